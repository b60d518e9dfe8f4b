"""Pixels of images, in memory and in files: NumPy and Pillow are all that is needed."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

# ITU-R 601 luma, as Pillow's convert("L")
LUMA = (0.299, 0.587, 0.114)
WHITE_16 = 65535.0


def open_image(path: str | os.PathLike[str]) -> Any:
    """Open an image file with Pillow, and decode it; EXIF orientation is applied.

    Raises
    ------
    OSError
        If the file cannot be read as an image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except (
        Image.DecompressionBombError,
        UnidentifiedImageError,
        SyntaxError,  # Pillow's word for a broken PNG
        ValueError,
    ) as error:
        raise OSError(str(error)) from error
    return image


def white_in_file(image: Any) -> float:
    """Tell what white is in a file's pixels of mode "I".

    Pillow gives 16 bits as 32 from these formats, by its version.
    """
    return WHITE_16 if image.format in ("PNG", "PPM") else 255.0


def to_pixels(image: Any, white: float) -> tuple[np.ndarray, float]:
    """Give the pixels as (height, width[, channels]) and the value of white.

    `white` is that of mode "I", where Pillow does not tell 16 bits from 32.
    """
    if image.mode.startswith("I;16"):
        return np.asarray(image), WHITE_16
    if image.mode == "I":
        pixels = np.asarray(image)
        low, high = pixels.min(), pixels.max()
        if low < 0 or high > white:
            raise ValueError(
                f"32-bit pixels from {low} to {high}, of which 0..{white:g} are read. "
                "Save them as 8 or 16 bits"
            )
        return pixels, white
    if image.mode == "F":
        pixels = np.asarray(image)
        if not np.isfinite(pixels).all():
            raise ValueError("pixels that are NaN or infinite")
        low, high = pixels.min(), pixels.max()
        if low < -0.01 or high > 1.01:
            raise ValueError(f"float pixels from {low:g} to {high:g}, not in 0..1")
        return pixels, 1.0
    if image.has_transparency_data:
        return np.asarray(image.convert("RGBA")), 255.0
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return np.asarray(image), 255.0


def channels_first(
    X: NDArray[Any], image_shape: tuple[int, ...] | None
) -> NDArray[Any]:
    """View images as (n, channels, height, width)."""
    if X.ndim == 3:
        if image_shape is None and X.shape[-1] in (3, 4):
            raise ValueError(
                f"X has shape {X.shape}, as one colour image has. If it is one, pass "
                "X[None]; if X holds grey images, pass X[..., None]."
            )
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


def white_of(dtype: np.dtype[Any], white: float | None = None) -> float:
    """Tell the value that stands for white; `white` is that of more than 8 bits."""
    if dtype.kind == "f" or dtype.kind == "b":
        return 1.0
    if white is not None and dtype.itemsize > 1:
        return white
    return WHITE_16 if dtype == np.uint16 else 255.0


def check_pixels(rows: NDArray[Any], white: float) -> None:
    """Refuse values that are no pixels: every network would see garbage."""
    if rows.size == 0:
        raise ValueError(f"X has images of shape {rows.shape[1:]}: 0 pixels.")
    if rows.dtype == np.uint8:
        return
    low, high = rows.min(), rows.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        wrong = [i for i, row in enumerate(rows) if not np.isfinite(row).all()]
        found = "NaN" if np.isnan(rows[wrong[0]]).any() else "infinity"
        raise ValueError(
            f"Input X contains {found}: {len(wrong)} of {len(rows)} images have such "
            f"pixels, the first of them is X[{wrong[0]}]. Fill the pixels (np.nan_to_"
            "num), or leave these images out."
        )
    # resampling may overshoot a little
    slack = 0.01 if rows.dtype.kind == "f" else 0
    if low < -slack or high > white + slack:
        raise ValueError(
            f"X has pixels from {low:g} to {high:g} as {rows.dtype}; images "
            f"are uint8 in 0..255{_deep(rows.dtype, white)} or floats in 0..1. Divide "
            "X by its white, or cast it to uint8."
        )


def _deep(dtype: np.dtype[Any], white: float) -> str:
    return f", {dtype} in 0..{white:g}" if white not in (1, 255) else ""
