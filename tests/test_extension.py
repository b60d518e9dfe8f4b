"""The page on how to write a detector, and the checks that it recommends."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import skdeepad
from skdeepad import MahalanobisFeatureScorer
from skdeepad.extension import check_detector

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def code():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


@pytest.fixture(scope="module")
def names(code, tmp_path_factory):
    """The names of the page's module: imported from a file, as pickle asks for."""
    folder = tmp_path_factory.mktemp("extending")
    (folder / "extending.py").write_text(code[0], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield vars(import_module("extending"))


def test_the_method_has_no_more_lines_than_promised(code):
    body = code[0].partition("def _learn")[2]
    assert len(body.splitlines()) < 50


def test_the_page_runs(code, names, photos):
    exec(code[1], {**names, "images": photos})


def test_the_method_is_checked_whole(code, names):
    assert "check_detector(NoisyFeatures(max_steps=5))" in code[2]
    exec(code[2], names)


def test_loss_by_hand(names):
    """Margins that a network gives, against the hinge loss that the paper has."""
    f = np.array([[1.0, 2.0], [3.0, -1.0]])
    drawn = torch.Generator().manual_seed(3)
    noise = torch.randn(2, 2, generator=drawn, dtype=torch.float64).numpy()
    margins = np.r_[f, f + 0.5 * np.array([1.0, 4.0]) * noise].sum(axis=1) / 4
    terms = np.maximum(0, 0.5 - margins[:2]), np.maximum(0, 0.5 + margins[2:])

    detector = names["NoisyFeatures"](noise=0.5, batch_size=2)
    detector._network = network = torch.nn.Identity()
    network.features = lambda x: x
    network.projection = lambda x: x.sum(dim=1, keepdim=True) / 4
    outputs = SimpleNamespace(
        front=SimpleNamespace(device="cpu"),
        batches=lambda index: [(index, [torch.from_numpy(f)])],
    )
    losses = detector._losses(
        outputs, np.arange(2), torch.tensor([1.0, 4.0]), np.random.RandomState(0)
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert next(losses).item() == pytest.approx(terms[0].mean() + terms[1].mean())


class Forgetful(MahalanobisFeatureScorer):
    """Scores by the batch that an image comes in."""

    def _score(self, features):
        return super()._score(features) - len(features)


class Optimistic(MahalanobisFeatureScorer):
    """Takes its threshold from the scores of what it was trained on."""

    def _set_threshold(self, digests, scores, unseen=None):
        super()._set_threshold(digests, np.zeros_like(scores) - 1e-3)


@pytest.mark.parametrize("wrong", [Forgetful, Optimistic])
def test_what_breaks_the_contract_is_found(wrong):
    with pytest.raises(AssertionError):
        check_detector(wrong(), scikit_learn=False)


def test_public_names():
    assert "extension" in dir(skdeepad)
