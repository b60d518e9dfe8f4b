"""Detectors that score an image by its features."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..detectors import (
    DeepSAD,
    DeepSVDD,
    HSCClassifier,
    KDClonerEstimator,
    MahalanobisFeatureScorer,
    OpenSetClassifier,
    PANDAEstimator,
)
from ..detectors._adaptation import unit_length
from ..detectors._open_set import normality
from ..detectors._source_and_cloner import discrepancy_map, sum_maps
from ..frozen import frozen_copy
from ..objectives import radial_distance
from ._maps import Refinement
from ._parts import (
    ExportError,
    FrontAndScore,
    Images,
    Part,
    Step,
    part_of,
    scoring,
    size_of_images,
)
from ._scorers import constant


def channels_of(detector: Any) -> int:
    """Tell how many channels the images have that a detector's network is given."""
    shape = detector.image_shape_in_
    return int(detector.backbone_.in_channels or (shape[0] if shape else 3))


def front_and_score(detector: Any, score: nn.Module) -> FrontAndScore:
    """Give the part of a detector that scores the features of its network."""
    return FrontAndScore(
        detector._front(), channels_of(detector), detector._end(), score
    )


class Split(Step):
    """Scores of parts of the features, added."""

    def __init__(self, scores: list[nn.Module], widths: list[int]) -> None:
        super().__init__()
        self.scores, self.widths = nn.ModuleList(scores), widths

    def forward(self, features: Tensor) -> Tensor:
        """Score features."""
        parts = features.split(self.widths, dim=1)
        pairs = zip(self.scores, parts, strict=True)
        return sum_of([score(part) for score, part in pairs])


def sum_of(terms: list[Tensor]) -> Tensor:
    """Add tensors."""
    return torch.stack(terms).sum(dim=0) if len(terms) > 1 else terms[0]


@part_of.register
def _(detector: MahalanobisFeatureScorer) -> Part:
    gaussians = detector._gaussians
    widths = detector._widths if len(gaussians) > 1 else [sum(detector._widths)]
    return front_and_score(detector, Split([scoring(g) for g in gaussians], widths))


class Checkpoints(Step):
    """The score of `PANDAEstimator`."""

    def __init__(self, detector: PANDAEstimator) -> None:
        super().__init__()
        self.widths, self.normalize = detector._widths, detector.normalize
        self.largest = detector.adaptation == "ses"
        self.logit = detector._logit
        self.scorers = nn.ModuleList(scoring(s) for s in detector.scorers_)
        self.typical = detector._typical

    def forward(self, features: Tensor) -> Tensor:
        """Score features."""
        parts = features.split(self.widths, dim=1)
        psi = [unit_length(part, self.normalize) for part in parts]
        if self.logit is not None:
            return -self.logit(psi[0])[:, 0].double()
        pairs = zip(self.scorers, psi, strict=True)
        scores = [scorer(part) for scorer, part in pairs]
        if len(scores) == 1 and not self.largest:
            return scores[0]
        both = zip(scores, self.typical, strict=True)
        ratios = torch.stack([score / typical for score, typical in both])
        return ratios.amin(dim=0) if self.largest else ratios.mean(dim=0)


@part_of.register
def _(detector: PANDAEstimator) -> Part:
    return front_and_score(detector, Checkpoints(detector))


class Sphere(Step):
    """Minus the squared distance from a centre."""

    def __init__(self, center: Any, squared_radius: float) -> None:
        super().__init__()
        self.register_buffer("center", constant(center))
        self.squared_radius = squared_radius

    def forward(self, outputs: Tensor) -> Tensor:
        """Score outputs."""
        apart = outputs.double() - self.center
        return self.squared_radius - apart.square().sum(dim=1)


@part_of.register
def _(detector: DeepSAD) -> Part:
    return front_and_score(detector, Sphere(detector.center_, 0.0))


