"""Small defects, by comparing patches of images (PatchCore, PaDiM, AnomalyDINO)."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, _fit_context
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from ..backbones import Backbone
from ..base import (
    draw_seed,
    keep_state_on_error,
    known_normal,
    seeded_clone,
)
from ..frozen import fingerprint
from ..inference import Arrays, Features, Outputs, PassOutputs, Tap
from ..inputs import Tiles, Vectors, chunks, resized_mask
from ..scorers._base import HeldOutScores, row_digests
from . import _tiles
from ._base import N_STAGES, BackboneDetector, TrainingSamples, find_related
from ._maps import AnomalyMapMixin
from ._patch_density import (
    N_FOLDS,
    PatchDensity,
    Patches,
    PatchGaussian,
    PatchMemory,
    PatchOutliers,
    patch_maps,
)

STRIDES = (8, 16)  # pixels from one position to the next, at the default stages
N_REMEMBERED = 1024  # images of a stream whose held-out scores are kept
PAPERS: dict[str, dict[str, Any]] = {
    "patchcore": {
        "backbone": "wide_resnet50_2",
        "stages": ("stage2", "stage3"),
        "n_patches": 16_000,
        "aggregation": "max",
    },
    "padim": {
        "backbone": "resnet18",
        "stages": ("stage1", "stage2", "stage3"),
        "pooling": 1,
        "n_features": 100,
        "scorer": "gaussian",
        "aggregation": "max",
    },
    "anomalydino": {
        "backbone": "timm/vit_small_patch14_dinov2.lvd142m",
        "stages": ("stage4",),
        "pooling": 1,
        "n_patches": 16_000,
        "metric": "cosine",
        "aggregation": "top",
        "share": 0.01,
    },
}


def has_memory(detector: Any) -> bool:
    """Tell whether a detector learns from parts."""
    return isinstance(detector.scorer, str) and detector.scorer == "memory"


class PatchDetector(AnomalyMapMixin, BackboneDetector):
    """Small defects, and where they are, by patches of a frozen network's maps.

    At each position of the maps of some stages, the features of all stages, averaged
    over the position's neighbourhood, describe a patch of the image. A density of
    the patches of good images is learnt; a patch's anomaly score is its distance to
    the nearest one in a memory (PatchCore [1]_), the Mahalanobis distance to a
    Gaussian (PaDiM [2]_), or what an outlier detector says. An image's score is
    the mean of its most anomalous patches' (AnomalyDINO [3]_)::

        score(x) = - mean of the largest `share` of d(patch, memory), over positions

    Nothing is trained. Use it for small defects; `MahalanobisFeatureScorer` and
    `PANDAEstimator` are better where the whole image shows another kind of thing.

    Parameters
    ----------
    stages : str or sequence of str, default=None
        The stages whose maps are used. Positions are those of the first one; maps of
        the others are resampled (bilinear). None: the stages with a position for each
        8 or 16 pixels, which for a ResNet are PatchCore's; the last three blocks where
        there are none.
    pooling : int, default=3
        Side of the neighbourhood, in positions, an odd number. Tokens of transformers
        have seen all of the image, and are taken as they are.
    n_features : int, default=None
        So many channels, chosen at random, are used, as in PaDiM. None: all.
    scorer : {"memory", "gaussian"} or outlier detector, default="memory"
        The density of patches. An outlier detector of scikit-learn's kind is fitted to
        at most `n_patches` random patches.
    n_patches : int, default=4000
        The most patches that are kept. For "memory" they are chosen by a greedy
        k-centre algorithm, in five folds of images, from an even sample of four times
        as many: so outliers take at most four times their share.
    metric : {"mahalanobis", "cosine", "euclidean"}, default="mahalanobis"
        Distance of patches, for "memory". "mahalanobis": by the covariance of good
        patches' features, of each stage by itself, shrunk by a tenth, after these are
        brought to about the same length; see Notes. "cosine": 1 minus the cosine,
        averaged over the stages.
    positions : {"each", "shared"}, default="each"
        Whether there is one Gaussian at each position, for aligned objects, or one for
        all positions, for textures.
    aggregation : {"top", "max", "reweighted"}, default="top"
        How an image's score follows from its patches'. "top": mean of the largest
        `share`. "max": the largest. "reweighted": Eq. 7 of [1]_, for "memory".
    share : float, default=0.02
        Share of positions that "top" averages over, in (0, 1]; one position at least.
    scale_positions : bool, default=True
        Whether a patch's score is divided by the mean of the held-out scores at its
        position: margins, where networks pad images, and what always varies count no
        more than the rest. Not for "reweighted" scores of images.
    mask : array-like of shape (height, width), or path, default=None
        Where to look: positions of which less than half is nonzero take no part in
        `fit` and scores, and maps are 0 where the mask is. It is resized to the images.
    tile_size : int or (int, int), default=None
        For large images: height and width in pixels of tiles that images of any size
        are cut into, without padding; a shorter side is one tile. Each is resized to
        `image_size`. Images are scored by the positions of all their tiles;
        `positions` and `scale_positions` mean those in a tile. None: nothing is cut.
    tile_overlap : float, default=0.25
        Share of a tile's side, at least, that it has in common with its neighbour, in
        [0, 1). Maps are blended there.
    max_cache_bytes : int, default=2**30
        The maps of the training images are kept in memory if they take no more than
        this, and computed again otherwise, twice. Scores are the same.
    random_state : int, RandomState instance or None, default=None
        Seeds random weights, the folds, and the choice of channels.

    Attributes
    ----------
    offset_ : float
        The threshold on ``score_samples``: the `contamination` quantile of the
        training images' scores, by what is learnt from the four folds that an image
        and its group are not in.
    n_samples_seen_ : int
        Number of normal images learnt from, over all calls of `partial_fit`.

    See Also
    --------
    skdeepad.KDClonerEstimator : Maps by a network that is trained.
    skdeepad.MahalanobisFeatureScorer : Whole images.

    Notes
    -----
    For the Mahalanobis distance, the features x of a stage at a position become
    ``x / sqrt(|x|^2 + m)``, with m the mean of ``|x|^2`` over the images of `fit` (of
    the first part of a stream). So strong contrast does not count for itself, and the
    noise of flat patches is not blown up.

    Images that were trained on are recognised by their features and get their held-out
    score from ``score_samples``; ``anomaly_map`` shows them as others.

    References
    ----------
    .. [1] K. Roth et al., "Towards Total Recall in Industrial Anomaly Detection",
       CVPR 2022.
    .. [2] T. Defard, A. Setkov, A. Loesch, R. Audigier, "PaDiM: A Patch Distribution
       Modeling Framework for Anomaly Detection and Localization", ICPR 2020 workshops.
    .. [3] S. Damm et al., "AnomalyDINO: Boosting Patch-Based Few-Shot Anomaly
       Detection with DINOv2", WACV 2025.

    Examples
    --------
    >>> from skdeepad import PatchDetector
    >>> from skdeepad.datasets import make_texture_defects
    >>> bricks = make_texture_defects("brick", n_train=40, random_state=0)
    >>> detector = PatchDetector(image_size=96).fit(bricks.X_train)
    >>> scores, good = detector.score_samples(bricks.X_test), bricks.y_test == 1
    >>> bool(scores[good].mean() > scores[~good].mean())
    True
    >>> detector.anomaly_map(bricks.X_test[:3]).shape
    (3, 64, 64)
    """

    stages: str | Iterable[str] | None = None
    pooling: int = 3
    n_features: int | None = None
    scorer: Any = "memory"
    n_patches: int = 4000
    metric: str = "mahalanobis"
    positions: str = "each"
    aggregation: str = "top"
    share: float = 0.02
    scale_positions: bool = True
    mask: Any = None
    tile_size: int | tuple[int, int] | None = None
    tile_overlap: float = 0.25
    max_cache_bytes: int = 2**30

    _saved: ClassVar = {
        "scorer": BaseEstimator,
        "_density": PatchDensity,
        "_peaks": HeldOutScores,
    }

    _parameter_constraints: ClassVar = {
        "stages": [str, tuple, list, None],
        "pooling": [Interval(Integral, 1, None, closed="left")],
        "n_features": [Interval(Integral, 1, None, closed="left"), None],
        "scorer": [
            StrOptions({"memory", "gaussian"}),
            HasMethods(["fit", "score_samples"]),
        ],
        "n_patches": [Interval(Integral, N_FOLDS, None, closed="left")],
        "metric": [StrOptions({"mahalanobis", "cosine", "euclidean"})],
        "positions": [StrOptions({"each", "shared"})],
        "aggregation": [StrOptions({"top", "max", "reweighted"})],
        "share": [Interval(Real, 0, 1, closed="right")],
        "scale_positions": ["boolean"],
        "mask": ["array-like", str, os.PathLike, None],
        "tile_size": [Interval(Integral, 1, None, closed="left"), tuple, list, None],
        "tile_overlap": [Interval(Real, 0, 1, closed="left")],
        "max_cache_bytes": [Interval(Integral, 0, None, closed="left")],
    }

    @classmethod
    def from_paper(cls, method: str, **changes: Any) -> Any:
        """Make the detector with the numbers of a paper and its official code.

        "patchcore": Wide ResNet-50-2 at 224 pixels, its second and third stage,
        neighbourhoods of 3 x 3 averaged, largest distance. The official coreset is a
        tenth of the patches; here it is at most 16,000, a tenth of 209 images of MVTec
        AD. "padim": ResNet-18, three stages, 100 channels, one Gaussian a position.
        "anomalydino": DINOv2's ViT-S/14 in timm, at 518 pixels, cosine distance, mean
        of the largest hundredth. Maps are smoothed with a Gaussian of 4 pixels and not
        opened.

        Parameters
        ----------
        method : {"patchcore", "padim", "anomalydino"}
            The paper.
        **changes
            Parameters that are to be otherwise.

        Returns
        -------
        PatchDetector
            Not fitted. The weights are torchvision's or timm's; see `weights`.

        Raises
        ------
        ValueError
            If the method is none of these.
        """
        if method not in PAPERS:
            raise ValueError(f"method={method!r} is none of {', '.join(PAPERS)}.")
        common = {"scale_positions": False, "sigma": 4.0, "opening": False}
        return cls(**{"metric": "euclidean", **common, **PAPERS[method], **changes})

    def _default_stages(self, backbone: Backbone) -> Iterable[str]:
        names = backbone.block_names
        if backbone.vectors or backbone.input_size is None:
            return names[-N_STAGES:]
        outputs = dict(zip(backbone.stage_names, backbone.probe(), strict=True))
        rows = {n: outputs[n].shape[2] for n in names if outputs[n].ndim == 4}
        strides = {n: round(backbone.input_size[0] / r) for n, r in rows.items()}
        fine = tuple(name for name, stride in strides.items() if stride in STRIDES)
        if backbone.to_map:  # all blocks have the same positions
            return names[-1:]
        return fine or names[-N_STAGES:]

    # ------------------------------------------------------------------ patches

    def _taps(self) -> tuple[Tap, ...]:
        return tuple(Tap(stage, "map") for stage in self.stages_)

    def _embed(self, outputs: Iterable[Outputs]) -> Iterator[Features]:
        """Give the patches of images, of shape (n, n_positions, n_features)."""
        return ((index, self._patches(arrays)) for index, arrays in outputs)

    def _blocks(self, inputs: Vectors) -> Iterator[Features]:
        return self._features(inputs)  # those of many images would fill the memory

    def _patches(self, arrays: Arrays) -> Patches:
        pooling = 1 if self.backbone_.to_map else self.pooling
        unit = has_memory(self) and self.metric == "cosine"
        maps = patch_maps(arrays, pooling, unit)
        rows = maps.permute(0, 2, 3, 1).flatten(1, 2).numpy()
        return np.ascontiguousarray(rows[:, self._cells.ravel()][:, :, self._channels])

    def _set_up(self, inputs: Vectors, rng: np.random.RandomState) -> None:
        """Settle positions, channels and the density."""
        if self.pooling % 2 == 0:
            raise ValueError(f"pooling={self.pooling} must be odd, such as 3.")
        if self.aggregation == "reweighted" and not has_memory(self):
            raise ValueError("aggregation='reweighted' needs scorer='memory'.")
        self._tile = _tiles.check_tiles(self)
        front = self._front()
        _, *raster = (*front.shapes(front.sample_shape(inputs))[0], 1, 1)[:3]
        self._mask, self._cells = _tiles.region(self, (raster[0], raster[1]))
        width = sum(self._widths)
        self._channels = np.arange(width)
        if self.n_features is not None and self.n_features < width:
            self._channels = np.sort(rng.permutation(width)[: self.n_features])
        self._density: PatchDensity
        if has_memory(self):
            stages = np.repeat(np.arange(len(self._widths)), self._widths)
            widths = np.bincount(stages[self._channels], minlength=len(self._widths))
            self._density = PatchMemory(
                self.n_patches, self.metric, widths[widths > 0].tolist()
            )
        elif isinstance(self.scorer, str):
            self._density = PatchGaussian(self.positions == "shared")
        else:
            detector = seeded_clone(self.scorer, rng)
            self._density = PatchOutliers(detector, self.n_patches, draw_seed(rng))

    def _settle_size(self, shape: tuple[int, ...] | None) -> tuple[int, int]:
        if self.image_size or self.backbone_.input_size or self.tile_size is None:
            return super()._settle_size(shape)
        return _tiles.check_tile_size(self.tile_size)

    def _cut(self, inputs: Any) -> Any:
        """Give what passes the network: images, or their tiles."""
        if self._tile is None:
            return inputs
        raster: Any = self._cells.shape
        return Tiles(inputs, self._tile, self.tile_overlap, raster, self._mask)

    # ------------------------------------------------------------------ learning

    def _learn(self, samples: TrainingSamples, rng: np.random.RandomState) -> None:
        self._set_up(samples.inputs, rng)
        self.n_samples_seen_ = 0
        self._set_thresholds(*self._absorb(samples, rng))

    def _absorb(
        self, samples: TrainingSamples, rng: np.random.RandomState | None
    ) -> tuple[NDArray[np.uint64], NDArray[np.float64], NDArray[np.float64]]:
        """Learn from images; give their digests, held-out scores and maps' maxima.

        Those of a later part of a stream (`rng` is None) are put in folds by content.
        """
        inputs, n = self._cut(samples.inputs), len(samples.inputs)
        owner = _tiles.owners(inputs)  # the image of each row
        outputs = PassOutputs(self._front(), inputs, self.max_cache_bytes)
        digests = np.zeros(len(inputs), dtype=np.uint64)
        means = np.full((len(inputs), len(self._channels)), np.nan, np.float32)
        batches = self._run(outputs.front, inputs, fitting=True)
        for index, patches in self._embed(outputs.keep(batches)):
            digests[index] = row_digests(patches)
            means[index] = patches.mean(axis=1)
            if rng is not None:
                known, _ = _tiles.inside(inputs, index, patches, index)
                self._density.measure(known)
        digests, means = _tiles.of_images(digests, means, owner, n)
        images = np.flatnonzero(~np.isnan(means).any(axis=1))
        self._check_enough(len(images), 1 if rng is None else 3)
        folds = (digests % N_FOLDS).astype(np.intp)
        if rng is not None:
            groups = samples.groups_of(images)
            related = find_related(groups, means[images], digests[images])
            _, number = np.unique(related, return_inverse=True)
            folds[images] = (rng.permutation(number.max() + 1) % N_FOLDS)[number]
        rows = np.flatnonzero(np.isin(owner, images))
        fold_of_row = folds[owner]
        for index, patches in self._again(outputs, rows):
            part = _tiles.inside(inputs, index, patches, fold_of_row[index])
            self._density.absorb(*part)
        at_positions = np.full((len(inputs), self._cells.sum()), np.nan, np.float32)
        scores = np.full(n, np.nan)
        for fold in np.unique(folds[images]):
            self._density.settle(without=int(fold))
            for index, patches in self._again(outputs, rows[fold_of_row[rows] == fold]):
                at_positions[index] = self._density.score(patches)
                if self.aggregation == "reweighted":
                    scores[index] = self._score(patches)
        self._density.finish()
        at_positions = _tiles.hidden(inputs, rows, at_positions[rows])
        self._settle_scale(at_positions, len(images))
        at_positions = at_positions / self._scale
        if self.aggregation != "reweighted":
            for index, found in _tiles.by_count(at_positions, owner[rows]):
                scores[index] = -self._aggregate(found)
        peaks = self._peaks_of(inputs, rows, at_positions)
        return digests[images], scores[images], peaks

    def _settle_scale(self, at_positions: NDArray[np.float32], n: int) -> None:
        """Learn what held-out scores are at each position, as the mean of all parts."""
        mean = _tiles.mean_of_positions(at_positions)
        if self.n_samples_seen_:
            share = n / (self.n_samples_seen_ + n)
            mean = share * mean + (1 - share) * self._typical
        self.n_samples_seen_ += n
        self._typical: NDArray[np.float64] = mean

    @property
    def _scale(self) -> NDArray[np.float64] | float:
        """What scores of positions are divided by."""
        least = 1e-3 * self._typical.mean()
        if not self.scale_positions or least == 0:
            return 1.0
        return np.maximum(self._typical, least)

    def _peaks_of(
        self, inputs: Any, rows: NDArray[np.intp], at_positions: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Give the maxima of maps of images, by the scores of rows."""
        if self.backbone_.vectors:
            return np.full(len(at_positions), np.nan)
        blocks = np.array_split(at_positions, -(-len(at_positions) // self.batch_size))
        rasters = map(self._on_raster, blocks)
        if isinstance(inputs, Tiles):
            of_block = np.array_split(rows, len(blocks))
            return _tiles.peaks(self, inputs, zip(of_block, rasters, strict=True))
        maps = (self._inside(self._refined(raster)) for raster in rasters)
        return np.concatenate([m.max(axis=(1, 2)) for m in maps]).astype(np.float64)

    def _again(
        self, outputs: PassOutputs, rows: NDArray[np.intp]
    ) -> Iterator[Features]:
        return self._embed(outputs.unchanged(chunks(rows, self.batch_size)))

    def _set_thresholds(
        self,
        digests: NDArray[np.uint64],
        scores: NDArray[np.float64],
        peaks: NDArray[np.float64],
    ) -> None:
        self._set_threshold(digests, scores)
        self._peaks = HeldOutScores(digests, peaks)
        self.map_offset_ = np.nan
        if not self.backbone_.vectors:
            self._map_peaks = peaks
            self._set_map_offset()

    def _set_thresholds_again(self, *new: tuple[NDArray[Any], ...]) -> None:
        """Set thresholds by images of all parts: those of the smallest digests."""
        held_out: Any = self._held_out
        known = held_out.digests, held_out.scores, self._peaks.scores
        digests, scores, peaks = map(np.concatenate, zip(known, *new, strict=True))
        kept = np.argsort(digests, kind="stable")[:N_REMEMBERED]
        self._set_thresholds(digests[kept], scores[kept], peaks[kept])

    @available_if(has_memory)
    @keep_state_on_error
    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: ArrayLike | None = None) -> PatchDetector:
        """Learn from one part of a stream of images, after `fit` or from nothing.

        The memory stays as large as it is. Held-out scores of 1,024 images, taken when
        their part came, set the threshold.

        Returns
        -------
        PatchDetector
            The detector itself.

        Raises
        ------
        AttributeError
            If `scorer` is not "memory".
        ValueError
            If X or y is not what is described here.
        """
        if not hasattr(self, "_density"):
            self._fit(X, y, None)
            return self
        inputs = self._check_inputs(X)
        normal = known_normal(y, len(inputs))
        samples = TrainingSamples(inputs.take(normal), np.ones(normal.sum(), int), None)
        self._density = copy.deepcopy(self._density)  # a failure changes nothing
        self._set_thresholds_again(self._absorb(samples, None))
        return self

    @available_if(has_memory)
    @keep_state_on_error
    def merge(self, others: Iterable[PatchDetector]) -> PatchDetector:
        """Learn what others have learnt, each from its part of the images.

        The memory stays as large as it is. As after `partial_fit`, the threshold is set
        by 1,024 images of all parts.

        Parameters
        ----------
        others : iterable of PatchDetector
            Fitted detectors with the same network, stages and parameters, which stay
            as they are.

        Returns
        -------
        PatchDetector
            The detector itself.

        Raises
        ------
        AttributeError
            If `scorer` is not "memory".
        ValueError
            If one sees its images in another way.
        """
        check_is_fitted(self)
        others = list(others)
        for i, other in enumerate(others):
            check_is_fitted(other)
            if not has_memory(other) or other._view() != self._view():
                raise ValueError(
                    f"others[{i}], {other!r}, cannot be merged into {self!r}: the "
                    "network, its weights, stages, image_size, pooling, channels, "
                    "metric and mask must be the same. Fit them with the same "
                    "parameters and an int for random_state."
                )
        density: Any = copy.deepcopy(self._density)
        density.join([other._density for other in others])
        self._density = density
        seen = [d.n_samples_seen_ for d in (self, *others)]
        typical = [d._typical for d in (self, *others)]
        self._typical = np.average(typical, axis=0, weights=seen)
        self.n_samples_seen_ = sum(seen)
        self._set_thresholds_again(
            *(
                (o._held_out.digests, o._held_out.scores, o._peaks.scores)  # type: ignore[union-attr]
                for o in others
            )
        )
        return self

    def _view(self) -> tuple[Any, ...]:
        """Tell what patches are of, and how they are compared."""
        return (
            *(fingerprint(self.backbone_), self.stages_, self.image_size_),
            *(self.pooling, self.metric, self._channels.tobytes()),
            *(self._cells.shape, self._cells.tobytes(), self._tile),
        )

    # ------------------------------------------------------------------ scoring

    def _score(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        if isinstance(self._density, PatchMemory) and self.aggregation == "reweighted":
            return -self._density.reweighted(features)
        return -self._aggregate(self._density.score(features) / self._scale)

    def _aggregate(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Give images' anomaly scores by those of their positions."""
        k = round(self.share * scores.shape[1]) if self.aggregation == "top" else 1
        k = max(k, 1)
        largest = np.sort(np.partition(scores, -k, axis=1)[:, -k:], axis=1)
        return np.asarray(largest.mean(axis=1))

    def _position_scores(
        self, inputs: Any
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float32]]]:
        for index, patches in self._features(inputs):
            yield index, self._on_raster(self._scores_of(inputs, index, patches))

    def _scores_of(
        self, inputs: Any, index: NDArray[np.intp], patches: Patches
    ) -> NDArray[np.float64]:
        """Score patches; NaN where a tile is outside the mask."""
        return _tiles.hidden(inputs, index, self._density.score(patches) / self._scale)

    def score_samples(self, X: Any) -> NDArray[np.float64]:
        """Score images; the higher, the more normal."""
        if getattr(self, "_tile", None) is None:
            return super().score_samples(X)
        inputs = self._check_inputs(X)
        digests, scores = _tiles.score_images(self, self._cut(inputs), len(inputs))
        return np.asarray(self._held_out.recall(digests, scores))  # type: ignore[union-attr]

    def _on_raster(self, scores: NDArray[np.float64]) -> NDArray[np.float32]:
        """Put scores in place; outside the mask, those of the nearest position."""
        rasters = np.full((len(scores), *self._cells.shape), np.nan, np.float32)
        rasters[:, self._cells] = scores
        return _tiles.fill(rasters)

    def _maps(self, inputs: Any) -> Iterator[tuple[int, NDArray[np.float32]]]:
        rows = self._cut(inputs)
        maps = super()._maps(rows)
        maps = _tiles.blend(maps, rows) if isinstance(rows, Tiles) else maps
        return ((i, self._inside(found)) for i, found in maps)

    def _inside(self, maps: NDArray[np.float32]) -> NDArray[np.float32]:
        """Make maps 0 outside the mask."""
        if self._mask is None:
            return maps
        return maps * resized_mask(self._mask, maps.shape[-2:])
