"""p-values, selections, dirty training data and drift: the rates that they promise."""

from __future__ import annotations

import pickle
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import beta, binom, false_discovery_control
from sklearn import config_context
from sklearn.base import BaseEstimator, clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import UnsetMetadataPassedError
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from skdeepad import (
    CentroidScorer,
    ConformalDetector,
    DeepSVDD,
    GaussianScorer,
    HSCClassifier,
    KNNScorer,
    MahalanobisFeatureScorer,
    RobustDetector,
    load,
    save,
)
from skdeepad.base import AnomalyDetector, threshold_below
from skdeepad.conformal import (
    DriftMonitor,
    false_alarm_interval,
    select_anomalies,
)
from skdeepad.conformal._drift import measure_images
from skdeepad.conformal._robust import share_standing_out
from skdeepad.detectors._refits import leaves_one_out

CHEAP = {
    "centroid": CentroidScorer(),
    "gaussian": GaussianScorer(),
    "neighbours": KNNScorer(n_neighbors=1),
    "split": ConformalDetector(KNNScorer(n_neighbors=1), method="split", cv=2),
}


class Given(AnomalyDetector):
    """Scores are the only column; held-out scores are those of training samples."""

    def fit(self, X, y=None):
        self.n_features_in_ = 1
        self._set_offset(np.ravel(X).astype(float))
        return self

    def score_samples(self, X):
        return np.ravel(X).astype(float)


def column(*values):
    return np.reshape(values, (-1, 1)).astype(float)


# ---------------------------------------------------------------------------- p-values


def test_p_values_by_hand():
    detector = Given(contamination=0.5).fit(column(1, 2, 2, 3))
    p = detector.p_values(column(0, 1, 1.5, 2, 2 * (1 - 1e-12), 3, 9, np.nan))
    assert_allclose(p, [0.2, 0.4, 0.4, 0.8, 0.8, 1, 1, np.nan])
    assert_array_equal(detector.held_out_scores_, [1, 2, 2, 3])


def test_p_values_depend_on_ranks_alone():
    rng = np.random.default_rng(0)
    X, new = -rng.exponential(size=(2, 50))
    plain, bent = Given().fit(column(X)), Given().fit(column(-(X**2)))
    assert_array_equal(plain.p_values(column(new)), bent.p_values(column(-(new**2))))


@pytest.mark.parametrize("n", [50, 200])
@pytest.mark.parametrize("name", CHEAP)
def test_p_values_under_the_null(name, n):
    """One new sample for each of 200 fits: they are independent."""
    rng = np.random.default_rng(n)
    detector = CHEAP[name].set_params(contamination=0.5)
    p = np.array(
        [
            detector.fit(rng.normal(size=(n, 4))).p_values(rng.normal(size=(1, 4)))[0]
            for _ in range(200)
        ]
    )
    n_held_out = len(detector.held_out_scores_)
    for t in (0.05, 0.1, 0.2):
        level = np.floor(t * (n_held_out + 1)) / (n_held_out + 1)  # p-values are steps
        low, high = binom.ppf([0.001, 0.999], 200, level)
        assert low <= (p <= t).sum() <= high


@pytest.mark.filterwarnings("ignore")
def test_trained_detectors_compare_with_unseen_images_alone():
    X = load_digits().data[:200] / 16
    detector = DeepSVDD(max_steps=5, pretrain_steps=2, random_state=0).fit(X)
    assert len(detector.held_out_scores_) == 40
    p = detector.p_values(load_digits().data[200:] / 16)
    assert p.min() >= 1 / 41 and p.max() <= 1


@pytest.mark.filterwarnings("ignore")
def test_no_p_values_without_held_out_scores():
    X = np.random.default_rng(0).normal(size=(40, 3))
    classifier = HSCClassifier(max_steps=2, random_state=0).fit(X)
    assert len(classifier.p_values(X)) == 40
    classifier.set_params(contamination=None).fit(X)
    with pytest.raises(ValueError, match="keeps no held-out scores"):
        classifier.p_values(X)
    old = Path(__file__).parent / "fixtures" / "0.1.0" / "KNNScorer.pickle"
    with pytest.raises(ValueError, match="Fit it again"):
        scorer = pickle.loads(old.read_bytes())
        scorer.p_values(np.zeros((1, scorer.n_features_in_)))


