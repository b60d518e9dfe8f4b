"""What the detectors around others share: a fitted estimator gives the scores."""

from __future__ import annotations

from dataclasses import field
from numbers import Integral
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, MetaEstimatorMixin
from sklearn.utils._param_validation import HasMethods, Interval
from sklearn.utils.validation import check_is_fitted

from ..base import AnomalyDetector
from ..detectors._refits import sample_digests
from ..scorers._base import HeldOutScores

Scores = NDArray[np.float64]


class RefittedDetector(MetaEstimatorMixin, AnomalyDetector):
    """Base of detectors around another one, which is fitted several times.

    Parameters
    ----------
    estimator : estimator
        Any outlier detector with ``score_samples``, or pipeline that ends in one. Its
        own threshold does not matter.
    cv : int, default=5
        Number of folds, 2 at least.
    random_state : int, RandomState instance or None, default=None
        Seeds what in the estimator has a `random_state` that is None: all fits start
        from the same networks.

    Attributes
    ----------
    estimator_ : estimator
        The fitted estimator, which gives the scores.
    """

    estimator: Any = field(kw_only=False)
    cv: int = 5
    random_state: int | np.random.RandomState | None = None

    _parameter_constraints: ClassVar = {
        "estimator": [HasMethods(["fit", "score_samples"])],
        "cv": [Interval(Integral, 2, None, closed="left")],
        "random_state": ["random_state"],
    }

    _saved: ClassVar = {
        "estimator": BaseEstimator,
        "estimator_": BaseEstimator,
        "_held_out": HeldOutScores,
    }

    def fit(
        self, X: Any, y: ArrayLike | None = None, groups: ArrayLike | None = None
    ) -> Self:
        """Fit the estimator, several times.

        Parameters
        ----------
        X : array-like or sequence of paths
            Samples, in any form that the estimator takes: numbers, images or paths.
        y : array-like of shape (n_samples,), default=None
            +1 for normal samples, -1 for known anomalies, which only an estimator
            that learns from them sees.
        groups : array-like of shape (n_samples,), default=None
            What each sample belongs to, such as a part or a video: groups are not
            parted by folds. None: samples are unrelated, but exact copies, which are
            in one fold.

        Returns
        -------
        self : object
            The fitted detector.

        Raises
        ------
        ValueError
            If X, y or groups is not what is described here, or the samples cannot be
            parted in two folds.
        """
        raise NotImplementedError

    def _keep(self, fitted: Any) -> None:
        """Take a fitted estimator for the one that scores."""
        self.estimator_ = fitted
        for name in ("n_features_in_", "feature_names_in_"):
            self.__dict__.pop(name, None)
            if hasattr(fitted, name):
                setattr(self, name, getattr(fitted, name))

    def _new_scores(self, X: Any) -> Scores:
        return np.asarray(self.estimator_.score_samples(X), dtype=np.float64)

    def score_samples(self, X: Any) -> Scores:
        """Score samples; the higher, the more normal.

        Parameters
        ----------
        X : array-like or sequence of paths
            Samples, in any form that `fit` takes.

        Returns
        -------
        ndarray of float64, shape (n_samples,)
            The scores of `estimator_`. A sample that was trained on gets the score
            that it would have as a new one.
        """
        check_is_fitted(self)
        scores = self._new_scores(X)  # the estimator checks X, and names of columns
        return self._held_out.recall(sample_digests(X), scores)
