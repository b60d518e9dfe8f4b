"""Parameters of estimators: said once, in the class that they belong to."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, dataclass_transform

SECTIONS = ("Parameters", "Attributes")


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(field,))
class ParametersMixin:
    """Make an estimator's `__init__` and its documentation from those of its bases.

    A subclass declares its own parameters as fields of a dataclass, their constraints
    in ``_parameter_constraints``, and documents them and its attributes in the
    docstring. Those of its bases are added: to the signature, the constraints, and
    the docstring, where its own come first. A parameter that is declared or documented
    again replaces the inherited one.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        dataclass(kw_only=True, eq=False, repr=False)(cls)
        _order_signature(cls)
        own = vars(cls).get("_parameter_constraints", {})
        inherited: dict[str, Any] = {}
        for base in reversed(cls.__bases__):
            inherited |= getattr(base, "_parameter_constraints", {})
        cls._parameter_constraints = {**inherited, **own}
        if cls.__doc__:  # not under python -OO
            cls.__doc__ = _with_inherited_entries(cls)


def _order_signature(cls: type) -> None:
    """Put a class's own parameters before those of its bases."""
    declared = [vars(base).get("__annotations__", {}) for base in cls.__mro__]
    names = list(dict.fromkeys(name for found in declared for name in found))

    def place(parameter: inspect.Parameter) -> tuple[int, int]:
        name = parameter.name  # "self", or of an __init__ that is written out
        return parameter.kind, names.index(name) if name in names else -1

    init: Any = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(init)
    ordered = sorted(signature.parameters.values(), key=place)
    init.__signature__ = signature.replace(parameters=ordered)


def _with_inherited_entries(cls: type) -> str:
    """Add the entries of bases to the sections of a class's docstring."""
    doc = inspect.cleandoc(cls.__doc__ or "")
    for section in SECTIONS:
        entries = _entries(doc, section)
        for base in cls.__mro__[1:]:
            if issubclass(base, ParametersMixin):
                for name, text in _entries(vars(base).get("__doc__"), section).items():
                    entries.setdefault(name, text)
        names = list(inspect.signature(cls).parameters)
        if section == "Parameters":  # in the order of the signature
            entries = {name: entries[name] for name in names if name in entries}
        if entries:
            doc = _with_section(doc, section, "".join(entries.values()))
    return doc


def _entries(doc: str | None, section: str) -> dict[str, str]:
    """Part a section of a numpydoc docstring by names."""
    found = _find(inspect.cleandoc(doc or ""), section)
    if not found:
        return {}
    entries = re.split(r"(?m)^(?=\S)", found["body"].strip())
    return {
        re.split(r"\W", entry, maxsplit=1)[0]: entry.rstrip() + "\n"
        for entry in entries
        if entry
    }


def _find(doc: str, section: str) -> re.Match[str] | None:
    until = r"(?=^\S[^\n]*\n-{3,}\n|\Z)"
    pattern = rf"^{section}\n-{{3,}}\n(?P<body>.*?){until}"
    return re.search(pattern, doc, re.MULTILINE | re.DOTALL)


def _with_section(doc: str, section: str, text: str) -> str:
    """Put a section in the place of the one of that name, or where it belongs."""
    whole = f"{section}\n{'-' * len(section)}\n{text}\n"
    if found := _find(doc, section):
        return doc[: found.start()] + whole + doc[found.end() :]
    before = _find(doc, r"(?:Attributes|See Also|Notes|References|Examples)")
    at = before.start() if before else len(doc)
    return f"{doc[:at].rstrip()}\n\n{whole}{doc[at:]}"
