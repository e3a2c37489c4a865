"""Slow, obvious oracles in float64 numpy and exact rationals; they share no code with eagerq.

Rounding is half to even everywhere: ``round`` of Python and ``numpy.rint`` both do that.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
from rows import Geometry, Row
from torch import nn

import eagerq.nn
from eagerq.quant import QConfig, QuantSpec

Array = Any
LEAST_SCALE = 2.0**-40
BIAS_ROOM = 2.0**30
#: The most by which a bias on a grid of its own is shifted to that of the sums.
BIAS_SHIFT = 2.0**16
#: Below this largest code a channel is trained on its float weight (docstring of ``WithBn``).
HEALTHY = 8


# --- numbers, one at a time


def code(x: float, scale: float, zero_point: int, low: int, high: int) -> float:
    """clip(rint(x / s) + z), where the quotient is that of the dtype of ``x`` and ``scale``; NaN for NaN."""
    quotient = x / scale
    if math.isnan(quotient):
        return math.nan
    if math.isinf(quotient):
        return high if quotient > 0 else low
    return min(max(round(float(quotient)) + zero_point, low), high)


def inside(x: float, scale: float, zero_point: int, low: int, high: int) -> bool:
    """Whether the code needs no clipping, so that the gradient passes."""
    quotient = float(x / scale)
    return math.isfinite(quotient) and low <= round(quotient) + zero_point <= high


def is_nearest_code(q: float, x: float, scale: float, zero_point: int, low: int, high: int, slack: Fraction) -> bool:
    """Whether ``q`` is a grid point nearest to ``x`` in exact arithmetic, up to ``slack`` of a step."""
    exact = Fraction(x) / Fraction(scale) + zero_point
    clipped = min(max(exact, Fraction(low)), Fraction(high))
    return abs(Fraction(int(q)) - clipped) <= Fraction(1, 2) + slack * max(1, abs(exact))


def scale_of(spec: QuantSpec, least: float) -> float:
    """The least scale on the spec's grid that is no smaller."""
    if not spec.power_of_two:
        return max(least, LEAST_SCALE)
    scale = LEAST_SCALE
    while scale < least:
        scale *= 2
    return scale


def grid(spec: QuantSpec, low: float, high: float) -> tuple[float, int]:
    """Scale and zero point that cover [low, high] and zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    if spec.symmetric:
        levels = 2 ** (spec.bits - 1) - 1
        return scale_of(spec, max(-low, high) / levels), 0 if spec.signed else 2 ** (spec.bits - 1)
    first, last = integer_range(spec)
    scale = scale_of(spec, (high - low) / (last - first))
    return scale, min(max(first - round(low / scale), first), last)


def integer_range(spec: QuantSpec) -> tuple[int, int]:
    """First and last code, from the definition of two's complement."""
    if not spec.signed:
        return 0, 2**spec.bits - 1
    return -(2 ** (spec.bits - 1)) + (1 if spec.narrow_range else 0), 2 ** (spec.bits - 1) - 1


# --- ranges


def percentile_range(values: list[float], percentile: float) -> tuple[float, float]:
    """The k-th smallest and largest value, k the least count that is the given share of all."""
    ordered = sorted(values)
    k = max(1, math.ceil(Fraction(str(percentile)) * len(ordered) / 100))
    return ordered[len(ordered) - k], ordered[k - 1]


def squared_error(values: list[float], spec: QuantSpec, low: float, high: float) -> float:
    """Sum over the values of (value - its quantized value)^2."""
    scale, zero = grid(spec, low, high)
    first, last = integer_range(spec)
    return sum((v - (code(v, scale, zero, first, last) - zero) * scale) ** 2 for v in values)


# --- weights


def channels(weight: Array, axis: int | None) -> list[Any]:
    """Index of each part of the weight that has a scale of its own."""
    if axis is None:
        return [...]
    return [(slice(None),) * axis + (c,) for c in range(weight.shape[axis])]


def weight_axis(row: Row, spec: QuantSpec) -> int | None:
    return (1 if row.transposed else 0) if spec.per_channel else None


