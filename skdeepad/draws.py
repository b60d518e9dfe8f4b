"""Random numbers of torch from a generator of one's own, whoever draws them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")
aten = torch.ops.aten
# some versions of torch let these draw from the global generator only
FILLED = {aten.rand_like.default: "uniform_", aten.randn_like.default: "normal_"}


class OwnDraws(TorchDispatchMode):
    """Let torch draw from generators of its own, in this thread, inside ``with``.

    The first numbers are those that would follow `torch.manual_seed`. The global
    generators, which all threads share, are neither read nor moved. What is given a
    generator uses that.

    Parameters
    ----------
    seed : int
        Of the generators, one for each device; they go on where they were when the
        context is entered again.

    Attributes
    ----------
    generators : dict of torch.device to torch.Generator
        Those that were drawn from.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, with a generator if it takes one."""
        kwargs = kwargs or {}
        if func in FILLED:
            out = torch.empty_like(*args, **kwargs)
            return getattr(out, FILLED[func])(generator=self._generator(out.device))
        if func is aten.native_dropout.default:
            return self._dropout(*args, **kwargs)
        func, place = _drawing(func)
        if place is None or any((*args[place : place + 1], kwargs.get("generator"))):
            return func(*args, **kwargs)
        found = (a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        device = next(found, None) or torch.device(kwargs.get("device") or "cpu")
        if device.type == "meta":  # neither numbers nor a generator
            return func(*args, **kwargs)
        return func(*args[:place], **{**kwargs, "generator": self._generator(device)})

    def _generator(self, device: torch.device) -> torch.Generator:
        """Find the generator of a device; "cuda" is its current number."""
        new = torch.Generator(device)
        if new.device not in self.generators:
            self.generators[new.device] = new.manual_seed(self.seed)
        return self.generators[new.device]

    def _dropout(
        self, x: Tensor, p: float, train: bool | None
    ) -> tuple[Tensor, Tensor]:
        """Do what CUDA's fused dropout does, which takes no generator."""
        kept = torch.ones_like(x, dtype=torch.bool)
        if train is False:
            return x.clone(), kept
        kept.bernoulli_(1 - p, generator=self._generator(x.device))
        return x * kept * (1 / (1 - p) if p < 1 else 0.0), kept


@lru_cache(None)
def _drawing(func: Any) -> tuple[Any, int | None]:
    """Find the overload of an operation that takes a generator, and its place."""
    names = _names(func)
    if "generator" in names:
        return func, names.index("generator")
    packet = func.overloadpacket
    for overload in (getattr(packet, name) for name in packet.overloads()):
        # randperm.generator(n, *, generator, ...) for randperm(n, ...)
        more = _names(overload)
        if "generator" in more and [n for n in more if n != "generator"] == names:
            return overload, more.index("generator")
    return func, None


def _names(func: Any) -> list[str]:
    return [argument.name for argument in func._schema.arguments]


def each_with_own_draws(values: Iterable[T], seed: int) -> Iterator[T]:
    """Compute each value inside `OwnDraws`; if the first draws nothing, only that.

    Parameters
    ----------
    values : iterable
        Computed when their turn comes, such as losses.
    seed : int
        See `OwnDraws`.

    Yields
    ------
    object
        Each value.
    """
    values, draws = iter(values), OwnDraws(seed)
    end = object()
    while True:
        with draws:
            value: Any = next(values, end)
        if value is end:
            return
        yield value
        if not draws.generators:
            # looking at every operation costs small networks a good part of their time
            yield from values
            return
