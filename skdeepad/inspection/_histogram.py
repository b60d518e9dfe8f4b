"""How scores are spread."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_consistent_length
from sklearn.utils._optional_dependencies import check_matplotlib_support

from ._display import DetectorDisplay


class ScoreHistogramDisplay(DetectorDisplay):
    """How scores of normal samples and of anomalies are spread, and the threshold.

    Make one with `from_estimator` or `from_predictions`.

    Parameters
    ----------
    y_score : ndarray of shape (n_samples,)
        The scores, higher = more normal.
    y_true : ndarray of shape (n_samples,), default=None
        +1 for normal samples, -1 for anomalies. None: not known.
    threshold : float, default=None
        Samples below it count as anomalies.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
        Where it is drawn.

    Examples
    --------
    >>> from skdeepad.inspection import ScoreHistogramDisplay
    >>> display = ScoreHistogramDisplay.from_predictions(
    ...     [1, 1, 1, -1], [0.3, 0.2, 0.4, -0.5], threshold=0
    ... )
    >>> display.ax_.get_xlabel()
    'score (higher = more normal)'
    """

    def __init__(
        self,
        *,
        y_score: NDArray[np.float64],
        y_true: NDArray[Any] | None = None,
        threshold: float | None = None,
    ) -> None:
        self.y_score = y_score
        self.y_true = y_true
        self.threshold = threshold

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any, y: ArrayLike | None = None, **kwargs: Any
    ) -> Self:
        """Draw ``decision_function`` of a fitted detector.

        Parameters
        ----------
        y : array-like of shape (n_samples,), default=None
            +1 for normal samples, -1 for anomalies. None: not known.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        scores = estimator.decision_function(X)
        return cls.from_predictions(y, scores, threshold=0.0, **kwargs)

    @classmethod
    def from_predictions(
        cls,
        y_true: ArrayLike | None,
        y_score: ArrayLike,
        *,
        threshold: float | None = None,
        **kwargs: Any,
    ) -> Self:
        """Draw scores that were made before.

        Parameters
        ----------
        y_true : array-like of shape (n_samples,) or None
            +1 for normal samples, -1 for anomalies. None: not known.
        y_score : array-like of shape (n_samples,)
            The scores, higher = more normal.
        threshold : float, default=None
            Samples below it count as anomalies.

        Raises
        ------
        ValueError
            If there are not as many labels as scores.
        """
        check_matplotlib_support(f"{cls.__name__}.from_predictions")
        check_consistent_length(y_true, y_score)
        display = cls(
            y_score=np.asarray(y_score, dtype=np.float64),
            y_true=None if y_true is None else np.asarray(y_true),
            threshold=threshold,
        )
        return display.plot(**kwargs)

    def plot(self, ax: Any = None, *, bins: int = 40) -> Self:
        """Draw the histogram.

        Parameters
        ----------
        bins : int, default=40
            Number of bins, shared by normal samples and anomalies.
        """
        self.ax_ = self._place(ax)[()]
        known = np.isfinite(self.y_score)
        edges = np.histogram_bin_edges(self.y_score[known], bins)
        kinds = {"samples": known}
        if self.y_true is not None:
            kinds = {
                "normal": known & (self.y_true == 1),
                "anomalous": known & (self.y_true == -1),
            }
        colours = {"samples": "C0", "normal": "C0", "anomalous": "C3"}
        for name, kind in kinds.items():
            self.ax_.hist(
                self.y_score[kind],
                edges.tolist(),
                alpha=0.6,
                label=name,
                color=colours[name],
            )
        if self.threshold is not None:
            self.ax_.axvline(
                self.threshold, color="black", linestyle="--", label="threshold"
            )
        self.ax_.set_xlabel("score (higher = more normal)")
        self.ax_.set_ylabel("samples")
        self.ax_.legend()
        return self
