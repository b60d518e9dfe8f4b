"""Several detectors side by side."""

from __future__ import annotations

from typing import Any, Self

from ._display import Display

COLUMNS = ["detector", "seed", "kind", "auroc", "found", "false_alarms"]
COLUMNS += ["fit_seconds", "score_seconds"]


class DetectorComparisonDisplay(Display):
    """Detectors compared over seeds and kinds of defects: three plots.

    The AUROC on each kind of defect; the share flagged, of normal samples (false
    alarms) and of each kind; and the time. A dot is one seed, a bar the mean.

    Parameters
    ----------
    table : pandas.DataFrame
        What `skdeepad.model_selection.compare_detectors` gives.

    Attributes
    ----------
    axes_ : ndarray of matplotlib.axes.Axes, shape (3,)
        The plots.

    Examples
    --------
    >>> import numpy as np
    >>> from skdeepad import KNNScorer, compare_detectors
    >>> from skdeepad.inspection import DetectorComparisonDisplay
    >>> rng = np.random.default_rng(0)
    >>> X_train, X_test = rng.normal(size=(100, 3)), rng.normal(size=(60, 3))
    >>> y_test = np.where(np.arange(60) < 40, 1, -1)
    >>> detectors = {k: KNNScorer(n_neighbors=int(k)) for k in "12"}
    >>> table = compare_detectors(detectors, X_train, X_test, y_test, n_seeds=1)
    >>> DetectorComparisonDisplay(table=table).plot().axes_.shape
    (3,)
    """

    def __init__(self, *, table: Any) -> None:
        self.table = table

    def plot(self, axes: Any = None) -> Self:
        """Draw.

        Raises
        ------
        ValueError
            If the table lacks a column.
        """
        table = self.table
        if missing := [name for name in COLUMNS if name not in table]:
            raise ValueError(
                f"table has no column {', '.join(missing)}; pass the table that "
                "compare_detectors gives."
            )
        kinds = list(dict.fromkeys(table["kind"]))
        self.axes_ = self._place(
            axes,
            (3,),
            figsize=(11 + 0.6 * len(kinds), 4),
            width_ratios=[len(kinds) + 1, len(kinds) + 2, 3],
        )
        by_kind = [table[table["kind"] == kind] for kind in kinds]
        aurocs = [(part, "auroc") for part in by_kind]
        flagged = [(by_kind[0], "false_alarms"), *((part, "found") for part in by_kind)]
        seconds = [(by_kind[0], "fit_seconds"), (by_kind[0], "score_seconds")]
        _draw_groups(self.axes_[0], kinds, aurocs)
        _draw_groups(self.axes_[1], ["false alarms", *kinds], flagged)
        _draw_groups(self.axes_[2], ["fit", "score"], seconds)
        lowest = min(0.5, float(table["auroc"].min()))
        self.axes_[0].set(title="AUROC", ylim=(lowest, 1.01))
        self.axes_[1].set(title="flagged: good, and each kind found", ylim=(0, 1.01))
        self.axes_[2].set(title="seconds")
        self.axes_[2].legend(fontsize=8)
        return self


def _draw_groups(ax: Any, labels: list[str], groups: list[tuple[Any, str]]) -> None:
    """Draw a group of bars for each label, one for each detector, with its seeds."""
    for place, (table, column) in enumerate(groups):
        by_name = table.groupby("detector", sort=False)[column]
        width = 0.8 / by_name.ngroups
        for k, (name, values) in enumerate(by_name):
            x = place - 0.4 + (k + 0.5) * width
            label = name if place == 0 else None
            ax.bar(x, values.mean(), 0.9 * width, color=f"C{k}", alpha=0.5, label=label)
            ax.plot([x] * len(values), values, ".", color=f"C{k}", markersize=5)
    angle = 0 if len(labels) <= 3 else 30
    ax.set_xticks(range(len(labels)), labels, rotation=angle, fontsize=8)
