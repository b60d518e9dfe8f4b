"""What a choice without any anomaly is worth.

    python benchmarks/selection.py
    python benchmarks/selection.py --tasks brick fashion-mnist-3

`PseudoAnomalyScorer` ranks 48 candidates by cross-validation on normal images alone;
the truth is the AUROC of each, fitted to all of them, on new images with true
anomalies. Fashion-MNIST, each class normal in turn: 300 of its training images; 300 of
its test images against 300 of the other classes. Textures: 300 patches; 300 good ones
against 300 with defects. The strengths of the pseudo-anomalies were fixed without a
look at the truth. AUROC x 100.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
from _common import ROOT, environment, write_json
from scipy.stats import rankdata, spearmanr
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from skdeepad import (
    BackboneFeatures,
    GaussianScorer,
    KNNScorer,
    OneClassKFold,
    PseudoAnomalyScorer,
)
from skdeepad.datasets import (
    load_fashion_mnist,
    make_pseudo_anomalies,
    make_texture_defects,
)

KINDS = ["cut_paste", "patch_shuffle", "blur", "noise", "rotation"]
# of EfficientNet-Lite0, and how many features each has
WIDTHS = {
    "stage1": 16,
    "stage3": 40,
    "stage5": 112,
    "stage6": 192,
    "stage7": 320,
    "pool": 1280,
}
# what a candidate sees of the features of all stages, which one pass gives
ENDS = np.cumsum([0, *WIDTHS.values()]).tolist()
SEEN = dict(zip(WIDTHS, pairwise(ENDS), strict=True))
SEEN["stages 5 to 7"] = (SEEN["stage5"][0], SEEN["stage7"][1])
del SEEN["stage6"]  # one of few, for the time it takes
SCORERS = {
    "kNN": KNNScorer(),
    "kNN, cosine": KNNScorer(metric="cosine"),
    "Gaussian": GaussianScorer(),
    "whitened kNN": KNNScorer(metric="mahalanobis"),
}
DEFAULT = "112, stages 5 to 7, Gaussian"  # MahalanobisFeatureScorer(image_size=112)


def see(X: Any, columns: tuple[int, int]) -> Any:
    """Take the features of some stages."""
    return X[:, slice(*columns)]


def load(task: str) -> tuple[Any, Any, Any]:
    """Give normal images, and test images with their labels."""
    if not task.startswith("fashion-mnist-"):
        data = make_texture_defects(
            task, n_train=300, n_test_good=300, n_test_defective=300, random_state=0
        )
        return data.X_train, data.X_test, data.y_test
    c = int(task.rpartition("-")[2])
    train, test = load_fashion_mnist("train"), load_fashion_mnist("test")
    rng = np.random.RandomState(0)
    normal = rng.choice(np.flatnonzero(test.target == c), 300, replace=False)
    others = rng.choice(np.flatnonzero(test.target != c), 300, replace=False)
    new = test.images[np.concatenate([normal, others])]
    return train.images[train.target == c][:300], new, np.repeat([1, -1], 300)


def describe(candidate: dict[str, Any]) -> str:
    """Name a candidate: size of the images, stages, scorer."""
    size, columns = candidate["features__image_size"], candidate["see__kw_args"]
    seen = next(name for name in SEEN if SEEN[name] == columns["columns"])
    scorer = next(name for name in SCORERS if SCORERS[name] is candidate["scorer"])
    return f"{size}, {seen}, {scorer}"


def run(task: str) -> dict[str, Any]:
    """Score all candidates by each kind of pseudo-anomaly, and by the truth."""
    normal, new, labels = load(task)
    start = perf_counter()
    with TemporaryDirectory() as memory:
        features = BackboneFeatures(stages=list(WIDTHS), memory=memory)
        model = Pipeline(
            [
                ("features", features),
                ("see", FunctionTransformer(see)),
                ("scorer", None),
            ]
        )
        search = GridSearchCV(
            model,
            {
                "features__image_size": [64, 112],
                "see__kw_args": [{"columns": columns} for columns in SEEN.values()],
                "scorer": list(SCORERS.values()),
            },
            scoring={kind: PseudoAnomalyScorer([kind]) for kind in KINDS},
            cv=OneClassKFold(3, shuffle=True, random_state=0),
            refit=False,
            error_score="raise",
        ).fit(normal)
        searched = perf_counter() - start
        candidates = search.cv_results_["params"]
        truth = []
        for candidate in candidates:
            fitted = clone(model).set_params(**candidate).fit(normal)
            truth.append(100 * roc_auc_score(labels, fitted.score_samples(new)))
    return {
        "candidates": [describe(candidate) for candidate in candidates],
        "truth": np.round(truth, 2).tolist(),
        "criteria": {
            kind: np.round(100 * search.cv_results_[f"mean_test_{kind}"], 2).tolist()
            for kind in KINDS
        },
        "search_seconds": round(searched, 1),
        "seconds": round(perf_counter() - start, 1),
    }


def judge(task: str, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Compare the choices of a task with what there was to choose from."""
    row = rows[task]
    truth = np.array(row["truth"])
    kinds = np.array(list(row["criteria"].values()))
    elsewhere = [other["truth"] for name, other in rows.items() if name != task]
    criteria = {
        "PseudoAnomalyScorer()": kinds.mean(axis=0),
        **{
            f"... {kind} alone": values
            for kind, values in zip(KINDS, kinds, strict=True)
        },
        "mean rank over the kinds": rankdata(kinds, axis=1).mean(axis=0),
    }
    chosen = {name: truth[np.argmax(values)] for name, values in criteria.items()}
    chosen["best by the truth"] = truth.max()
    chosen["the default"] = truth[row["candidates"].index(DEFAULT)]
    chosen["the median candidate"] = np.median(truth)
    if elsewhere:
        chosen["best on the other tasks"] = truth[np.mean(elsewhere, axis=0).argmax()]
    return {
        "spearman": {
            name: round(float(spearmanr(values, truth).statistic), 3)
            for name, values in criteria.items()
        },
        "auroc": {name: round(float(value), 2) for name, value in chosen.items()},
        "chosen": row["candidates"][int(np.argmax(kinds.mean(axis=0)))],
        "best": row["candidates"][int(truth.argmax())],
    }


