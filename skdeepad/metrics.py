"""Metrics and scorers in which the anomaly is the class to find.

Labels are +1 (normal) and -1 (anomaly); scores are those of ``decision_function``
or ``score_samples``, higher means more normal. scikit-learn's own ``"roc_auc"``,
``"average_precision"`` and ``"f1"`` take +1 for the class to find, and labels in
{0, 1} with 1 for anomalies turn them upside down without a word.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import label
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import (
    auc,
    average_precision_score,
    make_scorer,
    roc_auc_score,
    roc_curve,
)
from sklearn.utils import check_consistent_length, column_or_1d

from skdeepad.labels import is_anomaly

__all__ = [
    "anomaly_average_precision",
    "anomaly_average_precision_score",
    "anomaly_fpr_at_tpr_score",
    "anomaly_roc_auc",
    "anomaly_roc_auc_score",
    "aupro_score",
    "neg_anomaly_fpr95",
    "pixel_roc_auc_score",
]

# Pixels are counted by the first 22 bits of their float32 score, so that memory does
# not grow with them.
_DROPPED_BITS = 10


def anomaly_roc_auc_score(y_true: ArrayLike, y_score: ArrayLike) -> float:
    """Area under the ROC curve of anomalies against normal samples.

    It is the probability that a random anomaly scores lower than a random normal
    sample, a tie counting one half.

    Parameters
    ----------
    y_true : array-like of shape (n_samples,)
        +1 for normal samples, -1 for anomalies.
    y_score : array-like of shape (n_samples,)
        ``decision_function`` or ``score_samples``: finite, higher is more normal.

    Returns
    -------
    float
        In [0, 1]: 1 is perfect, 0.5 is chance. nan, with an
        ``UndefinedMetricWarning``, unless both classes are present.

    Raises
    ------
    ValueError
        If a label is neither +1 nor -1, a score is not finite, or the lengths differ.

    Examples
    --------
    >>> from skdeepad.metrics import anomaly_roc_auc_score
    >>> anomaly_roc_auc_score([1, 1, -1, -1], [0.9, 0.3, 0.5, 0.1])
    0.75
    """
    return _score(roc_auc_score, y_true, y_score)


def anomaly_average_precision_score(y_true: ArrayLike, y_score: ArrayLike) -> float:
    """Average precision of the anomalies among the lowest scores.

    Parameters
    ----------
    y_true : array-like of shape (n_samples,)
        +1 for normal samples, -1 for anomalies.
    y_score : array-like of shape (n_samples,)
        ``decision_function`` or ``score_samples``: finite, higher is more normal.

    Returns
    -------
    float
        In (0, 1]: 1 is perfect, chance is about the share of anomalies. nan, with
        an ``UndefinedMetricWarning``, unless both classes are present.

    Raises
    ------
    ValueError
        If a label is neither +1 nor -1, a score is not finite, or the lengths differ.

    Examples
    --------
    >>> from skdeepad.metrics import anomaly_average_precision_score
    >>> anomaly_average_precision_score([-1, 1, 1, -1], [0.1, 0.2, 0.3, 0.4])
    0.75
    """
    return _score(average_precision_score, y_true, y_score)


def anomaly_fpr_at_tpr_score(
    y_true: ArrayLike, y_score: ArrayLike, *, tpr: float = 0.95
) -> float:
    """Share of normal samples flagged where enough anomalies are detected.

    A threshold flags every sample that scores at or below it. Among the thresholds
    that detect at least ``tpr`` of the anomalies, the smallest share counts.

    Parameters
    ----------
    y_true : array-like of shape (n_samples,)
        +1 for normal samples, -1 for anomalies.
    y_score : array-like of shape (n_samples,)
        ``decision_function`` or ``score_samples``: finite, higher is more normal.
    tpr : float, default=0.95
        Share of the anomalies to detect, in (0, 1].

    Returns
    -------
    float
        In [0, 1]: 0 is perfect, chance is about ``tpr``. nan, with an
        ``UndefinedMetricWarning``, unless both classes are present.

    Raises
    ------
    ValueError
        If a label is neither +1 nor -1, a score is not finite, the lengths differ, or
        ``tpr`` is out of range.

    Examples
    --------
    >>> from skdeepad.metrics import anomaly_fpr_at_tpr_score
    >>> y_true, y_score = [-1, 1, -1, 1], [0.1, 0.2, 0.3, 0.4]
    >>> anomaly_fpr_at_tpr_score(y_true, y_score)
    0.5
    >>> anomaly_fpr_at_tpr_score(y_true, y_score, tpr=0.5)
    0.0
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must be in (0, 1], got {tpr!r}.")
    return _score(partial(_fpr_at_tpr, tpr=tpr), y_true, y_score)


