"""PatchDetector: its scores and maps against independent computations."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from scipy.linalg import block_diag
from scipy.spatial.distance import cdist
from sklearn.covariance import ShrunkCovariance
from sklearn.neighbors import LocalOutlierFactor
from torch import nn
from torch.nn import functional as F

import skdeepad
from skdeepad import PatchDetector
from skdeepad.backbones import load_backbone
from skdeepad.detectors._patch import patch_maps
from skdeepad.detectors._patch_density import N_FOLDS, PatchMemory
from skdeepad.scorers._coreset import Coreset, k_centre

RNG = np.random.RandomState(0)
X = RNG.rand(24, 16, 16).astype(np.float32)
NEW = RNG.rand(5, 16, 16).astype(np.float32)


def net():
    torch_state = torch.Generator().manual_seed(0)
    first = nn.Conv2d(1, 4, 3, stride=2, padding=1)
    second = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1))
    with torch.no_grad():
        for parameter in [*first.parameters(), *second.parameters()]:
            parameter.copy_(torch.randn(parameter.shape, generator=torch_state))
    return nn.Sequential(first, second)


def make(**options):
    defaults = {
        "stages": ("0", "1"),
        "random_state": 0,
        "sigma": 0,
        "opening": False,
        "precision": "float32",
        "metric": "euclidean",
        "scale_positions": False,
        "batch_size": 4,
    }
    return PatchDetector(net(), **{**defaults, **options})


def described(images, pooling=3):
    """Patches of images, (n, 64, 10), by torch alone."""
    module = net()
    with torch.no_grad():
        first = module[0](torch.from_numpy(images)[:, None])
        second = module[1](first)
        if pooling > 1:
            window = torch.full((1, 1, pooling, pooling), 1 / pooling**2)

            def pooled(m):
                apart = m.flatten(0, 1)[:, None]
                return F.conv2d(apart, window, padding=pooling // 2).reshape(m.shape)

            first, second = pooled(first), pooled(second)
        second = F.interpolate(second, (8, 8), mode="bilinear")
        maps = torch.cat([first, second], 1)
    return maps.permute(0, 2, 3, 1).flatten(1, 2).numpy().astype(np.float64)


def distances(queries, rows):
    return np.sqrt(np.square(queries[:, :, None] - rows).sum(axis=3))


@pytest.mark.parametrize("pooling", [1, 3])
def test_memory_of_all_patches_is_patchcore(pooling):
    detector = make(pooling=pooling, n_patches=10_000, aggregation="max").fit(X)
    apart = distances(described(NEW, pooling), described(X, pooling).reshape(-1, 10))
    nearest = apart.min(axis=2)
    assert_allclose(detector.score_samples(NEW), -nearest.max(axis=1), rtol=1e-5)
    expected = F.interpolate(
        torch.from_numpy(nearest).reshape(5, 1, 8, 8), (16, 16), mode="bilinear"
    )
    assert_allclose(detector.anomaly_map(NEW), expected[:, 0], rtol=1e-4)
    for share, k in ((1e-6, 1), (0.05, 3), (1, 64)):
        other = make(pooling=pooling, n_patches=10_000, share=share).fit(X)
        top = np.sort(nearest, axis=1)[:, -k:].mean(axis=1)
        assert_allclose(other.score_samples(NEW), -top, rtol=1e-5)


def test_reweighted_scores_are_equation_7():
    detector = make(n_patches=10_000, aggregation="reweighted").fit(X)
    rows = described(X).reshape(-1, 10)
    for patches, score in zip(described(NEW), detector.score_samples(NEW), strict=True):
        apart = distances(patches[None], rows)[0]
        q = apart.min(axis=1).argmax()
        m = apart[q].argmin()
        around = np.argsort(np.linalg.norm(rows - rows[m], axis=1))[:9]
        weight = 1 - np.exp(apart[q, m]) / np.exp(apart[q, around]).sum()
        assert_allclose(-score, weight * apart[q, m], rtol=1e-4)


def test_cosine_distance_is_averaged_over_stages():
    detector = make(n_patches=10_000, metric="cosine", aggregation="max").fit(X)

    def cosines(stage):
        a, b = described(NEW)[..., stage], described(X).reshape(-1, 10)[:, stage]
        a, b = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (a, b))
        return a @ b.T

    apart = 1 - (cosines(slice(0, 4)) + cosines(slice(4, 10))) / 2
    expected = apart.min(axis=2).max(axis=1)
    assert_allclose(detector.score_samples(NEW), -expected, rtol=1e-4)


def compressed(patches):
    """Patches of two stages, of four and six features, at about the same length."""
    parts = []
    for stage in (slice(0, 4), slice(4, 10)):
        x, mean = patches[..., stage], np.square(described(X)[..., stage]).sum(2).mean()
        parts.append(x / np.sqrt(np.square(x).sum(axis=-1, keepdims=True) + mean))
    return np.concatenate(parts, axis=-1)


def mahalanobis(patches, rows):
    """Distances to the nearest row, by scikit-learn's covariance and SciPy."""
    blocks = [ShrunkCovariance().fit(b).precision_ for b in np.split(rows, [4], axis=1)]
    return cdist(patches, rows, "mahalanobis", VI=block_diag(*blocks)).min(axis=1)


