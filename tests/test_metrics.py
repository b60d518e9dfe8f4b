"""Metrics and scorers against hand-worked numbers, brute force and scipy."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter, label
from scipy.stats import mannwhitneyu
from sklearn.base import OutlierMixin
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import get_scorer, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_validate
from sklearn.neighbors import KernelDensity, LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM

from skdeepad.metrics import (
    anomaly_average_precision,
    anomaly_average_precision_score,
    anomaly_fpr_at_tpr_score,
    anomaly_roc_auc,
    anomaly_roc_auc_score,
    aupro_score,
    neg_anomaly_fpr95,
    pixel_roc_auc_score,
)

METRICS = [
    anomaly_roc_auc_score,
    anomaly_average_precision_score,
    anomaly_fpr_at_tpr_score,
]
SCORERS = {
    "roc_auc": anomaly_roc_auc,
    "average_precision": anomaly_average_precision,
    "fpr95": neg_anomaly_fpr95,
}


@st.composite
def problems(draw):
    """Labels of both classes, with scores from few values so that many tie."""
    labels = draw(st.lists(st.sampled_from([1, -1]), max_size=30))
    y_true = np.array(draw(st.permutations([1, -1, *labels])))
    values = st.lists(st.integers(0, 6), min_size=y_true.size, max_size=y_true.size)
    return y_true, np.array(draw(values)) / 4 - 1


def brute_force(y_true, y_score):
    """(tpr, fpr, precision) at each threshold, from the strictest on."""
    normal, anomaly = y_score[y_true == 1], y_score[y_true == -1]
    for threshold in np.unique(y_score):
        detected, flagged = (anomaly <= threshold).sum(), (normal <= threshold).sum()
        yield (
            detected / anomaly.size,
            flagged / normal.size,
            detected / (detected + flagged),
        )


@settings(deadline=None, max_examples=60)
@given(problems())
def test_roc_auc_is_the_mann_whitney_statistic(problem):
    y_true, y_score = problem
    normal, anomaly = y_score[y_true == 1], y_score[y_true == -1]
    u = mannwhitneyu(normal, anomaly, method="asymptotic").statistic
    expected = u / (normal.size * anomaly.size)
    assert anomaly_roc_auc_score(y_true, y_score) == pytest.approx(expected)


@settings(deadline=None, max_examples=60)
@given(problems())
def test_average_precision_by_brute_force(problem):
    recall, expected = 0.0, 0.0
    for tpr, _, precision in brute_force(*problem):
        expected += (tpr - recall) * precision
        recall = tpr
    assert anomaly_average_precision_score(*problem) == pytest.approx(expected)


@settings(deadline=None, max_examples=60)
@given(problems(), st.floats(0.01, 1) | st.sampled_from([0.07, 0.5, 0.9, 0.95, 1]))
def test_fpr_at_tpr_by_brute_force(problem, tpr):
    points = brute_force(*problem)
    expected = min(fpr for detected, fpr, _ in points if detected >= tpr)
    assert anomaly_fpr_at_tpr_score(*problem, tpr=tpr) == expected


def test_by_hand():
    # From the lowest score on: anomaly, normal, anomaly, normal, normal.
    y_true, y_score = [1, -1, 1, -1, 1], [0.7, -0.2, 0.1, 0.3, 0.9]
    assert anomaly_roc_auc_score(y_true, y_score) == pytest.approx(5 / 6)
    expected = (1 / 1 + 2 / 3) / 2
    assert anomaly_average_precision_score(y_true, y_score) == pytest.approx(expected)
    assert anomaly_fpr_at_tpr_score(y_true, y_score) == pytest.approx(1 / 3)
    assert anomaly_fpr_at_tpr_score(y_true, y_score, tpr=0.5) == 0
    # The normal sample that ties with the second anomaly cannot be spared.
    y_score[0] = 0.3
    assert anomaly_fpr_at_tpr_score(y_true, y_score) == pytest.approx(2 / 3)


def test_share_of_detected_anomalies_is_counted_exactly():
    # 0.07 * 100 rounds to more than 7, yet 7 anomalies of 100 are 7 %.
    y_true = np.r_[np.full(100, -1), np.ones(100, int)]
    y_score = np.r_[np.arange(100), np.full(100, 6.5)]
    assert anomaly_fpr_at_tpr_score(y_true, y_score, tpr=0.07) == 0
    assert anomaly_fpr_at_tpr_score(y_true, y_score, tpr=0.08) == 1
    # Ten ties of one of each kind: the ROC curve is straight, every point counts.
    y_true, y_score = [1, -1] * 10, np.repeat(np.arange(10), 2)
    assert anomaly_fpr_at_tpr_score(y_true, y_score, tpr=0.3) == 0.3


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "convert", [list, pd.Series, lambda a: a.astype(np.uint8), lambda a: a[:, None]]
)
def test_containers_and_types_of_scores(metric, convert):
    y_true, y_score = np.array([1, -1, 1, -1]), np.array([3, 0, 1, 2])
    expected = metric(y_true, y_score)
    assert type(expected) is float
    assert metric(y_true.tolist(), convert(y_score)) == expected
    assert metric(pd.Series(y_true, index=[7, 7, 8, 9]), convert(y_score)) == expected


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("y_true", "row", "label"),
    [
        ([0, 1, 1], 0, "0"),
        ([True, False, True], 0, "True"),
        ([1, -1, 2], 2, "2"),
        ([1.0, np.nan, -1.0], 1, "nan"),
        (["1", "-1", "1"], 0, "'1'"),
        (np.array([1, -1, None], object), 2, "None"),
    ],
)
def test_other_labels_are_refused(metric, y_true, row, label):
    with pytest.raises(
        ValueError, match=rf"y_true\[{row}\] is {label}\. If 1 marks"
    ) as e:
        metric(y_true, [0.1, 0.2, 0.3])
    assert "np.where(y_true == 1, -1, 1)" in str(e.value)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(metric, score):
    with pytest.raises(ValueError, match=rf"y_score\[1\] is {score}\..*unreadable"):
        metric([1, -1, -1], [0.1, score, np.nan])


@pytest.mark.parametrize("metric", METRICS)
def test_shapes_that_do_not_match_are_refused(metric):
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        metric([1, -1, 1], [0.1, 0.2])
    with pytest.raises(ValueError, match="1d array"):
        metric([1, -1], [[0.1, 0.2], [0.3, 0.4]])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("label", [1, -1])
def test_one_class_only_is_undefined(metric, label):
    with pytest.warns(UndefinedMetricWarning, match="not defined") as record:
        assert np.isnan(metric([label] * 3, [0.1, 0.2, 0.3]))
    assert record[0].filename == __file__


@pytest.mark.parametrize("tpr", [0, -0.1, 1.1, np.nan])
def test_tpr_out_of_range(tpr):
    with pytest.raises(ValueError, match=r"tpr must be in \(0, 1\]"):
        anomaly_fpr_at_tpr_score([1, -1], [1, 0], tpr=tpr)


class DensityDetector(OutlierMixin, KernelDensity):
    """Has ``score_samples`` but no ``decision_function``."""


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    X = np.r_[rng.normal(0, 1, (80, 2)), rng.normal(3, 1, (40, 2))]
    return X, np.r_[np.ones(80, int), np.full(40, -1)]


@pytest.mark.parametrize(
    ("estimator", "method"),
    [
        (OneClassSVM(), "decision_function"),
        (IsolationForest(n_estimators=20, random_state=0), "decision_function"),
        (LocalOutlierFactor(novelty=True), "decision_function"),
        (make_pipeline(StandardScaler(), OneClassSVM()), "decision_function"),
        (DensityDetector(), "score_samples"),
        (make_pipeline(StandardScaler(), DensityDetector()), "score_samples"),
        (LogisticRegression(), "decision_function"),
        (make_pipeline(StandardScaler(), LogisticRegression()), "decision_function"),
    ],
    ids=str,
)
def test_scorers_take_the_methods_as_they_are(estimator, method, data):
    X, y = data
    is_classifier = "LogisticRegression" in str(estimator)
    estimator.fit(X if is_classifier else X[y == 1], y if is_classifier else None)
    y_score = getattr(estimator, method)(X)
    auc = anomaly_roc_auc(estimator, X, y)
    assert auc > 0.9
    assert auc == anomaly_roc_auc_score(y, y_score)
    expected = anomaly_average_precision_score(y, y_score)
    assert anomaly_average_precision(estimator, X, y) == expected
    expected = -anomaly_fpr_at_tpr_score(y, y_score, tpr=0.95)
    assert neg_anomaly_fpr95(estimator, X, y) == expected < 0


def test_scorers_refuse_labels_that_turn_scikit_learn_upside_down(data):
    X, y = data
    detector = OneClassSVM().fit(X[y == 1])
    is_anomaly = (y == -1).astype(int)
    assert get_scorer("roc_auc")(detector, X, is_anomaly) < 0.1
    for scorer in SCORERS.values():
        with pytest.raises(ValueError, match="If 1 marks anomalies"):
            scorer(detector, X, is_anomaly)


@pytest.mark.parametrize("name", SCORERS)
def test_scorers_pickle(name, data):
    detector = OneClassSVM().fit(data[0])
    scorer = SCORERS[name]
    assert pickle.loads(pickle.dumps(scorer))(detector, *data) == scorer(
        detector, *data
    )


def test_scorers_in_parallel_and_together(data):
    run = {"cv": StratifiedKFold(3), "scoring": SCORERS, "error_score": "raise"}
    serial = cross_validate(OneClassSVM(nu=0.3), *data, **run)
    parallel = cross_validate(OneClassSVM(nu=0.3), *data, **run, n_jobs=2)
    for name in SCORERS:
        assert np.isfinite(serial[f"test_{name}"]).all()
        np.testing.assert_array_equal(parallel[f"test_{name}"], serial[f"test_{name}"])


def test_scorers_together_score_once_per_fold(data):
    calls = []

    class Counting(OneClassSVM):
        def decision_function(self, X):
            calls.append(len(X))
            return super().decision_function(X)

    run = {"cv": StratifiedKFold(3), "scoring": SCORERS, "error_score": "raise"}
    cross_validate(Counting(), *data, **run)
    assert calls == [40, 40, 40]


# maps


def smooth_maps(n=6, size=40, seed=0):
    """Masks of a few round defects, and maps that find them by half."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, size, size), dtype=bool)
    y, x = np.indices((size, size))
    for mask in masks[1:]:
        for _ in range(rng.integers(1, 4)):
            (top, left), radius = rng.uniform(0, size, 2), rng.uniform(1, 6)
            mask |= np.hypot(y - top, x - left) < radius
    noise = gaussian_filter(rng.normal(size=masks.shape), (0, 2, 2))
    return masks, (gaussian_filter(masks * 1.0, (0, 1, 1)) + 4 * noise).astype("f4")


