"""What differs between Conv, ConvTranspose, Linear and Embedding, said once each.

An op is a mixin without state: ``op`` computes, the rest says how values per output channel lie on
the weight. QAT and deployed modules share it; they hold the geometry (``stride``, ...) as attributes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eagerq.nn.modules.conv import pad_same

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Op:
    """A linear map ``op(input, weight, bias)`` with output channels along one axis of its weight."""

    #: The axis of the weight along which an integer engine keeps one scale a channel.
    channel_axis = 0

    def op(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the map; further arguments are those of the float module's ``forward``."""
        raise NotImplementedError  # pragma: no cover

    def check_norm_input(self, x: Tensor) -> None:
        """Raise if a norm after this op would not see the op's channels on axis 1."""

    def scale_is_per_output(self) -> bool:
        """Whether a scale for each entry of ``channel_axis`` is one for each output channel."""
        return True

    def by_output(self, weight: Tensor) -> Tensor:
        """A view of the weight with axis 0 running over groups and ``channels_dim`` over each group's outputs."""
        return weight.unsqueeze(0)

    channels_dim = 1

    #: The axis of the output that its channels lie on.
    output_axis = 1

    #: Whether autocast runs it in half precision, and casts its weight.
    casts = True

    def scale_weight(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The weight with output channel c multiplied by ``scale[c]``; ``scale`` is ``(C_out,)``."""
        view = self.by_output(weight)
        shape = [1] * view.dim()
        shape[0], shape[self.channels_dim] = view.shape[0], view.shape[self.channels_dim]
        return (view * scale.reshape(shape)).reshape(weight.shape)

    def output_amax(self, weight: Tensor) -> Tensor:
        """Largest magnitude of each output channel's weights, ``(C_out,)``."""
        view = self.by_output(weight).abs()
        rest = [d for d in range(view.dim()) if d not in (0, self.channels_dim)]
        return view.amax(rest).reshape(-1)

    def output_sum(self, weight: Tensor) -> Tensor:
        """Sum of each output channel's weights, ``(C_out,)``."""
        view = self.by_output(weight)
        rest = [d for d in range(view.dim()) if d not in (0, self.channels_dim)]
        return view.sum(rest).reshape(-1)


class ConvOp(Op):
    """Convolution of any width; weight ``(out, in/groups, *k)``."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Any
    _reversed_padding_repeated_twice: list[int]
    same_padding = False

    def op(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        padding = self.padding
        if self.same_padding:
            input, padding = pad_same(input, self.kernel_size, self.stride, self.dilation), 0
        elif self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        conv: Any = _CONV[weight.dim() - 2]
        out: Tensor = conv(input, weight, bias, self.stride, padding, self.dilation, self.groups)
        return out


class ScaleOp(ConvOp):
    """Depthwise convolution of size 1, ``y[:, c] = x[:, c] weight[c] + bias[c]``; weight ``(C, 1, ..., 1)``.

    Products broadcast, which is faster than PyTorch's convolution.

    Raises:
        ValueError: if the input has not as many axes as the weight, as batch norms raise it.
        RuntimeError: if it has other channels than the weight, or holds integers.
    """

    casts = False

    def check_norm_input(self, x: Tensor) -> None:
        axes = len(self.kernel_size) + 2
        if x.dim() != axes:
            raise ValueError(f"expected {axes}D input (got {x.dim()}D input)")

    def op(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        if torch.onnx.is_in_onnx_export():  # where engines have an integer kernel
            return ConvOp.op(self, input, weight, bias)  # by name: deployed modules call it as theirs
        self.check_norm_input(input)
        if input.shape[1] != len(weight):  # which would broadcast
            raise RuntimeError(f"expected an input of {len(weight)} channels (got {input.shape[1]})")
        if not input.is_floating_point():  # to which the result would be cut
            raise RuntimeError(f"expected a floating-point input (got {input.dtype})")
        shape = (1, -1, *(1,) * (weight.dim() - 2))
        out = input * weight.reshape(shape)
        return (out if bias is None else out + bias.reshape(shape)).to(input.dtype)


class ConvTransposeOp(Op):
    """Transposed convolution of any width; weight ``(in, out/groups, *k)``."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    channel_axis = 1
    channels_dim = 2

    def op(self, input: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None, *args: Any) -> Tensor:
        dims = weight.dim() - 2
        output_padding: Any = self.output_padding
        if output_size is not None:
            output_padding = self._output_padding(  # type: ignore[attr-defined]
                input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
            )
        conv: Any = _CONV_TRANSPOSE[dims]
        out: Tensor = conv(input, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation)
        return out

    def scale_is_per_output(self) -> bool:
        return self.groups == 1

    def by_output(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])


class LinearOp(Op):
    """Matrix product over the last axis; weight ``(out, in)``."""

    output_axis = -1

    def op(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        return F.linear(input, weight, bias)

    def check_norm_input(self, x: Tensor) -> None:
        if x.dim() != 2:
            raise ValueError(
                f"Linear followed by a batch norm folds for inputs of shape (N, C), found {tuple(x.shape)}:"
                " on (N, L, C) the norm's channel axis is L. Keep such a pair unfused."
            )


class EmbeddingOp(Op):
    """Look-up of rows; weight ``(num_embeddings, embedding_dim)``."""

    casts = False

    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool

    def op(self, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        return F.embedding(input, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)


def fold(op: Op, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    r"""Fold :math:`y \mapsto a y + b` into the linear map before it: :math:`W' = a W,\; b' = a\,bias + b`.

    This is the one fold: QAT modules in eval, ``convert`` and the export all use it.

    Args:
        op: says how output channels lie on ``weight`` (grouped transposed convolutions included).
        weight, bias: of the linear map; ``bias`` ``(C_out,)`` or None.
        scale, shift: ``a`` and ``b``, each ``(C_out,)`` (see ``batchnorm.scale_and_shift``).
    """
    folded = op.scale_weight(weight.to(torch.promote_types(weight.dtype, scale.dtype)), scale)
    return folded, shift if bias is None else torch.addcmul(shift, bias.to(shift.dtype), scale)
