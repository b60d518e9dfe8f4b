"""A source and its cloner side by side, and how they are compared."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones import Backbone
from ..backbones._backbone import probes
from ..inference import PassOutputs
from ..inputs import chunks
from ..objectives import direction_loss, value_loss

WINDOW_SHARE = (
    3 / 16
)  # of the sides of a map: the window that residuals are averaged over
TOP_SHARE = 1 / 20  # of a map's positions: those that an image is scored by
MIN_VARIANCE = 0.01  # of a stage's mean: channels that vary less are not blown up
Pairs = dict[str, tuple[Tensor, Tensor]]  # of the source and the cloner, by stage
MIN_ENERGY = 1e-12  # an energy: places where neither network says anything


class SourceAndCloner(Backbone):
    """A source and its cloner side by side, compared stage by stage.

    It is given samples as the source sees them, and the source's activations at the
    stages that are compared. It gives two numbers for each stage: the value loss and
    the direction loss of Eqs. 1 and 3; or, once `precisions` are learnt, one number:
    the mean of the largest values of `residual_map`.

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

    def pairs(self, x: Tensor, *activations: Tensor) -> Pairs:
        """Give each stage's activations in the source and in the cloner."""
        expected = self.standardize(activations)
        both = zip(expected, self.imitate(x), strict=True)
        return dict(zip(self.compared, both, strict=True))

    def of_images(self, x: Tensor) -> Pairs:
        """Give the same from images in [0, 1], or vectors: run the source, too."""
        source: Any = self.stages["source"]
        outputs = source.forward_stages(x, self.compared)
        activations = [outputs[name] for name in self.compared]
        return self.pairs(source.normalize(x), *activations)

    def forward(self, x: Tensor, *activations: Tensor) -> Tensor:
        """Compare the stages: losses, or the largest residuals."""
        return self.compare(self.pairs(x, *activations))

    def compare(self, pairs: Pairs) -> Tensor:
        """Do the same with what `pairs` gives."""
        if not self.scored:
            return torch.cat([losses(*pair) for pair in pairs.values()], dim=1)
        values = self.residual_map(pairs).flatten(1)
        largest = values.topk(max(1, round(TOP_SHARE * int(values.shape[1]))))
        return largest.values.mean(dim=1, keepdim=True)

    def probe(self) -> list[Tensor]:
        """Give both networks' activations for a random image, always the same."""
        shape: tuple[int, ...] = (self.in_channels or 3,)
        if not self.vectors:
            shape = (*shape, *(self.input_size or (64, 64)))
        return [a for pair in self.of_images(*probes(shape)).values() for a in pair]

    def residual_map(self, pairs: Pairs) -> Tensor:
        """Give the Mahalanobis length of residuals, of all scored stages together.

        Parameters
        ----------
        pairs : mapping of str to pair of Tensor
            What `pairs` gives.

        Returns
        -------
        Tensor of shape (n_samples, height, width)
            At the size of the largest scored stage's maps.
        """
        found = [residuals(*pairs[name]) for name in self.scored]
        size = max((r.shape[2:] for r in found), key=math.prod)
        maps = []
        with torch.autocast(found[0].device.type, enabled=False):
            for precision, r in zip(self.precisions, found, strict=True):
                flat = r.flatten(2)
                lengths = (flat * (precision @ flat)).mean(dim=1)
                maps.append(lengths.view(-1, *r.shape[2:]))
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
    """
    if source.ndim == 2:
        source, cloner = source[..., None, None], cloner[..., None, None]
    energy = (source.square() + cloner.square()).mean(dim=1, keepdim=True)
    apart = (source - cloner) / energy.clamp(min=MIN_ENERGY).sqrt()
    window = [round(int(side) * WINDOW_SHARE) // 2 * 2 + 1 for side in apart.shape[2:]]
    return F.avg_pool2d(apart, window, 1, [side // 2 for side in window])


def total_loss(
    stages: tuple[str, ...], weights: list[float], network: Any, x: Tensor
) -> Tensor:
    """Eq. 4 over some stages, for each sample."""
    pairs = network.of_images(x)
    both = torch.stack([losses(*pairs[name]) for name in stages])
    return both.sum(dim=0) @ torch.tensor(weights, device=x.device)


def discrepancy(
    stages: tuple[str, ...], weights: list[float], network: Any, x: Tensor
) -> Tensor:
    """Eq. 4 position by position: maps of all stages, brought to one size."""
    return discrepancy_map(stages, weights, network.of_images(x), x.shape[2:])


def discrepancy_map(
    stages: tuple[str, ...], weights: list[float], pairs: Pairs, size: Any
) -> Tensor:
    """Do the same with what `SourceAndCloner.pairs` gives."""
    maps = []
    for name in stages:
        source, cloner = pairs[name]
        if source.ndim == 4:
            value = (source - cloner).square().mean(dim=1)
            direction = 1 - F.cosine_similarity(source, cloner)
            maps.append(weights[0] * value + weights[1] * direction)
    return sum_maps(maps, size)


def residual_map(network: Any, x: Tensor) -> Tensor:
    """`SourceAndCloner.residual_map`, brought to the size of the images."""
    return sum_maps([network.residual_map(network.of_images(x))], x.shape[2:])


def sum_maps(maps: list[Tensor], size: Any) -> Tensor:
    """Bring maps, each of shape (n_samples, height, width), to one size; add them."""
    resized = [F.interpolate(m[:, None], size=size, mode="bilinear") for m in maps]
    return torch.cat(resized, dim=1).sum(dim=1)


def paired(
    network: SourceAndCloner, outputs: PassOutputs, batches: Iterable[NDArray[np.intp]]
) -> Iterator[Pairs]:
    """Give each stage's activations in both networks, for one batch after the other."""
    front = outputs.front
    mixed = front.dtype == torch.bfloat16
    for _, inputs in outputs.batches(batches):
        with torch.autocast(front.device.type, torch.bfloat16, enabled=mixed):
            pairs = network.pairs(*inputs)
        yield pairs


