"""Is the line still the one that was trained on? A test that never stops."""

from __future__ import annotations

import bisect
from dataclasses import field
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import laplace
from scipy.special import logsumexp
from sklearn.base import BaseEstimator, MetaEstimatorMixin, _fit_context
from sklearn.utils import check_random_state
from sklearn.utils._optional_dependencies import check_matplotlib_support
from sklearn.utils._param_validation import HasMethods, Interval
from sklearn.utils.validation import check_is_fitted

from ..base import draw_seed, keep_state_on_error, known_normal, seeded_clone
from ..inputs import Vectors, check_inputs, chunks, load_batches
from ..parameters import ParametersMixin

SIDE = 128  # pixels to which images are brought to be measured
BATCH = 32
EXPONENTS = np.array([0.25, 0.5, 0.75])  # of the bets
N_RECENT = 100  # samples that `report` compares with the training samples


class DriftMonitor(ParametersMixin, MetaEstimatorMixin, BaseEstimator):
    """Watch whether new samples are still like the training samples.

    Each new score is compared with the held-out scores of the training samples and
    with all scores since, and so are an image's brightness, sharpness and size. As long
    as all of them are exchangeable, the ranks are uniform random numbers, and
    nobody who bets on them can expect to win [1]_. The alarm goes off when bets on low
    and on high ranks have won 1 / alpha times their stake: the probability that
    it ever does, however long the stream, is at most alpha (Ville's inequality).

    Parameters
    ----------
    estimator : detector
        A detector with held-out scores: any of this package, or any other
        in a `ConformalDetector`. Put a fitted one in
        :class:`~sklearn.frozen.FrozenEstimator`, and it is not fitted again.
    alpha : float, default=0.01
        The probability of a false alarm over the whole stream, in (0, 1).
    random_state : int, RandomState instance or None, default=None
        Breaks ties between scores, and seeds what in the estimator has a
        `random_state` that is None.

    Attributes
    ----------
    estimator_ : detector
        The fitted detector.
    signals_ : tuple of str
        What is watched: "score"; of images also "brightness", "sharpness" and "size".
    history_ : ndarray of float64, shape (n_updates, n_signals)
        After each sample, the decimal logarithm of what the bets on each signal have
        made of a stake of 1.
    alarm_ : bool
        Whether there has been an alarm. It stays; `fit` starts anew.
    alarm_at_ : int or None
        The position in the stream of the sample at which the alarm went off.
    n_features_in_ : int
        Number of columns seen in `fit`, where X was 2-D.
    feature_names_in_ : ndarray of str
        Names of the columns, where X had them.

    See Also
    --------
    ConformalDetector : Held-out scores for any detector.

    Notes
    -----
    With p the smoothed conformal p-value of a sample among all before it, a bet
    multiplies its capital by ``e p^(e - 1)`` or ``e (1 - p)^(e - 1)``, for e of 0.25,
    0.5 and 0.75. A mixture of fixed power bets was chosen because it needs no tuning,
    and wins fastest where a shift is large: p-values near 0 or 1 multiply capital
    without limit, while the linear bets of the "simple jumper" multiply it by 1.5 at
    most. Part of the stake is kept, and put on the bets bit by bit
    (``1 / log2(t + 2)`` of it is left after t samples), so that a change after a long
    quiet time is found as well. What must reach ``1 / alpha`` is the mean over signals.

    The bound is exact for brightness, sharpness and size, and for scores of detectors
    whose held-out scores are exchangeable with new ones (see ``p_values`` of the
    detector). Related samples (a video) are not exchangeable, and set the alarm off.

    The state is in the attributes: a monitor that was saved, by pickle or
    `skdeepad.save`, goes on after a restart where it was.

    References
    ----------
    .. [1] V. Vovk et al., "Testing Randomness Online", Statistical Science 36(4), 2021.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.frozen import FrozenEstimator
    >>> from skdeepad import KNNScorer
    >>> from skdeepad.conformal import DriftMonitor
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(200, 5))
    >>> detector = KNNScorer().fit(X)
    >>> monitor = DriftMonitor(FrozenEstimator(detector), random_state=0).fit(X)
    >>> monitor.update(rng.normal(size=(100, 5))).alarm_
    False
    >>> monitor.update(1.5 * rng.normal(size=(100, 5))).alarm_
    True
    """

    estimator: Any = field(kw_only=False)
    alpha: float = 0.01
    random_state: int | np.random.RandomState | None = None

    _parameter_constraints: ClassVar = {
        "estimator": [HasMethods(["fit", "score_samples"])],
        "alpha": [Interval(Real, 0, 1, closed="neither")],
        "random_state": ["random_state"],
    }

    _saved: ClassVar = {"estimator": BaseEstimator, "estimator_": BaseEstimator}

    @keep_state_on_error
    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: Any, y: ArrayLike | None = None) -> Self:
        """Fit the detector, and learn what training samples are like.

        Parameters
        ----------
        X : array-like or sequence of paths
            Training samples, in any form that the detector takes.
        y : array-like of shape (n_samples,), default=None
            +1 for normal samples, -1 for known anomalies.

        Returns
        -------
        self : object
            The monitor, at the start of a stream.

        Raises
        ------
        ValueError
            If X or y is nothing that the detector takes, or it keeps no held-out
            scores.
        """
        rng = check_random_state(self.random_state)
        self.estimator_ = seeded_clone(self.estimator, rng).fit(X, y)
        for name in ("n_features_in_", "feature_names_in_"):
            self.__dict__.pop(name, None)
            if hasattr(self.estimator_, name):
                setattr(self, name, getattr(self.estimator_, name))
        held_out = getattr(self.estimator_, "held_out_scores_", None)
        if held_out is None:
            raise ValueError(
                f"estimator={self.estimator!r} keeps no held-out scores. Wrap it in a "
                "ConformalDetector, or fit it again with a contamination."
            )
        self._pools = {"score": np.sort(held_out)}
        for name, values in self._measure(X).items():
            values = values[known_normal(y, len(values)) & ~np.isnan(values)]
            self._pools[name] = np.sort(values)
        self.signals_ = tuple(self._pools)
        self._training = {
            name: np.quantile(pool, [0.05, 0.5, 0.95])
            for name, pool in self._pools.items()
        }
        self._capital = np.full((len(self.signals_), 2 * len(EXPONENTS)), -np.inf)
        self._recent = np.empty((0, len(self.signals_)))
        self._rng = np.random.RandomState(draw_seed(rng))
        self.history_ = np.empty((0, len(self.signals_)))
        self.alarm_ = False
        self.alarm_at_: int | None = None
        return self

    def _measure(self, X: Any) -> dict[str, NDArray[np.float64]]:
        return measure_images(X, getattr(self.estimator_, "image_shape", None))

    @keep_state_on_error
    def update(self, X: Any) -> Self:
        """Watch the next samples of the stream.

        Parameters
        ----------
        X : array-like or sequence of paths
            New samples in the order in which they came, one at least, in any form that
            `fit` takes. Files that cannot be read, and are skipped, do not count.

        Returns
        -------
        self : object
            The monitor; see `alarm_`.

        Raises
        ------
        ValueError
            If X is nothing that the detector takes.
        """
        check_is_fitted(self)
        scores = np.asarray(self.estimator_.score_samples(X), dtype=np.float64)
        found = np.column_stack([scores, *self._measure(X).values()])
        found = found[~np.isnan(found).any(axis=1)]
        pools = [pool.tolist() for pool in self._pools.values()]
        draws = self._rng.uniform(size=found.shape)
        p = [
            [_smoothed_p_value(*of_one) for of_one in zip(pools, *row, strict=True)]
            for row in zip(found, draws, strict=True)
        ]
        n_before = len(self.history_)
        history = self._bet(np.reshape(p, found.shape)) / np.log(10)
        self._pools = dict(zip(self._pools, map(np.array, pools), strict=True))
        self._recent = np.concatenate([self._recent, found])[-N_RECENT:]
        self.history_ = np.concatenate([self.history_, history])
        over = np.flatnonzero(_mean(history) >= -np.log10(self.alpha))
        if len(over) and not self.alarm_:
            self.alarm_, self.alarm_at_ = True, n_before + int(over[0])
        return self

    def _bet(self, p: NDArray[np.float64]) -> NDArray[np.float64]:
        """Bet on p-values, one row after the other; give the logarithms of capital."""
        if not len(p):
            return p
        t = len(self.history_) + np.arange(len(p) + 1)
        left = 1 / np.log2(t + 2)  # of the stake
        stakes = (left[:-1] - left[1:]) / (2 * len(EXPONENTS))
        powers = (EXPONENTS - 1) * np.log(np.stack([p, 1 - p]))[..., None]
        growth = np.concatenate([*(powers + np.log(EXPONENTS))], axis=-1)
        total = np.cumsum(growth, axis=0)
        # each stake grows from the step on in which it is put on the bets
        since = np.log(stakes)[:, None, None] - (total - growth)
        started = np.logaddexp.accumulate(since, axis=0)
        capital = total + np.logaddexp(self._capital, started)
        self._capital = capital[-1]
        kept = np.log(left[1:])[:, None]
        return np.logaddexp(kept, np.asarray(logsumexp(capital, axis=2)))

    def report(self) -> str:
        """Say in words how recent samples differ from the training samples.

        Returns
        -------
        str
            One line for the alarm, and one for each signal: the median of the last 100
            samples, what it was in training, and the evidence for a change.
        """
        check_is_fitted(self)
        n = len(self.history_)
        lines = [f"{n} samples: no alarm."]
        if self.alarm_:
            lines = [f"{n} samples: alarm at sample {self.alarm_at_}."]
        for i, name in enumerate(self.signals_ if n else ()):
            low, middle, high = self._training[name]
            lines.append(
                f"{name}: {np.median(self._recent[:, i]):.4g}, in training "
                f"{middle:.4g} ({low:.4g} to {high:.4g}); evidence "
                f"10^{self.history_[-1, i]:.1f}"
            )
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """Draw the evidence for a change along the stream, and where the alarm is.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, default=None
            Where to draw. None: on a new figure.

        Returns
        -------
        matplotlib.axes.Axes
            Where it is drawn.

        Raises
        ------
        ImportError
            If matplotlib is not installed: ``pip install "skdeepad[plot]"``.
        """
        check_is_fitted(self)
        check_matplotlib_support("DriftMonitor.plot")
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        if len(self.signals_) > 1:
            for name, line in zip(self.signals_, self.history_.T, strict=True):
                ax.plot(line, lw=1, label=name)
        ax.plot(_mean(self.history_), color="black", label="mean")
        ax.axhline(-np.log10(self.alpha), color="red", ls="--", label="alarm")
        ax.set(xlabel="sample", ylabel="evidence for a change (log10)")
        ax.legend(loc="upper left")
        return ax


