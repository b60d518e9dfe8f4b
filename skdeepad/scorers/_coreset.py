"""Coresets: few rows, near which all others lie."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

WIDTH = 64  # of the random projection in which rows are compared


def k_centre(rows: NDArray[Any], n: int, seed: int = 0) -> NDArray[np.intp]:
    """Choose rows one by one, each the farthest from those chosen before.

    This greedy choice (Gonzalez, 1985) leaves no row farther from the chosen ones than
    twice what is possible. The first is the nearest to the mean. Rows of more than 64
    features are compared in a random projection (Johnson and Lindenstrauss), as
    PatchCore does.

    Parameters
    ----------
    rows : ndarray of shape (n_rows, n_features)
        Work is ``n * n_rows * 64``; beside the rows it takes memory for 64 features.
    n : int
        How many to choose, at most: copies of chosen rows are not chosen.
    seed : int, default=0
        Of the projection.

    Returns
    -------
    ndarray of int
        Their positions, in the order of choice.
    """
    points = (rows - rows.mean(axis=0)).astype(np.float32)
    if points.shape[1] > WIDTH:
        directions = np.random.RandomState(seed).randn(points.shape[1], WIDTH)
        points = points @ directions.astype(np.float32) / np.float32(np.sqrt(WIDTH))
    norms = np.einsum("ij,ij->i", points, points)
    apart = np.full(len(points), np.inf, dtype=np.float32)
    rounding = 1e-6 * norms.max(initial=0)
    chosen: list[int] = []
    farthest = int(norms.argmin())
    while len(chosen) < n and apart[farthest] > rounding:
        chosen.append(farthest)
        new = norms + norms[farthest] - 2 * (points @ points[farthest])
        np.minimum(apart, new, out=apart)
        farthest = int(apart.argmax())
    return np.array(chosen, dtype=np.intp)


class Coreset:
    """A coreset of rows that come in parts.

    Parameters
    ----------
    n : int
        The most rows that are kept. Up to twenty times as many wait in memory: then
        the coreset of all of them takes their place.
    """

    _saved: ClassVar[dict[str, Any]] = {}

    def __init__(self, n: int) -> None:
        self.n = n
        self.parts: list[NDArray[np.float32]] = []

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def add(self, rows: NDArray[np.float32]) -> None:
        """Add rows."""
        self.parts = [*self.parts, rows]
        if len(self) > 20 * self.n:
            self.reduce()

    def reduce(self) -> NDArray[np.float32]:
        """Keep the coreset of the rows; give it."""
        rows = np.concatenate(self.parts)
        if len(rows) > self.n:
            rows = rows[k_centre(rows, self.n)]
        self.parts = [rows]
        return rows
