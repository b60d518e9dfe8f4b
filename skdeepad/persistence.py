"""Fitted estimators in files that execute nothing when they are read.

A file is a zip archive of a manifest in JSON, arrays in NumPy's format and tensors in
safetensors; a digest of all of it is at the end. The manifest is a list of objects,
each made of plain values and of objects before it. Classes are named in it, and only
those that are known here, or that the reader trusts, are made again: without calling
them, from their attributes.
"""

from __future__ import annotations

import copyreg
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from enum import Enum
from functools import partial
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from inspect import isfunction
from io import BytesIO
from math import isfinite, prod
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np
import safetensors.torch
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import InconsistentVersionWarning
from torch import Tensor, nn

from .backbones import Backbone, load_backbone
from .inference import weights_digest
from .scorers._base import HeldOutScores
from .scorers._gaussian import Moments, RowSample

__all__ = ["LoadError", "load", "save"]

FORMAT = 1  # of the files; a reader refuses newer ones
MANIFEST, TENSORS, ARRAYS = "manifest.json", "tensors.safetensors", "arrays/{}.npy"
DIGEST_SIZE = 64  # a SHA-256 digest in hexadecimal, as the archive's comment
PACKAGES = ("skdeepad", "scikit-learn", "torch", "numpy")

# Where classes may come from, and what they must be
MODULES = (
    ("skdeepad.", (BaseEstimator, nn.Module, HeldOutScores, Moments, RowSample)),
    ("sklearn.", (BaseEstimator,)),
    *(
        (package, (nn.Module, Enum))
        for package in (
            *("torch.nn.modules.", "timm.layers.", "timm.models."),
            *("torchvision.models.", "torchvision.ops."),
        )
    ),
)
FUNCTIONS = "skdeepad.backbones._structure"  # what networks were cut with
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COLLECTIONS = {
    kind.__name__: kind for kind in (list, tuple, set, frozenset, torch.Size)
}
MAPPINGS = {kind.__name__: kind for kind in (dict, OrderedDict)}


class LoadError(ValueError):
    """A file that is not what `save` wrote, or not one for this version."""


def save(estimator: Any, file: str | os.PathLike[str] | BinaryIO) -> None:
    """Write an estimator to a file that executes nothing when it is read.

    Pretrained backbones are written by name, with a digest of their weights, and so
    the file is small; networks that were trained are written whole. Pipelines and
    scikit-learn's estimators on plain arrays can be written, too.

    Parameters
    ----------
    estimator : estimator
        One of this package, or one of scikit-learn that holds some.
    file : str, path or binary file
        Where to; a file that is there is replaced once the new one is complete.

    Returns
    -------
    None

    Raises
    ------
    TypeError
        If the estimator holds something that is not plain data, such as a forest;
        the message says where. Pickle takes such estimators.

    See Also
    --------
    load : Reads the file.

    Notes
    -----
    Parameters are written as they are: `memory` and `weights` may name folders of
    this machine.

    Examples
    --------
    >>> from io import BytesIO
    >>> from skdeepad import KNNScorer, load, save
    >>> scorer = KNNScorer(n_neighbors=1).fit([[0.0], [1.0], [2.0]])
    >>> file = BytesIO()
    >>> save(scorer, file)
    >>> load(file).score_samples([[5.0]])
    array([-9.])
    """
    if not isinstance(estimator, BaseEstimator):
        raise TypeError(f"estimator={estimator!r} is not a scikit-learn estimator.")
    writer = Writer()
    root = writer.encode(estimator, type(estimator).__name__)
    manifest = {
        "format": FORMAT,
        "made_with": {name: version(name) for name in PACKAGES},
        "objects": writer.objects,
        "root": root,
    }
    archive = BytesIO()
    with ZipFile(archive, "w", ZIP_STORED) as members:
        # ZipInfo has no time: the same estimator, the same file
        members.writestr(ZipInfo(MANIFEST), json.dumps(manifest, allow_nan=False))
        members.writestr(ZipInfo(TENSORS), safetensors.torch.save(writer.tensors))
        for i, array in enumerate(writer.arrays):
            with members.open(ZipInfo(ARRAYS.format(i)), "w") as member:
                npy.write_array(member, array, allow_pickle=False)
        members.comment = bytes(DIGEST_SIZE)
    data = archive.getvalue()[:-DIGEST_SIZE]
    data += sha256(data).hexdigest().encode()
    if hasattr(file, "write"):
        file.write(data)
        return
    path = Path(file)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(
    file: str | os.PathLike[str] | BinaryIO,
    *,
    trusted: Iterable[type | Callable[..., Any]] = (),
) -> Any:
    """Read an estimator that `save` wrote; nothing of the file is executed.

    Parameters
    ----------
    file : str, path or binary file
        The file.
    trusted : iterable of classes and functions, default=()
        Your own classes and functions that the estimator is made with, such as a
        network's. Others than these, this package's, and the estimators and layers
        of scikit-learn, torch, timm and torchvision are refused.

    Returns
    -------
    estimator
        The same as was saved; on the CPU.

    Raises
    ------
    LoadError
        If the file is damaged, is not one that `save` wrote, was written by a newer
        version, names classes that are not trusted, or was made with other
        pretrained weights than those on this machine.
    FileNotFoundError
        If the file, or the pretrained weights, are missing.

    Warns
    -----
    InconsistentVersionWarning
        If the file holds estimators of another version of scikit-learn.

    See Also
    --------
    save : Writes the file.

    Examples
    --------
    >>> from io import BytesIO
    >>> from skdeepad import load
    >>> load(BytesIO(b"something else"))
    Traceback (most recent call last):
    ...
    skdeepad.persistence.LoadError: The file is damaged, or not one that save wrote: ...
    """
    if hasattr(file, "read"):
        file.seek(0)
        data = file.read()
    else:
        data = Path(file).read_bytes()
    content, digest = data[:-DIGEST_SIZE], data[-DIGEST_SIZE:]
    if sha256(content).hexdigest().encode() != digest:
        raise LoadError(
            "The file is damaged, or not one that save wrote: its digest is not that "
            "of its content. Copy it again, or save the estimator anew."
        )
    try:
        return read(data, trusted)
    except (LoadError, FileNotFoundError):
        raise
    except Exception as error:  # whatever a hostile file may provoke
        raise LoadError(
            f"The file is not one that save wrote ({type(error).__name__}: {error})."
        ) from error


