"""The contract on images: what scikit-learn's suite checks on vectors, and more."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import tracemalloc
import warnings
from collections import Counter
from functools import partial
from itertools import product
from types import SimpleNamespace

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import (
    GridSearchCV,
    KFold,
    StratifiedKFold,
    cross_val_score,
)
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.utils import Bunch
from torch import nn

from skdeepad import (
    BackboneFeatures,
    CentroidScorer,
    DeepSVDD,
    GaussianScorer,
    HSCClassifier,
    KDClonerEstimator,
    KMeansScorer,
    KNNScorer,
    MahalanobisFeatureScorer,
    PANDAEstimator,
    PatchDetector,
    inference,
)
from skdeepad.backbones import load_backbone
from skdeepad.cache import MemoryCache, StageCache
from skdeepad.datasets import make_texture_defects
from skdeepad.inference import FeaturePass
from skdeepad.metrics import anomaly_roc_auc_score

STAGES = ("stage1", "stage2")  # few features, so that Gaussians are quick to fit


def tiny_net():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)
    )


def linear_net():
    """A matrix product, which rounds by the number of its rows."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 64))


def quick(options):
    stages = None if "backbone" in options else STAGES
    defaults = {"image_size": 32, "batch_size": 4, "random_state": 0, "stages": stages}
    return {**defaults, **options}


def features(**options):
    return BackboneFeatures(**quick(options))


def mahalanobis(**options):
    return MahalanobisFeatureScorer(**quick(options))


def panda(**options):
    options = {**quick(options), "max_steps": 2}
    del options["stages"]
    return PANDAEstimator(**options)


def patch(**options):
    return PatchDetector(**quick(options))


def kd_cloner(**options):
    return KDClonerEstimator(**quick(options), max_steps=2)


def hsc(**options):
    return HSCClassifier(**quick(options), max_steps=2)


def unbiased_net():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, bias=False),
        nn.BatchNorm2d(6, affine=False),
        nn.LeakyReLU(),
        nn.Conv2d(6, 4, 3, bias=False),
    )


def deep_svdd(**options):
    given = {"backbone": unbiased_net} if "backbone" in options else {}
    options = {**quick(options), "image_size": 32, "max_steps": 2, "pretrain_steps": 2}
    del options["stages"]
    return DeepSVDD(**{**options, **given})


def knn(**options):
    return make_pipeline(features(**options), KNNScorer())


def gaussian(**options):
    return make_pipeline(features(**options), GaussianScorer())


MAKERS = {
    "features": features,
    "mahalanobis": mahalanobis,
    "panda": panda,
    "patch": patch,
    "kd_cloner": kd_cloner,
    "hsc": hsc,
    "deep_svdd": deep_svdd,
    "knn": knn,
    "gaussian": gaussian,
}
DETECTORS = {name: make for name, make in MAKERS.items() if name != "features"}
NETWORKS = {
    "lite0": {},
    "lite0_64": {"image_size": 64, "stages": ("stage2", "stage5")},
    "tiny": {"backbone": tiny_net},
    "linear": {"backbone": linear_net, "precision": "float32"},
    "whole": {"stages": None},
}
KINDS = ("grey", "nhwc_float", "nchw_uint8", "flat", "paths")

# what follows from labels, or from the number of channels, is in test_hypersphere
ONE_CLASS = {name: make for name, make in DETECTORS.items() if name != "hsc"}
FROZEN = {name: make for name, make in DETECTORS.items() if name != "deep_svdd"}
every_estimator = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
every_detector = pytest.mark.parametrize("make", DETECTORS.values(), ids=DETECTORS)
every_one_class = pytest.mark.parametrize("make", ONE_CLASS.values(), ids=ONE_CLASS)
both = pytest.mark.parametrize("make", [features, mahalanobis])


def output(estimator, X):
    """What an estimator says of images: features, or scores."""
    if hasattr(estimator, "score_samples"):
        return estimator.score_samples(X)
    return estimator.transform(X)


def assert_same(estimator, actual, expected):
    """Compare features bit for bit, and scores but for rounding in float64."""
    rtol = 1e-10 if hasattr(estimator, "score_samples") else 0
    assert_allclose(actual, expected, rtol=rtol, atol=0)


@pytest.fixture(scope="module")
def images(textures, photos, image_files):
    """The same images in every form, to fit and to score."""
    first = np.ascontiguousarray(np.moveaxis(photos, -1, 1))
    forms = {
        "grey": np.concatenate([textures.X_train, textures.X_test]),
        "nhwc_float": np.float32(photos) / 255,
        "nchw_uint8": first,
        "flat": first.reshape(len(first), -1),
        "paths": image_files.photos,
    }
    return {kind: (X[:12], X[12:18]) for kind, X in forms.items()}


CASES = [
    *product(MAKERS, ["lite0", "tiny"], KINDS),
    *product(MAKERS, ["lite0_64"], ["grey"]),
    ("features", "linear", "nchw_uint8"),
    ("features", "whole", "nhwc_float"),
    ("knn", "whole", "paths"),
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, images):
    """A fitted estimator, images that it did not see, and what it says of them."""
    name, network, kind = request.param
    train, test = images[kind]
    options = {"image_shape": (3, 32, 32)} if kind == "flat" else {}
    estimator = MAKERS[name](**NETWORKS[network], **options).fit(train)
    return Bunch(
        estimator=estimator,
        kind=kind,
        network=network,
        train=train,
        test=test,
        output=output(estimator, test),
    )


