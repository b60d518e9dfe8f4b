"""Small defects: detectors side by side.

    python benchmarks/defects.py development --draws 2
    python benchmarks/defects.py halves --draws 5
    python benchmarks/defects.py held-back
    python benchmarks/defects.py overlapping
    python benchmarks/defects.py alarms
    python benchmarks/defects.py dirty
    python benchmarks/defects.py stream

development  what the defaults were chosen on: textures, and four photographs
halves       fitted to 150 good tiles of 64 pixels of the left half of a texture, judged
             by 60 good and 60 defective ones of the right half: no pixel in common
held-back    the same on five other photographs, which judge: nothing is chosen by them
overlapping  the draw of docs/kd_cloner.md: three textures, tiles of 64 and 128 pixels,
             200 good ones, judged by 100 good and 100 defective ones
alarms       good tiles and maps flagged of 300 new ones, at 96 pixels
dirty        a tenth of the training tiles are defective: what the memory holds of them
stream       seconds of the processor, memory and size of the file by number of images

Networks see images at 160 pixels, on one thread. "anomalib" rows are anomalib's own
PatchCore, given the same stages of the same network; it is left out where it is not
installed. "reference" rows are nearly the same, by plain torch. Rows of detectors that
are not asked for stay in the file.
"""

from __future__ import annotations

import argparse
import json
import pickle
import resource
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from typing import Any

import numpy as np
import skimage.color
import skimage.data
import torch
from _common import RESULTS, environment, write_json
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

TEXTURES = "brick", "grass", "gravel"
PHOTOGRAPHS = {
    "development": ["camera", "coffee", "cat", "rocket"],  # no others to develop on
    "held-back": [
        *("astronaut", "coins", "hubble_deep_field", "immunohistochemistry", "moon"),
    ],
}
NAMED = "split", "image_size"  # what data sets differ in
PIXELS = 160
OPTIONS: dict[str, Any] = {"image_size": PIXELS, "random_state": 0}


class ReferencePatchCore:
    """PatchCore with a coreset that is a share of all patches."""

    def __init__(self, share: float, stages: tuple[str, ...]) -> None:
        self.share, self.stages = share, stages

    def fit(self, X: Any) -> ReferencePatchCore:
        """Choose the coreset, by full distances."""
        rows = torch.cat([self._patches(part) for part in resized(X)]).flatten(0, 1)
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
        for part in resized(X):
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

    def _patches(self, x: torch.Tensor) -> torch.Tensor:
        network = load_backbone("efficientnet_lite0")
        with torch.inference_mode():
            maps = list(network.forward_stages(x, self.stages).values())
        maps = [F.avg_pool2d(m, 3, 1, 1) for m in maps]
        size = maps[0].shape[2:]
        maps = [F.interpolate(m, size, mode="bilinear") for m in maps]
        return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)


class AnomalibPatchCore:
    """anomalib's own PatchCore, which is given our stages; installed apart."""

    def __init__(self, share: float, stages: tuple[str, ...]) -> None:
        self.share, self.stages = share, stages

    def fit(self, X: Any) -> AnomalibPatchCore:
        """Choose the coreset."""
        from anomalib.models.image.patchcore.torch_model import PatchcoreModel

        torch.manual_seed(0)
        np.random.seed(0)
        self.model = PatchcoreModel(("layer1",), "resnet18", pre_trained=False)
        self.model.layers = self.stages
        self.model.feature_extractor = Stages(self.stages)
        self.model.train()
        for part in resized(X):
            self.model(part)
        self.model.subsample_embedding(self.share)
        self.model.eval()
        return self

    def measure(self, X: Any) -> tuple[Any, Any]:
        """Give scores, the higher the more normal, and maps."""
        with torch.inference_mode():
            found = [self.model(part) for part in resized(X)]
        maps = torch.cat([f.anomaly_map for f in found])[:, 0].numpy()
        maps = np.stack([fit_size(m, X.shape[1:]) for m in maps])
        return -torch.cat([f.pred_score for f in found]).numpy(), maps


class Stages(torch.nn.Module):
    """A network's stages, as anomalib's extractor gives them."""

    def __init__(self, stages: tuple[str, ...]) -> None:
        super().__init__()
        self.stages = stages

    def forward(self, x: Any) -> Any:
        """Give what each stage makes of images."""
        return load_backbone("efficientnet_lite0").forward_stages(x, self.stages)


