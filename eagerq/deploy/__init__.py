"""Floor 7: what leaves PyTorch."""

from eagerq.deploy.onnx import export_onnx

__all__ = ["export_onnx"]
