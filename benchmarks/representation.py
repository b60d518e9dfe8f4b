"""What a representation is worth, and what a classifier's outputs tell of the unknown.

    python benchmarks/representation.py brittle
    python benchmarks/representation.py open-set --seeds 0 1 2 3

brittle   the study of Mai et al. (2021): knowledge distillation, Mahalanobis,
          separability and brittleness of many representations, with their correlations.
          Fashion-MNIST, one class normal in turn: 600 of its training images, 300
          images of other classes.
open-set  the study of Garrepalli (2022): a classifier of six classes of Fashion-MNIST,
          anomalies are of the four others, drawn anew for each seed; 60 % of the
          images to train, 20 % for the oracle, 20 % to test. A LeNet from scratch. The
          paper has CIFAR-10 and a ResNet-34. AUROC x 100.
"""

from __future__ import annotations

import argparse
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
from _common import ROOT, environment, write_json
from joblib import Parallel, delayed
from sklearn.metrics import roc_auc_score

from skdeepad import (
    BackboneFeatures,
    ClassGaussianScorer,
    DeepSVDD,
    OpenSetClassifier,
)
from skdeepad.backbones import load_backbone
from skdeepad.datasets import load_fashion_mnist
from skdeepad.inspection import RepresentationDisplay
from skdeepad.representation import compare_representations, oracle

SCORES = ("max_logit", "max_softmax", "entropy", "energy")
# CIFAR-10: the slides' Q1 and Q2
PUBLISHED = {
    "plain, max_logit": 77.6,
    "plain, oracle": 90.5,
    "oracle representation": 98.7,
}
PRETRAINED = {"lite0", "lite1", "lite2"}
COLUMNS = ["mahalanobis_auroc", "knn_auroc", "separability", "brittleness"]


def representations(train: Any, seed: int, steps: int) -> list[tuple[str, Any]]:
    """Make the networks: pretrained, random, and trained on Fashion-MNIST itself."""
    classifier = OpenSetClassifier("mnist_lenet", max_steps=steps, random_state=seed)
    classifier.fit(train.images, train.target)
    autoencoder = DeepSVDD(
        "mnist_lenet", pretrain_steps=steps, max_steps=1, random_state=seed
    ).fit(train.images)
    return [
        ("lite0", "efficientnet_lite0"),
        ("lite1", "efficientnet_lite1"),
        ("lite2", "efficientnet_lite2"),
        ("lite0, random", load_random(seed)),
        ("classifier", classifier.backbone_),
        ("autoencoder", autoencoder.backbone_),
    ]


def load_random(seed: int) -> Any:
    return load_backbone("efficientnet_lite0", weights=None, seed=seed)


def run_brittle(args: argparse.Namespace) -> None:
    told = environment()
    train, test = load_fashion_mnist("train"), load_fashion_mnist("test")
    networks = representations(train, 0, args.steps)
    tables = []
    for c in args.classes:
        normal = train.images[train.target == c][:600]
        others = test.images[test.target != c][:300]
        start = perf_counter()
        parts = [
            compare_representations(
                [network],
                normal,
                others,
                image_size=28 if network[0] in ("classifier", "autoencoder") else 64,
                random_state=0,
            )
            for network in networks
        ]
        table = pd.concat(parts, ignore_index=True)
        table.insert(0, "class", c)
        tables.append(table)
        print(table.round(3).to_string(), flush=True)
        print(f"class {c}: {perf_counter() - start:.0f} s", flush=True)
    everything = pd.concat(tables, ignore_index=True)
    mean = everything.groupby(["backbone", "stage"], sort=False).mean().reset_index()
    display = RepresentationDisplay(table=mean).plot()
    path = ROOT / "docs" / "images" / "representations.png"
    display.figure_.savefig(path, dpi=100)
    content = {
        "classes": args.classes,
        "rows": everything.to_dict("records"),
        "spearman": correlations(everything),
        "chosen": choices(everything),
        "environment": told,
    }
    write_json("representation-brittle", content)


def spread(values: Any) -> dict[str, float]:
    """Give mean and standard deviation."""
    return {
        "mean": round(float(np.mean(values)), 4),
        "std": round(float(np.std(values, ddof=min(1, len(values) - 1))), 4),
    }


