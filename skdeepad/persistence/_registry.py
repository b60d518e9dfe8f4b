"""Which classes a file may hold, and what their attributes may be.

Every attribute may be plain data: numbers, text, arrays, tensors, and containers of
these. Nothing of that can be called. What else an attribute may hold is told for each
class, by `_saved` in the classes of this package and in the tables below for others.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from sklearn.base import BaseEstimator

# imported, so that `find_schema` finds what they hold
from .. import conformal, detectors, features, scorers  # noqa: F401
from ..backbones import Backbone, is_pretrained, load_backbone
from ..backbones._structure import SAVED_FUNCTIONS
from ..frozen import weights_digest

Held = tuple[type, ...]


SKLEARN: dict[str, dict[str, Held]] = {
    "sklearn.cluster._kmeans:KMeans": {},
    "sklearn.covariance._elliptic_envelope:EllipticEnvelope": {},
    "sklearn.covariance._empirical_covariance:EmpiricalCovariance": {},
    "sklearn.covariance._robust_covariance:MinCovDet": {},
    **{
        f"sklearn.covariance._shrunk_covariance:{name}": {}
        for name in ("LedoitWolf", "OAS", "ShrunkCovariance")
    },
    "sklearn.decomposition._pca:PCA": {},
    "sklearn.decomposition._truncated_svd:TruncatedSVD": {},
    "sklearn.feature_selection._variance_threshold:VarianceThreshold": {},
    "sklearn.frozen._frozen:FrozenEstimator": {"estimator": (BaseEstimator,)},
    "sklearn.impute._base:SimpleImputer": {},
    "sklearn.linear_model._base:LinearRegression": {},
    "sklearn.linear_model._logistic:LogisticRegression": {},
    "sklearn.linear_model._ridge:Ridge": {},
    "sklearn.neighbors._unsupervised:NearestNeighbors": {},
    "sklearn.pipeline:FeatureUnion": {"transformer_list": (BaseEstimator,)},
    "sklearn.pipeline:Pipeline": {"steps": (BaseEstimator,)},
    **{
        f"sklearn.preprocessing._data:{name}": {}
        for name in (
            *("MaxAbsScaler", "MinMaxScaler", "Normalizer", "QuantileTransformer"),
            *("RobustScaler", "StandardScaler"),
        )
    },
    "sklearn.preprocessing._data:PowerTransformer": {"_scaler": (BaseEstimator,)},
    "sklearn.preprocessing._function_transformer:FunctionTransformer": {},
}

# Layers, and the blocks that the networks of `list_backbones` are made of. None of them
# does more than to compute; some of timm's and torch's others trace or call what they
# are given.
MODULES = {
    "torch.nn.modules.activation": "ELU GELU Hardsigmoid Hardswish LeakyReLU ReLU "
    "ReLU6 SiLU Sigmoid Softplus Tanh",
    "torch.nn.modules.batchnorm": "BatchNorm1d BatchNorm2d",
    "torch.nn.modules.container": "ModuleDict ModuleList ParameterList Sequential",
    "torch.nn.modules.conv": "Conv2d ConvTranspose2d",
    "torch.nn.modules.dropout": "Dropout Dropout2d",
    "torch.nn.modules.flatten": "Flatten Unflatten",
    "torch.nn.modules.linear": "Identity Linear",
    "torch.nn.modules.normalization": "GroupNorm LayerNorm",
    "torch.nn.modules.pooling": "AdaptiveAvgPool2d AdaptiveMaxPool2d AvgPool2d "
    "MaxPool2d",
    "torch.nn.modules.upsampling": "Upsample",
    "timm.layers.activations": "GELU HardSigmoid HardSwish Sigmoid Swish",
    "timm.layers.adaptive_avgmax_pool": "SelectAdaptivePool2d",
    "timm.layers.attention": "Attention",
    "timm.layers.classifier": "ClassifierHead NormMlpClassifierHead",
    "timm.layers.conv2d_same": "Conv2dSame",
    "timm.layers.drop": "DropPath",
    "timm.layers.layer_scale": "LayerScale",
    "timm.layers.linear": "Linear",
    "timm.layers.mlp": "Mlp",
    "timm.layers.norm": "LayerNorm LayerNorm2d",
    "timm.layers.norm_act": "BatchNormAct2d",
    "timm.layers.patch_embed": "PatchEmbed",
    "timm.layers.squeeze_excite": "SEModule",
    "timm.models._efficientnet_blocks": "ConvBnAct DepthwiseSeparableConv EdgeResidual "
    "InvertedResidual SqueezeExcite",
    "timm.models.convnext": "ConvNeXtBlock ConvNeXtStage Downsample",
    "timm.models.mobilenetv3": "MobileNetV3",
    "timm.models.resnet": "BasicBlock Bottleneck",
    "timm.models.vision_transformer": "Block VisionTransformer",
    "torchvision.models.convnext": "CNBlock LayerNorm2d",
    "torchvision.models.efficientnet": "FusedMBConv MBConv",
    "torchvision.models.resnet": "BasicBlock Bottleneck",
    "torchvision.ops.misc": "Conv2dNormActivation Permute SqueezeExcitation",
    "torchvision.ops.stochastic_depth": "StochasticDepth",
}
FOREIGN: dict[str, Mapping[str, Held]] = {
    **SKLEARN,
    **{
        f"{module}:{name}": {}
        for module, names in MODULES.items()
        for name in names.split()
    },
}
ENUMS = ("timm.layers.format:Format",)
FUNCTIONS = {f"{f.__module__}:{f.__qualname__}": f for f in SAVED_FUNCTIONS}

LONGEST = 100  # of names
CHILD_NAME = re.compile(r"(?!__)\w[\w -]*")  # of layers and tensors
CONSTANTS = (type(None), bool, int, float, str)
PATHS = ("memory", "weights", "fisher")  # parameters that may name files or folders
NO_PATHS = ("default", "download")  # what they may say besides


def name_of(named: Any) -> str:
    """Name a class or function as files do."""
    return f"{named.__module__}:{named.__qualname__}"


@dataclass(frozen=True)
class Schema:
    """What an instance of a class may be filled with.

    Parameters
    ----------
    kind : type
        The class.
    held : mapping of str to tuple of type
        What attributes may hold besides plain data, by their names. None: anything,
        as the reader trusts the class.
    """

    kind: type
    held: Mapping[str, Held] | None

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """The parameters of an estimator, and their defaults."""
        if not issubclass(self.kind, BaseEstimator):
            return {}
        told = signature(self.kind).parameters.values()
        return {p.name: p.default for p in told}

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The parameters that an estimator of an earlier version may lack."""
        found = self.parameters.items()
        return {name: value for name, value in found if isinstance(value, CONSTANTS)}

    def allows(self, name: str) -> bool:
        """Tell whether an attribute may have that name: it hides no method."""
        return len(name) < LONGEST and (
            is_free(self.kind, name) or (name in self.parameters and name[:2] != "__")
        )

    def allows_child(self, name: str) -> bool:
        """Tell whether a layer or tensor of a module may have that name."""
        return len(name) < LONGEST and is_free_child(self.kind, name)

    def holds(self, name: str, kinds: Iterable[type]) -> bool:
        """Tell whether an attribute may hold instances of these classes."""
        if self.held is None:
            return True
        return all(issubclass(kind, self.held.get(name, ())) for kind in kinds)


