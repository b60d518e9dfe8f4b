import gzip
import os
import pickle
import sys
from functools import partial
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter
from scipy.stats import ks_2samp

from skdeepad.datasets import (
    _fashion_mnist,
    load_cifar,
    load_fashion_mnist,
    load_image_folder,
    make_texture_defects,
)

KINDS = ("scratch", "blob", "cut_paste", "blur", "missing")
TEXTURES = ("brick", "grass", "gravel")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep every test out of the user's own scikit-learn folder."""
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --------------------------------------------------------------------------- textures


def near(mask):
    """Pixels so near to the mask that the defect's soft border may reach them."""
    if not mask.any():
        return mask
    return distance_transform_edt(~mask) <= 2 + len(mask) / 32


def find_patch(photo, patch, mask):
    """Find `patch` in `photo` or a mirror image, going by the pixels off the defect.

    Returns its place in the photograph and the undamaged patch.
    """
    size = len(patch)
    end = len(photo) - size + 1
    known = np.argwhere(~near(mask))
    found = []
    for flip in (np.s_[:, :], np.s_[::-1], np.s_[:, ::-1], np.s_[::-1, ::-1]):
        mirrored = photo[flip]
        (i, j), *others = known[:: len(known) // 50]
        rows, columns = np.nonzero(mirrored[i : i + end, j : j + end] == patch[i, j])
        for i, j in others:
            fits = mirrored[rows + i, columns + j] == patch[i, j]
            rows, columns = rows[fits], columns[fits]
        places = np.arange(photo.size).reshape(photo.shape)[flip]
        for row, column in zip(rows, columns, strict=True):
            window = np.s_[row : row + size, column : column + size]
            found.append((places[window].min(), mirrored[window]))
    assert len(found) == 1, "the patch is no piece of the photograph, or several"
    assert_array_equal(found[0][1][~near(mask)], patch[~near(mask)])
    return found[0]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    texture=st.sampled_from(TEXTURES),
    counts=st.tuples(*[st.integers(0, 7)] * 3),
    image_size=st.integers(32, 128),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, unique=True),
    seed=st.integers(0, 2**32 - 1),
)
def test_textures_invariants(texture, counts, image_size, kinds, seed):
    n_train, n_good, n_defective = counts
    parameters = dict(
        n_train=n_train,
        n_test_good=n_good,
        n_test_defective=n_defective,
        image_size=image_size,
        kinds=kinds,
    )
    data = make_texture_defects(texture, random_state=seed, **parameters)
    n_test = n_good + n_defective
    assert data.X_train.shape == (n_train, image_size, image_size)
    assert data.X_test.shape == (n_test, image_size, image_size)
    assert data.X_train.dtype == data.X_test.dtype == np.uint8
    assert data.masks_test.shape == data.X_test.shape
    assert data.masks_test.dtype == bool
    assert data.y_test.dtype.kind == "i"
    assert_array_equal(data.y_test == -1, data.masks_test.any(axis=(1, 2)))
    assert_array_equal(data.y_test == 1, data.kinds_test == "good")
    assert (data.y_test == -1).sum() == n_defective
    painted = [np.sum(data.kinds_test == kind) for kind in kinds]
    assert sum(painted) == n_defective
    assert max(painted) - min(painted) <= 1

    again = make_texture_defects(
        texture, random_state=np.random.RandomState(seed), **parameters
    )
    for key in ("X_train", "X_test", "y_test", "masks_test", "kinds_test"):
        assert_array_equal(data[key], again[key])


def test_textures_seeds_differ_and_global_rng_is_left_alone():
    before = np.random.get_state()[1].copy()
    one = make_texture_defects(random_state=1)
    two = make_texture_defects(random_state=2)
    assert_array_equal(np.random.get_state()[1], before)
    for key in ("X_train", "X_test", "y_test", "masks_test"):
        assert (one[key] != two[key]).any()


