"""How an integer engine rounds: the formulas of its kernels, as named, versioned profiles.

Codes are held in float tensors; every formula is float32 arithmetic unless it says otherwise, since that is what
the engine's kernels use between their int32 sums and their int8 results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from eagerq.errors import SpecError
from eagerq.quant.spec import QuantSpec

#: float32 holds every integer below this, so that sums of codes that stay below it are exact in any order.
EXACT_FLOAT32 = 2.0**24


@dataclasses.dataclass(frozen=True)
class Grid:
    """The integer grid of one tensor.

    Attributes:
        scale: real value of one code, float32 ``()``.
        zero_point: the code of zero, float32 ``()``.
        low, high: lowest and highest code.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int

    @classmethod
    def of(cls, spec: QuantSpec, scale: Tensor, zero_point: Tensor) -> Grid:
        """From a quantizer's buffers of one element each."""
        return cls(scale.reshape(()).float(), zero_point.reshape(()).float(), spec.quant_min, spec.quant_max)

    def clip(self, codes: Tensor) -> Tensor:
        """The nearest codes of this grid."""
        return codes.clamp(self.low, self.high)

    def is_same(self, other: Grid) -> bool:
        """Whether equal codes stand for equal values."""
        return self is other or (bool(self.scale == other.scale) and bool(self.zero_point == other.zero_point))


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32 values, rounded once."""
    return (a.double() * b.double() + c.double()).float()


@dataclasses.dataclass(frozen=True)
class EngineProfile:
    r"""ONNX Runtime's integer kernels on x64: :math:`s` a scale, :math:`z` a zero point, :math:`q` codes; every rounding to even.

    Measured against ONNX Runtime 1.32, optimisation level ALL. A subclass overrides what another engine does otherwise.

    Attributes:
        name: for example ``"onnxruntime-x64"``.
        version: of these formulas; a number stays with its formulas for good.
    """

    name: str
    version: int

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        r""":math:`\mathrm{rint}(x / s) + z`, a division."""
        return grid.clip(torch.round(x.float() / grid.scale) + grid.zero_point)

    def dequantize(self, codes: Tensor, grid: Grid) -> Tensor:
        r""":math:`(q - z)\,s`."""
        return (codes - grid.zero_point) * grid.scale

    def requantize(self, total: Tensor, factor: Tensor, grid: Grid) -> Tensor:
        r""":math:`\mathrm{rint}(f(\textit{total}) \cdot (s_x s_w / s)) + z` of an int32 sum; ``factor`` is :math:`s_x s_w`."""
        return grid.clip(torch.round(total.float() * (factor / grid.scale)) + grid.zero_point)

    def add(self, a: Tensor, of_a: Grid, b: Tensor, of_b: Grid, grid: Grid) -> Tensor:
        r""":math:`\mathrm{rint}(\mathrm{fma}(q_a, r_a, \mathrm{fma}(q_b, r_b, c)))`.

        With :math:`r_i = s_i / s` and :math:`c = z - \mathrm{fma}(r_a, z_a, r_b z_b)`.
        """
        ra, rb = of_a.scale / grid.scale, of_b.scale / grid.scale
        c = grid.zero_point - fma(ra, of_a.zero_point, rb * of_b.zero_point)
        return grid.clip(torch.round(fma(a, ra, fma(b, rb, c))))

    def mul(self, a: Tensor, of_a: Grid, b: Tensor, of_b: Grid, grid: Grid) -> Tensor:
        r""":math:`\mathrm{rint}(\mathrm{fma}((q_a - z_a)(q_b - z_b), s_a s_b / s, z))`."""
        product = (a - of_a.zero_point) * (b - of_b.zero_point)
        return grid.clip(torch.round(fma(product, (of_a.scale * of_b.scale) / grid.scale, grid.zero_point)))

    def average(self, total: Tensor, count: int, of_x: Grid, grid: Grid) -> Tensor:
        r""":math:`\mathrm{rint}(\textit{total} \cdot s_x / (s\,n)) + z`; ``total`` is :math:`\sum (q - z_x)` over n codes."""
        return grid.clip(torch.round(total.float() * (of_x.scale / (grid.scale * count))) + grid.zero_point)

    def sigmoid(self, x: Tensor) -> Tensor:
        r"""The kernel's rational approximation of :math:`1/(1+e^{-x})`, within 1e-7; coefficients of Eigen's logistic."""
        x = x.float().clamp(-18.0, 18.0)
        square = x * x
        p, q = (torch.full_like(x, c[0]) for c in (_LOGISTIC_P, _LOGISTIC_Q))
        for c in _LOGISTIC_P[1:]:
            p = fma(square, p, torch.full_like(x, c))
        for c in _LOGISTIC_Q[1:]:
            q = fma(square, q, torch.full_like(x, c))
        return (p * x / q + 0.5).clamp(0.0, 1.0)

    def hardsigmoid(self, x: Tensor) -> Tensor:
        r""":math:`\mathrm{clip}(x/6 + 1/2, 0, 1)`."""
        return (x.float() * (1 / 6) + 0.5).clamp(0.0, 1.0)

    def table(self, function: Callable[[Tensor], Tensor], codes: Tensor, of_x: Grid, grid: Grid) -> Tensor:
        """The quantized ``function`` of the real value of each code: one entry a code, looked up."""
        entries = torch.arange(of_x.low, of_x.high + 1, dtype=torch.float32, device=codes.device)
        entries = self.quantize(function(self.dequantize(entries, of_x)), grid)
        return entries[(codes - of_x.low).long()]


_LOGISTIC_P = (4.37031012579801e-11, 1.15627324459942e-07, 6.08574864600143e-05, 8.51377133304701e-03, 2.48287947061529e-01)
_LOGISTIC_Q = (
    6.10247389755681e-13,
    5.76102136993427e-09,
    6.29106785017040e-06,
    1.70198817374094e-03,
    1.16817656904453e-01,
    9.93151921023180e-01,
)
PROFILES: Mapping[str, EngineProfile] = {"onnxruntime-x64": EngineProfile("onnxruntime-x64", 1)}


def get_profile(value: EngineProfile | str) -> EngineProfile:
    """The profile that ``value`` (a profile or its name) stands for.

    Raises:
        SpecError: for a name that no profile has, or another type.
    """
    if isinstance(value, EngineProfile):
        return value
    if isinstance(value, str) and value in PROFILES:
        return PROFILES[value]
    raise SpecError(f"wanted an EngineProfile or one of {', '.join(PROFILES)}, found {value!r}.")
