"""Exact integer sums on plain uint8 and int8 tensors, by the oneDNN convolution that PyTorch has for them.

Little is asked of that convolution: sums of uint8 codes times int8 weights, without zero point, bias, scale or padding. With
zero points, or padding beside small inputs, wrong sums and crashes were seen (PyTorch 2.11 and 2.14). So padding, the zero
point's share and the bias are computed here; a matrix product is a convolution of one pixel.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagerq.nn.modules.conv import same_pads
from eagerq.nn.modules.ops import ConvOp, LinearOp, Op, ScaleOp
from eagerq.quant.code_values import Coded
from eagerq.quant.engine import EXACT_FLOAT32
from eagerq.quant.pieces import PIECE

#: More products of uint8 and int8 may leave an int32 sum.
_MOST_PRODUCTS = 2**16


@dataclasses.dataclass(frozen=True)
class Sums:
    """A linear map of codes.

    Attributes:
        size: shape of its result.
        outputs: its number of channels.
        entries: how much of the batch is to be computed at a time; it divides the batch.
        of: from the codes of that many entries to their sums, each rounded once to float32.
    """

    size: torch.Size
    outputs: int
    entries: int
    of: Callable[[Tensor], Tensor]


def integer_sums(
    op: Op,
    x: Coded,
    weight: Tensor | Callable[[], Tensor],
    kept: tuple[Tensor, ...],
    bias: Tensor | None,
    alone: bool,
) -> Sums | str:
    r"""How to compute :math:`\sum (q_x - z_x)(q_w - z_w) + q_b` in integers, or in words why not.

    Args:
        op: says the geometry; a QAT or deployed module.
        x: codes of one byte each.
        weight: :math:`q_w - z_w`, int8 or whole numbers in float32; or what gives it from ``kept``.
        kept: tensors that outlive the call, the first of the weight's shape: while they are not written to and the input's
            shape stays, the packed weight is kept, until ``forget``.
        bias: whole numbers, ``(C_out,)``, or None.
        alone: whether the op was called with its input alone.
    """
    kind = getattr(op, "op_class", type(op)).op
    linear, codes = kind is LinearOp.op, x.codes
    if not alone or not (linear or kind in (ConvOp.op, ScaleOp.op)):
        return "only convolutions and matrix products have integer kernels"
    like = weight if isinstance(weight, Tensor) else kept[0]
    if codes.device.type != "cpu" or like.device.type != "cpu":
        return "the integer kernels run on CPUs"
    if refusal():
        return refusal()
    if not codes.numel() or codes.dim() < 2 or not (linear or codes.dim() == like.dim()):
        return "the input has no batch"
    products = like[0].numel()
    if products > _MOST_PRODUCTS:
        return f"a sum has {products} products"
    if bias is not None and bias.is_floating_point() and not torch.equal(bias, bias.round()):
        return "the bias is no whole number of the sums' units"
    g = _POINT if linear else _geometry(op, like.shape[2:], codes.shape[2:])  # type: ignore[arg-type]
    if codes.shape[-1 if linear else 1] != like.shape[1] * g.groups or min(g.out) < 1:
        return "the input does not fit"
    outputs = len(like)
    size = torch.Size((*codes.shape[:-1], outputs) if linear else (len(codes), outputs, *g.out))
    most = max(1, PIECE * len(codes) // size.numel())
    entries = next(n for n in range(min(most, len(codes)), 0, -1) if len(codes) % n == 0)
    if linear:
        g = dataclasses.replace(g, out=(size[:-1].numel() // len(codes) * entries, 1))
    packed = _packed(op, weight, kept, g, 1 if linear else entries)
    shift = 128 if codes.dtype == torch.int8 else 0  # the kernel takes uint8
    zero = int(x.grid.zero_point) + shift
    offset = -zero * packed.per_output if bias is None else bias.double() - zero * packed.per_output
    offset = None if bias is None and not zero else offset.reshape(-1, *[1] * len(g.out))  # type: ignore[assignment]

    def of(part: Tensor) -> Tensor:
        image = part.view(torch.uint8) ^ shift if shift else part
        if not linear:
            return _rounded(_padded(image, g, zero), packed, g, offset)
        image = image.reshape(1, -1, 1, products).permute(0, 3, 1, 2)  # rows as one column of pixels
        return _rounded(image, packed, g, offset).permute(0, 2, 3, 1).reshape(*part.shape[:-1], -1)

    return Sums(size, outputs, entries, of)


# --- geometry -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """A convolution of inputs of one size.

    ``pads`` are zeros at either end of each axis as ``F.pad`` takes them: just what the windows reach, so they may be
    negative. ``around`` is padding of another ``mode``, which comes first.
    """

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    out: tuple[int, ...]
    pads: tuple[int, ...] = ()
    around: tuple[int, ...] = ()
    mode: str = ""


_POINT = _Geometry((1, 1), (1, 1), 1, (1, 1))


def _geometry(op: ConvOp, kernel: torch.Size, sizes: tuple[int, ...]) -> _Geometry:
    around: tuple[int, ...] = ()
    dilation = tuple(1 if k == 1 else d for k, d in zip(kernel, op.dilation, strict=True))
    if op.same_padding:
        pads = same_pads(sizes, kernel, op.stride, dilation)
    elif op.padding_mode != "zeros":
        around, pads = tuple(op._reversed_padding_repeated_twice), [0] * 2 * len(kernel)
        sizes = tuple(n + low + high for n, low, high in zip(sizes, around[-2::-2], around[::-2], strict=True))
    elif op.padding == "same":
        totals = [d * (k - 1) for d, k in zip(reversed(dilation), reversed(kernel), strict=True)]
        pads = [side for total in totals for side in (total // 2, total - total // 2)]
    else:
        given = (0,) * len(kernel) if op.padding == "valid" else op.padding
        pads = [side for p in reversed(given) for side in (p, p)]
    stride, out = [], []
    for axis, (size, d, k, s) in enumerate(zip(sizes, dilation, kernel, op.stride, strict=True)):
        low = 2 * (len(kernel) - 1 - axis)
        window = d * (k - 1) + 1
        n = (size + pads[low] + pads[low + 1] - window) // s + 1
        pads[low + 1] = (n - 1) * s + window - size - pads[low]
        out.append(n)
        stride.append(1 if n == 1 else s)  # kernels may take wrongly a stride that is never taken
    return _Geometry(tuple(stride), dilation, op.groups, tuple(out), tuple(pads), around, op.padding_mode if around else "")


def _padded(codes: Tensor, g: _Geometry, zero: int) -> Tensor:
    if g.mode:
        codes = F.pad(codes.float(), g.around, g.mode).to(torch.uint8)
    return F.pad(codes, g.pads, value=zero) if any(g.pads) else codes


# --- weights --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Packed:
    """A weight as the kernel wants it, a sum of int8 terms; and the sum of each output's codes, float64."""

    terms: tuple[Tensor, ...]
    per_output: Tensor
    products: int


