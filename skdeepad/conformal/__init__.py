"""Error rates: p-values, selections, dirty training data, drift."""

from ._detector import ConformalDetector
from ._drift import DriftMonitor
from ._robust import RobustDetector
from ._selection import false_alarm_interval, select_anomalies

__all__ = [
    "ConformalDetector",
    "DriftMonitor",
    "RobustDetector",
    "false_alarm_interval",
    "select_anomalies",
]
