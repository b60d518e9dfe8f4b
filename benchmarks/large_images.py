"""Large images in tiles: time and memory.

    python benchmarks/large_images.py [--width 8000] [--height 2000] [--images 6]

Colour photographs of noisy stripes are written as PNG files. A `PatchDetector` with
tiles of 256 pixels, which the network sees at 224, is fitted to them, scores two more,
and maps one of them, on one thread. Memory is the largest resident set of a fresh
process so far, above what it held when a small detector had been fitted (Linux).
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from _common import environment, write_json
from PIL import Image

from skdeepad import PatchDetector

MB = 2**20


def write_image(path: Path, height: int, width: int, seed: int) -> None:
    """Write stripes with noise; a smooth picture would be decoded too quickly."""
    rng = np.random.default_rng(seed)
    stripes = 128 + 60 * np.sin(np.arange(width) / 9 + seed)
    pixels = rng.integers(-20, 20, (height, width, 3), dtype=np.int16)
    pixels += stripes.astype(np.int16)[None, :, None]
    Image.fromarray(pixels.astype(np.uint8)).save(path, compress_level=1)


def resident(name: str) -> float:
    """Give the resident set of this process in MB: "VmRSS" now, "VmHWM" at most so far.

    (`ru_maxrss` counts what the parent had, too.)
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(name))
    return int(kilobytes) * 1024 / MB


def measure(paths: list[Path], queue: Any) -> None:
    """Fit, score and map, and say what it took."""
    torch.set_num_threads(1)
    options = {"tile_size": 256, "image_size": 224, "random_state": 0}
    small = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
    PatchDetector(contamination=0.2, image_size=64, random_state=0).fit(small)
    detector = PatchDetector(contamination=0.2, **options)
    start, found = resident("VmRSS"), {}

    def take(name: str, function: Any, *arguments: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments)
        seconds = time.perf_counter() - started
        above = resident("VmHWM") - start
        found[name] = {"seconds": seconds, "megabytes_above_start": above}
        return result

    take("fit", detector.fit, paths[:-2])
    take("score two", detector.score_samples, paths[-2:])
    take("map one", detector.anomaly_map, paths[-1:])
    n_tiles = len(detector._cut(detector._check_inputs(paths[:1])))
    queue.put({"start_megabytes": start, "tiles_an_image": n_tiles, **found})


def main() -> None:
    """Measure in a fresh process, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--height", type=int, default=2000)
    parser.add_argument("--width", type=int, default=8000)
    parser.add_argument("--images", type=int, default=6)
    options = parser.parse_args()
    told = environment()
    with TemporaryDirectory() as folder:
        paths = [Path(folder, f"{i}.png") for i in range(options.images + 2)]
        for i, path in enumerate(paths):
            write_image(path, options.height, options.width, i)
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=measure, args=(paths, queue))
        process.start()
        found = queue.get()
        process.join()
    print(found)
    write_json("large_images", {"environment": told, **vars(options), **found})


if __name__ == "__main__":
    main()