# ------------------------------------------------------------- what holds in every case


def test_outputs_are_finite_and_differ(case):
    assert np.isfinite(case.output).all()
    assert len(np.unique(case.output, axis=0)) == len(case.test)
    scores = hasattr(case.estimator, "score_samples")
    assert case.output.dtype == (np.float64 if scores else np.float32)


def test_order_and_subset_do_not_matter(case):
    backwards = output(case.estimator, case.test[::-1])
    assert_same(case.estimator, backwards[::-1], case.output)
    part = output(case.estimator, case.test[1:4])
    assert_same(case.estimator, part, case.output[1:4])
    alone = [output(case.estimator, case.test[i : i + 1])[0] for i in (0, 5)]
    assert_same(case.estimator, alone, case.output[[0, 5]])


def test_maps_are_those_of_each_image(case):
    if not hasattr(case.estimator, "anomaly_map"):
        return
    maps = case.estimator.anomaly_map(case.test)
    assert maps.dtype == np.float32
    assert maps.shape == (len(case.test), 32, 32)
    assert np.isfinite(maps).all()
    rounding = 5e-3 * np.abs(maps).max()
    backwards = case.estimator.anomaly_map(case.test[::-1])
    assert_allclose(backwards[::-1], maps, atol=rounding)
    alone = [case.estimator.anomaly_map(case.test[i : i + 1])[0] for i in (0, 5)]
    assert_allclose(alone, maps[[0, 5]], atol=rounding)


def test_fitting_again_and_pickling_change_nothing(case):
    for again in (
        case.estimator,
        pickle.loads(pickle.dumps(case.estimator)),
        clone(case.estimator).fit(case.train),
    ):
        assert_array_equal(output(again, case.test), case.output)


def test_scoring_leaves_the_estimator_as_it_is(case):
    before = joblib.hash(vars(case.estimator))
    for method in ("transform", "score_samples", "decision_function", "predict"):
        if hasattr(case.estimator, method):
            getattr(case.estimator, method)(case.test)
    assert joblib.hash(vars(case.estimator)) == before


def test_other_images_than_in_fit_are_brought_to_the_size(case):
    if case.kind == "paths":  # files may be of any size and mode
        return
    if case.kind == "flat":
        with pytest.raises(ValueError, match="is expecting"):
            output(case.estimator, np.zeros((2, 3071)))
        return
    smaller, grey = np.zeros((2, 32, 30)), np.zeros((2, 32, 32))
    colour = np.zeros((2, 3, 32, 32))
    black = output(case.estimator, colour if case.kind != "grey" else grey)
    for X in (smaller, grey, colour):
        if case.network == "linear" and X is not (
            grey if case.kind == "grey" else colour
        ):
            with pytest.raises(ValueError, match="is expecting"):
                output(case.estimator, X)
        else:
            assert_allclose(output(case.estimator, X), black, rtol=1e-5, atol=1e-6)


def test_columns_are_counted_where_there_are_columns(case):
    first = case.estimator
    first = first[0] if isinstance(first, Pipeline) else first
    if case.kind == "flat":
        assert first.n_features_in_ == 3 * 32 * 32
    else:
        assert not hasattr(first, "n_features_in_")


def test_predictions_follow_the_threshold(case):
    if not hasattr(case.estimator, "predict"):
        return
    decision = case.estimator.decision_function(case.test)
    last = case.estimator
    last = last[-1] if isinstance(last, Pipeline) else last
    assert_allclose(decision, case.output - last.offset_, rtol=1e-12)
    assert_array_equal(
        case.estimator.predict(case.test), np.where(decision >= 0, 1, -1)
    )


@pytest.mark.parametrize("network", ["lite0", "tiny"])
def test_every_form_of_the_images_is_the_same(network, images):
    given = [
        features(
            **NETWORKS[network], image_shape=(3, 32, 32) if kind == "flat" else None
        )
        .fit(train)
        .transform(test)
        for kind, (train, test) in images.items()
        if kind != "grey"
    ]
    for other in given[1:]:
        assert_array_equal(other, given[0])


def test_grey_arrays_and_files_are_the_same(textures, image_files):
    detector = mahalanobis(backbone=tiny_net).fit(textures.X_train)
    assert_array_equal(
        detector.score_samples(image_files.test),
        detector.score_samples(textures.X_test),
    )


# --------------------------------------------------------------- what is left untouched


@every_estimator
@pytest.mark.parametrize("network", ["lite0", "tiny"])
def test_global_state_is_left_alone(make, network, images):
    def state():
        return (
            random.getstate(),
            joblib.hash(np.random.get_state()),
            torch.get_rng_state().tolist(),
            torch.get_num_threads(),
            torch.get_num_interop_threads(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
        )

    before = state()
    train, test = images["paths"]
    output(make(**NETWORKS[network]).fit(train), test)
    assert state() == before


@both
@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda: net])
def test_the_callers_module_is_left_alone(make, wrap, images):
    net = tiny_net().double().train()
    net[3].requires_grad_(False)

    def state():
        return (
            [module.training for module in net.modules()],
            [(p.requires_grad, p.device, p.dtype, p.grad) for p in net.parameters()],
            joblib.hash({name: v.numpy() for name, v in net.state_dict().items()}),
        )

    before = state()
    estimator = make(backbone=wrap(net))
    train, test = images["nchw_uint8"]
    output(estimator.fit(train), test)
    assert state() == before


