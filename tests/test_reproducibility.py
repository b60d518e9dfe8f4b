"""What is promised bit for bit, and what to a relative 1e-12."""

from __future__ import annotations

import numpy as np
import pytest
from estimators import PUBLIC, make
from sklearn.base import OutlierMixin
from threadpoolctl import threadpool_limits

import skdeepad
from skdeepad import BackboneFeatures, DetectorEnsemble, KNNScorer, OpenSetClassifier
from skdeepad.base import threshold_below

SMALL = {"image_size": 32, "batch_size": 8, "max_steps": 3, "pretrain_steps": 2}
DETECTORS = [public for public in PUBLIC if issubclass(public, OutlierMixin)]
SCORERS = [
    public for public in DETECTORS if public.__module__.startswith("skdeepad.sc")
]
# of three that have all of their code in common, RotNet is the quickest
ALIKE = [skdeepad.GEOMDetector, skdeepad.MHRotDetector]
ON_IMAGES = [public for public in DETECTORS if public not in SCORERS + ALIKE]


def splits(scores, X):
    """Score in parts of several sizes, and backwards."""
    yield np.concatenate([scores(X[i : i + 1]) for i in range(len(X))])
    yield np.concatenate([scores(X[:5]), scores(X[5:])])
    yield scores(X[::-1])[::-1]
    for n_threads in (1, 2):
        with threadpool_limits(n_threads, user_api="blas"):
            yield scores(X)


def fit(detector, X):
    """Fit to half of X; for those that need labels, to labels without a meaning."""
    if "random_state" in detector.get_params():
        detector.set_params(random_state=0)
    y = np.arange(len(X)) % 2 if isinstance(detector, OpenSetClassifier) else None
    return detector.fit(X, y)


def test_features_bit_for_bit(textures):
    features = BackboneFeatures(
        stages=("stage2", "stage7"), image_size=32, batch_size=8
    ).fit(textures.X_train)
    X = textures.X_test
    whole = features.transform(X)
    for i in range(len(X)):
        np.testing.assert_array_equal(features.transform(X[i : i + 1])[0], whole[i])
    np.testing.assert_array_equal(features.transform(X[::-1])[::-1], whole)


def test_features_of_large_images_bit_for_bit(textures):
    # more pixels than pass the network together
    features = BackboneFeatures(image_size=224, batch_size=16).fit(textures.X_train)
    X = textures.X_test[:6]
    whole = features.transform(X)
    for i in range(len(X)):
        np.testing.assert_array_equal(features.transform(X[i : i + 1])[0], whole[i])
    np.testing.assert_array_equal(features.transform(X[::-1])[::-1], whole)


@pytest.mark.parametrize("public", ON_IMAGES, ids=lambda public: public.__name__)
@pytest.mark.filterwarnings("ignore")
def test_scores_of_images(public, textures):
    detector = fit(make(public, **SMALL), textures.X_train)
    X = np.concatenate([textures.X_test, textures.X_train[:4]])
    expected, predicted = detector.score_samples(X), detector.predict(X)
    for scores in splits(detector.score_samples, X):
        np.testing.assert_allclose(scores, expected, rtol=1e-12, atol=1e-12)
    for alone in splits(detector.predict, X):
        np.testing.assert_array_equal(alone, predicted)


@pytest.mark.parametrize(
    "scorer",
    [*(make(public) for public in SCORERS), KNNScorer(metric="mahalanobis"),
     DetectorEnsemble()],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_scores_of_vectors(scorer):
    rng = np.random.default_rng(0)
    train, new = rng.normal(size=(60, 30)) + 5, rng.normal(size=(20, 30)) + 5
    scorer = fit(scorer, train)
    X = np.concatenate([new, train[:10]])
    for scores in splits(scorer.score_samples, X):
        np.testing.assert_allclose(
            scores, scorer.score_samples(X), rtol=1e-12, atol=1e-12
        )
    for alone in splits(scorer.predict, X):
        np.testing.assert_array_equal(alone, scorer.predict(X))


# the threshold


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("n", [1, 2, 19, 20, 99, 100])
def test_a_threshold_is_on_no_score(n, share):
    scores = np.random.default_rng(n).normal(size=n)
    threshold = threshold_below(scores, share)
    assert (scores < threshold).sum() == min(int(share * (n + 1) + 1e-9), n - 1)
    assert abs(scores - threshold).min() > 1e-9 * abs(threshold)


def test_rounding_moves_no_score_across_the_threshold():
    rng = np.random.default_rng(0)
    scores = rng.integers(-20, 0, size=200) / 7  # most are tied
    rounded = scores * (1 + rng.normal(size=200) * 1e-14)
    for share in (0.01, 0.05, 0.2, 0.5):
        threshold = threshold_below(scores, share)
        assert threshold == pytest.approx(threshold_below(rounded, share), rel=1e-6)
        np.testing.assert_array_equal(scores < threshold, rounded < threshold)
        assert (scores < threshold).mean() <= share


def test_too_few_samples_for_the_share_are_told():
    X = np.random.default_rng(0).normal(size=(20, 2))
    with pytest.warns(UserWarning, match=r"about 4\.8 % .*at least 99 need held-out"):
        KNNScorer(contamination=0.01).fit(X)
