"""The kernels of ``operators.py`` in plain PyTorch, for every device: the oracle of those in ``triton_*.py``.

Also what both agree on: how a mask and a quantizer's scratch memory lie.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eagerq.quant.functional import computing_dtype, dequantize, quantization_params, quantize
from eagerq.quant.layout import dense, memory_format
from eagerq.quant.observer import merged_range
from eagerq.quant.spec import Grid

#: A quantizer's scale, zero point, least and greatest value.
State = tuple[Tensor, Tensor, Tensor, Tensor]
#: Makes memory where a tensor lies, of sizes, strides and a dtype.
Allocator = Callable[[Tensor, tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]
#: Blocks of a norm's channels, at most, of which each has a count of the programs that are done.
BLOCKS = 64
#: Words of scratch memory of a quantizer, int32 and zero at first: what the programs of one launch share (the batch's range,
#: how many are done), the state that the launch found, and the counts.
COUNTS = 7
WORDS = COUNTS + BLOCKS
#: Where a norm's statistics begin in what its forward keeps: before them are scale, zero point, whether a range was known, at 4
#: the ends of the batch, at 6, where a kernel wrote it, between which values the gradient passes, and at 8 counts, all zero.
KEPT = 8 + BLOCKS


#: Codes of a table.
CODES = 256
#: What a gate's forward keeps: ``NUMBERS``, which are scale, zero point and whether a range was known, of three quantizers; then
#: two of a kernel's own; and, if the first one's range was known, a kernel's tables by its code, which begin here.
NUMBERS = 9
ENTRIES = 2 * CODES  # the last is for NaN
RESULTS, SLOPES, PRODUCTS = 16, 16 + ENTRIES, 16 + 2 * ENTRIES
USED = 16 + 3 * ENTRIES
#: What a sigmoid's forward keeps: those numbers of two quantizers.
SIGMOID_USED = 6


def state_before(scratch: Tensor) -> State:
    """The state that the last launch which learned found."""
    floats = scratch.view(torch.float32)
    return floats[3:4], scratch[4:5], floats[5], floats[6]


@functools.cache
def held(bound: float | None, dtype: torch.dtype) -> float | None:
    """The bound that the dtype holds, by which PyTorch clamps."""
    return None if bound is None else float(torch.tensor(bound, dtype=dtype))


def quantizer_state(scale: Tensor, zero_point: Tensor, min_val: Tensor, max_val: Tensor) -> Tensor:
    """The four in the scale's dtype, ``(4, n)``."""
    return torch.cat([t.reshape(-1).to(scale.dtype) for t in (scale, zero_point, min_val, max_val)]).view(4, -1)


