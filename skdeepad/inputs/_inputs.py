"""What X may be: vectors, arrays of images, or paths of image files.

The one place that decides it. Nothing is copied or decoded here; batches are made
later, one at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils import check_array
from torch import Tensor

from ..checks import (
    check_magnitude,
    check_rows,
    errors_name_x,
    plain,
    refuse_dates,
    shorten,
    to_array,
)
from ._decode import fit_channels, image_size, read_image, resize_rows

Shape = tuple[int, ...]


class Vectors:
    """Rows of numbers.

    Attributes
    ----------
    rows : ndarray of shape (n, d)
    shape : (d,)
        Of one sample.
    """

    def __init__(self, rows: NDArray[Any]) -> None:
        self.rows = rows
        self.shape: Shape | None = rows.shape[1:]
        self.kind = f"{rows.dtype}{self.shape}".encode()

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: NDArray[Any]) -> Any:
        """Select samples."""
        return type(self)(self.rows[index])

    def batch(
        self, index: NDArray[np.intp], size: Any = None, channels: int | None = None
    ) -> Tensor:
        """Give samples as a float32 tensor."""
        return torch.from_numpy(self.rows[index].astype(np.float32))

    def digest(self, i: int) -> bytes:
        """Name a sample by its content."""
        return _digest(self.kind + self.rows[i].tobytes())


class Images(Vectors):
    """Images in memory: uint8 in 0..255, or floats in [0, 1].

    Attributes
    ----------
    rows : ndarray of shape (n, channels, height, width)
        A view of what was given; nothing is converted before its batch is made.
    shape : (channels, height, width)
    """

    def __init__(self, rows: NDArray[Any]) -> None:
        super().__init__(rows)
        self.white = _white(rows.dtype)

    def size(self, i: int) -> tuple[int, int]:
        """Give the height and width of an image."""
        height, width = self.rows.shape[2:]
        return height, width

    def batch(
        self,
        index: NDArray[np.intp],
        size: tuple[int, int] | None = None,
        channels: int | None = None,
    ) -> Tensor:
        """Give images as a float32 tensor in [0, 1], resized."""
        # grey stays one channel: what is repeated later need not be resized thrice
        wanted = channels if self.rows.shape[1] > 1 else None
        height, width = self.rows.shape[2:]

        def rows(top: int, bottom: int) -> Tensor:
            strip = self.rows[index, :, top:bottom].astype(np.float32)
            return fit_channels(torch.from_numpy(strip).div_(self.white), wanted)

        return resize_rows(rows, len(index), (height, width), size)


class ImagePaths(Vectors):
    """Paths of image files, read when their batch comes.

    Attributes
    ----------
    rows : ndarray of object, shape (n,)
        The paths.
    positions : ndarray of int, shape (n,)
        Their positions in X, by which errors name them.
    shape : None
        Files may differ in size.
    """

    def __init__(
        self, rows: NDArray[Any], positions: NDArray[np.intp] | None = None
    ) -> None:
        super().__init__(rows)
        self.positions = np.arange(len(rows)) if positions is None else positions
        self.shape = None

    def take(self, index: NDArray[Any]) -> ImagePaths:
        """Select samples."""
        return type(self)(self.rows[index], self.positions[index])

    def name(self, index: Sequence[int]) -> str:
        """Name files and their positions in X; the first twenty of many."""
        named = [
            f"{shorten(str(self.rows[i]))!r} (X[{self.positions[i]}])"
            for i in index[:20]
        ]
        more = [f"and {len(index) - 20} more"] if len(index) > 20 else []
        return ", ".join(named + more)

    def read(
        self, i: int, size: tuple[int, int] | None, channels: int | None
    ) -> Tensor:
        """Read, resize and return the image of one path, without batch axis."""
        return read_image(self.rows[i], size, channels)

    def size(self, i: int) -> tuple[int, int]:
        """Give the height and width of an image."""
        return image_size(self.rows[i])

    def digest(self, i: int) -> bytes:
        """Name a file by its path, size and times of change, without reading it."""
        path = os.path.abspath(self.rows[i])
        try:
            stat = os.stat(path)
        except OSError:  # gone since X was checked: reading it will tell
            return _digest(path.encode())
        # who replaces a file can set its mtime, but not its ctime
        times = f"{stat.st_mtime_ns}\0{stat.st_ctime_ns}"
        return _digest(f"{path}\0{stat.st_size}\0{times}".encode())


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=16).digest()


def check_inputs(
    estimator: Any,
    X: Any,
    *,
    vectors: bool | None,
    image_shape: Shape | None,
    reset: bool,
) -> Vectors:
    """Decide what X is, and check it.

    Parameters
    ----------
    estimator : estimator
        On which scikit-learn's ``n_features_in_`` and ``feature_names_in_`` are set
        (`reset`) or checked, for 2-D X.
    X : array-like, tensor or sequence of paths
        See docs/architecture.md, "Inputs".
    vectors : bool or None
        Whether the backbone takes vectors; None where X decides.
    image_shape : (channels, height, width) or (height, width) or None
        The shape of one image, where X does not tell.
    reset : bool
        Whether this is `fit`.

    Returns
    -------
    Vectors, Images or ImagePaths
        What X is.

    Raises
    ------
    ValueError
        If X is none of these, is empty, holds NaN or infinity, or values that are
        no pixels; the message names the remedy.
    FileNotFoundError
        If files are missing; all of them are named.
    """
    if image_shape is not None:
        check_size("image_shape", image_shape)
    X = plain(X)
    paths = _as_paths(X)
    if paths is not None:
        if vectors:
            raise ValueError(
                "X holds paths of images, but the backbone takes vectors. Choose "
                "a backbone for images, such as 'efficientnet_lite0'."
            )
        return ImagePaths(paths)
    X = _stack(X)
    if getattr(X, "ndim", 2) <= 2:
        rows = check_rows(estimator, X, reset=reset, dtype="numeric")
        if image_shape is None and vectors is not False:
            # networks compute in float32
            return Vectors(check_magnitude(rows, float(np.finfo(np.float32).max)))
        return Images(_check_pixels(_unflatten(rows, image_shape)))
    if vectors:
        raise ValueError(
            f"X has images of shape {X.shape[1:]}, but the backbone takes vectors. "
            "Choose a backbone for images, such as 'efficientnet_lite0'."
        )
    if X.ndim > 4:
        raise ValueError(
            f"Found array with dim {X.ndim} as X, while images have 3 (grey) or 4. "
            "Reshape X to (n, height, width, channels)."
        )
    with errors_name_x():
        refuse_dates(X)
        X = check_array(
            X, allow_nd=True, dtype="numeric", estimator=estimator, input_name="X"
        )
    return Images(_check_pixels(_channels_first(X, image_shape)))


def _as_paths(X: Any) -> NDArray[Any] | None:
    """Give a sequence of paths as an object array, or None if X is none."""
    if isinstance(X, str | os.PathLike):
        raise ValueError(
            f"X={shorten(os.fspath(X))!r} is one path; pass a list of image paths, "
            "such as sorted(Path(folder).glob('*.png'))."
        )
    if isinstance(X, Iterator):
        raise ValueError(f"X={X!r} can be read once only; pass list(X), or sorted(X).")
    if hasattr(X, "iloc") and getattr(X, "ndim", 0) == 2 and X.shape[1] == 1:
        X = X.iloc[:, 0]  # the path column a ColumnTransformer hands over
    if isinstance(X, np.ndarray) and X.ndim == 2 and X.shape[1] == 1:
        X = X[:, 0] if X.dtype.kind in "OUS" else X
    if not isinstance(X, Sequence | np.ndarray) and not hasattr(X, "iloc"):
        return None
    if getattr(X, "ndim", 1) != 1:
        return None
    if len(X) == 0:
        raise ValueError("X is empty: Found 0 samples; is the folder's name right?")
    if not any(isinstance(path, str | os.PathLike) for path in X):
        return None
    paths = np.empty(len(X), dtype=object)
    paths[:] = [_path(path, i) for i, path in enumerate(X)]
    # unlike Path.is_file, this takes names that are too long for none
    missing = [i for i, path in enumerate(paths) if not os.path.isfile(path)]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} image files are missing: "
            f"{ImagePaths(paths).name(missing)}"
        )
    return paths


def _path(path: Any, i: int) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"X holds paths, but X[{i}] is {shorten(repr(path))}.")
    return Path(path)


def check_size(name: str, size: Any) -> Shape:
    """Check the height and width of images, perhaps after their channels."""
    lengths = (2, 3) if name == "image_shape" else (2,)
    if len(size) not in lengths or not all(
        isinstance(side, Integral) and int(side) > 0 for side in size
    ):
        channels = "(channels, height, width) or " if 3 in lengths else ""
        raise ValueError(
            f"{name}={size!r} must be {channels}(height, width), in pixels."
        )
    return tuple(int(side) for side in size)


def _stack(X: Any) -> Any:
    """Stack a list of image arrays; lists of numbers are left to scikit-learn."""
    if isinstance(X, np.ndarray) and X.ndim == 1 and X.dtype == object:
        X = list(X)
    if not isinstance(X, list | tuple) or not (
        isinstance(X[0], Tensor) or hasattr(X[0], "__array_interface__")
    ):
        return X  # neither tensors nor arrays, such as Pillow's images
    shapes = {np.shape(x) for x in X}
    if len(shapes) > 1:
        raise ValueError(
            f"X holds images of different shapes ({', '.join(map(str, sorted(shapes)))}"
            "); resize them to one shape, or pass the paths of their files."
        )
    return np.stack(
        [to_array(x) if isinstance(x, Tensor) else np.asarray(x) for x in X]
    )


def _unflatten(rows: NDArray[Any], image_shape: Shape | None) -> NDArray[Any]:
    if image_shape is None:
        raise ValueError(
            f"X has rows of {rows.shape[1]} numbers, but the backbone takes images. "
            "Set image_shape=(channels, height, width) if each row is a flattened "
            "image; Reshape your data to (n, height, width, channels) otherwise."
        )
    if np.prod(image_shape) != rows.shape[1]:
        raise ValueError(
            f"X has {rows.shape[1]} features, but image_shape={tuple(image_shape)} is "
            f"expecting {np.prod(image_shape)} features as input."
        )
    height_width = tuple(image_shape[-2:])
    return rows.reshape(len(rows), -1, *height_width)


def _channels_first(X: NDArray[Any], image_shape: Shape | None) -> NDArray[Any]:
    """View images as (n, channels, height, width)."""
    if X.ndim == 3:
        X = X[:, None]
        if image_shape is None:
            return X
    first, last = X, np.moveaxis(X, -1, 1)
    if image_shape is not None:
        shape = (1, *image_shape) if len(image_shape) == 2 else tuple(image_shape)
        for view in (first, last):
            if view.shape[1:] == shape:
                return view
        raise ValueError(
            f"X has images of shape {X.shape[1:]}, but image_shape={shape} is expected."
        )
    channels = (1, 3, 4)
    if X.shape[1] in channels and X.shape[-1] in channels:
        raise ValueError(
            f"X has shape {X.shape}: either axis 1 or axis 3 may be the channels. "
            "Set image_shape=(channels, height, width)."
        )
    if X.shape[-1] in channels:
        return last
    if X.shape[1] in channels:
        return first
    raise ValueError(
        f"X has shape {X.shape}: neither axis 1 nor axis 3 has 1, 3 or 4 channels. "
        "Set image_shape=(channels, height, width)."
    )


def _white(dtype: np.dtype[Any]) -> float:
    """Tell the value that stands for white."""
    if dtype.kind == "f" or dtype.kind == "b":
        return 1.0
    return 65535.0 if dtype == np.uint16 else 255.0


def _check_pixels(images: NDArray[Any]) -> NDArray[Any]:
    """Refuse values that are no pixels: every network would see garbage."""
    if images.size == 0:
        raise ValueError(f"X has images of shape {images.shape[1:]}: 0 pixels.")
    if images.dtype == np.uint8:
        return images
    low, high, white = images.min(), images.max(), _white(images.dtype)
    # resampling may overshoot a little
    slack = 0.01 if images.dtype.kind == "f" else 0
    if low < -slack or high > white + slack:
        raise ValueError(
            f"X has pixels from {low:g} to {high:g} as {images.dtype}; images "
            "are uint8 in 0..255 or floats in 0..1. Divide X by its white, or cast it "
            "to uint8."
        )
    return images


def chunks(index: NDArray[np.intp], size: int) -> Iterator[NDArray[np.intp]]:
    """Cut positions into runs of at most `size`."""
    for start in range(0, len(index), size):
        yield index[start : start + size]