def correlations(everything: Any) -> dict[str, Any]:
    """Correlate AUROC with the rest by rank: for each normal class, then the spread.

    Over all representations, over the networks' last stages, and over the stages of
    each network by itself.
    """

    def spearman(rows: Any) -> float:
        return float(rows[pair].corr("spearman").iloc[0, 1])

    found: dict[str, Any] = {}
    print(f"\n{'rank correlation with':40}{'all':>16}{'last stages':>16}{'within':>16}")
    for target in ("kd_auroc", "mahalanobis_auroc"):
        for column in COLUMNS:
            if column == target:
                continue
            pair = [target, column]
            values: dict[str, list[float]] = {"all": [], "last": [], "within": []}
            for _, rows in everything.groupby("class", sort=False):
                networks = rows.groupby("backbone", sort=False)
                values["all"].append(spearman(rows))
                values["last"].append(spearman(networks.tail(1)))
                within = [spearman(stages) for _, stages in networks]
                values["within"].append(float(np.mean(within)))
            row = {name: spread(each) for name, each in values.items()}
            found.setdefault(target, {})[column] = row
            told = "".join(f"{v['mean']:9.2f} ± {v['std']:.2f}" for v in row.values())
            print(f"{target}: {column:22}{told}")
    return found


def choices(everything: Any) -> dict[str, Any]:
    """Measure what the most brittle representation is worth, as one would choose it.

    Among the stages of the three pretrained networks, beside the best stage and the
    median one.
    """
    pretrained = everything[everything.backbone.isin(PRETRAINED)]
    found: dict[str, Any] = {}
    print(f"\n{'AUROC of':24}{'most brittle':>16}{'best':>16}{'median':>16}")
    for target in ("kd_auroc", "mahalanobis_auroc"):
        by_class = [rows for _, rows in pretrained.groupby("class", sort=False)]
        row = {
            "most brittle": [r.loc[r.brittleness.idxmax(), target] for r in by_class],
            "best": [rows[target].max() for rows in by_class],
            "median": [rows[target].median() for rows in by_class],
        }
        found[target] = {name: spread(values) for name, values in row.items()}
        told = [f"{v['mean']:9.3f} ± {v['std']:.3f}" for v in found[target].values()]
        print(f"{target:24}{''.join(told)}")
    return found


def split(seed: int, n_images: int) -> dict[str, Any]:
    """Draw six known classes, and parts of the images: 60, 20 and 20 %."""
    rng = np.random.RandomState(seed)
    both = [load_fashion_mnist(part) for part in ("train", "test")]
    images = np.concatenate([part.images for part in both])
    target = np.concatenate([part.target for part in both])
    known = np.sort(rng.permutation(10)[:6])
    order = rng.permutation(len(images))[:n_images]
    ends = [int(0.6 * n_images), int(0.8 * n_images)]
    parts = dict(zip(("train", "validate", "test"), np.split(order, ends), strict=True))
    found: dict[str, Any] = {"known": known}
    for name, index in parts.items():
        normal = np.where(np.isin(target[index], known), 1, -1)
        found[name] = images[index], target[index], normal
    return found


def measure(
    name: str, model: Any, parts: dict[str, Any], trees: int
) -> dict[str, dict[str, float]]:
    """Measure a fitted classifier's scores, and the oracle on its features."""
    images, target, normal = parts["test"]
    known = normal == 1
    accuracy = float(100 * model.score(images[known], target[known]))
    rows = {}
    scores = ("h", "g") if model.head == "cosine" else ()
    for score in (*SCORES, *scores):
        for member in [model, *model.estimators_]:
            member.anomaly_score = score  # as it is trained alike
        auroc = float(100 * roc_auc_score(normal, model.score_samples(images)))
        rows[f"{name}, {score}"] = {"auroc": auroc, "accuracy": accuracy}
    if not model.estimators_:
        for score, auroc in mahalanobis_aurocs(model, parts).items():
            rows[f"{name}, {score}"] = {"auroc": auroc, "accuracy": accuracy}
        rows[f"{name}, oracle"] = {
            "auroc": oracle_auroc(model, parts, trees),
            "accuracy": accuracy,
        }
    return rows


