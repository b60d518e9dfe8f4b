"""Pseudo-anomalies, and the choice of hyper-parameters by them."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy.stats import mannwhitneyu
from sklearn import config_context
from sklearn.base import BaseEstimator
from sklearn.ensemble import IsolationForest
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    RandomizedSearchCV,
    cross_validate,
)
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import OneClassSVM

from skdeepad import (
    BackboneFeatures,
    GaussianScorer,
    KNNScorer,
    OneClassKFold,
    PseudoAnomalyScorer,
)
from skdeepad.datasets import make_pseudo_anomalies
from skdeepad.inference import FeaturePass

KINDS = ["cut_paste", "patch_shuffle", "blur", "noise", "rotation"]


@pytest.fixture(scope="module")
def made(textures):
    return make_pseudo_anomalies(textures.X_train)


# what each kind does


def test_all_kinds_of_images_by_default(textures, made):
    assert list(made) == KINDS
    for spoilt in made.values():
        assert spoilt.shape == textures.X_train.shape
        assert spoilt.dtype == np.uint8
        # what has no contrast may stay
        assert (spoilt != textures.X_train).any(axis=(1, 2)).mean() > 0.9


def test_cut_paste_changes_a_rectangle_into_a_piece_of_the_image(photos):
    for image, spoilt in zip(
        photos, make_pseudo_anomalies(photos)["cut_paste"], strict=True
    ):
        y, x = np.nonzero((image != spoilt).any(axis=-1))
        box = spoilt[y.min() : y.max() + 1, x.min() : x.max() + 1]
        assert box.shape[0] * box.shape[1] <= 0.17 * 32 * 32  # sides are rounded
        windows = np.lib.stride_tricks.sliding_window_view(image, box.shape)
        assert (windows == box).all(axis=(-3, -2, -1)).any()


def test_patch_shuffle_moves_four_cells(textures, made):
    def cells(images):
        return images.reshape(-1, 4, 8, 4, 8).swapaxes(2, 3).reshape(-1, 16, 64)

    normal, spoilt = cells(textures.X_train), cells(made["patch_shuffle"])
    for before, after in zip(normal, spoilt, strict=True):
        assert sorted(map(bytes, before)) == sorted(map(bytes, after))
        assert (before != after).any(axis=1).sum() == 4


def test_blur_spreads_a_point_over_a_share_of_the_sides(textures, made):
    X = np.zeros((30, 100, 200))
    X[:, 50, 100] = np.linspace(0.5, 1, 30)
    blurred = make_pseudo_anomalies(X, ["blur"])["blur"]
    np.testing.assert_allclose(blurred.sum(axis=(1, 2)), X.sum(axis=(1, 2)), rtol=1e-3)
    weights = blurred / X.sum(axis=(1, 2), keepdims=True)
    height = np.sqrt(weights.sum(axis=2) @ (np.arange(100) - 50) ** 2)
    width = np.sqrt(weights.sum(axis=1) @ (np.arange(200) - 100) ** 2)
    np.testing.assert_allclose(width, 2 * height, rtol=0.02)
    assert 0.95 < height.min() < 1.2 < 2.8 < height.max() < 3.05

    def gradient_energy(images):
        return (np.diff(images.astype(float)) ** 2).sum(axis=(1, 2))

    assert (gradient_energy(made["blur"]) <= gradient_energy(textures.X_train)).all()


def test_noise_is_in_proportion_to_each_channels_contrast():
    rng = np.random.default_rng(0)
    contrast = np.array([0.0, 0.02, 0.1])
    X = 0.5 + contrast * rng.standard_normal((40, 32, 32, 3))
    added = make_pseudo_anomalies(X, ["noise"], image_shape=(3, 32, 32))["noise"] - X
    share = added.std(axis=(1, 2))[:, 1:] / X.std(axis=(1, 2))[:, 1:]
    np.testing.assert_allclose(share[:, 0], share[:, 1], rtol=0.12)
    assert 0.04 < share.min() < 0.07 < 0.18 < share.max() < 0.22
    assert abs(added.mean()) < 1e-3
    assert abs(added[..., 0]).max() < 1e-6  # a channel without contrast stays


def test_rotation_is_by_right_angles(textures, made):
    turned = np.stack([np.rot90(textures.X_train, k, axes=(1, 2)) for k in (1, 2, 3)])
    same = (turned == made["rotation"]).all(axis=(2, 3))
    assert (same.sum(axis=0) == 1).all()  # each image by one angle
    assert same.any(axis=1).all()  # each angle for some image
    oblong = textures.X_train[:, :20]
    np.testing.assert_array_equal(
        make_pseudo_anomalies(oblong, ["rotation"])["rotation"], oblong[:, ::-1, ::-1]
    )


def test_kinds_of_vectors():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(2000, 3)) * [1, 10, 0]
    made = make_pseudo_anomalies(X)
    assert list(made) == ["noise", "mix"]
    np.testing.assert_allclose((made["noise"] - X).std(axis=0), [0.5, 5, 0], rtol=0.05)
    changed = (made["mix"] != X)[:, :2]
    np.testing.assert_allclose(changed.mean(axis=0), 0.25, atol=0.04)
    for column, before in zip(made["mix"].T, X.T, strict=True):
        assert np.isin(column, before).all()
    frame = pd.DataFrame(X, columns=list("abc"), index=range(5, 2005))
    mixed = make_pseudo_anomalies(frame)["mix"]
    pd.testing.assert_frame_equal(
        mixed, pd.DataFrame(made["mix"], frame.index, frame.columns)
    )


# the same whatever X is


@settings(max_examples=25)
@given(data=st.data())
def test_any_shape_and_dtype(data):
    h, w = data.draw(st.tuples(st.integers(5, 12), st.integers(5, 12)))
    channels = data.draw(st.sampled_from([1, 3, 4]))
    dtype = data.draw(st.sampled_from([np.uint8, np.uint16, np.float32, np.float64]))
    white = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    values = st.integers(0, 255).map(lambda v: dtype(white * (v / 255)))
    X = data.draw(arrays(dtype, (2, channels, h, w), elements=values))
    seed = data.draw(st.integers(0, 3))
    expected = make_pseudo_anomalies(X, random_state=seed)
    flat = make_pseudo_anomalies(
        X.reshape(2, -1), image_shape=(channels, h, w), random_state=seed
    )
    last = make_pseudo_anomalies(np.moveaxis(X, 1, -1), random_state=seed)
    alone = make_pseudo_anomalies(X[1:], random_state=seed)
    tensor = make_pseudo_anomalies(torch.tensor(X), random_state=seed)
    for kind, spoilt in expected.items():
        assert spoilt.shape == X.shape
        assert spoilt.dtype == X.dtype
        assert spoilt.min() >= 0
        assert spoilt.max() <= white
        np.testing.assert_array_equal(flat[kind].reshape(X.shape), spoilt)
        np.testing.assert_array_equal(np.moveaxis(last[kind], -1, 1), spoilt)
        np.testing.assert_array_equal(alone[kind], spoilt[1:])
        np.testing.assert_array_equal(tensor[kind], spoilt)
        if channels == 1:
            grey = make_pseudo_anomalies(X[:, 0], [kind], random_state=seed)[kind]
            np.testing.assert_array_equal(grey, spoilt[:, 0])
    for kind in ["cut_paste", "patch_shuffle", "rotation"]:
        if np.issubdtype(dtype, np.integer):
            assert np.isin(expected[kind], X).all()


def test_random_state(textures, made):
    again = make_pseudo_anomalies(textures.X_train)
    other = make_pseudo_anomalies(textures.X_train, random_state=1)
    for kind in KINDS:
        np.testing.assert_array_equal(again[kind], made[kind])
        assert (other[kind] != made[kind]).any()


def test_files_give_what_arrays_give(textures, photos, image_files, tmp_path):
    for X, paths in (
        (textures.X_train, image_files.train),
        (photos, image_files.photos),
    ):
        written = make_pseudo_anomalies(list(map(str, paths)), folder=tmp_path / "new")
        for kind, spoilt in make_pseudo_anomalies(X).items():
            read = np.stack([np.asarray(Image.open(path)) for path in written[kind]])
            np.testing.assert_array_equal(read, spoilt)


def test_files_keep_their_size_their_depth_and_their_opacity(tmp_path):
    rng = np.random.default_rng(0)
    pixels = [
        rng.integers(0, 900, (24, 30)).astype(np.uint16),  # dark, 16 bits
        rng.integers(0, 256, (10, 8, 4)).astype(np.uint8),
        rng.integers(0, 256, (1, 16)).astype(np.uint8),
    ]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    written = make_pseudo_anomalies(paths, ["rotation"], folder=tmp_path / "new")
    for path, image in zip(written["rotation"], pixels, strict=True):
        turned = np.asarray(Image.open(path))
        assert turned.dtype == image.dtype
        np.testing.assert_array_equal(turned, image[::-1, ::-1])


def test_files_are_written_once(image_files, tmp_path):
    def times():
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    first = make_pseudo_anomalies(image_files.train[:3], folder=tmp_path)
    before = times()
    assert len(before) == 3 * len(KINDS)
    assert make_pseudo_anomalies(image_files.train[:3], folder=tmp_path) == first
    assert times() == before
    make_pseudo_anomalies(image_files.train[:3], folder=tmp_path, random_state=1)
    assert len(times()) == 2 * len(before)


def test_errors(image_files, tmp_path):
    X, vectors = np.zeros((2, 8, 8)), np.zeros((2, 64))
    with pytest.raises(ValueError, match=r"kinds=\['bogus'\].*'cut_paste'"):
        make_pseudo_anomalies(X, ["bogus"])
    with pytest.raises(ValueError, match=r"kinds=\[\].* at least one"):
        make_pseudo_anomalies(X, [])
    with pytest.raises(
        ValueError, match=r"X holds vectors .*image_shape.*\['noise', 'mix'\]"
    ):
        make_pseudo_anomalies(vectors, ["noise", "blur"])
    with pytest.raises(ValueError, match="X holds images: choose"):
        make_pseudo_anomalies(X, ["mix"])
    with pytest.raises(ValueError, match="'kinds' parameter"):
        make_pseudo_anomalies(X, "noise")
    with pytest.raises(ValueError, match="'random_state' parameter"):
        make_pseudo_anomalies(X, random_state=-1)
    with pytest.raises(ValueError, match=r"image_shape=\(5, 5\)"):
        make_pseudo_anomalies(vectors, image_shape=(5, 5))
    with pytest.raises(ValueError, match="Set folder"):
        make_pseudo_anomalies(image_files.train)
    broken = [tmp_path / "a.png", image_files.train[0], tmp_path / "b.png"]
    for path in broken[::2]:
        path.write_bytes(b"no image")
    with pytest.raises(OSError, match=r"(?s)cannot be read: .*a\.png.*b\.png"):
        make_pseudo_anomalies(broken, folder=tmp_path / "new")


# the scorer


class Mean(BaseEstimator):
    """Scores samples by their mean, or the negative."""

    def __init__(self, sign=1):
        self.sign = sign

    def fit(self, X, y=None):
        return self

    def score_samples(self, X):
        return self.sign * np.mean(X, axis=tuple(range(1, np.ndim(X))), dtype=float)


def test_scorer_is_the_mean_auroc_of_the_kinds(textures, made):
    X = textures.X_train
    kinds = ["cut_paste", "noise"]
    expected = (
        np.mean(
            [
                mannwhitneyu(
                    X.mean(axis=(1, 2)), made[kind].mean(axis=(1, 2))
                ).statistic
                for kind in kinds
            ]
        )
        / len(X) ** 2
    )
    scorer = PseudoAnomalyScorer(kinds)
    assert scorer(Mean(), X) == pytest.approx(expected)
    assert scorer(Mean(-1), X) == pytest.approx(1 - expected)
    # known anomalies are left out
    both = np.concatenate([textures.X_test[textures.y_test == -1], X])
    labels = np.repeat([-1, 1], [len(both) - len(X), len(X)])
    assert scorer(Mean(), both, labels) == pytest.approx(expected)
    with pytest.raises(ValueError, match="If 1 marks anomalies"):
        scorer(Mean(), X, np.zeros(len(X)))
    assert pickle.loads(pickle.dumps(scorer)) == scorer
    assert repr(scorer).startswith("PseudoAnomalyScorer(kinds=['cut_paste', 'noise']")


def test_score_samples_goes_first(textures):
    class Both(Mean):
        def decision_function(self, X):
            return -self.score_samples(X)

    scorer, X = PseudoAnomalyScorer(), textures.X_train
    assert scorer(Both(), X) == scorer(Mean(), X) != scorer(Mean(-1), X)
    with pytest.raises(AttributeError, match="decision_function"):
        scorer(BaseEstimator(), X)


@pytest.mark.parametrize("routing", [False, True])
def test_searches_without_labels(routing):
    """The better of two candidates is known: one sees the correlation, one does not."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 1)) + 0.1 * rng.normal(size=(200, 4))
    full, diagonal = GaussianScorer("empirical"), GaussianScorer("diagonal")
    grid = {"scorer": [diagonal, full]}
    pipeline = Pipeline([("scorer", full)])
    scorer = PseudoAnomalyScorer()
    with config_context(enable_metadata_routing=routing):
        for search in (
            GridSearchCV(pipeline, grid, scoring=scorer, cv=3),
            RandomizedSearchCV(pipeline, grid, n_iter=2, scoring=scorer, cv=3),
            HalvingGridSearchCV(pipeline, grid, scoring=scorer, cv=3, random_state=0),
        ):
            assert search.fit(X).best_params_ == {"scorer": full}
            assert search.best_score_ > 0.85
        several = {"ours": scorer, "noise": PseudoAnomalyScorer(["noise"])}
        found = cross_validate(OneClassSVM(), X, scoring=several, cv=3)
    assert np.isfinite(found["test_ours"]).all()
    assert (found["test_ours"] != found["test_noise"]).any()


