"""Samples, as they were given: rows of numbers, images, or paths of image files."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import shorten
from ..runtime._images import WHITE_16, check_pixels, white_of
from ._decode import decode, fit_channels, image_size, read_image, resize_rows

Shape = tuple[int, ...]
N_NAMED = 200  # characters of names in an error


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
        part = copy.copy(self)
        part.rows = self.rows[index]
        return part

    def batch(
        self, index: NDArray[np.intp], size: Any = None, channels: int | None = None
    ) -> Tensor:
        """Give samples as a float32 tensor."""
        return torch.from_numpy(self.rows[index].astype(np.float32))

    def digest(self, i: int) -> bytes:
        """Name a sample by its content."""
        return named_by(self.kind + self.rows[i].tobytes())


class Images(Vectors):
    """Images in memory: uint8 in 0..255, or floats in [0, 1].

    Attributes
    ----------
    rows : ndarray of shape (n, channels, height, width)
        A view of what was given; nothing is converted before its batch is made.
    shape : (channels, height, width)
    """

    def __init__(self, rows: NDArray[Any], white: float | None = None) -> None:
        super().__init__(rows)
        self.white = white_of(rows.dtype, white)
        if self.white != white_of(rows.dtype):
            self.kind += f"/{self.white}".encode()

    def size(self, i: int) -> tuple[int, int]:
        """Give the height and width of an image."""
        height, width = self.rows.shape[2:]
        return height, width

    def open(self, i: int) -> Images:
        """Give one image."""
        return Images(self.rows[i : i + 1], self.white)

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

    threads: int | None = None  # that read; None: as many as torch has

    def __init__(self, rows: NDArray[Any], white: float | None = None) -> None:
        super().__init__(rows)
        self.positions = np.arange(len(rows))
        self.shape = None
        self.white = white

    def take(self, index: NDArray[Any]) -> ImagePaths:
        """Select samples."""
        part: ImagePaths = super().take(index)
        part.positions = self.positions[index]
        return part

    def name(self, index: Sequence[int]) -> str:
        """Name samples and their positions in X; the first ones of many."""
        named: list[str] = []
        for i in index:
            text = self._name(i)
            if named and sum(map(len, named)) + len(text) > N_NAMED:
                return ", ".join([*named, f"and {len(index) - len(named)} more"])
            named.append(text)
        return ", ".join(named)

    def _name(self, i: int) -> str:
        return f"{shorten(str(self.rows[i]), 100)!r} (X[{self.positions[i]}])"

    def read(
        self, i: int, size: tuple[int, int] | None, channels: int | None
    ) -> Tensor:
        """Read, resize and return the image of one path, without batch axis."""
        return read_image(self._path(i), size, channels, self.white)

    def open(self, i: int) -> Images:
        """Decode one image, of which parts are wanted."""
        return read_pixels(self._path(i), self.white)

    def _path(self, i: int) -> Any:
        path = self.rows[i]
        if not isinstance(path, str | os.PathLike):
            raise ValueError(f"{shorten(repr(path), 60)} is no path")
        return path

    def size(self, i: int) -> tuple[int, int]:
        """Give the height and width of an image."""
        return image_size(self.rows[i])

    def of_images(self, failed: dict[int, str]) -> tuple[Any, dict[int, str]]:
        """Give the images, and those that cannot be read: of tiles, their images."""
        return self, failed

    def digest(self, i: int) -> bytes:
        """Name a file by its path, size and times of change, without reading it."""
        if not isinstance(self.rows[i], str | os.PathLike):  # reading it will tell
            return named_by(repr(self.rows[i]).encode())
        return file_digest(self.rows[i], self.white)


def read_pixels(path: Any, white: float | None) -> Images:
    """Decode an image file as an array."""
    pixels, brightest = decode(path, white)
    if pixels.dtype.kind == "f":  # resampling may have overshot a little
        pixels = pixels.clip(0, 1)
    rows = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    return Images(rows[None], brightest)


def file_digest(path: str | os.PathLike[str], white: float | None) -> bytes:
    """Name a file by its path, size and times of change."""
    path = os.path.abspath(path)
    key = path if white in (None, WHITE_16) else f"{path}\0{white}"
    try:
        stat = os.stat(path)
    except OSError:  # gone since X was checked: reading it will tell
        return named_by(key.encode())
    # who replaces a file can set its mtime, but not its ctime
    times = f"{stat.st_mtime_ns}\0{stat.st_ctime_ns}"
    return named_by(f"{key}\0{stat.st_size}\0{times}".encode())


def named_by(content: bytes) -> bytes:
    """Name a sample by its content."""
    return blake2b(content, digest_size=16).digest()


def check_images(images: Images) -> Images:
    """Refuse values that are no pixels."""
    check_pixels(images.rows, images.white)
    return images


def chunks(index: NDArray[np.intp], size: int) -> Iterator[NDArray[np.intp]]:
    """Cut positions into runs of at most `size`."""
    for start in range(0, len(index), size):
        yield index[start : start + size]
