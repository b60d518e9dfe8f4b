"""What X may be, and what each kind of bad X is told; Pillow is the reference."""

from __future__ import annotations

import io
import tracemalloc
import warnings
from collections import deque
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.base import BaseEstimator

from skdeepad.inputs import ImagePaths, Images, Vectors, check_inputs, load_batches

WHITE = {np.uint8: 255, np.uint16: 65535, np.int64: 255, np.bool_: 1}


def check(X, *, vectors=None, image_shape=None):
    return check_inputs(
        BaseEstimator(), X, vectors=vectors, image_shape=image_shape, reset=True
    )


def load(inputs, size=None, channels=None):
    (batch,) = load_batches(inputs, [np.arange(len(inputs))], size, channels)
    return batch


def read(X, size=None, channels=None, image_shape=None):
    """All images of X, as the array that a network is given."""
    batch = load(check(X, vectors=False, image_shape=image_shape), size, channels)
    assert not batch.failed
    assert batch.values.dtype == torch.float32
    return batch.values.numpy()


def noise(*shape, dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.floating):
        return rng.random(shape).astype(dtype)
    return rng.integers(0, WHITE[dtype] + 1, size=shape).astype(dtype)


def save(path, pixels, mode=None, **options):
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


# ----------------------------------------------------------------------------- vectors


@pytest.mark.parametrize(
    "make",
    [
        np.asarray,
        np.ndarray.tolist,
        list,
        pd.DataFrame,
        torch.from_numpy,
        lambda rows: torch.from_numpy(rows).requires_grad_(),
    ],
)
def test_rows_of_numbers_are_vectors(make):
    rows = noise(5, 4, dtype=np.float64)
    inputs = check(make(rows))
    assert type(inputs) is Vectors
    assert inputs.shape == (4,)
    assert_array_equal(load(inputs).values, rows.astype(np.float32))


def test_the_backbone_says_what_rows_of_numbers_are():
    rows = noise(5, 4, dtype=np.float64)
    assert type(check(rows, vectors=True)) is Vectors
    # an "mlp" on flattened images takes them as they are
    assert check(rows, vectors=None, image_shape=(2, 2)).shape == (1, 2, 2)
    with pytest.raises(ValueError, match=r"rows of 4 numbers.*Set image_shape="):
        check(rows, vectors=False)


@pytest.mark.parametrize("kind", ["images", "paths"])
def test_a_backbone_of_vectors_refuses_images(kind, image_files):
    X = noise(3, 8, 8) if kind == "images" else image_files.train
    with pytest.raises(ValueError, match=f"{kind}.*Choose a backbone for images"):
        check(X, vectors=True)


# -------------------------------------------------------------------- flattened images


@pytest.mark.parametrize("shape", [(6, 5), (1, 6, 5), (3, 6, 5)])
@pytest.mark.parametrize("make", [np.asarray, np.ndarray.tolist, pd.DataFrame])
def test_flattened_images(shape, make):
    images = noise(4, *shape)
    inputs = check(make(images.reshape(4, -1)), image_shape=shape)
    assert type(inputs) is Images
    assert inputs.shape == (1, *shape)[-3:]
    assert_array_equal(
        load(inputs).values, images.reshape(4, *inputs.shape).astype(np.float32) / 255
    )


def test_flattened_images_of_another_shape_are_refused():
    with pytest.raises(
        ValueError,
        match=r"X has 30 features, but image_shape=\(6, 6\) is expecting 36",
    ):
        check(noise(4, 30), image_shape=(6, 6))


@pytest.mark.parametrize("shape", [(64,), (1, 1, 8, 8), (-8, -8), ("8", 8), (0, 8)])
@pytest.mark.parametrize("flat", [True, False])
def test_an_image_shape_that_is_none_is_refused(shape, flat):
    X = noise(4, 64) if flat else noise(4, 8, 8)
    with pytest.raises(ValueError, match="image_shape="):
        check(X, image_shape=shape)


# -------------------------------------------------------------------- arrays of images


