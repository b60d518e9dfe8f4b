"""PANDA: pretrained features, adapted to the normal images (Reiss et al., 2021)."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    _fit_context,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from torch import Tensor, nn

from ..backbones._backbone import Adapted, Versions
from ..base import (
    draw_seed,
    keep_state_on_error,
)
from ..draws import OwnDraws
from ..fisher import check_classes
from ..inference import INPUT, PassOutputs, Tap
from ..inputs import chunks
from ..scorers._base import Scorer, row_digests
from ._adaptation import Adaptation, unit_length
from ._adapted_scores import SCORERS, AdaptedScores
from ._base import (
    TrainedDetector,
    TrainingSamples,
    find_related,
    hold_out,
    stages_to_adapt,
)

ADAPTATIONS = {"early_stopping", "ses", "ewc", "joint", "outlier_exposure"}
# mini-batches of 32: appendix D ("150k image samples" for "ses"), outlier exposure's
# 75 epochs counted for CIFAR-10
PAPER_STEPS: dict[str | None, int] = {
    "early_stopping": 2300,
    "ses": 4690,
    "ewc": 7800,
    "joint": 2300,
    "outlier_exposure": 11775,
}
MAX_EPOCHS = 50  # how often the paper's longest adaptation shows each image
COLLAPSED = 0.01  # of the features' spread: less was worse than no adaptation


class PANDAEstimator(
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    AdaptedScores,
    TrainedDetector,
):
    """PANDA: pretrained features, adapted to the normal images without collapse.

    The last stages of a pretrained network are trained to draw the normal images'
    features together (Eq. 1 of [1]_)::

        L = mean_x ||psi(x) - c||^2,    c = the mean of the features before training

    Anomalies, which are not trained on, stay behind, until all images fall on one
    point. `adaptation` says what keeps them from it. New images are scored by the
    distance to their nearest neighbours among the normal features.

    Parameters
    ----------
    adaptation : {"ewc", "early_stopping", "ses", "joint", "outlier_exposure"} or \
