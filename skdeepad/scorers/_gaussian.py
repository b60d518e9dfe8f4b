"""Gaussian density: the Mahalanobis distance to the normal samples."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    _fit_context,
    clone,
)
from sklearn.utils import gen_batches
from sklearn.utils._param_validation import HasMethods, StrOptions
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from ..base import keep_state_on_error
from ._base import (
    ROWS_AT_ONCE,
    Scorer,
    count_copies,
    row_digests,
)

VARIANCE_FLOOR = 1e-9  # GaussianNB's, of the largest variance, for constant features
CONSTANT = 1e-10  # a standard deviation, relative to the mean: less is rounding
SAMPLE_SIZE = 1024  # rows of a stream that are kept to set the threshold by


class Moments:
    """Sums over samples that give their mean, covariance and shrinkage.

    Taken about the mean of the first rows, so that nothing cancels; in float64.
    Rows may come in any number of parts, and the sums come out the same.
    """

    _saved: ClassVar[dict[str, Any]] = {}

    def __init__(self, X: NDArray[Any]) -> None:
        self.origin = X.mean(axis=0, dtype=np.float64)
        d = len(self.origin)
        self.n = 0
        self.first = np.zeros(d)  # sum of z
        self.second = np.zeros((d, d))  # sum of z z'
        self.third = np.zeros(d)  # sum of |z|^2 z
        self.fourth = 0.0  # sum of |z|^4

    def update(self, X: NDArray[Any]) -> Moments:
        """Add rows."""
        for block in gen_batches(len(X), ROWS_AT_ONCE):
            z = X[block] - self.origin
            norms = np.einsum("ij,ij->i", z, z)
            self.n += len(z)
            self.first += z.sum(axis=0)
            self.second += z.T @ z
            self.third += norms @ z
            self.fourth += norms @ norms
        return self

    def merge(self, other: Moments) -> Moments:
        """Add the rows that another has seen."""
        n, s = other.n, other.origin - self.origin  # z of ours is z of theirs + s
        ss = s @ s
        self.n += n
        self.first += other.first + n * s
        self.second += (
            other.second
            + np.outer(other.first, s)
            + np.outer(s, other.first)
            + n * np.outer(s, s)
        )
        self.third += (
            other.third
            + np.trace(other.second) * s
            + 2 * other.second @ s
            + 2 * (other.first @ s) * s
            + ss * (other.first + n * s)
        )
        self.fourth += float(
            other.fourth
            + 4 * other.third @ s
            + 4 * s @ other.second @ s
            + 2 * ss * np.trace(other.second)
            + 4 * ss * (other.first @ s)
            + n * ss**2
        )
        return self

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean of the rows."""
        return self.origin + self.first / self.n

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Maximum likelihood covariance of the rows (divided by n)."""
        shift = self.first / self.n
        return self.second / self.n - np.outer(shift, shift)

    def centred_fourth(self) -> float:
        """Sum of ``|x - mean|^4``, from the sums about the origin."""
        m = self.first / self.n
        mm = m @ m
        return float(
            self.fourth
            - 4 * m @ self.third
            + 4 * m @ self.second @ m
            + 2 * mm * np.trace(self.second)
            - 3 * self.n * mm**2
        )


def ledoit_wolf_shrinkage(moments: Moments, covariance: NDArray[np.float64]) -> float:
    """Shrinkage of Ledoit and Wolf (2004), Lemmas 3.2 to 3.4, about the mean."""
    n, d = moments.n, len(covariance)
    scale = np.trace(covariance) / d
    norm = np.sum(covariance**2)
    spread = norm / d - scale**2  # d^2 of the paper: distance from scale * I
    error = (moments.centred_fourth() / n - norm) / (n * d)  # b^2: error of S itself
    return float(np.clip(error / spread, 0, 1)) if spread > 0 and error > 0 else 0.0


def oas_shrinkage(moments: Moments, covariance: NDArray[np.float64]) -> float:
    """Oracle approximating shrinkage of Chen et al. (2010), as scikit-learn has it."""
    n, d = moments.n, len(covariance)
    alpha = np.mean(covariance**2)
    squared_scale = (np.trace(covariance) / d) ** 2
    denominator = (n + 1) * (alpha - squared_scale / d)
    if denominator <= 0:
        return 1.0
    return float(min((alpha + squared_scale) / denominator, 1.0))


class RowSample:
    """A bounded sample of a stream's rows: those of the smallest digests.

    Every distinct row is as likely to be kept as any other, whatever the order in
    which rows come and in how many parts.
    """

    _saved: ClassVar[dict[str, Any]] = {}

    def __init__(self, X: NDArray[Any]) -> None:
        self.rows = X[:0]
        self.digests = np.empty(0, dtype=np.uint64)
        self.copies = np.empty(0, dtype=np.intp)  # how often each row has come

    def update(
        self,
        X: NDArray[Any],
        digests: NDArray[np.uint64],
        copies: NDArray[np.intp] | None = None,
    ) -> RowSample:
        """Let rows into the sample, each for as many copies (None: one)."""
        if copies is None:
            copies = np.ones(len(X), dtype=np.intp)
        before = getattr(self, "copies", np.ones_like(self.digests))  # as in 0.1.0
        digests, first, inverse = np.unique(
            np.concatenate([self.digests, digests]),
            return_index=True,
            return_inverse=True,
        )
        counts = np.bincount(inverse, np.concatenate([before, copies]))
        first = first[:SAMPLE_SIZE]
        self.digests = digests[:SAMPLE_SIZE]
        self.copies = counts[:SAMPLE_SIZE].astype(np.intp)
        self.rows = np.concatenate([self.rows, X])[first]
        return self


def remaining(loss: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give what a loss leaves of 1; the guard is against rounding."""
    return np.maximum(1 - loss, np.finfo(np.float64).eps)


