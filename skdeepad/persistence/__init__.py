"""Fitted estimators in files that execute nothing when they are read.

A file is a zip archive of a manifest in JSON, arrays in NumPy's format and tensors in
safetensors; a digest of all of it is at the end. The manifest is a list of objects,
each made of plain values and of objects before it. Classes are named in it, and only
those that are known here, or that the reader trusts, are made again: without calling
them, from attributes that are checked.

What needs torch is imported when an estimator is written or read.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from reprlib import repr as short
from typing import Any, BinaryIO

from ..runtime._files import replacing
from ._archive import (
    LoadError,
    pack,
    read_arrays,
    read_manifest,
    read_tensors,
    unpack,
)

__all__ = ["LoadError", "load", "save"]

FORMAT = 1  # of the files; a reader refuses newer ones
PACKAGES = ("skdeepad", "scikit-learn", "torch", "numpy")


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
        The file is written whole, or not at all.

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
    `memory`, and `weights` and `fisher` that are paths, are written as None: they name
    places on this machine. Set them again after `load` where they are wanted.

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
    from sklearn.base import BaseEstimator

    from ._writer import Writer

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
    data = pack(manifest, writer.arrays, writer.tensors)
    if not isinstance(file, str | os.PathLike):
        file.write(data)
        return
    with replacing(file) as part:
        part.write_bytes(data)


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
        network's, and those of other packages that are not on this package's list.
        They are filled with whatever the file says.

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
    UserWarning
        If the file names places on another machine, which are set to None.

    See Also
    --------
    save : Writes the file.

    Notes
    -----
    What is promised against files that were forged, and what is not, is told in
    ``docs/persistence.md``. A forged file can still score wrongly: sign files where it
    matters who wrote them.

    Examples
    --------
    >>> from io import BytesIO
    >>> from skdeepad import load
    >>> load(BytesIO(b"something else"))
    Traceback (most recent call last):
    ...
    skdeepad.persistence.LoadError: The file is damaged, or not one that save wrote: ...
    """
    if isinstance(file, str | os.PathLike):
        data = Path(file).read_bytes()
    else:
        file.seek(0)
        data = file.read()
    try:
        return read(data, trusted)
    except (LoadError, FileNotFoundError, Warning):
        raise
    except Exception as error:  # whatever a hostile file may provoke
        raise LoadError(
            f"The file is not one that save wrote ({type(error).__name__}: {error})."
        ) from error


def read(data: bytes, trusted: Iterable[Any]) -> Any:
    """Make the estimator again."""
    from sklearn.base import BaseEstimator
    from sklearn.exceptions import InconsistentVersionWarning

    from ._reader import Reader
    from ._registry import name_of

    members = unpack(data)
    manifest = read_manifest(members)
    made_with = manifest["made_with"]
    if manifest["format"] > FORMAT:
        raise LoadError(
            f"The file was written by skdeepad {made_with['skdeepad']}, in a "
            f"format newer than {version('skdeepad')} reads: upgrade skdeepad."
        )
    tensors = read_tensors(members)
    known = {name_of(known): known for known in trusted}
    reader = Reader(read_arrays(members), tensors, known)
    estimator = reader.read(manifest["objects"], manifest["root"])
    if not isinstance(estimator, BaseEstimator):
        raise LoadError("The file holds no estimator.")
    if reader.paths:
        told = ", ".join(f"{name}={short(v)}" for name, v in reader.paths.items())
        warnings.warn(
            f"{told} of the file is a place on another machine, perhaps, and was set "
            "to None. Set it with set_params if it is wanted here.",
            UserWarning,
            stacklevel=3,
        )
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
