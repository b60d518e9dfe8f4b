"""How far from the backbone's own speed? All ratios, all measured in this run.

    python benchmarks/speed.py
    python benchmarks/speed.py --parts arrays grid

The floor is the bare network: as timm makes it, on tensors that lie ready in memory,
from images to logits, in the same precision, batches and threads. Contenders take
turns, so that other work on the machine hits all alike; ratios are given for the
fastest turns, and as the median over turns. All on the CPU.

arrays  score_samples on uint8 arrays, as images per second over the floor's
paths   score_samples on image files, likewise; reading them is not in the floor
fit     fit on uint8 arrays, likewise
grid    a grid search over twelve scorers, three folds, as time over that of one pass
        of features, and without keeping them
        (grid-112: of more and smaller images, where the scorers weigh more)
panda   scoring by ten checkpoints (SES), as time over that of unadapted features
panda-fit  time of a loop as in the official code, contiguous and channels last, over
        that of fit
kd_cloner  scores and maps, as time over a bare pass of each of its two networks
hsc     an epoch of a LeNet under HSC, as time over that of a bare loop in PyTorch
representation  compare_representations on 1,000 images and three backbones, as time
        over that of a pass of each, and of its student's training and gradients
knn     KNNScorer's fit and scores on 20,000 rows, as time over that of a flat index
        of faiss (needs faiss-cpu)
memory  peak memory of score_samples on few files and on many (Linux only)
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
from _common import PASSED, CountedFeatures, environment, write_json
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from numpy.typing import NDArray
from PIL import Image
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from torch import nn

from skdeepad import (
    BackboneFeatures,
    HSCClassifier,
    KDClonerEstimator,
    KNNScorer,
    MahalanobisFeatureScorer,
    OneClassKFold,
    PANDAEstimator,
)
from skdeepad.backbones import load_backbone
from skdeepad.datasets import load_fashion_mnist
from skdeepad.inference import resolve_precision
from skdeepad.representation import brittleness, compare_representations

BATCH = 32
AUTO = resolve_precision("auto", torch.device("cpu"), vectors=False)
GRID = {
    "knn__n_neighbors": [1, 2, 5],
    "knn__metric": ["sqeuclidean", "cosine"],
    "knn__aggregation": ["mean", "kth"],
}


def make_photos(n: int, size: int, seed: int = 0) -> NDArray[np.uint8]:
    """Make colour images that compress about as photographs do."""
    rng = np.random.default_rng(seed)
    photos = np.empty((n, size, size, 3), dtype=np.uint8)
    for photo in photos:
        coarse = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
        photo[:] = np.clip(smooth + rng.normal(0, 3, smooth.shape), 0, 255)
    return photos


def bare_forward(n: int, size: int, dtype: torch.dtype) -> Callable[[], None]:
    """Make the floor for n images."""
    backbone = load_backbone("efficientnet_lite0")
    net = timm.create_model("tf_efficientnet_lite0").eval()
    weights = backbone.state_dict().values()
    net.load_state_dict(dict(zip(net.state_dict(), weights, strict=True)))
    net = net.to(memory_format=torch.channels_last)
    images = torch.from_numpy(make_photos(n, size)).permute(0, 3, 1, 2)
    ready = backbone.normalize(images / 255).to(memory_format=torch.channels_last)

    def forward() -> None:
        bfloat16 = dtype == torch.bfloat16
        with (
            torch.inference_mode(),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16),
        ):
            for batch in ready.split(BATCH):
                net(batch)

    return forward


def make_detectors(**options: Any) -> dict[str, Any]:
    options = {"batch_size": BATCH, "device": "cpu", **options}
    return {
        "mahalanobis": MahalanobisFeatureScorer(**options),
        "knn": make_pipeline(BackboneFeatures(**options), KNNScorer()),
    }


def compare(
    what: str,
    repeats: int,
    floor: tuple[int, int, torch.dtype],
    contenders: dict[str, Callable[[], Any]],
) -> list[dict[str, Any]]:
    """Let the floor and the contenders take turns; the first turn does not count."""
    n = floor[0]
    seconds = take_turns({"floor": bare_forward(*floor), **contenders}, repeats)
    rows = []
    for name in contenders:
        row = {
            "what": f"{what}, {name}",
            "n_images": n,
            "images_per_second": round(n / min(seconds[name]), 1),
            "floor_images_per_second": round(n / min(seconds["floor"]), 1),
            **ratios(seconds["floor"], seconds[name]),
        }
        print_row(row, f"{row['images_per_second']:.0f} images/s")
        rows.append(row)
    return rows


def take_turns(
    runs: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, list[float]]:
    """Time each in turn; the first turn does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(above: list[float], below: list[float]) -> dict[str, float]:
    """Divide the fastest turns, and each turn by its neighbour."""
    return {
        "ratio": round(min(above) / min(below), 3),
        "median_ratio": round(float(np.median(np.divide(above, below))), 3),
    }


