"""Pseudo-anomalies: normal samples, spoilt."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any
from uuid import uuid4
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from sklearn.base import BaseEstimator
from sklearn.utils._param_validation import Interval, validate_params

# How strong each kind is: such that detectors that differ find it to different degrees,
# on textures and on Fashion-MNIST alike.
_AREA = (0.02, 0.15)  # of the image, cut and pasted; as in the paper
_ASPECT = 3.3  # of its sides, at most; as in the paper
_CELLS = 4  # along each side
_MOVED = 4  # of these cells
_SIGMA = (0.01, 0.03)  # of the blur, of the image's sides
_NOISE = (0.05, 0.2)  # of the standard deviation of the channel
_SPREAD = 0.5  # of the standard deviation of the column
_MIXED = 0.25  # of the entries of a vector


def _cut_paste(image, rng):
    """Paste a rectangle of the image elsewhere in it."""
    sides = np.array(image.shape[1:])
    stretch = np.exp(rng.uniform(-0.5, 0.5) * np.log(_ASPECT))
    share = np.sqrt(rng.uniform(*_AREA)) * np.array([stretch, 1 / stretch])
    h, w = np.clip(np.rint(share * sides).astype(int), 1, sides)
    (top, to_top), (left, to_left) = (
        rng.integers(0, free + 1, size=2) for free in sides - (h, w)
    )
    piece = image[:, top : top + h, left : left + w]
    pasted = image.copy()
    pasted[:, to_top : to_top + h, to_left : to_left + w] = piece
    return pasted


def _patch_shuffle(image, rng):
    """Let a few cells of a grid change places."""
    h, w = (max(1, side // _CELLS) for side in image.shape[1:])
    columns = image.shape[2] // w
    n = image.shape[1] // h * columns
    cells = rng.choice(n, size=min(_MOVED, n), replace=False)
    shuffled = image.copy()
    for cell, other in zip(cells, np.roll(cells, 1), strict=True):
        (y, x), (v, u) = divmod(cell, columns), divmod(other, columns)
        piece = image[:, v * h : (v + 1) * h, u * w : (u + 1) * w]
        shuffled[:, y * h : (y + 1) * h, x * w : (x + 1) * w] = piece
    return shuffled


def _blur(image, rng):
    """Put the image out of focus."""
    sigma = rng.uniform(*_SIGMA) * np.array(image.shape[1:])
    return gaussian_filter(image, (0, *sigma))


def _noise(image, rng):
    """Add Gaussian noise to each channel, in proportion to its contrast."""
    sigma = rng.uniform(*_NOISE) * image.std(axis=(1, 2), keepdims=True)
    return image + sigma * rng.standard_normal(image.shape)


def _rotation(image, rng):
    """Turn by a quarter, half or three quarters; by half unless it is square."""
    square = image.shape[1] == image.shape[2]
    return np.rot90(image, rng.integers(1, 4) if square else 2, axes=(1, 2))


def _vector_noise(rows, rng):
    """Add Gaussian noise to each column, in proportion to its spread."""
    return rows + _SPREAD * rows.std(axis=0) * rng.standard_normal(rows.shape)


def _mix(rows, rng):
    """Take entries from other rows: each looks normal, but not beside the others."""
    return np.where(rng.random(rows.shape) < _MIXED, rng.permuted(rows, axis=0), rows)


# of one image, float32 of shape (channels, height, width) in [0, 1]
_OF_IMAGES: dict[str, Callable[..., NDArray[Any]]] = {
    "cut_paste": _cut_paste,
    "patch_shuffle": _patch_shuffle,
    "blur": _blur,
    "noise": _noise,
    "rotation": _rotation,
}
# of all rows
_OF_VECTORS: dict[str, Callable[..., NDArray[Any]]] = {
    "noise": _vector_noise,
    "mix": _mix,
}


@validate_params(
    {
        "kinds": [list, tuple, None],
        "image_shape": [list, tuple, None],
        "folder": [str, os.PathLike, None],
        "random_state": [Interval(Integral, 0, None, closed="left")],
    },
    prefer_skip_nested_validation=True,
)
def make_pseudo_anomalies(
    X: Any,
    kinds: Sequence[str] | None = None,
    *,
    image_shape: tuple[int, ...] | None = None,
    folder: str | os.PathLike[str] | None = None,
    random_state: int = 0,
) -> dict[str, Any]:
    """Spoil normal samples mildly, in several ways.

    Parameters
    ----------
    X : array-like or sequence of paths
        Normal samples: whatever the detectors of this package take.
    kinds : list or tuple of str, default=None
        Which pseudo-anomalies to make; None: all that X allows. Of images:

        * "cut_paste": a rectangle of 2 to 15 % of the image is pasted elsewhere in
          it, as in [1]_, section 2.2, without its colour jitter;
        * "patch_shuffle": four of 4 x 4 cells change places;
        * "blur": Gaussian, with a standard deviation of 1 to 3 % of the image's sides;
        * "noise": Gaussian, of 5 to 20 % of each channel's standard deviation;
        * "rotation": by 90, 180 or 270 degrees; by 180 unless the image is square.

        Of vectors:

        * "noise": Gaussian, of half of each column's standard deviation;
        * "mix": a quarter of the entries, at random, is shuffled within its columns.
    image_shape : (int, int, int) or (int, int), default=None
        (channels, height, width) or (height, width) of one image, where X does not
        tell: rows that are flattened images, or an ambiguous channel axis.
    folder : str or path, default=None
        Where the pseudo-anomalies of image files are written, as PNG; made where
        there is none. Those that lie there already, of the same files and
        `random_state`, are taken as they are.
    random_state : int, default=0
        Decides on what is drawn at random.

    Returns
    -------
    dict of str to array, or to list of Path
        For each kind, one pseudo-anomaly of each sample, in the same order: an array
        of X's shape and, for images, of its dtype; a data frame where X is one; or
        the paths of files.

    Raises
    ------
    ValueError
        If `kinds` names one that X does not allow, X is not what is described here,
        or holds paths and `folder` is None.
    OSError
        If image files cannot be read; they are all named.

    Notes
    -----
    What becomes of an image depends on its pixels and `random_state` alone: not on
    the other images, their order, or how they are stored. An image without contrast
    where it is spoilt may stay as it is. Vectors are spoilt by what their columns hold.

    The strengths were fixed once, on real textures and on Fashion-MNIST, such that
    detectors that differ find the pseudo-anomalies to different degrees.

    References
    ----------
    .. [1] Li, C.-L., Sohn, K., Yoon, J. and Pfister, T. (2021). CutPaste:
       Self-supervised learning for anomaly detection and localization. CVPR.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdeepad.datasets import make_pseudo_anomalies
    >>> X = load_digits().images / 16
    >>> spoilt = make_pseudo_anomalies(X[:100], ["cut_paste", "rotation"])
    >>> {kind: images.shape for kind, images in spoilt.items()}
    {'cut_paste': (100, 8, 8), 'rotation': (100, 8, 8)}
    """
    # torch comes with it, for which the import of a data set need not wait
    from skdeepad.inputs import check_inputs

    inputs: Any = check_inputs(
        BaseEstimator(), X, vectors=None, image_shape=image_shape, reset=True
    )
    of_vectors = inputs.shape is not None and len(inputs.shape) == 1
    makers = _OF_VECTORS if of_vectors else _OF_IMAGES
    kinds = list(makers) if kinds is None else kinds
    if not kinds or not set(kinds) <= set(makers):
        held = "vectors (or set image_shape)" if of_vectors else "images"
        raise ValueError(
            f"kinds={kinds!r}, but X holds {held}: choose at least one of "
            f"{list(makers)} and nothing else."
        )
    if of_vectors:
        made = {
            kind: makers[kind](inputs.rows, np.random.default_rng(random_state))
            for kind in kinds
        }
    elif inputs.shape is None:
        return _spoil_files(inputs, kinds, folder, random_state)
    else:
        made = {kind: np.empty(inputs.rows.shape, inputs.rows.dtype) for kind in kinds}
        for i, image in _read(inputs, range(len(inputs))):
            for kind in kinds:
                pixels = _spoil(image, kind, random_state)
                made[kind][i] = _quantize(pixels, inputs.rows.dtype, inputs.white)
    return {kind: _as_given(X, rows) for kind, rows in made.items()}


def _spoil(image: NDArray[np.float32], kind: str, random_state: int) -> NDArray[Any]:
    """Make one pseudo-anomaly, by random numbers of the image's own."""
    rng = np.random.default_rng([random_state, crc32(image.tobytes())])
    return np.clip(_OF_IMAGES[kind](image, rng), 0, 1)


