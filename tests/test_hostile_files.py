"""Forged files are refused: they run nothing, and cost no more than they hold."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import tracemalloc
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_BZIP2, ZIP_DEFLATED

import numpy as np
import pytest
from forgery import Forge, archive_of, by_deepcopy, by_enum, parts, real_files, signed

from skdeepad import load
from skdeepad.persistence import LoadError

LINEAR = "torch.nn.modules.linear:Linear"
IDENTITY = "torch.nn.modules.linear:Identity"
KNN = "skdeepad.scorers._knn:KNNScorer"
PIPELINE = "sklearn.pipeline:Pipeline"
NEIGHBORS = "sklearn.neighbors._unsupervised:NearestNeighbors"
TO_MAP = "skdeepad.backbones._structure:_tokens_to_map"


def refused(data, match=None, **options):
    with pytest.raises(LoadError, match=match):
        load(BytesIO(data), **options)


# ways to run something


@pytest.mark.parametrize("forged", [by_enum, by_deepcopy])
def test_the_ways_in_of_earlier_versions(forged, tmp_path):
    """With version 0.1.0 as it first was, both ran the command."""
    refused(forged(f"touch {tmp_path / 'ran'}"))
    assert not list(tmp_path.iterdir())


def of_class(kind):
    return lambda f: f.instance(kind)


def with_attribute(name, value=None, kind=KNN):
    return lambda f: f.instance(kind, **{name: value and value(f)})


def in_backbone(**attributes):
    def forge(f):
        return f.features(f.backbone(**{k: v(f) for k, v in attributes.items()}))

    return forge


def layer(f):
    return f.identity()


def named(name):
    return lambda f: f.add(named=name)


def partial(function, arguments=(), **keywords):
    def forge(f):
        given = f.add(tuple=[value(f) for value in arguments])
        return f.add(partial=[function(f), given, f.dict(**keywords)])

    return forge


def holding(value):
    return lambda f: f.holding(value(f))


UNTRUSTED = [
    "timm.layers.hybrid_embed:HybridEmbed",
    "timm.models._features_fx:GraphExtractNet",
    "timm.models._features:FeatureDictNet",
    "torchvision.models._utils:IntermediateLayerGetter",
    "torch.nn.modules.module:Module",
    "torch.nn.modules.lazy:LazyModuleMixin",
    "torch.nn.modules.transformer:Transformer",
    "torch.nn.parallel.data_parallel:DataParallel",
    "torch.nn:Linear",  # lives elsewhere
    "timm.models.resnet:partial",
    "timm.models.vision_transformer:Mlp",  # lives elsewhere
    "skdeepad:KNNScorer",
    "skdeepad.features:BaseEstimator",
    "skdeepad.features:StageCache",
    "skdeepad.cache:StageCache",
    "skdeepad.backbones._plain:SavedBackbone",
    "skdeepad.augmentation:RotationAndScaling",
    "skdeepad.persistence._reader:Reader",
    "skdeepad.scorers._knn:KNNScorer.fit",
    "skdeepad.nothing:__class__",
    "sklearn.pipeline:Pipeline.fit",
    "sklearn.svm._classes:OneClassSVM",
    "sklearn.tree._classes:DecisionTreeClassifier",
    "sklearn.ensemble._iforest:IsolationForest",
    "sklearn.neighbors._kde:KernelDensity",
    "functools:partial",
    "builtins:type",
]


@pytest.mark.parametrize("name", UNTRUSTED)
@pytest.mark.parametrize("kind", ["class", "named", "enum"])
def test_classes_are_trusted_one_by_one(name, kind):
    forge = Forge()
    if kind == "class":
        root = forge.holding(forge.instance(name))
    elif kind == "named":
        root = forge.holding(forge.add(named=name))
    else:
        root = forge.holding(forge.add(enum=name, value=1))
    refused(forge.file(root), "which is not trusted")


GADGETS = {
    # names that Python looks for, or that hide what a class does
    "deepcopy": with_attribute("__deepcopy__"),
    "class": with_attribute("__class__"),
    "dict": with_attribute("__dict__"),
    "reduce": with_attribute("__reduce_ex__"),
    "clone": with_attribute("__sklearn_clone__"),
    "method": with_attribute("score_samples"),
    "private method": with_attribute("_set_offset"),
    "constraints": with_attribute("_parameter_constraints"),
    "constant": with_attribute("_has_end", kind="skdeepad.features:BackboneFeatures"),
    "link in HTML": with_attribute("_doc_link_module", lambda f: "skdeepad"),
    "template of links": with_attribute("_doc_link_template", lambda f: "<script>"),
    "the same in private": with_attribute("__doc_link_template"),
    "property": with_attribute("named_steps", kind=PIPELINE),
    "no identifier": with_attribute("a b"),
    "no name": with_attribute(""),
    "long name": with_attribute(1000 * "a"),
    "forward": lambda f: f.holding(f.identity(forward=1)),
    "compiled call": lambda f: f.holding(f.identity(_compiled_call_impl=1)),
    "modules": lambda f: f.module(
        "torch.nn.modules.container:ModuleList", modules=f.add(list=[])
    ),
    "hooks": lambda f: f.holding(f.identity(_forward_hooks=f.dict())),
    "twice": lambda f: f.add(
        **{"class": KNN}, attributes=[["offset_", 0.0], ["offset_", 1.0]]
    ),
    # names of layers
    "source": lambda f: f.sequential(**{'a", 1) or ("': f.identity()}),
    "dots": lambda f: f.sequential(**{"a.b": f.identity()}),
    "line": lambda f: f.sequential(**{"a\nb": f.identity()}),
    "layer named forward": lambda f: f.sequential(forward=f.identity()),
    "layer named training": lambda f: f.sequential(training=f.identity()),
    "layer named deepcopy": lambda f: f.sequential(__deepcopy__=f.identity()),
    # things in places where other things belong
    "loader": in_backbone(_loader=lambda f: f.add(tuple=["x", f.add(tuple=[])])),
    "layer as data": in_backbone(to_map=layer),
    "layer as neighbors": with_attribute("_neighbors", layer),
    "layer as step": with_attribute(
        "steps", lambda f: f.add(list=[layer(f)]), PIPELINE
    ),
    "layer as parameter": holding(layer),
    "function as parameter": holding(named(TO_MAP)),
    "estimator as layer": lambda f: f.sequential(a=f.instance(KNN)),
    "data as layer": lambda f: f.sequential(a=f.add(list=[])),
    "array as weight": lambda f: f.module(LINEAR, weight=f.array([1.0])),
    "layers that are a module": lambda f: f.instance(
        IDENTITY, _modules=f.module("torch.nn.modules.container:ModuleDict")
    ),
    # calls
    "partial of a class": holding(partial(named(KNN))),
    "partial of a layer": in_backbone(to_map=partial(layer)),
    "partial of data": in_backbone(to_map=partial(lambda f: f.add(list=[]))),
    "partial with a layer": in_backbone(to_map=partial(named(TO_MAP), [layer])),
    "function that is not listed": in_backbone(
        to_map=named("skdeepad.backbones._structure:to_backbone")
    ),
    "loader of networks": in_backbone(
        to_map=named("skdeepad.backbones._pretrained:_shared")
    ),
    "network of no one": lambda f: f.features(f.add(pretrained="os", digest="")),
    "network from the hub": lambda f: f.features(
        f.add(pretrained="timm/hf-hub:someone/something", digest="")
    ),
    "enum that is none": lambda f: f.add(
        enum="torch.nn.modules.batchnorm:BatchNorm1d", value=300_000_000
    ),
    "enum without that": lambda f: f.holding(
        f.add(enum="timm.layers.format:Format", value="os")
    ),
    # values that are not what they say
    "reference to nothing": lambda f: f.holding([10**6]),
    "reference from the end": lambda f: f.holding([-1]),
    "reference to itself": lambda f: f.holding([0]),
    "reference to two": lambda f: f.holding([0, 0]),
    "reference by truth": lambda f: (f.add(list=[]), f.holding([False]))[1],
    "object in place": lambda f: f.holding({"list": []}),
    "number": lambda f: f.holding(f.add(float="1_0")),
    "dtype": lambda f: f.holding(f.add(numpy_dtype="O")),
    "dtype of two": lambda f: f.holding(f.add(numpy_dtype="i4,O")),
    "torch's load as dtype": lambda f: f.holding(f.add(torch_dtype="torch.load")),
    "list as key": lambda f: f.holding(f.add(dict=[[f.add(list=[]), 0]])),
    "tuple in a set": lambda f: f.holding(f.add(set=[f.add(tuple=[])])),
    "large integer as key": lambda f: f.holding(f.add(dict=[[2**61 * 8, 0]])),
    "number of 80 bits as key": lambda f: f.holding(
        f.add(set=[f.add(scalar=f.array(np.longdouble(1)) and 0)])
    ),
    "scalar of many": lambda f: f.holding(f.add(scalar=f.array([1.0, 2.0]) and 0)),
}


@pytest.mark.parametrize("gadget", GADGETS.values(), ids=GADGETS)
def test_gadgets_are_refused(gadget):
    forge = Forge()
    # for what it is, before it is seen that the file's root is no estimator
    refused(forge.file(gadget(forge)), "^(?!The file holds no estimator)")


def test_what_is_like_them_and_right_is_loaded():
    forge = Forge()
    to_map = partial(named(TO_MAP), prefix=1, grid=None)(forge)
    weight = forge.tensor(np.ones((4, 4)))
    stage = forge.module(
        LINEAR, in_features=4, out_features=4, weight=weight, bias=None
    )
    data = forge.file(forge.features(forge.backbone(stage=stage, to_map=to_map)))
    np.testing.assert_array_equal(load(BytesIO(data)).transform(np.ones((2, 4))), 4)


# values that compiled code would take on trust


def neighbors(f, **changed):
    told = {"n_neighbors": 1, "radius": 1.0, "algorithm": "brute", "leaf_size": 30}
    told |= {"metric": "euclidean", "metric_params": None, "p": 2, "n_jobs": None}
    told |= {"n_features_in_": 4, "_fit_X": np.ones((3, 4)), "n_samples_fit_": 3}
    told |= {"effective_metric_": "euclidean", "_fit_method": "brute", "_tree": None}
    told |= changed
    told["_fit_X"] = f.array(told["_fit_X"])
    return f.instance(NEIGHBORS, effective_metric_params_=f.dict(), **told)


def clusters(f, **changed):
    told = {"n_clusters": 2, "n_features_in_": 4, "_n_threads": 1}
    told |= {"cluster_centers_": np.ones((2, 4))} | changed
    told["cluster_centers_"] = f.array(told["cluster_centers_"])
    return f.instance("sklearn.cluster._kmeans:KMeans", **told)


def covariance(f, d=4):
    kind = "sklearn.covariance._empirical_covariance:EmpiricalCovariance"
    given = {"store_precision": True, "location_": f.array(np.ones(4))}
    return f.instance(
        kind, **given, precision_=f.array(np.ones((d, d))), n_features_in_=4
    )


def random_state(f, position=0, n=624):
    state = f.add(tuple=["MT19937", f.array(np.ones(n, "u4")), position, 0, 0.0])
    return f.holding(f.add(random_state=state))


UNFIT = [
    lambda f: neighbors(f, _fit_X=np.ones((3, 2))),
    lambda f: neighbors(f, n_samples_fit_=10**6),
    lambda f: neighbors(f, _fit_X=np.full((3, 4), "a")),
    lambda f: neighbors(f, _fit_method="kd_tree"),
    lambda f: neighbors(f, effective_metric_="mahalanobis"),
    lambda f: clusters(f, cluster_centers_=np.ones((2, 1))),
    lambda f: clusters(f, n_clusters=10**6),
    lambda f: covariance(f, d=1),
    lambda f: random_state(f, position=10**6),
    lambda f: random_state(f, position=-1),
    lambda f: random_state(f, n=3),
    lambda f: f.features(
        f.backbone(
            stage=f.module(
                LINEAR, in_features=4, out_features=4, weight=f.tensor(np.ones((4, 9)))
            )
        )
    ),
]


@pytest.mark.parametrize("unfit", UNFIT)
def test_values_that_do_not_fit_are_refused(unfit):
    forge = Forge()
    refused(forge.file(unfit(forge)))


@pytest.mark.parametrize("fit", [neighbors, clusters, covariance, random_state])
def test_values_that_fit_are_loaded(fit):
    forge = Forge()
    load(BytesIO(forge.file(fit(forge))))


def test_processes_are_as_many_as_there_are_processors():
    forge = Forge()
    loaded = load(BytesIO(forge.file(neighbors(forge, n_jobs=10**9))))
    assert loaded.n_jobs == os.cpu_count()


# what would cost more than the file


def nested(kind, depth, twice=False):
    forge = Forge()
    inner = forge.add(**{kind: []})
    for _ in range(depth):
        inner = forge.add(**{kind: [inner, inner] if twice else [inner]})
    return forge.file(forge.holding(inner))


def compressed(method):
    members = parts(real_files()[0])
    members["manifest.json"] = b" " * 50_000_000 + members["manifest.json"]
    return archive_of(members.items(), method)


def of_members(n):
    return archive_of(
        [*parts(real_files()[0]).items(), *((f"{i}", b"") for i in range(n))]
    )


def one_member_often(n):
    """List the first member again and again in the archive's directory."""
    data = real_files()[0][:-64]
    end = data[-22:]
    size, start = struct.unpack("<2L", end[12:20])
    directory = data[start : start + size]
    first = directory[: 46 + struct.unpack("<H", directory[28:30])[0]]
    many = n * first + directory
    entries = min(n + 3, 65535)
    end = end[:8] + struct.pack("<2H2L", entries, entries, len(many), start) + end[20:]
    return signed(data[:start] + many + end)