None, default="ewc"
        What keeps features from collapse.

        - "ewc": elastic weight consolidation (Eq. 4): each weight is held back to
          its first value as far as it mattered there, by the Fisher information.
        - "early_stopping": nothing but the end after `max_steps`.
        - "ses": sample-wise early stopping: a sample's score is the largest, over
          `n_checkpoints` equally spaced steps, of its distance divided by the typical
          distance of held-out normal samples at that step.
        - "joint": joint optimization (Eq. 2) with the classification that the network
          was pretrained for, on images passed to `fit`.
        - "outlier_exposure": known anomalies (-1 in y) are told from normal images
          by logistic regression on the features, trained together with them (Eq. 5);
          the logit is the score, and `scorer` is not used.
        - None: the features stay as they are ("DN2").
    trainable_stages : str or sequence of str, default=None
        The stages that are trained; those before the first of them run once per
        image. None: the last two of the network ("pool" not counted; with
        "conv_head", where there is one), the paper's choice.
    normalize : bool, default=True
        Whether features are scaled to unit length, in training and in scoring, so
        that distances are those of directions. The paper does not; see Notes.
    scorer : {"knn", "kmeans", "centroid"} or outlier detector, default="knn"
        What scores the adapted features: `KNNScorer` (k = 2, the paper's),
        `KMeansScorer` (10 means), `CentroidScorer`, all with their defaults, or any
        scikit-learn outlier detector. ``KNNScorer(metric="mahalanobis")`` is the
        paper's whitening.
    include_initial : bool, default=True
        Whether the features as they were before count beside the adapted ones: a
        score is then the mean of the distances in both, each divided by its typical
        value. For "ses" they are one more checkpoint. The paper leaves them out.
    max_steps : int, default=30
        For how many mini-batches it trains. The paper: 2,300 with early stopping,
        7,800 with EWC, on another network; see Notes.
    learning_rate : float, default=0.01
        Of stochastic gradient descent.
    momentum : float, default=0.9
        Of stochastic gradient descent, in [0, 1).
    weight_decay : float, default=0.0
        Of stochastic gradient descent. The paper's is 5e-5; see Notes.
    clip_norm : float or None, default=1.0
        Bound on the norm of the whole gradient. The paper's is 1e-3; see Notes.
    ewc_lambda : float, default=0.3
        Lambda of Eq. 4, for a Fisher diagonal of single samples' gradients, and
        the mean over samples of the squared distance. (The official code's 1e4 goes
        with gradients of 32 samples at a time and a distance divided by the number of
        features d: here, 1e4 * d / 32.) 0 is early stopping.
    bound_stiffness : bool, default=True
        Whether lambda times the Fisher diagonal is kept below 1 / `learning_rate`:
        beyond it gradient descent may overshoot where it is to be held back, so that
        no `ewc_lambda` is too large. The paper has no bound; see Notes.
    fisher : path, mapping or None, default=None
        The Fisher diagonal for "ewc": what `skdeepad.fisher.fisher_diagonal` returns
        for the backbone, or the file it was saved to (``torch.save`` or safetensors).
        None: from 100 of the training images, with outcomes drawn from the network's
        own softmax (from a Gaussian about its features, if it has no head).
    joint_alpha : float, default=0.1
        Alpha of Eq. 2: the weight of compactness against classification.
    n_checkpoints : int, default=10
        How many checkpoints "ses" keeps.
    validation_fraction : float, default=0.1
        Share of the normal images that is not trained on, in [0, 0.5): they tell what
        distance is typical of new ones (Appendix D), and set the threshold. At least
        40 images, or a third of fewer than 120. 0: all are trained on, as in the paper
        but for "ses", and the threshold is optimistic: more new normal images are
        flagged than `contamination` says; a warning tells so.
    random_state : int, RandomState instance or None, default=None
        Seeds random weights, the held-out share, mini-batches, drawn outcomes, and
        the scorer, where it has a `random_state` that is None.

    Attributes
    ----------
    backbone_ : skdeepad.backbones.Backbone
        The network as it was before.
    stages_ : tuple of str
        The stage whose output is the feature: the last.
    trained_stages_ : tuple of str
        The stages that were trained.
    checkpoints_ : tuple of int
        The steps at which the trained stages were kept, to score by.
    scorers_ : list of outlier detectors
        One fitted scorer for each checkpoint.

    See Also
    --------
    skdeepad.fisher.fisher_diagonal : The Fisher diagonal, computed once and saved.
    MahalanobisFeatureScorer : Nothing is trained.

    Notes
    -----
    BatchNorm keeps its pretrained statistics throughout, as in the official code.

    The official code divides the loss of Eq. 1 by the number of features d, and clips
    its gradient at 1e-3. Here the loss is the sum, d times larger, as the paper prints
    it, and `ewc_lambda` is on that scale. Under one `clip_norm` the steps are the same
    as long as the official gradient is longer than `clip_norm`; a shorter one, down to
    ``clip_norm / d``, would be clipped here and not there. With the official lambda of
    1e4, `bound_stiffness` would hold back more than half of the weights less than Eq. 4
    says: `from_paper` has no bound.

    `from_paper` gives the paper's numbers. With the default network they make
    nearest neighbours worse: under a gradient clipped at 1e-3, weight decay moves the
    weights further than compactness does. The defaults were chosen on training images
    of Fashion-MNIST alone. There they take the mean AUROC from 94.8 % to 95.7 % at
    112 pixels; docs/panda.md has the evidence.

    References
    ----------
    .. [1] T. Reiss et al., "PANDA: Adapting Pretrained Features for Anomaly
       Detection and Segmentation", CVPR 2021.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdeepad import PANDAEstimator
    >>> X, y = load_digits(return_X_y=True)
    >>> X = X.reshape(-1, 8, 8)[:200] / 16
    >>> zeros, ones = X[y[:200] == 0], X[y[:200] == 1]
    >>> detector = PANDAEstimator(image_size=64, max_steps=10, random_state=0)
    >>> detector = detector.fit(zeros)
    >>> bool(detector.score_samples(zeros).mean() > detector.score_samples(ones).mean())
    True
    """

    adaptation: str | None = "ewc"
    trainable_stages: str | Iterable[str] | None = None
    normalize: bool = True
    scorer: Any = "knn"
    include_initial: bool = True
    max_steps: int = 30
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    ewc_lambda: float = 0.3
    bound_stiffness: bool = True
    fisher: Any = None
    joint_alpha: float = 0.1
    n_checkpoints: int = 10

    _n_at_end: ClassVar = 4  # maps are small: many at once are quicker
    _saved: ClassVar = {
        "scorer": BaseEstimator,
        "scorers_": BaseEstimator,
        "_versions": (Adapted, Versions),
        "_logit": nn.Linear,
    }

    _parameter_constraints: ClassVar = {
        "adaptation": [StrOptions(ADAPTATIONS), None],
        "trainable_stages": [str, tuple, list, None],
        "normalize": ["boolean"],
        "scorer": [StrOptions(set(SCORERS)), HasMethods(["fit", "score_samples"])],
        "include_initial": ["boolean"],
        "momentum": [Interval(Real, 0, 1, closed="left")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "clip_norm": [Interval(Real, 0, None, closed="neither"), None],
        "ewc_lambda": [Interval(Real, 0, None, closed="left")],
        "bound_stiffness": ["boolean"],
        "fisher": [str, Path, Mapping, None],
        "joint_alpha": [Interval(Real, 0, None, closed="left")],
        "n_checkpoints": [Interval(Integral, 1, None, closed="left")],
    }

    @classmethod
    def from_paper(cls, adaptation: str | None = "ewc", **changes: Any) -> Any:
        """Make the estimator with the numbers of the paper and its official code.

        ResNet-152, its blocks 3 and 4 trained, features as they come; SGD at 0.01 (0.1
        for outlier exposure) with momentum 0.9, weight decay 5e-5 (none for outlier
        exposure) and the gradient's norm clipped at 1e-3, for as many mini-batches of
        32 as the adaptation has in the paper's appendix D. EWC has no bound on its
        stiffness. But for "ses", no image is held out, so that the threshold is
        optimistic, as a warning of `fit` says.

        Parameters
        ----------
        adaptation : str or None, default="ewc"
            As in the class.
        **changes
            Parameters that are to be otherwise.

        Returns
        -------
        PANDAEstimator
            Not fitted. Its weights are torchvision's; see `weights`.
        """
        paper: dict[str, Any] = {
            "backbone": "resnet152",
            "adaptation": adaptation,
            "trainable_stages": ("stage3", "stage4"),
            "normalize": False,
            "include_initial": False,
            "max_steps": PAPER_STEPS.get(adaptation, 1),
            "weight_decay": 5e-5,
            "clip_norm": 1e-3,
            # Eq. 4 with the official scales: a loss divided by its 2,048 features,
            # a Fisher diagonal from gradients of 32 samples at a time
            "ewc_lambda": 1e4 * 2048 / 32,
            "bound_stiffness": False,
            "validation_fraction": 0.1 if adaptation == "ses" else 0,
            "n_checkpoints": 6,  # every 5 epochs of 5,000 images
        }
        if adaptation == "outlier_exposure":
            paper |= {
                "trainable_stages": ("stage4",),
                "learning_rate": 0.1,
                "weight_decay": 0.0,
            }
        return cls(**{**paper, **changes})

    @keep_state_on_error
    @_fit_context(prefer_skip_nested_validation=False)
    def fit(
        self,
        X: Any,
        y: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        *,
        X_pretrain: Any = None,
        y_pretrain: ArrayLike | None = None,
    ) -> Self:
        """Adapt the features to normal images, and learn their density.

        Parameters
        ----------
        y : array-like of shape (n_samples,), default=None
            +1 for normal images, -1 for known anomalies: they are left out, except
            by ``adaptation="outlier_exposure"``, which needs them.
        X_pretrain : array-like or sequence of paths, default=None
            For ``adaptation="joint"``: images of the classes that the network was
            pretrained on.
        y_pretrain : array-like of int, default=None
            Their classes: numbers of the head's logits.

        Warns
        -----
        ConvergenceWarning
            If features collapse (held-out images keep less than 1 % of their
            spread), or if images are shown more often than in the paper's longest
            adaptation (50 times).
        """
        self._fit(X, y, groups, X_pretrain=X_pretrain, y_pretrain=y_pretrain)
        return self

    def _check_labels(self, y: ArrayLike | None, n: int) -> NDArray[np.intp]:
        labels = super()._check_labels(y, n)
        if self._learns_anomalies() and (labels > 0).all():
            raise ValueError(
                "adaptation='outlier_exposure' needs known anomalies, but y "
                "labels none. Label some rows -1."
            )
        return labels

    def _learns_anomalies(self) -> bool:
        return self.adaptation == "outlier_exposure"

    def _learn(
        self,
        samples: TrainingSamples,
        rng: np.random.RandomState,
        X_pretrain: Any = None,
        y_pretrain: ArrayLike | None = None,
    ) -> None:
        inputs, normal = samples.inputs, samples.labels > 0
        stages = self._copy_stages()
        front = self._front()
        (self._front_shape,) = front.shapes(front.sample_shape(inputs))
        self._set_versions({"step0": stages})
        outputs = PassOutputs(front, inputs, self.max_cache_bytes)
        first = outputs.keep(self._run(front, inputs, not self.adaptation))
        features = self._gather(self._embed(first), len(inputs))
        readable = ~np.isnan(features).any(axis=1)
        rows = np.flatnonzero(normal & readable)
        self._check_enough(len(rows))
        groups = samples.groups_of(rows)
        digests = row_digests(features[rows])
        related = find_related(groups, features[rows], digests)
        held_out = self._hold_out(related, rng)
        self._logit: nn.Linear | None = None
        self.loss_curve_ = np.empty(0)
        self.checkpoints_: tuple[int, ...] = (0,)
        if self.adaptation:
            initial = torch.from_numpy(features[rows[~held_out]])
            adaptation = Adaptation(
                stages,
                self._trained_head(features.shape[1], rng),
                unit_length(initial, self.normalize).mean(dim=0),
                outputs,
                rows[~held_out],
                rng,
                normalize=self.normalize,
            )
            if self.adaptation == "outlier_exposure":
                outliers = np.flatnonzero(~normal & readable)
                losses = adaptation.outlier_exposure(outliers)
            elif self.adaptation == "joint":
                pretraining = self._pretraining(X_pretrain, y_pretrain)
                losses = adaptation.joint(*pretraining, self.joint_alpha)
            elif self.adaptation == "ewc":
                fisher = (
                    adaptation.fisher(rng)
                    if self.fisher is None
                    else adaptation.given_fisher(self.fisher)
                )
                stiffest = 1 / self.learning_rate if self.bound_stiffness else np.inf
                losses = adaptation.ewc(fisher, self.ewc_lambda, stiffest)
            else:
                losses = adaptation.compactness()
            versions = self._train(adaptation, losses)
            features = self._update(features, versions, outputs, rows, held_out)
        self.n_iter_ = len(self.loss_curve_)
        galleries = self._learn_scores(features[rows], held_out, groups, rng)
        if self._has_maps() and not held_out.any():  # for maps some are, all the same
            held_out = hold_out(related, self.validation_fraction or 0.1, rng)
            galleries = self._fit_galleries(features[rows[~held_out]])
        self._learn_map_threshold(inputs.take(rows[held_out]), galleries)

    def _copy_stages(self) -> nn.Sequential:
        """Copy the stages from the first trained one on, ready to be trained."""
        names = self.backbone_.stage_names
        self.trained_stages_ = stages_to_adapt(self.backbone_, self.trainable_stages)
        copied = self.backbone_.clone().stages
        stages = nn.Sequential(
            OrderedDict(
                (name, copied[name])
                for name in names[names.index(self.trained_stages_[0]) :]
            )
        )
        for name, stage in stages.named_children():
            stage.requires_grad_(name in self.trained_stages_)
        return stages

    def _taps(self) -> tuple[Tap, ...]:
        names = (INPUT, *self.backbone_.stage_names)
        return (Tap(names[names.index(self.trained_stages_[0]) - 1], "output"),)

    def _end(self) -> Versions:
        return self._versions

    def _set_versions(self, versions: Mapping[str, nn.Module]) -> None:
        """Take the features of these versions of the stages after them."""
        first = self.trained_stages_[0]
        self._versions = Adapted(
            self.backbone_, first, versions, self._front_shape
        ).frozen()
        self._widths = self._widths[:1] * len(versions)  # the last stage's, each

    def _hold_out(
        self, related: NDArray[Any], rng: np.random.RandomState
    ) -> NDArray[np.bool_]:
        """Choose the samples that are not trained on: App. D's 10 %."""
        # the package's scorers know their scores when left out themselves
        if not self.adaptation and isinstance(self.scorer, str | Scorer):
            return np.zeros(len(related), dtype=bool)
        return hold_out(related, self.validation_fraction, rng)

    def _trained_head(
        self, n_features: int, rng: np.random.RandomState
    ) -> nn.Module | None:
        if self.adaptation == "outlier_exposure":
            with OwnDraws(draw_seed(rng)):
                self._logit = nn.Linear(n_features, 1)
            return self._logit
        head = copy.deepcopy(self.backbone_.head)
        return head and head.requires_grad_(self.adaptation == "joint")

    def _pretraining(self, X: Any, y: ArrayLike | None) -> tuple[PassOutputs, Tensor]:
        """Check the images that the network was pretrained on, and run the trunk."""
        if X is None or y is None:
            raise ValueError(
                "adaptation='joint' also trains on labelled images of the "
                "pretraining classes. Pass them as fit(X, X_pretrain=..., "
                "y_pretrain=...)."
            )
        if self.backbone_.head is None:
            raise ValueError(
                "adaptation='joint' needs a backbone with a head that predicts classes."
            )
        inputs = self._check_inputs(X)
        classes = check_classes(y, len(inputs), self.backbone_)
        outputs = PassOutputs(self._front(), inputs, self.max_cache_bytes)
        for _ in outputs.keep(self._run(outputs.front, inputs, False)):
            pass
        return outputs, classes

    def _train(
        self, adaptation: Adaptation, losses: Iterator[Tensor]
    ) -> dict[str, nn.Module]:
        """Take the steps; give the trained stages as they were at the checkpoints."""
        epochs = self.max_steps * self.batch_size / len(adaptation.rows)
        if epochs > MAX_EPOCHS:
            enough = MAX_EPOCHS * len(adaptation.rows) // self.batch_size
            warnings.warn(
                f"max_steps={self.max_steps} shows each of {len(adaptation.rows)} "
                f"images {epochs:.0f} times, more often than any adaptation of the "
                f"paper ({MAX_EPOCHS} times). Set max_steps to {max(enough, 1)} or "
                "less, or train on more images.",
                ConvergenceWarning,
                stacklevel=3,
            )
        n = self.n_checkpoints if self.adaptation == "ses" else 1
        wanted = {round(self.max_steps * (i + 1) / n) for i in range(n)} - {0}
        optimizer = torch.optim.SGD(
            adaptation.parameters,
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        versions = {"step0": copy.deepcopy(adaptation.stages).cpu()}
        steps = self._take_steps(
            optimizer, losses, self.max_steps, adaptation.seed + 2, self.clip_norm
        )
        curve = []
        for step, loss in enumerate(steps, 1):
            curve.append(loss)
            if step in wanted:
                versions[f"step{step}"] = copy.deepcopy(adaptation.stages).cpu()
        initial = self.include_initial and self._logit is None
        if len(versions) > 1 and not initial:
            del versions["step0"]
        self.loss_curve_ = np.array(curve)
        self.checkpoints_ = tuple(int(name.removeprefix("step")) for name in versions)
        return versions

    def _update(
        self,
        initial: NDArray[np.float32],
        versions: dict[str, nn.Module],
        outputs: PassOutputs,
        rows: NDArray[np.intp],
        held_out: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        """Use these versions; give the features of normal images by them."""
        features = [initial] if "step0" in versions else []
        trained = {name: v for name, v in versions.items() if name != "step0"}
        if trained:
            self._set_versions(trained)
            again = outputs.unchanged(chunks(rows, self.batch_size))
            features.append(self._gather(self._embed(again), len(initial)))
        self._set_versions(versions)
        together = np.hstack(features)
        compared = rows[held_out] if held_out.any() else rows
        before, after = initial[compared], together[compared]
        self._warn_of_collapse(self._psi(before), self._by_version(after)[-1])
        return together

    def _warn_of_collapse(self, before: NDArray[Any], after: NDArray[Any]) -> None:
        """Warn if held-out features have fallen on one point."""
        left = after.var(axis=0).sum() / max(before.var(axis=0).sum(), 1e-30)
        if left < COLLAPSED and self._logit is None:
            warnings.warn(
                "The features have collapsed: held-out images keep only "
                f"{100 * left:.2g} % of their spread. Lower max_steps or "
                "learning_rate, or raise ewc_lambda.",
                ConvergenceWarning,
                stacklevel=4,
            )

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Give the adapted features.

        Returns
        -------
        ndarray of float32, shape (n_samples, n_features)
            What the scorer sees; for "ses", of all checkpoints side by side.
        """
        features = self._all_features(self._check_inputs(X))
        return np.hstack(self._by_version(features))

    @property
    def _n_features_out(self) -> int:
        return sum(self._widths)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags
