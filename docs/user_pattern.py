"""A pattern of your own in one file: a weight-standardised convolution, its fused form and its QAT forms.

Run it: ``python docs/user_pattern.py``
"""

import torch
import torch.nn.functional as F
from torch import nn

import eagerq
from eagerq.nn import qat as nnqat
from eagerq.nn.intrinsic import FusedNorm
from eagerq.nn.intrinsic.qat import WithAct, WithBn


class WSConv2d(nn.Conv2d):
    """Your own float module: each filter is standardised before it is applied (Qiao et al., 2019, arXiv:1903.10520)."""

    def forward(self, x):
        return F.conv2d(x, standardized(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups)


def standardized(weight):
    """Zero mean and unit variance for each output channel."""
    var, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
    return (weight - mean) * torch.rsqrt(var + 1e-5)


# Step 1: the QAT module. It inherits from_float, the geometry and the integer bookkeeping; it says what weight it applies.
class QATWSConv2d(nnqat.Conv2d, converts=WSConv2d):
    """QAT form of WSConv2d."""

    def effective_weight(self):
        return standardized(self.weight)


# Step 2: the fused wrapper. The class line is the pattern.
class WSConvBnReLU2d(FusedNorm, chain=(WSConv2d, nn.BatchNorm2d, nn.ReLU)):
    """WSConv2d, batch norm, ReLU."""


# Step 3: the fused QAT module. from_float peels the chain: ReLU, batch norm, convolution.
class QATWSConvBnReLU2d(WithAct, WithBn, QATWSConv2d, converts=WSConvBnReLU2d):
    """QAT form of WSConvBnReLU2d."""


PATTERNS = eagerq.DEFAULT_PATTERNS.extended(WSConvBnReLU2d, QATWSConvBnReLU2d, QATWSConv2d)


def main():
    """Fuse, convert, train a step, deploy; the deployed model equals the QAT model in eval."""
    torch.manual_seed(0)
    model = nn.Sequential(WSConv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), WSConv2d(8, 4, 3))
    x = torch.randn(4, 3, 16, 16)
    plan = eagerq.plan_fusion(model, PATTERNS, x)
    print(plan)
    qat = eagerq.convert_qat(eagerq.fuse_modules(model, PATTERNS, x))
    qat(x).square().mean().backward()
    deployed = eagerq.convert(qat)
    print("deployed equals QAT in eval:", torch.equal(deployed(x), qat.eval()(x)))
    return plan, qat, deployed


if __name__ == "__main__":
    main()
