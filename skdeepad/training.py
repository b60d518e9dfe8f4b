"""The one training loop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode


class DepthwiseConvolution(torch.autograd.Function):
    """A depthwise convolution whose weights' gradient is a convolution, too.

    Its kernels are the gradients of the outputs, one for each sample and channel. For
    5 x 5 this takes CPUs a third of the time of the gradient that torch computes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, stride: Any, padding: Any
    ) -> Tensor:
        """Convolve."""
        ctx.save_for_backward(x, weight)
        ctx.options = stride, padding
        return F.conv2d(x, weight, None, stride, padding, 1, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Give the gradients of the input and of the weights."""
        (x, weight), (stride, padding) = ctx.saved_tensors, ctx.options
        n_channels, _, height, width = weight.shape
        of_x = None
        if ctx.needs_input_grad[0]:
            options = stride, padding, 1, n_channels
            of_x = conv2d_input(x.shape, weight, gradient, *options)
        images, kernels = (
            tensor.contiguous().view(-1, *tensor.shape[2:]) for tensor in (x, gradient)
        )
        by_sample = F.conv2d(
            images[None], kernels[:, None], None, 1, padding, stride, len(images)
        )
        # the outermost rows and columns of the image may meet no stride
        by_sample = by_sample[0, :, :height, :width].unflatten(0, (-1, n_channels))
        return of_x, by_sample.sum(0)[:, None], None, None


class QuickGradients(TorchFunctionMode):
    """Within it, `DepthwiseConvolution` takes the place of what it is quicker than."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch."""
        if func is torch.conv2d and not kwargs and len(args) == 7:
            x, weight, bias, stride, padding, dilation, groups = args
            if (
                bias is None
                and groups == len(weight) == x.shape[1]
                and min(weight.shape[2:]) > 3
                and weight.requires_grad
                and x.device.type == "cpu"
                and dilation == (1, 1)
                and not isinstance(padding, str)
            ):
                return DepthwiseConvolution.apply(x, weight, stride, padding)
        return func(*args, **(kwargs or {}))


def with_quick_gradients(losses: Iterable[Tensor]) -> Iterator[Tensor]:
    """Compute each loss, when its turn comes, so that its gradient is quick."""
    losses, quick = iter(losses), QuickGradients()
    while True:
        with quick:  # left before the loss is given: nothing else is changed
            loss = next(losses, None)
        if loss is None:
            return
        yield loss


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
    for loss in with_quick_gradients(losses):
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
