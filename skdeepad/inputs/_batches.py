"""Samples -> batches; files are read ahead, in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import shorten
from ._samples import ImagePaths, Vectors

READ_AHEAD = 2  # batches in memory besides the one in use


@dataclass(frozen=True)
class Batch:
    """Some samples: their positions in X, their values, and the unreadable ones."""

    index: NDArray[np.intp]
    values: Tensor | None  # None where no sample could be read
    failed: dict[int, str]


def load_batches(
    inputs: Vectors,
    indices: Iterable[NDArray[np.intp]],
    size: tuple[int, int] | None,
    channels: int | None,
) -> Iterator[Batch]:
    """Load one batch of samples after the other.

    `size` and `channels` are what images are brought to (None: left as they are).
    Vectors stay as they are; images are in [0, 1]. Files that cannot be read are left
    out of a batch's `index`, and named in `failed`.
    """
    if not isinstance(inputs, ImagePaths):
        for index in indices:
            yield Batch(index, inputs.batch(index, size, channels), {})
        return
    threads = inputs.threads or max(2, torch.get_num_threads())
    pool = ThreadPoolExecutor(max_workers=threads)
    try:
        waiting: deque[list[tuple[int, Future[Tensor]]]] = deque()
        for index in indices:
            waiting.append(
                [(int(i), pool.submit(inputs.read, i, size, channels)) for i in index]
            )
            if len(waiting) > READ_AHEAD:
                yield _collect(waiting.popleft())
        while waiting:
            yield _collect(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(reading: list[tuple[int, Future[Tensor]]]) -> Batch:
    index, images, failed = [], [], {}
    for i, future in reading:
        try:
            images.append(future.result())
            index.append(i)
        except (OSError, ValueError) as error:
            failed[i] = shorten(str(error), 160)
    if len(shapes := {tuple(image.shape) for image in images}) > 1:
        raise ValueError(
            f"X has images of different shapes ({shorten(str(sorted(shapes)))}), and "
            "neither image_size nor the backbone tells which they are to have. Set "
            "image_size, and convert all images to grey or all to colour."
        )
    values = torch.stack(images) if images else None
    return Batch(np.array(index, dtype=np.intp), values, failed)
