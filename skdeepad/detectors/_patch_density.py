"""Patches of images, and densities of them: a memory, Gaussians, any outlier detector.

Each density is given the patches of training images part by part, with the fold that an
image is in, and can be settled without one of the folds, whose images are then new to
it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from sklearn.base import BaseEstimator, clone
from sklearn.covariance import shrunk_covariance
from torch.nn import functional as F

from ..inference import Arrays, to_tensor
from ..scorers._base import center_and_scale, centred
from ..scorers._coreset import Coreset
from ..scorers._gaussian import Moments

Patches = NDArray[np.float32]  # of shape (n_images, n_positions, n_features)
N_FOLDS = 5
N_REWEIGHTED = 9  # neighbours of the nearest row in Eq. 7, as anomalib has it
SHRINKAGE = 0.1  # of the covariance by which patches in memory are whitened
RIDGE = 0.01  # on the diagonal of covariances: section III-B of PaDiM


def patch_maps(arrays: Arrays, pooling: int, unit: bool = False) -> torch.Tensor:
    """Put maps of several stages on the raster of the first, neighbourhoods averaged.

    Beyond the margin they count as 0. So features there, which are odd because the
    network has padded the image, count less.

    Parameters
    ----------
    arrays : list of ndarray
        What a pass gives for some images, a map of each stage.
    pooling : int
        Side of the neighbourhood.
    unit : bool, default=False
        Whether the features of each stage are brought to unit length.

    Returns
    -------
    Tensor of shape (n, n_channels, height, width)
        In float32.
    """
    return on_first_raster([to_tensor(array) for array in arrays], pooling, unit)


def on_first_raster(
    outputs: list[torch.Tensor], pooling: int, unit: bool
) -> torch.Tensor:
    """Do what `patch_maps` does to tensors."""
    maps = [output.float() for output in outputs]
    maps = [m.transpose(1, 2)[..., None] if m.ndim == 3 else m for m in maps]
    maps = [m[..., None, None] if m.ndim == 2 else m for m in maps]
    if pooling > 1:
        maps = [F.avg_pool2d(m, pooling, 1, pooling // 2) for m in maps]
    size = maps[0].shape[2:]
    maps = [
        m if m.shape[2:] == size else F.interpolate(m, size, mode="bilinear")
        for m in maps
    ]
    return torch.cat([F.normalize(m) if unit else m for m in maps], dim=1)


class PatchDensity:
    """Base of the densities."""

    _saved: ClassVar[dict[str, Any]] = {}

    def measure(self, patches: Patches) -> None:
        """Look at some images' patches, before any are learnt from."""

    def absorb(self, patches: Patches, folds: NDArray[np.intp]) -> None:
        """Learn from some images' patches."""
        raise NotImplementedError

    def settle(self, without: int | None = None) -> None:
        """Make ready for scoring, without the images of a fold."""
        raise NotImplementedError

    def finish(self) -> None:
        """Make ready for scoring new images, after the last part."""
        self.settle()

    def score(self, patches: Patches) -> NDArray[np.float64]:
        """Score patches: 0 at least, higher = more anomalous."""
        raise NotImplementedError


