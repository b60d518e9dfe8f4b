"""Where in the image: scores of positions -> maps at the size of the images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.utils._param_validation import Interval

from ..base import AnomalyDetector, threshold_below
from ..features import BackboneEstimator
from ..inputs import ImagePaths
from ..localization import fit_size, refine, regions_above
from ..parameters import ParametersMixin

if TYPE_CHECKING:

    class Detector(AnomalyDetector, BackboneEstimator):
        """What the mixin is mixed into."""

else:  # with those as bases, their defaults would hide those of a detector's bases
    Detector = ParametersMixin


class AnomalyMapMixin(Detector):
    """Maps of images, for detectors that score positions.

    A subclass defines ``_position_scores(inputs)``.

    Parameters
    ----------
    sigma : float, default=4.0
        Standard deviation of the Gaussian filter that maps are smoothed with, in
        pixels of the images at `image_size`; 0 for none.
    opening : bool, default=True
        Whether maps are opened by a 3 x 3 ellipse, which removes specks.

    Attributes
    ----------
    map_offset_ : float
        The threshold on maps: the share of new normal images whose map exceeds it
        anywhere is `contamination`, by the maps of held-out images. NaN where there
        are no maps.
    """

    sigma: float = 4.0
    opening: bool = True

    _parameter_constraints: ClassVar = {
        "sigma": [Interval(Real, 0, None, closed="left")],
        "opening": ["boolean"],
    }

    def _position_scores(
        self, inputs: Any
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float32]]]:
        """Give positions in X, and scores of shape (n, height, width), by batches.

        Higher = more anomalous, on a raster of any size.
        """
        raise NotImplementedError

    def anomaly_map(self, X: Any) -> Any:
        """Show where in images the anomaly is.

        Parameters
        ----------
        X : array-like or sequence of paths
            Images, in any form that `fit` takes.

        Returns
        -------
        ndarray of float32, shape (n_samples, height, width)
            A map of each image, at its size: 0 at least, higher = more anomalous, on
            one scale for all images; normal ones seldom exceed `map_offset_`. A list
            of maps where files differ in size. NaN for files skipped by
            ``on_error="skip"``.

        Raises
        ------
        ValueError
            If X holds vectors, or if the stages that are scored have no maps.
        """
        inputs: Any = self._check_inputs(X)
        self._check_maps()
        size: Any = self.image_size_
        maps = [np.full(size, np.nan, np.float32) for _ in range(len(inputs))]
        for i, found in self._maps(inputs):
            maps[i] = found
        same_size = len({found.shape for found in maps}) == 1
        return np.stack(maps) if same_size else maps

    def locate(self, X: Any) -> Any:
        """List the regions of anomalous images where the map exceeds `map_offset_`.

        Parameters
        ----------
        X : array-like or sequence of paths
            Images, in any form that `fit` takes.

        Returns
        -------
        pandas.DataFrame
            One row for each region of an image that `predict` calls an anomaly, the
            highest peak of each image first. Other images have no row.

            position : int
                Of the image in X.
            file : str
                Its path, where X holds paths.
            decision : float
                Of the image, by ``decision_function``: negative.
            p_value : float
                Of the image, by ``p_values``.
            top, left, bottom, right : int
                The region's box in pixels, from row ``top`` to row ``bottom - 1``.
            area : int
                Number of pixels of the region (connected, diagonals included).
            peak : float
                The largest value of the map in it.

        Raises
        ------
        ImportError
            If pandas is not installed.
        ValueError
            If the detector has no maps, or has learnt no threshold for them.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "locate gives a pandas.DataFrame. Install pandas: pip install pandas."
            ) from error
        inputs: Any = self._check_inputs(X)
        self._check_maps()
        level = getattr(self, "map_offset_", np.nan)  # files of 0.1.0 have none
        if np.isnan(level):
            raise ValueError(
                "No threshold was learnt for these maps (map_offset_ is NaN), so there "
                "are no regions to list. Use anomaly_map, or a detector whose "
                "map_offset_ is a number, such as PatchDetector()."
            )
        scores = self.score_samples(X)
        of_images: dict[str, Any] = {
            "decision": scores - self.offset_,
            "p_value": self._p_values(scores),
        }
        flagged = np.flatnonzero(of_images["decision"] < 0)
        if isinstance(inputs, ImagePaths):
            of_images = {"file": inputs.rows.astype(str), **of_images}
        rows = [
            {
                "position": flagged[i],
                **{name: values[flagged[i]] for name, values in of_images.items()},
                **region,
            }
            for i, found in self._maps(inputs.take(flagged))
            for region in sorted(regions_above(found, level), key=lambda r: -r["peak"])
        ]
        box = ("top", "left", "bottom", "right", "area", "peak")
        return pd.DataFrame(rows, columns=["position", *of_images, *box])

    def _check_maps(self) -> None:
        """Raise an error if there are no maps."""
        if self.image_size_ is None:
            raise ValueError("Maps are for images, but the backbone takes vectors.")

    def _maps(self, inputs: Any) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Give positions of images that can be read, and their maps."""
        return self._drawn(inputs, self._position_scores(inputs))

    def _drawn(
        self, inputs: Any, batches: Iterable[tuple[NDArray[np.intp], NDArray[Any]]]
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Draw maps of scores of positions."""
        for index, scores in batches:
            for i, found in zip(index, self._refined(scores), strict=True):
                yield int(i), fit_size(found, inputs.size(i))

    def _refined(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Turn scores of positions into maps at the size that the network sees."""
        size: Any = self.image_size_
        at_size = np.stack([fit_size(found, size) for found in scores])
        return refine(at_size, self.sigma, self.opening)

    def _learn_map_offset(self, held_out: Any) -> None:
        """Set the threshold on maps by the maps of images held out of training."""
        peaks = [float(np.max(found)) for _, found in self._maps(held_out)]
        self._map_peaks = np.array(peaks)
        self._set_map_offset()

    def _set_map_offset(self) -> None:
        self.map_offset_ = -threshold_below(-self._map_peaks, self.contamination)

    def _recalibrate(
        self, X: Any, scores: NDArray[np.float64] | None, good: NDArray[np.bool_] | None
    ) -> None:
        super()._recalibrate(X, scores, good)
        if not np.isnan(getattr(self, "map_offset_", np.nan)):
            if good is not None:
                inputs = self._check_inputs(X)
                self._learn_map_offset(inputs.take(np.flatnonzero(good)))
            else:
                self._set_map_offset()
