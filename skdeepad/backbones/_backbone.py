"""A backbone: named stages in a row, and the head they were trained with."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import FunctionType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Backbone(nn.Module):
    """Named stages in a row, and a head.

    The one idea every method stands on: which stages train, which are frozen and
    run once, which are tapped for features, and the logits at the end.

    Parameters
    ----------
    stages : mapping of str to torch.nn.Module
        The stages, in the order in which they run; each takes the output of the one
        before.
    head : torch.nn.Module, default=None
        Turns the last stage's output into logits.
    input_size : (int, int), default=None
        Height and width of the images it was trained on, in pixels. None for a
        backbone of vectors, or of images of any size.
    mean, std : sequence of float, default=(0.0,), (1.0,)
        Per channel, on the scale where images are in [0, 1]: what the first stage
        sees is ``(x - mean) / std``.
    in_channels : int, default=None
        How many channels (or vector entries) the first stage takes. None: whatever
        comes.
    vectors : bool, default=False
        Whether it takes vectors and not images.
    to_map : callable, default=None
        Turns a stage's output into ``(n, channels, height, width)`` where it is laid
        out otherwise, as the tokens of a vision transformer are.

    Raises
    ------
    ValueError
        If there is no stage.

    Examples
    --------
    >>> import torch
    >>> from skdeepad.backbones import Backbone
    >>> net = Backbone({"conv": torch.nn.Conv2d(3, 8, 3), "relu": torch.nn.ReLU()})
    >>> net.stage_names
    ('conv', 'relu')
    >>> outputs = net.forward_stages(torch.zeros(2, 3, 16, 16), ["relu"])
    >>> outputs["relu"].shape
    torch.Size([2, 8, 14, 14])
    """

    _saved: ClassVar = {"to_map": (FunctionType, partial)}

    def __init__(
        self,
        stages: Mapping[str, nn.Module],
        head: nn.Module | None = None,
        *,
        input_size: tuple[int, int] | None = None,
        mean: Iterable[float] = (0.0,),
        std: Iterable[float] = (1.0,),
        in_channels: int | None = None,
        vectors: bool = False,
        to_map: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not stages:
            raise ValueError("stages is empty. A backbone needs at least one stage.")
        self.stages = nn.ModuleDict(stages)
        self.head = head
        self.input_size = input_size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.in_channels = in_channels
        self.vectors = vectors
        self.to_map = to_map
        # How to find it again in another process, where that is cheaper than its
        # weights: see `shared`.
        self._loader: tuple[Callable[..., Backbone], tuple[Any, ...]] | None = None

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Names of the stages, first to last."""
        return tuple(self.stages)

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the stages that do not restate the one before.

        "pool" averages it, "conv_head" widens it; all, if there are no others.
        """
        restating = {"pool", "conv_head"}
        blocks = tuple(name for name in self.stages if name not in restating)
        return blocks or self.stage_names

    def normalize(self, x: Tensor) -> Tensor:
        """Give images the channels and the scale that training had.

        Parameters
        ----------
        x : Tensor of shape (n, channels, height, width) or (n, n_features)
            Images in [0, 1], or vectors, which stay as they are.

        Returns
        -------
        Tensor
            What the first stage takes.
        """
        if self.vectors:
            return x
        if self.in_channels == 3 and x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        shape = (1, -1, 1, 1)
        mean = torch.tensor(self.mean, dtype=x.dtype, device=x.device).view(shape)
        std = torch.tensor(self.std, dtype=x.dtype, device=x.device).view(shape)
        return (x - mean) / std

    def forward_stages(self, x: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """Run no further than the last of the named stages.

        Parameters
        ----------
        x : Tensor of shape (n, channels, height, width) or (n, n_features)
            Images in [0, 1], or vectors.
        names : iterable of str
            The stages whose outputs are wanted.

        Returns
        -------
        dict of str to Tensor
            The outputs of those stages; maps are ``(n, channels, height, width)``.

        Raises
        ------
        ValueError
            If a name is not a stage's.
        """
        wanted = self.check_stages(names)
        outputs: dict[str, Tensor] = {}
        x = self.normalize(x)
        for name, stage in self.stages.items():
            x = stage(x)
            if name in wanted:
                outputs[name] = self.as_map(x)
            if len(outputs) == len(wanted):
                break
        return outputs

    def as_map(self, output: Tensor) -> Tensor:
        """Lay a stage's output out as a map.

        Parameters
        ----------
        output : Tensor
            What a stage gives, such as the tokens of a vision transformer.

        Returns
        -------
        Tensor of shape (n, channels, height, width)
            The same by position; outputs without positions stay as they are.
        """
        return self.to_map(output) if self.to_map and output.ndim > 2 else output

    def forward(self, x: Tensor) -> Tensor:
        """Run all stages and the head, if there is one.

        Parameters
        ----------
        x : Tensor of shape (n, channels, height, width) or (n, n_features)
            Images in [0, 1], or vectors.

        Returns
        -------
        Tensor
            The logits, or the last stage's output where there is no head.
        """
        x = self.normalize(x)
        for stage in self.stages.values():
            x = stage(x)
        return x if self.head is None else self.head(x)

    def probe(self) -> list[Tensor]:
        """Run all stages on a random sample, always the same one.

        Returns
        -------
        list of Tensor
            The output of each stage, for one sample.
        """
        shape: tuple[int, ...] = (self.in_channels or 3,)
        if not self.vectors:
            shape = (*shape, *(self.input_size or (64, 64)))
        return list(self.forward_stages(probes(shape)[0], self.stage_names).values())

    def check_stages(
        self, names: Iterable[str], parameter: str = "stages"
    ) -> tuple[str, ...]:
        """Put names of stages in the order in which the stages run.

        Parameters
        ----------
        names : iterable of str
            Names of stages.
        parameter : str, default="stages"
            The parameter that an error blames.

        Returns
        -------
        tuple of str
            The names, in order, each once.

        Raises
        ------
        ValueError
            If there is no name, or one that is not a stage's.
        """
        names = set(names)
        unknown = sorted(names - set(self.stages))
        if unknown or not names:
            raise ValueError(
                f"{parameter}={unknown!r} not found. The backbone has the stages "
                f"{', '.join(self.stages)}."
            )
        return tuple(name for name in self.stages if name in names)

    def frozen(self) -> Self:
        """Put it in evaluation mode, and switch gradients off.

        Returns
        -------
        Backbone
            The backbone itself.
        """
        return self.eval().requires_grad_(False)

    def shared(self, loader: Callable[..., Backbone], *args: Any) -> Backbone:
        """Mark it as the frozen one of this process that ``loader(*args)`` returns.

        It is pickled and copied as that call: a pickle stays small, and ten
        detectors in a process hold one set of weights. Train on a `clone`.

        Parameters
        ----------
        loader : callable
            A function of a module, which a pickle can name.
        *args
            Its arguments.

        Returns
        -------
        Backbone
            The backbone itself, frozen.
        """
        self._loader = loader, args
        return self.frozen()

    def unnormalized(self) -> Backbone:
        """Give the same stages, without a head, for images as they are in [0, 1].

        Returns
        -------
        Backbone
            A frozen backbone with the same weights.
        """
        return Backbone(
            dict(self.stages.items()),
            input_size=self.input_size,
            in_channels=self.in_channels,
            vectors=self.vectors,
            to_map=self.to_map,
        ).frozen()

    def clone(self) -> Self:
        """Copy the weights, so that the copy may be trained or moved.

        Returns
        -------
        Backbone
            The copy.
        """
        new = type(self).__new__(type(self))
        new.__dict__ = copy.deepcopy(self.__dict__)
        new._loader = None
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._loader or super().__reduce_ex__(protocol)


def pool(output: Tensor, cells: int = 1) -> Tensor:
    """Average a stage's maps over each cell of a raster of so many rows and columns."""
    output = output.float()
    if output.ndim == 4:
        if cells == 1:
            return output.mean((2, 3))
        return F.adaptive_avg_pool2d(output, cells).flatten(1)
    return output.mean(1) if output.ndim == 3 else output


