"""What the scorers share: validation, and scores of training rows."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import _fit_context
from sklearn.model_selection import KFold
from sklearn.utils import gen_batches
from sklearn.utils.validation import check_is_fitted, validate_data

from ..base import AnomalyDetector, keep_state_on_error, known_normal

FLOATS = (np.float64, np.float32)
METRICS = ("sqeuclidean", "euclidean", "cosine")
BLOCK = 1024  # rows that are worked on at a time, so that memory stays bounded


def row_digests(X: NDArray[Any]) -> NDArray[np.uint64]:
    """Digest each row's content, as float64, to 64 bits."""
    digests = np.empty(len(X), dtype=np.uint64)
    for block in gen_batches(len(X), BLOCK):
        rows = np.ascontiguousarray(X[block], dtype=np.float64) + 0.0  # -0.0 is 0.0
        digests[block] = [
            int.from_bytes(blake2b(row, digest_size=8).digest(), "little")
            for row in rows
        ]
    return digests


class HeldOutScores:
    """Scores of training rows that did not train on themselves, by content.

    A row that was trained on would look more normal than any new one. Scoring it
    again gives its leave-one-out score instead: training and new rows are on one
    scale, and `contamination` means the same on both.
    """

    _saved: ClassVar = {}

    def __init__(
        self, digests: NDArray[np.uint64], scores: NDArray[np.float64]
    ) -> None:
        self.digests, first = np.unique(digests, return_index=True)
        self.scores = scores[first]

    def score(
        self, X: NDArray[Any], score: Callable[[NDArray[Any]], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """Score rows; those that were trained on get their held-out scores."""
        digests = row_digests(X)
        at = np.searchsorted(self.digests, digests)
        at[at == len(self.digests)] = 0
        scores = self.scores[at]
        new = self.digests[at] != digests
        if new.any():
            scores[new] = score(X[new])
        return scores


def cross_fitted_scores(
    X: NDArray[Any], score: Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]
) -> NDArray[np.float64]:
    """Score each row by what ``score(train, test)`` learnt without the row's fold."""
    scores = np.empty(len(X))
    folds = KFold(min(10, len(X)), shuffle=True, random_state=0)
    for train, test in folds.split(X):
        scores[test] = score(X[train], X[test])
    return scores


def to_metric(X: NDArray[Any], metric: str) -> NDArray[Any]:
    """Map rows to where squared Euclidean distances give the metric."""
    if metric != "cosine":
        return X
    norms = np.linalg.norm(X, axis=1, keepdims=True)
    return X / np.where(norms == 0, 1, norms)


def from_squared(squared: NDArray[np.float64], metric: str) -> NDArray[np.float64]:
    """Turn squared Euclidean distances of `to_metric` rows into the metric's."""
    if metric == "euclidean":
        return np.sqrt(squared)
    # ||u - v||^2 = 2 (1 - cos(u, v)) for rows of unit length
    return squared / 2 if metric == "cosine" else squared


class Scorer(AnomalyDetector):
    """Base of the density scorers on vectors.

    A subclass defines ``_fit(X)``, which returns the leave-one-out scores of the
    training rows, and ``_score(X)``.
    """

    _saved: ClassVar = {"_held_out": HeldOutScores}

    def _fit(self, X: NDArray[Any]) -> NDArray[np.float64]:
        raise NotImplementedError

    def _score(self, X: NDArray[Any]) -> NDArray[np.float64]:
        raise NotImplementedError

    def _min_samples(self) -> int:
        return 2  # one row to learn from when the other is left out

    def _training_rows(self, X: Any, y: ArrayLike | None, reset: bool) -> NDArray[Any]:
        X = validate_data(self, X, dtype=FLOATS, reset=reset)
        X = X[known_normal(y, len(X))]
        minimum = self._min_samples() if reset else 1
        if len(X) < minimum:
            raise ValueError(
                f"Found {len(X)} normal sample(s) (n_samples={len(X)}) while a minimum "
                f"of {minimum} is required by {self!r}: each training "
                "sample is also scored by the others."
            )
        return X

    @keep_state_on_error
    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: ArrayLike, y: ArrayLike | None = None) -> Any:
        """Learn the density of normal samples.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Training samples.
        y : array-like of shape (n_samples,), default=None
            +1 for normal samples, -1 for known anomalies, which are left out.

        Returns
        -------
        object
            The fitted scorer itself.

        Raises
        ------
        ValueError
            If X is not a finite numeric matrix, or holds too few normal samples.
        """
        X = self._training_rows(X, y, reset=True)
        held_out = self._fit(X)
        self._set_threshold(row_digests(X), held_out)
        return self

    def _set_threshold(
        self, digests: NDArray[np.uint64], scores: NDArray[np.float64]
    ) -> None:
        """Set the threshold by scores of training rows as if they were new."""
        self._set_offset(scores)
        self._held_out = HeldOutScores(digests, scores)

    def score_samples(self, X: ArrayLike) -> NDArray[np.float64]:
        """Score each sample by its distance from the normal ones.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples.

        Returns
        -------
        ndarray of float64, shape (n_samples,)
            The negative distance: 0 at most, higher = more normal. A sample that
            was trained on gets the score it has when left out of training.
        """
        check_is_fitted(self)
        rows: Any = validate_data(self, X, dtype=FLOATS, reset=False)
        return self._held_out.score(rows, self._score)
