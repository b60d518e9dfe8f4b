"""Large images for `PatchDetector`: tiles are scored, and put together again.

Where images are not cut, each is the only row that it owns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from ..inference import Arrays, Outputs
from ..inputs import Tiles, cells_covered, check_size, read_region
from ..scorers._base import row_digests


def check_tiles(detector: Any) -> tuple[int, int] | None:
    """Give the size of tiles, if there are any, and refuse what does not suit them."""
    if detector.tile_size is None:
        return None
    if detector.backbone_.vectors:
        raise ValueError("tile_size is for images; X holds vectors.")
    if detector.aggregation == "reweighted":
        raise ValueError(
            "aggregation='reweighted' is not for tiles. Set aggregation='max' or "
            "'top', or tile_size=None."
        )
    gaussians = isinstance(detector.scorer, str) and detector.scorer == "gaussian"
    if gaussians and detector.positions == "each":
        raise ValueError(
            "positions='each' is for aligned images, and a tile may show any part of "
            "one. Set positions='shared', or tile_size=None."
        )
    return check_tile_size(detector.tile_size)


def check_tile_size(size: Any) -> tuple[int, int]:
    """Give the height and width of tiles."""
    pair = (size, size) if isinstance(size, Integral) else size
    height, width = check_size("tile_size", pair)
    return height, width


def region(
    detector: Any, raster: tuple[int, int]
) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_]]:
    """Read the mask; tell which positions it leaves. Of tiles, `Tiles` will tell."""
    cells = np.ones(raster, dtype=bool)
    if detector.mask is None:
        return None, cells
    mask = read_region(detector.mask, detector)
    if detector.tile_size is None:
        cells = cells_covered(mask, raster)
    if not cells.any():
        raise ValueError(
            f"mask leaves none of the {raster[0]} x {raster[1]} positions: it must be "
            "nonzero where to look, in a region that is larger."
        )
    return mask, cells


def owners(inputs: Any) -> NDArray[np.intp]:
    """Give the number of the image that each row is of."""
    return inputs.owner if isinstance(inputs, Tiles) else np.arange(len(inputs))


def of_images(
    digests: NDArray[np.uint64],
    means: NDArray[np.float32],
    owner: NDArray[np.intp],
    n: int,
) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """Give digests and means of n images by those of their rows."""
    whole = np.zeros(n, np.uint64)
    sums: NDArray[np.float32] = np.zeros((n, means.shape[1]), np.float32)
    np.add.at(whole, owner, digests)
    np.add.at(sums, owner, means)
    sums /= np.bincount(owner, minlength=n)[:, None]
    return whole, sums


def inside(
    inputs: Any, index: NDArray[np.intp], patches: NDArray[Any], folds: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Give the patches of some rows that the mask leaves, and the folds of them."""
    if not isinstance(inputs, Tiles):  # of images there are no others
        return patches, folds
    cells = inputs.cells(index)
    if cells.all():
        return patches, folds
    return patches[cells][:, None], np.repeat(folds, cells.sum(axis=1))


def hidden(inputs: Any, index: NDArray[np.intp], scores: NDArray[Any]) -> NDArray[Any]:
    """Put NaN in the place of scores outside of the mask."""
    if isinstance(inputs, Tiles):
        scores[~inputs.cells(index)] = np.nan
    return scores


