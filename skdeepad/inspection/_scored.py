"""Images read once: what a detector says of them, where, and how they look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from ..base import conformal_p_values
from ..checks import plain
from ..conformal import false_alarm_interval
from ..inference import report_unreadable
from ..inputs import ImagePaths, check_inputs, chunks, load_batches, open_inputs
from ..progress import Progress, silence

BATCH = 32
VIEW = (256, 256)  # pixels, where the detector's own resize is too small to look at


@dataclass(frozen=True)
class Scored:
    """Some of the images.

    Attributes
    ----------
    index : ndarray of int, shape (n,)
        Positions in X of those that could be read.
    pixels : ndarray of float32, shape (n, channels, height, width)
        In [0, 1]; the aspect is not kept.
    scores : ndarray of float64, shape (n,)
    maps : sequence of ndarray, or None
        Of any size, higher = more anomalous.
    failed : dict of int to str
        Positions in X of those that could not be read, and why.
    """

    index: NDArray[np.intp]
    pixels: NDArray[np.float32]
    scores: NDArray[np.float64]
    maps: Sequence[NDArray[Any]] | None
    failed: dict[int, str]


class Threshold:
    """The threshold of a fitted detector, and what it was set by.

    Attributes
    ----------
    offset : float
        Scores below it are those of anomalies.
    contamination : float or None
        The share of new good images that may be flagged.
    held_out : ndarray of float64, or None
        Scores of training images as if they were new.
    """

    def __init__(self, detector: Any) -> None:
        # that of a pipeline is in its last step
        self.last = detector.steps[-1][1] if hasattr(detector, "steps") else detector
        offset = getattr(self.last, "offset_", None)
        if offset is None or np.ndim(offset):
            raise ValueError(
                f"{type(self.last).__name__} has no threshold (offset_). Fit an "
                "outlier detector, with a contamination."
            )
        self.offset = float(offset)
        self.held_out = getattr(self.last, "held_out_scores_", None)
        share = getattr(self.last, "contamination", None)
        self.contamination = share if isinstance(share, float) else None

    def p_values(self, scores: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """Give p-values, where there are held-out scores."""
        if self.held_out is None:
            return None
        return conformal_p_values(self.held_out, scores)

    def false_alarms(self, n: int = 1) -> tuple[float, float, float] | None:
        """Give how many of n good images are flagged, and a 95 % interval for it."""
        if self.held_out is None or self.contamination is None:
            return None
        low, high = false_alarm_interval(self.last)
        return n * self.contamination, n * low, n * high


class ScoredImages:
    """A detector's scores of images, in batches.

    Parameters
    ----------
    detector : detector
        A fitted detector.
    X : array-like, sequence of paths or folder
        Images.
    maps : bool
        Whether maps are made, if the detector has any.
    pictures : bool
        Whether pixels are fit to be looked at.
    verbose : bool, int or "auto"
        Whether to show a bar.

    Attributes
    ----------
    names : list of str
        Of the images: their paths, or "X[0]".
    no_maps : str or None
        Why there are no maps, although they were wanted.
    """

    def __init__(
        self, detector: Any, X: Any, *, maps: bool, pictures: bool, verbose: Any
    ) -> None:
        self.X = plain(open_inputs(X))
        skipping = _Skipping(getattr(detector, "white", None))
        shape = getattr(detector, "image_shape", None)
        self.inputs: Any = check_inputs(
            skipping, self.X, vectors=False, image_shape=shape, reset=True
        )
        self.detector, self.maps, self.verbose = detector, maps, verbose
        self.size, self.channels, self.as_seen = VIEW, 3, False
        if hasattr(detector, "backbone_") and detector.memory is None:
            size, backbone = detector.image_size_, detector.backbone_
            settled = backbone.in_channels and (
                detector.image_size or backbone.input_size
            )
            if settled and not (pictures and min(size) < VIEW[0] // 2):
                # what the detector would make of a file: it need not be read again
                self.size, self.channels, self.as_seen = (
                    size,
                    backbone.in_channels,
                    True,
                )
        self.names = [f"X[{i}]" for i in range(len(self.inputs))]
        if type(self.inputs) is ImagePaths:
            self.names = [str(path) for path in self.inputs.rows]
        self.no_maps: str | None = None
        if maps and not hasattr(detector, "anomaly_map"):
            self.no_maps = f"{type(detector).__name__} has no anomaly_map."

    def __len__(self) -> int:
        return len(self.inputs)

    def __iter__(self) -> Iterator[Scored]:
        indices = chunks(np.arange(len(self)), BATCH)
        batches = load_batches(self.inputs, indices, self.size, self.channels)
        failed: dict[int, str] = {}
        with Progress(len(self), "image", "scoring", self.verbose) as progress:
            for batch in batches:
                failed |= batch.failed
                yield self._score(batch)
                progress.update(len(batch.index) + len(batch.failed))
        if failed:
            report_unreadable(self.inputs, failed, "skip")

    def _score(self, batch: Any) -> Scored:
        if batch.values is None:
            none: NDArray[Any] = np.empty(0)
            return Scored(batch.index, none, none, None, batch.failed)
        pixels = batch.values.numpy()
        rows = pixels if self.as_seen else self._rows(batch.index)
        maps = None
        with silence():
            scores = np.asarray(self.detector.score_samples(rows), dtype=np.float64)
            if self.maps and self.no_maps is None:
                try:
                    maps = list(self.detector.anomaly_map(rows))
                except ValueError as error:  # stages without maps
                    self.no_maps = str(error)
        return Scored(batch.index, pixels, scores, maps, batch.failed)

    def _rows(self, index: NDArray[np.intp]) -> Any:
        if hasattr(self.X, "shape"):
            return self.X[index]
        return [self.X[int(i)] for i in index]


class _Skipping(BaseEstimator):
    """Says how X is read: files that cannot be read are named later."""

    on_error = "skip"

    def __init__(self, white: float | None) -> None:
        self.white = white
