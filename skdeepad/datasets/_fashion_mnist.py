"""Fashion-MNIST, read from the files of the user, of Debian or of torchvision."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import get_data_home
from sklearn.utils import Bunch
from sklearn.utils._param_validation import StrOptions, validate_params

_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_TARGET_NAMES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


def _read_idx(path: Path, n_dimensions: int) -> NDArray[np.uint8]:
    """Read unsigned bytes in the idx format, gzipped or not.

    The file starts with two zero bytes, the type (8: unsigned byte) and the number
    of dimensions; then the dimensions as big-endian 32-bit integers; then the data.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"{str(path)!r} is not a whole gzip file ({error}); fetch it anew."
            ) from error
    n_header = 4 + 4 * n_dimensions
    if content[:4] != bytes([0, 0, 8, n_dimensions]) or len(content) < n_header:
        raise ValueError(
            f"{str(path)!r} is not an idx file of unsigned bytes with {n_dimensions} "
            "dimension(s); fetch it anew."
        )
    shape = np.frombuffer(content, ">u4", n_dimensions, offset=4).tolist()
    if len(content) != n_header + math.prod(shape):
        raise ValueError(
            f"{str(path)!r} announces {math.prod(shape)} bytes of data but holds "
            f"{len(content) - n_header}; fetch it anew."
        )
    return np.frombuffer(content, np.uint8, offset=n_header).reshape(shape).copy()


def _find_files(home: Path, split: str) -> list[Path] | None:
    """Return the files of images and labels below `home`, None if one is missing."""
    prefix = "train" if split == "train" else "t10k"
    names = [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]
    for folder in (home, home / "FashionMNIST" / "raw"):
        for suffix in ("", ".gz"):
            files = [folder / (name + suffix) for name in names]
            if all(file.is_file() for file in files):
                return files
    return None


def _locate(
    split: str, data_home: str | os.PathLike[str] | None, download_if_missing: bool
) -> list[Path]:
    """Return the files of images and labels, downloading them as a last resort."""
    if data_home is not None:
        home = Path(data_home).expanduser()
        if files := _find_files(home, split):
            return files
    if files := _find_files(_DEBIAN_FOLDER, split):
        return files
    if data_home is None:
        # Not earlier: get_data_home creates its folder.
        home = Path(get_data_home()) / "fashion_mnist"
        if files := _find_files(home, split):
            return files
    cause = None
    if download_if_missing:
        try:
            from torchvision.datasets import FashionMNIST

            FashionMNIST(home, download=True)
        except (ImportError, OSError, RuntimeError) as error:
            cause = error
        if files := _find_files(home, split):
            return files
    raise FileNotFoundError(
        f"Fashion-MNIST is neither in {str(home)!r} nor in {str(_DEBIAN_FOLDER)!r}, "
        + (f"and downloading it failed ({cause})" if cause else "and not to be fetched")
        + ". Ways out: apt-get install dataset-fashion-mnist (Debian, Ubuntu); "
        "data_home=folder, a folder with the four files *-ubyte.gz from "
        "https://github.com/zalandoresearch/fashion-mnist; or "
        "download_if_missing=True on a machine with network."
    ) from cause


@validate_params(
    {
        "split": [StrOptions({"train", "test"})],
        "data_home": [str, os.PathLike, None],
        "download_if_missing": ["boolean"],
        "return_X_y": ["boolean"],
    },
    prefer_skip_nested_validation=True,
)
def load_fashion_mnist(
    split: str = "train",
    *,
    data_home: str | os.PathLike[str] | None = None,
    download_if_missing: bool = True,
    return_X_y: bool = False,
) -> Bunch | tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Load Fashion-MNIST, grey images of 28 x 28 pixels of ten kinds of clothing.

    The files are taken from the first of these places that has them: `data_home`,
    Debian's package ``dataset-fashion-mnist``, torchvision's download into
    `data_home`.

    Parameters
    ----------
    split : {"train", "test"}, default="train"
        The 60000 training or the 10000 test images.
    data_home : str, path-like or None, default=None
        Folder with the idx files, gzipped or not, directly or in torchvision's
        sub-folder ``FashionMNIST/raw``; a download goes there, too. None stands for
        ``fashion_mnist`` in :func:`sklearn.datasets.get_data_home`.
    download_if_missing : bool, default=True
        Whether torchvision may download the files if they are nowhere else.
    return_X_y : bool, default=False
        Whether to return ``(images, target)`` instead of a Bunch.

    Returns
    -------
    bunch : :class:`~sklearn.utils.Bunch`
        The data, with these entries.

        images : ndarray of shape (n_images, 28, 28), uint8
            Grey levels 0 (background) to 255.
        target : ndarray of shape (n_images,), int64
            Classes 0 to 9.
        target_names : list of str
            Names of the ten classes.
        DESCR : str
            What the data are.
    (images, target) : tuple of ndarray
        If `return_X_y` is true.

    Raises
    ------
    FileNotFoundError
        If the files are nowhere and cannot be downloaded.
    ValueError
        If a file is truncated or not what it should be, or a parameter is invalid.

    References
    ----------
    .. [1] Xiao, H., Rasul, K. and Vollgraf, R. (2017). Fashion-MNIST: a novel image
       dataset for benchmarking machine learning algorithms. arXiv:1708.07747.

    Examples
    --------
    >>> from skdeepad.datasets import load_fashion_mnist
    >>> clothes = load_fashion_mnist("test")  # doctest: +SKIP
    >>> clothes.images.shape  # doctest: +SKIP
    (10000, 28, 28)
    """
    images_file, labels_file = _locate(split, data_home, download_if_missing)
    images = _read_idx(images_file, 3)
    target = _read_idx(labels_file, 1).astype(np.int64)
    if images.shape != (len(target), 28, 28) or target.max(initial=0) > 9:
        raise ValueError(
            f"{str(images_file.parent)!r} does not hold Fashion-MNIST: images of shape "
            f"{images.shape}, {len(target)} labels up to {target.max(initial=0)}; "
            "expected (n, 28, 28) and n labels 0 to 9."
        )
    if return_X_y:
        return images, target
    return Bunch(
        images=images,
        target=target,
        target_names=_TARGET_NAMES.copy(),
        DESCR=f"Fashion-MNIST (Zalando, MIT licence), {split} split.",
    )
