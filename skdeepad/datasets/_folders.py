"""Folders laid out as the MVTec AD data set is."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
from sklearn.utils import Bunch
from sklearn.utils._param_validation import validate_params

from ..runtime._files import SUFFIXES, list_images


def _mask_of(image: Path, masks: dict[str, Path]) -> str | None:
    mask = masks.get(f"{image.stem}_mask", masks.get(image.stem))
    return None if mask is None else str(mask)


@validate_params({"root": [str, os.PathLike]}, prefer_skip_nested_validation=True)
def load_image_folder(root: str | os.PathLike[str]) -> Bunch:
    """List the images of a folder laid out as the MVTec AD data set is.

    The layout [1]_ is::

        root/train/good/*                 good images to train on
        root/test/good/*                  good images to test on
        root/test/<kind>/*                defective images, one folder per kind
        root/ground_truth/<kind>/*        optional masks of the defects

    The mask of ``000.png`` is called ``000_mask.png`` or ``000.png``; its extension
    may differ from the image's. Images are files with a common image extension in
    lower or upper case; other and hidden files are left out.

    Parameters
    ----------
    root : str or path-like
        The folder of one category, such as ``mvtec/bottle``.

    Returns
    -------
    bunch : :class:`~sklearn.utils.Bunch`
        Only paths, so that estimators can read the images in batches.

        paths_train : ndarray of shape (n_train,), object
            Paths (str) of the training images, sorted.
        paths_test : ndarray of shape (n_test,), object
            Paths (str) of the test images, sorted by kind, then name.
        y_test : ndarray of shape (n_test,), int64
            +1 for good and -1 for defective images.
        kinds_test : ndarray of shape (n_test,), object
            Name of the folder of each test image, such as "good".
        masks_test : ndarray of shape (n_test,), object
            Path (str) of the mask, or None where there is none. The pixel metrics and
            `AnomalyMapDisplay` take these as they are.

    Raises
    ------
    FileNotFoundError
        If ``root/train/good`` or ``root/test`` is missing.
    ValueError
        If one of the two has no image.

    Warns
    -----
    UserWarning
        If some defective images have masks and others have none.

    References
    ----------
    .. [1] Bergmann, P., Fauser, M., Sattlegger, D. and Steger, C. (2019). MVTec AD:
       A comprehensive real-world dataset for unsupervised anomaly detection. CVPR.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from skdeepad.datasets import load_image_folder
    >>> with TemporaryDirectory() as root:
    ...     for name in ["train/good/0.png", "test/crack/0.png", "test/good/0.png"]:
    ...         path = Path(root, name)
    ...         path.parent.mkdir(parents=True)
    ...         path.touch()
    ...     bottle = load_image_folder(root)
    >>> bottle.kinds_test, bottle.y_test
    (array(['crack', 'good'], dtype=object), array([-1,  1]))
    """
    root = Path(root)
    train_folder, test_folder = root / "train" / "good", root / "test"
    for folder in (train_folder, test_folder):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"There is no folder {str(folder)!r}. root must hold train/good "
                "with good images, and test with one sub-folder for each kind of "
                "image."
            )
    train = list_images(train_folder, recursive=False)
    test, masks = [], []
    for folder in sorted(test_folder.iterdir()):
        if folder.is_dir() and not folder.name.startswith("."):
            mask_folder = root / "ground_truth" / folder.name
            by_stem = (
                {path.stem: path for path in list_images(mask_folder, recursive=False)}
                if mask_folder.is_dir()
                else {}
            )
            images = list_images(folder, recursive=False)
            test += images
            masks += [_mask_of(image, by_stem) for image in images]
    for folder, images in ((train_folder, train), (test_folder, test)):
        if not images:
            raise ValueError(
                f"There is no image in {str(folder)!r}. Files must end in "
                f"{', '.join(sorted(SUFFIXES))}."
            )
    kinds_test = np.array([path.parent.name for path in test], dtype=object)
    y_test = np.where(kinds_test == "good", 1, -1)
    without = [
        path
        for path, mask, label in zip(test, masks, y_test, strict=True)
        if mask is None and label == -1
    ]
    if without and any(masks):
        warnings.warn(
            f"{len(without)} defective images have no mask in {str(root)!r}, the first "
            f"is {str(without[0])!r}. Pixel metrics would count all their pixels as "
            "good: add the masks, or leave these images out of pixel metrics.",
            UserWarning,
            stacklevel=3,
        )
    return Bunch(
        paths_train=np.array([str(path) for path in train], dtype=object),
        paths_test=np.array([str(path) for path in test], dtype=object),
        y_test=y_test,
        kinds_test=kinds_test,
        masks_test=np.array(masks, dtype=object),
    )
