"""What goes with good detection."""

from __future__ import annotations

from typing import Any, Self

from ._display import Display

# Figures 3, 4 and 5 of the poster: column -> label
REPRESENTATION_COLUMNS = {
    "mahalanobis_auroc": "Mahalanobis, AUROC",
    "separability": "separability, balanced accuracy",
    "brittleness": "brittleness",
}


class RepresentationDisplay(Display):
    """What goes with good detection: three scatter plots of representations.

    Detection by knowledge distillation against the Mahalanobis distance, against
    separability and against brittleness: Figures 3 to 5 of [1]_, with the correlations
    over all representations.

    Parameters
    ----------
    table : pandas.DataFrame
        What `skdeepad.representation.compare_representations` gives, with anomalies.

    Attributes
    ----------
    axes_ : ndarray of matplotlib.axes.Axes, shape (3,)
        The plots.

    References
    ----------
    .. [1] K. T. Mai, T. Davies, L. D. Griffin, "Brittle Features May Help Anomaly
       Detection", arXiv:2104.10453, 2021.

    Examples
    --------
    >>> import pandas as pd
    >>> from skdeepad.inspection import RepresentationDisplay
    >>> table = pd.DataFrame({
    ...     "backbone": ["a", "a", "b"],
    ...     "kd_auroc": [0.9, 0.8, 0.7],
    ...     "mahalanobis_auroc": [0.95, 0.9, 0.7],
    ...     "separability": [0.99, 0.98, 0.99],
    ...     "brittleness": [20.0, 5.0, 3.0],
    ... })
    >>> RepresentationDisplay(table=table).plot().axes_.shape
    (3,)
    """

    def __init__(self, *, table: Any) -> None:
        self.table = table

    def plot(self, axes: Any = None) -> Self:
        """Draw.

        Raises
        ------
        ValueError
            If the table has no column of detection: it was made without anomalies.
        """
        if "kd_auroc" not in self.table:
            raise ValueError(
                "table has no column 'kd_auroc'. Compute it with anomalies: "
                "compare_representations(backbones, X, X_anomalous)."
            )
        axes = self.axes_ = self._place(axes, (3,), figsize=(12, 4), sharey=True)
        for ax, column in zip(axes, REPRESENTATION_COLUMNS, strict=True):
            for name, group in self.table.groupby("backbone", sort=False):
                ax.scatter(group[column], group["kd_auroc"], label=name)
            pair = self.table[[column, "kd_auroc"]]
            linear, ranks = (
                pair.corr(method).iloc[0, 1] for method in ("pearson", "spearman")
            )
            ax.set_title(f"Pearson {linear:.2f}, Spearman {ranks:.2f}", fontsize=10)
            ax.set_xlabel(REPRESENTATION_COLUMNS[column])
        axes[2].set_xscale("log")
        axes[0].set_ylabel("knowledge distillation, AUROC")
        axes[0].legend(fontsize=7)
        return self