def pixel_roc_auc_score(masks: Iterable[Any], maps: Iterable[Any]) -> float:
    """Area under the ROC curve of all pixels of all images.

    Parameters
    ----------
    masks : array-like of shape (n_images, height, width), or iterable of masks
        True, 1 or 255 where a pixel is anomalous. Each may be an array, the path of an
        image file, which is brought to the size of the map, or None for an image
        without a defect, as in ``load_image_folder(root).masks_test``.
    maps : array-like of shape (n_images, height, width), or iterable of maps
        ``anomaly_map``: finite, higher is more anomalous. Images may differ in size;
        with an iterable only one of them needs to be in memory.

    Returns
    -------
    float
        In [0, 1]: 1 is perfect, 0.5 is chance. nan, with an
        ``UndefinedMetricWarning``, unless there are both kinds of pixels. Scores that
        agree to one part in 8,000 count as ties.

    Raises
    ------
    ValueError
        If a mask is not binary, a score is not finite, or shapes or numbers differ.
    OSError
        If the file of a mask cannot be read.

    See Also
    --------
    aupro_score : The same whatever the size of the defects.

    Examples
    --------
    >>> from skdeepad.metrics import pixel_roc_auc_score
    >>> masks = [[[0, 0, 1], [0, 0, 1]], [[0, 0, 0], [0, 0, 0]]]
    >>> maps = [[[0.1, 0.2, 0.9], [0.1, 0.7, 0.6]], [[0.0, 0.1, 0.0], [0.2, 0.1, 0.0]]]
    >>> round(pixel_roc_auc_score(masks, maps), 3)
    0.95
    """
    return _pixel_area(masks, maps, by_region=False, max_fpr=1.0)


def aupro_score(
    masks: Iterable[Any], maps: Iterable[Any], *, max_fpr: float = 0.3
) -> float:
    """Area under the per-region overlap curve, each defect counting the same.

    The per-region overlap at a threshold is the share of a defect's pixels that are
    found, averaged over defects, which are the connected components (8 neighbours)
    of the masks. It is integrated over the share of normal pixels that are flagged,
    up to `max_fpr` [1]_.

    Parameters
    ----------
    masks : array-like of shape (n_images, height, width), or iterable of masks
        True, 1 or 255 where a pixel is anomalous. Each may be an array, the path of an
        image file, which is brought to the size of the map, or None for an image
        without a defect, as in ``load_image_folder(root).masks_test``.
    maps : array-like of shape (n_images, height, width), or iterable of maps
        ``anomaly_map``: finite, higher is more anomalous. Images may differ in size;
        with an iterable only one of them needs to be in memory.
    max_fpr : float, default=0.3
        Where integration ends, in (0, 1].

    Returns
    -------
    float
        In [0, 1], divided by `max_fpr`: 1 is perfect, chance is ``max_fpr / 2``. nan,
        with an ``UndefinedMetricWarning``, unless there are both kinds of pixels.
        Scores that agree to one part in 8,000 count as ties.

    Raises
    ------
    ValueError
        If a mask is not binary, a score is not finite, shapes or numbers differ, or
        `max_fpr` is out of range.
    OSError
        If the file of a mask cannot be read.

    References
    ----------
    .. [1] P. Bergmann et al., "Uninformed Students: Student-Teacher Anomaly Detection
       with Discriminative Latent Embeddings", CVPR 2020.

    Examples
    --------
    >>> from skdeepad.metrics import aupro_score
    >>> masks = [[[0, 0, 1], [0, 0, 1]], [[0, 0, 0], [0, 0, 0]]]
    >>> maps = [[[0.1, 0.2, 0.9], [0.1, 0.7, 0.6]], [[0.0, 0.1, 0.0], [0.2, 0.1, 0.0]]]
    >>> round(aupro_score(masks, maps), 3)
    0.833
    """
    if not 0 < max_fpr <= 1:
        raise ValueError(f"max_fpr must be in (0, 1], got {max_fpr!r}.")
    return _pixel_area(masks, maps, by_region=True, max_fpr=max_fpr)


