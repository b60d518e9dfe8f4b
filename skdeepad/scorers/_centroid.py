"""Distance to the mean of the normal samples."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import gen_batches
from sklearn.utils._param_validation import StrOptions

from ._base import (
    METRICS,
    ROWS_AT_ONCE,
    Scorer,
    count_copies,
    from_squared,
    mean_slopes,
    to_metric,
    unit_slopes,
)


class CentroidScorer(Scorer):
    """Distance to the centre of the normal samples.

    The score that the compactness loss of Deep SVDD [1]_ and PANDA [2]_ (Eq. 1)
    trains for: ``||f(x) - c||^2``.

    Parameters
    ----------
    metric : {"sqeuclidean", "euclidean", "cosine"}, default="sqeuclidean"
        The distance. "cosine" scales every sample to unit length first and takes
        half the squared Euclidean distance to the mean of the unit vectors, which
        ranks as the cosine similarity to that mean does.

    Attributes
    ----------
    center_ : ndarray of float64, shape (n_features,)
        The mean of the training samples (of unit length where `metric` is "cosine").
    offset_ : float
        The threshold on ``score_samples``: the `contamination` quantile of the
        training samples' leave-one-out scores.

    See Also
    --------
    GaussianScorer : Takes the features' covariance into account.

    References
    ----------
    .. [1] L. Ruff et al., "Deep One-Class Classification", ICML 2018.
    .. [2] T. Reiss et al., "PANDA: Adapting Pretrained Features for Anomaly
       Detection and Segmentation", CVPR 2021.

    Examples
    --------
    >>> from skdeepad.scorers import CentroidScorer
    >>> scorer = CentroidScorer().fit([[0.0], [2.0]])
    >>> scorer.score_samples([[4.0]])
    array([-9.])
    """

    metric: str = "sqeuclidean"

    _parameter_constraints: ClassVar = {
        "metric": [StrOptions(set(METRICS))],
    }

    def _learn(self, X: NDArray[Any], digests: NDArray[np.uint64]) -> None:
        self.center_ = to_metric(X, self.metric).mean(axis=0, dtype=np.float64)

    def _leave_one_out(
        self, X: NDArray[Any], digests: NDArray[np.uint64]
    ) -> NDArray[np.float64]:
        n, m = len(X), count_copies(digests)
        # without m copies of x, the centre moves away: x - c' = n / (n - m) (x - c)
        stretch = n / np.maximum(n - m, 1)  # if all are copies, x is the centre
        squared = stretch**2 * self._squared_distances(X)
        return -from_squared(squared, self.metric)

    def _score(self, X: NDArray[Any]) -> NDArray[np.float64]:
        return -from_squared(self._squared_distances(X), self.metric)

    def _slopes(self, X: NDArray[Any]) -> NDArray[np.float64]:
        apart = (to_metric(X, self.metric) - self.center_)[:, None]
        slopes = mean_slopes(apart, np.ones(apart.shape[:2]), self.metric)
        return unit_slopes(X, slopes) if self.metric == "cosine" else slopes

    def _squared_distances(self, X: NDArray[Any]) -> NDArray[np.float64]:
        squared = np.empty(len(X))
        for block in gen_batches(len(X), ROWS_AT_ONCE):
            shifted = to_metric(X[block], self.metric) - self.center_
            squared[block] = np.einsum("ij,ij->i", shifted, shifted)
        return squared
