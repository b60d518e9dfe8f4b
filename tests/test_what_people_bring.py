"""What people pass as X and y: each is right, or told in words that help."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.compose import make_column_transformer
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from skdeepad import (
    BackboneFeatures,
    ConformalDetector,
    HSCClassifier,
    KNNScorer,
    MahalanobisFeatureScorer,
)
from skdeepad.datasets import list_images

N = 24


class Network(nn.Sequential):
    """Takes grey or colour images of any size."""

    in_channels = 3

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )


class DataSet:
    """As torch's and Hugging Face's: read by position, and no sequence."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def make(**options):
    return MahalanobisFeatureScorer(
        **{
            **{"backbone": Network, "image_size": 16, "contamination": 0.2},
            **{"random_state": 0, **options},
        }
    )


@pytest.fixture(scope="module")
def images(photos):
    return photos[:N, :16, :16]


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    root = tmp_path_factory.mktemp("brought")
    (root / "night").mkdir()
    for i, image in enumerate(images):
        parent = root if i < 20 else root / "night"
        Image.fromarray(image).save(parent / f"{i:02}.{'PNG' if i % 2 else 'png'}")
    return root


@pytest.fixture(scope="module")
def paths(folder, images):
    # as numbered, whatever folder a file is in
    return sorted(map(str, list_images(folder)), key=lambda p: p.rsplit("/", 1)[1])


@pytest.fixture(scope="module")
def scores(images):
    return make().fit(images).score_samples(images)


def pictures(images):
    return list(map(Image.fromarray, images))


def polars(kind, values):
    return getattr(pytest.importorskip("polars"), kind)(values)


