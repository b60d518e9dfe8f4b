"""Fits of whole pipelines, again and again without some of the samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline
from sklearn.utils import _safe_indexing, get_tags, indexable
from sklearn.utils.validation import _num_samples

from ..base import AnomalyDetector, check_groups, known_normal
from ..features import BackboneFeatures
from ..inputs import Vectors, check_inputs, open_inputs
from ..scorers._base import Scorer, copies_together, row_digests, split_in_folds
from ._base import BackboneDetector, TrainedDetector


def steps_of(detector: Any) -> list[Any]:
    """List the steps of a pipeline, and of pipelines in it; or the detector alone."""
    if not isinstance(detector, Pipeline):
        return [detector]
    return [inner for _, step in detector.steps for inner in steps_of(step)]


def scores_are_held_out(detector: Any) -> bool:
    """Tell whether training samples get scores in which they did not take part.

    This package's detectors see to it themselves, unless a step before them has
    learnt from the same samples.
    """
    *before, last = steps_of(detector)
    return isinstance(last, AnomalyDetector) and all(
        step in (None, "passthrough")
        or isinstance(step, BackboneFeatures | FrozenEstimator)
        or not get_tags(step).requires_fit
        for step in before
    )


def leaves_one_out(detector: Any) -> bool:
    """Tell whether one fit gives all scores as new samples would have them.

    So it is where training samples are left out one by one or in folds, and not where
    a network was trained on them.
    """
    last = steps_of(detector)[-1]
    by_design = isinstance(last, Scorer) or (
        isinstance(last, BackboneDetector) and not isinstance(last, TrainedDetector)
    )
    return by_design and scores_are_held_out(detector)


def sample_digests(X: Any) -> NDArray[np.uint64]:
    """Digest each sample's content to 64 bits; of a file, its path, size and time."""
    inputs = check_inputs(
        BaseEstimator(), X, vectors=None, image_shape=None, reset=True
    )
    if type(inputs) is Vectors:
        return row_digests(inputs.rows)
    digests = (inputs.digest(i)[:8] for i in range(len(inputs)))
    return np.array([int.from_bytes(d, "little") for d in digests], dtype=np.uint64)


@dataclass(frozen=True)
class RefitSamples:
    """Samples that detectors are fitted to, whole or in part.

    Parameters
    ----------
    X : array-like or sequence of paths
        All samples.
    y : array-like of shape (n_samples,) or None
        Their labels.
    normal : ndarray of int, shape (n_normal,)
        The positions of normal samples. The others, known anomalies, are part of each
        fit by a detector that learns from them.
    digests : ndarray of uint64, shape (n_normal,)
        Of the normal samples' content.
    related : ndarray of shape (n_normal,)
        The same number for those that are in one fold.
    """

    X: Any
    y: ArrayLike | None
    normal: NDArray[np.intp]
    digests: NDArray[np.uint64]
    related: NDArray[Any]

    @classmethod
    def check(cls, X: Any, y: ArrayLike | None, groups: ArrayLike | None) -> Self:
        """Check what `fit` is given."""
        (X,) = indexable(open_inputs(X))
        digests = sample_digests(X)
        groups = check_groups(groups, len(digests))
        normal = np.flatnonzero(known_normal(y, len(digests)))
        related = copies_together(digests) if groups is None else groups
        return cls(X, y, normal, digests[normal], related[normal])

    def take(self, index: NDArray[np.intp]) -> Any:
        """Select normal samples."""
        return _safe_indexing(self.X, self.normal[index])

    def fit(self, detector: Any, index: NDArray[np.intp] | None = None) -> Any:
        """Fit a detector to these of the normal samples (None: all).

        One that knows nothing of labels sees normal samples only.
        """
        if not isinstance(steps_of(detector)[-1], AnomalyDetector):
            if index is None:
                index = np.arange(len(self.normal))
            return detector.fit(self.take(index))
        if index is None:
            return detector.fit(self.X, self.y)
        anomalies = np.setdiff1d(np.arange(_num_samples(self.X)), self.normal)
        kept = np.sort(np.append(self.normal[index], anomalies))
        labels = None if self.y is None else np.asarray(self.y)[kept]
        return detector.fit(_safe_indexing(self.X, kept), labels)

    def refits(
        self,
        detector: Any,
        n_folds: int,
        used: NDArray[np.bool_] | None = None,
        seed: int = 0,
    ) -> Iterator[tuple[Any, NDArray[np.intp], NDArray[np.float64]]]:
        """Give clones that were fitted without a fold, the fold, and its scores.

        Only those of the normal samples that are `used` (None: all) are learnt from.
        """
        for train, fold in split_in_folds(self.related, n_folds, seed):
            kept = train if used is None else train[used[train]]
            fitted = self.fit(clone(detector), kept)
            yield fitted, fold, np.asarray(fitted.score_samples(self.take(fold)))

    def refitted_scores(
        self,
        detector: Any,
        n_folds: int,
        used: NDArray[np.bool_] | None = None,
        seed: int = 0,
    ) -> NDArray[np.float64]:
        """Score normal samples, each by a clone that was fitted without its fold."""
        scores = np.empty(len(self.normal))
        for _, fold, found in self.refits(detector, n_folds, used, seed):
            scores[fold] = found
        return scores