@pytest.fixture
def passed(monkeypatch):
    """Count the images that pass the network."""
    counted = []
    run = FeaturePass.run

    def count(self, values):
        counted.append(len(values))
        return run(self, values)

    monkeypatch.setattr(FeaturePass, "run", count)
    return counted


@pytest.mark.parametrize("files", [False, True])
def test_a_search_passes_each_image_once(
    textures, image_files, tmp_path, passed, files
):
    """The known better candidate is the stage that sees; the other sees nothing."""
    X = image_files.train if files else textures.X_train
    pipeline = Pipeline(
        [
            ("features", BackboneFeatures(stages="stage5", image_size=32)),
            ("scorer", KNNScorer()),
        ]
    ).set_params(features__memory=tmp_path / "memory")
    scorers = [KNNScorer(), KNNScorer(5), OneClassSVM(), OneClassSVM(gamma=1e9)]
    search = GridSearchCV(
        pipeline,
        {"scorer": scorers},
        scoring=PseudoAnomalyScorer(folder=tmp_path / "files" if files else None),
        cv=OneClassKFold(2),
        error_score="raise",
    ).fit(X)
    images = [textures.X_train, *make_pseudo_anomalies(textures.X_train).values()]
    every = np.concatenate(images)
    distinct = len(every) if files else len(np.unique(every, axis=0))
    assert sum(passed) == distinct
    means = search.cv_results_["mean_test_score"]
    assert means[:3].min() > 0.6 > 0.51 > means[3]
    if files:  # the same images, the same scores
        left = os.listdir(tmp_path / "files")
        assert len(left) == len(X) * len(KINDS)
        scorer = PseudoAnomalyScorer()
        detector = search.best_estimator_
        assert scorer(detector, X) == scorer(detector, textures.X_train)


def test_any_detector_behind_any_images(photos):
    model = make_pipeline(
        BackboneFeatures(stages="stage3", image_size=32),
        IsolationForest(random_state=0),
    ).fit(photos[:20])
    assert 0.5 < PseudoAnomalyScorer()(model, photos[20:]) < 1
