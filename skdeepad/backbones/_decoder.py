"""The decoder of an autoencoder: a network's stages, mirrored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod

import torch
from torch import nn

from ._small import draw_as_svdd

Shape = tuple[int, ...]
CODE_SIDE = 4  # of the map that a LeNet's code is laid out as
LENET_SIDES = [28, 14, 7], [32, 16, 8, 4]  # of maps, for MNIST and CIFAR-10


def make_decoder(
    stages: Iterable[nn.Module],
    shape: Shape,
    *,
    unit: bool,
    normalize_code: bool = False,
) -> nn.Sequential:
    """Mirror stages: for each a layer that goes from its output to its input.

    Vectors are multiplied; maps are enlarged by repetition, and convolved (transposed,
    5 x 5). BatchNorm and leaky ReLU come between, and nothing has a bias. Of the LeNets
    it is the decoder of Deep SVDD's official code. `shape` is that of one input;
    `unit` tells whether it lies in [0, 1]: a sigmoid then ends the decoder.
    `normalize_code` puts BatchNorm before a LeNet for CIFAR-10, as that code does.
    Weights are drawn from torch's global stream.
    """
    shapes = [tuple(shape)]
    x = torch.zeros(2, *shape)
    with torch.inference_mode():
        for stage in stages:
            x = stage(x)
            shapes.append(tuple(x.shape[1:]))
    maps = [shape for shape in shapes if len(shape) == 3]
    vectors = [shape for shape in shapes if len(shape) == 1]
    sides = [side for _, side, width in maps if side == width]
    if sides in LENET_SIDES and vectors and vectors[0][0] % CODE_SIDE**2 == 0:
        decoder = _mirror_lenet(maps, vectors, normalize_code)
    else:
        decoder = _mirror(shapes)
    if unit:
        decoder.append(nn.Sigmoid())
    return decoder


def _mirror_lenet(
    maps: Sequence[Shape], vectors: Sequence[Shape], normalize_code: bool
) -> nn.Sequential:
    """Lay the code out as a map of 4 x 4, and enlarge it to those of the encoder."""
    colour = len(maps) == len(LENET_SIDES[1])
    decoder = nn.Sequential()
    for (after,), (before,) in pairwise(vectors[::-1]):
        decoder.append(nn.Linear(after, before, bias=False))
        decoder.append(nn.BatchNorm1d(before, eps=1e-4, affine=False))
    if colour and normalize_code and len(vectors) == 1:
        decoder.append(nn.BatchNorm1d(vectors[0][0], eps=1e-4, affine=False))
    n_channels, side = vectors[0][0] // CODE_SIDE**2, CODE_SIDE
    decoder.append(nn.Unflatten(1, (n_channels, side, side)))
    # to the maps that each stage gave, and at last to what the first was given
    for i, (before, wanted, _) in enumerate(maps[::-1]):
        if i:
            decoder.append(nn.BatchNorm2d(n_channels, eps=1e-4, affine=False))
        decoder.append(nn.LeakyReLU())
        if i or not colour:
            side *= 2
            decoder.append(nn.Upsample(scale_factor=2))
        # 16 is cut to 14; 8 stays, as 7 is not to be had
        padding = 2 + (side - wanted) // 2
        decoder.append(
            nn.ConvTranspose2d(n_channels, before, 5, padding=padding, bias=False)
        )
        n_channels, side = before, side + 4 - 2 * padding
    if colour:
        draw_as_svdd(list(decoder))
    return decoder


def _mirror(shapes: list[Shape]) -> nn.Sequential:
    decoder = nn.Sequential()
    for after, before in pairwise(reversed(shapes)):
        if len(decoder):
            norm = nn.BatchNorm2d if len(after) == 3 else nn.BatchNorm1d
            decoder.append(norm(after[0], eps=1e-4, affine=False))
            decoder.append(nn.LeakyReLU())
        if len(after) == 3:
            decoder.append(nn.Upsample(size=before[1:]))
            decoder.append(
                nn.ConvTranspose2d(after[0], before[0], 5, padding=2, bias=False)
            )
        else:
            decoder.append(nn.Linear(prod(after), prod(before), bias=False))
            decoder.append(nn.Unflatten(1, before))
    for module in decoder:
        if isinstance(module, nn.Linear | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(module.weight)
    return decoder