@pytest.mark.parametrize(
    "dtype",
    [np.uint8, np.uint16, np.int64, np.bool_, np.float16, np.float32, np.float64],
)
@pytest.mark.parametrize("channels", [None, 1, 3, 4])
@pytest.mark.parametrize("last", [True, False])
def test_arrays_of_images(dtype, channels, last):
    shape = (3, 6, 5) if channels is None else (3, channels, 6, 5)
    first = noise(*shape, dtype=dtype)
    X = np.ascontiguousarray(np.moveaxis(first, 1, -1)) if channels and last else first
    expected = first.reshape(3, -1, 6, 5).astype(np.float32) / WHITE.get(dtype, 1)
    assert check(X).shape == expected.shape[1:]
    assert_array_equal(read(X), expected)


@pytest.mark.parametrize(
    "make",
    [
        torch.from_numpy,
        lambda X: torch.from_numpy(X.astype(np.float32) / 255).requires_grad_(),
        lambda X: (torch.from_numpy(X) / 255).bfloat16(),
        lambda X: torch.from_numpy(X).permute(0, 2, 3, 1),
        lambda X: list(torch.from_numpy(X)),
        lambda X: list((torch.from_numpy(X) / 255).requires_grad_()),
        lambda X: list((torch.from_numpy(X) / 255).bfloat16()),
        list,
        tuple,
        lambda X: np.array([*map(np.copy, X), None], dtype=object)[:-1],
    ],
    ids=[
        *("tensor", "requires_grad", "bfloat16", "channels_last", "tensors"),
        *("tensors_requires_grad", "tensors_bfloat16"),
        *("list", "tuple", "object_array"),
    ],
)
def test_tensors_and_lists_of_images(make):
    images = noise(3, 3, 6, 5)
    # bfloat16 keeps 8 bits
    assert_allclose(read(make(images)), images / 255, atol=2**-8)


def test_views_and_memory_that_may_not_be_written(tmp_path):
    images = noise(8, 6, 5, 3)
    np.save(tmp_path / "images.npy", images)
    frozen = images.copy()
    frozen.setflags(write=False)
    expected = read(images)
    for X in (
        frozen,
        np.load(tmp_path / "images.npy", mmap_mode="r"),
        np.asfortranarray(images),
        np.repeat(images, 2, axis=0)[::2],
        images[:, :, ::-1][:, :, ::-1],
    ):
        assert_array_equal(read(X), expected)
    assert_array_equal(images, noise(8, 6, 5, 3))  # nobody wrote


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 8, 3), "either axis 1 or axis 3"),
        ((2, 1, 8, 4), "either axis 1 or axis 3"),
        ((2, 5, 8, 6), "neither axis 1 nor axis 3"),
    ],
)
def test_image_shape_settles_the_channel_axis(shape, message):
    X = noise(*shape)
    with pytest.raises(ValueError, match=rf"{message}.*Set image_shape="):
        check(X)
    first, last = np.float32(X) / 255, np.float32(np.moveaxis(X, -1, 1)) / 255
    for expected in (first, last):
        assert_array_equal(read(X, image_shape=expected.shape[1:]), expected)
    with pytest.raises(ValueError, match=r"but image_shape=\(3, 9, 9\) is expected"):
        check(X, image_shape=(3, 9, 9))


def test_image_shape_of_grey_images():
    X = noise(4, 8, 6)
    for shape in ((8, 6), (1, 8, 6)):
        assert_array_equal(read(X, image_shape=shape), read(X))
    with pytest.raises(ValueError, match=r"image_shape=\(1, 6, 8\) is expected"):
        check(X, image_shape=(6, 8))


