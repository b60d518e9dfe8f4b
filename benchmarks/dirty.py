"""Training images of which some are defective: what is still found, and flagged.

300 good patches of a texture and some with painted defects are fitted to, by Gaussians
and by nearest neighbours on the features of a frozen network, and by `PatchDetector`
(64 pixels, 500 patches). `RobustDetector` is
compared with the plain detector and with two published ways: one refinement (SROC,
Cohen, Abutbul and Hoshen 2022: leave out the share that looks least normal, and fit
again) and SRR (Yoon et al. 2022: keep what five detectors on disjoint subsets all call
normal, each at the assumed share; fit again). Constants of `RobustDetector` were chosen
on draws 100 to 102, which are not used here.

    python benchmarks/dirty.py
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from itertools import product
from operator import itemgetter
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from _common import RESULTS, environment, write_json
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold

from skdeepad import (
    BackboneFeatures,
    GaussianScorer,
    KNNScorer,
    PatchDetector,
    RobustDetector,
)
from skdeepad.datasets import make_texture_defects

SHARES = 0.0, 0.02, 0.05, 0.1, 0.2
N_GOOD, N_NEW, N_DEFECTIVE = 300, 300, 300
SCORERS = {"mahalanobis": GaussianScorer(), "knn": KNNScorer()}
PATCHES = PatchDetector(image_size=64, n_patches=500, random_state=0)

Rows = NDArray[Any]


def refine_once(scorer: Any, X: Rows, share: float) -> Any:
    """SROC: fit, leave out the share with the lowest scores, fit again."""
    scores = clone(scorer).fit(X).score_samples(X)
    return clone(scorer).fit(X[np.argsort(scores)[round(share * len(X)) :]])


def refine_by_ensemble(scorer: Any, X: Rows, share: float, rounds: int = 3) -> Any:
    """SRR: keep what detectors on five disjoint subsets all call normal, and repeat."""
    kept = np.ones(len(X), dtype=bool)
    for seed in range(rounds if share else 0):
        votes = np.ones(len(X), dtype=bool)
        for _, part in KFold(5, shuffle=True, random_state=seed).split(X):
            scores = clone(scorer).fit(X[part[kept[part]]]).score_samples(X)
            votes &= scores >= np.quantile(scores, share)
        kept = votes
    return clone(scorer).fit(X[kept])


def robust(scorer: Any, share: float | str) -> Any:
    return RobustDetector(scorer, training_contamination=share, random_state=0)


def figures(detector: Any, good: Rows, bad: Rows) -> dict[str, float]:
    scores = detector.decision_function(np.concatenate([good, bad]))
    labels = np.repeat([1, 0], [len(good), len(bad)])
    found = {
        "auroc": roc_auc_score(labels, scores),
        "false_alarms": (scores[: len(good)] < 0).mean(),
        "found": (scores[len(good) :] < 0).mean(),
    }
    if hasattr(detector, "training_contamination_"):
        found["estimate"] = detector.training_contamination_
    return {name: round(100 * float(value), 2) for name, value in found.items()}


def cases(texture: str, draw: int, memory: str) -> Iterator[tuple[Any, ...]]:
    """Give detectors by name, good samples to fit to, and good and bad ones."""
    data = make_texture_defects(
        texture,
        n_train=N_GOOD,
        n_test_good=N_NEW,
        n_test_defective=N_DEFECTIVE,
        random_state=draw,
    )
    images = (
        data.X_train,
        data.X_test[data.y_test == 1],
        data.X_test[data.y_test == -1],
    )
    network = BackboneFeatures(stages=("stage5", "stage6", "stage7"), image_size=112)
    features = [network.fit_transform(part) for part in images]
    for name, scorer in SCORERS.items():
        yield name, scorer, *features
    yield "patches", clone(PATCHES).set_params(memory=memory), *images


METHODS = {
    "plain": lambda scorer, X, share: clone(scorer).fit(X),
    "SROC": refine_once,
    "SRR": refine_by_ensemble,
    "robust": lambda scorer, X, share: robust(scorer, share).fit(X),
    "robust, auto": lambda scorer, X, share: robust(scorer, "auto").fit(X),
}


def run(textures: list[str], draws: int, methods: list[str]) -> None:
    """Measure some methods; rows of others in the file stay as they are."""
    before, rows = environment(), []
    for texture, draw in product(textures, range(draws)):
        with TemporaryDirectory() as memory:
            for name, scorer, X, good, bad in cases(texture, draw, memory):
                for share in SHARES:
                    n = round(share / (1 - share) * N_GOOD)
                    dirty = np.concatenate([X, bad[:n]])
                    for method in methods:
                        detector = METHODS[method](scorer, dirty, share)
                        row = {"texture": texture, "draw": draw, "scorer": name}
                        row |= {"share": share, "method": method}
                        rows.append(row | figures(detector, good, bad[75:]))
                print(texture, draw, name, flush=True)
        keep(before, rows)
    table(rows)


def keep(before: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write rows to the file, in the place of those of the same case."""
    path = RESULTS / "dirty.json"
    known = json.loads(path.read_text()) if path.exists() else {"rows": []}
    case = itemgetter("texture", "draw", "scorer", "share", "method")
    content = {case(row): row for row in [*known["rows"], *rows]}
    methods = {row["method"]: before for row in rows}
    environments = known.get("environment", {}) | methods
    write_json("dirty", {"environment": environments, "rows": list(content.values())})


def table(rows: list[dict[str, Any]]) -> None:
    names = "auroc", "false_alarms", "found", "estimate"
    print(f"{'':44}{'AUROC':>8}{'alarms':>8}{'found':>8}{'share':>8}")
    keys = sorted({(r["texture"], r["scorer"], r["share"], r["method"]) for r in rows})
    for key in keys:
        told = [
            row
            for row in rows
            if (row["texture"], row["scorer"], row["share"], row["method"]) == key
        ]
        texture, scorer, share, method = key
        means = [np.mean([row.get(name, np.nan) for row in told]) for name in names]
        label = f"{texture:7}{scorer:12}{100 * share:4.0f} %  {method:14}"
        print(f"{label:44}" + "".join(f"{mean:8.1f}" for mean in means))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--textures", nargs="+", default=["brick", "gravel"])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    run(arguments.textures, arguments.draws, arguments.methods)
