"""Where detectors see defects: maps of all of them side by side.

    python benchmarks/maps.py

On tiles of 64 pixels of a texture and of a photograph: 80 good ones of the left half
to learn from, 30 good and 30 defective ones of the right half to test. Detectors that
learn from anomalies are given 20 defective tiles of the left half; the classifier of
known classes has two other textures beside the good tiles. Pixel AUROC and per-region
overlap x 100, and docs/images/maps.png.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import skimage.color
import skimage.data
import torch
from _common import ROOT, environment, write_json

from skdeepad import (
    DeepSAD,
    DeepSVDD,
    HSCClassifier,
    KDClonerEstimator,
    MahalanobisFeatureScorer,
    OpenSetClassifier,
    PANDAEstimator,
    PatchDetector,
)
from skdeepad.datasets import make_texture_defects
from skdeepad.metrics import anomaly_roc_auc_score, aupro_score, pixel_roc_auc_score

SOURCES = ("grass", "coffee")
SHOWN = 4  # defective tiles of each, of different kinds
N_ANOMALIES = 20
OPTIONS: dict[str, Any] = {"image_size": 96, "random_state": 0}
SCRATCH: dict[str, Any] = {"random_state": 0, "pretrain_steps": 50, "max_steps": 50}
# title -> detector, and what it learns from beside good tiles
DETECTORS: dict[str, tuple[Any, str]] = {
    "PatchDetector": (PatchDetector(**OPTIONS), ""),
    "KDCloner,\nfor defects": (KDClonerEstimator.for_defects(random_state=0), ""),
    "Mahalanobis": (MahalanobisFeatureScorer(**OPTIONS), ""),
    "PANDA": (PANDAEstimator(**OPTIONS), ""),
    "HSC": (HSCClassifier(**OPTIONS), "anomalies"),
    "DeepSVDD": (DeepSVDD(**SCRATCH), ""),
    "DeepSAD": (DeepSAD(**SCRATCH), "anomalies"),
    "OpenSet": (OpenSetClassifier(**OPTIONS, max_steps=100), "classes"),
}


def photograph(source: str) -> Any:
    """Load a photograph of scikit-image, in grey levels."""
    photo = getattr(skimage.data, source)()
    return np.uint8(255 * skimage.color.rgb2gray(photo)) if photo.ndim == 3 else photo


def samples(source: str, good: Any, learns: str) -> tuple[Any, Any]:
    """Give what a detector learns from: X, and y where it takes some."""
    if learns == "anomalies":
        photo = photograph(source)
        more = make_texture_defects(
            photo[:, : photo.shape[1] // 2],
            n_train=1,
            n_test_good=0,
            n_test_defective=N_ANOMALIES,
            random_state=900,
        ).X_test
        return np.concatenate([good, more]), np.repeat([1, -1], [len(good), len(more)])
    if learns == "classes":
        others = [
            make_texture_defects(name, n_train=100, random_state=900).X_train
            for name in ("brick", "gravel")
        ]
        return np.concatenate([good, *others]), np.repeat(
            [0, 1, 2], [len(good), 100, 100]
        )
    return good, None


def main() -> None:
    """Measure, draw, and write both."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    where, rows = environment(), []
    titles = ["tile", *DETECTORS]
    figure, axes = plt.subplots(
        len(SOURCES) * SHOWN,
        len(titles),
        figsize=(1.15 * len(titles), 1.15 * len(SOURCES) * SHOWN + 0.4),
        layout="constrained",
    )
    for number, source in enumerate(SOURCES):
        data = make_texture_defects(
            photograph(source),
            n_train=80,
            n_test_good=30,
            n_test_defective=30,
            split="halves",
            random_state=500,
        )
        kinds = np.unique(data.kinds_test[data.y_test == -1])
        shown = [np.flatnonzero(data.kinds_test == kind)[0] for kind in kinds[:SHOWN]]
        lines = axes[number * SHOWN : (number + 1) * SHOWN]
        for line, i in zip(lines, shown, strict=True):
            line[0].imshow(data.X_test[i], cmap="gray", vmin=0, vmax=255)
            line[0].contour(data.masks_test[i], [0.5], colors="red", linewidths=1)
        for column, (title, (detector, learns)) in enumerate(DETECTORS.items(), 1):
            started = time.perf_counter()
            detector.fit(*samples(source, data.X_train, learns))
            fitted = time.perf_counter()
            maps = detector.anomaly_map(data.X_test)
            mapped = time.perf_counter()
            scores = detector.score_samples(data.X_test)
            good = data.y_test == 1
            rows.append(
                {
                    "source": source,
                    "detector": title.replace("\n", " "),
                    "image": 100 * anomaly_roc_auc_score(data.y_test, scores),
                    "pixel": 100 * pixel_roc_auc_score(data.masks_test, maps),
                    "aupro": 100 * aupro_score(data.masks_test, maps),
                    "good_maps_above_threshold": 100
                    * float(
                        np.mean(maps[good].max(axis=(1, 2)) > detector.map_offset_)
                    ),
                    "fit_s": fitted - started,
                    "maps_s": mapped - fitted,
                }
            )
            print(rows[-1], flush=True)
            low, high = np.quantile(maps[good], 0.5), max(m.max() for m in maps[shown])
            for line, i in zip(lines, shown, strict=True):
                line[column].imshow(maps[i], cmap="inferno", vmin=low, vmax=high)
                line[column].contour(
                    data.masks_test[i], [0.5], colors="white", linewidths=0.7
                )
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=8)
    figure.savefig(ROOT / "docs" / "images" / "maps.png", dpi=110)
    write_json("maps", {"environment": where, "rows": rows})


if __name__ == "__main__":
    main()