def test_training_samples_count_themselves():
    X = np.random.default_rng(0).normal(size=(30, 2))
    p = KNNScorer().fit(X).p_values(X)
    assert p.min() == pytest.approx(2 / 31)


@pytest.mark.parametrize("method", ["held_out", "split", "cv+"])
def test_state_is_kept(method):
    X, new = np.random.default_rng(0).normal(size=(2, 60, 3))
    detector = ConformalDetector(KNNScorer(), method=method, random_state=0)
    expected = detector.fit(X).p_values(new)
    file = BytesIO()
    save(detector, file)
    for again in (load(file), pickle.loads(pickle.dumps(detector))):
        assert_array_equal(again.p_values(new), expected)
        assert_array_equal(again.predict(X), detector.predict(X))


# ----------------------------------------------------------------- ConformalDetector


def test_cv_plus_against_the_definition():
    rng = np.random.default_rng(0)
    X, new = rng.normal(size=(40, 2)), 2 * rng.normal(size=(20, 2))
    detector = ConformalDetector(KNNScorer(), method="cv+", cv=4).fit(X)
    held_out = detector.score_samples(X)
    p = np.ones(len(new))
    for fitted in detector.estimators_:
        gallery = fitted._rows * fitted._scale + fitted._origin
        out = ~(np.abs(X[:, None] - gallery).max(axis=2) < 1e-9).any(axis=1)
        assert out.sum() == 10
        p += (held_out[out] <= fitted.score_samples(new)[:, None]).sum(axis=1)
    assert_allclose(detector.p_values(new), p / 41)


@pytest.mark.parametrize("method", ["held_out", "split", "cv+"])
def test_whole_pipelines_are_refitted(method):
    """A whitening that is learnt from too few samples must not spoil p-values."""
    rng = np.random.default_rng(0)
    pipeline = make_pipeline(PCA(whiten=True), KNNScorer())
    detector = ConformalDetector(
        pipeline, method=method, cv=10 if method != "split" else 2
    )
    new = rng.normal(size=(300, 50))
    shares = [
        (detector.fit(rng.normal(size=(200, 50))).p_values(new) <= 0.1).mean()
        for _ in range(3)
    ]
    assert 0.03 < np.mean(shares) < 0.15
    naive = pipeline.fit(rng.normal(size=(200, 50)))[-1]
    assert (naive.p_values(pipeline[:-1].transform(new)) <= 0.1).mean() > 0.2


def test_each_category_has_its_rates():
    rng = np.random.default_rng(0)

    def draw(n):
        kinds = rng.choice(["fine", "rough"], size=n, p=[0.7, 0.3])
        spread = np.where(kinds == "fine", 1, 3)[:, None]
        return spread * rng.normal(size=(n, 2)), kinds

    X, kinds = draw(400)
    new, new_kinds = draw(4000)
    detector = ConformalDetector(CentroidScorer(), contamination=0.1)
    pooled = detector.fit(X).predict(new)
    by_kind = detector.fit(X, categories=kinds).predict(new, new_kinds)
    p = detector.p_values(new, new_kinds)
    for kind in ("fine", "rough"):
        rows = new_kinds == kind
        n = (kinds == kind).sum()
        low, high = beta.ppf([0.001, 0.999], 0.1 * (n + 1), 0.9 * (n + 1))
        assert low - 0.02 < (by_kind[rows] == -1).mean() < high + 0.02
        assert low - 0.02 < (p[rows] <= 0.1).mean() < high + 0.02
    assert (pooled[new_kinds == "fine"] == -1).mean() < 0.02
    assert list(detector.category_offsets_) == ["fine", "rough"]
    with pytest.raises(ValueError, match="must be passed here"):
        detector.predict(new)
    with pytest.raises(ValueError, match="'odd', which fit has not seen"):
        detector.predict(new[:1], ["odd"])
    with pytest.warns(UserWarning, match="so few held-out scores: 'b' \\(3\\)"):
        detector.fit(X[:40], categories=["a"] * 37 + ["b"] * 3)


