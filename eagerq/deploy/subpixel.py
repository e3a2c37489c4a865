"""Transposed convolutions written as convolutions: engines have an integer kernel for those."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagerq.nn.modules.hooks import POST_HOOKS, PRE_HOOKS, share_hooks
from eagerq.nn.modules.ops import ConvTransposeOp
from eagerq.nn.qat.split import SplitActivation
from eagerq.nn.quantized import QuantizeDequantize, QuantizedModule
from eagerq.quant.observer import QuantState
from eagerq.surgery import BOOKKEEPING, replace_modules

#: Activations that an engine runs inside the convolution before them.
_CLIPS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)


@dataclasses.dataclass(frozen=True)
class Axis:
    r"""One axis of a transposed convolution of dilation 1 as a convolution of stride 1 with ``stride`` outputs a place.

    With the kernel :math:`w` of K taps, stride s, padding p and :math:`o + p = q s + r`, :math:`0 \le r < s`:
    :math:`y_o = \sum_m x_{q - m} w_{r + s m}`. For each phase r that is a convolution with :math:`M = \lceil K / s \rceil`
    taps, the kernel filled with zeros to :math:`M s` (the sub-pixel form of Shi et al., 2016, arXiv:1609.07009).
    Zeros before the kernel shift its places, which saves a crop where p is no multiple of s and there is room.

    Args:
        kernel, stride, padding: K, s and p.
    """

    kernel: int
    stride: int
    padding: int

    @property
    def taps(self) -> int:
        """M."""
        return -(-self.kernel // self.stride)

    @property
    def fill(self) -> tuple[int, int]:
        """Zeros before and behind the kernel."""
        room = self.taps * self.stride - self.kernel
        before = -self.padding % self.stride
        return (before, room - before) if before <= room else (0, room)

    @property
    def _skipped(self) -> int:
        """Places before the first that an output needs, as many as padding can leave out."""
        return min((self.padding + self.fill[0]) // self.stride, self.taps - 1)

    def pads(self, output_padding: int) -> tuple[int, int]:
        """Padding of the convolution, before and behind the input."""
        behind = (self.fill[0] + self.kernel - self.padding + output_padding - 1) // self.stride
        return self.taps - 1 - self._skipped, max(0, behind)

    def crops(self, output_padding: int) -> tuple[int, int]:
        """How many outputs too many there are, before and behind, once those of all places are in a row."""
        before = self.padding + self.fill[0] - self._skipped * self.stride
        # of an input of one place; each further one adds as much to both
        found = (1 + self.pads(output_padding)[1] - self._skipped) * self.stride
        wanted = self.kernel - 2 * self.padding + output_padding
        return before, found - wanted - before


def as_convolution(weight: Tensor, groups: int, height: Axis, width: Axis) -> Tensor:
    """The weight ``(in, out/groups, *k)`` of a transposed convolution as that of its convolution.

    Returns:
        ``(out * s_h * s_w, in/groups, M_h, M_w)``: the phases of an output channel lie together, the columns' last.
    """
    by_group = weight.reshape(groups, -1, *weight.shape[1:])
    filled = F.pad(by_group, (*width.fill, *height.fill))
    into, out = filled.shape[1:3]
    phases = filled.reshape(groups, into, out, height.taps, height.stride, width.taps, width.stride).flip(3, 5)
    return phases.permute(0, 2, 4, 6, 1, 3, 5).reshape(-1, into, height.taps, width.taps)


def interleaved(x: Tensor, height: Axis, width: Axis, output_padding: tuple[int, int]) -> Tensor:
    """``(N, C * s_h * s_w, H, W)`` with each channel's phases put into their places, and cropped: the transposed result.

    It moves values only. Two transpositions of three and four axes take ONNX Runtime a third of the time of
    DepthToSpace, which wants equal strides too.
    """
    rows, columns = x.shape[2:]
    channels = x.shape[1] // (height.stride * width.stride)
    if width.stride > 1:
        x = x.reshape(-1, width.stride, rows * columns).transpose(1, 2)
        columns *= width.stride
    if height.stride > 1:
        x = x.reshape(-1, height.stride, rows, columns).transpose(1, 2)
        rows *= height.stride
    x = x.reshape(-1, channels, rows, columns)
    for dim, axis, extra in ((2, height, output_padding[0]), (3, width, output_padding[1])):
        before, behind = axis.crops(extra)
        if before or behind:
            x = x.narrow(dim, before, x.shape[dim] - before - behind)
    return x


class SubpixelModule(QuantizedModule):
    """A deployed transposed convolution in the form it is exported in; its attributes and children are the original's.

    Buffers: ``kernel_codes``, ``kernel_scale``, ``kernel_zero_point``, ``offset_codes`` and ``offset_scale``, the
    convolution's weight and bias.

    Args:
        module: one that ``has_subpixel_form``.
    """

    kernel_codes: Tensor
    kernel_scale: Tensor
    kernel_zero_point: Tensor
    offset_codes: Tensor | None
    offset_scale: Tensor | None

    def __init__(self, module: QuantizedModule) -> None:
        QuantState.__init__(self)
        vars(self).update({name: value for name, value in vars(module).items() if name not in BOOKKEEPING})
        self.training = module.training
        for name, buffer in module._buffers.items():
            self.register_buffer(name, buffer)
        for name, child in module._modules.items():
            self.register_module(name, child)
        share_hooks(self, [module], (*PRE_HOOKS, *POST_HOOKS))
        height, width = (Axis(*sizes) for sizes in zip(module.kernel_size, module.stride, module.padding, strict=True))
        self.axes = (height, width)
        phases = height.stride * width.stride

        def by_output(values: Tensor) -> Tensor:
            """A value for each of the convolution's channels, from one for each place in a group, or for all."""
            return values if values.numel() == 1 else values.repeat(module.groups).repeat_interleave(phases)

        zero: Tensor = by_output(module.weight_zero_point)  # type: ignore[arg-type]
        about_zero = as_convolution(module._weight_about_zero(), module.groups, height, width)
        self.register_buffer("kernel_codes", (about_zero + zero.reshape(-1, 1, 1, 1)).to(module.weight_codes.dtype))
        self.register_buffer("kernel_scale", by_output(module.weight_scale))  # type: ignore[arg-type]
        self.register_buffer("kernel_zero_point", zero)
        for name, values in (("offset_codes", module.bias_codes), ("offset_scale", module.bias_scale)):
            self.register_buffer(name, None if values is None else values.repeat_interleave(phases))

    def _convolved(self, input: Tensor, height: tuple[int, int], width: tuple[int, int]) -> Tensor:
        weight = self._dequantized(self.kernel_codes, self.kernel_scale, self.kernel_zero_point, 0)
        given = [input, weight]
        if self.offset_codes is not None and self.offset_scale is not None:
            given.append(self._dequantized(self.offset_codes, self.offset_scale, torch.zeros_like(self.offset_codes), 0))
        batch, _, rows, columns = input.shape
        shape = (
            batch,
            weight.shape[0],
            rows + sum(height) - weight.shape[2] + 1,
            columns + sum(width) - weight.shape[3] + 1,
        )
        pads = [height[0], width[0], height[1], width[1]]
        attributes = {"pads": pads, "group": self.groups, "kernel_shape": list(weight.shape[2:])}
        # torch's own convolution pads both ends alike; a Pad before it would keep the engine from its integer kernel
        return torch.onnx.ops.symbolic("Conv", given, attributes, dtype=weight.dtype, shape=shape, version=11)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # type: ignore[override]
        if input.dim() == 3:  # without a batch
            return self.forward(input.unsqueeze(0), output_size).squeeze(0)
        if self.input_fake_quant is not None:
            input = self.input_fake_quant(input)
        height, width = self.axes
        rows, columns = self._output_padding(input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation)
        out = self._convolved(input, height.pads(rows), width.pads(columns))
        move = functools.partial(interleaved, height=height, width=width, output_padding=(rows, columns))
        quantize: nn.Module = self.activation_post_process  # type: ignore[assignment]
        if isinstance(self.act, SplitActivation):  # its first quantizer is the one behind the convolution
            result: Tensor = quantize(self.act(out, move))
        else:
            result = quantize(out if self.act is None else self.act(out), move)
        return result


