"""Images, their anomaly maps, and the verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import check_consistent_length
from sklearn.utils._optional_dependencies import check_matplotlib_support

from ..inputs import ImagePaths, check_inputs, chunks, load_batches, read_mask
from ._display import DetectorDisplay

PER_PAGE = 6  # images of a figure


class AnomalyMapDisplay(DetectorDisplay):
    """Images, their anomaly maps, and both together.

    Make one with `from_estimator` or `from_predictions`.

    Parameters
    ----------
    images : list of ndarray, each of shape (height, width) or (height, width, 3)
        The images, in [0, 1]; None for one that could not be read.
    anomaly_maps : list of ndarray, each of shape (height, width)
        Their maps, higher = more anomalous.
    masks : list of ndarray, each of shape (height, width), default=None
        True where the defects are.
    level : float, default=None
        The threshold on maps: the contour, and the middle of the colour scale, which
        starts at 0. None: no contour, and a scale from the least to the greatest value
        of all maps.
    decisions : ndarray of shape (n_images,), default=None
        ``decision_function`` of the images: negative for anomalies, and only those have
        a contour. None: not known, and all have one.
    names : list of str, default=None
        What the images are called.

    Attributes
    ----------
    axes_ : ndarray of matplotlib.axes.Axes, shape (n_images_of_the_page, 3)
        For each image: itself, its map, and the map over it where it exceeds `level`,
        with a contour.

    See Also
    --------
    skdeepad.KDClonerEstimator : A detector that localizes.

    Examples
    --------
    >>> import numpy as np
    >>> from skdeepad.inspection import AnomalyMapDisplay
    >>> rng = np.random.default_rng(0)
    >>> images, maps = rng.random((2, 16, 16)), rng.random((2, 16, 16))
    >>> display = AnomalyMapDisplay.from_predictions(images, maps, level=0.9)
    >>> display.axes_.shape
    (2, 3)
    """

    def __init__(
        self,
        *,
        images: list[NDArray[Any] | None],
        anomaly_maps: list[NDArray[Any]],
        masks: list[NDArray[Any]] | None = None,
        level: float | None = None,
        decisions: NDArray[np.float64] | None = None,
        names: list[str] | None = None,
    ) -> None:
        self.images = images
        self.anomaly_maps = anomaly_maps
        self.masks = masks
        self.level = level
        self.decisions = decisions
        self.names = names

    @property
    def n_pages(self) -> int:
        """How many pages there are for `plot`."""
        return -(-len(self.images) // PER_PAGE)

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
            Images, in any form that it takes.
        masks : array-like of shape (n_images, height, width), or sequence, default=None
            Where the defects are, drawn as an outline: for each image an array, the
            path of a file, or None.

        Returns
        -------
        AnomalyMapDisplay
            The display, with its first page drawn (or `page`).
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        level = getattr(estimator, "map_offset_", np.nan)
        return cls.from_predictions(
            X,
            estimator.anomaly_map(X),
            masks=masks,
            level=None if np.isnan(level) else level,
            # classifiers decide between their classes
            decisions=estimator.score_samples(X) - estimator.offset_,
            image_shape=getattr(estimator, "image_shape", None),
            **kwargs,
        )

    @classmethod
    def from_predictions(
        cls,
        X: Any,
        anomaly_maps: Any,
        *,
        masks: Any = None,
        level: float | None = None,
        decisions: ArrayLike | None = None,
        image_shape: tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Draw maps that were made before.

        Parameters
        ----------
        X : array-like or sequence of paths
            The images.
        anomaly_maps : array-like of shape (n_images, height, width), or list of maps
            Their maps; NaN where an image could not be read.
        masks : array-like of shape (n_images, height, width), or sequence, default=None
            Where the defects are, drawn as an outline: for each image an array, the
            path of a file, or None.
        level : float, default=None
            The threshold on maps, such as ``map_offset_``. None: no contour.
        decisions : array-like of shape (n_images,), default=None
            ``decision_function`` of the images: negative for anomalies.
        image_shape : tuple of int, default=None
            (channels, height, width) or (height, width), where X does not tell.

        Returns
        -------
        AnomalyMapDisplay
            The display, with its first page drawn (or `page`).

        Raises
        ------
        ValueError
            If there are not as many images as maps, masks or decisions, or if an image
            that has a map cannot be read.
        """
        check_matplotlib_support(f"{cls.__name__}.from_predictions")
        inputs = check_inputs(
            BaseEstimator(), X, vectors=False, image_shape=image_shape, reset=True
        )
        maps = list(map(np.asarray, anomaly_maps))
        check_consistent_length(maps, masks, decisions, np.empty(len(inputs)))
        names = [f"X[{i}]" for i in range(len(inputs))]
        if isinstance(inputs, ImagePaths):  # folders tell kinds of defects apart
            names = ["/".join(Path(path).parts[-2:]) for path in inputs.rows]
        images = _read_images(inputs, maps)
        display = cls(
            images=images,
            anomaly_maps=maps,
            masks=None if masks is None else _read_masks(masks, images, maps),
            level=level,
            decisions=None if decisions is None else np.asarray(decisions, np.float64),
            names=names,
        )
        return display.plot(**kwargs)

    def plot(
        self,
        *,
        page: int = 0,
        axes: Any = None,
        cmap: str = "inferno",
        alpha: float = 0.5,
    ) -> Self:
        """Draw three pictures for each of up to six images.

        Parameters
        ----------
        page : int, default=0
            Which six of many images, from 0 to ``n_pages - 1``.
        axes : array of matplotlib.axes.Axes, shape (n_images_of_the_page, 3), \
default=None
            Where to draw. None: on a new figure.
        cmap : str, default="inferno"
            Colours of the maps; all of them are on one scale.
        alpha : float, default=0.5
            Opacity of the map over the image, in [0, 1].

        Raises
        ------
        ValueError
            If there is no such page.
        """
        if not 0 <= page < self.n_pages:
            raise ValueError(f"page={page} must be from 0 to {self.n_pages - 1}.")
        shown = range(len(self.images))[page * PER_PAGE : (page + 1) * PER_PAGE]
        size = (6.6, 2.1 * len(shown) + 0.3)
        self.axes_ = self._place(axes, (len(shown), 3), figsize=size)
        low, high = self._scale()
        colours = {"cmap": cmap, "vmin": low, "vmax": high}
        for row, i in zip(self.axes_, shown, strict=True):
            self._draw(row, i, colours, alpha)
        if len(shown) < len(self.images):
            which = f"images {shown[0] + 1} to {shown[-1] + 1} of {len(self.images)}"
            self.figure_.suptitle(f"{which} (page={page})", fontsize=9)
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        scale = ScalarMappable(Normalize(low, high), cmap)
        bar = self.figure_.colorbar(
            scale,
            ax=list(self.axes_.flat),
            extend="neither" if self.level is None else "max",
            label="anomaly map",
            aspect=8 * len(shown),
        )
        if self.level is not None:
            bar.ax.axhline(self.level, color="white")
            bar.ax.annotate(
                "threshold",
                (0.5, self.level),
                color="white",
                ha="center",
                va="bottom",
                rotation=90,
                fontsize=7,
                xytext=(0, 3),
                textcoords="offset points",
            )
        return self

    def _scale(self) -> tuple[float, float]:
        """Give the ends of the colour scale."""
        if self.level is not None and self.level > 0:
            return 0.0, 2 * self.level
        found = np.concatenate([m[np.isfinite(m)] for m in self.anomaly_maps])
        return (float(found.min()), float(found.max())) if len(found) else (0.0, 1.0)

    def _draw(self, row: Any, i: int, colours: dict[str, Any], alpha: float) -> None:
        image, found = self.images[i], self.anomaly_maps[i]
        for ax in row:
            ax.set_axis_off()
        for ax, title in zip(row, self._titles(i), strict=True):
            ax.set_title(title, fontsize=8)
        if image is None:
            row[1].text(0.5, 0.5, "cannot be read", ha="center", va="center")
            return
        for ax in (row[0], row[2]):
            ax.imshow(image, cmap="gray", vmin=0, vmax=1)
        row[1].imshow(found, **colours)
        over: Any = np.full(found.shape, True)
        if self.level is not None:
            flagged = self.decisions is None or self.decisions[i] < 0
            over = flagged & (found > self.level)
        row[2].imshow(np.ma.masked_where(~over, found), alpha=alpha, **colours)
        if self.level is not None and over.any():
            row[2].contour(found, levels=[self.level], colors="white", linewidths=1)
        if self.masks is not None and self.masks[i].any():
            row[0].contour(self.masks[i], levels=[0.5], colors="red", linewidths=1)

    def _titles(self, i: int) -> Sequence[str]:
        """Name the image, what is shown, and the verdict."""
        name = "image" if self.names is None else _shortened(self.names[i])
        if self.decisions is None:
            return name, "map", "overlay"
        decision = self.decisions[i]
        if np.isnan(decision):
            return name, "", ""
        verdict = "normal" if decision >= 0 else "anomaly"
        return name, "map", f"{verdict}, score {decision:+.3g}"


def _read_images(inputs: Any, maps: list[NDArray[Any]]) -> list[NDArray[Any] | None]:
    """Give images as pictures; None for those that have no map and cannot be read."""
    images: list[NDArray[Any] | None] = []
    for batch in load_batches(inputs, chunks(np.arange(len(inputs)), 1), None, None):
        i = len(images)
        if batch.values is not None:
            image = batch.values[0].permute(1, 2, 0).numpy()
            images.append(image[..., 0] if image.shape[-1] == 1 else image)
        elif np.isnan(maps[i]).all():
            images.append(None)
        else:
            raise ValueError(f"X[{i}] cannot be read: {batch.failed}.")
    return images


def _read_masks(
    masks: Any, images: list[Any], maps: list[NDArray[Any]]
) -> list[NDArray[Any]]:
    readable = [
        None if image is None else mask
        for mask, image in zip(masks, images, strict=True)
    ]
    return [
        read_mask(mask, found.shape, f"masks[{i}]")
        for i, (mask, found) in enumerate(zip(readable, maps, strict=True))
    ]


def _shortened(name: str, length: int = 28) -> str:
    """Cut the beginning off a long name, so that titles do not overlap."""
    return name if len(name) <= length else f"…{name[1 - length :]}"
