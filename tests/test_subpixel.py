"""Transposed convolutions exported as convolutions: the same integers, in PyTorch and as ONNX Runtime's integer kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import eagerq
from eagerq.deploy.runtime import saturates, session
from eagerq.deploy.subpixel import Axis, SubpixelModule, as_convolution, has_subpixel_form, in_subpixel_form, interleaved
from eagerq.nn.quantized import QuantizedModule

# --- geometry


@st.composite
def axes(draw: st.DrawFn) -> tuple[Axis, int, int]:
    """An axis, its output padding and the input's size; the result has an element at least."""
    kernel, stride, padding = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(0, 4))
    extra, size = draw(st.integers(0, stride - 1)), draw(st.integers(1, 5))
    assume((size - 1) * stride - 2 * padding + kernel + extra > 0)
    return Axis(kernel, stride, padding), extra, size


counts = st.integers(1, 3)


@given(rows=axes(), columns=axes(), groups=counts, into=counts, out=counts, seed=st.integers(0, 99))
def test_the_integer_sums_are_those_of_the_transposed_convolution(
    rows: tuple[Axis, int, int], columns: tuple[Axis, int, int], groups: int, into: int, out: int, seed: int
) -> None:
    (height, down, h), (width, right, w) = rows, columns
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (2, groups * into, h, w), generator=draw)
    weight = torch.randint(-128, 128, (groups * into, out, height.kernel, width.kernel), generator=draw)
    bias = torch.randint(-(2**30), 2**30, (groups * out,), generator=draw)

    kernel = as_convolution(weight, groups, height, width)
    offsets = bias.repeat_interleave(height.stride * width.stride)
    found = F.conv2d(F.pad(x, (*width.pads(right), *height.pads(down))), kernel, offsets, groups=groups)
    assert found.dtype == torch.int64
    wanted = F.conv_transpose2d(
        x.double(), weight.double(), bias.double(),
        (height.stride, width.stride), (height.padding, width.padding), (down, right), groups,
    )  # fmt: skip
    moved = interleaved(found, height, width, (down, right))
    assert moved.dtype == torch.int64
    assert torch.equal(moved.double(), wanted)


@given(axis=axes())
def test_an_axis_computes_no_more_than_it_must(axis: tuple[Axis, int, int]) -> None:
    of, extra, _ = axis
    assert (of.taps - 1) * of.stride < of.kernel <= of.taps * of.stride == of.kernel + sum(of.fill)
    assert min(*of.fill, *of.pads(extra), *of.crops(extra)) >= 0
    if of.padding < of.kernel:  # else torch itself computes less than the input reaches
        assert max(of.crops(extra)) < of.stride
    if of.padding % of.stride == 0 and of.padding < of.kernel:
        assert of.crops(extra)[0] == 0


@pytest.mark.parametrize(
    ("axis", "extra", "pads", "crops"),
    [
        (Axis(2, 2, 0), 0, (0, 0), (0, 0)),
        (Axis(4, 2, 1), 0, (1, 1), (1, 1)),
        (Axis(3, 2, 1), 1, (0, 1), (0, 0)),
        (Axis(3, 1, 1), 0, (1, 1), (0, 0)),
    ],
)
def test_the_usual_axes(axis: Axis, extra: int, pads: tuple[int, int], crops: tuple[int, int]) -> None:
    assert (axis.pads(extra), axis.crops(extra)) == (pads, crops)


# --- the module, with ONNX's three operators read out in exact arithmetic


def deployed(model: nn.Module, x: Tensor, preset: Any = "onnxruntime") -> tuple[nn.Module, nn.Module]:
    """The QAT model that has seen some data, in eval mode, and its deployed form."""
    qat = eagerq.convert_qat(eagerq.fuse_modules(model.train(), example_inputs=x), preset, x)
    with torch.no_grad():
        qat(x)
    return qat.eval(), eagerq.convert(qat)


def only(model: nn.Module) -> QuantizedModule:
    (module,) = [m for m in model.modules() if isinstance(m, QuantizedModule)]
    return module


