"""Tiles of large images: where they lie, what they score, how maps are blended."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from test_patch import described, distances, make
from torch import nn

import skdeepad
from skdeepad import PatchDetector
from skdeepad.detectors._tiles import blend, by_count, fill, mean_of_positions, ramp
from skdeepad.inputs import Images, Tiles, check_inputs
from skdeepad.inputs._tiles import starts

RNG = np.random.RandomState(1)
WIDE = RNG.rand(12, 16, 40).astype(np.float32)  # tiles begin at 0, 12 and 24
NEW = RNG.rand(3, 16, 40).astype(np.float32)
LEFT = (0, 12, 24)


def tiled(**options):
    return make(**{"tile_size": 16, "n_patches": 10_000, **options})


def cut(images):
    """Tiles of images, (n, 3, 16, 16)."""
    return np.stack([images[:, :, x : x + 16] for x in LEFT], axis=1)


def patches_of(images):
    """Patches of all tiles, (n, 3 * 64, 10)."""
    tiles = cut(images)
    return described(tiles.reshape(-1, 16, 16)).reshape(len(images), -1, 10)


# ------------------------------------------------------------------- where tiles lie


def test_tiles_are_evenly_spaced_and_inside():
    assert starts(40, 16, 0.25) == list(LEFT)
    assert starts(16, 16, 0.25) == starts(9, 16, 0.25) == [0]
    assert starts(17, 16, 0.25) == [0, 1]
    assert starts(100, 10, 0.0) == list(range(0, 100, 10))
    for length, overlap in ((123, 0.3), (1000, 0.5), (57, 0.0)):
        found = np.array(starts(length, 32, overlap))
        assert found[0] == 0
        assert found[-1] == length - 32
        steps = np.diff(found)
        assert steps.max() <= np.ceil(32 * (1 - overlap))  # so much overlap, at least
        assert steps.max() - steps.min() <= 1
        fewer = (length - 32) / max(len(found) - 2, 1e-9)
        assert fewer > 32 * (1 - overlap)  # one tile less would overlap less


def test_tiles_hold_the_pixels_of_their_image(tmp_path):
    pixels = RNG.randint(0, 256, (2, 20, 30, 3)).astype(np.uint8)
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for image, path in zip(pixels, paths, strict=True):
        Image.fromarray(image).save(path)
    given = [pixels, paths, [pixels[0], pixels[1][:, :30]], [pixels[0], pixels[1, :12]]]
    for X in given:
        images = check_inputs(
            PatchDetector(), X, vectors=None, image_shape=None, reset=True
        )
        tiles = Tiles(images, (16, 16), 0.0)
        assert len(tiles) == (6 if X is given[-1] else 8)  # 12 rows are one tile's
        for i in range(len(tiles)):
            image, (rows, columns) = tiles.owner[i], tiles.box(i)
            expected = np.moveaxis(np.asarray(pixels[image][rows, columns]), -1, 0)
            assert_array_equal(tiles.read(i, None, 3), np.float32(expected) / 255)
            assert tiles.size(i) == expected.shape[1:]
        assert len({tiles.digest(i) for i in range(len(tiles))}) == len(tiles)


# --------------------------------------------------------------------------- scores


@pytest.mark.parametrize("aggregation", ["top", "max"])
def test_scores_are_of_all_positions_of_the_whole_image(aggregation):
    detector = tiled(aggregation=aggregation, share=0.05).fit(WIDE)
    rows = patches_of(WIDE).reshape(-1, 10)
    nearest = distances(patches_of(NEW), rows).min(axis=2)
    k = 10 if aggregation == "top" else 1  # of 192
    expected = np.sort(nearest, axis=1)[:, -k:].mean(axis=1)
    assert_allclose(detector.score_samples(NEW), -expected, rtol=1e-5)


def test_positions_are_scaled_as_in_a_tile():
    plain, scaled = tiled().fit(WIDE), tiled(scale_positions=True).fit(WIDE)
    assert scaled._typical.shape == (64,)
    tiles = plain._cut(plain._check_inputs(NEW))
    (_, found), (_, divided) = (
        next(d._position_scores(tiles)) for d in (plain, scaled)
    )
    scale = scaled._typical.reshape(8, 8)
    assert_allclose(divided, found / scale, rtol=1e-4, atol=1e-6)


def test_thresholds_are_held_out_by_image():
    detector = tiled(contamination=0.25).fit(WIDE)
    assert detector.n_samples_seen_ == 12
    assert len(detector._held_out.scores) == len(detector._peaks.scores) == 12
    held_out = detector.score_samples(WIDE)
    assert (held_out < -0.01).all()  # its own patches are not in the memory
    assert np.mean(held_out < detector.offset_) == pytest.approx(0.25, abs=0.1)
    sizes = [len(coreset) for coreset in detector._density.coresets]
    assert sum(sizes) == 12 * 192
    assert all(size % 192 == 0 for size in sizes)  # all of an image lies in one fold


def test_neither_batches_nor_neighbours_count(tmp_path):
    detector = tiled().fit(WIDE)
    expected = detector.score_samples(NEW)
    other = tiled(batch_size=7).fit(WIDE)
    assert_allclose(other.score_samples(NEW[::-1])[::-1], expected, rtol=1e-6)
    for i in range(3):
        assert_allclose(detector.score_samples(NEW[i : i + 1]), expected[i], rtol=1e-12)
    for _ in range(2):  # the cache gives tiles in any order
        cached = tiled(memory=tmp_path, max_cache_bytes=0).fit(WIDE)
        assert_allclose(cached.score_samples(NEW), expected, rtol=1e-12)
        assert_array_equal(cached.anomaly_map(NEW), detector.anomaly_map(NEW))


def test_images_of_one_tile_are_as_without_tiles():
    images, new = WIDE[:, :, :16], NEW[:, :, :16]
    plain, one = make(scale_positions=True).fit(images), None
    one = make(scale_positions=True, tile_size=16).fit(images)
    assert_array_equal(one.score_samples(new), plain.score_samples(new))
    assert_array_equal(one.anomaly_map(new), plain.anomaly_map(new))
    assert one.offset_ == plain.offset_
    assert one.map_offset_ == pytest.approx(plain.map_offset_)


def test_sizes_may_differ_and_files_be_missing(tmp_path):
    images = [*WIDE, *(RNG.rand(24, 16).astype(np.float32) for _ in range(4))]
    detector = tiled().fit(images)
    assert detector.n_samples_seen_ == 16
    new = [NEW[0], NEW[1, :9, :20], NEW[2, :, :30]]
    maps = detector.anomaly_map(new)
    assert [m.shape for m in maps] == [x.shape for x in new]
    alone = [detector.score_samples([x, x])[0] for x in new]
    assert_allclose(detector.score_samples(new), alone, rtol=1e-12)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for x, path in zip(NEW, paths, strict=True):
        Image.fromarray(np.uint8(255 * x)).save(path)
    good = detector.score_samples(paths)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[: len(whole) // 2])  # its size can be looked up
    paths[2].write_bytes(b"none")
    with pytest.raises(ValueError, match="2 of 3 images cannot be read"):
        detector.score_samples(paths)
    detector.set_params(on_error="skip")
    with pytest.warns(UserWarning, match="2 of 3 images"):
        scores = detector.score_samples(paths)
    assert_allclose(scores[0], good[0], rtol=1e-12)
    assert np.isnan(scores[1:]).all()


# ----------------------------------------------------------------------------- maps


def test_blended_maps_are_weighted_means_without_a_seam():
    tiles = Tiles(Images(np.zeros((2, 1, 16, 40))), (16, 16), 0.25)
    level = [(i, np.full((16, 16), 3.0, np.float32)) for i in range(6)]
    for image, found in blend(level, tiles):
        assert found.shape == tiles.sizes[image] == (16, 40)
        assert_allclose(found, 3, rtol=1e-6)
    steps = [(i, np.full((16, 16), float(i), np.float32)) for i in range(3)]
    ((_, found),) = blend(
        steps, Tiles(Images(np.zeros((1, 1, 16, 40))), (16, 16), 0.25)
    )
    row = found[5]
    assert_allclose(found, np.broadcast_to(row, found.shape), atol=1e-5)
    assert_allclose(row[:12], 0, atol=1e-6)
    x = np.arange(12.5, 16)  # of the first tile, 12 pixels before the second
    first, second = 16 - x, x - 12
    assert_allclose(row[12:16], second / (first + second), rtol=1e-5)
    assert np.abs(np.diff(row)).max() < 0.3  # of 1 from tile to tile
    assert_allclose(ramp(4), [0.25, 0.75, 0.75, 0.25])


def test_maps_show_where_and_have_a_threshold():
    detector = tiled(contamination=0.25, aggregation="max").fit(WIDE)
    spoilt = NEW.copy()
    spoilt[1, 4:10, 27:33] = 0.0
    maps = detector.anomaly_map(spoilt)
    assert maps.shape == NEW.shape
    change = np.abs(maps - detector.anomaly_map(NEW))
    assert not change[[0, 2]].any()
    assert change[1, 2:12, 25:35].mean() > 5 * change[1, :, :18].mean()
    peaks = detector._peaks.scores
    assert np.mean(peaks > detector.map_offset_) == pytest.approx(0.25, abs=0.1)
    assert set(detector.locate(spoilt).columns) >= {"position", "top", "left", "peak"}
    more = RNG.rand(40, 16, 40)
    detector.recalibrate(more)
    peaks = detector.anomaly_map(more).max(axis=(1, 2))
    assert np.mean(peaks > detector.map_offset_) == pytest.approx(0.25, abs=0.05)
    assert np.mean(detector.predict(more) < 0) == pytest.approx(0.25, abs=0.05)


# --------------------------------------------------------------------------- the mask


@pytest.mark.parametrize("scorer", ["memory", "gaussian"])
def test_the_mask_is_of_whole_images(scorer):
    mask = np.zeros((16, 40), bool)
    mask[:, 20:] = True  # nothing of the first tile; of the second from 8 on
    options = {"scorer": scorer, "positions": "shared", "aggregation": "max"}
    detector = tiled(mask=mask, pooling=1, **options).fit(WIDE)
    tiles = detector._cut(detector._check_inputs(NEW))
    assert [list(tiles.rows[i, :3]) for i in (0, 1)] == [[0, 0, 12], [0, 0, 24]]
    raster = np.zeros((3, 8, 8), bool)
    raster[1, :, 4:] = raster[2] = True

    def looked_at(images):
        rows = described(cut(images).reshape(-1, 16, 16), 1)
        return rows.reshape(len(images), 192, 10)[:, raster.ravel()]

    rows = looked_at(WIDE).reshape(-1, 10)
    if scorer == "memory":
        expected = distances(looked_at(NEW), rows).min(axis=2)
    else:
        inverse = np.linalg.inv(np.cov(rows, rowvar=False) + 0.01 * np.eye(10))
        apart = looked_at(NEW) - rows.mean(axis=0)
        expected = np.sqrt(np.einsum("nij,jk,nik->ni", apart, inverse, apart))
    assert_allclose(detector.score_samples(NEW), -expected.max(axis=1), rtol=2e-3)
    maps = detector.anomaly_map(NEW)
    assert not maps[:, :, :20].any()
    assert (maps[:, :, 20:] > 0).all()
    with pytest.raises(ValueError, match="mask leaves no position of an image of 16 x"):
        tiled(mask=np.zeros((16, 40))).fit(WIDE)


def test_positions_outside_do_not_count():
    scores = np.array([[1, 2, np.nan], [3, np.nan, np.nan], [4, 5, 6], [7, 8, 9]])
    found = {
        tuple(images): values.tolist()
        for images, values in by_count(scores, np.array([0, 0, 1, 2]))
    }
    assert found == {(0, 1, 2): [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}
    assert_allclose(mean_of_positions(scores.astype(np.float32)), [3.75, 5, 7.5])
    empty = mean_of_positions(np.array([[1, np.nan], [3, np.nan]], np.float32))
    assert_allclose(empty, [2, 2])
    raster = np.array([[[np.nan, 1, 2], [np.nan, np.nan, 5]]], np.float32)
    assert_array_equal(fill(raster)[0, 0], [1, 1, 2])


# --------------------------------------------------------------------------- the rest


def test_parts_of_a_stream_and_files(tmp_path):
    whole = tiled().fit(WIDE)
    parts = tiled().partial_fit(WIDE[:6]).partial_fit(WIDE[6:])
    merged = tiled().fit(WIDE[:6]).merge([tiled().fit(WIDE[6:])])
    for other in (parts, merged):
        assert other.n_samples_seen_ == 12
        assert_allclose(other.score_samples(NEW), whole.score_samples(NEW), rtol=1e-9)
    with pytest.raises(ValueError, match="cannot be merged"):
        merged.merge([tiled(tile_size=15).fit(WIDE[:6])])
    skdeepad.save(whole, tmp_path / "tiled.skdeepad")
    again = skdeepad.load(tmp_path / "tiled.skdeepad")
    assert_array_equal(again.score_samples(NEW), whole.score_samples(NEW))
    assert_array_equal(again.anomaly_map(NEW), whole.anomaly_map(NEW))


def test_the_network_sees_tiles_at_its_size():
    assert tiled().fit(WIDE).image_size_ == (16, 16)  # as nothing else tells
    assert tiled(image_size=8).fit(WIDE).image_size_ == (8, 8)
    assert tiled(tile_size=(16, 12)).fit(WIDE).image_size_ == (16, 12)


def test_parameters_that_do_not_suit_tiles():
    with pytest.raises(ValueError, match="not for tiles"):
        tiled(aggregation="reweighted").fit(WIDE)
    with pytest.raises(ValueError, match="Set positions='shared'"):
        tiled(scorer="gaussian").fit(WIDE)
    with pytest.raises(ValueError, match="tile_size=\\(16, 0\\) must be"):
        tiled(tile_size=(16, 0)).fit(WIDE)
    with pytest.raises(ValueError, match="tile_size is for images"):
        PatchDetector(nn.Linear(4, 3), tile_size=16).fit(RNG.rand(20, 4))
