"""The frozen copy of a backbone that is quickest, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .backbones import Backbone

_KNOWN: WeakKeyDictionary[Backbone, dict[Any, Any]] = WeakKeyDictionary()


def remember(backbone: Backbone, what: Any, make: Callable[[], Any]) -> Any:
    """Give what was made of a frozen backbone in this process, or make it."""
    known = _KNOWN.setdefault(backbone, {})
    if what not in known:
        known[what] = make()
    return known[what]


def frozen_copy(
    backbone: Backbone, device: torch.device, dtype: torch.dtype
) -> Backbone:
    """Give the copy of a frozen backbone that is quickest on the device.

    Made once per process: BatchNorm is folded into the convolutions before it,
    weights of convolutions and linear layers are cast, images lie channels last.
    The backbone itself stays as it is, on the CPU.
    """
    return remember(
        backbone, ("copy", device, dtype), lambda: _quickest(backbone, device, dtype)
    )


@torch.inference_mode(False)  # some passes need gradients
def _quickest(backbone: Backbone, device: torch.device, dtype: torch.dtype) -> Backbone:
    network = fold_batchnorm(backbone).to(device)
    if dtype == torch.bfloat16:
        for module in network.modules():
            # what autocast would cast again at every batch
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype)
    return (
        network if backbone.vectors else network.to(memory_format=torch.channels_last)
    )


def fold_batchnorm(backbone: Backbone) -> Backbone:
    """Copy a frozen backbone, each BatchNorm folded into the convolution before it.

    The order in which a module names its children is taken for the order in which
    they run, and the outcome is compared: where they disagree, nothing is folded.
    """
    folded = backbone.clone()
    changed = False
    for parent in list(folded.modules()):
        children = list(parent.named_children())
        for (name, conv), (bn_name, bn) in pairwise(children):
            if (
                isinstance(conv, nn.Conv2d)
                and isinstance(bn, nn.BatchNorm2d)
                and bn.num_features == conv.out_channels
                and bn.running_var is not None
            ):
                setattr(parent, name, fuse_conv_bn_eval(conv, bn))
                # timm's BatchNormAct2d applies an activation after the norm
                setattr(parent, bn_name, getattr(bn, "act", None) or nn.Identity())
                changed = True
    if not changed:
        return folded
    try:
        with torch.inference_mode():
            pairs = list(zip(backbone.probe(), folded.probe(), strict=True))
        same = all((b - a).abs().max() <= 1e-3 * a.abs().max() for a, b in pairs)
    except (RuntimeError, AttributeError, TypeError):
        same = False
    return folded.frozen() if same else backbone.clone()


def weights_digest(backbone: Backbone) -> str:
    """Digest a frozen backbone's weights."""

    def digest() -> str:
        digest = blake2b(digest_size=16)
        for value in backbone.state_dict().values():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    return remember(backbone, "weights", digest)


def fingerprint(backbone: Backbone) -> str:
    """Digest a frozen backbone's weights, structure and settings."""

    def digest() -> str:
        modules = [(repr(type(m)), settings(m)) for m in backbone.modules()]
        told = repr((repr(backbone), modules, weights_digest(backbone)))
        return blake2b(told.encode(), digest_size=16).hexdigest()

    return remember(backbone, "fingerprint", digest)


def settings(module: nn.Module) -> Any:
    """Give the attributes of a module that are neither weights nor modules."""
    elsewhere = {"_parameters", "_buffers", "_modules", "_loader"}
    found = sorted(vars(module).items())
    return [(name, describe(v)) for name, v in found if name not in elsewhere]


def describe(value: Any) -> Any:
    """Describe a setting in the same words in every process."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return [(describe(k), describe(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, partial):
        return describe([value.func, value.args, value.keywords])
    if value is None or isinstance(value, str | int | float | torch.dtype):
        return repr(value)
    return getattr(value, "__qualname__", type(value).__qualname__)
