"""The one inference loop: samples -> features of a frozen backbone.

What passes the network together is always padded to the same number of samples, so
that features depend neither on neighbours nor on place or number.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise
from multiprocessing import current_process
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .backbones import Backbone
from .inputs import Batch, Vectors, chunks, load_batches

Outputs = tuple[NDArray[np.intp], NDArray[Any]]
# Of images that pass a network on the CPU together, in float32 (twice as many in
# bfloat16): more outgrow the processor's cache. Four images of 224 x 224, chosen by the
# time of EfficientNet-lite0 alone.
PIXELS_AT_ONCE = 4 * 224**2


def resolve_device(device: str) -> torch.device:
    """Turn a `device` parameter into a device that is there.

    Raises
    ------
    ValueError
        If the name is no device of torch's, or one that this machine lacks.

    Warns
    -----
    UserWarning
        If joblib's processes share a CUDA device.
    """
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device={device!r} is not to be had here ({error}); use 'auto' or 'cpu'."
        ) from error
    if resolved.type == "cuda" and current_process().name.startswith("LokyProcess"):
        warnings.warn(
            "n_jobs starts processes that all use one CUDA device, with the network in "
            "each: n_jobs=1 is as fast, and takes less of its memory.",
            UserWarning,
            stacklevel=2,
        )
    return resolved


def resolve_precision(
    precision: str, device: torch.device, vectors: bool
) -> torch.dtype:
    """Choose bfloat16 for images where the processor is faster in it."""
    if precision == "auto" and not vectors:
        if device.type == "cuda" and torch.cuda.is_bf16_supported(False):
            return torch.bfloat16
        if device.type == "cpu" and _has_bfloat16_instructions():
            return torch.bfloat16
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def _has_bfloat16_instructions() -> bool:
    """Tell if the processor multiplies in bfloat16, and torch may use what it has."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False  # by ATEN_CPU_CAPABILITY, perhaps
    known = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in known)


def pool(output: Tensor, grid: int | None = None) -> Tensor:
    """Average a stage's maps over all positions, or over each cell of a grid."""
    output = output.float()
    if output.ndim == 4:
        if grid is None:
            return output.mean((2, 3))
        return F.adaptive_avg_pool2d(output, grid).flatten(1)
    return output.mean(1) if output.ndim == 3 else output


def to_array(values: Tensor) -> NDArray[Any]:
    """Give an array; NumPy has no bfloat16, whose bits are given as int16."""
    values = values.cpu()
    return values.view(
        torch.int16 if values.dtype == torch.bfloat16 else values.dtype
    ).numpy()


def to_tensor(array: NDArray[Any]) -> Tensor:
    """Undo `to_array`."""
    values = torch.from_numpy(array)
    if values.dtype == torch.int16:
        values = values.view(torch.bfloat16)
    # as convolutions like maps best
    channels_last = torch.channels_last if values.ndim == 4 else torch.contiguous_format
    return values.contiguous(memory_format=channels_last)


