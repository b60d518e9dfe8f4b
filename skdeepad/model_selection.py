"""Cross-validation that trains on normal samples, with anomalies and without."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone
from sklearn.model_selection import GroupKFold, KFold
from sklearn.utils import _safe_indexing, check_consistent_length
from sklearn.utils.validation import _num_samples

from skdeepad.datasets import make_pseudo_anomalies
from skdeepad.labels import is_anomaly
from skdeepad.metrics import anomaly_roc_auc_score

__all__ = ["OneClassKFold", "PseudoAnomalyScorer", "compare_detectors"]


class OneClassKFold(KFold):
    """K-fold cross-validation for detectors that learn from normal samples only.

    The normal rows (``y == +1``) are split as by
    :class:`~sklearn.model_selection.KFold`: a fold trains on the other folds' normal
    rows and tests on its own. No fold ever trains on an anomaly.

    The anomalies (``y == -1``) are split among the test sets in the same way, so that
    every row is tested exactly once, as ``cross_val_predict`` wants it. Where they are
    fewer than ``n_splits``, every fold tests on all of them instead: a test set
    without anomalies has no ROC AUC.

    Parameters
    ----------
    n_splits : int, default=5
        Number of folds, at least 2.
    shuffle : bool, default=False
        Whether to shuffle before splitting. Without it, folds are runs of
        consecutive rows: shuffle where rows are sorted, such as by kind of defect.
    random_state : int, RandomState instance or None, default=None
        Makes the shuffling reproducible; only with ``shuffle=True``.

    See Also
    --------
    skdeepad.metrics.anomaly_roc_auc : A scorer to use with it.

    Notes
    -----
    ``GridSearchCV(..., refit=True)`` ends with a fit on all rows given to it. The
    detectors of this package leave known anomalies out of every fit; scikit-learn's
    own do not, so for these set ``refit=False`` and refit on normal rows.

    Classifiers, such as `HSCClassifier`, train on anomalies, too: for these take
    :class:`~sklearn.model_selection.StratifiedKFold`.

    ``cross_val_predict(detector, X, y, cv=OneClassKFold(), method=...)`` gives
    out-of-fold scores and predictions, by every method of a detector.

    A training set without anomalies has no ROC AUC: ``learning_curve`` gives nan for
    training scores, and searches by halving do, unless ``return_train_score=False``.
    Test scores are not concerned.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.model_selection import GridSearchCV
    >>> from sklearn.svm import OneClassSVM
    >>> from skdeepad.metrics import anomaly_roc_auc
    >>> from skdeepad.model_selection import OneClassKFold
    >>> X = np.array([[0], [1], [9], [2], [-8], [3]])
    >>> y = np.array([1, 1, -1, 1, -1, 1])
    >>> for train, test in OneClassKFold(n_splits=2).split(X, y):
    ...     print(train, test)
    [3 5] [0 1 2]
    [0 1] [3 4 5]
    >>> search = GridSearchCV(
    ...     OneClassSVM(),
    ...     {"kernel": ["linear", "rbf"]},
    ...     cv=OneClassKFold(n_splits=2),
    ...     scoring=anomaly_roc_auc,
    ...     refit=False,
    ... )
    >>> search.fit(X, y).best_params_
    {'kernel': 'rbf'}
    """

    # with metadata routing, `groups` is handed to it as to GroupKFold
    __metadata_request__split: ClassVar = {"groups": True}

    def split(
        self, X: Any, y: ArrayLike | None = None, groups: ArrayLike | None = None
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        """Generate the train and test indices of each fold.

        Parameters
        ----------
        X : array-like of length n_samples
            The samples; only their number matters.
        y : array-like of shape (n_samples,), default=None
            +1 for normal rows, -1 for anomalies. None takes every row for normal.
        groups : array-like of shape (n_samples,), default=None
            What each row belongs to, such as a part or a camera. A group is either
            trained on or tested on; its anomalies are tested with its normal rows.

        Yields
        ------
        train : ndarray of shape (n_train,)
            Indices of normal rows.
        test : ndarray of shape (n_test,)
            Indices of the fold's normal rows and anomalies, sorted.

        Raises
        ------
        ValueError
            If a label is neither +1 nor -1, the lengths differ, or the normal rows
            (with `groups`, the groups that have any) are fewer than ``n_splits``.
        """
        if y is None:
            y = np.ones(_num_samples(X))
        anomalous = is_anomaly(y)
        check_consistent_length(X, anomalous, groups)
        together = np.arange(len(anomalous)) if groups is None else np.asarray(groups)
        normal = np.flatnonzero(~anomalous)
        n_normal = len(np.unique(together[normal]))
        if n_normal < self.n_splits:
            raise ValueError(
                f"n_splits={self.n_splits} needs at least as many normal rows (y "
                f"== +1), or groups of them, got {n_normal}."
            )
        # anomalies of a group that has normal rows, too, are tested with these
        alone = anomalous & ~np.isin(together, together[normal])
        others = np.flatnonzero(alone)
        if len(np.unique(together[others])) < self.n_splits:
            shares = [others] * self.n_splits
        else:
            shares = [others[share] for _, share in self._parts(others, groups)]
        parts = self._parts(normal, groups)
        for (train, test), share in zip(parts, shares, strict=True):
            tested = np.isin(together, together[normal[test]]) & ~alone
            yield normal[train], np.sort(np.append(np.flatnonzero(tested), share))

    def _parts(
        self, rows: NDArray[np.intp], groups: ArrayLike | None
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        """Split some of the rows, and no group of them."""
        if groups is None:
            return super().split(rows)
        folds = GroupKFold(
            self.n_splits, shuffle=self.shuffle, random_state=self.random_state
        )
        return folds.split(rows, groups=np.asarray(groups)[rows])


@dataclass(frozen=True)
class PseudoAnomalyScorer:
    """Scorer for ``scoring=`` where no anomaly is known.

    The held-out normal samples are spoilt by
    :func:`~skdeepad.datasets.make_pseudo_anomalies`; the score is the area under the
    ROC curve of what comes out against the samples themselves, averaged over the
    kinds of pseudo-anomalies. Greater is better.

    Parameters
    ----------
    kinds : list or tuple of str, default=None
        The kinds of pseudo-anomalies; None: all that X allows.
    image_shape : (int, int, int) or (int, int), default=None
        (channels, height, width) or (height, width) of one image, where X does not
        tell: rows that are flattened images, or an ambiguous channel axis.
    folder : str or path, default=None
        Where the pseudo-anomalies of image files are kept; None: in a temporary
        folder, until they are scored. See the notes.
    random_state : int, default=0
        Decides on what is drawn at random. An int, so that all candidates see the
        same.

    See Also
    --------
    skdeepad.metrics.anomaly_roc_auc : The scorer to use where anomalies are known.

    Notes
    -----
    It is called as ``scorer(estimator, X, y=None)`` by ``GridSearchCV``,
    ``cross_validate`` and the like. Rows with ``y == -1`` are left out. The estimator
    has a ``decision_function`` or ``score_samples``, higher = more normal.

    The same X gives the same pseudo-anomalies, so that estimators with ``memory=``
    pass them through the network once for all candidates. Image files are known to
    ``memory`` by their path: set `folder`, and they are written once, and found again.
    Of arrays, all kinds lie in memory at once.

    The pseudo-anomalies are meant to rank candidates, not to say how well anomalies
    will be found. How far the ranks can be trusted was measured: docs/selection.md.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.model_selection import GridSearchCV
    >>> from sklearn.svm import OneClassSVM
    >>> from skdeepad import PseudoAnomalyScorer
    >>> X, y = load_digits(return_X_y=True)
    >>> search = GridSearchCV(
    ...     OneClassSVM(nu=0.1),
    ...     {"gamma": [1e-6, 1e-3, 1.0]},
    ...     scoring=PseudoAnomalyScorer(),
    ... )
    >>> search.fit(X[y == 3]).best_params_
    {'gamma': 0.001}
    """

    kinds: Sequence[str] | None = None
    image_shape: tuple[int, ...] | None = None
    folder: str | os.PathLike[str] | None = None
    random_state: int = 0

    def __call__(self, estimator: Any, X: Any, y: ArrayLike | None = None) -> float:
        """Score a fitted estimator.

        Parameters
        ----------
        estimator : estimator
            With a ``decision_function`` or ``score_samples``, higher = more normal.
        X : array-like or sequence of paths
            Held-out samples: whatever the detectors of this package take.
        y : array-like of shape (n_samples,), default=None
            +1 for normal samples, -1 for anomalies, which are left out.

        Returns
        -------
        float
            In [0, 1]: 1 where all pseudo-anomalies are found, 0.5 is chance.

        Raises
        ------
        ValueError
            If X, y or a parameter is not what is described here, or a score is not
            finite.
        OSError
            If image files cannot be read.
        """
        if y is not None:
            X = _safe_indexing(X, np.flatnonzero(~is_anomaly(y)))
        # a classifier's decision_function may be higher for anomalies
        score = getattr(estimator, "score_samples", None) or estimator.decision_function
        with TemporaryDirectory() as temporary:
            made = make_pseudo_anomalies(
                X,
                self.kinds,
                image_shape=self.image_shape,
                folder=self.folder or temporary,
                random_state=self.random_state,
            )
            normal = score(X)
            labels = np.repeat([1, -1], len(normal))
            return float(
                np.mean(
                    [
                        anomaly_roc_auc_score(labels, np.append(normal, score(spoilt)))
                        for spoilt in made.values()
                    ]
                )
            )


def compare_detectors(
    detectors: Mapping[str, Any],
    X_train: Any,
    X_test: Any,
    y_test: ArrayLike,
    *,
    y_train: ArrayLike | None = None,
    kinds_test: ArrayLike | None = None,
    n_seeds: int = 3,
) -> Any:
    """Fit detectors from several seeds, and tell how well each kind of defect is found.

    Parameters
    ----------
    detectors : mapping of str to estimator
        Outlier detectors by name: this package's, pipelines, scikit-learn's. They are
        cloned; every ``random_state`` in them is set to the seed.
    X_train : array-like or sequence of paths
        Training samples, in any form that all of them take.
    X_test : array-like or sequence of paths
        Test samples.
    y_test : array-like of shape (n_test,)
        +1 for normal samples, -1 for anomalies; some of both.
    y_train : array-like of shape (n_train,), default=None
        +1 for normal samples, -1 for known anomalies, for detectors that learn from
        them. None: all are normal.
    kinds_test : array-like of str, shape (n_test,), default=None
        The kind of each anomaly, such as "scratch"; those of normal samples do not
        matter. None: all are of one kind.
    n_seeds : int, default=3
        How often each detector is fitted, with the seeds 0, 1, ...

    Returns
    -------
    pandas.DataFrame
        One row for each detector, seed and kind of anomaly, and one for all kinds.

        detector : str
            Its name.
        seed : int
            The ``random_state``.
        kind : str
            The kind of anomaly; "all" for all of them.
        auroc : float
            `skdeepad.metrics.anomaly_roc_auc_score`, of this kind against the normal
            samples.
        found : float
            Share of the anomalies below the threshold.
        false_alarms : float
            Share of the normal samples below the threshold.
        fit_seconds, score_seconds : float
            Of `X_train` and of all of `X_test`.

        Samples without a score (unreadable files that are skipped) are left out.

    Raises
    ------
    ImportError
        If pandas is not installed.
    ValueError
        If `y_test` has other labels or one kind only, if lengths differ, or if
        `n_seeds` is less than 1.

    See Also
    --------
    skdeepad.inspection.DetectorComparisonDisplay : Draws it.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.ensemble import IsolationForest
    >>> from skdeepad import KNNScorer, compare_detectors
    >>> rng = np.random.default_rng(0)
    >>> X_train, X_test = rng.normal(size=(100, 3)), rng.normal(size=(60, 3))
    >>> y_test = np.where(np.arange(60) < 40, 1, -1)
    >>> X_test[y_test == -1] += 4
    >>> detectors = {"knn": KNNScorer(), "forest": IsolationForest()}
    >>> table = compare_detectors(detectors, X_train, X_test, y_test, n_seeds=2)
    >>> table.groupby("detector", sort=False)["auroc"].mean().round(2).to_dict()
    {'knn': 1.0, 'forest': 1.0}
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError(
            "compare_detectors gives a pandas.DataFrame. Install pandas: "
            "pip install pandas."
        ) from error
    anomalous = is_anomaly(y_test)
    if anomalous.all() or not anomalous.any():
        raise ValueError("y_test must hold normal samples (+1) and anomalies (-1).")
    if n_seeds < 1:
        raise ValueError(f"n_seeds={n_seeds} must be 1 at least.")
    check_consistent_length(anomalous, kinds_test)
    of_kind = {"all": anomalous}
    if kinds_test is not None:
        kinds = np.asarray(kinds_test).astype(str)
        names = np.unique(kinds[anomalous]).tolist()
        of_kind |= {name: anomalous & (kinds == name) for name in names}
    rows = []
    for name, detector in detectors.items():
        for seed in range(n_seeds):
            decision, seconds = _timed_decision(
                _with_seed(detector, seed), X_train, y_train, X_test
            )
            scored = ~np.isnan(decision)
            flagged = decision < 0
            normal = scored & ~anomalous
            for kind, anomalies in of_kind.items():
                found = scored & anomalies
                judged = normal | found
                labels = np.where(anomalous, -1, 1)[judged]
                rows.append(
                    {
                        "detector": name,
                        "seed": seed,
                        "kind": kind,
                        "auroc": anomaly_roc_auc_score(labels, decision[judged]),
                        "found": flagged[found].mean(),
                        "false_alarms": flagged[normal].mean(),
                        **seconds,
                    }
                )
    return pd.DataFrame(rows)


def _with_seed(detector: Any, seed: int) -> Any:
    """Clone a detector, and seed all that is random in it."""
    detector = clone(detector)
    names = [n for n in detector.get_params() if f"__{n}".endswith("__random_state")]
    return detector.set_params(**dict.fromkeys(names, seed))


def _timed_decision(
    detector: Any, X_train: Any, y_train: ArrayLike | None, X_test: Any
) -> tuple[NDArray[np.float64], dict[str, float]]:
    """Fit a detector, and score with it; say how many seconds both take."""
    start = perf_counter()
    detector.fit(X_train, y_train)
    fitted = perf_counter()
    decision = np.asarray(detector.decision_function(X_test), dtype=np.float64)
    seconds = {"fit_seconds": fitted - start, "score_seconds": perf_counter() - fitted}
    return decision, seconds
