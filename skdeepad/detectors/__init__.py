"""Detectors on images: one file a method."""

from ._mahalanobis import MahalanobisFeatureScorer
from ._panda import PANDAEstimator

__all__ = ["MahalanobisFeatureScorer", "PANDAEstimator"]
