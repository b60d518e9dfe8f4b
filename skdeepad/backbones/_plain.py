"""Modules in a form that skops can save: it knows arrays, but no tensors."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import _pretrained
from ._backbone import Backbone


class Saved:
    """Stands in a state for what calling its class, with `args`, gives back.

    Both pickle and skops make that call when they load.
    """

    args: tuple[Any, ...]

    @classmethod
    def of(cls, *args: Any) -> Saved:
        """Make the stand-in."""
        new = object.__new__(cls)
        new.args = args
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args


class SavedTensor(Saved):
    """A tensor, as an array; NumPy has no bfloat16, whose bits are given as int16."""

    def __new__(cls, array: NDArray[Any], bfloat16: bool, gradient: bool | None) -> Any:
        """Give the tensor: a parameter, if `gradient` says whether it needs one."""
        tensor = torch.tensor(array)  # copied: joblib maps arrays that are read-only
        tensor = tensor.view(torch.bfloat16) if bfloat16 else tensor
        return tensor if gradient is None else nn.Parameter(tensor, gradient)


class SavedBackbone(Saved):
    """A backbone that is shared in the process, by name."""

    def __new__(cls, name: str) -> Any:
        """Find the backbone."""
        return _pretrained._shared(name)


class SavedDtype(Saved):
    """One of torch's dtypes, by name."""

    def __new__(cls, name: str) -> Any:
        """Find it."""
        return getattr(torch, name)


def to_plain(value: Any, memo: dict[int, Any]) -> Any:
    """Copy what holds modules, tensors replaced by arrays; the rest is not copied.

    Parameters
    ----------
    value : object
        A module, or containers of them.
    memo : dict
        What was copied before, so that what is shared stays so.
    """
    if id(value) in memo:
        return memo[id(value)]
    plain = value
    if isinstance(value, Backbone) and value._loader:
        plain = SavedBackbone.of(*value._loader[1])
    elif isinstance(value, nn.Module):
        plain = memo[id(value)] = object.__new__(type(value))
        plain.__dict__.update(to_plain(vars(value), memo))
    elif type(value) in (Tensor, nn.Parameter) and value.device.type == "cpu":
        bfloat16 = value.dtype == torch.bfloat16
        array = value.detach().view(torch.int16) if bfloat16 else value.detach()
        gradient = value.requires_grad if isinstance(value, nn.Parameter) else None
        plain = SavedTensor.of(array.numpy(), bfloat16, gradient)
    elif isinstance(value, torch.dtype):
        plain = SavedDtype.of(str(value).removeprefix("torch."))
    elif type(value).__name__ in ("dict", "OrderedDict"):
        plain = type(value)((key, to_plain(v, memo)) for key, v in value.items())
    elif type(value) in (list, tuple):
        plain = type(value)(to_plain(v, memo) for v in value)
    memo[id(value)] = plain
    return plain
