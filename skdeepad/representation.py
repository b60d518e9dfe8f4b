"""What is a representation worth? Brittleness, separability, oracle.

Before a detector is tuned: which backbone, and which of its stages, suits these images.
"""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_validate, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from torch import Tensor
from tqdm.auto import tqdm

from .base import draw_seed
from .detectors import KDClonerEstimator
from .detectors._kd_cloner import attributions, stage_losses
from .detectors._source_and_cloner import per_channel
from .features import BackboneFeatures
from .labels import is_anomaly
from .scorers import GaussianScorer, KNNScorer

__all__ = ["brittleness", "compare_representations", "oracle", "separability"]

Features = dict[str, NDArray[np.float32]]


def brittleness(
    X: Any,
    backbone: Any = "auto",
    *,
    stages: str | Iterable[str] | None = None,
    max_steps: int = 200,
    **options: Any,
) -> dict[str, float]:
    """How far small changes of normal images move a representation off its course.

    A student learns to give the representation of the normal images, as in knowledge
    distillation; then [1]_::

        brittleness = E ||dL/dx||_2 / tr(Sigma)

    over the same images. Better representations for anomaly detection tend to be more
    brittle. No anomaly is needed.

    What [1]_ leaves open is fixed here, so that values compare across representations:
    L is the squared difference of teacher and student, summed over channels, averaged
    over positions, in the teacher's own units; x is an image of pixels in [0, 1], at
    the size the network sees; Sigma is the covariance of the teacher's outputs,
    averaged over positions. Scaling a representation changes nothing. The student is
    the compact cloner of `KDClonerEstimator`, trained under its value loss (Adam,
    learning rate 0.001) on standardized channels; one student learns all stages.

    Parameters
    ----------
    X : array-like or sequence of paths
        Normal images, in any form that `KDClonerEstimator` takes.
    backbone : str, torch.nn.Module or callable, default="auto"
        As in `BackboneFeatures`.
    stages : str or sequence of str, default=None
        The stages to look at. None: all but "pool" and "conv_head".
    max_steps : int, default=200
        For how many mini-batches the student trains at most.
    **options
        Further parameters of `KDClonerEstimator`, such as `weights`, `image_size`,
        `batch_size`, `device` and `random_state`.

    Returns
    -------
    dict of str to float
        Of each stage: at least 0, in units of 1 / pixel value.

    References
    ----------
    .. [1] K. T. Mai, T. Davies, L. D. Griffin, "Brittle Features May Help Anomaly
       Detection", arXiv:2104.10453, 2021.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdeepad.representation import brittleness
    >>> X = load_digits().images[:60] / 16
    >>> found = brittleness(
    ...     X, stages=["stage2", "stage5"], image_size=32, max_steps=10, random_state=0
    ... )
    >>> list(found)
    ['stage2', 'stage5']
    """
    known = BackboneFeatures().get_params()
    shared = {name: value for name, value in options.items() if name in known}
    extractor, (features,), _ = _features([X], backbone, stages, shared)
    student = _distil(X, extractor, max_steps, options)
    return _brittleness(student, X, features)


def separability(
    X: Any,
    X_anomalous: Any,
    backbone: Any = "auto",
    *,
    stages: str | Iterable[str] | None = None,
    cv: int = 5,
    **options: Any,
) -> dict[str, dict[str, float]]:
    """How well a linear classifier tells anomalies from normal images.

    Of the representation's features, averaged over positions and standardized:
    logistic regression (C = 1, classes balanced), cross-validated (stratified,
    shuffled).

    Parameters
    ----------
    X, X_anomalous : array-like or sequence of paths
        Normal and anomalous images.
    backbone : str, torch.nn.Module or callable, default="auto"
        As in `BackboneFeatures`.
    stages : str or sequence of str, default=None
        The stages to look at. None: all but "pool" and "conv_head".
    cv : int, default=5
        Number of folds.
    **options
        Further parameters of `BackboneFeatures`.

    Returns
    -------
    dict of str to dict
        Of each stage: the mean "accuracy" (balanced) and the mean "auroc" over folds,
        in [0, 1].

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdeepad.representation import separability
    >>> X, y = load_digits(return_X_y=True)
    >>> X = X.reshape(-1, 8, 8) / 16
    >>> found = separability(X[y == 0], X[y == 1], stages="stage4", image_size=32)
    >>> found["stage4"]["auroc"] > 0.99
    True
    """
    seed = draw_seed(check_random_state(options.get("random_state")))
    _, (normal, anomalous), _ = _features([X, X_anomalous], backbone, stages, options)
    return {
        stage: _separability(normal[stage], anomalous[stage], cv, seed)
        for stage in normal
    }


