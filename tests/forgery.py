"""Forged files: what `load` withstands, for the tests and benchmarks/hostile.py."""

from __future__ import annotations

import copy
import json
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from hashlib import sha256
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import safetensors.numpy
import sklearn
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import skdeepad
from skdeepad import KNNScorer
from skdeepad.persistence._registry import FOREIGN, find_schema

FIXTURES = Path(__file__).parent / "fixtures"


def archive_of(members, compression=ZIP_STORED):
    """Make a file with these members, and a digest that is right."""
    file = BytesIO()
    with ZipFile(file, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
        archive.comment = bytes(64)
    return signed(file.getvalue()[:-64])


def signed(data):
    return data + sha256(data).hexdigest().encode()


def parts(data):
    with ZipFile(BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


class Forge:
    """A file that is written object by object, with whatever is wanted in it."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.arrays: list[Any] = []
        self.tensors: dict[str, Any] = {}

    def add(self, **description: Any) -> list[int]:
        self.objects.append(description)
        return [len(self.objects) - 1]

    def array(self, values: Any) -> list[int]:
        self.arrays.append(np.asarray(values))
        return self.add(array=len(self.arrays) - 1)

    def tensor(self, values: Any, parameter: bool = True) -> list[int]:
        key = str(len(self.tensors))
        self.tensors[key] = np.asarray(values, dtype=np.float32)
        order = list(range(self.tensors[key].ndim))
        return self.add(tensor=key, order=order, parameter=parameter, grad=False)

    def dict(self, **items: Any) -> list[int]:
        return self.add(dict=[[key, value] for key, value in items.items()])

    def instance(self, kind: str, **attributes: Any) -> list[int]:
        return self.add(**{"class": kind}, attributes=[*map(list, attributes.items())])

    def module(self, kind: str, layers: Any = (), **attributes: Any) -> list[int]:
        tensors = {k: attributes.pop(k) for k in ("weight", "bias") if k in attributes}
        return self.instance(
            kind,
            training=False,
            _parameters=self.dict(**tensors),
            _buffers=self.dict(),
            _non_persistent_buffers_set=self.add(set=[]),
            _is_full_backward_hook=None,
            _modules=self.add(dict=[list(item) for item in dict(layers).items()]),
            **attributes,
        )

    def sequential(self, **layers: Any) -> list[int]:
        return self.module("torch.nn.modules.container:Sequential", layers)

    def identity(self, **attributes: Any) -> list[int]:
        return self.module("torch.nn.modules.linear:Identity", **attributes)

    def backbone(self, **attributes: Any) -> list[int]:
        """A backbone of vectors with one stage that does nothing."""
        stage = attributes.pop("stage", None) or self.identity()
        told = {"input_size": None, "mean": self.add(tuple=[0.0])}
        told |= {"std": self.add(tuple=[1.0]), "in_channels": 4, "vectors": True}
        layers = {"head": attributes.pop("head", None)}
        told |= {"to_map": None, "_loader": None} | attributes
        stages = self.module("torch.nn.modules.container:ModuleDict", {"a": stage})
        kind = "skdeepad.backbones._backbone:Backbone"
        return self.module(kind, layers | {"stages": stages}, **told)

    def features(self, backbone: Any, **attributes: Any) -> list[int]:
        """A transformer that runs a backbone on vectors."""
        told = {"backbone": "mlp", "weights": "default", "stages": None, "grid": None}
        told |= {"image_size": None, "image_shape": None, "batch_size": 32}
        told |= {"memory": None, "on_error": "raise", "device": "cpu"}
        told |= {"precision": "float32", "random_state": 0, "verbose": False}
        told |= {"n_features_in_": 4, "backbone_": backbone, "image_size_": None}
        told |= {"_dtype": self.add(torch_dtype="torch.float32"), "_grid": None}
        told |= {"image_shape_in_": None, "stages_": self.add(tuple=["a"])}
        told |= {"_widths": self.add(list=[4])} | attributes
        return self.instance("skdeepad.features:BackboneFeatures", **told)

    def holding(self, value: Any) -> list[int]:
        """An estimator that holds a value."""
        kind = "sklearn.preprocessing._function_transformer:FunctionTransformer"
        return self.instance(kind, func=None, kw_args=value)

    def file(self, root: Any) -> bytes:
        versions = {"skdeepad": "0.1.0", "scikit-learn": sklearn.__version__}
        manifest = {"format": 1, "made_with": versions}
        manifest |= {"objects": self.objects, "root": root}
        members = [("manifest.json", json.dumps(manifest))]
        members.append(("tensors.safetensors", safetensors.numpy.save(self.tensors)))
        for i, array in enumerate(self.arrays):
            content = BytesIO()
            np.save(content, array)
            members.append((f"arrays/{i}.npy", content.getvalue()))
        return archive_of(members)


# The two ways in that version 0.1.0 had


def calling(forge: Forge, command: str) -> list[int]:
    """A module that runs a command when it is called.

    Names of layers are pasted into the source of what torch.fx traces.
    """
    code = tuple(f'__import__("os").system({command!r})'.encode())
    # in brackets, as torchvision takes it for a regular expression
    name = f'[a", eval(str(bytes({code}), "utf8"))) if 1 else ("]'
    traced = forge.sequential(**{name: forge.identity(), "b": forge.identity()})
    extract = forge.add(
        partial=[
            forge.add(named="timm.models._features_fx:GraphExtractNet"),
            forge.add(tuple=[traced, forge.dict(b="b")]),
            forge.dict(),
        ]
    )
    hybrid = forge.add(named="timm.layers.hybrid_embed:HybridEmbed")
    first = forge.identity(forward=extract)  # gives the traced module
    return forge.sequential(a=first, b=forge.identity(forward=hybrid))  # calls it


def by_enum(command: str) -> bytes:
    """Run a command while the file is read: "enum" called classes."""
    forge = Forge()
    kind = "timm.layers.hybrid_embed:HybridEmbed"
    forge.add(enum=kind, value=calling(forge, command))
    return forge.file(forge.holding(None))


def by_deepcopy(command: str) -> bytes:
    """Run a command when the estimator scores: it copies its network."""
    forge = Forge()
    arguments = forge.add(tuple=[calling(forge, command), 8])
    hybrid = forge.add(named="timm.layers.hybrid_embed:HybridEmbed")
    copier = forge.add(partial=[hybrid, arguments, forge.dict()])
    backbone = forge.backbone(stage=forge.identity(__deepcopy__=copier))
    return forge.file(forge.features(backbone))


# Mutations of real files: their structure, not their bytes

NAMES = (
    *("__deepcopy__", "__class__", "__dict__", "__reduce_ex__", "__getattr__"),
    *("forward", "score_samples", "_loader", "_modules", "_held_out", "offset_"),
    *("_forward_hooks", "stages", "to_map", "memory", "weights", "batch_size", "0"),
    *("_neighbors", "_fit_X", "_fit_method", "n_features_in_", 'a", b', "a.b", ""),
)
CLASSES = (
    *("os:system", "builtins:eval", "functools:partial", "torch:load", "torch:jit"),
    *("timm.models._features_fx:GraphExtractNet", "sklearn.base:clone"),
    *("timm.layers.hybrid_embed:HybridEmbed", "sklearn.svm._classes:OneClassSVM"),
    *("torch.nn.modules.linear:Identity", "torch.nn.modules.container:Sequential"),
    *("sklearn.neighbors._unsupervised:NearestNeighbors", "sklearn.pipeline:Pipeline"),
    *("sklearn.cluster._kmeans:KMeans", "skdeepad.scorers._knn:KNNScorer"),
    *("skdeepad.features:BackboneFeatures", "skdeepad.backbones._backbone:Backbone"),
    *("skdeepad.backbones._structure:_tokens_to_map", "timm.layers.format:Format"),
)
KINDS = (
    *("float", "array", "scalar", "objects", "tensor", "list", "tuple", "set", "dict"),
    *("torch_dtype", "numpy_dtype", "path", "random_state", "enum", "named", "class"),
    *("partial", "pretrained", "Size", "frozenset", "OrderedDict", "lambda"),
)
VALUES = (None, True, 0, -1, 1, 7, 10**6, 2**40, 10**30, 0.5, 1e308, "", "nan", "cuda")

Choose = Callable[[int], int]  # a number below another


def nodes_of(value: Any) -> list[tuple[Any, Any]]:
    """List the places in a manifest: a container and a key."""
    found = []
    todo = [value]
    while todo:
        container = todo.pop()
        keys = container if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                todo.append(container[key])
    return found


def mutate(manifest: dict[str, Any], choose: Choose) -> None:
    """Change something in a manifest: replace, delete, double, retarget, rename."""
    nodes = nodes_of(manifest["objects"])
    container, key = nodes[choose(len(nodes))]
    other, other_key = nodes[choose(len(nodes))]
    what = choose(8)
    if what == 0:
        container[key] = copy.deepcopy(other[other_key])
    elif what == 1:
        del container[key]
    elif what == 2 and isinstance(container, list):
        container.insert(choose(len(container) + 1), copy.deepcopy(container[key]))
    elif what == 3:
        container[key] = [choose(len(manifest["objects"]) + 1)]
    elif what == 4:
        container[key] = NAMES[choose(len(NAMES))]
    elif what == 5:
        container[key] = CLASSES[choose(len(CLASSES))]
    elif what == 6 and isinstance(container, dict):
        container[KINDS[choose(len(KINDS))]] = container.pop(key)
    else:
        container[key] = VALUES[choose(len(VALUES))]


def mutate_members(members: dict[str, bytes], choose: Choose) -> dict[str, bytes]:
    """Change a manifest in one place or two, and now and then arrays."""
    members = dict(members)
    manifest = json.loads(members["manifest.json"])
    for _ in range(1 + choose(2)):
        mutate(manifest, choose)
    members["manifest.json"] = json.dumps(manifest).encode()
    arrays = [name for name in members if name.startswith("arrays/")]
    if arrays and choose(3) == 0:
        name, other = arrays[choose(len(arrays))], arrays[choose(len(arrays))]
        members[name], members[other] = members[other], members[name]
    return members


# What happens when a file is loaded, and scored where it loads

EVENTS = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty."),
    *("os.mkdir", "os.remove", "os.rename", "shutil.", "socket.connect", "sqlite3."),
)


class Hang(BaseException):
    """A file that took too long."""


class Guard:
    """Bounds memory and time, and notes what hostile code would do.

    Python tells of it by its audit hooks.

    Parameters
    ----------
    memory : int
        Bytes that may be had beyond those of this process as it is.
    seconds : int
        For each file.
    """

    def __init__(self, memory: int = 2**30, seconds: int = 5) -> None:
        self.seconds = seconds
        self.seen: list[str] = []
        self.outcomes: dict[str, int] = {}
        self.watching = False
        for name in FOREIGN:  # imports compile, too
            find_schema(name)
        import_module("torch._subclasses.schema_check_mode")  # torch does so late
        for data in real_files():
            if self.run(data) != "scored":
                raise RuntimeError("A file that is right could not be scored with.")
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGALRM, self.stop)
        sys.addaudithook(self.audit)

    def stop(self, *_: Any) -> None:
        raise Hang

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.watching and (
            event.startswith(EVENTS)
            or (event == "open" and set(str(arguments[1])) & set("wax+"))
            or (event == "compile" and arguments[0] is not None)
        ):
            self.seen.append(f"{event}{arguments!r}"[:200])

    def run(self, data: bytes) -> str:
        """Load a file and score with it; give the outcome, which is counted, too."""
        self.watching = True
        signal.alarm(self.seconds)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = outcome(data)
        except Hang:
            found = "hang"
        finally:
            signal.alarm(0)
            self.watching = False
        self.outcomes[found] = self.outcomes.get(found, 0) + 1
        return found


def outcome(data: bytes) -> str:
    """Load a file, and score with it: "scored", or which error there was, and where."""
    try:
        estimator = skdeepad.load(BytesIO(data))
    except Exception as error:
        return f"load: {type(error).__name__}"
    try:
        use(estimator)
    except Exception as error:
        return f"score: {type(error).__name__}"
    return "scored"


def use(estimator: Any) -> None:
    """Do with an estimator what one does who believes in it."""
    X = np.cos(np.arange(20.0)).reshape(5, 4)
    repr(estimator)
    if hasattr(estimator, "score_samples"):
        estimator.score_samples(X)
        estimator.predict(X)
    else:
        estimator.transform(X)


def real_files() -> list[bytes]:
    """Give files to start from: one of each estimator, and of each kind of object."""
    files = [path.read_bytes() for path in sorted(FIXTURES.glob("*/*.skdeepad"))]
    forge = Forge()
    part = forge.instance(
        "skdeepad.backbones._backbone:Part",
        training=False,
        _parameters=forge.dict(),
        _buffers=forge.dict(),
        _modules=forge.dict(module=forge.identity()),
        step=forge.add(named="skdeepad.backbones._structure:_channels_to_front"),
    )
    function = forge.add(named="skdeepad.backbones._structure:_tokens_to_map")
    keywords = forge.dict(prefix=1, grid=forge.add(tuple=[2, 2]))
    to_map = forge.add(partial=[function, forge.add(tuple=[]), keywords])
    head = forge.sequential(a=part)
    files.append(forge.file(forge.features(forge.backbone(to_map=to_map, head=head))))
    X = np.sin(np.arange(160.0)).reshape(40, 4)
    members = StandardScaler(), PCA(3, whiten=True), KNNScorer(metric="cosine")
    file = BytesIO()
    skdeepad.save(make_pipeline(*members).fit(X), file)
    return [*files, file.getvalue()]