#: By module: what the packed weight was made of, with versions and geometry, and the packed weight.
_PACKED: weakref.WeakKeyDictionary[Op, tuple[tuple[Tensor, ...], object, _Packed]] = weakref.WeakKeyDictionary()


def forget(modules: Iterable[nn.Module]) -> None:
    """Give back the packed weights of these modules."""
    for module in modules:
        _PACKED.pop(module, None)  # type: ignore[call-overload]


def _packed(op: Op, weight: Tensor | Callable[[], Tensor], kept: tuple[Tensor, ...], g: _Geometry, batch: int) -> _Packed:
    keep = bool(kept) and not any(tensor.is_inference() for tensor in kept)  # those do not tell when they are written to
    # a form packed for another shape may be reordered in each call, slowly
    state = (g, batch, [tensor._version for tensor in kept] if keep else None)
    held = _PACKED.get(op)
    if keep and held is not None and held[1] == state and all(a is b for a, b in zip(held[0], kept, strict=True)):
        return held[2]
    codes = weight if isinstance(weight, Tensor) else weight()
    terms = [codes]
    if codes.dtype != torch.int8:
        terms, rest = [], codes
        while not terms or bool(rest.any()):
            terms.append(rest.clamp(-128, 127))
            rest = rest - terms[-1]
    rows = torch.split(codes, 64)  # no wider copy of all of it
    per_output = torch.cat([some.flatten(1).float().sum(1) for some in rows]).double()
    packed = _Packed(tuple(_prepacked(term.to(torch.int8), g, batch) for term in terms), per_output, codes[0].numel())
    if keep:
        _PACKED[op] = kept, state, packed
    return packed