def oracle(
    X: Any,
    y: ArrayLike,
    X_test: Any,
    y_test: ArrayLike,
    backbone: Any = "auto",
    *,
    stages: str | Iterable[str] | None = None,
    n_estimators: int = 1000,
    n_jobs: int | None = None,
    **options: Any,
) -> dict[str, float]:
    """How much a representation knows of anomalies: what a detector could reach.

    A random forest learns from labelled validation images, anomalies among them, to
    tell them apart by the representation's features, averaged over positions; how it
    ranks the test images bounds what an anomaly score is to extract (the oracle
    anomaly detector of [1]_). On a representation that was trained on the anomalies'
    classes too, it is the oracle representation.

    Parameters
    ----------
    X : array-like or sequence of paths
        Validation images.
    y : array-like of shape (n_samples,)
        Their labels: +1 for normal images, -1 for anomalies.
    X_test : array-like or sequence of paths
        Test images.
    y_test : array-like of shape (n_samples,)
        Their labels.
    backbone : str, torch.nn.Module or callable, default="auto"
        As in `BackboneFeatures`.
    stages : str or sequence of str, default=None
        The stages to look at. None: all but "pool" and "conv_head".
    n_estimators : int, default=1000
        Number of trees; the paper's.
    n_jobs : int, default=None
        For the forest, as in scikit-learn.
    **options
        Further parameters of `BackboneFeatures`; `random_state` also seeds the forest.

    Returns
    -------
    dict of str to float
        Of each stage: the AUROC on the test images, in [0, 1].

    Raises
    ------
    ValueError
        If labels are neither +1 nor -1, or of one kind only.

    References
    ----------
    .. [1] R. Garrepalli, "Oracle Analysis of Representations for Deep Open Set
       Detection", arXiv:2209.11350, 2022.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from skdeepad.representation import oracle
    >>> X, y = load_digits(return_X_y=True)
    >>> X, y = X.reshape(-1, 8, 8) / 16, np.where(y < 6, 1, -1)
    >>> found = oracle(
    ...     X[:300], y[:300], X[300:400], y[300:400],
    ...     stages="stage4", image_size=32, n_estimators=50, random_state=0,
    ... )
    >>> found["stage4"] > 0.8
    True
    """
    labels = np.asarray(y)
    if len(np.unique(is_anomaly(labels))) < 2:
        raise ValueError("y must label both normal images (+1) and anomalies (-1).")
    seed = draw_seed(check_random_state(options.get("random_state")))
    _, (known, new), _ = _features([X, X_test], backbone, stages, options)
    found = {}
    for stage in known:
        forest = RandomForestClassifier(n_estimators, random_state=seed, n_jobs=n_jobs)
        forest.fit(known[stage], labels)
        normal = forest.predict_proba(new[stage])[:, 1]
        found[stage] = float(roc_auc_score(y_test, normal))
    return found


