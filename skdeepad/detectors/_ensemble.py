"""Several detectors in one, their scores brought to one scale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, MetaEstimatorMixin, _fit_context, clone
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.utils import (
    Bunch,
    _safe_indexing,
    check_random_state,
    gen_batches,
    indexable,
)
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.metaestimators import _BaseComposition, available_if
from sklearn.utils.validation import _num_samples, check_is_fitted

from ..base import (
    AnomalyDetector,
    check_groups,
    keep_state_on_error,
    known_normal,
    seeded_clone,
)
from ..cache import MemoryCache
from ..features import BackboneEstimator, BackboneFeatures
from ..inference import BLOCK
from ..inputs import Vectors, check_inputs, open_inputs
from ..scorers import KNNScorer
from ..scorers._base import HeldOutScores
from ._patch import PatchDetector
from ._refits import RefitSamples, sample_digests, scores_are_held_out

MIN_RATIO = 1e-9  # of a score and the median: the logarithm of 0 is not finite
N_FOLDS = 10  # for members that do not know their held-out scores


def all_have_maps(ensemble: DetectorEnsemble) -> bool:
    """Tell whether all members show where the anomaly is."""
    members = ensemble.estimators or [("", None)]  # the default's have none
    return all(m == "drop" or hasattr(m, "anomaly_map") for _, m in members)


class DetectorEnsemble(MetaEstimatorMixin, AnomalyDetector, _BaseComposition):
    """Several detectors in one: the average or the worst of their scores, on one scale.

    What one network, stage or size of images overlooks, another may see. Members are
    any outlier detectors: this package's, pipelines, scikit-learn's. Those that look
    at stages of the same frozen network share one pass of each image.

    Parameters
    ----------
    estimators : list of (str, estimator) tuples, default=None
        The members, by name; "drop" in the place of one leaves it out. None: two
        that see different things. For images, both at 160 pixels: "patches", a
        `PatchDetector`, for small defects, and "cosine", the cosine distance to the
        nearest neighbours in a pretrained EfficientNet-Lite0's last stage, for other
        kinds of things (``named_estimators_["patches"]`` has maps). For vectors, the
        cosine and the Mahalanobis distance to the nearest neighbours.
    scale : {"log", "rank"}, default="log"
        What is averaged. "log": the logarithm of a member's anomaly score over its
        median on the training samples, for scores that are distances. "rank": the
        share of training samples that are less normal, for any scores; all beyond
        the training samples is alike.
    combine : {"mean", "max"}, default=None
        Whether members' anomaly scores are averaged, or the largest is taken, so that
        one member alone can raise an alarm: for members made for different kinds of
        anomalies. For "max", logarithms are brought to mean 0 and deviation 1 on the
        training samples. None: "max" for the default members for images, or "mean".
    weights : array-like of shape (n_members,), default=None
        What each member's scores count in the mean. None: all the same, but that the
        default's cosine distances of vectors, which are squares of lengths, count half.

    Attributes
    ----------
    estimators_ : list of estimator
        The fitted members, less those dropped.
    training_scores_ : ndarray of float64, shape (n_samples, n_members)
        The members' scores of the normal training samples, sorted each by itself,
        of samples left out of training: this package's detectors know them; foreign
        members, and pipelines with a step before the last that learns, are fitted
        ten times more, each time without a tenth of the samples.
    offset_ : float
        The threshold on ``score_samples``: the `contamination` quantile of the
        training samples' scores.
    map_offset_ : float
        The threshold on maps: 1. NaN if a member has no maps.
    n_features_in_ : int
        Number of columns seen in `fit`, where the first member tells.
    feature_names_in_ : ndarray of str
        Names of the columns, where X had them.

    See Also
    --------
    sklearn.ensemble.VotingClassifier : The same for classifiers.

    Examples
    --------
    >>> from sklearn.pipeline import make_pipeline
    >>> from skdeepad import BackboneFeatures, DetectorEnsemble, KNNScorer
    >>> from skdeepad.datasets import make_texture_defects
    >>> data = make_texture_defects("grass", n_train=50, random_state=0)
    >>> members = [
    ...     (stage, make_pipeline(BackboneFeatures(stages=stage), KNNScorer()))
    ...     for stage in ("stage3", "stage5")  # in one pass
    ... ]
    >>> ensemble = DetectorEnsemble(members).set_params(
    ...     stage3__backbonefeatures__image_size=96,
    ...     stage5__backbonefeatures__image_size=96,
    ... )
    >>> ensemble.fit(data.X_train).predict(data.X_test).shape
    (200,)
    """

    estimators: Sequence[tuple[str, Any]] | None = field(default=None, kw_only=False)
    scale: str = "log"
    combine: str | None = None
    weights: ArrayLike | None = None

    _saved: ClassVar = {
        "estimators": BaseEstimator,
        "estimators_": BaseEstimator,
        "_held_out": HeldOutScores,
    }

    _parameter_constraints: ClassVar = {
        "estimators": [list, None],
        "scale": [StrOptions({"log", "rank"})],
        "combine": [StrOptions({"mean", "max"}), None],
        "weights": ["array-like", None],
    }

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Give the parameters of the ensemble and of its members.

        Parameters
        ----------
        deep : bool, default=True
            Whether to give the members, and theirs, too.

        Returns
        -------
        dict
            Parameters by name; a member's as ``member__parameter``.
        """
        return self._get_params("estimators", deep=deep)

    def set_params(self, **params: Any) -> DetectorEnsemble:
        """Set parameters of the ensemble, members, or parameters of theirs.

        Parameters
        ----------
        **params : dict
            Values by name: a parameter, a member, or ``member__parameter``.

        Returns
        -------
        DetectorEnsemble
            The ensemble itself.
        """
        return self._set_params("estimators", **params)

    @property
    def named_estimators_(self) -> Bunch:
        """The fitted members by name."""
        return Bunch(**dict(zip(self._names, self.estimators_, strict=True)))

    @keep_state_on_error
    @_fit_context(prefer_skip_nested_validation=False)
    def fit(
        self, X: Any, y: ArrayLike | None = None, groups: ArrayLike | None = None
    ) -> DetectorEnsemble:
        """Fit all members, and learn the scales of their scores.

        Parameters
        ----------
        X : array-like or sequence of paths
            Samples, in any form that the members take.
        y : array-like of shape (n_samples,), default=None
            +1 for normal samples, -1 for known anomalies, which only members that
            learn from them see.
        groups : array-like of shape (n_samples,), default=None
            What each sample belongs to, such as a part or a video: the scales and the
            threshold are set by scores for which the sample's whole group is left
            out. None: samples are unrelated, but exact copies, which are left out
            together.

        Returns
        -------
        DetectorEnsemble
            The ensemble itself.

        Raises
        ------
        ValueError
            If there is no member, `weights` do not fit, X or y is nothing that the
            members take, or ``scale="log"`` where scores are not distances.
        """
        self.__dict__.pop("n_features_in_", None)
        self.__dict__.pop("feature_names_in_", None)
        (X,) = indexable(open_inputs(X))
        members = self._members(X)
        self._names = [name for name, _ in members]
        self._largest = self._takes_largest()
        self._shares = self._check_weights(len(members))
        groups = check_groups(groups, _num_samples(X))
        normal = np.flatnonzero(known_normal(y, _num_samples(X)))
        rows = X if len(normal) == _num_samples(X) else _safe_indexing(X, normal)
        rng = check_random_state(None)
        # seeded, so that a member that is fitted again starts from the same network
        self.estimators_ = [seeded_clone(member, rng) for _, member in members]
        known = [self._knows_held_out(member, groups) for member in self.estimators_]
        self._held_out: HeldOutScores | None = None
        if not all(known):
            samples = RefitSamples.check(X, y, groups)
        columns = []
        fronts = [clone(front) for front in frozen_fronts(self.estimators_)]
        for front in fronts:
            front._fit_inputs(rows)
        cache = MemoryCache(front._front() for front in fronts)
        for i, knows in enumerate(known):
            member = with_memory(self.estimators_[i], cache)
            if knows:
                member.fit(X, y, **({} if groups is None else {"groups": groups}))
                columns.append(member.score_samples(rows))
            else:
                samples.fit(member)
                columns.append(samples.refitted_scores(member, N_FOLDS))
            self.estimators_[i] = with_memory(member, None)
        scores = np.column_stack(columns)
        scored = ~np.isnan(scores).any(axis=1)  # unreadable files are not
        self.training_scores_ = np.sort(scores[scored], axis=0)
        no_distances = (self.training_scores_ > 0).any(axis=0)
        if self.scale == "log" and no_distances.any():
            raise ValueError(
                f"scale='log' is for distances; {self._names[no_distances.argmax()]!r} "
                "gives training samples scores above 0. Set scale='rank'."
            )
        first = self.estimators_[0]
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(first, name):
                setattr(self, name, getattr(first, name))
        self.map_offset_ = 1.0 if all_have_maps(self) else np.nan
        combined = self._combine(scores[scored])
        self._set_offset(combined)
        if not all(known):
            self._held_out = HeldOutScores(samples.digests[scored], combined)
        return self

    @staticmethod
    def _knows_held_out(member: Any, groups: NDArray[Any] | None) -> bool:
        """Tell whether a member scores what it is fitted to as if it were new."""
        # a pipeline hands no groups on
        whole = groups is None or isinstance(member, AnomalyDetector)
        return whole and scores_are_held_out(member)

    def _members(self, X: Any) -> list[tuple[str, Any]]:
        """Give the members, or those that stand for none."""
        if self.estimators is None:
            cosine = KNNScorer(metric="cosine")
            inputs = check_inputs(self, X, vectors=None, image_shape=None, reset=True)
            if type(inputs) is Vectors:
                return [
                    ("cosine", cosine),
                    ("whitened", KNNScorer(metric="mahalanobis")),
                ]
            return [
                ("patches", PatchDetector(image_size=160, random_state=0)),
                ("cosine", make_pipeline(BackboneFeatures(image_size=160), cosine)),
            ]
        self._validate_names([name for name, _ in self.estimators])
        members = [(name, m) for name, m in self.estimators if m != "drop"]
        if not members:
            raise ValueError("estimators has no members. Give at least one.")
        for name, member in members:
            if not hasattr(member, "fit") or not hasattr(member, "score_samples"):
                raise TypeError(
                    f"estimators: {name!r} is {member!r}, which has no fit or no "
                    "score_samples; members are outlier detectors."
                )
        return members

    def _takes_largest(self) -> bool:
        """Tell whether the largest anomaly score counts, and not the mean."""
        if self.combine is None:
            return self.estimators is None and self._names[0] == "patches"
        if self.combine == "max" and self.weights is not None:
            raise ValueError(
                "weights are for combine='mean'; the largest of the members' scores "
                "has none. Leave weights out, or set combine='mean'."
            )
        return self.combine == "max"

    def _check_weights(self, n: int) -> NDArray[np.float64]:
        """Give the share of each member."""
        weights = np.ones(n) if self.weights is None else np.asarray(self.weights)
        if self.weights is None and self.estimators is None and not self._largest:
            weights = np.array([1.0, 2.0])
        if weights.shape != (n,) or (weights < 0).any() or not weights.sum() > 0:
            raise ValueError(
                f"weights={self.weights!r} must be {n} numbers, one for each "
                "member, none of them negative and not all of them 0."
            )
        return weights / weights.sum()

    def _combine(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Average the members' scores on one scale, or take the worst."""
        # no products of matrices, which round by how many rows there are
        known = self.training_scores_
        largest = getattr(self, "_largest", False)  # files of 0.1.0 have none
        if self.scale == "log":
            medians = -np.median(known, axis=0)
            medians[medians == 0] = 1.0  # most training samples are the same
            logarithms = np.log(np.maximum(-scores / medians, MIN_RATIO))
            if largest:
                trained = np.log(np.maximum(-known / medians, MIN_RATIO))
                spread = trained.std(axis=0)
                spread[spread == 0] = 1.0
                return -((logarithms - trained.mean(axis=0)) / spread).max(axis=1)
            return -(logarithms * self._shares).sum(axis=1)
        below = [
            np.searchsorted(known[:, i], scores[:, i], side=side)
            for side in ("left", "right")
            for i in range(scores.shape[1])
        ]
        ranks = np.reshape(below, (2, -1, len(scores))).mean(axis=0) / len(known)
        mean = (self._shares[:, None] * ranks).sum(axis=0)
        mean = ranks.min(axis=0) if largest else mean
        return np.where(np.isnan(scores).any(axis=1), np.nan, mean)

    def score_samples(self, X: Any) -> NDArray[np.float64]:
        """Score samples; the higher, the more normal.

        Returns
        -------
        ndarray of float64, shape (n_samples,)
            The members' weighted mean, or the worst, on the scale that `scale` says;
            NaN for files that a member has skipped.
        """
        check_is_fitted(self)
        fronts = [front._front() for front in frozen_fronts(self.estimators_)]
        if len(MemoryCache(fronts).wanted) == len(fronts):  # nothing to share
            scores = self._combine(member_scores(self.estimators_, X))
        else:
            parts = []
            for block in gen_batches(_num_samples(X), BLOCK):  # memory stays bounded
                rows = _safe_indexing(X, np.arange(block.start, block.stop))
                cache = MemoryCache(fronts)
                members = [with_memory(member, cache) for member in self.estimators_]
                parts.append(self._combine(member_scores(members, rows)))
            scores = np.concatenate(parts)
        held_out = getattr(self, "_held_out", None)  # files of 0.1.0 have none
        return held_out.recall(sample_digests(X), scores) if held_out else scores

    @available_if(all_have_maps)
    def anomaly_map(self, X: Any) -> Any:
        """Show where in images the anomaly is: the members' maps on one scale.

        Each member's map is divided by its threshold on maps, and their weighted mean
        is taken, or the largest with ``combine="max"``. Where it exceeds 1,
        `map_offset_`, one of the members' maps exceeds its threshold: with n members,
        at most n times `contamination` of normal images do so, and fewer where members
        agree. The mean of such a map is no score.

        Returns
        -------
        ndarray of float32, shape (n_samples, height, width)
            As the members give them; a list of maps where files differ in size. NaN
            for files that a member has skipped.

        Raises
        ------
        AttributeError
            If a member has no maps.
        ValueError
            If a member has learnt no threshold on maps above 0.
        """
        check_is_fitted(self)
        levels = [getattr(m, "map_offset_", np.nan) for m in self.estimators_]
        for name, level in zip(self._names, levels, strict=True):
            if not level > 0:
                raise ValueError(
                    f"The maps of {name!r} have the threshold {level}, so they cannot "
                    "be brought to one scale. Leave it out, or use its own maps."
                )
        largest = getattr(self, "_largest", False)  # files of 0.1.0 have none
        scales = (1 if largest else self._shares) / np.array(levels)
        join: Any = np.max if largest else np.sum
        of_members = [member.anomaly_map(X) for member in self.estimators_]
        maps = [
            join([s * m for s, m in zip(scales, found, strict=True)], axis=0)
            for found in zip(*of_members, strict=True)
        ]
        maps = [found.astype(np.float32) for found in maps]
        return np.stack(maps) if len({m.shape for m in maps}) == 1 else maps


def member_scores(members: Sequence[Any], X: Any) -> NDArray[np.float64]:
    """Score samples by each member."""
    return np.column_stack([member.score_samples(X) for member in members])


def frozen_fronts(members: Sequence[Any]) -> Iterator[BackboneEstimator]:
    """Find the frozen networks at the front of members that keep nothing themselves.

    Maps are not shared: those of all training images would fill the memory.
    """
    for member in members:
        front = member.steps[0][1] if isinstance(member, Pipeline) else member
        frozen = isinstance(front, BackboneEstimator) and not front._has_end
        if frozen and front.memory is None and not isinstance(front, PatchDetector):
            yield front


def with_memory(member: Any, memory: Any) -> Any:
    """Copy a member, so that what its frozen network gives is kept in this cache.

    Weights and fitted state are not copied, and a `memory` of the user's stays.
    """
    new: Any = object.__new__(type(member))
    vars(new).update(vars(member))  # copy.copy would pickle the network
    if isinstance(new, Pipeline):
        (name, front), *rest = new.steps
        new.steps = [(name, with_memory(front, memory)), *rest]
    elif memory is None and isinstance(getattr(new, "memory", None), MemoryCache):
        new.memory = None
    elif new in frozen_fronts([new]):
        new.memory = memory
    return new
