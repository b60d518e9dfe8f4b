"""Exported detectors, without torch and scikit-learn.

What `skdeepad.export_onnx` has written is scored by ONNX Runtime, NumPy and Pillow
alone. The same source is the package ``skdeepad_runtime``, which needs nothing else.
"""

from ._detector import ExportedDetector, ModelError, load

__all__ = ["ExportedDetector", "ModelError", "load"]
