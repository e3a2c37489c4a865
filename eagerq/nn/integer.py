"""A linear map on codes: the integer sum an engine accumulates, in floating point that holds it exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagerq.nn.modules.ops import Op
from eagerq.quant.codes import Coded, CodeTensor, Pending
from eagerq.quant.engine import EXACT_FLOAT32


def integer_map(
    op: Op, x: Coded, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> CodeTensor:
    r"""The op's int32 sums :math:`\sum (q_x - z_x)(q_w - z_w) + q_b`, waiting for the quantizer behind them.

    Args:
        op: geometry and arithmetic.
        x: the input's codes.
        weight: :math:`q_w - z_w` in float32, of the weight's shape.
        weight_scale: ``(1,)``, or a scale for each entry of ``op.channel_axis``.
        bias: codes, ``(C_out,)``, or None.
        args, kwargs: further arguments of the module's forward.
    """
    grid, inputs = x.grid, x.about_zero()
    per_output = op.output_sum(weight.abs())
    reach = float(max(abs(grid.low - grid.zero_point), abs(grid.high - grid.zero_point)))
    largest = float(per_output.max()) * reach
    # other devices pick algorithms that are exact for no integers (Winograd), and a lower precision is allowed to round
    narrow = largest < EXACT_FLOAT32 and weight.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    dtype = torch.float32 if narrow else torch.float64
    total = op.op(inputs.to(dtype), weight.to(dtype), None, *args, **kwargs)
    if not narrow:
        total = total.round()
    axis = op.output_axis
    if bias is not None:
        if narrow and largest + float(bias.abs().max()) >= EXACT_FLOAT32:
            total = total.double()
        total = total + _along(bias.to(total.dtype), axis, total.dim())
    total = total.float()  # the engine's own rounding of its int32 sum
    outputs = per_output.numel()
    scale = (grid.scale * weight_scale.reshape(-1).float()).repeat(outputs // weight_scale.numel())
    factor = _along(scale, axis, total.dim())
    kind = "" if axis == -1 else "convolution"  # engines multiply matrices of codes to real values too
    return CodeTensor(
        Pending(
            total.shape,
            total.device,
            lambda: total * factor,
            lambda out: x.profile.requantize(total, factor, out),
            x.profile,
            kind,
        )
    )


def _along(values: Tensor, axis: int, ndim: int) -> Tensor:
    shape = [1] * ndim
    shape[axis if axis >= 0 else ndim + axis] = -1
    return values.reshape(shape)


def codes_of(x: Any) -> Coded | None:
    """The codes of an input, or None if it is real or waits for a quantizer."""
    return x.value if isinstance(x, CodeTensor) and isinstance(x.value, Coded) else None