@pytest.mark.parametrize(
    "X",
    [
        noise(4, 9, 8),
        noise(4, 9, 8, 3),
        noise(4, 3, 9, 8),
        noise(4, 3, 9, 8, dtype=np.float32),
    ],
)
def test_nothing_is_copied_before_its_batch(X):
    assert np.shares_memory(check(X).rows, X)
    flat = X.reshape(4, -1)
    assert np.shares_memory(check(flat, image_shape=(9, 8, X.size // 288)).rows, flat)


def test_batches_are_all_that_is_converted():
    X = np.zeros((4000, 16, 16, 3), dtype=np.uint8)
    tracemalloc.start()
    try:
        inputs = check(X)
        for _ in load_batches(inputs, np.arange(4000).reshape(-1, 50), None, 3):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < X.nbytes / 4


# ---------------------------------------------------------------- channels and resizing


def test_opacity_shows_white():
    rgba = noise(3, 4, 6, 5, dtype=np.float32)
    opacity = rgba[:, 3:]
    rgb = rgba[:, :3] * opacity + 1 - opacity
    assert_allclose(read(rgba, channels=3), rgb, rtol=1e-6)
    assert_allclose(read(rgba, channels=1), luma(rgb), rtol=1e-5)


def luma(rgb):
    return np.einsum("c,nchw->nhw", [0.299, 0.587, 0.114], rgb)[:, None]


def test_colour_becomes_pillows_grey(photos):
    grey = [np.asarray(Image.fromarray(photo).convert("L")) for photo in photos]
    # Pillow rounds to whole grey levels
    assert abs(255 * read(photos, channels=1)[:, 0] - grey).max() < 0.51


def test_grey_is_repeated_for_the_network(image_files):
    grey = read(image_files.train, channels=3)
    assert grey.shape[1] == 3
    assert_array_equal(grey, np.repeat(read(image_files.train), 3, axis=1))


def test_channels_that_nothing_can_be_made_of():
    with pytest.raises(ValueError, match="5 channels, but the backbone takes 3"):
        read(noise(2, 5, 8, 6), channels=3, image_shape=(5, 8, 6))


@pytest.mark.parametrize("size", [(32, 32), (7, 11), (20, 5), (50, 45), (1, 2)])
def test_resizing_is_pillows_bilinear_filter(size, photos):
    def resized(plane):
        image = Image.fromarray(plane.astype(np.float32) / 255)
        return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))

    planes = np.moveaxis(photos[:5], -1, 1)
    expected = [[resized(plane) for plane in image] for image in planes]
    assert_allclose(read(photos[:5], size=size), expected, atol=1e-5)


sides = st.integers(1, 24)


@st.composite
def uint8_images(draw):
    shape = draw(st.tuples(st.integers(1, 3), sides, sides, st.sampled_from([1, 3])))
    return draw(arrays(np.uint8, shape))


@settings(
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    images=uint8_images(),
    # torch resizes channels-last images to a single column wrongly
    size=st.none() | st.tuples(sides, st.integers(2, 24)),
    channels=st.sampled_from([1, 3]),
)
@example(images=noise(3, 13, 9, 3), size=(32, 20), channels=3)
@example(images=noise(3, 13, 9, 1), size=(32, 20), channels=3)
@example(images=noise(3, 13, 9, 3), size=(5, 7), channels=1)
def test_every_form_of_an_image_gives_the_same_batch(images, size, channels, tmp_path):
    first = np.ascontiguousarray(np.moveaxis(images, -1, 1))
    image_shape = first.shape[1:]
    paths = [
        save(tmp_path / f"{i}.png", image if image_shape[0] == 3 else image[..., 0])
        for i, image in enumerate(images)
    ]
    batches = [
        # repeating grey is left to the network
        np.repeat(batch, channels // batch.shape[1], axis=1)
        for batch in (
            read(images, size, channels, image_shape),
            read(first, size, channels, image_shape),
            read(first.reshape(len(first), -1), size, channels, image_shape),
            read(paths, size, channels),
        )
    ]
    for batch in batches[1:]:
        assert_array_equal(batch, batches[0])
    assert batches[0].shape == (len(images), channels, *(size or image_shape[1:]))


def test_a_sample_is_known_by_its_content():
    images = noise(3, 6, 5, 3)
    inputs = check(images)
    digests = [inputs.digest(i) for i in range(3)]
    assert len(set(digests)) == 3
    first = check(np.ascontiguousarray(np.moveaxis(images, -1, 1))[::-1])
    assert [first.digest(i) for i in (2, 1, 0)] == digests
    # the same bytes, in another shape or on another scale, are other images
    flat = first.rows.reshape(3, -1)
    assert check(flat, image_shape=(3, 6, 5)).digest(2) == digests[0]
    assert check(flat, image_shape=(3, 5, 6)).digest(2) != digests[0]
    bits = images // 128
    assert check(bits).digest(0) != check(bits.astype(bool)).digest(0)


# -------------------------------------------------------------------------- bad values


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(3, 4), (3, 8, 6), (3, 8, 6, 3)])
def test_numbers_that_are_not_finite(value, shape):
    X = noise(*shape, dtype=np.float32)
    X[1, ..., 2] = value
    with pytest.raises(ValueError, match=r"Input X contains (NaN|infinity)"):
        check(X)


