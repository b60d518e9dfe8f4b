"""Deep image anomaly detection as scikit-learn estimators.

The names below are imported when they are first used, so that ``import skdeepad``
costs nothing.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conformal import ConformalDetector, RobustDetector
    from .detectors import (
        DeepSAD,
        DeepSVDD,
        DetectorEnsemble,
        GEOMDetector,
        HSCClassifier,
        KDClonerEstimator,
        MahalanobisFeatureScorer,
        MHRotDetector,
        MSADEstimator,
        OpenSetClassifier,
        PANDAEstimator,
        PatchDetector,
        RotNetDetector,
    )
    from .export import export_onnx
    from .features import BackboneFeatures
    from .model_selection import OneClassKFold, PseudoAnomalyScorer, compare_detectors
    from .persistence import load, save
    from .scorers import (
        CentroidScorer,
        ClassGaussianScorer,
        GaussianScorer,
        KMeansScorer,
        KNNScorer,
    )

__version__ = "0.1.0"

_HOMES = {
    "BackboneFeatures": "features",
    "CentroidScorer": "scorers",
    "ClassGaussianScorer": "scorers",
    "ConformalDetector": "conformal",
    "DeepSAD": "detectors",
    "DeepSVDD": "detectors",
    "DetectorEnsemble": "detectors",
    "GEOMDetector": "detectors",
    "GaussianScorer": "scorers",
    "HSCClassifier": "detectors",
    "KDClonerEstimator": "detectors",
    "KMeansScorer": "scorers",
    "KNNScorer": "scorers",
    "MHRotDetector": "detectors",
    "MSADEstimator": "detectors",
    "MahalanobisFeatureScorer": "detectors",
    "OneClassKFold": "model_selection",
    "OpenSetClassifier": "detectors",
    "PANDAEstimator": "detectors",
    "PatchDetector": "detectors",
    "PseudoAnomalyScorer": "model_selection",
    "RobustDetector": "conformal",
    "RotNetDetector": "detectors",
    "compare_detectors": "model_selection",
    "export_onnx": "export",
    "load": "persistence",
    "save": "persistence",
}
_MODULES = frozenset(
    [
        "backbones",
        "conformal",
        "datasets",
        "detectors",
        "export",
        "extension",
        "fisher",
        "inspection",
        "metrics",
        "model_selection",
        "persistence",
        "representation",
        "runtime",
        "scorers",
    ]
)

__all__ = [
    "BackboneFeatures",
    "CentroidScorer",
    "ClassGaussianScorer",
    "ConformalDetector",
    "DeepSAD",
    "DeepSVDD",
    "DetectorEnsemble",
    "GEOMDetector",
    "GaussianScorer",
    "HSCClassifier",
    "KDClonerEstimator",
    "KMeansScorer",
    "KNNScorer",
    "MHRotDetector",
    "MSADEstimator",
    "MahalanobisFeatureScorer",
    "OneClassKFold",
    "OpenSetClassifier",
    "PANDAEstimator",
    "PatchDetector",
    "PseudoAnomalyScorer",
    "RobustDetector",
    "RotNetDetector",
    "compare_detectors",
    "export_onnx",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__, *_MODULES]


def _use_one_thread() -> None:
    """Keep a forked process from waiting for the threads that its parent has."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_use_one_thread)
