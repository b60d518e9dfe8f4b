"""What exported files score, how fast, and what they cost. Figures of docs/deploy.md.

    python benchmarks/export.py
    python benchmarks/export.py --parts scores

scores   detectors on EfficientNet-Lite0, fitted to textures in float32: the largest
         relative error of the runtime's scores over uint8 grey, uint8 colour and float
         images of four sizes (and the largest error over the largest score, since
         those of ensembles may be 0), seconds of an export, size of the file
speed    images per second of `score_samples` and of the runtime, on uint8 arrays of the
         network's size, in float32 and in the precision that "auto" chooses, in one
         thread
engine   images per second of the frozen pass alone, by torch as the package runs it and
         by ONNX Runtime
process  a process of its own: seconds of the processor, Python's start included, until
         a model is loaded, and until its first score; peak memory, with 100 colour
         photographs of 1,000 x 1,000 (Linux only)
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import torch
from _common import environment, write_json
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from torch.nn import functional as F

import skdeepad
from skdeepad import export_onnx
from skdeepad.datasets import make_texture_defects
from skdeepad.frozen import frozen_copy
from skdeepad.runtime import load

SIZES = ((64, 64), (200, 150), (40, 40), (91, 133))
THREADS = (1,)
SHORT = {"random_state": 0, "max_steps": 30}


def detectors(size: int) -> dict[str, Any]:
    """Give the detectors that are measured, not fitted."""
    common: dict[str, Any] = {"image_size": size, "precision": "float32"}
    trained = {**common, **SHORT}
    features = skdeepad.BackboneFeatures(**common)
    return {
        "mahalanobis": skdeepad.MahalanobisFeatureScorer(**common),
        "patches": skdeepad.PatchDetector(**common, random_state=0),
        "patches, gaussian": skdeepad.PatchDetector(
            **common, random_state=0, scorer="gaussian", n_features=50
        ),
        "PANDA": skdeepad.PANDAEstimator(**trained),
        "PANDA, ses": skdeepad.PANDAEstimator(
            **trained, adaptation="ses", n_checkpoints=2
        ),
        "KD cloner": skdeepad.KDClonerEstimator(**trained),
        "KD cloner, residuals": skdeepad.KDClonerEstimator(
            **trained, discrepancy="mahalanobis"
        ),
        "HSC": skdeepad.HSCClassifier(**trained),
        "DeepSVDD": skdeepad.DeepSVDD(
            "svdd_cifar10_lenet", **{**trained, "image_size": 32}, pretrain_steps=20
        ),
        "kNN": make_pipeline(features, skdeepad.KNNScorer()),
        "ensemble": skdeepad.DetectorEnsemble(
            [
                ("a", skdeepad.MahalanobisFeatureScorer(**common)),
                ("b", make_pipeline(features, skdeepad.KNNScorer(metric="cosine"))),
            ]
        ),
    }


def resized(images: NDArray[Any], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize colour images, uint8."""
    values = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)
    found = F.interpolate(values, size, mode="bilinear", antialias=True)
    return found.permute(0, 2, 3, 1).numpy().round().astype(np.uint8)


def measure_scores(folder: Path) -> list[dict[str, Any]]:
    """Compare scores of new images."""
    data = make_texture_defects("brick", n_train=100, random_state=0)
    train = np.repeat(data.X_train[..., None], 3, axis=3)
    new = np.repeat(data.X_test[96:103, ..., None], 3, axis=3)
    new = (new * np.array([1.0, 0.9, 0.8])).astype(np.uint8)  # some colour
    rows = []
    for name, detector in detectors(112).items():
        labels = np.where(np.arange(len(train)) % 10, 1, -1) if name == "HSC" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            detector.fit(train, labels)
        path = folder / f"{len(rows)}.onnx"
        start = time.perf_counter()
        export_onnx(detector, path)
        seconds = time.perf_counter() - start
        model = load(path)
        errors, to_scale = [], []
        for size in SIZES:
            colour = resized(new, size)
            for X in (colour, colour[..., 1], colour[:1] / 255):
                expected = detector.score_samples(X)
                apart = np.abs(model.score_samples(X) - expected)
                errors.append((apart / np.abs(expected)).max())
                to_scale.append(apart.max() / np.abs(expected).max())
        row = {
            "detector": name,
            "largest_relative_error": float(f"{max(errors):.1e}"),
            "largest_error_to_largest_score": float(f"{max(to_scale):.1e}"),
            "export_seconds": round(seconds, 1),
            "megabytes": round(path.stat().st_size / 1e6, 1),
        }
        print(row)
        rows.append(row)
    return rows