@pytest.mark.parametrize(
    "X",
    [
        noise(2, 8, 6).astype(np.float32),
        noise(2, 8, 6, dtype=np.float64) - 0.5,
        noise(2, 8, 6).astype(np.int64) - 1,
        noise(2, 8, 6).astype(np.int64) * 2,
        noise(2, 8, 6).astype(np.int8),
    ],
)
def test_values_that_are_no_pixels(X):
    with pytest.raises(ValueError, match=r"uint8 in 0\.\.255 or floats in 0\.\.1"):
        check(X)
    with pytest.raises(ValueError, match=r"uint8 in 0\.\.255 or floats in 0\.\.1"):
        check(X.reshape(2, -1), image_shape=(8, 6))


def test_resampling_may_overshoot_a_little():
    X = noise(2, 8, 6, dtype=np.float32) * 1.01 - 0.005
    assert_array_equal(read(X)[:, 0], X)


@pytest.mark.parametrize(
    "X",
    [
        [],
        (),
        np.empty(0),
        np.empty(0, dtype=object),
        pd.Series([], dtype=object),
        np.empty((0, 5)),
        np.empty((3, 0)),
        np.empty((0, 8, 6), dtype=np.uint8),
        np.empty((0, 3, 8, 6), dtype=np.uint8),
        torch.empty((0, 3, 8, 6)),
        np.empty((3, 0, 6), dtype=np.uint8),
        np.empty((3, 8, 0), dtype=np.uint8),
    ],
    ids=lambda X: f"{type(X).__name__}{tuple(getattr(X, 'shape', ()))}",
)
def test_emptiness(X):
    with pytest.raises(ValueError, match=r"(?i)\b0 (sample|feature|pixel)|empty"):
        check(X)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.arange(5.0), "Reshape your data"),
        ([1.0, 2.0], "Reshape your data"),
        (np.float64(3), "Reshape your data"),
        (None, "Reshape your data"),
        (noise(2, 2, 3, 4, 5), "dim 5"),
        ([["a", "b"], ["c", "d"]], "Convert your data to numeric"),
        ([noise(1), noise(2)], "different shapes"),
    ],
)
def test_shapes_that_mean_nothing(X, message):
    with pytest.raises(ValueError, match=message):
        check(X)


# ------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        deque,
        lambda paths: list(map(Path, paths)),
        lambda paths: [*paths[:2], *map(Path, paths[2:])],
        np.array,
        lambda paths: np.array(paths, dtype=object),
        lambda paths: np.array(list(map(Path, paths)), dtype=object),
        lambda paths: np.array(paths)[:, None],
        lambda paths: np.array(paths, dtype=object)[:, None],
        lambda paths: pd.Series(paths, index=range(9, 9 + len(paths))),
        lambda paths: pd.Series(list(map(Path, paths)), index=[1] * len(paths)),
        lambda paths: pd.DataFrame({"path": paths}, index=range(9, 9 + len(paths))),
    ],
)
def test_sequences_of_paths(make, image_files, textures):
    X = make([str(path) for path in image_files.train])
    inputs = check(X)
    assert type(inputs) is ImagePaths
    assert inputs.rows.tolist() == image_files.train
    assert inputs.shape is None
    assert_array_equal(read(X), read(textures.X_train))


