"""Pictures: maps over their images, and histograms of scores.

After scikit-learn's displays: ``from_estimator`` and ``from_predictions`` make and draw
one, ``plot`` draws it anew.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import check_consistent_length
from sklearn.utils._optional_dependencies import check_matplotlib_support

from .inputs import check_inputs, chunks, load_batches

__all__ = ["AnomalyMapDisplay", "RepresentationDisplay", "ScoreHistogramDisplay"]

# Figures 3, 4 and 5 of the poster: column -> label
REPRESENTATION_COLUMNS = {
    "mahalanobis_auroc": "Mahalanobis, AUROC",
    "separability": "separability, balanced accuracy",
    "brittleness": "brittleness",
}


class AnomalyMapDisplay:
    """Images, their anomaly maps, and both together.

    Make one with `from_estimator` or `from_predictions`.

    Parameters
    ----------
    images : list of ndarray, each of shape (height, width) or (height, width, 3)
        The images, in [0, 1].
    anomaly_maps : list of ndarray, each of shape (height, width)
        Their maps, higher = more anomalous.
    masks : list of ndarray, each of shape (height, width), default=None
        True where the defects are.

    Attributes
    ----------
    axes_ : ndarray of matplotlib.axes.Axes, shape (n_images, 3)
        For each image: itself, its map, and the map over it, with a contour.
    figure_ : matplotlib.figure.Figure
        The figure.

    See Also
    --------
    skdeepad.KDClonerEstimator : A detector that localizes.

    Examples
    --------
    >>> import numpy as np
    >>> from skdeepad.inspection import AnomalyMapDisplay
    >>> rng = np.random.default_rng(0)
    >>> images, maps = rng.random((2, 16, 16)), rng.random((2, 16, 16))
    >>> display = AnomalyMapDisplay.from_predictions(images, maps)
    >>> display.axes_.shape
    (2, 3)
    """

    def __init__(
        self,
        *,
        images: list[NDArray[Any]],
        anomaly_maps: list[NDArray[Any]],
        masks: list[NDArray[Any]] | None = None,
    ) -> None:
        self.images = images
        self.anomaly_maps = anomaly_maps
        self.masks = masks

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any, *, masks: Any = None, **kwargs: Any
    ) -> Self:
        """Draw the maps that a fitted detector makes of images.

        Parameters
        ----------
        estimator : detector with ``anomaly_map``
            The fitted detector.
        X : array-like or sequence of paths
            A few images, in any form that it takes.
        masks : array-like of shape (n_images, height, width), default=None
            True where the defects are; drawn as an outline.
        **kwargs
            As in `plot`.

        Returns
        -------
        AnomalyMapDisplay
            The display, drawn.

        Raises
        ------
        ImportError
            If matplotlib is not installed: ``pip install "skdeepad[plot]"``.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        maps = estimator.anomaly_map(X)
        shape = getattr(estimator, "image_shape", None)
        return cls.from_predictions(X, maps, masks=masks, image_shape=shape, **kwargs)

    @classmethod
    def from_predictions(
        cls,
        X: Any,
        anomaly_maps: Any,
        *,
        masks: Any = None,
        image_shape: tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Draw maps that were made before.

        Parameters
        ----------
        X : array-like or sequence of paths
            The images.
        anomaly_maps : array-like of shape (n_images, height, width), or list of maps
            Their maps.
        masks : array-like of shape (n_images, height, width), default=None
            True where the defects are; drawn as an outline.
        image_shape : tuple of int, default=None
            (channels, height, width) or (height, width), where X does not tell.
        **kwargs
            As in `plot`.

        Returns
        -------
        AnomalyMapDisplay
            The display, drawn.

        Raises
        ------
        ImportError
            If matplotlib is not installed: ``pip install "skdeepad[plot]"``.
        ValueError
            If there are not as many images as maps.
        """
        check_matplotlib_support(f"{cls.__name__}.from_predictions")
        inputs = check_inputs(
            BaseEstimator(), X, vectors=False, image_shape=image_shape, reset=True
        )
        images: list[Any] = []
        for batch in load_batches(
            inputs, chunks(np.arange(len(inputs)), 1), None, None
        ):
            if batch.values is None:
                raise ValueError(f"X[{len(images)}] cannot be read: {batch.failed}.")
            image = batch.values[0].permute(1, 2, 0).numpy()
            images.append(image[..., 0] if image.shape[-1] == 1 else image)
        check_consistent_length(images, anomaly_maps, masks)
        display = cls(
            images=images,
            anomaly_maps=list(map(np.asarray, anomaly_maps)),
            masks=None if masks is None else list(map(np.asarray, masks)),
        )
        return display.plot(**kwargs)

    def plot(
        self,
        *,
        axes: Any = None,
        level: float | None = None,
        cmap: str = "inferno",
        alpha: float = 0.5,
    ) -> Self:
        """Draw three pictures for each image; all maps are on one scale.

        Parameters
        ----------
        axes : array of matplotlib.axes.Axes, shape (n_images, 3), default=None
            Where to draw. None: on a new figure.
        level : float, default=None
            The value of the contour. None: midway between the least and the greatest
            value of all maps.
        cmap : str, default="inferno"
            Colours of the maps.
        alpha : float, default=0.5
            Opacity of the map over the image, in [0, 1].

        Returns
        -------
        AnomalyMapDisplay
            The display itself.

        Raises
        ------
        ImportError
            If matplotlib is not installed: ``pip install "skdeepad[plot]"``.
        """
        check_matplotlib_support(f"{type(self).__name__}.plot")
        import matplotlib.pyplot as plt

        n = len(self.images)
        if axes is None:
            size = (6.0, 2.0 * n)
            _, axes = plt.subplots(
                n, 3, figsize=size, squeeze=False, layout="constrained"
            )
        self.axes_ = np.asarray(axes).reshape(n, 3)
        self.figure_ = self.axes_[0, 0].figure
        low = min(float(np.nanmin(m)) for m in self.anomaly_maps)
        high = max(float(np.nanmax(m)) for m in self.anomaly_maps)
        level = (low + high) / 2 if level is None else level
        colours = {"cmap": cmap, "vmin": low, "vmax": high}
        for i, (row, image, found) in enumerate(
            zip(self.axes_, self.images, self.anomaly_maps, strict=True)
        ):
            for ax in (row[0], row[2]):
                ax.imshow(image, cmap="gray", vmin=0, vmax=1)
            row[1].imshow(found, **colours)
            row[2].imshow(found, alpha=alpha, **colours)
            if found.min() < level < found.max():
                row[2].contour(found, levels=[level], colors="white", linewidths=1)
            if self.masks is not None and self.masks[i].any():
                row[0].contour(self.masks[i], levels=[0.5], colors="red", linewidths=1)
            for ax in row:
                ax.set_axis_off()
        for ax, title in zip(self.axes_[0], ("image", "map", "overlay"), strict=True):
            ax.set_title(title)
        return self


class ScoreHistogramDisplay:
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
    figure_ : matplotlib.figure.Figure
        The figure.

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
        estimator : detector
            The fitted detector.
        X : array-like or sequence of paths
            Samples, in any form that it takes.
        y : array-like of shape (n_samples,), default=None
            +1 for normal samples, -1 for anomalies. None: not known.
        **kwargs
            As in `plot`.

        Returns
        -------
        ScoreHistogramDisplay
            The display, drawn.

        Raises
        ------
        ImportError
            If matplotlib is not installed: ``pip install "skdeepad[plot]"``.
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
        **kwargs
            As in `plot`.

        Returns
        -------
        ScoreHistogramDisplay
            The display, drawn.

        Raises
        ------
        ImportError
            If matplotlib is not installed: ``pip install "skdeepad[plot]"``.
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
        ax : matplotlib.axes.Axes, default=None
            Where to draw. None: on a new figure.
        bins : int, default=40
            Number of bins, shared by normal samples and anomalies.

        Returns
        -------
        ScoreHistogramDisplay
            The display itself.

        Raises
        ------
        ImportError
            If matplotlib is not installed: ``pip install "skdeepad[plot]"``.
        """
        check_matplotlib_support(f"{type(self).__name__}.plot")
        import matplotlib.pyplot as plt

        self.ax_ = plt.subplots()[1] if ax is None else ax
        self.figure_ = self.ax_.figure
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


class RepresentationDisplay:
    """What goes with good detection: three scatter plots of representations.

    Detection by knowledge distillation against the Mahalanobis distance, against
    separability and against brittleness: Figures 3 to 5 of [1]_, with the correlations
    over all representations.

    Parameters
    ----------
    table : pandas.DataFrame
        What `skdeepad.representation.compare_representations` gives, with anomalies.

    Attributes
    ----------
    axes_ : ndarray of matplotlib.axes.Axes, shape (3,)
        The plots.
    figure_ : matplotlib.figure.Figure
        The figure.

    References
    ----------
    .. [1] K. T. Mai, T. Davies, L. D. Griffin, "Brittle Features May Help Anomaly
       Detection", arXiv:2104.10453, 2021.

    Examples
    --------
    >>> import pandas as pd
    >>> from skdeepad.inspection import RepresentationDisplay
    >>> table = pd.DataFrame({
    ...     "backbone": ["a", "a", "b"],
    ...     "kd_auroc": [0.9, 0.8, 0.7],
    ...     "mahalanobis_auroc": [0.95, 0.9, 0.7],
    ...     "separability": [0.99, 0.98, 0.99],
    ...     "brittleness": [20.0, 5.0, 3.0],
    ... })
    >>> RepresentationDisplay(table=table).plot().axes_.shape
    (3,)
    """

    def __init__(self, *, table: Any) -> None:
        self.table = table

    def plot(self, axes: Any = None) -> Self:
        """Draw.

        Parameters
        ----------
        axes : array of matplotlib.axes.Axes, shape (3,), default=None
            Where to draw; a new figure's where none are given.

        Returns
        -------
        RepresentationDisplay
            The display itself.

        Raises
        ------
        ValueError
            If the table has no column of detection: it was made without anomalies.
        ImportError
            If matplotlib is not installed: ``pip install "skdeepad[plot]"``.
        """
        check_matplotlib_support(f"{type(self).__name__}.plot")
        import matplotlib.pyplot as plt

        if "kd_auroc" not in self.table:
            raise ValueError(
                "table has no column 'kd_auroc'. Compute it with anomalies: "
                "compare_representations(backbones, X, X_anomalous)."
            )
        if axes is None:
            _, axes = plt.subplots(
                1, 3, figsize=(12, 4), sharey=True, layout="constrained"
            )
        axes = np.asarray(axes)
        for ax, column in zip(axes, REPRESENTATION_COLUMNS, strict=True):
            for name, group in self.table.groupby("backbone", sort=False):
                ax.scatter(group[column], group["kd_auroc"], label=name)
            pair = self.table[[column, "kd_auroc"]]
            linear, ranks = (
                pair.corr(method).iloc[0, 1] for method in ("pearson", "spearman")
            )
            ax.set_title(f"Pearson {linear:.2f}, Spearman {ranks:.2f}", fontsize=10)
            ax.set_xlabel(REPRESENTATION_COLUMNS[column])
        axes[2].set_xscale("log")
        axes[0].set_ylabel("knowledge distillation, AUROC")
        axes[0].legend(fontsize=7)
        self.axes_, self.figure_ = axes, axes[0].figure
        return self