def mean_of_positions(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Average rows, less NaN; where there is nothing else, the mean of all."""
    missing = np.isnan(scores)
    if not missing.any():
        return np.asarray(scores.mean(axis=0, dtype=np.float64))
    counts = (~missing).sum(axis=0)
    mean = np.nansum(scores, axis=0, dtype=np.float64) / np.maximum(counts, 1)
    return np.where(counts > 0, mean, np.nanmean(scores, dtype=np.float64))


def whole_images(
    batches: Iterable[Outputs], tiles: Tiles
) -> Iterator[tuple[int, Arrays]]:
    """Give the number of one image after the other, and what its tiles have.

    Images of which a tile could not be read are left out. Only what belongs to images
    that are not complete is held.
    """
    n_tiles = np.bincount(tiles.owner)
    waiting: dict[int, dict[int, list[Any]]] = {}
    for index, arrays in batches:
        for k, *found in zip(index, *arrays, strict=True):
            image = int(tiles.owner[k])
            rows = waiting.setdefault(image, {})
            rows[k] = found
            if len(rows) == n_tiles[image]:
                columns = zip(*(rows[k] for k in sorted(rows)), strict=True)
                yield image, [np.stack(column) for column in columns]
                del waiting[image]


def score_images(
    detector: Any, tiles: Tiles, n: int
) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
    """Give digests and scores of n images; NaN for those that cannot be read."""
    digests = np.zeros(n, dtype=np.uint64)
    scores = np.full(n, np.nan)
    rows = (
        (index, [row_digests(patches), detector._scores_of(tiles, index, patches)])
        for index, patches in detector._features(tiles)
    )
    for i, (names, found) in whole_images(rows, tiles):
        digests[i] = names.sum()
        scores[i] = -detector._aggregate(found[~np.isnan(found)][None])[0]
    return digests, scores


def peaks(detector: Any, tiles: Tiles, rasters: Iterable[Any]) -> NDArray[np.float64]:
    """Give the maxima of images' maps, by the scores of their tiles."""
    maps = blend(detector._drawn(tiles, rasters), tiles)
    return np.array([detector._inside(found).max() for _, found in maps], np.float64)


def by_count(
    scores: NDArray[np.floating[Any]], owner: NDArray[np.intp]
) -> Iterator[tuple[NDArray[np.intp], NDArray[Any]]]:
    """Give the numbers of images with as many positions, and these positions' scores.

    Positions of NaN do not count.

    Parameters
    ----------
    scores : ndarray of shape (n_rows, n_positions)
    owner : ndarray of int, shape (n_rows,)
        The image that a row is of, in ascending order.
    """
    inside = ~np.isnan(scores)
    of_score = np.repeat(owner, scores.shape[1])[inside.ravel()]
    scores = scores[inside]
    counts = np.bincount(of_score)
    for count in np.unique(counts[counts > 0]):
        images = np.flatnonzero(counts == count)
        yield images, scores[counts[of_score] == count].reshape(len(images), count)


def fill(rasters: NDArray[np.float32]) -> NDArray[np.float32]:
    """Put the nearest score of the same raster in the place of NaN."""
    filled = rasters.copy()
    for raster, missing in zip(filled, np.isnan(rasters), strict=True):
        if missing.any():
            at = distance_transform_edt(
                missing, return_distances=False, return_indices=True
            )
            raster[:] = raster[tuple(at)]
    return filled


def blend(
    maps: Iterable[tuple[int, NDArray[np.float32]]], tiles: Tiles
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Put maps of tiles, at the tiles' size, together to maps of images.

    Where tiles overlap their mean is taken, weighted by pyramids, which fall to nearly
    0 at the tiles' borders: no seam is seen.
    """
    n_tiles = np.bincount(tiles.owner)
    waiting: dict[int, list[Any]] = {}
    for k, found in maps:
        image = int(tiles.owner[k])
        if n_tiles[image] == 1 and found.shape == tiles.sizes[image]:
            yield image, found
            continue
        if image not in waiting:
            empty = np.zeros(tiles.sizes[image], np.float32)
            waiting[image] = [0, empty, empty.copy()]
        weights = np.outer(*map(ramp, found.shape))
        _, sums, totals = waiting[image]
        sums[tiles.box(k)] += weights * found
        totals[tiles.box(k)] += weights
        waiting[image][0] += 1
        if waiting[image][0] == n_tiles[image]:
            del waiting[image]
            np.divide(sums, totals, out=sums, where=totals > 0)
            yield image, sums


def ramp(n: int) -> NDArray[np.float32]:
    """Rise from nearly 0 to nearly 1 in the middle, and fall again."""
    return (1 - np.abs(np.arange(0.5, n) * 2 / n - 1)).astype(np.float32)
