"""`save` and `load`: what is written, what is refused, and that nothing is executed."""

from __future__ import annotations

import json
import pickle
import runpy
import sys
import warnings
from collections import OrderedDict
from functools import partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
import pytest
import torch
from estimators import PUBLIC
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.cluster import KMeans
from sklearn.covariance import LedoitWolf
from sklearn.ensemble import IsolationForest
from sklearn.exceptions import InconsistentVersionWarning
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch import nn

import skdeepad
from skdeepad import (
    BackboneFeatures,
    DeepSVDD,
    GaussianScorer,
    HSCClassifier,
    KDClonerEstimator,
    KNNScorer,
    MahalanobisFeatureScorer,
    OpenSetClassifier,
    PANDAEstimator,
    load,
    save,
)
from skdeepad.backbones import list_backbones
from skdeepad.backbones._pretrained import EMBEDDED, TORCHVISION, make_pretrained
from skdeepad.persistence import LoadError, _registry

X = np.random.default_rng(0).normal(size=(40, 5))


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


def make_doubling():
    return Doubling()


def saved(estimator):
    file = BytesIO()
    save(estimator, file)
    return file.getvalue()


def again(estimator, **options):
    return load(BytesIO(saved(estimator)), **options)


def holding(value):
    """Make an estimator whose parameter is this value."""
    return FunctionTransformer(kw_args=value)


# what is written


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([torch.float32, torch.bfloat16, np.dtype("i2"), Path("a", "b")])
    | hnp.arrays(
        hnp.boolean_dtypes() | hnp.floating_dtypes() | hnp.unicode_string_dtypes(),
        hnp.array_shapes(min_dims=0, min_side=0),
    )
    | hnp.from_dtype(np.dtype("f4"))
)
KEYS = st.text() | st.integers(1 - 2**63, 2**63 - 1) | st.floats(allow_nan=False)
NESTED = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict)
        | st.frozensets(KEYS, max_size=3)
    ),
    max_leaves=8,
)


