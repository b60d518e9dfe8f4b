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

__all__ = [
    "DeepSAD",
    "DeepSVDD",
    "DetectorEnsemble",
    "HSCClassifier",
    "KDClonerEstimator",
    "MSADEstimator",
    "MahalanobisFeatureScorer",
    "OpenSetClassifier",
    "PANDAEstimator",
    "PatchDetector",
]