@pytest.mark.parametrize("method", ["held_out", "split", "cv+"])
def test_recalibrated_p_values(method):
    """Thresholds and p-values are of one set of held-out scores."""
    rng = np.random.default_rng(0)
    X, new = rng.normal(size=(2, 60, 3))
    good, more = 2 * rng.normal(size=(2, 50, 3))
    detector = ConformalDetector(KNNScorer(), method=method, contamination=0.1)
    detector.fit(X)
    assert (detector.p_values(more) <= 0.1).mean() > 0.4
    detector.recalibrate(good)
    scores = np.sort(detector.score_samples(good))
    expected = [(1 + (scores <= s).sum()) / 51 for s in detector.score_samples(new)]
    assert_allclose(detector.p_values(new), expected)
    assert_array_equal(detector.held_out_scores_, scores)
    assert detector.offset_ == threshold_below(scores, 0.1)
    assert (detector.p_values(more) <= 0.1).mean() < 0.3


def test_recalibrated_categories():
    rng = np.random.default_rng(0)
    X, new = rng.normal(size=(2, 80, 2))
    kinds = np.repeat(["a", "b"], 40)
    detector = ConformalDetector(KNNScorer(), method="cv+", contamination=0.1)
    detector.fit(X, categories=kinds)
    before = detector.p_values(new, kinds)
    offsets = dict(detector.category_offsets_)
    other = 3 * rng.normal(size=(60, 2))
    detector.recalibrate(other, categories=np.repeat(["b", "c"], 30))
    scores = detector.score_samples(other)
    assert list(detector.category_offsets_) == ["a", "b", "c"]
    assert detector.category_offsets_["a"] == offsets["a"]
    assert detector.category_offsets_["b"] == threshold_below(scores[:30], 0.1)
    assert detector.category_offsets_["c"] == threshold_below(scores[30:], 0.1)
    p = detector.p_values(new, kinds)
    assert_array_equal(p[:40], before[:40])  # of "a", which stays as it was
    found = detector.score_samples(new[40:])
    assert_allclose(p[40:], [(1 + (scores[:30] <= s).sum()) / 31 for s in found])
    detector.recalibrate(contamination=0.2)
    assert detector.category_offsets_["c"] == threshold_below(scores[30:], 0.2)
    for options in (
        {"X": other},
        {"categories": kinds},
        {"X": other, "categories": ["b"] * 60, "cost": {"false_alarm": 1, "miss": 1}},
    ):
        with pytest.raises(ValueError, match="categor"):
            detector.recalibrate(**options)


class AreaByCategory(BaseEstimator):
    """A scorer that hands categories on to the detector."""

    __metadata_request__score: ClassVar = {"categories": True}

    def __call__(self, detector, X, y, categories):
        scores = detector.decision_function(X, categories=categories)
        return roc_auc_score(y, scores)

    def score(self, X, y, categories):
        """Say what is asked for."""


def test_categories_are_routed():
    """Through pipelines, in predict and p-values' siblings, and in a grid search."""
    rng = np.random.default_rng(0)
    kinds = rng.permutation(np.repeat(["fine", "rough"], 60))
    y = rng.permutation(np.repeat([1, -1], [100, 20]))
    spread = np.where(kinds == "fine", 1, 5) * np.where(y == 1, 1, 4)
    X = spread[:, None] * rng.normal(size=(120, 2))
    detector = ConformalDetector(KNNScorer(), random_state=0)
    detector.fit(X, y, categories=kinds)
    with config_context(enable_metadata_routing=True):
        asking = clone(detector).set_fit_request(categories=True)
        asking.set_predict_request(categories=True)
        asking.set_decision_function_request(categories=True)
        model = make_pipeline(FunctionTransformer(), asking)
        model.fit(X, y, categories=kinds)
        for name in ("predict", "decision_function"):
            expected = getattr(detector, name)(X, categories=kinds)
            found = getattr(model, name)(X, categories=kinds)
            assert_array_equal(found, expected)
        search = GridSearchCV(
            model,
            {"conformaldetector__estimator__n_neighbors": [1, 3]},
            scoring=AreaByCategory(),
            cv=StratifiedKFold(3),
            error_score="raise",
        ).fit(X, y, categories=kinds)
        by_hand = []
        for train, test in StratifiedKFold(3).split(X, y):
            part = ConformalDetector(KNNScorer(n_neighbors=1), random_state=0)
            part.fit(X[train], y[train], categories=kinds[train])
            scores = part.decision_function(X[test], kinds[test])
            by_hand.append(roc_auc_score(y[test], scores))
        assert search.cv_results_["mean_test_score"][0] == pytest.approx(
            np.mean(by_hand)
        )
        best = search.best_estimator_  # search.predict hands nothing on
        assert set(best.predict(X, categories=kinds)) == {-1, 1}
        with pytest.raises(ValueError, match="categories must be passed"):
            search.predict(X)
        with pytest.raises(UnsetMetadataPassedError, match="categories"):
            make_pipeline(clone(detector)).fit(X, y, categories=kinds)