def test_mahalanobis_distance_is_whitened_stage_by_stage():
    detector = make(n_patches=10_000, metric="mahalanobis", aggregation="max").fit(X)
    rows, new = compressed(described(X).reshape(-1, 10)), compressed(described(NEW))
    expected = [mahalanobis(patches, rows).max() for patches in new]
    assert_allclose(detector.score_samples(NEW), -np.array(expected), rtol=1e-4)
    memory = detector._density  # without a fold, its patches are in nothing
    memory.settle(without=2)
    rows = [c.rows for k, c in enumerate(memory.coresets) if k != 2]
    rows = compressed(np.concatenate(rows).astype(np.float64))
    found = memory.score(described(NEW)[:1].astype(np.float32))
    assert_allclose(found[0], mahalanobis(new[0], rows), rtol=1e-4)


def test_mahalanobis_of_what_does_not_vary():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        flat = np.ones((24, 16, 16)) * RNG.rand(24, 1, 1)
        same = make(metric="mahalanobis").fit(flat)
        black = make(metric="mahalanobis").fit(np.zeros((24, 16, 16)))
    for detector in (same, black):
        assert np.isfinite(detector.score_samples(NEW)).all()


def test_positions_are_scaled_by_their_held_out_scores():
    plain = make(n_patches=10_000).fit(X)
    scaled = make(n_patches=10_000, scale_positions=True).fit(X)
    inputs = plain._check_inputs(X)
    folds = np.empty(24, int)  # by the patches in each fold's part of the memory
    rows = described(X)
    memory = scaled._density
    for k, coreset in enumerate(memory.coresets):
        for i in range(24):
            if np.abs(coreset.rows - rows[i, 0]).sum(axis=1).min() < 1e-4:
                folds[i] = k
    held_out = np.empty((24, 64))
    for i in range(24):
        others = rows[folds != folds[i]].reshape(-1, 10)
        held_out[i] = distances(rows[i : i + 1], others).min(axis=2)
    assert_allclose(scaled._typical, held_out.mean(axis=0), rtol=1e-4)
    top = np.sort(held_out / held_out.mean(axis=0), axis=1)[:, -1:].mean(axis=1)
    assert_allclose(scaled.score_samples(X), -top, rtol=1e-4)  # share 0.02 of 64
    (_, found), *_ = plain._position_scores(inputs)
    (_, divided), *_ = scaled._position_scores(inputs)
    scale = held_out.mean(axis=0).reshape(8, 8)
    assert_allclose(divided, found / scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", ["each", "shared"])
def test_gaussians_are_padim(positions):
    detector = make(scorer="gaussian", positions=positions, aggregation="max").fit(X)
    a, b = described(NEW), described(X)
    expected = np.empty((5, 64))
    for at in range(64):
        rows = b[:, at] if positions == "each" else b.reshape(-1, 10)
        inverse = np.linalg.inv(np.cov(rows, rowvar=False) + 0.01 * np.eye(10))
        apart = a[:, at] - rows.mean(axis=0)
        expected[:, at] = np.sqrt(np.einsum("ij,jk,ik->i", apart, inverse, apart))
    assert_allclose(detector.score_samples(NEW), -expected.max(axis=1), rtol=2e-3)
    found = next(detector._position_scores(detector._check_inputs(NEW[:4])))[1]
    assert_allclose(found.reshape(4, 64), expected[:4], rtol=2e-3)


def test_channels_are_chosen_at_random_as_in_padim():
    detector = make(n_features=3, n_patches=10_000, aggregation="max").fit(X)
    chosen = detector._channels
    assert len(set(chosen)) == 3
    rows = described(X).reshape(-1, 10)[:, chosen]
    nearest = distances(described(NEW)[:, :, chosen], rows).min(axis=2)
    assert_allclose(detector.score_samples(NEW), -nearest.max(axis=1), rtol=1e-4)


def test_any_outlier_detector_on_patches():
    scorer = LocalOutlierFactor(novelty=True)
    detector = make(scorer=scorer, n_patches=10_000, aggregation="max").fit(X)
    rows = described(X).reshape(-1, 10).astype(np.float32)
    lof = LocalOutlierFactor(novelty=True).fit(rows)
    scores = lof.score_samples(described(NEW).reshape(-1, 10).astype(np.float32))
    best = lof.score_samples(rows).max()
    expected = np.maximum(best - scores, 0).reshape(5, 64).max(axis=1)
    assert_allclose(detector.score_samples(NEW), -expected, rtol=1e-3)
    few = make(scorer=scorer, n_patches=50).fit(X)
    assert few._density.fitted.n_samples_fit_ == 50


# ------------------------------------------------------------------------ the coreset


def naive(rows, n):
    chosen = [int(np.linalg.norm(rows - rows.mean(axis=0), axis=1).argmin())]
    while len(chosen) < n:
        apart = np.linalg.norm(rows[:, None] - rows[chosen], axis=2).min(axis=1)
        chosen.append(int(apart.argmax()))
    return chosen


def test_coreset_is_the_naive_greedy_one():
    rows = RNG.randn(200, 8)
    assert_array_equal(k_centre(rows, 40), naive(rows, 40))
    assert len(k_centre(np.repeat(rows[:5], 9, axis=0), 40)) == 5  # no copies
    assert len(k_centre(np.ones((20, 8)), 40)) == 1


def test_coreset_in_a_projection_covers_as_well():
    rows = RNG.randn(400, 5) @ RNG.randn(5, 300)  # 300 features, of which 5 count

    def radius(chosen):
        return np.linalg.norm(rows[:, None] - rows[chosen], axis=2).min(axis=1).max()

    assert radius(k_centre(rows, 60)) < 1.25 * radius(naive(rows, 60))


def test_coreset_of_few_rows_is_the_greedy_one():
    rows = RNG.randn(200, 4).astype(np.float32)
    coreset = Coreset(50, 4)
    for part in np.array_split(rows, 3):
        coreset.add(part)
    coreset.reduce()
    assert_array_equal(coreset.rows, rows[naive(rows, 50)])
    whitened, stretch = Coreset(50, 4), np.diag([9, 1, 1, 1]).astype(np.float32)
    whitened.add(rows)
    whitened.reduce(lambda part: part @ stretch)
    assert_array_equal(whitened.rows, rows[naive(rows @ stretch, 50)])


def test_coreset_of_a_stream_is_bounded_and_covers():
    rows = RNG.randn(3000, 4).astype(np.float32)
    coreset = Coreset(50, 4)
    for part in np.array_split(rows, 30):
        coreset.add(part)
        assert len(coreset) <= 5 * 50
        if RNG.rand() < 0.3:
            coreset.reduce()
    coreset.reduce()
    assert len(coreset) == 50
    radius = np.linalg.norm(rows[:, None] - coreset.rows, axis=2).min(axis=1).max()
    whole = rows[k_centre(rows, 50)]
    best = np.linalg.norm(rows[:, None] - whole, axis=2).min(axis=1).max()
    assert radius < 3 * best


@pytest.mark.parametrize("n_parts", [1, 20])
def test_outliers_do_not_fill_a_coreset(n_parts):
    rows = RNG.randn(10_000, 4).astype(np.float32)
    outliers = RNG.permutation(len(rows))[:100]  # a hundredth
    rows[outliers] = 1000 * RNG.randn(100, 4)
    coreset = Coreset(100, 4)
    for part in np.array_split(rows, n_parts):
        coreset.add(part)
    coreset.reduce()
    far = np.linalg.norm(coreset.rows, axis=1) > 10
    assert 1 <= far.sum() <= 10  # four expected
    greedy = rows[k_centre(rows, 100)]
    assert np.mean(np.linalg.norm(greedy, axis=1) > 10) > 0.8


def test_memory_is_capped_in_patches():
    detector = make(n_patches=100).fit(X)
    assert len(detector._density.rows()) == 100
    assert len(pickle.dumps(detector)) < 30_000


# ------------------------------------------------------------------------- thresholds


def test_held_out_by_image_and_its_group():
    groups = np.repeat(np.arange(12), 2)
    detector = make(n_patches=100_000).fit(X, groups=groups)
    b = described(X)
    found = detector.score_samples(X)
    # the other images of an image's fold are left out, too: so it is farther than from
    # all images outside its group, and as far as from some choice of folds
    for i in range(0, 24, 5):
        others = b[groups != groups[i]].reshape(-1, 10)
        apart = distances(b[i : i + 1], others).min(axis=2)
        assert -found[i] >= np.sort(apart[0])[-1:].mean() - 1e-4
    full = make(n_patches=100_000, batch_size=7).fit(X, groups=groups)
    assert_allclose(full.score_samples(X), found, rtol=1e-6)
    memory = detector._density
    assert isinstance(memory, PatchMemory)
    sizes = [len(coreset) // 64 for coreset in memory.coresets]
    assert sum(sizes) == 24
    assert all(size % 2 == 0 for size in sizes)  # groups lie in one fold
    memory.settle(without=0)
    assert len(memory.rows()) == 64 * sum(sizes[1:])


def test_copies_are_left_out_together():
    copied = np.concatenate([X, X[:2]])
    with pytest.warns(UserWarning, match="cannot be kept"):
        detector = make(n_patches=100_000, contamination=0.01).fit(copied)
    assert (detector.score_samples(X[:2]) < -0.1).all()


def test_maps_have_a_threshold():
    detector = make(contamination=0.2).fit(X)
    peaks = detector._peaks.scores
    assert np.mean(peaks > detector.map_offset_) == pytest.approx(0.2, abs=0.05)


# ---------------------------------------------------------------------- parts of data


def test_parts_under_mahalanobis_distance():
    """The lengths that features are brought to are those of the first part."""
    same = {"metric": "mahalanobis", "n_patches": 100_000}
    whole = make(**same).fit(X)
    parts = make(**same).partial_fit(X[:12]).partial_fit(X[12:])
    merged = make(**same).fit(X[:12]).merge([make(**same).fit(X[12:])])
    for other in (parts, merged):
        assert_allclose(other.score_samples(NEW), whole.score_samples(NEW), rtol=0.05)
        assert (other.score_samples(X) < -0.01).all()  # held out


def test_partial_fit_and_merge():
    whole = make(n_patches=100_000).fit(X)
    parts = make(n_patches=100_000).partial_fit(X[:12]).partial_fit(X[12:])
    merged = make(n_patches=100_000).fit(X[:12])
    assert merged.merge([make(n_patches=100_000).fit(X[12:])]) is merged
    for other in (parts, merged):
        assert other.n_samples_seen_ == 24
        assert_allclose(other.score_samples(NEW), whole.score_samples(NEW), rtol=1e-9)
        assert (other.score_samples(X) < -0.01).all()  # held out
    small = make(n_patches=60).partial_fit(X[:12])
    before = small.score_samples(NEW)
    for _ in range(3):
        small.partial_fit(RNG.rand(12, 16, 16))
    assert len(small._density.rows()) <= 60
    assert (small.score_samples(NEW) != before).any()
    with pytest.raises(ValueError, match="cannot be merged"):
        merged.merge([make(metric="cosine").fit(X)])
    assert not hasattr(make(scorer="gaussian"), "partial_fit")


def test_a_small_cache_changes_nothing(tmp_path):
    expected = make().fit(X).score_samples(NEW)
    for options in ({"max_cache_bytes": 0}, {"memory": tmp_path}, {"memory": tmp_path}):
        assert_array_equal(make(**options).fit(X).score_samples(NEW), expected)


# --------------------------------------------------------------------------- the mask


def test_what_the_mask_hides_has_no_part():
    mask = np.zeros((16, 16), int)
    mask[:, 8:] = 255
    detector = make(mask=mask, pooling=1, aggregation="max", n_patches=10_000).fit(X)
    inside = np.arange(64).reshape(8, 8)[:, 4:].ravel()
    rows = described(X, 1)[:, inside].reshape(-1, 10)
    expected = distances(described(NEW, 1)[:, inside], rows).min(axis=2).max(axis=1)
    assert_allclose(detector.score_samples(NEW), -expected, rtol=1e-5)
    maps = detector.anomaly_map(NEW)
    assert not maps[:, :, :8].any()
    assert (maps[:, :, 8:] > 0).all()
    smooth = make(mask=mask, sigma=3.0).fit(X).anomaly_map(NEW)
    inner = smooth[:, :, 8:]
    assert inner[:, :, 0].mean() > 0.8 * inner.mean()  # no dark margin


def test_masks_from_files_and_bad_ones(tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    mask[:16] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    from_file = make(mask=tmp_path / "mask.png").fit(X)
    assert_array_equal(
        from_file.score_samples(NEW), make(mask=mask > 0).fit(X).score_samples(NEW)
    )
    with pytest.raises(ValueError, match="mask leaves none"):
        make(mask=np.zeros((16, 16))).fit(X)
    with pytest.raises(ValueError, match=r"mask has shape \(4,\)"):
        make(mask=np.ones(4)).fit(X)
    with pytest.raises(ValueError, match="mask is for images"):
        PatchDetector(mask=np.ones((4, 4))).fit(RNG.rand(20, 4))


# ------------------------------------------------------------------------- the rest


def test_parameters_that_do_not_fit():
    with pytest.raises(ValueError, match="pooling=2 must be odd"):
        make(pooling=2).fit(X)
    with pytest.raises(ValueError, match="needs scorer='memory'"):
        make(scorer="gaussian", aggregation="reweighted").fit(X)
    with pytest.raises(ValueError, match="method='spade' is none of"):
        PatchDetector.from_paper("spade")


def test_default_stages():
    found = {
        name: tuple(PatchDetector()._default_stages(load_backbone(name, weights=None)))
        for name in ("efficientnet_lite0", "wide_resnet50_2", "resnet18")
    }
    assert found["wide_resnet50_2"] == found["resnet18"] == ("stage2", "stage3")
    assert found["efficientnet_lite0"] == ("stage3", "stage4", "stage5")


@pytest.mark.parametrize(
    ("method", "changes", "n_channels"),
    [
        ("patchcore", {"image_size": 32}, 1536),
        ("padim", {"image_size": 32}, 100),
        ("anomalydino", {"backbone": "timm/vit_tiny_patch16_224"}, 192),
    ],
)
def test_papers_run_on_random_weights(method, changes, n_channels):
    images = RNG.randint(0, 256, (4, 40, 40, 3)).astype(np.uint8)
    detector = PatchDetector.from_paper(
        method, weights=None, random_state=0, n_patches=200, **changes
    )
    with pytest.warns(UserWarning, match="contamination"):
        detector.fit(images)
    assert len(detector._channels) == n_channels
    assert np.isfinite(detector.score_samples(images[::-1])).all()
    assert detector.anomaly_map(images).shape == (4, 40, 40)


def test_tokens_and_vectors_are_maps_too():
    tokens = np.arange(12, dtype=np.float32).reshape(1, 6, 2)
    assert patch_maps([tokens], 1).shape == (1, 2, 6, 1)
    assert patch_maps([tokens[0]], 3).shape == (6, 2, 1, 1)


@pytest.mark.parametrize("scorer", ["memory", "gaussian"])
def test_saved_and_loaded(tmp_path, scorer):
    options = {"scorer": scorer, "metric": "mahalanobis", "mask": np.eye(16) + 1}
    detector = make(**options).fit(X)
    skdeepad.save(detector, tmp_path / "detector.skdeepad")
    again = skdeepad.load(tmp_path / "detector.skdeepad")
    assert_array_equal(again.score_samples(NEW), detector.score_samples(NEW))
    assert_array_equal(again.anomaly_map(NEW), detector.anomaly_map(NEW))
    assert N_FOLDS == 5  # files hold a coreset for each


def test_recalibrated_by_new_good_images():
    detector = make().fit(X)
    more = RNG.rand(40, 16, 16)
    detector.recalibrate(more, contamination=0.2)
    assert np.mean(detector.predict(more) < 0) == pytest.approx(0.2, abs=0.05)
    peaks = detector.anomaly_map(more).max(axis=(1, 2))
    assert np.mean(peaks > detector.map_offset_) == pytest.approx(0.2, abs=0.05)
