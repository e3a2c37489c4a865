"""The demo with a tiny budget; the README's command runs the whole of it."""

import io
import json
import re

import onnx
import onnxruntime
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import eagerq
from eagerq.demo import exactness, plots, run_demo
from eagerq.demo.engine import scores
from eagerq.demo.report import speed
from eagerq.errors import EagerqError, ExportError, SpecError
from eagerq.quant.codes import decode

FILES = {"model.int8.onnx", "figures.json", "report.html", "curves.png"}


def tiny(out, **options):
    return run_demo(out, **{"seed": 1, "epochs": 1, "qat_epochs": 2, "images": 250, **options})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One run: (folder, figures, what was printed)."""
    out = tmp_path_factory.mktemp("demo") / "deeper" / "results"
    text = io.StringIO()
    before = torch.get_rng_state(), torch.get_num_threads()
    figures = tiny(out, console=Console(file=text, width=100))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == torch.get_num_threads()
    return out, figures, text.getvalue()


def test_it_leaves_these_files_and_no_others(done):
    assert {path.name for path in done[0].iterdir()} == FILES


def test_figures(done):
    out, figures, _ = done
    assert json.loads((out / "figures.json").read_text()) == figures
    assert set(figures) == {
        "seed", "versions", "images", "accuracy", "agreement", "exactness", "targets", "bytes", "size_ratio", "latency_ms",
        "latency_ratio",
        "chains", "modules", "history", "noise_db", "weight_ranges", "activation_ranges", "seconds",
    }  # fmt: skip
    assert figures["seed"] == 1
    assert {"torch", "timm", "onnxruntime"} <= set(figures["versions"])
    assert figures["images"] == {"train": 175, "test": 75}
    assert [epoch["stage"] for epoch in figures["history"]] == ["float", "qat", "qat"]
    assert set(figures["accuracy"]) == {"float", "qat", "int8"}
    assert figures["chains"] == {"fused": 13, "skipped": 4}
    assert figures["modules"] == {"quantized": 14, "float": 0}
    assert figures["size_ratio"] > 3
    assert figures["latency_ratio"] > 0


def test_the_engine_agrees_with_the_qat_model(done):
    assert done[1]["agreement"] >= 0.98


def test_the_exact_mode_is_the_engine_on_every_image(done):
    figures = done[1]
    exact = figures["exactness"]
    assert exact["compared"] == sum(row["compared"] for row in exact["tensors"]) > 75 * 30_000
    assert exact["differing"] == 0
    assert exact["same"]
    assert exact["predictions_equal"]
    assert exact["outputs_equal"]
    assert exact["agreement"] == 1.0
    assert exact["output_difference"] == 0
    assert exact["missing"] == exact["in_float"] == []
    assert exact["accuracy"] == figures["accuracy"]["int8"]
    assert figures["targets"]["exact"]


def test_fake_quantization_is_compared_on_the_same_codes(done):
    exact = done[1]["exactness"]
    fake = exact["fake_quant"]
    assert [(row["name"], row["compared"]) for row in fake["tensors"]] == [
        (row["name"], row["compared"]) for row in exact["tensors"]
    ]
    assert fake["compared"] == exact["compared"]
    assert fake["differing"] == sum(row["differing"] for row in fake["tensors"])
    assert fake["tensors"][0]["differing"] == 0  # the input is quantized by the same division
    assert 0 <= fake["predictions"] <= fake["images"] <= 75
    assert (fake["differing"] == 0) == (fake["images"] == 0)
    assert all(row["largest"] < 256 and (row["largest"] > 0) == (row["differing"] > 0) for row in fake["tensors"])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A QAT network in eval mode, images, labels, and its ONNX file."""
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    images = torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    qat = eagerq.convert_qat(eagerq.fuse_modules(nn.Sequential(*layers).train(), example_inputs=images[:2]))
    qat(images)
    path = eagerq.export_onnx(eagerq.convert(qat), tmp_path_factory.mktemp("small") / "model.onnx", images[:2])
    return qat.eval(), images, torch.arange(300) % 10, path


def codes_of(qat, images):
    """Codes of every quantizer, less their zero points."""
    seen = {}
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: decode(out).double() / m.scale.double()}))
        for name, module in qat.named_modules()
        if isinstance(module, eagerq.FakeQuantize) and not module.memoryless
    ]
    with torch.no_grad():
        qat(images)
    for hook in hooks:
        hook.remove()
    return {name: values.round().long() for name, values in seen.items()}


