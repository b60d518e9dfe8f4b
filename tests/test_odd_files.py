"""Odd files and odd numbers: read right, or refused in a few words."""

from __future__ import annotations

import datetime

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from test_inputs import check, load, noise, read, save

from skdeepad import GaussianScorer, KNNScorer, MahalanobisFeatureScorer
from skdeepad.inputs import _decode

SCORERS = [KNNScorer, GaussianScorer]


def scores(paths, **parameters):
    detector = MahalanobisFeatureScorer(
        backbone="mnist_lenet", weights=None, image_size=(28, 28), **parameters
    )
    return detector.fit(paths[:-1]).score_samples(paths)


# ------------------------------------------------------------------- float pixels


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (3, 5)])
def test_one_pixel_that_is_not_finite(value, place, tmp_path):
    good = noise(8, 6, dtype=np.float32)
    bad = good.copy()
    bad[place] = value
    X = [save(tmp_path / "good.tif", good), save(tmp_path / "bad.tif", bad)]
    batch = load(check(X))
    assert list(batch.failed) == [1]
    assert "NaN or infinite" in batch.failed[1]
    assert_array_equal(batch.values[0, 0], good)


def test_files_that_are_not_finite_are_named_or_skipped(tmp_path):
    images = noise(9, 28, 28, dtype=np.float32)
    images[8, 2, 2] = np.nan
    paths = [save(tmp_path / f"{i}.tif", image) for i, image in enumerate(images)]
    with pytest.raises(ValueError, match=r"8\.tif' \(X\[8\]\).*NaN or infinite"):
        scores(paths)
    with pytest.warns(UserWarning, match=r"8\.tif' \(X\[8\]\)"):
        skipped = scores(paths, on_error="skip")
    assert_array_equal(np.isnan(skipped), np.arange(9) == 8)


# ------------------------------------------------------------------- large pictures


@pytest.fixture
def strips(monkeypatch):
    """The shapes of what became float32 in one piece."""
    shapes = []
    original = _decode.pixels_to_tensor

    def spy(pixels, white):
        shapes.append(pixels.shape)
        return original(pixels, white)

    monkeypatch.setattr(_decode, "pixels_to_tensor", spy)
    return shapes


LARGE = {
    "L": noise(1500, 900),
    "RGB": noise(1100, 1300, 3),
    "RGBA": noise(1100, 1300, 4),
    "I;16": noise(900, 1500, dtype=np.uint16),
    "F": noise(900, 1500, dtype=np.float32),
}


@pytest.mark.parametrize("mode", LARGE)
@pytest.mark.parametrize("size", [(224, 224), (28, 40), (1600, 31), (100, 2000)])
def test_large_pictures_are_resized_in_strips(mode, size, strips, tmp_path):
    pixels = LARGE[mode]
    path = save(tmp_path / f"large.{'tif' if mode == 'F' else 'png'}", pixels)
    channels = 3 if pixels.ndim == 3 else 1
    from_file = read([path], size, channels)
    if size[1] < pixels.shape[1]:
        assert len(strips) > 1
        assert max(h * w for h, w, *_ in strips) <= _decode.STRIP
    from_array = read(pixels[None], size, channels)
    assert_allclose(from_file, from_array, rtol=0, atol=1e-6)
    whole = torch.from_numpy(read(pixels[None], None, channels))
    assert_allclose(from_file, _decode.resize(whole, size), rtol=0, atol=1e-6)


def test_large_pictures_with_palettes_and_orientations(strips, tmp_path):
    image = Image.fromarray(noise(1100, 1300, 3)).quantize(16)
    path = tmp_path / "palette.png"
    image.save(path, transparency=3)
    whole = read([path], None, 3)
    expected = _decode.resize(torch.from_numpy(whole), (64, 64))
    assert_allclose(read([path], (64, 64), 3), expected, rtol=0, atol=1e-6)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "turned.png", LARGE["L"], exif=exif)
    turned = np.rot90(LARGE["L"], -1)[None]
    assert_allclose(read([path], (64, 64)), read(turned, (64, 64)), rtol=0, atol=1e-6)
    assert max(h * w for h, w, *_ in strips[1:]) <= 1300 * 1100


@pytest.mark.parametrize("shape", [(1024, 1024), (1024, 1024, 3)])
def test_ordinary_pictures_are_resized_whole(shape, strips, tmp_path):
    pixels = noise(*shape)
    path = save(tmp_path / "ordinary.png", pixels)
    found = read([path], (224, 224))
    assert strips == [shape]
    planes = torch.from_numpy(np.atleast_3d(pixels).astype(np.float32)) / 255
    expected = _decode.resize(planes.permute(2, 0, 1)[None], (224, 224))
    assert_array_equal(found, expected)


# ------------------------------------------------------------------- names and integers


def test_names_that_are_too_long(image_files, tmp_path):
    long = tmp_path / ("a" * 5000 + ".png")
    X = [image_files.train[0], long, tmp_path / "none.png"]
    with pytest.raises(FileNotFoundError, match="2 of 3") as error:
        check(X)
    message = str(error.value)
    assert "(X[1])" in message
    assert "none.png' (X[2])" in message
    assert len(message) < 700


