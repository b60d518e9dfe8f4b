"""Pictures: maps over their images, scores, curves and comparisons.

After scikit-learn's displays: ``from_estimator`` and ``from_predictions`` make and draw
one, ``plot`` draws it anew.
"""

from ._comparison import DetectorComparisonDisplay
from ._curves import AnomalyPrecisionRecallDisplay, AnomalyRocCurveDisplay
from ._histogram import ScoreHistogramDisplay
from ._loss_curve import LossCurveDisplay
from ._maps import AnomalyMapDisplay
from ._report import report
from ._representation import RepresentationDisplay

__all__ = [
    "AnomalyMapDisplay",
    "AnomalyPrecisionRecallDisplay",
    "AnomalyRocCurveDisplay",
    "DetectorComparisonDisplay",
    "LossCurveDisplay",
    "RepresentationDisplay",
    "ScoreHistogramDisplay",
    "report",
]