def quantize_weight(
    weight: Array, spec: QuantSpec, axis: int | None, least: Array | float = LEAST_SCALE
) -> tuple[Array, Array, Array]:
    """Codes, scales and zero points by the weight's own minimum and maximum; ``least`` bounds the scales from below."""
    codes, scales, zeros = np.zeros_like(weight), [], []
    first, last = integer_range(spec)
    parts = channels(weight, axis)
    for part, floor in zip(parts, np.broadcast_to(least, len(parts)), strict=True):
        scale, zero = grid(spec, float(weight[part].min()), float(weight[part].max()))
        scale = max(scale, float(floor))
        codes[part] = np.clip(np.rint(weight[part] / scale) + zero, first, last)
        scales.append(scale)
        zeros.append(zero)
    return codes, np.array(scales), np.array(zeros)


def fake_quantize_weight(weight: Array, spec: QuantSpec, axis: int | None, least: Array | float = LEAST_SCALE) -> Array:
    codes, scales, zeros = quantize_weight(weight, spec, axis, least)
    out = np.zeros_like(codes)
    for part, scale, zero in zip(channels(codes, axis), scales, zeros, strict=True):
        out[part] = (codes[part] - zero) * scale
    return out


def output_parts(row: Row, g: Geometry, weight: Array) -> list[Any]:
    """Index of the weights that make each output channel."""
    if not row.transposed:
        return list(range(weight.shape[0]))
    ins = weight.shape[0] // g.groups
    return [(slice(group * ins, (group + 1) * ins), j) for group, j in itertools.product(range(g.groups), range(g.out_per_group))]


def times_channel(row: Row, g: Geometry, weight: Array, factor: Array) -> Array:
    """The weight with output channel c multiplied by factor[c]."""
    out = weight.copy()
    for part, a in zip(output_parts(row, g, weight), factor, strict=True):
        out[part] = weight[part] * a
    return out


# --- linear maps, in loops over the kernel's positions