@pytest.mark.parametrize("image_size", [32, 128])
def test_textures_good_patches_are_of_one_kind_and_never_repeated(image_size):
    photo = skimage.data.gravel()
    data = make_texture_defects(
        "gravel",
        n_train=100,
        n_test_good=100,
        n_test_defective=0,
        image_size=image_size,
        random_state=0,
    )
    whole = np.zeros((image_size, image_size), dtype=bool)
    patches = np.concatenate([data.X_train, data.X_test])
    places = np.array([find_patch(photo, patch, whole)[0] for patch in patches])
    assert len(set(places)) == 200
    rows, columns = np.divmod(places, len(photo))
    for positions in (rows, columns):  # both sets are spread over the photograph
        assert ks_2samp(positions[:100], positions[100:]).pvalue > 0.01
        assert np.ptp(positions[:100]) > 0.85 * (len(photo) - image_size)


@pytest.mark.parametrize("image_size", [32, 64, 128])
@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_masks_tell_what_is_damaged(texture, image_size):
    photo = getattr(skimage.data, texture)()
    data = make_texture_defects(
        texture,
        n_train=0,
        n_test_good=0,
        n_test_defective=20,
        image_size=image_size,
        random_state=0,
    )
    for patch, mask, kind in zip(
        data.X_test, data.masks_test, data.kinds_test, strict=True
    ):
        good = find_patch(photo, patch, mask)[1]
        change = abs(patch.astype(int) - good)
        assert change[mask].mean() >= 10
        assert change[mask].mean() > 4 * change[~mask].mean()
        assert 0.005 < mask.mean() < 0.3
        if kind == "scratch":
            width = 2 * distance_transform_edt(np.pad(mask, 1)).max()
            assert width <= 2 + image_size / 16
        elif kind == "blob":  # the texture shines through
            assert np.unique(patch[mask]).size > 3
        elif kind == "blur":
            rough = [abs(p - gaussian_filter(p, 1)) for p in (patch / 1.0, good / 1.0)]
            assert rough[0][mask].mean() < 0.6 * rough[1][mask].mean()
        elif kind == "missing":
            assert np.ptp(patch[binary_erosion(mask, iterations=2)]) <= 1


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"texture": "wood"}, "texture"),
        ({"split": "thirds"}, "split"),
        ({"n_train": -1}, "n_train"),
        ({"n_test_good": 1.5}, "n_test_good"),
        ({"n_test_defective": -3}, "n_test_defective"),
        ({"image_size": 31}, "image_size"),
        ({"image_size": 129}, "image_size"),
        ({"kinds": ()}, "kinds"),
        ({"kinds": ("scratch", "dent")}, "dent"),
        ({"kinds": "scratch"}, "kinds"),
        ({"random_state": "seed"}, "random_state"),
    ],
)
def test_textures_name_the_wrong_parameter(wrong, name):
    with pytest.raises(ValueError, match=name):
        make_texture_defects(**wrong)


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_of_halves_share_no_pixel(texture, monkeypatch):
    """On a photograph whose pixels tell their column."""
    columns = np.tile(np.arange(512) // 2, (512, 1)).astype(np.uint8)
    monkeypatch.setattr(skimage.data, texture, lambda: columns)
    options = {"n_test_defective": 0, "image_size": 128, "random_state": 0}
    halves = make_texture_defects(texture, split="halves", **options)
    assert halves.X_train.max() < 128 <= halves.X_test.min()
    assert halves.X_train.min() < 10
    assert halves.X_test.max() > 245
    overlapping = make_texture_defects(texture, **options)
    assert overlapping.X_test.min() < 128 < overlapping.X_train.max()


def test_textures_without_scikit_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(ImportError, match=r"pip install skdeepad\[textures\]"):
        make_texture_defects()


# ---------------------------------------------------------------------- Fashion-MNIST

RNG = np.random.RandomState(0)
IMAGES = {
    split: RNG.randint(256, size=(n, 28, 28), dtype=np.uint8)
    for split, n in (("train", 7), ("test", 4))
}
LABELS = {
    split: RNG.randint(10, size=len(images), dtype=np.uint8)
    for split, images in IMAGES.items()
}


def idx(array):
    header = bytes([0, 0, 8, array.ndim])
    return header + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


def write_fashion_mnist(folder, suffix=".gz"):
    folder.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if suffix else bytes
    for split, prefix in (("train", "train"), ("test", "t10k")):
        for array, what in ((IMAGES, "images-idx3"), (LABELS, "labels-idx1")):
            path = folder / f"{prefix}-{what}-ubyte{suffix}"
            path.write_bytes(pack(idx(array[split])))


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """No Debian package, and a downloader that fails; return its calls."""
    calls = []

    def fail(url, download_root, **kwargs):
        calls.append(download_root)
        raise URLError("no network")

    monkeypatch.setattr(_fashion_mnist, "_DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    return calls


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("layout", [".", "FashionMNIST/raw"])
def test_fashion_mnist_layouts(tmp_path, downloads, layout, suffix, split):
    write_fashion_mnist(tmp_path / layout, suffix)
    data = load_fashion_mnist(split, data_home=tmp_path)
    assert_array_equal(data.images, IMAGES[split])
    assert_array_equal(data.target, LABELS[split])
    assert data.images.dtype == np.uint8
    assert data.images.flags.writeable
    assert data.target.dtype == np.int64
    assert len(data.target_names) == 10
    X, y = load_fashion_mnist(split, data_home=str(tmp_path), return_X_y=True)
    assert_array_equal(X, data.images)
    assert_array_equal(y, data.target)
    assert not downloads


def test_fashion_mnist_order_of_places(tmp_path, cache, downloads, monkeypatch):
    home, debian, cached = tmp_path / "home", tmp_path / "debian", cache
    for i, folder in enumerate((home, debian, cached / "fashion_mnist")):
        monkeypatch.setitem(LABELS, "test", np.full(4, i, dtype=np.uint8))
        write_fashion_mnist(folder)

    def place(data_home):
        return load_fashion_mnist("test", data_home=data_home).target[0]

    assert place(home) == 0
    (home / "t10k-labels-idx1-ubyte.gz").unlink()
    assert place(home) == 1
    assert place(None) == 1
    (debian / "t10k-images-idx3-ubyte.gz").unlink()
    assert place(None) == 2
    assert not downloads


def test_fashion_mnist_failed_download_names_the_ways_out(tmp_path, downloads):
    with pytest.raises(FileNotFoundError) as caught:
        load_fashion_mnist(data_home=tmp_path)
    for way in ("apt-get install dataset-fashion-mnist", "data_home=", "network"):
        assert way in str(caught.value)
    assert "downloading it failed" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)  # torchvision's own
    assert downloads


def test_fashion_mnist_does_not_download_unasked(tmp_path, downloads):
    with pytest.raises(FileNotFoundError, match="download_if_missing=True"):
        load_fashion_mnist(data_home=tmp_path, download_if_missing=False)
    assert not downloads


def test_fashion_mnist_downloads_once_into_the_cache(cache, downloads, monkeypatch):
    def download(url, download_root, **kwargs):
        downloads.append(download_root)
        write_fashion_mnist(Path(download_root), "")
        write_fashion_mnist(Path(download_root), ".gz")

    monkeypatch.setattr(
        "torchvision.datasets.mnist.download_and_extract_archive", download
    )
    for _ in range(2):
        assert_array_equal(load_fashion_mnist("test").images, IMAGES["test"])
    assert downloads
    assert set(downloads) == {str(cache / "fashion_mnist" / "FashionMNIST" / "raw")}
    n_calls = len(downloads)
    load_fashion_mnist("train")
    assert len(downloads) == n_calls


# names of tests are the same in all of pytest's processes
packed = partial(gzip.compress, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("images-idx3", packed(idx(IMAGES["test"]))[:-20], "whole gzip"),
        ("images-idx3", b"<html>404</html>", "whole gzip"),
        ("images-idx3", packed(idx(IMAGES["test"])[:-1]), "announces 3136 "),
        ("images-idx3", packed(idx(IMAGES["test"]) + b"x"), "announces"),
        ("images-idx3", packed(idx(LABELS["test"])), "not an idx file"),
        ("images-idx3", packed(bytes([0, 0, 8, 3, 0])), "not an idx file"),
        ("images-idx3", packed(bytes([0, 0, 9, 3]) + bytes(99)), "not an idx"),
        ("images-idx3", packed(idx(IMAGES["test"][:, 1:])), r"\(4, 27, 28\)"),
        ("labels-idx1", packed(idx(LABELS["test"][1:])), "3 labels"),
        ("labels-idx1", packed(idx(LABELS["test"] + 10)), "labels 0 to 9"),
    ],
)
def test_fashion_mnist_corrupt_files(tmp_path, downloads, name, content, message):
    write_fashion_mnist(tmp_path)
    (tmp_path / f"t10k-{name}-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_fashion_mnist("test", data_home=tmp_path)


def test_fashion_mnist_wrong_split():
    with pytest.raises(ValueError, match=r"'split' parameter .* Got 'valid'"):
        load_fashion_mnist("valid")


@pytest.mark.skipif(
    not _fashion_mnist._DEBIAN_FOLDER.is_dir(),
    reason="needs Debian's package dataset-fashion-mnist",
)
def test_fashion_mnist_of_debian():
    data = load_fashion_mnist("test", download_if_missing=False)
    assert data.images.shape == (10000, 28, 28)
    assert_array_equal(np.bincount(data.target), [1000] * 10)
    # Trousers (1) leave the corners empty, bags (8) are the widest.
    ink = [np.mean(data.images[data.target == c] > 0) for c in (1, 8)]
    assert ink[0] < ink[1]


# ---------------------------------------------------------------------------- folders


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_image_folder(tmp_path):
    touch(
        tmp_path,
        "train/good/b.png",
        "train/good/a.JPG",
        "train/good/.hidden.png",
        "train/good/notes.txt",
        "test/good/000.png",
        "test/crack/001.png",
        "test/crack/000.png",
        "test/crack/002.TIFF",
        "test/hole/000.bmp",
        "test/.cache/000.png",
        "test/readme.png",
        "ground_truth/crack/000_mask.png",
        "ground_truth/crack/001.png",
        "ground_truth/crack/0020_mask.png",
    )
    with pytest.warns(UserWarning, match=r"2 defective images have no mask.*002.TIFF"):
        data = load_image_folder(tmp_path)

    def relative(paths):
        assert paths.dtype == object
        return [p and Path(p).relative_to(tmp_path).as_posix() for p in paths]

    assert relative(data.paths_train) == ["train/good/a.JPG", "train/good/b.png"]
    assert relative(data.paths_test) == [
        "test/crack/000.png",
        "test/crack/001.png",
        "test/crack/002.TIFF",
        "test/good/000.png",
        "test/hole/000.bmp",
    ]
    assert data.kinds_test.tolist() == ["crack", "crack", "crack", "good", "hole"]
    assert data.y_test.tolist() == [-1, -1, -1, 1, -1]
    masks = ["ground_truth/crack/000_mask.png", "ground_truth/crack/001.png"]
    assert relative(data.masks_test) == [*masks, None, None, None]


def test_image_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="train/good"):
        load_image_folder(tmp_path / "nowhere")
    touch(tmp_path, "train/good/notes.txt")
    with pytest.raises(FileNotFoundError, match="test"):
        load_image_folder(str(tmp_path))
    touch(tmp_path, "test/good/0.png")
    with pytest.raises(ValueError, match=r"no image in .*good.*\.jpg"):
        load_image_folder(tmp_path)
    touch(tmp_path, "train/good/0.png")
    assert load_image_folder(tmp_path).y_test.tolist() == [1]
    (tmp_path / "test/good/0.png").unlink()
    with pytest.raises(ValueError, match=r"no image in .*test"):
        load_image_folder(tmp_path)


