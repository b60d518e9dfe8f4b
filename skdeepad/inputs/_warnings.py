"""What is taken for something else by mistake, told in `fit`."""

from __future__ import annotations

import math
import os
import warnings

from ._samples import ImagePaths, Images, Vectors

WHITE_12 = 4095
N_OPENED = 4  # files that are looked at
SMALLEST = 8  # side of a flattened image


def warn_of_flat_images(inputs: Vectors) -> None:
    """Warn of rows that look like flattened images, and are taken for vectors."""
    rows = inputs.rows
    shapes = [
        f"({lead}{side}, {side})"
        for lead, channels in (("", 1), ("3, ", 3))
        if (side := math.isqrt(rows.shape[1] // channels)) >= SMALLEST
        and side * side * channels == rows.shape[1]
    ]
    if not shapes or rows.dtype.kind not in "ui":
        return
    if rows.min() < 0 or not 16 < rows.max() <= 255:
        return
    warnings.warn(
        f"X has rows of {rows.shape[1]} integers in 0..255, which look like flattened "
        "images. They are taken for vectors, and seen by an MLP with random weights. "
        f"If they are images, set image_shape={shapes[0]}; if not, backbone='mlp'.",
        UserWarning,
        stacklevel=6,
    )


def warn_of_dark_images(inputs: Vectors) -> None:
    """Warn of 16-bit images that fill 12 bits only, and so are nearly black."""
    if isinstance(inputs, Images):
        dark = inputs.rows.dtype == "uint16" and inputs.rows.max() <= WHITE_12
    else:
        assert isinstance(inputs, ImagePaths)
        levels = [_brightest(inputs, i) for i in range(min(N_OPENED, len(inputs)))]
        deep = [level for level in levels if level is not None]
        dark = bool(deep) and max(deep) <= WHITE_12 / 65535
    if dark:
        warnings.warn(
            "X has images of 16 bits that fill 12 only: none of those looked at is "
            f"brighter than {WHITE_12} of 65535, which is nearly black. If they are of "
            "a camera with 12 bits, set white=4095 (16383 for 14, 1023 for 10).",
            UserWarning,
            stacklevel=6,
        )


def _brightest(inputs: ImagePaths, i: int) -> float | None:
    """Give the brightest pixel of a file with 16 bits, None of others."""
    from PIL import Image

    path = inputs.rows[i]
    try:
        if not isinstance(path, str | os.PathLike):
            return None
        with Image.open(path) as file:
            if not file.mode.startswith("I"):
                return None
        return float(inputs.read(i, None, None).max())
    except (OSError, ValueError, SyntaxError):  # reading it will tell
        return None
