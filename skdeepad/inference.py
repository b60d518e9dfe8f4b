"""The one inference loop: samples -> a frozen front -> a live end, if there is one.

What passes the network together is always padded to the same number of samples, so
that features depend neither on neighbours nor on place or number.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain
from multiprocessing import current_process
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .backbones import Backbone
from .backbones._backbone import pool
from .checks import shorten
from .frozen import fingerprint, frozen_copy, remember
from .inputs import Batch, Vectors, chunks, load_batches

Arrays = list[NDArray[Any]]  # what each tap takes of some samples
Outputs = tuple[NDArray[np.intp], Arrays]  # with the positions of those samples
Features = tuple[NDArray[np.intp], NDArray[np.float32]]
BLOCK = 1024  # rows of features that are scored at a time
INPUT = ""  # stands for what the first stage is given; no stage has this name
# Of images that pass a network on the CPU together, in float32 (twice as many in
# bfloat16): more outgrow the processor's cache. Four images of 224 x 224, chosen by the
# time of EfficientNet-lite0 alone.
PIXELS_AT_ONCE = 4 * 224**2


def resolve_device(device: str) -> torch.device:
    """Turn a `device` parameter into a device of this machine.

    It warns if processes of joblib share a CUDA device.
    """
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device={device!r} is not available on this machine ({error}). Use "
            "'auto' or 'cpu'."
        ) from error
    if resolved.type == "cuda" and current_process().name.startswith("LokyProcess"):
        warnings.warn(
            "The processes that n_jobs starts all use one CUDA device, each with "
            "a copy of the network. Set n_jobs=1: it is as fast, and uses less of "
            "the device's memory.",
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


def flat(arrays: Arrays) -> NDArray[np.float32]:
    """Put what a pass gives for some samples side by side, in one row for each."""
    parts = [to_tensor(array).float().flatten(1) for array in arrays]
    rows: NDArray[np.float32] = torch.cat(parts, dim=1).numpy()
    return rows


@dataclass(frozen=True)
class Tap:
    """What is taken of a stage's output.

    Parameters
    ----------
    stage : str
        The stage; `INPUT` for what the first one is given.
    form : {"output", "map"} or int, default=1
        The output as it is; laid out as (channels, height, width); or averaged over
        the cells of a raster of so many rows and columns: over all positions, for 1.
    """

    stage: str
    form: str | int = 1

    def of(self, network: Backbone, output: Tensor) -> Tensor:
        """Take it."""
        if self.form == "output":
            return output
        output = network.as_map(output)
        return pool(output, self.form) if isinstance(self.form, int) else output


@dataclass(frozen=True)
class FeaturePass:
    """One pass of a frozen backbone: what is taken of it, at which size, and where."""

    backbone: Backbone
    taps: tuple[Tap, ...]
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

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Measure what each tap gives for a sample of this shape."""
        what = "shapes", type(self), self.taps, shape
        return remember(self.backbone, what, lambda: self._shapes(shape))

    def _shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        try:
            with torch.inference_mode():
                outputs = self._outputs(self.backbone, torch.zeros(1, *shape))
                return [tuple(output.shape[1:]) for output in outputs]
        except (RuntimeError, TypeError, AttributeError, AssertionError) as error:
            size = self.backbone.input_size
            hint = "Check image_size, image_shape and the backbone."
            if size and self.image_size and tuple(size) != tuple(self.image_size):
                asked, own = self.image_size[0], next(iter(size))
                hint = f"image_size={asked} was asked for; set image_size={own}."
            raise ValueError(
                f"The backbone fails on samples of shape {shape}: "
                f"{shorten(str(error))}. {hint}"
            ) from error

    def load(
        self, inputs: Vectors, indices: Iterable[NDArray[np.intp]]
    ) -> Iterator[Batch]:
        """Load samples as the backbone wants them."""
        channels = None if self.backbone.vectors else self.backbone.in_channels
        return load_batches(inputs, indices, self.image_size, channels)

    def run(self, values: Tensor) -> Arrays:
        """Give what each tap takes of up to `batch_size` samples.

        Of more, features would depend on how many there are: they are an error.
        """
        if len(values) > self.batch_size:
            raise ValueError(
                f"A pass of {self.batch_size} samples was given {len(values)}."
            )
        network = frozen_copy(self.backbone, self.device, self.dtype)
        size = n_at_once(values, self.batch_size, self.device, self.dtype)
        found = []
        with inference(self.device, self.dtype):
            for part in values.split(size):
                outputs = self._outputs(network, padded(part.to(self.device), size))
                found.append([output[: len(part)] for output in outputs])
            return [to_array(torch.cat(parts)) for parts in zip(*found, strict=True)]

    def _outputs(self, network: Backbone, x: Tensor) -> list[Tensor]:
        wanted = {tap.stage for tap in self.taps}
        x = network.normalize(x)
        found = {INPUT: x}
        for name, stage in network.stages.items():
            if wanted <= found.keys():
                break
            x = stage(x)
            if name in wanted:
                found[name] = x
        return [tap.of(network, found[tap.stage]) for tap in self.taps]

    def with_all_stages(self, inputs: Vectors) -> FeaturePass:
        """Take averages of all stages, where averages are taken: they cost nothing."""
        forms = {tap.form for tap in self.taps}
        if len(forms) > 1 or not isinstance(next(iter(forms)), int):
            return self
        shape, form = self.sample_shape(inputs), forms.pop()
        if not shape:  # files at their own size, which is message where there is one
            return self
        taps = [Tap(name, form) for name in self.backbone.stage_names]
        while taps:
            try:
                replace(self, taps=tuple(taps)).shapes(shape)
                break
            except ValueError:  # the last ones cannot take such samples
                taps.pop()
        more = [tap for tap in taps if tap not in self.taps]
        return replace(self, taps=(*self.taps, *more))

    def key(self, tap: Tap) -> str:
        """Name what a tap takes in this pass: the same name, the same numbers."""
        message = (*self._key_parts(), tap.stage, tap.form, torch.__version__)
        return blake2b(repr(message).encode(), digest_size=16).hexdigest()

    def _key_parts(self) -> tuple[Any, ...]:
        return (
            *(type(self).__name__, fingerprint(self.backbone), self.image_size),
            *(self.device.type, str(self.dtype)),
        )


