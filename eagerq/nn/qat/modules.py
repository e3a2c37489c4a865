"""nnqat: QAT standalone modules. A host is its op and its float class."""

from __future__ import annotations

from torch import nn

from eagerq.nn.modules.conv import Conv2dSame as _FloatConv2dSame
from eagerq.nn.modules.ops import ConvOp, ConvTransposeOp, EmbeddingOp, LinearOp
from eagerq.nn.qat.base import QATOp
from eagerq.nn.qat.mixins import LoneNorm


class Conv1d(QATOp, ConvOp, nn.Conv1d, converts=nn.Conv1d):
    """QAT form of ``nn.Conv1d``: its arguments and ``qconfig``."""


class Conv2d(QATOp, ConvOp, nn.Conv2d, converts=nn.Conv2d):
    """QAT form of ``nn.Conv2d``: its arguments and ``qconfig``."""


class Conv2dSame(QATOp, ConvOp, nn.Conv2d, converts=_FloatConv2dSame):
    """QAT form of ``eagerq.nn.Conv2dSame``: the arguments of ``nn.Conv2d`` and ``qconfig``."""

    same_padding = True


class Conv3d(QATOp, ConvOp, nn.Conv3d, converts=nn.Conv3d):
    """QAT form of ``nn.Conv3d``: its arguments and ``qconfig``."""


class ConvTranspose1d(QATOp, ConvTransposeOp, nn.ConvTranspose1d, converts=nn.ConvTranspose1d):
    """QAT form of ``nn.ConvTranspose1d``: its arguments and ``qconfig``."""


class ConvTranspose2d(QATOp, ConvTransposeOp, nn.ConvTranspose2d, converts=nn.ConvTranspose2d):
    """QAT form of ``nn.ConvTranspose2d``: its arguments and ``qconfig``."""


class ConvTranspose3d(QATOp, ConvTransposeOp, nn.ConvTranspose3d, converts=nn.ConvTranspose3d):
    """QAT form of ``nn.ConvTranspose3d``: its arguments and ``qconfig``."""


class Linear(QATOp, LinearOp, nn.Linear, converts=nn.Linear):
    """QAT form of ``nn.Linear``: its arguments and ``qconfig``."""


class Embedding(QATOp, EmbeddingOp, nn.Embedding, converts=nn.Embedding):
    """QAT form of ``nn.Embedding``: its arguments and ``qconfig``. Indices are not quantized, rows are."""


class BatchNorm2d(LoneNorm, converts=nn.BatchNorm2d):
    """QAT form of an ``nn.BatchNorm2d`` that folds into nothing: its arguments and ``qconfig``."""

    spatial = 2


class BatchNorm3d(LoneNorm, converts=nn.BatchNorm3d):
    """QAT form of an ``nn.BatchNorm3d`` that folds into nothing: its arguments and ``qconfig``."""

    spatial = 3
