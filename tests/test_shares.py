"""Maps of detectors that score whole images: shares of the score."""

from __future__ import annotations

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import approx_fprime
from sklearn.ensemble import IsolationForest
from torch import nn
from torch.nn import functional as F

from skdeepad import (
    CentroidScorer,
    DeepSAD,
    DeepSVDD,
    GaussianScorer,
    HSCClassifier,
    KMeansScorer,
    KNNScorer,
    MahalanobisFeatureScorer,
    OpenSetClassifier,
    PANDAEstimator,
    load,
    save,
)
from skdeepad.base import threshold_below
from skdeepad.inspection import AnomalyMapDisplay
from skdeepad.scorers import ClassGaussianScorer

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
NEW = RNG.integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
NEW[:, 4:9, 6:12] //= 2
Y = np.where(np.arange(60) < 50, 1, -1)
EXACT = {"opening": False, "precision": "float32", "random_state": 0}


def stage(inputs, outputs, stride=1, bias=False):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias), nn.LeakyReLU()
    )


def net():
    """Maps of 16, 8 and 4 positions a side."""
    torch.manual_seed(0)
    return nn.Sequential(stage(3, 4), stage(4, 5, 2), stage(5, 6, 2))


def net_of_numbers():
    """Linear layers behind maps of 4 positions a side."""
    torch.manual_seed(0)
    maps = nn.Sequential(stage(3, 4, 2), stage(4, 5, 2), nn.Flatten())
    return nn.Sequential(*maps, nn.Linear(80, 6, bias=False))


def mahalanobis(**options):
    return MahalanobisFeatureScorer(net(), **{"covariance": "oas", **EXACT, **options})


def panda(**options):
    return PANDAEstimator(net(), **{"max_steps": 2, **EXACT, **options})


def hsc(**options):
    given = {"stages": ("1", "2"), "trainable_stages": None, "max_steps": 3}
    return HSCClassifier(net(), **{**given, **EXACT, **options})


def hsc_of_numbers():
    stages = {"stages": ("1", "2", "3"), "max_steps": 3}
    return HSCClassifier(net_of_numbers(), **stages, **EXACT)


def open_set(**options):
    return OpenSetClassifier(net(), **{"max_steps": 3, **EXACT, **options})


def sphere(cls=DeepSVDD, **options):
    steps = {"max_steps": 2, "pretrain_steps": 0}
    return cls(net_of_numbers(), **{**steps, **EXACT, **options})


CLASSES = np.arange(60) % 3
DETECTORS = {
    "one stage": (mahalanobis, {}, None),
    "three stages": (mahalanobis, {"stages": ("0", "1", "2")}, None),
    "sum of stages": (mahalanobis, {"stages": ("1", "2"), "joint": False}, None),
    "panda": (panda, {}, None),
    "panda, ses": (panda, {"adaptation": "ses", "n_checkpoints": 2}, None),
    "panda, frozen": (panda, {"adaptation": None}, None),
    "panda, logits": (panda, {"adaptation": "outlier_exposure"}, Y),
    "panda, as it comes": (panda, {"normalize": False, "scorer": "kmeans"}, None),
    "hsc": (hsc, {}, Y),
    "hsc, trained": (hsc, {"trainable_stages": "2", "norm": "l1"}, Y),
    "hsc, logits": (hsc, {"objective": "bce"}, Y),
    "hsc, numbers": (hsc_of_numbers, {}, Y),
    "svdd": (sphere, {}, None),
    "svdd, radius": (sphere, {"objective": "soft-boundary", "warm_up_steps": 1}, None),
    "sad": (sphere, {"cls": DeepSAD}, Y),
    "open set": (open_set, {}, CLASSES),
    "open set, energy": (open_set, {"anomaly_score": "energy"}, CLASSES),
    "open set, changed images": (open_set, {"perturbation": 0.01}, CLASSES),
    "open set, members": (open_set, {"n_members": 2}, CLASSES),
}


@pytest.fixture(scope="module", params=DETECTORS.values(), ids=DETECTORS)
def fitted(request):
    make, options, y = request.param
    return make(**options).fit(X, y)


def shares(detector, images):
    """The shares of positions, at the size of the images."""
    batches = detector._position_scores(detector._check_inputs(images))
    return np.concatenate([found for _, found in batches])


# what is promised of each


