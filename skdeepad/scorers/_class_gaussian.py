"""Mahalanobis distance to the nearest of several normal classes (Lee et al., 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, _fit_context
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.validation import _num_samples

from ..base import keep_state_on_error, numeric_labels
from ._base import (
    Scorer,
    copies_together,
    cross_fitted_scores,
    row_digests,
    warn_of_copies,
)
from ._gaussian import GaussianScorer


def class_numbers(y: ArrayLike | None, n: int) -> NDArray[np.intp]:
    """Give the class of each sample, -1 for known anomalies; 1 where there is none."""
    if y is None:
        return np.ones(n, dtype=np.intp)
    labels = numeric_labels(y, n)
    whole = np.array_equal(labels, np.round(labels)) and labels.min() >= -1
    return labels.astype(np.intp) if whole else np.ones(n, dtype=np.intp)


class ClassGaussianScorer(Scorer):
    """Mahalanobis distance to the nearest of several normal classes.

    ``min_k sqrt((x - mu_k)' Sigma^-1 (x - mu_k))`` for each class's mean ``mu_k`` and
    one covariance ``Sigma`` of all samples about their class's mean [1]_. With one
    class it is `GaussianScorer`.

    Parameters
    ----------
    relative : bool, default=False
        Whether the squared distance from the mean of all classes, under the covariance
        of all samples, is taken from the squared one [2]_, so that what is unusual
        about all classes alike does not count:
        ``min_k d_k(x)^2 - d_0(x)^2``.
    covariance : {"ledoit_wolf", "oas", "diagonal"}, default="ledoit_wolf"
        How both covariances are estimated; see `GaussianScorer`.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The normal classes.
    means_ : ndarray of float64, shape (n_classes, n_features)
        Their means.
    offset_ : float
        The threshold on ``score_samples``: the `contamination` quantile of the
        training samples' scores under ten-fold cross-fitting.

    See Also
    --------
    skdeepad.OpenSetClassifier : Learns the classes, and scores by its own outputs.

    Notes
    -----
    Behind ``BackboneFeatures(stages=...)`` it is the multi-stage detector of [1]_, of
    all stages' features side by side.

    References
    ----------
    .. [1] K. Lee et al., "A Simple Unified Framework for Detecting
       Out-of-Distribution Samples and Adversarial Attacks", NeurIPS 2018.
    .. [2] J. Ren et al., "A Simple Fix to Mahalanobis Distance for Improving Near-OOD
       Detection", arXiv:2106.09022, 2021.

    Examples
    --------
    >>> import numpy as np
    >>> from skdeepad.scorers import ClassGaussianScorer
    >>> rng = np.random.default_rng(0)
    >>> X = np.concatenate([rng.normal(0, 1, (100, 2)), rng.normal(9, 1, (100, 2))])
    >>> scorer = ClassGaussianScorer().fit(X, np.repeat([0, 1], 100))
    >>> scorer.predict([[9.0, 9.0], [4.5, 4.5]])
    array([ 1, -1])
    """

    relative: bool = False
    covariance: str = "ledoit_wolf"

    _saved: ClassVar = {
        "covariance": BaseEstimator,
        "_within": GaussianScorer,
        "_overall": GaussianScorer,
    }

    _parameter_constraints: ClassVar = {
        "relative": ["boolean"],
        "covariance": [StrOptions({"ledoit_wolf", "oas", "diagonal"})],
    }

    @keep_state_on_error
    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> ClassGaussianScorer:
        """Learn the classes' means and the covariance they share.

        Parameters
        ----------
        y : array-like of int, shape (n_samples,), default=None
            Classes of normal samples, 0 at least, and -1 for known anomalies, which
            are left out. None, or numbers that are no classes: one class.
        """
        labels = class_numbers(y, _num_samples(X))
        anomalies_or_not = np.where(labels < 0, -1, 1)
        normal, groups = self._training_rows(X, anomalies_or_not, groups, reset=True)
        self.classes_, labels = np.unique(labels[labels >= 0], return_inverse=True)
        digests = row_digests(normal)
        if groups is None:
            warn_of_copies(normal, digests)
            groups = copies_together(digests)
        self._learn_classes(normal, labels)

        def score(
            train: NDArray[np.intp], test: NDArray[np.intp]
        ) -> NDArray[np.float64]:
            part = type(self)(relative=self.relative, covariance=self.covariance)
            part._learn_classes(normal[train], labels[train])
            return part._score(normal[test])

        held_out = cross_fitted_scores(groups, score)
        self._set_threshold(digests, held_out)
        return self

    def _learn_classes(self, X: NDArray[Any], labels: NDArray[np.intp]) -> None:
        X = X.astype(np.float64)
        known = np.unique(labels)  # a fold may miss one
        self.means_ = np.array([X[labels == k].mean(axis=0) for k in known])
        within = X - self.means_[np.searchsorted(known, labels)]
        self._within = self._gaussian(within, X)
        self._overall = self._gaussian(X, X) if self.relative else None

    def _gaussian(self, X: NDArray[Any], otherwise: NDArray[Any]) -> GaussianScorer:
        """Fit a Gaussian; to all samples where each is a class of its own."""
        rows = X if np.ptp(X, axis=0).any() else otherwise
        gaussian = GaussianScorer(self.covariance)
        gaussian._learn(rows, row_digests(rows))
        return gaussian

    def _score(self, X: NDArray[Any]) -> NDArray[np.float64]:
        X = X.astype(np.float64)
        nearest = np.min(self._squared_distances(X), axis=0)
        if self._overall is None:
            return -np.sqrt(nearest)
        return np.sum(self._overall._whiten(X) ** 2, axis=1) - nearest

    def _squared_distances(self, X: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        """Give squared distances to each class."""
        return [
            np.sum(self._within._whiten(X - mean) ** 2, axis=1) for mean in self.means_
        ]

    def _slopes(self, X: NDArray[Any]) -> NDArray[np.float64]:
        X = X.astype(np.float64)
        apart = X - self.means_[np.argmin(self._squared_distances(X), axis=0)]
        slopes = self._within._slopes(apart)
        if self._overall is None:
            return slopes
        # of squares
        within, overall = (
            -2 * gaussian._score(rows)[:, None]
            for gaussian, rows in ((self._within, apart), (self._overall, X))
        )
        return within * slopes - overall * self._overall._slopes(X)
