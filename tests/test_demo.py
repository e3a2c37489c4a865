"""The demo with a tiny budget; the README's command runs the whole of it."""

import io
import json
import re

import onnx
import pytest
import torch
from rich.console import Console

from eagerq.demo import run_demo
from eagerq.demo.report import speed
from eagerq.errors import EagerqError, ExportError, SpecError

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
        "seed", "versions", "images", "accuracy", "agreement", "targets", "bytes", "size_ratio", "latency_ms", "latency_ratio",
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
    assert len(re.findall(r'src="data:image/png;base64,[A-Za-z0-9+/=]{5000,}"', page)) == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    for text in (
        "Training curves",
        "Signal to quantization noise",
        "Weight ranges",
        "Activation ranges",
        "layer4.0.downsample.0",
    ):
        assert text in page


def test_the_picture(done):
    assert (done[0] / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_it_prints_the_plan_and_one_table(done):
    text = done[2]
    assert "13 chains to fuse" in text
    for row in ("test accuracy", "predictions equal to QAT", "ONNX file", "latency"):
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