# --- the kernel -----------------------------------------------------------------------------------


def _prepacked(codes: Tensor, g: _Geometry, batch: int) -> Tensor:
    codes = codes.reshape(*codes.shape, 1, 1) if codes.dim() == 2 else codes
    axes = zip(g.out, g.stride, g.dilation, codes.shape[2:], strict=True)
    shape = [batch, codes.shape[1] * g.groups, *((n - 1) * s + d * (k - 1) + 1 for n, s, d, k in axes)]
    one, none = torch.ones(1, device="cpu"), [0] * len(g.stride)
    packed: Tensor = torch.ops.onednn.qconv_prepack(codes, one, 1.0, 0, g.stride, none, g.dilation, g.groups, shape)
    return packed


def _products(image: Tensor, packed: Tensor, g: _Geometry) -> Tensor:
    """Sums of codes times weights, rounded to float32."""
    one, zero, none = torch.ones(1, device="cpu"), torch.zeros(1, dtype=torch.int32, device="cpu"), [0] * len(g.stride)
    out: Tensor = torch.ops.onednn.qconv_pointwise(
        image, 1.0, 0, packed, one, zero, None, g.stride, none, g.dilation, g.groups, 1.0, 0, torch.float32, "none", [], ""
    )
    return out


def _exact(image: Tensor, term: Tensor, packed: _Packed, g: _Geometry, bits: int = 8) -> Tensor:
    """The same without rounding: where float32 does not hold a sum, in float64 of the codes' upper and lower bits."""
    total = _products(image, term, g)
    dense = total.movedim(1, -1)  # as the kernel laid it out
    holds = packed.products * 128 * 2**bits < EXACT_FLOAT32
    if holds or max(float(dense.amax()), -float(dense.amin())) < EXACT_FLOAT32:
        return total
    half = bits // 2  # one bit is always held: products are few enough
    upper = _exact(image >> half, term, packed, g, bits - half).double()
    return upper.mul_(2**half).add_(_exact(image & (2**half - 1), term, packed, g, half))


def _rounded(image: Tensor, packed: _Packed, g: _Geometry, offset: Tensor | None) -> Tensor:
    """The products and the offset, rounded once."""
    if offset is None and len(packed.terms) == 1:
        return _products(image, packed.terms[0], g)
    total, *more = (_exact(image, term, packed, g) for term in packed.terms)
    if not more and offset is not None and total.dtype == torch.float32 and bool((offset.abs() < EXACT_FLOAT32).all()):
        return total.add_(offset.float())  # both are whole: one rounding
    total = total.double()
    for term in more if offset is None else (*more, offset):
        total += term
    return total.float()


@functools.cache
def refusal() -> str:
    """Why this machine's kernels are not used, or ``""``: they are tried on the largest codes, where some saturate."""
    if not (hasattr(torch.ops.onednn, "qconv_pointwise") and hasattr(torch.ops.onednn, "qconv_prepack")):
        return "this PyTorch has no integer convolution"
    generator = torch.Generator("cpu").manual_seed(0)
    draw = functools.partial(torch.randint, generator=generator, device="cpu")
    for channels, outputs, groups, kernel, stride in _TRIALS:
        image = draw(250, 256, (2, channels, 9, 9), dtype=torch.uint8)
        weight = draw(120, 128, (outputs, channels // groups, kernel, kernel), dtype=torch.int8)
        weight[::2].neg_()
        g = _Geometry((stride, stride), (1, 1), groups, ((9 - kernel) // stride + 1,) * 2)
        try:
            found = _products(image, _prepacked(weight, g, 2), g)
        except (RuntimeError, NotImplementedError) as error:
            return f"this machine's integer convolution fails: {str(error).splitlines()[0]}"
        if not torch.equal(found, F.conv2d(image.double(), weight.double(), None, stride, groups=groups).float()):
            return "this machine's integer convolution is not exact (x86 processors without VNNI saturate)"
    return ""


#: Channels, outputs, groups, kernel, stride: a dense, a grouped, a depthwise, a one-pixel convolution and one of few channels.
_TRIALS = ((64, 32, 1, 3, 1), (24, 24, 3, 3, 2), (32, 32, 32, 5, 1), (512, 16, 1, 1, 1), (3, 8, 1, 7, 2))
