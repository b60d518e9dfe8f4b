"""What the scorers share: validation, and scores of training rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import _fit_context, clone
from sklearn.model_selection import GroupKFold
from sklearn.utils import gen_batches
from sklearn.utils.validation import check_is_fitted

from ..base import AnomalyDetector, check_groups, keep_state_on_error, known_normal
from ..checks import check_magnitude, check_rows

FLOATS = (np.float64, np.float32)
METRICS = ("sqeuclidean", "euclidean", "cosine")
ROWS_AT_ONCE = 1024  # rows that are worked on at a time, so that memory stays bounded
N_INSPECTED = 256  # rows whose neighbours are inspected for near copies
LEAP = 10  # from one neighbour to the next: a near copy's distance to others'
# squares of float32 (clusters) and fourth powers of float64 (shrinkage) stay finite
MAX_MAGNITUDE = {"float32": 1e18, "float64": 1e70}
MAX_COPIED = 0.2  # share of rows with copies from which on a warning is due


def row_digests(X: NDArray[Any]) -> NDArray[np.uint64]:
    """Digest each row's content, as float64, to 64 bits."""
    digests = np.empty(len(X), dtype=np.uint64)
    for block in gen_batches(len(X), ROWS_AT_ONCE):
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

    _saved: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, digests: NDArray[np.uint64], scores: NDArray[np.float64]
    ) -> None:
        self.digests, first = np.unique(digests, return_index=True)
        self.scores = scores[first]

    def known(
        self, digests: NDArray[np.uint64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Tell which rows were trained on; give their scores, in those places."""
        at = np.searchsorted(self.digests, digests)
        at[at == len(self.digests)] = 0
        return self.digests[at] == digests, self.scores[at]

    def score(
        self, X: NDArray[Any], score: Callable[[NDArray[Any]], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """Score rows; those that were trained on get their held-out scores."""
        known, scores = self.known(row_digests(X))
        if not known.all():
            scores[~known] = score(X[~known])
        return scores

    def recall(
        self, digests: NDArray[np.uint64], scores: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Put held-out scores in the place of those of samples trained on."""
        known, held_out = self.known(digests)
        return np.where(known, held_out, scores)


def count_copies(digests: NDArray[np.uint64]) -> NDArray[np.intp]:
    """Count for each row how often it is there."""
    _, inverse, counts = np.unique(digests, return_inverse=True, return_counts=True)
    return counts[inverse]


def copies_together(digests: NDArray[np.uint64]) -> NDArray[np.intp]:
    """Give each row the number of the first of its copies."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    return first[inverse]


def split_in_folds(
    groups: NDArray[Any], n_folds: int, seed: int = 0
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Split rows in folds; rows of one group are in one fold."""
    n_groups = len(np.unique(groups))
    if n_groups < 2:
        raise ValueError(
            "All training samples are copies of one sample, or belong to one "
            "group, so none can be held out. Pass samples of at least two groups."
        )
    folds = GroupKFold(min(n_folds, n_groups), shuffle=True, random_state=seed)
    return folds.split(groups, groups=groups)


def cross_fitted_scores(
    groups: NDArray[Any],
    score: Callable[[NDArray[np.intp], NDArray[np.intp]], NDArray[np.float64]],
    n_folds: int = 10,
) -> NDArray[np.float64]:
    """Score each row by what ``score(train, test)`` learnt without the row's fold."""
    scores = np.empty(len(groups))
    for train, test in split_in_folds(groups, n_folds):
        scores[test] = score(train, test)
    return scores


def centred(X: NDArray[Any], origin: NDArray[Any], scale: float) -> NDArray[Any]:
    """Move rows to an origin, and divide them by a scale."""
    return ((X - origin) / scale).astype(X.dtype, copy=False)


def center_and_scale(X: NDArray[Any]) -> tuple[NDArray[np.float64], float]:
    """Give the origin and the scale at which products of rows lose least.

    The scale is a power of two, so that dividing by it rounds nothing.
    """
    origin = X.mean(axis=0, dtype=np.float64)
    size = max(
        np.abs(X.max(axis=0) - origin).max(), np.abs(X.min(axis=0) - origin).max()
    )
    return origin, float(np.exp2(np.floor(np.log2(size)))) if size > 0 else 1.0


def warn_of_copies(X: NDArray[Any], digests: NDArray[np.uint64]) -> None:
    """Warn if many rows are copies of others, or nearly so.

    A row has near copies if the distances to its nearest neighbours leap at some
    point: to the next one it is ten times as far.
    """
    copied = count_copies(digests) > 1
    _, first = np.unique(digests, return_index=True)
    near: Any = np.zeros(0, dtype=bool)
    if len(first) > 20:  # the neighbours of fewer leap by chance
        from ._neighbors import nearest

        rows = centred(X[first], *center_and_scale(X[first]))
        inspected = np.arange(0, len(rows), max(1, len(rows) // N_INSPECTED))
        _, squared = nearest(rows[inspected], rows, 10, itself=inspected)
        near = (squared[:, 1:] > LEAP**2 * squared[:, :-1]).any(axis=1)
        near = near | copied[first[inspected]]
    share = max(copied.mean(), near.mean() if len(near) else 0.0)
    if share > MAX_COPIED:
        warnings.warn(
            f"About {100 * share:.0f} % of the training samples have exact or near "
            "copies among the others. Exact copies are held out together when the "
            "threshold is set. If samples are related (frames of one video, "
            "pictures of one part, augmented versions), pass groups= to fit, "
            "which says what belongs together; otherwise more new samples are "
            "flagged than contamination says.",
            UserWarning,
            stacklevel=3,
        )


def to_metric(X: NDArray[Any], metric: str) -> NDArray[Any]:
    """Map rows to where squared Euclidean distances give the metric."""
    if metric != "cosine":
        return X
    norms = np.linalg.norm(X, axis=1, keepdims=True)
    return X / np.where(norms == 0, 1, norms)


def from_squared(squared: NDArray[np.float64], metric: str) -> NDArray[np.float64]:
    """Turn squared Euclidean distances of `to_metric` rows into the metric's."""
    if metric in ("euclidean", "mahalanobis"):
        return np.sqrt(squared)
    # ||u - v||^2 = 2 (1 - cos(u, v)) for rows of unit length
    return squared / 2 if metric == "cosine" else squared


def mean_slopes(
    apart: NDArray[np.float64], weights: NDArray[np.float64], metric: str
) -> NDArray[np.float64]:
    """Give gradients of weighted means of distances.

    Parameters
    ----------
    apart : ndarray of shape (n_rows, n_others, n_features)
        How far each row lies from others, where squared Euclidean distances give the
        metric.
    weights : ndarray of shape (n_rows, n_others)
        Of the others, for each row.
    metric : str

    Returns
    -------
    ndarray of shape (n_rows, n_features)
        In that space; 0 where a row is one of the others and distances have no slope.
    """
    if metric in ("euclidean", "mahalanobis"):
        lengths = np.linalg.norm(apart, axis=2)
        weights = weights / np.where(lengths == 0, 1, lengths)
    slopes = np.einsum("nk,nkd->nd", weights, apart)
    return 2 * slopes if metric == "sqeuclidean" else slopes


def unit_slopes(X: NDArray[Any], slopes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn gradients by rows of unit length into gradients by the rows themselves."""
    norms = np.linalg.norm(X, axis=1, keepdims=True)
    norms = np.where(norms == 0, 1, norms).astype(np.float64)
    unit = X / norms
    along = np.sum(unit * slopes, axis=1, keepdims=True)
    return np.asarray((slopes - along * unit) / norms)


class Scorer(AnomalyDetector):
    """Base of the density scorers on vectors.

    A subclass defines ``_learn(X, digests)``, ``_score(X)`` and, where it has them
    in closed form, ``_leave_one_out(X, digests)``. For maps there is ``_slopes(X)``.
    """

    _saved: ClassVar = {"_held_out": HeldOutScores}

    def _learn(self, X: NDArray[Any], digests: NDArray[np.uint64]) -> None:
        raise NotImplementedError

    def _score(self, X: NDArray[Any]) -> NDArray[np.float64]:
        raise NotImplementedError

    def _slopes(self, X: NDArray[Any]) -> NDArray[np.float64]:
        """Give the gradient of minus the score by each row."""
        raise NotImplementedError

    def _leave_one_out(
        self, X: NDArray[Any], digests: NDArray[np.uint64]
    ) -> NDArray[np.float64]:
        """Score training rows, each by what is learnt without it and its copies."""
        return self._leave_groups_out(X, digests, copies_together(digests))

    def _leave_groups_out(
        self, X: NDArray[Any], digests: NDArray[np.uint64], groups: NDArray[Any]
    ) -> NDArray[np.float64]:
        """Score training rows, each by what is learnt without its group's fold."""

        def score(
            train: NDArray[np.intp], test: NDArray[np.intp]
        ) -> NDArray[np.float64]:
            part = clone(self)
            part._learn(X[train], digests[train])
            return part._score(X[test])

        return cross_fitted_scores(groups, score)

    def _min_samples(self) -> int:
        return 2  # one row to learn from when the other is left out

    def _checked(self, X: Any, reset: bool) -> NDArray[Any]:
        rows = check_rows(self, X, dtype=FLOATS, reset=reset)
        return check_magnitude(rows, MAX_MAGNITUDE[rows.dtype.name])

    def _training_rows(
        self, X: Any, y: ArrayLike | None, groups: ArrayLike | None, reset: bool
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        X = self._checked(X, reset)
        groups = check_groups(groups, len(X))
        normal = known_normal(y, len(X))
        X = X[normal]
        minimum = self._min_samples() if reset else 1
        if len(X) < minimum:
            raise ValueError(
                f"Found {len(X)} normal sample(s) in X (n_samples={len(X)}) while a "
                f"minimum of {minimum} is required by {self!r}: each training "
                "sample is also scored by the others."
            )
        return X, None if groups is None else groups[normal]

    @keep_state_on_error
    @_fit_context(prefer_skip_nested_validation=False)
    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> Any:
        """Learn the density of normal samples.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Training samples.
        y : array-like of shape (n_samples,), default=None
            +1 for normal samples, -1 for known anomalies, which are left out.
        groups : array-like of shape (n_samples,), default=None
            What each sample belongs to, such as a part or a video: the threshold is
            set by scores for which the sample's whole group is left out, in at most
            ten folds. None: samples are unrelated, but exact copies, which are left
            out together.

        Returns
        -------
        object
            The fitted scorer itself.

        Raises
        ------
        ValueError
            If X is not a finite numeric matrix, or holds too few normal samples.

        Warns
        -----
        UserWarning
            If there are too few samples for `contamination`, or, without `groups`, if
            more than a fifth of them are copies of others or nearly so.
        """
        X, groups = self._training_rows(X, y, groups, reset=True)
        digests = row_digests(X)
        self._learn(X, digests)
        if groups is None:
            warn_of_copies(X, digests)
            held_out = self._leave_one_out(X, digests)
        else:
            held_out = self._leave_groups_out(X, digests, groups)
        self._set_threshold(digests, held_out)
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
        return self._held_out.score(self._checked(X, reset=False), self._score)