def images_per_second(
    contenders: dict[str, Callable[[], Any]], n: int, turns: int = 5
) -> dict[str, float]:
    """Time contenders that take turns, each in its fastest turn, of n images.

    With one thread the processor's time counts, which other work on the machine hardly
    changes; with more, the time that passes.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns + 1):  # the first one warms up
        for name, run in contenders.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: round(n / min(found[1:]), 1) for name, found in seconds.items()}


def measure_speed(folder: Path) -> list[dict[str, Any]]:
    """Time `score_samples`."""
    rng, rows = np.random.default_rng(0), []
    for size in (112, 224):
        X = rng.integers(0, 256, (48, size, size, 3), dtype=np.uint8)
        for name in ("mahalanobis", "patches"):
            chosen = detectors(size)[name]
            detector = chosen.fit(X[:32])
            auto = clone(chosen).set_params(precision="auto").fit(X[:32])
            path = folder / "x.onnx"
            export_onnx(detector, path, overwrite=True)
            for threads in THREADS:
                torch.set_num_threads(threads)
                model = load(path, threads=threads)
                timed = {
                    "torch_float32": partial(detector.score_samples, X[32:]),
                    "torch_auto": partial(auto.score_samples, X[32:]),
                    "runtime": partial(model.score_samples, X[32:]),
                }
                rows.append(
                    {
                        "detector": name,
                        "image_size": size,
                        "threads": threads,
                        "auto_is": str(auto._dtype).removeprefix("torch."),
                        **images_per_second(timed, 16),
                    }
                )
                print(rows[-1], flush=True)
    return rows


class Pass(torch.nn.Module):
    """The frozen pass, for export."""

    def __init__(self, front: Any) -> None:
        super().__init__()
        self.front = front
        self.network = frozen_copy(front.backbone, torch.device("cpu"), torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give the features."""
        return torch.cat(self.front._outputs(self.network, x), dim=1)


def run_parts(session: Any, parts: list[NDArray[Any]]) -> None:
    """Run one batch after the other."""
    for part in parts:
        session.run(None, {"x": part})


def measure_engine(folder: Path) -> list[dict[str, Any]]:
    """Time the pass alone."""
    rows = []
    for size in (112, 160, 224):
        x = torch.rand(16, 3, size, size)
        timed: dict[str, Callable[[], Any]] = {}
        for precision in ("float32", "bfloat16"):
            detector = skdeepad.MahalanobisFeatureScorer(
                image_size=size, precision=precision, contamination=0.5
            )
            front = detector.fit(x[:4].numpy())._front()
            timed[f"torch_{precision}"] = partial(front.run, x)
            if precision == "float32":
                file = exported_pass(front, x[:2])
        for threads in THREADS:
            torch.set_num_threads(threads)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(file, options)
            for n in (1, 4):
                parts = [part.numpy() for part in x.split(n)]
                timed[f"onnxruntime_batches_of_{n}"] = partial(
                    run_parts, session, parts
                )
            row = {"image_size": size, "threads": threads}
            rows.append({**row, **images_per_second(timed, 16)})
            print(rows[-1], flush=True)
    return rows


def exported_pass(front: Any, x: torch.Tensor) -> bytes:
    """Give the graph of a frozen pass."""
    file: Any = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Pass(front),
            (x,),
            file,
            input_names=["x"],
            dynamic_axes={"x": {0: "n"}},
            opset_version=18,
            dynamo=False,
        )
    return bytes(file.getvalue())


PROCESS = """
import time
from skdeepad.runtime import load
model = load({path!r}, threads=1)
loaded = time.process_time()
import numpy as np
X = np.zeros((1, 64, 64, 3), np.uint8)
model.score_samples(X)
scored = time.process_time()
photo = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
for _ in range(100):
    model.score_samples(photo[None])
status = open("/proc/self/status").read()
print(loaded, scored, int(status.partition("VmHWM:")[2].split()[0]) / 1024)
"""


def measure_process(folder: Path) -> list[dict[str, Any]]:
    """Time a process of its own, three times."""
    X = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    rows = []
    for name in ("mahalanobis", "patches"):
        path = folder / f"{name}.onnx"
        export_onnx(detectors(112)[name].fit(X), path)
        found = []
        for _ in range(3):
            process = subprocess.run(
                [sys.executable, "-c", PROCESS.format(path=str(path))],
                capture_output=True,
                text=True,
                check=True,
            )
            found.append([float(value) for value in process.stdout.split()])
        loaded, scored, megabytes = np.min(found, axis=0)
        rows.append(
            {
                "detector": name,
                "seconds_until_loaded": round(loaded, 2),
                "seconds_until_first_score": round(scored, 2),
                "peak_megabytes": round(megabytes),
            }
        )
        print(rows[-1])
    return rows


PARTS = {
    "scores": measure_scores,
    "speed": measure_speed,
    "engine": measure_engine,
    "process": measure_process,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    told = {**environment(), "onnxruntime": onnxruntime.__version__}
    for part in args.parts:
        with TemporaryDirectory() as folder:
            rows = PARTS[part](Path(folder))
        write_json(f"export-{part}", {part: rows, "environment": told})


if __name__ == "__main__":
    main()
