"""Names, modules and functions -> `Backbone`: named stages in a row, and a head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..draws import OwnDraws
from ._backbone import Backbone
from ._pretrained import (
    EMBEDDED,
    TORCHVISION,
    is_pretrained,
    load_weights,
    make_pretrained,
)
from ._small import SMALL
from ._structure import to_backbone

__all__ = ["Backbone", "list_backbones", "load_backbone", "to_backbone"]


def list_backbones() -> list[str]:
    """Name the backbones there are.

    Returns
    -------
    list of str
        Names that `load_backbone` takes; "timm/NAME" stands for any model of timm's.

    Examples
    --------
    >>> from skdeepad.backbones import list_backbones
    >>> "efficientnet_lite0" in list_backbones()
    True
    """
    return [*EMBEDDED, *TORCHVISION, "timm/NAME", *SMALL]


def load_backbone(
    backbone: str | nn.Module | Callable[[], nn.Module] = "efficientnet_lite0",
    *,
    weights: str | Path | None = "default",
    in_channels: int = 3,
    vectors: bool = False,
    seed: int = 0,
) -> Backbone:
    """Make a backbone from its name, a module, or a function that makes one.

    Parameters
    ----------
    backbone : str, torch.nn.Module or callable, default="efficientnet_lite0"
        A name of `list_backbones`; a module, of which a copy is taken; or a function
        without arguments that returns a module. Modules are cut into stages by
        `to_backbone`.
    weights : "default", "download", None or path, default="default"
        "default": the pretrained weights of a name that has them, as found on this
        machine (torchvision's IMAGENET1K_V1, the papers'), or else random ones;
        nothing is ever downloaded. "download": the same, fetched first where they
        are missing. None: random weights. A path: a state dict, which is read
        without running code. A module's own weights stay as they are unless a path
        is given.
    in_channels : int, default=3
        Channels of the images, for the LeNets; entries of the vectors, for "mlp".
    vectors : bool, default=False
        Whether a module takes vectors and not images.
    seed : int, default=0
        Seeds random weights; torch's global stream is left alone.

    Returns
    -------
    Backbone
        Frozen, in evaluation mode, on the CPU. Pretrained backbones by name are
        shared in the process: train on a ``clone()``.

    Raises
    ------
    ValueError
        If the name is unknown, or a weight file does not fit.
    FileNotFoundError
        If the weights are not on this machine; the message names the ways out.
    TypeError
        If `backbone` is none of these, or the function returns no module.

    Examples
    --------
    >>> from skdeepad.backbones import load_backbone
    >>> load_backbone("efficientnet_lite0").stage_names[-3:]
    ('stage7', 'conv_head', 'pool')
    """
    with OwnDraws(seed):
        if isinstance(backbone, str):
            made = _from_name(backbone, weights, in_channels)
        else:
            made = _from_module(backbone, weights, vectors)
    return made.frozen()


def _from_name(name: str, weights: Any, in_channels: int) -> Backbone:
    if is_pretrained(name):
        return make_pretrained(name, weights)
    if name not in SMALL:
        raise ValueError(
            f"backbone={name!r} is unknown. Known names are "
            f"{', '.join(list_backbones())}."
        )
    made = SMALL[name](in_channels)
    if weights not in (None, "default", "download"):
        load_weights(made, Path(weights))
    return made


def _from_module(backbone: Any, weights: Any, vectors: bool) -> Backbone:
    module = backbone
    if callable(backbone) and not isinstance(backbone, nn.Module):
        module = backbone()
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"backbone={backbone!r} is neither the name of a backbone, nor a "
            "torch.nn.Module, nor a function that returns one."
        )
    module = copy.deepcopy(module)  # the caller's stays as it is
    if weights not in (None, "default", "download"):
        if isinstance(module, Backbone):
            module = module.clone()  # a shared one keeps its weights
        load_weights(module, Path(weights))
    if isinstance(module, Backbone):
        return module
    return to_backbone(module.float(), vectors=vectors)