@pytest.mark.parametrize("top", [255, 200])
def test_32_bit_tiffs_are_as_32_bit_arrays(top, tmp_path):
    pixels = np.minimum(noise(9, 7), top).astype(np.int32)
    path = save(tmp_path / "i.tif", pixels)
    assert Image.open(path).mode == "I"
    assert_array_equal(read([path]), read(pixels[None]))
    assert read([path]).max() > 0.5


@pytest.mark.parametrize("values", [(0, 65535), (0, 256), (-1, 255)])
def test_32_bit_tiffs_of_another_range_are_refused(values, tmp_path):
    pixels = np.full((4, 4), values[1], dtype=np.int32)
    pixels[1, 1] = values[0]
    path = save(tmp_path / "i.tif", pixels)
    batch = load(check([path]))
    assert f"from {values[0]} to {values[1]}" in batch.failed[0]
    assert "8 or 16 bits" in batch.failed[0]


def test_formats_of_16_bits_that_pillow_widens(tmp_path):
    pixels = noise(6, 5, dtype=np.uint16)
    path = tmp_path / "grey.pgm"
    path.write_bytes(b"P5 5 6 65535\n" + pixels.astype(">u2").tobytes())
    assert_array_equal(read([path]), read(pixels[None]))


# ------------------------------------------------------------------- numbers


def odd(kind):
    X = noise(40, 3, dtype=np.float64)
    return {
        "masked": lambda: np.ma.masked_array(X, mask=X > 0.9),
        "list of masked": lambda: [np.ma.masked_greater(row, 0.9) for row in X],
        "bytes": lambda: [b"a" * 10_000] * 40,
        "array of bytes": lambda: np.array([b"a" * 100] * 40),
        "dates": lambda: np.full((40, 2), "2020-01-01", dtype="M8[D]"),
        "durations": lambda: np.ones((40, 2), dtype="m8[s]"),
        "list of dates": lambda: [[np.datetime64("2020-01-01")]] * 40,
        "python's dates": lambda: [[datetime.date(2020, 1, 1)]] * 40,
        "table": lambda: pd.DataFrame({"a": X[:, 0], "b": pd.Timestamp("2020")}),
        "text": lambda: [["a" * 5000]] * 40,
        "one row": lambda: list(range(5000)),
        "long integers": lambda: [[10**400]] * 40,
        "huge": lambda: X * 1e155,
        "negative": lambda: X * -1e155,
        "NaN": lambda: X * np.nan,
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    [
        *("masked", "list of masked", "bytes", "array of bytes", "dates", "durations"),
        *("list of dates", "python's dates", "table", "text", "one row"),
        *("long integers", "huge", "negative", "NaN"),
    ],
)
@pytest.mark.parametrize("use", [*SCORERS, "inputs"])
def test_odd_numbers_are_refused_in_few_words(kind, use):
    X = odd(kind)
    with pytest.raises((ValueError, TypeError), match=r"\bX\b") as error:
        check(X, vectors=True) if use == "inputs" else use().fit(X)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("kind", ["masked", "huge", "dates"])
@pytest.mark.parametrize("scorer", SCORERS)
def test_odd_numbers_are_refused_by_what_is_fitted(kind, scorer):
    X = odd(kind)
    fitted = scorer().fit(noise(40, X.shape[1], dtype=np.float64))
    remedy = {"masked": "Fill", "huge": "Scale X", "dates": "to numbers"}[kind]
    with pytest.raises(ValueError, match=remedy):
        fitted.score_samples(X)


def test_masks_and_dates_of_images():
    images = noise(3, 8, 6, dtype=np.float32)
    for X in (np.ma.masked_less(images, 0.1), list(np.ma.masked_less(images, 0.1))):
        with pytest.raises(ValueError, match="X has masked"):
            check(X)
    with pytest.raises(ValueError, match="X holds dates or durations"):
        check(images.astype("m8[s]"))
    unmasked = np.ma.masked_array(images, mask=False)
    assert_array_equal(read(unmasked), read(images))


@pytest.mark.parametrize("scorer", SCORERS)
def test_large_numbers_below_the_limit(scorer):
    X = noise(40, 3, dtype=np.float64)
    expected = np.argsort(scorer().fit(X).score_samples(X))
    for rows in (X * 2.0**230, (X * 2.0**58).astype(np.float32)):
        found = scorer().fit(rows).score_samples(rows)
        assert np.isfinite(found).all()
        assert_array_equal(np.argsort(found)[:5], expected[:5])


@pytest.mark.parametrize("scorer", SCORERS)
def test_scorers_take_tensors_as_images_may_be(scorer):
    X = torch.from_numpy(noise(40, 3, dtype=np.float32))
    expected = scorer().fit(X.numpy()).score_samples(X.numpy())
    found = scorer().fit(X.clone().requires_grad_()).score_samples(X.requires_grad_())
    assert_array_equal(found, expected)
    half = X.detach().bfloat16()
    expected = scorer().fit(half.float()).score_samples(half.float())
    assert_array_equal(scorer().fit(half).score_samples(half), expected)


def test_tables_of_another_byte_order():
    rows = np.random.default_rng(0).random((30, 5), dtype=np.float32)
    table = pd.DataFrame(rows.astype(">f4"))
    assert_array_equal(
        KNNScorer().fit(table).score_samples(table),
        KNNScorer().fit(rows).score_samples(rows),
    )
