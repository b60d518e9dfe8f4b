"""The scores of PANDA: scorers of features at several checkpoints, and their maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone

from ..base import seeded_clone
from ..inputs import Vectors
from ..scorers import CentroidScorer, KMeansScorer, KNNScorer
from ..scorers._base import Scorer, row_digests, unit_slopes
from ._adaptation import unit_length
from ._base import as_unseen
from ._shares import PositionShares

SCORERS = {"knn": KNNScorer, "kmeans": KMeansScorer, "centroid": CentroidScorer}


class AdaptedScores(PositionShares):
    """One scorer for the features of each checkpoint: section 3, appendix D."""

    if TYPE_CHECKING:  # of the estimator
        adaptation: str | None
        normalize: bool
        scorer: Any
        _logit: Any

    def _learn_scores(
        self,
        features: NDArray[np.float32],
        held_out: NDArray[np.bool_],
        groups: NDArray[Any] | None,
        rng: np.random.RandomState,
    ) -> list[Any]:
        """Fit a scorer to each checkpoint's features, and set the threshold.

        Those that do not know the held-out images are given, if some are held out.
        """
        scorer: Any = self.scorer
        scorer = SCORERS[scorer]() if isinstance(scorer, str) else scorer
        scorer = seeded_clone(scorer, rng)
        self.scorers_, self._typical, unseen, galleries = [], [], [], []
        for psi in self._by_version(features) if self._logit is None else ():
            if held_out.any():
                # App. D: the others are the gallery of the held-out ones
                galleries.append(clone(scorer).fit(psi[~held_out]))
                unseen.append(galleries[-1].score_samples(psi[held_out]))
                self._typical.append(-unseen[-1].mean())
            given = {"groups": groups} if isinstance(scorer, Scorer) else {}
            self.scorers_.append(clone(scorer).fit(psi, **given))
            if self.adaptation and not held_out.any():
                self._typical.append(-self.scorers_[-1].score_samples(psi).mean())
        scores = self._score(features)
        if held_out.any():
            if unseen:
                scores[held_out] = self._combine(unseen)
            scores[~held_out] = as_unseen(scores[~held_out], scores[held_out])
        self._set_threshold(row_digests(features), scores)
        return galleries

    def _fit_galleries(self, features: NDArray[np.float32]) -> list[Any]:
        """Fit the scorers to features of some images."""
        pairs = zip(self.scorers_, self._by_version(features), strict=False)
        # their thresholds are not used: no warning that there are few images
        return [clone(s).set_params(contamination=0.5).fit(psi) for s, psi in pairs]

    def _learn_map_threshold(self, held_out: Vectors, galleries: list[Any]) -> None:
        """Set the threshold on maps by scorers that do not know these images."""
        fitted, self.scorers_ = self.scorers_, galleries
        self._learn_maps(held_out)
        self.scorers_ = fitted

    def _has_maps(self) -> bool:
        known = all(isinstance(scorer, Scorer) for scorer in self.scorers_)
        return known and super()._has_maps()

    def _by_version(self, features: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Part features by checkpoint; of unit length where so wanted."""
        parts = np.split(features, len(self._widths), axis=1)
        return [self._psi(part) for part in parts]

    def _psi(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        return unit_length(torch.from_numpy(features), self.normalize).numpy()

    def _score(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        versions = self._by_version(features)
        if self._logit is not None:
            with torch.inference_mode():
                logits = self._logit(torch.from_numpy(versions[0]))[:, 0]
            return -logits.numpy().astype(np.float64)
        pairs = zip(self.scorers_, versions, strict=True)
        return self._combine([scorer.score_samples(psi) for scorer, psi in pairs])

    def _tangent(
        self, features: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        versions = self._by_version(features)
        if self._logit is not None:
            weights = self._logit.weight.detach().double().numpy()
            scores = self._score(features)[None]
            slopes = [np.broadcast_to(weights, versions[0].shape)]
        else:
            pairs = list(zip(self.scorers_, versions, strict=True))
            scores = np.array([scorer._score(psi) for scorer, psi in pairs])
            slopes = [scorer._slopes(psi) for scorer, psi in pairs]
        if self.normalize:
            parts = np.split(features, len(self._widths), axis=1)
            slopes = [unit_slopes(*pair) for pair in zip(parts, slopes, strict=True)]
        scale = self._scale_of(scores)[:, :, None]
        return -self._combine(list(scores)), np.hstack(list(scale * slopes))

    def _scale_of(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Give the derivative of what `_combine` gives by each checkpoint's scores."""
        if len(scores) == 1 and self.adaptation != "ses":
            return np.ones_like(scores)
        scale = np.ones_like(scores) / np.reshape(self._typical, (-1, 1))
        if self.adaptation == "ses":
            return scale * (
                np.arange(len(scores))[:, None] == (scores * scale).argmin(axis=0)
            )
        return scale / len(scores)

    def _combine(self, scores: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Divide distances by typical ones; SES takes the largest (section 3)."""
        if len(scores) == 1 and self.adaptation != "ses":
            return scores[0]
        ratios = [s / typical for s, typical in zip(scores, self._typical, strict=True)]
        return (np.min if self.adaptation == "ses" else np.mean)(ratios, axis=0)