def compare_representations(
    backbones: Iterable[Any],
    X: Any,
    X_anomalous: Any = None,
    *,
    stages: str | Iterable[str] | None = None,
    test_fraction: float = 0.3,
    max_steps: int = 200,
    verbose: bool = False,
    **options: Any,
) -> Any:
    """Put representations side by side, to see which suits the images.

    Each backbone passes over the images once, for all of its stages, and a student
    learns them, for `brittleness` and for the detection by knowledge distillation.

    Parameters
    ----------
    backbones : sequence of str, torch.nn.Module, callable or (name, backbone)
        The networks; a pair gives one a name in the table.
    X : array-like or sequence of paths
        Normal images.
    X_anomalous : array-like or sequence of paths, default=None
        Anomalies, where some are known.
    stages : str or sequence of str, default=None
        The stages of each network. None: all but "pool" and "conv_head".
    test_fraction : float, default=0.3
        Share of the normal images that nothing is learnt from: detectors are measured
        by them and by the anomalies, in (0, 1).
    max_steps : int, default=200
        For how many mini-batches each student trains at most.
    verbose : bool, default=False
        Whether to show a progress bar over the backbones.
    **options
        Further parameters of `BackboneFeatures`.

    Returns
    -------
    pandas.DataFrame
        A row for each stage of each backbone. "n_features"; "brittleness"; "rank" by
        it, 1 for the most brittle, which takes no anomaly (docs/representation.md has
        what that is worth: little); "images_per_second" of the backbone's pass. With
        anomalies also "separability" (balanced accuracy) and "separability_auroc", and
        the AUROC of detectors: "kd_auroc" (knowledge distillation at this stage),
        "mahalanobis_auroc" and "knn_auroc".

    See Also
    --------
    skdeepad.inspection.RepresentationDisplay : Draws it.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skdeepad.representation import compare_representations
    >>> X, y = load_digits(return_X_y=True)
    >>> X = X.reshape(-1, 8, 8) / 16
    >>> table = compare_representations(
    ...     ["efficientnet_lite0", ("random", "mnist_lenet")], X[y == 0], X[y == 1],
    ...     image_size=28, max_steps=2, random_state=0,
    ... )
    >>> sorted(table.backbone.unique())
    ['efficientnet_lite0', 'random']
    """
    import pandas as pd

    seed = draw_seed(check_random_state(options.get("random_state")))
    options = {**options, "random_state": seed}
    rows: list[dict[str, Any]] = []
    named = [pair if isinstance(pair, tuple) else (pair, pair) for pair in backbones]
    for name, backbone in tqdm(named, unit="backbone", disable=not verbose):
        label = name if isinstance(name, str) else type(name).__name__
        for row in _measure(
            backbone, X, X_anomalous, stages, test_fraction, max_steps, options
        ):
            rows.append({"backbone": label, **row})
    table = pd.DataFrame(rows)
    ranks = rankdata(-table["brittleness"], method="min").astype(int)
    table.insert(table.columns.get_loc("brittleness") + 1, "rank", ranks)
    return table


