"""Estimators on a backbone: what they share, and the transformer `BackboneFeatures`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import field
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, TransformerMixin, _fit_context
from sklearn.utils import Tags, check_random_state
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.validation import _check_feature_names_in, check_is_fitted
from torch import nn

from .backbones import Backbone, load_backbone
from .backbones._plain import to_plain
from .base import draw_seed, keep_state_on_error
from .cache import RowCache, StageCache
from .inference import (
    FeaturePass,
    Features,
    Outputs,
    Tap,
    flat,
    iter_outputs,
    resolve_device,
    resolve_precision,
    run_end,
)
from .inputs import (
    Vectors,
    check_inputs,
    check_size,
    warn_of_dark_images,
    warn_of_flat_images,
)
from .parameters import ParametersMixin
from .progress import Progress

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # before scikit-learn 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stand-in: there are no callbacks to support."""


class BackboneEstimator(ParametersMixin, CallbackSupportMixin, BaseEstimator):
    """Base of every estimator that sees its samples through a backbone.

    Parameters
    ----------
    backbone : str, torch.nn.Module or callable, default="auto"
        The network: a name of `skdeepad.backbones.list_backbones`, a module (a copy
        is taken), or a function that makes one. "auto" is "efficientnet_lite0" for
        images and "mlp" for vectors.
    weights : "default", "download", None or path, default="default"
        "default": pretrained weights that are found on this machine. "download": the
        same, downloaded first if they are missing. None: random weights. A path: the
        file of a state dict. See `skdeepad.backbones.load_backbone`.
    image_size : int or (int, int), default=None
        Height and width in pixels that images are resized to (bilinear, antialiased,
        aspect ratio not kept). None: the size that the network was trained on, or
        else the images' own. The time grows with the number of pixels.
    image_shape : (int, int, int) or (int, int), default=None
        (channels, height, width) or (height, width) of one image, where X does not
        tell: rows that are flattened images, or an ambiguous channel axis.
    white : int, default=None
        The value of white of images with more than 8 bits, such as 4095 of a camera
        with 12. None: 65535 of unsigned integers of 16 bits, and 255 of others.
    batch_size : int, default=32
        How many samples the network is given at once, in training and in scoring.
    memory : str, path or joblib.Memory, default=None
        Folder in which the outputs of the frozen stages are kept, by the content of
        their sample. Any subset of samples that were seen before is found again: the
        folds of a grid search, on both sides, in all of its processes.
    on_error : {"raise", "skip"}, default="raise"
        What to do about images that cannot be read: missing or damaged files, folders
        among them, items of a data set. "raise": an error that names them. "skip": a
        warning; they are left out of `fit` and score NaN, and an X of no image, such
        as an empty folder, gives no scores in place of an error.
    device : str, default="auto"
        A device of torch. "auto": CUDA or MPS where there is one, else the CPU.
    precision : {"auto", "float32", "bfloat16"}, default="auto"
        Of the frozen stages. "auto": bfloat16 for images where the processor has
        instructions for it (AMX, AVX512-BF16, CUDA), float32 elsewhere. Distances are
        in float64 always.
    random_state : int, RandomState instance or None, default=None
        Seeds random weights.
    verbose : bool, int or "auto", default="auto"
        Whether to show progress bars. "auto": in a terminal and in a notebook, for
        what takes longer than a second; elsewhere, such as in a log, one line says
        what will take longer than ten seconds. scikit-learn's callbacks (1.9 and
        later) are served, too, while it is fitted.

    Attributes
    ----------
    backbone_ : skdeepad.backbones.Backbone
        The network. A pretrained one that is not trained is shared in the process and
        pickled by name.
    stages_ : tuple of str
        The stages whose outputs are used.
    image_size_ : (int, int) or None
        Height and width at which the network runs; None for vectors.
    image_shape_in_ : (int, int, int) or None
        (channels, height, width) of the arrays seen in `fit`; None for files and
        vectors.
    n_features_in_ : int
        Number of columns seen in `fit`, where X was 2-D.
    feature_names_in_ : ndarray of str
        Names of the columns, where X had them.
    """

    backbone: Any = field(default="auto", kw_only=False)
    weights: str | Path | None = "default"
    image_size: int | tuple[int, int] | None = None
    image_shape: tuple[int, ...] | None = None
    white: int | None = None
    batch_size: int = 32
    memory: Any = None
    on_error: str = "raise"
    device: str = "auto"
    precision: str = "auto"
    random_state: int | np.random.RandomState | None = None
    verbose: bool | int | str = "auto"

    _parameter_constraints: ClassVar = {
        "backbone": [str, callable],  # a torch.nn.Module is callable
        "weights": [str, os.PathLike, None],
        "image_size": [Interval(Integral, 1, None, closed="left"), tuple, list, None],
        "image_shape": [tuple, list, None],
        "white": [Interval(Integral, 1, None, closed="left"), None],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "memory": [str, os.PathLike, HasMethods(["cache"]), None],
        "on_error": [StrOptions({"raise", "skip"})],
        "device": [str],
        "precision": [StrOptions({"auto", "float32", "bfloat16"})],
        "random_state": ["random_state"],
        "verbose": ["verbose", StrOptions({"auto"})],
    }
    _saved: ClassVar = {"backbone": nn.Module, "backbone_": Backbone}
    _has_end: ClassVar = False  # a live one, behind the frozen front
    _n_at_end: ClassVar = 1  # mini-batches that the live end is given together
    _end_dtype: ClassVar[torch.dtype | None] = None  # None: as the front

    def __getstate__(self) -> dict[str, Any]:
        """Give the state without tensors, so that skops can save it, too."""
        memo: dict[int, Any] = {}
        state = super().__getstate__()
        return {name: to_plain(value, memo) for name, value in state.items()}

    def _default_stages(self, backbone: Backbone) -> Iterable[str]:
        return backbone.stage_names[-1:]

    def _fit_inputs(self, X: Any) -> Vectors:
        """Check X, and settle the backbone, the size of images and the stages."""
        for name in ("n_features_in_", "feature_names_in_"):
            self.__dict__.pop(name, None)  # images have none
        vectors = self._takes_vectors()
        inputs = check_inputs(
            self, X, vectors=vectors, image_shape=self.image_shape, reset=True
        )
        vectors = type(inputs) is Vectors
        shape = inputs.shape
        if vectors and self.backbone == "auto":
            warn_of_flat_images(inputs)
        elif self.white is None and not vectors:
            warn_of_dark_images(inputs)
        name = self.backbone
        if isinstance(name, str) and name == "auto":
            name = self._auto_backbone(shape)
        seed = draw_seed(check_random_state(self.random_state))
        self.backbone_ = load_backbone(
            name,
            weights=self.weights,
            in_channels=shape[0] if shape else 3,
            vectors=vectors,
            seed=seed,
        )
        # settled here, so that a pickle gives the same scores on another processor
        device = resolve_device(self.device)
        self._dtype = resolve_precision(self.precision, device, vectors)
        self.image_size_ = None if vectors else self._settle_size(shape)
        self.image_shape_in_ = None if vectors else shape
        stages = self._default_stages(self.backbone_)
        if (given := getattr(self, "stages", None)) is not None:
            stages = (given,) if isinstance(given, str) else given
        self.stages_ = self.backbone_.check_stages(stages)
        self._grid = getattr(self, "grid", None)
        front = self._pass(BackboneEstimator._taps(self))
        self._widths = [width for (width,) in front.shapes(front.sample_shape(inputs))]
        return inputs

    def _auto_backbone(self, shape: tuple[int, ...] | None) -> str:
        """Name what "auto" stands for, for samples of this shape (None: files)."""
        vectors = shape is not None and len(shape) == 1
        return "mlp" if vectors else "efficientnet_lite0"

    def _takes_vectors(self) -> bool | None:
        if isinstance(self.backbone, Backbone):
            return self.backbone.vectors
        if isinstance(self.backbone, str) and self.backbone != "auto":
            return self.backbone == "mlp"
        return None

    def _settle_size(self, shape: tuple[int, ...] | None) -> tuple[int, int]:
        size: Any = self.image_size
        if size is None:
            size = self.backbone_.input_size or (shape and shape[1:])
        if size is None:
            raise ValueError(
                "image_size=None, but neither the backbone nor X determines the "
                "size. Set image_size to the height and width to which files are "
                "resized."
            )
        pair = (size, size) if isinstance(size, Integral) else size
        height, width = check_size("image_size", pair)
        return height, width

    def _check_inputs(self, X: Any) -> Vectors:
        """Check X against what was seen in `fit`."""
        check_is_fitted(self)
        inputs = check_inputs(
            self,
            X,
            vectors=self.backbone_.vectors,
            image_shape=self.image_shape,
            reset=False,
        )
        expected = self.image_shape_in_
        if expected is None or inputs.shape in (None, expected):
            return inputs
        if np.shape(X) == expected:
            raise ValueError(f"X has the shape of one image, {expected}; pass X[None].")
        # other images are brought to what was settled, as files are
        size = self.image_size or self.backbone_.input_size
        channels = self.backbone_.in_channels
        if size is None or (channels is None and inputs.shape[:1] != expected[:1]):
            raise ValueError(
                f"X has images of shape {inputs.shape}, but {type(self).__name__} is "
                f"expecting images of shape {expected} as input. "
                + (
                    "Set image_size, and images of any size are resized."
                    if size is None
                    else "Convert the images: the backbone does not say how many "
                    "channels it takes."
                )
            )
        return inputs

    def _taps(self) -> tuple[Tap, ...]:
        """Tell what is taken of the frozen front: averages over positions, or cells."""
        return tuple(Tap(stage, self._grid or 1) for stage in self.stages_)

    def _end(self) -> Backbone | None:
        """Give the live end of the network, which is called with that."""
        return None

    def _front(self) -> FeaturePass:
        """Give the pass that samples take through the frozen front."""
        return self._pass(self._taps())

    def _pass(self, taps: tuple[Tap, ...]) -> FeaturePass:
        return FeaturePass(
            self.backbone_,
            taps,
            self.image_size_,
            self.batch_size,
            resolve_device(self.device),
            self._dtype,
        )

    def _run(self, front: FeaturePass, inputs: Vectors, fitting: bool) -> Iterator[Any]:
        """Pass samples through a front, or find what it has made of them."""
        cache = self.memory
        if cache is not None and not isinstance(cache, RowCache):
            folder = getattr(cache, "location", cache)
            cache = None if folder is None else StageCache(folder)
        batches = iter_outputs(front, inputs, on_error=self.on_error, cache=cache)
        return self._track(batches, len(inputs), fitting)

    def _embed(self, outputs: Iterable[Outputs]) -> Iterator[Features]:
        """Turn what the front has made of samples into features."""
        end = self._end()
        if end is None:
            return ((index, flat(arrays)) for index, arrays in outputs)
        limit = self._n_at_end * self.batch_size
        device = resolve_device(self.device)
        return run_end(end, outputs, limit, device, self._end_dtype or self._dtype)

    def _features(
        self, inputs: Vectors, *, fitting: bool = False
    ) -> Iterator[Features]:
        """Give positions and features of the samples, batch by batch."""
        return self._embed(self._run(self._front(), inputs, fitting))

    def _all_features(
        self, inputs: Vectors, *, fitting: bool = False
    ) -> NDArray[np.float32]:
        """Give the features of all samples; NaN for those that were skipped."""
        return self._gather(self._features(inputs, fitting=fitting), len(inputs))

    def _gather(self, batches: Iterable[Features], n: int) -> NDArray[np.float32]:
        out = np.full((n, sum(self._widths)), np.nan, dtype=np.float32)
        for index, features in batches:
            out[index] = features
        return out

    def _track(
        self, items: Iterable[Any], total: int, fitting: bool, phase: str = ""
    ) -> Iterator[Any]:
        """Pass items on, showing progress and, in `fit`, to scikit-learn's callbacks.

        Items are batches of samples, which start with their positions, or the steps
        of a phase of training.
        """
        context = None
        if fitting and hasattr(self, "_init_callback_context"):
            context = self._init_callback_context(max_subtasks=None)
            context.call_on_fit_task_begin(estimator=self)
        name = " ".join([type(self).__name__, phase]).strip()
        unit = "step" if phase else "sample"
        with Progress(total, unit, name, self.verbose) as progress:
            for item in items:
                task = context and context.subcontext(task_name="batch")
                if task:
                    task.call_on_fit_task_begin(estimator=self)
                yield item
                if task:
                    task.call_on_fit_task_end(estimator=self)
                progress.update(1 if phase else len(item[0]))
        if context:
            context.call_on_fit_task_end(estimator=self)


