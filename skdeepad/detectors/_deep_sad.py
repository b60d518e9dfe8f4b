"""Deep semi-supervised anomaly detection (Ruff et al., 2020)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import _fit_context
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval
from torch import Tensor

from ..base import check_groups, keep_state_on_error, numeric_labels
from ..inference import PassOutputs
from ..objectives import semi_supervised_loss
from ..training import balanced_batches, batchnorm_batches
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
        As in `DeepSVDD`. "fashion_mnist_lenet" and "mnist_lenet" are the paper's.
    weights : None or path, default=None
        Random weights, or a state dict's file to start from.
    eta : float, default=1.0
        Weight of labelled images, above 0.
    balanced : bool, default=True
        Whether to each mini-batch of images that are not known anomalies as many
        known anomalies are added, as in the outlier exposure of [2]_, which weighs
        the terms anew. False: mini-batches are drawn from all images, as in [1]_.
    contrast_normalization : bool, default=False
        Whether images are normalized as in Deep SVDD's paper.
    pretrain_steps : int, default=1000
        Number of mini-batches for which the network is first trained as the encoder
        of an autoencoder, 0 for none.
    pretrain_weight_decay : float, default=0.0005
        Of Adam, for the autoencoder.
    max_steps : int, default=1000
        Number of mini-batches for the objective. The paper: 150 epochs.
    learning_rate : float, default=0.001
        Of Adam, for both. The paper's is 0.0001.
    milestones : sequence of float, default=(2 / 3,)
        At these shares of the steps, in (0, 1), the learning rate falls to a tenth.
    weight_decay : float, default=5e-7
        Of Adam, for the objective.
    augmentation : "paper", None or callable, default=None
        As in `HSCClassifier`.
    validation_fraction : float, default=0.1
        Share of the images that are not known anomalies that is not trained on, in
        (0, 0.5): they set the threshold. At least 40 images, or a third of fewer
        than 120.
    contamination : float, default=0.05
        Share of new normal images that may fall below the threshold, in (0, 0.5].
    image_size : int or (int, int), default=None
        Height and width in pixels that images are resized to (bilinear, antialiased,
        aspect not kept). None: what the network is made for, or else the images' own.
    image_shape : (int, int, int) or (int, int), default=None
        (channels, height, width) or (height, width) of one image, where X does not
        tell: rows that are flattened images, or an ambiguous channel axis.
    batch_size : int, default=128
        Images in a mini-batch; twice as many where it is `balanced`.
    max_cache_bytes : int, default=2**30
        The training images are kept in memory as the network takes them if they take
        no more than this. Scores are the same.
    memory : str, path or joblib.Memory, default=None
        Folder in which images are kept as the network takes them.
    on_error : {"raise", "skip"}, default="raise"
        What to do about image files that cannot be read: raise an error that names
        them all, or warn, leave them out of `fit` and score them NaN.
    device : str, default="auto"
        Device of torch's. "auto": CUDA or MPS where there is one, else the CPU.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        Without effect: all stages are trained, in float32.
    random_state : int, RandomState instance or None, default=None
        Seeds random weights, the held-out share, mini-batches and augmentation.
    verbose : bool or int, default=False
        Whether to show a progress bar. In `fit`, scikit-learn's callbacks are served
        too (1.9 and later).

    Attributes
    ----------
    backbone_ : skdeepad.backbones.Backbone
        The network, as trained.
    center_ : ndarray of shape (n_outputs,)
        c: the mean of the outputs before the objective is trained, known anomalies
        left out, no entry nearer to zero than 0.1.
    stages_ : tuple of str
        The stage whose output it is.
    trained_stages_ : tuple of str
        The stages that were trained.
    loss_curve_ : ndarray of shape (n_iter_,)
        The objective for each mini-batch.
    n_iter_ : int
        Number of steps taken, without those of the autoencoder.
    offset_ : float
        The threshold on ``score_samples``: the `contamination` quantile of the
        training images' scores, brought to the level of held-out images.
    image_size_ : (int, int) or None
        Size at which the network runs; None for vectors.
    image_shape_in_ : (int, int, int) or None
        (channels, height, width) of the arrays seen in `fit`; None for files and
        vectors.
    n_features_in_ : int
        Number of columns seen in `fit`, where X was 2-D.
    feature_names_in_ : ndarray of str
        Names of the columns, where X had them.

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

    _parameter_constraints = {  # noqa: RUF012
        **SphereDetector._parameter_constraints,
        "eta": [Interval(Real, 0, None, closed="neither")],
        "balanced": ["boolean"],
    }

    def __init__(
        self,
        backbone: Any = "auto",
        *,
        weights: str | Path | None = None,
        eta: float = 1.0,
        balanced: bool = True,
        contrast_normalization: bool = False,
        pretrain_steps: int = 1000,
        pretrain_weight_decay: float = 5e-4,
        max_steps: int = 1000,
        learning_rate: float = 0.001,
        milestones: Iterable[float] = (2 / 3,),
        weight_decay: float = 5e-7,
        augmentation: Any = None,
        validation_fraction: float = 0.1,
        contamination: float = 0.05,
        image_size: int | tuple[int, int] | None = None,
        image_shape: tuple[int, ...] | None = None,
        batch_size: int = 128,
        max_cache_bytes: int = 2**30,
        memory: Any = None,
        on_error: str = "raise",
        device: str = "auto",
        precision: str = "auto",
        random_state: int | np.random.RandomState | None = None,
        verbose: bool | int = False,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.eta = eta
        self.balanced = balanced
        self.contrast_normalization = contrast_normalization
        self.pretrain_steps = pretrain_steps
        self.pretrain_weight_decay = pretrain_weight_decay
        self.max_steps = max_steps
        self.learning_rate = learning_rate
        self.milestones = milestones
        self.weight_decay = weight_decay
        self.augmentation = augmentation
        self.validation_fraction = validation_fraction
        self.contamination = contamination
        self.image_size = image_size
        self.image_shape = image_shape
        self.batch_size = batch_size
        self.max_cache_bytes = max_cache_bytes
        self.memory = memory
        self.on_error = on_error
        self.device = device
        self.precision = precision
        self.random_state = random_state
        self.verbose = verbose

    @keep_state_on_error
    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self, X: Any, y: ArrayLike | None = None, groups: ArrayLike | None = None
    ) -> DeepSAD:
        """Train the network.

        Parameters
        ----------
        X : array-like or sequence of paths
            ``(n, d)`` vectors or flattened images; ``(n, height, width)``,
            ``(n, height, width, channels)`` or ``(n, channels, height, width)``
            images, uint8 or floats in [0, 1]; or paths of image files.
        y : array-like of shape (n_samples,), default=None
            +1 for images known to be normal, -1 for known anomalies, 0 for images
            without label. None: no image has one, which is Deep SVDD.
        groups : array-like of shape (n_samples,), default=None
            What each image belongs to, such as a part or a video: what is held out of
            training to set the threshold are whole groups. None: images are
            unrelated, but exact copies, which are held out together.

        Returns
        -------
        DeepSAD
            The detector itself.

        Raises
        ------
        ValueError
            If X, y or a parameter is not what is described here, if a given network
            has biases, or if training diverges.
        FileNotFoundError
            If image files, or the weights, are missing.

        Warns
        -----
        ConvergenceWarning
            If all images have one score.
        """
        inputs = self._fit_inputs(X)
        groups = check_groups(groups, len(inputs))
        labels = check_semi_labels(y, len(inputs))
        rng = check_random_state(self.random_state)
        self._fit_sphere(inputs, labels, groups, rng)
        return self

    def _losses(
        self,
        outputs: PassOutputs,
        labels: NDArray[np.intp],
        rows: NDArray[np.intp],
        anomalies: NDArray[np.intp],
        rng: np.random.RandomState,
    ) -> Iterator[Tensor]:
        device = outputs.task.device
        paired = self.balanced and len(anomalies) > 0
        if paired:
            drawn = balanced_batches(rows, anomalies, self.batch_size, rng)
        else:
            drawn = batchnorm_batches(np.append(rows, anomalies), self.batch_size, rng)
        stream = outputs.batches(drawn)
        for index, batch in stream:
            if paired:
                others, more = next(stream)
                index, batch = np.append(index, others), np.concatenate([batch, more])
            z = self._network(torch.from_numpy(batch).to(device))
            known = torch.from_numpy(labels[index]).to(device)
            yield semi_supervised_loss(self._squared(z), known, self.eta).mean()


def check_semi_labels(y: ArrayLike | None, n: int) -> NDArray[np.intp]:
    """Give labels in {-1, 0, 1}; labels of another kind count as none.

    Warns
    -----
    UserWarning
        If y holds 0 and 1 only, where 1 may be meant to mark the anomalies.
    """
    if y is None:
        return np.zeros(n, dtype=np.intp)
    labels = numeric_labels(y, n)
    found = set(np.unique(labels).tolist())
    if found == {0, 1}:
        warnings.warn(
            "y holds 0 and 1: images without label, and images known to be normal. If "
            "1 marks the anomalies, map the labels with np.where(y == 1, -1, 0).",
            UserWarning,
            stacklevel=4,
        )
    if not found <= {-1, 0, 1}:
        return np.zeros(n, dtype=np.intp)
    return labels.astype(np.intp)
