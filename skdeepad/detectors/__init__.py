"""Detectors on images: one file a method."""

from ._deep_sad import DeepSAD
from ._deep_svdd import DeepSVDD
from ._ensemble import DetectorEnsemble
from ._hsc import HSCClassifier
from ._kd_cloner import KDClonerEstimator
from ._mahalanobis import MahalanobisFeatureScorer
from ._msad import MSADEstimator
from ._open_set import OpenSetClassifier
from ._panda import PANDAEstimator
from ._patch import PatchDetector
from ._transformations import GEOMDetector, MHRotDetector, RotNetDetector

__all__ = [
    "DeepSAD",
    "DeepSVDD",
    "DetectorEnsemble",
    "GEOMDetector",
    "HSCClassifier",
    "KDClonerEstimator",
    "MHRotDetector",
    "MSADEstimator",
    "MahalanobisFeatureScorer",
    "OpenSetClassifier",
    "PANDAEstimator",
    "PatchDetector",
    "RotNetDetector",
]
