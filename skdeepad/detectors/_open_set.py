"""Detectors from a classifier's own outputs (Garrepalli, 2022; Hsu et al., 2020)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from joblib import Parallel, delayed
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones import Backbone
from ..base import draw_seed
from ..draws import OwnDraws
from ..frozen import fingerprint, frozen_copy
from ..inference import FeaturePass, PassOutputs
from ..training import batchnorm_batches
from ._base import TrainingSamples, numbers_of
from ._shares import OutputShares
from ._trained import FineTunedDetector, TrainedEnd

GODIN = ("inner", "cosine", "euclidean")
SCORES = ("max_logit", "max_softmax", "entropy", "energy", "h", "g")
NORM_EPSILON = 1e-4  # added to norms, as in the code of Guyer


class Deconfidence(nn.Module):
    """The head of Generalized ODIN: logits ``h_i(z) / g(z)``.

    Parameters
    ----------
    kind : {"inner", "cosine", "euclidean"}
        h: ``w_i z + b_i``; the cosine of z and w_i; ``-mean_j (z_j - w_ij)^2``.
    n_features, n_classes : int
    """

    _saved: ClassVar[dict[str, Any]] = {}

    def __init__(self, kind: str, n_features: int, n_classes: int) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.empty(n_classes, n_features))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        self.bias = nn.Parameter(torch.zeros(n_classes)) if kind == "inner" else None
        self.g = nn.Sequential(
            nn.Linear(n_features, 1), nn.BatchNorm1d(1), nn.Sigmoid()
        )

    def h(self, z: Tensor) -> Tensor:
        """Give each class's h."""
        if self.kind == "inner":
            return F.linear(z, self.weight, self.bias)
        if self.kind == "cosine":
            z, weight = (
                v / (v.norm(dim=1, keepdim=True) + NORM_EPSILON)
                for v in (z, self.weight)
            )
            return z @ weight.T
        return -(z[:, None] - self.weight).square().mean(dim=2)

    def forward(self, z: Tensor) -> Tensor:
        """Give the logits, h and g, side by side."""
        h, g = self.h(z), self.g(z)
        return torch.cat([h / g, h, g], dim=1)


def normality(outputs: Tensor, score: str, n_classes: int) -> Tensor:
    """Score outputs; the higher, the more like a known class.

    Parameters
    ----------
    outputs : Tensor of shape (n_samples, n_outputs)
        The logits, and behind them h and g if the head is Generalized ODIN's.
    score : {"max_logit", "max_softmax", "entropy", "energy", "h", "g"}
        What `OpenSetClassifier` describes.
    n_classes : int

    Returns
    -------
    Tensor of shape (n_samples,)
    """
    logits = outputs[:, :n_classes]
    if score == "h":
        return outputs[:, n_classes : 2 * n_classes].amax(dim=1)
    if score == "g":
        return outputs[:, -1]
    if score == "max_logit":
        return logits.amax(dim=1)
    if score == "energy":
        return logits.logsumexp(dim=1)
    log_p = logits.log_softmax(dim=1)
    if score == "max_softmax":
        return log_p.amax(dim=1).exp()
    return (log_p.exp() * log_p).sum(dim=1)


@dataclass(frozen=True)
class PerturbedPass(FeaturePass):
    """A pass of images that were first changed so that they score higher."""

    plain: FeaturePass
    end: TrainedEnd
    score: str
    n_classes: int
    size: float

    def _outputs(self, network: Backbone, x: Tensor) -> list[Tensor]:
        end = frozen_copy(self.end, x.device, torch.float32)
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            outputs = end(*self.plain._outputs(network, x))
            scores = normality(outputs, self.score, self.n_classes)
            (slope,) = torch.autograd.grad(scores.sum(), x)
        return super()._outputs(network, x.detach() + self.size * slope.sign())

    def _key_parts(self) -> tuple[Any, ...]:
        return *super()._key_parts(), self.score, self.size, fingerprint(self.end)


