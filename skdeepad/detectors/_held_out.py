"""Images that are not trained on: they tell how new ones score."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ENOUGH = 20  # held-out samples, where a tenth would be fewer and there are 60


def hold_out(n: int, fraction: float, rng: np.random.RandomState) -> NDArray[np.bool_]:
    """Choose the samples that are not trained on.

    Parameters
    ----------
    n : int
        How many samples there are.
    fraction : float
        The share to hold out; at least 20 samples, or a third of fewer than 60.
    rng : numpy.random.RandomState
        Chooses them.

    Returns
    -------
    ndarray of bool, shape (n,)
    """
    n_held_out = max(int(np.ceil(fraction * n)), min(ENOUGH, n // 3))
    held_out = np.zeros(n, dtype=bool)
    held_out[rng.permutation(n)[:n_held_out]] = True
    return held_out


def as_unseen(
    trained: NDArray[np.float64], unseen: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Bring scores of samples that were trained on to the level of unseen ones.

    Training draws its samples nearer than it draws new ones, which would put the
    threshold too near. Distances are stretched, other scores are shifted, until the
    means agree.
    """
    if trained.max() <= 0 and unseen.max() <= 0 and trained.mean() < 0:
        return trained * (unseen.mean() / trained.mean())
    return trained + (unseen.mean() - trained.mean())
