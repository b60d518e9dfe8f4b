"""Deep semi-supervised anomaly detection (Ruff et al., 2020)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils._param_validation import Interval
from torch import Tensor

from ..inference import PassOutputs
from ..labels import semi_labels
from ..objectives import semi_supervised_loss
from ..training import balanced_batches, batchnorm_batches
from ._base import numbers_of
from ._deep_svdd import SphereDetector


class DeepSAD(SphereDetector):
    """Deep SAD: Deep SVDD with a few labels.

    As in `DeepSVDD`, a network without biases draws images to a centre c; known
    anomalies are pushed away from it [1]_::

        min_phi  1/(n+m) sum_i ||phi(x_i) - c||^2
                 + eta/(n+m) sum_j (||phi(x_j) - c||^2)^y_j

    where the n images x_i have no label, and the m images x_j have the label y_j, +1
    or -1. The score is minus the squared distance.

    Parameters
    ----------
    backbone : str, torch.nn.Module or callable, default="auto"
        As in `DeepSVDD`. The paper's are "svdd_mnist_lenet", "fashion_mnist_lenet" and
        "svdd_cifar10_lenet".
    eta : float, default=1.0
        Weight of labelled images, above 0.
    balanced : bool, default=True
        Whether to each mini-batch of images that are not known anomalies as many
        known anomalies are added, as in the outlier exposure of [2]_, which weighs
        the terms anew. False: mini-batches are drawn from all images, as in [1]_.
    validation_fraction : float, default=0.1
        Share of the images that are not known anomalies that is not trained on, in
        [0, 0.5): they set the threshold. At least 40 images, or a third of fewer
        than 120. 0: all are trained on, as in the paper, and the threshold is
        optimistic: more new normal images are flagged than `contamination` says; a
        warning tells so.
    batch_size : int, default=128
        Images in a mini-batch; twice as many where it is `balanced`.

    Attributes
    ----------
    center_ : ndarray of shape (n_outputs,)
        c: the mean of the outputs before the objective is trained, known anomalies
        left out, no entry nearer to zero than 0.1.

    See Also
    --------
    HSCClassifier : The same task as classification, also with pretrained networks.

    References
    ----------
    .. [1] L. Ruff et al., "Deep Semi-Supervised Anomaly Detection", ICLR 2020.
    .. [2] L. Ruff et al., "Rethinking Assumptions in Deep Anomaly Detection",
       arXiv:2006.00339, 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from skdeepad import DeepSAD
    >>> X, digits = load_digits(return_X_y=True)
    >>> X = X.reshape(-1, 8, 8) / 16
    >>> X, ones = np.concatenate([X[digits == 0], X[digits == 1][:5]]), X[digits == 1]
    >>> y = np.repeat([0, -1], [len(X) - 5, 5])  # no label; known anomalies
    >>> detector = DeepSAD(pretrain_steps=50, max_steps=50, random_state=0).fit(X, y)
    >>> bool((detector.predict(ones[5:]) == -1).mean() > 0.9)
    True
    """

    eta: float = 1.0
    balanced: bool = True

    _parameter_constraints: ClassVar = {
        "eta": [Interval(Real, 0, None, closed="neither")],
        "balanced": ["boolean"],
    }

    @classmethod
    def from_paper(cls, dataset: str = "mnist", **changes: Any) -> Any:
        """Make the detector with the numbers of the paper and its official code.

        As many steps as 150 epochs of the images of one class have, in mini-batches
        of 128 drawn from all images: 6,000 of "mnist" or "fashion_mnist", 5,000 of
        "cifar10"; as many for the autoencoder. Images are in [0, 1], as they are. No
        image is held out, so that the threshold is optimistic, as a warning of `fit`
        says.

        Parameters
        ----------
        dataset : {"mnist", "fashion_mnist", "cifar10"}, default="mnist"
            Whose network and schedule.
        **changes
            Parameters that are to be otherwise.

        Returns
        -------
        DeepSAD
            Not fitted.
        """
        networks = {
            "mnist": ("svdd_mnist_lenet", 6000),
            "fashion_mnist": ("fashion_mnist_lenet", 6000),
            "cifar10": ("svdd_cifar10_lenet", 5000),
        }
        backbone, n_images = numbers_of(dataset, networks)
        n_steps = 150 * math.ceil(n_images / 128)
        paper = {
            "backbone": backbone,
            "balanced": False,
            "learning_rate": 1e-4,
            "pretrain_steps": n_steps,
            "pretrain_milestones": (50 / 150,),
            "max_steps": n_steps,
            "milestones": (50 / 150,),
            "validation_fraction": 0,
        }
        return cls(**{**paper, **changes})

    def fit(
        self, X: Any, y: ArrayLike | None = None, groups: ArrayLike | None = None
    ) -> Self:
        """Train the network.

        Parameters
        ----------
        y : array-like of shape (n_samples,), default=None
            +1 for images known to be normal, -1 for known anomalies, 0 for images
            without label. None: no image has one, which is Deep SVDD.
        """
        return super().fit(X, y, groups)

    def _check_labels(self, y: ArrayLike | None, n: int) -> NDArray[np.intp]:
        return semi_labels(y, n)

    def _learns_anomalies(self) -> bool:
        return True

    def _losses(
        self,
        outputs: PassOutputs,
        labels: NDArray[np.intp],
        rows: NDArray[np.intp],
        anomalies: NDArray[np.intp],
        rng: np.random.RandomState,
    ) -> Iterator[Tensor]:
        paired = self.balanced and len(anomalies) > 0
        if paired:
            drawn = balanced_batches(rows, anomalies, self.batch_size, rng)
        else:
            drawn = batchnorm_batches(np.append(rows, anomalies), self.batch_size, rng)
        stream = outputs.batches(drawn)
        for index, (x,) in stream:
            if paired:
                others, (more,) = next(stream)
                index, x = np.append(index, others), torch.cat([x, more])
            z = self._network(x)
            known = torch.from_numpy(labels[index]).to(z.device)
            yield semi_supervised_loss(self._squared(z), known, self.eta).mean()
