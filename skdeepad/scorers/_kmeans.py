"""k-means: the distance to the nearest of a few means."""

from __future__ import annotations

from dataclasses import field
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.utils import check_random_state, gen_batches
from sklearn.utils._param_validation import Interval, StrOptions

from ..base import draw_seed
from ._base import (
    METRICS,
    ROWS_AT_ONCE,
    Scorer,
    from_squared,
    mean_slopes,
    to_metric,
    unit_slopes,
)


class KMeansScorer(Scorer):
    """Distance to the nearest of k means of the normal samples.

    The alternative to nearest neighbours of PANDA's section 4.2.3 [1]_, whose time
    does not grow with the number of training samples.

    Parameters
    ----------
    n_clusters : int, default=10
        Number of means; 10 in the paper. A mean of one sample alone says little of
        new ones: with few training samples take fewer means.
    metric : {"sqeuclidean", "euclidean", "cosine"}, default="sqeuclidean"
        The distance. "cosine" scales every sample to unit length first and takes
        half the squared Euclidean distance to the means.
    random_state : int, RandomState instance or None, default=None
        Seeds the initial means.

    Attributes
    ----------
    cluster_centers_ : ndarray of shape (n_clusters, n_features)
        The means.
    offset_ : float
        The threshold on ``score_samples``: the `contamination` quantile of the
        training samples' held-out scores.

    See Also
    --------
    KNNScorer : Every training sample is kept; more accurate by about 1 % in [1]_.

    Notes
    -----
    The training samples' held-out scores come from ten-fold cross-fitting: each
    sample is scored by the means of the other folds.

    References
    ----------
    .. [1] T. Reiss et al., "PANDA: Adapting Pretrained Features for Anomaly
       Detection and Segmentation", CVPR 2021, section 4.2.3.

    Examples
    --------
    >>> from skdeepad.scorers import KMeansScorer
    >>> scorer = KMeansScorer(n_clusters=2, random_state=0)
    >>> scorer = scorer.fit([[0.0], [1.0], [9.0], [10.0]])
    >>> scorer.score_samples([[11.5], [5.0]])
    array([ -4.  , -20.25])
    """

    n_clusters: int = field(default=10, kw_only=False)
    metric: str = "sqeuclidean"
    random_state: int | np.random.RandomState | None = None

    _parameter_constraints: ClassVar = {
        "n_clusters": [Interval(Integral, 1, None, closed="left")],
        "metric": [StrOptions(set(METRICS))],
        "random_state": ["random_state"],
    }

    def _min_samples(self) -> int:
        return max(2, self.n_clusters)

    def _learn(self, X: NDArray[Any], digests: NDArray[np.uint64]) -> None:
        seed = draw_seed(check_random_state(self.random_state))
        k = min(self.n_clusters, len(X))  # a fold may hold fewer samples
        means = KMeans(k, n_init="auto", random_state=seed)
        self.cluster_centers_ = means.fit(to_metric(X, self.metric)).cluster_centers_

    def _score(self, X: NDArray[Any]) -> NDArray[np.float64]:
        X, means = to_metric(X, self.metric), self.cluster_centers_
        squared = np.empty(len(X))
        for block in gen_batches(len(X), ROWS_AT_ONCE):
            distances = cdist(X[block], means, "sqeuclidean")
            squared[block] = distances.min(axis=1)
        return -from_squared(squared, self.metric)

    def _slopes(self, X: NDArray[Any]) -> NDArray[np.float64]:
        rows, means = to_metric(X, self.metric), self.cluster_centers_
        nearest = cdist(rows, means, "sqeuclidean").argmin(axis=1)
        apart = (rows.astype(np.float64) - means[nearest])[:, None]
        slopes = mean_slopes(apart, np.ones(apart.shape[:2]), self.metric)
        return unit_slopes(X, slopes) if self.metric == "cosine" else slopes