# --------------------------------------------------------------- selections, intervals


def test_selections_against_scipy():
    rng = np.random.default_rng(0)
    p = np.concatenate([rng.uniform(size=80), rng.uniform(0, 0.01, size=20)])
    for procedure in ("bh", "by"):
        adjusted = false_discovery_control(p, method=procedure)
        assert_array_equal(select_anomalies(p, 0.1, procedure), adjusted <= 0.1)
    pi_0 = (1 + (p > 0.5).sum()) / (0.5 * len(p))
    adjusted = false_discovery_control(p)
    assert_array_equal(select_anomalies(p, 0.1, "storey"), adjusted <= 0.1 / pi_0)
    holes = np.concatenate([[np.nan], p, [np.nan]])
    assert_array_equal(select_anomalies(holes)[1:-1], select_anomalies(p))
    assert not select_anomalies(holes)[[0, -1]].any()
    assert not select_anomalies([np.nan]).any()


def test_too_few_held_out_scores_are_told():
    rng = np.random.default_rng(0)
    new = np.concatenate([rng.normal(size=(99, 2)), [[9, 9]]])
    few = KNNScorer().fit(rng.normal(size=(200, 2))).p_values(new)
    with pytest.warns(UserWarning, match="1 of 100 .* all 200 .* has 999"):
        assert not select_anomalies(few).any()
    enough = KNNScorer().fit(rng.normal(size=(1000, 2))).p_values(new)
    assert select_anomalies(enough)[-1]
    select_anomalies([0.3, 0.5, 0.9])  # nothing to warn of
    for wrong in ([0.0, 0.5], [1.5]):
        with pytest.raises(ValueError, match="must hold p-values"):
            select_anomalies(wrong)
    with pytest.raises(ValueError, match="alpha"):
        select_anomalies([0.5], alpha=1.0)


@pytest.mark.filterwarnings("ignore:Nothing is selected")
def test_discoveries():
    """The false discovery rate holds; held-out scores buy the power of more images."""
    rng = np.random.default_rng(0)
    detectors = {
        "held out": GaussianScorer(),
        "split": ConformalDetector(GaussianScorer(), method="split", cv=2),
    }
    power = {}
    for name, detector in detectors.items():
        false, found = {0.1: [], 0.2: []}, {0.1: [], 0.2: []}
        for _ in range(100):
            new = rng.normal(size=(100, 20))
            new[:10] += 0.9  # 4 standard deviations, in 20 dimensions
            p = detector.fit(rng.normal(size=(200, 20))).p_values(new)
            for alpha in false:
                selected = select_anomalies(p, alpha)
                false[alpha].append(selected[10:].sum() / max(1, selected.sum()))
                found[alpha].append(selected[:10].mean())
        for alpha, rates in false.items():
            assert np.mean(rates) < alpha + 3 * np.std(rates) / 10
        power[name] = np.mean(found[0.1])
    assert power["held out"] > 2 * power["split"] > 0


