"""k nearest neighbours: the distance to the closest normal samples."""

from __future__ import annotations

from numbers import Integral
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from sklearn.utils._param_validation import Interval, StrOptions

from ._base import METRICS, Scorer, from_squared, to_metric


class KNNScorer(Scorer):
    """Distance to the k nearest normal samples.

    The anomaly scoring of PANDA [1]_ and of deep nearest neighbours before it: a
    sample far from every normal one is anomalous.

    Parameters
    ----------
    n_neighbors : int, default=2
        How many neighbours count; k = 2 in the paper.
    metric : {"sqeuclidean", "euclidean", "cosine"}, default="sqeuclidean"
        The distance. "sqeuclidean" is what the paper's official code ranks by.
    aggregation : {"mean", "kth"}, default="mean"
        Whether the score is the mean of the k distances (the paper ranks by their
        sum) or the k-th alone.
    contamination : float, default=0.05
        Share of new normal samples that may fall below the threshold, in (0, 0.5].

    Attributes
    ----------
    offset_ : float
        The threshold on ``score_samples``: the `contamination` quantile of the
        training samples' scores, each left out of its own neighbours.
    n_features_in_ : int
        Number of features seen in `fit`.
    feature_names_in_ : ndarray of str
        Names of the features, where X had them.

    See Also
    --------
    KMeansScorer : Its time does not grow with the number of training samples.

    Notes
    -----
    Neighbours are searched exhaustively, in blocks: memory does not grow with the
    product of training and test samples.

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

    _saved: ClassVar = {"_neighbors": NearestNeighbors}

    _parameter_constraints = {  # noqa: RUF012
        **Scorer._parameter_constraints,
        "n_neighbors": [Interval(Integral, 1, None, closed="left")],
        "metric": [StrOptions(set(METRICS))],
        "aggregation": [StrOptions({"mean", "kth"})],
    }

    def __init__(
        self,
        n_neighbors: int = 2,
        *,
        metric: str = "sqeuclidean",
        aggregation: str = "mean",
        contamination: float = 0.05,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.metric = metric
        self.aggregation = aggregation
        self.contamination = contamination

    def _min_samples(self) -> int:
        return self.n_neighbors + 1

    def _fit(self, X: NDArray[Any]) -> NDArray[np.float64]:
        self._origin = X.mean(axis=0, dtype=np.float64).astype(X.dtype)
        self._neighbors = NearestNeighbors(
            n_neighbors=self.n_neighbors, algorithm="brute", metric="sqeuclidean"
        ).fit(self._map(X))
        return self._distances_to_scores(self._neighbors.kneighbors()[0])

    def _score(self, X: NDArray[Any]) -> NDArray[np.float64]:
        return self._distances_to_scores(self._neighbors.kneighbors(self._map(X))[0])

    def _map(self, X: NDArray[Any]) -> NDArray[Any]:
        # scikit-learn's |x|^2 - 2 x'y + |y|^2 cancels far from the origin
        return to_metric(X, "cosine") if self.metric == "cosine" else X - self._origin

    def _distances_to_scores(self, squared: NDArray[Any]) -> NDArray[np.float64]:
        distances = from_squared(squared.astype(np.float64), self.metric)
        if self.aggregation == "kth":
            return -distances[:, -1]
        return -distances.mean(axis=1)