RIGHT = {
    "array": lambda x, p: x,
    "channels first": lambda x, p: np.moveaxis(x, -1, 1),
    "floats": lambda x, p: x / np.float32(255),
    "uint16": lambda x, p: x.astype(np.uint16) * 257,
    "tensor": lambda x, p: torch.from_numpy(x.copy()),
    "list of arrays": lambda x, p: list(x),
    "list of pictures": lambda x, p: pictures(x),
    "object array": lambda x, p: np.array([*x, None], dtype=object)[:-1],
    "two layouts": lambda x, p: [*x[:5], *np.moveaxis(x[5:], -1, 1)],
    "arrays and pictures": lambda x, p: [*x[:5], *pictures(x[5:])],
    "arrays, two types": lambda x, p: [*x[:5], *(x[5:] / 255).astype(np.float32)],
    "paths": lambda x, p: p,
    "array of paths": lambda x, p: np.array(p),
    "pandas column": lambda x, p: pd.Series(p),
    "pandas table": lambda x, p: pd.DataFrame({"path": p}),
    "pandas column of pictures": lambda x, p: pd.Series(pictures(x)),
    "polars column": lambda x, p: polars("Series", p),
    "polars table": lambda x, p: polars("DataFrame", {"path": p}),
    "data set": lambda x, p: DataSet(x),
    "data set of pairs": lambda x, p: DataSet([(image, 1) for image in pictures(x)]),
    "data set of paths": lambda x, p: DataSet([(path, 1) for path in p]),
    "data set of dicts": lambda x, p: DataSet(
        [{"image": image, "label": 1} for image in pictures(x)]
    ),
    "encoded dicts": lambda x, p: DataSet(
        [{"image": {"bytes": Path(q).read_bytes(), "path": None}} for q in p]
    ),
    "columns": lambda x, p: {"image": pictures(x), "label": [1] * len(x)},
    "list of pairs": lambda x, p: [(image, 1) for image in x],
    "torch data set": lambda x, p: TensorDataset(
        torch.from_numpy(np.moveaxis(x, -1, 1).copy()), torch.ones(len(x))
    ),
    "loader": lambda x, p: DataLoader(DataSet(x), batch_size=5),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right(name, images, paths, scores):
    X = RIGHT[name](images, paths)
    found = make().fit(X).score_samples(X)
    assert_allclose(found, scores, rtol=1e-5)
    # scored as another form than it was learnt from
    assert_allclose(make().fit(images).score_samples(X), scores, rtol=1e-5)


def test_a_folder(folder, images, scores):
    listed = list_images(folder)
    assert len(listed) == N
    assert len(list_images(folder, recursive=False)) == 20
    order = [int(path.stem) for path in listed]
    for X in (folder, str(folder), listed):
        assert_allclose(make().fit(X).score_samples(X), scores[order], rtol=1e-5)
    with pytest.raises(FileNotFoundError, match="no folder"):
        list_images(folder / "day")


@pytest.mark.parametrize("mix", ["sizes", "grey and colour", "palettes"])
def test_images_that_differ(mix, images, tmp_path):
    X = pictures(images)
    if mix == "sizes":
        X = [image.resize((16 + i, 40)) for i, image in enumerate(X)]
    elif mix == "grey and colour":
        X = [image.convert("L") if i % 2 else image for i, image in enumerate(X)]
    else:
        X = [image.quantize() if i % 2 else image for i, image in enumerate(X)]
    files = [tmp_path / f"{i}.png" for i in range(len(X))]
    for image, path in zip(X, files, strict=True):
        image.save(path)
    expected = make().fit(files).score_samples(files)
    forms = [X, DataSet(X)]
    if mix != "palettes":  # of which an array has numbers, but no colours
        forms.append([np.asarray(image) for image in X])
    for given in forms:
        assert_allclose(make().fit(given).score_samples(given), expected, rtol=1e-5)


def test_other_images_than_in_fit(images):
    model = make().fit(images)
    grey = np.asarray([image.convert("L") for image in pictures(images)])
    large = np.repeat(np.repeat(images, 2, axis=1), 2, axis=2)
    for X in (grey, large):
        assert np.isfinite(model.score_samples(X)).all()
        assert_allclose(
            model.score_samples(X), model.score_samples(pictures(X)), rtol=1e-5
        )
    with pytest.raises(ValueError, match=r"expecting images.*Set image_size"):
        make(image_size=None).fit(images).score_samples(large)


@pytest.mark.parametrize("form", ["array", "files"])
def test_cameras_of_twelve_bits(form, images, tmp_path):
    grey = images[..., 0].astype(np.uint16) * 16
    X = grey
    if form == "files":
        X = [tmp_path / f"{i}.png" for i in range(N)]
        for pixels, path in zip(grey, X, strict=True):
            Image.fromarray(pixels).save(path)
    with pytest.warns(UserWarning, match="set white=4095"):
        make().fit(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = make(white=4095).fit(X).score_samples(X)
    floats = grey / np.float32(4095)
    assert_allclose(found, make().fit(floats).score_samples(floats), rtol=1e-5)


def test_flattened_images_are_told_from_vectors(images):
    rows = images[..., 0].reshape(N, -1)
    with pytest.warns(UserWarning, match=r"set image_shape=\(16, 16\)"):
        BackboneFeatures().fit(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BackboneFeatures("mlp").fit(rows)
        BackboneFeatures().fit(rows / 255.0)


@pytest.mark.parametrize("kind", ["missing", "folder", "none", "damaged", "data set"])
def test_what_cannot_be_read_is_skipped(kind, images, paths, tmp_path):
    (tmp_path / "damaged.png").write_bytes(b"no image")
    bad = {"missing": "no/such.png", "folder": str(tmp_path), "none": None}
    bad["damaged"] = str(tmp_path / "damaged.png")
    X = [*paths[:3], bad.get(kind), *paths[3:]]
    X = DataSet(X) if kind == "data set" else X
    model = make(on_error="skip")
    with pytest.warns(UserWarning, match=r"1 of 25 .*X\[3\]"):
        model.fit(X)
    with pytest.warns(UserWarning, match=r"X\[3\]"):
        found = model.score_samples(X)
    assert_array_equal(np.flatnonzero(np.isnan(found)), [3])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        make().fit(X)
    assert "X[3]" in str(error.value)
    assert len(str(error.value)) < 500


def test_an_empty_night(images, tmp_path):
    model = make(on_error="skip").fit(images)
    for X in ([], np.array([], dtype=object), pd.Series([], dtype=object), tmp_path):
        assert model.score_samples(X).shape == model.predict(X).shape == (0,)
        with pytest.raises(ValueError, match="X is empty"):
            make(on_error="skip").fit(X)
        with pytest.raises(ValueError, match="X is empty"):
            make().fit(images).predict(X)


WRONG = {
    "bytes": (lambda x, p: [Path(q).read_bytes() for q in p], r"bytes \(X\[0\]\)"),
    "one array": (lambda x, p: x[0], r"pass X\[None\]"),
    "one picture": (lambda x, p: Image.fromarray(x[0]), r"pass \[X\]"),
    "one path": (lambda x, p: p[0], "pass a list of image paths"),
    "a URL": (lambda x, p: "https://example.org/a.png", "download"),
    "URLs": (lambda x, p: ["https://example.org/a.png"] * 30, "download"),
    "many missing files": (lambda x, p: ["no/" + "x" * 300] * 999, "999 of 999.*more"),
    "more columns": (
        lambda x, p: pd.DataFrame({"path": p, "size": 1}),
        r"'path' holds text.*X\['path'\]",
    ),
    "more columns, polars": (
        lambda x, p: polars("DataFrame", {"path": p, "size": [1] * len(p)}),
        r"'path' holds text.*X\['path'\]",
    ),
    "NaN pixels": (
        lambda x, p: np.where(
            np.arange(N)[:, None, None] == 7, np.nan, x[..., 0] / 256
        ),
        r"NaN.*X\[7\]",
    ),
    "NaN in one of a list": (
        lambda x, p: [np.full((5, 5), np.nan) if i == 7 else x[i] for i in range(N)],
        r"X\[7\].*NaN",
    ),
    "floats in 0..255": (lambda x, p: x.astype(float), "Divide X by its white"),
    "a generator": (lambda x, p: (image for image in x), r"pass list\(X\)"),
    "a shuffled loader": (
        lambda x, p: DataLoader(DataSet(x), shuffle=True),
        "shuffle=False",
    ),
    "two columns of images": (
        lambda x, p: DataSet([{"a": i, "b": i} for i in pictures(x)]),
        "Pass one column alone",
    ),
    "a data set of vectors": (lambda x, p: DataSet(np.ones((N, 9))), r"X\[0\]"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.filterwarnings("ignore")
def test_wrong(name, images, paths):
    make_x, message = WRONG[name]
    with pytest.raises(
        (ValueError, FileNotFoundError), match=f"(?s){message}"
    ) as error:
        make().fit(make_x(images, paths))
    assert len(str(error.value)) < 500


def test_a_network_at_another_size(images):
    with pytest.raises(ValueError, match=r"image_size=16.*image_size=224") as error:
        make(backbone="timm/vit_tiny_patch16_224", weights=None).fit(images)
    assert len(str(error.value)) < 500


def test_polars_through_scikit_learn(images, paths):
    pl = pytest.importorskip("polars")
    table = pl.DataFrame({"path": paths, "price": np.arange(N)})
    features = BackboneFeatures(Network, image_size=16, random_state=0)
    columns = make_column_transformer((features, ["path"]), ("passthrough", ["price"]))
    out = columns.set_output(transform="polars").fit_transform(table)
    assert isinstance(out, pl.DataFrame)
    expected = features.fit_transform(images)
    assert_allclose(out.to_numpy()[:, :-1], expected, rtol=1e-5, atol=1e-6)
    numbers = pl.DataFrame(expected[:, :3], schema=["a", "b", "c"])
    model = KNNScorer(contamination=0.2).fit(numbers)
    assert model.feature_names_in_.tolist() == ["a", "b", "c"]
    array = KNNScorer(contamination=0.2).fit(expected[:, :3])
    assert_array_equal(
        model.score_samples(numbers), array.score_samples(expected[:, :3])
    )


@pytest.mark.parametrize("form", ["folder", "data set"])
def test_meta_estimators_take_them_too(form, images, folder):
    X = folder if form == "folder" else DataSet(images)
    model = ConformalDetector(make(), cv=3, contamination=0.2).fit(X)
    assert model.score_samples(X).shape == (N,)


# ---------------------------------------------------------------------------------- y

LABELS = {
    "0 and 1": (0, 1),
    "is_defect": (False, True),
    "names": ("good", "scratch"),
    "1 and 2": (1, 2),
}


@pytest.fixture(scope="module")
def labelled():
    rng = np.random.default_rng(0)
    X = np.r_[rng.normal(size=(80, 6)), rng.normal(4, 1, (40, 6))]
    return X, np.repeat([1, -1], [80, 40])


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_never_inverted_in_silence(name, labelled):
    X, signs = labelled
    normal, anomalous = LABELS[name]
    y = np.where(signs == 1, normal, anomalous)
    options = {"max_steps": 30, "random_state": 0, "backbone": "mlp"}
    options["contamination"] = 0.2
    told = rf"{y.max() if y.dtype.kind != 'U' else 'scratch'}.*\(40 of 120 rows\)"
    with pytest.warns(UserWarning, match=told):
        HSCClassifier(**options).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plain = HSCClassifier(**options).fit(X, signs)
        model = HSCClassifier(normal_label=normal, **options).fit(X, y)
        found = cross_val_score(
            HSCClassifier(normal_label=normal, **options), X, y, cv=3, scoring="roc_auc"
        )
    assert_array_equal(model.score_samples(X), plain.score_samples(X))
    assert_array_equal(model.predict(X), np.where(plain.predict(X) == 1, *LABELS[name]))
    assert roc_auc_score(signs, model.score_samples(X)) > 0.9
    assert roc_auc_score(y, model.decision_function(X)) > 0.9
    assert roc_auc_score(y, model.predict_proba(X)[:, 1]) > 0.9
    assert found.min() > 0.9
    if y.dtype.kind != "U":
        with pytest.warns(UserWarning, match="is ignored"):
            KNNScorer().fit(X, y)
    else:
        with pytest.raises(ValueError, match=r"np\.where\(y == 'good', 1, -1\)"):
            KNNScorer().fit(X, y)


def test_a_normal_label_that_cannot_be(labelled):
    X, y = labelled
    with pytest.raises(ValueError, match="normal_label='ok' is not in y"):
        HSCClassifier("mlp", normal_label="ok").fit(X, y)
    with pytest.raises(ValueError, match="swap the signs"):
        HSCClassifier("mlp", normal_label=-1).fit(X, y)


def test_known_anomalies_among_rows_without_label(labelled):
    X, y = labelled
    marked = np.where(y == 1, 0, -1)
    assert_array_equal(
        KNNScorer().fit(X, marked).score_samples(X),
        KNNScorer().fit(X, y).score_samples(X),
    )
