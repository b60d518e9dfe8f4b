"""Where in the image: scores of positions -> maps at the size of the images."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.utils._param_validation import Interval

from ..base import AnomalyDetector, threshold_below
from ..features import BackboneEstimator
from ..localization import fit_size, refine


class AnomalyMapMixin(AnomalyDetector, BackboneEstimator):
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

        Scores are 0 at least, higher = more anomalous, on a raster of any size.
        """
        raise NotImplementedError

    def anomaly_map(self, X: Any) -> Any:
        """Show where in images the anomaly is.

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
        maps = self._maps(inputs)
        same_size = len({found.shape for found in maps}) == 1
        return np.stack(maps) if same_size else maps

    def _check_maps(self) -> None:
        """Raise an error if there are no maps."""
        if self.image_size_ is None:
            raise ValueError("anomaly_map is for images; the backbone takes vectors.")

    def _maps(self, inputs: Any) -> list[NDArray[np.float32]]:
        size: Any = self.image_size_
        maps = [np.full(size, np.nan, np.float32) for _ in range(len(inputs))]
        for index, scores in self._position_scores(inputs):
            for i, found in zip(index, self._refined(scores), strict=True):
                maps[i] = fit_size(found, inputs.size(i))
        return maps

    def _refined(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Turn scores of positions into maps at the size that the network sees."""
        size: Any = self.image_size_
        at_size = np.stack([fit_size(found, size) for found in scores])
        return refine(at_size, self.sigma, self.opening)

    def _learn_map_offset(self, held_out: Any) -> None:
        """Set the threshold on maps by the maps of images held out of training."""
        largest = np.array([np.max(found) for found in self._maps(held_out)])
        self.map_offset_ = -threshold_below(-largest, self.contamination)
