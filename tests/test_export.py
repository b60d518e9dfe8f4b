"""export_onnx and skdeepad.runtime: files score like the detectors that they are of."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fixtures.make_onnx import FOLDER, NAMES, NEW
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from torch import nn
from torch.nn import functional as F

import skdeepad
from skdeepad import export_onnx
from skdeepad.backbones import Backbone
from skdeepad.export import ExportError
from skdeepad.runtime import ModelError, load

STAGES = ("one", "two", "three")


def stage(before, after, stride):
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride, 1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )


def network(channels=3, **options):
    """A small network with BatchNorm, whose weights are always the same."""
    stages = {
        "one": stage(channels, 6, 2),
        "two": stage(6, 8, 2),
        "three": stage(8, 10, 2),
    }
    backbone = Backbone(
        stages,
        in_channels=channels,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        **options,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in [*backbone.parameters(), *backbone.buffers()]:
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator) / 2)
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.abs_().add_(0.3)
                module.weight.abs_().add_(0.5)
    return backbone.frozen()


def common(**options):
    return {
        "backbone": network(),
        "image_size": 32,
        "precision": "float32",
        "contamination": 0.1,
        "random_state": 0,
        **options,
    }


def features(**options):
    return skdeepad.BackboneFeatures(
        network(), stages=STAGES, image_size=32, precision="float32", **options
    )


def mahalanobis(**options):
    return skdeepad.MahalanobisFeatureScorer(**common(**options))


def panda(**options):
    return skdeepad.PANDAEstimator(
        **common(trainable_stages="three", max_steps=6, batch_size=8, **options)
    )


def cloner(**options):
    return skdeepad.KDClonerEstimator(
        **common(stages=STAGES, max_steps=6, batch_size=8, **options)
    )


def patches(**options):
    return skdeepad.PatchDetector(**common(**{"stages": ("one", "two"), **options}))


def hsc(**options):
    return skdeepad.HSCClassifier(**common(max_steps=5, **options))


def open_set(**options):
    return skdeepad.OpenSetClassifier(**common(max_steps=5, **options))


def svdd(kind=skdeepad.DeepSVDD, **options):
    stages = {
        "convolution": nn.Sequential(
            nn.Conv2d(3, 6, 5, 2, 2, bias=False), nn.LeakyReLU(), nn.MaxPool2d(2)
        ),
        "linear": nn.Sequential(nn.Flatten(), nn.Linear(384, 12, bias=False)),
    }
    short = {"pretrain_steps": 0, "max_steps": 3, "batch_size": 16}
    backbone = Backbone(stages, in_channels=3)
    return kind(**common(backbone=backbone, **short, **options))


MASK = np.zeros((32, 32))
MASK[6:, :20] = 1

DETECTORS = {
    "mahalanobis": mahalanobis(),
    "mahalanobis of each stage": mahalanobis(joint=False, covariance="diagonal"),
    "PANDA as it is": panda(adaptation=None),
    "PANDA, early": panda(scorer="knn"),
    "PANDA, ses": panda(adaptation="ses", n_checkpoints=2),
    "PANDA, outlier exposure": panda(adaptation="outlier_exposure"),
    "cloner": cloner(),
    "cloner, residuals": cloner(discrepancy="mahalanobis"),
    "cloner, direction": cloner(loss="direction", localization="gradient"),
    "patches": patches(),
    "patches, reweighted": patches(
        aggregation="reweighted", metric="euclidean", scale_positions=False
    ),
    "patches, gaussian, mask": patches(scorer="gaussian", mask=MASK, n_features=9),
    "patches, shared": patches(
        scorer="gaussian", positions="shared", aggregation="max", sigma=0
    ),
    "HSC": hsc(),
    "HSC, bce": hsc(objective="bce", trainable_stages="three", normal_label="good"),
    "DeepSVDD": svdd(),
    "DeepSVDD, soft": svdd(objective="soft-boundary", warm_up_steps=1),
    "DeepSVDD, contrast": svdd(contrast_normalization=True),
    "DeepSAD": svdd(skdeepad.DeepSAD),
    "open set": open_set(),
    "open set, members": open_set(n_members=2, anomaly_score="energy"),
    "Gaussian": make_pipeline(features(), skdeepad.GaussianScorer("oas")),
    "class Gaussian": make_pipeline(
        features(grid=2), PCA(5), skdeepad.ClassGaussianScorer(relative=True)
    ),
    "kNN": make_pipeline(features(), skdeepad.KNNScorer(3, aggregation="kth")),
    "whitened kNN": make_pipeline(features(), skdeepad.KNNScorer(metric="mahalanobis")),
    "cosine kNN": make_pipeline(features(), skdeepad.KNNScorer(metric="cosine")),
    "centroid": make_pipeline(
        features(), StandardScaler(), skdeepad.CentroidScorer(metric="cosine")
    ),
    "k-means": make_pipeline(
        features(), PCA(4, whiten=True), skdeepad.KMeansScorer(3, random_state=0)
    ),
    "whitening": make_pipeline(
        features(), skdeepad.GaussianScorer(), skdeepad.CentroidScorer()
    ),
    "ensemble": skdeepad.DetectorEnsemble(
        [("a", mahalanobis()), ("b", mahalanobis(image_size=(24, 20)))]
    ),
    "ensemble of ranks": skdeepad.DetectorEnsemble(
        [("a", mahalanobis()), ("b", patches(stages="two"))],
        scale="rank",
        weights=[1, 3],
    ),
    "largest": skdeepad.DetectorEnsemble(
        [("a", mahalanobis()), ("b", patches(stages="two"))], combine="max"
    ),
    "largest of ranks": skdeepad.DetectorEnsemble(
        [("a", mahalanobis()), ("b", mahalanobis(stages="two"))],
        scale="rank",
        combine="max",
    ),
    "conformal": skdeepad.ConformalDetector(
        make_pipeline(features(), skdeepad.KNNScorer()), method="split", random_state=0
    ),
    "robust": skdeepad.RobustDetector(
        mahalanobis(), training_contamination=0.1, random_state=0
    ),
}


def labels_for(name, photos):
    """What `fit` wants to know of the photos."""
    if name == "HSC, bce":
        return np.where(np.arange(len(photos)) % 5, "good", "other")
    if name.startswith(("HSC", "PANDA, out", "DeepSAD")):
        return np.where(np.arange(len(photos)) % 5, 1, -1)
    if name.startswith(("open", "class")):
        return np.arange(len(photos)) % 3
    return None


@pytest.fixture(scope="session")
def exported(photos, tmp_path_factory):
    """Give a fitted detector and its file, loaded; each is made once."""
    folder, made = tmp_path_factory.mktemp("onnx"), {}

    def get(name):
        if name not in made:
            path = folder / f"{name}.onnx"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                detector = DETECTORS[name].fit(photos, labels_for(name, photos))
            export_onnx(detector, path)
            made[name] = detector, load(path, threads=1), path
        return made[name]

    return get


@pytest.fixture(scope="session")
def new(photos):
    """Seven images that no detector was fitted to, of shape (7, 32, 32, 3)."""
    turned = np.flip(photos[::6], axis=2).astype(int)
    noise = np.random.default_rng(0).integers(-20, 20, turned.shape)
    return np.clip(turned + noise, 0, 255).astype(np.uint8)[:7]


def resized(images, size):
    values = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)
    found = F.interpolate(values, size, mode="bilinear", antialias=True)
    return found.permute(0, 2, 3, 1).numpy().round().astype(np.uint8)


NEAR_0 = (
    *("HSC, bce", "class Gaussian", "ensemble"),
    *("DeepSVDD, contrast", "DeepSVDD, soft"),
)
SIZES = {"native": (32, 32), "larger": (70, 48), "smaller": (20, 20), "odd": (33, 57)}


@pytest.mark.parametrize("name", DETECTORS)
def test_scores_are_the_detectors(name, exported, new):
    detector, model, _ = exported(name)
    for size in SIZES.values():
        colour = resized(new, size)
        for X in (colour, colour[..., 1], colour[:1] / 255):
            expected = detector.score_samples(X)
            # of scores that are small differences of large numbers
            atol = 1e-4 * np.abs(detector.score_samples(colour)).max()
            found = model.score_samples(X)
            assert_allclose(found, expected, rtol=1e-5, atol=atol * (name in NEAR_0))


@pytest.mark.parametrize("name", DETECTORS)
def test_decisions_are_the_detectors(name, exported, new, photos):
    detector, model, _ = exported(name)
    X = np.concatenate([new, 255 - new, new // 2])
    expected = detector.decision_function(X)
    assert_allclose(
        model.decision_function(X), expected, atol=2e-5 * np.abs(expected).max() + 2e-5
    )
    scores = detector.score_samples(X)
    last = detector[-1] if hasattr(detector, "steps") else detector
    clear = np.abs(scores - last.offset_) > 1e-4 * np.abs(scores).max()
    assert_array_equal(model.predict(X)[clear], detector.predict(X)[clear])
    if hasattr(last, "p_values"):
        of_scores = last._p_values(scores)
        assert_allclose(model.p_values(X), of_scores, atol=1.01 / 30)
        assert (model.p_values(X) == of_scores).mean() > 0.8


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [n for n in DETECTORS if n[:4] in ("clon", "patc")])
def test_maps_are_the_detectors(name, size, exported, new):
    detector, model, _ = exported(name)
    X = resized(new, SIZES[size])[:3]
    if getattr(detector, "localization", "discrepancy") != "discrepancy":
        with pytest.raises(ValueError, match="gives no map"):
            model.anomaly_map(X)
        return
    expected = detector.anomaly_map(X)
    assert_allclose(model.anomaly_map(X), expected, atol=1e-4 * expected.max())


# the graph alone


def test_the_graph_takes_batches_and_its_inputs_have_defaults(exported, new):
    import onnxruntime

    detector, model, path = exported("mahalanobis")
    session = onnxruntime.InferenceSession(path)
    images = new.astype(np.float32)
    score, decision, label = session.run(
        ["score", "decision", "label"], {"images": images}
    )
    assert_allclose(score, detector.score_samples(new), rtol=1e-5)
    assert_allclose(decision, score - detector.offset_, rtol=1e-12)
    assert_array_equal(label, np.where(decision >= 0, 1, -1))
    moved = {"images": images, "threshold": np.array(score[0])}
    assert session.run(["decision"], moved)[0][0] == 0
    # each passes alone in the runtime
    assert_array_equal(model.score_samples(new[3:4]), model.score_samples(new)[3:4])


def test_metadata_says_what_made_the_file(exported):
    detector, model, path = exported("patches")
    told = json.loads(onnx.load(path).metadata_props[0].value)
    assert told["class"] == "PatchDetector"
    assert exported("kNN")[1].metadata["parts"][1:] == ["BackboneFeatures", "KNNScorer"]
    assert told["versions"]["skdeepad"] == skdeepad.__version__
    assert told["image_sizes"] == [[32, 32]]
    assert told["contamination"] == 0.1
    assert told["map_threshold"] == detector.map_offset_
    again = exported("patches, shared")[1]
    assert again.metadata["weights"] != told["weights"]
    assert "PatchDetector" in repr(model)


def test_thresholds_are_those_of_recalibrate(exported, photos, new):
    detector, model, _ = exported("mahalanobis")
    other = skdeepad.MahalanobisFeatureScorer(**common()).fit(photos)
    other.recalibrate(contamination=0.5)
    assert model.thresholds[0.5] == other.offset_
    before = model.threshold
    assert before == detector.offset_
    try:
        model.threshold = model.thresholds[0.5]
        assert_array_equal(model.predict(new), other.predict(new))
    finally:
        model.threshold = before
    assert min(model.thresholds) == 0.05  # 40 images do not tell of fewer


def test_open_set_tells_known_from_unknown(exported, new):
    detector, model, _ = exported("open set")
    assert_array_equal(model.predict_known(new), detector.predict_known(new))


# what the runtime takes


def test_files_folders_and_images_of_many_sizes(exported, new, tmp_path):
    detector, model, _ = exported("mahalanobis")
    alpha = np.dstack([new[0], np.full((32, 32), 90, np.uint8)])
    deep = (new[1, ..., 0].astype(np.uint16) * 257) // 2
    made = {
        "a.png": Image.fromarray(new[0]),
        "b.jpg": Image.fromarray(resized(new[1:2], (50, 41))[0]),
        "c.png": Image.fromarray(alpha),
        "d.png": Image.fromarray(deep),
        "e.png": Image.fromarray(new[2]).convert("P"),
        "f.tif": Image.fromarray((new[3, ..., 1] / 255).astype(np.float32)),
        "g.bmp": Image.fromarray(new[4, ..., 0] > 127),
    }
    for name, image in made.items():
        image.save(tmp_path / name)
    rotated = Image.fromarray(resized(new[5:6], (20, 44))[0])
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "h.jpg", exif=exif)
    expected = detector.score_samples(tmp_path)
    assert len(expected) == 8
    assert_allclose(model.score_samples(tmp_path), expected, rtol=1e-5)
    files = sorted(tmp_path.iterdir())
    assert_allclose(model.score_samples(files), expected, rtol=1e-5)
    assert_allclose(model.score_samples(str(files[1])), expected[1:2], rtol=1e-5)
    arrays = [new[0], new[1, :20], deep, alpha, new[2] / 255.0, rotated]
    assert_allclose(
        model.score_samples(arrays), detector.score_samples(arrays), rtol=1e-5
    )


def test_maps_of_images_of_many_sizes(exported, new):
    detector, model, _ = exported("patches")
    arrays = [new[0], new[1, :20], new[2, :, 3:]]
    for ours, theirs in zip(
        model.anomaly_map(arrays), detector.anomaly_map(arrays), strict=True
    ):
        assert_allclose(ours, theirs, atol=1e-4 * theirs.max())


def test_white_and_layout_are_the_detectors(photos, new, tmp_path):
    deep = photos.astype(np.uint16) * 16
    detector = mahalanobis(white=4080, image_shape=(3, 32, 32)).fit(deep)
    export_onnx(detector, tmp_path / "deep.onnx")
    model = load(tmp_path / "deep.onnx")
    for X in (
        new.astype(np.uint16) * 16,
        new,
        new.transpose(0, 3, 1, 2),
        new.transpose(0, 3, 1, 2).reshape(7, -1) / 255,
    ):
        assert_allclose(model.score_samples(X), detector.score_samples(X), rtol=1e-5)


def test_networks_of_grey_images(photos, new, tmp_path):
    grey = photos.mean(axis=3).astype(np.uint8)
    detector = mahalanobis(backbone=network(1)).fit(grey)
    export_onnx(detector, tmp_path / "grey.onnx")
    model = load(tmp_path / "grey.onnx")
    for X in (new[..., 0], new):
        assert_allclose(model.score_samples(X), detector.score_samples(X), rtol=1e-5)


def test_unreadable_images(exported, new, tmp_path):
    _, model, path = exported("mahalanobis")
    Image.fromarray(new[0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    X = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "missing.png"]
    with pytest.raises(ValueError, match=r"b\.png' \(X\[1\]\) cannot be read"):
        model.score_samples(X)
    night = load(path, on_error="skip")
    assert_array_equal(np.isnan(night.score_samples(X)), [False, True, True])
    assert_array_equal(night.predict(X)[1:], [-1, -1])
    assert_array_equal(np.isnan(night.p_values(X)), [False, True, True])


@pytest.mark.parametrize(
    ("X", "message"),
    [
        ([], "X is empty"),
        (np.zeros((2, 5)), "images are"),
        (np.full((2, 8, 8), 300), "pixels from 300"),
        (np.full((2, 8, 8), np.nan), "NaN"),
        (np.zeros((32, 32, 3), np.uint8), r"pass X\[None\]"),
        (["nowhere.png"], "cannot be read"),
        ([object()], "no image"),
        (np.zeros((2, 0, 5), np.uint8), "0 pixels"),
    ],
)
def test_what_is_no_image(X, message, exported):
    with pytest.raises(ValueError, match=message):
        exported("mahalanobis")[1].score_samples(X)


# what is no model


def test_files_that_are_no_exported_detector(exported, tmp_path):
    path = exported("mahalanobis")[2]
    whole = path.read_bytes()
    damaged = tmp_path / "damaged.onnx"
    for content in (b"", b"no model", whole[: len(whole) // 2], whole[:-200]):
        damaged.write_bytes(content)
        with pytest.raises(ModelError, match="cannot be read as an ONNX"):
            load(damaged)
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, damaged)
    with pytest.raises(ModelError, match="not of a detector"):
        load(damaged)
    for told in ("[", "3", "{}", '{"format": 1}'):
        onnx.helper.set_model_props(model, {"skdeepad": told})
        onnx.save(model, damaged)
        with pytest.raises(ModelError):
            load(damaged)
    onnx.helper.set_model_props(model, {"skdeepad": '{"format": 99}'})
    onnx.save(model, damaged)
    with pytest.raises(ModelError, match="later version"):
        load(damaged)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing.onnx")
    with pytest.raises(ValueError, match="on_error"):
        load(path, on_error="ignore")


# what is not exported


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        (patches(scorer=LocalOutlierFactor(novelty=True)), "only scorer='memory'"),
        (patches(tile_size=16), "with tile_size"),
        (open_set(perturbation=0.01), "needs gradients"),
        (make_pipeline(features(), IsolationForest(random_state=0)), "IsolationForest"),
        (
            make_pipeline(features(), MinMaxScaler(), skdeepad.KNNScorer()),
            "MinMaxScaler in a pipeline",
        ),
        (panda(scorer=IsolationForest(random_state=0)), "IsolationForest"),
    ],
)
def test_what_cannot_be_exported_says_why(detector, message, photos, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector.fit(photos, np.arange(len(photos)) % 3)
    with pytest.raises(ExportError, match=message):
        export_onnx(detector, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_vectors_and_strangers_are_refused(tmp_path):
    X = np.random.default_rng(0).normal(size=(30, 4))
    vectors = skdeepad.MahalanobisFeatureScorer("mlp", random_state=0).fit(X)
    strangers = IsolationForest().fit(X)
    for detector in (vectors, strangers, skdeepad.KNNScorer().fit(X)):
        with pytest.raises(ExportError):
            export_onnx(detector, tmp_path / "x.onnx")
    with pytest.raises(ValueError, match="not fitted"):
        export_onnx(mahalanobis(), tmp_path / "x.onnx")


def test_a_file_that_is_there_is_kept(exported, tmp_path):
    detector, _, _ = exported("mahalanobis")
    path = tmp_path / "x.onnx"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export_onnx(detector, path)
    assert path.read_bytes() == b"mine"
    export_onnx(detector, path, overwrite=True)
    load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.onnx"]


def test_what_was_fitted_in_bfloat16_is_warned_of(photos, tmp_path):
    detector = mahalanobis(precision="bfloat16").fit(photos)
    with pytest.warns(UserWarning, match="bfloat16"):
        export_onnx(detector, tmp_path / "x.onnx")


# without torch


def test_a_process_that_scores_has_neither_torch_nor_sklearn(exported, new, tmp_path):
    detector, _, path = exported("patches")
    np.save(tmp_path / "X.npy", new)
    code = f"""