def _measure(
    backbone: Any,
    X: Any,
    X_anomalous: Any,
    stages: Any,
    test_fraction: float,
    max_steps: int,
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    """Measure all stages of one backbone."""
    seed = options["random_state"]
    groups = [X] if X_anomalous is None else [X, X_anomalous]
    extractor, parts, seconds = _features(groups, backbone, stages, options)
    normal = parts[0]
    n = len(next(iter(normal.values())))
    train, test = train_test_split(
        np.arange(n), test_size=test_fraction, random_state=seed
    )
    X_train = _take(X, train)
    student = _distil(X_train, extractor, max_steps, options)
    brittle = _brittleness(student, X_train, {s: f[train] for s, f in normal.items()})
    rows = [
        {
            "stage": stage,
            "n_features": features.shape[1],
            "brittleness": brittle[stage],
            "images_per_second": sum(map(len, [p[stage] for p in parts])) / seconds,
        }
        for stage, features in normal.items()
    ]
    if X_anomalous is None:
        return rows
    tested = [stage_losses(student, x) for x in (_take(X, test), X_anomalous)]
    for k, row in enumerate(rows):
        good, bad = (part[row["stage"]] for part in parts)
        linear = _separability(good, bad, 5, seed)
        row |= {
            "separability": linear["accuracy"],
            "separability_auroc": linear["auroc"],
            "kd_auroc": _auroc(-tested[0][:, k], -tested[1][:, k]),
        }
        for name, scorer in (
            ("mahalanobis_auroc", GaussianScorer()),
            ("knn_auroc", KNNScorer()),
        ):
            scorer.fit(good[train])
            scores = scorer.score_samples(good[test]), scorer.score_samples(bad)
            row[name] = _auroc(*scores)
    return rows


def _take(X: Any, index: NDArray[np.intp]) -> Any:
    """Select samples."""
    return X[index] if hasattr(X, "shape") else [X[i] for i in index]


def _auroc(normal: NDArray[Any], anomalous: NDArray[Any]) -> float:
    y = np.repeat([1, -1], [len(normal), len(anomalous)])
    return float(roc_auc_score(y, np.concatenate([normal, anomalous])))


def _part(extractor: BackboneFeatures, together: NDArray[np.float32]) -> Features:
    """Part features by stage."""
    names = extractor.get_feature_names_out()
    stages = np.array([name.rpartition("_")[0] for name in names])
    return {stage: together[:, stages == stage] for stage in extractor.stages_}


def _features(
    groups: list[Any], backbone: Any, stages: Any, options: dict[str, Any]
) -> tuple[BackboneFeatures, list[Features], float]:
    """Pass groups of images through a backbone, once; give each stage's features.

    The seconds that it took are given, too.
    """
    extractor = BackboneFeatures(backbone, stages=stages, **options).fit(groups[0])
    if stages is None:
        extractor.set_params(stages=extractor.backbone_.block_names).fit(groups[0])
    extractor.transform(_take(groups[0], np.arange(1)))  # what is done once
    start = perf_counter()
    parts = [_part(extractor, extractor.transform(group)) for group in groups]
    return extractor, parts, perf_counter() - start


def _distil(
    X: Any, extractor: BackboneFeatures, max_steps: int, options: dict[str, Any]
) -> KDClonerEstimator:
    """Teach a student the stages of a backbone."""
    student = KDClonerEstimator(
        extractor.backbone_,
        stages=extractor.stages_,
        score_stages=extractor.stages_,
        loss="value",
        max_steps=max_steps,
        **options,
    )
    return student.fit(X)


def _separability(
    normal: NDArray[Any], anomalous: NDArray[Any], cv: int, seed: int
) -> dict[str, float]:
    y = np.repeat([1, 0], [len(anomalous), len(normal)])
    linear = make_pipeline(
        StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced")
    )
    scores = cross_validate(
        linear,
        np.concatenate([anomalous, normal]),
        y,
        cv=StratifiedKFold(cv, shuffle=True, random_state=seed),
        scoring={"accuracy": "balanced_accuracy", "auroc": "roc_auc"},
    )
    return {
        name: float(scores[f"test_{name}"].mean()) for name in ("accuracy", "auroc")
    }


def _brittleness(
    student: KDClonerEstimator, X: Any, features: Features
) -> dict[str, float]:
    """Divide the mean gradient norm by the trace of the features' covariance."""
    norms = attributions(student, X, gradient_norms).mean(axis=0)
    return {
        stage: float(
            norm / features[stage].astype(np.float64).var(axis=0, ddof=1).sum()
        )
        for stage, norm in zip(student.stages_, norms, strict=True)
    }


def gradient_norms(network: Any, x: Tensor) -> Tensor:
    """Give the norm of each stage's gradient by the pixels: (n_samples, n_stages)."""
    norms = []
    # the pass around is one without gradients
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().requires_grad_()
        pairs = network.of_images(x)
        for name, scale in zip(network.compared, network.scales, strict=True):
            teacher, student = pairs[name]
            apart = (teacher - student) * per_channel(scale, teacher)
            loss = apart.square().sum()
            n_positions = apart[0, 0].numel()
            (slope,) = torch.autograd.grad(loss / n_positions, x, retain_graph=True)
            norms.append(torch.linalg.vector_norm(slope.flatten(1), dim=1))
    return torch.stack(norms, dim=1)
