"""Real texture photographs with painted defects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from numbers import Integral

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial import KDTree
from sklearn.utils import Bunch, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions, validate_params

# A defect whose pixels change by fewer grey levels than this, on average, is drawn
# anew: a blurred spot in the middle of a plain brick would be one nobody can see.
_VISIBLE = 10


def _patches(
    photo: NDArray[np.uint8], n: int, size: int, rng: np.random.RandomState
) -> NDArray[np.uint8]:
    """Cut `n` square patches at different places, mirrored at random."""
    places = np.maximum(np.subtract(photo.shape, size - 1), 0)
    if places.prod() < n:
        raise ValueError(
            f"texture, or its half, has {photo.shape[0]} x {photo.shape[1]} pixels: "
            f"too few for {n} different patches of {size} x {size}. Pass a larger "
            "photograph, or lower image_size."
        )
    corners = np.unravel_index(rng.choice(places.prod(), size=n, replace=False), places)
    mirrored = rng.choice([-1, 1], size=(n, 2))
    patches = np.empty((n, size, size), dtype=photo.dtype)
    for i, (top, left) in enumerate(zip(*corners, strict=True)):
        patch = photo[top : top + size, left : left + size]
        patches[i] = patch[:: mirrored[i, 0], :: mirrored[i, 1]]
    return patches


def _centred_grid(size: int, rng: np.random.RandomState) -> NDArray[np.float64]:
    """Coordinates (2, size, size) relative to a random point of the inner patch."""
    centre = rng.uniform(0.2 * size, 0.8 * size, size=2)
    return np.indices((size, size)) - centre[:, None, None]


def _spot(size: int, radius: float, rng: np.random.RandomState) -> NDArray[np.float64]:
    """Pixels inwards of an irregular closed outline; negative outside of it."""
    y, x = _centred_grid(size, rng)
    angle = np.arctan2(y, x)
    waves = np.arange(2, 8)[:, None, None]
    heights, phases = rng.uniform(0, 1, size=(2, len(waves), 1, 1))
    wobble = heights / waves * np.cos(waves * angle + 2 * np.pi * phases)
    return radius * (1 + 0.6 * wobble.sum(axis=0)) - np.hypot(y, x)


def _rectangle(size: int, rng: np.random.RandomState) -> NDArray[np.float64]:
    """Pixels inwards of the border of a turned rectangle; negative outside of it."""
    y, x = _centred_grid(size, rng)
    turn = rng.uniform(0, np.pi)
    half_height, half_width = size * rng.uniform(0.09, 0.18, size=2)
    along = np.cos(turn) * x + np.sin(turn) * y
    across = np.cos(turn) * y - np.sin(turn) * x
    return np.minimum(half_width - abs(along), half_height - abs(across))


def _opacity(inwards: NDArray[np.float64], softness: float) -> NDArray[np.float64]:
    """Ramp from 0 to 1, `softness` pixels wide and 0.5 on the outline."""
    return np.clip(0.5 + inwards / softness, 0, 1)


def _sign(rng: np.random.RandomState) -> int:
    return rng.choice([-1, 1])


# A painter returns the opacity of the defect and the picture that shows through it.
_Painting = tuple[NDArray[np.float64], NDArray[np.float64]]


def _scratch(patch, donor, rng) -> _Painting:
    """Draw a thin line, a quadratic Bezier curve, lighter or darker than around."""
    size = len(patch)
    middle = rng.uniform(0.25, 0.75, size=2) * size
    direction = rng.uniform(0, np.pi)
    reach = rng.uniform(0.2, 0.45) * size
    arm = reach * np.array([np.sin(direction), np.cos(direction)])
    bend = rng.uniform(-0.5, 0.5) * arm[::-1] * [1, -1]
    t = np.linspace(-1, 1, 4 * size)[:, None]
    points = middle + t * arm + t**2 * bend
    pixels = np.moveaxis(np.indices((size, size)), 0, -1)
    distance, _ = KDTree(points).query(pixels)
    half_width = max(0.7, rng.uniform(0.6, 1.0) * size / 64)
    contrast = rng.uniform(1.5, 2.5) * patch.std()
    paint = gaussian_filter(patch, size / 16) + _sign(rng) * contrast
    return _opacity(half_width - distance, 1), paint


def _blob(patch, donor, rng) -> _Painting:
    """Stain an irregular spot lighter or darker; the texture shines through."""
    size = len(patch)
    spot = _spot(size, rng.uniform(0.08, 0.16) * size, rng)
    shade = patch.mean() + _sign(rng) * rng.uniform(2, 3) * patch.std()
    return _opacity(spot, size / 16), patch + rng.uniform(0.6, 0.9) * (shade - patch)


def _cut_paste(patch, donor, rng) -> _Painting:
    """Paste a turned, perhaps mirrored, lighter or darker piece from elsewhere."""
    piece = np.rot90(donor, rng.randint(1, 4))[:, :: _sign(rng)]
    shift = _sign(rng) * rng.uniform(0.6, 1.2) * patch.std()
    return _opacity(_rectangle(len(patch), rng), rng.uniform(1, 2)), piece + shift


def _blur(patch, donor, rng) -> _Painting:
    """Put an irregular spot out of focus."""
    size = len(patch)
    spot = _spot(size, rng.uniform(0.12, 0.22) * size, rng)
    sigma = rng.uniform(2, 3) * max(1, size / 64)
    return _opacity(spot, size / 16), gaussian_filter(patch, sigma)


def _missing(patch, donor, rng) -> _Painting:
    """Break out an irregular piece: a flat hole, dark or as grey as around."""
    size = len(patch)
    hole = _spot(size, rng.uniform(0.08, 0.16) * size, rng)
    opacity = _opacity(hole, 1.5)
    around = patch[opacity > 0.5].mean()
    level = around * rng.choice([rng.uniform(0.4, 0.7), 1])
    return opacity, np.full_like(patch, level)


_PAINTERS: dict[str, Callable[..., _Painting]] = {
    "scratch": _scratch,
    "blob": _blob,
    "cut_paste": _cut_paste,
    "blur": _blur,
    "missing": _missing,
}


def _damaged_patch(
    photo: NDArray[np.uint8], size: int, kind: str, rng: np.random.RandomState
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Cut a test patch and paint one defect; return the patch and the mask."""
    while True:
        patch, donor = _patches(photo, 2, size, rng).astype(float)
        opacity, paint = _PAINTERS[kind](patch, donor, rng)
        damaged = np.rint(np.clip(patch + opacity * (paint - patch), 0, 255))
        mask = opacity > 0.5
        if abs(damaged - patch)[mask].mean() >= _VISIBLE:
            return damaged.astype(np.uint8), mask


