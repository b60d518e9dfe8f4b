"""Which default for images: patches, whole images, or both.

    python benchmarks/image_default.py textures [--draws 2]
    python benchmarks/image_default.py fashion-mnist [--n-train 1000] [--n-test 100]

"textures": small defects, the draws of `defects.py`. "fashion-mnist": each class in
turn is normal, as in `one_vs_rest.py`, but with the first `--n-train` training images
of the class and the first `--n-test` test images of each: patches take their time. The
members are fitted once, judged alone, and joined as `DetectorEnsemble()` joins them.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from _common import environment, write_json
from one_vs_rest import DETECTORS, load_tasks
from sklearn.pipeline import Pipeline

from skdeepad import DetectorEnsemble, MahalanobisFeatureScorer, PatchDetector
from skdeepad.datasets import make_texture_defects
from skdeepad.metrics import anomaly_roc_auc_score

ALONE = {
    "patches": lambda: PatchDetector(image_size=160, random_state=0),
    "cosine": lambda: DETECTORS["cosine-knn"](image_size=160),
    "whitened": lambda: DETECTORS["whitened-knn"](stages="stage5", image_size=64),
    "MahalanobisFeatureScorer": lambda: MahalanobisFeatureScorer(image_size=112),
}
JOINED = {
    "DetectorEnsemble()": (["patches", "cosine"], "max"),
    "two views of whole images": (["cosine", "whitened"], "mean"),
}
SHARES = np.array([1, 2]) / 3  # of the second one: squared lengths, and lengths


def textures(options: argparse.Namespace) -> Iterator[tuple[str, Any, Any, Any]]:
    """Give the draws of `defects.py`."""
    for texture in ("brick", "grass", "gravel"):
        for draw in range(options.draws):
            data = make_texture_defects(
                texture,
                n_train=150,
                n_test_good=60,
                n_test_defective=60,
                split="halves",
                random_state=500 + draw,
            )
            yield f"{texture} {draw}", data.X_train, data.X_test, data.y_test


def fashion_mnist(options: argparse.Namespace) -> Iterator[tuple[str, Any, Any, Any]]:
    """Give each class against the others."""
    tasks = list(load_tasks("fashion-mnist", None, None, False))
    labels = [y for *_, y in tasks]
    some = np.concatenate([np.flatnonzero(y == 1)[: options.n_test] for y in labels])
    for _, name, X_train, X_test, y_test in tasks:
        yield name, X_train[: options.n_train], X_test[some], y_test[some]


def judge(y: Any, scores: Any, offset: float, times: tuple[float, ...]) -> Any:
    """Give the figures of one detector."""
    return {
        "auroc": 100 * anomaly_roc_auc_score(y, scores),
        "false_alarms": 100 * float(np.mean(scores[y == 1] < offset)),
        "found": 100 * float(np.mean(scores[y == -1] < offset)),
        **dict(zip(("fit_s", "score_s"), times, strict=True)),
    }


def timed(function: Any, *arguments: Any) -> tuple[Any, float]:
    """Call a function, and say how long it took."""
    start = time.perf_counter()
    return function(*arguments), time.perf_counter() - start


def joined(names: list[str], combine: str, columns: dict[str, Any]) -> Any:
    """Join members that are fitted, by their scores of training and of test images."""
    both = DetectorEnsemble(combine=combine)
    held_out, new = (
        np.column_stack([columns[name][k] for name in names]) for k in (0, 1)
    )
    both._largest, both._shares = combine == "max", SHARES
    both.training_scores_ = np.sort(held_out, axis=0)
    both._set_offset(both._combine(held_out))
    return both._combine(new), both.offset_


def measure(X_train: Any, X_test: Any, y: Any) -> dict[str, Any]:
    """Judge all detectors on one task."""
    rows, columns = {}, {}
    for name, make in ALONE.items():
        fitted, fit_s = timed(make().fit, X_train)
        scores, score_s = timed(fitted.score_samples, X_test)
        offset = fitted[-1].offset_ if isinstance(fitted, Pipeline) else fitted.offset_
        rows[name] = judge(y, scores, offset, (fit_s, score_s))
        columns[name] = fitted.score_samples(X_train), scores
    for name, (members, combine) in JOINED.items():
        times = tuple(sum(rows[m][t] for m in members) for t in ("fit_s", "score_s"))
        rows[name] = judge(y, *joined(members, combine, columns), times)
    return rows


def means(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Average each detector's figures over tasks."""
    first = next(iter(found.values()))
    return {
        detector: {
            key: float(np.mean([rows[detector][key] for rows in found.values()]))
            for key in figures
        }
        for detector, figures in first.items()
    }


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("textures", "fashion-mnist"))
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--n-train", type=int, default=1000)
    parser.add_argument("--n-test", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tasks = {"textures": textures, "fashion-mnist": fashion_mnist}[options.task]
    told, found = environment(), {}
    for name, *task in tasks(options):
        found[name] = measure(*task)
        for detector, row in found[name].items():
            figures = (f"{value:8.1f}" for value in row.values())
            print(f"{name:12}{detector:26}", *figures, flush=True)
        # after each task: patches take their time
        content = {"environment": told, **vars(options), "mean": means(found)}
        write_json(f"image_default-{options.task}", {**content, "tasks": found})
    for detector, row in means(found).items():
        print(f"| {detector} | " + " | ".join(f"{v:.2f}" for v in row.values()) + " |")


if __name__ == "__main__":
    main()