def test_a_shared_backbone_is_left_alone(images):
    backbone = load_backbone("efficientnet_lite0")
    before = joblib.hash({k: v.numpy() for k, v in backbone.state_dict().items()})
    train, test = images["grey"]
    estimator = features(backbone=backbone, precision="bfloat16").fit(train)
    estimator.transform(test)
    assert estimator.backbone_ is backbone
    state = {k: v.numpy() for k, v in backbone.state_dict().items()}
    assert joblib.hash(state) == before
    assert not any(module.training for module in backbone.modules())


@both
def test_images_are_not_copied_as_a_whole(make):
    X = np.random.default_rng(0).integers(0, 256, (4000, 32, 32, 3), dtype=np.uint8)
    estimator = make(backbone=tiny_net, image_size=None, batch_size=50)
    tracemalloc.start()
    try:
        output(estimator.fit(X), X)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < X.nbytes / 2


# --------------------------------------------------------------------------- pickling


def test_pickles_speak_in_another_process(images, tmp_path):
    train, test = images["nchw_uint8"]
    torch.manual_seed(0)
    estimators = [make().fit(train) for make in MAKERS.values()]
    # a module that the other process can import; the tests it cannot
    estimators.append(mahalanobis(backbone=tiny_net()).fit(train))
    (tmp_path / "in.pkl").write_bytes(pickle.dumps((estimators, test)))
    code = (
        "import pickle, sys\n"
        "estimators, X = pickle.load(open('in.pkl', 'rb'))\n"
        "said = [getattr(e, 'score_samples', getattr(e, 'transform', None))(X)\n"
        "        for e in estimators]\n"
        "pickle.dump(said, open('out.pkl', 'wb'))\n"
    )
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    said = pickle.loads((tmp_path / "out.pkl").read_bytes())
    for estimator, there in zip(estimators, said, strict=True):
        assert_array_equal(there, output(estimator, test))


def test_pickles_of_pretrained_backbones_are_small(images):
    train, _ = images["grey"]
    assert len(pickle.dumps(features().fit(train))) < 50_000
    # two times a Gaussian of 16 and of 24 features
    assert len(pickle.dumps(mahalanobis().fit(train))) < 50_000


def test_precision_is_settled_in_fit(images, monkeypatch):
    """A pickle that goes to another processor is read in the precision it knows."""
    train, test = images["grey"]
    told = "skdeepad.inference._has_bfloat16_instructions"
    monkeypatch.setattr(told, lambda: True)
    detector = mahalanobis(device="cpu").fit(train)
    expected = detector.score_samples(test)
    monkeypatch.setattr(told, lambda: False)
    assert_array_equal(detector.score_samples(test), expected)


# ------------------------------------------------------------------ bad images in fit


@every_estimator
def test_before_fit_there_is_nothing_to_say(make, images):
    with pytest.raises(NotFittedError):
        output(make(), images["grey"][1])


@every_detector
def test_one_image_is_too_few_to_fit_but_not_to_score(make, images):
    train, test = images["grey"]
    with pytest.raises(ValueError, match=r"1 normal sample.* minimum of [23]"):
        make().fit(train[:1])
    assert make().fit(train).score_samples(test[:1]).shape == (1,)


def test_one_image_is_enough_for_features(images):
    train, test = images["grey"]
    expected = features().fit(train).transform(test)
    assert_array_equal(features().fit(train[:1]).transform(test), expected)


@both
@pytest.mark.parametrize(
    "spoil",
    [
        lambda X: np.where(np.arange(32) == 3, np.nan, np.float32(X) / 255),
        lambda X: X.astype(np.float32),
        lambda X: X[:0],
        lambda X: ["no/such.png"],
        lambda X: "no/such.png",
        lambda X: X[:, :, :, None, None],
        lambda X: X.reshape(len(X), -1)[:, :500],
    ],
    ids=["nan", "range", "empty", "missing", "one path", "5-D", "flat"],
)
def test_a_failing_fit_leaves_the_fitted_state(make, spoil, images):
    train, test = images["grey"]
    estimator = make(image_shape=(32, 32)).fit(train)
    expected, names = output(estimator, test), set(vars(estimator))
    with pytest.raises((ValueError, FileNotFoundError)):
        estimator.fit(spoil(train))
    assert set(vars(estimator)) == names
    assert_array_equal(output(estimator, test), expected)


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_failing_late_leaves_the_fitted_state(method, images, corrupt):
    train, test = images["grey"]
    detector = mahalanobis().fit(train)
    expected = detector.score_samples(test)
    for X, y in ((train, -np.ones(12)), (corrupt.paths, None), (train, ["good"] * 12)):
        with pytest.raises(ValueError):
            getattr(detector, method)(X, y)
    assert_array_equal(detector.score_samples(test), expected)
    assert detector.n_samples_seen_ == 12


