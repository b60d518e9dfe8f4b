"""A damaged cache gives a warning or an error, and never another score."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import warnings
from contextlib import closing

import numpy as np
import pytest
import torch
from torch import nn

from skdeepad import BackboneFeatures
from skdeepad.backbones import Backbone, load_backbone
from skdeepad.cache import StageCache
from skdeepad.frozen import fingerprint

X = np.random.default_rng(0).normal(size=(40, 6))
NAME = "skdeepad-features.sqlite"


def features(folder, X=X):
    return BackboneFeatures("mlp", batch_size=8, memory=folder, random_state=0).fit(X)


EXPECTED = features(None).transform(X)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the features of 30 of 40 samples."""
    folder = tmp_path_factory.mktemp("cache")
    features(folder).transform(X[:30])
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    return tmp_path


def change(folder, statement, *values):
    with closing(sqlite3.connect(folder / NAME)) as table, table:
        table.execute(statement, values)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE rows SET value = zeroblob(length(value))",
        "UPDATE rows SET value = substr(value, 1, 8)",
        "UPDATE rows SET value = NULL",
        "UPDATE rows SET value = 'text'",
        "UPDATE rows SET digest = zeroblob(8)",
        "UPDATE rows SET digest = NULL",
        "UPDATE rows SET value = (SELECT value FROM rows LIMIT 1)",  # another sample's
        "DELETE FROM rows",
    ],
)
def test_a_damaged_row_is_computed_again(copy, statement, recwarn):
    change(copy, statement)
    np.testing.assert_array_equal(features(copy).transform(X), EXPECTED)
    task = (fitted := features(copy).fit(X))._front()
    keys = [task.key(tap) for tap in task.taps]
    inputs = fitted._check_inputs(X)
    digests = [inputs.digest(i) for i in range(len(X))]
    ((_, (kept,)),) = StageCache(copy).read(keys, digests)
    np.testing.assert_array_equal(kept, EXPECTED)
    assert not recwarn


def test_three_flipped_bytes(copy):
    rng = np.random.default_rng(0)
    (value,) = sqlite3.connect(copy / NAME).execute("SELECT value FROM rows").fetchone()
    flipped = bytearray(value)
    for i in rng.choice(len(flipped), 3, replace=False):
        flipped[i] ^= 0xFF
    change(copy, "UPDATE rows SET value = ? WHERE value = ?", bytes(flipped), value)
    np.testing.assert_array_equal(features(copy).transform(X), EXPECTED)


def test_sixty_damaged_files(whole, tmp_path):
    """Noise over some bytes, a page, or the rest; the end cut off."""
    rng = np.random.default_rng(0)
    content = (whole / NAME).read_bytes()
    outcomes = set()
    for i in range(60):
        damaged = bytearray(content)
        start = int(rng.integers(len(content)))
        size = [3, 100, 4096, len(content)][i % 4]
        if i % 5 == 4:
            del damaged[start:]
        else:
            noise = rng.bytes(len(damaged[start : start + size]))
            damaged[start : start + size] = noise
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / NAME).write_bytes(damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = features(folder).transform(X)
            except ValueError as error:
                assert str(folder) in str(error)
                assert "Remove that file" in str(error)
                outcomes.add("error")
                continue
        np.testing.assert_array_equal(found, EXPECTED)
        assert len(caught) <= 1
        assert all("cannot be used" in str(warning.message) for warning in caught)
        outcomes.add("warning" if caught else "silent")
    assert outcomes == {"error", "warning", "silent"}


@pytest.mark.parametrize(
    "trouble",
    [
        sqlite3.OperationalError("database is locked"),
        sqlite3.OperationalError("attempt to write a readonly database"),
        sqlite3.OperationalError("database or disk is full"),
        sqlite3.DatabaseError("database disk image is malformed"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        OSError(5, "Input/output error"),
    ],
    ids=str,
)
@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_trouble_on_the_way(copy, trouble, after, monkeypatch):
    """From some connection on, nothing can be read or written."""
    connect, calls = sqlite3.connect, []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) > after:
            raise trouble
        return connect(*args, **options)

    estimator = features(copy)
    monkeypatch.setattr(sqlite3, "connect", failing)
    with pytest.warns(UserWarning, match=r"memory=.*computed without it") as caught:
        np.testing.assert_array_equal(estimator.transform(X), EXPECTED)
    assert len(caught) == 1


def test_a_table_of_another_layout(tmp_path):
    change(tmp_path, "CREATE TABLE rows (something TEXT)")
    with pytest.warns(UserWarning, match="cannot be used"):
        np.testing.assert_array_equal(features(tmp_path).transform(X), EXPECTED)


@pytest.mark.parametrize("name", ["file", "file/inside", "long" * 100])
def test_a_folder_that_cannot_be(tmp_path, name):
    (tmp_path / "file").write_text("something")
    with pytest.raises(ValueError, match=r"memory=.*cannot be a folder") as caught:
        features(tmp_path / name).transform(X)
    assert len(str(caught.value)) < 500


class Scaled(nn.Module):
    """Has a setting that neither its repr nor its weights tell."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * torch.as_tensor(self.factor)


@pytest.mark.parametrize(
    "other", [3.0, np.full(6, 3.0, np.float32), torch.full((6,), 3.0)], ids=type
)
def test_networks_that_differ_in_a_setting_share_no_rows(tmp_path, other):
    def transform(factor):
        backbone = Backbone({"stage": Scaled(factor)}, in_channels=6, vectors=True)
        return BackboneFeatures(backbone, memory=tmp_path).fit_transform(X)

    same = type(other)(2.0) if isinstance(other, float) else other * 0 + 2
    np.testing.assert_allclose(transform(same), 2 * X, rtol=1e-6)
    np.testing.assert_allclose(transform(other), 3 * X, rtol=1e-6)


def test_one_network_has_one_name_in_every_process():
    code = (
        "from skdeepad.backbones import load_backbone\n"
        "from skdeepad.frozen import fingerprint\n"
        "print(fingerprint(load_backbone('timm/test_vit', weights=None, seed=0)))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    here = fingerprint(load_backbone("timm/test_vit", weights=None, seed=0))
    assert told.stdout.strip() == here
