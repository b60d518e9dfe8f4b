"""The package as a whole: what importing it costs, its names, its docstrings."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
from draw_imports import drawing, imported_rooms, rooms
from estimators import make

import skdeepad
from skdeepad.base import AnomalyDetector

ROOT = Path(skdeepad.__file__).parent
MODULES = [
    "backbones",
    "conformal",
    "datasets",
    "detectors",
    "export",
    "extension",
    "fisher",
    "inspection",
    "metrics",
    "model_selection",
    "persistence",
    "representation",
    "runtime",
    "scorers",
]
NAMES = [
    (module, name)
    for module in ("skdeepad", *(f"skdeepad.{module}" for module in MODULES))
    for name in import_module(module).__all__
]
PUBLIC = {
    name: public
    for module, name in NAMES
    # scorers, of metrics, are objects without a docstring; errors need no example, and
    # base classes have docs/extending.md
    if hasattr(public := getattr(import_module(module), name), "__name__")
    and not name.endswith("Error")
    and (module != "skdeepad.extension" or name == "check_detector")
}
ESTIMATORS = {name: public for name, public in PUBLIC.items() if hasattr(public, "fit")}
METHODS = {
    method.__qualname__: method
    for cls in [*ESTIMATORS.values(), skdeepad.OneClassKFold]
    for _, method in inspect.getmembers(cls, inspect.isfunction)
    if method.__module__.startswith("skdeepad") and method.__name__[0] != "_"
}

# Imports run downwards only: each room stands on rooms of the lines below it.
TOP = [("command",), ("inspection",)]  # they put the rest together
HOUSE = [
    ("export", "extension", "persistence", "representation"),
    ("conformal",),
    ("detectors",),
    ("features", "fisher", "localization"),
    ("cache", "inference", "scorers"),
    ("frozen",),
    ("augmentation", "backbones", "base", "objectives", "training"),
    ("draws", "inputs", "labels"),
    ("checks", "parameters", "progress", "runtime"),
]
# around the estimators, which know nothing of them; on the same ground
BESIDE = [
    ("model_selection",),
    ("datasets", "metrics"),
    ("inputs", "labels"),
    ("checks", "parameters", "runtime"),
]


# importing


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import skdeepad", "numpy sklearn torch torchvision timm"),
        (
            "import skdeepad as ad; ad.scorers, ad.KNNScorer, ad.OneClassKFold",
            "torch torchvision timm",
        ),
        (
            "from skdeepad import BackboneFeatures, MahalanobisFeatureScorer",
            "torchvision timm huggingface_hub skimage matplotlib",
        ),
        ("import skdeepad.runtime", "torch sklearn scipy onnx onnxruntime PIL"),
    ],
)
def test_imports_wait_until_they_are_needed(statement, absent):
    code = f"{statement}; import sys; print(*sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT.parent,
    )
    assert not set(absent.split()) & set(process.stdout.split())


def test_every_room_has_its_place():
    placed = [room for line in TOP + HOUSE + BESIDE[:-2] for room in line]
    assert sorted(placed) == sorted({room for room, _ in rooms()})


@pytest.mark.parametrize(
    ("room", "path"),
    [pytest.param(*r, id=str(r[1].relative_to(ROOT))) for r in rooms()],
)
def test_imports_run_downwards(room, path):
    for lines in (TOP + HOUSE + BESIDE, HOUSE, BESIDE):
        for depth, line in enumerate(lines):
            if room in line:
                below = {other for lower in lines[depth + 1 :] for other in lower}
                assert set(imported_rooms(path)) <= {room} | below


def test_the_drawing_of_imports_is_of_this_code():
    page = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert drawing() in page


# names


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_public_names_resolve(module, name):
    assert getattr(import_module(module), name) is not None
    assert name in dir(import_module(module))


def test_names_of_the_package():
    assert sorted(skdeepad.__all__) == skdeepad.__all__
    assert {*skdeepad.__all__, *MODULES, "__version__"} <= set(dir(skdeepad))
    for module in ("scorers", "detectors"):
        assert set(import_module(f"skdeepad.{module}").__all__) < set(skdeepad.__all__)
    with pytest.raises(AttributeError, match="no attribute 'bogus'"):
        skdeepad.bogus  # noqa: B018
    # what type checkers see
    source = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    typed = next(node for node in source.body if isinstance(node, ast.If))
    assert (
        sorted(alias.name for node in typed.body for alias in node.names)
        == skdeepad.__all__
    )


def test_types_are_shipped():
    assert files("skdeepad").joinpath("py.typed").is_file()


def test_project_file():
    file = Path(__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8"))
    assert project["project"]["version"] == skdeepad.__version__
    assert project["project"]["scripts"] == {"skdeepad": "skdeepad.command:main"}
    assert project["tool"]["setuptools"]["package-data"]["skdeepad"] == [
        "py.typed",
        "inspection/*.jinja",
    ]


# docstrings


def sections(documented):
    """Part a numpydoc docstring by its headings."""
    parts = re.split(r"^(\w[\w ]*)\n-+\n", inspect.getdoc(documented) or "", flags=re.M)
    return {"Summary": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def entries(section):
    """Name what a section describes: the lines that are not indented."""
    lines = re.findall(r"^(?=\S)[^:\n]+", section, flags=re.M)
    return [name.strip("* ") for line in lines for name in line.split(",")]


@pytest.mark.parametrize("public", PUBLIC.values(), ids=PUBLIC)
def test_docstring(public):
    parts = sections(public)
    first, _, rest = parts["Summary"].partition("\n")
    assert first.endswith(".")
    assert not rest or rest.startswith("\n")
    assert entries(parts.get("Parameters", "")) == [
        *inspect.signature(public).parameters
    ]
    assert inspect.isclass(public) or "Returns" in parts
    assert ">>> " in parts["Examples"]


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_documented_defaults(estimator):
    """An inherited entry must not outlive a default that a subclass has changed."""
    documented = dict(
        re.findall(r"(?m)^(\w+) : .*default=(.*)$", sections(estimator)["Parameters"])
    )
    for name, parameter in inspect.signature(estimator).parameters.items():
        if parameter.default is not parameter.empty:
            assert (
                ast.unparse(ast.parse(documented[name]))
                == ast.unparse(ast.parse(repr(parameter.default)))
                or eval(documented[name]) == parameter.default
            )


def test_parameters_come_from_the_nearest_class():
    class Base(AnomalyDetector):
        """Summary.

        Parameters
        ----------
        first : int
            Of the base.
        """

        first: int = 1
        _parameter_constraints: ClassVar = {"first": [int]}

    class Child(Base):
        """Summary.

        Parameters
        ----------
        second : str
            Its own.
        contamination : float
            Anew.
        """

        second: str = "a"
        contamination: float = 0.1
        _parameter_constraints: ClassVar = {"second": [str]}

    # everyday ones first, then its own
    in_order = ["contamination", "second", "first"]
    assert list(inspect.signature(Child).parameters) == in_order
    assert Child(first=2).get_params() == {
        **{"first": 2, "second": "a", "contamination": 0.1}
    }
    assert set(Child._parameter_constraints) == {"first", "second", "contamination"}
    assert entries(sections(Child)["Parameters"]) == in_order
    assert "Anew." in Child.__doc__ and "Share of new" not in Child.__doc__
    assert entries(sections(Child)["Attributes"])[0] == "offset_"

    class Written(Child):
        def __init__(self, third=3):
            self.third = third

    assert Written().get_params() == {"third": 3}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_docstring_of_methods(method):
    parts = sections(method)
    _, *parameters = inspect.signature(method).parameters  # self
    assert entries(parts.get("Parameters", "")) == parameters
    assert "Returns" in parts or "Yields" in parts


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_attributes_are_documented(estimator):
    """What `fit` sets for all to see, and nothing else."""
    X = pd.DataFrame(np.random.default_rng(0).normal(size=(30, 3)), columns=list("abc"))
    fitted = vars(make(estimator).fit(X, [1, -1] * 15))
    public = {name for name in fitted if name.endswith("_") and name[0] != "_"}
    assert set(entries(sections(estimator)["Attributes"])) == public
