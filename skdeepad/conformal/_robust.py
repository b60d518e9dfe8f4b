"""Training samples of which some are not normal: repeated trimming."""

from __future__ import annotations

from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom, norm
from sklearn.base import _fit_context, clone
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _num_samples

from ..base import draw_seed, keep_state_on_error, seeded_clone
from ..detectors._refits import RefitSamples, leaves_one_out
from ..scorers._base import HeldOutScores
from ._base import RefittedDetector

N_ROUNDS = 3
BULK = 0.1, 0.7  # quantiles of distances between which normal samples are alone
STANDS_OUT = 2.5  # standard deviations beyond the bulk
CHANCE = 0.01  # at which as many of one distribution may be beyond


class RobustDetector(RefittedDetector):
    """A detector or pipeline for training samples of which some are not normal.

    Anomalies among the training samples harm the ranking of new samples little, and the
    threshold much: it moves beyond them. Here, in three rounds, all samples are scored
    as if they were new, and those that look least normal are left out of the
    next round [1]_. The last fit sees the others only.

    Scorers, `MahalanobisFeatureScorer` and `PatchDetector`, also behind frozen steps,
    know by themselves how training samples would score as new ones: a round is one
    fit. All other detectors are fitted again without each of `cv` folds.

    Parameters
    ----------
    training_contamination : float or "auto", default="auto"
        Share of the training samples that are not normal, in [0, 0.5). "auto": as many
        as stand out from the others in each round; none, if no more do than by
        chance. Anomalies that do not stand out are not counted, so state the share if
        you know it. Not to be confused with `contamination`, the share of false alarms
        among new normal samples.

    Attributes
    ----------
    training_contamination_ : float
        The share of training samples that was left out.
    inlier_mask_ : ndarray of bool, shape (n_samples,)
        The training samples that the last fit saw. False also for samples labelled -1
        and for files that cannot be read.
    suspects_ : ndarray of int, shape (n_scored,)
        Positions of the training samples, the most suspicious first: look at
        the first twenty, and remove those that are no good.
    offset_ : float
        The threshold on ``score_samples``: the `contamination` quantile of
        `held_out_scores_`.
    held_out_scores_ : ndarray of float64, shape (n_held_out,)
        Scores of training samples as if they were new, sorted, without the lowest,
        which are taken for anomalies.

    See Also
    --------
    ConformalDetector : For training samples that are all normal.

    Notes
    -----
    If all samples that were left out were taken for anomalies, the threshold would be
    too high, as normal ones are among them. So the logarithms of anomaly scores (the
    scores themselves, if any is positive) are compared with a normal distribution
    through their bulk, from the 10 % to the 70 % quantile. The share of those beyond
    2.5 of its standard deviations, less what chance puts there, is the share that
    stands out. The threshold takes it for the share of anomalies, or the mean of it and
    of half the share that was left out if that is more, but no more than were left out.

    No estimate from scores alone can do better where anomalies score like normal
    samples: the normal ones' distribution is not known, and may have any tail.

    References
    ----------
    .. [1] J. Yoon et al., "Self-supervise, Refine, Repeat: Improving Unsupervised
       Anomaly Detection", TMLR 2022.

    Examples
    --------
    >>> import numpy as np
    >>> from skdeepad import KNNScorer, RobustDetector
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(200, 5))
    >>> X[:20] *= 10
    >>> detector = RobustDetector(
    ...     KNNScorer(), training_contamination=0.1, random_state=0
    ... ).fit(X)
    >>> sum(i < 20 for i in detector.suspects_[:20].tolist()) >= 18
    True
    """

    training_contamination: float | str = "auto"

    _parameter_constraints: ClassVar = {
        "training_contamination": [
            StrOptions({"auto"}),
            Interval(Real, 0, 0.5, closed="left"),
        ],
    }

    @keep_state_on_error
    @_fit_context(prefer_skip_nested_validation=False)
    def fit(
        self, X: Any, y: ArrayLike | None = None, groups: ArrayLike | None = None
    ) -> Self:
        """Fit the estimator to those of the samples that look normal.

        Parameters
        ----------
        y : array-like of shape (n_samples,), default=None
            +1 for samples that are thought to be normal, -1 for known anomalies, which
            only an estimator that learns from them sees.
        """
        samples = RefitSamples.check(X, y, groups)
        rng = check_random_state(self.random_state)
        detector = seeded_clone(self.estimator, rng)
        seed = draw_seed(rng)
        fitted, scores, used, share = self._trim(
            samples, detector, seed, groups is None and leaves_one_out(detector)
        )
        self._keep(fitted)
        scored = np.flatnonzero(~np.isnan(scores))
        ordered = np.sort(scores[scored])
        visible = share_standing_out(ordered)
        anomalous = min(max(visible, (visible + share / 2) / 2), share)
        self._set_offset(ordered[round(anomalous * len(ordered)) :])
        self._held_out = HeldOutScores(samples.digests[scored], scores[scored])
        self.training_contamination_ = float(share)
        self.inlier_mask_ = np.zeros(_num_samples(samples.X), dtype=bool)
        self.inlier_mask_[samples.normal[used]] = True
        self.suspects_ = samples.normal[scored[np.argsort(scores[scored])]]
        return self

    def _trim(
        self, samples: RefitSamples, detector: Any, seed: int, once: bool
    ) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], float]:
        """Fit to those that look normal; give the fit, all scores, which, and a share.

        The share is that of the others. Scores are those of new samples, of one fit
        if it gives such (`once`), and otherwise of fits without each fold.
        """
        everything = np.arange(len(samples.normal))
        used, share = np.ones(len(everything), dtype=bool), 0.0
        for i in range(N_ROUNDS + 1):
            if once:
                fitted = samples.fit(clone(detector), np.flatnonzero(used))
                scores = np.asarray(fitted.score_samples(samples.take(everything)))
            else:
                scores = samples.refitted_scores(
                    detector, self.cv, used, (seed + i) % 2**31
                )
            if i == N_ROUNDS:
                break
            given: Any = self.training_contamination
            n_scored = int((~np.isnan(scores)).sum())
            order = np.argsort(scores)[:n_scored]  # NaN last
            share = share_standing_out(scores[order]) if given == "auto" else given
            kept = np.zeros(len(used), dtype=bool)
            kept[order[round(share * n_scored) :]] = True
            if (kept == used).all():
                break
            used = kept
        if not once:
            fitted = samples.fit(clone(detector), np.flatnonzero(used))
        return fitted, scores, used & ~np.isnan(scores), share


def share_standing_out(scores: NDArray[np.float64]) -> float:
    """Give the share of samples that are no part of the bulk's distribution.

    It is 0 where so many of one distribution are beyond by chance, in one case of 100.
    """
    distances = np.sort(np.log(-scores) if scores.max() < 0 else -scores)
    n = len(distances)
    levels = (np.arange(n) + 0.5) / n
    bulk = (levels > BULK[0]) & (levels < BULK[1])
    if bulk.sum() < 2:
        return 0.0
    spread, middle = np.polyfit(norm.ppf(levels[bulk]), distances[bulk], 1)
    n_beyond = int((distances > middle + STANDS_OUT * spread).sum())
    by_chance = norm.sf(STANDS_OUT)
    if binom.sf(n_beyond - 1, n, by_chance) > CHANCE:
        return 0.0
    return float(n_beyond / n - by_chance)