class OpenSetClassifier(ClassifierMixin, OutputShares, FineTunedDetector):
    """A classifier of known classes that also tells what belongs to none of them.

    A network learns the known classes under cross-entropy; how sure it is of an image
    says whether the image belongs to a known class at all [1]_. It is a classifier
    (`predict` gives known classes), and a detector besides: `score_samples`, and
    `predict_known` by a threshold.

    Parameters
    ----------
    head : {"linear", "inner", "cosine", "euclidean", "given"}, default="linear"
        What turns features into logits. "linear": one layer. "inner", "cosine",
        "euclidean": Generalized ODIN's ``h_i(z) / g(z)`` [2]_, with that h. "given":
        `backbone` is a classifier that is trained already, and gives logits; nothing
        is trained.
    anomaly_score : {"max_logit", "max_softmax", "entropy", "energy", "h", "g"}, \
default="max_logit"
        The largest logit; the largest probability; minus the entropy of the
        probabilities, in nats; ``log sum exp`` of the logits; for Generalized ODIN
        also the largest ``h_i``, or g. Higher = more normal.
    perturbation : float, default=0.0
        By how much each pixel, in [0, 1], is changed towards a higher score before
        images are scored: ``x + perturbation * sign(d score / dx)``, as in ODIN. It
        takes a pass and a half more, in float32.
    reconstruction_weight : float, default=0.0
        Lambda of the hybrid network [1]_: a decoder gives the image back from the
        features, and lambda times the squared error per pixel is added to the loss.
        The paper has 0.9 for CIFAR-10. Only where all stages are trained.
    n_members : int, default=1
        Members of a deep ensemble: each trained from another seed; scores and
        probabilities are averaged.
    n_jobs : int, default=None
        How many members are trained at once, as in joblib.
    max_steps : int, default=500
        Number of mini-batches.
    weight_decay : float, default=0.0
        Of Adam; h of Generalized ODIN has none.
    contamination : float, default=0.05
        Share of new images of known classes that may fall below the threshold, in
        (0, 0.5].

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The known classes, sorted.
    estimators_ : list of OpenSetClassifier
        The members of an ensemble; none, if there is but one.
    loss_curve_ : ndarray of shape (n_steps,)
        The loss of each mini-batch; of an ensemble, the members' mean.

    See Also
    --------
    skdeepad.representation.oracle : What the representation knows, beside it.

    References
    ----------
    .. [1] R. Garrepalli, "Oracle Analysis of Representations for Deep Open Set
       Detection", arXiv:2209.11350, 2022.
    .. [2] Y.-C. Hsu et al., "Generalized ODIN: Detecting Out-of-distribution Image
       without Learning from Out-of-distribution Data", CVPR 2020.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdeepad import OpenSetClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> X, known = X.reshape(-1, 8, 8) / 16, y < 6
    >>> model = OpenSetClassifier("mnist_lenet", max_steps=40, random_state=0)
    >>> model = model.fit(X[known][:500], y[known][:500])
    >>> bool(model.score(X[known][500:], y[known][500:]) > 0.8)
    True
    >>> scores = model.score_samples(X)
    >>> bool(scores[known].mean() > scores[~known].mean())
    True
    """

    head: str = "linear"
    anomaly_score: str = "max_logit"
    perturbation: float = 0.0
    reconstruction_weight: float = 0.0
    n_members: int = 1
    n_jobs: int | None = None
    max_steps: int = 500

    _saved: ClassVar = {"estimators_": BaseEstimator}

    _parameter_constraints: ClassVar = {
        "head": [StrOptions({"linear", "given", *GODIN})],
        "anomaly_score": [StrOptions(set(SCORES))],
        "perturbation": [Interval(Real, 0, None, closed="left")],
        "reconstruction_weight": [Interval(Real, 0, None, closed="left")],
        "n_members": [Interval(Integral, 1, None, closed="left")],
        "n_jobs": [Integral, None],
    }

    @classmethod
    def from_paper(
        cls, dataset: str = "cifar10", *, hybrid: bool = False, **changes: Any
    ) -> Any:
        """Make the classifier as its paper describes it.

        ResNet-34 from scratch, scored by its largest logit. A quarter of the images
        that are fitted to is held out (the paper's 20 % of all, where 60 % are trained
        on). The paper stops when the accuracy on these is best and gives no numbers
        for its optimizer: steps, rate and mini-batches are this class's.

        Parameters
        ----------
        dataset : {"cifar10", "cifar100"}, default="cifar10"
            Whose weight of the reconstruction.
        hybrid : bool, default=False
            Whether the network also reconstructs the image, with weight 0.9 for
            "cifar10" and 0.005 for "cifar100". The paper says that these were chosen
            on labelled test images.
        **changes
            Parameters that are to be otherwise.

        Returns
        -------
        OpenSetClassifier
            Not fitted.
        """
        weight = numbers_of(dataset, {"cifar10": 0.9, "cifar100": 0.005})
        paper = {
            "backbone": "resnet34",
            "weights": None,
            "image_size": 32,
            "reconstruction_weight": weight if hybrid else 0.0,
            "validation_fraction": 0.25,
        }
        return cls(**{**paper, **changes})

    def fit(
        self, X: Any, y: ArrayLike | None = None, groups: ArrayLike | None = None
    ) -> Self:
        """Train the network on images of known classes.

        Parameters
        ----------
        y : array-like of shape (n_samples,)
            Their classes, two at least. With ``head="given"`` only the classes'
            names are learnt: sorted, they stand for the logits; None for numbers.
        """
        return super().fit(X, y, groups)

    def _fit(self, X: Any, y: Any, groups: Any, **more: Any) -> None:
        if self.anomaly_score in ("h", "g") and self.head not in GODIN:
            raise ValueError(
                f"anomaly_score={self.anomaly_score!r} needs a head of Generalized "
                f"ODIN. Set head to one of {', '.join(GODIN)}."
            )
        if self.n_members == 1:
            super()._fit(X, y, groups)
        else:
            self._fit_members(X, y, groups)

    def _learn(self, samples: TrainingSamples, rng: np.random.RandomState) -> None:
        inputs, labels = samples.inputs, samples.labels
        trained = () if self.head == "given" else self._trained_stages(self.backbone_)
        outputs = self._split_network(inputs, trained, rng)
        seen = self._run_front(outputs)
        rows = np.flatnonzero(seen.readable)
        self._check_enough(len(rows))
        held_out = self._hold_out(seen, rows, samples, rng)
        self._put_head(draw_seed(rng))
        if self.head == "given":
            held_out[:] = True  # nothing is trained on
            self.loss_curve_ = np.empty(0)
        else:
            self._train_head(outputs, labels, rows[~held_out], rng)
        self.n_iter_ = len(self.loss_curve_)
        self.estimators_: list[OpenSetClassifier] = []
        self._freeze_network()
        if self.perturbation:
            found = self._all_features(inputs)[rows]
        else:
            found = self._scored_outputs(outputs, rows)
        self._learn_threshold(found, held_out)
        self._learn_maps(inputs.take(rows[held_out]))

    def _check_labels(self, y: ArrayLike | None, n: int) -> NDArray[np.intp]:
        """Learn the classes' names; give each sample's number."""
        if y is None:
            if self.head != "given":
                raise ValueError(
                    f"{type(self).__name__} requires y to be passed, but the target y "
                    "is None."
                )
            self.classes_ = np.arange(self._given_logits())
            return np.zeros(n, dtype=np.intp)
        self.classes_, numbers = self._check_targets(y, n)
        if len(self.classes_) < 2:
            raise ValueError(
                f"y has one class only, {self.classes_.tolist()[0]!r}; a classifier "
                "needs two. For one class, see MahalanobisFeatureScorer."
            )
        if self.head == "given" and len(self.classes_) != self._given_logits():
            raise ValueError(
                f"y has {len(self.classes_)} classes, but the given classifier has "
                f"{self._given_logits()} logits. Leave y out to have the classes "
                "numbered."
            )
        return numbers

    def _given_logits(self) -> int:
        """Count the logits of a classifier that is trained already."""
        head, width = self.backbone_.head, self._widths[-1]
        if head is None:
            return width
        with torch.inference_mode():
            return int(head(torch.zeros(2, width)).shape[1])

    def _default_stages(self, backbone: Backbone) -> Iterable[str]:
        if self.head == "given":
            return backbone.stage_names[-1:]
        return super()._default_stages(backbone)

    def _put_head(self, seed: int) -> None:
        """Put what gives the logits behind the features."""
        n_features, n_classes = sum(self._widths), len(self.classes_)
        with OwnDraws(seed):
            if self.head in GODIN:
                head: nn.Module = Deconfidence(self.head, n_features, n_classes)
            elif self.head == "given":
                head = copy.deepcopy(self.backbone_.head) or nn.Identity()
            else:
                head = nn.Linear(n_features, n_classes)
        self._network.projection = head

    def _train_head(
        self,
        outputs: PassOutputs,
        targets: NDArray[np.intp],
        rows: NDArray[np.intp],
        rng: np.random.RandomState,
    ) -> None:
        """Train network and head, and a decoder with them."""
        network = self._network
        modules = self._stages_in_training()
        head = network.projection.train()
        modules.append(head)
        undecayed = []
        if isinstance(head, Deconfidence):  # as in the paper: h is not decayed
            undecayed = [head.weight] if head.bias is None else [head.weight, head.bias]
        decoder = None
        if self.reconstruction_weight:
            if not self._trains_all(self.backbone_):
                raise ValueError(
                    "reconstruction_weight needs all stages to be trained, so "
                    "that the features can learn to reconstruct the image. Name "
                    "all stages in trainable_stages, or set weights=None."
                )
            decoder = self._make_decoder(draw_seed(rng)).to(outputs.front.device)
            modules.append(decoder)
        self.loss_curve_ = self._train(
            self._losses(outputs, targets, rows, decoder, rng),
            self.max_steps,
            rng,
            modules=modules,
            undecayed=undecayed,
            weight_decay=self.weight_decay,
        )

    def _losses(
        self,
        outputs: PassOutputs,
        targets: NDArray[np.intp],
        rows: NDArray[np.intp],
        decoder: nn.Module | None,
        rng: np.random.RandomState,
    ) -> Iterator[Tensor]:
        """Give the loss of one mini-batch after the other, without end."""
        device = outputs.front.device
        network = self._network.to(device)
        n_classes = len(self.classes_)
        drawn = batchnorm_batches(rows, self.batch_size, rng)
        for index, inputs in outputs.batches(drawn):
            logits = network(*inputs)[:, :n_classes]
            wanted = torch.from_numpy(targets[index]).to(device)
            loss = F.cross_entropy(logits, wanted)
            if decoder is not None:
                (image,) = inputs
                error = F.mse_loss(decoder(network.encode(image)), image)
                loss = loss + self.reconstruction_weight * error
            yield loss

    def _fit_members(self, X: Any, y: Any, groups: Any) -> None:
        """Fit the members of an ensemble, each from a seed of its own."""
        inputs = self._fit_inputs(X)
        self._check_labels(y, len(inputs))
        rng = check_random_state(self.random_state)
        members = [
            clone(self).set_params(
                n_members=1, n_jobs=None, verbose=False, random_state=draw_seed(rng)
            )
            for _ in range(self.n_members)
        ]
        self.estimators_ = Parallel(n_jobs=self.n_jobs)(
            delayed(member.fit)(X, y, groups) for member in members
        )
        first = self.estimators_[0]
        self.backbone_, self.trained_stages_ = first.backbone_, first.trained_stages_
        curves = [member.loss_curve_ for member in self.estimators_]
        self.loss_curve_, self.n_iter_ = np.mean(curves, axis=0), len(curves[0])
        # members score what they were trained on as if it were new
        scores = self.score_samples(X)
        self._set_offset(scores[np.isfinite(scores)])
        self.map_offset_ = np.nan
        if self._has_maps():  # each member has left out other images
            peaks = [np.sort(member._map_peaks) for member in self.estimators_]
            self._map_peaks = np.mean(peaks, axis=0)
            self._set_map_offset()

    def _front(self) -> FeaturePass:
        if not self.perturbation:
            return super()._front()
        plain = replace(super()._front(), dtype=torch.float32)
        return PerturbedPass(
            **vars(plain),
            plain=plain,
            end=self._network,
            score=self.anomaly_score,
            n_classes=len(self.classes_),
            size=self.perturbation,
        )

    def _anomaly(self, outputs: Tensor) -> Tensor:
        return -normality(outputs, self.anomaly_score, len(self.classes_))

    def _position_scores(
        self, inputs: Any
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float32]]]:
        if not self.estimators_:
            yield from super()._position_scores(inputs)
            return
        of_members = [member._position_scores(inputs) for member in self.estimators_]
        for batches in zip(*of_members, strict=True):
            yield batches[0][0], np.mean([scores for _, scores in batches], axis=0)

    def score_samples(self, X: Any) -> NDArray[np.float64]:
        """Score images; the higher, the more like an image of a known class.

        Returns
        -------
        ndarray of float64, shape (n_samples,)
            `anomaly_score`, averaged over members; NaN for files skipped by
            ``on_error="skip"``. An image that was trained on gets the score that it
            would have as a new one.
        """
        check_is_fitted(self)
        if not self.estimators_:
            return super().score_samples(X)
        return np.mean([m.score_samples(X) for m in self.estimators_], axis=0)

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Give the classes' logits.

        Returns
        -------
        ndarray of float64, shape (n_samples, n_classes) or (n_samples,)
            For two classes, the second's less the first's; of an ensemble, the
            logarithms of the mean probabilities. For the decision whether an image is
            of a known class at all, see `predict_known`.
        """
        check_is_fitted(self)
        if self.estimators_:
            p = np.mean([m.predict_proba(X) for m in self.estimators_], axis=0)
            logits = np.log(np.maximum(p, np.finfo(np.float64).tiny))
        else:
            outputs = self._all_features(self._check_inputs(X)).astype(np.float64)
            logits = outputs[:, : len(self.classes_)]
        return logits if len(self.classes_) > 2 else logits[:, 1] - logits[:, 0]

    def predict(self, X: Any) -> NDArray[Any]:
        """Tell the most probable of the known classes.

        Returns
        -------
        ndarray of shape (n_samples,)
            Known classes, for images of others too: see `predict_known`.
        """
        decision = self.decision_function(X)
        if decision.ndim == 1:
            return self.classes_[(decision > 0).astype(np.intp)]
        return self.classes_[decision.argmax(axis=1)]

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Give the probabilities of the known classes.

        Returns
        -------
        ndarray of float64, shape (n_samples, n_classes)
            Softmax of the logits, averaged over members.
        """
        decision = self.decision_function(X)
        if decision.ndim == 1:
            decision = np.column_stack([np.zeros_like(decision), decision])
        return softmax(decision, axis=1)

    def predict_known(self, X: Any) -> NDArray[np.int_]:
        """Tell images of known classes from others.

        Returns
        -------
        ndarray of int, shape (n_samples,)
            +1 where ``score_samples`` reaches the threshold, -1 elsewhere: for images
            of unknown classes, and for files that were skipped.
        """
        return np.where(self.score_samples(X) >= self.offset_, 1, -1)

    def fit_predict(self, X: Any, y: ArrayLike | None = None) -> NDArray[np.int_]:
        """Fit to X, and tell its images of known classes from others.

        Outlier detectors of scikit-learn give +1 and -1 here; classifiers have no such
        method.

        Returns
        -------
        ndarray of int, shape (n_samples,)
            As `predict_known` gives them: +1 for known classes, -1 for others. Classes
            are what ``fit(X, y).predict(X)`` gives.
        """
        return self.fit(X, y).predict_known(X)
