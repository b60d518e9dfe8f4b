"""Deep support vector data description (Ruff et al., 2018)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor, nn

from ..backbones import Backbone
from ..backbones._small import ContrastNormalization, biases, without_biases
from ..base import draw_seed
from ..draws import OwnDraws
from ..inference import PassOutputs
from ..inputs import Vectors, chunks
from ..objectives import compactness, soft_boundary_loss
from ..training import batchnorm_batches
from ._base import TrainingSamples, numbers_of
from ._shares import OutputShares
from ._trained import ObjectiveDetector

N_SPHERE_OUTPUTS = 32  # where the last layer of a network is not linear
MIN_CENTER = 0.1  # from zero, for each entry of the centre
CONTRAST = "contrast"


def away_from_zero(center: NDArray[np.float32]) -> NDArray[np.float32]:
    """Keep each entry away from zero, which networks without biases always reach."""
    return np.where(
        np.abs(center) < MIN_CENTER,
        np.where(center < 0, -MIN_CENTER, MIN_CENTER),
        center,
    )


class SphereDetector(OutputShares, ObjectiveDetector):
    """Base of the detectors that draw images to a centre, with a network from scratch.

    The centre is where the untrained network has them on average. A network with
    biases could put all images there without looking at them: there are none.

    Parameters
    ----------
    weights : None or path, default=None
        Random weights, or a state dict's file to start from.
    contrast_normalization : bool, default=False
        Whether images are normalized as in Deep SVDD's paper: less their mean,
        divided by the mean of their absolute values, and brought to [0, 1] by the
        extremes of all training images.
    pretrain_steps : int, default=1000
        Number of mini-batches for which the network is first trained as the encoder
        of an autoencoder (sum of squared errors), 0 for none. The paper: 150 epochs,
        some 4,500 mini-batches of 6,000 images.
    pretrain_weight_decay : float, default=0.0005
        Of Adam, for the autoencoder.
    max_steps : int, default=1000
        Number of mini-batches for the objective, after those of `pretrain_steps`,
        which take longer. The paper: 150 epochs.
    learning_rate : float, default=0.001
        Of Adam, for both. The paper's is 0.0001.
    pretrain_milestones : sequence of float, default=(2 / 3,)
        At these shares of `pretrain_steps`, in (0, 1), the learning rate of the
        autoencoder falls to a tenth.
    milestones : sequence of float, default=(2 / 3,)
        The same for `max_steps`. The papers': after 50 of 150 epochs.
    weight_decay : float, default=5e-7
        Of Adam, for the objective.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        Without effect: all stages are trained, in float32.

    Attributes
    ----------
    stages_ : tuple of str
        The stage whose output it is.
    loss_curve_ : ndarray of shape (n_steps,)
        The objective for each mini-batch.
    n_iter_ : int
        Number of steps taken, without those of the autoencoder.
    """

    weights: str | Path | None = None
    contrast_normalization: bool = False
    pretrain_steps: int = 1000
    pretrain_weight_decay: float = 5e-4
    pretrain_milestones: Iterable[float] = (2 / 3,)
    max_steps: int = 1000
    milestones: Iterable[float] = (2 / 3,)
    weight_decay: float = 5e-7

    _parameter_constraints: ClassVar = {
        "contrast_normalization": ["boolean"],
        "pretrain_steps": [Interval(Integral, 0, None, closed="left")],
        "pretrain_weight_decay": [Interval(Real, 0, None, closed="left")],
        "pretrain_milestones": [tuple, list],
    }

    def _auto_backbone(self, shape: tuple[int, ...] | None) -> str:
        if shape is not None and len(shape) == 1:
            return "mlp"
        small = shape is not None and max(shape[1:]) <= 28
        return "svdd_mnist_lenet" if small else "svdd_cifar10_lenet"

    def _learn(self, samples: TrainingSamples, rng: np.random.RandomState) -> None:
        inputs, labels = samples.inputs, samples.labels
        self._take_biases()
        if self.contrast_normalization:
            self._normalize_contrast(inputs)
        names = [name for name in self.backbone_.stage_names if name != CONTRAST]
        outputs = self._split_network(inputs, tuple(names), rng)
        seen = self._run_front(outputs)
        rows = np.flatnonzero((labels >= 0) & seen.readable)
        anomalies = np.flatnonzero((labels < 0) & seen.readable)
        self._check_enough(len(rows))
        held_out = self._hold_out(seen, rows, samples, rng)
        trained = rows[~held_out]
        self._project(draw_seed(rng))
        if self.pretrain_steps:
            self._pretrain(outputs, np.append(trained, anomalies), rng)
        self.center_ = away_from_zero(self._outputs(outputs, trained).mean(axis=0))
        self._network.train()
        self.loss_curve_ = self._train(
            self._losses(outputs, labels, trained, anomalies, rng),
            self.max_steps,
            rng,
            modules=[self._network],
            weight_decay=self.weight_decay,
        )
        self.n_iter_ = len(self.loss_curve_)
        self._freeze_network()
        self._learn_threshold(self._scored_outputs(outputs, rows), held_out)
        self._learn_maps(inputs.take(rows[held_out]))

    def _take_biases(self) -> None:
        """Take the biases from our networks; refuse others that have some."""
        if isinstance(self.backbone, str):
            self.backbone_ = without_biases(self.backbone_.clone())
        if names := biases(self.backbone_):
            raise ValueError(
                f"backbone has biases, by which {type(self).__name__} could give "
                "all images the same output: "
                f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. Build "
                "its layers with bias=False and its normalization with "
                "affine=False. For pretrained networks, use PANDAEstimator or "
                "HSCClassifier."
            )

    def _normalize_contrast(self, inputs: Vectors) -> None:
        """Put global contrast normalization before the first stage."""
        old, contrast = self.backbone_, ContrastNormalization()
        if old.vectors:
            raise ValueError(
                "contrast_normalization needs images, but X holds vectors."
            )
        everything = chunks(np.arange(len(inputs)), self.batch_size)
        loaded = self._pass(()).load(inputs, everything)
        found = [
            contrast(old.normalize(batch.values)).aminmax()
            for batch in loaded
            if batch.values is not None
        ]
        if found:
            contrast.low = min(float(low) for low, _ in found)
            contrast.high = max(float(high) for _, high in found)
        self.backbone_ = Backbone(
            {CONTRAST: contrast, **old.stages},
            input_size=old.input_size,
            mean=old.mean,
            std=old.std,
            in_channels=old.in_channels,
            to_map=old.to_map,
        ).frozen()

    def _project(self, seed: int) -> None:
        """Put a linear layer behind a network that does not end in one."""
        if self._network.ends_linear:
            return
        with OwnDraws(seed):
            self._network.projection = nn.Linear(
                sum(self._widths), N_SPHERE_OUTPUTS, bias=False
            )

    def _pretrain(
        self,
        outputs: PassOutputs,
        rows: NDArray[np.intp],
        rng: np.random.RandomState,
    ) -> None:
        """Train the network as the encoder of an autoencoder."""
        network, device = self._network, outputs.front.device
        decoder = self._make_decoder(draw_seed(rng)).to(device)

        def losses() -> Iterator[Tensor]:
            network.to(device).train()
            drawn = batchnorm_batches(rows, self.batch_size, rng)
            for _, (x,) in outputs.batches(drawn):
                error = decoder(network.encode(x)) - x
                yield error.square().flatten(1).sum(dim=1).mean()

        self._train(
            losses(),
            self.pretrain_steps,
            rng,
            modules=[network.stages, decoder],
            weight_decay=self.pretrain_weight_decay,
            phase="pretraining",
        )

    def _squared(self, outputs: Tensor) -> Tensor:
        """Give squared distances from the centre."""
        return (outputs - self._center(outputs)).square().sum(dim=1)

    def _center(self, outputs: Tensor) -> Tensor:
        return torch.from_numpy(self.center_).to(outputs)

    def _losses(
        self,
        outputs: PassOutputs,
        labels: NDArray[np.intp],
        rows: NDArray[np.intp],
        anomalies: NDArray[np.intp],
        rng: np.random.RandomState,
    ) -> Iterator[Tensor]:
        raise NotImplementedError

    def _anomaly(self, outputs: Tensor) -> Tensor:
        return self._squared(outputs)


class DeepSVDD(SphereDetector):
    """Deep SVDD: a network that has all normal images near one point.

    A network without biases, trained from scratch, draws normal images to a centre c
    [1]_; an image's score is minus its squared distance::

        min_phi  1/n sum_i ||phi(x_i) - c||^2                            (one-class)
        min_phi  R^2 + 1/(nu n) sum_i max(0, ||phi(x_i) - c||^2 - R^2)   (soft-boundary)

    Parameters
    ----------
    backbone : str, torch.nn.Module or callable, default="auto"
        The network: a name of `skdeepad.backbones.list_backbones`, whose biases are
        taken from it, or a module without biases (a copy is taken), or a function
        that makes one. "auto" is "mlp" for vectors, and the paper's LeNets for
        images: "svdd_mnist_lenet" up to 28 pixels, "svdd_cifar10_lenet" (images of 32
        pixels) for larger ones.
    objective : {"one-class", "soft-boundary"}, default="one-class"
        Which of the above; scores are ``R^2 - d`` for the second.
    nu : float, default=0.1
        For "soft-boundary": bounds the share of training images outside of the ball,
        in (0, 1].
    warm_up_steps : int, default=100
        For "soft-boundary": after so many steps the radius R, 0 until then, is the
        ``1 - nu`` quantile of each mini-batch's distances. The paper's is 10 epochs.
    batch_size : int, default=128
        Images in a mini-batch. The paper's is 200.

    Attributes
    ----------
    center_ : ndarray of shape (n_outputs,)
        c: the mean of the outputs before the objective is trained, no entry nearer
        to zero than 0.1.
    radius_ : float
        R; 0 for "one-class".

    See Also
    --------
    DeepSAD : The same with known anomalies.
    PANDAEstimator : The same idea with a pretrained network: first choice for images.

    References
    ----------
    .. [1] L. Ruff et al., "Deep One-Class Classification", ICML 2018.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdeepad import DeepSVDD
    >>> X, y = load_digits(return_X_y=True)
    >>> X = X.reshape(-1, 8, 8) / 16
    >>> detector = DeepSVDD(pretrain_steps=30, max_steps=30, random_state=0)
    >>> detector = detector.fit(X[y == 0][:100])
    >>> zeros, ones = X[y == 0][100:], X[y == 1]
    >>> bool(detector.score_samples(zeros).mean() > detector.score_samples(ones).mean())
    True
    """

    objective: str = "one-class"
    nu: float = 0.1
    warm_up_steps: int = 100

    _normalizes_code: ClassVar = True

    _parameter_constraints: ClassVar = {
        "objective": [StrOptions({"one-class", "soft-boundary"})],
        "nu": [Interval(Real, 0, 1, closed="right")],
        "warm_up_steps": [Interval(Integral, 0, None, closed="left")],
    }

    @classmethod
    def from_paper(cls, dataset: str = "mnist", **changes: Any) -> Any:
        """Make the detector with the numbers of the paper and its official code.

        As many steps as its epochs have with the images of one class, in mini-batches
        of 200: 150 for each of autoencoder and objective with 6,000 images ("mnist"),
        350 and 150 with 5,000 ("cifar10"). No image is held out, so that the threshold
        is optimistic, as a warning of `fit` says.

        Parameters
        ----------
        dataset : {"mnist", "cifar10"}, default="mnist"
            Whose network and schedule.
        **changes
            Parameters that are to be otherwise.

        Returns
        -------
        DeepSVDD
            Not fitted.
        """
        numbers: dict[str, dict[str, Any]] = {
            "mnist": {
                "backbone": "svdd_mnist_lenet",
                "pretrain_steps": 4500,
                "pretrain_milestones": (50 / 150,),
                "max_steps": 4500,
                "warm_up_steps": 300,
            },
            "cifar10": {
                "backbone": "svdd_cifar10_lenet",
                "pretrain_steps": 8750,
                "pretrain_weight_decay": 5e-7,
                "pretrain_milestones": (250 / 350,),
                "max_steps": 3750,
                "warm_up_steps": 250,
            },
        }
        paper = {
            "contrast_normalization": True,
            "learning_rate": 1e-4,
            "batch_size": 200,
            "milestones": (50 / 150,),
            "validation_fraction": 0,
            **numbers_of(dataset, numbers),
        }
        return cls(**{**paper, **changes})

    def _learn(self, samples: TrainingSamples, rng: np.random.RandomState) -> None:
        self.radius_ = 0.0
        super()._learn(samples, rng)
        if self.objective == "soft-boundary" and self.radius_ == 0:
            warnings.warn(
                f"The radius is still 0 after max_steps={self.max_steps}. Set "
                "warm_up_steps to less than max_steps.",
                ConvergenceWarning,
                stacklevel=5,
            )

    def _losses(
        self,
        outputs: PassOutputs,
        labels: NDArray[np.intp],
        rows: NDArray[np.intp],
        anomalies: NDArray[np.intp],
        rng: np.random.RandomState,
    ) -> Iterator[Tensor]:
        drawn = batchnorm_batches(rows, self.batch_size, rng)
        for step, (_, inputs) in enumerate(outputs.batches(drawn), 1):
            z = self._network(*inputs)
            if self.objective == "one-class":
                yield compactness(z, self._center(z))
                continue
            squared = self._squared(z)
            loss = soft_boundary_loss(squared, z.new_tensor(self.radius_), self.nu)
            if step > self.warm_up_steps:  # for the next mini-batch
                distances = squared.detach().sqrt()
                self.radius_ = float(torch.quantile(distances, 1 - self.nu))
            yield loss

    def _anomaly(self, outputs: Tensor) -> Tensor:
        return super()._anomaly(outputs) - self.radius_**2
