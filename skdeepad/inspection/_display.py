"""What the displays share: their documentation, and axes to draw on."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.utils._optional_dependencies import check_matplotlib_support

from ..parameters import DocumentedMixin


class Display(DocumentedMixin):
    """Base of the displays, which `plot` draws.

    Attributes
    ----------
    figure_ : matplotlib.figure.Figure
        The figure.
    """

    figure_: Any

    def plot(self, *args: Any, **kwargs: Any) -> Self:
        """Draw.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, default=None
            Where to draw, perhaps beside others. None: on a new figure.
        axes : array of matplotlib.axes.Axes, shape (3,), default=None
            Where to draw. None: on a new figure.

        Returns
        -------
        display
            The display itself.

        Raises
        ------
        ImportError
            If matplotlib is not installed: ``pip install "skdeepad[plot]"``.
        """
        raise NotImplementedError

    def _place(self, given: Any, shape: tuple[int, ...] = (), **options: Any) -> Any:
        """Give the axes to draw on: those given, or a new figure's, and its figure."""
        check_matplotlib_support(f"{type(self).__name__}.plot")
        import matplotlib.pyplot as plt

        if given is None:
            rows, columns = (1, 1, *shape)[-2:]
            _, given = plt.subplots(
                rows, columns, squeeze=False, layout="constrained", **options
            )
        axes = np.asarray(given, dtype=object).reshape(shape)
        self.figure_ = axes.flat[0].figure
        return axes


class DetectorDisplay(Display):
    """Base of the displays of one detector, or of what it gave."""

    @classmethod
    def from_estimator(cls, *args: Any, **kwargs: Any) -> Self:
        """Draw what a fitted detector gives.

        Parameters
        ----------
        estimator : detector
            The fitted detector, or a pipeline that ends in one; scikit-learn's outlier
            detectors, too.
        X : array-like or sequence of paths
            Samples, in any form that it takes.
        **kwargs
            As in `plot`.

        Returns
        -------
        display
            The display, drawn.

        Raises
        ------
        ImportError
            If matplotlib is not installed: ``pip install "skdeepad[plot]"``.
        """
        raise NotImplementedError

    @classmethod
    def from_predictions(cls, *args: Any, **kwargs: Any) -> Self:
        """Draw what was computed before.

        Parameters
        ----------
        **kwargs
            As in `plot`.

        Returns
        -------
        display
            The display, drawn.

        Raises
        ------
        ImportError
            If matplotlib is not installed: ``pip install "skdeepad[plot]"``.
        """
        raise NotImplementedError