def name_of(named: Any) -> str:
    return f"{named.__module__}:{named.__qualname__}"


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
        if isinstance(value, np.ndarray) and value.dtype != object:
            return {"array": self.keep(value)}
        if isinstance(value, np.ndarray):
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
            make, arguments, *rest = object.__reduce_ex__(value, 2)
            plain = make is copyreg.__newobj__ and arguments == (kind,)
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
        encoded = [[k, self.encode(v, f"{path}.{k}")] for k, v in state.items()]
        return {"class": name_of(kind), "attributes": encoded}

    def keep(self, array: NDArray[Any]) -> int:
        self.arrays.append(array)
        return len(self.arrays) - 1


def read(data: bytes, trusted: Iterable[Any]) -> Any:
    """Make the estimator again."""
    with ZipFile(BytesIO(data)) as archive:
        for member in archive.infolist():
            if ".." in member.filename or member.filename.startswith(("/", "\\")):
                raise LoadError(f"The file has a member outside: {member.filename!r}.")
        manifest = json.loads(archive.read(MANIFEST))
        made_with = manifest["made_with"]
        if manifest["format"] > FORMAT:
            raise LoadError(
                f"The file was written by skdeepad {made_with['skdeepad']}, in a "
                f"format newer than {version('skdeepad')} reads: upgrade skdeepad."
            )
        members = {}
        for member in archive.infolist():
            if member.compress_type != ZIP_STORED:  # a small file stays small
                raise LoadError(f"{member.filename!r} in the file is compressed.")
            members[member.filename] = archive.read(member)
    del members[MANIFEST]
    tensors = safetensors.torch.load(members.pop(TENSORS))
    arrays = [read_array(members.pop(ARRAYS.format(i))) for i in range(len(members))]
    reader = Reader(arrays, tensors, {name_of(known): known for known in trusted})
    for description in manifest["objects"]:
        reader.made.append(reader.make(description))
    estimator = reader.decode(manifest["root"])
    if not isinstance(estimator, BaseEstimator):
        raise LoadError("The file holds no estimator.")
    if reader.of_sklearn and made_with["scikit-learn"] != version("scikit-learn"):
        warnings.warn(
            InconsistentVersionWarning(
                estimator_name=reader.of_sklearn,
                current_sklearn_version=version("scikit-learn"),
                original_sklearn_version=made_with["scikit-learn"],
            ),
            stacklevel=3,
        )
    return estimator


