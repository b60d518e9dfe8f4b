"""A source and its cloner side by side, and how they are compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones import Backbone
from ..objectives import direction_loss, value_loss

# what stands for a stage where residuals are scored; no stage has a dot in its name
RESIDUAL = "residual.largest"
SHARE = 3 / 16  # of the sides of a map: the window that residuals are averaged over
LARGEST = 1 / 20  # of a map's positions: those that an image is scored by
TINY = 1e-12  # an energy: places where neither network says anything


class SourceAndCloner(Backbone):
    """A source and its cloner side by side, compared stage by stage.

    Its "features" are two numbers for each stage: the value loss and the direction
    loss of Eqs. 1 and 3. Once `precisions` are learnt, it has another stage,
    `RESIDUAL`, of one number: the mean of the largest values of `residual_map`.

    Parameters
    ----------
    source : Backbone
    cloner : torch.nn.Module
        Gives the activations of each of `stages`, in a sequence or a mapping.
    stages : tuple of str
        The stages that are compared.
    means, scales : list of Tensor, each of shape (n_channels,)
        The source's activations are compared once ``(a - mean) / scale``.
    """

    def __init__(
        self,
        source: Backbone,
        cloner: nn.Module,
        stages: tuple[str, ...],
        means: Iterable[Tensor],
        scales: Iterable[Tensor],
    ) -> None:
        super().__init__(
            {"source": source, "cloner": cloner},
            input_size=source.input_size,
            in_channels=source.in_channels,
            vectors=source.vectors,
        )
        self.compared = stages
        self.means = nn.ParameterList(means)
        self.scales = nn.ParameterList(scales)
        self.scored: tuple[str, ...] = ()  # the stages that precisions are of
        self.precisions = nn.ParameterList()

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Names of the stages that are compared."""
        return self.compared

    def clone(self) -> Self:
        """Copy the weights, the source's too, which pickles as a name."""
        new = super().clone()
        new.stages["source"] = self.stages["source"].clone()  # type: ignore[operator]
        return new

    def standardize(self, activations: Iterable[Tensor]) -> list[Tensor]:
        """Bring the source's channels to one scale."""
        terms = zip(activations, self.means, self.scales, strict=True)
        return [
            (a.float() - per_channel(mean, a)) / per_channel(scale, a)
            for a, mean, scale in terms
        ]

    def imitate(self, x: Tensor) -> list[Tensor]:
        """Give the cloner's activations, from samples as the source sees them."""
        outputs = in_order(self.stages["cloner"](x), self.compared)
        return [a.float() for a in outputs]

    def activations(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Run both networks; give each stage's activations in the one and the other."""
        source: Any = self.stages["source"]
        outputs = source.forward_stages(x, self.compared)
        expected = self.standardize(outputs[name] for name in self.compared)
        pairs = zip(expected, self.imitate(source.normalize(x)), strict=True)
        return dict(zip(self.compared, pairs, strict=True))

    def forward_stages(self, x: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """Give the value and the direction loss of the named stages."""
        if tuple(names) == (RESIDUAL,):
            values = self.residual_map(x).flatten(1)
            largest = values.topk(max(1, round(LARGEST * values.shape[1])))
            return {RESIDUAL: largest.values.mean(dim=1, keepdim=True)}
        pairs = self.activations(x)
        return {name: losses(*pairs[name]) for name in names}

    def residual_map(self, x: Tensor) -> Tensor:
        """Give the Mahalanobis length of residuals, of all scored stages together.

        Parameters
        ----------
        x : Tensor of shape (n_samples, ...)
            Images in [0, 1], or vectors.

        Returns
        -------
        Tensor of shape (n_samples, height, width)
            At the size of the largest scored stage's maps.
        """
        pairs = self.activations(x)
        found = {name: residuals(*pairs[name]) for name in self.scored}
        size = max((r.shape[2:] for r in found.values()), key=math.prod)
        maps = []
        with torch.autocast(x.device.type, enabled=False):
            for precision, r in zip(self.precisions, found.values(), strict=True):
                flat = r.flatten(2)
                lengths = (flat * (precision @ flat)).mean(dim=1)
                maps.append(lengths.view(len(r), *r.shape[2:]))
        return sum_maps(maps, size).clamp(min=0).sqrt()


def in_order(outputs: Any, stages: tuple[str, ...]) -> Iterable[Tensor]:
    """Give what a cloner returned, a sequence or a mapping, in the stages' order."""
    return (
        [outputs[name] for name in stages] if isinstance(outputs, Mapping) else outputs
    )


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Shape one value for each channel so that it meets activations."""
    return values.view(-1, *(1 for _ in like.shape[2:]))


def losses(source: Tensor, cloner: Tensor) -> Tensor:
    """Eqs. 1 and 3 for one stage, side by side, for each sample."""
    return torch.stack(
        [value_loss(source, cloner), direction_loss(source, cloner)], dim=1
    )


def residuals(source: Tensor, cloner: Tensor) -> Tensor:
    """Average over places nearby what a source says and its cloner does not.

    ``(a_s - a_c) / sqrt((|a_s|^2 + |a_c|^2) / n_channels)`` at each place, so that a
    contrast does not count for itself. Noise of normal textures averages out; what a
    defect makes does not. Beyond the border there is nothing, and networks that see
    nothing there err more: it counts as 0.

    Parameters
    ----------
    source, cloner : Tensor of shape (n_samples, n_channels, ...)

    Returns
    -------
    Tensor of shape (n_samples, n_channels, height, width)
    """
    if source.ndim == 2:
        source, cloner = source[..., None, None], cloner[..., None, None]
    energy = (source.square() + cloner.square()).mean(dim=1, keepdim=True)
    apart = (source - cloner) / energy.clamp(min=TINY).sqrt()
    window = [round(side * SHARE) // 2 * 2 + 1 for side in apart.shape[2:]]
    return F.avg_pool2d(apart, window, 1, [side // 2 for side in window])


def total_loss(
    stages: tuple[str, ...], weights: list[float], network: Any, x: Tensor
) -> Tensor:
    """Eq. 4 over some stages, for each sample."""
    both = torch.stack(list(network.forward_stages(x, stages).values()))
    return both.sum(dim=0) @ torch.tensor(weights, device=x.device)


def discrepancy(
    stages: tuple[str, ...], weights: list[float], network: Any, x: Tensor
) -> Tensor:
    """Eq. 4 position by position: maps of all stages, brought to one size."""
    pairs = network.activations(x)
    maps = []
    for name in stages:
        source, cloner = pairs[name]
        if source.ndim == 4:
            value = (source - cloner).square().mean(dim=1)
            direction = 1 - F.cosine_similarity(source, cloner)
            maps.append(weights[0] * value + weights[1] * direction)
    return sum_maps(maps, x.shape[2:])


def residual_map(network: Any, x: Tensor) -> Tensor:
    """`SourceAndCloner.residual_map`, brought to the size of the images."""
    return sum_maps([network.residual_map(x)], x.shape[2:])


def sum_maps(maps: list[Tensor], size: Any) -> Tensor:
    """Bring maps, each of shape (n_samples, height, width), to one size; add them."""
    resized = [F.interpolate(m[:, None], size=size, mode="bilinear") for m in maps]
    return torch.cat(resized, dim=1).sum(dim=1)
