r"""Fake quantization as ``torch.library`` operators that do in one pass what the plain form does in ten.

- ``eagerq::fake_quantize_activation``: an activation that clamps (ReLU, ReLU6, Hardtanh, none), fake quantization by the
  scale known before the batch, and observation: :math:`a = \mathrm{clamp}(x, low, high)`,
  :math:`\hat a = (\mathrm{clip}(\mathrm{rint}(a/s)+z) - z)\,s`; then the range, scale and zero point learn :math:`\min a,
  \max a`. While no range is known the result is :math:`a`. It gives :math:`\hat a` and a mask, a bit a value in the order of
  memory, that says where the gradient passes: where neither clamp nor clip held the value.
- ``eagerq::masked_gradient``: its backward, which needs no saved activation.
- ``eagerq::fake_quantize_gelu``: the same of :math:`a = \mathrm{gelu}(x)`, in the exact form; its backward
  ``eagerq::gelu_gradient`` needs :math:`x`, which the float form keeps too, and the mask.
- ``eagerq::fake_quantize_gated``: SiLU or Hardswish as engines compute it, :math:`Q_y(Q_x(x)\, Q_g(g(Q_x(x))))`, with its three
  quantizers; its backward ``eagerq::gated_gradient`` finds them again from :math:`x`, which the float form keeps too.
- ``eagerq::fake_quantize_sigmoid``: a sigmoid or hard sigmoid that is a table over codes, :math:`Q_y(f(Q_x(x)))`, with its two
  quantizers; its backward ``eagerq::sigmoid_gradient`` finds them again from :math:`x`.
- ``eagerq::batch_norm_activation``: a batch norm in training before all that, in the passes that it takes itself: statistics and
  the ends of each channel of x, then :math:`\hat a` of :math:`a = \mathrm{clamp}((x - \mu)\,\gamma/\sigma + \beta, low, high)`.
  A norm is monotone in each channel, after every rounding too, so the ends of its output are images of those of x. Its backward
  finds :math:`a` again from x, which a norm keeps anyway, and needs no mask. Compilers see ``eagerq::batch_norm_statistics`` and
  ``eagerq::batch_norm_sums``, the first pass of either way, and PyTorch's own functions, to be fused with what surrounds them.
- ``eagerq::batch_norm_gated``: a batch norm in training before SiLU or Hardswish in quantized steps, in as many passes; its
  backward ``eagerq::batch_norm_gated_gradient`` finds all of it again from x.
- ``eagerq::quantizer_state``: a copy of a quantizer's state, for what compilers make of PyTorch's own functions. In a backward
  they would rather compute anew than keep what comes from the state, and by then it has learned; what an operator gave they keep.
- ``eagerq::fake_quantize_weight``: range, scale and fake quantization of a weight by its own range, a scale for each of its
  outermost channels, in the dtype asked for. It never clips, so the gradient passes whole.

CUDA tensors take the kernels of ``fast_kernels.py``, all others those of ``plain_kernels.py``. The state is float32 and int32,
and written in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagerq.quant import fast_kernels as fast
from eagerq.quant import plain_kernels as plain
from eagerq.quant.layout import dense

_GRID = "int quant_min, int quant_max, int levels, int fixed_zero_point, bool symmetric, bool power_of_two"
_STATE = "Tensor(a!) scale, Tensor(b!) zero_point, Tensor(c!) min_val, Tensor(d!) max_val"
_NORM = (
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor(f!) running_mean, Tensor(g!) running_var, Tensor(h!)? batches,"
    f" float momentum, float eps, {_STATE}, Tensor(e!) scratch, bool observes, bool learns, float? low, float? high,"
    f" float? constant, {_GRID})"
)

_SCHEMAS = {
    "fake_quantize_activation": f"(Tensor x, {_STATE}, Tensor(e!)? scratch, float? low, float? high, float? constant, {_GRID},"
    " bool needs_mask) -> (Tensor, Tensor)",
    "masked_gradient": "(Tensor grad, Tensor mask) -> Tensor",
    "fake_quantize_gelu": f"(Tensor x, {_STATE}, Tensor(e!)? scratch, float? constant, {_GRID}, bool needs_mask)"
    " -> (Tensor, Tensor)",
    "gelu_gradient": "(Tensor grad, Tensor x, Tensor mask) -> Tensor",
    "fake_quantize_gated": f"(Tensor x, Tensor(a!)[] state, Tensor(b!)[] scratch, bool hard, float? constant, {_GRID})"
    " -> (Tensor, Tensor)",
    "gated_gradient": "(Tensor grad, Tensor x, Tensor used, bool hard, int quant_min, int quant_max) -> Tensor",
    "fake_quantize_sigmoid": f"(Tensor x, Tensor(a!)[] state, Tensor(b!)[] scratch, bool hard, float? constant, {_GRID})"
    " -> (Tensor, Tensor)",
    "sigmoid_gradient": "(Tensor grad, Tensor x, Tensor used, bool hard, int quant_min, int quant_max) -> Tensor",
    "batch_norm_activation": f"{_NORM} -> (Tensor, Tensor)",
    "batch_norm_statistics": f"{_NORM} -> Tensor",
    "batch_norm_sums": "(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor kept, float? low, float? high,"
    " int quant_min, int quant_max) -> Tensor",
    "batch_norm_gated": "(Tensor x, Tensor? weight, Tensor? bias, Tensor(f!) running_mean, Tensor(g!) running_var,"
    " Tensor(h!)? batches, float momentum, float eps, Tensor(a!)[] state, Tensor(b!)[] scratch, bool learns, bool hard,"
    f" float? constant, {_GRID}) -> (Tensor, Tensor, Tensor)",
    "batch_norm_gated_gradient": "(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor kept, Tensor used, bool hard,"
    " int quant_min, int quant_max) -> (Tensor, Tensor)",
    "quantizer_state": "(Tensor scale, Tensor zero_point, Tensor min_val, Tensor max_val) -> Tensor",
    "fake_quantize_weight": f"(Tensor weight, {_STATE}, {_GRID}, ScalarType dtype) -> Tensor",
}
#: Behind the name of an operator with a gradient, the same without one: what compiled code holds, since for the first PyTorch's
#: dispatcher would enter Python twice.
BELOW = "_below_autograd"
WITH_BELOW = (
    "fake_quantize_activation", "masked_gradient", "fake_quantize_gelu", "fake_quantize_gated", "fake_quantize_sigmoid",
    "batch_norm_gated", "fake_quantize_weight",
)  # fmt: skip

LIBRARY: Any = torch.library.Library("eagerq", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _schema in _SCHEMAS.items():
    LIBRARY.define(_name + _schema)
    if _name in WITH_BELOW:
        LIBRARY.define(_name + BELOW + _schema)


# --- shapes alone


def _fake_activation(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense(x)), plain.mask_like(x, rest[-1])


def _fake_gelu_gradient(grad: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(dense(x), dtype=grad.dtype)


def _fake_gated(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense(x)), plain.used_of(x)


def _fake_gated_gradient(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(dense(x))


def _fake_sigmoid(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense(x)), plain.used_of(x, plain.SIGMOID_USED)


def _fake_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense(x)), plain.kept_of(x)


def _fake_norm_gated(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_gated(x), plain.kept_of(x)


def _fake_norm_gated_gradient(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense(x), dtype=grad.dtype), plain.sums_of(x)


def _fake_statistics(x: Tensor, *rest: Any) -> Tensor:
    return plain.kept_of(x)


def _fake_sums(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return plain.sums_of(x)


def _fake_gradient(grad: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(dense(grad))


def _fake_state(scale: Tensor, *rest: Tensor) -> Tensor:
    return scale.new_empty(4, scale.numel())


def _fake_weight(weight: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(dense(weight), dtype=rest[-1])


for _name, _plain, _fast, _fake in (
    ("fake_quantize_activation", plain.activation, fast.activation, _fake_activation),
    ("masked_gradient", plain.masked_gradient, fast.masked_gradient, _fake_gradient),
    ("fake_quantize_gelu", plain.gelu, fast.gelu, _fake_activation),
    ("gelu_gradient", plain.gelu_gradient, fast.gelu_gradient, _fake_gelu_gradient),
    ("fake_quantize_gated", plain.gated, fast.gated, _fake_gated),
    ("gated_gradient", plain.gated_gradient, fast.gated_gradient, _fake_gated_gradient),
    ("fake_quantize_sigmoid", plain.sigmoid, fast.sigmoid, _fake_sigmoid),
    ("sigmoid_gradient", plain.sigmoid_gradient, fast.sigmoid_gradient, _fake_gated_gradient),
    ("batch_norm_activation", plain.norm_activation, fast.norm_activation, _fake_norm),
    ("batch_norm_gated", plain.norm_gated, fast.norm_gated, _fake_norm_gated),
    ("batch_norm_gated_gradient", plain.norm_gated_gradient, fast.norm_gated_gradient, _fake_norm_gated_gradient),
    ("batch_norm_statistics", plain.norm_statistics, fast.norm_statistics, _fake_statistics),
    ("batch_norm_sums", plain.norm_sums, fast.norm_sums, _fake_sums),
    ("quantizer_state", plain.quantizer_state, plain.quantizer_state, _fake_state),
    ("fake_quantize_weight", plain.weight_by_its_range, fast.weight_by_its_range, _fake_weight),
):
    for _each in (_name, _name + BELOW) if _name in WITH_BELOW else (_name,):
        LIBRARY.impl(_each, _plain, "CompositeExplicitAutograd")
        LIBRARY.impl(_each, _fast, "CUDA")
        torch.library.register_fake(f"eagerq::{_each}", _fake, lib=LIBRARY)
