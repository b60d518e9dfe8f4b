"""CIFAR-10 and the 20 super-classes of CIFAR-100, read from their python batches."""

from __future__ import annotations

import os
import pickle
from numbers import Integral
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import get_data_home
from sklearn.utils import Bunch
from sklearn.utils._param_validation import Options, StrOptions, validate_params

_SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html"


_RECONSTRUCT = np.empty(0).__reduce__()[0]

_ALLOWED = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    # The published batches name numpy 1's module, those written today numpy 2's.
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickle numpy arrays and plain Python values only: other pickles run code."""

    def find_class(self, module: str, name: str) -> object:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"{module}.{name} is not allowed in a CIFAR batch"
            ) from None


def _read(path: Path, *keys: str) -> list:
    """Read a pickled dict and return the values of `keys`."""
    try:
        with path.open("rb") as file:
            # latin1 is numpy's own choice for arrays pickled by Python 2.
            content = _ArrayUnpickler(file, encoding="latin1").load()
        return [content[key] for key in keys]
    except FileNotFoundError:
        raise
    except Exception as error:  # a broken pickle may raise nearly anything
        raise ValueError(
            f"{str(path)!r} is not a whole CIFAR batch ({error!r}); fetch it anew from "
            f"{_SOURCE}."
        ) from error


@validate_params(
    {
        "n_classes": [Options(Integral, {10, 20})],
        "split": [StrOptions({"train", "test"})],
        "data_home": [str, os.PathLike, None],
        "return_X_y": ["boolean"],
    },
    prefer_skip_nested_validation=True,
)
def load_cifar(
    n_classes: int = 10,
    split: str = "train",
    *,
    data_home: str | os.PathLike[str] | None = None,
    return_X_y: bool = False,
) -> Bunch | tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Load CIFAR-10 or the 20 super-classes of CIFAR-100 from python batches.

    Nothing is downloaded. The folder is the one which torchvision makes, or which
    the archive holds.

    Parameters
    ----------
    n_classes : {10, 20}, default=10
        10 for CIFAR-10, 20 for CIFAR-100 with its super-classes.
    split : {"train", "test"}, default="train"
        The 50000 training or the 10000 test images.
    data_home : str, path-like or None, default=None
        Folder which holds ``cifar-10-batches-py`` or ``cifar-100-python``. None
        stands for :func:`sklearn.datasets.get_data_home`.
    return_X_y : bool, default=False
        Whether to return ``(images, target)`` instead of a Bunch.

    Returns
    -------
    bunch : :class:`~sklearn.utils.Bunch`
        The data, with these entries.

        images : ndarray of shape (n_images, 32, 32, 3), uint8
            Red, green and blue, 0 to 255.
        target : ndarray of shape (n_images,), int64
            Classes 0 to ``n_classes - 1``.
        target_names : list of str
            Names of the classes.
        DESCR : str
            What the data are.
    (images, target) : tuple of ndarray
        If `return_X_y` is true.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If a file is truncated, holds anything but arrays and plain values, or is
        not a CIFAR batch, or a parameter is invalid.

    References
    ----------
    .. [1] Krizhevsky, A. (2009). Learning multiple layers of features from tiny
       images. Technical report, University of Toronto.

    Examples
    --------
    >>> from skdeepad.datasets import load_cifar
    >>> cifar = load_cifar(10, "test", data_home="data")  # doctest: +SKIP
    >>> cifar.images.shape  # doctest: +SKIP
    (10000, 32, 32, 3)
    """
    home = Path(get_data_home() if data_home is None else data_home).expanduser()
    if n_classes == 10:
        dataset, folder, archive = "CIFAR10", "cifar-10-batches-py", "cifar-10-python"
        batches = [f"data_batch_{i}" for i in range(1, 6)]
        names = batches if split == "train" else ["test_batch"]
        labels_key, meta, names_key = "labels", "batches.meta", "label_names"
    else:
        dataset, folder, archive = "CIFAR100", "cifar-100-python", "cifar-100-python"
        names = [split]
        labels_key, meta, names_key = "coarse_labels", "meta", "coarse_label_names"
    try:
        contents = [_read(home / folder / name, "data", labels_key) for name in names]
        (target_names,) = _read(home / folder / meta, names_key)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"There is no file {error.filename!r}. Fetch {archive}.tar.gz from "
            f"{_SOURCE} and extract it, or let torchvision.datasets.{dataset}(root, "
            f"download=True) do so, and pass as data_home the folder which then holds "
            f"{folder}."
        ) from error
    images = np.concatenate([data for data, _ in contents])
    target = np.concatenate([labels for _, labels in contents]).astype(np.int64)
    if images.dtype != np.uint8 or images.shape != (len(target), 3 * 32 * 32):
        raise ValueError(
            f"{str(home / folder)!r} does not hold CIFAR: {images.dtype} data of shape "
            f"{images.shape} and {len(target)} labels; expected uint8, (n, 3072) and n."
        )
    images = np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    if return_X_y:
        return images, target
    return Bunch(
        images=images,
        target=target,
        target_names=list(target_names),
        DESCR=f"{dataset}, {n_classes} classes, {split} split.",
    )
