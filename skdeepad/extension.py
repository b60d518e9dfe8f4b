"""What authors of new detectors build on, and how they check what they have built.

docs/extending.md shows how: "Write your own method in fifty lines".
"""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.base import clone
from sklearn.utils.estimator_checks import check_estimator

from .detectors._base import BackboneDetector
from .detectors._maps import AnomalyMapMixin
from .detectors._shares import PositionShares
from .detectors._trained import FineTunedDetector
from .draws import OwnDraws

__all__ = [
    "AnomalyMapMixin",
    "BackboneDetector",
    "FineTunedDetector",
    "OwnDraws",
    "PositionShares",
    "check_detector",
]

SIDE = 32  # of the images of these checks, in pixels
N_IMAGES = 60
N_DRAWS = 4
CONTAMINATION = 0.2


def check_detector(estimator: Any, *, scikit_learn: bool = True) -> None:
    """Check that a detector keeps the contract of scikit-learn, and of this package.

    Besides scikit-learn's own checks, on vectors: scores of images are finite and in
    float64, and depend neither on order, neighbours and repetition nor on the form
    in which images are given (grey levels or fractions, channels first or last, files);
    `fit` with a seed leaves the global random numbers alone and can be repeated; a
    `fit` that fails leaves the detector as it was; pickles score the same; maps, where
    there are some, depend on nothing but the image, too; and
    `contamination` is the share of new normal images flagged, within sampling error.

    Parameters
    ----------
    estimator : detector
        Not fitted, of a class that stands on `BackboneDetector`. Give it a small
        network and few steps: it is fitted a hundred times.
    scikit_learn : bool, default=True
        Whether scikit-learn's checks run, too.

    Returns
    -------
    None
        If all checks pass.

    Raises
    ------
    AssertionError, ValueError, TypeError
        What is wrong, by the first check that fails.

    Examples
    --------
    >>> from skdeepad import MahalanobisFeatureScorer
    >>> from skdeepad.extension import check_detector
    >>> check_detector(MahalanobisFeatureScorer(), scikit_learn=False)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few images, and few steps
        if scikit_learn:
            check_estimator(clone(estimator))
        for check in IMAGE_CHECKS:
            check(_small(estimator))


def _small(estimator: Any) -> Any:
    """Clone a detector, seeded, for small images."""
    return clone(estimator).set_params(image_size=SIDE, random_state=0)


def _images(n: int, seed: int) -> NDArray[np.uint8]:
    """Make colour images of a soft texture: uint8 of shape (n, 32, 32, 3)."""
    noise = np.random.default_rng(seed).normal(size=(n, SIDE, SIDE, 3))
    soft = gaussian_filter(noise, (0, 2, 2, 0))
    scaled = 128 + 40 * soft / soft.std()
    return np.asarray(scaled.clip(0, 255), dtype=np.uint8)


def _check_scores(detector: Any) -> None:
    X, new = _images(N_IMAGES, 0), _images(12, 1)
    scores = detector.fit(X).score_samples(new)
    assert scores.shape == (12,) and scores.dtype == np.float64
    assert np.isfinite(scores).all() and np.ptp(scores) > 0
    assert_array_equal(detector.decision_function(new), scores - detector.offset_)
    order = np.random.default_rng(0).permutation(12)
    assert_allclose(detector.score_samples(new[order]), scores[order], rtol=1e-12)
    alone = [detector.score_samples(new[i : i + 1])[0] for i in range(12)]
    assert_allclose(alone, scores, rtol=1e-12)
    assert_allclose(detector.score_samples(new), scores, rtol=1e-12)


def _check_forms(detector: Any) -> None:
    X, new = _images(N_IMAGES, 0), _images(6, 1)
    scores = detector.fit(X).score_samples(new)
    channels_first = np.moveaxis(new, 3, 1)
    fractions = new.astype(np.float32) / 255
    assert_allclose(detector.score_samples(channels_first), scores, rtol=1e-9)
    assert_allclose(detector.score_samples(fractions), scores, rtol=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{i}.png") for i in range(len(new))]
        for image, path in zip(new, paths, strict=True):
            Image.fromarray(image).save(path)
        assert_allclose(detector.score_samples(paths), scores, rtol=1e-9)


def _check_random_numbers(detector: Any) -> None:
    X = _images(N_IMAGES, 0)
    before = str(np.random.get_state()), torch.get_rng_state()
    scores = detector.fit(X).score_samples(X)
    assert str(np.random.get_state()) == before[0]
    assert_array_equal(torch.get_rng_state(), before[1])
    assert_array_equal(clone(detector).fit(X).score_samples(X), scores)


def _check_state(detector: Any) -> None:
    X, new = _images(N_IMAGES, 0), _images(6, 1)
    scores = detector.fit(X).score_samples(new)
    before = copy.copy(vars(detector))
    try:
        detector.fit(np.full_like(X, np.nan, dtype=np.float32))
    except ValueError:
        pass
    else:
        raise AssertionError("fit takes images that are not a number.")
    assert vars(detector).keys() == before.keys()
    assert_array_equal(detector.score_samples(new), scores)
    again = pickle.loads(pickle.dumps(detector))
    assert_array_equal(again.score_samples(new), scores)


def _check_false_alarms(detector: Any) -> None:
    detector.set_params(contamination=CONTAMINATION)
    n_new = 5 * N_IMAGES
    flagged = []
    for draw in range(N_DRAWS):
        detector.set_params(random_state=draw).fit(_images(N_IMAGES, 2 * draw))
        flagged.append((detector.predict(_images(n_new, 2 * draw + 1)) == -1).mean())
    trained = hasattr(detector, "validation_fraction")
    n_held_out = N_IMAGES // 3 if trained else N_IMAGES
    variance = CONTAMINATION * (1 - CONTAMINATION) * (1 / n_held_out + 1 / n_new)
    assert_allclose(
        np.mean(flagged), CONTAMINATION, atol=4 * np.sqrt(variance / N_DRAWS)
    )


def _check_maps(detector: Any) -> None:
    if not hasattr(detector, "anomaly_map"):
        return
    new = _images(6, 1)
    maps = detector.fit(_images(N_IMAGES, 0)).anomaly_map(new)
    assert maps.shape == (6, SIDE, SIDE) and maps.dtype == np.float32
    assert np.isfinite(maps).all() and (np.ptp(maps, axis=(1, 2)) > 0).all()
    rounding = 5e-3 * np.abs(maps).max()  # of gradients in bfloat16
    assert_allclose(detector.anomaly_map(new[::-1])[::-1], maps, atol=rounding)
    assert_allclose(detector.anomaly_map(new[2:3])[0], maps[2], atol=rounding)
    assert_array_equal(pickle.loads(pickle.dumps(detector)).anomaly_map(new), maps)
    if not np.isnan(detector.map_offset_):
        regions = detector.locate(new)
        assert (regions["decision"] < 0).all()
        assert (regions["peak"] > detector.map_offset_).all()


IMAGE_CHECKS: list[Callable[[Any], None]] = [
    _check_scores,
    _check_forms,
    _check_random_numbers,
    _check_state,
    _check_maps,
    _check_false_alarms,
]