@part_of.register
def _(detector: DeepSVDD) -> Part:
    return front_and_score(detector, Sphere(detector.center_, detector.radius_**2))


class Call(Step):
    """A function of a tensor."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, outputs: Tensor) -> Any:
        """Call it."""
        return self.function(outputs)


def radial_score(norm: str, outputs: Tensor) -> Tensor:
    """Score what an `HSCClassifier` gives."""
    return -radial_distance(outputs.double(), norm)


def logit_score(outputs: Tensor) -> Tensor:
    """Score what a classifier of two classes gives."""
    return -outputs[:, 0].double()


@part_of.register
def _(detector: HSCClassifier) -> Part:
    radial = detector.objective == "hsc"
    score = partial(radial_score, detector.norm) if radial else logit_score
    return front_and_score(detector, Call(score))


def open_set_outputs(
    anomaly_score: str, n_classes: int, outputs: Tensor
) -> dict[str, Tensor]:
    """Give the score and the logits of an `OpenSetClassifier`."""
    outputs = outputs.double()
    score = normality(outputs, anomaly_score, n_classes)
    return {"score": score, "logits": outputs[:, :n_classes]}


class Members(Part):
    """The members of an `OpenSetClassifier`."""

    def __init__(self, members: list[Part]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.sizes, self.channels = members[0].sizes, members[0].channels

    def forward(self, images: Images) -> dict[str, Tensor]:
        """Average scores and probabilities."""
        found = [member(images) for member in self.members]
        p = torch.stack([outputs["logits"].softmax(dim=1) for outputs in found])
        score = torch.stack([outputs["score"] for outputs in found]).mean(dim=0)
        tiny = torch.finfo(torch.float64).tiny
        return {"score": score, "logits": p.mean(dim=0).clamp(min=tiny).log()}


@part_of.register
def _(detector: OpenSetClassifier) -> Part:
    if detector.perturbation:
        raise ExportError(
            f"OpenSetClassifier(perturbation={detector.perturbation}) cannot be "
            "exported: it needs gradients, which graphs have not. Fit it with "
            "perturbation=0."
        )
    if detector.estimators_:
        return Members([part_of(member) for member in detector.estimators_])
    score = partial(open_set_outputs, detector.anomaly_score, len(detector.classes_))
    return front_and_score(detector, Call(score))


class Cloner(Part):
    """`KDClonerEstimator`: losses or residuals, and the map of discrepancies."""

    def __init__(self, detector: KDClonerEstimator) -> None:
        super().__init__()
        size = size_of_images(detector.image_size_)
        self.sizes, self.channels = (size,), channels_of(detector)
        network = frozen_copy(detector._network, torch.device("cpu"), torch.float32)
        self.network: Any = network
        self.stages, self.weights = detector.score_stages_, detector._weights
        self.scored = [name in self.stages for name in detector.stages_]
        self.refine = None
        if detector.localization == "discrepancy" and detector._has_maps:
            self.refine = Refinement(detector, size)

    def forward(self, images: Images) -> dict[str, Tensor]:
        """Compare source and cloner."""
        pairs = self.network.of_images(images[self.sizes[0]])
        found = self.network.compare(pairs).double()
        if self.network.scored:
            outputs = {"score": -found[:, 0]}
            maps = sum_maps([self.network.residual_map(pairs)], self.sizes[0])
        else:
            of_stages = found.reshape(-1, len(self.scored), 2)[:, self.scored]
            both = of_stages.sum(dim=1)
            value, direction = self.weights
            outputs = {"score": -(value * both[:, 0] + direction * both[:, 1])}
            if self.refine is None:
                return outputs
            maps = discrepancy_map(self.stages, self.weights, pairs, self.sizes[0])
        if self.refine is not None:
            outputs["map"] = self.refine(maps)
        return outputs


@part_of.register
def _(detector: KDClonerEstimator) -> Part:
    return Cloner(detector)
