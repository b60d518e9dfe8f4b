"""Scorers on features, in float64 as the package computes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from ..scorers import (
    CentroidScorer,
    ClassGaussianScorer,
    GaussianScorer,
    KMeansScorer,
    KNNScorer,
)
from ..scorers._neighbors import MARGIN
from ._parts import ExportError, Step, scoring


def constant(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """Give numbers as a tensor of its own."""
    return torch.tensor(np.asarray(values), dtype=dtype)


def unit(x: Tensor, metric: str) -> Tensor:
    """Map rows to where squared Euclidean distances give the metric."""
    if metric != "cosine":
        return x
    norms = torch.sqrt(x.square().sum(dim=1, keepdim=True))
    return x / torch.where(norms == 0, torch.ones_like(norms), norms)


def from_squared(squared: Tensor, metric: str) -> Tensor:
    """Turn squared Euclidean distances into the metric's."""
    if metric in ("euclidean", "mahalanobis"):
        return squared.clamp(min=0).sqrt()
    return squared / 2 if metric == "cosine" else squared


class Whitening(Step):
    """``(x - mean) W`` of a Gaussian."""

    def __init__(self, gaussian: GaussianScorer) -> None:
        super().__init__()
        self.register_buffer("mean", constant(gaussian.location_))
        self.register_buffer("whitening", constant(gaussian._whitening))

    def forward(self, x: Tensor) -> Tensor:
        """Whiten rows."""
        centred = x.double() - self.mean
        if self.whitening.ndim == 1:
            return centred * self.whitening
        return centred @ self.whitening


class Gaussian(Step):
    """`GaussianScorer`."""

    def __init__(self, scorer: GaussianScorer) -> None:
        super().__init__()
        self.whiten = Whitening(scorer)

    def forward(self, x: Tensor) -> Tensor:
        """Score rows."""
        return -self.whiten(x).square().sum(dim=1).sqrt()


class ClassGaussian(Step):
    """`ClassGaussianScorer`."""

    def __init__(self, scorer: ClassGaussianScorer) -> None:
        super().__init__()
        self.within = Whitening(scorer._within)
        self.overall = None if scorer._overall is None else Whitening(scorer._overall)
        self.register_buffer("means", constant(scorer.means_))

    def forward(self, x: Tensor) -> Tensor:
        """Score rows."""
        x = x.double()
        apart = [
            self.within(x - mean).square().sum(dim=1, keepdim=True)
            for mean in self.means
        ]
        nearest = torch.cat(apart, dim=1).amin(dim=1)
        if self.overall is None:
            return -nearest.sqrt()
        return self.overall(x).square().sum(dim=1) - nearest


class Centroid(Step):
    """`CentroidScorer`."""

    def __init__(self, scorer: CentroidScorer) -> None:
        super().__init__()
        self.metric = scorer.metric
        self.register_buffer("center", constant(scorer.center_))

    def forward(self, x: Tensor) -> Tensor:
        """Score rows."""
        apart = unit(x, self.metric).double() - self.center
        return -from_squared(apart.square().sum(dim=1), self.metric)


class KMeans(Step):
    """`KMeansScorer`."""

    def __init__(self, scorer: KMeansScorer) -> None:
        super().__init__()
        self.metric = scorer.metric
        self.register_buffer("means", constant(scorer.cluster_centers_))

    def forward(self, x: Tensor) -> Tensor:
        """Score rows."""
        apart = unit(x, self.metric).double()[:, None] - self.means
        squared = apart.square().sum(dim=2).amin(dim=1)
        return -from_squared(squared, self.metric)


