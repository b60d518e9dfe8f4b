"""The contract every detector keeps: labels, scores, offset, prediction.

Nothing here knows about images or networks; the scorers on vectors and the
detectors on images stand on it alike.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, OutlierMixin, clone
from sklearn.utils import check_consistent_length, column_or_1d
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import check_is_fitted

from .labels import is_anomaly, known_normal, numeric_labels
from .parameters import ParametersMixin

__all__ = [
    "AnomalyDetector",
    "cheapest_threshold",
    "check_groups",
    "conformal_p_values",
    "count_below",
    "draw_seed",
    "keep_state_on_error",
    "known_normal",
    "numeric_labels",
    "seeded_clone",
    "threshold_below",
    "too_few",
]


ROUNDING = 1e-9  # of scores, relative to their size: nearer ones count as tied


def draw_seed(rng: np.random.RandomState) -> int:
    """Draw a seed for another generator."""
    return int(rng.randint(np.iinfo(np.int32).max))


def seeded_clone(estimator: Any, rng: np.random.RandomState) -> Any:
    """Clone an estimator, and seed what in it has a `random_state` that is None."""
    estimator = clone(estimator)
    unseeded = [
        name
        for name, value in estimator.get_params().items()
        if f"__{name}".endswith("__random_state") and value is None
    ]
    estimator.set_params(**{name: draw_seed(rng) for name in unseeded})
    return estimator


def check_groups(groups: ArrayLike | None, n_samples: int) -> NDArray[Any] | None:
    """Check what tells which samples belong together; number the groups."""
    if groups is None:
        return None
    _, numbers = np.unique(column_or_1d(groups), return_inverse=True)
    check_consistent_length(numbers, np.empty(n_samples))
    return numbers


def _rounding(ordered: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the distance up to which a score and the one before it count as tied."""
    sizes = np.maximum(np.abs(ordered), np.median(np.abs(ordered)))
    return np.maximum(2 * ROUNDING * sizes, np.finfo(np.float64).tiny)


def threshold_below(scores: NDArray[np.float64], share: float) -> float:
    """Give the threshold below which this share of new scores is expected to fall.

    The scores are of samples that did not train on themselves. A new score falls below
    the k-th of n exchangeable ones with probability ``k / (n + 1)``. Between two of
    them the threshold is interpolated, but kept away from both by a twentieth of their
    distance, so that rounding never decides; scores that are tied but for rounding all
    stay above it. It equals none of the scores.
    """
    ordered = np.sort(scores)
    rounding = _rounding(ordered)
    at = share * (len(ordered) + 1)
    k = min(int(at), len(ordered) - 1)  # so many fall below
    weight = at - k
    while k and ordered[k] - ordered[k - 1] <= rounding[k]:
        k, weight = k - 1, 1.0
    if k == 0:
        return float(ordered[0] - rounding[0])
    weight = min(max(weight, 0.05), 0.95)
    return float((1 - weight) * ordered[k - 1] + weight * ordered[k])


def too_few(n: int, share: float) -> bool:
    """Tell whether fewer than this share of new scores can fall below none of n."""
    return share * (n + 1) < 1 - ROUNDING


def cheapest_threshold(
    normal: NDArray[np.float64],
    anomalous: NDArray[np.float64],
    false_alarm: float,
    miss: float,
) -> float:
    """Give the threshold that costs least on samples whose labels are known.

    `false_alarm` is what it costs to flag all normal samples, `miss` to flag no
    anomaly. The threshold is halfway between two scores, or beyond all of them; of
    thresholds that cost the same, the lowest is given.
    """
    scores = np.concatenate([normal, anomalous])
    order = np.argsort(scores)
    alarms = np.append(0, np.cumsum(order < len(normal))) / len(normal)
    misses = 1 - np.append(0, np.cumsum(order >= len(normal))) / len(anomalous)
    cost = false_alarm * alarms + miss * misses  # if so many scores are flagged
    ordered = scores[order]
    tied = np.diff(ordered) <= _rounding(ordered)[1:]
    cost[1:-1][tied] = np.inf
    n_flagged = int(np.argmax(cost <= cost.min() * (1 + ROUNDING)))
    if n_flagged == len(scores):
        return -threshold_below(-scores, 0)
    return threshold_below(scores, (n_flagged + 0.5) / (len(scores) + 1))