def can_update(scorer: Any) -> bool:
    """Tell whether the covariance can be learnt part by part."""
    if isinstance(scorer.covariance, str):
        return True
    raise AttributeError(
        f"covariance={scorer.covariance!r} cannot be learnt in parts. Use "
        "'ledoit_wolf', 'oas', 'empirical' or 'diagonal'."
    )


class GaussianScorer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Scorer):
    """Mahalanobis distance to the normal samples.

    ``sqrt((x - mu)' Sigma^-1 (x - mu))`` for the mean ``mu`` and a covariance
    ``Sigma`` of the training samples, as [1]_ scores deep features.

    Parameters
    ----------
    covariance : {"ledoit_wolf", "oas", "empirical", "diagonal"} or covariance \
estimator, default="ledoit_wolf"
        How the covariance is estimated. "ledoit_wolf" [2]_ and "oas" [3]_ shrink it
        towards a multiple of the identity and can be inverted however few samples
        there are; "empirical" needs more samples than features; "diagonal" takes
        the features for uncorrelated. Or any scikit-learn covariance object, such
        as ``MinCovDet()``, of which a clone is fitted.

    Attributes
    ----------
    location_ : ndarray of float64, shape (n_features,)
        The mean.
    shrinkage_ : float
        The weight of the identity in the covariance, in [0, 1].
    n_samples_seen_ : int
        Number of normal samples trained on, over all calls of `partial_fit`.
    offset_ : float
        The threshold on ``score_samples``: the `contamination` quantile of the
        training samples' leave-one-out scores.

    See Also
    --------
    skdeepad.detectors.MahalanobisFeatureScorer : The same on stages of a backbone.

    Notes
    -----
    Leave-one-out scores are exact for the mean and the sample covariance
    (a rank-one downdate, for all copies of a sample together); the shrinkage and its
    scale are held fixed. For a covariance object, and with `groups`, they come from
    ten-fold cross-fitting instead.

    Three samples are needed at least, so that two are left that vary. With so few,
    thresholds are far off, as one of two deviations is the whole variance.

    "empirical" and "diagonal" do not depend on the features' scales. The shrunk
    covariances do, by definition: all features get the same share of their mean
    variance, in which those of small scale may drown. Scale features that are in
    different units first.

    Constant features get a variance of 1e-9 of the largest (as in scikit-learn's
    ``GaussianNB``): a sample that moves in them is far from normal. So do directions
    in which features of unit variance do not vary.

    References
    ----------
    .. [1] O. Rippel, P. Mertens, D. Merhof, "Modeling the Distribution of Normal
       Data in Pre-Trained Deep Features for Anomaly Detection", ICPR 2020.
    .. [2] O. Ledoit, M. Wolf, "A Well-Conditioned Estimator for Large-Dimensional
       Covariance Matrices", Journal of Multivariate Analysis 88(2), 2004.
    .. [3] Y. Chen et al., "Shrinkage Algorithms for MMSE Covariance Estimation",
       IEEE Transactions on Signal Processing 58(10), 2010.

    Examples
    --------
    >>> import numpy as np
    >>> from skdeepad.scorers import GaussianScorer
    >>> X = np.random.default_rng(0).normal(size=(500, 2)) * [1, 10]
    >>> scorer = GaussianScorer(covariance="empirical").fit(X)
    >>> scorer.score_samples([[3.0, 0.0], [0.0, 3.0]]).round(1)
    array([-3.1, -0.3])
    """

    covariance: Any = field(default="ledoit_wolf", kw_only=False)

    _saved: ClassVar = {"covariance": BaseEstimator, "_stream": (Moments, RowSample)}

    _parameter_constraints: ClassVar = {
        "covariance": [
            StrOptions({"ledoit_wolf", "oas", "empirical", "diagonal"}),
            HasMethods(["fit", "mahalanobis"]),
        ],
    }

    @property
    def _n_features_out(self) -> int:
        return len(self.location_)

    def _min_samples(self) -> int:
        return 3  # two that vary, when the other is left out

    def _learn(self, X: NDArray[Any], digests: NDArray[np.uint64]) -> None:
        self.__dict__.pop("_stream", None)
        if isinstance(self.covariance, str):
            self._absorb(X, digests)
            return
        X = X.astype(np.float64)
        fitted = clone(self.covariance).fit(X)
        self.n_samples_seen_ = len(X)
        self.shrinkage_ = float(getattr(fitted, "shrinkage_", 0.0))
        variances, axes = np.linalg.eigh(fitted.covariance_)
        floor = VARIANCE_FLOOR * variances.max()
        self._set_whitening(fitted.location_, np.maximum(variances, floor), axes)

    @available_if(can_update)
    @keep_state_on_error
    @_fit_context(prefer_skip_nested_validation=False)
    def partial_fit(self, X: ArrayLike, y: ArrayLike | None = None) -> GaussianScorer:
        """Learn from one part of a stream of samples, after `fit` or from nothing.

        The mean and the covariance come out as if all parts had been fitted at
        once. A bounded sample of 1,024 rows is kept to set the threshold by, and
        only these rows have leave-one-out scores.

        Returns
        -------
        GaussianScorer
            The scorer itself.

        Raises
        ------
        AttributeError
            If `covariance` is an object: it would need all samples at once.
        ValueError
            If X is not a finite numeric matrix with the features seen before.
        """
        reset = not hasattr(self, "_stream")
        X, _ = self._training_rows(X, y, None, reset=reset)
        self._absorb(X, row_digests(X))
        return self._finish_parts()

    @available_if(can_update)
    @keep_state_on_error
    def merge(self, others: Iterable[GaussianScorer]) -> GaussianScorer:
        """Learn what others have learnt, each from its part of the samples.

        The mean and the covariance come out as if all parts had been fitted at
        once, so that parts may be fitted on different machines. As after
        `partial_fit`, the threshold is set by 1,024 rows of all parts.

        Parameters
        ----------
        others : iterable of GaussianScorer
            Fitted scorers, which stay as they are.

        Returns
        -------
        GaussianScorer
            The scorer itself.

        Raises
        ------
        AttributeError
            If `covariance` is an object: it would need all samples at once.
        ValueError
            If one was fitted to other features, or by a covariance object.

        Examples
        --------
        >>> import numpy as np
        >>> from skdeepad.scorers import GaussianScorer
        >>> X = np.random.default_rng(0).normal(size=(500, 2))
        >>> first, second = (GaussianScorer().fit(part) for part in np.split(X, 2))
        >>> first.merge([second]).location_.round(9) == X.mean(axis=0).round(9)
        array([ True,  True])
        """
        check_is_fitted(self)
        others = list(others)
        for i, other in enumerate(others):
            check_is_fitted(other)
            if other.n_features_in_ != self.n_features_in_ or not isinstance(
                other.covariance, str
            ):
                raise ValueError(
                    f"others[{i}] ({other!r} of {other.n_features_in_} features) "
                    f"cannot be merged into {self!r} of {self.n_features_in_} "
                    "features. All must be fitted to the same features, and none "
                    "with a covariance object."
                )
        self._join(others)
        return self._finish_parts()

    def _finish_parts(self) -> GaussianScorer:
        """Set the threshold by the rows that were kept."""
        self._set_threshold(self._stream[1].digests, self._sample_scores())
        return self

    def _absorb(self, X: NDArray[Any], digests: NDArray[np.uint64]) -> None:
        """Learn from some rows more; the first ones start anew."""
        if hasattr(self, "_stream"):
            moments, sample = copy.deepcopy(self._stream)
        else:
            moments, sample = Moments(X), RowSample(X)
        self._stream: Any = moments.update(X), sample.update(X, digests)
        self._set_gaussian(moments)

    def _join(self, others: Iterable[GaussianScorer]) -> None:
        """Learn what others have learnt."""
        moments, sample = copy.deepcopy(self._stream)
        for theirs, kept in (other._stream for other in others):
            moments.merge(theirs)
            sample.update(kept.rows, kept.digests, getattr(kept, "copies", None))
        self._stream = moments, sample
        self._set_gaussian(moments)

    def _sample_scores(self) -> NDArray[np.float64]:
        """Leave-one-out scores of the rows that were kept."""
        sample = self._stream[1]
        return self._scores_without(sample.rows, sample.copies)

    def _set_gaussian(self, moments: Moments) -> None:
        """Estimate the covariance from the moments, and its inverse root."""
        covariance, mean = moments.covariance, moments.mean
        n, d = moments.n, len(covariance)
        variances = np.diag(covariance).copy()
        if variances.max() <= 0:
            raise ValueError(
                "All training samples are identical, so their covariance is zero. "
                "Check X."
            )
        if self.covariance == "empirical" and n <= d + 1:
            raise ValueError(
                f"covariance='empirical' needs more than n_features + 1 = {d + 1} "
                f"samples, got n_samples={n}. Use 'ledoit_wolf', 'oas' or "
                "'diagonal', or more samples."
            )
        shrinkage = 0.0
        if self.covariance == "ledoit_wolf":
            shrinkage = ledoit_wolf_shrinkage(moments, covariance)
        elif self.covariance == "oas":
            shrinkage = oas_shrinkage(moments, covariance)
        self.n_samples_seen_ = n
        self.shrinkage_ = shrinkage
        self._ridge = shrinkage * variances.mean()
        if shrinkage:
            variances, axes = np.linalg.eigh(covariance)
            shrunk = (1 - shrinkage) * np.maximum(variances, 0) + self._ridge
            self._set_whitening(mean, shrunk, axes)
            return
        # on each feature's own scale
        constant = variances <= (CONSTANT * mean) ** 2
        variances[constant] = VARIANCE_FLOOR * variances.max()
        if self.covariance == "diagonal":
            self._set_whitening(mean, variances, None)
            return
        scale = np.sqrt(variances)
        correlation = covariance / np.outer(scale, scale)
        np.fill_diagonal(correlation, 1)
        variances, axes = np.linalg.eigh(correlation)
        floor = VARIANCE_FLOOR * variances.max()
        self._set_whitening(mean, np.maximum(variances, floor), axes, scale)

    def _set_whitening(
        self,
        location: NDArray[np.float64],
        variances: NDArray[np.float64],
        axes: NDArray[np.float64] | None,
        scale: NDArray[np.float64] | float = 1.0,
    ) -> None:
        """Keep the mean and an inverse root of the covariance.

        `variances` are those along the principal axes, from the smallest, of features
        divided by their `scale`; or those of the features themselves where `axes` is
        None: the covariance is diagonal.
        """
        self.location_ = location
        if axes is None:
            self._variances, self._whitening = variances, 1 / np.sqrt(variances)
            return
        self._variances = variances[::-1]
        whitening = axes[:, ::-1] / np.sqrt(self._variances)
        self._whitening = whitening / np.reshape(scale, (-1, 1))

    def _whiten(self, X: NDArray[Any]) -> NDArray[np.float64]:
        centred = X - self.location_
        if self._whitening.ndim == 1:
            return centred * self._whitening
        return centred @ self._whitening

    def _score(self, X: NDArray[Any]) -> NDArray[np.float64]:
        squared = np.empty(len(X))
        for block in gen_batches(len(X), ROWS_AT_ONCE):
            squared[block] = np.sum(self._whiten(X[block]) ** 2, axis=1)
        return -np.sqrt(squared)

    def _slopes(self, X: NDArray[Any]) -> NDArray[np.float64]:
        white = self._whiten(X)
        lengths = np.linalg.norm(white, axis=1, keepdims=True)
        white = white / np.where(lengths == 0, 1, lengths)
        whitening = self._whitening
        return white * whitening if whitening.ndim == 1 else white @ whitening.T

    def _leave_one_out(
        self, X: NDArray[Any], digests: NDArray[np.uint64]
    ) -> NDArray[np.float64]:
        if not isinstance(self.covariance, str):
            return super()._leave_one_out(X, digests)
        return self._scores_without(X, count_copies(digests))

    def _scores_without(
        self, X: NDArray[Any], copies: NDArray[np.intp]
    ) -> NDArray[np.float64]:
        """Scores of training rows, each under the Gaussian without its copies."""
        scores = np.empty(len(X))
        for m in np.unique(copies):
            out = np.flatnonzero(copies == m)
            for block in gen_batches(len(out), ROWS_AT_ONCE):
                rows = out[block]
                scores[rows] = self._scores_without_copies(X[rows], m)
        return scores

    def _scores_without_copies(self, X: NDArray[Any], m: int) -> NDArray[np.float64]:
        stretch, loss, rescaled = self._without(m)
        r2 = self._whiten(X) ** 2 * self._variances  # squares of r along the axes
        if self._whitening.ndim == 1:
            without = np.maximum(rescaled - loss * r2, VARIANCE_FLOOR * rescaled)
            return -stretch * np.sqrt((r2 / without).sum(axis=1))
        q = (r2 / rescaled).sum(axis=1)
        return -stretch * np.sqrt(q / remaining(loss * q))

    def _without(self, m: int) -> tuple[float, float, NDArray[np.float64]]:
        """Tell what leaving m copies of a row x out changes.

        The scatter about the mean loses m n / (n - m) r r' for r = x - mu, and x lies
        n / (n - m) r from the new mean. Given are n / (n - m); what the covariance
        loses of r r'; and its variances with n - m in the place of n, x not yet taken
        out.
        """
        n = self.n_samples_seen_
        others = max(n - m, 1)
        stretch = n / others
        loss = (1 - self.shrinkage_) * stretch * m / others
        return stretch, loss, stretch * (self._variances - self._ridge) + self._ridge

    def _whiten_without(
        self, X: NDArray[Any], m: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Whiten training rows, for distances from one of which m copies are left out.

        The squared distance of x from another row v away is then
        ``|w|^2 + leverage (u'w)^2``, with u and w the whitened x and v: Sherman and
        Morrison.
        """
        _, loss, rescaled = self._without(m)
        rows = self._whiten(X) * np.sqrt(self._variances / rescaled)
        q = np.sum(rows**2, axis=1)
        return rows, loss / remaining(loss * q)

    def transform(self, X: ArrayLike) -> NDArray[np.float64]:
        """Whiten samples: zero mean and unit covariance on the normal ones.

        The norm of a whitened sample is its Mahalanobis distance.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples.

        Returns
        -------
        ndarray of float64, shape (n_samples, n_features)
            Whitened samples, along the principal axes, widest first (of features of
            unit variance for "empirical"; along the features themselves for
            "diagonal").
        """
        check_is_fitted(self)
        return self._whiten(self._checked(X, reset=False))