@pytest.mark.parametrize("seed", range(3))
def test_pixel_roc_auc_is_that_of_all_pixels(seed):
    masks, maps = smooth_maps(seed=seed)
    found = pixel_roc_auc_score(masks, maps)
    assert found == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-5)
    assert pixel_roc_auc_score(masks, -maps) == pytest.approx(1 - found, abs=1e-5)


def overlap_by_hand(masks, maps, max_fpr, n_thresholds=4000):
    """AUPRO, threshold by threshold and region by region."""
    regions = []
    for i, mask in enumerate(masks):
        labels, n = label(mask, structure=np.ones((3, 3)))
        regions += [(i, labels == k) for k in range(1, n + 1)]
    thresholds = np.quantile(maps, np.linspace(1, 0, n_thresholds))
    flagged, overlap = [0.0], [0.0]
    for threshold in thresholds:
        found = maps >= threshold
        flagged.append(found[~masks].mean())
        overlap.append(np.mean([found[i][region].mean() for i, region in regions]))
    grid = np.linspace(0, max_fpr, 20001)
    return np.mean(np.interp(grid, flagged, overlap))


@pytest.mark.parametrize("max_fpr", [0.05, 0.3, 1.0])
def test_aupro_counts_defects_and_not_pixels(max_fpr):
    masks, maps = smooth_maps()
    found = aupro_score(masks, maps, max_fpr=max_fpr)
    assert found == pytest.approx(overlap_by_hand(masks, maps, max_fpr), abs=2e-3)


