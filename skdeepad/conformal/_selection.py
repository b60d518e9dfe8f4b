"""What follows from p-values and held-out scores: selections, and intervals."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta
from sklearn.utils import column_or_1d
from sklearn.utils._param_validation import StrOptions, validate_params
from sklearn.utils.validation import check_is_fitted

PROCEDURES = ("bh", "storey", "by")
LARGE = 0.5  # p-values above it are taken for those of normal samples (Storey)


@validate_params(
    {"p": ["array-like"], "procedure": [StrOptions(set(PROCEDURES))]},
    prefer_skip_nested_validation=True,
)
def select_anomalies(
    p: ArrayLike, alpha: float = 0.1, procedure: str = "bh"
) -> NDArray[np.bool_]:
    """Select anomalies, so that few of those selected are false alarms.

    With m p-values, sorted, the k smallest are selected for the largest k with
    ``p_(k) <= alpha k / m`` [1]_. The false discovery rate, the expected share of
    normal samples among those selected, is at most alpha.

    Parameters
    ----------
    p : array-like of shape (n_samples,)
        P-values of samples that are judged together, such as those of one night, in
        (0, 1]. Samples whose p-value is NaN are not selected, and do not count.
    alpha : float, default=0.1
        The false discovery rate, in (0, 1).
    procedure : {"bh", "storey", "by"}, default="bh"
        "bh": Benjamini and Hochberg, valid for conformal p-values of one detector
        [2]_. "storey": the same at ``alpha / pi_0``, where ``pi_0 = (1 + #{p > 0.5}) /
        (0.5 m)``, 1 at most, estimates the share of normal samples; it selects more
        where many samples are anomalies. "by": Benjamini and Yekutieli, at ``alpha /
        (1 + 1/2 + ... + 1/m)``, valid whatever the dependence of p-values is, such as
        for those of several detectors.

    Returns
    -------
    ndarray of bool, shape (n_samples,)
        True for the samples that are selected.

    Raises
    ------
    ValueError
        If a p-value is not in (0, 1], or a parameter is out of its range.

    Warns
    -----
    UserWarning
        If nothing is selected because the detector has too few held-out scores: with n
        of them, no p-value is below ``1 / (n + 1)``, and R samples can only be selected
        if n is at least ``m / (R alpha) - 1``.

    See Also
    --------
    false_alarm_interval : The false alarm rate of a threshold.

    References
    ----------
    .. [1] Y. Benjamini and Y. Hochberg, "Controlling the False Discovery Rate", Journal
       of the Royal Statistical Society B 57(1), 1995.
    .. [2] S. Bates et al., "Testing for Outliers with Conformal p-values", The Annals
       of Statistics 51(1), 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from skdeepad import KNNScorer
    >>> from skdeepad.conformal import select_anomalies
    >>> rng = np.random.default_rng(0)
    >>> detector = KNNScorer().fit(rng.normal(size=(200, 2)))
    >>> tonight = np.concatenate([rng.normal(size=(95, 2)), np.full((5, 2), 9.0)])
    >>> np.flatnonzero(select_anomalies(detector.p_values(tonight)))
    array([95, 96, 97, 98, 99])
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} must be in (0, 1).")
    values = np.asarray(column_or_1d(p), dtype=np.float64)
    known = values[~np.isnan(values)]
    if not ((known > 0) & (known <= 1)).all():
        raise ValueError("p must hold p-values: numbers in (0, 1], or NaN.")
    selected = np.zeros(len(values), dtype=bool)
    if not len(known):
        return selected
    m = len(known)
    level = alpha
    if procedure == "storey":
        level = alpha / min(1.0, (1 + (known > LARGE).sum()) / (LARGE * m))
    elif procedure == "by":
        level = alpha / (1 / np.arange(1, m + 1)).sum()
    ordered = np.sort(known)
    passed = np.flatnonzero(ordered <= level * np.arange(1, m + 1) / m)
    if len(passed):
        return values <= ordered[passed[-1]]  # False for NaN
    _warn_of_few_scores(known, level)
    return selected


def _warn_of_few_scores(p: NDArray[np.float64], level: float) -> None:
    """Warn if samples beyond all held-out scores are not selected."""
    steps = p / p.min()
    if p.min() == 1 or not np.allclose(steps, np.rint(steps), rtol=0, atol=1e-6):
        return  # the smallest is not the step 1 / (n + 1), of which all are multiples
    n, n_least = round(1 / p.min()) - 1, int((p == p.min()).sum())
    needed = math.ceil(len(p) / (n_least * level) - 1)
    warnings.warn(
        f"Nothing is selected, although {n_least} of {len(p)} samples are less normal "
        f"than all {n} held-out scores: no p-value can be below 1 / {n + 1}. Fit the "
        f"detector to more samples, so that it has {needed} held-out scores, or raise "
        "alpha.",
        UserWarning,
        stacklevel=3,
    )


def false_alarm_interval(
    detector: Any, confidence: float = 0.95
) -> tuple[float, float]:
    """Give an interval for the false alarm rate that a threshold really has.

    A threshold at the k-th of n held-out scores flags a share of all new normal samples
    that depends on the training samples. For exchangeable scores it is distributed as
    ``Beta(k, n + 1 - k)``, with ``k = contamination (n + 1)``, whatever the scores are.

    Parameters
    ----------
    detector : detector
        A fitted detector, with ``contamination`` and ``held_out_scores_``.
    confidence : float, default=0.95
        With this probability, over training sets, the false alarm rate is in the
        interval; in (0, 1).

    Returns
    -------
    low, high : float
        The central interval, in [0, 1].

    Raises
    ------
    ValueError
        If the detector keeps no held-out scores, or `confidence` is not in (0, 1).
    NotFittedError
        If the detector is not fitted.

    See Also
    --------
    select_anomalies : Limits the share of false alarms among all alarms.

    Notes
    -----
    Exact where held-out scores and new ones are exchangeable (see ``p_values`` of the
    detector), and about right where scores are leave-one-out or out-of-fold.

    Examples
    --------
    >>> import numpy as np
    >>> from skdeepad import GaussianScorer
    >>> from skdeepad.conformal import false_alarm_interval
    >>> detector = GaussianScorer().fit(np.random.default_rng(0).normal(size=(200, 3)))
    >>> low, high = false_alarm_interval(detector)
    >>> print(f"{low:.3f} to {high:.3f}")
    0.024 to 0.084
    """
    check_is_fitted(detector)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be in (0, 1).")
    held_out = getattr(detector, "held_out_scores_", None)
    if held_out is None:
        raise ValueError(
            f"{type(detector).__name__} keeps no held-out scores. Fit it again with a "
            "contamination, or wrap it in ConformalDetector."
        )
    n = len(held_out)
    k = max(detector.contamination * (n + 1), 1.0)  # below the lowest score, 1 is left
    low, high = beta.interval(confidence, k, n + 1 - k)
    return float(low), float(high)