def resized(X: Any) -> Any:
    """Give batches of grey images at the size that networks see."""
    for part in torch.from_numpy(X).float().div(255)[:, None].split(32):
        yield F.interpolate(part, (PIXELS, PIXELS), mode="bilinear")


DETECTORS: dict[str, Any] = {
    "PatchDetector": lambda: PatchDetector(**OPTIONS),
    "PatchDetector, cosine": lambda: PatchDetector(metric="cosine", **OPTIONS),
    "PatchDetector, euclidean": lambda: PatchDetector(metric="euclidean", **OPTIONS),
    "PatchDetector, gaussian, each": lambda: PatchDetector(
        scorer="gaussian", **OPTIONS
    ),
    "PatchDetector, gaussian, shared": lambda: PatchDetector(
        scorer="gaussian", positions="shared", **OPTIONS
    ),
    "reference PatchCore 1 %": lambda: ReferencePatchCore(0.01, ("stage3", "stage5")),
    "reference PatchCore 10 %": lambda: ReferencePatchCore(0.1, ("stage3", "stage5")),
    "anomalib PatchCore 1 %": lambda: AnomalibPatchCore(0.01, ("stage3", "stage5")),
    "anomalib PatchCore 10 %": lambda: AnomalibPatchCore(0.1, ("stage3", "stage5")),
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


def data_sets(protocol: str, draw: int) -> Iterator[tuple[str, Any]]:
    """Give what detectors are fitted to and judged by, by name."""
    few = {"n_train": 150, "n_test_good": 60, "n_test_defective": 60}
    apart = {**few, "split": "halves"}
    options: dict[str, list[dict[str, Any]]] = {
        "halves": [{**apart, "random_state": 500 + draw}],
        "overlapping": [
            {"image_size": size, "random_state": 1 + draw} for size in (64, 128)
        ],
        "development": [
            {**apart, "random_state": 101 + draw},
            {**few, "random_state": 101 + draw},
            {**few, "image_size": 128, "random_state": 101 + draw},
        ],
    }
    for texture, chosen in product(TEXTURES, options.get(protocol, [])):
        name = ", ".join([texture, *(str(v) for k, v in chosen.items() if k in NAMED)])
        yield name, make_texture_defects(texture, **chosen)
    for name in PHOTOGRAPHS.get(protocol, []):
        photo = getattr(skimage.data, name)()
        if photo.ndim == 3:
            photo = np.round(255 * skimage.color.rgb2gray(photo)).astype(np.uint8)
        seed = {"development": 101, "held-back": 900}[protocol] + draw
        photo = make_texture_defects(photo, **apart, random_state=seed)
        yield f"{name}, halves", photo


def table(protocol: str, names: list[str], draws: int) -> None:
    """Measure detectors, print the table, and write it."""
    where, rows = environment(), []
    for draw in range(draws):
        for data_set, data in data_sets(protocol, draw):
            for name in names:
                what = {"detector": name, "data": data_set, "draw": draw}
                rows.append(what | measure(DETECTORS[name], data))
                print(rows[-1], flush=True)
    keys = [k for k in rows[0] if k not in ("detector", "data", "draw")]
    print("| | " + " | ".join(keys) + " |\n| --- |" + " --- |" * len(keys))
    for name in names:
        mine = [row for row in rows if row["detector"] == name]
        means = [np.mean([row[key] for row in mine]) for key in keys]
        print(f"| {name} | " + " | ".join(f"{m:.1f}" for m in means) + " |")
    for row in rows:
        row.update({k: None for k in keys if np.isnan(row[k])})
    path = RESULTS / f"defects-{protocol}.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    runs |= {
        name: {"environment": where, "rows": [r for r in rows if r["detector"] == name]}
        for name in names
    }
    write_json(path.stem, {"runs": runs})


