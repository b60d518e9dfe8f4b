"""What y may be: the one place that tells labels apart.

+1 is normal and -1 a known anomaly. Everything else is refused, or told: 0 and 1 (or
False and True) mean "good, defect" to some and "defect, good" to others.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_consistent_length, column_or_1d

from .checks import shorten

__all__ = [
    "is_anomaly",
    "known_normal",
    "normal_class",
    "numeric_labels",
    "semi_labels",
]


def is_anomaly(y: ArrayLike, name: str = "y") -> NDArray[np.bool_]:
    """Tell which labels are -1, and refuse any but +1 and -1.

    Raises
    ------
    ValueError
        If a label is another one; booleans are refused, too.
    """
    labels: Any = column_or_1d(y)
    anomalous = labels == -1
    known = (anomalous | (labels == 1)) & (labels.dtype.kind != "b")
    if not known.all():
        row = int(np.argmin(known))
        raise ValueError(
            f"{name} must be +1 (normal) or -1 (anomaly), but {name}[{row}] is "
            f"{shorten(repr(labels[row : row + 1].tolist()[0]))}. If 1 marks "
            f"anomalies, use np.where({name} == 1, -1, 1)."
        )
    return anomalous


def numeric_labels(y: ArrayLike, n_samples: int) -> NDArray[np.float64]:
    """Check the labels of an outlier detector, whatever numbers they are.

    Parameters
    ----------
    y : array-like of shape (n_samples,)
    n_samples : int
        The number of rows of X.

    Returns
    -------
    ndarray of float64, shape (n_samples,)

    Raises
    ------
    ValueError
        If y is not numeric, has another length, or labels every row -1.
    """
    labelled: Any = column_or_1d(y)
    check_consistent_length(labelled, np.empty(n_samples))
    try:
        labels = labelled.astype(np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"Unknown label type: y holds {shorten(repr(labelled[0]))}; an outlier "
            "detector takes +1 for normal rows and -1 for anomalies. Map the labels "
            "first, for example np.where(y == 'good', 1, -1)."
        ) from None
    if (labels == -1).all():
        raise ValueError("y labels every row as an anomaly (-1). Label normal rows +1.")
    return labels


def known_normal(y: ArrayLike | None, n_samples: int) -> NDArray[np.bool_]:
    """Tell which rows may be trained on.

    Parameters
    ----------
    y : array-like of shape (n_samples,) or None
        +1 for normal rows, -1 for known anomalies. Numbers that are neither do
        not label anomalies (class numbers, say) and leave every row in.
    n_samples : int
        The number of rows of X.

    Returns
    -------
    ndarray of bool, shape (n_samples,)
        False where y is -1.

    Raises
    ------
    ValueError
        If y is not numeric, has another length, or labels no row as normal.

    Warns
    -----
    UserWarning
        If y holds two labels that are not +1 and -1: with those, scikit-learn's
        ``roc_auc`` takes the greater for the normal one, and is inverted when it
        marks anomalies.
    """
    if y is None:
        return np.ones(n_samples, dtype=bool)
    labels = numeric_labels(y, n_samples)
    found = set(np.unique(labels).tolist())
    if found <= {-1, 0, 1} and -1 in found:
        return labels != -1
    if _is_pair(found):
        low, high = min(found), max(found)
        warnings.warn(
            f"y holds {_named(found)}, and is ignored: every row counts as normal. "
            "Outlier detectors take +1 for normal rows and -1 for anomalies. If "
            f"{high:g} marks the anomalies, scoring='roc_auc' is inverted; map the "
            f"labels with np.where(y == {high:g}, -1, 1), or with "
            f"np.where(y == {low:g}, -1, 1) if {low:g} does. (cross_val_predict "
            "encodes +1 and -1 as 1 and 0 for some methods: there, pass "
            "cv=list(cv.split(X, y)) and no y.)",
            UserWarning,
            stacklevel=3,
        )
    return np.ones(n_samples, dtype=bool)


def semi_labels(y: ArrayLike | None, n_samples: int) -> NDArray[np.intp]:
    """Give labels in {-1, 0, 1}; numbers of another kind count as 0, no label.

    Warns
    -----
    UserWarning
        If y holds 0 and 1 only, where 1 may mark the anomalies, or another pair.
    """
    if y is None:
        return np.zeros(n_samples, dtype=np.intp)
    labels = numeric_labels(y, n_samples)
    found = set(np.unique(labels).tolist())
    if found == {0, 1}:
        warnings.warn(
            "y holds 0 and 1: images without label, and images known to be normal. If "
            "1 marks the anomalies, map the labels with np.where(y == 1, -1, 0).",
            UserWarning,
            stacklevel=6,
        )
    elif _is_pair(found) and not found <= {-1, 0, 1}:
        warnings.warn(
            f"y holds {_named(found)}, and is ignored: no image counts as labelled. "
            "Label images known to be normal +1, known anomalies -1 and others 0.",
            UserWarning,
            stacklevel=6,
        )
    if not found <= {-1, 0, 1}:
        return np.zeros(n_samples, dtype=np.intp)
    return labels.astype(np.intp)


def normal_class(
    classes: NDArray[Any], numbers: NDArray[np.intp], normal_label: Any
) -> int:
    """Tell which of two classes is normal: 0 or 1.

    Parameters
    ----------
    classes : ndarray of shape (2,)
        The labels, sorted.
    numbers : ndarray of int, shape (n_samples,)
        The class of each sample, by its place there.
    normal_label : object
        The label of normal samples; None where it is not told.

    Raises
    ------
    ValueError
        If `normal_label` is neither, or contradicts +1 and -1.

    Warns
    -----
    UserWarning
        If it is not told, and the labels are not +1 and -1.
    """
    pair = classes.tolist()
    signs = classes.dtype.kind != "b" and pair == [-1, 1]
    if normal_label is not None:
        if normal_label not in pair:
            raise ValueError(
                f"normal_label={shorten(repr(normal_label))} is not in y, which holds "
                f"{shorten(_named(pair))}. (cross_val_predict encodes labels as 0 and "
                "1 for some methods; map them to +1 and -1 first.)"
            )
        if signs and normal_label != 1:
            raise ValueError(
                f"normal_label={normal_label!r}, but y holds +1 and -1, of which +1 is "
                "normal. Leave normal_label out, or swap the signs: -y."
            )
        return pair.index(normal_label)
    if not signs:
        n_normal = int((numbers == 1).sum())
        warnings.warn(
            f"y holds {shorten(_named(pair))}: {shorten(repr(pair[1]))} "
            f"({n_normal} of {len(numbers)} rows) is taken for normal, as the greater "
            f"one. Set normal_label={shorten(repr(pair[1]))} if that is right, "
            f"normal_label={shorten(repr(pair[0]))} if not.",
            UserWarning,
            stacklevel=7,
        )
    return 1


def _is_pair(found: set[float]) -> bool:
    """Tell labels that may mean normal and anomalous, but are not +1 and -1."""
    return len(found) == 2 or found == {0}


def _named(labels: Any) -> str:
    first, *rest = (
        f"{x:g}" if isinstance(x, float) else repr(x) for x in sorted(labels)
    )
    return " and ".join([first, *rest])
