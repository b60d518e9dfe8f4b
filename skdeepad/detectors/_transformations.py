"""Detectors that tell transformations apart: RotNet, MHRot, GEOM.

One idea: normal images are turned, moved and mirrored, and a network learns to tell in
which way. Of images unlike them it cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import polygamma, psi
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor, nn

from ..backbones import Backbone
from ..base import draw_seed
from ..draws import OwnDraws
from ..inference import FeaturePass, PassOutputs
from ._base import TrainingSamples, numbers_of
from ._trained import FineTunedDetector
from ._views import DrawnViews, Views, ViewsPass

SMALLEST_RATE = 1e-6  # where the cosine schedule of MHRot's code ends
N_DIRICHLET_STEPS = 200
DIRICHLET_TOL = 1e-9  # relative change in a step
EULER = -psi(1)


class TransformationDetector(FineTunedDetector):
    """Base of the detectors that tell transformations of images apart.

    Parameters
    ----------
    backbone : str, torch.nn.Module or callable, default="auto"
        The network: a name of `skdeepad.backbones.list_backbones`, a module (a copy
        is taken), or a function that makes one. "auto" is "wrn10_1", a small wide
        residual network from scratch, for images, and "mlp" for vectors. A pretrained
        one is taken as it is, unless `trainable_stages` says otherwise.
    max_steps : int, default=500
        Number of mini-batches.
    optimizer : {"adam", "sgd"}, default="adam"
        "sgd" is stochastic gradient descent with Nesterov's momentum of 0.9, whose
        rate falls from `learning_rate` to 1e-6 along a cosine; `milestones` are not
        used then.
    learning_rate : float, default=0.001
        Of the optimizer.
    weight_decay : float, default=0.0
        Of the optimizer.
    batch_size : int, default=32
        Images in a mini-batch, each of which is there with all its turns. Also how
        many images the network sees at once otherwise.

    """

    optimizer: str = "adam"
    max_steps: int = 500
    batch_size: int = 32

    _parameter_constraints: ClassVar = {"optimizer": [StrOptions({"adam", "sgd"})]}

    _saved: ClassVar = {"_views": Views}
    _mirrored: ClassVar[tuple[int, ...]] = (0,)
    _moved: ClassVar[tuple[int, ...]] = (0,)
    _multi_headed: ClassVar = False
    _repeat_edge: ClassVar = False
    _n_together: ClassVar = 4  # views of an image in a mini-batch: its turns

    def _auto_backbone(self, shape: tuple[int, ...] | None) -> str:
        return "mlp" if shape is not None and len(shape) == 1 else "wrn10_1"

    def _is_pretrained(self, backbone: Backbone) -> bool:
        return self.backbone != "auto" and super()._is_pretrained(backbone)

    def _optimizer(
        self, groups: list[dict[str, Any]], weight_decay: float
    ) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return super()._optimizer(groups, weight_decay)
        return torch.optim.SGD(
            groups,
            self.learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=weight_decay,
        )

    def _schedule(
        self, optimizer: torch.optim.Optimizer, n_steps: int, phase: str
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.optimizer == "adam":
            return super()._schedule(optimizer, n_steps, phase)
        return torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, n_steps, SMALLEST_RATE
        )

    def _learn(self, samples: TrainingSamples, rng: np.random.RandomState) -> None:
        if self.image_size_ is not None and len(set(self.image_size_)) > 1:
            raise ValueError(
                f"Images of {self.image_size_} pixels cannot be turned by 90 degrees. "
                "Set image_size to one number."
            )
        inputs, normal = samples.inputs, samples.labels > 0
        outputs = self._split_network(inputs, self._trained_stages(self.backbone_), rng)
        seen = self._run_front(outputs)
        rows = np.flatnonzero(normal & seen.readable)
        outliers = np.flatnonzero(~normal & seen.readable)
        self._check_enough(len(rows))
        held_out = self._hold_out(seen, rows, samples, rng)
        self._views = Views(
            self._mirrored,
            self._moved,
            multi_headed=self._multi_headed,
            repeat_edge=self._repeat_edge,
            shape=outputs.front.sample_shape(inputs),
            seed=draw_seed(rng),
        )
        n_outputs = sum(self._views.widths)
        with OwnDraws(draw_seed(rng)):
            self._network.projection = nn.Linear(sum(self._widths), n_outputs)
        drawn = DrawnViews(self._views, self._n_together, outputs.augment)
        outputs.augment = drawn
        self.loss_curve_ = self._train(
            self._losses(outputs, drawn, rows[~held_out], outliers, rng),
            self.max_steps,
            rng,
            modules=[*self._stages_in_training(), self._network.projection],
            weight_decay=self.weight_decay,
        )
        self.n_iter_ = len(self.loss_curve_)
        self._freeze_network()
        self._widths = [len(self._views) * n_outputs]
        found = self._all_features(inputs)[rows]
        self._learn_density(found[~held_out])
        self._learn_threshold(found, held_out)

    def _losses(
        self,
        outputs: PassOutputs,
        drawn: DrawnViews,
        rows: NDArray[np.intp],
        outliers: NDArray[np.intp],
        rng: np.random.RandomState,
    ) -> Iterator[Tensor]:
        """Give the loss of one mini-batch after the other, without end."""
        network = self._network.to(outputs.front.device)
        batches = outputs.batches(drawn.draw(rows, outliers, self.batch_size, rng))
        for _, inputs in batches:
            labels = torch.from_numpy(self._views.labels[drawn.done.popleft()])
            log_p = self._views.log_probabilities(network(*inputs))
            heads = log_p.split(self._views.widths, dim=1)
            pairs = zip(heads, labels.to(log_p.device).unbind(dim=1), strict=True)
            loss = -torch.stack(
                [p.gather(1, truth[:, None]).mean() for p, truth in pairs]
            ).mean()
            if len(outliers):
                _, others = next(batches)
                drawn.done.popleft()
                loss = loss + self._loss_of_outliers(network(*others))
            yield loss

    def _loss_of_outliers(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def _front(self) -> FeaturePass:
        return ViewsPass(**vars(super()._front()), end=self._network, views=self._views)

    def _end(self) -> None:  # type: ignore[override]
        """Give none: a pass goes through the whole network."""

    def _learn_density(self, found: NDArray[np.float32]) -> None:
        """Learn from outputs for images that were trained on, if anything."""

    def _log_p(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Give the heads' log-probabilities: (n_samples, n_views, n_outputs)."""
        shape = len(features), len(self._views), sum(self._views.widths)
        return features.reshape(shape).astype(np.float64)


