"""How the loss falls in training."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils._optional_dependencies import check_matplotlib_support
from sklearn.utils.validation import check_is_fitted

from ._display import DetectorDisplay

WINDOW = 20  # a share of 1/20 of the steps is averaged


class LossCurveDisplay(DetectorDisplay):
    """The loss of each training step, and its moving average.

    Make one with `from_estimator` or `from_predictions`.

    Parameters
    ----------
    loss_curve : ndarray of shape (n_steps,)
        The loss of each step.
    name : str, default=None
        What is trained.

    Attributes
    ----------
    ax_ : matplotlib.axes.Axes
        Where it is drawn.

    Examples
    --------
    >>> import numpy as np
    >>> from skdeepad.inspection import LossCurveDisplay
    >>> curve = 1 / np.arange(1, 101)
    >>> display = LossCurveDisplay.from_predictions(curve, name="example")
    >>> display.ax_.get_xlabel()
    'step'
    """

    def __init__(
        self, *, loss_curve: NDArray[np.float64], name: str | None = None
    ) -> None:
        self.loss_curve = loss_curve
        self.name = name

    @classmethod
    def from_estimator(
        cls, estimator: Any, *, name: str | None = None, **kwargs: Any
    ) -> Self:
        """Draw the ``loss_curve_`` of a fitted detector.

        Parameters
        ----------
        estimator : detector with ``loss_curve_``
            The fitted detector.
        name : str, default=None
            What the curve is called. None: the name of the class.

        Raises
        ------
        ValueError
            If the detector has no ``loss_curve_``: it does not train in steps.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        check_is_fitted(estimator)
        if not hasattr(estimator, "loss_curve_"):
            raise ValueError(
                f"{type(estimator).__name__} has no loss_curve_: it does not train a "
                "network. Detectors that do are, for example, KDClonerEstimator and "
                "DeepSVDD."
            )
        name = type(estimator).__name__ if name is None else name
        return cls.from_predictions(estimator.loss_curve_, name=name, **kwargs)

    @classmethod
    def from_predictions(
        cls, loss_curve: ArrayLike, *, name: str | None = None, **kwargs: Any
    ) -> Self:
        """Draw the losses of steps.

        Parameters
        ----------
        loss_curve : array-like of shape (n_steps,)
            The loss of each step.
        name : str, default=None
            What the curve is called.
        """
        check_matplotlib_support(f"{cls.__name__}.from_predictions")
        display = cls(loss_curve=np.asarray(loss_curve, dtype=np.float64), name=name)
        return display.plot(**kwargs)

    def plot(self, ax: Any = None) -> Self:
        """Draw the curve."""
        self.ax_ = self._place(ax)[()]
        steps = np.arange(1, len(self.loss_curve) + 1)
        (line,) = self.ax_.plot(steps, self.loss_curve, alpha=0.35, linewidth=0.8)
        width = max(1, len(steps) // WINDOW)
        averaged = np.convolve(self.loss_curve, np.full(width, 1 / width), "valid")
        name = self.name or "loss"
        label = name if width == 1 else f"{name} (mean of {width} steps)"
        self.ax_.plot(steps[width - 1 :], averaged, color=line.get_color(), label=label)
        self.ax_.set(xlabel="step", ylabel="training loss")
        self.ax_.legend()
        return self
