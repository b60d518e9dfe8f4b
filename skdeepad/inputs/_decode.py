"""One image file -> a float tensor in [0, 1]."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# ITU-R 601 luma, as Pillow's convert("L")
LUMA = (0.299, 0.587, 0.114)


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read an image file.

    Parameters
    ----------
    path : str or path-like
        A file that Pillow can read. EXIF orientation is applied, palettes are
        looked up, 16 bits of grey are kept, transparent pixels show white.

    Returns
    -------
    Tensor of float32, shape (1 or 3, height, width)
        In [0, 1].

    Raises
    ------
    OSError
        If the file cannot be read as an image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except (
        Image.DecompressionBombError,
        UnidentifiedImageError,
        SyntaxError,  # Pillow's word for a broken PNG
        ValueError,
    ) as error:
        raise OSError(str(error)) from error
    return pixels_to_tensor(*_to_pixels(image))


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Look up the height and width of an image file that can be read."""
    from PIL import ExifTags, Image

    with Image.open(path) as file:
        width, height = file.size
        orientation = file.getexif().get(ExifTags.Base.Orientation)
    lying = orientation in (5, 6, 7, 8)  # stored on its side
    return (width, height) if lying else (height, width)


def _to_pixels(image: Any) -> tuple[np.ndarray, float]:
    """Give the pixels as (height, width[, channels]) and the value of white."""
    if image.mode.startswith("I"):  # 16 bits, grey
        return np.asarray(image), 65535.0
    if image.mode == "F":
        low, high = image.getextrema()
        if not (low >= -0.01 and high <= 1.01):
            raise ValueError(f"float pixels from {low:g} to {high:g}, not in 0..1")
        return np.asarray(image), 1.0
    if image.has_transparency_data:
        return np.asarray(image.convert("RGBA")), 255.0
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return np.asarray(image), 255.0


def pixels_to_tensor(pixels: np.ndarray, white: float) -> Tensor:
    """Scale pixels of shape (height, width[, channels]) to [0, 1], channels first."""
    image = torch.from_numpy(np.array(pixels, dtype=np.float32)) / white
    image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
    return image.clamp(0, 1)


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