class PatchMemory(PatchDensity):
    """Distance to the nearest patch of a memory (PatchCore).

    The memory is made of a coreset for each fold of images, so that leaving one out is
    exact. For the Mahalanobis distance the features x of each stage are compressed, and
    then whitened by the covariance of all patches but the fold's that is left out::

        z = x / sqrt(|x|^2 + mean of |x|^2 over the patches of the first images)

    So patches of strong contrast do not count for it, as with unit length, and the
    noise of flat ones is not blown up.

    Parameters
    ----------
    n_patches : int
        The most that are kept.
    metric : {"mahalanobis", "cosine", "euclidean"}
        For "cosine", patches are made of a vector of unit length for each stage.
    widths : sequence of int
        Number of features of each stage.
    """

    _saved: ClassVar = {"coresets": Coreset, "moments": Moments}

    def __init__(self, n_patches: int, metric: str, widths: Sequence[int]) -> None:
        self.metric = metric
        self.widths = [int(width) for width in widths]
        size = n_patches // N_FOLDS, sum(self.widths)
        self.coresets = [Coreset(*size) for _ in range(N_FOLDS)]
        self.moments: list[list[Moments]] = [[] for _ in range(N_FOLDS)]
        self.squares: Any = 0.0  # sums of |x|^2, of each stage
        self.n_measured = 0

    def measure(self, patches: Patches) -> None:
        """Look at some images' patches, before any are learnt from."""
        rows = patches.reshape(-1, patches.shape[2])
        self.squares += np.array([squared_length(x).sum() for x in self._stages(rows)])
        self.n_measured += len(rows)

    def absorb(self, patches: Patches, folds: NDArray[np.intp]) -> None:
        """Learn from some images' patches."""
        rows = patches.reshape(-1, patches.shape[2])
        fold_of_row = np.repeat(folds, patches.shape[1])
        for fold in np.unique(folds):
            own = rows[fold_of_row == fold]
            if self.metric == "mahalanobis":
                stages = self._compressed(own)
                if not self.moments[fold]:
                    self.moments[fold] = [Moments(x) for x in stages]
                for moments, x in zip(self.moments[fold], stages, strict=True):
                    moments.update(x)
            self.coresets[fold].add(own)

    def sizes(self) -> NDArray[np.float64]:
        """Give the mean of |x|^2 over the patches of the first images, by stage."""
        return np.where(self.squares > 0, self.squares, 1) / self.n_measured

    def _stages(self, rows: Patches) -> list[Patches]:
        return np.split(rows, np.cumsum(self.widths)[:-1], axis=1)

    def join(self, others: Iterable[PatchMemory]) -> None:
        """Learn what others have learnt."""
        for other in others:
            for own, theirs in zip(self.coresets, other.coresets, strict=True):
                own.join(theirs)
            pairs = zip(self.moments, other.moments, strict=True)
            self.moments = [merged(pair) for pair in pairs]
        self.settle()

    def settle(self, without: int | None = None) -> None:
        """Make ready for scoring, without the images of a fold."""
        filled = [k for k in range(N_FOLDS) if len(self.coresets[k])]
        for k in filled:
            self.whitening = self._whitening([k])
            self.coresets[k].reduce(self._compared)
        self.used = [k for k in filled if k != without]
        self.whitening = self._whitening(self.used)
        self.origin, self.scale = center_and_scale(self._compared(self.rows()))

    def rows(self) -> Patches:
        """Give the patches in the memory."""
        return np.concatenate([self.coresets[k].rows for k in self.used])

    def _whitening(self, folds: Sequence[int]) -> list[NDArray[np.float64]]:
        """Give the matrices that whiten the stages; none if they are not whitened."""
        stages = merged(self.moments[k] for k in folds)
        return [whitening(moments) for moments in stages]

    def _compared(self, rows: Patches) -> NDArray[Any]:
        """Turn patches into what is compared by its Euclidean distance.

        In float64, as products in float32 would depend on what else is in a batch.
        """
        if self.metric != "mahalanobis":
            return rows
        stages = zip(self._compressed(rows), self.whitening, strict=True)
        return np.concatenate([x @ matrix for x, matrix in stages], axis=1)

    def _compressed(self, rows: Patches) -> list[NDArray[np.float64]]:
        pairs = zip(self._stages(rows), self.sizes(), strict=True)
        return [x / np.sqrt(squared_length(x) + size)[:, None] for x, size in pairs]

    def score(self, patches: Patches) -> NDArray[np.float64]:
        """Score patches: 0 at least, higher = more anomalous."""
        return self._nearest(patches)[0]

    def reweighted(self, patches: Patches) -> NDArray[np.float64]:
        """Score images by their most anomalous patch (Eq. 7 of PatchCore).

        The farther its nearest patch in the memory is from others there, the rarer it
        is, and the more its distance counts::

            (1 - exp(d(q, m)) / sum_b exp(d(q, m_b))) d(q, m)
        """
        from ..scorers._neighbors import nearest

        apart, found = self._nearest(patches)
        worst = apart.argmax(axis=1)[:, None]
        apart = np.take_along_axis(apart, worst, axis=1)[:, 0]
        winner = np.take_along_axis(found, worst, axis=1)[:, 0]
        rows = self._centred(self.rows())
        around, _ = nearest(rows[winner], rows, N_REWEIGHTED)
        query = np.take_along_axis(patches, worst[:, :, None], axis=1)[:, 0]
        query = self._centred(query).astype(np.float64)
        squared = np.square(query[:, None] - rows[around]).sum(axis=2)
        others = self._distance(squared)
        return -np.expm1(apart - logsumexp(others, axis=1)) * apart

    def _centred(self, rows: Patches) -> NDArray[Any]:
        return centred(self._compared(rows), self.origin, self.scale)

    def _distance(self, squared: NDArray[np.float64]) -> NDArray[np.float64]:
        squared = squared * self.scale**2
        if self.metric == "cosine":
            return squared / (2 * len(self.widths))
        return np.sqrt(squared)

    def _nearest(
        self, patches: Patches
    ) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        from ..scorers._neighbors import nearest

        queries = patches.reshape(-1, patches.shape[2])
        rows = self._centred(self.rows())
        found, squared = nearest(self._centred(queries), rows, 1)
        apart = self._distance(squared)
        return apart.reshape(patches.shape[:2]), found.reshape(patches.shape[:2])


def squared_length(rows: Patches) -> NDArray[np.float64]:
    """Give the squared length of each row."""
    return np.einsum("ij,ij->i", rows, rows, dtype=np.float64)


def merged(parts: Iterable[list[Moments]]) -> list[Moments]:
    """Merge what is known of the stages from several folds."""
    known = copy.deepcopy([stages for stages in parts if stages])
    return [reduce(Moments.merge, same) for same in zip(*known, strict=True)]