@pytest.mark.parametrize("n", [30, 200])
def test_intervals_cover_the_rate(n):
    """Scores are uniform: a threshold is its own false alarm rate."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        detector = Given(contamination=0.1).fit(column(rng.uniform(size=n)))
        low, high = false_alarm_interval(detector, 0.9)
        covered.append(low <= detector.offset_ <= high)
    assert binom.ppf(0.0005, 400, 0.9) <= sum(covered) <= binom.ppf(0.9995, 400, 0.9)
    expected = beta.interval(0.9, 0.1 * (n + 1), 0.9 * (n + 1))
    assert_allclose((low, high), expected)


# --------------------------------------------------------------------- RobustDetector


@pytest.fixture(scope="module")
def dirty_digits():
    """Zeros, a tenth of the training samples other digits; which ones are."""
    X, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    zeros = rng.permutation(np.flatnonzero(y == 0))
    others = rng.permutation(np.flatnonzero(y != 0))
    train = np.r_[zeros[:90], others[:10]]
    return X[train] / 16, X[zeros[90:]] / 16, X[others[10:300]] / 16


@pytest.mark.parametrize("share", [0.1, "auto"])
@pytest.mark.parametrize(
    "scorer", [GaussianScorer(), KNNScorer()], ids=["gauss", "knn"]
)
def test_dirty_training_samples(scorer, share, dirty_digits):
    X, good, bad = dirty_digits
    scorer = scorer.set_params(contamination=0.1)
    clean = scorer.fit(X[:90])
    expected = (clean.predict(bad) == -1).mean()
    detector = RobustDetector(
        scorer, training_contamination=share, contamination=0.1, random_state=0
    ).fit(X)
    assert (detector.predict(bad) == -1).mean() > 0.9 * expected
    assert (detector.predict(good) == -1).mean() < 0.2
    assert len(set(detector.suspects_[:10]) & set(range(90, 100))) >= 9
    assert detector.training_contamination_ == pytest.approx(0.1, abs=0.04)
    assert detector.inlier_mask_.sum() == round(
        100 - 100 * detector.training_contamination_
    )
    assert not detector.inlier_mask_[detector.suspects_[:5]].any()
    assert (detector.p_values(bad) <= 0.1).mean() > 0.9 * expected
    file = BytesIO()
    save(detector, file)
    assert_array_equal(load(file).predict(good), detector.predict(good))


def test_clean_training_samples_stay():
    rng = np.random.default_rng(0)
    new, shares, flagged = rng.normal(size=(1000, 5)), [], []
    for _ in range(5):
        detector = RobustDetector(GaussianScorer(), random_state=0)
        detector.fit(rng.normal(size=(300, 5)))
        shares.append(detector.training_contamination_)
        flagged.append((detector.predict(new) == -1).mean())
    assert shares.count(0) >= 4  # no more stand out than by chance
    assert 0.03 < np.mean(flagged) < 0.07


def test_suspects_are_scored_as_new_samples(dirty_digits):
    """By one fit to the others, where a detector leaves out its own samples."""
    X, *_ = dirty_digits
    detector = RobustDetector(KNNScorer(), training_contamination=0.1).fit(X)
    kept = detector.inlier_mask_
    alone = KNNScorer().fit(X[kept])
    assert_allclose(detector.score_samples(X), alone.score_samples(X))
    forest = IsolationForest(n_estimators=20, random_state=0)
    folds = RobustDetector(forest, training_contamination=0.1).fit(X)
    plain = folds.estimator_.score_samples(X)
    assert not np.isclose(folds.score_samples(X), plain).any()
    assert folds.inlier_mask_.sum() == 90


def test_what_leaves_one_out():
    pca = PCA(2)
    for detector, expected in (
        (KNNScorer(), True),
        (MahalanobisFeatureScorer(), True),
        (make_pipeline(FunctionTransformer(), GaussianScorer()), True),
        (make_pipeline(pca, GaussianScorer()), False),
        (DeepSVDD(), False),
        (IsolationForest(), False),
    ):
        assert leaves_one_out(detector) == expected


def test_share_that_stands_out():
    rng = np.random.default_rng(0)
    good = -np.exp(0.1 * rng.normal(size=900))
    assert share_standing_out(good) == 0
    assert share_standing_out(np.append(good, -np.full(100, 3.0))) == pytest.approx(
        0.1, abs=0.015
    )
    assert share_standing_out(np.array([-1.0, -2.0])) == 0


# ----------------------------------------------------------------------- DriftMonitor


def monitor(X, **options):
    scorer = FrozenEstimator(GaussianScorer().fit(X))
    return DriftMonitor(scorer, random_state=0, **options).fit(X)


def test_false_alarms_over_streams():
    """At most alpha of the streams, by Ville's inequality."""
    rng = np.random.default_rng(0)
    alarms = 0
    for i in range(100):
        X = rng.normal(size=(100, 3))
        watch = monitor(X, alpha=0.1).set_params(random_state=i).fit(X)
        alarms += watch.update(rng.normal(size=(500, 3))).alarm_
    assert alarms <= binom.ppf(0.999, 100, 0.1)


