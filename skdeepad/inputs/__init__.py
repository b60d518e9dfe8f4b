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

__all__ = [
    "Batch",
    "ImagePaths",
    "Images",
    "Vectors",
    "check_inputs",
    "check_size",
    "chunks",
    "load_batches",
]
