"""Progress: where a bar is shown, and what is said where there is none."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from skdeepad import DeepSVDD, progress
from skdeepad.progress import Progress

NAME = "Estimator training"


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Half a second passes whenever somebody looks."""
    now = np.arange(0, 1e6, 0.5)
    monkeypatch.setattr(progress, "monotonic", iter(now).__next__)
    monkeypatch.setattr(progress, "_told", set())


def run(total, verbose="auto", name=NAME):
    with Progress(total, "step", name, verbose) as shown:
        for _ in range(total):
            shown.update(1)


def test_what_takes_long_is_told_once(caplog, capfd):
    run(20)  # at a second, 2 of 20 are done: 10 seconds
    assert not caplog.records
    run(30)
    run(40)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("skdeepad", logging.WARNING)
    assert record.getMessage() == (
        "Estimator training: 30 steps take about 15 seconds. Set verbose=True to see "
        "progress, verbose=False for silence."
    )
    run(30, name="Estimator pretraining")
    assert len(caplog.records) == 2
    assert capfd.readouterr() == ("", "")


def test_silence_and_bars_where_they_are_asked_for(caplog, capfd):
    run(100, verbose=False)
    assert capfd.readouterr() == ("", "")
    run(100, verbose=True)
    assert "100/100" in capfd.readouterr().err
    assert not caplog.records


def test_a_terminal_shows_bars_of_what_takes_more_than_a_moment(
    monkeypatch, caplog, capfd
):
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    run(100)
    assert capfd.readouterr() == ("", "")  # less than a second by the real clock
    monkeypatch.setattr(progress, "DELAY", 0.0)
    run(100)
    assert "Estimator training: 100%" in capfd.readouterr().err
    assert not caplog.records


def test_who_watches(monkeypatch):
    assert not progress.is_watched()  # pytest captures
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    assert progress.is_watched()
    monkeypatch.setattr(progress, "parent_process", lambda: "joblib's parent")
    assert not progress.is_watched()
    monkeypatch.undo()
    monkeypatch.setattr(progress.auto, "tqdm", object)  # in a notebook
    assert progress.is_watched()


def test_pretraining_has_its_own_progress(caplog, capfd):
    X = np.random.default_rng(0).normal(size=(80, 4))
    options = {"pretrain_steps": 30, "max_steps": 40, "random_state": 0}
    DeepSVDD(**options).fit(X)
    assert [record.getMessage().split(" take")[0] for record in caplog.records] == [
        "DeepSVDD pretraining: 30 steps",
        "DeepSVDD training: 40 steps",
    ]
    DeepSVDD(**options, verbose=True).fit(X)
    shown = capfd.readouterr().err
    assert "DeepSVDD pretraining: 100%" in shown
    assert "DeepSVDD training: 100%" in shown


def test_parts_of_something_are_silent(monkeypatch, caplog, capfd):
    """A part says nothing of its own, unless it was asked for."""
    with progress.silence():
        run(100)
    assert not caplog.records
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    with progress.silence():
        run(100, name="quiet")
        run(100, verbose=True, name="asked for")
    run(100, name="afterwards")
    shown = capfd.readouterr().err
    assert "quiet" not in shown and "asked for" in shown and "afterwards" in shown
