"""The papers' protocol: train on the images of one class, test on all classes.

    python benchmarks/one_vs_rest.py --dataset fashion-mnist --detector mahalanobis
    python benchmarks/one_vs_rest.py --dataset cifar-10 --data-home DIR --detector knn
    python benchmarks/one_vs_rest.py --dataset mvtec --data-home DIR --detector knn

Each class in turn is normal: its training images are the training set, and the test
images of all classes are scored, the class's own being normal. MVTec-style folders
have their own training and test images, one detector a sub-folder. Figures are
AUROC x 100.

The classes share one pass of the backbone over the images by a feature cache, so
their times tell little. The first row runs without it: its times are what a user
waits for.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
from _common import environment, write_json
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.utils import Bunch

from skdeepad import (
    BackboneFeatures,
    CentroidScorer,
    DeepSVDD,
    DetectorEnsemble,
    GaussianScorer,
    GEOMDetector,
    KDClonerEstimator,
    KMeansScorer,
    KNNScorer,
    MahalanobisFeatureScorer,
    MHRotDetector,
    MSADEstimator,
    PANDAEstimator,
    PatchDetector,
    RotNetDetector,
)
from skdeepad.datasets import load_cifar, load_fashion_mnist, load_image_folder
from skdeepad.metrics import anomaly_roc_auc_score


def behind_features(*steps: Callable[[], Any]) -> Callable[..., Pipeline]:
    """Put the steps behind pooled features of the backbone."""
    return lambda **images: make_pipeline(
        BackboneFeatures(**images), *(step() for step in steps)
    )


def image_default(**options: Any) -> DetectorEnsemble:
    """Give the default of `DetectorEnsemble` for images, at 160 pixels."""
    members = [
        ("patches", PatchDetector(**options)),
        ("cosine", DETECTORS["cosine-knn"](**options)),
    ]
    return DetectorEnsemble(members, combine="max")


def two_views(late: Callable[..., Any], **options: Any) -> DetectorEnsemble:
    """Join the last stage, at one size of images, and a whitened one at another."""
    early = DETECTORS["whitened-knn"]
    whitened = early(**(options | {"stages": "stage5", "image_size": 64}))
    members = [("late", late(**options)), ("whitened", whitened)]
    return DetectorEnsemble(members, weights=[1, 2])  # squared lengths, and lengths


# name -> a function of image_size and memory that makes the estimator
DETECTORS: dict[str, Callable[..., Any]] = {
    "mahalanobis": MahalanobisFeatureScorer,
    "panda": PANDAEstimator,
    "msad": MSADEstimator,
    "kd-cloner": KDClonerEstimator,
    "deep-svdd": DeepSVDD,
    "rotnet": RotNetDetector,
    "mhrot": MHRotDetector,
    "geom": GEOMDetector,
    "patches": PatchDetector,
    "image-default": image_default,
    "knn": behind_features(KNNScorer),
    "cosine-knn": behind_features(lambda: KNNScorer(metric="cosine")),
    "kmeans": behind_features(KMeansScorer),
    "centroid": behind_features(CentroidScorer),
    "gaussian": behind_features(GaussianScorer),
    "whitened-knn": behind_features(lambda: KNNScorer(metric="mahalanobis")),
}
# two views of whole images, at 160 pixels, and the same with PANDA
DETECTORS["ensemble"] = partial(two_views, DETECTORS["cosine-knn"])
DETECTORS["panda-ensemble"] = partial(two_views, PANDAEstimator)

# dataset -> column -> class number or folder -> AUROC x 100. Sources:
# DN2: PANDA (Reiss et al., CVPR 2021), table 1, "Unadapted": kNN (k = 2) on the
#   features of a ResNet-152; MVTec: table 2, the folders as its authors list them in
#   issue 7 of github.com/talreiss/PANDA.
# PANDA: the same table 1, "PANDA": those features adapted, with EWC.
# KDAD: Salehi et al., "Multiresolution Knowledge Distillation for Anomaly Detection",
#   CVPR 2021, VGG-16: table 2 (Fashion-MNIST and CIFAR-10), table 3 (MVTec).
# fmt: off
MVTEC = ["bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather",
         "metal_nut", "pill", "screw", "tile", "toothbrush", "transistor", "wood",
         "zipper"]
PUBLISHED: dict[str, dict[str, dict[Any, float]]] = {
    "fashion-mnist": {
        "DN2": {"mean": 94.5},
        "PANDA": {"mean": 95.6},
        "KDAD": dict(enumerate([92.5, 99.21, 92.48, 93.8, 92.95, 98.21, 84.87, 99.02,
                                94.33, 97.51])) | {"mean": 94.49},
    },
    "cifar-10": {
        "DN2": {"mean": 92.5},
        "PANDA": {"mean": 96.2},
        "KDAD": dict(enumerate([90.53, 90.35, 79.66, 77.02, 86.71, 91.4, 88.98, 86.78,
                                91.45, 88.91])) | {"mean": 87.18},
    },
    "cifar-100": {"DN2": {"mean": 94.1}, "PANDA": {"mean": 94.1}},
    "mvtec": {
        "DN2": dict(zip(MVTEC, [97.9, 86.1, 87.5, 88.2, 54.0, 96.9, 97.9, 80.9, 79.0,
                                66.9, 98.7, 84.4, 91.1, 94.7, 93.2], strict=True))
               | {"mean": 86.5},
        "KDAD": dict(zip(MVTEC, [99.39, 89.19, 80.46, 79.25, 78.01, 98.37, 95.05,
                                 73.58, 82.7, 83.31, 91.57, 92.17, 85.55, 94.29,
                                 93.24], strict=True)) | {"mean": 87.74},
    },
}
# fmt: on
ALL_CLASSES: dict[str, list[Any]] = {
    "fashion-mnist": list(range(10)),
    "cifar-10": list(range(10)),
    "cifar-100": list(range(20)),
    "mvtec": MVTEC,
}
PLAIN = int | float | str | tuple | None
FIGURES = ("auroc", "false_alarm_rate", "fit_seconds", "score_seconds")


def load_tasks(
    dataset: str,
    classes: list[int] | None,
    data_home: str | None,
    validate: bool,
) -> Iterator[tuple[Any, str, Any, Any, Any]]:
    """Give the key, name, training images, test images and test labels of classes."""
    if dataset == "mvtec":
        folders = sorted(path for path in Path(data_home).iterdir() if path.is_dir())
        for i in range(len(folders)) if classes is None else classes:
            data, name = load_image_folder(folders[i]), folders[i].name
            yield name, name, data.paths_train, data.paths_test, data.y_test
        return
    if dataset == "fashion-mnist":
        train, test = (
            load_fashion_mnist(split, data_home=data_home)
            for split in ("train", "test")
        )
    else:
        n_classes = 10 if dataset == "cifar-10" else 20
        train, test = (
            load_cifar(n_classes, split, data_home=data_home)
            for split in ("train", "test")
        )
    if validate:
        train, test = split_training(train)
    for k in range(len(train.target_names)) if classes is None else classes:
        y_test = np.where(test.target == k, 1, -1)
        X_train = train.images[train.target == k]
        yield k, train.target_names[k], X_train, test.images, y_test


def split_training(data: Any) -> tuple[Bunch, Bunch]:
    """Keep a sixth of each class to choose settings by, without the test images."""
    order = [np.flatnonzero(data.target == k) for k in np.unique(data.target)]
    parts = (
        np.concatenate([index[: len(index) * 5 // 6] for index in order]),
        np.concatenate([index[len(index) * 5 // 6 :] for index in order]),
    )
    train, held_out = (
        Bunch(
            images=data.images[part],
            target=data.target[part],
            target_names=data.target_names,
        )
        for part in parts
    )
    return train, held_out


def set_everywhere(estimator: Any, name: str, value: Any) -> None:
    """Set a parameter in each step that has it, or by its full name in one."""
    known = [p for p in estimator.get_params() if f"__{p}".endswith(f"__{name}")]
    if not known:
        raise SystemExit(f"No step has {name!r}: {sorted(estimator.get_params())}")
    estimator.set_params(**dict.fromkeys(known, value))


def parse_setting(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE: a Python literal, a word, or words between commas."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, tuple(value.split(",")) if "," in value else value


def configuration(estimator: Any) -> dict[str, Any]:
    """Give the parameters of all steps, less the steps themselves and folders."""
    return {
        name: value if isinstance(value, PLAIN) else repr(value)
        for name, value in estimator.get_params().items()
        if not (
            name.endswith(("memory", "steps", "estimators")) or hasattr(value, "fit")
        )
    }


def run(estimator: Any, X_train: Any, X_test: Any, y_test: Any) -> dict[str, float]:
    """Fit, score and measure one detector."""
    start = perf_counter()
    estimator.fit(X_train)
    fitted = perf_counter()
    decision = estimator.decision_function(X_test)
    scored = perf_counter()
    flagged = float(np.mean(decision[y_test == 1] < 0))  # as predict does
    figures = (
        100 * anomaly_roc_auc_score(y_test, decision),
        flagged,
        fitted - start,
        scored - fitted,
    )
    return {name: round(x, 4) for name, x in zip(FIGURES, figures, strict=True)}


def summarize(by_seed: Iterable[list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Average each seed's figures over its classes, and these over the seeds."""
    means = [[np.mean([r[name] for r in runs]) for name in FIGURES] for runs in by_seed]
    spread = np.std(means, axis=0, ddof=1) if len(means) > 1 else [None] * len(FIGURES)
    return {
        name: {"mean": round(mean, 4), "std": std and round(std, 4)}
        for name, mean, std in zip(FIGURES, np.mean(means, axis=0), spread, strict=True)
    }


