"""Values that compiled code, or layers, would take on trust."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.cluster import KMeans
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ._archive import LoadError

PLAIN_METRICS = ("cosine", "euclidean", "manhattan", "sqeuclidean")  # without settings


def check(instance: Any) -> None:
    """See that an object's values fit each other.

    Raises
    ------
    LoadError
        If they do not.
    """
    for kind, test in TESTS.items():
        if isinstance(instance, kind) and not test(instance):
            name = type(instance).__name__
            raise LoadError(f"The file has a {name} whose values do not fit.")


def is_matrix(value: Any, *shape: int) -> bool:
    """Tell whether a value is numbers of this shape."""
    numbers = type(value) is np.ndarray and value.dtype.kind in "iuf"
    return numbers and value.shape == shape


def check_jobs(found: Any) -> bool:
    """Take no more processes than this machine has processors."""
    if getattr(found, "n_jobs", None) is not None:
        found.n_jobs = min(found.n_jobs, os.cpu_count() or 1)
    return True


def check_neighbors(found: NearestNeighbors) -> bool:
    if not hasattr(found, "_fit_X"):
        return True  # not fitted
    return (
        is_matrix(found._fit_X, found.n_samples_fit_, found.n_features_in_)
        and (found._fit_method, found._tree) == ("brute", None)
        and found.effective_metric_ in PLAIN_METRICS
        and not found.effective_metric_params_
    )


def check_kmeans(found: KMeans) -> bool:
    if not hasattr(found, "cluster_centers_"):
        return True
    # another machine's threads are too many for this one, perhaps
    found._n_threads = min(max(found._n_threads, 1), os.cpu_count() or 1)
    shape = found.n_clusters, found.n_features_in_
    return is_matrix(found.cluster_centers_, *shape)


def check_covariance(found: EmpiricalCovariance) -> bool:
    if not hasattr(found, "location_"):
        return True
    d = found.n_features_in_
    precision = found.precision_ if found.store_precision else found.covariance_
    return is_matrix(found.location_, d) and is_matrix(precision, d, d)


def check_layer(module: nn.Module) -> bool:
    """Tell whether a layer's tensors have the sizes that its settings say."""
    tensors = module._parameters | module._buffers
    expected = expected_shapes(module) if tensors else {}
    return all(
        tensor.shape == expected.get(name, tensor.shape)
        for name, tensor in tensors.items()
        if tensor is not None
    )


def expected_shapes(module: Any) -> dict[str, tuple[int, ...]]:
    """Give the shapes of a layer's tensors."""
    if isinstance(module, nn.Linear):
        out = module.out_features
        return {"weight": (out, module.in_features), "bias": (out,)}
    if isinstance(module, _ConvNd):
        out, into = module.out_channels, module.in_channels
        first, second = (
            (into, out) if isinstance(module, _ConvTransposeNd) else (out, into)
        )
        weight = first, second // module.groups, *module.kernel_size
        return {"weight": weight, "bias": (out,)}
    if isinstance(module, _BatchNorm):
        names = "weight", "bias", "running_mean", "running_var"
        return dict.fromkeys(names, (module.num_features,))
    if isinstance(module, nn.LayerNorm):
        return dict.fromkeys(("weight", "bias"), tuple(module.normalized_shape))
    if isinstance(module, nn.GroupNorm):
        return dict.fromkeys(("weight", "bias"), (module.num_channels,))
    return {}


TESTS = {
    BaseEstimator: check_jobs,
    NearestNeighbors: check_neighbors,
    KMeans: check_kmeans,
    EmpiricalCovariance: check_covariance,
    nn.Module: check_layer,
}
