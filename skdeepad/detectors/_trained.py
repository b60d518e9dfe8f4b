"""What the detectors share that train a network under an objective of its outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from math import prod
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_consistent_length
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_y
from torch import Tensor, nn

from ..augmentation import EachImage, paper_augmentation
from ..backbones import Backbone
from ..backbones._backbone import pool, probes
from ..backbones._decoder import make_decoder
from ..backbones._pretrained import is_pretrained
from ..base import draw_seed
from ..draws import OwnDraws
from ..frozen import frozen_copy
from ..inference import INPUT, PassOutputs, Tap, flat
from ..inputs import Vectors, chunks
from ..scorers._base import row_digests
from ._base import (
    N_STAGES,
    TrainedDetector,
    TrainingSamples,
    find_related,
    hold_out,
)

MILESTONE_DECAY = 0.1  # of the learning rate at a milestone
MIN_SPREAD = 1e-4  # of scores, relative to their size: less is none
MAX_COMPARED = 256  # columns of a row, to know near copies by


class TrainedEnd(Backbone):
    """The end of a network that is trained, behind stages that are not.

    It is given what the last frozen stage makes of samples, if stages follow that,
    and the features of frozen stages. Its output is what the objective sees: the
    features of the frozen and of the trained stages side by side, whitened if so
    wanted, and projected.

    Parameters
    ----------
    trained : mapping of str to torch.nn.Module
        The stages that follow the frozen ones; none, perhaps.
    shape : tuple of int
        The shape of what the first of them takes.
    taps : tuple of str
        The stages whose outputs, averaged over positions, are features.
    n_features : int
        How many features of frozen stages there are.
    source : Backbone
        The network that the stages are of.
    """

    def __init__(
        self,
        trained: Mapping[str, nn.Module],
        shape: tuple[int, ...],
        taps: tuple[str, ...],
        n_features: int,
        source: Backbone,
    ) -> None:
        n_handed_on = prod(shape) if trained else 0
        super().__init__(
            trained or {"features": nn.Identity()},
            in_channels=n_handed_on + n_features,
            vectors=True,
            to_map=source.to_map,
        )
        self.shape = shape
        self.n_handed_on = n_handed_on
        self.taps = taps
        self.whitening: nn.Module = nn.Identity()
        self.projection: nn.Module = nn.Identity()

    @property
    def ends_linear(self) -> bool:
        """Whether the last layer is made to give an objective its outputs."""
        return isinstance(list(self.stages.modules())[-1], nn.Linear)

    def routes(self) -> list[list[tuple[str, nn.Module]]]:
        """Give the trained stages by their names, if there are any."""
        return [list(self.stages.items())] if self.n_handed_on else []

    def encode(self, x: Tensor) -> Tensor:
        """Give the last trained stage's output, as it is."""
        for stage in self.stages.values():
            x = stage(x)
        return x

    def features(self, *inputs: Tensor) -> Tensor:
        """Give the features of all stages that count, in the order of the network."""
        if not self.n_handed_on:
            return torch.cat(inputs, dim=1)
        x, *outputs = inputs
        for name, stage in self.stages.items():
            x = stage(x)
            if name in self.taps:
                outputs.append(pool(self.as_map(x)))
        return torch.cat(outputs, dim=1)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Give what the objective sees."""
        return self.projection(self.whitening(self.features(*inputs)))

    def probe(self) -> list[Tensor]:
        """Give what the objective sees of random inputs, always the same."""
        handed_on = [self.shape] if self.n_handed_on else []
        n_features = (self.in_channels or 0) - self.n_handed_on
        return [self(*probes(*handed_on, (n_features,)))]


class FirstPass(NamedTuple):
    """What is known of samples once they have passed the frozen stages."""

    readable: NDArray[np.bool_]
    columns: NDArray[np.float32]  # some of each row, by which near copies are known
    digests: NDArray[np.uint64]  # by which exact copies are known


class ObjectiveDetector(TrainedDetector):
    """Base of the detectors that train a network under an objective of its outputs.

    A subclass defines `_learn`, which calls `_split_network`, `_run_front` and
    `_train`, and ``_score(outputs)``.

    Parameters
    ----------
    batch_size : int, default=128
        How many images the network is given at once, in training and in scoring.
    milestones : sequence of float, default=()
        At these shares of the steps, in (0, 1), the learning rate falls to a tenth.
    weight_decay : float, default=0.0
        Of Adam.
    augmentation : "paper", None or callable, default=None
        What is done to each image each time it is trained on: a function of one
        image, a tensor of shape (channels, height, width) in [0, 1], such as
        torchvision's transforms are. "paper": what Ruff et al. (2020) do to CIFAR-10
        (a little noise, colours by 1 %, mirrored, moved by up to an eighth).

    Attributes
    ----------
    backbone_ : skdeepad.backbones.Backbone
        The network, as trained.
    trained_stages_ : tuple of str
        The stages that were trained.
    """

    batch_size: int = 128
    milestones: Iterable[float] = ()
    weight_decay: float = 0.0
    augmentation: Any = None

    _saved: ClassVar = {"_network": TrainedEnd}
    _normalizes_code: ClassVar = False  # before a decoder of LeNets for CIFAR-10
    # what the frozen stages gain in bfloat16, distances would lose
    _end_dtype: ClassVar = torch.float32

    _parameter_constraints: ClassVar = {
        "milestones": [tuple, list],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "augmentation": [StrOptions({"paper"}), callable, None],
    }

    def _split_network(
        self,
        inputs: Vectors,
        trained: tuple[str, ...],
        rng: np.random.RandomState,
    ) -> PassOutputs:
        """Part the backbone into frozen stages and trained ones, which are copied."""
        names = self.backbone_.stage_names
        first = names.index(trained[0]) if trained else len(names)
        self.trained_stages_ = trained
        self._frozen_stages = names[:first]
        if trained:
            self.backbone_ = self.backbone_.clone()
        front = self._pass(self._taps())  # `_front` may ask for the end
        # copied before training sets the modes of modules that both hold
        frozen_copy(self.backbone_, front.device, front.dtype)
        shapes = front.shapes(front.sample_shape(inputs))
        self._network = TrainedEnd(
            {name: self.backbone_.stages[name] for name in names[first:]},
            shapes[0] if trained else (),
            self.stages_,
            sum(width for (width,) in (shapes[1:] if trained else shapes)),
            self.backbone_,
        )
        augment = self._augment(draw_seed(rng))
        return PassOutputs(front, inputs, self.max_cache_bytes, augment)

    def _taps(self) -> tuple[Tap, ...]:
        frozen = tuple(t for t in super()._taps() if t.stage in self._frozen_stages)
        if not self.trained_stages_:
            return frozen
        last = self._frozen_stages[-1] if self._frozen_stages else INPUT
        return Tap(last, "output"), *frozen

    def _end(self) -> TrainedEnd:
        return self._network

    def _augment(self, seed: int) -> Callable[[Tensor], Tensor] | None:
        if self.augmentation is None:
            return None
        if self.image_size_ is None:
            raise ValueError("augmentation needs images, but X holds vectors.")
        if self.augmentation == "paper":
            return paper_augmentation(self.image_size_, seed)
        return EachImage(self.augmentation, seed)

    def _run_front(self, outputs: PassOutputs) -> FirstPass:
        """Pass all samples through the frozen stages."""
        n, n_columns = len(outputs.inputs), self._network.in_channels or 0
        some = slice(None, None, max(1, n_columns // MAX_COMPARED))
        seen = FirstPass(
            np.zeros(n, dtype=bool),
            np.zeros((n, len(range(n_columns)[some])), dtype=np.float32),
            np.zeros(n, dtype=np.uint64),
        )
        batches = self._run(outputs.front, outputs.inputs, fitting=False)
        for index, arrays in outputs.keep(batches):
            rows = flat(arrays)
            seen.readable[index] = True
            seen.columns[index] = rows[:, some]
            seen.digests[index] = row_digests(rows)
        return seen

    def _hold_out(
        self,
        seen: FirstPass,
        rows: NDArray[np.intp],
        samples: TrainingSamples,
        rng: np.random.RandomState,
    ) -> NDArray[np.bool_]:
        """Choose which of these samples are not trained on."""
        groups = samples.groups_of(rows)
        related = find_related(groups, seen.columns[rows], seen.digests[rows])
        return hold_out(related, self.validation_fraction, rng)

    def _outputs(
        self, outputs: PassOutputs, index: NDArray[np.intp]
    ) -> NDArray[np.float32]:
        """Give what the network, as it is, makes of training samples."""
        network = self._network.frozen()
        found = []
        for _, inputs in outputs.batches(chunks(index, self.batch_size)):
            with torch.inference_mode():
                found.append(network(*inputs).cpu())
        return torch.cat(found).numpy()

    def _train(
        self,
        losses: Iterable[Tensor],
        n_steps: int,
        rng: np.random.RandomState,
        *,
        modules: Iterable[nn.Module],
        weight_decay: float,
        undecayed: Iterable[Tensor] = (),
        phase: str = "training",
    ) -> NDArray[np.float64]:
        """Take one step for each loss, with all weights of these modules."""
        weights = [p for m in modules for p in m.requires_grad_(True).parameters()]
        held = set(undecayed)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in weights if p not in held]},
            {"params": [p for p in weights if p in held], "weight_decay": 0.0},
        ]
        optimizer = self._optimizer(groups, weight_decay)
        schedule = self._schedule(optimizer, n_steps, phase)
        curve = []
        seed = draw_seed(rng)
        for loss in self._take_steps(optimizer, losses, n_steps, seed, phase=phase):
            curve.append(loss)
            schedule.step()
        return np.array(curve)

    def _optimizer(
        self, groups: list[dict[str, Any]], weight_decay: float
    ) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, self.learning_rate, weight_decay=weight_decay)

    def _schedule(
        self, optimizer: torch.optim.Optimizer, n_steps: int, phase: str
    ) -> torch.optim.lr_scheduler.LRScheduler:
        name = "milestones" if phase == "training" else "pretrain_milestones"
        milestones = getattr(self, name)
        if not all(0 < m < 1 for m in milestones):
            raise ValueError(
                f"{name}={milestones!r} must be shares of the steps, each between 0 "
                "and 1."
            )
        steps = sorted({round(m * n_steps) for m in milestones})
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, MILESTONE_DECAY)

    def _make_decoder(self, seed: int) -> nn.Module:
        """Mirror the trained stages."""
        backbone, network = self.backbone_, self._network
        pixels = (backbone.mean, backbone.std) == ((0.0,), (1.0,))
        with OwnDraws(seed):
            return make_decoder(
                network.stages.values(),
                network.shape,
                unit=pixels and not backbone.vectors,
                normalize_code=self._normalizes_code,
            )

    def _freeze_network(self) -> None:
        """Use the network as it is now."""
        self._network.frozen().cpu()
        self._widths = [output.shape[1] for output in self._network.probe()]

    def _scored_outputs(
        self, outputs: PassOutputs, index: NDArray[np.intp]
    ) -> NDArray[np.float32]:
        """Give what the settled network makes of training samples, as in scoring."""
        batches = outputs.unchanged(chunks(index, self.batch_size))
        return np.concatenate([found for _, found in self._embed(batches)])

    def _learn_threshold(
        self, found: NDArray[np.float32], held_out: NDArray[np.bool_]
    ) -> None:
        """Set the threshold by outputs for training samples, some held out."""
        scores = self._score(found)
        self._warn_of_collapse(scores)
        self._set_held_out(row_digests(found), scores, held_out)

    def _warn_of_collapse(self, scores: NDArray[np.float64]) -> None:
        """Warn if all images have one score."""
        if np.ptp(scores) <= MIN_SPREAD * np.abs(scores).max():
            warnings.warn(
                "The network has collapsed: all images have the same score. Lower "
                "learning_rate or max_steps, and check that X is scaled and not "
                "constant.",
                ConvergenceWarning,
                stacklevel=5,
            )


class FineTunedDetector(ObjectiveDetector):
    """Base of those that take pretrained networks, too, frozen or trained in part.

    Parameters
    ----------
    stages : str or sequence of str, default=None
        The stages whose outputs, averaged over positions, are the features. None:
        the last three of a pretrained network ("pool" and "conv_head" not counted,
        which only restate the stage before them), and the last one of others.
    trainable_stages : "auto", None, str or sequence of str, default="auto"
        The stages that are trained. "auto": all stages of a network with random
        weights and of a given module, none of a pretrained one. None: none. Where
        all are trained, BatchNorm learns, too.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        Of the frozen stages. "auto": bfloat16 for images where the processor has
        instructions for it (AMX, AVX512-BF16, CUDA), float32 elsewhere. What is
        trained is in float32.
    """

    stages: str | Iterable[str] | None = None
    trainable_stages: str | Iterable[str] | None = "auto"

    _parameter_constraints: ClassVar = {
        "stages": [str, tuple, list, None],
        "trainable_stages": [str, tuple, list, None],
    }

    def _default_stages(self, backbone: Backbone) -> Iterable[str]:
        if self._trains_all(backbone):
            return backbone.stage_names[-1:]
        return backbone.block_names[-N_STAGES:]

    def _is_pretrained(self, backbone: Backbone) -> bool:
        """Tell whether "auto" leaves all stages as they are."""
        name = self.backbone
        named = isinstance(name, str) and (name == "auto" or is_pretrained(name))
        return named and not backbone.vectors and self.weights is not None

    def _trained_stages(self, backbone: Backbone) -> tuple[str, ...]:
        given: Any = self.trainable_stages
        if isinstance(given, str) and given == "auto":
            return () if self._is_pretrained(backbone) else backbone.stage_names
        if given is None or not len(given):
            return ()
        given = (given,) if isinstance(given, str) else given
        return backbone.check_stages(given, "trainable_stages")

    def _trains_all(self, backbone: Backbone) -> bool:
        return set(self._trained_stages(backbone)) == set(backbone.stage_names)

    def _stages_in_training(self) -> list[nn.Module]:
        """Give the trained stages; where all are, BatchNorm learns, too."""
        whole = self._trains_all(self.backbone_)
        stages = self._network.stages
        return [stages[name].train(whole) for name in self.trained_stages_]

    def _check_targets(
        self, y: ArrayLike, n: int
    ) -> tuple[NDArray[Any], NDArray[np.intp]]:
        """Give the classes, sorted, and each sample's number."""
        labels = _check_y(y, estimator=self)
        check_classification_targets(labels)
        check_consistent_length(labels, np.empty(n))
        return np.unique(labels, return_inverse=True)