def by_the_book(op: str, given: Sequence[Tensor], attrs: dict[str, Any], *, dtype: Any, shape: Any, version: int) -> Tensor:
    """What ONNX says of the operators that an export writes."""
    x, scale, zero = given[0], given[1], given[-1]
    if op == "Conv":
        top, left, bottom, right = attrs["pads"]
        assert attrs["kernel_shape"] == list(given[1].shape[2:])
        out = F.conv2d(F.pad(x, (left, right, top, bottom)), *given[1:], groups=attrs["group"])
    elif op == "QuantizeLinear":
        info = torch.iinfo(zero.dtype)
        out = (torch.round(x / scale) + zero).clamp(info.min, info.max).to(zero.dtype)
    else:
        assert op == "DequantizeLinear"
        assert x.dtype == zero.dtype
        along = [1] * x.dim()
        if scale.numel() > 1:
            along[attrs["axis"]] = -1
        out = (x.double() - zero.double().reshape(along)) * scale.reshape(along)
    assert (out.shape, out.dtype) == (tuple(shape), dtype)
    return out


ACTS: dict[str, Any] = {"none": list, "relu": lambda: [nn.ReLU()], "leaky": lambda: [nn.LeakyReLU(0.1)]}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("preset", ["onnxruntime", "per_tensor"])
@given(rows=axes(), columns=axes(), groups=counts, into=counts, out=counts, bias=st.booleans())
def test_the_form_computes_the_module(
    act: str, preset: str, rows: Any, columns: Any, groups: int, into: int, out: int, bias: bool
) -> None:
    """To the last bit, on scales that are powers of two, with which float64 holds every sum and quotient."""
    (height, down, h), (width, right, w) = rows, columns
    op = nn.ConvTranspose2d(
        groups * into, groups * out,
        (height.kernel, width.kernel), (height.stride, width.stride), (height.padding, width.padding),
        (down, right), groups, bias,
    )  # fmt: skip
    x = torch.randn(2, groups * into, h, w).double()
    model = nn.Sequential(op, *ACTS[act]()).double()
    assume(bool((model(x) > 0).any()))  # else there is no range to quantize to
    module = only(deployed(model, x, preset)[1])
    for name, buffer in module.named_buffers():
        if name.endswith("scale"):
            buffer.copy_(2.0 ** buffer.log2().round())
    largest = [(n - 1) * a.stride - 2 * a.padding + a.kernel + a.stride - 1 for n, a in ((h, height), (w, width))]
    assert has_subpixel_form(module)
    form = SubpixelModule(module)
    with torch.no_grad():
        for asked in ((), (largest,)):
            wanted = module(x, *asked)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.onnx.ops, "symbolic", by_the_book)
                patch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
                found = form(x, *asked)
                alone = form(x[0], *asked)
            assert torch.equal(found, wanted)
            assert torch.equal(alone, wanted[0])


# --- in the engine


