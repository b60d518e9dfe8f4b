"""`export_onnx`: the graph, and what the file says of the detector."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from ..base import threshold_below
from ..conformal import ConformalDetector
from ..detectors import HSCClassifier, OpenSetClassifier
from ..features import BackboneEstimator
from ..runtime._detector import FORMAT, PROPERTY
from ..runtime._files import replacing
from . import _around, _patches  # noqa: F401 -- they register detectors
from ._graph import make_graph
from ._parts import Part, part_of

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
PACKAGES = ("skdeepad", "torch", "onnx")


def export_onnx(
    detector: Any, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write a fitted detector to one ONNX file, from pixels to scores.

    The file needs neither torch nor this package: `skdeepad.runtime.load` scores with
    it, and so does ONNX Runtime in any language.

    Parameters
    ----------
    detector : estimator
        A fitted detector of images, a pipeline of `BackboneFeatures` and a scorer of
        this package, or an ensemble or a `ConformalDetector` of these.
    path : str or path-like
        Where to. The file is complete, or is not there.
    overwrite : bool, default=False
        Whether a file that is there is replaced.

    Returns
    -------
    None
        The file is written whole, or not at all.

    Raises
    ------
    ExportError
        If the detector, or a part of it, has no graph; the message says why.
    FileExistsError
        If there is a file, and `overwrite` is False.
    ImportError
        If onnx or onnxruntime is not installed.

    Warns
    -----
    UserWarning
        If the detector was fitted in bfloat16: the graph computes in float32, so that
        its scores differ by some percent (docs/deploy.md).

    See Also
    --------
    skdeepad.save : Keeps the whole estimator, which can then be recalibrated.

    Notes
    -----
    Inputs of the graph: "images", float32 of shape (n, height, width, channels), one
    or three channels, in 0..white; "white" (255 by default; 1 for images in 0..1) and
    "threshold" (`offset_` by default). Outputs: "score", "decision" (score less
    threshold), "label" (+1 normal, -1 anomaly), and where the detector has them
    "p_value", "map" (at the size of the images) and "logits". The property "skdeepad"
    holds, as JSON, what is known of the detector.

    Images that were trained on get the scores of new images. Scores agree with those of
    the detector in float32 to a relative 1e-5.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from sklearn.datasets import load_digits
    >>> from skdeepad import MahalanobisFeatureScorer, export_onnx
    >>> from skdeepad.runtime import load
    >>> X = load_digits().images / 16
    >>> detector = MahalanobisFeatureScorer(image_size=64, precision="float32")
    >>> detector = detector.fit(X[:200])
    >>> with TemporaryDirectory() as folder:
    ...     export_onnx(detector, f"{folder}/digits.onnx")
    ...     model = load(f"{folder}/digits.onnx")
    >>> scores = detector.score_samples(X[200:210])
    >>> bool((abs(model.score_samples(X[200:210]) / scores - 1) < 1e-5).all())
    True
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"export_onnx needs onnx and onnxruntime ({error}). Install them: "
            "pip install 'skdeepad[onnx]'."
        ) from error
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"path={os.fspath(path)!r} is there already. Set overwrite=True to "
            "replace it."
        )
    check_is_fitted(detector)
    part = part_of(detector)
    _warn_of_bfloat16(detector)
    last = detector.steps[-1][1] if isinstance(detector, Pipeline) else detector
    held_out, why_not = _held_out(last)
    mask = _patches.mask_of(_scored_by(detector))
    model, outputs = make_graph(part, float(last.offset_), held_out, mask)
    told = _describe(detector, last, part, outputs, why_not)
    onnx.helper.set_model_props(model, {PROPERTY: json.dumps(told)})
    model.producer_name, model.producer_version = "skdeepad", version("skdeepad")
    with replacing(path) as unfinished:
        unfinished.write_bytes(model.SerializeToString())


def _describe(
    detector: Any, last: Any, part: Part, outputs: dict[str, Any], why_not: str
) -> dict[str, Any]:
    """Tell what the runtime, and whoever finds the file, wants to know."""
    front = next(_estimators(detector, BackboneEstimator))
    classifier = isinstance(detector, HSCClassifier | OpenSetClassifier)
    without = {} if "p_value" in outputs else {"p_value": why_not}
    if "map" not in outputs:
        without["map"] = (
            "its maps need gradients, or its stages have none"
            if hasattr(detector, "anomaly_map")
            else "it scores whole images"
        )
    kept: Any = getattr(last, "_threshold_scores", None)
    shares = [s for s in SHARES if kept is not None and s * (len(kept) + 1) >= 1]
    return {
        "format": FORMAT,
        "class": type(detector).__name__,
        "parts": [type(e).__name__ for e in _estimators(detector, BaseEstimator)],
        "versions": {name: version(name) for name in PACKAGES},
        "weights": _digest(part),
        "image_sizes": part.sizes,
        "channels": part.channels,
        "white": front.white,
        "image_shape": front.image_shape,
        "contamination": last.contamination,
        "threshold": float(last.offset_),
        "thresholds": {str(s): threshold_below(kept, s) for s in shares},
        "map_threshold": _number(getattr(detector, "map_offset_", None)),
        "classes": detector.classes_.tolist() if classifier else None,
        "normal_class": detector._normal_column
        if isinstance(detector, HSCClassifier)
        else None,
        "outputs": {name: shape for name, shape in outputs.items() if name != "map"},
        "without": without,
    }


def _number(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else float(value)


def _held_out(last: Any) -> tuple[Any, str]:
    """Give the scores that p-values compare with, or say why there are none."""
    if isinstance(last, ConformalDetector) and last.method == "cv+":
        return None, "method='cv+' compares with scores by each fold's estimator"
    if not hasattr(last, "held_out_scores_"):
        return None, "it keeps no held-out scores"
    return last.held_out_scores_, ""


def _scored_by(detector: Any) -> Any:
    """Give the detector whose maps are shown."""
    while hasattr(detector, "estimator_"):
        detector = detector.estimator_
    return detector


def _estimators(detector: Any, kind: type) -> Iterator[Any]:
    """Give the fitted estimators of a kind that a detector is made of."""
    if isinstance(detector, kind):
        yield detector
    inner = [getattr(detector, "estimator_", None)]
    inner += getattr(detector, "estimators_", None) or []
    if isinstance(detector, Pipeline):
        inner += [step for _, step in detector.steps]
    for estimator in inner:
        if isinstance(estimator, BaseEstimator):
            yield from _estimators(estimator, kind)


def _warn_of_bfloat16(detector: Any) -> None:
    fronts = _estimators(detector, BackboneEstimator)
    if any(front._dtype == torch.bfloat16 for front in fronts):
        warnings.warn(
            "The detector computes in bfloat16, as this processor is faster in it; the "
            "graph computes in float32, so that its scores differ by some percent. Fit "
            "it with precision='float32' for equal scores.",
            UserWarning,
            stacklevel=3,
        )


def _digest(part: Part) -> str:
    """Digest the weights of all that is exported."""
    digest = blake2b(digest_size=16)
    for name, value in part.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
