"""The losses that networks are trained under: pure functions, one an equation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F


def compactness(features: Tensor, centers: Tensor) -> Tensor:
    """Mean squared distance from the centre: PANDA's Eq. 1, Deep SVDD's objective.

    Parameters
    ----------
    features : Tensor of shape (n_samples, n_features)
    centers : Tensor of shape (n_features,) or (n_samples, n_features)
        The centre, or each sample's own.

    Returns
    -------
    Tensor of shape ()
        The mean over samples of ``||f(x) - c||^2``; the paper has the sum, the
        official code divides by the number of features, too.
    """
    return (features - centers).square().sum(dim=1).mean()


def elastic_penalty(
    parameters: Iterable[Tensor], initial: Iterable[Tensor], stiffness: Iterable[Tensor]
) -> Tensor:
    """Elastic weight consolidation: the second term of PANDA's Eq. 4.

    Parameters
    ----------
    parameters, initial, stiffness : iterables of Tensor
        The parameters theta, their values theta* before training, and lambda times
        the Fisher information's diagonal F, in one order and of the same shapes.

    Returns
    -------
    Tensor of shape ()
        ``lambda/2 sum_i F_i (theta_i - theta_i*)^2``.
    """
    terms = zip(parameters, initial, stiffness, strict=True)
    return torch.stack([(k * (p - p0).square()).sum() for p, p0, k in terms]).sum() / 2


def outlier_exposure(logits: Tensor, outlier: Tensor) -> Tensor:
    """Logistic regression of outliers against normal samples: PANDA's Eq. 5.

    Parameters
    ----------
    logits : Tensor of shape (n_samples,)
        ``w' f(x)``, higher = more anomalous.
    outlier : Tensor of bool, shape (n_samples,)

    Returns
    -------
    Tensor of shape ()
        The mean of ``-log sigma(w' f(x))`` over outliers and of
        ``-log sigma(-w' f(x))`` over normal samples. (As printed, the paper's
        equation misses the signs.)
    """
    return F.binary_cross_entropy_with_logits(logits, outlier.to(logits.dtype))


def value_loss(source: Tensor, cloner: Tensor) -> Tensor:
    """How far activations are apart: a layer's term of Eq. 1 of Salehi et al. (2021).

    Parameters
    ----------
    source, cloner : Tensor of shape (n_samples, ...)
        The activations of the layer in both networks.

    Returns
    -------
    Tensor of shape (n_samples,)
        ``1/N sum_j (a_s(j) - a_c(j))^2`` over the N activations of a sample.
    """
    return (source - cloner).square().flatten(1).mean(dim=1)


def direction_loss(source: Tensor, cloner: Tensor) -> Tensor:
    """How far directions are apart: a layer's term of Eq. 3 of Salehi et al. (2021).

    Parameters
    ----------
    source, cloner : Tensor of shape (n_samples, ...)
        The activations of the layer in both networks.

    Returns
    -------
    Tensor of shape (n_samples,)
        ``1 - cos(vec(a_s), vec(a_c))``. (As printed, the equation subtracts the
        layers' cosines from one 1; the official code sums this over layers.)
    """
    return 1 - F.cosine_similarity(source.flatten(1), cloner.flatten(1))