def _new(x: Tensor, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """By PyTorch's own allocator, which knows fake tensors too."""
    return torch.empty_strided(size, stride, dtype=dtype, device=x.device)


def mask_like(x: Tensor, needs_mask: bool, new: Allocator = _new) -> Tensor:
    """Memory of a mask: a bit a value, or nothing."""
    return new(x, ((x.numel() + 7) // 8 if needs_mask else 0,), (1,), torch.uint8)


def _bits(device: torch.device) -> Tensor:
    return 2 ** torch.arange(8, device=device)


def packed(inside: Tensor) -> Tensor:
    """A bit for each value in the order of memory, eight a byte, the lowest first."""
    flat = inside.as_strided((inside.numel(),), (1,))
    flat = torch.nn.functional.pad(flat.to(torch.int64), (0, -flat.numel() % 8))
    return (flat.reshape(-1, 8) * _bits(inside.device)).sum(1).to(torch.uint8)


def unpacked(mask: Tensor, like: Tensor) -> Tensor:
    """Inverse of ``packed``: a bool for each value of ``like``."""
    flat = (mask.unsqueeze(1).to(torch.int64) & _bits(mask.device)).ne(0).reshape(-1)
    return flat[: like.numel()].as_strided(like.shape, like.stride())


def _fake_quantized(x: Tensor, state: State, grid: Grid) -> tuple[Tensor, Tensor]:
    """Real values of codes (x itself while no range is known), and whether the gradient passes."""
    scale, zero_point, low, high = (t.reshape(()) for t in state)
    known = (low != 0) | (high != 0)
    q = quantize(x, scale, zero_point, -(2**20), 2**20)
    real = dequantize(q.clamp(grid.quant_min, grid.quant_max), scale, zero_point).to(x.dtype)
    return torch.where(known, real, x), ((q >= grid.quant_min) & (q <= grid.quant_max)) | ~known


def _learn(x: Tensor, state: State, before: State, constant: float | None, grid: Grid) -> None:
    """Keep the state in ``before``, then let it learn the range of x."""
    for word, value in zip(before, state, strict=True):
        word.copy_(value.reshape(word.shape))
    scale, zero_point, min_val, max_val = state
    low, high = (end.float().reshape(min_val.shape) for end in x.aminmax())
    new = merged_range(min_val, max_val, low, high, constant)
    new_scale, new_zero = (t.reshape(scale.shape) for t in quantization_params(grid, *new))
    known = (new[0] != 0) | (new[1] != 0)
    scale.copy_(torch.where(known, new_scale, scale))
    zero_point.copy_(torch.where(known, new_zero, zero_point))
    min_val.copy_(new[0])
    max_val.copy_(new[1])


def activation(
    x: Tensor, scale: Tensor, zero_point: Tensor, min_val: Tensor, max_val: Tensor, scratch: Tensor | None,
    low: float | None, high: float | None, constant: float | None, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    state, grid, needs_mask = (scale, zero_point, min_val, max_val), Grid(*rest[:-1]), rest[-1]
    x = dense(x)
    a = x if low is None and high is None else x.clamp(low, high)
    out, inside = _fake_quantized(a, state, grid)
    mask = mask_like(x, needs_mask)
    if needs_mask:
        for bound, passes in ((low, torch.gt), (high, torch.lt)):
            if bound is not None:
                inside &= passes(x, bound)
        mask = packed(inside)
    if scratch is not None and x.numel():
        _learn(a, state, state_before(scratch), constant, grid)
    return out, mask


def gelu(
    x: Tensor, scale: Tensor, zero_point: Tensor, min_val: Tensor, max_val: Tensor, scratch: Tensor | None,
    constant: float | None, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    a = torch.nn.functional.gelu(dense(x))
    return activation(a, scale, zero_point, min_val, max_val, scratch, None, None, constant, *rest)


def _states(flat: list[Tensor]) -> list[State]:
    return [(flat[i], flat[i + 1], flat[i + 2], flat[i + 3]) for i in range(0, len(flat), 4)]


def _gate(x: Tensor, hard: bool) -> Tensor:
    if not hard:
        return torch.sigmoid(x)
    wide = (x.to(computing_dtype(x.dtype)) + 3).clamp_(0, 6)
    return wide.div_(torch.full_like(wide, 6)).to(x.dtype)  # by a tensor: CUDA's hard sigmoid multiplies by a sixth


def _slope(x: Tensor, hard: bool) -> Tensor:
    """The gate's derivative, in float32."""
    wide = x.float()
    if hard:
        return torch.where((wide > -3) & (wide < 3), 1 / 6, 0.0)
    fine = _gate(wide, hard)
    return fine * (1 - fine)


def _numbers(state: list[Tensor]) -> Tensor:
    """Scale, zero point and whether a range is known, of each quantizer."""
    each = [t.reshape(()).float() for s, z, low, high in _states(state) for t in (s, z, (low != 0) | (high != 0))]
    return torch.stack(each)


def sigmoid(
    x: Tensor, state: list[Tensor], scratch: list[Tensor], hard: bool, constant: float | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    grid, (of_x, of_y) = Grid(*rest), _states(state)
    x = dense(x)
    used = _numbers(state)
    a, _ = _fake_quantized(x, of_x, grid)
    y = _gate(a, hard)
    out, _ = _fake_quantized(y, of_y, grid)
    if scratch and x.numel():
        for seen, own, kept in zip((x, y), (of_x, of_y), scratch, strict=True):
            _learn(seen, own, state_before(kept), constant, grid)
    return out, used


def sigmoid_passing(x: Tensor, used: Tensor, hard: bool, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    """Of what ``sigmoid`` used: the quantized input, and where the gradient passes."""
    grid = Grid(quant_min, quant_max, 0, 0, False, False)
    of_x, of_y = ((s, z.to(torch.int32), k, k) for s, z, k in used.reshape(2, 3))
    a, passes = _fake_quantized(dense(x), of_x, grid)
    return a, passes & _fake_quantized(_gate(a, hard), of_y, grid)[1]


def sigmoid_gradient(grad: Tensor, x: Tensor, used: Tensor, hard: bool, quant_min: int, quant_max: int) -> Tensor:
    a, passes = sigmoid_passing(x, used, hard, quant_min, quant_max)
    return torch.where(passes, grad.float() * _slope(a, hard), 0.0).to(grad.dtype)


def gated(
    x: Tensor, state: list[Tensor], scratch: list[Tensor], hard: bool, constant: float | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    grid, (of_x, of_gate, of_y) = Grid(*rest), _states(state)
    x = dense(x)
    used = torch.cat([_numbers(state), x.new_zeros(USED - NUMBERS, dtype=torch.float32)])
    a, _ = _fake_quantized(x, of_x, grid)
    gate = _gate(a, hard)
    b, _ = _fake_quantized(gate, of_gate, grid)
    y = a * b
    out, _ = _fake_quantized(y, of_y, grid)
    if scratch and x.numel():
        for seen, own, kept in zip((x, gate, y), _states(state), scratch, strict=True):
            _learn(seen, own, state_before(kept), constant, grid)
    return out, used


def gated_gradient(grad: Tensor, x: Tensor, used: Tensor, hard: bool, quant_min: int, quant_max: int) -> Tensor:
    grid = Grid(quant_min, quant_max, 0, 0, False, False)
    x = dense(x)
    of_x, of_gate, of_y = ((s, z.to(torch.int32), k, k) for s, z, k in used[:NUMBERS].reshape(3, 3))
    a, passes = _fake_quantized(x, of_x, grid)
    gate = _gate(a, hard)
    b, gate_passes = _fake_quantized(gate, of_gate, grid)
    _, y_passes = _fake_quantized(a * b, of_y, grid)
    slope = b.float() + torch.where(gate_passes, a.float() * _slope(a, hard), 0.0)
    return torch.where(passes & y_passes, grad.float() * slope, 0.0).to(grad.dtype)


def used_of(x: Tensor, numbers: int = USED, new: Allocator = _new) -> Tensor:
    """Memory of what a gate's forward keeps, or a sigmoid's."""
    return new(x, (numbers,), (1,), torch.float32)


def kept_of(x: Tensor, new: Allocator = _new) -> Tensor:
    """Memory of what a norm's forward keeps."""
    return new(x, (KEPT + 2 * x.shape[1],), (1,), torch.float32)


def sums_of(x: Tensor, new: Allocator = _new) -> Tensor:
    """Memory of what a norm's backward sums."""
    channels = x.shape[1]
    return new(x, (2, channels), (channels, 1), torch.float32)


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse: Tensor) -> Tensor:
    """What a batch norm makes of x with these statistics, ``(C,)``, rounded as its own tensor is: monotone in x."""
    factor = inverse if weight is None else inverse * weight.float()
    y = (x.float() - _along_channels(mean, x)) * _along_channels(factor, x)
    return (y if bias is None else y + _along_channels(bias.float(), x)).to(x.dtype)


def norm_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, batches: Tensor | None,
    momentum: float, eps: float, scale: Tensor, zero_point: Tensor, min_val: Tensor, max_val: Tensor, scratch: Tensor,
    observes: bool, learns: bool, low: float | None, high: float | None, constant: float | None, *rest: Any,
) -> Tensor:  # fmt: skip
    state, grid = (scale, zero_point, min_val, max_val), Grid(*rest)
    x = dense(x)
    axes = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(x.float(), axes, correction=0)
    n = x.numel() // x.shape[1]
    for running, found in ((running_mean, mean), (running_var, var * (n / (n - 1)))):
        running.copy_(found * momentum + (1.0 - momentum) * running.float())
    if batches is not None:
        batches.add_(1)
    inverse = torch.ones_like(var) / torch.sqrt(var + eps)
    used = torch.stack([scale.reshape(()), zero_point.reshape(()).float(), ((min_val != 0) | (max_val != 0)).float()])
    kept = torch.cat([used, used.new_zeros(KEPT - 3), mean, inverse])
    if observes:
        a = normalised(x, weight, bias, mean, inverse)
        a = a if low is None and high is None else a.clamp(low, high)
        if learns:
            _learn(a, state, state_before(scratch), constant, grid)
        else:
            kept[4:6] = torch.stack(a.aminmax())
    return kept


def norm_applied(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kept: Tensor, low: float | None, high: float | None, quant_min: int,
    quant_max: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """With what ``norm_statistics`` kept of x: the result, and where its gradient passes, as neither clamp nor clip held it."""
    (scale, zero, known), (mean, inverse) = kept[:3], kept[KEPT:].reshape(2, -1)
    y = normalised(x, weight, bias, mean, inverse)
    a = y if low is None and high is None else y.clamp(low, high)
    out, inside = _fake_quantized(a, (scale, zero, known, known), Grid(quant_min, quant_max, 0, 0, False, False))
    for bound, within in ((low, torch.gt), (high, torch.lt)):
        if bound is not None:
            inside = inside & within(y, bound)
    return out, inside


def norm_activation(x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    x = dense(x)
    kept = norm_statistics(x, weight, bias, *rest)
    low, high, _, quant_min, quant_max, *_ = rest[12:]
    return norm_applied(x, weight, bias, kept, low, high, quant_min, quant_max)[0], kept


def norm_sums(grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, kept: Tensor, *rest: Any) -> Tensor:
    """Of the gradient that passes, for each channel: its sum and that of its product with the normalised x, ``(2, C)``; the
    gradients of bias and weight."""
    x = dense(x)
    return _norm_sums(torch.where(norm_applied(x, weight, bias, kept, *rest)[1], grad.float(), 0.0), x, kept)


def _norm_sums(passed: Tensor, x: Tensor, kept: Tensor) -> Tensor:
    mean, inverse = kept[KEPT:].reshape(2, -1)
    apart = (x.float() - _along_channels(mean, x)) * _along_channels(inverse, x)
    axes = [0, *range(2, x.dim())]
    return torch.stack([passed.sum(axes), (passed * apart).sum(axes)])


def norm_gradient(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, kept: Tensor, found: Tensor, *rest: Any
) -> Tensor:
    """Of x, with what ``norm_sums`` found."""
    x = dense(x)
    passed = torch.where(norm_applied(x, weight, bias, kept, *rest)[1], grad.float(), 0.0)
    return _norm_gradient(passed, x, weight, kept, found).to(grad.dtype)


def _norm_gradient(passed: Tensor, x: Tensor, weight: Tensor | None, kept: Tensor, found: Tensor) -> Tensor:
    mean, inverse = kept[KEPT:].reshape(2, -1)
    n = x.numel() // x.shape[1]
    factor = inverse if weight is None else inverse * weight.float()
    shift, slope = found[0] / n, found[1] / n * inverse
    out = passed - _along_channels(shift, x) - (x.float() - _along_channels(mean, x)) * _along_channels(slope, x)
    return out * _along_channels(factor, x)


def norm_gated(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, batches: Tensor | None,
    momentum: float, eps: float, state: list[Tensor], scratch: list[Tensor], learns: bool, hard: bool, constant: float | None,
    *grid: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x = dense(x)
    kept = norm_statistics(
        x, weight, bias, running_mean, running_var, batches, momentum, eps, *_states(state)[0], scratch[0], False, False, None,
        None, None, *grid,
    )  # fmt: skip
    y = normalised(x, weight, bias, *kept[KEPT:].reshape(2, -1))
    return *gated(y, state, scratch if learns else [], hard, constant, *grid), kept


def norm_gated_gradient(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, kept: Tensor, used: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Of x, and the sums of ``norm_sums``."""
    x = dense(x)
    y = normalised(x, weight, bias, *kept[KEPT:].reshape(2, -1))
    passed = gated_gradient(grad, y, used, *rest).float()
    found = _norm_sums(passed, x, kept)
    return _norm_gradient(passed, x, weight, kept, found).to(grad.dtype), found


def masked_gradient(grad: Tensor, mask: Tensor) -> Tensor:
    grad = dense(grad)
    return torch.where(unpacked(mask, grad), grad, 0.0)


def gelu_gradient(grad: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    x = dense(x)
    passed = masked_gradient(grad.contiguous(memory_format=memory_format(x)), mask)
    out: Tensor = torch.ops.aten.gelu_backward(passed, x).to(grad.dtype)
    return out


def weight_by_its_range(
    weight: Tensor, scale: Tensor, zero_point: Tensor, min_val: Tensor, max_val: Tensor, *rest: Any
) -> Tensor:
    grid, dtype = Grid(*rest[:-1]), rest[-1]
    weight = dense(weight)
    rows = weight.float().flatten(1)
    new = merged_range(min_val, max_val, rows.amin(1), rows.amax(1), 1.0)
    for state, value in zip((scale, zero_point, min_val, max_val), (*quantization_params(grid, *new), *new), strict=True):
        state.copy_(value)
    shape = (-1,) + (1,) * (weight.dim() - 1)
    s, z = scale.reshape(shape), zero_point.reshape(shape)
    return dequantize(quantize(weight, s, z, grid.quant_min, grid.quant_max), s, z).to(dtype)