def print_row(row: dict[str, Any], told: str) -> None:
    shown = "".join(f"{row[k]:8.2f}" for k in ("ratio", "median_ratio") if k in row)
    print(f"{row['what']:56}{told:>16}{shown}", flush=True)


def measure_arrays(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for size, n in ((112, 512), (224, 256)):
        train, test = make_photos(1024, size, seed=1), make_photos(n, size)
        for dtype in (torch.bfloat16, torch.float32):
            precision = str(dtype).removeprefix("torch.")
            contenders = {
                name: partial(detector.fit(train).score_samples, test)
                for name, detector in make_detectors(
                    image_size=size, precision=precision
                ).items()
            }
            what = f"arrays, {size} px, {precision}"
            rows += compare(what, repeats, (n, size, dtype), contenders)
    return rows


def write_files(folder: Path, n: int, ending: str) -> list[str]:
    """Write photos of 256 x 256 pixels."""
    paths = [str(folder / f"{i}.{ending}") for i in range(n)]
    for path, photo in zip(paths, make_photos(n, 256), strict=True):
        Image.fromarray(photo).save(path)
    return paths


def measure_paths(repeats: int) -> list[dict[str, Any]]:
    rows, n = [], 256
    with TemporaryDirectory() as folder:
        for ending in ("jpg", "png"):
            paths = write_files(Path(folder), n, ending)
            for size in (112, 224):
                contenders = {
                    name: partial(detector.fit(paths).score_samples, paths)
                    for name, detector in make_detectors(image_size=size).items()
                }
                what = f"paths, {ending} of 256 px, {size} px"
                rows += compare(what, repeats, (n, size, AUTO), contenders)
    return rows


def measure_fit(repeats: int) -> list[dict[str, Any]]:
    n, size = 2048, 112
    photos = make_photos(n, size)
    contenders = {
        name: partial(detector.fit, photos)
        for name, detector in make_detectors(image_size=size).items()
    }
    return compare(f"fit, {size} px", repeats, (n, size, AUTO), contenders)


def search(
    images: NDArray[np.uint8],
    y: NDArray[np.int_],
    size: int,
    features: Any,
    pipeline: Any,
) -> None:
    """Try all of the grid in two processes; say where features are kept."""
    steps = [
        ("features", CountedFeatures(image_size=size, device="cpu", memory=features)),
        ("knn", KNNScorer()),
    ]
    GridSearchCV(
        Pipeline(steps, memory=pipeline),
        GRID,
        cv=OneClassKFold(3),
        scoring="roc_auc",
        n_jobs=2,
    ).fit(images, y)


def start_workers(warm: bool, image: NDArray[np.uint8], size: int) -> None:
    """End worker processes; where asked to, start those whose start does not count."""
    get_reusable_executor().shutdown(wait=True)

    def ready() -> None:
        CountedFeatures(image_size=size, device="cpu").fit(image).transform(image)
        time.sleep(1)  # so that each worker gets one of the tasks

    if warm:
        Parallel(n_jobs=2)(delayed(ready)() for _ in range(2))


# what is kept -> warm workers, BackboneFeatures(memory=), Pipeline(memory=)
SHARED = {
    "BackboneFeatures(memory), workers not started": (False, True, False),
    "BackboneFeatures(memory)": (True, True, False),
    "BackboneFeatures(memory), Pipeline(memory)": (True, True, True),
}
UNSHARED = {
    "Pipeline(memory)": (True, False, True),
    "no memory": (True, False, False),
}


def measure_grid(
    repeats: int, cases: list[tuple[int, int, dict[str, tuple[bool, bool, bool]]]]
) -> list[dict[str, Any]]:
    data = load_fashion_mnist()
    normal, other = np.flatnonzero(data.target == 0), np.flatnonzero(data.target != 0)
    rows = []
    for n, size, variants in cases:
        index = np.r_[normal[: n - n // 6], other[: n // 6]]
        y = np.where(data.target[index] == 0, 1, -1)
        rows += measure_searches(data.images[index], y, size, variants, repeats)
    return rows


def measure_searches(
    images: NDArray[np.uint8],
    y: NDArray[np.int_],
    size: int,
    variants: dict[str, tuple[bool, bool, bool]],
    repeats: int,
) -> list[dict[str, Any]]:
    n = len(images)
    one_pass = BackboneFeatures(image_size=size, device="cpu").fit(images)
    passes: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    passed: dict[str, int] = {}
    for _ in range(repeats):
        start = time.perf_counter()
        one_pass.transform(images)
        passes.append(time.perf_counter() - start)
        for name, (warm, *keep) in variants.items():
            with TemporaryDirectory() as folder:
                count = Path(folder, "passed")
                os.environ[PASSED] = str(count)  # before the workers start
                start_workers(warm, images[:1], size)
                count.unlink(missing_ok=True)
                kept = [f"{folder}/{i}" if on else None for i, on in enumerate(keep)]
                start = time.perf_counter()
                search(images, y, size, *kept)
                seconds[name].append(time.perf_counter() - start)
                passed[name] = sum(map(int, count.read_text().split()))
    rows = []
    for name in variants:
        row = {
            "what": f"grid, {size} px, {name}",
            "n_images": n,
            "seconds": round(min(seconds[name]), 2),
            "pass_seconds": round(min(passes), 2),
            "passes": round(passed[name] / n, 3),
            **ratios(seconds[name], passes),
        }
        print_row(row, f"{row['passes']:.2f} passes")
        rows.append(row)
    return rows


def measure_panda(repeats: int) -> list[dict[str, Any]]:
    """Score by the unadapted network and by ten checkpoints, in turns."""
    n = 1000
    rows = []
    for size in (112, 224):
        photos, new = make_photos(500, size), make_photos(n, size, seed=1)
        none, ses = (
            PANDAEstimator(
                adaptation=adaptation,
                image_size=size,
                include_initial=False,
                n_checkpoints=10,
                max_steps=10,
                device="cpu",
                random_state=0,
            ).fit(photos)
            for adaptation in (None, "ses")
        )
        scorers = {"none": none, "ses": ses}
        seconds = take_turns(
            {name: partial(d.score_samples, new) for name, d in scorers.items()},
            repeats,
        )
        row = {
            "what": f"panda, {size} px, ten checkpoints over none",
            "n_images": n,
            "images_per_second": round(n / min(seconds["none"]), 1),
            **ratios(seconds["ses"], seconds["none"]),
        }
        print_row(row, f"{row['images_per_second']:.0f} images/s")
        rows.append(row)
    return rows


def measure_panda_fit(repeats: int) -> list[dict[str, Any]]:
    """Adapt by 30 steps, and by a loop that runs the whole network at each."""
    n, size, rows = 300, 112, []
    photos = make_photos(n, size)
    options = {"image_size": size, "device": "cpu", "random_state": 0}
    runs: dict[str, Callable[[], Any]] = {
        "contiguous": official_loop(photos, torch.contiguous_format),
        "channels last": official_loop(photos, torch.channels_last),
    }
    for adaptation in ("ewc", "early_stopping"):
        detector = PANDAEstimator(adaptation=adaptation, **options)
        runs[adaptation] = partial(detector.fit, photos)
    seconds = take_turns(runs, repeats)
    loops = list(runs)[:2]
    for name, loop in product(("ewc", "early_stopping"), loops):
        row = {
            "what": f"panda-fit, {size} px, official loop, {loop}, over {name}",
            "n_images": n,
            "seconds": round(min(seconds[name]), 2),
            "loop_seconds": round(min(seconds[loop]), 2),
            **ratios(seconds[loop], seconds[name]),
        }
        print_row(row, f"{row['seconds']:.1f} s")
        rows.append(row)
    return rows


def official_loop(
    photos: NDArray[np.uint8], memory_format: torch.memory_format
) -> Callable[[], None]:
    """Make a loop as in the official code: features, 30 steps of EWC, features again.

    Images lie ready, and the Fisher diagonal is given.
    """
    images = torch.from_numpy(photos).permute(0, 3, 1, 2) / 255

    def loop() -> None:
        net = load_backbone("efficientnet_lite0").clone()
        ready = net.normalize(images).contiguous(memory_format=memory_format)
        net = net.to(memory_format=memory_format)
        stages = nn.Sequential(*net.stages.values())
        weights = list(stages[6:].requires_grad_(True).parameters())
        initial = [weight.detach().clone() for weight in weights]
        fisher = [torch.ones_like(weight) for weight in weights]

        def features() -> torch.Tensor:
            with torch.inference_mode():
                return torch.cat([stages(batch) for batch in ready.split(BATCH)])

        center = features().mean(dim=0)
        optimizer = torch.optim.SGD(weights, 0.01, momentum=0.9)
        for _ in range(30):
            drawn = torch.randperm(len(ready))[:BATCH]
            batch = ready[drawn].contiguous(memory_format=memory_format)
            loss = (stages(batch) - center.clone()).square().sum(dim=1).mean()
            for f, now, before in zip(fisher, weights, initial, strict=True):
                loss = loss + (f * (now - before).square()).sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1e-3)
            optimizer.step()
        features()

    return loop


def measure_kd_cloner(repeats: int) -> list[dict[str, Any]]:
    """Score and map by knowledge distillation, over both networks' bare passes."""
    n, rows = 300, []
    for size, precision in product((112, 224), ("auto", "float32")):
        photos, new = make_photos(64, size), make_photos(n, size, seed=1)
        detector = KDClonerEstimator(
            image_size=size,
            max_steps=2,
            batch_size=BATCH,
            precision=precision,
            device="cpu",
            random_state=0,
        ).fit(photos)
        gradient = pickle.loads(pickle.dumps(detector))
        gradient.set_params(localization="gradient")
        dtype = resolve_precision(precision, torch.device("cpu"), False)
        seconds = take_turns(
            {
                "floor": both_forwards(detector, n, size, dtype),
                "score_samples": partial(detector.score_samples, new),
                "discrepancy map": partial(detector.anomaly_map, new),
                "gradient map": partial(gradient.anomaly_map, new),
            },
            repeats,
        )
        name = str(dtype).removeprefix("torch.")
        for what, taken in list(seconds.items())[1:]:
            row = {
                "what": f"kd_cloner, {size} px, {name}, {what} over two bare passes",
                "n_images": n,
                "images_per_second": round(n / min(taken), 1),
                **ratios(taken, seconds["floor"]),
            }
            print_row(row, f"{row['images_per_second']:.0f} images/s")
            rows.append(row)
    return rows


def both_forwards(
    detector: KDClonerEstimator, n: int, size: int, dtype: torch.dtype
) -> Callable[[], None]:
    """Make the floor: the source as timm makes it, and the cloner as it is trained."""
    source = bare_forward(n, size, dtype)
    cloner = pickle.loads(pickle.dumps(detector.cloner_))
    cloner = cloner.to(memory_format=torch.channels_last)
    images = torch.from_numpy(make_photos(n, size)).permute(0, 3, 1, 2) / 255
    ready = images.contiguous(memory_format=torch.channels_last)

    def forward() -> None:
        source()
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            for batch in ready.split(BATCH):
                cloner(batch)

    return forward


def measure_knn(repeats: int) -> list[dict[str, Any]]:
    """Search 20,000 rows of 1,280 numbers for each other and for 2,000 new ones."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    rng, rows = np.random.default_rng(0), []
    mixing = rng.normal(size=(200, 1280))  # features are of fewer dimensions
    X, new = (
        (rng.normal(size=(n, 200)) @ mixing).astype(np.float32) for n in (20_000, 2_000)
    )

    def flat_index(queries: NDArray[np.float32], k: int) -> None:
        index = faiss.IndexFlatL2(X.shape[1])
        index.add(X)
        index.search(queries, k)

    for scorer in (KNNScorer(), KNNScorer(metric="mahalanobis")):
        fitted = scorer.fit(X)
        for what, ours, k, queries in (
            ("fit", partial(scorer.fit, X), 3, X),  # the row itself, and two others
            ("score_samples", partial(fitted.score_samples, new), 2, new),
        ):
            runs = {"faiss": partial(flat_index, queries, k), "ours": ours}
            seconds = take_turns(runs, repeats)
            rows.append(
                {
                    "what": f"{scorer}, {what}, over faiss's flat index",
                    "seconds": round(min(seconds["ours"]), 2),
                    "faiss_seconds": round(min(seconds["faiss"]), 2),
                    **ratios(seconds["ours"], seconds["faiss"]),
                }
            )
            print_row(rows[-1], f"{rows[-1]['seconds']:.2f} s")
    return rows


def measure_memory(repeats: int) -> list[dict[str, Any]]:
    rows = []
    with TemporaryDirectory() as folder:
        write_files(Path(folder), 500, "jpg")
        for n in (500, 4000):
            command = [sys.executable, __file__, "--peak-memory", str(n), folder]
            told = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"what": f"memory, {n} files", "peak_mib": int(told.stdout)})
            print_row(rows[-1], f"{rows[-1]['peak_mib']} MiB")
    return rows


def measure_hsc(repeats: int) -> list[dict[str, Any]]:
    """Train HSC's LeNet, over a loop written by hand: network, loss, Adam."""
    data = load_fashion_mnist()
    normal = data.images[data.target == 0]
    outliers = data.images[data.target != 0][:512]
    half, rows = 128, []
    epochs = {"one epoch": 1, "four epochs": 4}
    X, y = np.concatenate([normal, outliers]), np.repeat([1, -1], [6000, 512])
    ready = [torch.from_numpy(x).float().div(255)[:, None] for x in (normal, outliers)]
    for what, n_epochs in epochs.items():
        n_steps = n_epochs * len(normal) // half
        estimator = HSCClassifier(
            "mnist_lenet",
            max_steps=n_steps,
            contamination=None,
            device="cpu",
            random_state=0,
        )

        def bare(n_steps: int = n_steps) -> None:
            net = load_backbone("mnist_lenet", in_channels=1).requires_grad_(True)
            net.train()
            optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
            for _ in range(n_steps):
                drawn = [x[torch.randint(len(x), (half,))] for x in ready]
                z = net(torch.cat(drawn))
                d = torch.sqrt(z.square().sum(dim=1) + 1) - 1
                away = torch.log(1 - torch.exp(-d[half:]) + 1e-9)
                loss = torch.cat([d[:half], -away]).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        runs = {"bare": bare, "fit": partial(estimator.fit, X, y)}
        seconds = take_turns(runs, repeats)
        rows.append(
            {
                "what": f"hsc, mnist_lenet, {what}, over a bare loop",
                "n_steps": n_steps,
                "seconds": round(min(seconds["fit"]), 2),
                "bare_seconds": round(min(seconds["bare"]), 2),
                **ratios(seconds["fit"], seconds["bare"]),
            }
        )
        print_row(rows[-1], f"{rows[-1]['seconds']:.2f} s")
    return rows


def measure_representation(repeats: int) -> list[dict[str, Any]]:
    """Compare three backbones, over what that needs of passes."""
    backbones = [f"efficientnet_lite{k}" for k in range(3)]
    X, X_anomalous = make_photos(1000, 64), make_photos(200, 64, seed=1)
    options = {"image_size": 64, "device": "cpu", "random_state": 0}

    def needed() -> None:
        for name in backbones:
            found = brittleness(X[:700], name, max_steps=50, **options)
            features = BackboneFeatures(name, stages=tuple(found), **options)
            tested = np.concatenate([X[700:], X_anomalous])
            features.fit(X).transform(tested)
            features.transform(tested)  # the student is scored against its teacher

    def compared() -> None:
        compare_representations(backbones, X, X_anomalous, max_steps=50, **options)

    seconds = take_turns({"needed": needed, "compared": compared}, repeats)
    row = {
        "what": "representation, three backbones, 64 px, over what it needs",
        "seconds": round(min(seconds["compared"]), 1),
        **ratios(seconds["compared"], seconds["needed"]),
    }
    print_row(row, f"{row['seconds']:.0f} s")
    return [row]


def print_peak_memory(n: int, folder: str) -> None:
    """Score files, as many as asked for by naming them again and again."""
    paths = sorted(Path(folder).iterdir())
    detector = MahalanobisFeatureScorer(image_size=112, device="cpu").fit(paths[:64])
    detector.score_samples((paths * (n // len(paths) + 1))[:n])
    # not getrusage: a process starts with its parent's peak there
    status = Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) // 1024)


PARTS = {
    "arrays": measure_arrays,
    "paths": measure_paths,
    "fit": measure_fit,
    "grid": partial(measure_grid, cases=[(2000, 224, SHARED), (300, 224, UNSHARED)]),
    "grid-112": partial(
        measure_grid, cases=[(6000, 112, SHARED), (600, 112, UNSHARED)]
    ),
    "panda": measure_panda,
    "panda-fit": measure_panda_fit,
    "kd_cloner": measure_kd_cloner,
    "hsc": measure_hsc,
    "representation": measure_representation,
    "knn": measure_knn,
    "memory": measure_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-memory", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_memory:
        print_peak_memory(int(args.peak_memory[0]), args.peak_memory[1])
        return
    told = environment()
    print(f"{'':72}   ratio  median")
    for part in args.parts:
        rows = PARTS[part](args.repeats)
        content = {"repeats": args.repeats, part: rows, "environment": told}
        write_json(f"speed-{part}", content)


if __name__ == "__main__":
    main()