class Neighbors(Step):
    """The nearest of some rows: found by products in float32, measured in float64."""

    def __init__(self, rows: Any, k: int) -> None:
        super().__init__()
        self.k = min(k, len(rows))
        self.n_candidates = min(k + (MARGIN if k > 1 else 0), len(rows))
        rows = constant(rows, torch.float32)
        self.register_buffer("rows", rows)
        self.register_buffer("norms", rows.square().sum(dim=1))
        self.register_buffer("turned", rows.T.contiguous())

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Give squared distances of the k nearest rows, and their numbers."""
        apart = self.norms - 2 * (queries.float() @ self.turned)
        if self.n_candidates == 1:
            index = apart.argmin(dim=1, keepdim=True)
        else:
            index = apart.topk(self.n_candidates, dim=1, largest=False).indices
        near = self.rows[index.flatten()].double().reshape(*index.shape, -1)
        squared = (queries.double()[:, None] - near).square().sum(dim=2)
        if self.n_candidates == 1:
            return squared, index
        squared, order = squared.topk(self.k, dim=1, largest=False, sorted=True)
        return squared, index.gather(1, order)


class KNN(Step):
    """`KNNScorer`."""

    def __init__(self, scorer: KNNScorer) -> None:
        super().__init__()
        if not hasattr(scorer, "_rows"):
            raise ExportError(
                "A KNNScorer of version 0.1.0 cannot be exported. Fit it again."
            )
        self.metric, self.n_neighbors = scorer.metric, scorer.n_neighbors
        self.kth = scorer.aggregation == "kth"
        self.scale = float(scorer._scale)
        gaussian = scorer._gaussian
        self.whiten = None if gaussian is None else Whitening(gaussian)
        self.register_buffer("origin", constant(scorer._origin))
        self.neighbors = Neighbors(scorer._rows, scorer.n_neighbors)
        self.register_buffer("copies", constant(scorer._copies))

    def forward(self, x: Tensor) -> Tensor:
        """Score rows."""
        x = unit(x, self.metric) if self.whiten is None else self.whiten(x)
        queries = ((x.double() - self.origin) / self.scale).to(x.dtype)
        squared, index = self.neighbors(queries)
        distances = from_squared(squared * self.scale**2, self.metric)
        # a row that was there several times counts as often
        copies = self.copies[index.flatten()].reshape(index.shape)
        before = copies.cumsum(dim=1) - copies
        weights = torch.minimum((self.n_neighbors - before).clamp(min=0), copies)
        if self.kth:
            return -torch.where(weights > 0, distances, 0.0).amax(dim=1)
        return -(weights * distances).sum(dim=1) / weights.sum(dim=1)


class Scaling(Step):
    """`StandardScaler`."""

    def __init__(self, scaler: StandardScaler) -> None:
        super().__init__()
        zero, one = np.zeros(scaler.n_features_in_), np.ones(scaler.n_features_in_)
        self.register_buffer(
            "mean", constant(scaler.mean_ if scaler.with_mean else zero)
        )
        self.register_buffer(
            "scale", constant(scaler.scale_ if scaler.with_std else one)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scale rows."""
        return ((x.double() - self.mean) / self.scale).to(x.dtype)


class Components(Step):
    """`PCA`."""

    def __init__(self, pca: PCA) -> None:
        super().__init__()
        axes = pca.components_.T.astype(np.float64)
        if pca.whiten:
            axes = axes / np.sqrt(pca.explained_variance_)
        self.register_buffer("mean", constant(pca.mean_))
        self.register_buffer("axes", constant(axes))

    def forward(self, x: Tensor) -> Tensor:
        """Turn rows."""
        return ((x.double() - self.mean) @ self.axes).to(x.dtype)


def transforming(step: Any) -> nn.Module:
    """Give the function that a fitted transformer computes."""
    known = {GaussianScorer: Whitening, StandardScaler: Scaling, PCA: Components}
    if type(step) not in known:
        raise ExportError(
            f"{type(step).__name__} in a pipeline cannot be exported. Steps between "
            "BackboneFeatures and the scorer may be GaussianScorer, StandardScaler and "
            "PCA."
        )
    return known[type(step)](step)


for kind, module in (
    (GaussianScorer, Gaussian),
    (ClassGaussianScorer, ClassGaussian),
    (CentroidScorer, Centroid),
    (KMeansScorer, KMeans),
    (KNNScorer, KNN),
):
    scoring.register(kind, module)