def test_the_mean_of_a_map_is_minus_the_score(fitted):
    scores = fitted.score_samples(NEW)
    means = fitted.anomaly_map(NEW).mean(axis=(1, 2), dtype=np.float64)
    assert_allclose(means, -scores, rtol=1e-6, atol=1e-6 * np.abs(scores).max())
    assert np.ptp(fitted.anomaly_map(NEW), axis=(1, 2)).min() > 0


def test_maps_have_a_threshold_and_regions(fitted):
    assert np.isfinite(fitted.map_offset_)
    regions = fitted.locate(NEW)
    flagged = np.flatnonzero(fitted.score_samples(NEW) < fitted.offset_)
    assert set(regions["position"]) <= set(flagged)
    assert (regions["peak"] > fitted.map_offset_).all()


def test_maps_are_kept_by_pickles_and_files(fitted, tmp_path):
    maps = fitted.anomaly_map(NEW)
    save(fitted, tmp_path / "file")
    for again in (pickle.loads(pickle.dumps(fitted)), load(tmp_path / "file")):
        assert_array_equal(again.anomaly_map(NEW), maps)
        assert again.map_offset_ == fitted.map_offset_
        again.recalibrate(contamination=0.5)
        assert again.map_offset_ < fitted.map_offset_


def test_maps_do_not_depend_on_other_images(fitted):
    maps = fitted.anomaly_map(NEW)
    assert_allclose(fitted.anomaly_map(NEW[::-1])[::-1], maps, rtol=1e-4, atol=1e-5)
    assert_allclose(fitted.anomaly_map(NEW[2:3])[0], maps[2], rtol=1e-4, atol=1e-5)


def test_maps_where_gradients_are_off(fitted):
    maps = fitted.anomaly_map(NEW)
    with torch.inference_mode():
        assert_array_equal(fitted.anomaly_map(NEW), maps)


def test_maps_are_drawn(fitted):
    pytest.importorskip("matplotlib")
    display = AnomalyMapDisplay.from_estimator(fitted, NEW[:2])
    expected = fitted.score_samples(NEW[:2]) - fitted.offset_
    assert_allclose(display.decisions, expected)


# against what they are


def features(detector, images, name):
    """A stage's activations at each position: (n, channels, height, width)."""
    x = torch.from_numpy(np.moveaxis(images, -1, 1).astype(np.float32) / 255)
    with torch.no_grad():
        found = detector.backbone_.forward_stages(x, [name])[name]
    return found.double().numpy()


def at_size(raster):
    resized = F.interpolate(
        torch.from_numpy(raster)[:, None], (16, 16), mode="bilinear"
    )
    return resized[:, 0].numpy()


def test_shares_of_the_mahalanobis_distance():
    detector = mahalanobis(stages="1", covariance="empirical").fit(X)
    f = features(detector, X, "1").mean(axis=(2, 3))
    precision = np.linalg.inv(np.cov(f.T, bias=True))
    mean = f.mean(axis=0)
    a = features(detector, NEW, "1")
    apart = a.mean(axis=(2, 3)) - mean
    distance = np.sqrt(np.einsum("ni,ij,nj->n", apart, precision, apart))
    raster = np.einsum("nihw,ij,nj->nhw", a - mean[:, None, None], precision, apart)
    raster /= distance[:, None, None]
    assert_allclose(raster.mean(axis=(1, 2)), distance)
    assert_allclose(shares(detector, NEW), at_size(raster), rtol=1e-4, atol=1e-4)


def test_shares_of_several_stages_add_up():
    names = ("0", "2")
    both = mahalanobis(stages=names, joint=False).fit(X)
    alone = [mahalanobis(stages=name).fit(X) for name in names]
    expected = sum(shares(detector, NEW) for detector in alone)
    assert_allclose(shares(both, NEW), expected, rtol=1e-5, atol=1e-4)


def test_shares_of_the_distance_to_neighbours():
    detector = panda(adaptation=None, normalize=False, include_initial=False).fit(X)
    f = features(detector, X, "2").mean(axis=(2, 3))
    a = features(detector, NEW, "2")
    expected = []
    for one in a:
        g = one.mean(axis=(1, 2))
        near = f[np.argsort(np.square(f - g).sum(axis=1))[:2]]
        slope = 2 * (g - near).mean(axis=0)
        score = np.square(g - near).sum(axis=1).mean()
        expected.append(score + np.tensordot(slope, one - g[:, None, None], 1))
    found = shares(detector, NEW)
    scale = np.abs(found).max()
    assert_allclose(found, at_size(np.array(expected)), rtol=1e-4, atol=1e-5 * scale)