def summarize(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """Give means and standard deviations over tasks."""
    return {
        name: {
            what: [
                round(float(of([task[what][name] for task in tasks])), 3)
                for of in (np.mean, np.std)
            ]
            for what in ("spearman", "auroc")
            if name in tasks[0][what]
        }
        for name in tasks[0]["auroc"]
    }


def draw() -> None:
    """Show the pseudo-anomalies of a texture and of a Fashion-MNIST image."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1 + len(KINDS), figsize=(9, 3.2))
    for row, task, i in zip(axes, ("brick", "fashion-mnist-7"), (0, 3), strict=True):
        images = load(task)[0][[i]]
        shown = {"normal": images, **make_pseudo_anomalies(images)}
        for ax, (kind, (image,)) in zip(row, shown.items(), strict=True):
            ax.imshow(image, cmap="gray", vmin=0, vmax=255)
            ax.set_axis_off()
            ax.set_title(kind, fontsize=9)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "images" / "pseudo_anomalies.png", dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    classes = [f"fashion-mnist-{c}" for c in range(10)]
    tasks = [*classes, "brick", "grass", "gravel"]
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks)
    args = parser.parse_args()
    told = environment()
    draw()
    rows = {}
    for task in args.tasks:
        rows[task] = run(task)
        print(f"{task}: {rows[task]['seconds']} s", flush=True)
    judged = {task: judge(task, rows) for task in rows}
    titles = ["rank corr.", "chosen", "best", "default", "median"]
    print(f"\n{'':18} " + "".join(f"{title:>10}" for title in titles))
    for task, found in judged.items():
        auroc = found["auroc"]
        print(
            f"{task:18}{found['spearman']['PseudoAnomalyScorer()']:11.2f}"
            f"{auroc['PseudoAnomalyScorer()']:10.2f}{auroc['best by the truth']:10.2f}"
            f"{auroc['the default']:10.2f}{auroc['the median candidate']:10.2f}"
            f"  {found['chosen']}"
        )
    parts = {}
    for part, chosen in (
        ("Fashion-MNIST", [task for task in judged if task.startswith("fashion")]),
        ("textures", [task for task in judged if not task.startswith("fashion")]),
    ):
        if not chosen:
            continue
        parts[part] = summarize([judged[task] for task in chosen])
        print(f"\n{part:26}{'AUROC':>16}{'rank correlation':>20}")
        for name, found in parts[part].items():
            print(
                f"{name:26}"
                + "".join(
                    f"{found[what][0]:{width}.2f} ± {found[what][1]:4.2f}"
                    for what, width in (("auroc", 9), ("spearman", 13))
                    if what in found
                )
            )
    write_json(
        "selection",
        {"summary": parts, "tasks": judged, "candidates": rows, "environment": told},
    )


if __name__ == "__main__":
    main()
