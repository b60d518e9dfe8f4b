"""k nearest neighbours: the distance to the closest normal samples."""

from __future__ import annotations

from dataclasses import field
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from sklearn.utils._param_validation import Interval, StrOptions

from ._base import (
    METRICS,
    Scorer,
    center_and_scale,
    centred,
    from_squared,
    mean_slopes,
    to_metric,
    unit_slopes,
)
from ._gaussian import GaussianScorer


class KNNScorer(Scorer):
    """Distance to the k nearest normal samples.

    The anomaly scoring of PANDA [1]_ and of deep nearest neighbours before it: a
    sample far from every normal one is anomalous.

    Parameters
    ----------
    n_neighbors : int, default=2
        How many neighbours count; k = 2 in the paper.
    metric : {"sqeuclidean", "euclidean", "cosine", "mahalanobis"}, \
default="sqeuclidean"
        The distance. "sqeuclidean" is what the paper's official code ranks by.
        "mahalanobis" is the Euclidean distance of whitened samples, by the training
        samples' Ledoit-Wolf covariance.
    aggregation : {"mean", "kth"}, default="mean"
        Whether the score is the mean of the k distances (the paper ranks by their
        sum) or the k-th alone.

    Attributes
    ----------
    offset_ : float
        The threshold on ``score_samples``: the `contamination` quantile of the
        training samples' scores, each left out of its own neighbours, and of the
        covariance.

    See Also
    --------
    KMeansScorer : Its time does not grow with the number of training samples.

    Notes
    -----
    Neighbours are searched exhaustively, in blocks: memory does not grow with the
    product of training and test samples. Candidates are found by products of matrices
    in float32; the distances of the nearest are computed in float64.

    Whitening before this scorer, as in ``make_pipeline(GaussianScorer(),
    KNNScorer())``, learns from the very samples that are left out of their neighbours,
    and far more new samples fall below the threshold than `contamination` says.
    ``metric="mahalanobis"`` leaves them out of both (of the covariance by a rank-one
    downdate; its shrinkage is held fixed).

    References
    ----------
    .. [1] T. Reiss et al., "PANDA: Adapting Pretrained Features for Anomaly
       Detection and Segmentation", CVPR 2021, section 3.

    Examples
    --------
    >>> from skdeepad.scorers import KNNScorer
    >>> scorer = KNNScorer(n_neighbors=1).fit([[0.0], [1.0], [2.0]])
    >>> scorer.score_samples([[5.0]])
    array([-9.])
    """

    n_neighbors: int = field(default=2, kw_only=False)
    metric: str = "sqeuclidean"
    aggregation: str = "mean"

    _saved: ClassVar = {"_gaussian": GaussianScorer, "_neighbors": NearestNeighbors}

    _parameter_constraints: ClassVar = {
        "n_neighbors": [Interval(Integral, 1, None, closed="left")],
        "metric": [StrOptions({*METRICS, "mahalanobis"})],
        "aggregation": [StrOptions({"mean", "kth"})],
    }

    def _min_samples(self) -> int:
        return self.n_neighbors + 1

    def _learn(self, X: NDArray[Any], digests: NDArray[np.uint64]) -> None:
        self._gaussian = None
        if self.metric == "mahalanobis":
            self._gaussian = GaussianScorer()
            self._gaussian._learn(X, digests)
            del self._gaussian._stream  # nothing is added later
        _, first, self._copies = np.unique(
            digests, return_index=True, return_counts=True
        )
        rows = self._to_space(X[first]).astype(X.dtype, copy=False)
        self._origin, self._scale = center_and_scale(rows)
        self._rows = centred(rows, self._origin, self._scale)

    def _to_space(self, X: NDArray[Any]) -> NDArray[Any]:
        """Map samples to where Euclidean distances give the metric."""
        if self._gaussian is not None:
            return self._gaussian._whiten(X)
        return to_metric(X, self.metric)

    def _read_0_1_0(self) -> None:
        """Take over what a file of 0.1.0 holds."""
        self._gaussian = None
        self._rows = self.__dict__.pop("_neighbors")._fit_X
        self._copies = np.ones(len(self._rows), dtype=np.intp)
        self._scale = 1.0
        if self.metric == "cosine":
            self._origin = np.zeros(self._rows.shape[1])

    def _score(self, X: NDArray[Any]) -> NDArray[np.float64]:
        return self._search(self._queries(X), self._rows, self._scale)

    def _queries(self, X: NDArray[Any]) -> NDArray[Any]:
        """Map samples to where the training samples lie."""
        if hasattr(self, "_neighbors"):
            self._read_0_1_0()
        return centred(self._to_space(X), self._origin, self._scale)

    def _slopes(self, X: NDArray[Any]) -> NDArray[np.float64]:
        from ._neighbors import nearest

        queries = self._queries(X)
        index, squared = nearest(queries, self._rows, self.n_neighbors)
        weights = self._weights(self._copies[index], squared)
        apart = queries[:, None].astype(np.float64) - self._rows[index]
        slopes = mean_slopes(apart * self._scale, weights, self.metric)
        if self._gaussian is not None:
            return slopes @ self._gaussian._whitening.T
        return unit_slopes(X, slopes) if self.metric == "cosine" else slopes

    def _leave_one_out(
        self, X: NDArray[Any], digests: NDArray[np.uint64]
    ) -> NDArray[np.float64]:
        known, first, at = np.unique(digests, return_index=True, return_inverse=True)
        if len(known) == 1:
            return np.zeros(len(X))
        if self._gaussian is None:
            itself = np.arange(len(known))
            return self._search(self._rows, self._rows, self._scale, itself)[at]
        scores = np.empty(len(known))
        for m in np.unique(self._copies):
            # all samples, whitened by the covariance without m copies of one of them
            rows, leverage = self._gaussian._whiten_without(X[first], m)
            rows = rows.astype(X.dtype, copy=False)
            out = np.flatnonzero(self._copies == m)
            scores[out] = self._search(rows[out], rows, 1.0, out, leverage[out])
        return scores[at]

    def _search(
        self,
        queries: NDArray[Any],
        rows: NDArray[Any],
        scale: float,
        itself: NDArray[np.intp] | None = None,
        leverage: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float64]:
        """Score queries by their nearest rows; see `nearest`."""
        from ._neighbors import nearest

        index, squared = nearest(
            queries, rows, self.n_neighbors, itself=itself, leverage=leverage
        )
        return self._to_scores(self._copies[index], squared * scale**2)

    def _to_scores(
        self, copies: NDArray[np.intp], squared: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Score samples by the distances of neighbours, each there so many times."""
        distances = from_squared(squared, self.metric)
        return -np.sum(self._weights(copies, squared) * distances, axis=1)

    def _weights(
        self, copies: NDArray[np.intp], squared: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Tell how much neighbours count, from the nearest: their sum is 1."""
        before = np.cumsum(copies, axis=1) - copies
        weights = np.clip(self.n_neighbors - before, 0, copies)
        if self.aggregation == "kth":
            farthest = np.argmax(np.where(weights > 0, squared, -1), axis=1)
            weights = np.arange(weights.shape[1]) == farthest[:, None]
        return weights / weights.sum(axis=1, keepdims=True)
