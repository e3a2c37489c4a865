"""Floor 7: what leaves PyTorch."""

from eagerq.deploy.kernels import Export, Kernel
from eagerq.deploy.onnx import export_onnx
from eagerq.deploy.verification import Verification, verify_deployment

__all__ = ["Export", "Kernel", "Verification", "export_onnx", "verify_deployment"]
