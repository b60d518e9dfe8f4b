"""Small defects: detectors side by side, on tiles that share no pixel.

    python benchmarks/defects.py [--textures brick grass gravel] [--size 64] [--draws 1]

Each detector is fitted to 150 good tiles of the left half of a photograph and scores 60
good and 60 defective ones of the right half, at 160 pixels, on one thread. "reference"
rows are PatchCore as anomalib computes it (3 x 3 pooling, a greedy coreset of a share
of all patches, reweighted scores), by plain torch on the same weights.
"""

from __future__ import annotations

import argparse
import pickle
import time
import warnings
from typing import Any

import numpy as np
import torch
from _common import environment, write_json
from torch.nn import functional as F

from skdeepad import (
    DetectorEnsemble,
    KDClonerEstimator,
    MahalanobisFeatureScorer,
    PANDAEstimator,
    PatchDetector,
)
from skdeepad.backbones import load_backbone
from skdeepad.datasets import make_texture_defects
from skdeepad.localization import fit_size, refine
from skdeepad.metrics import anomaly_roc_auc_score, aupro_score, pixel_roc_auc_score

PIXELS = 160
OPTIONS: dict[str, Any] = {"image_size": PIXELS, "random_state": 0}


class ReferencePatchCore:
    """PatchCore with a coreset that is a share of all patches."""

    def __init__(self, share: float, stages: tuple[str, ...]) -> None:
        self.share, self.stages = share, stages

    def fit(self, X: Any) -> ReferencePatchCore:
        """Choose the coreset, by full distances."""
        rows = torch.cat([self._patches(part) for part in self._parts(X)]).flatten(0, 1)
        rng = np.random.RandomState(0)
        projected = rows @ torch.from_numpy(
            rng.randn(rows.shape[1], 128).astype(np.float32) / 128**0.5
        )
        apart = torch.full((len(rows),), torch.inf)
        chosen = [int(rng.randint(len(rows)))]
        for _ in range(int(self.share * len(rows)) - 1):
            new = (projected - projected[chosen[-1]]).square().sum(dim=1)
            apart = torch.minimum(apart, new)
            chosen.append(int(apart.argmax()))
        self.bank = rows[chosen]
        return self

    def measure(self, X: Any) -> tuple[Any, Any]:
        """Give scores, the higher the more normal, and maps."""
        scores, maps = [], []
        for part in self._parts(X):
            patches = self._patches(part)
            apart, found = torch.cdist(patches.flatten(0, 1), self.bank).min(dim=1)
            apart = apart.view(patches.shape[:2])
            worst = apart.argmax(dim=1)
            for i, q in enumerate(worst):
                m = self.bank[found.view(apart.shape)[i, q]]
                near = torch.cdist(m[None], self.bank)[0].topk(9, largest=False).indices
                others = torch.cdist(patches[i, q][None], self.bank[near])[0]
                weight = 1 - torch.softmax(others, 0)[0]
                scores.append(-float(weight * apart[i, q]))
            side = int(apart.shape[1] ** 0.5)
            for one in apart.view(-1, side, side).numpy():
                at_size = fit_size(one, (PIXELS, PIXELS))[None]
                maps.append(fit_size(refine(at_size, 4.0, False)[0], X.shape[1:]))
        return np.array(scores), np.stack(maps)

    def _parts(self, X: Any) -> Any:
        return torch.from_numpy(X).float().div(255)[:, None].split(32)

    def _patches(self, x: torch.Tensor) -> torch.Tensor:
        network = load_backbone("efficientnet_lite0")
        x = F.interpolate(x, (PIXELS, PIXELS), mode="bilinear")
        with torch.inference_mode():
            maps = list(network.forward_stages(x, self.stages).values())
        maps = [F.avg_pool2d(m, 3, 1, 1) for m in maps]
        size = maps[0].shape[2:]
        maps = [F.interpolate(m, size, mode="bilinear") for m in maps]
        return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)


DETECTORS: dict[str, Any] = {
    "PatchDetector": lambda: PatchDetector(**OPTIONS),
    "PatchDetector, gaussian, each": lambda: PatchDetector(
        scorer="gaussian", **OPTIONS
    ),
    "PatchDetector, gaussian, shared": lambda: PatchDetector(
        scorer="gaussian", positions="shared", **OPTIONS
    ),
    "reference PatchCore 1 %": lambda: ReferencePatchCore(0.01, ("stage3", "stage5")),
    "reference PatchCore 10 %": lambda: ReferencePatchCore(0.1, ("stage3", "stage5")),
    "KDCloner, for defects": lambda: KDClonerEstimator.for_defects(
        **{**OPTIONS, "image_size": 128}
    ),
    "MahalanobisFeatureScorer": lambda: MahalanobisFeatureScorer(**OPTIONS),
    "PANDA": lambda: PANDAEstimator(**OPTIONS),
    "DetectorEnsemble": DetectorEnsemble,
}


def measure(make: Any, data: Any) -> dict[str, float]:
    """Fit and score one detector."""
    detector, started = make(), time.perf_counter()
    detector.fit(data.X_train)
    fitted = time.perf_counter()
    maps, alarms = None, np.nan
    if hasattr(detector, "measure"):
        scores, maps = detector.measure(data.X_test)
        scored = time.perf_counter()
    else:
        scores = detector.score_samples(data.X_test)
        scored = time.perf_counter()
        alarms = np.mean(scores[data.y_test == 1] < detector.offset_)
        if hasattr(detector, "anomaly_map"):
            maps = detector.anomaly_map(data.X_test)
    known = maps is not None
    return {
        "image": 100 * anomaly_roc_auc_score(data.y_test, scores),
        "pixel": 100 * pixel_roc_auc_score(data.masks_test, maps) if known else np.nan,
        "aupro": 100 * aupro_score(data.masks_test, maps) if known else np.nan,
        "false_alarms": 100 * float(alarms),
        "fit_s": fitted - started,
        "score_s": scored - fitted,
        "megabytes": len(pickle.dumps(detector)) / 1e6,
    }


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--textures", nargs="+", default=["brick", "grass", "gravel"])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--detectors", nargs="+", default=list(DETECTORS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    where, rows = environment(), []
    for texture in options.textures:
        for draw in range(options.draws):
            data = make_texture_defects(
                texture,
                n_train=150,
                n_test_good=60,
                n_test_defective=60,
                image_size=options.size,
                split="halves",
                random_state=500 + draw,
            )
            for name in options.detectors:
                found = measure(DETECTORS[name], data)
                rows.append(
                    {"detector": name, "texture": texture, "draw": draw} | found
                )
                print(rows[-1], flush=True)
    keys = [k for k in rows[0] if k not in ("detector", "texture", "draw")]
    print("| | " + " | ".join(keys) + " |\n| --- |" + " --- |" * len(keys))
    for name in options.detectors:
        mine = [row for row in rows if row["detector"] == name]
        means = [np.mean([row[key] for row in mine]) for key in keys]
        print(f"| {name} | " + " | ".join(f"{m:.1f}" for m in means) + " |")
    for row in rows:
        row.update({k: None for k in keys if np.isnan(row[k])})
    write_json("defects", {"environment": where, "size": options.size, "rows": rows})


if __name__ == "__main__":
    main()
