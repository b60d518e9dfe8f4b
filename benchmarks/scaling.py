"""How much more do more threads and more workers score? All measured in this run.

    python benchmarks/scaling.py

Image files of 256 pixels are scored in one process held to one core, in one process by
1 and 2 threads, by 1 and 2 workers of dask, of one thread each, and by one worker with
the memory setting that dask has and the others are spared. (Files are read in threads
of their own: only the first contender keeps to one core.) Contenders take turns, so
that other work on the machine hits all alike; ratios are of speeds over that of one
process of one thread, for the fastest turns, and as the median over turns.
Also: the bytes of a pickled detector, and what a part with nothing to do costs dask.
"""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dask
import dask.array as da
import numpy as np
import torch
from _common import environment, write_json
from distributed import Client, LocalCluster
from numpy.typing import NDArray
from sklearn.base import clone
from speed import print_row, ratios, take_turns, write_files
from threadpoolctl import threadpool_limits

from skdeepad import MahalanobisFeatureScorer

TRIM = "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_"
PART = 96  # files, three batches: the next is read while one is scored


def score(part: NDArray[Any], detector: Any) -> NDArray[np.float64]:
    return detector.score_samples(part)


def in_one_process(detector: Any, paths: NDArray[Any], threads: int) -> None:
    torch.set_num_threads(threads)
    with threadpool_limits(threads):
        detector.score_samples(paths)


def on_one_core(detector: Any, paths: NDArray[Any]) -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # threads that start from here inherit it
    try:
        in_one_process(detector, paths, 1)
    finally:
        os.sched_setaffinity(0, cores)


def on_dask(client: Client, detector: Any, paths: NDArray[Any]) -> None:
    parts = da.from_array(paths, chunks=PART)
    scores = parts.map_blocks(score, dask.delayed(detector), meta=np.empty(0))
    client.compute(scores).result()


def measure_images(
    what: str,
    detector: Any,
    paths: NDArray[Any],
    clients: dict[str, Client],
    repeats: int,
) -> list[dict[str, Any]]:
    one_thread = "one process, 1 thread"
    runs: dict[str, Callable[[], None]] = {
        one_thread: partial(in_one_process, detector, paths, 1),
        "one process, 2 threads": partial(in_one_process, detector, paths, 2),
        "one process, on one core": partial(on_one_core, detector, paths),
    }
    for name, client in clients.items():
        runs[name] = partial(on_dask, client, detector, paths)
    seconds = take_turns(runs, repeats)
    rows = []
    for name, taken in seconds.items():
        row = {
            "what": f"{what}: {name}",
            "n_images": len(paths),
            "images_per_second": round(len(paths) / min(taken), 1),
            **ratios(seconds[one_thread], taken),
        }
        print_row(row, f"{row['images_per_second']:.0f} images/s")
        rows.append(row)
    return rows


def nothing(part: int) -> int:
    return part


def measure_tasks(client: Client, repeats: int, n: int = 2000) -> dict[str, Any]:
    """Time parts in which nothing is done."""
    tasks = [dask.delayed(nothing)(i) for i in range(n)]
    run = {"tasks": lambda: client.gather(client.compute(tasks))}
    fastest = min(take_turns(run, repeats)["tasks"])
    row = {"what": "dask, a part of nothing", "milliseconds": 1000 * fastest / n}
    row["milliseconds"] = round(row["milliseconds"], 2)
    print_row(row, f"{row['milliseconds']:.2f} ms")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--n-images", type=int, default=384)
    args = parser.parse_args()
    told, content = environment(), {"repeats": args.repeats, "cores": os.cpu_count()}
    options = {
        "threads_per_worker": 1,
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",
    }
    print(f"{'':72}   ratio  median")
    with TemporaryDirectory() as folder, ExitStack() as stack:

        def start(n_workers: int, trim: int | None) -> Client:
            with dask.config.set({TRIM: trim}):
                cluster = LocalCluster(n_workers=n_workers, **options)
            return stack.enter_context(Client(stack.enter_context(cluster)))

        clients = {
            "dask, 1 x 1 thread": start(1, None),
            "dask, 2 x 1 thread": (two := start(2, None)),
            # last: the setting stays in this process's environment
            "dask, 1 x 1 thread, trimming": start(1, 65536),
        }
        for ending, size in (("jpg", 112), ("png", 112), ("jpg", 224)):
            paths = write_files(Path(folder), args.n_images, ending)
            detector = MahalanobisFeatureScorer(image_size=size, device="cpu")
            detector.fit(paths[:256])
            what = f"{ending} of 256 px, {size} px"
            content[what] = {
                "bytes_of_a_file": round(np.mean([os.path.getsize(p) for p in paths])),
                "rows": measure_images(
                    what, detector, np.array(paths), clients, args.repeats
                ),
            }
        content["pickled_bytes"] = {
            "fitted on 256": len(pickle.dumps(detector)),
            "not fitted": len(pickle.dumps(clone(detector))),
        }
        content["tasks"] = measure_tasks(two, args.repeats)
    write_json("scaling", {**content, "environment": told})


if __name__ == "__main__":
    main()