class RotNetDetector(TransformationDetector):
    """A network that learns by how much normal images were turned.

    Each image is turned by 0, 90, 180 and 270 degrees, and a network learns to tell
    which it was [1]_. The score is the mean log-probability, over the four, of the
    right answer [2]_.

    See Also
    --------
    MHRotDetector : Images are moved, too.
    GEOMDetector : Seventy-two transformations.

    Notes
    -----
    Of vectors, which cannot be turned, entries are exchanged and signs changed, in
    fixed ways drawn at random, after Bergman and Hoshen (ICLR 2020), who take random
    linear maps.

    References
    ----------
    .. [1] S. Gidaris et al., "Unsupervised Representation Learning by Predicting Image
       Rotations", ICLR 2018.
    .. [2] D. Hendrycks et al., "Using Self-Supervised Learning Can Improve Model
       Robustness and Uncertainty", NeurIPS 2019.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdeepad import RotNetDetector
    >>> X, y = load_digits(return_X_y=True)
    >>> X = X.reshape(-1, 8, 8) / 16
    >>> detector = RotNetDetector(max_steps=60, random_state=0).fit(X[y == 7][:100])
    >>> sevens, zeros = X[y == 7][100:], X[y == 0]
    >>> scores = detector.score_samples(sevens), detector.score_samples(zeros)
    >>> bool(scores[0].mean() > scores[1].mean())
    True
    """

    @classmethod
    def from_paper(cls, **changes: Any) -> Any:
        """Make the detector as `MHRotDetector.from_paper` does, for turns alone.

        Parameters
        ----------
        **changes
            Parameters that are to be otherwise.

        Returns
        -------
        RotNetDetector
            Not fitted.
        """
        return cls(**{**paper_of_mhrot("cifar10"), **changes})

    def _score(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        truth = self._views.of_truth(self._log_p(features))
        return truth.mean(axis=(1, 2))


class MHRotDetector(TransformationDetector):
    """A network that learns how normal images were moved and turned: three heads.

    Each image is moved up, down or not at all, left, right or not at all, by a quarter
    of its sides, and turned by 0, 90, 180 or 270 degrees. Three heads of a network
    learn to tell each of these [1]_. The score is the mean, over all 36 views and the
    three heads, of the probability of the right answer.

    Known anomalies, or images of anything else (-1 in y), are outliers: on their views
    the heads are taught to give all answers the same probability (outlier exposure).

    Parameters
    ----------
    outlier_weight : float, default=0.5
        Weight of the loss of outliers, where y labels some: the cross-entropy of their
        heads' probabilities with equal ones.

    See Also
    --------
    RotNetDetector : Images are turned only.
    GEOMDetector : One head for 72 transformations.

    Notes
    -----
    Of vectors, which cannot be moved, entries are exchanged and signs changed, as in
    `RotNetDetector`.

    References
    ----------
    .. [1] D. Hendrycks et al., "Using Self-Supervised Learning Can Improve Model
       Robustness and Uncertainty", NeurIPS 2019.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdeepad import MHRotDetector
    >>> X, y = load_digits(return_X_y=True)
    >>> X = X.reshape(-1, 8, 8) / 16
    >>> detector = MHRotDetector(max_steps=60, random_state=0).fit(X[y == 7][:100])
    >>> sevens, zeros = X[y == 7][100:], X[y == 0]
    >>> scores = detector.score_samples(sevens), detector.score_samples(zeros)
    >>> bool(scores[0].mean() > scores[1].mean())
    True
    """

    outlier_weight: float = 0.5

    _moved: ClassVar[tuple[int, ...]] = (-1, 0, 1)
    _multi_headed: ClassVar = True
    _parameter_constraints: ClassVar = {
        "outlier_weight": [Interval(Real, 0, None, closed="left")]
    }

    @classmethod
    def from_paper(cls, dataset: str = "cifar10", **changes: Any) -> Any:
        """Make the detector with the numbers of the paper and its official code.

        "imagenet": ResNet-18 (the official one also has attention modules) for 5
        epochs of 1,300 images, each moved in nine ways. "cifar10": the paper's
        WRN-16-4 at 32 pixels. Its one-class code was never released: batches and
        optimizer are the released code's, and 200 epochs those of its code for several
        classes. Images are mirrored half of the time; nothing is cut at random. No
        image is held out, so that the threshold is optimistic, as a warning of `fit`
        says.

        Parameters
        ----------
        dataset : {"cifar10", "imagenet"}, default="cifar10"
            Whose network and schedule.
        **changes
            Parameters that are to be otherwise.

        Returns
        -------
        MHRotDetector
            Not fitted.
        """
        return cls(**{**paper_of_mhrot(dataset), **changes})

    def _learns_anomalies(self) -> bool:
        return True

    def _loss_of_outliers(self, logits: Tensor) -> Tensor:
        heads = self._views.log_probabilities(logits).split(self._views.widths, dim=1)
        return -self.outlier_weight * torch.stack([p.mean() for p in heads]).mean()

    def _score(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        truth = self._views.of_truth(self._log_p(features))
        return np.exp(truth).mean(axis=(1, 2))


class GEOMDetector(TransformationDetector):
    """A network that tells 72 transformations of normal images apart.

    Each image is mirrored or not, moved in nine ways by a quarter of its sides, and
    turned in four: a network learns to tell which of the 72 it was [1]_. For normal
    images, its probabilities p under transformation t have a Dirichlet distribution,
    whose parameters alpha_t are learnt by maximum likelihood. The score is the mean
    over the transformations of its log-density, less what does not depend on p::

        1/72 sum_t sum_k (alpha_tk - 1) log p_k(T_t(x))

    Parameters
    ----------
    density : {"dirichlet", "none"}, default="dirichlet"
        "none": the score is the mean probability of the right answers, the paper's
        simpler one.
    batch_size : int, default=128
        Images in a mini-batch, each under one transformation. Also how many images
        the network sees at once otherwise.

    Attributes
    ----------
    alpha_ : ndarray of shape (72, 72)
        The parameters of the Dirichlet distributions, a row for each transformation.
        Only for ``density="dirichlet"``.

    See Also
    --------
    MHRotDetector : A head for each kind of transformation.

    Notes
    -----
    Of vectors, which cannot be moved, entries are exchanged and signs changed, as in
    `RotNetDetector`.

    References
    ----------
    .. [1] I. Golan and R. El-Yaniv, "Deep Anomaly Detection Using Geometric
       Transformations", NeurIPS 2018.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdeepad import GEOMDetector
    >>> X, y = load_digits(return_X_y=True)
    >>> X = X.reshape(-1, 8, 8) / 16
    >>> detector = GEOMDetector(max_steps=150, random_state=0).fit(X[y == 7][:100])
    >>> sevens, zeros = X[y == 7][100:], X[y == 0]
    >>> scores = detector.score_samples(sevens), detector.score_samples(zeros)
    >>> bool(scores[0].mean() > scores[1].mean())
    True
    """

    density: str = "dirichlet"
    batch_size: int = 128

    _mirrored: ClassVar[tuple[int, ...]] = (0, 1)
    _moved: ClassVar[tuple[int, ...]] = (0, -1, 1)
    _repeat_edge: ClassVar = True
    _n_together: ClassVar = 1
    _parameter_constraints: ClassVar = {"density": [StrOptions({"dirichlet", "none"})]}

    @classmethod
    def from_paper(cls, dataset: str = "cifar10", **changes: Any) -> Any:
        """Make the detector with the numbers of the paper and its official code.

        WRN-10-4 at 32 pixels, Adam, mini-batches of 128, three epochs of all 72 views
        of 5,000 ("cifar10") or 6,000 images ("fashion_mnist", which the official code
        pads with zeros to 32 pixels and this class enlarges). No image is held out, so
        that the threshold is optimistic, as a warning of `fit` says.

        Parameters
        ----------
        dataset : {"cifar10", "fashion_mnist"}, default="cifar10"
            Whose schedule.
        **changes
            Parameters that are to be otherwise.

        Returns
        -------
        GEOMDetector
            Not fitted.
        """
        n_images = numbers_of(dataset, {"cifar10": 5000, "fashion_mnist": 6000})
        paper = {
            "backbone": "wrn10_4",
            "image_size": 32,
            "max_steps": 3 * math.ceil(72 * n_images / 128),
            "validation_fraction": 0,
        }
        return cls(**{**paper, **changes})

    def _learn_density(self, found: NDArray[np.float32]) -> None:
        self.__dict__.pop("alpha_", None)  # of a fit before
        if self.density == "dirichlet":
            self.alpha_ = fit_dirichlet(self._log_p(found))

    def _score(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        log_p = self._log_p(features)
        if self.density == "none":
            return np.exp(self._views.of_truth(log_p)).mean(axis=(1, 2))
        return np.einsum("itk,tk->i", log_p, self.alpha_ - 1) / len(self._views)


def paper_of_mhrot(dataset: str) -> dict[str, Any]:
    """Give the numbers of MHRot's official code, which its images decide."""
    from torchvision.transforms import v2

    numbers: dict[str, dict[str, Any]] = {
        "cifar10": {
            "backbone": "wrn16_4",
            "image_size": 32,
            "max_steps": 200 * math.ceil(5000 / 64),
        },
        "imagenet": {
            "backbone": "resnet18",
            "weights": None,
            "image_size": 224,
            "max_steps": 5 * math.ceil(9 * 1300 / 64),
        },
    }
    return {
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "weight_decay": 5e-4,
        "batch_size": 64,
        "augmentation": v2.RandomHorizontalFlip(),
        "validation_fraction": 0,
        **numbers_of(dataset, numbers),
    }


def fit_dirichlet(log_p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the parameters of Dirichlet distributions by maximum likelihood.

    By Newton's method for ``psi(alpha_k) = psi(sum alpha) + mean log p_k`` (Minka,
    2000) from the start that Wicker et al. (2008) give; where a step would leave the
    positive numbers, by the iteration of that equation, which never does.

    Parameters
    ----------
    log_p : ndarray of shape (n_samples, n_distributions, n_classes)
        Logarithms of probabilities.

    Returns
    -------
    ndarray of shape (n_distributions, n_classes)
    """
    mean_log = log_p.mean(axis=0)
    mean = np.exp(log_p).mean(axis=0)
    n_classes = mean.shape[1]
    spread = (mean * (np.log(mean) - mean_log)).sum(axis=1, keepdims=True)
    alpha = mean * (n_classes - 1) * EULER / np.maximum(spread, 1e-12)
    for _ in range(N_DIRICHLET_STEPS):
        before, total = alpha, alpha.sum(axis=1, keepdims=True)
        slope = psi(total) - psi(alpha) + mean_log
        # the Hessian is diagonal, but for one number that is added to all of it
        diagonal = -polygamma(1, alpha)
        common = (slope / diagonal).sum(axis=1, keepdims=True) / (
            1 / polygamma(1, total) + (1 / diagonal).sum(axis=1, keepdims=True)
        )
        newton = alpha - (slope - common) / diagonal
        alpha = np.where(
            (newton > 0).all(axis=1, keepdims=True),
            newton,
            inverse_psi(psi(total) + mean_log),
        )
        if np.abs(alpha / before - 1).max() < DIRICHLET_TOL:
            break
    return alpha


def inverse_psi(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Solve psi(x) = y for x > 0, by Newton's method."""
    with np.errstate(over="ignore"):
        x = np.where(y >= -2.22, np.exp(y) + 0.5, -1 / (y + EULER))
    for _ in range(5):
        x = x - (psi(x) - y) / polygamma(1, x)
    return x