def test_columns_are_forgotten_by_a_fit_to_images(images):
    estimator = features(image_shape=(3, 32, 32))
    flat = pd.DataFrame(images["flat"][0]).add_prefix("pixel")
    assert estimator.fit(flat).n_features_in_ == 3 * 32 * 32
    assert len(estimator.feature_names_in_) == 3 * 32 * 32
    estimator.fit(images["nchw_uint8"][0])
    assert not hasattr(estimator, "n_features_in_")
    assert not hasattr(estimator, "feature_names_in_")


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet"}, "backbone='resnet' is unknown"),
        ({"backbone": "mlp"}, "Choose a backbone for images"),
        ({"stages": "stage9"}, r"stages=\['stage9'\] not found.*stage1"),
        ({"stages": ()}, "stages="),
        ({"image_size": 0}, "image_size"),
        ({"image_size": (32,)}, "image_size"),
        ({"image_size": (0, 32)}, "image_size"),
        ({"image_size": (32.5, 32)}, "image_size"),
        ({"image_size": ("32", 32)}, "image_size"),
        ({"image_size": 2, "backbone": tiny_net}, "fails on samples.*image_size"),
        ({"image_shape": (3, 32, 32)}, r"image_shape=\(3, 32, 32\) is expected"),
        ({"batch_size": 0}, "batch_size"),
        ({"precision": "float64"}, "precision"),
        ({"on_error": "ignore"}, "on_error"),
        ({"device": "gpu"}, "device='gpu'"),
    ],
)
def test_parameters_that_mean_nothing(make, options, message, images):
    with pytest.raises(ValueError, match=message):
        make(**options).fit(images["grey"][0])


