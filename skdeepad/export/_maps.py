"""Scores of positions -> maps at the size that the network sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional as F

from ._parts import Step


class Refinement(Step):
    """`fit_size` and `refine` of `localization`, as two products of matrices.

    Resizing and smoothing are linear in the rows and in the columns of a map, so that
    what they do to unit vectors says all.
    """

    def __init__(self, detector: Any, raster: tuple[int, int]) -> None:
        super().__init__()
        size = detector.image_size_
        smaller = any(a < b for a, b in zip(size, raster, strict=True))
        rows, columns = (
            smooth_resizing(new, old, smaller, detector.sigma)
            for new, old in zip(size, raster, strict=True)
        )
        self.register_buffer("rows", torch.from_numpy(rows))
        self.register_buffer("columns", torch.from_numpy(columns.T.copy()))
        self.opening = detector.opening

    def forward(self, scores: Tensor) -> Tensor:
        """Make maps of scores of shape (n, height, width)."""
        maps = self.rows @ scores.float() @ self.columns
        if self.opening:
            maps = -dilated(-maps)  # eroded
            maps = dilated(maps)
        return maps


def smooth_resizing(new: int, old: int, antialias: bool, sigma: float) -> NDArray[Any]:
    """Give the matrix that resizes a row of a map, and smooths it."""
    unit = torch.eye(old, dtype=torch.float64)[None, None]
    # two identical columns: the other axis stays as it is
    resized = F.interpolate(
        unit, size=(new, old), mode="bilinear", antialias=antialias
    )[0, 0].numpy()
    if sigma:
        resized = gaussian_filter(resized, (sigma, 0))
    return resized.astype(np.float32)


def dilated(maps: Tensor) -> Tensor:
    """Give the largest value of each place and its four neighbours."""
    wide = F.pad(maps[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    _, height, width = maps.shape
    middle, up, down = slice(1, -1), slice(0, height), slice(2, None)
    left, right = slice(0, width), slice(2, None)
    found = maps
    for rows, columns in (
        *((up, middle), (down, middle)),
        *((middle, left), (middle, right)),
    ):
        found = torch.maximum(found, wide[:, rows, columns])
    return found
