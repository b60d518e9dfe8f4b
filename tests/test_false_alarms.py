"""`contamination` is the share of new normal samples that is flagged, everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from estimators import PUBLIC, make
from sklearn.base import OutlierMixin
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.pipeline import make_pipeline

from skdeepad import (
    ConformalDetector,
    DeepSAD,
    DeepSVDD,
    DetectorEnsemble,
    HSCClassifier,
    KDClonerEstimator,
    KNNScorer,
    OpenSetClassifier,
    PANDAEstimator,
    PatchDetector,
)

SHARE, N, DRAWS = 0.1, 200, 6
BUDGET = {"max_steps": 20, "pretrain_steps": 5, "batch_size": 64}
DETECTORS = [public for public in PUBLIC if issubclass(public, OutlierMixin)]
WHITENED = KNNScorer(metric="mahalanobis")
# what learns from the training rows before it scores them
RECIPES = {
    "whitened neighbours": WHITENED,
    "whitened PANDA": PANDAEstimator(scorer=WHITENED, max_steps=20),
    "residuals": KDClonerEstimator(discrepancy="mahalanobis", max_steps=20),
    "cross-fitted": ConformalDetector(
        make_pipeline(PCA(40, whiten=True), KNNScorer()), cv=10
    ),
    "whitened member": DetectorEnsemble(
        [("pca", make_pipeline(PCA(40, whiten=True), KNNScorer()))]
    ),
    "foreign member": DetectorEnsemble(
        [("forest", IsolationForest(n_estimators=20))], scale="rank"
    ),
}
CASES = {public.__name__: make(public, **BUDGET) for public in DETECTORS} | RECIPES
DIGITS, CLASSES = load_digits(return_X_y=True)


def share_flagged(detector, draw, *, twice=False):
    """Fit to some digits; tell how many of the others are flagged."""
    rng = np.random.default_rng(draw)
    order = rng.permutation(len(DIGITS))
    train, new, others = order[:N], order[N:-50], order[-50:]
    X, y = DIGITS[train] / 16, CLASSES[train]
    if twice:
        X, y = np.concatenate([X, X[: N // 4]]), np.append(y, y[: N // 4])
    if isinstance(detector, HSCClassifier | DeepSAD):  # digits upside down
        X = np.concatenate([X, DIGITS[others, ::-1] / 16])
        y = np.repeat([1, -1], [len(X) - 50, 50])
    elif not isinstance(detector, OpenSetClassifier):
        y = None
    detector.set_params(contamination=SHARE)
    if "random_state" in detector.get_params():
        detector.set_params(random_state=draw)
    detector.fit(X, y)
    predict = getattr(detector, "predict_known", detector.predict)
    return (predict(DIGITS[new] / 16) == -1).mean(), len(new)


def check_share(detector, **options):
    """The mean over some draws is within four standard deviations of the share.

    The share below a threshold from n exchangeable scores is Beta distributed, of
    variance share (1 - share) / (n + 2); counting it on m new samples adds a
    binomial's. Detectors that train hold 40 of 200 samples out. `PatchDetector` scores
    held-out images by four fifths of its memory, and so flags fewer than asked for:
    half of them at least.
    """
    found, sizes = zip(
        *(share_flagged(detector, draw, **options) for draw in range(DRAWS)),
        strict=True,
    )
    n = 40 if hasattr(detector, "validation_fraction") else N
    deviation = np.sqrt(SHARE * (1 - SHARE) * (1 / (n + 2) + 1 / sizes[0]) / DRAWS)
    lowest = SHARE / 2 if isinstance(detector, PatchDetector) else SHARE
    assert lowest - 4 * deviation < np.mean(found) < SHARE + 4 * deviation


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_share_of_new_samples_flagged(name):
    check_share(CASES[name])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:About .* copies")
def test_share_flagged_with_a_quarter_of_the_samples_twice(name):
    check_share(CASES[name], twice=True)


def test_what_the_recipes_are_for():
    """Whitening before nearest neighbours flags far too many."""
    naive = make_pipeline(PCA(whiten=True), KNNScorer(contamination=SHARE))
    whitened = KNNScorer(metric="mahalanobis", contamination=SHARE)
    cross_fitted = ConformalDetector(naive, contamination=SHARE)
    X, new = np.random.default_rng(0).normal(size=(2, 200, 100))
    flagged = [
        (detector.fit(X).predict(new) == -1).mean()
        for detector in (naive, whitened, cross_fitted)
    ]
    assert flagged[0] > 4 * SHARE
    assert max(flagged[1:]) < 2 * SHARE


@pytest.mark.parametrize("n", [20, 50])
def test_few_samples_of_many_features(n):
    rng = np.random.default_rng(0)
    for detector in (WHITENED, DetectorEnsemble()):
        detector.set_params(contamination=SHARE)
        flagged = [
            detector.fit(rng.normal(size=(n, 100))).predict(rng.normal(size=(200, 100)))
            for _ in range(20)
        ]
        deviation = np.sqrt(SHARE * (1 - SHARE) * (1 / (n + 2) + 1 / 200) / 20)
        assert np.mean(np.equal(flagged, -1)) == pytest.approx(SHARE, abs=4 * deviation)


AUGMENTED = {
    "DeepSVDD": DeepSVDD("mnist_lenet", pretrain_steps=5, max_steps=30),
    "DeepSAD": DeepSAD("mnist_lenet", pretrain_steps=5, max_steps=30),
    "HSCClassifier": HSCClassifier("mnist_lenet", max_steps=30),
}


def noisy(image):
    """Nothing that is seen in scoring looks like it."""
    return image + 0.3 * image.new_empty(image.shape).normal_()


@pytest.mark.parametrize("name", AUGMENTED)
@pytest.mark.filterwarnings("ignore")
def test_augmentation_touches_no_threshold(name):
    detector = AUGMENTED[name].set_params(
        augmentation=noisy, image_shape=(8, 8), image_size=28, batch_size=64
    )
    flagged, m = zip(*(share_flagged(detector, draw) for draw in range(3)), strict=True)
    deviation = np.sqrt(SHARE * (1 - SHARE) * (1 / 42 + 1 / m[0]) / 3)
    assert np.mean(flagged) == pytest.approx(SHARE, abs=4 * deviation)
    # training rows are known by their content
    order = np.random.default_rng(2).permutation(len(DIGITS))
    scores = detector.score_samples(DIGITS[order[:N]] / 16)
    assert np.isin(scores, detector._held_out.scores).all()
