"""Masks of defects: arrays, files or None -> boolean arrays at the size of a map."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from ._decode import read_image


def read_mask(mask: Any, size: tuple[int, int], name: str = "mask") -> NDArray[Any]:
    """Tell which pixels of an image are anomalous.

    Parameters
    ----------
    mask : array-like of shape (height, width), str, path-like or None
        True, 1 or 255 where a pixel is anomalous; the path of such an image, which is
        brought to `size` (nearest neighbour); or None for an image without a defect.
    size : (int, int)
        Height and width of the image.
    name : str, default="mask"
        How errors call it.

    Returns
    -------
    ndarray of bool, shape `size`

    Raises
    ------
    ValueError
        If an array has another shape, or values that are not binary.
    OSError
        If a file cannot be read.
    """
    if mask is None:
        return np.zeros(size, dtype=bool)
    if isinstance(mask, str | os.PathLike):
        try:
            pixels = read_image(mask, channels=1)
        except OSError as error:
            raise type(error)(f"{name}={os.fspath(mask)!r}: {error}") from error
        white: Any = pixels > pixels.max() / 2  # 1 or 255; JPEG files are not binary
        resized = F.interpolate(white[None].to(torch.uint8), size, mode="nearest-exact")
        return resized[0, 0].numpy().astype(bool)
    array = np.asarray(mask)
    if array.shape != tuple(size):
        raise ValueError(
            f"{name} has shape {array.shape}, but its image (or map) has height and "
            f"width {tuple(size)}. Pass an array of that shape, a path, or None."
        )
    values = set(np.unique(array).tolist())
    if not (values <= {0, 1} or values <= {0, 255}):
        raise ValueError(
            f"{name} must hold 0 and 1 (or 255) only. Threshold it halfway, after "
            "resizing it, for example mask > 127."
        )
    return array > 0


def read_region(mask: Any, estimator: Any) -> NDArray[np.bool_]:
    """Read an estimator's `mask`, nonzero where to look: an array, or a path of one."""
    if estimator.backbone_.vectors:
        raise ValueError("mask is for images; X holds vectors.")
    if isinstance(mask, str | os.PathLike):
        from PIL import Image

        with Image.open(mask) as image:
            mask = image.convert("L")
    found = np.asarray(mask) != 0
    if found.ndim != 2:
        raise ValueError(f"mask has shape {found.shape}; it must be (height, width).")
    return found


def resized_mask(mask: NDArray[np.bool_], size: Any) -> NDArray[np.bool_]:
    """Bring a mask to the size of an image (nearest neighbour)."""
    values = torch.from_numpy(mask.astype(np.uint8))[None, None]
    resized = F.interpolate(values, size, mode="nearest")
    return resized[0, 0].numpy().astype(bool)


def cells_covered(
    mask: NDArray[np.bool_], raster: tuple[int, int]
) -> NDArray[np.bool_]:
    """Tell which cells of a raster over an image a mask covers by half at least."""
    values = torch.from_numpy(mask.astype(np.float32))[None, None]
    covered = F.interpolate(values, raster, mode="area")
    return (covered[0, 0] >= 0.5).numpy()