import sys, numpy as np
from skdeepad.runtime import load
X = np.load({str(tmp_path / "X.npy")!r})
print(*load({str(path)!r}).score_samples(X))
print(*{{name.partition(".")[0] for name in sys.modules}})
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    scores, modules = process.stdout.splitlines()
    assert_allclose(
        [float(s) for s in scores.split()], detector.score_samples(new), rtol=1e-5
    )
    assert not {"torch", "sklearn", "scipy", "onnx", "torchvision"} & set(
        modules.split()
    )


# files and packages of other versions


@pytest.mark.parametrize("name", NAMES)
def test_files_of_earlier_versions_score_as_they_did(name):
    model = load(FOLDER / f"{name}.onnx")
    with np.load(FOLDER / f"{name}.npz") as expected:
        assert_allclose(model.score_samples(NEW), expected["score"], rtol=1e-5)
        assert_allclose(model.p_values(NEW), expected["p"], atol=1e-6)
        if "map" in expected:
            top = expected["map"].max()
            assert_allclose(model.anomaly_map(NEW), expected["map"], atol=1e-4 * top)


def test_the_package_of_the_runtime_alone():
    root = Path(skdeepad.__file__).parents[1]
    texts = [root / "pyproject.toml", root / "packaging/runtime/pyproject.toml"]
    whole, alone = (tomllib.loads(p.read_text(encoding="utf-8")) for p in texts)
    assert alone["project"]["version"] == whole["project"]["version"]
    names = {re.match(r"[\w-]+", d)[0] for d in alone["project"]["dependencies"]}
    assert names == {"numpy", "onnxruntime", "pillow"}
    # each of its files stands alone, wherever the folder lies
    wheel = alone["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for source in wheel:
        assert (root / "packaging/runtime" / source).exists()
    for path in (root / "skdeepad/runtime").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2
                assert not (node.module or "").startswith("skdeepad")


def test_a_copy_of_the_runtime_scores(tmp_path):
    shutil.copytree(Path(skdeepad.__file__).parent / "runtime", tmp_path / "alone")
    code = f"""
import sys
sys.modules["skdeepad"] = None
from alone import load
print(load({str(FOLDER / "patches.onnx")!r}))
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
