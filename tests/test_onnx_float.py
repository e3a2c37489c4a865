"""What the engine's optimiser would compute on codes, but the model does not, runs in float; and files of less usual models."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import eagerq
from eagerq.deploy.runtime import session


class Through(nn.Module):
    """Two convolutions, and a function between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


class Added(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.a, self.b, self.p = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Parameter(torch.full((1,), value))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) + self.p)


def lopsided(*middle: nn.Module) -> nn.Sequential:
    """A channel that is always zero has the largest weights: with one scale a tensor, codes say nothing of the others."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *middle)
    layer = next(m for m in middle if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)))
    with torch.no_grad():
        if isinstance(layer, nn.ConvTranspose2d):
            layer.weight[0] += 200
        else:
            layer.weight.unflatten(1, (8, -1))[:, 0] += 200
        model[0].weight[0], model[0].bias[0] = 0, -1
    return model


FLAT = 8 * 100
#: A net, rules of what is quantized, and the operations that are to run in float.
NETS: dict[str, tuple[Callable[[], nn.Module], Any, set[str]]] = {
    "a float convolution": (lambda: lopsided(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)), {"2": None}, {"Conv"}),
    "and its ReLU": (lambda: lopsided(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), {"2": None}, {"Conv"}),
    "a float transposed convolution": (
        lambda: lopsided(nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8, 4, 1)), {"2": None}, {"ConvTranspose"}
    ),
    "a float linear map": (lambda: lopsided(nn.Flatten(), nn.Linear(FLAT, 16), nn.Linear(16, 4)), {"3": None}, {"Gemm"}),
    "spectral norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), spectral_norm(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 4, 1)), {}, {"Conv"}
    ),
    "a product by one": (lambda: Through(lambda x: x * 1.0), {}, set()),
    "a sum with a stored zero": (lambda: Added(0.0), {}, set()),
    "a view": (lambda: Through(lambda x: x.view_as(x)), {}, set()),
    "a pool that counts padding": (lambda: Through(lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True)), {}, {"AveragePool"}),
    "a padded one": (lambda: Through(lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)), {}, {"AveragePool"}),
    "a pool that counts none": (
        lambda: Through(lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False)), {}, set()
    ),
}  # fmt: skip


def deployed(model: nn.Module, rules: Any, *inputs: Any) -> nn.Module:
    q = eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=inputs), {"": "onnxruntime", **rules}, inputs)
    for factor in (1.0, 0.5, 2.0, 0.7):
        q(*(x * factor if isinstance(x, Tensor) else x for x in inputs))
    return eagerq.convert(q)


def of_engine(path: Any, *inputs: Tensor) -> Tensor:
    engine = session(os.fspath(path))
    return torch.from_numpy(engine.run(None, {v.name: x.numpy() for v, x in zip(engine.get_inputs(), inputs, strict=True)})[0])


@pytest.mark.parametrize("opset", [17, 18, 23])
@pytest.mark.parametrize("name", NETS)
def test_the_engine_computes_in_float_what_the_model_does(name: str, opset: int, tmp_path: Path) -> None:
    """To rounding of the file as it is: taps of its tensors would change what the optimiser sees."""
    make, rules, wanted = NETS[name]
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12)
    model = deployed(make(), rules, x)
    export = eagerq.export_onnx(model, tmp_path / "model.onnx", x, opset=opset)
    with torch.no_grad():
        expected = model(x)
    error = (of_engine(export, x) - expected).abs()
    assert float(error.max()) <= 1e-5 * float(expected.abs().max())
    assert {kernel.op.removeprefix("Fused") for kernel in export.floats} == wanted
    stays = [kernel for kernel in export.floats if kernel.op != "AveragePool"]
    assert all((kernel.reason, kernel.expected) == ("its weights are float", True) for kernel in stays)
    assert eagerq.verify_deployment(model, export, x).differing == 0


def test_a_strict_file_may_hold_layers_that_were_kept_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12)
    make, rules, _ = NETS["a float convolution"]
    export = eagerq.export_onnx(deployed(make(), rules, x), tmp_path / "model.onnx", x, strict=True)
    assert [(kernel.op, kernel.module) for kernel in export.floats] == [("Conv", "2")]
    pool, rules, _ = NETS["a padded one"]
    with pytest.raises(eagerq.errors.ExportError, match="AveragePool"):
        eagerq.export_onnx(deployed(pool(), rules, x), tmp_path / "pool.onnx", x, strict=True)


class Named(nn.Module):
    """Reached by a second name."""

    def __init__(self, part: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.encoder, self.last = self.body, nn.Conv2d(4, 2, 1) if part else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(x))


@pytest.mark.parametrize("part", [True, False])
def test_a_model_is_verified_whatever_names_its_forward_takes(part: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = deployed(Named(part), {}, x)
    found = eagerq.verify_deployment(model, eagerq.export_onnx(model, tmp_path / "model.onnx", x, strict=True), x)
    assert found.same and not found.missing
    assert len(found.rows) == (4 if part else 3)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, factor: float | None = None, flag: bool = False) -> Tensor:
        y = self.a(x)
        return self.b(y if factor is None or flag else y * factor)


@pytest.mark.parametrize("rest", [(), (0.5,), (None, True)], ids=str)
def test_a_batch_stays_open_beside_other_arguments(rest: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 12, 12)
    model = deployed(Scaled(), {}, x, *rest)
    export = eagerq.export_onnx(model, tmp_path / "model.onnx", (x, *rest))
    for size in (1, 2, 5):
        assert eagerq.verify_deployment(model, export, (torch.randn(size, 3, 12, 12), *rest)).differing == 0


def test_an_example_of_one_is_kept_where_no_batch_can_be_open(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 12, 12)

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Scaled()

        def forward(self, xs: list[Tensor]) -> Tensor:
            return self.net(xs[0])

    model = Listed()
    q = eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=([x],)), example_inputs=([x],))
    q([x])
    path = eagerq.export_onnx(eagerq.convert(q), tmp_path / "model.onnx", ([x],))
    assert [d.dim_value for d in onnx.load(os.fspath(path)).graph.input[0].type.tensor_type.shape.dim] == [1, 3, 12, 12]


class Branching(nn.Module):
    """One value, read as it is and quantized again."""

    def __init__(self, again: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.again = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), again

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return torch.cat([self.b(y), self.c(self.again(y))], 1)


#: Nets in which nothing is to be kept from integer kernels that was in them.
ALL_INTEGER: dict[str, Callable[[], nn.Module]] = {
    "quantized again by a view": lambda: Branching(lambda y: y.view_as(y)),
    "quantized again by a product": lambda: Branching(lambda y: y * 1.0),
    "a pool whose windows fit": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(8, 4, 1)),
    "a padded one whose windows fit": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AvgPool2d(2, padding=1, ceil_mode=True), nn.Conv2d(8, 4, 1)
    ),
}


@pytest.mark.parametrize("name", ALL_INTEGER)
def test_what_codes_serve_stays_on_codes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12)
    model = deployed(ALL_INTEGER[name](), {}, x)
    export = eagerq.export_onnx(model, tmp_path / "model.onnx", x, strict=True)
    found = eagerq.verify_deployment(model, export, x)
    assert (export.floats, found.differing, found.missing) == ((), 0, ())
    with torch.no_grad():
        assert float((of_engine(export, x) - model(x)).abs().max()) <= 1e-5


def test_a_part_that_is_all_float_is_as_it_was(tmp_path: Path) -> None:
    """ONNX Runtime fuses it, which a Max would keep it from."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12)
    body = [layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())]
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Sequential(*body))
    path = eagerq.export_onnx(deployed(model, {"1.*": None}, x), tmp_path / "model.onnx", x)
    kept = [node for node in onnx.load(os.fspath(path)).graph.node if node.op_type == "Max"]
    assert len(kept) == 1, "behind the first, which reads codes"


