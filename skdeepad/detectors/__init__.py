"""Detectors on images: one file a method."""

from ._kd_cloner import KDClonerEstimator
from ._mahalanobis import MahalanobisFeatureScorer
from ._panda import PANDAEstimator

__all__ = ["KDClonerEstimator", "MahalanobisFeatureScorer", "PANDAEstimator"]
