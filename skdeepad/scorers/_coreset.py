"""Coresets: few rows, near which all others lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

WIDTH = 64  # of the random projection in which rows are compared
CANDIDATES = 4  # for each row of a coreset
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, are evenly spread


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
    """A coreset of rows that come in parts, which outliers do not fill.

    A greedy choice takes what lies apart first, so all outliers. Here rows are chosen
    from candidates, an even sample of four times as many, so that outliers take at
    most four times the share of the coreset that they have of the rows. What has been
    chosen stays a candidate; of later rows every k-th becomes one, by the number of
    all rows so far.

    Parameters
    ----------
    n : int
        The most rows that are kept; while rows come, five times as many.
    width : int
        The number of features.
    """

    _saved: ClassVar[dict[str, Any]] = {}

    def __init__(self, n: int, width: int) -> None:
        self.n = n
        self.n_seen = 0
        self.rows = np.empty((0, width), dtype=np.float32)
        self.waiting: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def __len__(self) -> int:
        return len(self.rows) + sum(len(rows) for rows, _ in self.waiting)

    def add(self, rows: NDArray[np.float32]) -> None:
        """Add rows."""
        turns = np.arange(self.n_seen, self.n_seen + len(rows)) * GOLDEN % 1
        self.n_seen += len(rows)
        share = CANDIDATES * self.n / self.n_seen
        waiting = [*self.waiting, (rows, turns)]
        self.waiting = [(x[t < share], t[t < share]) for x, t in waiting]

    def join(self, other: Coreset) -> None:
        """Add what another has chosen."""
        self.rows = np.concatenate([self.rows, other.rows])
        self.n_seen += other.n_seen

    def reduce(self, compared: Callable[[Any], Any] = np.asarray) -> None:
        """Choose from the candidates, by the distances of what `compared` makes."""
        rows = np.concatenate([self.rows, *(rows for rows, _ in self.waiting)])
        if len(rows) > self.n:
            rows = rows[k_centre(compared(rows), self.n)]
        self.rows, self.waiting = rows, []
