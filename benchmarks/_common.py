"""What the benchmarks share: the environment, JSON, and a count of images."""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import sklearn
import timm
import torch
from numpy.typing import NDArray

import skdeepad
from skdeepad import BackboneFeatures
from skdeepad.inference import FeaturePass, Tap

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PASSED = "SKDEEPAD_BENCH_PASSED"  # names a file; the variable reaches the workers


def environment() -> dict[str, Any]:
    """Describe what a result depends on; call it before the work begins."""
    load = os.getloadavg()[0]
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "scikit-learn": sklearn.__version__,
        "skdeepad": skdeepad.__version__,
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load_average_at_start": round(load, 2),
        "busy_at_start": load > 1,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()


def write_json(name: str, content: dict[str, Any]) -> None:
    """Write a result under its name."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(f"written: {os.path.relpath(path)}")


class _CountedPass(FeaturePass):
    def run(self, values: torch.Tensor) -> list[NDArray[Any]]:
        with open(os.environ[PASSED], "a") as file:
            file.write(f"{len(values)}\n")
        return super().run(values)


class CountedFeatures(BackboneFeatures):
    """`BackboneFeatures` that notes each image it passes through the backbone.

    It lives in a module of its own, and not in the script, so that worker processes
    can import it.
    """

    def _pass(self, taps: tuple[Tap, ...]) -> FeaturePass:
        return _CountedPass(**vars(super()._pass(taps)))