@pytest.mark.parametrize("make", [str, Path])
def test_one_path_is_no_sequence(make):
    with pytest.raises(ValueError, match="one path; pass a list of image paths"):
        check(make("image.png"))


@pytest.mark.parametrize("position", [0, 2])
@pytest.mark.parametrize("value", [3, None, np.nan])
@pytest.mark.parametrize("make", [list, pd.Series])
def test_something_else_among_paths(position, value, make, image_files):
    X = [str(path) for path in image_files.train]
    X[position] = value
    message = rf"X holds paths, but X\[{position}\] is {value}"
    with pytest.raises(ValueError, match=message):
        check(make(X, **({} if make is list else {"dtype": object})))


def test_missing_files_are_named_with_their_positions(image_files, tmp_path):
    X = [*image_files.train[:3], "no/such.png", image_files.train[3], tmp_path]
    with pytest.raises(FileNotFoundError) as error:
        check(X)
    assert "2 of 6" in str(error.value)
    for i in (3, 5):
        assert f"{str(X[i])!r} (X[{i}])" in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"\(X\[10\]\), and 14 more$"):
        check([f"no/{i}.png" for i in range(25)])


# ------------------------------------------------------------------------------- files


def bytes_of(image, suffix):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, suffix)
    return buffer.getvalue()


def damage(kind):
    png, jpeg = (bytes_of(noise(40, 40, 3), suffix) for suffix in ("PNG", "JPEG"))
    flipped = bytearray(png)
    flipped[20] ^= 255  # in the header, whose checksum tells
    return {
        "text": b"no image at all",
        "zero bytes": b"",
        "truncated png": png[:-100],
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "png header only": png[:40],
        "flipped bits": bytes(flipped),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        *("text", "zero bytes", "truncated png", "truncated jpeg"),
        *("png header only", "flipped bits", "deleted", "too large", "not finite"),
        "no pixels",
    ],
)
def test_unreadable_files_are_told_apart(kind, image_files, tmp_path, monkeypatch):
    path = tmp_path / "bad.tif"
    if kind == "too large":
        save(path, noise(80, 80))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    elif kind in ("not finite", "no pixels"):
        value = np.nan if kind == "not finite" else 255
        save(path, np.full((8, 6), value, dtype=np.float32))
    else:
        path.write_bytes(b"" if kind == "deleted" else damage(kind))
    X = [*image_files.train[:2], path, image_files.train[2]]
    inputs = check(X)
    if kind == "deleted":
        path.unlink()
    batch = load(inputs, channels=3)
    assert batch.index.tolist() == [0, 1, 3]
    assert list(batch.failed) == [2]
    assert len(batch.failed[2]) > 10  # says why
    assert_array_equal(batch.values, read(image_files.train[:3], channels=3))


def test_a_batch_of_unreadable_files(tmp_path):
    path = tmp_path / "bad.png"
    path.touch()
    batch = load(check([path, path]))
    assert batch.values is None
    assert batch.index.tolist() == []
    assert list(batch.failed) == [0, 1]


@settings(
    max_examples=100,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    suffix=st.sampled_from(["PNG", "JPEG", "GIF", "BMP"]),
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), max_size=4),
)
def test_damage_is_seen_or_harmless(suffix, cut, flips, tmp_path):
    raw = bytearray(bytes_of(noise(12, 9), suffix))
    for where, bits in flips:
        raw[int(where * len(raw))] ^= bits
    path = tmp_path / "damaged"
    path.write_bytes(raw[: round(cut * len(raw))])
    batch = load(check([path]), size=(8, 8), channels=3)
    if not batch.failed:
        values = batch.values.numpy()
        assert values.shape == (1, 3, 8, 8)
        assert values.min() >= 0
        assert values.max() <= 1


# --------------------------------------------------------------------------- decoding


