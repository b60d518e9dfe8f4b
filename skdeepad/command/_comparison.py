"""Which detector suits a folder of images."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

from .. import detectors
from ..datasets import make_pseudo_anomalies
from ..inputs import ImagePaths, chunks, load_batches
from ..model_selection import compare_detectors
from ..runtime._files import printable
from ._commands import DETECTORS
from ._folders import listed

MOST_BAD = 100  # images with defects
SPOILT = 20  # good images that are spoilt, in each of five ways


def compare_on(
    good: Path,
    bad: Path | None,
    names: tuple[str, ...],
    backbones: tuple[str, ...],
    contamination: float,
    image_size: int | None,
    n_images: int,
) -> None:
    """Fit detectors to some of the images, and print how well they do on others."""
    rng = np.random.default_rng(0)
    paths = _readable(_some(listed(good, "train"), n_images, rng))
    n_test = len(paths) // 3
    if n_test < 5:
        raise ValueError(
            f"There are {len(paths)} good images that can be read; 15 are needed."
        )
    train, test = paths[n_test:], paths[:n_test]
    candidates = {
        name if len(backbones) == 1 else f"{name}, {backbone}": _make(
            name, backbone, contamination, image_size
        )
        for name in names
        for backbone in backbones
    }
    with tempfile.TemporaryDirectory() as spoilt:
        defects = listed(bad, "test") if bad else listed(good, "bad")
        defects = _readable(_some(defects, MOST_BAD, rng))
        kinds = [path.parent.name for path in defects]
        if not defects:
            made = make_pseudo_anomalies(test[:SPOILT], folder=spoilt)
            defects = [Path(path) for kind in made for path in made[kind]]
            kinds = [kind for kind in made for _ in made[kind]]
        click.echo(
            f"{len(train)} good images to learn from, {len(test)} held back, "
            f"{len(defects)} defects ({printable(', '.join(sorted(set(kinds))))})"
        )
        y_test = np.repeat([1, -1], [len(test), len(defects)])
        table = compare_detectors(
            candidates,
            train,
            [*test, *defects],
            y_test,
            kinds_test=["good"] * len(test) + kinds,
            n_seeds=1,
        )
    _print(table)


def _make(
    name: str, backbone: str, contamination: float, image_size: int | None
) -> Any:
    return getattr(detectors, DETECTORS[name])(
        backbone, contamination=contamination, image_size=image_size
    )


def _some(paths: list[Path], n: int, rng: np.random.Generator) -> list[Path]:
    """Choose some at random, in a random order."""
    return [paths[i] for i in rng.permutation(len(paths))[:n]]


def _readable(paths: list[Path]) -> list[Path]:
    """Leave out, and name, those that cannot be read."""
    rows = np.empty(len(paths), dtype=object)
    rows[:] = paths
    failed: dict[int, str] = {}
    for batch in load_batches(
        ImagePaths(rows), chunks(np.arange(len(rows)), 32), (1, 1), 3
    ):
        failed |= batch.failed
    for i, why in failed.items():
        click.echo(f"Warning: {printable(f'{paths[i]}: {why}')}", err=True)
    return [path for i, path in enumerate(paths) if i not in failed]


def _print(table: Any) -> None:
    """Print a line for each detector, and its worst kind of defect; the best first."""
    overall = table[table["kind"] == "all"].sort_values("auroc", ascending=False)
    width = max(len("detector"), *map(len, overall["detector"]))
    click.echo(
        f"{'detector':{width}}  AUROC  found  false alarms  fit (s)  score (s)  "
        "hardest kind"
    )
    for _, row in overall.iterrows():
        kinds = table[(table["detector"] == row["detector"]) & (table["kind"] != "all")]
        hardest = kinds.loc[kinds["auroc"].idxmin()]
        click.echo(
            f"{row['detector']:{width}}  {row['auroc']:.3f}  {row['found']:5.0%}  "
            f"{row['false_alarms']:12.0%}  {row['fit_seconds']:7.1f}  "
            f"{row['score_seconds']:9.1f}  "
            f"{printable(hardest['kind'])} ({hardest['auroc']:.3f})"
        )
