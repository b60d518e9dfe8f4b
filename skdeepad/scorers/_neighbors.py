"""Nearest neighbours: candidates by products of matrices, distances of the winners.

Imported when it is needed, as torch takes seconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils import gen_batches
from torch import Tensor

MARGIN = 4  # candidates beyond those wanted, as float32 may confuse close ones
BLOCK_SIZE = 2**24  # products that are in memory at a time
MEASURED = 128  # queries whose candidates are measured at a time


def nearest(
    queries: NDArray[Any],
    rows: NDArray[Any],
    k: int,
    *,
    itself: NDArray[np.intp] | None = None,
    leverage: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Find the k nearest rows of each query, exhaustively.

    ``|q - g|^2 + c (q'(q - g))^2`` is minimized, with c the query's `leverage` (None:
    0). `itself` tells which row each query is: it is not its own neighbour. Rows are
    about centred, and of a scale that float32 can square: candidates are found in
    float32 and measured in float64. Where the bound on float32's error leaves open
    whether they include all of the nearest, they are searched again in float64.

    Returns
    -------
    index : ndarray of int, shape (n_queries, min(k, n_others))
        The nearest rows, the nearest first.
    squared : ndarray of float64, of the same shape
        Their distances.
    """
    others = len(rows) - (itself is not None)
    wanted, n_candidates = min(k, others), min(k + MARGIN, others)
    index = np.empty((len(queries), wanted), dtype=np.intp)
    squared = np.empty((len(queries), wanted))
    if leverage is None:
        leverage = np.zeros(len(queries))
    left = np.arange(len(queries))
    for dtype in (torch.float32, torch.float64):
        gallery = torch.from_numpy(rows).to(dtype)
        norms = gallery.square().sum(dim=1)
        uncertain = [left[:0]]
        for block in gen_batches(len(left), max(16, BLOCK_SIZE // len(rows))):
            part = left[block]
            q, c = torch.from_numpy(queries[part]), torch.from_numpy(leverage[part])
            own = None if itself is None else torch.from_numpy(itself[part])
            found = _candidates(
                q.to(dtype), gallery, norms, n_candidates, own, c.to(dtype)
            )
            apart = _measure(q, torch.from_numpy(rows), found, c)
            apart, order = apart.sort(dim=1, stable=True)
            index[part] = found.gather(1, order[:, :wanted])
            squared[part] = apart[:, :wanted]
            if n_candidates < others:
                error = _rounding(q, apart[:, wanted - 1], c, dtype)
                certain = apart[:, -1] - 2 * error > apart[:, wanted - 1]
                uncertain.append(part[~certain.numpy()])
        left = np.concatenate(uncertain)
        if not len(left):
            break
    return index, squared


def _candidates(
    q: Tensor,
    gallery: Tensor,
    norms: Tensor,
    n: int,
    itself: Tensor | None,
    leverage: Tensor,
) -> Tensor:
    """Find the rows that seem nearest, in the order in which they lie."""
    if leverage.any():
        products = q @ gallery.T
        apart = q.square().sum(dim=1, keepdim=True) - products
        apart.square_().mul_(leverage[:, None])
        apart.add_(norms).sub_(products, alpha=2)
    else:
        apart = torch.addmm(norms, q, gallery.T, alpha=-2)
    if itself is not None:
        apart[torch.arange(len(q)), itself] = torch.inf
    return apart.topk(n, largest=False, sorted=False).indices.sort(dim=1).values


def _measure(q: Tensor, rows: Tensor, found: Tensor, leverage: Tensor) -> Tensor:
    """Measure candidates by their differences, in float64."""
    squared = torch.empty(found.shape, dtype=torch.float64)
    for few in gen_batches(len(q), MEASURED):
        at, c = q[few].double()[:, None], leverage[few, None]
        apart = at - rows[found[few]]
        squared[few] = apart.square().sum(dim=2)
        if leverage.any():
            squared[few] += c * apart.mul_(at).sum(dim=2).square()
    return squared


def _rounding(
    q: Tensor, farthest: Tensor, leverage: Tensor, dtype: torch.dtype
) -> Tensor:
    """Bound what products may be off by, of rows as near as the farthest wanted one.

    At a distance D such a row is no longer than |q| + sqrt(D). A sum of d products is
    off by sqrt(d) roundings (Higham and Mary, 2019), or a few times as much, and what
    `leverage` c makes of it by sqrt(c D).
    """
    few_times = 8 * q.shape[1] ** 0.5 * torch.finfo(dtype).eps / 2
    reach = 2 * q.double().norm(dim=1) + farthest.sqrt()
    return few_times * reach**2 * (1 + (leverage * farthest).sqrt())
