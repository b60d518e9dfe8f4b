"""The splitter: what it trains on, what it tests on, and inside GridSearchCV."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from sklearn import config_context
from sklearn.base import clone
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.model_selection import (
    GridSearchCV,
    KFold,
    cross_val_predict,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM

from skdeepad import DeepSVDD, KNNScorer
from skdeepad.metrics import anomaly_roc_auc, anomaly_roc_auc_score
from skdeepad.model_selection import OneClassKFold, compare_detectors


@settings(deadline=None, max_examples=60)
@given(data=st.data(), n_splits=st.integers(2, 6), shuffle=st.booleans())
def test_partition(data, n_splits, shuffle):
    n_normal = data.draw(st.integers(n_splits, 20))
    n_anomalies = data.draw(st.integers(0, 20))
    y = np.array(data.draw(st.permutations([1] * n_normal + [-1] * n_anomalies)))
    random_state = data.draw(st.integers(0, 9)) if shuffle else None
    cv = OneClassKFold(n_splits, shuffle=shuffle, random_state=random_state)
    folds = list(cv.split(np.zeros((y.size, 2)), y))

    assert len(folds) == cv.get_n_splits() == n_splits
    for train, test in folds:
        assert (y[train] == 1).all()
        # Train and test hold every normal row once.
        kept = np.sort(np.r_[train, test[y[test] == 1]])
        np.testing.assert_array_equal(kept, np.flatnonzero(y == 1))
        assert (np.diff(test) > 0).all()
    tested = np.bincount(np.concatenate([test for _, test in folds]), minlength=y.size)
    times = 1 if n_anomalies >= n_splits else n_splits
    np.testing.assert_array_equal(tested, np.where(y == 1, 1, times))
    for label in [1, -1]:
        sizes = [(y[test] == label).sum() for _, test in folds]
        assert max(sizes) - min(sizes) <= 1
    for (train, test), (again, same) in zip(
        folds, cv.split(y, pd.Series(y)), strict=True
    ):
        np.testing.assert_array_equal(train, again)
        np.testing.assert_array_equal(test, same)


def test_by_hand():
    y = [1, -1, 1, 1, -1, 1, -1]
    folds = [(list(a), list(b)) for a, b in OneClassKFold(2).split(y, y)]
    assert folds == [([3, 5], [0, 1, 2, 4]), ([0, 2], [3, 5, 6])]
    folds = [(list(a), list(b)) for a, b in OneClassKFold(4).split(y, y)]
    assert folds[1] == ([0, 3, 5], [1, 2, 4, 6])


@pytest.mark.parametrize("y", [None, np.ones(7)])
def test_without_anomalies_it_is_kfold(y):
    X = np.zeros((7, 1))
    cv = {"n_splits": 3, "shuffle": True, "random_state": 0}
    for ours, theirs in zip(
        OneClassKFold(**cv).split(X, y), KFold(**cv).split(X), strict=True
    ):
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])


def test_shuffle():
    y = np.repeat([1, -1], 50)

    def tests(random_state):
        cv = OneClassKFold(shuffle=True, random_state=random_state)
        return np.concatenate([test for _, test in cv.split(y, y)])

    np.testing.assert_array_equal(tests(0), tests(0))
    assert (tests(0) != tests(1)).any()
    random_state = np.random.RandomState(0)
    assert (tests(random_state) != tests(random_state)).any()


def test_errors():
    X = np.zeros((6, 1))
    with pytest.raises(ValueError, match="If 1 marks anomalies"):
        next(OneClassKFold().split(X, [0, 1, 0, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"n_splits=5 needs .* normal rows .* got 4"):
        next(OneClassKFold().split(X, [1, 1, 1, 1, -1, -1]))
    with pytest.raises(ValueError, match="n_splits=7"):
        next(OneClassKFold(7).split(X))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        next(OneClassKFold().split(X, np.ones(7)))
    with pytest.raises(ValueError, match="n_splits=2 or more"):
        OneClassKFold(1)


def test_groups_are_not_parted():
    groups = np.repeat(["a", "b", "c", "d", "e"], 4)
    y = np.ones(20, dtype=int)
    y[[0, 5, 16, 17, 18, 19]] = -1  # of e, there are anomalies only
    X = np.zeros((20, 1))
    for shuffle in (False, True):
        cv = OneClassKFold(4, shuffle=shuffle, random_state=0 if shuffle else None)
        tested = []
        for train, test in cv.split(X, y, groups):
            assert (y[train] == 1).all()
            assert not set(groups[train]) & set(groups[test])
            assert set(groups[test]) > {"e"}  # in all, as there is one such group
            tested += [i for i in test if groups[i] != "e"]
        assert sorted(tested) == list(range(16))
    with pytest.raises(ValueError, match="groups of them, got 4"):
        next(OneClassKFold(5).split(X, y, groups))


def test_groups_are_routed_to_the_splitter_and_to_fit():
    from sklearn import config_context
    from sklearn.model_selection import cross_validate

    from skdeepad import KNNScorer

    rng = np.random.default_rng(0)
    X, groups = rng.normal(size=(60, 2)), np.repeat(np.arange(20), 3)
    y = np.r_[np.ones(54, dtype=int), -np.ones(6, dtype=int)]
    with config_context(enable_metadata_routing=True):
        found = cross_validate(
            KNNScorer(contamination=0.2).set_fit_request(groups=True),
            *(X, y),
            cv=OneClassKFold(3),
            scoring="roc_auc",
            params={"groups": groups},
            return_indices=True,
        )
    for train, test in zip(*found["indices"].values(), strict=True):
        assert not set(groups[train]) & set(groups[test])


@pytest.mark.parametrize("method", ["predict", "decision_function"])
def test_every_method_gives_out_of_fold_predictions(method, recwarn):
    from skdeepad import KNNScorer

    rng = np.random.default_rng(0)
    X = np.r_[rng.normal(size=(60, 2)), rng.normal(8, 1, (12, 2))]
    y = np.repeat([1, -1], [60, 12])
    cv = OneClassKFold(3, shuffle=True, random_state=0)
    found = cross_val_predict(KNNScorer(), X, y, cv=cv, method=method)
    for train, test in cv.split(X, y):
        fitted = KNNScorer().fit(X[train])
        np.testing.assert_array_equal(found[test], getattr(fitted, method)(X[test]))
    assert not [w for w in recwarn if "ignored" in str(w.message)]


def test_repr():
    expected = "OneClassKFold(n_splits=3, random_state=0, shuffle=True)"
    assert repr(OneClassKFold(3, shuffle=True, random_state=0)) == expected
    assert repr(OneClassKFold()).startswith("OneClassKFold(n_splits=5,")


class Spy(OneClassSVM):
    """Refuses to be fitted on an anomaly."""

    def fit(self, X, y=None):
        assert (y == 1).all()
        return super().fit(X, y)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    X = np.r_[rng.normal(0, 1, (60, 2)), rng.normal(2, 1, (20, 2))]
    y = np.repeat([1, -1], [60, 20])
    order = rng.permutation(80)
    return X[order], y[order]


@pytest.mark.parametrize("routing", [False, True])
def test_grid_search_never_fits_on_an_anomaly(data, routing):
    X, y = data
    gammas = [1e-3, 0.3, 100.0]
    search = GridSearchCV(
        Spy(),
        {"gamma": gammas},
        cv=OneClassKFold(4),
        scoring=anomaly_roc_auc,
        refit=False,
        error_score="raise",
    )
    with config_context(enable_metadata_routing=routing):
        search.fit(X, y)

    # The same by hand: quarters of each kind, in order, and the Mann-Whitney U.
    normals, anomalies = np.split(X[y == 1], 4), np.split(X[y == -1], 4)
    expected = []
    for gamma in gammas:
        scores = []
        for i in range(4):
            train = np.concatenate(normals[:i] + normals[i + 1 :])
            detector = OneClassSVM(gamma=gamma).fit(train)
            u = mannwhitneyu(
                detector.decision_function(normals[i]),
                detector.decision_function(anomalies[i]),
            ).statistic
            scores.append(u / (15 * 5))
        expected.append(np.mean(scores))
    np.testing.assert_allclose(search.cv_results_["mean_test_score"], expected)
    assert search.best_params_ == {"gamma": gammas[int(np.argmax(expected))]}
    assert search.best_score_ > 0.8


def test_cross_val_predict_scores_every_row_out_of_fold(data):
    X, y = data
    forest = IsolationForest(n_estimators=10, random_state=0)
    folds = list(OneClassKFold(4).split(X, y))
    scores = cross_val_predict(forest, X, cv=folds, method="decision_function")
    labels = cross_val_predict(forest, X, y, cv=OneClassKFold(4))
    for train, test in folds:
        fitted = clone(forest).fit(X[train])
        np.testing.assert_array_equal(scores[test], fitted.decision_function(X[test]))
        np.testing.assert_array_equal(labels[test], fitted.predict(X[test]))


def test_few_anomalies_leave_no_fold_undefined(data):
    X, y = data
    few = np.r_[np.flatnonzero(y == 1), np.flatnonzero(y == -1)[:2]]
    run = {"cv": OneClassKFold(5), "scoring": anomaly_roc_auc, "error_score": "raise"}
    assert np.isfinite(cross_val_score(Spy(), X[few], y[few], **run)).all()
    with pytest.warns(UndefinedMetricWarning):
        assert np.isnan(cross_val_score(Spy(), X[y == 1], y[y == 1], **run)).all()


# comparing detectors


@pytest.fixture
def groups_of_points():
    rng = np.random.default_rng(0)
    X_train, X_test = rng.normal(size=(60, 4)), rng.normal(size=(50, 4))
    kinds = np.repeat(["good", "near", "far"], [30, 10, 10])
    X_test[30:] += np.repeat([[1.0], [4.0]], 10, axis=0)
    return X_train, X_test, np.where(kinds == "good", 1, -1), kinds


def test_comparison_gives_a_row_for_each_detector_seed_and_kind(groups_of_points):
    X_train, X_test, y_test, kinds = groups_of_points
    detectors = {
        "knn": KNNScorer(),
        "forest": IsolationForest(n_estimators=20, contamination=0.1),
        "svdd": make_pipeline(
            StandardScaler(), DeepSVDD(pretrain_steps=0, max_steps=2)
        ),
    }
    table = compare_detectors(
        detectors, X_train, X_test, y_test, kinds_test=kinds, n_seeds=2
    )
    assert list(table.columns) == [
        *("detector", "seed", "kind", "auroc", "found", "false_alarms"),
        *("fit_seconds", "score_seconds"),
    ]
    rows = table.set_index(["detector", "seed", "kind"])
    assert len(rows) == 3 * 2 * 3
    for name, detector in detectors.items():
        for seed in range(2):
            names = [n for n in detector.get_params() if n.endswith("random_state")]
            fitted = clone(detector).set_params(**dict.fromkeys(names, seed))
            decision = fitted.fit(X_train).decision_function(X_test)
            for kind in ("all", "near", "far"):
                row = rows.loc[(name, seed, kind)]
                some = (kinds == kind) | (kinds == "good") | (kind == "all")
                wanted = anomaly_roc_auc_score(y_test[some], decision[some])
                assert row["auroc"] == wanted
                flagged = fitted.predict(X_test) == -1
                assert row["found"] == flagged[some & (y_test == -1)].mean()
                assert row["false_alarms"] == flagged[:30].mean()
                assert row["fit_seconds"] > 0
    forest = table[(table["detector"] == "forest") & (table["kind"] == "all")]
    assert forest["auroc"].nunique() == 2  # each seed counts
    assert clone(detectors["forest"]).random_state is None  # left as it was


def test_comparison_tells_what_it_cannot_compare(groups_of_points, monkeypatch):
    X_train, X_test, y_test, _ = groups_of_points
    knn = {"knn": KNNScorer()}
    with pytest.raises(ValueError, match=r"normal samples \(\+1\) and anomalies"):
        compare_detectors(knn, X_train, X_test, np.ones(50))
    with pytest.raises(ValueError, match=r"y must be \+1"):
        compare_detectors(knn, X_train, X_test, y_test == -1)
    with pytest.raises(ValueError, match="n_seeds=0"):
        compare_detectors(knn, X_train, X_test, y_test, n_seeds=0)
    with pytest.raises(ValueError, match="inconsistent"):
        compare_detectors(knn, X_train, X_test, y_test, kinds_test=["a"])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        compare_detectors(knn, X_train, X_test, y_test)


def test_comparison_leaves_out_samples_without_a_score(groups_of_points):
    class Skipping(KNNScorer):
        def score_samples(self, X):
            scores = super().score_samples(X)
            scores[[0, -1]] = np.nan
            return scores

    X_train, X_test, y_test, _ = groups_of_points
    skipped = compare_detectors({"a": Skipping()}, X_train, X_test, y_test, n_seeds=1)
    fewer = compare_detectors(
        {"a": KNNScorer()}, X_train, X_test[1:-1], y_test[1:-1], n_seeds=1
    )
    columns = ["auroc", "found", "false_alarms"]
    pd.testing.assert_frame_equal(skipped[columns], fewer[columns])