def whitening(moments: Moments) -> NDArray[np.float64]:
    """Give the matrix by which rows are multiplied to have unit covariance.

    The covariance is shrunk by a tenth towards a multiple of the identity, as
    `sklearn.covariance.ShrunkCovariance` does. Features that are constant, but for
    rounding, are not blown up.
    """
    covariance = shrunk_covariance(moments.covariance, SHRINKAGE)
    d = len(covariance)
    covariance[range(d), range(d)] += 1e-12 * np.square(moments.mean).mean()
    if not covariance.any():
        return np.eye(d)
    variances, axes = np.linalg.eigh(covariance)
    return axes / np.sqrt(variances)


class PatchGaussian(PatchDensity):
    """Mahalanobis distance (PaDiM): one Gaussian a position, or one for all."""

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self.moments: dict[int, list[Any]] = {}  # of each fold: count, sums, products

    def absorb(self, patches: Patches, folds: NDArray[np.intp]) -> None:
        """Learn from some images' patches."""
        if not self.moments:  # sums about it lose little in float32
            self.origin = patches.mean(axis=(0, 1) if self.shared else 0, keepdims=True)
        apart = patches - self.origin
        for fold in np.unique(folds):
            x = self._by_gaussian(apart[folds == fold])
            new = x.shape[1], x.sum(axis=1), x.transpose(0, 2, 1) @ x
            old = self.moments.get(fold, [0, 0, 0])
            self.moments[int(fold)] = [a + b for a, b in zip(old, new, strict=True)]

    def settle(self, without: int | None = None) -> None:
        """Make ready for scoring, without the images of a fold."""
        used = [m for fold, m in self.moments.items() if fold != without]
        n, sums, products = (sum(parts) for parts in zip(*used, strict=True))
        self.mean = sums / n
        covariance = products - n * self.mean[:, :, None] * self.mean[:, None, :]
        covariance /= max(n - 1, 1)
        d = covariance.shape[1]
        covariance[:, range(d), range(d)] += RIDGE
        self.whitening = np.linalg.inv(np.linalg.cholesky(covariance))

    def finish(self) -> None:
        """Make ready for scoring new images, after the last part."""
        self.settle()
        self.moments = {}

    def score(self, patches: Patches) -> NDArray[np.float64]:
        """Score patches: 0 at least, higher = more anomalous."""
        apart = self._by_gaussian(patches - self.origin) - self.mean[:, None]
        white = apart @ self.whitening.transpose(0, 2, 1)
        length = np.linalg.norm(white.astype(np.float64), axis=2)
        if self.shared:
            return length.reshape(patches.shape[:2])
        return length.T

    def _by_gaussian(self, patches: Patches) -> Patches:
        """Lay patches out as (n_gaussians, n_rows, n_features)."""
        if self.shared:
            return patches.reshape(1, -1, patches.shape[2])
        return np.ascontiguousarray(patches.transpose(1, 0, 2))


class PatchOutliers(PatchDensity):
    """An outlier detector of scikit-learn's kind, fitted to a sample of patches.

    Scores are how far it is below the best score in that sample.
    """

    _saved: ClassVar = {"detector": BaseEstimator, "fitted": BaseEstimator}

    def __init__(self, detector: Any, n_patches: int, seed: int) -> None:
        self.detector = detector
        self.n_patches = n_patches
        self.rng = np.random.RandomState(seed)
        self.sample: list[NDArray[Any]] = []  # patches, their folds, random numbers

    def absorb(self, patches: Patches, folds: NDArray[np.intp]) -> None:
        """Learn from some images' patches."""
        rows = patches.reshape(-1, patches.shape[2])
        of_row = np.repeat(folds, patches.shape[1])
        new: list[NDArray[Any]] = [rows, of_row, self.rng.random_sample(len(rows))]
        if self.sample:
            new = [np.concatenate(p) for p in zip(self.sample, new, strict=True)]
        kept = np.sort(np.argsort(new[2])[: self.n_patches])
        self.sample = [part[kept] for part in new]

    def settle(self, without: int | None = None) -> None:
        """Make ready for scoring, without the images of a fold."""
        rows, folds, _ = self.sample
        rows = rows if without is None else rows[folds != without]
        self.fitted = clone(self.detector).fit(rows)
        self.best = float(np.max(self.fitted.score_samples(rows)))

    def finish(self) -> None:
        """Make ready for scoring new images, after the last part."""
        self.settle()
        del self.sample, self.rng

    def score(self, patches: Patches) -> NDArray[np.float64]:
        """Score patches: 0 at least, higher = more anomalous."""
        rows = patches.reshape(-1, patches.shape[2])
        scores = self.best - np.asarray(self.fitted.score_samples(rows), np.float64)
        return np.maximum(scores, 0).reshape(patches.shape[:2])