def test_martingale_by_hand():
    """Against sums of products, with p-values that are known."""
    watch = DriftMonitor(
        FrozenEstimator(Given().fit(column(1, 2, 3, 4))), random_state=0
    )
    watch.fit(column(1, 2, 3, 4))
    rng = pickle.loads(pickle.dumps(watch._rng))
    watch.update(column(0.5, 9, 2))
    u = rng.uniform(size=3)
    p = np.array([u[0] / 5, (5 + u[1]) / 6, (2 + 2 * u[2]) / 7])
    exponents = np.array([0.25, 0.5, 0.75])
    bets = [[e * q ** (e - 1) for e in exponents] for q in p]
    bets = np.hstack([bets, [[e * (1 - q) ** (e - 1) for e in exponents] for q in p]])
    left = 1 / np.log2(np.arange(1, 5) + 1)
    for t in range(1, 4):
        won = sum(
            (left[k] - left[k + 1]) * bets[k:t].prod(axis=0).mean() for k in range(t)
        )
        assert watch.history_[t - 1, 0] == pytest.approx(np.log10(left[t] + won))


@pytest.mark.parametrize("keep", ["pickle", "save", "none"])
def test_a_stream_goes_on(keep):
    rng = np.random.default_rng(0)
    X, stream = rng.normal(size=(60, 3)), rng.normal(size=(90, 3))
    stream[60:] *= 4
    whole = monitor(X).update(stream)
    parts = monitor(X)
    for part in np.split(stream, 3):
        if keep == "pickle":
            parts = pickle.loads(pickle.dumps(parts))
        elif keep == "save":
            file = BytesIO()
            save(parts, file)
            parts = load(file)
        parts.update(part)
    assert_allclose(parts.history_, whole.history_, atol=1e-9)
    assert whole.alarm_ and parts.alarm_at_ == whole.alarm_at_ >= 60
    assert f"alarm at sample {whole.alarm_at_}" in parts.report()


def test_brighter_images(textures):
    """All patches of one photograph; those that come later are a tenth brighter."""
    rng = np.random.default_rng(0)
    images = rng.normal(110, 4, size=(160, 1, 1)) + rng.normal(
        0, 20, size=(160, 32, 32)
    )
    images = images.clip(0, 255).astype(np.uint8)
    scorer = MahalanobisFeatureScorer(image_size=32, stages="stage2")
    watch = DriftMonitor(scorer, random_state=0).fit(images[:100])
    assert watch.signals_ == ("score", "brightness", "sharpness", "size")
    watch.update(images[100:130])
    assert not watch.alarm_
    watch.update((images[130:] * 1.1).clip(0, 255).astype(np.uint8))
    assert watch.alarm_ and watch.history_[-1, 1] > 2
    axes = watch.plot()
    assert len(axes.lines) == 6


def test_measures_of_images(image_files):
    steps = np.zeros((3, 128, 128))
    steps[1:, :, 64:] = 1
    steps[2, ::2] = 0
    found = measure_images(steps)
    assert_allclose(found["brightness"], [0, 0.5, 0.25])
    assert found["sharpness"][0] == 0 < found["sharpness"][1] < found["sharpness"][2]
    assert_array_equal(found["size"], [128, 128, 128])
    assert measure_images(np.zeros((3, 5))) == {}
    files = measure_images(image_files.train[:3])
    assert np.isfinite(list(files.values())).all()


def test_errors_of_the_monitor():
    X = np.random.default_rng(0).normal(size=(40, 2))
    with pytest.raises(ValueError, match="Wrap it in a ConformalDetector"):
        DriftMonitor(PCAScores()).fit(X)


class PCAScores(PCA):
    """Scores, but no held-out ones."""


def test_agrees_with_nonconform():
    """Their split p-values are ours; nonconform needs Python 3.12."""
    pytest.importorskip("nonconform")
    from nonconform import ConformalDetector as Theirs
    from nonconform import Split
    from pyod.models.knn import KNN

    rng = np.random.default_rng(0)
    X, new = rng.normal(size=(400, 3)), 1.5 * rng.normal(size=(300, 3))
    theirs = Theirs(KNN(n_neighbors=1), strategy=Split(n_calib=0.5), seed=0).fit(X)
    ours = ConformalDetector(KNNScorer(n_neighbors=1), method="split", cv=2).fit(X)
    shares = [
        (np.asarray(p) <= 0.1).mean()
        for p in (theirs.compute_p_values(new), ours.p_values(new))
    ]
    assert shares[0] == pytest.approx(shares[1], abs=0.1)
