"""Images one by one: lists and data sets whose images may differ in size and layout."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..checks import is_tensor, shorten, to_array
from ..runtime._images import channels_first, to_pixels
from ._decode import fit_channels, image_size, read_image
from ._samples import (
    ImagePaths,
    Images,
    Shape,
    check_images,
    file_digest,
    read_pixels,
)

IMAGE_COLUMNS = ("image", "img", "path", "file")


class ImageItems(ImagePaths):
    """Images of a list or a data set, fetched when their batch comes.

    Attributes
    ----------
    rows : ndarray of int, shape (n,)
        Their positions in `source`.
    source : object with ``__getitem__``
        It gives images, (image, label) pairs, or dicts with a column of images.
    """

    threads = 1  # a data set need not be safe in several

    def __init__(
        self, source: Any, white: float | None = None, image_shape: Shape | None = None
    ) -> None:
        super().__init__(np.arange(len(source)), white)
        self.source = source
        self.image_shape = image_shape

    def _name(self, i: int) -> str:
        return f"X[{self.positions[i]}]"

    def _get(self, i: int) -> Any:
        """Give a path, or an image as `Images` of one."""
        try:
            image = image_in(self.source[int(self.rows[i])])
            if isinstance(image, str | os.PathLike):
                return image
            pixels, white = _pixels(image)
            rows = channels_first(pixels[None], self.image_shape)
            return check_images(Images(rows, self.white or white))
        except Exception as error:  # whatever a data set of the user's raises
            raise OSError(str(error) or repr(error)) from error

    def read(
        self, i: int, size: tuple[int, int] | None, channels: int | None
    ) -> Tensor:
        """Fetch, resize and return one image, without batch axis."""
        image = self._get(i)
        if not isinstance(image, Images):
            return read_image(image, size, channels, self.white)
        return fit_channels(image.batch(np.array([0]), size, channels)[0], channels)

    def open(self, i: int) -> Images:
        """Fetch one image, of which parts are wanted."""
        image = self._get(i)
        return image if isinstance(image, Images) else read_pixels(image, self.white)

    def size(self, i: int) -> tuple[int, int]:
        """Give the height and width of an image."""
        image = self._get(i)
        return image.size(0) if isinstance(image, Images) else image_size(image)

    def digest(self, i: int) -> bytes:
        """Name an image by its content, as an array or a file of it is named."""
        try:
            image = self._get(i)
        except OSError:  # reading it will tell
            return self._name(i).encode()
        if isinstance(image, Images):
            return image.digest(0)
        return file_digest(image, self.white)


def is_picture(x: Any) -> bool:
    """Tell an image of Pillow."""
    return hasattr(x, "getbands") and hasattr(x, "mode")


def is_image(x: Any) -> bool:
    """Tell an image in memory: of Pillow, an array or a tensor."""
    return is_picture(x) or (
        (is_tensor(x) or isinstance(x, np.ndarray)) and len(x.shape) >= 2
    )


def is_item(x: Any) -> bool:
    """Tell an (image, label) pair, or a dict with an image."""
    if isinstance(x, Mapping):
        return True
    return isinstance(x, tuple | list) and len(x) > 1 and is_image(x[0])


def image_in(item: Any) -> Any:
    """Give the image of an item of a data set."""
    if isinstance(item, Mapping):
        item = item[image_column(item)]
    elif isinstance(item, tuple | list) and item and not np.isscalar(item[0]):
        item = item[0] if len(item) == 1 or is_item(item) else item
    elif isinstance(item, tuple) and isinstance(item[0], str | os.PathLike):
        item = item[0]
    if isinstance(item, Mapping):  # of Hugging Face, not decoded
        from PIL import Image

        held = item.get("bytes")
        return item.get("path") if held is None else Image.open(io.BytesIO(held))
    return item


def image_column(item: Mapping[str, Any]) -> str:
    """Name the entry of a dict that is the image, or a list of images."""

    def holds(value: Any) -> bool:
        first = value[0] if isinstance(value, list) and value else value
        encoded = isinstance(first, Mapping) and {"bytes", "path"} <= set(first)
        return is_image(first) or encoded

    found = [name for name, value in item.items() if holds(value)]
    usual = [name for name in IMAGE_COLUMNS if name in (found or item)]
    if len(found) != 1 and not usual:
        raise ValueError(
            f"X has the columns {shorten(', '.join(map(str, item)))}, of which "
            f"{len(found)} hold images. Pass one column alone, such as X['image']"
        )
    return usual[0] if len(found) != 1 else found[0]


def form(x: Any) -> Any:
    """Give shape and type of an image that `np.asarray` tells all of, else None."""
    if is_picture(x):
        plain = x.mode in ("L", "RGB", "RGBA", "I;16") and not x.getexif().get(0x0112)
        plain = plain and "transparency" not in x.info
        return (x.size, x.mode) if plain else None
    if is_tensor(x) or hasattr(x, "__array_interface__"):
        return tuple(x.shape), str(x.dtype)
    return None


def _pixels(image: Any) -> tuple[NDArray[Any], float | None]:
    if is_picture(image):
        from PIL import ImageOps

        upright: Any = ImageOps.exif_transpose(image)
        return to_pixels(upright, 65535.0 if upright.format == "PNG" else 255.0)
    array = to_array(image) if is_tensor(image) else np.asarray(image)
    if array.ndim not in (2, 3) or array.dtype.kind not in "uifb":
        raise ValueError(f"it is {shorten(repr(image), 60)}, which is no image")
    return array, None