def channel_scales(
    averages: NDArray[np.float32], widths: list[int], standardize: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Give the mean and the scale of each stage's channels over the training images.

    `averages`, of shape (n_samples, 2, n_channels), holds each image's mean, and mean
    square, of the channels of all stages, which have these `widths`.
    """
    average = torch.from_numpy(averages.mean(axis=0, dtype=np.float64))
    means, scales = [], []
    for mean, square in zip(*(m.split(widths) for m in average), strict=True):
        variance = (square - mean**2).clamp(min=0)
        variance = variance.clamp(min=MIN_VARIANCE * float(variance.mean()))
        varies = standardize and float(variance.max()) > 0
        means.append(mean.float() if varies else torch.zeros(len(mean)))
        scales.append(variance.sqrt().float() if varies else torch.ones(len(mean)))
    return means, scales


def learn_precisions(
    network: SourceAndCloner,
    scored: tuple[str, ...],
    outputs: PassOutputs,
    rows: NDArray[np.intp],
) -> None:
    """Learn how residuals of normal images vary, at each stage that is scored."""
    network.to(outputs.front.device)
    covariances: list[Any] = [0.0] * len(scored)
    with torch.no_grad():
        for pairs in paired(network, outputs, chunks(rows, outputs.front.batch_size)):
            for k, name in enumerate(scored):
                flat = residuals(*pairs[name]).transpose(0, 1).flatten(1)
                share = len(pairs[name][0]) / len(rows) / flat.shape[1]
                covariances[k] += share * (flat @ flat.T).double().cpu()
    for covariance in covariances:
        n_channels = len(covariance)
        ridge = MIN_VARIANCE * covariance.trace() / n_channels
        covariance += ridge.clamp(min=MIN_ENERGY) * torch.eye(n_channels)
        precision = torch.linalg.inv(covariance).float()
        network.precisions.append(nn.Parameter(precision, requires_grad=False))
    network.scored = scored
    network.frozen().cpu()


def checked_cloner(
    cloner: nn.Module, stages: tuple[str, ...], shapes: list[tuple[int, ...]]
) -> nn.Module:
    """Copy a cloner that the user gives, and check the shapes of what it gives.

    `shapes` are those of an image and of the stages' activations.
    """
    cloner = copy.deepcopy(cloner).float().requires_grad_(True).eval()
    image, *expected = map(tuple, shapes)
    try:
        with torch.inference_mode():
            outputs = in_order(cloner(torch.zeros(2, *image)), stages)
        given = [tuple(output.shape[1:]) for output in outputs]
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"cloner fails on images of shape {image}: {error!r}."
        ) from error
    if given != expected:
        raise ValueError(
            f"cloner gives activations of shapes {given}, but the stages "
            f"{', '.join(stages)} of the source have {expected}."
        )
    return cloner