def every_kind() -> nn.Module:
    """One after the other: results cropped and not, groups, no bias, strides that differ, stride 1."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 4, 2, 1, groups=2), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, 2, bias=False),
        nn.ConvTranspose2d(4, 6, (3, 5), (3, 2), (0, 4), (1, 0)), nn.ReLU6(),
        nn.ConvTranspose2d(6, 4, 3, 1, 1), nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(4, 4, (3, 2), 1, (2, 3), groups=4), nn.SiLU(),
        nn.Conv2d(4, 3, 1),
    )  # fmt: skip


class EncoderDecoder(nn.Module):
    """Down and up again, to the size that the skipped tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(12, 8, 3, stride=2, padding=1, groups=2)
        self.merge = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.bigger = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.out = nn.Sequential(nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(6, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        skipped = self.stem(x)
        x = self.up(self.down(skipped), output_size=skipped.shape[2:])
        return self.out(self.bigger(self.merge(torch.cat([x, skipped], 1))))


ROWS: dict[str, tuple[Any, str]] = {
    **{preset: (every_kind, preset) for preset in ("onnxruntime", "onnxruntime-arm", "per_tensor", "qnn")},
    "encoder_decoder": (EncoderDecoder, "onnxruntime"),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_engine_computes_it_in_integers_code_for_code(name: str, tmp_path: Path) -> None:
    build, preset = ROWS[name]
    x = torch.randn(2, 3, 5, 4)
    qat, model = deployed(build(), x, preset)
    wanted = [module for module in model.modules() if has_subpixel_form(module)]
    assert len(wanted) == sum(isinstance(m, nn.ConvTranspose2d) for m in build().modules())
    if preset == "onnxruntime-arm" and saturates():  # there ONNX Runtime takes not all signed activations as codes
        with pytest.raises(eagerq.errors.ExportError, match="strict=True wants integer kernels"):
            eagerq.export_onnx(model, tmp_path / "model.onnx", x, strict=True)
        return
    export = eagerq.export_onnx(model, tmp_path / "model.onnx", x, strict=True)
    assert [module for module in model.modules() if has_subpixel_form(module)] == wanted
    found = eagerq.verify_deployment(qat, export, [torch.randn(3, 3, 5, 4), x[:1]])
    assert found.compared > 5_000
    assert (found.differing, found.output_difference, found.missing) == (0, 0.0, ()), str(found)
    assert not found.exact.floats, str(found)
    session(export, optimized=str(tmp_path / "optimized.onnx"))
    runs = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    convolutions = sum(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in build().modules())
    assert runs["QLinearConv"] == convolutions
    assert not {"Conv", "ConvTranspose", "FusedConv"} & runs.keys()
    # nothing is taken to real values and back but what enters and leaves
    assert runs["QuantizeLinear"] == 1
    assert runs["DequantizeLinear"] == 1


def keeps(op: nn.Module, act: nn.Module | None = None, preset: Any = "onnxruntime", hook: bool = False) -> QuantizedModule:
    x = torch.randn(2, 4, *[5] * (op.weight.dim() - 2))  # type: ignore[union-attr,operator]
    module = only(deployed(nn.Sequential(op, *([] if act is None else [act])), x, preset)[1])
    if hook:
        module.act.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    return module


UP = lambda **kwargs: nn.ConvTranspose2d(4, 4, 3, **kwargs)  # noqa: E731
KEPT: dict[str, Any] = {
    "one_dimension": lambda: keeps(nn.ConvTranspose1d(4, 4, 3)),
    "three_dimensions": lambda: keeps(nn.ConvTranspose3d(4, 4, 3)),
    "dilated": lambda: keeps(UP(dilation=(1, 2))),
    "a_convolution": lambda: keeps(nn.Conv2d(4, 4, 3)),
    "gelu": lambda: keeps(UP(), nn.GELU()),
    "prelu": lambda: keeps(UP(), nn.PReLU(4)),
    "leaky_not_split": lambda: keeps(UP(), nn.LeakyReLU(), "openvino"),
    "hooked": lambda: keeps(UP(), nn.ReLU(), hook=True),
    "float_weight": lambda: keeps(UP(), None, eagerq.QConfig(eagerq.QuantSpec(), None)),
    "result_not_quantized": lambda: keeps(UP(), None, "tensorrt"),
    "bias_on_its_own_grid": lambda: keeps(UP(), None, "vitis"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_keeps_its_own_operator(name: str) -> None:
    module = KEPT[name]()
    assert not has_subpixel_form(module)
    with in_subpixel_form(module) as form:
        assert form is module


class Held(nn.Module):
    """A module under two names, and a dilated one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.dilated = UP(stride=2), UP(dilation=2)
        self.parts = nn.ModuleList([self.up])

    def forward(self, x: Tensor) -> Tensor:
        return self.dilated(self.up(x))


def test_only_what_can_be_is_swapped_under_every_name_and_hooks_run(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 5, 5)
    qat, model = deployed(Held(), x)
    up, shapes = model.up, []
    handle = up.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape[1:])))  # type: ignore[operator,union-attr]
    with in_subpixel_form(model) as form:
        assert form is model
        assert isinstance(model.up, SubpixelModule)
        assert model.parts[0] is model.up  # type: ignore[index]
    assert model.parts[0] is model.up is up  # type: ignore[index]
    export = eagerq.export_onnx(model, tmp_path / "model.onnx", x)
    assert [(k.op, k.module) for k in export.kernels] == [("QLinearConv", "up"), ("ConvTranspose", "dilated")]
    assert set(shapes) == {(4, 11, 11)}
    handle.remove()
    shapes.clear()
    assert eagerq.verify_deployment(qat, export, x).rows[1].name == "up.activation_post_process"
    model(x)
    assert shapes == []


def test_a_model_that_is_itself_one(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 5, 5)
    qat, model = deployed(UP(stride=2), x)
    assert eagerq.verify_deployment(qat, eagerq.export_onnx(model, tmp_path / "model.onnx", x, strict=True), x).same


def test_a_failing_export_leaves_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = deployed(every_kind(), image := torch.randn(2, 3, 6, 6))[1].train()
    before = [(name, module, module.training) for name, module in model.named_modules()]
    swapped = []

    def fail(form: nn.Module, *args: Any, **kwargs: Any) -> None:
        swapped.extend(m for m in form.modules() if isinstance(m, SubpixelModule))
        raise RuntimeError("no")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(eagerq.errors.ExportError, match="no"):
        eagerq.export_onnx(model, tmp_path / "model.onnx", image)
    assert len(swapped) == 5
    assert [(name, module, module.training) for name, module in model.named_modules()] == before