def alarms(n_draws: int = 1) -> None:
    """Measure the shares of new good images, and of their maps, that are flagged."""
    where, rows = environment(), []
    for n, texture, draw in product((50, 200), TEXTURES, range(n_draws)):
        good = make_texture_defects(
            texture,
            n_train=n + 300,
            n_test_good=0,
            n_test_defective=1,
            random_state=1000 + draw,
        ).X_train
        detector = PatchDetector(image_size=96, random_state=draw).fit(good[:n])
        images = np.mean(detector.predict(good[n:]) < 0)
        peaks = detector.anomaly_map(good[n:]).max(axis=(1, 2))
        row = {"n": n, "texture": texture, "draw": draw, "images": float(images)}
        rows.append(row | {"maps": float(np.mean(peaks > detector.map_offset_))})
        print(rows[-1], flush=True)
    for n in (50, 200):
        mine = [row for row in rows if row["n"] == n]
        means = {k: 100 * np.mean([row[k] for row in mine]) for k in ("images", "maps")}
        print(n, {k: round(v, 1) for k, v in means.items()})
    write_json("defects-alarms", {"environment": where, "rows": rows})


def dirty() -> None:
    """Let a tenth of the training tiles be defective."""
    where, rows = environment(), []
    for texture in TEXTURES:
        data = make_texture_defects(
            texture, n_train=150, n_test_defective=115, random_state=500
        )
        bad = np.flatnonzero(data.y_test < 0)[:15]
        rest = np.setdiff1d(np.arange(len(data.y_test)), bad)
        clean, detectors = data.X_train[15:], {}
        for name, more in (("clean", data.X_train[:15]), ("dirty", data.X_test[bad])):
            X = np.concatenate([clean, more])
            detector = detectors[name] = PatchDetector(**OPTIONS).fit(X)
            scores = detector.score_samples(data.X_test[rest])
            maps = detector.anomaly_map(data.X_test[rest])
            y, masks = data.y_test[rest], data.masks_test[rest]
            row = {"texture": texture, "training": name}
            row["image"] = 100 * anomaly_roc_auc_score(y, scores)
            row["pixel"] = 100 * pixel_roc_auc_score(masks, maps)
            row["aupro"] = 100 * aupro_score(masks, maps)
            rows.append(row)
        detector, painted = detectors["dirty"], data.masks_test[bad]
        patches = next(detector._features(detector._check_inputs(data.X_test[bad])))[1]
        side = int(patches.shape[1] ** 0.5)
        covered = F.interpolate(
            torch.tensor(painted)[:, None].float(), side, mode="area"
        )
        hurt = patches.reshape(-1, patches.shape[2])[covered.flatten() > 0]
        kept = {row.tobytes() for row in detector._density.rows()}
        found = sum(row.tobytes() in kept for row in hurt)
        rows[-1]["percent_of_patches"] = 100 * len(hurt) / (150 * patches.shape[1])
        rows[-1]["percent_of_memory"] = 100 * found / len(kept)
        print(rows[-2:], flush=True)
    write_json("defects-dirty", {"environment": where, "rows": rows})


def stream() -> None:
    """Fit and score by number of images, and learn from a stream of parts."""
    where, rows = environment(), []
    data = make_texture_defects(
        "gravel", n_train=600, n_test_good=0, n_test_defective=1, random_state=0
    )
    images, options = data.X_train, {"image_size": 128, "random_state": 0}
    detector, started = PatchDetector(**options), time.process_time()
    detector.fit(images[:200]).score_samples(images[200:400])
    seconds = time.process_time() - started  # of the processor: others may work, too
    print(f"200 fitted and 200 scored at 128 pixels: {seconds:.1f} s")
    streamed = PatchDetector(**options)
    for start in range(0, len(images), 100):
        streamed.partial_fit(images[start : start + 100])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        size = len(pickle.dumps(streamed)) / 1e6
        rows.append({"images": start + 100, "peak_rss_mb": peak, "file_mb": size})
        print(rows[-1], flush=True)
    content = {"environment": where, "fit_and_score_400_cpu_s": seconds, "stream": rows}
    write_json("defects-stream", content)


def main() -> None:
    """Run a protocol."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = ["development", "halves", "held-back", "overlapping"]
    protocols = [*tables, "alarms", "dirty", "stream"]
    parser.add_argument("protocol", choices=protocols)
    parser.add_argument("--draws", type=int, default=1)
    known = [n for n in DETECTORS if "anomalib" not in n or find_spec("anomalib")]
    parser.add_argument("--detectors", nargs="+", default=known, choices=known)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.protocol in tables:
        table(options.protocol, options.detectors, options.draws)
    else:
        {"alarms": alarms, "dirty": dirty, "stream": stream}[options.protocol]()


if __name__ == "__main__":
    main()