class Head(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a, self.h, self.dtype = nn.Conv2d(3, 8, 3), nn.Linear(8, 4, dtype=dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.a(x).mean((2, 3)).to(self.dtype))


class Lowest(nn.Module):
    """Whose argument has the name of a constant that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.f, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, lowest: Tensor) -> Tensor:
        return self.b(self.f(self.a(x))) + lowest


class Factors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, *factors: Any) -> Tensor:
        y = self.a(x)
        for factor in factors:
            y = y * factor
        return self.b(y)


IMAGE = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
UNUSUAL: dict[str, tuple[Callable[[], nn.Module], Any, tuple[Any, ...]]] = {
    "a half head": (lambda: Head(torch.float16), {"h": None}, (IMAGE,)),
    "a double head": (lambda: Head(torch.float64), {"h": None}, (IMAGE,)),
    "a name": (Lowest, {"f": None}, (IMAGE, torch.ones(2, 4, 10, 10))),
    "a list of numbers": (Factors, {}, (IMAGE, 0.5, 2.0)),
    "a list of tensors": (Factors, {}, (IMAGE, torch.ones(2, 4, 10, 10))),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_less_usual_models_are_written(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, rules, inputs = UNUSUAL[name]
    model = deployed(make(), rules, *inputs)
    path = eagerq.export_onnx(model, tmp_path / "model.onnx", inputs)
    assert eagerq.verify_deployment(model, path, inputs).differing == 0


class Called(nn.Module):
    """One module, by two names in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 1)
        self.encoder = self.body

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(self.body(x) * 0.5))


def test_every_call_by_whatever_name_is_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = deployed(Called(), {}, IMAGE)
    path = eagerq.export_onnx(model, tmp_path / "model.onnx", IMAGE)
    taps = [n for node in onnx.load(os.fspath(path)).graph.node for n in node.output if n.endswith(".codes")]
    found = eagerq.verify_deployment(model, path, IMAGE)
    assert found.same and {row.name for row in found.rows} == {tap.removesuffix(".codes") for tap in taps}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_model_of_another_dtype_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 12, 12)
    model = deployed(Scaled(), {}, x).to(dtype)
    with pytest.raises(eagerq.errors.StateError, match="wanted a float32 model"):
        eagerq.export_onnx(model, tmp_path / "model.onnx", x.to(dtype))
    assert not list(tmp_path.iterdir())


class Asking(nn.Module):
    """Pads before convolutions of a type."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(F.pad(x, (1, 1, 1, 1)) if type(layer) is nn.Conv2d else x)
        return x


def test_a_forward_that_gives_other_shapes_when_converted_is_refused() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = eagerq.fuse_modules(Asking(), example_inputs=x)
    before = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(eagerq.errors.StateError, match="asks modules for their types"):
        eagerq.convert_qat(model, example_inputs=x)
    assert {name: type(m) for name, m in model.named_modules()} == before


class Picking(nn.Module):
    """Whose result has the shape of its values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return y[y > 0.1]


def test_a_result_with_the_shape_of_its_values_is_no_reason_to_refuse() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(4, 3, 12, 12)
        eagerq.convert_qat(eagerq.fuse_modules(Picking(), example_inputs=x), example_inputs=x)
