"""The ONNX file: integer initializers, a graph the engine turns into integer kernels, nothing half-written."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

import eagerq
from tests.test_exact import Branches


def trained(model: nn.Module, x: torch.Tensor, qconfig: object = None) -> nn.Module:
    """A deployed model whose quantizers have seen some data."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    qat = eagerq.convert_qat(eagerq.fuse_modules(model.train(), example_inputs=x), qconfig, x)
    for _ in range(3):
        qat(torch.randn_like(x) if x.is_floating_point() else x)
    return eagerq.convert(qat)


def session(path: Path | eagerq.Export, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")  # exact on processors without VNNI too
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


def run(path: Path | eagerq.Export, x: torch.Tensor) -> np.ndarray:
    engine = session(path)
    return engine.run(None, {engine.get_inputs()[0].name: x.numpy()})[0]


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=2), nn.ReLU6(), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip


def test_resnet18_becomes_integer_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10)
    deployed = trained(model, torch.randn(2, 3, 64, 64))
    path = eagerq.export_onnx(deployed, tmp_path / "model.onnx", torch.randn(1, 3, 64, 64))
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    convs = [n for n in proto.graph.node if n.op_type in ("Conv", "Gemm")]
    stored = {i.name: i.data_type for i in proto.graph.initializer}
    dequantized = {n.output[0]: stored.get(n.input[0]) for n in proto.graph.node if n.op_type == "DequantizeLinear"}
    for node in convs:
        assert dequantized[node.input[1]] == onnx.TensorProto.INT8, node.name
        assert dequantized[node.input[2]] == onnx.TensorProto.INT32, node.name
    session(path, tmp_path / "optimized.onnx")
    kernels = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert (kernels["QLinearConv"], kernels["QLinearAdd"], kernels["QGemm"], kernels["QLinearGlobalAveragePool"]) == (20, 8, 1, 1)
    assert not {"Conv", "Add", "Relu", "Gemm"} & set(kernels)
    for batch in (1, 5):
        x = torch.randn(batch, 3, 64, 64)
        with torch.no_grad():
            expected = deployed(x).numpy()
        # one code a layer at most, over a chain of 21
        assert np.abs(run(path, x) - expected).max() < 0.2 * np.abs(expected).max()


@pytest.mark.parametrize("preset", sorted(eagerq.PRESETS))
def test_the_engine_computes_the_deployed_model(tmp_path: Path, preset: str) -> None:
    x = torch.randn(4, 3, 16, 16)
    deployed = trained(small(), x, preset)
    path = eagerq.export_onnx(deployed, tmp_path / "small.onnx", x)
    with torch.no_grad():
        expected = deployed(x).numpy()
    # codes differ by one at most where the engine rounds a tie the other way
    step = np.abs(expected).max() / 100
    assert np.abs(run(path, x) - expected).max() < step


@pytest.mark.parametrize("bits", [4, 6])
def test_narrower_activations_clip_in_the_engine_too(tmp_path: Path, bits: int) -> None:
    x = torch.randn(4, 3, 16, 16)
    qconfig = eagerq.QConfig(eagerq.QuantSpec(bits=bits), eagerq.PRESETS["onnxruntime"].weight)
    deployed = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), x, qconfig)
    path = eagerq.export_onnx(deployed, tmp_path / "narrow.onnx", x)
    outliers = 10 * x
    with torch.no_grad():
        expected = deployed(outliers).numpy()
    assert len(np.unique(expected)) <= 2**bits
    differing = np.abs(run(path, outliers) - expected) > 1e-4
    assert differing.mean() < 0.01


def test_an_embedding_and_keyword_inputs(tmp_path: Path) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(ids))

    ids = torch.randint(0, 11, (2, 5))
    qat = eagerq.convert_qat(Tokens().train(), example_inputs={"ids": ids})
    qat(ids=ids)
    deployed = eagerq.convert(qat)
    path = eagerq.export_onnx(deployed, tmp_path / "tokens.onnx", {"ids": ids})
    with torch.no_grad():
        np.testing.assert_allclose(run(path, ids), deployed(ids).numpy(), atol=1e-5)


