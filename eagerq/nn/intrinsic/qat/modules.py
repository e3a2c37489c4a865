"""nniqat: QAT fused modules. Each adds its parts to a QAT host; ``converts`` names the nni class it comes from."""

from __future__ import annotations

from eagerq.nn import intrinsic as nni
from eagerq.nn import qat as nnqat
from eagerq.nn.qat.mixins import NormActQAT, WithAct, WithBn


class ConvBn1d(WithBn, nnqat.Conv1d, converts=nni.ConvBn1d):
    """QAT form of ``nni.ConvBn1d``."""


class ConvBnReLU1d(WithAct, WithBn, nnqat.Conv1d, converts=nni.ConvBnReLU1d):
    """QAT form of ``nni.ConvBnReLU1d``."""


class ConvBnAct1d(WithAct, WithBn, nnqat.Conv1d, converts=nni.ConvBnAct1d):
    """QAT form of ``nni.ConvBnAct1d``."""


class ConvReLU1d(WithAct, nnqat.Conv1d, converts=nni.ConvReLU1d):
    """QAT form of ``nni.ConvReLU1d``."""


class ConvAct1d(WithAct, nnqat.Conv1d, converts=nni.ConvAct1d):
    """QAT form of ``nni.ConvAct1d``."""


class ConvTransposeBn1d(WithBn, nnqat.ConvTranspose1d, converts=nni.ConvTransposeBn1d):
    """QAT form of ``nni.ConvTransposeBn1d``."""


class ConvTransposeBnReLU1d(WithAct, WithBn, nnqat.ConvTranspose1d, converts=nni.ConvTransposeBnReLU1d):
    """QAT form of ``nni.ConvTransposeBnReLU1d``."""


class ConvTransposeBnAct1d(WithAct, WithBn, nnqat.ConvTranspose1d, converts=nni.ConvTransposeBnAct1d):
    """QAT form of ``nni.ConvTransposeBnAct1d``."""


class ConvTransposeReLU1d(WithAct, nnqat.ConvTranspose1d, converts=nni.ConvTransposeReLU1d):
    """QAT form of ``nni.ConvTransposeReLU1d``."""


class ConvTransposeAct1d(WithAct, nnqat.ConvTranspose1d, converts=nni.ConvTransposeAct1d):
    """QAT form of ``nni.ConvTransposeAct1d``."""


class ConvBn2d(WithBn, nnqat.Conv2d, converts=nni.ConvBn2d):
    """QAT form of ``nni.ConvBn2d``."""


class ConvBnReLU2d(WithAct, WithBn, nnqat.Conv2d, converts=nni.ConvBnReLU2d):
    """QAT form of ``nni.ConvBnReLU2d``."""


class ConvBnAct2d(WithAct, WithBn, nnqat.Conv2d, converts=nni.ConvBnAct2d):
    """QAT form of ``nni.ConvBnAct2d``."""


class ConvReLU2d(WithAct, nnqat.Conv2d, converts=nni.ConvReLU2d):
    """QAT form of ``nni.ConvReLU2d``."""


class ConvAct2d(WithAct, nnqat.Conv2d, converts=nni.ConvAct2d):
    """QAT form of ``nni.ConvAct2d``."""


class ConvTransposeBn2d(WithBn, nnqat.ConvTranspose2d, converts=nni.ConvTransposeBn2d):
    """QAT form of ``nni.ConvTransposeBn2d``."""


class ConvTransposeBnReLU2d(WithAct, WithBn, nnqat.ConvTranspose2d, converts=nni.ConvTransposeBnReLU2d):
    """QAT form of ``nni.ConvTransposeBnReLU2d``."""


class ConvTransposeBnAct2d(WithAct, WithBn, nnqat.ConvTranspose2d, converts=nni.ConvTransposeBnAct2d):
    """QAT form of ``nni.ConvTransposeBnAct2d``."""


class ConvTransposeReLU2d(WithAct, nnqat.ConvTranspose2d, converts=nni.ConvTransposeReLU2d):
    """QAT form of ``nni.ConvTransposeReLU2d``."""


class ConvTransposeAct2d(WithAct, nnqat.ConvTranspose2d, converts=nni.ConvTransposeAct2d):
    """QAT form of ``nni.ConvTransposeAct2d``."""


class ConvBn3d(WithBn, nnqat.Conv3d, converts=nni.ConvBn3d):
    """QAT form of ``nni.ConvBn3d``."""


class ConvBnReLU3d(WithAct, WithBn, nnqat.Conv3d, converts=nni.ConvBnReLU3d):
    """QAT form of ``nni.ConvBnReLU3d``."""


class ConvBnAct3d(WithAct, WithBn, nnqat.Conv3d, converts=nni.ConvBnAct3d):
    """QAT form of ``nni.ConvBnAct3d``."""


class ConvReLU3d(WithAct, nnqat.Conv3d, converts=nni.ConvReLU3d):
    """QAT form of ``nni.ConvReLU3d``."""


class ConvAct3d(WithAct, nnqat.Conv3d, converts=nni.ConvAct3d):
    """QAT form of ``nni.ConvAct3d``."""


class ConvTransposeBn3d(WithBn, nnqat.ConvTranspose3d, converts=nni.ConvTransposeBn3d):
    """QAT form of ``nni.ConvTransposeBn3d``."""


class ConvTransposeBnReLU3d(WithAct, WithBn, nnqat.ConvTranspose3d, converts=nni.ConvTransposeBnReLU3d):
    """QAT form of ``nni.ConvTransposeBnReLU3d``."""


class ConvTransposeBnAct3d(WithAct, WithBn, nnqat.ConvTranspose3d, converts=nni.ConvTransposeBnAct3d):
    """QAT form of ``nni.ConvTransposeBnAct3d``."""


class ConvTransposeReLU3d(WithAct, nnqat.ConvTranspose3d, converts=nni.ConvTransposeReLU3d):
    """QAT form of ``nni.ConvTransposeReLU3d``."""


class ConvTransposeAct3d(WithAct, nnqat.ConvTranspose3d, converts=nni.ConvTransposeAct3d):
    """QAT form of ``nni.ConvTransposeAct3d``."""


class LinearBn1d(WithBn, nnqat.Linear, converts=nni.LinearBn1d):
    """QAT form of ``nni.LinearBn1d``."""


class LinearBnReLU1d(WithAct, WithBn, nnqat.Linear, converts=nni.LinearBnReLU1d):
    """QAT form of ``nni.LinearBnReLU1d``."""


class LinearBnAct1d(WithAct, WithBn, nnqat.Linear, converts=nni.LinearBnAct1d):
    """QAT form of ``nni.LinearBnAct1d``."""


class LinearReLU(WithAct, nnqat.Linear, converts=nni.LinearReLU):
    """QAT form of ``nni.LinearReLU``."""


class LinearAct(WithAct, nnqat.Linear, converts=nni.LinearAct):
    """QAT form of ``nni.LinearAct``."""


class BNReLU2d(NormActQAT, converts=nni.BNReLU2d):
    """QAT form of ``nni.BNReLU2d``."""


class BNReLU3d(NormActQAT, converts=nni.BNReLU3d):
    """QAT form of ``nni.BNReLU3d``."""