def test_aupro_of_one_pixel_defects_is_the_roc():
    masks, maps = smooth_maps()
    masks[:] = False
    masks[:, ::5, ::5] = True  # neighbours of none
    found = aupro_score(masks, maps, max_fpr=1.0)
    assert found == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-6)


@pytest.mark.parametrize("metric", [pixel_roc_auc_score, aupro_score])
def test_maps_are_taken_in_every_form(metric):
    masks, maps = smooth_maps()
    wanted = metric(masks, maps)
    assert metric(masks * np.uint8(255), maps.astype("f8")) == wanted
    assert metric((m.astype(int) for m in masks), iter(maps)) == wanted
    order = [3, 1, 0, 5, 4, 2]
    assert metric(masks[order], maps[order]) == pytest.approx(wanted, abs=1e-12)
    # a power of two moves no first bits
    assert metric(masks, 4 * maps) == wanted
    sizes = metric([masks[1], masks[2, :20]], [maps[1], maps[2, :20]])
    assert 0 < sizes < 1
    assert metric(masks, masks * 1.0) == 1
    chance = 0.15 if metric is aupro_score else 0.5
    assert metric(masks, 0 * maps) == pytest.approx(chance)


@pytest.mark.parametrize("metric", [pixel_roc_auc_score, aupro_score])
def test_masks_may_be_files_or_none(metric, tmp_path):
    masks, maps = smooth_maps()
    assert not masks[0].any()
    mixed = [None, *masks[1:]]
    wanted = metric(masks, maps)
    assert metric(mixed, maps) == wanted
    # of the values 0 and 255, 0 and 1, of lossy files, of colours, of two sizes
    Image.fromarray(masks[1] * np.uint8(255)).save(tmp_path / "1.png")
    Image.fromarray(masks[2] * np.uint8(1)).save(tmp_path / "2.png")
    smooth = np.kron(masks[3], np.ones((8, 8))) * 255
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "3.jpg", quality=95)
    red = np.stack([masks[4] * 255, 0 * masks[4], 0 * masks[4]], axis=-1)
    Image.fromarray(red.astype(np.uint8)).save(tmp_path / "4.bmp")
    Image.fromarray(masks[5]).save(tmp_path / "5.png")
    names = ["1.png", "2.png", "3.jpg", "4.bmp", "5.png"]
    mixed[1:] = [tmp_path / names[0], *(str(tmp_path / name) for name in names[1:])]
    assert metric(np.array(mixed, dtype=object), maps) == wanted
    mixed[3] = tmp_path / "nowhere.png"
    with pytest.raises(FileNotFoundError, match=r"masks\[3\]='.*nowhere.png'"):
        metric(mixed, maps)


