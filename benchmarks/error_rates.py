"""Do the rates hold? p-values of new normal samples, discoveries, intervals, streams.

python benchmarks/error_rates.py              # all four studies
python benchmarks/error_rates.py discoveries  # or calibration, intervals, drift
python benchmarks/error_rates.py plot         # the pictures of docs/error_rates.md
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from _common import RESULTS, ROOT, environment, write_json
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import make_pipeline

from skdeepad import (
    BackboneFeatures,
    CentroidScorer,
    ConformalDetector,
    DeepSAD,
    DeepSVDD,
    DetectorEnsemble,
    GaussianScorer,
    HSCClassifier,
    KDClonerEstimator,
    KMeansScorer,
    KNNScorer,
    MahalanobisFeatureScorer,
    OpenSetClassifier,
    PANDAEstimator,
    PatchDetector,
)
from skdeepad.conformal import DriftMonitor, false_alarm_interval, select_anomalies
from skdeepad.datasets import make_texture_defects

LEVELS = 0.05, 0.1, 0.2
GRID = np.linspace(0.01, 0.5, 50)
N_FEATURES = 20
ALPHAS = 0.05, 0.1, 0.2, 0.3


def cheap() -> dict[str, Any]:
    """Make detectors that are fitted in milliseconds."""
    knn = KNNScorer(n_neighbors=1)
    whitened = make_pipeline(PCA(whiten=True), knn)
    return {
        "KNNScorer": knn,
        'KNNScorer("mahalanobis")': KNNScorer(metric="mahalanobis"),
        "GaussianScorer": GaussianScorer(),
        "CentroidScorer": CentroidScorer(),
        'ConformalDetector(KNNScorer, "split", cv=2)': ConformalDetector(
            knn, method="split", cv=2
        ),
        'ConformalDetector(KNNScorer, "cv+")': ConformalDetector(knn, method="cv+"),
        "ConformalDetector(PCA, KNNScorer)": ConformalDetector(whitened),
        "PCA, KNNScorer (does not hold)": whitened,
        "DetectorEnsemble": DetectorEnsemble(),
        "KMeansScorer": KMeansScorer(n_clusters=3, random_state=0),
    }


def trained() -> dict[str, Any]:
    """Make detectors that take longer; those that train do so for a short time."""
    small = {"max_steps": 20, "batch_size": 64}
    return {
        "MahalanobisFeatureScorer": MahalanobisFeatureScorer(),
        "PatchDetector": PatchDetector(image_size=64, n_patches=500),
        "PANDAEstimator": PANDAEstimator(**small),
        "KDClonerEstimator": KDClonerEstimator(**small),
        "KDClonerEstimator (residuals)": KDClonerEstimator(
            discrepancy="mahalanobis", **small
        ),
        "DeepSVDD": DeepSVDD(pretrain_steps=5, **small),
        "DeepSAD": DeepSAD(pretrain_steps=5, **small),
        "HSCClassifier": HSCClassifier(**small),
        "OpenSetClassifier": OpenSetClassifier(**small),
    }


def p_values(detector: Any, X: Any) -> Any:
    if hasattr(detector, "p_values"):
        return detector.p_values(X)
    return detector[-1].p_values(detector[:-1].transform(X))


def patches_and_features(n: int) -> tuple[Any, Any]:
    """Give good patches of a photograph, which come twice nowhere, and features."""
    data = make_texture_defects("brick", n_train=n, n_test_good=0, random_state=7)
    network = BackboneFeatures(stages="stage5", image_size=64)
    return data.X_train, network.fit_transform(data.X_train)


def fitted(detector: Any, X: Any) -> Any:
    if isinstance(detector, OpenSetClassifier):  # two classes, both known
        return detector.fit(X, (X[:, 0] > np.median(X[:, 0])).astype(int))
    return detector.fit(X)


def calibration(n_fits: int) -> dict[str, Any]:
    """Shares of p-values of new normal samples, one set of them for each fit."""
    images, rows_of = patches_and_features(3000)
    found: dict[str, Any] = {}
    cases = [(name, d, max(3, n_fits // 10)) for name, d in trained().items()]
    cases += [(name, d, n_fits) for name, d in cheap().items()]
    for name, detector, repeats in cases:
        for source in ("vectors", "patches"):
            known = images if isinstance(detector, PatchDetector) else rows_of
            if source == "vectors" and known is images:
                continue
            for n in (50, 200):
                shares = []
                for draw in range(repeats):
                    rng = np.random.default_rng(draw)
                    if source == "vectors":
                        X, new = np.split(rng.normal(size=(n + 100, N_FEATURES)), [n])
                    else:
                        rows = rng.choice(len(known), n + 100, replace=False)
                        X, new = np.split(known[rows], [n])
                    model = clone(detector)
                    if "random_state" in model.get_params():
                        model.set_params(random_state=draw)
                    p = p_values(fitted(model, X), new)
                    shares.append([(p <= t).mean() for t in GRID])
                mean = np.mean(shares, axis=0)
                error = np.std(shares, axis=0) / np.sqrt(repeats)
                at = [int(np.argmin(abs(GRID - t))) for t in LEVELS]
                found[f"{name}, {source}, n={n}"] = {
                    "fits": repeats,
                    "share": mean.round(4).tolist(),
                    "standard_error": error.round(4).tolist(),
                }
                keep("calibration", None, found, whole=False)  # this takes a while
                told = "  ".join(f"{mean[i]:.3f} +- {error[i]:.3f}" for i in at)
                print(f"{name:46}{source:9}n={n:4}  {told}", flush=True)
    return found


def discoveries(n_runs: int) -> dict[str, Any]:
    """10 anomalies among 100 new samples; all, or half for a split."""
    found: dict[str, Any] = {}
    for n in (50, 200, 1000):
        for name, detector in (
            ("held out", GaussianScorer()),
            ("split", ConformalDetector(GaussianScorer(), method="split", cv=2)),
        ):
            rates: Any = {str(alpha): [] for alpha in ALPHAS}
            for draw in range(n_runs):
                rng = np.random.default_rng(draw)
                new = rng.normal(size=(100, N_FEATURES))
                new[:10] += 0.9
                p = detector.fit(rng.normal(size=(n, N_FEATURES))).p_values(new)
                for alpha in ALPHAS:
                    chosen = select_anomalies(p, alpha)
                    false = chosen[10:].sum() / max(1, chosen.sum())
                    rates[str(alpha)].append([false, chosen[:10].mean()])
            means = {a: np.mean(r, axis=0).round(4).tolist() for a, r in rates.items()}
            found[f"{name}, n={n}"] = means
            print(f"n={n:5} {name:9} {means}", flush=True)
    return found


def intervals(n_runs: int) -> dict[str, Any]:
    """How far the false alarm rate of a threshold is off, and what was said of it."""
    found = {}
    for n in (20, 50, 100, 200, 500, 1000):
        rates, inside = [], []
        for draw in range(n_runs):
            rng = np.random.default_rng(draw)
            detector = GaussianScorer().fit(rng.normal(size=(n, 5)))
            rate = (detector.predict(rng.normal(size=(5000, 5))) == -1).mean()
            low, high = false_alarm_interval(detector)
            rates.append(rate)
            inside.append(low <= rate <= high)
        found[str(n)] = {
            "interval": [low, high],
            "rates": np.round(rates, 4).tolist(),
            "covered": float(np.mean(inside)),
        }
        print(f"n={n:5} {low:.3f} to {high:.3f}, covered {np.mean(inside):.3f}")
    return found


def drift(n_streams: int, length: int) -> dict[str, Any]:
    """Streams of exchangeable samples, and images that become a tenth brighter."""
    alarms = {}
    for name, scorer in (
        ("KNNScorer", KNNScorer()),
        ("GaussianScorer", GaussianScorer()),
    ):
        count = 0
        for draw in range(n_streams):
            rng = np.random.default_rng(draw)
            X = rng.normal(size=(200, 5))
            monitor = DriftMonitor(
                FrozenEstimator(scorer.fit(X)), alpha=0.1, random_state=draw
            ).fit(X)
            count += monitor.update(rng.normal(size=(length, 5))).alarm_
        alarms[name] = count / n_streams
        print(f"{name}: alarms in {count} of {n_streams} streams", flush=True)
    delays = delays_of_brighter_images(n_streams // 2)
    print("delays", np.quantile(delays, [0, 0.5, 0.95, 1]), flush=True)
    return {"alpha": 0.1, "length": length, "alarms": alarms, "delays": delays}


def delays_of_brighter_images(n_streams: int) -> list[int]:
    """200 images to fit, 50 like them, and then such as are a tenth brighter."""
    data = make_texture_defects("brick", n_train=1500, n_test_good=0, random_state=7)
    good = data.X_train
    brighter = (good * 1.1).clip(0, 255).astype(np.uint8)
    delays = []
    with TemporaryDirectory() as memory:
        network = BackboneFeatures(stages="stage3", image_size=32, memory=memory)
        detector = ConformalDetector(
            make_pipeline(network, KNNScorer()), random_state=0
        )
        for draw in range(n_streams):
            rows = np.random.default_rng(draw).permutation(len(good))
            monitor = DriftMonitor(detector, random_state=draw).fit(good[rows[:200]])
            monitor.update(good[rows[200:250]])
            early = monitor.alarm_
            monitor.update(brighter[rows[250:400]])
            at = monitor.alarm_at_
            delays.append(-1 if early else 10**6 if at is None else at - 50 + 1)
    return delays


def plot() -> None:
    import matplotlib.pyplot as plt

    content = json.loads((RESULTS / "error_rates.json").read_text())
    images = ROOT / "docs" / "images"
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for ax, source in zip(axes, ("vectors", "patches"), strict=True):
        ax.plot([0, 0.5], [0, 0.5], color="black", lw=0.8, label="as promised")
        for name, row in content["calibration"].items():
            detector, _, rest = name.rpartition(f", {source}, n=")
            if rest == "200":
                style = "--" if "not hold" in detector else "-"
                ax.plot(GRID, row["share"], style, lw=1.5, label=detector)
        ax.set(title=f"{source}, 200 to fit", xlabel="t", xlim=(0, 0.5), ylim=(0, 0.8))
    axes[0].set_ylabel("share of new normal samples with p <= t")
    axes[0].legend(fontsize=7, loc="upper left")
    figure.savefig(images / "error_rates_calibration.png", dpi=110)

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, row in content["discoveries"].items():
        method, n = name.split(", n=")
        values = np.array([row[str(alpha)] for alpha in ALPHAS])
        colour = f"C{('50', '200', '1000').index(n)}"
        for ax, column in zip(axes, values.T, strict=True):
            style = "-o" if method == "held out" else "--x"
            ax.plot(ALPHAS, column, style, color=colour, label=f"{method}, {n} to fit")
    axes[0].plot([0, 0.3], [0, 0.3], color="black", lw=0.8, label="as promised")
    axes[0].set(xlabel="alpha", ylabel="false alarms among alarms", ylim=(0, 0.35))
    axes[1].set(xlabel="alpha", ylabel="anomalies found", ylim=(0, 1))
    axes[0].legend(fontsize=7)
    figure.savefig(images / "error_rates_discoveries.png", dpi=110)

    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    sizes = [int(n) for n in content["intervals"]]
    rows = content["intervals"].values()
    low, high = np.transpose([row["interval"] for row in rows])
    ax.fill_between(sizes, low, high, alpha=0.3, label="false_alarm_interval, 95 %")
    for n, row in zip(sizes, rows, strict=True):
        some = row["rates"][:60]
        ax.plot([n] * len(some), some, ".", ms=3, color="C1")
    ax.plot([], [], ".", color="C1", label="measured, one dot a training set")
    ax.axhline(0.05, color="black", lw=0.8, label="contamination")
    ax.set(xscale="log", xlabel="held-out scores", ylabel="false alarm rate")
    ax.set_xticks(sizes, [str(n) for n in sizes])
    ax.legend(fontsize=8)
    figure.savefig(images / "error_rates_interval.png", dpi=110)


STUDIES: dict[str, Callable[[Any], Any]] = {
    "intervals": lambda options: intervals(options.fits),
    "discoveries": lambda options: discoveries(options.fits * 3 // 2),
    "drift": lambda options: drift(options.streams, options.length),
    "calibration": lambda options: calibration(options.fits),
}


def keep(name: str, before: Any, result: dict[str, Any], whole: bool = True) -> None:
    """Write a study beside the others, or what is known of it; with its environment."""
    path = RESULTS / "error_rates.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    content[name] = result if whole else content.get(name, {}) | result
    if before is not None:
        environments = content.get("environment", {})
        content["environment"] = {k: v for k, v in environments.items() if k in STUDIES}
        content["environment"][name] = before
    write_json("error_rates", content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", nargs="?", choices=[*STUDIES, "plot"])
    parser.add_argument("--fits", type=int, default=200)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--length", type=int, default=10_000)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.study == "plot":
        plot()
    else:
        for name in [arguments.study] if arguments.study else STUDIES:
            before = environment()
            keep(name, before, STUDIES[name](arguments))