class BackboneFeatures(TransformerMixin, BackboneEstimator):
    """Features of a frozen, pretrained network, as a transformer.

    Images (or vectors) -> a matrix, so that every scikit-learn estimator works
    behind it.

    Parameters
    ----------
    stages : str or sequence of str, default=None
        Which stages' outputs are the features; several are put side by side, in the
        order of the network. None: the last stage, pooled.
    grid : int, default=None
        Average maps over the cells of a ``grid`` x ``grid`` raster and not over the
        whole map, so that features tell where.
    on_error : {"raise", "skip"}, default="raise"
        What to do about image files that cannot be read: raise an error that names
        them all, or warn and give them NaN, which few estimators take.

    See Also
    --------
    skdeepad.detectors.MahalanobisFeatureScorer : Scores the stages' features itself.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.pipeline import make_pipeline
    >>> from skdeepad import BackboneFeatures, KNNScorer
    >>> X = load_digits().images[:64] / 16
    >>> model = make_pipeline(BackboneFeatures(image_size=64), KNNScorer())
    >>> model.fit(X).score_samples(X).shape
    (64,)
    """

    stages: str | Iterable[str] | None = None
    grid: int | None = None

    _parameter_constraints: ClassVar = {
        "stages": [str, tuple, list, None],
        "grid": [Interval(Integral, 1, None, closed="left"), None],
    }

    @keep_state_on_error
    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: ArrayLike | None = None) -> BackboneFeatures:
        """Load the backbone and learn the shape of the samples.

        Parameters
        ----------
        X : array-like or sequence of paths
            ``(n, d)`` vectors or flattened images; ``(n, height, width)``,
            ``(n, height, width, channels)`` or ``(n, channels, height, width)``
            images, uint8 or floats in [0, 1]; or paths of image files.
        y : ignored
            For scikit-learn's pipelines.

        Returns
        -------
        BackboneFeatures
            The transformer itself.

        Raises
        ------
        ValueError
            If X or a parameter is not what is described here.
        FileNotFoundError
            If image files, or the weights, are missing.
        """
        self._fit_inputs(X)
        return self

    @keep_state_on_error
    @_fit_context(prefer_skip_nested_validation=True)
    def fit_transform(self, X: Any, y: ArrayLike | None = None) -> NDArray[np.float32]:
        """Fit, and give the features of the same samples.

        Returns
        -------
        ndarray of float32, shape (n_samples, n_features)
            As `transform` gives them.
        """
        return self._all_features(self._fit_inputs(X), fitting=True)

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Give the features of samples.

        Returns
        -------
        ndarray of float32, shape (n_samples, n_features)
            One row a sample; NaN for files skipped by ``on_error="skip"``.
        """
        return self._all_features(self._check_inputs(X))

    def get_feature_names_out(
        self, input_features: ArrayLike | None = None
    ) -> NDArray[np.object_]:
        """Name the features: the stage, and the position in its output.

        Parameters
        ----------
        input_features : array-like of str, default=None
            Checked against the names seen in `fit`, and not used otherwise.

        Returns
        -------
        ndarray of str, shape (n_features,)
            Such as "stage5_0", ..., "stage5_111".
        """
        check_is_fitted(self)
        if hasattr(self, "n_features_in_"):
            _check_feature_names_in(self, input_features)
        names = [
            f"{stage}_{i}"
            for stage, width in zip(self.stages_, self._widths, strict=True)
            for i in range(width)
        ]
        return np.array(names, dtype=object)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags
