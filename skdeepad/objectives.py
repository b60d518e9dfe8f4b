"""The losses that networks are trained under: pure functions, one an equation."""

from __future__ import annotations

import math
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


def radial_distance(z: Tensor, norm: str = "pseudo_huber") -> Tensor:
    """How far outputs are from the origin: minus the log of HSC's radial function.

    Parameters
    ----------
    z : Tensor of shape (n_samples, n_outputs)
    norm : {"pseudo_huber", "l2_squared", "l2", "l1"}, default="pseudo_huber"
        ``sqrt(||z||^2 + 1) - 1``, of the official code of Ruff et al. (2020);
        ``||z||^2``, of their equation; ``||z||``; or ``sum |z|``.

    Returns
    -------
    Tensor of shape (n_samples,)
        At least 0.
    """
    if norm == "l1":
        return z.abs().sum(dim=1)
    squared = z.square().sum(dim=1)
    if norm == "l2_squared":
        return squared
    if norm == "l2":
        return torch.linalg.vector_norm(z, dim=1)
    # sqrt(1 + s) - 1 without the difference of two near numbers
    return squared / (torch.sqrt(squared + 1) + 1)


def hypersphere_loss(distances: Tensor, outlier: Tensor) -> Tensor:
    """Hypersphere classification: cross-entropy under ``l(z) = exp(-d)``.

    Parameters
    ----------
    distances : Tensor of shape (n_samples,)
        d, as `radial_distance` gives it.
    outlier : Tensor of bool, shape (n_samples,)

    Returns
    -------
    Tensor of shape (n_samples,)
        ``d`` for normal samples and ``-log(1 - exp(-d))`` for outliers (Ruff et al.,
        2020), to full precision for any d: the official code adds 1e-9 under the
        logarithm. An outlier at d = 0 has a large, finite loss.
    """
    d = distances.clamp(min=torch.finfo(distances.dtype).tiny)
    near = d < math.log(2)
    # each branch sees what it is precise for, and no infinite gradient
    small = torch.log(-torch.expm1(-torch.where(near, d, 1.0)))
    large = torch.log1p(-torch.exp(-torch.where(near, 1.0, d)))
    return torch.where(outlier, -torch.where(near, small, large), distances)


def focal_loss(logits: Tensor, outlier: Tensor, gamma: float = 2.0) -> Tensor:
    """Cross-entropy with less weight on samples that are classified well.

    Parameters
    ----------
    logits : Tensor of shape (n_samples,)
        Higher = more anomalous.
    outlier : Tensor of bool, shape (n_samples,)
    gamma : float, default=2.0
        0 is cross-entropy itself.

    Returns
    -------
    Tensor of shape (n_samples,)
        ``-(1 - p)^gamma log(p)`` with p the probability of the sample's own class
        (Lin et al., 2017; without their alpha, as in Ruff et al., 2020).
    """
    margin = torch.where(outlier, logits, -logits)
    # 1 - p = sigma(-margin); by its logarithm, which is precise at both ends
    weight = torch.exp(gamma * F.logsigmoid(-margin))
    return -weight * F.logsigmoid(margin)


def semi_supervised_loss(
    squared: Tensor, labels: Tensor, eta: float = 1.0, eps: float = 1e-6
) -> Tensor:
    """Deep SAD: known anomalies are pushed from the centre, all others drawn to it.

    Parameters
    ----------
    squared : Tensor of shape (n_samples,)
        Squared distances from the centre.
    labels : Tensor of shape (n_samples,)
        +1 for known normal samples, -1 for known anomalies, 0 for unlabelled ones.
    eta : float, default=1.0
        Weight of labelled samples.
    eps : float, default=1e-6
        Added to the distances of labelled samples.

    Returns
    -------
    Tensor of shape (n_samples,)
        ``d`` for unlabelled samples and ``eta (d + eps)^y`` for labelled ones, as in
        the official code of Ruff et al. (2020).
    """
    labelled = eta * torch.where(labels < 0, 1 / (squared + eps), squared + eps)
    return torch.where(labels == 0, squared, labelled)


def soft_boundary_loss(squared: Tensor, radius: Tensor, nu: float) -> Tensor:
    """Deep SVDD with a soft boundary: the ball is small, few samples lie outside.

    Parameters
    ----------
    squared : Tensor of shape (n_samples,)
        Squared distances from the centre.
    radius : Tensor of shape ()
        R, the ball's radius.
    nu : float
        Bounds the share of samples outside, in (0, 1].

    Returns
    -------
    Tensor of shape ()
        ``R^2 + 1/nu mean(max(0, d - R^2))`` (Ruff et al., 2018, Eq. 3).
    """
    return radius.square() + (squared - radius.square()).clamp(min=0).mean() / nu
