"""The four layers: nn (float), nn.intrinsic (float fused), nn.qat (QAT), nn.intrinsic.qat (QAT fused)."""

from eagerq.nn.modules import Add, Conv2dSame, FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d

__all__ = ["Add", "Conv2dSame", "FrozenBatchNorm1d", "FrozenBatchNorm2d", "FrozenBatchNorm3d"]