def print_row(
    name: str, summary: dict[str, dict[str, Any]], published: dict[str, float | None]
) -> None:
    auroc, alarms, *seconds = summary.values()
    std = "" if auroc["std"] is None else f" ± {auroc['std']:.2f}"
    known = "".join(f"{'' if x is None else x:>8}" for x in published.values())
    times = "".join(f"{x['mean']:9.2f}" for x in seconds)
    share = 100 * alarms["mean"]
    print(
        f"{name:16}{auroc['mean']:8.2f}{std:7}{known}{share:9.1f} %{times}", flush=True
    )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=PUBLISHED, required=True)
    parser.add_argument("--detector", choices=DETECTORS, required=True)
    parser.add_argument("--classes", type=int, nargs="+", help="numbers; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="estimator settings"
    )
    parser.add_argument("--data-home", help="where the data set lies")
    parser.add_argument(
        "--validate",
        action="store_true",
        help="leave the test images alone: train on 5/6 of the training images, and "
        "score the others",
    )
    parser.add_argument("--memory", help="folder that keeps features for later runs")
    parser.add_argument("--suffix", help="of the result's name; default: the settings")
    args = parser.parse_args(arguments)
    if args.dataset == "mvtec" and (args.data_home is None or args.validate):
        parser.error("--dataset mvtec needs --data-home, and takes no --validate")
    return args


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run one detector on all classes; give what is written."""
    args = parse_arguments(arguments)
    settings = [parse_setting(text) for text in args.set]
    told = environment()
    columns = PUBLISHED[args.dataset]
    heads = "".join(f"{column:>8}" for column in columns)
    print(
        f"{'class':16}{'AUROC':>8}{'':7}{heads}{'alarms':>11}{'fit s':>9}{'score s':>9}"
    )

    rows: list[dict[str, Any]] = []
    estimator: Any = None
    with TemporaryDirectory() as temporary:
        tasks = load_tasks(args.dataset, args.classes, args.data_home, args.validate)
        for key, name, X_train, X_test, y_test in tasks:
            runs: list[dict[str, Any]] = []
            for seed in args.seeds:
                cached = bool(rows or runs)
                estimator = DETECTORS[args.detector](
                    image_size=args.image_size,
                    memory=(args.memory or temporary) if cached else None,
                )
                for setting in (*settings, ("random_state", seed)):
                    set_everywhere(estimator, *setting)
                figures = run(estimator, X_train, X_test, y_test)
                runs.append({"seed": seed, "cached": cached, **figures})
            published = {
                column: None if args.validate else known.get(key)
                for column, known in columns.items()
            }
            rows.append(
                {
                    "key": key,
                    "class": name,
                    "n_train": len(X_train),
                    "n_test_normal": int(np.sum(y_test == 1)),
                    "n_test_anomalous": int(np.sum(y_test == -1)),
                    "published": published,
                    "runs": runs,
                }
            )
            print_row(name, summarize([run] for run in runs), published)

    # a mean of some classes is not what the papers report
    keys = [row["key"] for row in rows]
    whole = keys == ALL_CLASSES[args.dataset] and not args.validate
    published = {c: known["mean"] if whole else None for c, known in columns.items()}
    by_seed = map(list, zip(*(row["runs"] for row in rows), strict=True))
    mean = {name: x for name, x in summarize(by_seed).items() if "seconds" not in name}
    print_row("mean", mean, published)
    final = estimator.steps[-1][1] if hasattr(estimator, "steps") else estimator
    print(f"alarms: on unseen normal images; contamination={final.contamination}")
    print("seconds: with cached features, but for the first run")

    trial = [f"classes={','.join(map(str, args.classes))}"] if args.classes else []
    parts = ["one_vs_rest", args.dataset, args.detector, str(args.image_size)]
    parts += ["validation"] if args.validate else []
    parts += [args.suffix] if args.suffix else args.set + trial
    content = {
        "dataset": args.dataset,
        "detector": args.detector,
        "images": "training images alone" if args.validate else "training and test",
        "contamination": final.contamination,
        "configuration": configuration(estimator),
        "mean": {**mean, "published": published},
        "classes": rows,
        "environment": told,
    }
    write_json("-".join(parts), content)
    return content


def run_study(
    study: str,
    rows: dict[str, tuple[str, list[str], float | None]],
    arguments: list[str],
) -> None:
    """Run each row of a paper's table: its detector, settings and published figure."""
    found = {}
    for name, (detector, settings, published) in rows.items():
        print(f"\n{name}", flush=True)
        suffix = f"{study}-{name.replace(' ', '_').replace(',', '')}"
        content = main(
            ["--dataset", "fashion-mnist", "--detector", detector]
            + ["--suffix", suffix, *arguments]
            + (["--set", *settings] if settings else [])
        )
        found[name] = content["mean"]["auroc"], published
    print(f"\n{study:32}{'AUROC':>8}{'':8}{'paper':>8}")
    for name, (auroc, published) in found.items():
        std = "" if auroc["std"] is None else f" ± {auroc['std']:.2f}"
        print(f"{name:32}{auroc['mean']:8.2f}{std:8}{published or '':>8}")


if __name__ == "__main__":
    main()
