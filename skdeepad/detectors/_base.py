"""What the detectors share: scores, and images that are not trained on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from sklearn.base import _fit_context
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval
from torch import Tensor

from ..backbones import Backbone
from ..base import AnomalyDetector, check_groups, keep_state_on_error, known_normal
from ..draws import each_with_own_draws
from ..features import BackboneEstimator
from ..inference import Features, in_blocks
from ..inputs import Vectors
from ..scorers._base import HeldOutScores, copies_together, warn_of_copies
from ..training import DivergedError, train

N_STAGES = 3  # of a pretrained network, by default
MIN_HELD_OUT = 40  # samples, where a tenth would be fewer and there are 120


@dataclass(frozen=True)
class TrainingSamples:
    """What `fit` is given: samples, their labels, and what they belong to."""

    inputs: Vectors
    labels: NDArray[np.intp]  # negative for known anomalies
    groups: NDArray[Any] | None

    def take(self, index: NDArray[Any]) -> TrainingSamples:
        """Select samples."""
        return TrainingSamples(
            self.inputs.take(index), self.labels[index], self.groups_of(index)
        )

    def groups_of(self, index: NDArray[Any]) -> NDArray[Any] | None:
        """Give the groups of these samples, if there are any."""
        return None if self.groups is None else self.groups[index]


class BackboneDetector(AnomalyDetector, BackboneEstimator):
    """Base of the detectors: each image's score follows from its features.

    A subclass defines ``_learn(samples, rng)``, which ends in `_set_threshold`, and
    ``_score(features)``.
    """

    _saved: ClassVar = {"_held_out": HeldOutScores}

    @keep_state_on_error
    @_fit_context(prefer_skip_nested_validation=False)
    def fit(
        self, X: Any, y: ArrayLike | None = None, groups: ArrayLike | None = None
    ) -> Self:
        """Learn what normal images look like.

        Parameters
        ----------
        X : array-like or sequence of paths
            ``(n, d)`` vectors or flattened images; ``(n, height, width)``,
            ``(n, height, width, channels)`` or ``(n, channels, height, width)``
            images, uint8 or floats in [0, 1]; or paths of image files.
        y : array-like of shape (n_samples,), default=None
            +1 for normal images, -1 for known anomalies, which are left out.
        groups : array-like of shape (n_samples,), default=None
            What each image belongs to, such as a part or a video: whole groups are
            left out when the threshold is set. None: images are unrelated, except
            exact copies, which are left out together.

        Returns
        -------
        self : object
            The fitted detector.

        Raises
        ------
        ValueError
            If X, y, groups or a parameter is not what is described here, or if
            training diverges.
        FileNotFoundError
            If image files, or the weights, are missing.

        Warns
        -----
        UserWarning
            If there are too few images for `contamination`, or, without `groups`, if
            many of them are copies of others or nearly so.
        ConvergenceWarning
            If training did not work; the message says what to change.
        """
        self._fit(X, y, groups)
        return self

    def _fit(self, X: Any, y: Any, groups: Any, **more: Any) -> None:
        inputs = self._fit_inputs(X)
        groups = check_groups(groups, len(inputs))
        labels = self._check_labels(y, len(inputs))
        samples = TrainingSamples(inputs, labels, groups)
        if not self._learns_anomalies() and (labels < 0).any():
            samples = samples.take(labels >= 0)
        self._learn(samples, check_random_state(self.random_state), **more)

    def _check_labels(self, y: ArrayLike | None, n: int) -> NDArray[np.intp]:
        """Give each sample's label: negative for known anomalies."""
        return np.where(known_normal(y, n), 1, -1)

    def _learns_anomalies(self) -> bool:
        """Tell whether `_learn` is given known anomalies, too."""
        return False

    def _learn(self, samples: TrainingSamples, rng: np.random.RandomState) -> None:
        """Learn from samples, and set the threshold."""
        raise NotImplementedError

    def _check_enough(self, n: int, minimum: int = 2) -> None:
        if n < minimum:
            raise ValueError(
                f"Found {n} normal sample(s) in X (n_samples={n}) while a minimum "
                f"of {minimum} is required by {type(self).__name__}."
            )

    def _score(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        raise NotImplementedError

    def _blocks(self, inputs: Vectors) -> Iterator[Features]:
        """Give features of images, as many at a time as are scored together."""
        return in_blocks(self._features(inputs))

    def _set_threshold(
        self,
        digests: NDArray[np.uint64],
        scores: NDArray[np.float64],
        unseen: NDArray[np.bool_] | None = None,
    ) -> None:
        """Set the threshold by scores of training images as if they were new.

        Those that are `unseen` (None: all) say how scores of new ones are distributed.
        """
        self._set_offset(scores, unseen)
        self._held_out: HeldOutScores | None = HeldOutScores(digests, scores)

    def score_samples(self, X: Any) -> NDArray[np.float64]:
        """Score images; the higher, the more normal.

        Returns
        -------
        ndarray of float64, shape (n_samples,)
            Minus the anomaly score that the class describes; NaN for files skipped by
            ``on_error="skip"``. An image that was trained on gets the score that it
            would have as a new one.
        """
        inputs = self._check_inputs(X)
        scores = np.full(len(inputs), np.nan)
        held_out = self._held_out
        for index, features in self._blocks(inputs):
            scores[index] = (
                held_out.score(features, self._score)
                if held_out
                else self._score(features)
            )
        return scores


class TrainedDetector(BackboneDetector):
    """Base of the detectors that train a network, or a part of it.

    Parameters
    ----------
    max_steps : int
        For how many mini-batches it trains.
    learning_rate : float, default=0.001
        Of Adam.
    validation_fraction : float, default=0.1
        Share of the normal images that is not trained on, in [0, 0.5): they set the
        threshold. At least 40 images, or a third of fewer than 120. 0: all are
        trained on, as in the papers, and the threshold is optimistic: more new normal
        images are flagged than `contamination` says; a warning tells so.
    max_cache_bytes : int, default=2**30
        The outputs of the frozen stages for the training images (the images, if no
        stage is frozen) are kept in memory if they take no more than this, and
        computed again for each mini-batch otherwise. Scores are the same.
    random_state : int, RandomState instance or None, default=None
        Seeds random weights, the held-out share, mini-batches and augmentation.

    Attributes
    ----------
    loss_curve_ : ndarray of shape (n_steps,)
        The loss of each mini-batch.
    n_iter_ : int
        Number of steps taken.
    offset_ : float
        The threshold on ``score_samples``: the `contamination` quantile of the
        training images' scores, brought to the level of held-out images.
    """

    _has_end: ClassVar = True

    max_steps: int
    learning_rate: float = 0.001
    validation_fraction: float = 0.1
    max_cache_bytes: int = 2**30

    _parameter_constraints: ClassVar = {
        "max_steps": [Interval(Integral, 1, None, closed="left")],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "validation_fraction": [Interval(Real, 0, 0.5, closed="left")],
        "max_cache_bytes": [Interval(Integral, 0, None, closed="left")],
    }

    def _set_held_out(
        self,
        digests: NDArray[np.uint64],
        scores: NDArray[np.float64],
        held_out: NDArray[np.bool_],
    ) -> None:
        """Set the threshold by images that were held out; the others are ranked."""
        if not held_out.all():
            scores[~held_out] = by_rank_as_unseen(scores[~held_out], scores[held_out])
        self._set_threshold(digests, scores, held_out if held_out.any() else None)

    def _take_steps(
        self,
        optimizer: torch.optim.Optimizer,
        losses: Iterable[Tensor],
        n_steps: int,
        seed: int,
        clip_norm: float | None = None,
        phase: str = "training",
    ) -> Iterator[float]:
        """Take a step for each loss, and give the loss; say so if training diverges."""
        # what a network draws in training: dropout
        drawn = each_with_own_draws(islice(losses, n_steps), seed)
        steps = train(optimizer, drawn, clip_norm=clip_norm)
        n_taken = 0
        try:
            for loss in self._track(steps, n_steps, fitting=True, phase=phase):
                n_taken += 1
                yield loss
        except DivergedError as error:
            raise ValueError(
                f"Training diverged: {error} after {n_taken} steps. Lower "
                "learning_rate, or scale X."
            ) from error


def stages_to_adapt(backbone: Backbone, given: Any) -> tuple[str, ...]:
    """Name the stages that are adapted: those given, or (None) the last two.

    "pool" is not counted, and "conv_head", where there is one, goes with the last.
    """
    names = backbone.stage_names
    if given is None:
        first = names.index(backbone.block_names[-2:][0])
        chosen = tuple(name for name in names[first:] if name != "pool") or names
    else:
        given = (given,) if isinstance(given, str) else given
        chosen = backbone.check_stages(given, "trainable_stages")
    if not any(list(backbone.stages[name].parameters()) for name in chosen):
        raise ValueError(
            f"trainable_stages={chosen} have no weights to train. Choose stages with "
            "layers that learn."
        )
    return chosen


def numbers_of(dataset: str, numbers: Mapping[str, Any]) -> Any:
    """Look up what a paper has for a data set."""
    if dataset not in numbers:
        raise ValueError(f"dataset={dataset!r} is not one of {', '.join(numbers)}.")
    return numbers[dataset]


def find_related(
    groups: NDArray[Any] | None, rows: NDArray[Any], digests: NDArray[np.uint64]
) -> NDArray[Any]:
    """Tell which training images belong together: as given, or exact copies.

    `rows` holds something of each image, by which near copies are found, and `digests`
    its content. Images that belong together have the same number.
    """
    if groups is None:
        warn_of_copies(rows, digests)
        related = copies_together(digests)
        # copies of one image alone: training will tell
        return related if related.any() else np.arange(len(related))
    if len(groups) and (groups == groups[0]).all():
        raise ValueError(
            "groups has only one group, so none can be held out. Pass images of "
            "at least two groups, or leave groups out."
        )
    return groups


def hold_out(
    related: NDArray[Any], fraction: float, rng: np.random.RandomState
) -> NDArray[np.bool_]:
    """Choose the images that are not trained on: a fraction of them.

    There are at least 40, or a third of fewer than 120. Of those that are `related`,
    which have the same number, all are held out, or none. A fraction of 0 holds none
    out, with a warning.
    """
    n = len(related)
    if not fraction:
        warnings.warn(
            "validation_fraction=0 trains on all images, so that the threshold is set "
            "by images that were trained on: more new normal images will be flagged "
            "than contamination says. Set validation_fraction=0.1 for a threshold "
            "that holds.",
            UserWarning,
            stacklevel=2,
        )
        return np.zeros(n, dtype=bool)
    n_held_out = max(int(np.ceil(fraction * n)), min(MIN_HELD_OUT, n // 3))
    shuffled = related[rng.permutation(n)]
    found, first, sizes = np.unique(shuffled, return_index=True, return_counts=True)
    order = np.argsort(first)
    enough = np.searchsorted(np.cumsum(sizes[order]), n_held_out) + 1
    return np.isin(related, found[order[: min(enough, len(found) - 1)]])


def as_unseen(
    trained: NDArray[np.float64], unseen: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Bring scores of samples that were trained on to the level of unseen ones.

    Training draws its samples nearer than it draws new ones, which would put the
    threshold too near. Distances are stretched, other scores are shifted, until the
    means agree. Without unseen samples there is no level to bring them to.
    """
    if not len(unseen):
        return trained
    if trained.max() <= 0 and unseen.max() <= 0 and trained.mean() < 0:
        return trained * (unseen.mean() / trained.mean())
    return trained + (unseen.mean() - trained.mean())


def by_rank_as_unseen(
    trained: NDArray[np.float64], unseen: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Give samples that were trained on the scores that unseen ones of their rank have.

    Where training brings its samples to nearly one score, as with fewer samples than
    features, no stretching gives them the spread of new ones. Only their order is kept.
    Without unseen samples scores stay as they are.
    """
    if not len(unseen):
        return trained
    known = np.sort(unseen)
    below = 2 * known[0] - known[min(1, len(known) - 1)]
    ranks = rankdata(trained) / (len(trained) + 1)
    levels = np.arange(len(known) + 2) / (len(known) + 1)
    return np.interp(ranks, levels, [below, *known, known[-1]])
