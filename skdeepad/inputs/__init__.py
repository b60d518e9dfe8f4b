"""What X may be, turned into batches."""

from ._batches import Batch, load_batches
from ._inputs import check_inputs, check_size, open_inputs
from ._items import ImageItems
from ._masks import cells_covered, read_mask, read_region, resized_mask
from ._samples import ImagePaths, Images, Vectors, chunks
from ._tiles import Tiles
from ._warnings import warn_of_dark_images, warn_of_flat_images

__all__ = [
    "Batch",
    "ImageItems",
    "ImagePaths",
    "Images",
    "Tiles",
    "Vectors",
    "cells_covered",
    "check_inputs",
    "check_size",
    "chunks",
    "load_batches",
    "open_inputs",
    "read_mask",
    "read_region",
    "resized_mask",
    "warn_of_dark_images",
    "warn_of_flat_images",
]
