"""What X may be: vectors, arrays of images, or paths of image files.

The one place that decides it. Nothing is copied or decoded here; batches are made
later, one at a time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import check_array
from torch.utils.data import DataLoader, SequentialSampler

from ..checks import (
    check_magnitude,
    check_rows,
    errors_name_x,
    is_tensor,
    plain,
    refuse_dates,
    shorten,
    to_array,
)
from ..runtime._files import list_images
from ..runtime._images import channels_first
from ._items import ImageItems, form, image_column, is_image, is_item, is_picture
from ._samples import (
    ImagePaths,
    Images,
    Shape,
    Vectors,
    check_images,
)


def check_inputs(
    estimator: Any,
    X: Any,
    *,
    vectors: bool | None,
    image_shape: Shape | None,
    reset: bool,
) -> Vectors:
    """Decide what X is, and check it.

    Parameters
    ----------
    estimator : estimator
        On which scikit-learn's ``n_features_in_`` and ``feature_names_in_`` are set
        (`reset`) or checked, for 2-D X. Its `white`, and ``on_error="skip"``, which
        takes missing files for unreadable ones, count where it has them.
    X : array-like, tensor, sequence of paths or images, data set, or folder
        See docs/architecture.md, "Inputs".
    vectors : bool or None
        Whether the backbone takes vectors; None where X decides.
    image_shape : (channels, height, width) or (height, width) or None
        The shape of one image, where X does not tell.
    reset : bool
        Whether this is `fit`.

    Returns
    -------
    Vectors, Images, ImagePaths or ImageItems
        What X is.

    Raises
    ------
    ValueError
        If X is none of these, is empty, holds NaN or infinity, or values that are
        no pixels; the message names the remedy.
    FileNotFoundError
        If files are missing; the first of them are named.
    """
    if image_shape is not None:
        check_size("image_shape", image_shape)
    skip = getattr(estimator, "on_error", "raise") == "skip"
    white = getattr(estimator, "white", None)
    X = plain(open_inputs(X))
    if _is_list(X) and len(X) == 0:
        if skip and vectors is False and not reset:
            return ImagePaths(np.empty(0, dtype=object))
        raise ValueError("X is empty: Found 0 samples; is the folder's name right?")
    found = _as_paths(X, skip, white) or _as_items(X, white, image_shape)
    if found is not None:
        if vectors:
            what = "images" if isinstance(found, ImageItems) else "paths of images"
            raise ValueError(
                f"X holds {what}, but the backbone takes vectors. Choose "
                "a backbone for images, such as 'efficientnet_lite0'."
            )
        return found
    X = _stack(X)
    if getattr(X, "ndim", 2) <= 2:
        if not vectors:
            _refuse_text(X)
        rows = check_rows(estimator, X, reset=reset, dtype="numeric")
        if image_shape is None and vectors is not False:
            # networks compute in float32
            return Vectors(check_magnitude(rows, float(np.finfo(np.float32).max)))
        return check_images(Images(_unflatten(rows, image_shape), white))
    if vectors:
        raise ValueError(
            f"X has images of shape {X.shape[1:]}, but the backbone takes vectors. "
            "Choose a backbone for images, such as 'efficientnet_lite0'."
        )
    if X.ndim > 4:
        raise ValueError(
            f"Found array with dim {X.ndim} as X, while images have 3 (grey) or 4. "
            "Reshape X to (n, height, width, channels)."
        )
    with errors_name_x():
        refuse_dates(X)
        X = check_array(
            X,
            allow_nd=True,
            dtype="numeric",
            ensure_all_finite=False,  # `check_pixels` names the image
            estimator=estimator,
            input_name="X",
        )
    return check_images(Images(channels_first(X, image_shape), white))


def open_inputs(X: Any) -> Any:
    """Give what can be indexed: the paths of a folder, a loader's data set, a column.

    Nothing is read.
    """
    if isinstance(X, str | os.PathLike):
        if not os.path.isdir(X):
            raise ValueError(
                f"X={shorten(os.fspath(X))!r} is one path; pass a list of image paths, "
                f"or a folder.{_url_hint(X)}"
            )
        return list_images(X)
    if isinstance(X, DataLoader):
        if not isinstance(X.sampler, SequentialSampler):
            raise ValueError(
                "X is a DataLoader that changes the order of its data set, in which "
                "scores are given. Pass its data set (X.dataset), or shuffle=False."
            )
        return X.dataset
    if is_picture(X):
        raise ValueError("X is one image; pass [X], a list of images.")
    once = hasattr(X, "__iter__") and not hasattr(X, "__len__")
    if isinstance(X, Iterator) or (once and not hasattr(X, "__array__")):
        raise ValueError(
            f"X={shorten(repr(X))} can be read once only; pass list(X), or sorted(X)."
        )
    if isinstance(X, Mapping):
        X = X[image_column(X)]
    shape: Any = getattr(X, "shape", ())
    if hasattr(X, "columns") and len(shape) == 2 and shape[1] == 1:
        column = X[X.columns[0]]  # perhaps paths that a ColumnTransformer hands over
        values = column.to_list() if hasattr(column, "to_list") else []
        kinds = str | os.PathLike | Mapping
        given = any(isinstance(x, kinds) or is_image(x) for x in values)
        return values if given else X
    if hasattr(X, "to_list") and len(shape) == 1:
        return X.to_list()  # a column of pandas or polars
    return X


def _is_list(X: Any) -> bool:
    return isinstance(X, Sequence | np.ndarray) and getattr(X, "ndim", 1) == 1


def _as_paths(X: Any, skip: bool, white: float | None) -> ImagePaths | None:
    """Give a sequence of paths, or None if X is none."""
    if isinstance(X, np.ndarray) and X.ndim == 2 and X.shape[1] == 1:
        X = X[:, 0] if X.dtype.kind in "OUS" else X
    if not _is_list(X):
        return None
    if not any(isinstance(path, str | os.PathLike) for path in X):
        return None
    paths = np.empty(len(X), dtype=object)
    paths[:] = [x if skip else _path(x, i) for i, x in enumerate(X)]
    if skip:
        paths[:] = [Path(x) if isinstance(x, str) else x for x in paths]
        return ImagePaths(paths, white)
    # unlike Path.is_file, this takes names that are too long for none
    missing = [i for i, path in enumerate(paths) if not os.path.isfile(path)]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} image files are missing: "
            f"{ImagePaths(paths).name(missing)}{_url_hint(X[missing[0]])}"
        )
    return ImagePaths(paths, white)


def _url_hint(path: Any) -> str:
    url = re.match(r"\w\w+://", os.fspath(path))
    return ". URLs are not read: download the files first" if url else ""


def _as_items(
    X: Any, white: float | None, image_shape: Shape | None
) -> ImageItems | None:
    """Give a data set, or a list whose images differ, or None if X is none."""
    if isinstance(X, np.ndarray) and X.dtype == object and X.ndim == 1:
        X = list(X)
    if not isinstance(X, list | tuple):
        told = ("__array__", "__array_interface__", "dtype", "iloc", "columns")
        data_set = hasattr(X, "__getitem__") and hasattr(X, "__len__")
        if not data_set or any(hasattr(X, name) for name in told):
            return None
        return None if isinstance(X, Sequence) else ImageItems(X, white, image_shape)
    if is_item(X[0]):
        return ImageItems(X, white, image_shape)
    if not any(is_picture(x) or len(getattr(x, "shape", ())) > 1 for x in X):
        return None
    forms = {form(x) for x in X}
    if len(forms) == 1 and None not in forms:
        return None
    return ImageItems(X, white, image_shape)


def _refuse_text(X: Any) -> None:
    """Refuse a table with a column of text, which may be the paths."""
    if not hasattr(X, "columns") or not hasattr(X, "__getitem__") or not len(X):
        return
    for name in X.columns:
        if isinstance(next(iter(X[name])), str):
            raise ValueError(
                f"X is a table of {len(X.columns)} columns, and {name!r} holds text. "
                f"Pass that column alone, X[{name!r}], if it holds paths of images."
            )


def _path(path: Any, i: int) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"X holds paths, but X[{i}] is {shorten(repr(path))}.")
    return Path(path)


def check_size(name: str, size: Any) -> Shape:
    """Check the height and width of images, perhaps after their channels."""
    lengths = (2, 3) if name == "image_shape" else (2,)
    if len(size) not in lengths or not all(
        isinstance(side, Integral) and int(side) > 0 for side in size
    ):
        channels = "(channels, height, width) or " if 3 in lengths else ""
        raise ValueError(
            f"{name}={size!r} must be {channels}(height, width), in pixels."
        )
    return tuple(int(side) for side in size)


def _stack(X: Any) -> Any:
    """Stack a list of image arrays; lists of numbers are left to scikit-learn."""
    if isinstance(X, np.ndarray) and X.ndim == 1 and X.dtype == object:
        X = list(X)
    if not isinstance(X, list | tuple) or not (
        is_tensor(X[0]) or hasattr(X[0], "__array_interface__")
    ):
        return X  # neither tensors nor arrays, such as Pillow's images
    shapes = sorted({np.shape(x) for x in X})
    if len(shapes) > 1:
        raise ValueError(
            f"X holds rows of different shapes ({shorten(', '.join(map(str, shapes)))}"
            "); images have a height and a width, and vectors one length."
        )
    return np.stack([to_array(x) if is_tensor(x) else np.asarray(x) for x in X])


def _unflatten(rows: NDArray[Any], image_shape: Shape | None) -> NDArray[Any]:
    if image_shape is None:
        raise ValueError(
            f"X has rows of {rows.shape[1]} numbers, but the backbone takes images. "
            "Set image_shape=(channels, height, width) if each row is a flattened "
            "image; Reshape your data to (n, height, width, channels) otherwise, which "
            "is X[None] if X is one grey image."
        )
    if np.prod(image_shape) != rows.shape[1]:
        raise ValueError(
            f"X has {rows.shape[1]} features, but image_shape={tuple(image_shape)} is "
            f"expecting {np.prod(image_shape)} features as input."
        )
    height_width = tuple(image_shape[-2:])
    return rows.reshape(len(rows), -1, *height_width)
