"""Pictures: what they show, and on which scale."""

from __future__ import annotations

import builtins
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from skdeepad import KDClonerEstimator, KNNScorer
from skdeepad.inspection import AnomalyMapDisplay, ScoreHistogramDisplay

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
        assert_array_equal(row[2].images[1].get_array(), found)
        # one scale for all, so that a faint map looks faint
        assert row[1].images[0].get_clim() == (maps.min(), maps.max())
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
    masks = np.zeros((3, 16, 16), dtype=bool)
    masks[1, 4:8, 4:8] = True
    display = AnomalyMapDisplay.from_predictions(images, maps, masks=masks, level=0.5)
    outlined = [len(ax.collections) for ax in display.axes_[:, 0]]
    assert outlined == [0, 1, 0]
    contours = [ax.collections[0] for ax in display.axes_[:, 2]]
    assert [contour.levels.tolist() for contour in contours] == [[0.5]] * 3
    _, axes = plt.subplots(3, 3)
    again = display.plot(axes=axes, level=2.0)
    assert again is display
    assert again.figure_ is axes[0, 0].figure
    assert not any(ax.collections for ax in axes[:, 2])


def test_numbers_of_images_and_maps_agree():
    images, maps = RNG.random((2, 3, 16, 16))
    with pytest.raises(ValueError, match="inconsistent numbers"):
        AnomalyMapDisplay.from_predictions(images, maps[:2])


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


@pytest.mark.parametrize(
    "draw",
    [
        lambda: AnomalyMapDisplay.from_predictions(RNG.random((1, 4, 4)), [[[0]]]),
        lambda: ScoreHistogramDisplay.from_predictions([1], [0.5]),
        lambda: ScoreHistogramDisplay.from_estimator(SimpleNamespace(), None),
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
