"""Known networks, cut into stages: torchvision's, timm's, any `nn.Sequential`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ._backbone import Backbone, Part


def to_backbone(module: nn.Module, **options: Any) -> Backbone:
    """Cut a network into stages by its class, or take it whole.

    Parameters
    ----------
    module : torch.nn.Module
        A network. Torchvision's ResNets, VGGs, EfficientNets and ConvNeXts and
        timm's models are cut into ``stem, stage1, ..., pool`` and a head; the
        children of an ``nn.Sequential`` are its stages, by their names; any other
        module is a single stage, "features".
    **options
        Options of `Backbone`, such as `mean` and `std`.

    Returns
    -------
    Backbone
        On the same weights: they are not copied.

    Examples
    --------
    >>> import torchvision
    >>> from skdeepad.backbones import to_backbone
    >>> to_backbone(torchvision.models.resnet18()).stage_names
    ('stem', 'stage1', 'stage2', 'stage3', 'stage4', 'pool')
    """
    convolutions = (m for m in module.modules() if isinstance(m, nn.Conv2d))
    if first := next(convolutions, None):
        options.setdefault("in_channels", first.in_channels)
    if isinstance(module, nn.Sequential):
        return Backbone(dict(module.named_children()), **options)
    package = type(module).__module__.partition(".")[0]
    cut = _CUTS.get((package, type(module).__name__))
    if cut is None and package == "timm":
        cut = _cut_any_timm
    if cut is None:
        return Backbone({"features": module}, **options)
    stages, head, *to_map = cut(module)
    return Backbone(stages, head, to_map=to_map[0] if to_map else None, **options)


def _number(parts: Any, first: int = 1) -> dict[str, nn.Module]:
    return {f"stage{i}": part for i, part in enumerate(parts, first)}


# torchvision


def _cut_resnet(net: Any) -> tuple[Any, ...]:
    stages = {
        "stem": nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool),
        **_number([net.layer1, net.layer2, net.layer3, net.layer4]),
        "pool": nn.Sequential(net.avgpool, nn.Flatten()),
    }
    return stages, net.fc


def _cut_vgg(net: Any) -> tuple[Any, ...]:
    parts, part = [], []
    for layer in net.features:
        part.append(layer)
        if isinstance(layer, nn.MaxPool2d):
            parts.append(nn.Sequential(*part))
            part = []
    # "pool" is what the last linear layer classifies: fc7, 4,096 values
    pool = nn.Sequential(net.avgpool, nn.Flatten(), *list(net.classifier)[:-1])
    return {**_number(parts), "pool": pool}, net.classifier[-1]


def _cut_efficientnet(net: Any) -> tuple[Any, ...]:
    stem, *blocks, conv_head = net.features
    stages = {
        "stem": stem,
        **_number(blocks),
        "conv_head": conv_head,
        "pool": nn.Sequential(net.avgpool, nn.Flatten()),
    }
    return stages, net.classifier


def _cut_convnext(net: Any) -> tuple[Any, ...]:
    stem, first, *rest = net.features
    pairs = [nn.Sequential(*rest[i : i + 2]) for i in range(0, len(rest), 2)]
    norm, flatten, linear = net.classifier
    pool = nn.Sequential(net.avgpool, norm, flatten)
    return {"stem": stem, **_number([first, *pairs]), "pool": pool}, linear


# timm


def _cut_timm_efficientnet(net: Any) -> tuple[Any, ...]:
    stages = {
        "stem": nn.Sequential(net.conv_stem, net.bn1),
        **_number(net.blocks),
        "conv_head": nn.Sequential(net.conv_head, net.bn2),
        "pool": net.global_pool,
    }
    return stages, net.classifier


def _cut_timm_resnet(net: Any) -> tuple[Any, ...]:
    stages = {
        "stem": nn.Sequential(net.conv1, net.bn1, net.act1, net.maxpool),
        **_number([net.layer1, net.layer2, net.layer3, net.layer4]),
        "pool": net.global_pool,
    }
    return stages, net.fc


def _cut_timm_convnext(net: Any) -> tuple[Any, ...]:
    last = nn.Sequential(net.stages[-1], net.norm_pre)
    stages = {
        "stem": net.stem,
        **_number([*net.stages[:-1], last]),
        # the head pools, and classifies with "fc"
        "pool": Part(net.head, _pre_logits, keep=set(net.head._modules) - {"fc"}),
    }
    return stages, net.get_classifier()


def _cut_vit(net: Any) -> tuple[Any, ...]:
    """Four groups of blocks, as the four stages of a convolutional network."""
    quarter = -(-len(net.blocks) // 4)
    groups = [net.blocks[i : i + quarter] for i in range(0, len(net.blocks), quarter)]
    stem = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")
    pool = ("norm", "attn_pool", "fc_norm", "head_drop")
    stages = {
        "stem": Part(net, _embed_patches, keep=stem, keep_parameters=True),
        **_number(groups),
        "pool": Part(net, _norm_and_pool, keep=pool),
    }
    return stages, net.get_classifier(), _token_layout(net)


def _cut_any_timm(net: Any) -> tuple[Any, ...]:
    """Two stages that every timm model has: its features, and their pooling."""
    # which children its forward_head needs, a model does not tell
    stages = {
        name: Part(net, step, keep=tuple(net._modules), keep_parameters=True)
        for name, step in (("features", _features), ("pool", _pool))
    }
    to_map: Callable[[Tensor], Tensor] | None = None
    if getattr(net, "output_fmt", None) == "NHWC":
        to_map = _channels_to_front
    elif hasattr(net, "num_prefix_tokens") and hasattr(
        getattr(net, "patch_embed", None), "grid_size"
    ):
        to_map = _token_layout(net)
    head = net.get_classifier()
    # some have a pair of heads, or a convolution: no classifier of pooled features
    return stages, head if isinstance(head, nn.Linear) else None, to_map


def _token_layout(net: Any) -> Callable[[Tensor], Tensor]:
    return partial(
        _tokens_to_map,
        prefix=net.num_prefix_tokens,
        grid=tuple(net.patch_embed.grid_size),
    )


# plain functions, so that a backbone can be pickled


def _embed_patches(net: Any, x: Tensor) -> Tensor:
    return net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(x))))


def _features(net: Any, x: Tensor) -> Tensor:
    return net.forward_features(x)


def _pool(net: Any, x: Tensor) -> Tensor:
    return net.forward_head(x, pre_logits=True)


def _pre_logits(head: Any, x: Tensor) -> Tensor:
    return head(x, pre_logits=True)


def _norm_and_pool(net: Any, x: Tensor) -> Tensor:
    return _pool(net, net.norm(x))


def _channels_to_front(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _tokens_to_map(x: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Lay the patch tokens out as the image's grid; drop class and register tokens."""
    return x[:, prefix:].transpose(1, 2).reshape(len(x), -1, *grid)


_CUTS: dict[tuple[str, str], Callable[[Any], tuple[Any, ...]]] = {
    ("torchvision", "ResNet"): _cut_resnet,
    ("torchvision", "VGG"): _cut_vgg,
    ("torchvision", "EfficientNet"): _cut_efficientnet,
    ("torchvision", "ConvNeXt"): _cut_convnext,
    ("timm", "EfficientNet"): _cut_timm_efficientnet,
    ("timm", "ResNet"): _cut_timm_resnet,
    ("timm", "ConvNeXt"): _cut_timm_convnext,
    ("timm", "VisionTransformer"): _cut_vit,
}

# what backbones made here hold, and a file may name: see `skdeepad.persistence`
SAVED_FUNCTIONS = (
    _embed_patches,
    _features,
    _pool,
    _pre_logits,
    _norm_and_pool,
    _channels_to_front,
    _tokens_to_map,
)