@contextmanager
def inference(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Compute without gradients, and in bfloat16 if so wanted."""
    bfloat16 = dtype == torch.bfloat16
    with (
        torch.inference_mode(),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16),
    ):
        yield


def n_at_once(
    values: Tensor, limit: int, device: torch.device, dtype: torch.dtype
) -> int:
    """Tell how many samples are quickest together: for a shape, always as many."""
    if values.ndim < 4 or device.type != "cpu":
        return limit
    at_once = PIXELS_AT_ONCE * (4 // dtype.itemsize)
    n = at_once // (values.shape[-2] * values.shape[-1])
    return min(max(n, 1), limit)


def padded(x: Tensor, n: int) -> Tensor:
    """Add zeros behind samples, so that there are n."""
    return F.pad(x, (*(0, 0) * (x.ndim - 1), 0, n - len(x))) if len(x) < n else x


def run_end(
    end: Backbone,
    batches: Iterable[Outputs],
    limit: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Features]:
    """Turn what a frozen front has made of samples into features, by a live end.

    The end is called with the outputs of the front's taps, in their order, for at most
    `limit` samples at once. Positions of samples and their features are given.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return
    network = frozen_copy(end, device, dtype)
    # at its input, which has the most pixels
    size = n_at_once(to_tensor(first[1][0]), limit, device, dtype)
    precise = dtype == torch.float32
    for index, arrays in regroup(chain([first], batches), size):
        tensors = [to_tensor(array).to(device) for array in arrays]
        inputs = [padded(x.float() if precise else x, size) for x in tensors]
        with inference(device, dtype):
            outputs = network(*inputs)[: len(index)]
        yield index, to_array(outputs.float())


class PassOutputs:
    """What a pass of frozen stages makes of the training samples.

    It is computed once and kept in memory where all of it fits in `max_bytes`, or
    computed again each time: the numbers are the same. `augment` changes the samples of
    each batch that is trained on, anew each time.
    """

    def __init__(
        self,
        front: FeaturePass,
        inputs: Vectors,
        max_bytes: int,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.front = front
        self.inputs = inputs
        self.max_bytes = max_bytes
        self.augment = augment
        self.kept: Arrays | None = None

    def without_changes(self) -> PassOutputs:
        """Give the same without augmentation."""
        plain = copy.copy(self)
        plain.augment = None
        return plain

    def keep(self, batches: Iterable[Outputs]) -> Iterator[Outputs]:
        """Pass the outputs of all samples on, and keep them if all would fit."""
        n = len(self.inputs)
        for index, arrays in batches:
            n_bytes = n * sum(array[0].nbytes for array in arrays)
            if self.kept is None and n_bytes <= self.max_bytes:
                self.kept = [np.empty((n, *a.shape[1:]), a.dtype) for a in arrays]
            if self.kept is not None:
                for kept, array in zip(self.kept, arrays, strict=True):
                    kept[index] = array
            yield index, arrays

    def unchanged(self, indices: Iterable[NDArray[np.intp]]) -> Iterator[Outputs]:
        """Give the outputs for one batch of samples after the other, as in scoring."""
        if self.kept is None:
            return self._run(indices)
        kept = self.kept
        return ((index, [array[index] for array in kept]) for index in indices)

    def batches(
        self, indices: Iterable[NDArray[np.intp]]
    ) -> Iterator[tuple[NDArray[np.intp], list[Tensor]]]:
        """Give the outputs for one mini-batch of samples after the other.

        As float32, on the device where they are trained on.
        """
        change = self.augment
        outputs = self._run(indices, change) if change else self.unchanged(indices)
        device = self.front.device
        for index, arrays in outputs:
            yield index, [to_tensor(array).to(device).float() for array in arrays]

    def _run(
        self,
        indices: Iterable[NDArray[np.intp]],
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Outputs]:
        for batch in self.front.load(self.inputs, indices):
            if batch.values is None or batch.failed:
                raise ValueError(
                    "Files that could be read at first cannot be read any more: "
                    f"{batch.failed}."
                )
            values = change(batch.values) if change else batch.values
            # a mini-batch may hold its samples twice, for BatchNorm
            parts = map(self.front.run, values.split(self.front.batch_size))
            yield batch.index, join(list(parts))


def join(parts: list[Arrays]) -> Arrays:
    """Put what a pass gives for several batches behind one another."""
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def in_blocks(batches: Iterable[Features]) -> Iterator[Features]:
    """Give features in blocks of `BLOCK` rows, for what is slow on a few."""
    outputs = ((index, [features]) for index, features in batches)
    return ((index, features) for index, (features,) in regroup(outputs, BLOCK))


def regroup(batches: Iterable[Outputs], size: int) -> Iterator[Outputs]:
    """Cut batches of samples anew: all of this size, but for the last."""
    index: NDArray[np.intp] = np.empty(0, dtype=np.intp)
    arrays: Arrays = []
    for more, new in batches:
        arrays = join([arrays, new]) if len(index) else new
        index = np.append(index, more)
        while len(index) >= size:
            yield index[:size], [array[:size] for array in arrays]
            index, arrays = index[size:], [array[size:] for array in arrays]
    if len(index):
        yield index, arrays


def iter_outputs(
    front: FeaturePass, inputs: Vectors, *, on_error: str, cache: Any = None
) -> Iterator[Outputs]:
    """Pass samples through a frozen front, batch by batch.

    Positions of samples are given, and what each tap takes of them; files that cannot
    be read are in no batch. With ``on_error="raise"`` they are an error, which names
    all of them, once all files were tried. The cache holds outputs for samples seen
    before.
    """
    failed: dict[int, str] = {}
    everything = chunks(np.arange(len(inputs)), front.batch_size)
    if cache is None:
        yield from _compute(front, inputs, everything, failed, on_error)
    else:
        yield from _look_up(front, inputs, cache, failed, on_error)
    if failed:
        report_unreadable(inputs, failed, on_error)


def _look_up(
    front: FeaturePass,
    inputs: Vectors,
    cache: Any,
    failed: dict[int, str],
    on_error: str,
) -> Iterator[Outputs]:
    """Give outputs from the cache, and put those in that are not there."""
    n_taps = len(front.taps)
    whole = cache.whole(front, inputs)
    keys = [front.key(tap) for tap in whole.taps]
    wanted = keys[:n_taps]
    digests = [inputs.digest(i) for i in range(len(inputs))]

    def compute(indices: Iterable[NDArray[np.intp]]) -> Iterator[Outputs]:
        for index, arrays in _compute(whole, inputs, indices, failed, on_error):
            cache.put(keys, [digests[i] for i in index], arrays)
            yield index, arrays[:n_taps]

    found = np.ones(len(inputs), dtype=bool)
    for index, arrays in compute(cache.missing(wanted, digests, front.batch_size)):
        found[index] = False
        yield index, arrays
    rest = np.flatnonzero(found)
    for at, arrays in cache.read(wanted, [digests[i] for i in rest]):
        found[rest[at]] = False
        yield rest[at], arrays
    # rows that are damaged, or cannot be read any more
    lost = [i for i in np.flatnonzero(found) if i not in failed]
    yield from compute(chunks(np.array(lost, dtype=np.intp), front.batch_size))


def _compute(
    front: FeaturePass,
    inputs: Vectors,
    indices: Iterable[NDArray[np.intp]],
    failed: dict[int, str],
    on_error: str,
) -> Iterator[Outputs]:
    for batch in front.load(inputs, indices):
        failed.update(batch.failed)
        # once an error is certain, the other files are only read, to name all
        if batch.values is not None and not (failed and on_error == "raise"):
            yield batch.index, front.run(batch.values)
    if failed and on_error == "raise":
        report_unreadable(inputs, failed, on_error)


def report_unreadable(inputs: Any, failed: dict[int, str], on_error: str) -> None:
    """Warn of images that cannot be read, or raise an error."""
    inputs, failed = inputs.of_images(failed)
    index = sorted(failed)
    message = (
        f"{len(index)} of {len(inputs)} images cannot be read: "
        f"{inputs.name(index)}. The first says: {failed[index[0]]}."
    )
    if on_error == "raise":
        raise ValueError(
            f"{message} Repair or remove them, or set on_error='skip' to give them "
            "NaN as a score."
        )
    warnings.warn(f"{message} They were skipped.", UserWarning, stacklevel=2)
