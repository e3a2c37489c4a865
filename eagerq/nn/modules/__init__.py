"""nn: float modules PyTorch does not have, and what each op does with its weight."""

from eagerq.nn.modules.add import Add
from eagerq.nn.modules.batchnorm import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from eagerq.nn.modules.conv import Conv2dSame

__all__ = ["Add", "Conv2dSame", "FrozenBatchNorm1d", "FrozenBatchNorm2d", "FrozenBatchNorm3d"]
