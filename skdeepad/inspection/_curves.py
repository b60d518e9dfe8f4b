"""ROC and precision-recall curves in which the anomaly is the class to find."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import precision_recall_curve, roc_curve
from sklearn.utils._optional_dependencies import check_matplotlib_support

from ..metrics import anomaly_average_precision_score, anomaly_roc_auc_score
from ._display import DetectorDisplay


class CurveDisplay(DetectorDisplay):
    """Base of the curves over all thresholds.

    A subclass says what `_curve` and `_point` are, from who is an anomaly and who is
    flagged.

    Parameters
    ----------
    y_true : ndarray of shape (n_samples,)
        +1 for normal samples, -1 for anomalies.
    y_score : ndarray of shape (n_samples,)
        The scores, higher = more normal.
    threshold : float, default=None
        Samples that score below it are flagged.
    name : str, default=None
        What the curve is called.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
        Where it is drawn.
    """

    _labels: ClassVar[tuple[str, str]]
    _drawstyle: ClassVar = "default"

    def __init__(
        self,
        *,
        y_true: NDArray[Any],
        y_score: NDArray[np.float64],
        threshold: float | None = None,
        name: str | None = None,
    ) -> None:
        self.y_true = y_true
        self.y_score = y_score
        self.threshold = threshold
        self.name = name

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: ArrayLike,
        *,
        name: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Draw the curve of a fitted detector, and mark its threshold.

        Parameters
        ----------
        y : array-like of shape (n_samples,)
            +1 for normal samples, -1 for anomalies.
        name : str, default=None
            What the curve is called. None: the name of the class.

        Raises
        ------
        ValueError
            If a label is neither +1 nor -1.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        scores = estimator.decision_function(X)
        name = type(estimator).__name__ if name is None else name
        return cls.from_predictions(y, scores, threshold=0.0, name=name, **kwargs)

    @classmethod
    def from_predictions(
        cls,
        y_true: ArrayLike,
        y_score: ArrayLike,
        *,
        threshold: float | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Draw the curve of scores that were made before.

        Parameters
        ----------
        y_true : array-like of shape (n_samples,)
            +1 for normal samples, -1 for anomalies.
        y_score : array-like of shape (n_samples,)
            ``decision_function`` or ``score_samples``: higher is more normal. Samples
            whose score is NaN are left out.
        threshold : float, default=None
            Samples that score below it are flagged: marked by a dot. 0 for
            ``decision_function``.
        name : str, default=None
            What the curve is called.

        Raises
        ------
        ValueError
            If a label is neither +1 nor -1, or the lengths differ.
        """
        check_matplotlib_support(f"{cls.__name__}.from_predictions")
        labels, scores = np.asarray(y_true), np.asarray(y_score, dtype=np.float64)
        if scores.shape == labels.shape:
            known = ~np.isnan(scores)
            labels, scores = labels[known], scores[known]
        display = cls(y_true=labels, y_score=scores, threshold=threshold, name=name)
        return display.plot(**kwargs)

    def plot(self, ax: Any = None) -> Self:
        """Draw the curve."""
        summary = self._summary()  # checks labels and scores
        self.ax_ = self._place(ax)[()]
        is_anomaly = self.y_true == -1
        x, y = self._curve(is_anomaly, -self.y_score)
        label = summary if self.name is None else f"{self.name} ({summary})"
        (line,) = self.ax_.plot(x, y, label=label, drawstyle=self._drawstyle)
        if self.threshold is not None:
            flagged = self.y_score < self.threshold
            point = self._point(is_anomaly, flagged)
            self.ax_.plot(*point, "o", color=line.get_color())
        x_label, y_label = self._labels
        self.ax_.set(xlabel=x_label, ylabel=y_label)
        self.ax_.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        self.ax_.legend(loc="lower right", fontsize=8)
        return self

    def _summary(self) -> str:
        raise NotImplementedError

    def _curve(self, is_anomaly: NDArray[np.bool_], score: NDArray[Any]) -> Any:
        raise NotImplementedError

    def _point(self, is_anomaly: NDArray[np.bool_], flagged: NDArray[np.bool_]) -> Any:
        raise NotImplementedError


class AnomalyRocCurveDisplay(CurveDisplay):
    """Share of anomalies found over the share of normal samples flagged.

    The ROC curve of a detector, the anomaly being the positive class; a dot marks its
    threshold. Make one with `from_estimator` or `from_predictions`.

    See Also
    --------
    skdeepad.metrics.anomaly_roc_auc_score : The area under it.

    Examples
    --------
    >>> from skdeepad.inspection import AnomalyRocCurveDisplay
    >>> display = AnomalyRocCurveDisplay.from_predictions(
    ...     [1, 1, 1, -1], [0.3, 0.2, 0.4, -0.5], threshold=0, name="example"
    ... )
    >>> display.ax_.get_legend().get_texts()[0].get_text()
    'example (AUROC 1.000)'
    """

    _labels: ClassVar = ("normal samples flagged", "anomalies found")

    def _summary(self) -> str:
        return f"AUROC {anomaly_roc_auc_score(self.y_true, self.y_score):.3f}"

    def _curve(self, is_anomaly: NDArray[np.bool_], score: NDArray[Any]) -> Any:
        return roc_curve(is_anomaly, score)[:2]

    def _point(self, is_anomaly: NDArray[np.bool_], flagged: NDArray[np.bool_]) -> Any:
        return flagged[~is_anomaly].mean(), flagged[is_anomaly].mean()


class AnomalyPrecisionRecallDisplay(CurveDisplay):
    """Share of flagged samples that are anomalies, over the share of anomalies found.

    The precision-recall curve of a detector, the anomaly being the positive class; a
    dot marks its threshold. Make one with `from_estimator` or `from_predictions`.

    See Also
    --------
    skdeepad.metrics.anomaly_average_precision_score : The area under it.

    Examples
    --------
    >>> from skdeepad.inspection import AnomalyPrecisionRecallDisplay
    >>> display = AnomalyPrecisionRecallDisplay.from_predictions(
    ...     [1, 1, 1, -1], [0.3, 0.2, 0.4, -0.5], threshold=0, name="example"
    ... )
    >>> display.ax_.get_legend().get_texts()[0].get_text()
    'example (average precision 1.000)'
    """

    _labels: ClassVar = ("anomalies found (recall)", "anomalies among the flagged")
    _drawstyle: ClassVar = "steps-post"

    def _summary(self) -> str:
        found = anomaly_average_precision_score(self.y_true, self.y_score)
        return f"average precision {found:.3f}"

    def _curve(self, is_anomaly: NDArray[np.bool_], score: NDArray[Any]) -> Any:
        precision, recall, _ = precision_recall_curve(is_anomaly, score)
        return recall, precision

    def _point(self, is_anomaly: NDArray[np.bool_], flagged: NDArray[np.bool_]) -> Any:
        precision = is_anomaly[flagged].mean() if flagged.any() else np.nan
        return flagged[is_anomaly].mean(), precision
