"""Does `contamination` hold? Shares of new good samples that are flagged.

A detector is fitted to good patches of brick, gravel and grass, and sees new ones that
are cut in the same way (exchangeable ones), of which it should flag 5 %. Each draw has
other patches. Patches may be there twice, and training may augment them.

    python benchmarks/false_alarms.py textures    # 200 patches, ten draws
    python benchmarks/false_alarms.py sizes       # 20, 50, 200 and 2,000 samples
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from typing import Any

import numpy as np
from _common import environment, write_json
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline

from skdeepad import (
    BackboneFeatures,
    ConformalDetector,
    DeepSAD,
    DeepSVDD,
    DetectorEnsemble,
    GaussianScorer,
    HSCClassifier,
    KDClonerEstimator,
    KNNScorer,
    MahalanobisFeatureScorer,
    PANDAEstimator,
)
from skdeepad.datasets import make_texture_defects

TEXTURES = "brick", "gravel", "grass"
N_NEW = 300
N_OUTLIERS = 32  # known anomalies, for detectors that learn from them
SMALL = {
    "backbone": "svdd_mnist_lenet",
    "image_size": 28,
    "pretrain_steps": 10,
    "max_steps": 30,
}
AUGMENTED = {
    "hsc": {"augmentation": "paper", "max_steps": 20},
    "deep_svdd": {"augmentation": "paper"},
    "deep_sad": {"augmentation": "paper"},
    "kd_cloner": {"rotation": 10, "scaling": (0.9, 1.1)},
    "kd_cloner_mahalanobis": {"rotation": 10, "scaling": (0.9, 1.1)},
}


def whitened(scorer: Any) -> Any:
    return make_pipeline(BackboneFeatures(stages="stage5", image_size=64), scorer)


def detectors() -> dict[str, Any]:
    """Make each detector, its budget of training short."""
    pca = make_pipeline(PCA(0.99, whiten=True), KNNScorer())
    return {
        "ensemble": DetectorEnsemble(),
        "whitened_knn": whitened(KNNScorer(metric="mahalanobis")),
        "pca_cross_fitted": ConformalDetector(whitened(pca)),
        "pca_pipeline": whitened(pca),  # what a user would write: does not hold
        "mahalanobis": MahalanobisFeatureScorer(image_size=64),
        "panda": PANDAEstimator(image_size=64),
        "panda_whitened": PANDAEstimator(
            image_size=64, scorer=KNNScorer(metric="mahalanobis")
        ),
        "kd_cloner": KDClonerEstimator(image_size=64, max_steps=50),
        "kd_cloner_mahalanobis": KDClonerEstimator(
            image_size=64, max_steps=50, discrepancy="mahalanobis"
        ),
        "hsc": HSCClassifier(image_size=64, max_steps=100),
        "deep_svdd": DeepSVDD(**SMALL),
        "deep_sad": DeepSAD(**SMALL),
    }


MEMORY = tempfile.TemporaryDirectory()  # frozen stages run once for all cases


def flagged(
    detector: Any, texture: str, n: int, draw: int, *, twice: bool = False
) -> float:
    """Fit to n good patches; give the share of new ones that are flagged."""
    data = make_texture_defects(
        texture,
        n_train=n + N_NEW,
        n_test_good=0,
        n_test_defective=N_OUTLIERS,
        random_state=1000 + draw,
    )
    X, new = data.X_train[:n], data.X_train[n:]
    if twice:  # a quarter of them
        X = np.concatenate([X, X[: n // 4]])
    y = None
    if isinstance(detector, HSCClassifier | DeepSAD):
        y = np.repeat([1, -1], [len(X), N_OUTLIERS])
        X = np.concatenate([X, data.X_test])
    for parameter in detector.get_params():
        if parameter == "random_state":
            detector.set_params(random_state=draw)
        elif f"__{parameter}".endswith("__memory"):
            detector.set_params(**{parameter: MEMORY.name})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of copies, and of outliers that are easy
        return float((detector.fit(X, y).predict(new) == -1).mean())


def textures(names: list[str], draws: int) -> None:
    """200 good patches, as they are, a quarter of them twice, and augmented."""
    for name in names:
        before, start, found = environment(), time.perf_counter(), {}
        cases: dict[str, Any] = {"plain": {}, "twice": {"twice": True}}
        if name in AUGMENTED:
            cases["augmented"] = {}
        for case, options in cases.items():
            changes = AUGMENTED[name] if case == "augmented" else {}
            for texture in TEXTURES:
                detector = detectors()[name].set_params(**changes)
                shares = [
                    flagged(detector, texture, 200, draw, **options)
                    for draw in range(draws)
                ]
                found[f"{texture}, {case}"] = shares
                print(
                    f"{name:22} {texture:7} {case:10} {100 * np.mean(shares):5.1f} % "
                    f"+- {100 * np.std(shares, ddof=1):4.1f}",
                    flush=True,
                )
        seconds = time.perf_counter() - start
        content = {"environment": before, "detector": repr(detectors()[name])}
        content |= {"seconds": round(seconds), "n_train": 200, "n_new": N_NEW}
        write_json(f"false_alarms-textures-{name}", content | {"flagged": found})


def vectors(draws: int) -> dict[str, dict[int, float]]:
    """Scorers on Gaussian vectors of 100 features."""
    scorers = {
        "KNNScorer()": KNNScorer(),
        'KNNScorer(metric="mahalanobis")': KNNScorer(metric="mahalanobis"),
        "GaussianScorer()": GaussianScorer(),
        "DetectorEnsemble()": DetectorEnsemble(),
        "PCA, KNNScorer()": make_pipeline(PCA(0.99, whiten=True), KNNScorer()),
    }
    scorers["ConformalDetector of it"] = ConformalDetector(scorers["PCA, KNNScorer()"])
    found: dict[str, dict[int, float]] = {name: {} for name in scorers}
    for n in (20, 50, 200, 2000):
        for name, scorer in scorers.items():
            shares = []
            for draw in range(draws if n < 2000 else max(3, draws // 10)):
                rng = np.random.default_rng(draw)
                X, new = rng.normal(size=(n, 100)), rng.normal(size=(1000, 100))
                shares.append((scorer.fit(X).predict(new) == -1).mean())
            found[name][n] = float(np.mean(shares))
            print(f"{name:32} n={n:5} {100 * found[name][n]:5.1f} %", flush=True)
    return found


def sizes(names: list[str], draws: int) -> None:
    """20, 50, 200 and 2,000 patches, the mean over the textures."""
    before = environment()
    content: dict[str, Any] = {"vectors of 100 features": vectors(10 * draws)}
    for name in names:
        found = content[name] = {}
        for n in (20, 50, 200, 2000):
            shares = [
                flagged(detectors()[name], texture, n, draw)
                for texture in TEXTURES
                for draw in range(draws if n < 2000 else max(1, draws // 5))
            ]
            found[n] = float(np.mean(shares))
            print(f"{name:32} n={n:5} {100 * found[n]:5.1f} %", flush=True)
    write_json("false_alarms-sizes", {"environment": before, "flagged": content})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=["textures", "sizes"])
    parser.add_argument("--detectors", nargs="+", default=list(detectors()))
    parser.add_argument("--draws", type=int, default=10)
    arguments = parser.parse_args()
    study = {"textures": textures, "sizes": sizes}[arguments.study]
    study(arguments.detectors, arguments.draws)