def test_refusals_leave_no_file(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    qat = eagerq.convert_qat(eagerq.fuse_modules(small(), example_inputs=x))
    with pytest.raises(eagerq.errors.StateError, match=r"eagerq\.convert first"):
        eagerq.export_onnx(qat, tmp_path / "a.onnx", x)
    deployed = trained(small(), x)
    with pytest.raises(eagerq.errors.ExportError, match="create it first"):
        eagerq.export_onnx(deployed, tmp_path / "nowhere" / "a.onnx", x)
    with pytest.raises(eagerq.errors.ExportError, match="add a file name"):
        eagerq.export_onnx(deployed, tmp_path, x)
    with pytest.raises(eagerq.errors.ExportError, match="opset from 17 to 23"):
        eagerq.export_onnx(deployed, tmp_path / "a.onnx", x, opset=3)

    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return y if y.sum().item() > 0 else -y

    with pytest.raises(eagerq.errors.ExportError, match="control flow on tensor values"):
        eagerq.export_onnx(trained(Decides(), x), tmp_path / "a.onnx", x)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 16, 16)
    deployed = trained(nn.Sequential(nn.Conv2d(3, 4, 3)), x)
    target = tmp_path / "model.onnx"
    target.write_bytes(b"old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(eagerq.errors.ExportError, match="No space left"):
        eagerq.export_onnx(deployed, target, x)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


# --- which kernels the engine runs ------------------------------------------------------------------


class Stands(nn.Module):
    """A norm and a ReLU with no convolution of their own before them, between two; and a softmax behind them."""

    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.one, self.bn, self.act, self.two = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
        self.softmax = softmax

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.one(x)
        two = self.two(self.act(self.bn(one)) + one)
        return two.softmax(1) if self.softmax else two


def test_the_export_says_which_operations_are_integer_kernels(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    model = timm.create_model("resnet10t", num_classes=10)
    export = eagerq.export_onnx(trained(model, x), tmp_path / "model.onnx", x, strict=True)
    assert export.path == tmp_path / "model.onnx"
    assert export.floats == ()
    assert export.engine == f"ONNX Runtime {onnxruntime.__version__}"
    convs = {kernel.module for kernel in export.kernels if kernel.op == "QLinearConv"}
    assert convs == {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert f"{len(export.kernels)} of {len(export.kernels)} operations are integer kernels" in str(export)


def test_norms_that_fold_into_nothing_are_integer_kernels(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    export = eagerq.export_onnx(trained(Branches(), x), tmp_path / "model.onnx", x, strict=True)
    assert export.floats == ()
    convolutions = {kernel.module for kernel in export.kernels if kernel.op == "QLinearConv"}
    assert convolutions == {"stem.0", "wide.0", "narrow.0", "identity", "norm", "last"}
    layers = nn.Conv3d(3, 4, 1), nn.MaxPool3d(2), nn.BatchNorm3d(4), nn.Conv3d(4, 2, 1)
    volume = torch.randn(2, 3, 4, 6, 6)
    export = eagerq.export_onnx(trained(nn.Sequential(*layers), volume), tmp_path / "volume.onnx", volume, strict=True)
    assert (export.floats, Counter(kernel.op for kernel in export.kernels)["QLinearConv"]) == ((), 3)


@pytest.mark.parametrize("scales", ["equal", "other"])
def test_equal_weights_of_two_modules_stay_two(tmp_path: Path, scales: str) -> None:
    """ONNX Runtime turns them unsigned one by one on x86 processors without VNNI, and takes no file in which two share one."""
    x = torch.randn(2, 4, 8, 8)
    one, two = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    two.load_state_dict({k: v * (1 if scales == "equal" else 2) for k, v in one.state_dict().items()})
    deployed = trained(nn.Sequential(one, nn.ReLU(), two, nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.BatchNorm2d(4)), x)
    export = eagerq.export_onnx(deployed, tmp_path / "model.onnx", x, strict=True)
    assert export.floats == ()
    graph = onnx.load(export.path).graph
    weights = {name for node in graph.node if node.op_type == "Conv" for name in node.input[1:2]}
    codes = [node.input[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.output[0] in weights]
    assert len(weights) == len(set(codes)) == 4
    assert eagerq.verify_deployment(deployed, export, x).differing == 0


@pytest.mark.parametrize("softmax", [False, True])
def test_what_stays_float_is_listed_with_its_module_and_reason(tmp_path: Path, softmax: bool) -> None:
    x = torch.randn(4, 3, 16, 16)
    export = eagerq.export_onnx(trained(Stands(softmax), x), tmp_path / "model.onnx", x)
    floats = {kernel.op: kernel for kernel in export.floats}
    assert floats["BatchNormalization"].module.startswith("bn")
    assert all(kernel.reason for kernel in export.floats)
    assert ("Softmax" in floats) == softmax
    assert all(kernel.op in str(export) for kernel in export.floats)
    eagerq.export_onnx(trained(Stands(softmax), x), tmp_path / "strict.onnx", x, strict=True)  # all of it is expected


def test_strict_refuses_a_linear_map_in_float_and_leaves_no_file(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    silu = eagerq.PRESETS["openvino"]  # quantizes behind SiLU alone, so that ONNX Runtime convolves in float
    deployed = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3)), x, silu)
    with pytest.raises(eagerq.errors.ExportError, match=r"Conv of 0 .*its result is not quantized"):
        eagerq.export_onnx(deployed, tmp_path / "model.onnx", x, strict=True)
    assert list(tmp_path.iterdir()) == []
    loose = eagerq.export_onnx(deployed, tmp_path / "model.onnx", x)
    assert any(kernel.op in ("Conv", "FusedConv") and not kernel.expected for kernel in loose.floats)