def read_array(data: bytes) -> NDArray[Any]:
    """Read an array, once it is known that the file has as much as it says."""
    stream = BytesIO(data)
    reads = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    shape, _, dtype = reads[npy.read_magic(stream)](stream)
    if prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise LoadError(f"The file has not the {shape} array of {dtype} that it names.")
    stream.seek(0)
    return npy.read_array(stream, allow_pickle=False)


class Reader:
    """Makes the objects of a manifest, one after the other."""

    def __init__(
        self,
        arrays: list[NDArray[Any]],
        tensors: dict[str, Tensor],
        trusted: dict[str, Any],
    ) -> None:
        self.arrays = arrays
        self.tensors = tensors
        self.trusted = trusted
        self.made: list[Any] = []
        self.of_sklearn = ""

    def decode(self, value: Any) -> Any:
        """Give the value that something in the manifest stands for."""
        if not isinstance(value, list):
            return value
        (place,) = value
        return self.made[place]

    def make(self, description: dict[str, Any]) -> Any:
        """Make an object."""
        kind, value = next(iter(description.items()))
        if kind == "float":
            return float(value)
        if kind == "array":
            return self.arrays[value]
        if kind == "scalar":
            return self.arrays[value][()]
        if kind == "objects":
            array = np.empty(prod(description["shape"]), dtype=object)
            array[:] = [self.decode(item) for item in value]
            return array.reshape(description["shape"])
        if kind == "tensor":
            order, grad = description["order"], description["grad"]
            tensor = self.tensors[value].permute(np.argsort(order).tolist())
            if description["parameter"]:
                return nn.Parameter(tensor, requires_grad=grad)
            return tensor.requires_grad_(grad)
        if kind in COLLECTIONS:
            return COLLECTIONS[kind](self.decode(item) for item in value)
        if kind in MAPPINGS:
            return MAPPINGS[kind]((self.decode(k), self.decode(v)) for k, v in value)
        if kind == "torch_dtype":
            return {str(dtype): dtype for dtype in DTYPES}[value]
        if kind == "numpy_dtype":
            return np.dtype(value)
        if kind == "path":
            return Path(value)
        if kind == "random_state":
            rng = np.random.RandomState()
            rng.set_state(self.decode(value))
            return rng
        if kind == "partial":
            function, arguments, keywords = map(self.decode, value)
            return partial(function, *arguments, **keywords)
        if kind == "named":
            return self.find(value)
        if kind == "enum":
            return self.find(value)(self.decode(description["value"]))
        if kind == "pretrained":
            return find_pretrained(value, description["digest"])
        if kind == "class":
            return self.make_instance(value, description["attributes"])
        raise LoadError(f"The file holds a {kind!r}, which is unknown.")

    def make_instance(self, name: str, attributes: list[Any]) -> Any:
        """Make an instance from its attributes; its class is not called."""
        found = self.find(name)
        if not isinstance(found, type):
            raise LoadError(f"{name!r} in the file is no class.")
        if name.startswith("sklearn."):
            self.of_sklearn = found.__name__
        instance = found.__new__(found)
        if isinstance(instance, nn.Module):
            nn.Module.__init__(instance)
        instance.__dict__.update({str(k): self.decode(v) for k, v in attributes})
        return instance

    def find(self, name: str) -> Any:
        """Find a class or function by its name, if it may be used."""
        if name in self.trusted:
            return self.trusted[name]
        module, _, qualname = name.partition(":")
        allowed = [kinds for start, kinds in MODULES if module.startswith(start)]
        if allowed or module == FUNCTIONS:
            found = getattr(import_module(module), qualname)
            if isinstance(found, type) and allowed and issubclass(found, allowed[0]):
                return found
            if isfunction(found) and module == found.__module__ == FUNCTIONS:
                return found
        raise LoadError(
            f"The file names {name}, which is not trusted. If you know it, pass it: "
            f"load(file, trusted=[{qualname}])."
        )


def find_pretrained(name: str, digest: str) -> Backbone:
    """Find the pretrained network with these weights."""
    backbone = load_backbone(name)
    if weights_digest(backbone) != digest:
        raise LoadError(
            f"The pretrained weights of {name!r} on this machine are not those that "
            "the estimator was fitted with."
        )
    return backbone
