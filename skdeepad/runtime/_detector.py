"""An exported detector: images -> scores, by ONNX Runtime."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._files import list_images
from ._images import (
    LUMA,
    WHITE_16,
    channels_first,
    check_pixels,
    open_image,
    to_pixels,
    white_in_file,
    white_of,
)

FORMAT = 1  # of the metadata
PROPERTY = "skdeepad"  # of the file, that holds the metadata
READ_AHEAD = 4  # images that threads decode while one is scored
ENTRIES: dict[str, Any] = {  # of the metadata, that scoring needs
    "class": str,
    "versions": dict,
    "threshold": float,
    "thresholds": dict,
    "image_sizes": list,
    "channels": int,
    "outputs": dict,
    "without": dict,
    "white": int | None,
    "image_shape": list | None,
    "classes": list | None,
    "normal_class": int | None,
}
Pixels = tuple[NDArray[np.float32], float]  # (height, width, channels), and white


class ModelError(ValueError):
    """A file that is not a detector exported by skdeepad, or is damaged."""


class ExportedDetector:
    """A detector that `skdeepad.export_onnx` has written.

    Images pass one by one, so that no score depends on other images.

    Parameters
    ----------
    path : str or path-like
        The file.
    threads : int, default=None
        How many threads ONNX Runtime takes. None: as many as it likes.
    on_error : {"raise", "skip"}, default="raise"
        What to do about images that cannot be read, as in `load`.

    Attributes
    ----------
    threshold : float
        Samples that score below it are anomalies: `offset_` of the detector. Set it to
        move the threshold; `thresholds` has some.
    thresholds : dict of float to float
        Thresholds by the share of new normal images that fall below them; empty where
        the detector keeps no held-out scores.
    classes : list or None
        Names of the classes, of a classifier: what `predict` gives.
    metadata : dict
        What the file says of the detector: its class, the versions of the packages
        that made it, the digest of its weights, sizes, `contamination`.
    on_error : {"raise", "skip"}
        What is done about images that cannot be read: an error names the first one, or
        they score NaN and `predict` takes them for anomalies.
    image_shape : tuple of int or None
        (channels, height, width) of arrays, where they do not tell.

    See Also
    --------
    load : Makes one.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from sklearn.datasets import load_digits
    >>> from skdeepad import MahalanobisFeatureScorer, export_onnx
    >>> from skdeepad.runtime import load
    >>> X = load_digits().images / 16
    >>> detector = MahalanobisFeatureScorer(image_size=64, precision="float32")
    >>> with TemporaryDirectory() as folder:
    ...     export_onnx(detector.fit(X[:100]), f"{folder}/digits.onnx")
    ...     model = load(f"{folder}/digits.onnx")
    >>> model.threshold = model.thresholds[0.1]
    >>> model.predict(X[100:103]).shape
    (3,)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int | None = None,
        on_error: str = "raise",
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r} must be 'raise' or 'skip'.")
        self._session, self._options = _open(path, threads)
        self.metadata = _read_metadata(self._session, path)
        self.threshold = float(self.metadata["threshold"])
        shares = self.metadata["thresholds"].items()
        self.thresholds = {float(share): value for share, value in shares}
        self.classes = self.metadata["classes"]
        self.on_error = on_error
        self.image_shape = self.metadata["image_shape"]

    def __repr__(self) -> str:
        """Name the class, the version and the threshold."""
        made_by = f"skdeepad {self.metadata['versions']['skdeepad']}"
        name = self.metadata["class"]
        return f"<{name}, exported by {made_by}, threshold {self.threshold:g}>"

    def score_samples(self, X: Any) -> NDArray[np.float64]:
        """Score images; the higher, the more normal.

        Parameters
        ----------
        X : array-like, sequence or folder
            Images, as the detector takes them: an array of shape (n, height, width),
            (n, height, width, channels) or (n, channels, height, width), uint8 in
            0..255, uint16 or floats in 0..1; a sequence of arrays or Pillow's images,
            which may differ in size; a sequence of paths; or a folder.

        Returns
        -------
        ndarray of float64, shape (n_samples,)
            As the detector scores new images; NaN for unreadable ones.
        """
        (scores,) = self._run(X, ["score"])
        return scores

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Score images relative to the threshold.

        Parameters
        ----------
        X : array-like, sequence or folder
            Images, as in `score_samples`.

        Returns
        -------
        ndarray of float64, shape (n_samples,) or (n_samples, n_classes)
            ``score_samples(X) - threshold``, negative for anomalies. Classifiers give
            what the detector gives: `HSCClassifier` a positive number for
            ``classes[1]``, `OpenSetClassifier` its logits.
        """
        if self.metadata["outputs"].get("logits"):
            (logits,) = self._run(X, ["logits"])
            return logits if logits.shape[1] > 2 else logits[:, 1] - logits[:, 0]
        decision = self.score_samples(X) - self.threshold
        return -decision if self.metadata["normal_class"] == 0 else decision

    def predict(self, X: Any) -> NDArray[Any]:
        """Tell normal images from anomalies.

        Parameters
        ----------
        X : array-like, sequence or folder
            Images, as in `score_samples`.

        Returns
        -------
        ndarray of shape (n_samples,)
            +1 for normal images, -1 for anomalies and unreadable images. Classifiers
            give `classes`, as the detector does.
        """
        if self.metadata["outputs"].get("logits"):
            (logits,) = self._run(X, ["logits"])
            return np.array(self.classes)[np.nan_to_num(logits).argmax(axis=1)]
        normal = self.predict_known(X)
        if self.classes is None:
            return normal
        column = self.metadata["normal_class"]
        return np.array(self.classes)[np.where(normal > 0, column, 1 - column)]

    def predict_known(self, X: Any) -> NDArray[np.int_]:
        """Tell images that reach the threshold from others, whatever the classes.

        Parameters
        ----------
        X : array-like, sequence or folder
            Images, as in `score_samples`.

        Returns
        -------
        ndarray of int, shape (n_samples,)
            +1 for images that reach the threshold, -1 for others.
        """
        return np.where(self.score_samples(X) >= self.threshold, 1, -1)

    def p_values(self, X: Any) -> NDArray[np.float64]:
        """Tell how unusual each image would be among normal ones.

        Parameters
        ----------
        X : array-like, sequence or folder
            Images, as in `score_samples`.

        Returns
        -------
        ndarray of float64, shape (n_samples,)
            ``(1 + #{held-out score <= score}) / (n + 1)``; NaN for unreadable images.

        Raises
        ------
        ValueError
            If the detector has none; the message says why.
        """
        self._check_has("p_value")
        (p,) = self._run(X, ["p_value"])
        return p

    def anomaly_map(self, X: Any) -> Any:
        """Show where in images the anomaly is.

        Parameters
        ----------
        X : array-like, sequence or folder
            Images, as in `score_samples`.

        Returns
        -------
        ndarray of float32, shape (n_samples, height, width)
            A map of each image, at its size, higher = more anomalous. A list of maps
            where images differ in size.

        Raises
        ------
        ValueError
            If the detector has none; the message says why.
        """
        self._check_has("map")
        unread = np.full(self.metadata["image_sizes"][0], np.nan, np.float32)
        found = self._each(X, ["map"])
        maps = [unread if outputs is None else outputs[0] for outputs in found]
        same_size = len({m.shape for m in maps}) == 1
        return np.stack(maps) if same_size else maps

    def _check_has(self, output: str) -> None:
        if why := self.metadata["without"].get(output):
            raise ValueError(f"This {self.metadata['class']} gives no {output}: {why}.")

    def _run(self, X: Any, outputs: list[str]) -> list[NDArray[Any]]:
        """Give outputs of all images, NaN for unreadable ones."""
        rows = list(self._each(X, outputs))
        empty = [np.full(self.metadata["outputs"][name], np.nan) for name in outputs]
        rows = [empty if row is None else row for row in rows]
        return [np.stack(column) for column in zip(*rows, strict=True)]

    def _each(self, X: Any, outputs: list[str]) -> Iterator[list[NDArray[Any]] | None]:
        """Give outputs of each image, which passes alone; None for unreadable ones."""
        for name, read in _images(X, self.image_shape, self.metadata["white"]):
            try:
                pixels, white = self._fit_channels(*read())
            except (OSError, ValueError) as error:
                if self.on_error == "skip":
                    yield None
                    continue
                raise ValueError(
                    f"{name} cannot be read: {error}. Repair or remove it, or load the "
                    "model with on_error='skip' to give such images NaN as a score."
                ) from error
            feeds = {
                "images": pixels[None],
                "white": np.array(white, np.float32),
                "threshold": np.array(self.threshold, np.float64),
            }
            try:
                found = self._session.run(outputs, feeds, self._options)
            except Exception as error:  # ONNX Runtime has a dozen classes of its own
                raise ModelError(
                    f"The model fails on {name}, of shape {pixels.shape}: "
                    f"{str(error)[:200]}. Export the detector again."
                ) from error
            yield [values[0] for values in found]

    def _fit_channels(self, pixels: NDArray[np.float32], white: float) -> Pixels:
        """Put transparent pixels on white, and give a grey network grey ones."""
        wanted, have = self.metadata["channels"], pixels.shape[2]
        if have == 4 != wanted:
            pixels, white = pixels / np.float32(white), 1.0
            alpha = pixels[..., 3:]
            pixels = pixels[..., :3] * alpha + (1 - alpha)
            have = 3
        if have == 3 and wanted == 1:
            pixels, white = pixels / np.float32(white), 1.0
            pixels = (pixels * np.array(LUMA, np.float32)).sum(axis=2, keepdims=True)
            have = 1
        if have not in (1, wanted):
            raise ValueError(f"it has {have} channels, but the network takes {wanted}")
        return pixels, white


def _open(path: str | os.PathLike[str], threads: int | None) -> tuple[Any, Any]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            "The runtime needs ONNX Runtime. Install it: pip install onnxruntime."
        ) from error
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {os.fspath(path)!r}.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # images pass one by one; told so, ONNX Runtime settles all shapes once
    options.add_free_dimension_override_by_name("n", 1)
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime has a dozen classes of its own
        raise ModelError(
            f"{os.fspath(path)!r} cannot be read as an ONNX model: "
            f"{str(error)[:200]}. Copy or export it again."
        ) from error
    run_options = onnxruntime.RunOptions()
    run_options.log_severity_level = 4
    run_options.only_execute_path_to_fetches = True  # maps cost, where nobody asks
    return session, run_options


def _read_metadata(session: Any, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what the file says of the detector, and check that it fits the graph."""
    told = session.get_modelmeta().custom_metadata_map.get(PROPERTY)
    found: Any = None
    if told is not None:
        try:
            found = json.loads(told)
        except ValueError:
            found = None
    if not isinstance(found, dict) or not isinstance(found.get("format"), int):
        raise ModelError(
            f"{os.fspath(path)!r} is an ONNX model, but not of a detector that "
            "skdeepad.export_onnx has written."
        )
    if found["format"] > FORMAT:
        raise ModelError(
            f"{os.fspath(path)!r} was written by a later version of skdeepad "
            f"({found.get('versions')}). Install that version."
        )
    sound = all(
        name in found and isinstance(found[name], kind)
        for name, kind in ENTRIES.items()
    )
    inputs = {i.name for i in session.get_inputs()}
    inputs |= {i.name for i in session.get_overridable_initializers()}
    outputs = {o.name for o in session.get_outputs()}
    if (
        not sound
        or not {"images", "white", "threshold"} <= inputs
        or not {"score", *found["outputs"]} <= outputs
    ):
        raise ModelError(
            f"{os.fspath(path)!r}: what the file says of the detector does not fit "
            "its graph. Export the detector again."
        )
    return found


def _images(
    X: Any, image_shape: Sequence[int] | None, white: float | None
) -> Iterator[tuple[str, Callable[[], Pixels]]]:
    """Give each image's name, and a function that gives its pixels."""
    if isinstance(X, str | os.PathLike):
        X = list_images(X) if os.path.isdir(X) else [X]
    shape = tuple(image_shape) if image_shape else None
    if hasattr(X, "to_list"):
        X = X.to_list()  # a column of pandas or polars
    if isinstance(X, Iterable) and not hasattr(X, "__array__"):
        X = list(X)
        if len(X) == 0:
            raise ValueError("X is empty: no image was found.")
        yield from _read_ahead(
            (
                f"{os.fspath(x)!r} (X[{i}])"
                if isinstance(x, str | os.PathLike)
                else f"X[{i}]",
                partial(_pixels_of, x, shape, white),
            )
            for i, x in enumerate(X)
        )
        return
    X = np.asarray(X)
    if X.dtype.kind in "OUS":
        yield from _images(X.ravel().tolist(), image_shape, white)
        return
    if X.ndim == 2 and shape and X.shape[1] == np.prod(shape):
        X = X.reshape(len(X), *shape)
    if X.ndim not in (3, 4) or X.dtype.kind not in "uifb":
        raise ValueError(
            f"X has shape {X.shape} and type {X.dtype}; images are (n, height, width) "
            "or (n, height, width, channels), of numbers."
        )
    X = channels_first(X, shape)
    at_white = white_of(X.dtype, white)
    check_pixels(X, at_white)
    for i, image in enumerate(X):
        yield f"X[{i}]", partial(_with_white, image, at_white)


def _pixels_of(
    x: Any, image_shape: tuple[int, ...] | None, white: float | None
) -> Pixels:
    """Give the pixels of one image: a path, an image of Pillow, or an array."""
    if isinstance(x, str | os.PathLike):
        image = open_image(x)
        pixels, brightest = to_pixels(image, white_in_file(image))
        pixels = np.clip(pixels, 0, brightest)
    elif hasattr(x, "getbands"):
        from PIL import ImageOps

        image = ImageOps.exif_transpose(x)
        pixels, brightest = to_pixels(image, white_in_file(image))
    else:
        array = np.asarray(x)
        if array.ndim not in (2, 3) or array.dtype.kind not in "uifb":
            raise ValueError(f"it is {str(x)[:60]!r}, which is no image")
        rows = channels_first(array[None], image_shape)
        brightest = white_of(array.dtype, white)
        check_pixels(rows, brightest)
        return _with_white(rows[0], brightest)
    if white is not None and brightest == WHITE_16:
        brightest = white
        pixels = np.clip(pixels, 0, brightest)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return np.ascontiguousarray(pixels, dtype=np.float32), brightest


def _with_white(image: NDArray[Any], white: float) -> Pixels:
    """Lay an image of shape (channels, height, width) out as the graph wants it."""
    return np.ascontiguousarray(np.moveaxis(image, 0, -1), dtype=np.float32), white


def _read_ahead(
    images: Iterable[tuple[str, Callable[[], Pixels]]],
) -> Iterator[tuple[str, Callable[[], Pixels]]]:
    """Decode some images in threads, while others are scored."""
    images = iter(images)
    with ThreadPoolExecutor(2) as pool:
        waiting = deque(
            (name, pool.submit(read)) for name, read in islice(images, READ_AHEAD)
        )
        while waiting:
            name, future = waiting.popleft()
            yield name, future.result
            for name, read in islice(images, 1):
                waiting.append((name, pool.submit(read)))


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    on_error: str = "raise",
) -> ExportedDetector:
    """Open a detector that `skdeepad.export_onnx` has written.

    Parameters
    ----------
    path : str or path-like
        The ONNX file.
    threads : int, default=None
        Of the network. None: as many as the machine has cores.
    on_error : {"raise", "skip"}, default="raise"
        What is done about images that cannot be read: an error names the first one, or
        they score NaN and `predict` takes them for anomalies.

    Returns
    -------
    ExportedDetector
        It scores arrays, lists of arrays, files and folders.

    Raises
    ------
    ModelError
        If the file is damaged, or no detector of this package.
    FileNotFoundError
        If there is no such file.
    ImportError
        If ONNX Runtime is not installed.

    Examples
    --------
    Score a folder, and give images that cannot be read NaN:

    >>> model = load("bricks.onnx", on_error="skip")  # doctest: +SKIP
    >>> scores = model.score_samples("photos")  # doctest: +SKIP
    """
    return ExportedDetector(Path(path), threads, on_error)
