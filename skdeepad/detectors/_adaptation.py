"""The objectives of PANDA: how features are adapted without collapse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones._backbone import pool
from ..backbones._pretrained import read_tensors
from ..base import draw_seed
from ..fisher import mean_squared_gradients, sampled_loss
from ..inference import PassOutputs
from ..inputs import chunks
from ..objectives import compactness, elastic_penalty, outlier_exposure
from ..training import balanced_batches, shuffled_batches

FISHER_SAMPLES = 100  # as many draws as the paper takes mini-batches


class Adaptation:
    """What is trained, and the objectives it is trained under: sections 2 and 3.

    Each objective is a stream of losses without end, one for each mini-batch.
    """

    def __init__(
        self,
        stages: nn.Module,
        head: nn.Module | None,
        center: Tensor,
        outputs: PassOutputs,
        rows: NDArray[np.intp],
        rng: np.random.RandomState,
        *,
        normalize: bool,
    ) -> None:
        self.device = outputs.front.device
        self.stages = stages.to(self.device).to(memory_format=torch.channels_last)
        self.head: Any = head and head.to(self.device)
        self.center = center.to(self.device)
        self.outputs = outputs
        self.rows = rows
        # of its own, so that all objectives see the same mini-batches
        self.seed = draw_seed(rng)
        self.rng = np.random.RandomState(self.seed)
        self.batch_size = outputs.front.batch_size
        self.normalize = normalize
        self.trained = {
            name: parameter
            for name, parameter in stages.named_parameters()
            if parameter.requires_grad
        }

    @property
    def parameters(self) -> list[Tensor]:
        """Everything that has a gradient."""
        of_head = self.head.parameters() if self.head else ()
        return [*self.trained.values(), *(p for p in of_head if p.requires_grad)]

    def pooled(self, x: Tensor) -> Tensor:
        """Give features, from what the frozen stages made of images."""
        return pool(self.stages(x))

    def psi(self, x: Tensor) -> Tensor:
        """Give features, of unit length where so wanted."""
        return unit_length(self.pooled(x), self.normalize)

    def compactness(self) -> Iterator[Tensor]:
        """Eq. 1."""
        shuffled = shuffled_batches(self.rows, self.batch_size, self.rng)
        for _, (x,) in self.outputs.batches(shuffled):
            yield compactness(self.psi(x), self.center)

    def joint(
        self, images: PassOutputs, classes: Tensor, alpha: float
    ) -> Iterator[Tensor]:
        """Eq. 2."""
        everything = np.arange(len(classes))
        # of its own: files are read ahead, and streams would take turns otherwise
        rng = np.random.RandomState(self.seed + 1)
        shuffled = shuffled_batches(everything, self.batch_size, rng)
        pretraining = images.batches(shuffled)
        for loss, (index, (x,)) in zip(self.compactness(), pretraining, strict=True):
            logits = self.head(self.pooled(x))
            target = classes[index].to(self.device)
            yield F.cross_entropy(logits, target) + alpha * loss

    def fisher(self, rng: np.random.RandomState) -> list[Tensor]:
        """Eq. 3, over outcomes drawn from what the network predicts."""
        chosen = rng.permutation(self.rows)[:FISHER_SAMPLES]
        generator = torch.Generator().manual_seed(draw_seed(rng))
        losses = (
            sampled_loss(self.pooled(x), self.head, generator)
            for _, (x,) in self.outputs.batches(chunks(chosen, 1))
        )
        return mean_squared_gradients(list(self.trained.values()), losses)

    def given_fisher(self, given: str | Path | Mapping[str, Any]) -> list[Tensor]:
        """Look up the Fisher diagonal of the trained weights in what the user gives."""
        if not isinstance(given, Mapping):
            given = read_tensors(Path(given), "fisher")
        found = []
        for name, parameter in self.trained.items():
            values = given.get(f"stages.{name}")
            if values is None or np.shape(values) != parameter.shape:
                raise ValueError(
                    f"fisher has no values of shape {tuple(parameter.shape)} for the "
                    f"weight 'stages.{name}'. Compute it for this backbone by "
                    "skdeepad.fisher.fisher_diagonal."
                )
            found.append(torch.as_tensor(values, dtype=torch.float32))
        return [values.to(self.device) for values in found]

    def ewc(
        self, fisher: list[Tensor], ewc_lambda: float, stiffest: float
    ) -> Iterator[Tensor]:
        """Eq. 4, lambda times F no larger than `stiffest`."""
        parameters = list(self.trained.values())
        initial = [parameter.detach().clone() for parameter in parameters]
        stiffness = [(ewc_lambda * f).clamp(max=stiffest) for f in fisher]
        for loss in self.compactness():
            yield loss + elastic_penalty(parameters, initial, stiffness)

    def outlier_exposure(self, outliers: NDArray[np.intp]) -> Iterator[Tensor]:
        """Eq. 5, over as many outliers as normal samples."""
        drawn = balanced_batches(self.rows, outliers, self.batch_size, self.rng)
        halves = self.outputs.batches(drawn)
        for _, (normal,) in halves:
            x = torch.cat([normal, *next(halves)[1]])
            outlier = torch.arange(len(x), device=self.device) >= len(normal)
            logits = self.head(self.psi(x))[:, 0]
            yield outlier_exposure(logits, outlier)


def unit_length(features: Tensor, normalize: bool) -> Tensor:
    """Scale each row to unit length, if so wanted."""
    return F.normalize(features) if normalize else features
