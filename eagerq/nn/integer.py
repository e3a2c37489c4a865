"""A linear map on codes: the integer sum an engine accumulates, by integer kernels or in floating point that holds it exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eagerq.nn.int8 import Sums, integer_sums
from eagerq.nn.modules.ops import Op
from eagerq.quant.code_values import Coded, Pending
from eagerq.quant.codes import CodeTensor
from eagerq.quant.engine import EXACT_FLOAT32, EngineProfile, Grid
from eagerq.quant.pieces import PIECE, in_pieces

#: Called with the reason for each linear map on bytes that integer kernels do not take.
on_refusal: Callable[[str], None] | None = None


def integer_map(
    op: Op,
    x: Coded,
    weight: Tensor | Callable[[], Tensor],
    weight_scale: Tensor,
    bias: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kept: tuple[Tensor, ...] = (),
) -> CodeTensor:
    r"""The op's int32 sums :math:`\sum (q_x - z_x)(q_w - z_w) + q_b`, waiting for the quantizer behind them.

    Args:
        op: geometry and arithmetic.
        x: the input's codes.
        weight: :math:`q_w - z_w` in float32 or int8, of the weight's shape; or what gives it from ``kept``.
        weight_scale: ``(1,)``, or a scale for each entry of ``op.channel_axis``.
        bias: codes, ``(C_out,)``, or None.
        args, kwargs: further arguments of the module's forward.
        kept: tensors that outlive the call, the first of the weight's shape; see ``integer_sums``.
    """
    grid = x.grid
    scale = grid.scale * weight_scale.reshape(-1).float()
    space = (1,) * ((weight if isinstance(weight, Tensor) else kept[0]).dim() - 2)  # the axes behind the channels
    kind = "convolution" if space else ""  # engines multiply matrices of codes to real values too
    if not x.codes.is_floating_point():
        sums = integer_sums(op, x, weight, kept, bias, alone=not (args or kwargs))
        if isinstance(sums, Sums):
            scale = scale.repeat(sums.outputs // scale.numel())
            return CodeTensor(_by_kernels(sums, x, scale.reshape(-1, *space), kind))
        if on_refusal is not None:
            on_refusal(sums)
    weight, inputs = (weight if isinstance(weight, Tensor) else weight()).float(), x.about_zero()
    per_output = op.output_sum(weight.abs())
    reach = float(max(abs(grid.low - grid.zero_point), abs(grid.high - grid.zero_point)))
    largest = float(per_output.max()) * reach
    # other devices pick algorithms that are exact for no integers (Winograd), and a lower precision is allowed to round
    narrow = largest < EXACT_FLOAT32 and weight.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    dtype = torch.float32 if narrow else torch.float64
    with torch.autocast(x.codes.device.type, enabled=False):  # which would sum in half precision
        total = op.op(inputs.to(dtype), weight.to(dtype), None, *args, **kwargs)
    if not narrow:
        total = total.round()
    if bias is not None:
        if narrow and largest + float(bias.abs().max()) >= EXACT_FLOAT32:
            total = total.double()
        total = total + bias.to(total.dtype).reshape(-1, *space)
    total = total.float()  # the engine's own rounding of its int32 sum
    scale = scale.repeat(per_output.numel() // scale.numel())
    return CodeTensor(_waiting(total, scale.reshape(-1, *space), x.profile, kind))


def _waiting(total: Tensor, factor: Tensor, profile: EngineProfile, kind: str) -> Pending:
    """Sums that wait for their quantizer."""

    def codes(grid: Grid) -> Tensor:
        return in_pieces(lambda sums, factors: profile.requantize(sums, factors, grid), total, factor)

    return Pending(total.shape, total.device, lambda: total * factor, codes, profile, kind)


def _by_kernels(sums: Sums, x: Coded, factor: Tensor, kind: str) -> Pending:
    """The same; many sums are not held but computed once their grid is known, some entries of the batch at a time."""
    if sums.size.numel() <= PIECE:
        return _waiting(sums.of(x.codes), factor, x.profile, kind)

    def joined(of: Callable[[Pending], Tensor]) -> Tensor:
        parts = torch.split(x.codes, sums.entries)
        return torch.cat([of(_waiting(sums.of(part), factor, x.profile, kind)) for part in parts])

    def value() -> Tensor:
        return joined(lambda waiting: waiting.value())

    def codes(grid: Grid) -> Tensor:
        return joined(lambda waiting: waiting.codes(grid))

    return Pending(sums.size, x.codes.device, value, codes, x.profile, kind)


def codes_of(x: Any) -> Coded | None:
    """The codes of an input, or None if it is real or waits for a quantizer."""
    return x.value if isinstance(x, CodeTensor) and isinstance(x.value, Coded) else None
