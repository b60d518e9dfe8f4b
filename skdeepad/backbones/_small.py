"""Small networks to train from scratch: an MLP, LeNets, wide residual networks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from ._backbone import Backbone


def make_mlp(n_features: int) -> Backbone:
    """Two hidden layers on vectors."""
    widths = [n_features, 128, 64]
    return Backbone(
        OrderedDict(
            (f"stage{i}", nn.Sequential(nn.Linear(*pair), nn.ReLU()))
            for i, pair in enumerate(pairwise(widths), 1)
        ),
        in_channels=n_features,
        vectors=True,
    )


LEAKY_GAIN = nn.init.calculate_gain("leaky_relu")
# of CIFAR-10's images, as the official code of HSC has them
CIFAR10_COLOURS = (0.491373, 0.482353, 0.446667), (0.247059, 0.243529, 0.261569)


def draw_as_hsc(layers: list[Any]) -> None:
    """Draw weights as the official code of HSC does: Xavier, normal."""
    for layer in layers[:-1]:
        nn.init.xavier_normal_(layer.weight, LEAKY_GAIN)
    nn.init.xavier_normal_(layers[-1].weight)


def draw_as_svdd(layers: list[Any]) -> None:
    """Draw convolutions as Deep SVDD's code does for CIFAR-10: Xavier, uniform."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight, LEAKY_GAIN)


def make_lenet(
    channels: int,
    size: int,
    filters: tuple[int, ...],
    widths: tuple[int, ...],
    start: Callable[[list[nn.Module]], None] | None = None,
    colours: tuple[tuple[float, ...], tuple[float, ...]] = ((0.0,), (1.0,)),
) -> Backbone:
    """Convolutions with max-pooling, a stage each, and linear layers, a stage each.

    `start` draws the weights of these layers anew; None: they are as torch draws them.
    `colours` are the mean and standard deviation that colour images are normalized by.
    """
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    for i, pair in enumerate(pairwise((channels, *filters)), 1):
        stages[f"stage{i}"] = nn.Sequential(
            nn.Conv2d(*pair, 5, padding=2),
            nn.BatchNorm2d(pair[1], eps=1e-4),
            nn.LeakyReLU(),
            nn.MaxPool2d(2),
        )
    side = size // 2 ** len(filters)
    for i, (width, out) in enumerate(pairwise((filters[-1] * side**2, *widths)), 1):
        layers: list[nn.Module] = [nn.Flatten()] if i == 1 else []
        layers.append(nn.Linear(width, out))
        if i < len(widths):
            layers += [nn.BatchNorm1d(out, eps=1e-4), nn.LeakyReLU()]
        stages[f"fc{i}"] = nn.Sequential(*layers)
    if start is not None:
        modules = (module for stage in stages.values() for module in stage.children())
        start([m for m in modules if isinstance(m, nn.Conv2d | nn.Linear)])
    mean, std = colours if channels == 3 else ((0.0,), (1.0,))
    return Backbone(
        stages, input_size=(size, size), mean=mean, std=std, in_channels=channels
    )


class WideBlock(nn.Module):
    """Two convolutions of 3 x 3, each behind BatchNorm and ReLU, beside a shortcut."""

    _saved: ClassVar[dict[str, Any]] = {}

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        same = width == out and stride == 1
        self.shortcut = None if same else nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        before = self.bn1(x).relu()
        y = self.conv2(self.bn2(self.conv1(before)).relu())
        return y + (x if self.shortcut is None else self.shortcut(before))


def make_wide_resnet(channels: int, depth: int, widening: int) -> Backbone:
    """Make a wide residual network (Zagoruyko and Komodakis, 2016)."""
    widths = [16, *(widening * width for width in (16, 32, 64))]
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    stages["stem"] = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
    for i, (width, out) in enumerate(pairwise(widths), 1):
        first = WideBlock(width, out, stride=1 if i == 1 else 2)
        others = [WideBlock(out, out, stride=1) for _ in range((depth - 10) // 6)]
        stages[f"stage{i}"] = nn.Sequential(first, *others)
    stages["norm"] = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU())
    for module in nn.ModuleDict(stages).modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return Backbone(stages, mean=(0.5,), std=(0.5,), in_channels=channels)


# The networks of the official codes, with the biases that HSC's have; see
# `without_biases` for Deep SVDD's and Deep SAD's.
SMALL: dict[str, Callable[[int], Backbone]] = {
    "mlp": make_mlp,
    # GEOM has depth 10 and widening 4, MHRot 16 and 4; the first is for a CPU
    **{
        f"wrn{depth}_{widening}": partial(
            make_wide_resnet, depth=depth, widening=widening
        )
        for depth, widening in ((10, 1), (10, 4), (16, 4))
    },
    # HSC on MNIST
    "mnist_lenet": partial(
        make_lenet, size=28, filters=(16, 32), widths=(64, 32), start=draw_as_hsc
    ),
    # Deep SAD on Fashion-MNIST
    "fashion_mnist_lenet": partial(
        make_lenet, size=28, filters=(16, 32), widths=(128, 64)
    ),
    # HSC on CIFAR-10
    "cifar10_lenet": partial(
        make_lenet,
        size=32,
        filters=(32, 64, 128),
        widths=(512, 256),
        start=draw_as_hsc,
        colours=CIFAR10_COLOURS,
    ),
    # Deep SVDD and Deep SAD on MNIST and on CIFAR-10
    "svdd_mnist_lenet": partial(make_lenet, size=28, filters=(8, 4), widths=(32,)),
    "svdd_cifar10_lenet": partial(
        make_lenet,
        size=32,
        filters=(32, 64, 128),
        widths=(128,),
        start=draw_as_svdd,
    ),
}


def biases(module: nn.Module) -> list[str]:
    """Name the parameters that let a network give a constant whatever it sees."""
    return [
        name for name, _ in module.named_parameters() if name.split(".")[-1] == "bias"
    ]


def without_biases(backbone: Backbone) -> Backbone:
    """Take a network's biases, and all that its normalisations learn, from it."""
    for module in backbone.modules():
        if getattr(module, "bias", None) is not None:
            module.register_parameter("bias", None)
            if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                module.register_parameter("weight", None)  # as affine=False does
    return backbone


class ContrastNormalization(nn.Module):
    """Global contrast normalization: each image less its mean, by its mean size.

    What comes is brought to [0, 1] by the least and the greatest value that there
    were in training, as in the official code of Deep SVDD.
    """

    _saved: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = 0.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=(1, 2, 3), keepdim=True)
        # an image of one colour has no contrast, and stays at 0
        size = centred.abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
        return (centred / size - self.low) / (self.high - self.low)
