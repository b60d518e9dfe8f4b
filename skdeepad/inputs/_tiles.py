"""Large images, cut into tiles: each tile is a sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ._decode import fit_channels
from ._masks import cells_covered, resized_mask
from ._samples import ImagePaths, Images, named_by

Box = tuple[int, int, int, int]  # top, left, bottom, right
Size = tuple[int, int]  # height and width
UNKNOWN = 0, 0  # size of an image that cannot be read


class Tiles(ImagePaths):
    """Tiles of images, one image's after the other's.

    Tiles lie evenly spaced inside their image, in rows and columns, and nothing is
    padded: see `starts`. A side of an image that is shorter than a tile's is one tile.

    Parameters
    ----------
    images : Images or ImagePaths
        What is cut.
    size : (int, int)
        Height and width of a tile in pixels.
    overlap : float
        The share of a tile's side, at least, that the next one has in common with it.
    raster : (int, int)
        Rows and columns of positions that are told apart in a tile.
    mask : ndarray of bool, shape (height, width), or None
        Where to look; it is resized to each image. Tiles of which it leaves no
        position are left out.

    Attributes
    ----------
    rows : ndarray of int, shape (n_tiles, 6)
        The image's number, the tile's top, left, bottom and right, and its number in
        `inside`. An image whose size cannot be looked up has one tile of no pixels.
    inside : ndarray of bool, shape (n_kinds, n_positions)
        Which positions the mask covers by half at least.
    sizes : list of (int, int)
        Height and width of each image.
    """

    threads = 1  # which keeps the image that is being cut

    def __init__(
        self,
        images: Any,
        size: Size,
        overlap: float,
        raster: Size = (1, 1),
        mask: NDArray[np.bool_] | None = None,
    ) -> None:
        self.images = images
        self.sizes = [image_size(images, i) for i in range(len(images))]
        kinds = [np.ones(raster[0] * raster[1], dtype=bool)]
        places: dict[Size, list[tuple[int, ...]]] = {}
        for whole in dict.fromkeys(self.sizes):
            places[whole] = [(*box, 0) for box in boxes(whole, size, overlap)]
            if mask is not None and whole != UNKNOWN:
                at_size = resized_mask(mask, whole)
                found = [
                    (
                        b,
                        cells_covered(
                            at_size[b[0] : b[2], b[1] : b[3]], raster
                        ).ravel(),
                    )
                    for *b, _ in places[whole]
                ]
                found = [(b, cells) for b, cells in found if cells.any()]
                if not found:
                    raise ValueError(
                        f"mask leaves no position of an image of {whole[0]} x "
                        f"{whole[1]} pixels: it must be nonzero where to look, in a "
                        "region that is larger."
                    )
                places[whole] = [(*b, len(kinds) + k) for k, (b, _) in enumerate(found)]
                kinds += [cells for _, cells in found]
        rows = [(i, *p) for i, whole in enumerate(self.sizes) for p in places[whole]]
        super().__init__(np.array(rows, dtype=np.intp).reshape(-1, 6))
        self.inside = np.array(kinds)
        self._opened: tuple[int, Any] = -1, None
        self._named: tuple[int, bytes] = -1, b""

    @property
    def owner(self) -> NDArray[np.intp]:
        """The number of each tile's image, shape (n_tiles,)."""
        return self.rows[:, 0]

    def cells(self, index: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Tell which positions of tiles are looked at, shape (n, n_positions)."""
        return self.inside[self.rows[index, 5]]

    def box(self, i: int) -> tuple[slice, slice]:
        """Give a tile's place in its image."""
        _, top, left, bottom, right, _ = self.rows[i]
        return slice(top, bottom), slice(left, right)

    def read(self, i: int, size: Size | None, channels: int | None) -> Tensor:
        """Cut and resize one tile, without batch axis.

        The image stays decoded until another one's turn comes.
        """
        image = int(self.owner[i])
        if self._opened[0] != image:
            self._opened = -1, None  # never two at a time
            self._opened = image, self.images.open(image)
        rows, columns = self.box(i)
        whole: Images = self._opened[1]
        part = Images(whole.rows[:, :, rows, columns], whole.white)
        return fit_channels(part.batch(np.array([0]), size, channels)[0], channels)

    def size(self, i: int) -> Size:
        """Give the height and width of a tile."""
        rows, columns = self.box(i)
        return rows.stop - rows.start, columns.stop - columns.start

    def digest(self, i: int) -> bytes:
        """Name a tile by its image's content and its place."""
        image = int(self.owner[i])
        if self._named[0] != image:
            self._named = image, self.images.digest(image)
        return named_by(self._named[1] + self.rows[i, 1:5].tobytes())

    def of_images(self, failed: Mapping[int, str]) -> tuple[Any, dict[int, str]]:
        """Give the images, and those of them that cannot be read, with what it says."""
        return self.images, {int(self.owner[i]): failed[i] for i in sorted(failed)}


def image_size(images: Any, i: int) -> Size:
    """Look up the height and width of an image."""
    try:
        height, width = images.size(i)
    except Exception:  # whatever Pillow, or a data set, raises: reading it will tell
        return UNKNOWN
    return height, width


def boxes(image: Size, tile: Size, overlap: float) -> list[Box]:
    """Give the places of an image's tiles, row by row."""
    height, width = (min(a, b) for a, b in zip(image, tile, strict=True))
    return [
        (top, left, top + height, left + width)
        for top in starts(image[0], tile[0], overlap)
        for left in starts(image[1], tile[1], overlap)
    ]


def starts(length: int, tile: int, overlap: float) -> list[int]:
    """Tell where tiles begin along one side of an image.

    As few as keep the overlap, evenly spaced, the first one at the start of the side
    and the last one at its end::

        n = ceil((length - tile) / (tile (1 - overlap))) + 1
    """
    if length <= tile:
        return [0]
    n = math.ceil((length - tile) / (tile * (1 - overlap)) - 1e-9) + 1
    return np.linspace(0, length - tile, n).round().astype(int).tolist()