def assert_same(a, b):
    """Compare values whose equality NumPy makes hard to tell, by type and content."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list | tuple):
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, float | np.floating):
        assert repr(a) == repr(b)
    else:
        assert a == b


@given(NESTED)
def test_values_come_back(value):
    assert_same(again(holding(value)).kw_args, value)


def test_more_values_come_back():
    rng = np.random.RandomState(0)
    names = np.array([["a", None], [("b", 1), 2.5]], dtype=object)
    tensor = torch.arange(6.0).view(2, 3).T.bfloat16()
    parameter = nn.Parameter(torch.ones(2), requires_grad=False)
    pairs = np.empty(2, dtype=object)
    pairs[0], pairs[1] = ("a", 1), ("b", 2)
    assert again(holding(pairs)).kw_args.tolist() == pairs.tolist()
    given_ = rng, names, tensor, parameter, torch.Size([1, 2]), {1, "a"}
    back = again(holding(given_)).kw_args
    assert [type(value) for value in back] == [type(value) for value in given_]
    assert back[0].randint(2**31) == rng.randint(2**31)
    assert back[1].tolist() == names.tolist()
    assert torch.equal(back[2], tensor) and back[2].dtype == torch.bfloat16
    assert back[2].stride() == tensor.stride()  # products round by it
    assert not back[3].requires_grad
    assert back[4:] == given_[4:]


def test_the_same_estimator_gives_the_same_file():
    assert saved(GaussianScorer().fit(X)) == saved(GaussianScorer().fit(X))


def test_what_was_shared_is_shared():
    array = np.zeros(1000)
    one = again(holding([array, {"again": array}])).kw_args
    assert one[0] is one[1]["again"]
    assert len(saved(holding([array] * 9))) < 2 * array.nbytes


def test_pretrained_weights_are_written_by_name(textures):
    pipeline = make_pipeline(
        BackboneFeatures(image_size=32), StandardScaler(), KNNScorer()
    ).fit(textures.X_train)
    data = saved(pipeline)
    gallery = 24 * 1280 * 8
    assert len(data) < 1.2 * gallery  # the network alone has 13 MB
    loaded = load(BytesIO(data))
    assert loaded[0].backbone_ is pipeline[0].backbone_
    np.testing.assert_array_equal(
        loaded.score_samples(textures.X_test), pipeline.score_samples(textures.X_test)
    )


def test_other_pretrained_weights_are_told(textures, monkeypatch):
    data = saved(BackboneFeatures(image_size=32).fit(textures.X_train))
    monkeypatch.setattr(_registry, "weights_digest", lambda _: "others")
    with pytest.raises(LoadError, match="'efficientnet_lite0' on this machine are not"):
        load(BytesIO(data))


def test_missing_pretrained_weights_are_told(textures, monkeypatch):
    data = saved(BackboneFeatures(image_size=32).fit(textures.X_train))

    def none_here(_):
        raise FileNotFoundError("The pretrained weights are not on this machine.")

    monkeypatch.setattr(_registry, "load_backbone", none_here)
    with pytest.raises(FileNotFoundError, match="not on this machine"):
        load(BytesIO(data))


def test_trained_networks_are_written_whole():
    detector = KDClonerEstimator(max_steps=3, random_state=0).fit(X)
    detector.cloner_.register_forward_hook(lambda *_: 1 / 0)
    loaded = again(detector)
    assert not loaded.cloner_._forward_hooks
    cloned = detector.cloner_.state_dict()
    for name, value in loaded.cloner_.state_dict().items():
        assert torch.equal(value, cloned[name])
    # one network, whoever holds it
    shared = {id(p) for p in loaded._network.parameters()}
    assert shared >= {id(p) for p in loaded.cloner_.parameters()}


@pytest.mark.filterwarnings("ignore:There is random noise is used")
def test_own_networks_need_trust():
    module = nn.Sequential(OrderedDict(twice=Doubling(), out=nn.Linear(5, 3)))
    for backbone in (module, Doubling, make_doubling):
        detector = HSCClassifier(
            backbone, trainable_stages=None, max_steps=3, random_state=0
        ).fit(X)
        data = BytesIO(saved(detector))
        with pytest.raises(LoadError, match=r"names .*oubling, which is not trusted"):
            load(data)
        loaded = load(data, trusted=[Doubling, make_doubling])
        np.testing.assert_array_equal(
            loaded.score_samples(X + 1), detector.score_samples(X + 1)
        )


@pytest.mark.parametrize(
    ("held", "told"),
    [
        (IsolationForest(n_estimators=2).fit(X), r"\._tree|\.tree_|estimators_\[0\]"),
        ((part for part in X), "a builtins:generator"),
        ({"a": [memoryview(b"")]}, r"kw_args\['a'\]\[0\] cannot be saved"),
        (np.random.default_rng(), "Generator"),
    ],
    ids=["forest", "generator", "memoryview", "rng"],
)
def test_what_is_more_than_data_is_refused(held, told, tmp_path):
    file = tmp_path / "file"
    save(KNNScorer(), file)
    with pytest.raises(TypeError, match=told):
        save(holding(held), file)
    assert isinstance(load(file), KNNScorer)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_holds_itself_is_refused():
    value = []
    value.append(value)
    with pytest.raises(TypeError, match="holds itself"):
        saved(holding(value))
    with pytest.raises(TypeError, match="not a scikit-learn estimator"):
        saved(nn.Linear(1, 1))


def test_files(tmp_path, monkeypatch):
    file = tmp_path / "scorer"
    scorer = GaussianScorer().fit(X)
    save(scorer, str(file))
    before = file.read_bytes()
    np.testing.assert_array_equal(load(file).score_samples(X), scorer.score_samples(X))
    with file.open("rb") as stream:
        assert load(stream).offset_ == scorer.offset_

    def interrupt(path, data):
        path.open("wb").write(data[:10])
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", interrupt)
        with pytest.raises(OSError, match="full"):
            save(scorer.fit(X[:20]), file)
    assert file.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")


def test_another_scikit_learn_is_told():
    data = edit(saved(KMeans(2).fit(X)), made_with={"scikit-learn": "1.2.3"})
    with pytest.warns(InconsistentVersionWarning, match=r"KMeans from version 1\.2\.3"):
        load(BytesIO(data))
    data = edit(saved(GaussianScorer().fit(X)), made_with={"scikit-learn": "1.2.3"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing in it is scikit-learn's
        load(BytesIO(data))


# what is not a file of ours


def parts(data):
    with ZipFile(BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(members, compression=ZIP_STORED):
    """Make a file with these members, and a digest that is right."""
    file = BytesIO()
    with ZipFile(file, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
        archive.comment = bytes(64)
    data = file.getvalue()[:-64]
    return data + sha256(data).hexdigest().encode()


def edit(data, **changed):
    members = parts(data)
    manifest = json.loads(members["manifest.json"]) | changed
    members["manifest.json"] = json.dumps(manifest)
    return archive_of(members.items())


FILE = saved(make_pipeline(StandardScaler(), GaussianScorer()).fit(X))
NETWORK = saved(
    HSCClassifier(max_steps=1, random_state=0).fit(X, np.repeat([1, -1], 20))
)


def refused(data, match=None):
    with pytest.raises(LoadError, match=match):
        load(BytesIO(data))


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data):
    refused(data)
    refused(data + sha256(data).hexdigest().encode())


@given(st.sampled_from([FILE, NETWORK]), st.data())
def test_a_flipped_bit_is_noticed(data, draw):
    damaged = bytearray(data)
    damaged[draw.draw(st.integers(0, len(data) - 1))] ^= 1 << draw.draw(
        st.integers(0, 7)
    )
    refused(bytes(damaged), "damaged")


@given(st.integers(0, len(FILE) - 1))
def test_a_truncated_file_is_noticed(n):
    refused(FILE[:n], "damaged")
    refused(FILE[n + 1 :], "damaged")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=5,
)


def mutate(value, draw):
    """Change something, somewhere in a manifest."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 9)):
        at = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else
                                  range(len(value))))  # fmt: skip
        value[at] = mutate(value[at], draw)
        return value
    return draw(JSON | st.sampled_from([[0], [10**6], [-1], {"array": 10**9}]))


