"""What is around other estimators: pipelines, ensembles, error rates."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.pipeline import Pipeline
from torch import Tensor, nn

from ..conformal import ConformalDetector, RobustDetector
from ..detectors import DetectorEnsemble
from ..detectors._ensemble import MIN_RATIO
from ..features import BackboneFeatures
from ._detectors import front_and_score
from ._parts import ExportError, Images, Part, part_of, scoring
from ._scorers import constant, transforming


@part_of.register
def _(detector: Pipeline) -> Part:
    (_, first), *between, (_, last) = detector.steps
    if not isinstance(first, BackboneFeatures):
        raise ExportError(
            f"A pipeline that starts with {type(first).__name__} cannot be exported: "
            "graphs start at images. Put BackboneFeatures first."
        )
    steps = [transforming(s) for _, s in between if s not in ("passthrough", None)]
    return front_and_score(first, nn.Sequential(*steps, scoring(last)))


class Ensemble(Part):
    """`DetectorEnsemble`."""

    def __init__(self, ensemble: DetectorEnsemble) -> None:
        super().__init__()
        members = [part_of(member) for member in ensemble.estimators_]
        self.members = nn.ModuleList(members)
        self.sizes = tuple(dict.fromkeys(s for part in members for s in part.sizes))
        channels = {part.channels for part in members}
        if len(channels) > 1:
            raise ExportError(
                "An ensemble of networks that take grey images and networks that take "
                "colour ones cannot be exported. Export the members one by one."
            )
        self.channels = channels.pop()
        self.logarithmic = ensemble.scale == "log"
        self.largest = getattr(ensemble, "_largest", False)  # not in old files
        known = ensemble.training_scores_
        medians = -np.median(known, axis=0)
        medians[medians == 0] = 1.0
        if self.logarithmic and self.largest:
            trained = np.log(np.maximum(-known / medians, MIN_RATIO))
            spread = trained.std(axis=0)
            spread[spread == 0] = 1.0
            self.register_buffer("centre", constant(trained.mean(axis=0)))
            self.register_buffer("spread", constant(spread))
        self.register_buffer("medians", constant(medians))
        self.register_buffer("shares", constant(ensemble._shares))
        self.register_buffer("known", constant(known))

    def forward(self, images: Images) -> dict[str, Tensor]:
        """Bring the members' scores to one scale; average them, or take the worst."""
        found = [member(images)["score"] for member in self.members]
        scores = torch.stack(found, dim=1)
        if self.logarithmic:
            ratios = (-scores / self.medians).clamp(min=MIN_RATIO)
            if self.largest:
                apart = (ratios.log() - self.centre) / self.spread
                return {"score": -apart.amax(dim=1)}
            return {"score": -(ratios.log() * self.shares).sum(dim=1)}
        known, scores = self.known[None], scores[:, None]
        below = (known < scores).double().sum(dim=1)
        below = below + (known <= scores).double().sum(dim=1)
        ranks = below / (2 * self.known.shape[0])
        if self.largest:
            return {"score": ranks.amin(dim=1)}
        return {"score": (ranks * self.shares).sum(dim=1)}


@part_of.register
def _(detector: DetectorEnsemble) -> Part:
    return Ensemble(detector)


@part_of.register(ConformalDetector)
@part_of.register(RobustDetector)
def _(detector: Any) -> Part:
    if getattr(detector, "category_offsets_", None):
        raise ExportError(
            "A ConformalDetector with categories cannot be exported: a graph has one "
            "threshold. Fit one detector for each category."
        )
    return part_of(detector.estimator_)
