"""Turns an estimator into a list of objects, each made of those before it."""

from __future__ import annotations

import copyreg
from enum import Enum
from functools import partial
from inspect import isfunction
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from torch import Tensor, nn

from ..backbones import Backbone
from ..frozen import weights_digest
from ._archive import PLAIN_KINDS
from ._reader import COLLECTIONS, MAPPINGS, is_key
from ._registry import is_path, name_of


class Writer:
    """Turns an estimator into a list of objects, each made of those before it."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.arrays: list[NDArray[Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self.places: dict[int, int | None] = {}
        self.alive: list[Any] = []  # so that an id stays one object's

    def encode(self, value: Any, path: str) -> Any:
        """Give what stands for a value in the manifest."""
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float and isfinite(value):
            return value
        if id(value) not in self.places:
            self.alive.append(value)
            self.places[id(value)] = None
            self.objects.append(self.describe(value, path))
            self.places[id(value)] = len(self.objects) - 1
        place = self.places[id(value)]
        if place is None:
            raise TypeError(f"{path} cannot be saved: it holds itself.")
        return [place]

    def describe(self, value: Any, path: str) -> dict[str, Any]:
        """Tell how to make an object."""
        kind = type(value)
        if kind is float:
            return {"float": repr(value)}
        if isinstance(value, np.ndarray) and value.dtype.kind in PLAIN_KINDS:
            return {"array": self.keep(value)}
        if isinstance(value, np.ndarray) and value.dtype == object:
            items = [self.encode(item, f"{path}[...]") for item in value.flat]
            return {"objects": items, "shape": value.shape}
        if isinstance(value, np.generic):
            return {"scalar": self.keep(np.asarray(value))}
        if isinstance(value, Tensor):
            key = str(len(self.tensors))
            # products of matrices round by how these lie in memory
            order = np.argsort(np.negative(value.stride()), kind="stable").tolist()
            stored = value.detach().cpu().permute(order)
            self.tensors[key] = stored.clone(memory_format=torch.contiguous_format)
            parameter = isinstance(value, nn.Parameter)
            told = {"order": order, "parameter": parameter}
            return {"tensor": key, **told, "grad": value.requires_grad}
        hashed = value if kind in (set, frozenset, *MAPPINGS.values()) else ()
        if not all(map(is_key, hashed)):
            raise TypeError(
                f"{path} cannot be saved: in sets and as keys, files hold text and "
                "numbers of up to 63 bits. Pickle the estimator instead."
            )
        if kind in COLLECTIONS.values():
            items = [self.encode(item, f"{path}[{i}]") for i, item in enumerate(value)]
            return {kind.__name__: items}
        if kind in MAPPINGS.values():
            return {
                kind.__name__: [
                    [self.encode(k, path), self.encode(v, f"{path}[{k!r}]")]
                    for k, v in value.items()
                ]
            }
        if isinstance(value, torch.dtype):
            return {"torch_dtype": str(value)}
        if isinstance(value, np.dtype):
            return {"numpy_dtype": value.str}
        if isinstance(value, Path):
            return {"path": str(value)}
        if isinstance(value, np.random.RandomState):
            return {"random_state": self.encode(value.get_state(), path)}
        if isinstance(value, partial):
            parts = (value.func, value.args, value.keywords)
            return {"partial": [self.encode(part, path) for part in parts]}
        if isinstance(value, Enum):
            member = self.encode(value.value, path)
            return {"enum": name_of(kind), "value": member}
        if isinstance(value, type) or isfunction(value):
            return {"named": name_of(value)}
        if isinstance(value, Backbone) and value._loader:
            _, (name,) = value._loader
            return {"pretrained": name, "digest": weights_digest(value)}
        return self.describe_instance(value, path)

    def describe_instance(self, value: Any, path: str) -> dict[str, Any]:
        """Tell an object's class and attributes, where that is all there is to it."""
        kind = type(value)
        try:
            reduced: Any = object.__reduce_ex__(value, 2)
            make, arguments, *rest = reduced
            plain = make is vars(copyreg)["__newobj__"] and arguments == (kind,)
            plain = plain and not any(rest[1:])  # items, of a list or dict
        except TypeError:  # a file, a lock
            plain = False
        if not plain or not hasattr(value, "__dict__"):
            raise TypeError(
                f"{path} cannot be saved: it is a {name_of(kind)}, which is more than "
                "its attributes. Pickle the estimator instead."
            )
        state = vars(value)
        if isinstance(value, nn.Module):
            state = {k: v for k, v in state.items() if "_hooks" not in k}
        if isinstance(value, BaseEstimator):
            state = {k: None if is_path(k, v) else v for k, v in state.items()}
        encoded = [[k, self.encode(v, f"{path}.{k}")] for k, v in state.items()]
        return {"class": name_of(kind), "attributes": encoded}

    def keep(self, array: NDArray[Any]) -> int:
        self.arrays.append(array)
        return len(self.arrays) - 1