def _quantize(pixels: NDArray[Any], dtype: Any, white: float) -> NDArray[Any]:
    """Give pixels in [0, 1] as others of this dtype are."""
    dtype = np.dtype(dtype)
    return (pixels if dtype.kind == "f" else np.rint(white * pixels)).astype(dtype)


def _as_given(X: Any, rows: NDArray[Any]) -> Any:
    """Give rows, of images channels first, the layout of X."""
    shape = np.shape(X)
    if len(shape) == 4 and rows.shape != shape:
        rows = np.moveaxis(rows, 1, -1)
    rows = rows.reshape(shape)
    return type(X)(rows, X.index, X.columns) if hasattr(X, "columns") else rows


def _read(inputs: Any, index: Any) -> Any:
    """Give positions and images, float32 in [0, 1]; files are read ahead."""
    from skdeepad.inputs import load_batches

    failed = {}
    for batch in load_batches(inputs, (np.array([i]) for i in index), None, None):
        failed.update(batch.failed)
        if batch.values is not None:
            yield batch.index[0], np.ascontiguousarray(batch.values[0].numpy())
    if failed:
        names = ", ".join(f"{inputs.rows[i]} ({why})" for i, why in failed.items())
        raise OSError(f"Some image files of X cannot be read: {names}. Leave them out.")


def _spoil_files(
    inputs: Any, kinds: Sequence[str], folder: Any, random_state: int
) -> dict[str, list[Path]]:
    from PIL import Image

    if folder is None:
        raise ValueError(
            "X holds paths. Set folder to where the new files are to be written."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [inputs.digest(i).hex() for i in range(len(inputs))]
    made = {
        kind: [folder / f"{name}-{kind}-{random_state}.png" for name in names]
        for kind in kinds
    }
    wanted = [
        i
        for i in range(len(inputs))
        if not all(files[i].exists() for files in made.values())
    ]
    for i, image in _read(inputs, wanted):
        # what has more than 8 bits, which only grey files have, keeps 16
        deep = (
            len(image) == 1
            and (_quantize(image, "u1", 255) / np.float32(255) != image).any()
        )
        for kind in kinds:
            pixels = _spoil(image, kind, random_state)
            pixels = _quantize(pixels, *(("u2", 65535) if deep else ("u1", 255)))
            pixels = pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)
            # whole, or not there, for processes that do the same at the same time
            part = folder / f"{uuid4().hex}.part"
            Image.fromarray(np.ascontiguousarray(pixels)).save(part, format="PNG")
            os.replace(part, made[kind][i])
    return made