def load_or_refuse(data):
    """Read a hostile file: it may be right by chance, but there is one error only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InconsistentVersionWarning)
            load(BytesIO(data))
    except LoadError:
        return False
    return True


@given(st.sampled_from([FILE, NETWORK]), st.data())
@settings(max_examples=200)
def test_a_tampered_manifest_is_refused(data, draw):
    members = parts(data)
    manifest = json.loads(members["manifest.json"])
    for _ in range(draw.draw(st.integers(1, 3))):
        manifest = mutate(manifest, draw.draw)
    members["manifest.json"] = json.dumps(manifest)
    load_or_refuse(archive_of(members.items()))


@given(st.sampled_from([FILE, NETWORK]), st.data())
def test_tampered_members_are_refused(data, draw):
    members = parts(data)
    name = draw.draw(st.sampled_from(sorted(members)))
    content = bytearray(members[name])
    at = draw.draw(st.integers(0, min(200, len(content) - 1)))  # where headers are
    content[at : at + 1] = draw.draw(st.binary(max_size=4))
    members[name] = bytes(content)
    load_or_refuse(archive_of(members.items()))


@pytest.mark.parametrize(
    "name", ["../../arrays/0.npy", "/etc/passwd", "\\\\x", "arrays/../manifest.json"]
)
def test_members_outside_are_refused(name):
    members = [*parts(FILE).items(), (name, b"")]
    refused(archive_of(members), "outside")


def test_odd_archives_are_refused():
    members = parts(FILE)
    refused(archive_of(members.items(), ZIP_DEFLATED), "is compressed")
    refused(archive_of([*members.items(), ("more", b"")]), "KeyError")
    for name in members:
        fewer = {other: members[other] for other in members if other != name}
        refused(archive_of(fewer.items()))
    refused(edit(FILE, root=None), "holds no estimator")
    refused(edit(FILE, objects=[{"lambda": 0}]), "'lambda', which is unknown")


def test_a_newer_format_is_told():
    data = edit(FILE, format=2, made_with={"skdeepad": "9.9"}, objects="of the future")
    refused(data, r"written by skdeepad 9\.9, in a format newer .* upgrade")


def test_arrays_are_as_large_as_they_say():
    members = parts(FILE)
    shape = b"(5,), }" + 12 * b" "
    name = next(name for name, content in members.items() if shape in content)
    many = b"(999999999999,), }".ljust(len(shape))
    members[name] = members[name].replace(shape, many)
    refused(archive_of(members.items()), "has not the")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_pickles_are_not_read(tmp_path):
    went_off = tmp_path / "bomb"
    pickle.loads(pickle.dumps(Bomb(went_off)))
    assert went_off.exists()
    went_off.unlink()

    members = parts(FILE)
    pickled = BytesIO()
    np.save(pickled, np.array([Bomb(went_off)], dtype=object), allow_pickle=True)
    for name in members:
        for content in (pickled.getvalue(), pickle.dumps(Bomb(went_off))):
            refused(archive_of((members | {name: content}).items()))
    assert not went_off.exists()


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "builtins:eval",
        "subprocess:Popen",
        "antigravity:fly",  # opens a browser on import
        "torch:load",
        "torch.hub:load",
        "joblib:load",
        "sklearn.base:clone",
        "sklearn.externals:array_api_extra",
        "skdeepad.persistence:load",
        "skdeepad.cache:StageCache",
        "skdeepad.persistence:os.system",
        "skdeepad.persistence:no",
        "skdeepad.none:no",
        "tests.test_persistence:Bomb",
    ],
)
@pytest.mark.parametrize("kind", ["class", "named", "partial"])
def test_names_are_not_called(name, kind):
    sys.modules.pop("antigravity", None)
    objects = [{"named": name}, {"tuple": []}, {"dict": []}]
    objects.append({"partial": [[0], [1], [2]]})
    if kind == "class":
        objects = [{"class": name, "attributes": []}]
    objects.append({"class": "sklearn.pipeline:Pipeline", "attributes": []})
    objects[-1]["attributes"] = [["steps", [0]]]
    refused(edit(FILE, objects=objects, root=[len(objects) - 1]))
    assert "antigravity" not in sys.modules


def test_cuts_of_networks_come_back():
    """The functions that vision transformers' stages are made of."""
    timm = pytest.importorskip("timm")
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=2)
    features = BackboneFeatures(net, image_size=32, random_state=0)
    images = np.random.default_rng(0).random((4, 32, 32, 3), dtype=np.float32)
    features.fit(images)
    np.testing.assert_array_equal(
        again(features).transform(images), features.transform(images)
    )
    assert isinstance(again(features).backbone_.to_map, partial)


