"""Observers: the range of values a tensor takes, learned in training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eagerq.quant.functional import Bounds, dequantize, quantization_params, quantize
from eagerq.quant.layout import rows_of
from eagerq.quant.ranks import Ranks, hull, mean
from eagerq.quant.spec import QuantSpec

_MSE_CANDIDATES = 40


class QuantState(nn.Module):
    """Base of modules whose buffers are quantization parameters: they never drop below float32."""

    def _unlearned(self) -> dict[str, float]:
        """What buffers hold while nothing was learned, by name."""
        return {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantState:
        before = dict(self._buffers)
        # of to_empty, which gives a module that has two parents memory twice: what held nothing learned still does, since nobody
        # writes that memory and a float checkpoint will not
        unlearned = {name: value for name, value in self._unlearned().items() if _is_filled(before.get(name), value)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = old.to(device=new.device, dtype=torch.float32)
        self._fill({name: value for name, value in unlearned.items() if self._buffers[name] is not before[name]})
        return self

    @torch.no_grad()
    def _fill(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            buffer = self._buffers.get(name)
            if buffer is not None:
                buffer.fill_(value)

    def _fit_checkpoint(self, state_dict: dict[str, Any], prefix: str, unset: dict[str, float]) -> None:
        """Give each checkpoint entry this module's shape: torch.ao stores () , (1,) or nothing before it observes."""
        for name, empty in unset.items():
            own, found = self._buffers[name], state_dict.get(prefix + name)
            if own is None or not isinstance(found, Tensor) or found.shape == own.shape:
                continue
            if found.numel() == 0:
                state_dict[prefix + name] = torch.full_like(own, empty)
            elif found.numel() in (1, own.numel()):
                state_dict[prefix + name] = found.reshape(-1).expand(own.numel()).reshape(own.shape)


def _is_filled(buffer: Tensor | None, value: float) -> bool:
    """Whether all of it holds this, or it holds nothing."""
    if buffer is None or torch._C._len_torch_dispatch_stack():  # within FakeTensorMode and the like nobody can say
        return False
    return buffer.is_meta or (type(buffer) is Tensor and bool((buffer == value).all()))


