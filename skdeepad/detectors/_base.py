"""What the detectors share: scores, and images that are not trained on."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..base import AnomalyDetector
from ..features import BackboneEstimator
from ..scorers._base import HeldOutScores

N_STAGES = 3  # of a pretrained network, by default
MOST_SPREAD = 1e6  # rounding is not to be taken for scores
ENOUGH = 20  # held-out samples, where a tenth would be fewer and there are 60


class BackboneDetector(AnomalyDetector, BackboneEstimator):
    """Base of the detectors: each image's score follows from its features.

    A subclass defines ``_score(features)``; its `fit` ends in `_set_threshold`.
    """

    _saved: ClassVar = {"_held_out": HeldOutScores}

    _parameter_constraints = {  # noqa: RUF012
        **BackboneEstimator._parameter_constraints,
        **AnomalyDetector._parameter_constraints,
    }

    def _check_enough(self, n: int, minimum: int = 2) -> None:
        if n < minimum:
            raise ValueError(
                f"Found {n} normal sample(s) (n_samples={n}) while a minimum of "
                f"{minimum} is required by {type(self).__name__}."
            )

    def _score(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        raise NotImplementedError

    def _set_threshold(
        self, digests: NDArray[np.uint64], scores: NDArray[np.float64]
    ) -> None:
        """Set the threshold by scores of training images as if they were new."""
        self._set_offset(scores)
        self._held_out: HeldOutScores | None = HeldOutScores(digests, scores)

    def score_samples(self, X: Any) -> NDArray[np.float64]:
        """Score images; the higher, the more normal.

        Parameters
        ----------
        X : array-like or sequence of paths
            Images, in any form that `fit` takes.

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
        for index, features in self._features(inputs):
            scores[index] = (
                held_out.score(features, self._score)
                if held_out
                else self._score(features)
            )
        return scores


def hold_out(n: int, fraction: float, rng: np.random.RandomState) -> NDArray[np.bool_]:
    """Choose the samples that are not trained on.

    Parameters
    ----------
    n : int
        How many samples there are.
    fraction : float
        The share to hold out; at least 20 samples, or a third of fewer than 60.
    rng : numpy.random.RandomState
        Chooses them.

    Returns
    -------
    ndarray of bool, shape (n,)
    """
    n_held_out = max(int(np.ceil(fraction * n)), min(ENOUGH, n // 3))
    held_out = np.zeros(n, dtype=bool)
    held_out[rng.permutation(n)[:n_held_out]] = True
    return held_out


def as_unseen(
    trained: NDArray[np.float64], unseen: NDArray[np.float64], *, spread: bool = False
) -> NDArray[np.float64]:
    """Bring scores of samples that were trained on to the level of unseen ones.

    Training draws its samples nearer than it draws new ones, which would put the
    threshold too near. Distances are stretched, other scores are shifted, until the
    means agree; where training may have brought its samples to one score, as with
    fewer samples than features, the `spread` is made to agree, too.
    """
    if spread:
        ratio = unseen.std() / max(trained.std(), np.finfo(np.float64).tiny)
        return (trained - trained.mean()) * min(ratio, MOST_SPREAD) + unseen.mean()
    if trained.max() <= 0 and unseen.max() <= 0 and trained.mean() < 0:
        return trained * (unseen.mean() / trained.mean())
    return trained + (unseen.mean() - trained.mean())
