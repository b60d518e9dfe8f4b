"""What commands do with a model."""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.frozen import FrozenEstimator

from ..conformal import DriftMonitor, select_anomalies
from ..inspection import report
from ..inspection._scored import ScoredImages, Threshold
from ..localization import fit_size
from ..metrics import anomaly_roc_auc_score
from ..persistence import load
from ..runtime._files import printable, replacing
from ._folders import check_target, check_target_folder, kind, listed, map_names

COLUMNS = ("path", "score", "decision", "label", "p_value")


def opened(path: Path) -> Any:
    """Read a model, which skips what it cannot read."""
    model = load(path)
    if "on_error" in model.get_params():
        model.set_params(on_error="skip")
    return model


def say_threshold(model: Any) -> None:
    """Print the threshold, and how sure it is."""
    threshold = Threshold(model)
    click.echo(f"Threshold: {threshold.offset:.4g} (scores are lower for anomalies)")
    if threshold.held_out is not None and (rates := threshold.false_alarms()):
        share, low, high = rates
        click.echo(
            f"False alarms: {share:.3g} of new good images, by "
            f"{len(threshold.held_out)} scores ({low:.3f} to {high:.3f}, 95 %)"
        )


def say_found(model: Any, paths: list[Path]) -> None:
    """Print how many known defects a model finds."""
    scores = model.score_samples(paths)
    scores = scores[~np.isnan(scores)]
    if not len(scores):
        return  # a warning has told
    good = model.held_out_scores_
    labels = np.repeat([1, -1], [len(good), len(scores)])
    area = anomaly_roc_auc_score(labels, np.concatenate([good, scores]))
    found = int((scores < model.offset_).sum())
    click.echo(
        f"Known defects: {found} of {len(scores)} found; AUROC {area:.3f} against "
        "held-out good images"
    )


def score_folder(
    model: Path,
    folder: Path,
    table: Path,
    maps: Path | None,
    fdr: float | None,
    force: bool,
) -> bool:
    """Write the table of scores, and maps; tell whether all images are good."""
    check_target(table, force)
    if maps is not None:
        check_target_folder(maps, force)
    paths = listed(folder, "test")
    detector = opened(model)
    threshold = Threshold(detector)
    if fdr is not None and threshold.held_out is None:
        raise click.UsageError("The model has no p-values, which --fdr needs.")
    images = ScoredImages(
        detector, paths, maps=maps is not None, pictures=False, verbose="auto"
    )
    if images.no_maps:
        raise click.UsageError(f"There can be no --maps: {images.no_maps}")
    scores = np.full(len(paths), np.nan)
    failed: dict[int, str] = {}
    with replacing(table) as part, _FolderOfMaps(maps) as kept:
        level = getattr(detector, "map_offset_", np.nan)
        names = map_names(paths, folder)
        for batch in images:
            scores[batch.index] = batch.scores
            failed |= batch.failed
            if images.no_maps:
                raise ValueError(f"There can be no --maps: {images.no_maps}")
            for k, found in enumerate(batch.maps or ()):
                i = batch.index[k]
                kept.put(names[i], fit_size(found, images.inputs.size(i)), level)
        if len(failed) == len(paths):
            raise ValueError(f"No image can be read; the first says: {failed[0]}.")
        selected = _write_table(part, paths, scores, threshold, failed, fdr)
        kept.move()
    _say_scored(scores - threshold.offset, threshold)
    if selected is not None:
        click.echo(f"{int(selected.sum())} selected at a false discovery rate of {fdr}")
    _say_auroc(folder, paths, scores)
    click.echo(f"Table: {printable(str(table))}")
    if maps is not None:
        click.echo(f"Maps: {printable(str(maps))}")
    return bool((scores >= threshold.offset).all())


def _write_table(
    file: Path,
    paths: list[Path],
    scores: NDArray[np.float64],
    threshold: Threshold,
    failed: dict[int, str],
    fdr: float | None,
) -> NDArray[np.bool_] | None:
    p = threshold.p_values(scores)
    selected = None if fdr is None or p is None else select_anomalies(p, fdr)
    discovery = [] if selected is None else ["discovery"]
    # names are bytes to the system, and need not be text
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as out:
        writer = csv.writer(out)
        writer.writerow([*COLUMNS, *discovery, "error"])
        for i, path in enumerate(paths):
            score = scores[i]
            numbers: list[Any] = ["", "", -1, ""]
            if not np.isnan(score):
                decision = score - threshold.offset
                label = 1 if decision >= 0 else -1
                numbers = [float(score), float(decision), label]
                numbers.append("" if p is None else float(p[i]))
            found = [] if selected is None else [int(selected[i])]
            writer.writerow([str(path), *numbers, *found, failed.get(i, "")])
    return selected


def _say_scored(decisions: NDArray[np.float64], threshold: Threshold) -> None:
    known = decisions[~np.isnan(decisions)]
    n, flagged = len(known), int((known < 0).sum())
    click.echo(f"{n} images scored, {flagged} flagged ({flagged / n:.1%})")
    if expected := threshold.false_alarms(n):
        count, low, high = expected
        click.echo(
            f"If all were good, {count:.1f} would be flagged ({low:.1f} to "
            f"{high:.1f}, 95 %)"
        )


def _say_auroc(folder: Path, paths: list[Path], scores: NDArray[np.float64]) -> None:
    """Print how well scores agree with the folders of MVTec AD's layout."""
    if folder / "test" not in paths[0].parents:
        return
    good = np.array([kind(path, folder) == "good" for path in paths])
    known = ~np.isnan(scores)
    if good[known].any() and not good[known].all():
        labels = np.where(good, 1, -1)[known]
        area = anomaly_roc_auc_score(labels, scores[known])
        click.echo(f"AUROC {area:.3f}, test/good against all others")


class _FolderOfMaps:
    """Maps beside their folder, until all of them are there."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.names: list[Path] = []

    def __enter__(self) -> _FolderOfMaps:
        if self.folder is not None:
            self.part = tempfile.TemporaryDirectory(
                prefix=f"{self.folder.name}.", suffix=".part", dir=self.folder.parent
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self.folder is not None:
            self.part.cleanup()

    def put(self, name: Path, found: NDArray[Any], level: float) -> None:
        """Write a map."""
        top = 2 * level if level > 0 else max(float(found.max()), 1e-12)
        grey = np.rint(255 * np.clip(found / top, 0, 1)).astype(np.uint8)
        file = Path(self.part.name, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey).save(file)
        self.names.append(name)

    def move(self) -> None:
        """Put them where they belong."""
        for name in self.names if self.folder is not None else ():
            target = self.folder / name  # type: ignore[operator]
            target.parent.mkdir(parents=True, exist_ok=True)
            Path(self.part.name, name).replace(target)


def write_report(
    model: Path,
    folder: Path,
    out: Path,
    good: Path | None,
    fdr: float,
    n_images: int,
    force: bool,
) -> None:
    """Write the page."""
    check_target(out, force)
    paths = listed(folder, "test")
    detector = opened(model)
    training = None if good is None else listed(good, "train")
    drift = None
    if training is not None:
        drift = DriftMonitor(FrozenEstimator(detector), random_state=0)
        drift.fit(training).update(paths)
    report(
        detector,
        paths,
        out,
        X_train=training,
        drift=drift,
        alpha=fdr,
        n_images=n_images,
        title=f"{folder.resolve().name}: anomaly report",
    )
