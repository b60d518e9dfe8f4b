"""The losses that networks are trained under: pure functions, one an equation."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F


def compactness(features: Tensor, centers: Tensor) -> Tensor:
    """Mean squared distance from the centre: PANDA's Eq. 1, Deep SVDD's objective.

    ``mean_x ||f(x) - c||^2``. (The paper has the sum; the official code divides by the
    number of features, too.) `centers` is one centre, or each sample's own.
    """
    return (features - centers).square().sum(dim=1).mean()


def mean_shifted_contrastive_loss(
    features: Tensor, center: Tensor, temperature: float = 0.25
) -> Tensor:
    """Tell images apart by their direction from the centre: Reiss and Hoshen (2023).

    Row i of `features` (2 n rows of unit length) is a view of the same image as row i +
    n. With ``theta = (f - c) / ||f - c||``, the mean over rows of ``-log(exp(theta_i .
    theta_i' / tau) / sum_{j != i} exp(theta_i . theta_j / tau))``, i' the other view.
    """
    theta = F.normalize(features - center)
    similar = theta @ theta.T / temperature
    itself = torch.eye(len(theta), dtype=torch.bool, device=theta.device)
    other_view = torch.arange(len(theta), device=theta.device).roll(len(theta) // 2)
    return F.cross_entropy(similar.masked_fill(itself, -torch.inf), other_view)


def elastic_penalty(
    parameters: Iterable[Tensor], initial: Iterable[Tensor], stiffness: Iterable[Tensor]
) -> Tensor:
    """Elastic weight consolidation: ``lambda/2 sum_i F_i (theta_i - theta_i*)^2``.

    The second term of PANDA's Eq. 4: `initial` holds the parameters theta* before
    training, `stiffness` lambda times the diagonal F of the Fisher information.
    """
    terms = zip(parameters, initial, stiffness, strict=True)
    return torch.stack([(k * (p - p0).square()).sum() for p, p0, k in terms]).sum() / 2


def outlier_exposure(logits: Tensor, outlier: Tensor) -> Tensor:
    """Logistic regression of outliers against normal samples: PANDA's Eq. 5.

    The mean of ``-log sigma(w' f(x))`` over outliers and of ``-log sigma(-w' f(x))``
    over normal samples, for logits ``w' f(x)`` of shape (n_samples,), higher = more
    anomalous. (As printed, the paper's equation misses the signs.)
    """
    return F.binary_cross_entropy_with_logits(logits, outlier.to(logits.dtype))


def value_loss(source: Tensor, cloner: Tensor) -> Tensor:
    """Distance of activations: a layer's term of Eq. 1 of Salehi et al. (2021).

    ``1/N sum_j (a_s(j) - a_c(j))^2`` over the N activations of each sample.
    """
    return (source - cloner).square().flatten(1).mean(dim=1)


def direction_loss(source: Tensor, cloner: Tensor) -> Tensor:
    """Distance of directions: a layer's term of Eq. 3 of Salehi et al. (2021).

    ``1 - cos(vec(a_s), vec(a_c))`` for each sample. (As printed, the equation subtracts
    the layers' cosines from one 1; the official code sums this over layers.)
    """
    return 1 - F.cosine_similarity(source.flatten(1), cloner.flatten(1))


def radial_distance(z: Tensor, norm: str = "pseudo_huber") -> Tensor:
    """Distance of outputs from the origin: minus the log of HSC's radial function.

    For z of shape (n_samples, n_outputs), ``sqrt(||z||^2 + 1) - 1`` ("pseudo_huber",
    the official code of Ruff et al., 2020), ``||z||^2`` ("l2_squared", their equation),
    ``||z||`` ("l2") or ``sum |z|`` ("l1").
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

    ``d`` for normal samples and ``-log(1 - exp(-d))`` for outliers (Ruff et al., 2020),
    for the distances of `radial_distance`. It is exact for any d: the official code
    adds 1e-9 under the logarithm. An outlier at d = 0 has a large, finite loss.
    """
    d = distances.clamp(min=torch.finfo(distances.dtype).tiny)
    near = d < math.log(2)
    # each branch sees what it is precise for, and no infinite gradient
    small = torch.log(-torch.expm1(-torch.where(near, d, 1.0)))
    large = torch.log1p(-torch.exp(-torch.where(near, 1.0, d)))
    return torch.where(outlier, -torch.where(near, small, large), distances)


def focal_loss(logits: Tensor, outlier: Tensor, gamma: float = 2.0) -> Tensor:
    """Cross-entropy with less weight on samples that are classified well.

    ``-(1 - p)^gamma log(p)`` with p the probability of the sample's own class (Lin et
    al., 2017; without their alpha, as in Ruff et al., 2020), for logits of shape
    (n_samples,), higher = more anomalous. ``gamma=0`` is cross-entropy.
    """
    margin = torch.where(outlier, logits, -logits)
    # 1 - p = sigma(-margin); by its logarithm, which is precise at both ends
    weight = torch.exp(gamma * F.logsigmoid(-margin))
    return -weight * F.logsigmoid(margin)


def semi_supervised_loss(
    squared: Tensor, labels: Tensor, eta: float = 1.0, eps: float = 1e-6
) -> Tensor:
    """Deep SAD: known anomalies are pushed from the centre, all others drawn to it.

    For squared distances d, ``d`` for unlabelled samples (label 0) and ``eta (d +
    eps)^y`` for known normal (y = 1) and anomalous ones (-1), as in the official code
    of Ruff et al. (2020).
    """
    labelled = eta * torch.where(labels < 0, 1 / (squared + eps), squared + eps)
    return torch.where(labels == 0, squared, labelled)


def soft_boundary_loss(squared: Tensor, radius: Tensor, nu: float) -> Tensor:
    """Deep SVDD with a soft boundary: ``R^2 + 1/nu mean(max(0, d - R^2))``.

    For squared distances d; nu, in (0, 1], bounds the share of samples outside the ball
    (Ruff et al., 2018, Eq. 3).
    """
    return radius.square() + (squared - radius.square()).clamp(min=0).mean() / nu
