"""Parameters and documentation of estimators: each in the class it belongs to."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, ClassVar, dataclass_transform

# the sections of a numpydoc docstring, in their order; "" is what comes before them
SECTIONS = (
    *("", "Parameters", "Attributes", "Returns", "Yields", "Raises", "Warns"),
    *("See Also", "Notes", "References", "Examples"),
)
MERGED = ("Parameters", "Attributes", "Raises", "Warns")  # entry by entry
FIRST = ("score_samples", "fit")  # methods whose X, y and groups others take, too
INHERITED = ("Returns",)  # as a whole, where a method does not say it itself
# parameters that most users set; signatures, documents and HTML give them first
EVERYDAY = (
    *("image_size", "stages", "max_steps", "contamination"),
    *("random_state", "memory", "verbose"),
)


def _inherit(
    documented: Any, above: Iterable[str | None], alike: Iterable[str | None] = ()
) -> str | None:
    """Add to a docstring what those above say that it does not say itself.

    Those that are alike are asked for parameters only.
    """
    if not documented.__doc__:  # as under python -OO
        return None
    sections = _split_sections(documented.__doc__)
    for other in map(_split_sections, above):
        for title in MERGED:
            own = _split_entries(sections.get(title, ""))
            theirs = _split_entries(other.get(title, ""))
            merged = own | {name: theirs[name] for name in theirs if name not in own}
            sections[title] = "".join(merged.values())
        for title in INHERITED:
            sections.setdefault(title, other.get(title, ""))
    entries: dict[str, str] = {}
    for other in (*map(_split_sections, reversed([*alike])), sections):
        entries |= _split_entries(other.get("Parameters", ""))
    names = inspect.signature(documented).parameters
    given = {re.sub(r"^\*+", "", name): name for name in entries}
    sections["Parameters"] = "".join(entries[given[n]] for n in names if n in given)
    return "\n".join(
        (f"{title}\n{'-' * len(title)}\n" if title else "")
        + sections[title].strip("\n")
        + "\n"
        for title in SECTIONS
        if sections.get(title, "").strip()
    )


def _split_sections(doc: str | None) -> dict[str, str]:
    """Split a numpydoc docstring into its sections, by title."""
    titles = r"(?m)^(\S[^\n]*)\n-{3,}\n"
    before, *rest = re.split(titles, inspect.cleandoc(doc or ""))
    return {"": before, **dict(zip(rest[::2], rest[1::2], strict=True))}


def _split_entries(section: str) -> dict[str, str]:
    """Split a section into what it documents, by name."""
    entries = re.split(r"(?m)^(?=\S)", section.strip("\n"))
    return {
        re.split(r"[\s:,]", entry, maxsplit=1)[0]: entry.rstrip() + "\n"
        for entry in entries
        if entry
    }


def _function(method: Any) -> Any:
    """Give the function of a class method, or of one under `available_if`."""
    return getattr(method, "__func__", getattr(method, "fn", method))


class DocumentedMixin:
    """Add to the documentation of a class and its methods what its bases say."""

    _own_doc: ClassVar[str | None] = None  # the docstring as it was written

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        bases = [base for base in cls.__mro__[1:] if issubclass(base, DocumentedMixin)]
        cls._own_doc = cls.__doc__
        cls.__doc__ = _inherit(cls, [base._own_doc for base in bases])
        for name in sorted(vars(cls), key=lambda name: name not in FIRST):
            method = _function(vars(cls)[name])
            if isinstance(method, FunctionType) and not name.startswith("_"):
                vars(method)["_own_doc"] = method.__doc__
                above = [vars(base)[name] for base in bases if name in vars(base)]
                alike = [getattr(cls, other, None) for other in FIRST]
                method.__doc__ = _inherit(
                    method,
                    [_function(other)._own_doc for other in above],
                    [other.__doc__ for other in alike if other],
                )


def _order_signature(cls: type) -> None:
    """Put everyday parameters first, then a class's own before those of its bases."""
    declared = [vars(base).get("__annotations__", {}) for base in cls.__mro__]
    names = list(dict.fromkeys(name for found in declared for name in found))

    def place(parameter: inspect.Parameter) -> tuple[int, int, int]:
        name = parameter.name  # "self", or of an __init__ that is written out
        if name in EVERYDAY:
            return parameter.kind, 0, EVERYDAY.index(name)
        return parameter.kind, 1, names.index(name) if name in names else -1

    init: Any = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(init)
    ordered = sorted(signature.parameters.values(), key=place)
    init.__signature__ = signature.replace(parameters=ordered)


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(field,))
class ParametersMixin(DocumentedMixin):
    """Make an estimator's `__init__` and its documentation from those of its bases.

    A subclass declares its own parameters as fields of a dataclass, their constraints
    in ``_parameter_constraints``, and documents them and its attributes in the
    docstring. Those of its bases are added: to the signature, the constraints, and
    the docstring, where `EVERYDAY` ones come first, then its own. A parameter that is
    declared or documented again replaces the inherited one.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        dataclass(kw_only=True, eq=False, repr=False)(cls)
        _order_signature(cls)
        own = vars(cls).get("_parameter_constraints", {})
        inherited: dict[str, Any] = {}
        for base in reversed(cls.__bases__):
            inherited |= getattr(base, "_parameter_constraints", {})
        cls._parameter_constraints = {**inherited, **own}
        super().__init_subclass__(**options)
