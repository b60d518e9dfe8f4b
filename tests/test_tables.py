"""Tables of the documents say what benchmarks/results say."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
tables = module_from_spec(spec)
spec.loader.exec_module(tables)
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in tables.DOCUMENTS}


@pytest.mark.parametrize("name", TEXTS)
def test_tables_are_those_of_the_results(name):
    assert tables.written(TEXTS[name]) == TEXTS[name], "run benchmarks/tables.py"


def test_every_table_is_in_a_document():
    marked = [m[2] for text in TEXTS.values() for m in tables.MARKED.finditer(text)]
    assert sorted(marked) == sorted(tables.TABLES)
    opened = sum(text.count("<!-- table:") for text in TEXTS.values())
    assert opened == sum(text.count("<!-- end -->") for text in TEXTS.values())
    assert opened == len(marked)


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_figure_that_differs_is_caught(name):
    (text,) = (t for t in TEXTS.values() if f"<!-- table: {name} -->" in t)
    start = text.index(f"<!-- table: {name} -->")
    figure = re.search(r"\d\d\.\d\d", text[start:])
    wrong = "00.01" if figure[0] != "00.01" else "00.02"
    at = start + figure.start()
    changed = text[:at] + wrong + text[at + 5 :]
    assert tables.written(changed) == text
