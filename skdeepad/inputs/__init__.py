"""What X may be, turned into batches."""

from ._batches import Batch, load_batches
from ._inputs import (
    ImagePaths,
    Images,
    Vectors,
    check_inputs,
    check_size,
    chunks,
)
from ._masks import read_mask

__all__ = [
    "Batch",
    "ImagePaths",
    "Images",
    "Vectors",
    "check_inputs",
    "check_size",
    "chunks",
    "load_batches",
    "read_mask",
]