def mahalanobis_aurocs(model: Any, parts: dict[str, Any]) -> dict[str, float]:
    """Measure class-conditional Gaussians, of the last and of all stages."""
    images, target, normal = parts["train"]
    known = normal == 1
    found = {}
    for what, stages in (("last", None), ("all", model.backbone_.stage_names)):
        features = BackboneFeatures(model.backbone_, stages=stages, batch_size=128)
        train = features.fit_transform(images[known])
        test = features.transform(parts["test"][0])
        for relative in (False, True):
            scorer = ClassGaussianScorer(relative=relative).fit(train, target[known])
            auroc = 100 * roc_auc_score(parts["test"][2], scorer.score_samples(test))
            kind = "relative Mahalanobis" if relative else "Mahalanobis"
            found[f"{kind}, {what}"] = float(auroc)
    return found


def oracle_auroc(model: Any, parts: dict[str, Any], trees: int) -> float:
    known, new = parts["validate"], parts["test"]
    found = oracle(
        known[0],
        known[2],
        new[0],
        new[2],
        model.backbone_,
        stages=model.stages_,
        n_estimators=trees,
        random_state=0,
        batch_size=128,
    )
    return 100 * found[model.stages_[0]]


def run_draw(seed: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure all networks on one draw of the known classes."""
    # Generalized ODIN's schedule, shortened: its paper has 300 epochs of SGD
    longer = {
        "max_steps": 4 * args.steps,
        "milestones": (0.5, 0.75),
        "weight_decay": 5e-4,
    }
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "plain, longer": longer,
        "hybrid, lambda 1": {"reconstruction_weight": 1.0},
        "hybrid, lambda 10": {"reconstruction_weight": 10.0},
        "GODIN, cosine": {"head": "cosine"},
        "GODIN, cosine, longer": {"head": "cosine", **longer},
        "ensemble of 3": {"n_members": 3},
    }
    parts = split(seed, args.n_images)
    images, target, normal = parts["train"]
    known = normal == 1
    shared = {"backbone": "mnist_lenet", "max_steps": args.steps, "random_state": seed}
    rows = {}
    for name, options in variants.items():
        start = perf_counter()
        model = OpenSetClassifier(**{**shared, **options})
        model.fit(images[known], target[known])
        seconds = round(perf_counter() - start, 1)
        for row, figures in measure(name, model, parts, args.trees).items():
            rows[row] = {"seed": seed, "fit_seconds": seconds, **figures}
            print(f"{seed} {row:38}{figures['auroc']:8.2f}{seconds:8.1f} s", flush=True)
    # the oracle representation: trained on the anomalies' classes, too
    model = OpenSetClassifier(**shared).fit(images, target)
    auroc = oracle_auroc(model, parts, args.trees)
    rows["oracle representation"] = {"seed": seed, "auroc": auroc}
    print(f"{seed} {'oracle representation':38}{auroc:8.2f}", flush=True)
    return rows


def run_open_set(args: argparse.Namespace) -> None:
    told = environment()
    draws = Parallel(args.n_jobs)(delayed(run_draw)(seed, args) for seed in args.seeds)
    print(f"\n{'':38}{'AUROC':>8}{'':8}{'paper':>8}")
    found = {}
    for name in draws[0]:
        rows = [draw[name] for draw in draws]
        auroc = spread([row["auroc"] for row in rows])
        published = PUBLISHED.get(name)
        found[name] = {
            "auroc": auroc["mean"],
            "std": auroc["std"],
            "published": published,
            "runs": rows,
        }
        print(
            f"{name:38}{auroc['mean']:8.2f} ± {auroc['std']:5.2f}{published or '':>8}"
        )
    options = {"seeds": args.seeds, "steps": args.steps, "n_images": args.n_images}
    content = {"options": options, "rows": found, "environment": told}
    write_json("representation-open_set", content)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=["brittle", "open-set"])
    parser.add_argument("--classes", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=600, help="for the LeNets")
    parser.add_argument("--n-images", type=int, default=21000)
    parser.add_argument("--n-jobs", type=int, help="draws of open-set at once")
    parser.add_argument("--trees", type=int, default=1000, help="of the oracle")
    args = parser.parse_args()
    (run_brittle if args.study == "brittle" else run_open_set)(args)


if __name__ == "__main__":
    main()
