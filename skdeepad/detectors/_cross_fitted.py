"""Thresholds that hold behind steps that learn: whole pipelines are refitted."""

from __future__ import annotations

from dataclasses import field
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, MetaEstimatorMixin, _fit_context, clone
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline
from sklearn.utils import _safe_indexing, check_random_state, get_tags, indexable
from sklearn.utils._param_validation import HasMethods, Interval
from sklearn.utils.validation import _num_samples, check_is_fitted

from ..base import (
    AnomalyDetector,
    check_groups,
    keep_state_on_error,
    known_normal,
    seeded_clone,
)
from ..features import BackboneFeatures
from ..inputs import Vectors, check_inputs, open_inputs
from ..scorers._base import (
    HeldOutScores,
    copies_together,
    cross_fitted_scores,
    row_digests,
)


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


def fit_detector(
    detector: Any, X: Any, y: ArrayLike | None, normal: NDArray[np.intp]
) -> Any:
    """Fit a detector; one that knows nothing of labels sees normal samples only."""
    if isinstance(steps_of(detector)[-1], AnomalyDetector):
        return detector.fit(X, y)
    return detector.fit(_safe_indexing(X, normal))


def refitted_scores(
    detector: Any,
    X: Any,
    y: ArrayLike | None,
    normal: NDArray[np.intp],
    related: NDArray[Any],
    n_folds: int,
) -> NDArray[np.float64]:
    """Score normal samples, each by a clone that was fitted without its fold.

    Parameters
    ----------
    detector : estimator
        With ``fit`` and ``score_samples``.
    X, y : array-like
        All samples, and their labels or None.
    normal : ndarray of int
        Which samples are normal.
    related : ndarray of shape (len(normal),)
        The same number for those that are in one fold.
    n_folds : int
        How often it is fitted.

    Returns
    -------
    ndarray of float64, shape (len(normal),)
    """
    anomalies = np.setdiff1d(np.arange(_num_samples(X)), normal)

    def score(train: NDArray[np.intp], test: NDArray[np.intp]) -> NDArray[np.float64]:
        kept = np.sort(np.append(normal[train], anomalies))
        labels = None if y is None else np.asarray(y)[kept]
        rows = np.flatnonzero(np.isin(kept, normal))
        fitted = fit_detector(clone(detector), _safe_indexing(X, kept), labels, rows)
        return np.asarray(fitted.score_samples(_safe_indexing(X, normal[test])))

    return cross_fitted_scores(related, score, n_folds)


def sample_digests(X: Any) -> NDArray[np.uint64]:
    """Digest each sample's content to 64 bits; of a file, its path, size and time."""
    inputs = check_inputs(
        BaseEstimator(), X, vectors=None, image_shape=None, reset=True
    )
    if type(inputs) is Vectors:
        return row_digests(inputs.rows)
    digests = (inputs.digest(i)[:8] for i in range(len(inputs)))
    return np.array([int.from_bytes(d, "little") for d in digests], dtype=np.uint64)


class CrossFittedDetector(MetaEstimatorMixin, AnomalyDetector):
    """A detector or pipeline with a threshold that holds on new samples.

    What learns from the training samples before the last step (whitening, PCA,
    a selection of features) makes them look more normal than any new one, and a
    threshold from their scores flags too many. Here the *whole* pipeline is fitted
    ``cv`` times more, each time without one fold of the samples, and the threshold is
    set by the scores of the folds that were left out.

    Parameters
    ----------
    estimator : estimator
        Any outlier detector with ``score_samples``, or pipeline that ends in one.
    cv : int, default=10
        Number of folds, 2 at least. With few folds the threshold is cautious: it
        comes from fits to fewer samples, and somewhat fewer new samples are flagged.
    contamination : float, default=0.05
        Share of new normal samples that may fall below the threshold, in (0, 0.5].
        That of `estimator` does not matter.
    random_state : int, RandomState instance or None, default=None
        Seeds what in the estimator has a `random_state` that is None: all fits start
        from the same networks.

    Attributes
    ----------
    estimator_ : estimator
        Fitted to all samples: it gives the scores.
    offset_ : float
        The threshold on ``score_samples``: the `contamination` quantile of the
        training samples' scores by fits without their fold.

    See Also
    --------
    DetectorEnsemble : Does the same for members that need it.
    sklearn.model_selection.FixedThresholdClassifier : A threshold for classifiers.

    Notes
    -----
    This package's detectors and scorers know their held-out scores without it, and
    need it only behind steps that learn.

    The threshold compares scores by fits to a part of the samples with scores by the
    fit to all. With fewer samples than features, a step without regularization, such
    as ``PCA(whiten=True)``, scores on another scale for each number of samples, and
    the threshold does not hold: of 50 samples with 100 features a third of new ones
    was flagged. Take fewer components, or ``KNNScorer(metric="mahalanobis")``.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.decomposition import PCA
    >>> from sklearn.pipeline import make_pipeline
    >>> from skdeepad import CrossFittedDetector, KNNScorer
    >>> X, new = np.random.default_rng(0).normal(size=(2, 200, 50))
    >>> whitened = make_pipeline(PCA(whiten=True), KNNScorer())
    >>> print(f"{(whitened.fit(X).predict(new) == -1).mean():.2f}")
    0.34
    >>> detector = CrossFittedDetector(whitened).fit(X)
    >>> print(f"{(detector.predict(new) == -1).mean():.2f}")
    0.04
    """

    estimator: Any = field(kw_only=False)
    cv: int = 10
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

    @keep_state_on_error
    @_fit_context(prefer_skip_nested_validation=False)
    def fit(
        self, X: Any, y: ArrayLike | None = None, groups: ArrayLike | None = None
    ) -> CrossFittedDetector:
        """Fit the estimator to all samples, and without each fold in turn.

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
        CrossFittedDetector
            The detector itself.

        Raises
        ------
        ValueError
            If X, y or groups is not what is described here, or the samples cannot be
            parted in two folds.
        """
        (X,) = indexable(open_inputs(X))
        digests = sample_digests(X)
        groups = check_groups(groups, len(digests))
        normal = np.flatnonzero(known_normal(y, len(digests)))
        related = copies_together(digests) if groups is None else groups
        detector = seeded_clone(self.estimator, check_random_state(self.random_state))
        self.estimator_ = fit_detector(clone(detector), X, y, normal)
        for name in ("n_features_in_", "feature_names_in_"):
            self.__dict__.pop(name, None)
            if hasattr(self.estimator_, name):
                setattr(self, name, getattr(self.estimator_, name))
        scores = refitted_scores(detector, X, y, normal, related[normal], self.cv)
        scored = ~np.isnan(scores)  # unreadable files are not
        self._set_offset(scores[scored])
        self._held_out = HeldOutScores(digests[normal][scored], scores[scored])
        return self

    def score_samples(self, X: Any) -> NDArray[np.float64]:
        """Score samples; the higher, the more normal.

        Returns
        -------
        ndarray of float64, shape (n_samples,)
            The estimator's scores. A sample that was trained on gets the score by the
            fit without its fold.
        """
        check_is_fitted(self)
        scores = np.asarray(self.estimator_.score_samples(X), dtype=np.float64)
        return self._held_out.recall(sample_digests(X), scores)