def test_grey_and_colour_files(tmp_path):
    grey, colour = noise(6, 5), noise(6, 5, 3)
    paths = [save(tmp_path / "grey.png", grey), save(tmp_path / "colour.png", colour)]
    assert_array_equal(read(paths[:1])[0, 0], np.float32(grey) / 255)
    assert_array_equal(read(paths[1:])[0], np.moveaxis(np.float32(colour) / 255, -1, 0))
    both = read(paths, channels=3)
    assert_array_equal(both, [read([path], channels=3)[0] for path in paths])


def test_palettes_are_looked_up(tmp_path):
    colour = np.repeat(noise(2, 5, 3), 3, axis=0)  # ten colours
    path = save(tmp_path / "p.png", colour, "P", colors=16)
    with Image.open(path) as file:
        assert file.mode == "P"
        expected = np.asarray(file.convert("RGB"))
    assert_array_equal(read([path])[0], np.moveaxis(np.float32(expected) / 255, -1, 0))


def test_one_colour_of_a_palette_may_be_transparent(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "p.png", transparency=1)
    red, white, blue = (1, 0, 0), (1, 1, 1), (0, 0, 1)
    pixels = np.moveaxis(read([tmp_path / "p.png"], channels=3)[0], 0, -1)
    assert_array_equal(pixels, [[red, white], [blue, white]])


def test_one_grey_level_may_be_transparent(tmp_path):
    path = save(
        tmp_path / "l.png", np.array([[0, 51], [102, 51]], np.uint8), transparency=51
    )
    pixels = read([path], channels=1)[0, 0]
    assert_allclose(pixels, [[0, 1], [0.4, 1]], rtol=1e-6)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_files_show_white(mode, tmp_path):
    pixels = noise(6, 5, len(mode))
    path = save(tmp_path / "a.png", pixels)
    with Image.open(path) as file:
        assert file.mode == mode
    colour, opacity = np.split(np.moveaxis(pixels / 255, -1, 0), [-1])
    expected = np.broadcast_to(colour * opacity + 1 - opacity, (3, 6, 5))
    assert_allclose(read([path], channels=3)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_kept(suffix, tmp_path):
    pixels = noise(6, 5, dtype=np.uint16)
    path = save(tmp_path / f"i.{suffix}", pixels)
    assert_array_equal(read([path])[0, 0], np.float32(pixels) / 65535)


def test_one_bit(tmp_path):
    pixels = noise(6, 5, dtype=np.bool_)
    path = save(tmp_path / "1.png", pixels)
    with Image.open(path) as file:
        assert file.mode == "1"
    assert_array_equal(read([path])[0, 0], np.float32(pixels))


def test_cmyk_jpeg(tmp_path, photos):
    path = save(tmp_path / "cmyk.jpg", photos[0], "CMYK", quality=100)
    with Image.open(path) as file:
        assert file.mode == "CMYK"
    # turned into RGB again, but for what JPEG loses
    difference = read([path])[0] - np.moveaxis(photos[0] / 255, -1, 0)
    assert abs(difference).mean() < 2 / 255


def test_float_tiff(tmp_path):
    pixels = noise(6, 5, dtype=np.float32)
    path = save(tmp_path / "f.tif", pixels)
    torch.set_warn_always(True)  # of memory that it may not write, for one
    try:
        with warnings.catch_warnings(action="error"):
            assert_array_equal(read([path])[0, 0], pixels)
    finally:
        torch.set_warn_always(False)


# how the upright image is stored under each EXIF orientation
STORED = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: np.transpose,
    6: np.rot90,
    7: lambda upright: np.rot90(upright, 2).T,
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(("suffix", "tolerance"), [("png", 0), ("jpg", 0.02)])
def test_exif_orientation(orientation, suffix, tolerance, tmp_path, photos):
    upright = np.ascontiguousarray(photos[0, :20, :, 0])  # not square
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](upright))
    path = save(tmp_path / f"exif.{suffix}", stored, exif=exif, quality=100)
    pixels = read([path])[0, 0]
    assert pixels.shape == upright.shape
    assert ImagePaths(np.array([path], dtype=object)).size(0) == upright.shape
    assert abs(pixels - np.float32(upright) / 255).max() <= tolerance