def _smoothed_p_value(pool: list[float], value: float, u: float) -> float:
    """Rank a value among all before it, ties at random, and put it among them."""
    below, up_to = bisect.bisect_left(pool, value), bisect.bisect_right(pool, value)
    p = (below + u * (up_to - below + 1)) / (len(pool) + 1)
    pool.insert(up_to, value)
    return float(np.clip(p, 1e-12, 1 - 1e-12))


def _mean(history: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average signals, whose decimal logarithms are given."""
    natural = logsumexp(history * np.log(10), axis=1, b=1 / history.shape[1])
    return np.asarray(natural) / np.log(10)


def measure_images(
    X: Any, image_shape: tuple[int, ...] | None = None
) -> dict[str, NDArray[np.float64]]:
    """Measure what images look like, whatever is in them; nothing of vectors.

    Brightness is the mean, in [0, 1]. Sharpness is the standard deviation of the
    Laplacian, divided by that of the image, at 128 x 128 pixels. Size is the square
    root of the number of pixels. They are NaN for files that cannot be read.
    """
    inputs: Any = check_inputs(
        BaseEstimator(), X, vectors=None, image_shape=image_shape, reset=True
    )
    if type(inputs) is Vectors:
        return {}
    n = len(inputs)
    measured = {
        name: np.full(n, np.nan) for name in ("brightness", "sharpness", "size")
    }
    indices = chunks(np.arange(n), BATCH)
    for batch in load_batches(inputs, indices, (SIDE, SIDE), None):
        images = () if batch.values is None else batch.values
        for i, image in zip(batch.index, images, strict=True):
            grey = image.mean(dim=0).double().numpy()
            measured["brightness"][i] = grey.mean()
            contrast = max(float(grey.std()), 1e-6)
            measured["sharpness"][i] = laplace(grey).std() / contrast
            measured["size"][i] = np.sqrt(np.prod(inputs.size(i), dtype=np.float64))
    return measured
