"""nni: float fused modules, each an ``nn.Sequential`` of its chain. The class line is the whole class."""

from __future__ import annotations

from torch import nn

from eagerq.nn.intrinsic.fused import Fused, FusedNorm
from eagerq.nn.modules.activation import ELEMENTWISE
from eagerq.nn.modules.batchnorm import NORMS_1D, NORMS_2D, NORMS_3D, FrozenBatchNorm2d, FrozenBatchNorm3d
from eagerq.nn.modules.conv import Conv2dSame

RELU = (nn.ReLU,)
# The matcher takes exact types, so nn.Module lets nothing more through there; it only leaves the constructors open.
ACT = (*(t for t in ELEMENTWISE if t is not nn.ReLU), nn.Module)
CONV2D = (nn.Conv2d, Conv2dSame)


class ConvBn1d(FusedNorm, chain=(nn.Conv1d, NORMS_1D)):
    """Conv1d, batch norm."""


class ConvBnReLU1d(FusedNorm, chain=(nn.Conv1d, NORMS_1D, RELU)):
    """Conv1d, batch norm, ReLU."""


class ConvBnAct1d(FusedNorm, chain=(nn.Conv1d, NORMS_1D, ACT)):
    """Conv1d, batch norm, another elementwise activation."""


class ConvReLU1d(Fused, chain=(nn.Conv1d, RELU)):
    """Conv1d, ReLU."""


class ConvAct1d(Fused, chain=(nn.Conv1d, ACT)):
    """Conv1d, another elementwise activation."""


class ConvTransposeBn1d(FusedNorm, chain=(nn.ConvTranspose1d, NORMS_1D)):
    """ConvTranspose1d, batch norm."""


class ConvTransposeBnReLU1d(FusedNorm, chain=(nn.ConvTranspose1d, NORMS_1D, RELU)):
    """ConvTranspose1d, batch norm, ReLU."""


class ConvTransposeBnAct1d(FusedNorm, chain=(nn.ConvTranspose1d, NORMS_1D, ACT)):
    """ConvTranspose1d, batch norm, another elementwise activation."""


class ConvTransposeReLU1d(Fused, chain=(nn.ConvTranspose1d, RELU)):
    """ConvTranspose1d, ReLU."""


class ConvTransposeAct1d(Fused, chain=(nn.ConvTranspose1d, ACT)):
    """ConvTranspose1d, another elementwise activation."""


class ConvBn2d(FusedNorm, chain=(CONV2D, NORMS_2D)):
    """Conv2d, batch norm."""


class ConvBnReLU2d(FusedNorm, chain=(CONV2D, NORMS_2D, RELU)):
    """Conv2d, batch norm, ReLU."""


class ConvBnAct2d(FusedNorm, chain=(CONV2D, NORMS_2D, ACT)):
    """Conv2d, batch norm, another elementwise activation."""


class ConvReLU2d(Fused, chain=(CONV2D, RELU)):
    """Conv2d, ReLU."""


class ConvAct2d(Fused, chain=(CONV2D, ACT)):
    """Conv2d, another elementwise activation."""


class ConvTransposeBn2d(FusedNorm, chain=(nn.ConvTranspose2d, NORMS_2D)):
    """ConvTranspose2d, batch norm."""


class ConvTransposeBnReLU2d(FusedNorm, chain=(nn.ConvTranspose2d, NORMS_2D, RELU)):
    """ConvTranspose2d, batch norm, ReLU."""


class ConvTransposeBnAct2d(FusedNorm, chain=(nn.ConvTranspose2d, NORMS_2D, ACT)):
    """ConvTranspose2d, batch norm, another elementwise activation."""


class ConvTransposeReLU2d(Fused, chain=(nn.ConvTranspose2d, RELU)):
    """ConvTranspose2d, ReLU."""


class ConvTransposeAct2d(Fused, chain=(nn.ConvTranspose2d, ACT)):
    """ConvTranspose2d, another elementwise activation."""


class ConvBn3d(FusedNorm, chain=(nn.Conv3d, NORMS_3D)):
    """Conv3d, batch norm."""


class ConvBnReLU3d(FusedNorm, chain=(nn.Conv3d, NORMS_3D, RELU)):
    """Conv3d, batch norm, ReLU."""


class ConvBnAct3d(FusedNorm, chain=(nn.Conv3d, NORMS_3D, ACT)):
    """Conv3d, batch norm, another elementwise activation."""


class ConvReLU3d(Fused, chain=(nn.Conv3d, RELU)):
    """Conv3d, ReLU."""


class ConvAct3d(Fused, chain=(nn.Conv3d, ACT)):
    """Conv3d, another elementwise activation."""


class ConvTransposeBn3d(FusedNorm, chain=(nn.ConvTranspose3d, NORMS_3D)):
    """ConvTranspose3d, batch norm."""


class ConvTransposeBnReLU3d(FusedNorm, chain=(nn.ConvTranspose3d, NORMS_3D, RELU)):
    """ConvTranspose3d, batch norm, ReLU."""


class ConvTransposeBnAct3d(FusedNorm, chain=(nn.ConvTranspose3d, NORMS_3D, ACT)):
    """ConvTranspose3d, batch norm, another elementwise activation."""


class ConvTransposeReLU3d(Fused, chain=(nn.ConvTranspose3d, RELU)):
    """ConvTranspose3d, ReLU."""


class ConvTransposeAct3d(Fused, chain=(nn.ConvTranspose3d, ACT)):
    """ConvTranspose3d, another elementwise activation."""


class LinearBn1d(FusedNorm, chain=(nn.Linear, NORMS_1D)):
    """Linear, batch norm; input ``(N, C)``."""


class LinearBnReLU1d(FusedNorm, chain=(nn.Linear, NORMS_1D, RELU)):
    """Linear, batch norm, ReLU; input ``(N, C)``."""


class LinearBnAct1d(FusedNorm, chain=(nn.Linear, NORMS_1D, ACT)):
    """Linear, batch norm, another elementwise activation; input ``(N, C)``."""


class LinearReLU(Fused, chain=(nn.Linear, RELU)):
    """Linear, ReLU."""


class LinearAct(Fused, chain=(nn.Linear, ACT)):
    """Linear, another elementwise activation."""


class BNReLU2d(FusedNorm, chain=((nn.BatchNorm2d, FrozenBatchNorm2d), RELU)):
    """Batch norm, ReLU, with no linear map before them to fold into."""

    norm_index = 0


class BNReLU3d(FusedNorm, chain=((nn.BatchNorm3d, FrozenBatchNorm3d), RELU)):
    """Batch norm, ReLU, with no linear map before them to fold into."""

    norm_index = 0
