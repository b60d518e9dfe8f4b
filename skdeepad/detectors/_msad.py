"""Mean-shifted contrastive loss (Reiss and Hoshen, 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils._param_validation import Interval
from torch import Tensor
from torch.nn import functional as F

from ..augmentation import contrastive_views
from ..inference import PassOutputs
from ..objectives import compactness, mean_shifted_contrastive_loss
from ..scorers import KNNScorer
from ..scorers._base import row_digests
from ..training import shuffled_batches
from ._base import TrainingSamples, as_unseen, stages_to_adapt
from ._trained import ObjectiveDetector


class MSADEstimator(ObjectiveDetector):
    """Mean-shifted contrastive adaptation of pretrained features.

    The last stages of a pretrained network learn to tell two views of one normal image
    from those of others, by their directions from the centre of the normal features
    [1]_::

        L = mean_i -log( exp(theta_i . theta_i' / tau)
                         / sum_{j != i} exp(theta_i . theta_j / tau) ),
        theta = (f - c) / ||f - c||,    f = phi(x) / ||phi(x)||

    where i' is the other view of the image of view i, and c the mean of the normal
    images' f before training. About the origin, as contrastive learning has it, views
    would be spread over the whole sphere, and normal images no longer lie together;
    about their own centre they are spread as far as they can where they are. New images
    are scored by the distance of f to its two nearest neighbours among the normal ones.

    Parameters
    ----------
    angular : bool, default=False
        Whether c is of unit length, and ``mean ||f - c||^2`` is added to the loss for
        both views: the paper's angular centre loss.
    temperature : float, default=0.25
        Tau of the loss above.
    trainable_stages : str or sequence of str, default=None
        The stages that are trained; those before the first of them run once per
        view. None: the last two of the network ("pool" not counted; with "conv_head",
        where there is one), the paper's choice.
    augmentation : "paper", None or callable, default="paper"
        What makes a view of an image: a function of one image, a tensor of shape
        (channels, height, width) in [0, 1], such as torchvision's transforms are.
        "paper": a part of the image, its colours changed, grey, blurred and mirrored
        at random. None, and for vectors under "paper": both views are the image.
    max_steps : int, default=30
        For how many mini-batches it trains. The paper: 20 epochs, 1,580 of them for
        5,000 images.
    learning_rate : float, default=0.01
        Of stochastic gradient descent. The paper's is 1e-5.
    momentum : float, default=0.9
        Of stochastic gradient descent, in [0, 1). The paper has none.
    weight_decay : float, default=0.0
        Of stochastic gradient descent. The paper's is 5e-5.
    milestones : sequence of float, default=()
        At these shares of the steps, in (0, 1), the learning rate falls to a tenth.
    batch_size : int, default=64
        Images in a mini-batch, each of which has two views. Also how many images the
        network sees at once otherwise.

    Attributes
    ----------
    center_ : ndarray of shape (n_features,)
        c.
    scorer_ : KNNScorer
        The normal images' features.

    See Also
    --------
    PANDAEstimator : By the same authors: features are drawn to their centre.

    Notes
    -----
    BatchNorm keeps its pretrained statistics throughout, as in the official code.

    References
    ----------
    .. [1] T. Reiss and Y. Hoshen, "Mean-Shifted Contrastive Loss for Anomaly
       Detection", AAAI 2023.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdeepad import MSADEstimator
    >>> X, y = load_digits(return_X_y=True)
    >>> X = X.reshape(-1, 8, 8)[:200] / 16
    >>> zeros, ones = X[y[:200] == 0], X[y[:200] == 1]
    >>> detector = MSADEstimator(image_size=32, max_steps=5, random_state=0).fit(zeros)
    >>> bool(detector.score_samples(zeros).mean() > detector.score_samples(ones).mean())
    True
    """

    angular: bool = False
    temperature: float = 0.25
    trainable_stages: str | Iterable[str] | None = None
    augmentation: Any = "paper"
    max_steps: int = 30
    learning_rate: float = 0.01
    momentum: float = 0.9
    batch_size: int = 64

    _saved: ClassVar = {"scorer_": KNNScorer}

    _parameter_constraints: ClassVar = {
        "angular": ["boolean"],
        "temperature": [Interval(Real, 0, None, closed="neither")],
        "trainable_stages": [str, tuple, list, None],
        "momentum": [Interval(Real, 0, 1, closed="left")],
    }

    @classmethod
    def from_paper(cls, **changes: Any) -> Any:
        """Make the estimator with the numbers of the paper and its official code.

        ResNet-152, its blocks 3 and 4 trained by SGD at 1e-5 with weight decay 5e-5,
        without momentum, for 20 epochs of 5,000 images (CIFAR-10). ``angular=True`` is
        its variant. No image is held out, so that the threshold is optimistic, as a
        warning of `fit` says. (The official code enlarges images that are scored to
        256 pixels and cuts 224 out; here nothing is cut.)

        Parameters
        ----------
        **changes
            Parameters that are to be otherwise.

        Returns
        -------
        MSADEstimator
            Not fitted. Its weights are torchvision's; see `weights`.
        """
        paper = {
            "backbone": "resnet152",
            "trainable_stages": ("stage3", "stage4"),
            "max_steps": 20 * 79,
            "learning_rate": 1e-5,
            "momentum": 0.0,
            "weight_decay": 5e-5,
            "validation_fraction": 0,
        }
        return cls(**{**paper, **changes})

    def _augment(self, seed: int) -> Callable[[Tensor], Tensor] | None:
        if self.augmentation == "paper":
            size = self.image_size_
            return None if size is None else contrastive_views(size, seed)
        return super()._augment(seed)

    def _optimizer(
        self, groups: list[dict[str, Any]], weight_decay: float
    ) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            groups, self.learning_rate, self.momentum, weight_decay=weight_decay
        )

    def _learn(self, samples: TrainingSamples, rng: np.random.RandomState) -> None:
        trained = stages_to_adapt(self.backbone_, self.trainable_stages)
        outputs = self._split_network(samples.inputs, trained, rng)
        seen = self._run_front(outputs)
        rows = np.flatnonzero(seen.readable)
        self._check_enough(len(rows), 3)
        held_out = self._hold_out(seen, rows, samples, rng)
        network = self._network
        first = self._outputs(outputs.without_changes(), rows[~held_out])
        center = F.normalize(torch.from_numpy(first)).mean(dim=0)
        if self.angular:
            center = F.normalize(center, dim=0)
        self.center_ = center.numpy()
        network.frozen().to(outputs.front.device)
        self.loss_curve_ = self._train(
            self._losses(outputs, rows[~held_out], rng),
            self.max_steps,
            rng,
            modules=[network.stages[name] for name in trained],
            weight_decay=self.weight_decay,
        )
        self.n_iter_ = len(self.loss_curve_)
        self._freeze_network()
        found = self._scored_outputs(outputs, rows)
        self._learn_scores(found, held_out, samples.groups_of(rows))

    def _losses(
        self, outputs: PassOutputs, rows: NDArray[np.intp], rng: np.random.RandomState
    ) -> Iterator[Tensor]:
        """Give the loss of one mini-batch after the other, without end."""
        center = torch.from_numpy(self.center_).to(outputs.front.device)
        # each image twice: two views
        drawn = (np.tile(i, 2) for i in shuffled_batches(rows, self.batch_size, rng))
        for _, inputs in outputs.batches(drawn):
            f = F.normalize(self._network(*inputs))
            loss = mean_shifted_contrastive_loss(f, center, self.temperature)
            if self.angular:
                loss = loss + 2 * compactness(f, center)  # of each view
            yield loss

    def _learn_scores(
        self,
        found: NDArray[np.float32],
        held_out: NDArray[np.bool_],
        groups: NDArray[Any] | None,
    ) -> None:
        """Keep the normal features, and set the threshold, as PANDA does."""
        self.scorer_ = KNNScorer(metric="cosine").fit(found, groups=groups)
        scores = self._score(found)
        self._warn_of_collapse(scores)
        if held_out.any():
            others = KNNScorer(metric="cosine").fit(found[~held_out])
            scores[held_out] = others.score_samples(found[held_out])
            scores[~held_out] = as_unseen(scores[~held_out], scores[held_out])
        self._set_threshold(row_digests(found), scores)

    def _score(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        return self.scorer_.score_samples(features)