def test_files_have_no_size_to_go_by(images):
    with pytest.raises(ValueError, match="Set image_size"):
        features(backbone=tiny_net, image_size=None).fit(images["paths"][0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(images):
    with pytest.raises(ValueError, match=r"device='cuda'.*Use 'auto' or 'cpu'"):
        features(device="cuda").fit(images["grey"][0])


def test_processes_on_one_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, warned in (("MainProcess", 0), ("LokyProcess-1", 1)):
        process = SimpleNamespace(name=name)
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as w:
            patch.setattr(inference, "current_process", lambda: process)  # noqa: B023
            patch.setattr(torch, "empty", lambda *_, **__: None)
            assert inference.resolve_device("auto").type == "cuda"
            assert inference.resolve_device("cpu").type == "cpu"
        assert ["Set n_jobs=1: it is as fast" in str(one.message) for one in w] == [
            True
        ] * warned


# -------------------------------------------------------------------------- labels


@every_one_class
@pytest.mark.parametrize("kind", ["grey", "paths"])
def test_known_anomalies_are_left_out(make, kind, images):
    train, test = images[kind]
    y = np.ones(len(train))
    y[[0, 4, 11]] = -1
    without = [image for image, label in zip(train, y, strict=True) if label == 1]
    labelled, plain = make().fit(train, y), make().fit(without)
    assert_allclose(labelled.score_samples(test), plain.score_samples(test), rtol=1e-9)
    assert_array_equal(labelled.predict(test), plain.predict(test))


@every_one_class
def test_labels_that_mean_something_else(make, images):
    train, _ = images["grey"]
    with pytest.raises(ValueError, match="every row as an anomaly"):
        make().fit(train, -np.ones(12))
    with pytest.raises(ValueError, match=r"Unknown label type.*'good'"):
        make().fit(train, ["good"] * 12)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        make().fit(train, np.ones(11))
    with pytest.warns(UserWarning, match=r"roc_auc.* inverted"):
        make().fit(train, np.arange(12) % 2)


# ------------------------------------------------------------------- unreadable files


@pytest.fixture
def corrupt(image_files, tmp_path):
    """Sixty paths, of which three are no images."""
    paths, bad = [*image_files.photos, *image_files.train[:20]], [7, 30, 58]
    for i in bad:
        paths[i] = tmp_path / f"bad{i}.png"
        paths[i].write_text("no image")
    good = np.delete(np.array(paths, dtype=object), bad)
    return Bunch(paths=paths, good=good, bad=bad)


def names_the_first(message, corrupt, positions):
    """Messages are short: as many files are named as there is room for."""
    k, i = min(zip(positions, corrupt.bad, strict=True))
    return f"{str(corrupt.paths[i])!r} (X[{k}])" in message and len(message) < 500


@pytest.mark.parametrize("cached", [False, True])
def test_unreadable_files_are_counted_and_named(cached, corrupt, tmp_path):
    options = {"backbone": tiny_net, "memory": tmp_path if cached else None}
    fitted = features(**options).fit(corrupt.paths)
    calls = [
        lambda: fitted.transform(corrupt.paths),
        lambda: mahalanobis(**options).fit(corrupt.paths),
        lambda: knn(**options).fit(corrupt.paths),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"3 of 60 .*on_error='skip'") as error:
            call()
        assert names_the_first(str(error.value), corrupt, corrupt.bad)


def test_positions_are_those_in_x(corrupt):
    y = np.ones(60)
    y[:20] = -1  # left out, the first unreadable file among them
    with pytest.raises(ValueError, match=r"X\[30\].*X\[58\]"):
        mahalanobis(backbone=tiny_net).fit(corrupt.paths, y)


@pytest.mark.parametrize("cached", [False, True])
def test_unreadable_files_may_be_skipped(cached, corrupt, tmp_path):
    options = {"backbone": tiny_net, "memory": tmp_path if cached else None}
    detector = mahalanobis(on_error="skip", **options)
    with pytest.warns(UserWarning, match="skipped") as record:
        detector.fit(corrupt.paths)
    assert len(record) == 1
    assert names_the_first(str(record[0].message), corrupt, corrupt.bad)
    plain = mahalanobis(**options).fit(corrupt.good)
    assert detector.offset_ == plain.offset_
    assert detector.n_samples_seen_ == 57

    X = corrupt.paths[::-1]
    with pytest.warns(UserWarning, match="skipped") as record:
        scores = detector.score_samples(X)
    assert len(record) == 1
    assert names_the_first(
        str(record[0].message), corrupt, [59 - i for i in corrupt.bad]
    )
    skipped = np.isin(np.arange(60), corrupt.bad)[::-1]
    assert_array_equal(np.isnan(scores), skipped)
    assert_allclose(
        scores[~skipped], plain.score_samples(list(corrupt.good[::-1])), rtol=1e-10
    )
    with pytest.warns(UserWarning, match="skipped"):
        assert (detector.predict(X)[skipped] == -1).all()
    with pytest.warns(UserWarning, match="skipped"):
        white = detector.transform(X)
    assert_array_equal(np.isnan(white).all(axis=1), skipped)
    assert np.isfinite(white[~skipped]).all()


def test_no_file_can_be_read(corrupt):
    paths = [corrupt.paths[i] for i in corrupt.bad]
    with (
        pytest.warns(UserWarning, match="3 of 3"),
        pytest.raises(ValueError, match="0 normal sample"),
    ):
        mahalanobis(on_error="skip").fit(paths)


# -------------------------------------------------------------------------- features


def test_stages_side_by_side(images):
    train, test = images["grey"]
    together = features(stages=("stage3", "stage1", "conv_head")).fit(train)
    assert together.stages_ == ("stage1", "stage3", "conv_head")
    single = [features(stages=stage).fit(train) for stage in together.stages_]
    assert_array_equal(
        together.transform(test), np.hstack([one.transform(test) for one in single])
    )
    assert_array_equal(
        together.get_feature_names_out(),
        np.hstack([one.get_feature_names_out() for one in single]),
    )


def test_features_are_the_networks_output(images):
    """Against the network itself, written out."""
    train, test = images["nchw_uint8"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = tiny_net().eval()
    estimator = features(backbone=net, precision="float32").fit(train)
    with torch.inference_mode():
        expected = net(torch.from_numpy(test) / 255).mean((2, 3))
    assert_allclose(estimator.transform(test), expected, rtol=1e-4, atol=1e-6)
    # "pool" of the pretrained network is the average of the stage before it
    pooled, averaged = (
        features(stages=stages, precision="float32").fit(train).transform(test)
        for stages in (None, "conv_head")
    )
    assert_allclose(pooled, averaged, rtol=1e-4, atol=1e-6)


def test_grid_tells_where(images):
    net = tiny_net().eval()
    test = np.pad(images["nchw_uint8"][1], [(0, 0), (0, 0), (1, 1), (1, 1)])
    options = {"backbone": net, "image_size": None, "precision": "float32"}
    cells = features(grid=2, **options).fit(test)
    with torch.inference_mode():
        maps = net(torch.from_numpy(test) / 255)
    quarters = maps.reshape(len(test), 4, 2, 7, 2, 7).mean((3, 5))
    assert_allclose(cells.transform(test), quarters.flatten(1), rtol=1e-4, atol=1e-6)
    names = cells.get_feature_names_out()
    assert names.tolist() == [f"3_{i}" for i in range(16)]


@both
def test_pandas_output(make, images):
    train, test = images["paths"]
    estimator = make(stages=STAGES).set_output(transform="pandas").fit(train)
    frame = estimator.transform(test)
    assert_array_equal(frame.columns, estimator.get_feature_names_out())
    assert_array_equal(frame, clone(estimator).fit(train).transform(test))
    assert frame.shape == (len(test), 16 + 24)


@pytest.mark.parametrize("joint", [True, False])
def test_whitened_features_give_the_distance(images, joint):
    train, test = images["grey"]
    detector = mahalanobis(joint=joint).fit(train)
    white = np.split(detector.transform(test), [] if joint else [16], axis=1)
    distance = sum(np.linalg.norm(part, axis=1) for part in white)
    assert_allclose(detector.score_samples(test), -distance, rtol=1e-10)


def test_batch_size_changes_nothing_but_rounding(images):
    train, test = images["nchw_uint8"]
    options = {"precision": "float32", "stages": (*STAGES, "pool")}
    expected = features(**options).fit(train).transform(test)
    for batch_size in (1, 5, 32):
        actual = features(**options, batch_size=batch_size).fit(train).transform(test)
        assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


def test_precisions_agree_roughly(textures):
    scores = [
        mahalanobis(precision=precision)
        .fit(textures.X_train)
        .score_samples(textures.X_test)
        for precision in ("float32", "bfloat16")
    ]
    assert np.corrcoef(scores)[0, 1] > 0.98
    assert (scores[0] != scores[1]).any()


# ----------------------------------------------------------- MahalanobisFeatureScorer


@pytest.mark.parametrize("covariance", ["ledoit_wolf", "diagonal"])
def test_scores_are_summed_over_stages(covariance, textures):
    X, new = textures.X_train, textures.X_test
    detector = mahalanobis(joint=False, covariance=covariance).fit(X)
    single = [
        make_pipeline(features(stages=stage), GaussianScorer(covariance)).fit(X)
        for stage in STAGES
    ]
    expected = sum(pipeline.score_samples(new) for pipeline in single)
    assert_allclose(detector.score_samples(new), expected, rtol=1e-10)


def test_joint_scores_are_those_of_one_gaussian(textures):
    X, new = textures.X_train, textures.X_test
    pipeline = make_pipeline(features(stages=STAGES), GaussianScorer()).fit(X)
    scores = mahalanobis(joint=True).fit(X).score_samples(new)
    assert_allclose(scores, pipeline.score_samples(new), rtol=1e-10)


def test_the_last_three_stages_are_the_default(images):
    detector = MahalanobisFeatureScorer(backbone=tiny_net, image_size=32)
    assert detector.fit(images["grey"][0]).stages_ == ("1", "2", "3")
    detector = MahalanobisFeatureScorer(image_size=32)
    assert detector.fit(images["grey"][0]).stages_ == ("stage5", "stage6", "stage7")


@pytest.mark.parametrize("joint", [True, False])
def test_parts_of_a_stream_add_up(textures, joint):
    X, new = textures.X_train, textures.X_test
    make = partial(mahalanobis, joint=joint)
    whole = make().fit(X)
    parts = make().partial_fit(X[:5]).partial_fit(X[5:7]).partial_fit(X[7:])
    continued = make().fit(X[:10]).partial_fit(X[10:])
    merged = make().fit(X[:9]).merge([make().fit(X[9:17]), make().fit(X[17:])])
    for other in (parts, continued, merged):
        assert other.n_samples_seen_ == whole.n_samples_seen_ == len(X)
        assert_allclose(other.score_samples(new), whole.score_samples(new), rtol=1e-6)
        assert_allclose(other.score_samples(X), whole.score_samples(X), rtol=1e-6)
        assert_allclose(other.offset_, whole.offset_, rtol=1e-6)
    assert parts.fit(X[:10]).n_samples_seen_ == 10  # starts anew


def test_known_anomalies_in_a_stream(textures):
    X, y = textures.X_test, textures.y_test
    streamed = mahalanobis().partial_fit(X[:8], y[:8]).partial_fit(X[8:], y[8:])
    expected = mahalanobis().fit(X[y == 1]).score_samples(textures.X_train)
    assert_allclose(streamed.score_samples(textures.X_train), expected, rtol=1e-6)


def test_parts_were_seen_in_the_same_way(textures):
    X = textures.X_train
    detector = mahalanobis().fit(X)
    for other in (
        mahalanobis(joint=False),
        mahalanobis(stages="stage4"),
        mahalanobis(image_size=48),
        mahalanobis(weights=None),
    ):
        with pytest.raises(ValueError, match="cannot be merged into"):
            detector.merge([other.fit(X)])
    assert detector.n_samples_seen_ == len(X)


def test_a_stream_may_have_images_of_other_sizes(textures):
    detector = mahalanobis().fit(textures.X_train)
    detector.partial_fit(textures.X_train[:, :30])
    assert detector.n_samples_seen_ == 2 * len(textures.X_train)


# ------------------------------------------------------------------ features on disk


@pytest.fixture
def passes(monkeypatch):
    """How many images went through a network."""
    count = Counter()
    run = FeaturePass.run

    def counted(self, values):
        count["images"] += len(values)
        return run(self, values)

    monkeypatch.setattr(FeaturePass, "run", counted)
    return lambda: count.pop("images", 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", ["lite0", "tiny"])
def test_features_on_disk_are_found_again(kind, network, images, passes, tmp_path):
    train, test = images[kind]
    options = {
        **NETWORKS[network],
        "image_shape": (3, 32, 32) if kind == "flat" else None,
    }
    expected = mahalanobis(**options).fit(train).score_samples(test)
    passes()
    detector = mahalanobis(memory=tmp_path / "new" / "folder", **options)
    assert_array_equal(detector.fit(train).score_samples(test), expected)
    # training images pass once more, for the threshold on maps
    assert passes() == 2 * len(train) + len(test)
    assert_array_equal(detector.fit(train).score_samples(test), expected)
    assert_array_equal(detector.score_samples(test[::-1])[::-1], expected)
    assert passes() == 0
    other = detector.set_params(image_size=24).fit(train)
    assert passes() == 2 * len(train)
    assert (other.score_samples(test) != expected).all()


def test_each_pass_has_its_own_features(images, passes, tmp_path):
    train, _ = images["grey"]
    estimator = features(memory=joblib.Memory(tmp_path, verbose=0))
    different = [
        {"precision": "float32"},
        {"precision": "bfloat16"},
        {"stages": "stage1"},
        {"stages": "stage2"},
        {"grid": 2},
        {"backbone": "cifar10_lenet", "stages": None, "grid": None},
        {"random_state": 1},
    ]
    given = []
    for change in different:
        estimator.set_params(**change)
        given.append(joblib.hash(estimator.fit_transform(train)))
    assert len(set(given)) == len(different)
    passes()
    estimator.set_params(batch_size=3).fit_transform(train)
    assert passes() == 0


def test_changed_files_are_read_again(image_files, passes, tmp_path):
    path = tmp_path / "image.png"
    estimator = features(memory=tmp_path / "memory").fit(image_files.photos)
    given = []
    for source in image_files.photos[:2]:
        path.write_bytes(source.read_bytes())
        given.append(estimator.transform([path, path]))
    assert passes() == 2
    plain = features().fit(image_files.photos).transform(image_files.photos[:2])
    assert_array_equal(np.vstack(given), plain[[0, 0, 1, 1]])


@pytest.mark.skipif(os.name == "nt", reason="Windows tells no time of change")
def test_replaced_files_of_the_same_size_and_time_are_read_again(tmp_path, passes):
    paths = [tmp_path / f"{name}.tiff" for name in "ab"]
    for path, grey in zip(paths, (50, 200), strict=True):
        Image.fromarray(np.full((32, 32), grey, np.uint8)).save(path)
        os.utime(path, ns=(0, 0))
    estimator = features(memory=tmp_path / "memory").fit(paths)
    first, other = estimator.transform(paths)
    changed = os.stat(paths[0]).st_ctime_ns
    while os.stat(paths[0]).st_ctime_ns == changed:  # until the system's clock ticks
        shutil.copy2(paths[1], paths[0])
    assert os.stat(paths[0]).st_mtime_ns == 0
    assert not np.array_equal(first, other)
    assert_array_equal(estimator.transform(paths), [other, other])
    assert passes() == 3  # the copy, once


def test_a_grid_over_stages_costs_one_pass(images, passes, tmp_path):
    train, _ = images["nchw_uint8"]
    stages = ["stage1", ("stage2", "pool"), "stage7"]
    expected = [features(stages=s).fit_transform(train) for s in stages]
    passes()
    for given, alone in zip(stages, expected, strict=True):
        estimator = features(stages=given, memory=tmp_path)
        assert_array_equal(estimator.fit_transform(train), alone)
    assert passes() == len(train)


def test_stages_that_cannot_take_the_images_are_not_kept(passes, tmp_path):
    X = np.random.default_rng(0).random((6, 20, 20), dtype=np.float32)
    estimator = BackboneFeatures(
        "mnist_lenet",
        stages="stage1",
        image_size=20,
        random_state=0,
        memory=tmp_path,
    )
    for _ in range(2):  # the linear layer is made for 28 pixels
        estimator.fit_transform(X)
    assert passes() == len(X)


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
@pytest.mark.parametrize("shape", [(3,), (2, 4, 5), (0,)])
def test_rows_keep_their_shape(dtype, shape, tmp_path):
    values = np.arange(4 * int(np.prod(shape))).reshape(4, *shape).astype(dtype)
    for cache in (StageCache(tmp_path), MemoryCache([])):
        cache.put(["a", "b"], [b"1", b"2", b"3", b"4"], [values, -values])
        ((index, (first, second)),) = cache.read(["a", "b"], [b"4", b"5", b"2"])
        assert_array_equal(index, [0, 2])
        assert_array_equal(first, values[[3, 1]])
        assert_array_equal(second, -values[[3, 1]])
        assert first.dtype == dtype


def test_processes_share_the_work(tmp_path):
    ours, theirs = StageCache(tmp_path), StageCache(tmp_path)
    digests = [bytes([i]) for i in range(6)]
    batches = ours.missing(["stage"], [*digests, *digests], 2)
    first = next(batches)
    assert len(set(first.tolist())) == 2
    others = np.setdiff1d(np.arange(6), first)
    theirs.put(["stage"], [digests[i] for i in others], [np.ones((4, 3), np.float32)])
    assert list(batches) == []  # somebody has done the rest
    ((found, (values,)),) = ours.read(["stage"], digests)
    assert_array_equal(found, others)
    assert_array_equal(values, np.ones((4, 3)))


@both
def test_a_folder_that_cannot_keep_features(make, images, tmp_path):
    (tmp_path / "skdeepad-features.sqlite").write_text("something else " * 100)
    with pytest.raises(ValueError, match=r"memory=.*Remove that file"):
        output(make(memory=tmp_path).fit(images["grey"][0]), images["grey"][0])


# ---------------------------------------------------------------- scikit-learn's tools


def test_grid_search_in_processes(textures, image_files):
    y = textures.y_test
    grid = {
        "knnscorer__n_neighbors": [1, 2],
        "backbonefeatures__stages": ["stage1", "stage3"],
    }
    cv = KFold(2, shuffle=True, random_state=1)
    found = [
        GridSearchCV(knn(), grid, scoring="roc_auc", cv=cv, n_jobs=n_jobs)
        .fit(X, y)
        .cv_results_["mean_test_score"]
        for X, n_jobs in (
            (textures.X_test, None),
            (textures.X_test, 2),
            (image_files.test, 2),
        )
    ]
    assert len(set(found[0])) > 1
    assert_array_equal(found[1], found[0])
    assert_array_equal(found[2], found[0])


@pytest.mark.parametrize("make", FROZEN.values(), ids=FROZEN)
def test_cross_validation_on_paths(make, textures, image_files):
    X, y = image_files.test, textures.y_test
    cv = StratifiedKFold(2, shuffle=True, random_state=1)
    on_arrays, on_paths = (
        cross_val_score(make(), rows, y, cv=cv, scoring="roc_auc")
        for rows in (textures.X_test, np.array(X, dtype=object))
    )
    assert_array_equal(on_paths, on_arrays)
    assert np.isfinite(on_paths).all()


def test_a_pipeline_with_memory_computes_features_once(images, passes, tmp_path):
    train, test = images["grey"]
    pipeline = Pipeline(
        [("features", features()), ("pca", PCA(3)), ("knn", KNNScorer())],
        memory=str(tmp_path),
    )
    expected = pipeline.fit(train).score_samples(test)
    assert passes() == len(train) + len(test)
    pipeline.set_params(knn__n_neighbors=1, pca__n_components=2).fit(train)
    assert passes() == 0
    pipeline.set_params(knn__n_neighbors=2, pca__n_components=3).fit(train)
    # PCA rounds by the layout in memory, which joblib does not keep
    assert_allclose(pipeline.score_samples(test), expected, rtol=1e-5)


@every_estimator
def test_html_representation(make, images):
    estimator = make()
    behind_features = isinstance(estimator, Pipeline | BackboneFeatures)
    assert ("BackboneFeatures" in estimator._repr_html_()) == behind_features
    assert "efficientnet" not in repr(estimator)  # defaults are not shown
    estimator.fit(images["grey"][0])._repr_html_()


# ------------------------------------------------------------------------- progress


def test_a_bar_where_it_is_asked_for(images, capfd):
    train, test = images["grey"]
    mahalanobis().fit(train).score_samples(test)
    assert capfd.readouterr() == ("", "")
    mahalanobis(verbose=True).fit(train).score_samples(test)
    out, err = capfd.readouterr()
    assert out == ""
    assert "MahalanobisFeatureScorer" in err
    assert "12/12" in err
    assert "6/6" in err


class Recorder:
    """A callback of scikit-learn's that remembers what it was told."""

    def __init__(self):
        self.told = []

    def setup(self, estimator, context):
        self.told.append("setup")

    def teardown(self, estimator, context):
        self.told.append("teardown")

    def on_fit_task_begin(self, estimator, context):
        self.told.append(f"begin {context.task_name} {context.task_id}")

    def on_fit_task_end(self, estimator, context):
        self.told.append(f"end {context.task_name} {context.task_id}")


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_callbacks_hear_of_every_batch(method, images):
    pytest.importorskip("sklearn.callback", reason="scikit-learn before 1.9")
    train, test = images["grey"]
    recorder = Recorder()
    detector = mahalanobis(batch_size=5).set_callbacks(recorder)
    getattr(detector, method)(train)
    batches = [f"{word} batch {i}" for i in range(3) for word in ("begin", "end")]
    expected = ["setup", "begin fit 0", *batches, "end fit 0", "teardown"]
    assert recorder.told == expected
    scores = detector.score_samples(test)
    assert recorder.told == expected  # only fitting is told
    assert_array_equal(pickle.loads(pickle.dumps(detector)).score_samples(test), scores)
    assert_array_equal(clone(detector).fit(train).score_samples(test), scores)
    assert recorder.told == 2 * expected  # a clone keeps its callbacks


def test_callbacks_are_dismissed_where_fit_fails(corrupt):
    pytest.importorskip("sklearn.callback", reason="scikit-learn before 1.9")
    recorder = Recorder()
    with pytest.raises(ValueError, match="3 of 60"):
        mahalanobis().set_callbacks(recorder).fit(corrupt.paths)
    assert recorder.told[0] == "setup"
    assert recorder.told[-1] == "teardown"


# ---------------------------------------------------------------------------- threads


@pytest.mark.parametrize("network", ["lite0", "tiny"])
def test_scoring_from_threads(network, images):
    """Also the first time, when the network is made ready."""
    train, test = images["paths"]
    estimator = mahalanobis(**NETWORKS[network]).fit(train)
    expected = estimator.score_samples(test)
    fresh = mahalanobis(**NETWORKS[network]).fit(train)
    scores, start = {}, threading.Barrier(3)

    def score(i, rows):
        start.wait()
        for _ in range(3):
            scores[i] = fresh.score_samples(rows)

    rows = [test, test[::-1], test[1:5]]
    threads = [threading.Thread(target=score, args=args) for args in enumerate(rows)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, part in enumerate([expected, expected[::-1], expected[1:5]]):
        assert_allclose(scores[i], part, rtol=1e-10)


# ---------------------------------------------------------------------- contamination


@pytest.mark.parametrize(
    "scorer",
    [
        KNNScorer(),
        KMeansScorer(random_state=0),
        CentroidScorer(),
        GaussianScorer(),
        GaussianScorer("diagonal"),
    ],
)
def test_contamination_is_the_share_of_new_images_flagged(scorer, many_features):
    train, test = many_features
    shares = [
        (clone(scorer).set_params(contamination=share).fit(train).predict(test) == -1)
        for share in (0.1, 0.3)
    ]
    # 200 images each: a standard deviation of the share is 0.03 and 0.046
    assert 0.02 < shares[0].mean() < 0.2
    assert 0.17 < shares[1].mean() < 0.45


@pytest.fixture(scope="module")
def many_features():
    """Features of 400 patches of one texture, parted at random."""
    X = make_texture_defects(
        n_train=400, n_test_good=0, n_test_defective=0, image_size=32, random_state=0
    ).X_train
    given = features(stages=STAGES, batch_size=32).fit_transform(X)
    return given[:200], given[200:]


def test_defects_are_found(textures):
    """The whole thing does what it is for."""
    detector = mahalanobis(stages=("stage3", "stage4")).fit(textures.X_train)
    scores = detector.score_samples(textures.X_test)
    assert anomaly_roc_auc_score(textures.y_test, scores) > 0.7
