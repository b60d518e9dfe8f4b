"""One image file -> a float tensor in [0, 1]."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..runtime._images import LUMA, WHITE_16, open_image, to_pixels, white_in_file

LARGE = 2**20  # pixels of an image beyond which it becomes float32 in strips
STRIP = 2**18  # pixels of a strip


def read_image(
    path: str | os.PathLike[str],
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    white: float | None = None,
) -> Tensor:
    """Read an image file.

    Parameters
    ----------
    path : str or path-like
        A file that Pillow can read. EXIF orientation is applied, palettes are
        looked up, 16 bits of grey are kept, transparent pixels show white.
    size : (int, int) or None
        Height and width that the image is resized to.
    channels : int or None
        Channels that the image is brought to.
    white : float or None
        The value of white of files with 16 bits; None: 65535.

    Returns
    -------
    Tensor of float32, shape (channels, height, width)
        In [0, 1].

    Raises
    ------
    OSError
        If the file cannot be read as an image.
    ValueError
        If its pixels are no numbers of an image.
    """
    image = open_image(path)
    limit = white_in_file(image)

    def rows(top: int, bottom: int) -> Tensor:
        whole = (top, bottom) == (0, image.height)
        strip = image if whole else image.crop((0, top, image.width, bottom))
        pixels = pixels_to_tensor(*_pixels(strip, limit, white))
        return fit_channels(pixels, channels)[None]

    return resize_rows(rows, 1, (image.height, image.width), size)[0]


def decode(
    path: str | os.PathLike[str], white: float | None = None
) -> tuple[np.ndarray, float]:
    """Read an image file as it is: (height, width[, channels]), and what white is.

    Errors are those of `read_image`.
    """
    image = open_image(path)
    return _pixels(image, white_in_file(image), white)


def _pixels(image: Any, limit: float, white: float | None) -> tuple[np.ndarray, float]:
    pixels, brightest = to_pixels(image, limit)
    return pixels, white if white is not None and brightest == WHITE_16 else brightest


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Look up the height and width of an image file that can be read."""
    from PIL import ExifTags, Image

    with Image.open(path) as file:
        width, height = file.size
        orientation = file.getexif().get(ExifTags.Base.Orientation)
    lying = orientation in (5, 6, 7, 8)  # stored on its side
    return (width, height) if lying else (height, width)


def pixels_to_tensor(pixels: np.ndarray, white: float) -> Tensor:
    """Scale pixels of shape (height, width[, channels]) to [0, 1], channels first."""
    image = torch.from_numpy(np.array(pixels, dtype=np.float32))
    image.div_(white).clamp_(0, 1)
    return image[None] if image.ndim == 2 else image.permute(2, 0, 1)


def fit_channels(images: Tensor, channels: int | None) -> Tensor:
    """Give images of shape (..., channels, height, width) the channels asked for.

    Grey is repeated, colour becomes luma, and a fourth channel is opacity over
    white. None leaves them as they are.

    Raises
    ------
    ValueError
        If there is no way from one number of channels to the other.
    """
    have = images.shape[-3]
    if channels is None or have == channels:
        return images
    if have == 4:
        alpha = images[..., 3:, :, :]
        images, have = images[..., :3, :, :] * alpha + (1 - alpha), 3
        if channels == 3:
            return images
    if have == 1:
        shape = (*images.shape[:-3], channels, *images.shape[-2:])
        return images.expand(shape)
    if have == 3 and channels == 1:
        luma = torch.tensor(LUMA, dtype=images.dtype, device=images.device)
        return (images * luma.view(3, 1, 1)).sum(-3, keepdim=True)
    raise ValueError(
        f"X has images of {have} channels, but the backbone takes {channels}. "
        "Convert the images, or choose another backbone."
    )


def resize(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Resize images of shape (n, channels, height, width), bilinear, antialiased."""
    if size is None or tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def resize_rows(
    rows: Callable[[int, int], Tensor],
    n_images: int,
    have: tuple[int, int],
    size: tuple[int, int] | None,
) -> Tensor:
    """Resize images that are given some rows at a time.

    Large ones become float32 in strips: each is resized horizontally, and all of
    them vertically, which are the two steps of any resize.

    Parameters
    ----------
    rows : callable
        ``rows(top, bottom)`` gives float32 of shape (n, channels, rows, width).
    n_images : int
        How many images there are.
    have, size : (int, int)
        Height and width that the images have, and shall have (None: they stay).
    """
    height, width = have
    if size is None or height * width <= LARGE or size[1] >= width:
        return resize(rows(0, height), size)
    step = max(1, STRIP // (n_images * width))
    narrow = torch.empty(0)
    for top in range(0, height, step):
        strip = rows(top, min(top + step, height))
        strip = resize(strip, (strip.shape[-2], size[1]))
        if top == 0:
            narrow = strip.new_empty((*strip.shape[:-2], height, size[1]))
        narrow[..., top : top + step, :] = strip
    return resize(narrow, size)
