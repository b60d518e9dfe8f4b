"""Densities on vectors: each an outlier detector of scikit-learn's in its own right."""

from ._centroid import CentroidScorer
from ._class_gaussian import ClassGaussianScorer
from ._gaussian import GaussianScorer
from ._kmeans import KMeansScorer
from ._knn import KNNScorer

__all__ = [
    "CentroidScorer",
    "ClassGaussianScorer",
    "GaussianScorer",
    "KMeansScorer",
    "KNNScorer",
]