def _pixel_area(
    masks: Iterable[Any], maps: Iterable[Any], *, by_region: bool, max_fpr: float
) -> float:
    """Integrate the detected share over the flagged share, from counts by score."""
    normal, anomalous = np.zeros((2, 2 ** (32 - _DROPPED_BITS)))
    for i, (given, scored) in enumerate(zip(masks, maps, strict=True)):
        mask, score = _check_map(given, scored, i)
        weight = mask.astype(np.float64)
        if by_region:
            regions, _ = label(mask, structure=np.ones((3, 3)))
            weight /= np.maximum(np.bincount(regions.ravel()), 1)[regions]
        bins, inverse = np.unique(_order_bits(score.ravel()), return_inverse=True)
        normal[bins] += np.bincount(inverse, ~mask.ravel())
        anomalous[bins] += np.bincount(inverse, weight.ravel())
    if not (normal.any() and anomalous.any()):
        warnings.warn(
            "masks must hold normal and anomalous pixels; with one kind only, the "
            "score is not defined.",
            UndefinedMetricWarning,
            stacklevel=3,
        )
        return np.nan
    seen = np.flatnonzero((normal > 0) | (anomalous > 0))[::-1]  # highest first
    flagged, detected = (
        np.append(0, np.cumsum(counts[seen]) / counts.sum())
        for counts in (normal, anomalous)
    )
    flagged[-1] = 1.0  # but for rounding
    end = np.interp(max_fpr, flagged, detected)
    kept = flagged <= max_fpr
    x, y = np.append(flagged[kept], max_fpr), np.append(detected[kept], end)
    return float(auc(x, y) / max_fpr)


def _check_map(given: Any, scored: Any, i: int) -> tuple[NDArray[np.bool_], Any]:
    from .inputs import read_mask  # imports torch

    score = np.asarray(scored, dtype=np.float32)
    if score.ndim != 2:
        raise ValueError(
            f"maps[{i}] has shape {score.shape}, but must be (height, width)."
        )
    if not np.isfinite(score).all():
        raise ValueError(
            f"maps[{i}] holds values that are not finite. Leave out images that "
            "could not be read."
        )
    return read_mask(given, score.shape, f"masks[{i}]"), score


def _order_bits(score: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Give the first bits of float32 numbers, as integers in the same order."""
    bits = (score + np.float32(0)).view(np.uint32)  # -0.0 is 0.0
    negative = bits >> 31 == 1
    ordered = np.where(negative, ~bits, bits | np.uint32(0x80000000))
    return ordered >> np.uint32(_DROPPED_BITS)


def _fpr_at_tpr(
    anomalous: NDArray[np.bool_], score: NDArray[np.float64], tpr: float
) -> float:
    # Every threshold: the default drops points on a straight line, perhaps the best.
    flagged, detected, _ = roc_curve(anomalous, score, drop_intermediate=False)
    return flagged[detected >= tpr].min()


def _score(
    metric: Callable[[NDArray[np.bool_], NDArray[np.float64]], float],
    y_true: ArrayLike,
    y_score: ArrayLike,
) -> float:
    """Apply a metric of (is it an anomaly?, anomaly score) to checked arrays."""
    anomalous = is_anomaly(y_true, "y_true")
    score = column_or_1d(y_score, dtype=np.float64)
    check_consistent_length(anomalous, score)
    if not np.isfinite(score).all():
        row = int(np.argmin(np.isfinite(score)))
        raise ValueError(
            f"y_score[{row}] is {score[row]}. A sample without a score (an unreadable "
            "image) cannot be ranked: leave it out of y_true and y_score."
        )
    if np.unique(anomalous).size < 2:
        warnings.warn(
            "y_true must hold normal samples (+1) and anomalies (-1); with one kind "
            "only, the score is not defined.",
            UndefinedMetricWarning,
            stacklevel=3,
        )
        return np.nan
    return float(metric(anomalous, -score))


# Both are higher for normal samples, and scikit-learn hands them over as they are, for
# outlier detectors and for classifiers alike, whose last class is +1.
_RESPONSE_METHOD = ("decision_function", "score_samples")

#: Scorer of :func:`anomaly_roc_auc_score`, for ``scoring=``.
anomaly_roc_auc = make_scorer(anomaly_roc_auc_score, response_method=_RESPONSE_METHOD)

#: Scorer of :func:`anomaly_average_precision_score`, for ``scoring=``.
anomaly_average_precision = make_scorer(
    anomaly_average_precision_score, response_method=_RESPONSE_METHOD
)

#: Scorer of :func:`anomaly_fpr_at_tpr_score` at 95 %, negated: greater is better.
neg_anomaly_fpr95 = make_scorer(
    anomaly_fpr_at_tpr_score,
    response_method=_RESPONSE_METHOD,
    greater_is_better=False,
    tpr=0.95,
)
