"""The one training loop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer


class DivergedError(ArithmeticError):
    """The loss is not a finite number any more."""


def train(
    optimizer: Optimizer, losses: Iterable[Tensor], *, clip_norm: float | None = None
) -> Iterator[float]:
    """Take one step of the optimizer for each loss, and give the loss.

    Losses are computed when their turn comes. `clip_norm` bounds the norm of the whole
    gradient. A loss that is not finite raises DivergedError, and its step is not taken.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for loss in losses:
        value = loss.item()
        if not math.isfinite(value):
            raise DivergedError(f"the loss is {value}")
        optimizer.zero_grad()
        loss.backward()
        if clip_norm is not None:
            clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        yield value


def shuffled_batches(
    index: NDArray[np.intp], batch_size: int, rng: np.random.RandomState
) -> Iterator[NDArray[np.intp]]:
    """Give mini-batches of samples without end, in a new order each epoch.

    An epoch's last batch may be smaller.
    """
    while True:
        order = rng.permutation(index)
        yield from (order[i : i + batch_size] for i in range(0, len(order), batch_size))


def batchnorm_batches(
    index: NDArray[np.intp], batch_size: int, rng: np.random.RandomState
) -> Iterator[NDArray[np.intp]]:
    """Give `shuffled_batches`, a sample that is alone twice: BatchNorm needs two."""
    for batch in shuffled_batches(index, batch_size, rng):
        yield batch if len(batch) > 1 else np.repeat(batch, 2)


def balanced_batches(
    normal: NDArray[np.intp],
    outliers: NDArray[np.intp],
    batch_size: int,
    rng: np.random.RandomState,
) -> Iterator[NDArray[np.intp]]:
    """Give mini-batches of normal samples, each followed by as many outliers.

    Both are shuffled once all of them were given, so that few outliers, or one, come
    over and over. Without outliers there are only normal samples.
    """
    each = shuffled_batches(outliers, 1, rng)
    for batch in shuffled_batches(normal, batch_size, rng):
        yield batch
        if len(outliers):
            yield np.concatenate([*islice(each, len(batch))])
