"""What a kernel of the meta device gave before is what it gives, and errors are not remembered; weights stay random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .laws import _PERIOD, randomise
from .shapes import OPERATORS, remembered


def kernel_of(name: str) -> Any:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return operator.py_kernels[torch._C.DispatchKey.Meta]


def form(result: Any) -> list[Any]:
    results = result if isinstance(result, (tuple, list)) else [result]
    return [(t.shape, t.stride(), t.dtype, t.device) for t in results]


def arguments(name: str, batch: int, channels_last: bool) -> tuple[Any, ...]:
    x = torch.empty(batch, 6, 8, 8, device="meta")
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    c = torch.empty(6, device="meta")
    return {
        "native_batch_norm": (x, c, c, c, c, batch > 2, 0.1, 1e-5),
        "native_layer_norm": (x, [8], torch.empty(8, device="meta"), None, 1e-5),
        "native_group_norm": (x, c, c, batch, 6, 64, 2, 1e-5),
        "addmm": (c, torch.empty(batch, 4, device="meta"), torch.empty(4, 6, device="meta")),
        "gelu": (x,),
        "_softmax": (x, 1, False),
        "_safe_softmax": (x, 1),
        "mul.Tensor": (x, torch.empty(1, 8, device="meta", dtype=torch.float64 if batch > 2 else torch.float32)),
        "add.Tensor": (x, x[:1]),
        "mean.dim": (x, [2, 3], batch > 2),
        "cat": ([x, x], batch % 2),
        "roll": (x, [1], [2]),
        "convolution": (x, torch.empty(4, 6, 3, 3, device="meta"), None, [1, 1], [batch % 2] * 2, [1, 1], False, [0, 0], 1),
    }[name]


@pytest.mark.parametrize("name", OPERATORS)
def test_a_remembered_result_has_the_form_of_a_new_one(name: str) -> None:
    kernel, calls = kernel_of(name), 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return kernel(*args)

    known = remembered(counted)
    for _ in range(2):
        for batch, channels_last in ((2, False), (3, False), (2, True)):
            args = arguments(name, batch, channels_last)
            assert form(known(*args)) == form(kernel(*args))
    assert calls <= 3
    first, second = (known(*arguments(name, 2, False)) for _ in range(2))
    first, second = (r if isinstance(r, Tensor) else r[0] for r in (first, second))
    assert first is not second


def test_what_fails_fails_each_time() -> None:
    known = remembered(kernel_of("addmm"))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            known(torch.empty(6, device="meta"), torch.empty(2, 4, device="meta"), torch.empty(5, 6, device="meta"))


def test_rows_and_weights_differ() -> None:
    model = nn.Sequential(nn.Linear(1024, 1500, bias=False), nn.Linear(1024, 1500, bias=False), nn.Conv2d(8, 16, 3))
    randomise(model)
    weights = [module.weight.detach().flatten(1) for module in model if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert weights[0].numel() > _PERIOD
    for weight in weights:
        assert len(weight.unique(dim=0)) == len(weight)
        assert abs(weight.mean()) < 0.05 * weight.std()
        assert weight.std() == pytest.approx((1.5 / weight.shape[1]) ** 0.5, rel=0.1)
    assert not (weights[0] == weights[1]).all(dim=1).any()
