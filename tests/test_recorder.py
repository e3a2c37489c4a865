"""Watched on the meta device, functions give the shapes, strides, types and gradients that PyTorch's own give on data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagerq.recorder import record_forward

LSTM = nn.LSTM(6, 4, num_layers=2, batch_first=True, bidirectional=True)
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "linear": (F.linear, (torch.randn(3, 4, 6), torch.randn(5, 6), torch.randn(5))),
    "linear, no bias": (F.linear, (torch.randn(3, 6), torch.randn(5, 6))),
    "linear, permuted": (F.linear, (torch.randn(2, 6, 3, 4).permute(0, 2, 3, 1), torch.randn(5, 6), torch.randn(5))),
    "linear, a vector": (F.linear, (torch.randn(6), torch.randn(5, 6))),
    "linear, to a number": (F.linear, (torch.randn(3, 6), torch.randn(6))),
    "layer_norm": (F.layer_norm, (torch.randn(3, 4, 6), (6,), torch.randn(6), torch.randn(6))),
    "layer_norm, plain": (F.layer_norm, (torch.randn(3, 4, 6), [4, 6])),
    "layer_norm, permuted": (F.layer_norm, (torch.randn(2, 6, 3, 4).permute(0, 2, 3, 1), (6,), torch.randn(6))),
    "torch.layer_norm": (torch.layer_norm, (torch.randn(3, 4, 6), (6,), None, None, 1e-5, False)),
    "normalize": (F.normalize, (torch.randn(3, 4, 6),)),
    "normalize, permuted": (F.normalize, (torch.randn(3, 4, 6).transpose(1, 2), 1.0, -1)),
    "gelu": (F.gelu, (torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),)),
    "gelu, tanh": (partial(F.gelu, approximate="tanh"), (torch.randn(2, 3),)),
    "linear, of nothing": (F.linear, (torch.randn(2, 0, 6), torch.randn(5, 6))),
    "linear, to nothing": (F.linear, (torch.randn(3, 6), torch.randn(0, 6))),
    "layer_norm, of nothing": (F.layer_norm, (torch.randn(0, 6), (6,), torch.randn(6))),
    "batch_norm": (F.batch_norm, (torch.randn(4, 6, 3), torch.zeros(6), torch.ones(6), torch.ones(6), None, True)),
    "lstm, steps first": (nn.LSTM(6, 4), (torch.randn(2, 7, 6),)),
    "lstm": (LSTM, (torch.randn(2, 7, 6),)),
}
#: Which argument is the weight.
WEIGHTS: dict[Any, int] = {F.linear: 1, F.layer_norm: 2, F.batch_norm: 3}
WRONG: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "linear, widths": (F.linear, (torch.randn(3, 4), torch.randn(5, 6))),
    "linear, bias": (F.linear, (torch.randn(3, 6), torch.randn(5, 6), torch.randn(4))),
    "layer_norm, widths": (F.layer_norm, (torch.randn(3, 4), (6,))),
    "layer_norm, weight": (F.layer_norm, (torch.randn(3, 4), (4,), torch.randn(3))),
    "torch.layer_norm, widths": (torch.layer_norm, (torch.randn(3, 4), (6,), None, None, 1e-5, False)),
    "normalize, whole numbers": (F.normalize, (torch.ones(3, 4, dtype=torch.int64),)),
    "normalize, axis": (partial(F.normalize, dim=1), (torch.randn(4),)),
    "gelu, unknown": (partial(F.gelu, approximate="rough"), (torch.randn(3),)),
}


def _no(module: nn.Module) -> bool:
    return False


class _Calls(nn.Module):
    """Calls one function and keeps what it gave."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        self.given = self.function(*args)
        return self.given


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [t for item in found for t in _tensors(item)]


def _meta(args: tuple[Any, ...], learns: int) -> tuple[Any, ...]:
    """The arguments on the meta device, with the same strides; that numbered ``learns`` records gradients."""
    made = []
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            value.requires_grad_(i == learns)
        made.append(value)
    return tuple(made)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("learns", [0, 1, -1])
def test_functions_on_meta_do_to_shapes_what_they_do_on_data(name: str, learns: int) -> None:
    function, args = CASES[name]
    if learns == 1:  # the weight, where there is one
        learns = WEIGHTS.get(function, 0)
        learns = learns if learns < len(args) and isinstance(args[learns], Tensor) else 0
    data = [a.clone().requires_grad_() if i == learns else a for i, a in enumerate(args)]
    on_meta = function.to("meta") if isinstance(function, nn.Module) else function
    model = _Calls(on_meta)
    record_forward(model, _meta(args, learns), {}, _no)
    if isinstance(function, nn.Module):
        function.to_empty(device="cpu")
    want, found = _tensors(function(*data)), _tensors(model.given)
    assert [t.shape for t in found] == [t.shape for t in want]
    assert [t.stride() for t in found] == [t.stride() for t in want]
    assert [t.dtype for t in found] == [t.dtype for t in want]
    assert [t.requires_grad for t in found] == [t.requires_grad for t in want]


@pytest.mark.parametrize("name", WRONG)
def test_what_raises_on_data_raises_on_meta(name: str) -> None:
    function, args = WRONG[name]
    with pytest.raises((RuntimeError, IndexError)) as wanted:
        function(*args)
    with pytest.raises(wanted.type):
        record_forward(_Calls(function), _meta(args, -1), {}, _no)


def test_functions_keep_their_names() -> None:
    """Quantizers are placed by them."""

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        x = F.normalize(F.gelu(F.layer_norm(F.linear(x, weight), (5,))))
        return torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)

    for device in ("cpu", "meta"):
        trace = record_forward(_Calls(forward), (torch.empty(2, 6, device=device), torch.empty(5, 6, device=device)), {}, _no)
        assert [call.name for call in trace.calls] == ["linear", "layer_norm", "gelu", "normalize", "batch_norm"]
