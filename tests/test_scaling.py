"""The recipes of docs/scaling.md, as they stand there, on a cluster on loopback."""

from __future__ import annotations

import os
import pickle
import re
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import dask
import dask.array as da
import numpy as np
import psutil
import pytest
import skimage.data
from distributed import Client, LocalCluster
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits

from skdeepad import (
    BackboneFeatures,
    KNNScorer,
    MahalanobisFeatureScorer,
    OneClassKFold,
)

pytestmark = pytest.mark.xdist_group("cluster")  # one for all tests

DOCS = Path(__file__).parents[1] / "docs" / "scaling.md"
TRIM = "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_"  # see the docs
DETECTOR = MahalanobisFeatureScorer(image_size=32, device="cpu")


def recipe(heading, **names):
    """Run the code under a heading of the documentation; return its names."""
    section = DOCS.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1]
    code = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    names["__name__"] = "__main__"  # as in a script: functions travel by value
    exec("\n".join(code), names)
    return names


@pytest.fixture(scope="module")
def client():
    # dask changes this process's environment before it starts a worker
    with mock.patch.dict(os.environ), dask.config.set({TRIM: None}):
        cluster = LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        )
        with cluster, Client(cluster) as client:
            yield client


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Compute here as workers do: BLAS rounds by its number of threads."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def tiles():
    """5,000 pieces of a photograph, uint8 of shape (16, 16, 3), all different."""
    photo = skimage.data.coffee()
    corners = np.random.default_rng(0).choice(384 * 512, 5000, replace=False)
    corners = zip(*np.divmod(corners, 512), strict=True)
    tiles = np.stack([photo[i : i + 16, j : j + 16] for i, j in corners])
    assert len(np.unique(tiles, axis=0)) == 5000
    return tiles


@pytest.fixture(scope="module")
def detector(tiles):
    return clone(DETECTOR).fit(tiles[:200])


@pytest.fixture(scope="module")
def expected(detector, tiles):
    return detector.score_samples(tiles)


def watched(detector, folder, *, held):
    """Make a detector that notes, in a folder, the processes it is unpickled in.

    Held, it stops in the third part that a process scores, and says so, until that
    process is killed; only the first process to come so far stops.
    """

    class Watched:  # local, so that it travels by value: workers have no tests
        def __init__(self):
            self.detector = detector
            self.n_parts = 0

        def __setstate__(self, state):
            self.__dict__ = state
            with open(folder / "unpickled", "a") as file:
                file.write(f"{os.getpid()}\n")

        def score_samples(self, X):
            self.n_parts += 1
            if held and self.n_parts == 3:
                try:
                    with open(folder / "held", "x") as file:
                        file.write(str(os.getpid()))
                except FileExistsError:
                    pass
                else:
                    threading.Event().wait()
            return self.detector.score_samples(X)

    return Watched()


def score_and_kill(folder, *args, **names):
    """Run a recipe, kill the process that stops in it; return scores and process."""
    held = folder / "held"
    with ThreadPoolExecutor() as pool:
        scoring = pool.submit(recipe, *args, **names)
        while not (held.exists() and held.read_text()):
            assert not scoring.done(), scoring.result()
            time.sleep(0.05)
        killed = int(held.read_text())
        os.kill(killed, signal.SIGKILL)
        return scoring.result()["scores"], killed


def unpickled(folder):
    """Count how often each process but this one unpickled the detector."""
    counts = Counter(map(int, (folder / "unpickled").read_text().split()))
    counts.pop(os.getpid(), None)  # the scheduler lives here
    return counts


def test_pickled_detector_holds_no_network(detector):
    # three d x d matrices of float64 at most, and 1,024 rows of float32
    d = sum(p.numel() for p in detector.backbone_.parameters())
    width = detector.transform(np.zeros((1, 16, 16, 3), dtype=np.uint8)).shape[1]
    size = len(pickle.dumps(detector))
    assert size < 3 * 8 * width**2 + 4 * 1024 * width
    assert size < 4 * d


def test_arrays_when_a_worker_is_killed(client, detector, tiles, expected, tmp_path):
    images = da.from_array(tiles, chunks=(250, -1, -1, -1))
    model = watched(detector, tmp_path, held=True)
    before = set(client.run(os.getpid).values())
    scores, killed = score_and_kill(
        tmp_path, "Scoring arrays on dask", images=images, detector=model
    )
    # The killed worker had scored two parts, which were lost with it, and was at its
    # third, which it would never have ended.
    assert killed in before
    assert not psutil.pid_exists(killed)
    np.testing.assert_array_equal(scores, expected, strict=True)
    client.wait_for_workers(2)
    after = set(client.run(os.getpid).values())
    assert len(after) == 2 and killed not in after


