"""The examples run, and write their pictures."""

from __future__ import annotations

import runpy
from pathlib import Path

import matplotlib as mpl
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURES = {
    "folder_to_decision": ["folder_to_decision.png"],
    "scikit_learn_tour": ["scikit_learn_tour.png"],
    "compare_methods": ["compare_methods.png", "compare_methods_loss.png"],
}


@pytest.mark.filterwarnings("ignore")  # few images, few steps
@pytest.mark.parametrize("name", PICTURES)
def test_example(name, tmp_path, monkeypatch, capsys):
    path = str(EXAMPLES / f"{name}.py")
    monkeypatch.setattr("sys.argv", [path, "--quick", "--out", str(tmp_path)])
    with mpl.rc_context():
        runpy.run_path(path, run_name="__main__")
    told = capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == PICTURES[name]
    for file in PICTURES[name]:
        assert f"written: {tmp_path / file}" in told
        with Image.open(tmp_path / file) as picture:
            assert min(picture.size) > 300