@pytest.mark.parametrize("metric", [pixel_roc_auc_score, aupro_score])
def test_wrong_maps_are_told(metric):
    masks, maps = smooth_maps()
    with pytest.raises(ValueError, match=r"masks\[1\] must hold 0 and 1"):
        metric(masks * 0.5, maps)  # resized, say
    with pytest.raises(ValueError, match=r"masks\[0\] has shape"):
        metric(masks[:, 1:], maps)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        metric(masks[1:], maps)
    with pytest.raises(ValueError, match=r"maps\[0\] has shape \(40,\)"):
        metric(masks, maps[0])
    maps[2, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"maps\[2\] holds values"):
        metric(masks, maps)
    with pytest.warns(UndefinedMetricWarning):
        assert np.isnan(metric(0 * masks[:2], maps[:2]))
    with pytest.raises(ValueError, match="max_fpr"):
        aupro_score(masks, maps, max_fpr=0)


def test_memory_of_maps_is_bounded():
    masks, maps = smooth_maps(n=8, size=128)

    def peak(repeats):
        tracemalloc.start()
        aupro_score(
            (m for _ in range(repeats) for m in masks),
            (m for _ in range(repeats) for m in maps),
        )
        _, high = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return high

    peak(1)
    assert peak(6) < 1.1 * peak(1)