def probes(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Draw one sample of each of these shapes, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(1, *shape, generator=generator) for shape in shapes]


class Versions(Backbone):
    """Versions of a network's last stages, side by side on the same input.

    What adaptation makes of them: a checkpoint each. The stages before them stay as
    they were, and run once for all versions.

    Parameters
    ----------
    versions : mapping of str to torch.nn.Module
        The stages, in one module for each version.
    input_shape : tuple of int
        The shape of one input: what the stages before them make of a sample.
    to_map : callable, default=None
        As in `Backbone`.
    """

    def __init__(
        self,
        versions: Mapping[str, nn.Module],
        input_shape: tuple[int, ...],
        to_map: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(versions, in_channels=input_shape[0], to_map=to_map)
        self.input_size = input_shape[1:] if len(input_shape) == 3 else None
        self.vectors = len(input_shape) == 1

    def routes(self) -> list[list[tuple[str, nn.Module]]]:
        """Give each version's stages, by their names."""
        return [list(version.named_children()) for version in self.stages.values()]

    def forward(self, x: Tensor) -> Tensor:
        """Give the features by each version, side by side."""
        outputs = [self.as_map(version(x)) for version in self.stages.values()]
        return torch.cat([pool(output) for output in outputs], dim=1)

    def probe(self) -> list[Tensor]:
        """Give what the versions make of a random input, always the same."""
        shape: tuple[int, ...] = (self.in_channels or 3,)
        return [self(*probes((*shape, *(self.input_size or ()))))]


class Adapted(Versions):
    """`Versions`, held as what sets them apart from the network that they are of.

    A pickle holds the weights that training has changed; the network, which has the
    others, goes by name where it is shared.

    Parameters
    ----------
    source : Backbone
        The network as it was before.
    first : str
        The first of its stages that the versions have.
    versions : mapping of str to torch.nn.Module
        The stages from that one on, by their names, in one module for each version.
    input_shape : tuple of int
        As in `Versions`.
    """

    def __init__(
        self,
        source: Backbone,
        first: str,
        versions: Mapping[str, nn.Module],
        input_shape: tuple[int, ...],
    ) -> None:
        super().__init__({"source": source}, input_shape, source.to_map)
        self.first = first
        self.input_shape = input_shape
        self.changed: dict[str, tuple[str, ...]] = {}
        self.tensors = nn.ParameterList()
        before = source.stages.state_dict()
        for version, stages in versions.items():
            now = {
                name: value
                for name, value in stages.state_dict().items()
                if not torch.equal(value, before[name])
            }
            self.changed[version] = tuple(now)
            self.tensors.extend(nn.Parameter(v, False) for v in now.values())

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Names of the versions."""
        return tuple(self.changed)

    def clone(self) -> Versions:  # type: ignore[override]
        """Make the versions whole."""
        source: Any = self.stages["source"]
        names = source.stage_names[source.stage_names.index(self.first) :]
        stages = nn.Sequential(OrderedDict((n, source.stages[n]) for n in names))
        tensors = iter(self.tensors)
        versions = {}
        for version, changed in self.changed.items():
            now = {name: next(tensors) for name in changed}
            versions[version] = copy.deepcopy(stages)
            versions[version].load_state_dict(now, strict=False)
        return Versions(versions, self.input_shape, self.to_map).frozen()

    def forward(self, x: Tensor) -> Tensor:
        """Give the features by each version; for many samples, run a `clone`."""
        return self.clone()(x)


class Part(nn.Module):
    """A step of a larger network: a function of the network and its input.

    It keeps the named children of the network, and its own parameters, only where
    the step needs them, so that a weight belongs to one stage.
    """

    _saved: ClassVar = {"step": FunctionType}

    def __init__(
        self,
        module: nn.Module,
        step: Callable[[nn.Module, Tensor], Tensor],
        *,
        keep: Iterable[str],
        keep_parameters: bool = False,
    ) -> None:
        super().__init__()
        keep = set(keep)
        self.module = copy.copy(module)
        self.module._modules = {
            name: child if name in keep else nn.Identity()
            for name, child in module._modules.items()
        }
        if not keep_parameters:
            self.module._parameters = {}
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self.module, x)
