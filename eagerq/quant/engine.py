"""How an integer engine rounds: the formulas of its kernels, as named, versioned profiles.

Codes are whole numbers, in float tensors or in bytes; every formula is float32 arithmetic unless it says otherwise,
since that is what the engine's kernels use between their int32 sums and their int8 results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

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
        dtype: that codes are held in: float32, or the one byte that holds the grid.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, spec: QuantSpec, scale: Tensor, zero_point: Tensor, kernels: str = "float") -> Grid:
        """From a quantizer's buffers of one element each; ``kernels`` as in ``EngineProfile``."""
        byte = torch.int8 if spec.signed else torch.uint8
        dtype = torch.float32 if kernels == "float" else byte
        return cls(scale.reshape(()).float(), zero_point.reshape(()).float(), spec.quant_min, spec.quant_max, dtype)

    def clip(self, codes: Tensor) -> Tensor:
        """The nearest codes of this grid, in its dtype."""
        return codes.clamp(self.low, self.high).to(self.dtype)

    def is_same(self, other: Grid) -> bool:
        """Whether the codes of both are the same and stand for equal values."""
        if self is other:
            return True
        same = (self.low, self.high, self.dtype) == (other.low, other.high, other.dtype)
        return same and bool(self.scale == other.scale) and bool(self.zero_point == other.zero_point)

    def clips_to_unit(self) -> bool:
        """Whether the codes of x and of x clipped to [0, 1] are the same, for every x."""
        # below 0, rint(x / s) + z falls without end, so the code is that of 0 for all x just where z is the lowest code;
        # above 1, rint(x / s) + z grows without end from rint(1 / s) + z on, so that must not lie under the highest code
        return bool(self.zero_point == self.low) and bool(torch.round(1 / self.scale) + self.zero_point >= self.high)


def hardsigmoid_terms(of_x: Grid, grid: Grid) -> tuple[Grid, Grid] | None:
    """The grids of x/6, on which the codes are those of x, and of one half, whose code is 1, if a hard sigmoid is their sum.

    It is where the codes of ``grid`` clip it as it should be, and both grids have all of the same eight bits.
    """
    # a narrower grid is clipped before QuantizeLinear, so that no sum would stand right before that
    bounds = (of_x.low, of_x.high)
    if bounds != (grid.low, grid.high) or bounds not in ((0, 255), (-128, 127)) or not grid.clips_to_unit():
        return None
    half = dataclasses.replace(of_x, scale=torch.full_like(of_x.scale, 0.5), zero_point=torch.zeros_like(of_x.zero_point))
    return dataclasses.replace(of_x, scale=of_x.scale / 6), half


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
        kernels: what computes them here, with one result: ``"float"`` holds codes in float32 and sums them in
            floating point, ``"int8"`` holds a code in a byte and sums in integer kernels (see ``eagerq.nn.int8``).
    """

    name: str
    version: int
    kernels: str = "float"

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        r""":math:`\mathrm{rint}(x / s) + z`, a division."""
        return grid.clip(torch.round(x.float() / grid.scale) + grid.zero_point)

    def dequantize(self, codes: Tensor, grid: Grid) -> Tensor:
        r""":math:`(q - z)\,s`."""
        return (codes - grid.zero_point) * grid.scale

    def requantize(self, total: Tensor, factor: Tensor, grid: Grid) -> Tensor:
        r""":math:`\mathrm{rint}(f(\textit{total}) \cdot (s_x s_w / s)) + z` of an int32 sum; ``factor`` is :math:`s_x s_w`."""
        scaled = total.float() * (factor / grid.scale)
        return scaled.round_().add_(grid.zero_point).clamp_(grid.low, grid.high).to(grid.dtype)

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

    def window_average(self, windows: Iterable[Tensor], count: Tensor, grid: Grid) -> Tensor:
        r""":math:`\mathrm{rint}(\frac{1}{n} \sum x / s + z)`: real values summed one after the other, in float32.

        Args:
            windows: the values at each place of the window, in row-major order, zero where the window leaves the input.
            count: n, broadcasts against a window.
            grid: of the result.
        """
        total: Tensor | None = None
        for values in windows:
            total = values if total is None else total + values
        if total is None:
            raise ValueError("an average over a window of no places is not defined; give at least one.")
        return grid.clip(torch.round(total / count / grid.scale + grid.zero_point))

    def batch_norm(self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        r""":math:`x a + (\beta - \mu a)`, :math:`a = (1 / \sqrt{\sigma^2 + \epsilon})\,\gamma`, float32; parameters ``(C,)``."""
        root = torch.sqrt((var + eps).double()).float()  # torch's own float32 root is not always the nearest
        scale = (1.0 / root.double()).float() * weight
        shape = (-1,) + (1,) * (x.dim() - 2)
        return x * scale.reshape(shape) + (bias - mean * scale).reshape(shape)

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

    def hardswish(self, x: Tensor) -> Tensor:
        r""":math:`x \cdot \mathrm{hardsigmoid}(x)`: the engine takes the operator apart."""
        return x.float() * self.hardsigmoid(x)

    def nearest(self, inputs: int, outputs: int, factor: float | None = None) -> Tensor:
        r"""Which of ``inputs`` places each of ``outputs`` is: :math:`\lfloor o / f \rfloor`, f the factor or the sizes' ratio.

        All of it float32; PyTorch multiplies by :math:`1/f`, which at uneven factors now and then gives the place before.
        """
        scale = torch.tensor(float(outputs)) / inputs if factor is None else torch.tensor(float(factor))
        return torch.floor(torch.arange(outputs, dtype=torch.float32) / scale).clamp(max=inputs - 1).long()

    def table(self, function: Callable[[Tensor], Tensor], codes: Tensor, of_x: Grid, grid: Grid) -> Tensor:
        """The quantized ``function`` of the real value of each code: one entry a code, looked up."""
        return _looked_up(lambda entries: self.quantize(function(self.dequantize(entries, of_x)), grid), codes, of_x)

    def hardsigmoid_sum(self, codes: Tensor, of_x: Grid, grid: Grid) -> Tensor:
        r"""The sum :math:`(q - z_x)\,s_x/6 + 1 \cdot 1/2` by ``add`` where there are ``hardsigmoid_terms``, else the table."""
        terms = hardsigmoid_terms(of_x, grid)
        if terms is None:
            return self.table(self.hardsigmoid, codes, of_x, grid)
        sixth, half = terms
        return _looked_up(lambda entries: self.add(entries, sixth, torch.ones_like(entries), half, grid), codes, of_x)


class FollowsEngine:
    """Mixin of modules whose eval forward gives an engine's codes while ``profile`` is set; copies and pickles do not keep it."""

    #: Set by ``exact_mode``: the engine whose arithmetic the eval forward follows.
    profile: EngineProfile | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "profile"}


def _looked_up(function: Callable[[Tensor], Tensor], codes: Tensor, of_x: Grid) -> Tensor:
    entries = torch.arange(of_x.low, of_x.high + 1, dtype=torch.float32, device=codes.device)
    return function(entries)[codes.long() - of_x.low]


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
