"""What a file says it holds, told without making it: torch is not needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ._archive import ARRAYS, LoadError, read_array, read_manifest, unpack


def summarize(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Tell what a file that `save` wrote says of its estimator.

    Returns
    -------
    dict
        "class": its name; "made_with": versions by package; "parameters" and "fitted":
        attributes by name, in words but for numbers, text and tuples of them.

    Raises
    ------
    LoadError
        If the file is damaged, or not one that `save` wrote.
    """
    members = unpack(Path(file).read_bytes())
    try:
        manifest = read_manifest(members)
        objects = manifest["objects"]
        (place,) = manifest["root"]
        root = objects[place]
        values = {k: _value(objects, members, v) for k, v in root["attributes"]}
        return {
            "class": _last(root["class"]),
            "made_with": dict(manifest["made_with"]),
            "parameters": {k: v for k, v in values.items() if k.strip("_") == k},
            "fitted": {k: v for k, v in values.items() if k.endswith("_")},
        }
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise LoadError(f"The file is not one that save wrote ({error!r}).") from error


def _value(objects: list[Any], members: dict[str, memoryview], value: Any) -> Any:
    """Give a number, text or a tuple of them as it is, and the class of others."""
    if not isinstance(value, list):
        return value
    told = objects[value[0]]
    kind, content = next(iter(told.items()))
    if kind == "float":
        return float(content)
    if kind in ("list", "tuple"):
        plain = [x for x in content if not isinstance(x, list)]
        return tuple(plain) if plain == content else f"{kind} of {len(content)}"
    if kind in ("array", "scalar"):
        array = read_array(members[ARRAYS.format(content)])
        return array.item() if kind == "scalar" else f"array of shape {array.shape}"
    return _last(content) if isinstance(content, str) else kind


def _last(name: str) -> str:
    return name.rpartition(".")[2].rpartition(":")[2]
