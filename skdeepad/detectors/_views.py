"""Views of samples: how they are transformed, drawn, and passed through a network."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..backbones import Backbone
from ..frozen import fingerprint, frozen_copy
from ..inference import FeaturePass
from ..training import balanced_batches
from ._trained import TrainedEnd


class Views:
    """Transformations of samples, and what each head is to tell of them.

    An image is mirrored, moved and turned, in this order; of a vector, entries are
    exchanged and their signs changed, at random, but by no transformation's first.

    Parameters
    ----------
    mirrored : tuple of int
        Out of 0 and 1.
    moved : tuple of int
        How often a quarter of the side, down and to the right.
    multi_headed : bool
        Whether there is a head for each axis that images are moved along, and one for
        turns; or one for all transformations.
    repeat_edge : bool
        How what moves in is filled: mirrored at the outermost pixels, which are
        repeated or not.
    shape : tuple of int
        Of one sample.
    seed : int
        For vectors.
    """

    _saved: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        mirrored: tuple[int, ...],
        moved: tuple[int, ...],
        *,
        multi_headed: bool,
        repeat_edge: bool,
        shape: tuple[int, ...],
        seed: int,
    ) -> None:
        self.steps = list(product(mirrored, moved, moved, range(4)))
        n = len(self.steps)
        self.labels = np.arange(n)[:, None]
        self.widths: tuple[int, ...] = (n,)
        if multi_headed:
            places = [[moved.index(d), moved.index(r), t] for _, d, r, t in self.steps]
            self.labels = np.array(places)
            self.widths = (len(moved), len(moved), 4)
        self.repeat_edge = repeat_edge
        self.entries = self.signs = None
        if len(shape) == 1:
            rng = np.random.RandomState(seed)
            found = [rng.permutation(shape[0]) for _ in range(n)]
            self.entries = np.array([np.arange(shape[0]), *found[1:]])
            self.signs = rng.choice([-1.0, 1.0], (n, shape[0])).astype(np.float32)
            self.signs[0] = 1

    def __len__(self) -> int:
        return len(self.steps)

    def apply(self, x: Tensor, which: NDArray[np.intp]) -> Tensor:
        """Transform each sample by the transformation of this number."""
        out = torch.empty_like(x)
        for t in np.unique(which):
            chosen = torch.from_numpy(which == t).to(x.device)
            out[chosen] = self.transform(x[chosen], t)
        return out

    def transform(self, x: Tensor, t: int) -> Tensor:
        """Transform all samples in one way."""
        if self.entries is not None and self.signs is not None:
            signs = torch.from_numpy(self.signs[t]).to(x)
            return x[:, torch.from_numpy(self.entries[t]).to(x.device)] * signs
        flip, down, right, turns = self.steps[t]
        x = x.flip(3) if flip else x
        for axis, quarters in ((2, down), (3, right)):
            if quarters:
                side = x.shape[axis]
                at = np.arange(side) - quarters * round(side / 4)
                within = mirror(at, side, self.repeat_edge)
                x = x.index_select(axis, torch.from_numpy(within).to(x.device))
        return x.rot90(turns, (2, 3)).contiguous()

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Give the logarithms of each head's probabilities, side by side."""
        parts = logits.split(self.widths, dim=-1)
        return torch.cat([part.log_softmax(dim=-1) for part in parts], dim=-1)

    def of_truth(self, log_p: NDArray[Any]) -> NDArray[Any]:
        """Give what heads say of each view's own transformation.

        From (n_samples, n_views, n_outputs) to (n_samples, n_views, n_heads).
        """
        columns = self.labels + np.cumsum((0, *self.widths[:-1]))
        return np.take_along_axis(log_p, columns[None], axis=2)


def mirror(at: NDArray[np.intp], side: int, repeat_edge: bool) -> NDArray[np.intp]:
    """Bring positions beyond the margin back into [0, side), as a mirror there does."""
    last = 2 * side - 1 if repeat_edge else max(2 * side - 2, 1)
    at = at % (last + repeat_edge)
    return np.minimum(at, last - at)


class DrawnViews:
    """Draws mini-batches, and transforms them when they are loaded, in that order."""

    def __init__(
        self,
        views: Views,
        n_together: int,
        augment: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.views = views
        self.n_together = n_together
        self.augment = augment
        self.waiting: deque[NDArray[np.intp]] = deque()
        self.done: deque[NDArray[np.intp]] = deque()

    def draw(
        self,
        rows: NDArray[np.intp],
        outliers: NDArray[np.intp],
        batch_size: int,
        rng: np.random.RandomState,
    ) -> Iterator[NDArray[np.intp]]:
        """Give mini-batches of samples, each of them once for each of its views."""
        together = self.n_together
        n_groups = len(self.views) // together
        samples = np.append(rows, outliers)
        items = np.arange(len(samples) * n_groups)
        normal, others = np.split(items, [len(rows) * n_groups])
        for batch in balanced_batches(normal, others, batch_size, rng):
            first = together * (batch % n_groups)
            self.waiting.append((first[:, None] + np.arange(together)).ravel())
            yield np.repeat(samples[batch // n_groups], together)

    def __call__(self, x: Tensor) -> Tensor:
        """Transform the mini-batch whose turn it is."""
        which = self.waiting.popleft()
        self.done.append(which)
        return self.views.apply(self.augment(x) if self.augment else x, which)


@dataclass(frozen=True)
class ViewsPass(FeaturePass):
    """A pass of all views of each sample through the whole network."""

    end: TrainedEnd
    views: Views

    def _outputs(self, network: Backbone, x: Tensor) -> list[Tensor]:
        end = frozen_copy(self.end, x.device, torch.float32)
        found = []
        for t in range(len(self.views)):
            inputs = super()._outputs(network, self.views.transform(x, t))
            with torch.autocast(x.device.type, enabled=False):
                logits = end(*(value.float() for value in inputs))
            found.append(self.views.log_probabilities(logits))
        return [torch.cat(found, dim=1)]

    def _key_parts(self) -> tuple[Any, ...]:
        views = sorted(vars(self.views).items())
        return *super()._key_parts(), repr(views), fingerprint(self.end)