def _photograph(texture: str | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Load a photograph of scikit-image, or check one that was given."""
    if not isinstance(texture, str):
        if texture.ndim != 2 or texture.dtype != np.uint8:
            raise ValueError(
                f"texture has shape {texture.shape} and dtype {texture.dtype}; pass a "
                "grey photograph of shape (height, width) and dtype uint8."
            )
        return texture
    try:
        import skimage.data
    except ImportError as error:
        raise ImportError(
            "make_texture_defects takes its photographs from scikit-image; install "
            "it with: pip install skdeepad[textures]"
        ) from error
    photo: NDArray[np.uint8] = getattr(skimage.data, texture)()
    return photo


@validate_params(
    {
        "texture": [StrOptions({"brick", "grass", "gravel"}), np.ndarray],
        "n_train": [Interval(Integral, 0, None, closed="left")],
        "n_test_good": [Interval(Integral, 0, None, closed="left")],
        "n_test_defective": [Interval(Integral, 0, None, closed="left")],
        "image_size": [Interval(Integral, 32, 128, closed="both")],
        "kinds": [list, tuple],
        "split": [StrOptions({"overlapping", "halves"})],
        "random_state": ["random_state"],
    },
    prefer_skip_nested_validation=True,
)
def make_texture_defects(
    texture: str | NDArray[np.uint8] = "brick",
    *,
    n_train: int = 200,
    n_test_good: int = 100,
    n_test_defective: int = 100,
    image_size: int = 64,
    kinds: Sequence[str] = ("scratch", "blob", "cut_paste", "blur", "missing"),
    split: str = "overlapping",
    random_state: int | np.random.RandomState | None = None,
) -> Bunch:
    """Cut patches of a real texture photograph and paint defects into some of them.

    A small stand-in for industrial inspection data which needs no download: the
    photographs come with scikit-image.

    Parameters
    ----------
    texture : {"brick", "grass", "gravel"} or ndarray, default="brick"
        A photograph of scikit-image, 512 x 512 pixels, or one of your own, uint8 of
        shape (height, width), in grey levels 0 to 255.
    n_train : int, default=200
        Number of training patches, all good.
    n_test_good : int, default=100
        Number of good test patches.
    n_test_defective : int, default=100
        Number of test patches with one defect each.
    image_size : int, default=64
        Side of the square patches in pixels of the photograph, 32 to 128.
    kinds : list or tuple of str, default=("scratch", "blob", "cut_paste", "blur", \
"missing")
        The kinds of defects, each painted equally often (give or take one):

        * "scratch": a thin curved line, lighter or darker than around it;
        * "blob": a soft-edged irregular stain, lighter or darker;
        * "cut_paste": a turned rectangle from another patch, made a little
          lighter or darker;
        * "blur": an irregular spot out of focus;
        * "missing": an irregular flat hole, dark or as grey as its surroundings.
    split : {"overlapping", "halves"}, default="overlapping"
        Where patches are cut. "overlapping": all anywhere in the photograph, so that
        new good patches are exchangeable with the training patches, and thresholds
        can be tested. "halves": training patches in its left half and test patches
        in its right half: they have no pixel in common, as on a production line, but
        the halves differ a little.
    random_state : int, RandomState instance or None, default=None
        Decides on the patches, the order of the test set and the defects. Pass an
        int for the same result on each call.

    Returns
    -------
    bunch : :class:`~sklearn.utils.Bunch`
        X_train : ndarray of shape (n_train, image_size, image_size), uint8
            Good patches.
        X_test : ndarray of shape (n_test, image_size, image_size), uint8
            Good and defective patches in random order,
            ``n_test = n_test_good + n_test_defective``.
        y_test : ndarray of shape (n_test,), int64
            +1 for good and -1 for defective patches, as in scikit-learn's outlier
            detectors.
        masks_test : ndarray of shape (n_test, image_size, image_size), bool
            The pixels of the defect; all False for good patches.
        kinds_test : ndarray of shape (n_test,), object
            "good" or the kind of the defect.
        DESCR : str
            What the data are.

    Raises
    ------
    ValueError
        If a parameter is out of its range, `kinds` is empty or has an unknown kind,
        or your photograph is no grey one of uint8 or too small for so many patches.
    ImportError
        If scikit-image is not installed.

    Notes
    -----
    Good patches, for training and for testing, are cut at different random places
    of the photograph and mirrored at random. By default they overlap, within the
    training set as much as between the sets: new good patches are to the training
    patches what these are to each other. That flatters detectors, which have seen
    parts of the test patches; with ``split="halves"`` they have not. Either way, a
    score says how well defects are found on this material, not on another photograph
    of it.

    A pixel belongs to the mask where the defect covers it by more than half. Pixels
    further than ``2 + image_size / 32`` from the mask are those of the photograph.
    Patch and defect are drawn again until the pixels of the mask change by at least
    10 of the 255 grey levels on average.

    The defects follow the idea of [1]_ and the kinds in [2]_.

    References
    ----------
    .. [1] Li, C.-L., Sohn, K., Yoon, J. and Pfister, T. (2021). CutPaste:
       Self-supervised learning for anomaly detection and localization. CVPR.
    .. [2] Bergmann, P., Fauser, M., Sattlegger, D. and Steger, C. (2019). MVTec AD:
       A comprehensive real-world dataset for unsupervised anomaly detection. CVPR.

    Examples
    --------
    >>> from skdeepad.datasets import make_texture_defects
    >>> bricks = make_texture_defects(
    ...     "brick", n_train=8, n_test_good=2, n_test_defective=5, random_state=0
    ... )
    >>> bricks.X_train.shape, bricks.X_test.shape
    ((8, 64, 64), (7, 64, 64))
    >>> sorted(bricks.kinds_test)
    ['blob', 'blur', 'cut_paste', 'good', 'good', 'missing', 'scratch']
    >>> bool((bricks.masks_test.any(axis=(1, 2)) == (bricks.y_test == -1)).all())
    True
    """
    if not kinds or not set(kinds) <= set(_PAINTERS):
        raise ValueError(
            f"kinds must name at least one of {list(_PAINTERS)} and nothing else, "
            f"got {kinds!r}."
        )
    rng = check_random_state(random_state)
    photo = _photograph(texture)
    n_test = n_test_good + n_test_defective
    if split == "halves":
        middle = photo.shape[1] // 2
        X_train = _patches(photo[:, :middle], n_train, image_size, rng)
        photo = photo[:, middle:]
        X_test = _patches(photo, n_test, image_size, rng)
    else:
        patches = _patches(photo, n_train + n_test, image_size, rng)
        X_train, X_test = patches[:n_train], patches[n_train:]
    masks_test = np.zeros(X_test.shape, dtype=bool)
    kinds_test = np.array(
        ["good"] * n_test_good + list(islice(cycle(kinds), n_test_defective)),
        dtype=object,
    )
    rng.shuffle(kinds_test)
    defective = kinds_test != "good"
    for i in np.flatnonzero(defective):
        X_test[i], masks_test[i] = _damaged_patch(photo, image_size, kinds_test[i], rng)
    origin = "a photograph that was given"
    if isinstance(texture, str):
        origin = f"scikit-image's photograph {texture!r} (CC0 licence)"
    return Bunch(
        X_train=X_train,
        X_test=X_test,
        y_test=np.where(defective, -1, 1),
        masks_test=masks_test,
        kinds_test=kinds_test,
        DESCR=(
            f"Patches of {image_size} x {image_size} pixels from {origin}, some of the "
            "test patches with artificial defects. Patches are cut at different "
            "places, and overlap"
            f"{'' if split == 'overlapping' else ', but those of the two sets'}."
        ),
    )