def manifest_of(text):
    members = parts(real_files()[0])
    return archive_of((members | {"manifest.json": text}).items())


def shaped(items, shape):
    forge = Forge()
    return forge.file(forge.holding(forge.add(objects=items, shape=shape)))


def lists_in_array(n, length):
    forge = Forge()
    inner = forge.add(list=length * [0])
    array = forge.add(objects=n * [inner], shape=[n])
    return forge.file(forge.holding(forge.add(dict=[[array, 0]])))


def array_header(shape, dtype="<f8"):
    members = parts(real_files()[1])
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode()
    return archive_of((members | {"arrays/0.npy": content}).items())


def tensor_header(n):
    members = parts(real_files()[0])
    content = struct.pack("<Q", n) + b" " * 100
    return archive_of((members | {"tensors.safetensors": content}).items())


def same_hashes(n):
    forge = Forge()
    keys = [i * (2**61 - 1) for i in range(8, n)]
    return forge.file(forge.holding(forge.add(set=keys)))


BOMBS = {
    "bzip2": lambda: compressed(ZIP_BZIP2),
    "deflate": lambda: compressed(ZIP_DEFLATED),
    "members": lambda: of_members(30_000),
    "one member often": lambda: one_member_often(15_000),
    "one member very often": lambda: one_member_often(200_000),
    "shape of objects": lambda: shaped([None], [400_000_000]),
    "shape without end": lambda: shaped([None], [2**62, 2**62]),
    "shape of many sides": lambda: shaped([None], 300_000 * [9]),
    "negative shape": lambda: shaped([None], [-1]),
    "lists in an array": lambda: lists_in_array(1000, 100_000),
    "array of nothing": lambda: array_header("(999999999999,)", "<U0"),
    "array of more than there is": lambda: array_header("(999999999999,)"),
    "array of structures": lambda: array_header("(1,)", "<f8', 'x': '"),
    "list of tensors": lambda: tensor_header(2**62),
    "pairs in a set": lambda: nested("frozenset", 60, twice=True),
    "pairs of tuples": lambda: nested("tuple", 60, twice=True),
    "pairs of lists": lambda: nested("list", 60, twice=True),
    "deep tuples": lambda: nested("tuple", 30_000),
    "deeper tuples": lambda: nested("tuple", 200_000),
    "deep JSON": lambda: manifest_of(b"[" * 1_000_000),
    "wide JSON": lambda: manifest_of(b"[" + b"[]," * 10_000_000 + b"[]]"),
    "many objects": lambda: manifest_of(
        json.dumps(
            {"format": 1, "made_with": {}, "objects": 99_000 * [{"list": []}]}
        ).encode()
    ),
    "equal hashes": lambda: same_hashes(40_000),
    "long number": lambda: manifest_of(b'{"format": ' + b"1" * 900_000 + b"}"),
    "no number": lambda: manifest_of(b'{"format": NaN}'),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused_at_once(bomb):
    data = bomb()
    tracemalloc.start()
    try:
        start = time.process_time()
        refused(data)
        seconds = time.process_time() - start
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seconds < 4  # tracing makes it several times slower
    assert peak < 5 * len(data) + 2**26


@pytest.mark.parametrize("name", ["a" * 900_000, "a\ud800:B", "\x1b[31m:B", "a\nb:B"])
def test_names_in_messages_are_short_and_printable(name):
    forge = Forge()
    with pytest.raises(LoadError, match=r"not trusted|a{1000}") as error:
        load(BytesIO(forge.file(forge.instance(name))))
    message = str(error.value)
    assert message.isprintable()
    assert len(message) <= 2000


def test_members_in_one_another_are_refused():
    inner = archive_of([("manifest.json", b"{}")])[:-64]
    data = bytearray(real_files()[0][:-64])
    assert inner[:4] == b"PK\x03\x04"
    start = struct.unpack("<L", data[-6:-2])[0]
    at = data.index(b"PK\x01\x02", start)
    size = struct.pack("<L", len(data) - 200)  # of the first member: nearly all
    data[at + 20 : at + 28] = size + size
    refused(signed(bytes(data)))


# places on the machine of whoever wrote the file


@pytest.mark.parametrize(
    ("name", "place"),
    [("memory", "cache"), ("weights", "weights.pth"), ("weights", None)],
)
def test_places_do_not_come_back(name, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forge = Forge()
    place = forge.add(path=str(tmp_path / "x")) if place is None else place
    data = forge.file(forge.features(forge.backbone(), **{name: place}))
    with pytest.warns(UserWarning, match=f"{name}=.* was set to None"):
        loaded = load(BytesIO(data))
    assert getattr(loaded, name) is None
    loaded.transform(np.ones((3, 4)))
    assert not list(tmp_path.iterdir())


# mutations


def test_mutated_files_run_nothing():
    """Thousands more: benchmarks/hostile.py."""
    code = """
import json, sys
import hypothesis, numpy
from hypothesis import strategies as st
import forgery

guard = forgery.Guard()
members = [forgery.parts(data) for data in forgery.real_files()]

@hypothesis.given(st.data())
@hypothesis.settings(
    max_examples=600, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
def fuzz(data):
    choose = lambda below: data.draw(st.integers(0, below - 1))
    changed = forgery.mutate_members(members[choose(len(members))], choose)
    found = guard.run(forgery.archive_of(changed.items()))
    assert found.startswith(("score", "load: LoadError")), found
    assert not guard.seen, guard.seen

fuzz()
print(json.dumps(guard.outcomes))
"""
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert told.returncode == 0, told.stderr
    outcomes = json.loads(told.stdout)
    assert outcomes["scored"] > 30  # it is not all refused at the gate
    assert outcomes["load: LoadError"] > 300
