"""What a graph is made of: modules, and the error of what cannot be exported."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..base import ROUNDING
from ..frozen import frozen_copy
from ..inference import FeaturePass

Size = tuple[int, int]
Images = Mapping[Size, Tensor]  # of shape (n, channels, height, width), by their size


class ExportError(NotImplementedError):
    """A detector, or a part of it, that has no ONNX graph; the message says why."""


class Step(nn.Module):
    """A module whose buffers are tensors to type checkers, too."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class Part(Step):
    """A part of a graph: images in [0, 1] -> the outputs of a detector, by name.

    Attributes
    ----------
    sizes : tuple of (int, int)
        The sizes in which it wants the images.
    channels : int
        How many channels the images have.
    """

    sizes: tuple[Size, ...]
    channels: int

    def forward(self, images: Images) -> dict[str, Tensor]:
        """Give "score", and where there are any "map" and "logits"."""
        raise NotImplementedError


@singledispatch
def part_of(detector: Any) -> Part:
    """Give the part of the graph that scores images as a fitted detector does."""
    raise ExportError(
        f"{type(detector).__name__} cannot be exported: it is no detector of images of "
        "this package, and no pipeline of BackboneFeatures and a scorer. Use "
        "skdeepad.save to keep it."
    )


@singledispatch
def scoring(scorer: Any) -> nn.Module:
    """Give the function of features, in float32, that a fitted scorer computes."""
    raise ExportError(
        f"{type(scorer).__name__} cannot be exported: only the scorers of "
        "skdeepad.scorers have a graph. Use one of them."
    )


def size_of_images(size: Size | None) -> Size:
    """Give the size at which a network sees images, and refuse networks of vectors."""
    if size is None:
        raise ExportError(
            "Detectors of vectors cannot be exported: graphs start at images. Fit the "
            "detector on images."
        )
    return size


class FrontAndScore(Part):
    """A frozen front, perhaps a live end, and a score of the features."""

    def __init__(
        self, front: FeaturePass, channels: int, end: Any, score: nn.Module
    ) -> None:
        super().__init__()
        size = size_of_images(front.image_size)
        self.front, self.channels, self.sizes = front, channels, (size,)
        cpu = torch.device("cpu")
        self.network = frozen_copy(front.backbone, cpu, torch.float32)
        self.end = None if end is None else frozen_copy(end, cpu, torch.float32)
        self.score = score

    def forward(self, images: Images) -> dict[str, Tensor]:
        """Give what the score makes of the features: a tensor, or some by name."""
        outputs = self.front._outputs(self.network, images[self.sizes[0]])
        outputs = [output.float() for output in outputs]
        features = (
            torch.cat([output.flatten(1) for output in outputs], dim=1)
            if self.end is None
            else self.end(*outputs)
        )
        found = self.score(features)
        return found if isinstance(found, dict) else {"score": found}


class PValues(Step):
    """``(1 + #{held-out score <= score}) / (n + 1)``, ties as in `count_below`."""

    def __init__(self, held_out: Any) -> None:
        super().__init__()
        self.register_buffer("held_out", torch.from_numpy(held_out))
        self.typical = float(self.held_out.abs().quantile(0.5))

    def forward(self, score: Tensor) -> Tensor:
        """Compare."""
        sizes = score.abs().clamp(min=self.typical)
        below = self.held_out[None] <= (score + ROUNDING * sizes)[:, None]
        return (1 + below.double().sum(dim=1)) / (len(self.held_out) + 1)