def has_subpixel_form(module: nn.Module) -> TypeGuard[QuantizedModule]:
    """Whether this is a transposed convolution that an engine runs as integers once it is an ordinary one.

    All others keep their own operator, which ONNX Runtime runs in float: those of one or three dimensions, dilated ones,
    those whose input, weight or result is not quantized, whose bias is on a grid of its own, or whose activation the engine
    runs neither in the convolution nor on codes, or has hooks, which would see values that are not in their places yet.
    """
    if type(module) is not QuantizedModule or module.op_class.op is not ConvTransposeOp.op or module.weight_codes.dim() != 4:
        return False
    act, bias = module.act, module.bias_codes
    hooked = act is not None and (act._forward_hooks or act._forward_pre_hooks)
    return (
        tuple(module.dilation) == (1, 1)
        and module.weight_scale is not None
        and (bias is None or (bias.dtype == torch.int32 and module.bias_scale is not None))
        and isinstance(module.activation_post_process, QuantizeDequantize)
        and (act is None or isinstance(act, SplitActivation) or (type(act) in _CLIPS and not hooked))
    )


@contextlib.contextmanager
def in_subpixel_form(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the transposed convolutions of ``model`` that can be are written as convolutions.

    Yields:
        ``model``, or its form if it is itself such a convolution.
    """
    forms: dict[nn.Module, nn.Module] = {m: SubpixelModule(m) for m in model.modules() if has_subpixel_form(m)}
    form = replace_modules(model, forms)
    try:
        yield form
    finally:
        replace_modules(model, {form: module for module, form in forms.items()})
