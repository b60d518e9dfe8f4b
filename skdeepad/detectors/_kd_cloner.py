"""Multiresolution knowledge distillation (Salehi et al., 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor, nn

from ..augmentation import RotationAndScaling
from ..backbones import Backbone
from ..backbones._cloner import make_cloner
from ..base import draw_seed
from ..draws import OwnDraws
from ..inference import INPUT, PassOutputs, Tap, flat, iter_outputs, to_tensor
from ..inputs import Vectors, chunks
from ..localization import Attribution, MapPass, gradient, guided, smoothgrad
from ..scorers._base import row_digests
from ..training import batchnorm_batches
from ._base import (
    TrainedDetector,
    TrainingSamples,
    find_related,
    hold_out,
    numbers_of,
)
from ._maps import AnomalyMapMixin
from ._source_and_cloner import (
    SourceAndCloner,
    channel_scales,
    checked_cloner,
    discrepancy,
    learn_precisions,
    losses,
    paired,
    residual_map,
    total_loss,
)

N_CRITICAL_LAYERS = 4  # the paper's "last four max-pooling layers"
LOCALIZATIONS = {"discrepancy", "gradient", "smoothgrad", "guided_backprop"}
CONVERGENCE_STEPS = 100  # steps over which losses are compared


class KDClonerEstimator(AnomalyMapMixin, TrainedDetector):
    """Multiresolution knowledge distillation: a cloner that knows normal images only.

    A small network, the cloner, learns on normal images to give the activations that
    a pretrained network, the source, has at several of its stages [1]_. On anomalies,
    which it has not seen, it fails to. The score is the loss it was trained under,
    Eq. 4::

        L = L_val + lambda L_dir
        L_val = sum_i 1/N_i ||a_s^i - a_c^i||^2          (Eq. 1)
        L_dir = sum_i (1 - cos(a_s^i, a_c^i))            (Eq. 3)

    and where in the image the two networks disagree is a map of the anomaly.

    Parameters
    ----------
    backbone : str, torch.nn.Module or callable, default="auto"
        The source: a name of `skdeepad.backbones.list_backbones`, a module (a copy is
        taken), or a function that makes one. "auto" is "efficientnet_lite0" for
        images and "mlp" for vectors. "vgg16" is the paper's.
    cloner : {"compact", "equal"}, torch.nn.Module or callable, default="compact"
        The network that learns. Both of ours have a block for each stage of the
        source, without biases, so that constants are not all they can learn; layers
        between those that are compared have 16 channels ("compact", the paper's) or
        as many as their stage ("equal", its ablation). A module (a copy is taken and
        trained), or a function that makes one, is called with images as the source
        sees them, and gives the activations of each of `stages`, in a sequence or in
        a mapping by their names.
    stages : str or sequence of str, default=None
        The critical layers: the stages whose outputs the cloner learns. None: the
        last four, "pool" and "conv_head" not counted.
    score_stages : str or sequence of str, default=None
        Those of `stages` that are scored and localized by. None: all but the first,
        as in the official code, where there are more than two.
    discrepancy : {"loss", "mahalanobis"}, default="loss"
        How source and cloner are compared in images that are scored.

        - "loss": by the loss of training, as in the paper: means over all positions.
        - "mahalanobis": beyond the paper, for small defects in irregular textures.
          At each position, the activations' difference over their size, averaged over
          a window of 3/16 of the map's sides, and its Mahalanobis length under the
          covariance of training images' differences; squares are summed over stages.
          The score is minus the mean of the largest twentieth of that map.
    loss : {"total", "value", "direction"}, default="total"
        Eq. 4, or one of its terms alone (section 3.3.3).
    direction_weight : float or "auto", default="auto"
        Lambda of Eq. 4. "auto": what makes the terms equal on the untrained cloner
        (the first mini-batch), as the paper says. The official code fixes it, to 100
        or, for MVTec AD, 2, as 0.01 and 0.5 on the other term.
    normalize_input : bool, default=True
        Whether both networks see images with the mean and variance that the source was
        trained with. The paper does so for CIFAR-10 alone: elsewhere pixels stay in
        [0, 1].
    standardize : bool, default=True
        Whether the cloner learns the source's activations as they are once each
        channel has mean 0 and variance 1 over the training images. The paper learns
        them as they are; channels and stages of large values then count for most.
    max_steps : int, default=400
        For how many mini-batches it trains at most. The paper, with mini-batches of
        64: 50 epochs of 6,000 images (Fashion-MNIST), 600 of about 240 (MVTec AD),
        which is 4,700 and 2,400.
    tol : float, default=0.001
        Training stops when the mean loss over 100 mini-batches is no lower than
        ``(1 - tol)`` times that of the 100 before.
    rotation : float, default=0.0
        Images are turned at random by up to so many degrees in training. The paper's
        setting for few images is 20.
    scaling : (float, float), default=(1.0, 1.0)
        Images are scaled at random by a factor in this range in training. The paper's
        setting for few images is (0.9, 1.05).
    localization : {"discrepancy", "gradient", "smoothgrad", "guided_backprop"}, \
default="discrepancy"
        What `anomaly_map` shows.

        - "discrepancy": what `discrepancy` says, position by position, summed over
          stages. It needs no backward pass.
        - "gradient": the gradient of the loss by the pixels (Eq. 5).
        - "smoothgrad": its mean over `n_noisy` noisy copies of the image.
        - "guided_backprop": the same gradient; what is negative at a ReLU module of
          the cloner is not handed on.
    n_noisy : int, default=50
        For "smoothgrad": how many noisy copies of each image there are.
    noise : float, default=0.05
        For "smoothgrad": the noise's standard deviation, for pixels in [0, 1].
    batch_size : int, default=32
        How many samples the networks see at once, in training and in scoring. The
        paper's is 64.
    max_cache_bytes : int, default=2**30
        What the source makes of the training images is kept in memory if it takes no
        more than this, and computed again in each epoch otherwise, or where images
        are turned or scaled. Scores are the same.
    memory : str, path or joblib.Memory, default=None
        Folder in which what the source makes of training images, and the losses of
        scored ones, are kept by the content of the image.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        Of both networks: "auto" runs images in bfloat16 where the processor is made
        for it (AMX, AVX512-BF16, CUDA), in training by automatic mixed precision.
        Losses and the gradients of maps are in float32.
    random_state : int, RandomState instance or None, default=None
        Seeds the cloner's weights, random weights of the source, the held-out share,
        mini-batches, augmentation and noise.

    Attributes
    ----------
    backbone_ : skdeepad.backbones.Backbone
        The source.
    cloner_ : torch.nn.Module
        The trained cloner.
    stages_ : tuple of str
        The stages that the cloner has learnt.
    score_stages_ : tuple of str
        Those that are scored by.
    direction_weight_ : float
        Lambda of Eq. 4.

    See Also
    --------
    skdeepad.inspection.AnomalyMapDisplay : Pictures of the maps.
    skdeepad.metrics.aupro_score : How well maps find the defects.

    References
    ----------
    .. [1] M. Salehi et al., "Multiresolution Knowledge Distillation for Anomaly
       Detection", CVPR 2021.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdeepad import KDClonerEstimator
    >>> X, y = load_digits(return_X_y=True)
    >>> X = X.reshape(-1, 8, 8)[:400] / 16
    >>> zeros, ones = X[y[:400] == 0], X[y[:400] == 1]
    >>> detector = KDClonerEstimator(image_size=32, max_steps=20, random_state=0)
    >>> detector = detector.fit(zeros)
    >>> bool(detector.score_samples(zeros).mean() > detector.score_samples(ones).mean())
    True
    >>> detector.anomaly_map(ones[:3]).shape
    (3, 8, 8)
    """

    cloner: Any = "compact"
    stages: str | Iterable[str] | None = None
    score_stages: str | Iterable[str] | None = None
    discrepancy: str = "loss"
    loss: str = "total"
    direction_weight: float | str = "auto"
    normalize_input: bool = True
    standardize: bool = True
    max_steps: int = 400
    tol: float = 1e-3
    rotation: float = 0.0
    scaling: tuple[float, float] = (1.0, 1.0)
    localization: str = "discrepancy"
    n_noisy: int = 50
    noise: float = 0.05

    _saved: ClassVar = {
        "cloner": nn.Module,
        "cloner_": nn.Module,
        "_network": SourceAndCloner,
    }

    _parameter_constraints: ClassVar = {
        "cloner": [StrOptions({"compact", "equal"}), callable],
        "stages": [str, tuple, list, None],
        "score_stages": [str, tuple, list, None],
        "discrepancy": [StrOptions({"loss", "mahalanobis"})],
        "loss": [StrOptions({"total", "value", "direction"})],
        "direction_weight": [
            Interval(Real, 0, None, closed="left"),
            StrOptions({"auto"}),
        ],
        "normalize_input": ["boolean"],
        "standardize": ["boolean"],
        "tol": [Interval(Real, None, 1, closed="left")],
        "rotation": [Interval(Real, 0, 180, closed="both")],
        "scaling": [tuple, list],
        "localization": [StrOptions(LOCALIZATIONS)],
        "n_noisy": [Interval(Integral, 1, None, closed="left")],
        "noise": [Interval(Real, 0, None, closed="left")],
    }

    @classmethod
    def from_paper(cls, dataset: str = "fashion_mnist", **changes: Any) -> Any:
        """Make the estimator with the numbers of the paper and its official code.

        VGG-16, learnt at its last four max-poolings and scored at the last three,
        activations as they come; gradients for maps. Mini-batches of 64, as many as
        50 epochs of 6,000 images ("mnist", "fashion_mnist"), 200 of 5,000 ("cifar10")
        or 600 of about 240 ("mvtec"). Images have 32, 224 and 128 pixels; only those
        of "cifar10" are normalized. (The official code enlarges them to 256 pixels and
        cuts the middle out; here nothing is cut.) No image is held out, so that the
        threshold is optimistic, as a warning of `fit` says.

        Parameters
        ----------
        dataset : {"fashion_mnist", "mnist", "cifar10", "mvtec"}, \
default="fashion_mnist"
            Whose images and schedule.
        **changes
            Parameters that are to be otherwise.

        Returns
        -------
        KDClonerEstimator
            Not fitted. The source's weights are torchvision's; see `weights`.
        """
        grey = {"image_size": 32, "max_steps": 50 * 94}
        numbers: dict[str, dict[str, Any]] = {
            "fashion_mnist": grey,
            "mnist": grey,
            "cifar10": {
                "image_size": 224,
                "max_steps": 200 * 79,
                "normalize_input": True,
            },
            "mvtec": {
                "image_size": 128,
                "max_steps": 600 * 4,
                "direction_weight": 2.0,
            },
        }
        paper: dict[str, Any] = {
            "backbone": "vgg16",
            "normalize_input": False,
            "stages": ("stage2", "stage3", "stage4", "stage5"),
            "score_stages": ("stage3", "stage4", "stage5"),
            "direction_weight": 100.0,
            "standardize": False,
            "batch_size": 64,
            "tol": -math.inf,
            "localization": "gradient",
            "validation_fraction": 0,
            **numbers_of(dataset, numbers),
        }
        return cls(**{**paper, **changes})

    @classmethod
    def for_defects(cls, **changes: Any) -> Any:
        """Make the estimator for small defects in textures.

        Residuals of four early stages, all of them scored, and 100 mini-batches at a
        learning rate of 0.003.

        Parameters
        ----------
        **changes
            Parameters that are to be otherwise.

        Returns
        -------
        KDClonerEstimator
            Not fitted.
        """
        stages = ("stage2", "stage3", "stage4", "stage5")
        defaults: dict[str, Any] = {
            "discrepancy": "mahalanobis",
            "stages": stages,
            "score_stages": stages,
            "image_size": 128,
            "max_steps": 100,
            "learning_rate": 3e-3,
        }
        return cls(**{**defaults, **changes})

    def _default_stages(self, backbone: Backbone) -> Iterable[str]:
        return backbone.block_names[-N_CRITICAL_LAYERS:]

    def _learn(self, samples: TrainingSamples, rng: np.random.RandomState) -> None:
        inputs = samples.inputs
        self.score_stages_ = self._check_score_stages()
        if not self.normalize_input:
            self.backbone_ = self.backbone_.unnormalized()
        front = self._front()
        sample_shape = front.sample_shape(inputs)
        augment = self._augmentation(draw_seed(rng))
        outputs = PassOutputs(front, inputs, self.max_cache_bytes, augment)
        shapes = front.shapes(sample_shape)
        averages, digests = self._measure(outputs, shapes)
        rows = np.flatnonzero(~np.isnan(averages).any(axis=(1, 2)))
        self._check_enough(len(rows))
        widths = [shape[0] for shape in shapes[1:]]
        groups = samples.groups_of(rows)
        related = find_related(groups, averages[rows, 0], digests[rows])
        held_out = hold_out(related, self.validation_fraction, rng)
        # nothing is learnt from those that are held out: they count as new ones
        means, scales = channel_scales(
            averages[rows[~held_out]], widths, self.standardize
        )
        seed = draw_seed(rng)
        cloner = self._make_cloner(sample_shape, shapes, seed)
        network = SourceAndCloner(self.backbone_, cloner, self.stages_, means, scales)
        self._train(network, outputs, rows[~held_out], rng, seed + 1)
        if self.discrepancy == "mahalanobis":
            learn_precisions(network, self.score_stages_, outputs, rows[~held_out])
        self._network, self.cloner_ = network, network.stages["cloner"]
        self._widths = [1] if network.scored else [2] * len(self.stages_)
        self._has_maps = any(
            len(shape) == 3 and name in self.score_stages_
            for name, shape in zip(self.stages_, shapes[1:], strict=True)
        )
        settled = outputs.unchanged(chunks(rows, self.batch_size))
        found = self._gather(self._embed(settled), len(inputs))
        self._learn_threshold(found[rows], held_out)
        self._noise_seed = draw_seed(rng)
        self.map_offset_ = np.nan
        if self.localization == "discrepancy" and self._has_maps:
            unseen = rows[held_out] if held_out.any() else rows
            self._learn_map_offset(inputs.take(unseen))

    def _check_score_stages(self) -> tuple[str, ...]:
        given = self.score_stages
        if given is None:
            return self.stages_[1:] if len(self.stages_) > 2 else self.stages_
        names = {given} if isinstance(given, str) else set(given)
        if not names or not names <= set(self.stages_):
            raise ValueError(
                f"score_stages={given!r} must name stages that the cloner learns: "
                f"{', '.join(self.stages_)}."
            )
        return tuple(name for name in self.stages_ if name in names)

    def _augmentation(self, seed: int) -> RotationAndScaling | None:
        low, high = check_scaling(self.scaling)
        if self.rotation == 0 and low == high == 1:
            return None
        if self.backbone_.vectors:
            raise ValueError("rotation and scaling need images, but X holds vectors.")
        return RotationAndScaling(self.rotation, (low, high), seed)

    def _taps(self) -> tuple[Tap, ...]:
        return Tap(INPUT, "output"), *(Tap(stage, "map") for stage in self.stages_)

    def _end(self) -> SourceAndCloner:
        return self._network

    def _measure(
        self, outputs: PassOutputs, shapes: list[tuple[int, ...]]
    ) -> tuple[NDArray[np.float32], NDArray[np.uint64]]:
        """Pass all samples once; give each channel's mean and mean square in each.

        Samples that cannot be read have NaN. The other array holds digests, by which
        copies are known.
        """
        n = len(outputs.inputs)
        # by sample, so that sums do not depend on the order in which they come
        averages = np.full((n, 2, sum(s[0] for s in shapes[1:])), np.nan, np.float32)
        digests = np.zeros(n, dtype=np.uint64)
        batches = self._run(outputs.front, outputs.inputs, fitting=False)
        for index, (x, *taps) in outputs.keep(batches):
            digests[index] = row_digests(flat([x]))
            found = [to_tensor(tap).float() for tap in taps]
            maps = [tap.reshape(*tap.shape[:2], -1) for tap in found]
            for k, power in enumerate((1, 2)):
                mean = torch.cat([(m**power).mean(dim=2) for m in maps], dim=1)
                averages[index, k] = mean.numpy()
        return averages, digests

    def _make_cloner(
        self, sample_shape: tuple[int, ...], shapes: list[tuple[int, ...]], seed: int
    ) -> nn.Module:
        """Make the cloner, or copy the given one, and check what it gives."""
        made: Any = self.cloner
        with OwnDraws(seed):
            if isinstance(made, str):
                return make_cloner(
                    self.backbone_,
                    self.stages_,
                    sample_shape,
                    compact=made == "compact",
                    signed=self.standardize,
                )
            if not isinstance(made, nn.Module):
                made = made()
        if not isinstance(made, nn.Module):
            raise ValueError(
                f"cloner={self.cloner!r} is not 'compact', 'equal', a torch.nn.Module "
                "or a function that returns one."
            )
        return checked_cloner(made, self.stages_, shapes)

    def _train(
        self,
        network: SourceAndCloner,
        outputs: PassOutputs,
        rows: NDArray[np.intp],
        rng: np.random.RandomState,
        seed: int,
    ) -> None:
        """Train the cloner until the loss has converged, or the budget is spent."""
        network.frozen().to(outputs.front.device)
        cloner = network.stages["cloner"].requires_grad_(True)
        if not network.vectors:
            cloner = cloner.to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(cloner.parameters(), lr=self.learning_rate)
        found = self._losses(network, outputs, rows, rng)
        cloner.train()
        curve: list[float] = []
        for loss in self._take_steps(optimizer, found, self.max_steps, seed):
            curve.append(loss)
            if has_converged(curve, self.tol):
                break
        self.loss_curve_ = np.array(curve)
        self.n_iter_ = len(curve)
        network.frozen().cpu()

    def _losses(
        self,
        network: SourceAndCloner,
        outputs: PassOutputs,
        rows: NDArray[np.intp],
        rng: np.random.RandomState,
    ) -> Iterator[Tensor]:
        """Give Eq. 4 for one mini-batch after the other, without end."""
        mini_batches = batchnorm_batches(rows, self.batch_size, rng)
        weights: Tensor | None = None
        for pairs in paired(network, outputs, mini_batches):
            of_stages = [losses(*pair).mean(dim=0) for pair in pairs.values()]
            both = torch.stack(of_stages).sum(dim=0)
            if weights is None:
                weights = self._settle_weights(*both.tolist()).to(both.device)
            yield both @ weights

    def _settle_weights(self, value: float, direction: float) -> Tensor:
        """Weigh the terms of Eq. 4, by their first values if so wanted."""
        weight: Any = self.direction_weight
        if weight == "auto":
            weight = value / max(direction, 1e-12)
        self.direction_weight_ = float(weight)
        both = {"total": [1.0, weight], "value": [1.0, 0.0], "direction": [0.0, 1.0]}
        self._weights: list[float] = both[self.loss]
        return torch.tensor(self._weights)

    def _learn_threshold(
        self, losses: NDArray[np.float32], held_out: NDArray[np.bool_]
    ) -> None:
        self._set_held_out(row_digests(losses), self._score(losses), held_out)

    def _score(self, losses: NDArray[np.float32]) -> NDArray[np.float64]:
        if self._network.scored:
            return -losses[:, 0].astype(np.float64)
        scored = [name in self.score_stages_ for name in self.stages_]
        by_stage = losses.reshape(len(losses), -1, 2)[:, scored]
        return -(by_stage.sum(axis=1, dtype=np.float64) @ np.array(self._weights))

    def _check_maps(self) -> None:
        super()._check_maps()
        if self.localization == "discrepancy" and not self._has_maps:
            raise ValueError(
                f"score_stages={self.score_stages_} have no maps. Choose earlier "
                "stages, or set localization='gradient'."
            )

    def _position_scores(
        self, inputs: Any
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float32]]]:
        task, size = self._map_pass(inputs), self.image_size_ or ()
        batches = iter_outputs(task, inputs, on_error=self.on_error)
        for index, (rows,) in self._track(batches, len(inputs), False):
            yield index, rows.reshape(len(rows), *size)

    def _whole_network(self) -> dict[str, Any]:
        """Give what a pass is made of that goes through source and cloner."""
        return {**vars(self._front()), "backbone": self._network, "taps": ()}

    def _map_pass(self, inputs: Vectors) -> MapPass:
        """Choose what maps show."""
        options = self._whole_network()
        total = partial(total_loss, self.score_stages_, self._weights)
        if self.localization == "discrepancy":
            attribution = (
                residual_map
                if self._network.scored
                else partial(discrepancy, self.score_stages_, self._weights)
            )
            return MapPass(**options, attribution=attribution)
        options = {**options, "dtype": torch.float32}  # gradients vanish in bfloat16
        if self.localization == "guided_backprop":
            network = self._network
            options["backbone"] = SourceAndCloner(
                self.backbone_,
                guided(self.cloner_),
                self.stages_,
                network.means,
                network.scales,
            ).frozen()
        if self.localization == "smoothgrad":
            generator = torch.Generator().manual_seed(self._noise_seed)
            shape = self.n_noisy, *self._front().sample_shape(inputs)
            noise = self.noise * torch.randn(shape, generator=generator)
            return MapPass(**options, attribution=partial(smoothgrad, total, noise))
        return MapPass(**options, attribution=partial(gradient, total))


def attributions(
    detector: KDClonerEstimator, X: Any, attribution: Attribution
) -> NDArray[np.float32]:
    """Give an attribution of each image, which needs gradients, in one row."""
    inputs = detector._check_inputs(X)
    options = {**detector._whole_network(), "dtype": torch.float32}
    task = MapPass(**options, attribution=attribution)
    batches = iter_outputs(task, inputs, on_error=detector.on_error)
    return np.concatenate([rows for _, (rows,) in batches])


def stage_losses(detector: KDClonerEstimator, X: Any) -> NDArray[np.float32]:
    """Give the value loss (Eq. 1) of each stage, for each image."""
    return detector._all_features(detector._check_inputs(X))[:, ::2]


def check_scaling(scaling: Any) -> tuple[float, float]:
    """Check a range of factors."""
    if len(scaling) != 2 or not 0 < scaling[0] <= scaling[1]:
        raise ValueError(
            f"scaling={scaling!r} must be two positive factors, the smaller one first."
        )
    return float(scaling[0]), float(scaling[1])


def has_converged(curve: list[float], tol: float) -> bool:
    """Tell, every 100 steps, whether the last 100 have made a difference."""
    if len(curve) % CONVERGENCE_STEPS or len(curve) < 2 * CONVERGENCE_STEPS:
        return False
    *_, before, after = np.reshape(curve, (-1, CONVERGENCE_STEPS)).mean(axis=1)
    return bool(after > (1 - tol) * before)
