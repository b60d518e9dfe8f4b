"""The cloner of knowledge distillation: a small network that imitates a backbone."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._backbone import Backbone

COMPACT_WIDTH = 16  # width of the layers that nothing is compared with: the paper's
MAX_LAYERS = 3  # layers in a block; VGG's have no more


class Cloner(nn.Module):
    """Blocks in a row, one for each stage of a backbone.

    The outputs of the blocks that `stages` names are given.
    """

    _saved: ClassVar[dict[str, Any]] = {}

    def __init__(self, blocks: dict[str, nn.Module], stages: Iterable[str]) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(blocks)
        self.stages = tuple(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Give the outputs of the tapped blocks."""
        outputs = []
        for name, block in self.blocks.items():
            x = block(x)
            if name in self.stages:
                outputs.append(x)
        return outputs


def make_cloner(
    source: Backbone,
    stages: tuple[str, ...],
    shape: tuple[int, ...],
    *,
    compact: bool,
    signed: bool,
) -> Cloner:
    """Make a bias-free network whose blocks imitate a backbone's stages.

    A block has as many 3 x 3 convolutions (or linear layers) as its stage, two or
    three, with BatchNorm and ReLU between them; where the stage makes maps smaller, so
    does its first convolution, or the max-pooling that the stage ends in. For a VGG-16
    this is the network of Salehi et al. (2021), layer for layer. Weights are drawn from
    torch's global stream (Xavier, uniform).

    Parameters
    ----------
    source : Backbone
        The network to imitate.
    stages : tuple of str
        The stages that are compared, in their order.
    shape : tuple of int
        The shape of one sample.
    compact : bool
        Whether layers that are not compared have 16 channels instead of as many as
        their stage.
    signed : bool
        Whether compared outputs may be negative even where the stage's are not.
    """
    names = source.stage_names[: source.stage_names.index(stages[-1]) + 1]
    with torch.inference_mode():
        # noise, so that a stage that gives negative values shows it
        probe = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
        outputs = source.forward_stages(probe, names)
        x = source.normalize(probe)
    blocks: dict[str, nn.Module] = {}
    for name in names:
        output, compared = outputs[name], name in stages
        if output.ndim not in (2, 4) or output.ndim > x.ndim:
            raise ValueError(
                f"stage {name!r} gives values of shape {tuple(output.shape[1:])}, "
                "which are neither maps nor vectors. Choose other stages, or pass "
                "a cloner of your own."
            )
        width = output.shape[1] if compared or not compact else COMPACT_WIDTH
        hidden = COMPACT_WIDTH if compact else width
        depth = min(max(_count_layers(source.stages[name]), 1 + compared), MAX_LAYERS)
        widths = [x.shape[1], *[hidden] * (depth - 1), width]
        pooling = _last_max_pooling(source.stages[name])
        block = _make_block(x, output, widths, pooling)
        if not compared or not (signed or output.min() < 0):
            block.append(nn.ReLU())
        block.extend(pooling)
        with torch.inference_mode():
            x = block.eval()(x)
            if x.shape[2:] != output.shape[2:]:  # the stage does not pad its maps
                block.append(nn.AdaptiveAvgPool2d(tuple(output.shape[2:])))
                x = block[-1](x)
        blocks[name] = block
    cloner = Cloner(blocks, stages)
    for module in cloner.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    return cloner.train()


def _make_block(
    x: Tensor, output: Tensor, widths: list[int], pooling: list[nn.MaxPool2d]
) -> nn.Sequential:
    """Make layers of these widths from one shape to the other, but for the pooling."""
    maps = output.ndim == 4
    block = nn.Sequential()
    if x.ndim == 4 and not maps:
        block.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    strides = (1, 1)
    if maps:
        left: Any = pooling[0].stride if pooling else 1  # to the pooling
        high, wide = (
            round(before / after / left)
            for before, after in zip(x.shape[2:], output.shape[2:], strict=True)
        )
        strides = (high, wide)
    for i, (channels, out) in enumerate(pairwise(widths)):
        if i > 0:
            block.append(nn.BatchNorm2d(channels) if maps else nn.BatchNorm1d(channels))
            block.append(nn.ReLU())
        if maps:
            block.append(_convolution(channels, out, strides if i == 0 else (1, 1)))
        else:
            block.append(nn.Linear(channels, out, bias=False))
    return block


def _convolution(channels: int, out: int, strides: tuple[int, int]) -> nn.Conv2d:
    sizes = [max(3, stride + 1 - stride % 2) for stride in strides]
    return nn.Conv2d(
        channels,
        out,
        (sizes[0], sizes[1]),
        stride=strides,
        padding=(sizes[0] // 2, sizes[1] // 2),
        bias=False,
    )


def _count_layers(stage: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d | nn.Linear) for m in stage.modules())


def _last_max_pooling(stage: nn.Module) -> list[nn.MaxPool2d]:
    """Copy the max-pooling that a stage ends in, as VGG's do."""
    last = list(stage.children())[-1:]
    return [copy.deepcopy(m) for m in last if isinstance(m, nn.MaxPool2d)]