# ------------------------------------------------------------------------------ CIFAR

PIXELS = RNG.randint(256, size=(12, 3, 32, 32), dtype=np.uint8)
CLASSES = RNG.permutation(12) % 10


def write_pickle(path, content):
    """Pickle as Python 2 with numpy 1 did, whose byte strings are plain strings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pickled = pickle.dumps(content, protocol=3)
    pickled = pickled.replace(b"numpy._core", b"numpy.core")
    if "data" in content:
        data = content["data"].tobytes()
        length = len(data).to_bytes(4, "little")
        assert pickled.count(b"B" + length + data) == 1
        pickled = pickled.replace(b"B" + length + data, b"T" + length + data)
    path.write_bytes(pickled)


@pytest.fixture
def cifar(tmp_path):
    flat = PIXELS.reshape(12, -1)
    labels = CLASSES.tolist()
    folder = tmp_path / "cifar-10-batches-py"
    for i in range(5):
        part = np.s_[2 * i : 2 * i + 2]
        batch = {"data": flat[part], "labels": labels[part]}
        write_pickle(folder / f"data_batch_{i + 1}", batch)
    write_pickle(folder / "test_batch", {"data": flat[10:], "labels": labels[10:]})
    write_pickle(folder / "batches.meta", {"label_names": [*"abcdefghij"]})
    folder = tmp_path / "cifar-100-python"
    for split, part in (("train", np.s_[:10]), ("test", np.s_[10:])):
        batch = {"data": flat[part], "coarse_labels": [c + 10 for c in labels[part]]}
        write_pickle(folder / split, {"fine_labels": labels[part][::-1]} | batch)
    names = {"fine_label_names": ["x"] * 100, "coarse_label_names": ["y"] * 20}
    write_pickle(folder / "meta", names)
    return tmp_path


@pytest.mark.parametrize(
    ("split", "part"), [("train", np.s_[:10]), ("test", np.s_[10:])]
)
@pytest.mark.parametrize("n_classes", [10, 20])
def test_cifar(cifar, n_classes, split, part):
    data = load_cifar(n_classes, split, data_home=cifar)
    assert_array_equal(data.images.transpose(0, 3, 1, 2), PIXELS[part])
    assert_array_equal(data.target, CLASSES[part] + n_classes - 10)
    assert data.images.dtype == np.uint8
    assert data.target.dtype == np.int64
    assert data.target_names == ([*"abcdefghij"] if n_classes == 10 else ["y"] * 20)
    X, y = load_cifar(n_classes, split, data_home=str(cifar), return_X_y=True)
    assert_array_equal(X, data.images)
    assert_array_equal(y, data.target)


def test_cifar_looks_into_scikit_learns_folder(cifar, monkeypatch):
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(cifar))
    assert load_cifar(20, "test").images.shape == (2, 32, 32, 3)


class MakesFolder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_cifar_runs_no_code(cifar, protocol):
    bait = cifar / "bait"
    batch = cifar / "cifar-10-batches-py" / "test_batch"
    batch.write_bytes(pickle.dumps({"data": MakesFolder(bait)}, protocol))
    with pytest.raises(ValueError, match=r"mkdir is not allowed"):
        load_cifar(10, "test", data_home=cifar)
    assert not bait.exists()
    pickle.loads(batch.read_bytes())
    assert bait.exists()  # the bait does bite elsewhere


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "whole CIFAR batch"),
        (b"<html>404</html>", "whole CIFAR batch"),
        (pickle.dumps([1, 2], 3), "whole CIFAR batch"),
        (pickle.dumps({"data": np.zeros((1, 3072), "u1")}, 3), "'labels'"),
        (pickle.dumps({"data": np.zeros((1, 9), "u1"), "labels": [0]}, 3), r"\(1, 9\)"),
        (pickle.dumps({"data": np.zeros((1, 3072)), "labels": [0]}, 3), "float64"),
        (
            pickle.dumps({"data": np.zeros((1, 3072), "u1"), "labels": [0, 1]}, 3),
            "2 labels",
        ),
    ],
)
def test_cifar_corrupt_batch(cifar, content, message):
    (cifar / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_cifar(10, "test", data_home=cifar)


@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_cifar_missing_file(cifar, name):
    (cifar / "cifar-10-batches-py" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}.*cifar-10-python\.tar\.gz"):
        load_cifar(data_home=cifar)


def test_cifar_wrong_parameters():
    with pytest.raises(ValueError, match="n_classes"):
        load_cifar(100)
    with pytest.raises(ValueError, match="split"):
        load_cifar(10, "valid")


def test_defects_in_a_photograph_of_ones_own():
    photo = np.random.RandomState(0).randint(0, 256, (90, 140)).astype(np.uint8)
    made = make_texture_defects(
        photo, n_train=5, n_test_good=2, n_test_defective=3, split="halves",
        random_state=0,
    )  # fmt: skip
    assert made.X_train.shape == made.X_test[:5].shape == (5, 64, 64)
    windows = np.lib.stride_tricks.sliding_window_view(photo[:, :70], (64, 64))
    patch = made.X_train[0]
    turned = [patch, patch[::-1], patch[:, ::-1], patch[::-1, ::-1]]
    assert any((windows == p).all(axis=(2, 3)).any() for p in turned)
    assert "scikit-image" not in made.DESCR
    with pytest.raises(ValueError, match="pass a grey photograph"):
        make_texture_defects(photo[..., None])
    with pytest.raises(ValueError, match="too few for"):
        make_texture_defects(photo[:66, :70], n_train=30)