def _pads(row: Row, g: Geometry, size: tuple[int, ...], kernel: tuple[int, ...]) -> list[tuple[int, int]]:
    pads = []
    for axis, (n, k) in enumerate(zip(size, kernel, strict=True)):
        reach, stride = g.dilation[axis] * (k - 1), g.stride[axis]
        if row.op is eagerq.nn.Conv2dSame:
            total = max((math.ceil(n / stride) - 1) * stride + reach + 1 - n, 0)
        elif g.padding == "same":
            total = reach
        elif g.padding == "valid":
            total = 0
        else:
            total = 2 * int(g.padding[axis])
        pads.append((total // 2, total - total // 2))
    return pads


def _conv(row: Row, g: Geometry, x: Array, w: Array) -> Array:
    kernel = w.shape[2:]
    mode = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[g.padding_mode]
    x = np.pad(x, [(0, 0), (0, 0), *_pads(row, g, x.shape[2:], kernel)], mode=mode)
    stride, dilation = g.stride[: row.dims], g.dilation[: row.dims]
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    y = np.zeros((x.shape[0], w.shape[0], *sizes))
    ins, outs = w.shape[1], w.shape[0] // g.groups
    for group in range(g.groups):
        xs, ys = slice(group * ins, (group + 1) * ins), slice(group * outs, (group + 1) * outs)
        for at in itertools.product(*(range(k) for k in kernel)):
            window = tuple(
                slice(i * d, i * d + (n - 1) * s + 1, s) for i, d, n, s in zip(at, dilation, sizes, stride, strict=True)
            )
            y[:, ys] += np.einsum("nc...,oc->no...", x[(slice(None), xs, *window)], w[(ys, slice(None), *at)])
    return y


def _conv_transpose(row: Row, g: Geometry, x: Array, w: Array) -> Array:
    kernel, stride, dilation = w.shape[2:], g.stride[: row.dims], g.dilation[: row.dims]
    pad, extra = g.padding[: row.dims], g.output_padding[: row.dims]
    full = [(n - 1) * s + d * (k - 1) + 1 + e for n, k, s, d, e in zip(x.shape[2:], kernel, stride, dilation, extra, strict=True)]
    ins, outs = w.shape[0] // g.groups, w.shape[1]
    y = np.zeros((x.shape[0], g.groups * outs, *full))
    for group in range(g.groups):
        xs, ys = slice(group * ins, (group + 1) * ins), slice(group * outs, (group + 1) * outs)
        for at in itertools.product(*(range(k) for k in kernel)):
            window = tuple(
                slice(i * d, i * d + (n - 1) * s + 1, s) for i, d, n, s in zip(at, dilation, x.shape[2:], stride, strict=True)
            )
            y[(slice(None), ys, *window)] += np.einsum("nc...,co->no...", x[:, xs], w[(xs, slice(None), *at)])
    crop = tuple(slice(int(p), n - int(p)) for p, n in zip(pad, full, strict=True))
    return y[(slice(None), slice(None), *crop)]


def linear_map(row: Row, g: Geometry, x: Array, w: Array, bias: Array | None) -> Array:
    """The row's op."""
    if row.op is nn.Embedding:
        return w[x]
    if row.op is nn.Linear:
        return x @ w.T + (0 if bias is None else bias)
    y = (_conv_transpose if row.transposed else _conv)(row, g, x, w)
    return y if bias is None else y + bias.reshape(-1, *[1] * row.dims)


# --- batch norm


def norm_map(norm: Any) -> tuple[Array, Array]:
    """(a, b) with which the norm in eval is a x + b."""
    mean, var = (t.detach().double().numpy() for t in (norm.running_mean, norm.running_var))
    gamma = np.ones_like(mean) if norm.weight is None else norm.weight.detach().double().numpy()
    beta = np.zeros_like(mean) if norm.bias is None else norm.bias.detach().double().numpy()
    a = gamma / np.sqrt(var + norm.eps)
    return a, beta - mean * a


# --- what a QAT module computes


def deployed_weights(
    row: Row,
    g: Geometry,
    config: QConfig,
    weight: Array,
    bias: Array | None,
    norm: Any,
    input_scale: float | None,
) -> tuple[Array, Array | None]:
    """Fold, then codes by rint and clip, then real values again; bias codes where the input's scale is known."""
    spec, of_bias = config.weight, config.bias
    if norm is not None:
        a, b = norm_map(norm)
        weight = times_channel(row, g, weight, a)
        bias = b if bias is None else b + a * bias
    if spec is None:
        return weight, bias
    axis = weight_axis(row, spec)
    parts = len(channels(weight, axis))
    least = np.full(parts, LEAST_SCALE)
    if bias is not None and input_scale is not None:
        own = isinstance(of_bias, QuantSpec)
        for c, b in enumerate(bias):  # channel c has scale c % parts
            room = abs(bias).max() / (of_bias.quant_max * BIAS_SHIFT) if own else abs(b) / BIAS_ROOM
            least[c % parts] = scale_of(spec, max(least[c % parts], room / input_scale))
    _codes, scales, _ = quantize_weight(weight, spec, axis, least)
    real = fake_quantize_weight(weight, spec, axis, least)
    if bias is not None and input_scale is not None and of_bias is not None:
        steps = [input_scale * scales[c % parts] for c in range(len(bias))]
        if isinstance(of_bias, QuantSpec):
            steps = [max(grid(of_bias, float(bias.min()), float(bias.max()))[0], *steps)] * len(bias)
        bias = np.array([round(b / step) * step for b, step in zip(bias, steps, strict=True)])
    return real, bias


def textbook_weights(row: Row, g: Geometry, spec: QuantSpec, weight: Array, norm: Any) -> tuple[Array, Array, list[bool]]:
    """The weight before the norm, fq(aW)/a, and the error after it; a channel without codes is float before the norm."""
    a, _ = norm_map(norm)
    scaled = times_channel(row, g, weight, a)
    axis = weight_axis(row, spec)
    codes, _scales, zeros = quantize_weight(scaled, spec, axis)
    real = fake_quantize_weight(scaled, spec, axis)
    relative = codes.copy()
    for part, zero in zip(channels(codes, axis), zeros, strict=True):
        relative[part] = codes[part] - zero
    before, after, healthy = weight.copy(), np.zeros_like(weight), []
    for part, factor in zip(output_parts(row, g, weight), a, strict=True):
        healthy.append(bool(np.abs(relative[part]).max() >= HEALTHY))
        if healthy[-1]:
            before[part] = real[part] / factor
        else:
            after[part] = real[part] - scaled[part]
    return before, after, healthy
