"""The decoder of an autoencoder: a network's stages, mirrored."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from math import prod

import torch
from torch import nn


def make_decoder(
    stages: Iterable[nn.Module], shape: tuple[int, ...], *, unit: bool
) -> nn.Sequential:
    """Mirror stages: for each a layer that goes from its output to its input.

    Maps are enlarged by repetition, and convolved (transposed, 5 x 5); vectors are
    multiplied. BatchNorm and leaky ReLU come between, nothing has a bias: for the
    LeNets, the decoders of the official code of Deep SVDD. `shape` is that of one
    input, and `unit` tells whether it lies in [0, 1]: a sigmoid then ends the decoder.
    Weights are drawn from torch's global stream (Xavier, uniform).
    """
    shapes = [tuple(shape)]
    x = torch.zeros(2, *shape)
    with torch.inference_mode():
        for stage in stages:
            x = stage(x)
            shapes.append(tuple(x.shape[1:]))
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
    if unit:
        decoder.append(nn.Sigmoid())
    return decoder