def test_lists_of_files(client, detector, image_files, tmp_path):
    names = [str(path) for path in image_files.photos]
    lists = [str(tmp_path / f"{i}.txt") for i in range(8)]
    for i, name in enumerate(lists):
        Path(name).write_text("\n".join(names[5 * i : 5 * i + 5]))
    model = watched(detector, tmp_path, held=False)
    ran = recipe("Scoring millions of files on dask", lists=lists, detector=model)
    assert ran["n_scored"] == 40
    scores = [np.load(tmp_path / f"{i}.npy") for i in range(8)]
    expected = [detector.score_samples(names[5 * i : 5 * i + 5]) for i in range(8)]
    np.testing.assert_array_equal(scores, expected)
    # eight parts, but hardly more than one model for each worker
    workers = set(client.run(os.getpid).values())
    assert set(unpickled(tmp_path)) <= workers
    assert sum(unpickled(tmp_path).values()) <= 4


@pytest.mark.parametrize("joint", [True, False])
def test_gaussian_fitted_on_parts(client, tiles, joint):
    X = tiles[:1500]
    detector = clone(DETECTOR).set_params(joint=joint)
    images = da.from_array(X, chunks=(400, -1, -1, -1))  # the last part is smaller
    merged = recipe("Fitting on dask", images=images, detector=detector)["merged"]
    whole = clone(detector).partial_fit(X)
    assert merged.n_samples_seen_ == 1500
    assert merged.offset_ == pytest.approx(whole.offset_, rel=1e-9)
    for new in (X[:100], tiles[-100:]):
        np.testing.assert_allclose(
            merged.score_samples(new), whole.score_samples(new), rtol=1e-9
        )


def grid_search(images, memory):
    """Make a search that also notes in which process it scored, and its data."""
    y = np.repeat([1, -1], [24, 16])
    X = np.where(y[:, None, None, None] == 1, images[:40], 255 - images[:40])
    features = BackboneFeatures(image_size=32, device="cpu", memory=memory)
    search = GridSearchCV(
        Pipeline([("features", features), ("scorer", KNNScorer())]),
        {"scorer__n_neighbors": [1, 3], "scorer__metric": ["sqeuclidean", "cosine"]},
        scoring={"auc": "roc_auc", "process": lambda model, X, y: os.getpid()},
        cv=OneClassKFold(3),
        refit="auc",
        error_score="raise",
    )
    return {"search": search, "X": X, "y": y}


def assert_same_search(search, expected, here):
    names = [f"split{i}_test_auc" for i in range(3)] + ["mean_test_auc"]
    for name in names:
        np.testing.assert_array_equal(
            search.cv_results_[name], expected.cv_results_[name]
        )
    assert search.best_params_ == expected.best_params_
    processes = [search.cv_results_[f"split{i}_test_process"] for i in range(3)]
    assert (os.getpid() in np.concatenate(processes)) == here


@pytest.fixture(scope="module")
def searched(tiles):
    data = grid_search(tiles, None)
    search = data["search"].fit(data["X"], data["y"])
    assert_same_search(search, search, here=True)
    return search


def test_grid_search_on_dask(client, tiles, searched, tmp_path):
    ran = recipe("A grid search on dask", **grid_search(tiles, str(tmp_path)))
    assert_same_search(ran["search"], searched, here=False)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            object_store_memory=10**8,
        )
        yield ray
        ray.shutdown()


def test_grid_search_on_ray(ray, tiles, searched, tmp_path):
    ran = recipe("A grid search on ray", **grid_search(tiles, str(tmp_path)))
    assert_same_search(ran["search"], searched, here=False)


def test_ray_when_a_worker_is_killed(ray, detector, tiles, expected, tmp_path):
    model = watched(detector, tmp_path, held=True)
    parts = np.split(tiles, 20)
    scores, killed = score_and_kill(
        tmp_path, "Scoring on ray", parts=parts, detector=model
    )
    assert not psutil.pid_exists(killed)
    np.testing.assert_array_equal(scores, expected, strict=True)