NETWORKS = [
    *(name for name in list_backbones() if name in TORCHVISION),
    *(name for name in list_backbones() if name in EMBEDDED),
    *("timm/resnet50", "timm/convnext_tiny", "timm/vit_tiny_patch16_224"),
    *("timm/mobilenetv3_small_050", "timm/tf_efficientnet_b0"),
]


@pytest.mark.parametrize("name", NETWORKS)
def test_all_layers_of_named_networks_are_known(name):
    with torch.device("meta"):  # without weights, which may be large
        network = make_pretrained(name, None)
    for module in network.modules():
        schema = _registry.find_schema(_registry.name_of(type(module)))
        assert schema.kind is type(module)
        attributes = vars(module).keys() - vars(nn.Module()).keys()
        assert all(map(schema.allows, attributes))
        for children in (module._modules, module._parameters, module._buffers):
            assert all(map(schema.allows_child, children))


IMAGES = np.random.default_rng(0).random((24, 28, 28), dtype=np.float32)
SMALL = {"backbone": "mnist_lenet", "max_steps": 2, "random_state": 0}


@pytest.mark.parametrize(
    "estimator",
    [
        PANDAEstimator(**SMALL, adaptation="outlier_exposure", scorer=KNNScorer()),
        DeepSVDD(**SMALL, contrast_normalization=True, pretrain_steps=2),
        HSCClassifier(**SMALL),
        OpenSetClassifier(**SMALL, head="cosine", n_members=2),
        KDClonerEstimator(**SMALL, discrepancy="mahalanobis"),
        MahalanobisFeatureScorer("mnist_lenet", covariance=LedoitWolf(), joint=False),
        BackboneFeatures("mnist_lenet", random_state=np.random.RandomState(0)),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
@pytest.mark.filterwarnings("ignore")  # two steps are few
def test_all_that_is_fitted_comes_back(estimator):
    fitted = estimator.fit(IMAGES, np.repeat([1, -1], [18, 6]))
    method = "score_samples" if hasattr(fitted, "score_samples") else "transform"
    loaded = again(fitted)
    new = IMAGES[:, ::-1]
    np.testing.assert_array_equal(
        getattr(loaded, method)(new), getattr(fitted, method)(new)
    )
    assert vars(loaded).keys() == vars(fitted).keys()


def test_parameters_that_are_new_have_their_defaults():
    """A file of an earlier version may lack them."""
    data = edit(FILE)
    members = parts(data)
    manifest = json.loads(members["manifest.json"])
    scorer = next(d for d in manifest["objects"] if "GaussianScorer" in str(d))
    scorer["attributes"] = [a for a in scorer["attributes"] if a[0] != "contamination"]
    data = edit(FILE, objects=manifest["objects"])
    assert load(BytesIO(data))[-1].contamination == GaussianScorer().contamination


def test_all_classes_that_are_missing_are_named():
    module = nn.Sequential(OrderedDict(twice=Doubling(), out=nn.Softmax(dim=1)))
    data = BytesIO(saved(BackboneFeatures(module).fit(X)))
    with pytest.raises(LoadError, match=r"trusted=\[Doubling, Softmax\]"):
        load(data)
    loaded = load(data, trusted=[Doubling, nn.Softmax])
    assert loaded.transform(X).shape == (40, 5)


@pytest.mark.parametrize("name", _registry.FOREIGN)
def test_listed_classes_are_there(name):
    assert _registry.find_schema(name)


# versions


FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize(
    "file",
    sorted([*FIXTURES.glob("*/*.pickle"), *FIXTURES.glob("*/*.skdeepad")]),
    ids=lambda file: "/".join(file.parts[-2:]),
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.InconsistentVersionWarning")
def test_estimators_of_earlier_versions(file):
    """See fixtures/make.py, which wrote them."""
    make = runpy.run_path(FIXTURES / "make.py")
    estimator = load(file) if file.suffix == ".skdeepad" else pickle.loads(
        file.read_bytes()
    )  # fmt: skip
    expected = json.loads((file.parent / "outputs.json").read_text())[file.stem]
    # rounding is a processor's own
    np.testing.assert_allclose(
        make["outputs"](estimator), expected, rtol=1e-3, atol=1e-5
    )


def test_this_version_is_guarded():
    since = {
        "ConformalDetector",
        "GEOMDetector",
        "MHRotDetector",
        "MSADEstimator",
        "PatchDetector",
        "RobustDetector",
        "RotNetDetector",
    }  # come with the next release
    estimators = sorted({public.__name__ for public in PUBLIC} - since)
    folder = FIXTURES / skdeepad.__version__
    for ending in ("pickle", "skdeepad"):
        assert sorted(file.stem for file in folder.glob(f"*.{ending}")) == estimators
