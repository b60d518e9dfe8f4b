"""The diagonal of the Fisher information: how much a network minds each weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils import check_consistent_length, check_random_state, column_or_1d
from torch import Tensor, nn
from torch.nn import functional as F

from .backbones import Backbone, load_backbone
from .base import draw_seed
from .inference import pool
from .inputs import check_inputs, chunks, load_batches
from .training import with_quick_gradients

__all__ = ["fisher_diagonal"]


def mean_squared_gradients(
    parameters: Sequence[Tensor], losses: Iterable[Tensor]
) -> list[Tensor]:
    """Average the squared gradient of each sample's loss: PANDA's Eq. 3.

    There is one loss for each sample: the mean loss of a mini-batch would give less, by
    up to the size of the batch.
    """
    total = [torch.zeros_like(p) for p in parameters]
    n = 0
    for loss in with_quick_gradients(losses):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for sum_of_squares, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                sum_of_squares.addcmul_(gradient, gradient)
        n += 1
    return [sum_of_squares / n for sum_of_squares in total]


def sampled_loss(
    features: Tensor, head: nn.Module | None, generator: torch.Generator
) -> Tensor:
    """Loss for an outcome drawn from the model's own prediction.

    Its squared gradients average to the Fisher information, by definition. The
    prediction is the head's softmax; without a head, a Gaussian of unit variance
    about the features.
    """
    if head is None:
        noise = torch.randn(features.shape, generator=generator).to(features.device)
        return (features - features.detach() - noise).square().sum() / 2
    logits = head(features)
    chances = logits.detach().softmax(1).cpu()
    drawn = torch.multinomial(chances, 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, drawn.to(logits.device))


def fisher_diagonal(
    X: Any,
    y: ArrayLike | None = None,
    *,
    backbone: Any = "efficientnet_lite0",
    weights: str | Path | None = "default",
    image_size: tuple[int, int] | None = None,
    n_samples: int = 3200,
    random_state: int | np.random.RandomState | None = None,
) -> dict[str, Tensor]:
    """Estimate the Fisher information's diagonal of a pretrained network.

    ``F_i = E[(d log p(y | x) / d theta_i)^2]``, Eq. 3 of PANDA [1]_: what elastic
    weight consolidation weighs the change of each weight with. It is computed once,
    for all later adaptations::

        torch.save(fisher_diagonal(X, y), "fisher.pt")
        PANDAEstimator(fisher="fisher.pt")

    Parameters
    ----------
    X : array-like or sequence of paths
        Images that the network was pretrained on, or the like of them.
    y : array-like of shape (n_samples,), default=None
        Their classes: numbers of the head's logits. None: drawn from the network's
        softmax, which is the Fisher information proper; with given classes it is
        the "empirical" one, the paper's.
    backbone : str, torch.nn.Module or callable, default="efficientnet_lite0"
        The network; see `skdeepad.backbones.load_backbone`.
    weights : "default", "download", None or path, default="default"
        Its weights.
    image_size : (int, int), default=None
        Height and width in pixels. None: what the network was trained on.
    n_samples : int, default=3200
        At most so many images are used, the first of a random order. The paper takes
        100 mini-batches of 32.
    random_state : int, RandomState instance or None, default=None
        Seeds the order and the drawn classes.

    Returns
    -------
    dict of str to Tensor
        For each of the backbone's parameters, by its name, the mean over samples of
        its squared gradient. PANDA's official file squares gradients of mini-batches
        of 32, which gives up to 32 times less.

    Raises
    ------
    ValueError
        If X, y or image_size is not what is described here, if the network has no
        head, or if an image file cannot be read.

    References
    ----------
    .. [1] T. Reiss et al., "PANDA: Adapting Pretrained Features for Anomaly
       Detection and Segmentation", CVPR 2021.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdeepad.fisher import fisher_diagonal
    >>> X = load_digits().images[:2] / 16
    >>> fisher = fisher_diagonal(X, image_size=(64, 64), random_state=0)
    >>> fisher["stages.stage7.0.conv_pw.weight"].shape
    torch.Size([1152, 192, 1, 1])
    """
    rng = check_random_state(random_state)
    network = load_backbone(backbone, weights=weights).clone().requires_grad_(True)
    head = network.head
    if head is None:
        raise ValueError(
            f"backbone={backbone!r} has no head that predicts classes. Choose a "
            "backbone that was trained as a classifier."
        )
    inputs = check_inputs(
        BaseEstimator(), X, vectors=False, image_shape=None, reset=True
    )
    classes = None if y is None else check_classes(y, len(inputs), network)
    chosen = rng.permutation(len(inputs))[:n_samples]
    generator = torch.Generator().manual_seed(draw_seed(rng))
    last = network.stage_names[-1:]

    size: Any = image_size or network.input_size or (inputs.shape and inputs.shape[1:])
    if size is None:
        raise ValueError(
            "image_size=None, but neither the backbone nor X determines it. Set "
            "image_size."
        )

    def losses() -> Iterator[Tensor]:
        for batch in load_batches(inputs, chunks(chosen, 1), size, network.in_channels):
            if batch.values is None:
                raise ValueError(f"An image file cannot be read: {batch.failed}")
            features = pool(network.forward_stages(batch.values, last)[last[0]])
            if classes is None:
                yield sampled_loss(features, head, generator)
            else:
                yield F.cross_entropy(head(features), classes[batch.index])

    named = {
        name: parameter
        for name, parameter in network.named_parameters()
        if name.startswith("stages.")
    }
    fisher = mean_squared_gradients(list(named.values()), losses())
    return dict(zip(named, fisher, strict=True))


def check_classes(y: ArrayLike, n_samples: int, backbone: Backbone) -> Tensor:
    """Check that labels are numbers of the head's logits.

    Raises
    ------
    ValueError
        If they are not.
    """
    classes = column_or_1d(y)
    check_consistent_length(classes, np.empty(n_samples))
    n_classes = getattr(backbone.head, "out_features", np.inf)
    whole = np.issubdtype(classes.dtype, np.integer)
    if not whole or classes.min() < 0 or classes.max() >= n_classes:
        raise ValueError(
            f"y_pretrain must hold integers from 0 to {n_classes - 1}: the classes "
            "that the backbone's head predicts."
        )
    return torch.from_numpy(classes.astype(np.int64))
