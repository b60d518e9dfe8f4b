"""Pictures: what they show, and on which scale."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.ensemble import IsolationForest
from sklearn.metrics import precision_recall_curve, roc_auc_score, roc_curve

from skdeepad import KDClonerEstimator, KNNScorer, compare_detectors
from skdeepad.datasets import load_image_folder, make_texture_defects
from skdeepad.inspection import (
    AnomalyMapDisplay,
    AnomalyPrecisionRecallDisplay,
    AnomalyRocCurveDisplay,
    DetectorComparisonDisplay,
    LossCurveDisplay,
    ScoreHistogramDisplay,
)
from skdeepad.inspection._comparison import COLUMNS
from skdeepad.localization import regions_above
from skdeepad.metrics import aupro_score, pixel_roc_auc_score

mpl.use("agg")
import matplotlib.pyplot as plt

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def detector(photos):
    return KDClonerEstimator(image_size=32, max_steps=2, random_state=0).fit(photos)


def test_maps_of_an_estimator(detector, photos):
    display = AnomalyMapDisplay.from_estimator(detector, photos[:3])
    maps = detector.anomaly_map(photos[:3])
    assert display.axes_.shape == (3, 3)
    for row, image, found in zip(display.axes_, photos, maps, strict=False):
        assert_allclose(row[0].images[0].get_array(), image / 255, atol=1e-6)
        assert_array_equal(row[1].images[0].get_array(), found)
        assert_array_equal(row[2].images[1].get_array().data, found)
        # one scale for all images, which does not depend on those that are shown
        assert row[1].images[0].get_clim() == (0, 2 * detector.map_offset_)
    display.figure_.canvas.draw()


def test_maps_of_files_and_flat_rows(detector, photos, image_files):
    of_files = AnomalyMapDisplay.from_estimator(detector, image_files.photos[:2])
    of_arrays = AnomalyMapDisplay.from_estimator(detector, photos[:2])
    assert_allclose(of_files.images, of_arrays.images, atol=1e-6)
    rows = np.moveaxis(photos, -1, 1).reshape(len(photos), -1)
    shaped = KDClonerEstimator(
        image_size=32, image_shape=(3, 32, 32), max_steps=2, random_state=0
    )
    of_rows = AnomalyMapDisplay.from_estimator(shaped.fit(rows), rows[:2])
    assert_allclose(of_rows.images, of_arrays.images, atol=1e-6)


def test_masks_are_outlined_and_the_contour_is_at_the_level():
    images, maps = RNG.random((2, 3, 16, 16))
    masks = [None, np.zeros((16, 16), dtype=bool), None]
    masks[1][4:8, 4:8] = True
    display = AnomalyMapDisplay.from_predictions(images, maps, masks=masks, level=0.5)
    outlined = [len(ax.collections) for ax in display.axes_[:, 0]]
    assert outlined == [0, 1, 0]
    contours = [ax.collections[0] for ax in display.axes_[:, 2]]
    assert [contour.levels.tolist() for contour in contours] == [[0.5]] * 3
    shown = display.axes_[0, 2].images[1].get_array()
    assert_array_equal(shown.mask, maps[0] <= 0.5)
    _, axes = plt.subplots(3, 3)
    display.level = 2.0
    again = display.plot(axes=axes)
    assert again is display
    assert again.figure_ is axes[0, 0].figure
    assert not any(ax.collections for ax in axes[:, 2])


def test_without_a_level_there_is_no_contour():
    images, maps = RNG.random((2, 3, 16, 16))
    display = AnomalyMapDisplay.from_predictions(images, maps)
    assert not any(ax.collections for ax in display.axes_[:, 2])
    assert display.axes_[0, 1].images[0].get_clim() == (maps.min(), maps.max())


def test_titles_tell_the_image_and_the_verdict(detector, image_files):
    files = image_files.photos[:3]
    display = AnomalyMapDisplay.from_estimator(detector, files)
    decisions = detector.decision_function(files)
    for row, file, decision in zip(display.axes_, files, decisions, strict=True):
        assert row[0].get_title().endswith(file.name)
        verdict = "normal" if decision >= 0 else "anomaly"
        assert row[2].get_title() == f"{verdict}, score {decision:+.3g}"
    *_, bar = display.figure_.axes
    assert bar.get_ylabel() == "anomaly map"


def test_many_images_take_pages():
    images, maps = RNG.random((2, 33, 8, 8))
    display = AnomalyMapDisplay.from_predictions(images, maps)
    assert display.n_pages == 6
    assert display.axes_.shape == (6, 3)
    assert max(display.figure_.get_size_inches()) < 15
    assert "images 1 to 6 of 33" in display.figure_.get_suptitle()
    display.plot(page=5)
    assert display.axes_.shape == (3, 3)
    assert display.axes_[0, 0].get_title() == "X[30]"
    with pytest.raises(ValueError, match=r"page=6 must be from 0 to 5"):
        display.plot(page=6)


def test_files_that_cannot_be_read(photos, image_files, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    files = [*image_files.photos[:2], broken]
    detector = KDClonerEstimator(
        image_size=32, max_steps=2, on_error="skip", random_state=0
    ).fit(photos)
    with pytest.warns(UserWarning, match="skipped"):
        display = AnomalyMapDisplay.from_estimator(
            detector, files, masks=[None, None, np.ones((5, 5))]
        )
    assert [text.get_text() for text in display.axes_[2, 1].texts] == ["cannot be read"]
    assert display.axes_[2, 0].get_title().endswith("broken.png")
    assert display.axes_[1, 0].images
    with pytest.warns(UserWarning, match="skipped"):
        assert 2 not in set(detector.locate(files)["position"])
    with pytest.raises(ValueError, match=r"X\[2\] cannot be read"):
        AnomalyMapDisplay.from_predictions(files, np.zeros((3, 32, 32)))


def test_numbers_of_images_and_maps_agree():
    images, maps = RNG.random((2, 3, 16, 16))
    with pytest.raises(ValueError, match="inconsistent numbers"):
        AnomalyMapDisplay.from_predictions(images, maps[:2])


EARLY = ("stage1", "stage2", "stage3")


@pytest.fixture(scope="module", params=["brick", "gravel"])
def located(request):
    """A detector of defects in a texture, and test images with their masks."""
    data = make_texture_defects(
        request.param,
        n_train=60,
        n_test_good=60,
        n_test_defective=60,
        image_size=64,
        random_state=0,
    )
    detector = KDClonerEstimator(
        stages=EARLY,
        score_stages=EARLY,
        discrepancy="mahalanobis",
        image_size=64,
        max_steps=80,
        random_state=0,
    )
    return detector.fit(data.X_train), data


def test_contours_are_drawn_on_defects_and_not_on_good_parts(located):
    detector, data = located
    maps = detector.anomaly_map(data.X_test)
    decisions = detector.decision_function(data.X_test)
    level = detector.map_offset_
    passed = (data.y_test == 1) & (decisions >= 0)
    found = (data.y_test == -1) & (decisions < 0)
    assert passed.sum() >= 50
    assert found.sum() >= 10
    exceeds = (maps > level).any(axis=(1, 2))
    assert exceeds[passed].mean() <= 0.05
    touches = ((maps > level) & data.masks_test).any(axis=(1, 2))
    assert touches[found].mean() >= 0.9

    shown = np.r_[np.flatnonzero(passed)[:6], np.flatnonzero(exceeds & found)[:6]]
    display = AnomalyMapDisplay.from_estimator(detector, data.X_test[shown])
    assert not any(ax.collections for ax in display.axes_[:, 2])
    display.plot(page=1)
    assert all(len(ax.collections) == 1 for ax in display.axes_[:, 2])


def test_no_contour_contradicts_the_verdict():
    images, maps = RNG.random((2, 2, 16, 16))
    display = AnomalyMapDisplay.from_predictions(
        images, maps, level=0.5, decisions=[1.0, -1.0]
    )
    assert [len(ax.collections) for ax in display.axes_[:, 2]] == [0, 1]


def test_locate_lists_the_regions_that_are_outlined(located):
    detector, data = located
    table = detector.locate(data.X_test)
    maps = detector.anomaly_map(data.X_test)
    decisions = detector.decision_function(data.X_test)
    assert set(table["position"]) == set(
        np.flatnonzero((decisions < 0) & (maps.max(axis=(1, 2)) > detector.map_offset_))
    )
    assert_array_equal(table["decision"], decisions[table["position"]])
    assert table["position"].is_monotonic_increasing
    for position, regions in table.groupby("position"):
        assert regions["peak"].is_monotonic_decreasing
        over = maps[position] > detector.map_offset_
        assert regions["area"].sum() == over.sum()
        covered = np.zeros_like(over)
        for region in regions.itertuples():
            box = np.s_[region.top : region.bottom, region.left : region.right]
            covered[box] = True
            assert maps[position][box].max() >= region.peak
            assert over[box][[0, -1]].any(axis=1).all()  # no row too many
            assert over[box][:, [0, -1]].any(axis=0).all()
        assert (over <= covered).all()
        assert regions["peak"].iloc[0] == maps[position].max()


def test_regions_by_hand():
    found = np.zeros((6, 8), np.float32)
    found[0, 0] = found[1, 1] = 3  # diagonal: one region
    found[4:6, 3:6] = 2
    found[5, 4] = 1  # not above the level
    first, second = regions_above(found, 1.0)
    assert first == {
        **{"top": 0, "left": 0, "bottom": 2, "right": 2, "area": 2, "peak": 3.0}
    }
    assert second == {
        **{"top": 4, "left": 3, "bottom": 6, "right": 6, "area": 5, "peak": 2.0}
    }


def test_locate_without_regions_and_without_a_threshold(
    detector, image_files, photos, monkeypatch
):
    monkeypatch.setattr(detector, "map_offset_", np.inf)
    table = detector.locate(image_files.photos[:3])
    assert len(table) == 0
    assert list(table)[:3] == ["position", "file", "decision"]
    slopes = KDClonerEstimator(
        image_size=32, max_steps=2, localization="gradient", random_state=0
    ).fit(photos)
    with pytest.raises(ValueError, match="No threshold was learnt for these maps"):
        slopes.locate(photos)


def test_locate_needs_pandas(detector, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        detector.locate(photos)


def test_a_folder_like_mvtec_in_ten_lines(located, tmp_path):
    detector, data = located
    root = write_folder(tmp_path, data)
    bottle = load_image_folder(root)
    decisions = detector.decision_function(bottle.paths_test)
    maps = detector.anomaly_map(bottle.paths_test)
    area = pixel_roc_auc_score(bottle.masks_test, maps)
    overlap = aupro_score(bottle.masks_test, maps)
    display = AnomalyMapDisplay.from_estimator(
        detector, bottle.paths_test, masks=bottle.masks_test
    )
    regions = detector.locate(bottle.paths_test)

    names = [int(Path(path).stem) for path in bottle.paths_test]
    assert_allclose(decisions, detector.decision_function(data.X_test[names]))
    assert area == pixel_roc_auc_score(data.masks_test[names], maps) > 0.8
    assert overlap == aupro_score(data.masks_test[names], maps)
    assert_array_equal(np.stack(display.masks), data.masks_test[names])
    assert set(regions["file"]) == {bottle.paths_test[i] for i in regions["position"]}


def write_folder(root, data):
    def save(image, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)

    for i, image in enumerate(data.X_train[:4]):
        save(image, root / "train" / "good" / f"{i:03}.png")
    for i in [*range(6), *range(len(data.X_test))[-6:]]:
        kind = data.kinds_test[i]
        save(data.X_test[i], root / "test" / kind / f"{i:03}.png")
        if kind != "good":
            mask = data.masks_test[i].astype(np.uint8) * 255
            save(mask, root / "ground_truth" / kind / f"{i:03}_mask.png")
    return root


def test_histogram_of_an_estimator():
    X, odd = RNG.normal(size=(200, 3)), 4 + RNG.normal(size=(50, 3))
    detector = KNNScorer().fit(X)
    new = np.concatenate([RNG.normal(size=(100, 3)), odd])
    y = np.r_[np.ones(100), -np.ones(50)]
    display = ScoreHistogramDisplay.from_estimator(detector, new, y, bins=20)
    assert_array_equal(display.y_score, detector.decision_function(new))
    normal, anomalous = display.ax_.containers
    assert [len(bars) for bars in (normal, anomalous)] == [20, 20]
    assert sum(bar.get_height() for bar in normal) == 100
    assert sum(bar.get_height() for bar in anomalous) == 50
    (line,) = display.ax_.lines
    assert line.get_xdata() == [0, 0]
    labels = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert sorted(labels) == ["anomalous", "normal", "threshold"]


def test_histogram_without_labels():
    scores = np.r_[RNG.normal(size=30), np.nan]  # a skipped file has no score
    _, ax = plt.subplots()
    display = ScoreHistogramDisplay.from_predictions(None, scores, ax=ax)
    assert display.ax_ is ax
    (bars,) = ax.containers
    assert sum(bar.get_height() for bar in bars) == 30
    assert not ax.lines


def test_loss_curve(detector):
    display = LossCurveDisplay.from_estimator(detector)
    raw, mean = display.ax_.lines
    assert_array_equal(raw.get_ydata(), detector.loss_curve_)
    (label,) = display.ax_.get_legend().get_texts()
    assert label.get_text() == "KDClonerEstimator"
    curve = RNG.random(100)
    display = LossCurveDisplay.from_predictions(curve, ax=display.ax_)
    mean = display.ax_.lines[-1]
    assert_allclose(mean.get_ydata()[0], curve[:5].mean())
    assert_array_equal(mean.get_xdata(), np.arange(5, 101))
    with pytest.raises(ValueError, match="KNNScorer has no loss_curve_"):
        LossCurveDisplay.from_estimator(KNNScorer().fit(RNG.normal(size=(30, 2))))


@pytest.mark.parametrize("detector_class", [KNNScorer, IsolationForest])
def test_curves_of_detectors_have_the_anomaly_as_the_positive_class(detector_class):
    X = RNG.normal(size=(200, 3))
    new = np.concatenate([RNG.normal(size=(100, 3)), 2 + RNG.normal(size=(50, 3))])
    y = np.r_[np.ones(100), -np.ones(50)]
    fitted = detector_class().fit(X)
    score = -fitted.decision_function(new)
    roc = AnomalyRocCurveDisplay.from_estimator(fitted, new, y)
    curve, dot = roc.ax_.lines
    assert_array_equal(curve.get_xydata(), np.transpose(roc_curve(y == -1, score)[:2]))
    flagged = fitted.predict(new) == -1
    false_alarms, found = flagged[:100].mean(), flagged[100:].mean()
    assert dot.get_xydata().tolist() == [[false_alarms, found]]
    area = roc_auc_score(y == -1, score)
    assert area > 0.8
    (label,) = roc.ax_.get_legend().get_texts()
    assert label.get_text() == f"{detector_class.__name__} (AUROC {area:.3f})"

    pr = AnomalyPrecisionRecallDisplay.from_estimator(fitted, new, y, name="mine")
    curve, dot = pr.ax_.lines
    precision, recall, _ = precision_recall_curve(y == -1, score)
    assert_array_equal(curve.get_xydata(), np.transpose([recall, precision]))
    assert_allclose(dot.get_xydata(), [[found, flagged[100:].sum() / flagged.sum()]])


def test_curves_leave_out_what_has_no_score():
    y, scores = [1, 1, -1, -1], [0.5, np.nan, -0.5, 1.0]
    display = AnomalyRocCurveDisplay.from_predictions(y, scores)
    (curve,) = display.ax_.lines
    assert curve.get_xydata().tolist()[-1] == [1, 1]
    assert len(display.y_score) == 3
    with pytest.raises(ValueError, match=r"y_true must be \+1"):
        AnomalyRocCurveDisplay.from_predictions([0, 1, 0, 1], scores)


def test_comparison_of_detectors():
    X = RNG.normal(size=(100, 3))
    new = RNG.normal(size=(60, 3))
    new[40:] += np.repeat([[2.0], [6.0]], 10, axis=0)
    kinds = np.repeat(["good", "small", "large"], [40, 10, 10])
    y = np.where(kinds == "good", 1, -1)
    detectors = {"knn": KNNScorer(), "forest": IsolationForest()}
    table = compare_detectors(detectors, X, new, y, kinds_test=kinds, n_seeds=2)
    display = DetectorComparisonDisplay(table=table).plot()
    kinds_drawn = [label.get_text() for label in display.axes_[1].get_xticklabels()]
    assert kinds_drawn == ["false alarms", "all", "large", "small"]
    knn = table[(table["detector"] == "knn") & (table["kind"] == "small")]
    heights = [bar.get_height() for bar in display.axes_[0].patches]
    assert knn["auroc"].mean() == heights[4]  # third kind, first detector
    assert len(display.axes_[2].patches) == 4
    with pytest.raises(ValueError, match="table has no column found, false_alarms"):
        DetectorComparisonDisplay(
            table=table.drop(columns=["found", "false_alarms"])
        ).plot()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: AnomalyMapDisplay.from_predictions(RNG.random((1, 4, 4)), [[[0]]]),
        lambda: ScoreHistogramDisplay.from_predictions([1], [0.5]),
        lambda: ScoreHistogramDisplay.from_estimator(SimpleNamespace(), None),
        lambda: AnomalyRocCurveDisplay.from_predictions([1, -1], [0.5, 0.1]),
        lambda: LossCurveDisplay.from_predictions([0.5, 0.1]),
        lambda: DetectorComparisonDisplay(table={name: [] for name in COLUMNS}).plot(),
    ],
)
def test_matplotlib_is_asked_for(monkeypatch, draw):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError("no matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="requires matplotlib"):
        draw()