class Observer(QuantState):
    r"""Keeps ``min_val`` and ``max_val``, the range of what it saw, in real values.

    Once ``enable_observer_sync`` has set ``ranks``, a batch is that of all ranks of ``torch.distributed``. With the
    rank :math:`r` holding the :math:`n_r` values :math:`x_r`, and its own range :math:`l_r, h_r`, the batch's range is

    - ``"min_max"``, ``"moving_average"``: :math:`\min_r \min x_r,\; \max_r \max x_r`, the range of the union to the last bit;
    - ``"mse"``: of the shrunken ranges of the union that with the least :math:`\sum_r \mathrm{error}(x_r)`, which is the union's
      but for the rounding of that sum;
    - ``"percentile"``: :math:`\sum_r n_r l_r / \sum_r n_r,\; \sum_r n_r h_r / \sum_r n_r`. This is not the union's
      percentile, which would need all values in one place; both lie between the ranks' percentiles.

    A range that is not finite on one rank leaves the batch out on all, and a rank without values counts for nothing.

    Args:
        spec: names the method (``spec.observer``) and the grid it is for.
        channels: number of channels with a range each, or None for one range a tensor.
        axis: the channels' axis.
        memoryless: keep only the newest tensor's range (weights).

    Buffers:
        min_val, max_val: ``()`` or ``(channels,)``; zero until something was seen, and always finite, so
            that an averaged copy of a model (EMA) averages them. Batches whose range is not finite are left
            out, so one overflow in mixed precision does no harm.
    """

    #: Set by ``enable_observer_sync``: the processes whose batches count as one.
    ranks: Ranks | None

    min_val: Tensor
    max_val: Tensor

    def __init__(
        self, spec: QuantSpec, channels: int | None = None, axis: int = 0, *, memoryless: bool = False, device: Any = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.channels = channels
        self.axis = axis
        self.memoryless = memoryless
        self.ranks = None  # of the module's own, which compilers look at again, as they do not at its class's
        shape = () if channels is None else (channels,)
        self.register_buffer("min_val", torch.zeros(shape, device=device))
        self.register_buffer("max_val", torch.zeros(shape, device=device))

    def _unlearned(self) -> dict[str, float]:
        return {"min_val": 0.0, "max_val": 0.0}

    def reset_parameters(self) -> None:
        """Forget every batch: no range is known."""
        self._fill(self._unlearned())

    def others(self) -> Ranks | None:
        """The ranks to agree with in each batch; None if alone or not asked to."""
        return self.ranks if self.ranks is not None and self.ranks.are_several() else None

    def batch_range(self, x: Tensor, ranks: Ranks | None = None) -> tuple[Tensor, Tensor]:
        """Lowest and highest value to represent of ``x``, by the spec's method; ``()`` or ``(channels,)``.

        With ``ranks`` it is a collective, and ``x`` may be empty.
        """
        x = x.detach()
        size = self.channels or 1
        if not x.numel():
            low, high = self.min_val.new_full((size,), math.inf), self.min_val.new_full((size,), -math.inf)
        elif self.spec.observer == "percentile":
            low, high = _percentile(self._rows(x), self.spec.percentile)
        else:
            low, high = self._extremes(x)
        if ranks is not None:
            if self.spec.observer == "percentile":
                low, high = mean(low, high, torch.full_like(low, x.numel() // size), ranks)
            else:
                low, high = hull(low, high, ranks)
        if self.spec.observer == "mse":
            low, high = _least_squares(self._rows(x), low, high, self.spec, ranks)
        return low.reshape(self.min_val.shape), high.reshape(self.max_val.shape)

    def _rows(self, x: Tensor) -> Tensor:
        rows = x.reshape(1, -1) if self.channels is None else x.transpose(0, self.axis).flatten(1)
        return rows.to(self.min_val.dtype)

    def _extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest value of the tensor or of each channel, ``(channels or 1,)``; of two reductions, which are
        vectorised on CPUs and fused by compilers where ``aminmax`` along axes is neither. On CUDA what is compiled finds them row
        by row, in the kernel that makes the rows: none makes a tensor and reduces all of it."""
        low = high = x
        if self.channels is None and (row := _row_of(x)):
            low, high = low.amin(row), high.amax(row)
        rest = [d for d in range(low.dim()) if self.channels is None or d != self.axis % x.dim()]
        low, high = (low.amin(rest), high.amax(rest)) if rest else (low, high)
        return low.reshape(-1).to(self.min_val.dtype), high.reshape(-1).to(self.min_val.dtype)

    def merged(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The range after one more batch whose range is ``low``..``high``."""
        forgets = self.memoryless and self.spec.observer != "moving_average"
        constant = 1.0 if forgets else None if self.spec.observer == "min_max" else self.spec.averaging_constant
        return merged_range(self.min_val, self.max_val, low, high, constant)

    @torch.no_grad()
    def forward(self, x: Tensor, bounds: Bounds = (None, None)) -> Tensor:
        """Observe ``x.clamp(*bounds)`` (any shape) and return ``x``. An empty tensor teaches nothing."""
        ranks = self.others()
        if x.numel() or ranks is not None:
            if bounds != (None, None) and self.spec.observer not in ("min_max", "moving_average"):
                x, bounds = x.clamp(*bounds), (None, None)
            low, high = self.batch_range(x, ranks)
            if bounds != (None, None):  # the ends of what is clamped are the clamped ends
                low, high = low.clamp(*bounds), high.clamp(*bounds)
            low, high = self.merged(low, high)
            # as rows: of a write to a float64 tensor without axes torch.compile of PyTorch 2.11 says nothing and does nothing
            self.min_val.view(-1).copy_(low.view(-1))
            self.max_val.view(-1).copy_(high.view(-1))
        return x

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "eps", None)  # torch.ao's observers carry their least scale
        self._fit_checkpoint(state_dict, prefix, {"min_val": 0.0, "max_val": 0.0})
        for name in ("min_val", "max_val"):
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor):  # torch.ao's start at infinity
                state_dict[prefix + name] = torch.where(torch.isfinite(value), value, 0.0)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return self.spec.observer


def _row_of(x: Tensor) -> list[int]:
    """Axes to reduce before the others."""
    return rows_of(x) if torch.compiler.is_compiling() and x.is_cuda else []


def merged_range(min_val: Tensor, max_val: Tensor, low: Tensor, high: Tensor, constant: float | None) -> tuple[Tensor, Tensor]:
    r"""A running range after one more batch, whose range is ``low``..``high``.

    With a constant c, :math:`l' = l + c\,(low - l)`, with None :math:`\min(l, low)`; alike for the other end. The first range
    (both ends are zero until then) is taken whole, and one that is not finite is left out.
    """
    if constant == 1.0:
        new_low, new_high = low, high
    else:
        if constant is None:
            new_low, new_high = torch.minimum(min_val, low), torch.maximum(max_val, high)
        else:
            new_low, new_high = min_val + constant * (low - min_val), max_val + constant * (high - max_val)
        first = (min_val == 0) & (max_val == 0)
        new_low, new_high = torch.where(first, low, new_low), torch.where(first, high, new_high)
    finite = (high - low).abs() < math.inf  # of no values they are inf and -inf
    return torch.where(finite, new_low, min_val), torch.where(finite, new_high, max_val)


def merged_scalars(
    min_val: float, max_val: float, low: float, high: float, constant: float | None, nearest: Callable[[float], float]
) -> tuple[float, float]:
    """``merged_range`` in Python's numbers, each result rounded by ``nearest``: the same bits, sooner."""
    if not math.isfinite(nearest(high - low)):
        return min_val, max_val
    if (min_val == 0 and max_val == 0) or constant == 1.0:
        return low, high
    if constant is None:
        return min(min_val, low), max(max_val, high)
    c = nearest(constant)
    ends = ((min_val, low), (max_val, high))
    new_low, new_high = (nearest(old + nearest(c * nearest(new - old))) for old, new in ends)
    return new_low, new_high


def _percentile(rows: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Per row, the values below and above which the given share of the entries lies (exact order statistics)."""
    n = rows.shape[1]
    k = min(n, max(1, math.ceil(n * percentile / 100.0)))
    return rows.kthvalue(n - k + 1, dim=1).values, rows.kthvalue(k, dim=1).values


def _least_squares(rows: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, ranks: Ranks | None = None) -> tuple[Tensor, Tensor]:
    """Per row, the shrunken range that quantizes it with the least squared error (grid search), over all ranks' rows."""
    shares = [1.0 - 0.8 * i / _MSE_CANDIDATES for i in range(_MSE_CANDIDATES)]
    errors = []
    for share in shares:
        scale, zero_point = quantization_params(spec, low * share, high * share)
        scale, zero_point = scale.unsqueeze(1), zero_point.unsqueeze(1)
        q = quantize(rows, scale, zero_point, spec.quant_min, spec.quant_max)
        errors.append((dequantize(q, scale, zero_point) - rows).square().sum(1))
    if ranks is not None:
        errors = list(ranks.total(torch.stack(errors)))
    best_low, best_high = low, high
    best = torch.full_like(low, math.inf)
    for share, error in zip(shares, errors, strict=True):
        better = error < best
        best = torch.where(better, error, best)
        best_low = torch.where(better, low * share, best_low)
        best_high = torch.where(better, high * share, best_high)
    return best_low, best_high