def test_unit_length_is_linearised():
    """To first order, what the score changes if the image is a little more like it."""
    detector = panda(adaptation=None, scorer="centroid").fit(X)
    f = features(detector, X, "2").mean(axis=(2, 3))
    unit = f / np.linalg.norm(f, axis=1, keepdims=True)
    center = unit.mean(axis=0)
    a = features(detector, NEW, "2")
    expected = np.empty((len(a), *a.shape[2:]))
    for i, one in enumerate(a):
        g = one.mean(axis=(1, 2))

        def score(z):
            return np.square(z / np.linalg.norm(z) - center).sum()

        for place in np.ndindex(*expected.shape[1:]):
            towards, step = one[(slice(None), *place)] - g, 1e-6
            change = score(g + step * towards) - score(g - step * towards)
            expected[(i, *place)] = score(g) + change / (2 * step)
    found = shares(detector, NEW)
    scale = np.abs(found).max()
    assert_allclose(found, at_size(expected), rtol=1e-3, atol=1e-4 * scale)


def test_shares_behind_linear_layers():
    detector = sphere().fit(X)
    a = features(detector, NEW, "1")
    weight = detector._network.stages["3"].weight.double().numpy()
    by_place = weight.reshape(6, *a.shape[1:])
    z = np.einsum("kchw,nchw->nk", by_place, a)
    score = np.square(z - detector.center_).sum(axis=1)
    assert_allclose(-detector.score_samples(NEW), score, rtol=1e-4)
    parts = 2 * np.einsum("nk,kchw,nchw->nhw", z - detector.center_, by_place, a)
    raster = score[:, None, None] + parts[0].size * (
        parts - parts.mean(axis=(1, 2), keepdims=True)
    )
    found = shares(detector, NEW)
    scale = np.abs(found).max()
    assert_allclose(found, at_size(raster), rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize(
    "scorer",
    [
        *(KNNScorer(metric=m) for m in ("euclidean", "cosine", "mahalanobis")),
        *(KNNScorer(3, aggregation=how) for how in ("mean", "kth")),
        *(CentroidScorer(metric=m) for m in ("sqeuclidean", "euclidean", "cosine")),
        *(KMeansScorer(3, metric=m, random_state=0) for m in ("euclidean", "cosine")),
        *(GaussianScorer(c) for c in ("ledoit_wolf", "diagonal", "empirical")),
        ClassGaussianScorer(),
        ClassGaussianScorer(relative=True),
    ],
    ids=repr,
)
def test_slopes_are_those_of_scores(scorer):
    draw = np.random.default_rng(1)
    rows, new = draw.normal(2, 1, (50, 4)), draw.normal(2, 2, (5, 4))
    y = np.arange(50) % 2 if isinstance(scorer, ClassGaussianScorer) else None
    scorer.fit(np.repeat(rows, 2, axis=0), None if y is None else np.repeat(y, 2))
    slopes = scorer._slopes(new)
    for row, slope in zip(new, slopes, strict=True):
        expected = approx_fprime(row, lambda z: -scorer.score_samples(z[None])[0])
        assert_allclose(slope, expected, rtol=1e-4, atol=1e-5)


def test_there_is_no_slope_where_distances_have_none():
    rows = np.arange(12.0).reshape(4, 3)
    for scorer in (KNNScorer(1, metric="euclidean"), GaussianScorer()):
        at = rows.mean(axis=0, keepdims=True)
        scorer.fit(np.concatenate([rows, at]))
        assert_array_equal(scorer._slopes(at), np.zeros((1, 3)))


def test_scores_in_bfloat16_have_maps_too():
    detector = mahalanobis(stages=("1", "2"), precision="bfloat16").fit(X)
    means = detector.anomaly_map(NEW).mean(axis=(1, 2), dtype=np.float64)
    assert_allclose(means, -detector.score_samples(NEW), rtol=1e-6)
    exact = mahalanobis(stages=("1", "2")).fit(X).anomaly_map(NEW)
    assert np.corrcoef(detector.anomaly_map(NEW).ravel(), exact.ravel())[0, 1] > 0.99


def test_a_defect_has_more_of_the_score_than_the_rest():
    draw = np.random.default_rng(3)
    normal = draw.integers(100, 156, (60, 16, 16, 3), dtype=np.uint8)
    odd = draw.integers(100, 156, (20, 16, 16, 3), dtype=np.uint8)
    odd[:, 4:9, 6:12] = draw.integers(0, 256, (20, 5, 6, 3))
    maps = mahalanobis(stages="0", sigma=0).fit(normal).anomaly_map(odd)
    inside = np.zeros((16, 16), dtype=bool)
    inside[4:9, 6:12] = True
    assert (maps[:, inside].mean(axis=1) > maps[:, ~inside].mean(axis=1)).all()


# thresholds


@pytest.mark.parametrize("make", [mahalanobis, panda, partial(panda, adaptation=None)])
def test_normal_maps_exceed_the_threshold_as_often_as_asked(make):
    shares_above = []
    for draw in range(4):
        rng = np.random.default_rng(draw)
        images = rng.integers(0, 256, (260, 16, 16, 3), dtype=np.uint8)
        detector = make(contamination=0.2, random_state=draw).fit(images[:60])
        peaks = detector.anomaly_map(images[60:]).max(axis=(1, 2))
        shares_above.append(np.mean(peaks > detector.map_offset_))
    assert np.mean(shares_above) == pytest.approx(0.2, abs=0.12)


def test_leaving_an_image_out_stretches_its_map():
    detector = mahalanobis(stages="1").fit(X)
    for i in range(3):
        without = mahalanobis(stages="1").fit(np.delete(X, i, axis=0))
        map_of_both = detector.anomaly_map(X[i : i + 1])
        stretch = detector.score_samples(X[i : i + 1]) / -map_of_both.mean()
        expected = without.anomaly_map(X[i : i + 1])
        bound = 0.03 * np.abs(expected).max()
        assert_allclose(stretch * map_of_both, expected, atol=bound)


def test_parts_of_a_stream_and_of_others_set_the_threshold():
    first = mahalanobis().partial_fit(X[:15])
    assert len(first._map_peaks) == 15
    before = first.map_offset_
    first.partial_fit(X[15:])
    assert len(first._map_peaks) == 40
    assert first.map_offset_ != before
    second = mahalanobis().fit(X[30:])
    merged = mahalanobis().fit(X[:30]).merge([second])
    assert merged._map_peaks[30:].tolist() == second._map_peaks.tolist()
    expected = -threshold_below(-merged._map_peaks, 0.05)
    assert merged.map_offset_ == expected


def test_members_share_a_threshold():
    ensemble = open_set(n_members=2).fit(X, CLASSES)
    peaks = [np.sort(member._map_peaks) for member in ensemble.estimators_]
    expected = -threshold_below(-np.mean(peaks, axis=0), 0.05)
    assert ensemble.map_offset_ == expected


def test_a_classifier_without_held_out_images_learns_it_later():
    classifier = hsc(contamination=None).fit(X, Y)
    assert np.isnan(classifier.map_offset_)
    with pytest.raises(ValueError, match="No threshold was learnt"):
        classifier.locate(NEW)
    classifier.recalibrate(X[:30], contamination=0.1)
    peaks = classifier.anomaly_map(X[:30]).max(axis=(1, 2)).astype(np.float64)
    assert classifier.map_offset_ == -threshold_below(-peaks, 0.1)


# where there are none


def test_scorers_of_others_have_no_slopes():
    detector = panda(scorer=IsolationForest(n_estimators=5)).fit(X)
    assert np.isnan(detector.map_offset_)
    with pytest.raises(ValueError, match="not of this package"):
        detector.anomaly_map(NEW)


def test_vectors_have_no_maps():
    detector = MahalanobisFeatureScorer().fit(RNG.normal(size=(30, 4)))
    assert np.isnan(detector.map_offset_)
    with pytest.raises(ValueError, match="Maps are for images"):
        detector.anomaly_map(RNG.normal(size=(2, 4)))


@pytest.mark.parametrize("make", [mahalanobis, panda, hsc, sphere])
def test_files_of_versions_without_maps_show_some(make):
    detector = make().fit(X, Y)
    maps, level = detector.anomaly_map(NEW), detector.map_offset_
    for name in ("map_offset_", "_map_peaks", "sigma"):
        del vars(detector)[name]
    assert np.isfinite(detector.anomaly_map(NEW)).all()
    assert_array_equal(detector.set_params(sigma=4.0).anomaly_map(NEW), maps)
    with pytest.raises(ValueError, match="No threshold was learnt"):
        detector.locate(NEW)
    detector.recalibrate(X[:40])
    assert detector.map_offset_ == pytest.approx(level, rel=0.8)
    detector.locate(NEW)
