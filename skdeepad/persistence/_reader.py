"""Makes the objects of a manifest again, one after the other; calls none of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from math import prod
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from torch import Tensor, nn

from ..backbones import Backbone
from ._archive import LoadError, plain_dtype
from ._checks import check
from ._registry import (
    FUNCTIONS,
    Schema,
    find_enum,
    find_pretrained,
    find_schema,
    is_path,
)

COLLECTIONS = {
    kind.__name__: kind for kind in (list, tuple, set, frozenset, torch.Size)
}
MAPPINGS = {kind.__name__: kind for kind in (dict, OrderedDict)}
TORCH_DTYPES = {
    str(dtype): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
NON_FINITE = ("nan", "inf", "-inf")  # which JSON has not
# What may be a key; of larger numbers, thousands may share one hash
SCALARS = (str, int, float, type(None), np.bool_, np.integer, np.float16, np.float32)

# Far above what estimators need
MAX_OBJECTS = 2**19
MAX_DEPTH = 100  # of objects in objects; Python's own limit is a few hundred
MAX_SIDES = 64  # of an array, which is NumPy's own limit
MAX_UNFOLDED = 2**20  # objects in an object, those counted often that are there often

NOTHING: frozenset[type] = frozenset()
PARTS = {  # of a module; there may be None in the place of each
    "_parameters": (nn.Parameter, type(None)),
    "_buffers": (Tensor, type(None)),
    "_modules": (nn.Module, type(None)),
}


class Reader:
    """Makes the objects of a manifest, one after the other.

    Parameters
    ----------
    arrays, tensors : list of ndarray, dict of Tensor
        What the manifest refers to.
    trusted : mapping of str to type or callable
        The reader's own classes and functions, by name.
    """

    def __init__(
        self,
        arrays: list[NDArray[Any]],
        tensors: dict[str, Tensor],
        trusted: Mapping[str, Any],
    ) -> None:
        self.arrays = arrays
        self.tensors = tensors
        self.trusted = trusted
        self.objects: list[dict[str, Any]] = []
        # Of the object that is being made: the classes of what is in it and is not
        # plain data, how many objects are in it, and how deep
        self.kinds: frozenset[type] = NOTHING
        self.size = self.depth = 1
        # the same of those that are made, behind each
        self.made: list[tuple[Any, frozenset[type], int, int]] = []
        # for the warnings
        self.of_sklearn = ""
        self.paths: dict[str, Any] = {}

    def read(self, objects: list[dict[str, Any]], root: Any) -> Any:
        """Make all objects, and give the one that the others are parts of."""
        if len(objects) > MAX_OBJECTS:
            raise LoadError("The file holds more objects than an estimator can have.")
        self.objects = objects
        for description in objects:
            kind, value = next(iter(description.items()))
            if kind not in MAKERS:
                raise LoadError(f"The file holds a {kind!r}, which is unknown.")
            self.kinds, self.size, self.depth = NOTHING, 1, 1
            made = MAKERS[kind](self, value, description)
            if self.size > MAX_UNFOLDED or self.depth > MAX_DEPTH:
                raise LoadError("The file holds more objects in an object than it may.")
            self.made.append((made, self.kinds, self.size, self.depth))
        return self.decode(root)

    def decode(self, value: Any) -> Any:
        """Give the value that something in the manifest stands for."""
        if type(value) is list:
            (place,) = value
            made, kinds, size, depth = at(self.made, place)
            if kinds:
                self.kinds |= kinds
            self.size += size
            if depth >= self.depth:
                self.depth = depth + 1
            return made
        if type(value) is dict:
            raise LoadError("The file's manifest is not one that save wrote.")
        return value

    def decode_keys(self, values: list[Any]) -> list[Any]:
        """Give values that are to be hashed."""
        keys = [self.decode(value) for value in values]
        for key in keys:
            if not is_key(key):
                raise LoadError(f"The file has a {type(key).__name__} as a key.")
        return keys

    # plain data

    def make_float(self, value: str, _: Any) -> float:
        if value not in NON_FINITE:
            raise LoadError(f"{value!r} in the file is no number.")
        return float(value)

    def make_array(self, value: int, _: Any) -> NDArray[Any]:
        return at(self.arrays, value)

    def make_scalar(self, value: int, _: Any) -> Any:
        (scalar,) = at(self.arrays, value).reshape(1)
        return scalar

    def make_objects(self, value: list[Any], told: dict[str, Any]) -> NDArray[Any]:
        items = [self.decode(item) for item in value]
        if len(told["shape"]) > MAX_SIDES or prod(told["shape"]) != len(items):
            raise LoadError("The file has an array that is not of the shape it says.")
        array = np.empty(len(items), dtype=object)
        for i, item in enumerate(items):  # all at once, NumPy would unpack lists
            array[i] = item
        return array.reshape(told["shape"])

    def make_tensor(self, value: str, told: dict[str, Any]) -> Tensor:
        tensor = self.tensors[value].permute(np.argsort(told["order"]).tolist())
        if told["parameter"]:
            return nn.Parameter(tensor, requires_grad=told["grad"])
        return tensor.requires_grad_(told["grad"])

    def make_collection(self, value: list[Any], told: dict[str, Any]) -> Any:
        kind = COLLECTIONS[next(iter(told))]
        hashed = kind in (set, frozenset)
        return kind(self.decode_keys(value) if hashed else map(self.decode, value))

    def make_mapping(self, value: list[Any], told: dict[str, Any]) -> Any:
        keys = self.decode_keys([key for key, _ in value])
        values = [self.decode(item) for _, item in value]
        return MAPPINGS[next(iter(told))](zip(keys, values, strict=True))

    def make_torch_dtype(self, value: str, _: Any) -> torch.dtype:
        return TORCH_DTYPES[value]

    def make_numpy_dtype(self, value: str, _: Any) -> np.dtype[Any]:
        return plain_dtype(value)

    def make_path(self, value: str, _: Any) -> Path:
        return Path(value)

    def make_random_state(self, value: Any, _: Any) -> np.random.RandomState:
        name, key, position, *_ = state = self.decode(value)
        # what NumPy does not check itself
        if name != "MT19937" or not 0 <= int(position) <= len(key) == 624:
            raise LoadError("The file has a RandomState that is none.")
        rng = np.random.RandomState()
        rng.set_state(state)
        return rng

    def make_enum(self, value: str, told: dict[str, Any]) -> Enum:
        kind = self.trusted.get(value) or find_enum(value)
        if not isinstance(kind, type) or not issubclass(kind, Enum):
            raise self.unknown(value)
        wanted = self.decode(told["value"])
        for member in kind:
            if type(member.value) is type(wanted) and member.value == wanted:
                return member
        raise LoadError(f"{value} in the file has no {wanted!r}.")

    # what is more than data

    def make_named(self, value: str, _: Any) -> Any:
        if value in self.trusted:
            return self.trusted[value]
        if value not in FUNCTIONS:
            raise self.unknown(value)
        self.kinds = frozenset([FunctionType])
        return FUNCTIONS[value]

    def make_partial(self, value: list[Any], _: Any) -> partial[Any]:
        function = self.decode(value[0])
        ours = self.kinds == {FunctionType}
        if not ours and not any(function is own for own in self.trusted.values()):
            raise LoadError("The file has a partial of what is no function.")
        self.kinds = NOTHING
        arguments, keywords = self.decode(value[1]), self.decode(value[2])
        if self.kinds or type(arguments) is not tuple:
            raise LoadError("The file has a partial with arguments that are no data.")
        self.kinds = frozenset([partial]) if ours else NOTHING
        return partial(function, *arguments, **keywords)

    def make_pretrained(self, value: str, told: dict[str, Any]) -> Backbone:
        found = find_pretrained(value, told["digest"])
        if found is None:
            raise LoadError(
                f"The pretrained weights of {value!r} on this machine are not those "
                "that the estimator was fitted with."
            )
        self.kinds = frozenset([Backbone])
        return found

    def make_instance(self, value: str, told: dict[str, Any]) -> Any:
        """Make an instance from its attributes; its class is not called."""
        schema = self.find_schema(value)
        parts = PARTS if issubclass(schema.kind, nn.Module) else ()
        attributes = {}
        for name, reference in told["attributes"]:
            if not schema.allows(name) or name in attributes:
                raise LoadError(f"{value} in the file may not have {name!r}.")
            self.kinds = NOTHING
            attributes[name] = self.decode(reference)
            if self.kinds and name not in parts and not schema.holds(name, self.kinds):
                held = ", ".join(kind.__name__ for kind in self.kinds)
                raise LoadError(f"{value} in the file may not hold {held} as {name!r}.")
        instance: Any = schema.kind.__new__(schema.kind)  # type: ignore[call-overload]
        if isinstance(instance, nn.Module):
            fill_module(instance, schema, attributes)
        elif isinstance(instance, BaseEstimator):
            attributes = schema.defaults | self.without_paths(attributes)
            if value.startswith("sklearn."):
                self.of_sklearn = schema.kind.__name__
        instance.__dict__.update(attributes)
        if schema.held is None:  # the reader's own
            self.kinds = NOTHING
            return instance
        check(instance)
        self.kinds = frozenset([schema.kind])
        return instance

    def without_paths(self, attributes: dict[str, Any]) -> dict[str, Any]:
        """Leave out the places on the machine of whoever wrote the file."""
        paths = {
            name: value for name, value in attributes.items() if is_path(name, value)
        }
        self.paths |= paths
        return attributes | dict.fromkeys(paths)

    def find_schema(self, name: str) -> Schema:
        """Find a class by its name, if it may be used."""
        if name in self.trusted and isinstance(self.trusted[name], type):
            return Schema(self.trusted[name], None)
        schema = find_schema(name)
        if schema is None:
            raise self.unknown(name)
        return schema

    def unknown(self, name: str) -> LoadError:
        """Say which names in the file are not known here, this one and others."""
        named = [(d.get("class"), d.get("named")) for d in self.objects]
        names = {name}
        names |= {kind for kind, _ in named if kind and find_schema(kind) is None}
        names |= {found for _, found in named if found and found not in FUNCTIONS}
        unknown = sorted(names - self.trusted.keys() | {name})
        short = ", ".join(name.rpartition(":")[2] for name in unknown)
        return LoadError(
            f"The file names {', '.join(unknown)}, which is not trusted. If you know "
            f"where the file comes from, pass it: load(file, trusted=[{short}])."
        )


def is_key(value: Any) -> bool:
    """Tell whether a value may be a key, or in a set: it hashes in no time."""
    small = type(value) is not int or abs(value) < 2**63
    return isinstance(value, SCALARS) and small


def at(items: list[Any], place: Any) -> Any:
    """Give an item by its place; not from the end, as negative numbers would."""
    if type(place) is not int or not 0 <= place < len(items):
        raise LoadError(f"The file refers to {place!r}, which it does not have.")
    return items[place]


def fill_module(module: nn.Module, schema: Schema, attributes: dict[str, Any]) -> None:
    """Fill a new module with its layers and tensors, which leave `attributes`."""
    nn.Module.__init__(module)
    for part, kind in PARTS.items():
        for name, value in dict.items(attributes.pop(part, {})):
            allowed = name not in vars(module) and schema.allows_child(name)
            if not allowed or not isinstance(value, kind):
                raise LoadError(
                    f"{type(module).__name__} in the file may not have {name!r} in "
                    f"{part}."
                )
            vars(module)[part][name] = value
    names = attributes.pop("_non_persistent_buffers_set", set())
    training = bool(attributes.pop("training", False))
    # not set as attributes: each would be looked for among layers and tensors
    vars(module)["_non_persistent_buffers_set"] = names & module._buffers.keys()
    vars(module)["training"] = training
    if isinstance(module, Backbone):  # how it is found again: copying calls that
        vars(module)["_loader"] = None
    for name in vars(module).keys() & attributes.keys():
        if attributes[name] is not None:
            raise LoadError(
                f"{type(module).__name__} in the file may not have {name!r}."
            )


MAKERS: dict[str, Callable[[Reader, Any, dict[str, Any]], Any]] = {
    "float": Reader.make_float,
    "array": Reader.make_array,
    "scalar": Reader.make_scalar,
    "objects": Reader.make_objects,
    "tensor": Reader.make_tensor,
    **dict.fromkeys(COLLECTIONS, Reader.make_collection),
    **dict.fromkeys(MAPPINGS, Reader.make_mapping),
    "torch_dtype": Reader.make_torch_dtype,
    "numpy_dtype": Reader.make_numpy_dtype,
    "path": Reader.make_path,
    "random_state": Reader.make_random_state,
    "enum": Reader.make_enum,
    "named": Reader.make_named,
    "partial": Reader.make_partial,
    "pretrained": Reader.make_pretrained,
    "class": Reader.make_instance,
}