@dataclass(frozen=True)
class FeaturePass:
    """One pass of a frozen backbone: which features, at which size, and where."""

    backbone: Backbone
    stages: tuple[str, ...]
    grid: int | None
    image_size: tuple[int, int] | None
    batch_size: int
    device: torch.device
    dtype: torch.dtype

    def sample_shape(self, inputs: Vectors) -> tuple[int, ...]:
        """Give the shape of one sample as the backbone sees it."""
        shape = inputs.shape
        if self.image_size is not None:
            channels = self.backbone.in_channels or (shape[0] if shape else 3)
            shape = (channels, *self.image_size)
        return shape or ()

    def widths(self, shape: tuple[int, ...]) -> list[int]:
        """Measure how many features each stage gives for a sample of this shape.

        Raises
        ------
        ValueError
            If the backbone cannot take such samples.
        """
        what = "widths", replace(self, backbone=None), shape
        return remember(self.backbone, what, lambda: self._widths(shape))

    def _widths(self, shape: tuple[int, ...]) -> list[int]:
        try:
            with torch.inference_mode():
                outputs = self._outputs(self.backbone, torch.zeros(1, *shape))
                return [output.shape[1] for output in outputs]
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The backbone cannot take samples of shape {shape}: {error}. Check "
                "image_size, image_shape and the backbone."
            ) from error

    def load(
        self, inputs: Vectors, indices: Iterable[NDArray[np.intp]]
    ) -> Iterator[Batch]:
        """Load samples as the backbone wants them."""
        channels = None if self.backbone.vectors else self.backbone.in_channels
        return load_batches(inputs, indices, self.image_size, channels)

    def run(self, values: Tensor) -> NDArray[Any]:
        """Give the features of up to `batch_size` samples.

        Raises
        ------
        ValueError
            If there are more, whose features would depend on how many there are.
        """
        n = len(values)
        if n > self.batch_size:
            raise ValueError(f"A pass of {self.batch_size} samples was given {n}.")
        network = frozen_copy(self.backbone, self.device, self.dtype)
        size = self._n_at_once(values)
        bfloat16 = self.dtype == torch.bfloat16
        rows = []
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16),
        ):
            for part in values.split(size):
                x = part.to(self.device, non_blocking=True)
                if len(x) < size:
                    x = F.pad(x, (*(0, 0) * (x.ndim - 1), 0, size - len(x)))
                outputs = torch.cat(self._outputs(network, x), dim=1)
                rows.append(outputs[: len(part)])
            return to_array(torch.cat(rows))

    def _n_at_once(self, values: Tensor) -> int:
        """Tell how many samples are quickest together: for a shape, always as many."""
        if values.ndim < 4 or self.device.type != "cpu":
            return self.batch_size
        at_once = PIXELS_AT_ONCE * (4 // self.dtype.itemsize)
        n = at_once // (values.shape[-2] * values.shape[-1])
        return min(max(n, 1), self.batch_size)

    def _outputs(self, network: Backbone, x: Tensor) -> list[Tensor]:
        outputs = network.forward_stages(x, self.stages)
        return [pool(outputs[name], self.grid) for name in self.stages]

    def key(self) -> str:
        """Name this pass: the same name, the same features."""
        told = (
            *(type(self).__name__, fingerprint(self.backbone)),
            *(self.stages, self.grid, self.image_size),
            *(self.device.type, str(self.dtype), torch.__version__),
        )
        return blake2b(repr(told).encode(), digest_size=16).hexdigest()


class TrunkPass(FeaturePass):
    """One pass of the first stages of a backbone, whose last ones are adapted.

    Its `stages` are those; their output is given as it is, not averaged.
    """

    def _outputs(self, network: Backbone, x: Tensor) -> list[Tensor]:
        x = network.normalize(x)
        for name in self.stages:
            x = network.stages[name](x)
        return [x]

    def row(self, inputs: Vectors) -> tuple[Any, tuple[int, ...]]:
        """Measure the dtype and shape of one sample's output."""
        output = self.run(torch.zeros(1, *self.sample_shape(inputs)))
        return output.dtype, output.shape[1:]


class TapPass(FeaturePass):
    """One pass that gives samples, and what stages make of them, as they are.

    All in one row: the sample as the first stage sees it, and the outputs of
    `stages`, flattened.
    """

    def _outputs(self, network: Backbone, x: Tensor) -> list[Tensor]:
        outputs = network.forward_stages(x, self.stages)
        values = [network.normalize(x), *(outputs[name] for name in self.stages)]
        return [value.float().flatten(1) for value in values]


@dataclass(frozen=True)
class JunctionPass(FeaturePass):
    """One pass of the frozen stages of a backbone, whose last ones are trained.

    All in one row: what `frozen`, the first stages, make of the sample (the sample
    as the first stage sees it, if there are none), if it is `handed_on`; and the
    features of those of them that are among `stages`.
    """

    frozen: tuple[str, ...]
    handed_on: bool

    def _outputs(self, network: Backbone, x: Tensor) -> list[Tensor]:
        outputs = []
        x = network.normalize(x)
        for name in self.frozen:
            x = network.stages[name](x)
            if name in self.stages:
                outputs.append(pool(network.as_map(x), self.grid))
        return [x.float().flatten(1), *outputs] if self.handed_on else outputs

    def key(self) -> str:
        """Name this pass: the same name, the same rows."""
        return f"{super().key()}-{len(self.frozen)}-{self.handed_on}"

    def junction_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Give the shape of what is handed on, for a sample of this shape."""
        with torch.inference_mode():
            x = self.backbone.normalize(torch.zeros(1, *shape))
            for name in self.frozen:
                x = self.backbone.stages[name](x)
        return x.shape[1:]


class PassOutputs:
    """What a pass of frozen stages makes of the training samples.

    Computed once and kept in memory where all of it fits, or else computed again
    each time: the numbers are the same.

    Parameters
    ----------
    task : FeaturePass
        What to compute.
    inputs : Vectors, Images or ImagePaths
        The samples.
    max_bytes : int
        The bound on what is kept.
    augment : callable, default=None
        Changes a batch of samples before it is passed, anew each time, for training.
    """

    def __init__(
        self,
        task: FeaturePass,
        inputs: Vectors,
        max_bytes: int,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.task = task
        self.inputs = inputs
        self.max_bytes = max_bytes
        self.augment = augment
        self.kept: NDArray[Any] | None = None

    def keep(self, batches: Iterable[Outputs]) -> Iterator[Outputs]:
        """Pass the outputs of all samples on, and keep them if all would fit."""
        for index, values in batches:
            n_bytes = values[0].nbytes * len(self.inputs)
            if self.kept is None and n_bytes <= self.max_bytes:
                shape = (len(self.inputs), *values.shape[1:])
                self.kept = np.empty(shape, values.dtype)
            if self.kept is not None:
                self.kept[index] = values
            yield index, values

    def unchanged(self, indices: Iterable[NDArray[np.intp]]) -> Iterator[Outputs]:
        """Give the outputs for one batch of samples after the other, as in scoring."""
        if self.kept is not None:
            yield from ((index, self.kept[index]) for index in indices)
        else:
            yield from self._run(indices)

    def batches(self, indices: Iterable[NDArray[np.intp]]) -> Iterator[Outputs]:
        """Give the outputs for one mini-batch of samples after the other."""
        if self.augment is None:
            return self.unchanged(indices)
        return self._run(indices, self.augment)

    def _run(
        self,
        indices: Iterable[NDArray[np.intp]],
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Outputs]:
        for batch in self.task.load(self.inputs, indices):
            if batch.values is None or batch.failed:
                raise ValueError(f"Files cannot be read any more: {batch.failed}.")
            values = change(batch.values) if change else batch.values
            # a mini-batch may hold its samples twice, for BatchNorm
            parts = values.split(self.task.batch_size)
            yield batch.index, np.concatenate([self.task.run(part) for part in parts])


def regroup(batches: Iterable[Outputs], size: int) -> Iterator[Outputs]:
    """Cut batches of samples anew: all of this size, but for the last."""
    index: NDArray[np.intp] = np.empty(0, dtype=np.intp)
    values: NDArray[Any] | None = None
    for more, new in batches:
        index = np.append(index, more)
        values = new if values is None else np.concatenate([values, new])
        while len(index) >= size:
            yield index[:size], values[:size]
            index, values = index[size:], values[size:]
    if values is not None and len(index):
        yield index, values


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
    shape: tuple[int, ...] = (backbone.in_channels or 3,)
    if not backbone.vectors:
        shape = (*shape, *(backbone.input_size or (64, 64)))
    sample = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            names = backbone.stage_names
            expected = backbone.forward_stages(sample, names)
            got = folded.forward_stages(sample, names)
        same = all(
            (got[name] - expected[name]).abs().max()
            <= 1e-3 * expected[name].abs().max()
            for name in names
        )
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
    """Digest a frozen backbone's weights and structure."""

    def digest() -> str:
        told = (repr(backbone), backbone.mean, backbone.std, weights_digest(backbone))
        return blake2b(repr(told).encode(), digest_size=16).hexdigest()

    return remember(backbone, "fingerprint", digest)


def iter_features(
    task: FeaturePass, inputs: Vectors, *, on_error: str, cache: Any = None
) -> Iterator[Outputs]:
    """Pass samples through a backbone, batch by batch.

    Parameters
    ----------
    task : FeaturePass
        What to compute.
    inputs : Vectors, Images or ImagePaths
        The samples.
    on_error : {"raise", "skip"}
        What to do about image files that cannot be read.
    cache : FeatureCache, default=None
        Where features of samples seen before are found, and new ones are put.

    Yields
    ------
    index : ndarray of int
        Positions of some samples.
    features : ndarray of float32, shape (len(index), n_features)
        Their features. Skipped samples are in no batch.

    Raises
    ------
    ValueError
        With ``on_error="raise"``, after all files were tried, if some cannot be
        read; all of them are named.
    """
    failed: dict[int, str] = {}
    everything = chunks(np.arange(len(inputs)), task.batch_size)
    if cache is None:
        yield from _compute(task, inputs, everything, failed, on_error)
    else:
        digests = [inputs.digest(i) for i in range(len(inputs))]
        missing = cache.missing(digests, task.batch_size)
        found = np.ones(len(inputs), dtype=bool)
        for index, features in _compute(task, inputs, missing, failed, on_error):
            cache.put([digests[i] for i in index], features)
            found[index] = False
            yield index, features
        rest = np.flatnonzero(found)
        for at, features in cache.read([digests[i] for i in rest]):
            found[rest[at]] = False
            yield rest[at], features
        # rows that are damaged, or cannot be read any more
        lost = [i for i in np.flatnonzero(found) if i not in failed]
        again = chunks(np.array(lost, dtype=np.intp), task.batch_size)
        for index, features in _compute(task, inputs, again, failed, on_error):
            cache.put([digests[i] for i in index], features)
            yield index, features
    if failed:
        _tell(inputs, failed, on_error)


def _compute(
    task: FeaturePass,
    inputs: Vectors,
    indices: Iterable[NDArray[np.intp]],
    failed: dict[int, str],
    on_error: str,
) -> Iterator[Outputs]:
    for batch in task.load(inputs, indices):
        failed.update(batch.failed)
        # once an error is certain, the other files are only read, to name all
        if batch.values is not None and not (failed and on_error == "raise"):
            yield batch.index, task.run(batch.values)
    if failed and on_error == "raise":
        _tell(inputs, failed, on_error)


def _tell(inputs: Any, failed: dict[int, str], on_error: str) -> None:
    index = sorted(failed)
    told = (
        f"{len(index)} of {len(inputs)} image files cannot be read: "
        f"{inputs.name(index)}. The first says: {failed[index[0]]}."
    )
    if on_error == "raise":
        raise ValueError(
            f"{told} Mend or remove them, or set on_error='skip' to score them NaN."
        )
    warnings.warn(f"{told} They were skipped.", UserWarning, stacklevel=2)
