"""Score -> map: where in an image the anomaly is.

An attribution is a function of the network and a batch of images, which gives a map
for each; `MapPass` runs it over a batch as the inference loop wants it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import (
    find_objects,
    gaussian_filter,
    generate_binary_structure,
    grey_opening,
    label,
)
from torch import Tensor, nn
from torch.nn import functional as F

from .backbones import Backbone
from .inference import FeaturePass

Score = Callable[[Backbone, Tensor], Tensor]
Attribution = Callable[[Backbone, Tensor], Tensor]


@dataclass(frozen=True)
class MapPass(FeaturePass):
    """One pass that gives a map of each image, at the size the network sees."""

    attribution: Attribution

    def _outputs(self, network: Backbone, x: Tensor) -> list[Tensor]:
        return [self.attribution(network, x).flatten(1)]


def gradient(score: Score, network: Backbone, x: Tensor) -> Tensor:
    """How much each pixel adds to the score: ``sum_channels |d score / d x|``.

    Eq. 5 of Salehi et al. (2021), of shape (n_samples, height, width).
    """
    # the pass around is one without gradients, perhaps in lower precision
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(x.device.type, enabled=False),
    ):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(score(network, x).sum(), x)
        return slope.abs().sum(dim=1)


def smoothgrad(score: Score, noise: Tensor, network: Backbone, x: Tensor) -> Tensor:
    """Average `gradient` over noisy copies of the images (Smilkov et al., 2017).

    `noise`, of shape (n_copies, channels, height, width), is added to each image, so
    that no map depends on the other images.
    """
    maps = [gradient(score, network, x + n) for n in noise.to(x.device)]
    return torch.stack(maps).mean(dim=0)


class _GuidedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return slope.clamp(min=0) * (x > 0)


class GuidedReLU(nn.Module):
    """A ReLU that lets positive gradients through only (Springenberg et al., 2015)."""

    def forward(self, x: Tensor) -> Tensor:
        """Clip at 0."""
        return _GuidedStep.apply(x)


def guided(module: nn.Module) -> nn.Module:
    """Copy a network, its ReLU modules replaced by guided ones.

    A copy needs no hooks: the network stays as it was, and threads do not meet.
    """
    copied = copy.deepcopy(module)
    for parent in list(copied.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, GuidedReLU())
    return copied


def refine(
    maps: NDArray[np.float32], sigma: float, opening: bool
) -> NDArray[np.float32]:
    """Smooth maps, and remove what is smaller than the structuring element.

    ``(M - B) + B`` of ``M = g_sigma(map)``: Eq. 6 of Salehi et al. (2021), with the
    ellipse of 3 x 3 pixels, a cross, for B. `sigma` is in pixels; 0 does not smooth.
    """
    if sigma:
        maps = gaussian_filter(maps, sigma, axes=(1, 2))
    if opening:
        maps = grey_opening(maps, footprint=generate_binary_structure(2, 1)[None])
    return maps


def fit_size(image_map: NDArray[np.float32], size: tuple[int, int]) -> NDArray[Any]:
    """Bring a map to the size of its image (bilinear)."""
    values = torch.from_numpy(image_map)[None, None]
    smaller = size[0] < image_map.shape[0] or size[1] < image_map.shape[1]
    resized = F.interpolate(values, size=size, mode="bilinear", antialias=smaller)
    return resized[0, 0].numpy()


def regions_above(image_map: NDArray[np.float32], level: float) -> list[dict[str, Any]]:
    """List the connected regions in which a map exceeds a level.

    Parameters
    ----------
    image_map : ndarray of float32, shape (height, width)
    level : float

    Returns
    -------
    list of dict
        For each region its box ("top", "left", "bottom", "right"; the last two are
        not in it), its "area" in pixels and its "peak".
    """
    numbers, _ = label(image_map > level, structure=np.ones((3, 3)))
    regions = []
    for number, (rows, columns) in enumerate(find_objects(numbers), 1):
        inside = image_map[rows, columns][numbers[rows, columns] == number]
        box = {"top": rows.start, "left": columns.start}
        box |= {"bottom": rows.stop, "right": columns.stop}
        regions.append({**box, "area": inside.size, "peak": float(inside.max())})
    return regions
