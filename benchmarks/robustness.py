"""What estimators do with odd arrays, odd image files, damaged caches and threads.

    python benchmarks/robustness.py --arrays 10000 --files 200 --caches 50 --threads 24

Each case is made of its number. It is fitted or scored, and ends in finite scores, in a
documented error (ValueError, TypeError or FileNotFoundError, of fewer than 500
characters, which names X or the file), or in one of what is counted here: undocumented
errors, scores that are not finite, hangs, crashed processes, and files whose scores are
not those of the same image as an array. A damaged cache has to give the same features
with at most one warning, or an error that names its folder. A call made in eight
threads at once has to give the numbers of the same call alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from _common import environment, write_json
from PIL import Image

from skdeepad import (
    BackboneFeatures,
    GaussianScorer,
    HSCClassifier,
    KNNScorer,
    MahalanobisFeatureScorer,
)
from skdeepad.backbones import load_backbone

CHUNK = 500  # cases that a process tries
SECONDS = 20  # after which a case hangs
TOLERANCE = 1e-4  # relative, of scores of a file and of an array

# fit for any X: a detector of 28 pixels by random LeNet features
DETECTORS: dict[str, Callable[[], Any]] = {
    "KNNScorer": KNNScorer,
    "GaussianScorer": GaussianScorer,
    "MahalanobisFeatureScorer": lambda: MahalanobisFeatureScorer(
        backbone="mnist_lenet", weights=None, image_size=(28, 28), random_state=0
    ),
}


class Hang(BaseException):
    """A case has taken too long."""


def _hang(*_: Any) -> None:
    raise Hang


def outcome(call: Callable[[], Any], names: list[str]) -> tuple[str, Any]:
    """Run a case; tell how it ended, and its scores if there are any."""
    signal.alarm(SECONDS)
    try:
        scores = call()
    except Hang:
        return "hang", None
    except (ValueError, TypeError, FileNotFoundError) as error:
        message = str(error)
        named = re.search(r"\bX\b", message) or any(name in message for name in names)
        if len(message) < 500 and named:
            return f"refused: {type(error).__name__}", None
        return f"undocumented: {type(error).__name__}: {message[:100]}", None
    except Exception as error:
        return f"undocumented: {type(error).__name__}: {str(error)[:100]}", None
    finally:
        signal.alarm(0)
    finite = np.isfinite(scores).all()
    return "scores" if finite else "scores that are not finite", scores


# ------------------------------------------------------------------- arrays

DTYPES = [
    "u1",
    "i1",
    "u2",
    "i2",
    "u4",
    "i4",
    "i8",
    "f2",
    "f4",
    "f8",
    "g",
    "?",
    "c8",
    "O",
    "S3",
    "U3",
    "M8[D]",
    "m8[s]",
    ">f4",
    ">u2",
]
SPECIAL = [np.nan, np.inf, -np.inf, 1e155, -1e300, 5e-324, 1e39, -1, 256, 65536, 0]


def odd_array(rng: np.random.Generator, vectors: bool) -> Any:
    """Make an array, or something like it, that may be odd in many ways."""
    n = int(rng.choice([0, 1, 2, 3, 12, 30], p=[0.02, 0.02, 0.02, 0.02, 0.46, 0.46]))
    shapes = [(n, 5), (n, 28, 28), (n, 8, 6, 3), (n, 1, 9, 9), (n, 4, 7, 5)]
    odd = [
        (n, 5),
        (n, 28, 28),
        (n,),
        (),
        (n, 0),
        (n, 2, 2, 2, 2),
        (n, 1, 1),
        (n, 5, 5, 7),
        (n, 3, 3, 3),
    ]
    at = 0 if vectors else int(rng.integers(1, 5))
    shape = shapes[at] if rng.random() < 0.85 else odd[int(rng.integers(len(odd)))]
    X: Any = rng.random(shape)
    if rng.random() < 0.2:
        X = X * 10.0 ** rng.integers(-300, 300)
    if rng.random() < 0.2 and X.size:
        X = np.array(X)
        X.flat[int(rng.integers(X.size))] = rng.choice(SPECIAL)
    dtype = str(rng.choice(DTYPES)) if rng.random() < 0.5 else "f8"
    if dtype[0] in "ui" or dtype == ">u2":
        X = X * 255
    if dtype[0] in "Mm":
        X = (X * 1000).astype("i8")
    X = np.asarray(X).astype(dtype)
    return contain(X, rng)


def contain(X: Any, rng: np.random.Generator) -> Any:
    """Give an array as something else that may be passed as X."""
    makers: list[Callable[[], Any]] = [
        lambda: X.tolist(),
        lambda: list(X),
        lambda: np.ma.masked_array(X, mask=rng.random(X.shape) < 0.1),
        lambda: torch.from_numpy(X),
        lambda: torch.from_numpy(X).bfloat16(),
        lambda: torch.from_numpy(X).requires_grad_(),
        lambda: pd.DataFrame(X),
        lambda: pd.Series(list(X)),
        lambda: np.asfortranarray(X)[::-1],
        lambda: [x.tobytes() for x in X],
        lambda: [*X, None],
        lambda: [*X, "text" * 500],
        lambda: [*X, datetime.datetime(2020, 1, 1)],
        lambda: [[datetime.timedelta(1)] * 5] * len(X),
        lambda: iter(X),
        lambda: [*X, X],
        lambda: None,
        lambda: "text" * 500,
        lambda: {"a": X},
    ]
    if rng.random() < 0.6:
        return X
    try:
        return makers[int(rng.integers(len(makers)))]()
    except Exception:  # the container cannot hold this array
        return X


def try_arrays(first: int, n: int) -> Counter[str]:
    """Fit to odd arrays, and score them by what was fitted to even ones."""
    rng = np.random.default_rng(0)
    fitted = {
        name: make().fit(rng.random((30, 28, 28) if "Feature" in name else (30, 5)))
        for name, make in DETECTORS.items()
    }
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + n):
        rng = np.random.default_rng(seed)
        name = str(rng.choice(list(DETECTORS)))
        X = odd_array(rng, vectors="Feature" not in name)
        if rng.random() < 0.5:
            call = fitted[name].score_samples
        else:
            call = lambda X, name=name: DETECTORS[name]().fit(X).offset_  # noqa: E731
        told, _ = outcome(lambda call=call, X=X: call(X), [])
        outcomes[told] += 1
        if not told.startswith(("scores", "refused")) or "not finite" in told:
            print(f"array {seed}, {name}: {told}", file=sys.stderr)
    return outcomes


# ------------------------------------------------------------------- files

EVEN = [
    "L",
    "RGB",
    "RGBA",
    "L.tif",
    "RGB.tif",
    "RGB.bmp",
    "I;16",
    "I;16.tif",
    "I.tif",
    "F.tif",
    "pgm",
    "bool",
]
ODD = [
    "truncated",
    "flipped",
    "empty",
    "text",
    "folder",
    "missing",
    "nan",
    "inf",
    "beyond",
    "big-integers",
    "long-name",
    "odd-name",
    "wrong-suffix",
    "lying-size",
]


def odd_pixels(kind: str, rng: np.random.Generator) -> Any:
    """Make the pixels of one image, as an array."""
    sides = [1, 2, 5, 28, 60, 300, 1200]
    height, width = (int(side) for side in rng.choice(sides, size=2))
    channels = {"RGB": (3,), "RGBA": (4,)}.get(kind.split(".")[0], ())
    values = rng.random((height, width, *channels))
    if kind.startswith("F"):
        return values.astype(np.float32)
    if kind.startswith("I;16") or kind == "pgm":
        return (values * 65535).astype(np.uint16)
    if kind == "bool":
        return values > 0.5
    return (values * 255).astype(np.int32 if kind == "I.tif" else np.uint8)


def write_file(kind: str, pixels: Any, folder: Path) -> Path:
    """Write pixels as an undamaged file."""
    path = folder / f"image.{kind.split('.')[1] if '.' in kind else 'png'}"
    if kind == "pgm":
        head = f"P5 {pixels.shape[1]} {pixels.shape[0]} 65535\n".encode()
        path = path.with_suffix(".pgm")
        path.write_bytes(head + pixels.astype(">u2").tobytes())
    else:
        Image.fromarray(pixels).save(path)
    return path


def odd_file(kind: str, rng: np.random.Generator, folder: Path) -> Path:
    """Write a file that is odd or damaged."""
    floats = kind in ("nan", "inf", "beyond")
    form = "F.tif" if floats else "I.tif" if kind == "big-integers" else "RGB"
    pixels = odd_pixels(form, rng)
    if floats:
        value = {"nan": np.nan, "inf": -np.inf, "beyond": 7.0}[kind]
        pixels.flat[int(rng.integers(pixels.size))] = value
    if kind == "big-integers":
        pixels = pixels * 300
        pixels.flat[0] = 65535
    path = write_file(form, pixels, folder)
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        data = data[: int(rng.integers(len(data)))]
    elif kind == "flipped":
        for at in rng.integers(len(data), size=5):
            data[at] ^= 1 << int(rng.integers(8))
    elif kind == "lying-size":
        data[16:24] = rng.bytes(8)
    elif kind in ("empty", "text"):
        data = bytearray(b"" if kind == "empty" else b"no image")
    path.write_bytes(data)
    new = {
        "long-name": "a" * int(rng.choice([250, 251, 300, 5000])) + ".png",
        "odd-name": str(rng.choice(["a\nb.png", "ü é 雪.png", "%s{0}.png", " .png"])),
        "wrong-suffix": "image.jpg",
        "missing": "none.png",
    }.get(kind)
    if kind == "folder":
        return folder
    if new is None:
        return path
    if kind != "missing" and len(new) <= 255:
        path.rename(folder / new)
    return folder / new


def try_files(first: int, n: int) -> Counter[str]:
    """Score odd files among even ones, and even ones as arrays, too."""
    rng = np.random.default_rng(0)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        even = (rng.random((30, 28, 28, 3)) * 255).astype(np.uint8)
        paths = [folder / f"even{i}.png" for i in range(30)]
        for path, pixels in zip(paths, even, strict=True):
            Image.fromarray(pixels).save(path)
        detector = DETECTORS["MahalanobisFeatureScorer"]().fit(paths)
        paths = paths[:3]
        expected = detector.score_samples(paths)
        for seed in range(first, first + n):
            rng = np.random.default_rng(seed)
            place = Path(tempfile.mkdtemp(dir=folder))
            if rng.random() < 0.4:
                told = even_case(detector, str(rng.choice(EVEN)), rng, place)
            else:
                kind = str(rng.choice(ODD))
                path = odd_file(kind, rng, place)
                told = odd_case(detector, [*paths, path], expected)
            outcomes[told] += 1
            if not told.startswith(("same", "scores", "refused", "skipped")):
                print(f"file {seed}: {told}", file=sys.stderr)
    return outcomes


def even_case(detector: Any, kind: str, rng: np.random.Generator, folder: Path) -> str:
    """Score an undamaged file as a file and as an array."""
    pixels = odd_pixels(kind, rng)
    path = write_file(kind, pixels, folder)
    told, by_file = outcome(lambda: detector.score_samples([path]), ["image"])
    if not told.startswith("scores"):
        return f"even file, {kind}: {told}"
    if pixels.ndim == 3:  # small images leave open which axis the channels are
        detector.set_params(image_shape=(pixels.shape[2], *pixels.shape[:2]))
    told, by_array = outcome(lambda: detector.score_samples(pixels[None]), [])
    detector.set_params(image_shape=None)
    if not told.startswith("scores"):
        return f"even array, {kind}: {told}"
    if np.allclose(by_file, by_array, rtol=TOLERANCE, atol=0):
        return "same scores as an array and as a file"
    return f"silent change, {kind}: {by_file[0]:g}, as an array {by_array[0]:g}"


def odd_case(detector: Any, paths: list[Path], expected: Any) -> str:
    """Score an odd file among others; then again, skipping it if it is refused."""
    names = [paths[-1].name[:40]]
    told, scores = outcome(lambda: detector.score_samples(paths), names)
    if scores is not None:
        same = np.allclose(scores[:-1], expected, rtol=TOLERANCE, atol=0)
        return told if same else "silent change of the other files"
    if told != "refused: ValueError":
        return told
    detector.set_params(on_error="skip")
    _, scores = outcome(lambda: detector.score_samples(paths), names)
    detector.set_params(on_error="raise")
    if scores is None or not np.isnan(scores[-1]):
        return "undocumented: refused, but not skipped"
    same = np.allclose(scores[:-1], expected, rtol=TOLERANCE, atol=0)
    return f"{told}, and skipped" if same else "silent change of the other files"


# ---------------------------------------------------------- caches and threads


def try_caches(first: int, n: int) -> Counter[str]:
    """Damage the file of a cache, and compute features with it."""
    X = np.random.default_rng(0).normal(size=(40, 6))
    outcomes: Counter[str] = Counter()

    def transform(folder: Path | None, X: Any = X) -> Any:
        features = BackboneFeatures("mlp", batch_size=8, memory=folder, random_state=0)
        return features.fit(X).transform(X)

    expected = transform(None)
    with tempfile.TemporaryDirectory() as name:
        transform(Path(name), X[:30])
        (whole,) = Path(name).iterdir()
        for seed in range(first, first + n):
            rng = np.random.default_rng(seed)
            folder = Path(tempfile.mkdtemp(dir=name))
            data = bytearray(whole.read_bytes())
            start = int(rng.integers(len(data)))
            end = min(start + int(rng.choice([3, 100, 4096, len(data)])), len(data))
            data[start:end] = rng.bytes(end - start) if rng.random() < 0.8 else b""
            (folder / whole.name).write_bytes(data)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                told, found = outcome(lambda at=folder: transform(at), [str(folder)])
            if found is not None:
                same = np.array_equal(found, expected) and len(caught) <= 1
                told = f"same features, {len(caught)} warnings"
                told = told if same else "silent change"
            outcomes[told] += 1
    return outcomes


def try_threads(first: int, n: int) -> Counter[str]:
    """Do the same in eight threads at once, and compare with doing it alone."""
    X = np.random.default_rng(0).random((48, 28, 28), dtype=np.float32)
    detector = DETECTORS["MahalanobisFeatureScorer"]().fit(X)
    y = np.where(np.arange(48) < 36, 1, -1)
    works: list[Callable[[int], Any]] = [
        lambda seed: detector.score_samples(X[seed % 40 :]),
        lambda seed: (
            HSCClassifier("mnist_lenet", max_steps=3, random_state=seed)
            .fit(X, y)
            .score_samples(X)
        ),
        lambda seed: [
            p.numpy()
            for p in load_backbone("cifar10_lenet", seed=seed).state_dict().values()
        ],
    ]
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + n):
        work, before = works[seed % len(works)], torch.get_rng_state()

        def alone(_: Any, work: Any = work, seed: int = seed) -> Any:
            torch.set_num_threads(1)  # a new thread starts with torch's default
            return np.concatenate([np.ravel(part) for part in work(seed)])

        expected = alone(0)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(alone, range(8)))
        same = all(np.array_equal(numbers, expected) for numbers in found)
        same = same and torch.equal(torch.get_rng_state(), before)
        outcomes["same numbers in 8 threads" if same else "silent change"] += 1
    return outcomes


TRY = {
    "arrays": try_arrays,
    "files": try_files,
    "caches": try_caches,
    "threads": try_threads,
}


def in_processes(kind: str, n: int) -> dict[str, Any]:
    """Try cases in processes of their own, and add up what they tell."""
    outcomes: Counter[str] = Counter()
    crashed = []
    for first in range(0, n, CHUNK):
        count = min(CHUNK, n - first)
        command = [sys.executable, __file__, "--try", kind, str(first), str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            crashed.append(first)
        else:
            outcomes.update(json.loads(done.stdout.splitlines()[-1]))

    def count_of(*words: str) -> int:
        return sum(c for told, c in outcomes.items() if any(w in told for w in words))

    return {
        "tried": sum(outcomes.values()),
        "crashed processes, by their first case": crashed,
        "hangs": count_of("hang"),
        "undocumented errors": count_of("undocumented"),
        "scores that are not finite": count_of("not finite"),
        "even images that were refused": count_of("even file", "even array"),
        "silent changes": count_of("silent change"),
        "outcomes": dict(outcomes.most_common()),
    }


def main() -> None:
    """Try many arrays and files in processes, and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arrays", type=int, default=10_000)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--caches", type=int, default=50)
    parser.add_argument("--threads", type=int, default=24)
    parser.add_argument("--try", dest="part", nargs=3, help="of a process's own cases")
    given = parser.parse_args()
    if given.part:
        warnings.simplefilter("ignore")
        np.seterr(all="ignore")
        torch.set_num_threads(1)
        signal.signal(signal.SIGALRM, _hang)
        kind, first, n = given.part
        print(json.dumps(TRY[kind](int(first), int(n))))
        return
    about = environment()
    start = time.perf_counter()
    result: dict[str, Any] = {
        kind: in_processes(kind, getattr(given, kind)) for kind in TRY
    }
    result["seconds"] = round(time.perf_counter() - start)
    print(json.dumps(result, indent=1, ensure_ascii=False))
    write_json("robustness", {"environment": about, **result})


if __name__ == "__main__":
    main()