def count_below(
    held_out_scores: NDArray[np.float64], scores: NDArray[np.float64]
) -> NDArray[np.intp]:
    """Count for each score the sorted held-out scores that are no greater.

    Scores that are tied but for rounding count as tied.
    """
    if not len(held_out_scores):
        return np.zeros(len(scores), dtype=np.intp)
    sizes = np.maximum(np.abs(scores), np.median(np.abs(held_out_scores)))
    return np.searchsorted(held_out_scores, scores + ROUNDING * sizes, side="right")


def conformal_p_values(
    held_out_scores: NDArray[np.float64], scores: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Give ``(1 + #{held-out score <= score}) / (n + 1)``; NaN for scores of NaN."""
    p = (1 + count_below(held_out_scores, scores)) / (len(held_out_scores) + 1)
    return np.where(np.isnan(scores), np.nan, p)


def keep_state_on_error(fit: Callable[..., Any]) -> Callable[..., Any]:
    """Leave the estimator as it was when a method that changes it fails."""

    @functools.wraps(fit)
    def safe_fit(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = self.__dict__.copy()
        try:
            return fit(self, *args, **kwargs)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    return safe_fit


def _check_cost(cost: Mapping[str, float], prevalence: float) -> tuple[float, float]:
    """Give what it costs to flag all normal samples, and to flag no anomaly."""
    names = "false_alarm", "miss"
    if set(cost) != set(names) or not all(0 <= cost[name] < math.inf for name in names):
        raise ValueError(
            f"cost={cost!r} must say what errors cost, such as "
            '{"false_alarm": 1, "miss": 20}.'
        )
    if not 0 < prevalence < 1:
        raise ValueError(f"prevalence={prevalence!r} must be in (0, 1), such as 0.01.")
    return (1 - prevalence) * cost["false_alarm"], prevalence * cost["miss"]


class AnomalyDetector(ParametersMixin, OutlierMixin, BaseEstimator):
    """Base of every detector: scikit-learn's outlier contract, spelled out once.

    A subclass defines ``fit``, which calls `_set_offset` with scores of normal
    rows that did not take part in training, and ``score_samples``.

    Parameters
    ----------
    contamination : float, default=0.05
        Share of new normal samples that may fall below the threshold, in (0, 0.5].
        `fit` sets the threshold by it; to change it afterwards, call `recalibrate`.

    Attributes
    ----------
    offset_ : float
        The threshold on ``score_samples``: the `contamination` quantile of the scores
        of training samples as if they were new.
    classes_ : ndarray of shape (2,)
        -1 and +1: what `predict` gives.
    held_out_scores_ : ndarray of float64, shape (n_held_out,)
        Scores of normal training samples that did not train on themselves, sorted:
        what `p_values` compares with.
    n_features_in_ : int
        Number of columns seen in `fit`, where X was 2-D.
    feature_names_in_ : ndarray of str
        Names of the columns, where X had them.
    """

    contamination: float = 0.05

    _parameter_constraints: ClassVar = {
        "contamination": [Interval(Real, 0, 0.5, closed="right")],
    }
    # what attributes hold besides plain data: see docs/architecture.md
    _saved: ClassVar[dict[str, Any]] = {}

    def _set_offset(
        self,
        held_out_scores: NDArray[np.float64],
        unseen: NDArray[np.bool_] | None = None,
    ) -> None:
        """Put the threshold where `contamination` of new normal rows fall below.

        Those of the scores that are `unseen` (None: all) say how new ones are
        distributed.

        Warns
        -----
        UserWarning
            If there are too few scores for so small a share.
        """
        told = held_out_scores if unseen is None else held_out_scores[unseen]
        n = len(told)
        if too_few(n, self.contamination):
            needed = math.ceil(1 / self.contamination - 1)
            warnings.warn(
                f"contamination={self.contamination} cannot be kept with the "
                f"held-out scores of {n} training samples: about "
                f"{100 / (n + 1):.2g} % of new normal samples will be flagged. "
                f"Train on more samples (at least {needed} need held-out scores), "
                "or raise contamination.",
                UserWarning,
                stacklevel=3,
            )
        if not hasattr(self, "classes_"):  # cross_val_predict asks for them
            self.classes_ = np.array([-1, 1])
        self.offset_ = threshold_below(held_out_scores, self.contamination)
        self.held_out_scores_ = np.sort(told)
        self._threshold_scores: NDArray[np.float64] | None = held_out_scores
        self._unseen = unseen

    @keep_state_on_error
    def recalibrate(
        self,
        X: Any = None,
        y: ArrayLike | None = None,
        *,
        contamination: float | None = None,
        cost: Mapping[str, float] | None = None,
        prevalence: float | None = None,
    ) -> Self:
        """Set the threshold again, without learning again.

        Changing the parameter `contamination` of a fitted detector has no effect;
        this method has. Scores stay as they are.

        Parameters
        ----------
        X : array-like, default=None
            New samples, in any form that `fit` takes, such as the first good
            parts of a new batch. None: the threshold is set by the held-out scores
            that the detector keeps from `fit`, or from the last call with X.
        y : array-like of shape (n_samples,), default=None
            +1 for normal samples, -1 for anomalies. None: all are normal. Without
            `cost`, anomalies do not count.
        contamination : float, default=None
            Share of new normal samples that may fall below the threshold, in
            (0, 0.5]; the parameter is set to it. None: the parameter as it is.
        cost : dict, default=None
            What errors cost, each at least 0: ``{"false_alarm": 1, "miss": 20}``. The
            threshold is the one at which errors on X cost least on average, and the
            parameter `contamination` is set to the share of normal samples below it,
            ``(1 + number below) / (n_normal + 1)``, 0.5 at most. None: the threshold
            is set by `contamination`.
        prevalence : float, default=None
            Share of anomalies among the samples to come, in (0, 1), for `cost`. None:
            as in y.

        Returns
        -------
        self : object
            The detector with its new threshold.

        Raises
        ------
        ValueError
            If a parameter is out of range, if X is no valid input or has no normal
            sample that can be read, if it is None and no held-out scores are kept, or
            if `cost` is given without labelled samples of both kinds.

        Warns
        -----
        UserWarning
            If there are too few scores for `contamination`.

        Notes
        -----
        With P_FA(t) the share of normal samples and P_miss(t) that of anomalies on the
        wrong side of a threshold t, `cost` minimises ``(1 - prevalence) cost_FA P_FA(t)
        + prevalence cost_miss P_miss(t)``. The threshold lies halfway between two
        scores. It is chosen by the anomalies of X, so it is best for more of the
        same kind; take samples that have not been trained on, and others to report on.
        """
        self._recalibrate_by(X, y, contamination, cost, prevalence)
        return self

    def _recalibrate_by(
        self,
        X: Any,
        y: ArrayLike | None,
        contamination: float | None,
        cost: Mapping[str, float] | None,
        prevalence: float | None,
        **more: Any,
    ) -> None:
        check_is_fitted(self)
        if contamination is not None:
            self.contamination = contamination
        if X is None:
            if y is not None or cost is not None:
                raise ValueError("y and cost need X: pass the samples that y labels.")
            self._check_share()
            self._recalibrate(None, None, None)
            return
        scores = self.score_samples(X)
        anomalous = np.zeros(len(scores), bool) if y is None else is_anomaly(y)
        check_consistent_length(scores, anomalous)
        readable = ~np.isnan(scores)  # unreadable files have no score
        good, bad = readable & ~anomalous, readable & anomalous
        if not good.any():
            raise ValueError(
                "X has no normal sample that can be read. Pass some good ones."
            )
        offset = None
        if cost is not None:
            if not bad.any():
                raise ValueError(
                    "cost needs anomalies, but y labels none that can be read. Label "
                    "anomalies -1, or leave cost out."
                )
            prevalence = (
                bad.sum() / readable.sum() if prevalence is None else prevalence
            )
            costs = _check_cost(cost, prevalence)
            offset = cheapest_threshold(scores[good], scores[bad], *costs)
            below = int((scores[good] < offset).sum())
            self.contamination = min((below + 1) / (good.sum() + 1), 0.5)
        self._check_share()
        self._recalibrate(X, scores, good, **more)
        if offset is not None:
            self.offset_ = offset

    def _check_share(self) -> None:
        self._validate_params()
        if self.contamination is None:
            raise ValueError("contamination is None: pass the share, such as 0.05.")

    def _recalibrate(
        self, X: Any, scores: NDArray[np.float64] | None, good: NDArray[np.bool_] | None
    ) -> None:
        """Set thresholds by the scores that were kept, or by the good of new ones."""
        if scores is not None:
            self._set_offset(scores[good])
            return
        kept = getattr(self, "_threshold_scores", None)
        if kept is None:
            raise ValueError(
                f"This {type(self).__name__} keeps no held-out scores (it was fitted "
                "with contamination=None, or by an older version). Pass X, some "
                "normal samples."
            )
        self._set_offset(kept, self._unseen)

    def score_samples(self, X: Any) -> NDArray[np.float64]:
        """Score each sample; the higher, the more normal.

        Parameters
        ----------
        X : array-like
            Samples, in any form that `fit` takes.

        Returns
        -------
        ndarray of float64, shape (n_samples,)
            Minus an anomaly score.
        """
        raise NotImplementedError

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Score each sample relative to the threshold.

        Returns
        -------
        ndarray of float64, shape (n_samples,)
            ``score_samples(X) - offset_``: at least 0 for samples that count as
            normal, negative for anomalies.
        """
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> NDArray[np.int_]:
        """Tell normal samples from anomalies.

        Returns
        -------
        ndarray of int, shape (n_samples,)
            +1 for normal samples, -1 for anomalies. A sample without a score (an
            unreadable image, skipped) is not known to be good, and gets -1.
        """
        return np.where(self.decision_function(X) >= 0, 1, -1)

    def p_values(self, X: Any) -> NDArray[np.float64]:
        """Tell how unusual each sample would be among normal ones.

        The conformal p-value is ``(1 + #{held-out score <= score}) / (n + 1)``, where n
        scores of normal training samples, `held_out_scores_`, did not train on
        themselves. A new normal sample has a p-value of at most t with probability t,
        about; a small one is evidence of an anomaly.

        Parameters
        ----------
        X : array-like
            Samples, in any form that `fit` takes.

        Returns
        -------
        ndarray of float64, shape (n_samples,)
            In [1 / (n + 1), 1]. Scores that are tied, but for rounding, count as tied,
            which makes p-values larger. A training sample gets the p-value of its
            held-out score, which counts itself and so is at least 2 / (n + 1). NaN
            where a sample has no score (an unreadable image, skipped).

        Raises
        ------
        ValueError
            If the detector keeps no held-out scores: it was fitted with
            ``contamination=None``, or by version 0.1.0.

        See Also
        --------
        skdeepad.conformal.select_anomalies : Limits the share of false alarms.

        Notes
        -----
        What is guaranteed: where held-out scores come from samples that no step
        learnt from (`HSCClassifier`, `DeepSVDD`, `DeepSAD`, `OpenSetClassifier`,
        `KDClonerEstimator`, ``ConformalDetector(method="split")``, and any detector
        after ``recalibrate`` with new samples), P(p <= t) <= t for new normal samples
        that are exchangeable with the training samples, on average over training
        sets. ``ConformalDetector(method="cv+")`` guarantees 2 t and a little. Other
        detectors compare leave-one-out or out-of-fold scores with scores by all
        samples: no theorem bounds P(p <= t). It was measured to be about t for
        scorers, `PatchDetector` and `PANDAEstimator` (docs/error_rates.md has the
        table).

        References
        ----------
        .. [1] S. Bates et al., "Testing for Outliers with Conformal p-values",
           The Annals of Statistics 51(1), 2023.
        """
        return self._p_values(self.score_samples(X))

    def _p_values(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Give the p-values of samples with these scores."""
        if not hasattr(self, "held_out_scores_"):
            raise ValueError(
                f"This {type(self).__name__} keeps no held-out scores: it was fitted "
                "with contamination=None, or by version 0.1.0. Fit it again."
            )
        return conformal_p_values(self.held_out_scores_, scores)

    def fit_predict(self, X: Any, y: ArrayLike | None = None) -> NDArray[np.int_]:
        """Fit to X and tell its normal samples from its anomalies.

        Parameters
        ----------
        X : array-like
            Training samples.
        y : array-like of shape (n_samples,), default=None
            As in `fit`: rows labelled -1 are not trained on.

        Returns
        -------
        ndarray of int, shape (n_samples,)
            +1 for normal samples, -1 for anomalies.
        """
        return self.fit(X, y).predict(X)
