"""The hypersphere classifier and its siblings (Ruff et al., 2020)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from sklearn.base import ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.multiclass import type_of_target
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..base import draw_seed
from ..draws import OwnDraws
from ..inference import PassOutputs
from ..inputs import chunks
from ..labels import normal_class
from ..objectives import focal_loss, hypersphere_loss, radial_distance
from ..scorers import GaussianScorer
from ..scorers._base import row_digests
from ..training import balanced_batches
from ._base import TrainingSamples, numbers_of
from ._shares import OutputShares
from ._trained import FineTunedDetector

N_PROJECTED = 64  # where the last layer of a network is not made for the objective
N_CHECKED = 1024  # images that are looked at for a collapse
MIN_OUTLIER_LOSS = 0.01  # an outlier loss below it teaches nothing


class HSCClassifier(ClassifierMixin, OutputShares, FineTunedDetector):
    """Hypersphere classification: known anomalies, or any other images, as teachers.

    A network draws normal images to the origin and pushes outliers away from it,
    under cross-entropy with a radial function in place of the sigmoid [1]_::

        L = 1/n sum_i  y_i d(z_i) - (1 - y_i) log(1 - exp(-d(z_i))),   z = phi(x)

    where y is 1 for normal images, and d is `norm`. The score is minus the distance d;
    the probability of being normal is exp(-d). A few known anomalies, or images of
    anything else (outlier exposure), are enough.

    With a pretrained network, what is learnt is a metric: features are whitened by
    the covariance of the normal ones, and multiplied by a matrix that is the identity
    at first. The score then starts as the Mahalanobis distance, which needs no
    outlier, and outliers only change what they speak of.

    Parameters
    ----------
    backbone : str, torch.nn.Module or callable, default="auto"
        The network: a name of `skdeepad.backbones.list_backbones`, a module (a copy
        is taken), or a function that makes one. "auto" is "efficientnet_lite0" for
        images and "mlp" for vectors. The papers' are "mnist_lenet" and
        "cifar10_lenet", or "resnet18" with ``weights=None`` for larger images.
    objective : {"hsc", "bce", "focal"}, default="hsc"
        The loss above; binary cross-entropy, or focal loss, of a linear layer on
        top of the network (the score is minus its logit).
    norm : {"pseudo_huber", "l2_squared", "l2", "l1"}, default="pseudo_huber"
        The distance from the origin: ``sqrt(||z||^2 + 1) - 1``, which the official
        code has by default; ``||z||^2``, which the paper has; ``||z||``; ``sum |z|``.
        Only for "hsc".
    gamma : float, default=2.0
        For "focal": by how much samples that are classified well count for less, at
        least 0. The paper tries 0, 0.5, 2 and 4.
    trainable_stages : "auto", None, str or sequence of str, default="auto"
        The stages that are trained. "auto": all stages of a network with random
        weights and of a given module, none of a pretrained one. None: none. Where
        all are trained, BatchNorm learns, too; otherwise it stays as it is, and
        features are whitened.
    projection : int, None or "auto", default="auto"
        Number of outputs of a linear layer, without bias, that the features are
        given to. None: the features are the outputs. "auto": with frozen stages, a
        square matrix that is the identity at first; otherwise 64, or None where the
        network ends in a linear layer.
    normal_label : str, int, float or bool, default=None
        The label of normal images, where y has other labels than +1 (normal) and -1.
        No name is understood without it, not even "good": the greater label is taken
        for normal, with a warning.
    max_steps : int, default=200
        Number of mini-batches. The papers train from scratch for 150 to 200 epochs,
        some 7,000 mini-batches of 6,000 images; see `from_paper`.
    weight_decay : float, default=0.0
        Of Adam; the papers' is 5e-7.
    validation_fraction : float, default=0.1
        For `contamination`: share of the normal images that is not trained on, in [0,
        0.5). At least 40 images, or a third of fewer than 120. 0: all are trained on,
        and the threshold is optimistic.
    contamination : float or None, default=0.05
        Share of new normal images that may fall below the threshold, in (0, 0.5].
        None: no image is held out, and the threshold is where both classes are
        equally probable under the objective.
    batch_size : int, default=128
        Normal images in a mini-batch; as many outliers join them, drawn anew each
        time, over and over where there are few. Also how many images the network
        sees at once otherwise.

    Attributes
    ----------
    classes_ : ndarray of shape (2,)
        The labels, sorted; ``classes_[1]`` is normal unless `normal_label` is the
        lesser one.
    offset_ : float
        The threshold on ``score_samples``.

    See Also
    --------
    DeepSAD : Some anomalies known, most images unlabelled.
    skdeepad.detectors.MahalanobisFeatureScorer : Where it starts; needs no outlier.

    Notes
    -----
    There is no ``sample_weight``: mini-batches are balanced and drawn at random, so
    that a weight of 2 could not be what a sample given twice is.

    References
    ----------
    .. [1] L. Ruff et al., "Rethinking Assumptions in Deep Anomaly Detection",
       arXiv:2006.00339, 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from skdeepad import HSCClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> X, y = X.reshape(-1, 8, 8) / 16, np.where(y == 0, 1, -1)
    >>> known = (np.arange(len(y)) < 200) & ((y == 1) | (np.arange(len(y)) % 10 == 0))
    >>> model = HSCClassifier(image_size=32, max_steps=50, random_state=0)
    >>> model = model.fit(X[known], y[known])
    >>> bool(model.score(X[200:400], y[200:400]) > 0.9)
    True
    """

    objective: str = "hsc"
    norm: str = "pseudo_huber"
    gamma: float = 2.0
    projection: int | str | None = "auto"
    contamination: float | None = 0.05  # type: ignore[assignment]
    normal_label: Any = None
    max_steps: int = 200

    _parameter_constraints: ClassVar = {
        "objective": [StrOptions({"hsc", "bce", "focal"})],
        "norm": [StrOptions({"pseudo_huber", "l2_squared", "l2", "l1"})],
        "gamma": [Interval(Real, 0, None, closed="left")],
        "projection": [
            Interval(Integral, 1, None, closed="left"),
            StrOptions({"auto"}),
            None,
        ],
        "contamination": [Interval(Real, 0, 0.5, closed="right"), None],
        "normal_label": [str, Real, "boolean", None],
    }

    @classmethod
    def from_paper(cls, dataset: str = "mnist", **changes: Any) -> Any:
        """Make the classifier with the numbers of the paper and its official code.

        Networks from scratch, as many steps as their epochs have with the normal
        images of one class: 150 epochs of 6,000 ("mnist"), 200 of 5,000 ("cifar10")
        or 150 of 1,300 ("imagenet"; the paper's network also has attention modules).
        ``contamination=None``: all images are trained on, and the threshold is the
        loss's own.

        Parameters
        ----------
        dataset : {"mnist", "cifar10", "imagenet"}, default="mnist"
            Whose network and schedule.
        **changes
            Parameters that are to be otherwise.

        Returns
        -------
        HSCClassifier
            Not fitted.
        """
        numbers: dict[str, dict[str, Any]] = {
            "mnist": {
                "backbone": "mnist_lenet",
                "max_steps": 150 * 6000 // 128,
                "milestones": (1 / 3, 2 / 3),
            },
            "cifar10": {
                "backbone": "cifar10_lenet",
                "max_steps": 200 * 5000 // 128,
                "milestones": (1 / 2, 3 / 4),
                "augmentation": "paper",
            },
            "imagenet": {
                "backbone": "resnet18",
                "weights": None,
                "projection": 256,
                "max_steps": 150 * 1300 // 128,
                "milestones": (2 / 3, 5 / 6),
                "augmentation": "paper",
            },
        }
        paper = {
            "weight_decay": 5e-7,
            "contamination": None,
            **numbers_of(dataset, numbers),
        }
        return cls(**{**paper, **changes})

    def fit(
        self, X: Any, y: ArrayLike | None = None, groups: ArrayLike | None = None
    ) -> Self:
        """Train the network on normal images and outliers.

        Parameters
        ----------
        y : array-like of shape (n_samples,), default=None
            +1 for normal images, -1 for known anomalies or images of anything else;
            or any two labels, of which `normal_label` is normal. None: there are
            only normal images, and noise is made for outliers.

        Warns
        -----
        UserWarning
            If y is None, or has other labels than +1 and -1 without `normal_label`:
            the warning names the label that is taken for normal, the greater one.
        """
        return super().fit(X, y, groups)

    def _learns_anomalies(self) -> bool:
        return True

    def _learn(self, samples: TrainingSamples, rng: np.random.RandomState) -> None:
        inputs, normal = samples.inputs, samples.labels > 0
        outputs = self._split_network(inputs, self._trained_stages(self.backbone_), rng)
        seen = self._run_front(outputs)
        rows = np.flatnonzero(normal & seen.readable)
        outliers = np.flatnonzero(~normal & seen.readable)
        self._check_enough(len(rows))
        if not (normal.all() or len(outliers)):
            raise ValueError(
                "y has one class only: none of the images of the other class can "
                "be read."
            )
        held_out = np.zeros(len(rows), dtype=bool)
        if self.contamination is not None:
            held_out = self._hold_out(seen, rows, samples, rng)
        whole = self._trains_all(self.backbone_)
        if not whole:
            # nothing is behind the features yet
            features = self._outputs(outputs, rows[~held_out])
            self._network.whitening = whitening(features)
        self._project(whole, draw_seed(rng))
        self.loss_curve_ = self._train(
            self._losses(outputs, rows[~held_out], outliers, rng),
            self.max_steps,
            rng,
            modules=[*self._stages_in_training(), self._network.projection],
            weight_decay=self.weight_decay,
        )
        self.n_iter_ = len(self.loss_curve_)
        self._freeze_network()
        if self.contamination is None:
            self._held_out = self._threshold_scores = None
            self.__dict__.pop("held_out_scores_", None)  # of a fit before
            self.offset_ = -math.log(2) if self.objective == "hsc" else 0.0
            found = self._scored_outputs(outputs, rows[:N_CHECKED])
            self._warn_of_collapse(self._score(found))
        else:
            self._learn_threshold(self._scored_outputs(outputs, rows), held_out)
        self._learn_maps(inputs.take(rows[held_out]))

    def _check_labels(self, y: ArrayLike | None, n: int) -> NDArray[np.intp]:
        """Learn the two labels; give 1 for the normal one, and -1."""
        if y is None:
            warnings.warn(
                "y is None, so random noise is used as outliers. Pass images of "
                "anything else, labelled -1, to learn more; without any, "
                "MahalanobisFeatureScorer or PANDAEstimator is a better choice.",
                UserWarning,
                stacklevel=6,
            )
            self.classes_, self._normal = np.array([-1, 1]), 1
            return np.ones(n, dtype=np.intp)
        classes, numbers = self._check_targets(y, n)
        if len(classes) > 2:
            raise ValueError(
                "Only binary classification is supported. The type of the target is "
                f"{type_of_target(classes[numbers])}."
            )
        if len(classes) < 2:
            raise ValueError(
                f"y has one class only, {classes.tolist()[0]!r}. Label outliers -1 and "
                "normal images +1; without outliers, leave y out."
            )
        self.classes_ = classes
        self._normal = normal_class(classes, numbers, self.normal_label)
        return np.where(numbers == self._normal, 1, -1)

    def _project(self, whole: bool, seed: int) -> None:
        """Put the last layers behind the features."""
        width, n_features = self.projection, sum(self._widths)
        layers: list[nn.Linear] = []
        with OwnDraws(seed):
            if width == "auto" and not whole:
                # ||z||^2 starts at about 1, whatever the number of features, while the
                # matrix that learns starts at 1, whose steps Adam makes alike
                for weights in self._network.whitening.parameters():
                    weights.data.div_(math.sqrt(n_features))
                identity = nn.Linear(n_features, n_features, bias=False)
                nn.init.eye_(identity.weight)
                layers.append(identity)
            elif width == "auto" and not self._network.ends_linear:
                layers.append(nn.Linear(n_features, N_PROJECTED, bias=False))
            elif isinstance(width, int | np.integer):
                layers.append(nn.Linear(n_features, width, bias=False))
            if self.objective != "hsc":
                n_outputs = layers[-1].out_features if layers else n_features
                layers.append(nn.Linear(n_outputs, 1))
        if not layers and not self.trained_stages_:
            raise ValueError(
                "projection=None leaves nothing to train, since no stage is "
                "trained either. Set projection or trainable_stages."
            )
        self._network.projection = nn.Sequential(*layers)

    def _losses(
        self,
        outputs: PassOutputs,
        normal: NDArray[np.intp],
        outliers: NDArray[np.intp],
        rng: np.random.RandomState,
    ) -> Iterator[Tensor]:
        """Give the loss of one mini-batch after the other, without end."""
        device = outputs.front.device
        network = self._network.to(device)
        noise = None if len(outliers) else Noise(outputs, normal, draw_seed(rng))
        halves = outputs.batches(
            balanced_batches(normal, outliers, self.batch_size, rng)
        )
        first = True
        for index, inputs in halves:
            others = next(halves)[1] if noise is None else noise(len(index))
            z = network(*map(torch.cat, zip(inputs, others, strict=True)))
            outlier = torch.arange(len(z), device=device) >= len(index)
            if first and self.objective == "hsc":
                self._check_outliers(z, outlier)
            first = False
            yield self._loss(z, outlier).mean()

    def _check_outliers(self, z: Tensor, outlier: Tensor) -> None:
        """Warn of outliers that are far outside before anything is learnt."""
        distances = radial_distance(z.detach(), self.norm)
        loss = hypersphere_loss(distances, outlier)[outlier].mean().item()
        if (
            loss < MIN_OUTLIER_LOSS
            and distances[outlier].min() > distances[~outlier].max()
        ):
            warnings.warn(
                "The outliers are already separated before training (their loss "
                f"is {loss:.1g}), so they teach the network nothing. Use outliers "
                "that are more like the normal images.",
                ConvergenceWarning,
                stacklevel=9,
            )

    def _loss(self, outputs: Tensor, outlier: Tensor) -> Tensor:
        if self.objective == "hsc":
            distances = radial_distance(outputs, self.norm)
            return hypersphere_loss(distances, outlier)
        gamma = self.gamma if self.objective == "focal" else 0.0
        return focal_loss(outputs[:, 0], outlier, gamma)

    @property
    def _normal_column(self) -> int:
        return getattr(self, "_normal", 1)  # files of 0.1.0 have none

    def _anomaly(self, outputs: Tensor) -> Tensor:
        if self.objective == "hsc":
            return radial_distance(outputs, self.norm)
        return outputs[:, 0]

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Score images relative to the threshold, as scikit-learn's classifiers do.

        Returns
        -------
        ndarray of float64, shape (n_samples,)
            Positive for ``classes_[1]``: ``score_samples(X) - offset_`` where that is
            normal, as with +1 and -1, and minus that where `normal_label` is
            ``classes_[0]``, so that ``scoring="roc_auc"`` is right for both.
        """
        scores = self.score_samples(X) - self.offset_
        return scores if self._normal_column == 1 else -scores

    def predict(self, X: Any) -> NDArray[Any]:
        """Tell the class of images.

        Returns
        -------
        ndarray of shape (n_samples,)
            The normal label where ``score_samples`` is at least ``offset_``, the other
            elsewhere: for anomalies, and for files skipped by ``on_error="skip"``.
        """
        scores = self.score_samples(X)
        normal = scores >= self.offset_
        column = self._normal_column
        return self.classes_[np.where(normal, column, 1 - column)]

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Give the probabilities of both classes.

        Returns
        -------
        ndarray of float64, shape (n_samples, 2)
            In the normal label's column ``exp(-d)`` for ``objective="hsc"`` and
            ``sigmoid(-logit)`` for others, with d scaled, or the logit shifted, so
            that 0.5 is at the threshold (as they are, if `contamination` is None).
            They are of balanced mini-batches: for the shares in your data, see
            scikit-learn's ``CalibratedClassifierCV``. Far out, exp(-d) ties at 0;
            scores do not.
        """
        scores = self.score_samples(X)
        if self.objective == "hsc":
            normal = np.exp2(-scores / min(self.offset_, -np.finfo(float).tiny))
        else:
            normal = expit(scores - self.offset_)
        columns = [1 - normal, normal]
        return np.column_stack(columns if self._normal_column == 1 else columns[::-1])

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.target_tags.required = False
        return tags


def whitening(features: NDArray[np.float32]) -> nn.Linear:
    """Give the map after which these features have mean 0 and covariance 1."""
    gaussian = GaussianScorer()
    gaussian._learn(features, row_digests(features))
    origin = gaussian._whiten(np.zeros((1, features.shape[1])))
    axes = gaussian._whiten(np.eye(features.shape[1])) - origin
    layer = skip_init(nn.Linear, *axes.shape)
    layer.weight.data = torch.from_numpy(axes.T.astype(np.float32))
    layer.bias.data = torch.from_numpy(origin[0].astype(np.float32))
    return layer.requires_grad_(False)


class Noise:
    """Samples drawn evenly from the box that holds the normal ones.

    Told apart from such a background, normal samples' density is learnt
    (Steinwart et al., 2005).
    """

    def __init__(
        self, outputs: PassOutputs, normal: NDArray[np.intp], seed: int
    ) -> None:
        self.rng = np.random.RandomState(seed)
        self.low: list[Any] = []
        self.high: list[Any] = []
        batches = outputs.batches(chunks(normal, outputs.front.batch_size))
        for _, inputs in batches:
            low, high = [x.amin(dim=0) for x in inputs], [x.amax(dim=0) for x in inputs]
            self.low = list(map(torch.minimum, self.low or low, low))
            self.high = list(map(torch.maximum, self.high or high, high))

    def __call__(self, n: int) -> list[Tensor]:
        """Draw n samples of what the live end is given."""
        drawn = self.rng.random_sample((n, sum(low.numel() for low in self.low)))
        parts = torch.from_numpy(drawn).split([low.numel() for low in self.low], dim=1)
        return [
            (low + part.to(low.device).view(n, *low.shape) * (high - low)).float()
            for part, low, high in zip(parts, self.low, self.high, strict=True)
        ]