def test_flips_are_counted_against_the_exact_mode(small, monkeypatch):
    """One code more in some images where the second convolution is quantized; counted beside a slow count."""
    qat, images, *_ = small
    before = {row["name"]: row for row in exactness.flips(qat, images)["tensors"]}
    quantizer, name = qat[2].activation_post_process, "2.activation_post_process"
    forward = quantizer.forward

    def off(x):
        y = forward(x)
        return y + quantizer.scale * (x.mean((1, 2, 3), keepdim=True) > x.mean()) if type(y) is Tensor else y

    monkeypatch.setattr(quantizer, "forward", off)
    found = exactness.flips(qat, images)
    rows = {row["name"]: row for row in found["tensors"]}
    assert rows["0.activation_post_process"] == before["0.activation_post_process"]  # computed before it
    wanted, touched = {}, set()
    for start in (0, 256):  # as the demo cuts them: another batch may sum in another order
        part = images[start : start + 256]
        fake = codes_of(qat, part)
        with eagerq.exact_mode(qat):
            exact = codes_of(qat, part)
        for key, codes in fake.items():
            apart = (codes - exact[key]).abs()
            row = wanted.setdefault(key, [0, 0, 0])
            row[0] += apart.numel()
            row[1] += int((apart > 0).sum())
            row[2] = max(row[2], int(apart.max()))
            touched |= {start + i for i in range(len(part)) if apart[i].any()}
    assert {key: [row["compared"], row["differing"], row["largest"]] for key, row in rows.items()} == wanted
    assert 0 < len(touched) == found["images"] < 300
    assert rows[name]["differing"] > before[name]["differing"]
    assert found["output_difference"] > 0


@pytest.mark.parametrize("layer", [None, "0", "2", "6"])
def test_a_changed_file_misses_the_target(small, tmp_path, layer):
    qat, images, labels, path = small
    proto = onnx.load(path)
    weight = next(i for i in proto.graph.initializer if i.name == f"{layer or 0}.weight_codes")
    codes = onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(codes if layer is None else codes // 2, weight.name))
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # processors without VNNI saturate
    engine = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    figures, text = exactness.measure(qat, path, images, labels, scores(engine, images))
    assert figures["outputs_equal"] == figures["same"] == exactness.is_met(figures) == (layer is None)
    assert (figures["differing"] == 0) == (layer in (None, "6"))
    assert f"{figures['differing']:,} of {figures['compared']:,} codes" in text


def test_noise_and_ranges_of_every_layer(done):
    figures = done[1]
    assert set(figures["noise_db"]) == set(figures["weight_ranges"])
    assert all(10 < value < 60 for value in figures["noise_db"].values())
    for found in (*figures["weight_ranges"].values(), *figures["activation_ranges"].values()):
        assert found["low"] <= found["low_1"] <= found["high_99"] <= found["high"]
    assert all(found["grid_low"] <= 0 <= found["grid_high"] for found in figures["activation_ranges"].values())
    # a residual branch is recorded before the shortcut is added to it in place
    assert figures["activation_ranges"]["layer1.0.conv2"] != figures["activation_ranges"]["layer1.0.act2"]


def test_the_model_takes_any_batch_and_holds_integers(done):
    model = onnx.load(done[0] / "model.int8.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    kinds = {initializer.data_type for initializer in model.graph.initializer}
    assert {onnx.TensorProto.INT8, onnx.TensorProto.INT32} <= kinds


def test_the_report_stands_alone(done):
    page = (done[0] / "report.html").read_text()
    assert len(re.findall(r'src="data:image/png;base64,[A-Za-z0-9+/=]{5000,}"', page)) == 5
    assert not re.search(r'(src|href)="(?!data:)', page)
    for text in (
        "Training curves",
        "Signal to quantization noise",
        "Codes that differ by tensor",
        "Exact mode and ONNX Runtime",
        f"0 of {done[1]['exactness']['compared']:,} codes in 19 tensors differ",
        "Weight ranges",
        "Activation ranges",
        "layer4.0.downsample.0",
    ):
        assert text in page


def test_the_picture(done):
    assert (done[0] / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("differing", [(0, 0), (3, 0), (900, 1000)])
def test_the_picture_of_codes_takes_any_counts(differing):
    rows = [[{"name": "a.activation_post_process", "compared": 1000, "differing": n, "largest": n}] for n in differing]
    assert plots.codes_apart(*rows).startswith(b"\x89PNG")


def test_it_prints_the_plan_and_one_table(done):
    text = done[2]
    assert "13 chains to fuse" in text
    compared = done[1]["exactness"]["compared"]
    for row in (
        "test accuracy",
        "accuracy in exact mode",
        "predictions equal to QAT",
        "equal to exact mode",
        f"codes off, of {compared:,}",
        "ONNX file",
        "latency",
        "exact mode and ONNX Runtime the same in every code, output and prediction: met",
    ):
        assert row in text


@pytest.mark.parametrize("options", [{"seed": -1}, {"epochs": 0}, {"qat_epochs": 0}, {"images": 10}])
def test_numbers_that_make_no_sense(tmp_path, options):
    with pytest.raises(SpecError, match="at least"):
        tiny(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="--out"):
        tiny(tmp_path / "file")
    with pytest.raises(ExportError):
        tiny(tmp_path / "file" / "below")


def test_a_failure_leaves_no_half_written_file(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise EagerqError("stop here")

    monkeypatch.setattr("eagerq.demo.job.report.page", fail)
    monkeypatch.setattr("eagerq.demo.job.fit", lambda *args, **kwargs: [])
    monkeypatch.setattr("eagerq.demo.job._deploy", fail)
    with pytest.raises(EagerqError):
        tiny(tmp_path, console=Console(file=io.StringIO()))
    assert list(tmp_path.iterdir()) == []


def test_a_slower_engine_is_called_slower() -> None:
    assert [speed(ratio) for ratio in (2.0, 1.0, 0.8)] == ["2.00x faster", "1.00x faster", "1.25x slower"]
