"""A fitted detector -> one ONNX file, which `skdeepad.runtime` scores by."""

from ._export import export_onnx
from ._parts import ExportError

__all__ = ["ExportError", "export_onnx"]