@lru_cache(maxsize=2**14)
def is_free(kind: type, name: str) -> bool:
    """Tell whether a name hides nothing, and is none that Python looks for."""
    special = not name.isidentifier() or name.startswith("__")
    return not special and not hasattr(kind, name)


@lru_cache(maxsize=2**14)
def is_free_child(kind: type, name: str) -> bool:
    """Tell the same of names that may be numbers, or have spaces in them."""
    return CHILD_NAME.fullmatch(name) is not None and not hasattr(kind, name)


def find_schema(name: str) -> Schema | None:
    """Find a class that files may hold, by its name in a file."""
    module, _, qualname = name.partition(":")
    if name in FOREIGN:
        found = getattr(import_module(module), qualname, None)
        return schema_of(found, name) if is_class(found, name) else None
    if not module.startswith("skdeepad."):
        return None
    found = getattr(sys.modules.get(module), qualname, None)
    known = is_class(found, name) and hasattr(found, "_saved")
    return schema_of(found, name) if known else None


@lru_cache(None)
def schema_of(kind: type, name: str) -> Schema:
    """Collect what attributes of a class may hold, over its bases."""
    if name in FOREIGN:
        return Schema(kind, FOREIGN[name])
    told = (vars(base).get("_saved", {}) for base in reversed(kind.__mro__))
    return Schema(kind, {k: held for saved in told for k, held in saved.items()})


def find_enum(name: str) -> Any:
    """Find an enumeration that files may hold, by its name in a file."""
    if name not in ENUMS:
        return None
    module, _, qualname = name.partition(":")
    return getattr(import_module(module), qualname)


def is_class(found: Any, name: str) -> bool:
    """Tell whether something is the class that says of itself that it has this name."""
    return isinstance(found, type) and name_of(found) == name


def is_path(name: str, value: Any) -> bool:
    """Tell whether a parameter names a place on the machine that it was set on."""
    return (name == "memory" and value is not None) or (
        name in PATHS and isinstance(value, str | Path) and value not in NO_PATHS
    )


def find_pretrained(name: str, digest: str) -> Backbone | None:
    """Find the pretrained network, if it has these weights on this machine."""
    if not is_pretrained(name):
        return None
    backbone = load_backbone(name)
    return backbone if weights_digest(backbone) == digest else None
