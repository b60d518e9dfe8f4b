"""Error rates for any detector and pipeline: all of it is refitted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, _fit_context, clone
from sklearn.utils import check_consistent_length, check_random_state, column_or_1d
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.validation import _num_samples

from ..base import (
    count_below,
    keep_state_on_error,
    seeded_clone,
    threshold_below,
    too_few,
)
from ..detectors._base import by_rank_as_unseen
from ..detectors._refits import RefitSamples, sample_digests
from ..scorers._base import HeldOutScores
from ._base import RefittedDetector

WHOLE = -1  # in the place of a fold: compared with scores by the fit to all


class ConformalDetector(RefittedDetector):
    """A detector or pipeline with p-values and a threshold that hold on new samples.

    What learns from the training samples before the last step (whitening, PCA,
    a selection of features) makes them look more normal than any new one, and a
    threshold from their scores flags too many. Here the *whole* pipeline is fitted
    without some of the samples, and their scores set the threshold and the p-values.

    Parameters
    ----------
    method : {"held_out", "split", "cv+"}, default="held_out"
        Which scores are compared.

        * "held_out": scores of samples by fits without their fold, with new ones by
          the fit to all samples. `cv` + 1 fits; nothing is guaranteed, but the
          p-values of new normal samples are uniform or a little larger, as measured.
        * "split": one of `cv` folds is held out of the only fit. P(p <= t) <= t is
          guaranteed; fewer samples are trained on, and far fewer compared with.
        * "cv+": each held-out score is compared with the new sample's score by the
          same fit [1]_. P(p <= t) <= 2 t + (2 / n_samples) ** 0.5 is guaranteed,
          about t is measured. p-values take `cv` + 1 scorings.
    cv : int, default=5
        Number of folds, 2 at least. With few folds "held_out" is cautious: its scores
        come from fits to fewer samples, and fewer new samples are flagged. "split"
        holds out one sample in `cv`.
    contamination : float, default=0.05
        Share of new normal samples that may fall below the threshold, in (0, 0.5].
        That of `estimator` does not matter.

    Attributes
    ----------
    estimators_ : list of estimator
        The fits without a fold, for "cv+"; otherwise empty.
    category_offsets_ : dict
        The threshold of each category; empty if `fit` was given none.
    offset_ : float
        The threshold on ``score_samples``: the `contamination` quantile of the
        held-out scores.

    See Also
    --------
    DetectorEnsemble : Does the same for members that need it.
    sklearn.model_selection.FixedThresholdClassifier : A threshold for classifiers.

    Notes
    -----
    This package's detectors and scorers know their held-out scores without it, and
    need it only behind steps that learn, for a guarantee, or for categories.

    "held_out" compares scores by fits to a part of the samples with scores by the
    fit to all. With fewer samples than features, a step without regularization, such
    as ``PCA(whiten=True)``, scores on another scale for each number of samples, and
    the threshold does not hold: of 50 samples with 100 features a third of new ones
    was flagged. Take "split" or "cv+", fewer components, or
    ``KNNScorer(metric="mahalanobis")``.

    References
    ----------
    .. [1] R. F. Barber et al., "Predictive Inference with the Jackknife+", The Annals
       of Statistics 49(1), 2021.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.decomposition import PCA
    >>> from sklearn.pipeline import make_pipeline
    >>> from skdeepad import ConformalDetector, KNNScorer
    >>> X, new = np.random.default_rng(0).normal(size=(2, 200, 50))
    >>> whitened = make_pipeline(PCA(whiten=True), KNNScorer())
    >>> print(f"{(whitened.fit(X).predict(new) == -1).mean():.2f}")
    0.34
    >>> detector = ConformalDetector(whitened, cv=10).fit(X)
    >>> print(f"{(detector.predict(new) == -1).mean():.2f}")
    0.04
    """

    method: str = "held_out"

    _saved: ClassVar = {"estimators_": BaseEstimator}

    _parameter_constraints: ClassVar = {
        "method": [StrOptions({"held_out", "split", "cv+"})],
    }

    @keep_state_on_error
    @_fit_context(prefer_skip_nested_validation=False)
    def fit(
        self,
        X: Any,
        y: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        categories: ArrayLike | None = None,
    ) -> Self:
        """Fit the estimator, and learn how it scores samples that it has not seen.

        Parameters
        ----------
        categories : array-like of shape (n_samples,), default=None
            The kind of each sample, such as its product, camera or line: each
            category gets a threshold and p-values of its own, from its own held-out
            scores. New samples then need a category, too.

        Raises
        ------
        ValueError
            If X, y, groups or categories is not what is described here, or the
            samples cannot be parted in two folds.

        Warns
        -----
        UserWarning
            If there are too few samples, in all or of a category, for `contamination`.
        """
        samples = RefitSamples.check(X, y, groups)
        kinds, numbers = _check_categories(categories, _num_samples(samples.X))
        detector = seeded_clone(self.estimator, check_random_state(self.random_state))
        n = len(samples.normal)
        scores, fold_of = np.full(n, np.nan), np.full(n, WHOLE)
        self.estimators_: list[Any] = []
        for fitted, fold, found in samples.refits(detector, self.cv):
            scores[fold] = found
            if self.method == "split":
                self._keep(fitted)
                break
            if self.method == "cv+":
                fold_of[fold] = len(self.estimators_)
                self.estimators_.append(fitted)
        else:
            self._keep(samples.fit(clone(detector)))
        unseen = ~np.isnan(scores)  # unreadable files have no score
        if self.method == "split":  # samples that were trained on are only ranked
            trained = np.flatnonzero(~unseen)
            found = self._new_scores(samples.take(trained))
            trained, found = trained[~np.isnan(found)], found[~np.isnan(found)]
            scores[trained] = by_rank_as_unseen(found, scores[unseen])
        scored = ~np.isnan(scores)
        self._set_offset(scores[scored], unseen[scored])
        self._held_out = HeldOutScores(samples.digests[scored], scores[scored])
        self._fold = fold_of[scored]
        self._category = numbers[samples.normal][scored]
        self._set_category_offsets(kinds)
        return self

    @keep_state_on_error
    def recalibrate(
        self,
        X: Any = None,
        y: ArrayLike | None = None,
        *,
        contamination: float | None = None,
        cost: Mapping[str, float] | None = None,
        prevalence: float | None = None,
        categories: ArrayLike | None = None,
    ) -> Self:
        """Set the thresholds again, and what p-values compare with; do not learn again.

        With ``method="cv+"``, p-values compare new scores of X by `estimator_`, of
        which none took part in a fit, as those of "split" do.

        Parameters
        ----------
        categories : array-like of shape (n_samples,), default=None
            The category of each sample in X, if `fit` was given categories. Those of
            which X has no sample stay as they are, and new ones are added. Each
            keeps `contamination`; `cost` cannot be given as well.

        Raises
        ------
        ValueError
            If categories are missing, not as many as samples, or given with `cost`.
        """
        more = {} if X is None else {"categories": categories}
        if X is not None:
            self._check_presence(categories)
        elif categories is not None:
            raise ValueError("categories need X: pass the samples that they are of.")
        if cost is not None and categories is not None:
            raise ValueError(
                "cost sets one threshold, but there is one for each category. Leave "
                "cost out, or fit a detector for each category."
            )
        self._recalibrate_by(X, y, contamination, cost, prevalence, **more)
        return self

    def _recalibrate(
        self,
        X: Any,
        scores: NDArray[np.float64] | None,
        good: NDArray[np.bool_] | None,
        categories: ArrayLike | None = None,
    ) -> None:
        if scores is None or good is None:
            super()._recalibrate(None, None, None)
            self._set_category_offsets(list(self.category_offsets_))
            return
        found, numbers = _check_categories(categories, len(scores))
        known = list(self.category_offsets_)
        kinds = known + [kind for kind in found if kind not in known]
        if found:
            numbers = np.array([kinds.index(kind) for kind in found])[numbers]
        kept = self._held_out_rows & ~np.isin(self._category, numbers[good])
        values = np.append(np.asarray(self._threshold_scores)[kept], scores[good])
        self._fold = np.append(self._fold[kept], np.full(good.sum(), WHOLE))
        self._category = np.append(self._category[kept], numbers[good])
        self._set_offset(values, np.ones(len(values), dtype=bool))
        self._set_category_offsets(kinds)

    @property
    def _held_out_rows(self) -> NDArray[np.bool_]:
        """Which of the scores that thresholds are set by are held out."""
        return np.asarray(self._unseen)

    def _set_category_offsets(self, kinds: list[Any]) -> None:
        self.category_offsets_: dict[Any, float] = {}
        few = []
        for number, kind in enumerate(kinds):
            of_kind = self._held_out_rows & (self._category == number)
            scores = np.asarray(self._threshold_scores)[of_kind]
            if not len(scores):
                raise ValueError(
                    f"categories: no normal sample of {kind!r} has a held-out score. "
                    "Pass more samples of it, or none."
                )
            self.category_offsets_[kind] = threshold_below(scores, self.contamination)
            if too_few(len(scores), self.contamination):
                few.append(f"{kind!r} ({len(scores)})")
        if few:
            warnings.warn(
                f"contamination={self.contamination} cannot be kept for categories "
                f"with so few held-out scores: {', '.join(few)}. Pass more samples of "
                "them, or raise contamination.",
                UserWarning,
                stacklevel=3,
            )

    def _check_presence(self, categories: ArrayLike | None) -> None:
        if (categories is None) == bool(self.category_offsets_):
            raise ValueError(
                "categories must be passed here if they were passed to fit, and only "
                "then."
            )

    def _by_category(
        self, categories: ArrayLike | None, n: int
    ) -> Iterator[tuple[float, NDArray[np.bool_], NDArray[np.bool_]]]:
        """Give each category's threshold, and its samples among new and held-out ones.

        All samples are of one category where `fit` was given none.
        """
        self._check_presence(categories)
        if categories is None:
            yield self.offset_, np.ones(n, dtype=bool), self._held_out_rows
            return
        kinds, numbers = _check_categories(categories, n)
        known = list(self.category_offsets_)
        for number, kind in enumerate(kinds):
            if kind not in known:
                raise ValueError(
                    f"categories holds {kind!r}, which fit has not seen; it has seen "
                    f"{', '.join(map(repr, known))}."
                )
            of_kind = self._held_out_rows & (self._category == known.index(kind))
            yield self.category_offsets_[kind], numbers == number, of_kind

    def decision_function(
        self, X: Any, categories: ArrayLike | None = None
    ) -> NDArray[np.float64]:
        """Score samples relative to the threshold, that of their category.

        Parameters
        ----------
        categories : array-like of shape (n_samples,), default=None
            The category of each sample, if `fit` was given categories.

        Raises
        ------
        ValueError
            If categories are missing, unknown, or not as many as samples.
        """
        scores = self.score_samples(X)
        offsets = np.empty(len(scores))
        for offset, new, _ in self._by_category(categories, len(scores)):
            offsets[new] = offset
        return scores - offsets

    def predict(self, X: Any, categories: ArrayLike | None = None) -> NDArray[np.int_]:
        """Tell normal samples from anomalies, by the threshold of their category.

        Parameters
        ----------
        categories : array-like of shape (n_samples,), default=None
            The category of each sample, if `fit` was given categories.

        Raises
        ------
        ValueError
            If categories are missing, unknown, or not as many as samples.
        """
        return np.where(self.decision_function(X, categories) >= 0, 1, -1)

    def p_values(
        self, X: Any, categories: ArrayLike | None = None
    ) -> NDArray[np.float64]:
        """Tell how unusual each sample would be among normal ones of its category.

        ``(1 + #{held-out score <= score}) / (n + 1)``; with ``method="cv+"``, each
        held-out score is compared with the score by the same fit. A sample that was
        trained on gets the p-value of its held-out score.

        Parameters
        ----------
        categories : array-like of shape (n_samples,), default=None
            The category of each sample, if `fit` was given categories.

        Raises
        ------
        ValueError
            If categories are missing, unknown, or not as many as samples.
        """
        scores = self.score_samples(X)
        by_fold = {WHOLE: scores}
        folds = np.setdiff1d(self._fold, [WHOLE])
        if len(folds):
            trained, _ = self._held_out.known(sample_digests(X))
            for k in folds.tolist():
                found = np.asarray(self.estimators_[k].score_samples(X))
                by_fold[k] = np.where(trained, scores, found)
        p, kept = np.empty(len(scores)), np.asarray(self._threshold_scores)
        for _, new, held_out in self._by_category(categories, len(scores)):
            below = np.zeros(int(new.sum()), dtype=np.intp)
            for k, found in by_fold.items():
                of_fold = kept[held_out & (self._fold == k)]
                below += count_below(np.sort(of_fold), found[new])
            p[new] = (1 + below) / (held_out.sum() + 1)
        return np.where(np.isnan(scores), np.nan, p)


def _check_categories(
    categories: ArrayLike | None, n: int
) -> tuple[list[Any], NDArray[np.intp]]:
    """Give the categories there are, and the number of each sample's."""
    if categories is None:
        return [], np.zeros(n, dtype=np.intp)
    kinds, numbers = np.unique(column_or_1d(categories), return_inverse=True)
    check_consistent_length(numbers, np.empty(n))
    return kinds.tolist(), numbers
