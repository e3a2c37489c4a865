"""The eagerq command: plans as text and JSON, and errors in one line."""

import functools
import json
import subprocess
import sys
import textwrap

import pytest

from eagerq.cli import main
from eagerq.errors import MissingExtraError
from eagerq.extras import require


def called(capsys, *argv):
    """Run the command in this process: (exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture
def run(capsys):
    return functools.partial(called, capsys)


def one_line(err):
    assert err.startswith("eagerq: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("spec", ["timm:resnet18", "torchvision.models:resnet18"])
def test_inspect(run, spec):
    code, out, _ = run("inspect", spec)
    assert code == 0
    assert "layer4.1.conv1" in out
    assert out.splitlines()[-1].startswith("20 conv chains fused, 9 of them with ReLU")


def test_inspect_in_a_terminal(run, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    code, out, _ = run("inspect", "torchvision.models:resnet18")
    assert code == 0
    assert "layer4.1.conv1 + layer4.1.bn1 + layer4.1.relu (copy)" in out
    assert "20 conv chains fused, 9 of them with ReLU" in out


def test_inspect_names_what_it_skips(run):
    _, out, _ = run("inspect", "timm:resnet18", "--eval", "--input", "3x64x64", "--batch", "1")
    assert "read by function add" in out


@pytest.mark.parametrize("spec", ["timm:resnet18", "torchvision.models:resnet18"])
def test_inspect_json_is_all_of_stdout(run, spec):
    code, out, _ = run("inspect", spec, "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["model"] == spec
    assert plan["summary"]["conv_chains"] == len(plan["matches"]) == 20
    assert plan["summary"]["conv_chains_with_relu"] == 9
    assert plan["summary"]["skipped"] == len(plan["skips"])


def test_other_activations_are_counted(run):
    _, out, _ = run("inspect", "timm:efficientnet_b0", "--json", "--input", "3x64x64")
    summary = json.loads(out)["summary"]
    assert summary["conv_chains_with_relu"] + summary["conv_chains_with_other_activation"] <= summary["conv_chains"]
    assert summary["conv_chains_with_other_activation"] > 40


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "my_factories.py").write_text(
        textwrap.dedent("""
            import json as data
            from torch import nn

            def net():
                print("noise of a factory")
                return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())

            def two_inputs():
                class Two(nn.Module):
                    def __init__(self):
                        super().__init__()
                        self.conv = nn.Conv2d(1, 2, 3)
                        self.bn = nn.BatchNorm2d(2)

                    def forward(self, x, y):
                        return self.bn(self.conv(x)) + y

                return Two()

            def fails():
                raise RuntimeError("first line\\nsecond line")

            def no_model():
                return 3

            def wants_an_argument(width):
                return nn.Linear(width, width)

            ready = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        """)
    )
    (tmp_path / "needs_another.py").write_text("import surely_not_installed\n")
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_factories", "needs_another", "broken_module"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("factories")
def test_a_factory_in_the_working_folder(run):
    code, out, err = run("inspect", "my_factories:net", "--json", "--input", "1x8x8")
    assert code == 0
    assert json.loads(out)["matches"] == [{"names": ["0", "1", "2"], "fused": "ConvBnReLU2d", "copied": []}]
    assert "noise of a factory" in err


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(("spec", "shapes"), [("two_inputs", ["1x8x8", "2x6x6"]), ("ready", []), ("ready", ["1x8x8"])])
def test_one_input_option_for_each_argument(run, spec, shapes):
    options = [part for shape in shapes for part in ("--input", shape)]
    code, out, _ = run("inspect", f"my_factories:{spec}", *options)
    assert code == 0
    assert "1 conv chains fused, 0 of them with ReLU" in out


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["resnet18"], "timm:NAME"),
        (["timm:"], "timm:NAME"),
        (["timm:resnett18"], "did you mean resnet18"),
        (["timm:qqqq"], "list_models"),
        (["surely_not_there:net"], "no module 'surely_not_there'"),
        (["my_factories.deeper:net"], "no module"),
        (["my_factories:nett"], "did you mean net"),
        (["my_factories:data"], "found a module"),
        (["my_factories:fails"], "RuntimeError: first line second line"),
        (["my_factories:no_model"], "found a int"),
        (["my_factories:wants_an_argument"], "wrap it in a factory"),
        (["needs_another:net"], "it needs surely_not_installed"),
        (["broken_module:net"], "ZeroDivisionError"),
        (["my_factories:ready", "--input", "1x8xq"], "3x224x224"),
        (["my_factories:ready", "--input", "7x8x8"], "channels"),
    ],
)
def test_bad_specs_end_with_one_line(run, argv, said):
    code, out, err = run("inspect", *argv)
    assert code == 1
    assert out == ""
    assert said in one_line(err)


def test_wrong_usage(run):
    assert run("inspect")[0] == 2
    assert run("no-such-command")[0] == 2
    assert run("--version")[0] == 0
    assert "inspect" in run("--help")[1]


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_without_the_cli_extra(run, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = run("inspect", "timm:resnet18")
    assert code == 2
    assert one_line(err) == f"eagerq: error: the eagerq command needs {module}; run: pip install 'eagerq[cli]'\n"


@pytest.mark.parametrize("module", ["sklearn", "onnxruntime", "jinja2"])
def test_without_the_demo_extra(run, monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = run("demo", "--out", str(tmp_path / "out"))
    package = {"sklearn": "scikit-learn"}.get(module, module)
    assert code == 1
    assert one_line(err) == f"eagerq: error: eagerq demo needs {package}; run: pip install 'eagerq[demo]'\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["float_accuracy", "int8_accuracy", "exact", None])
def test_the_demo_ends_with_1_if_it_misses_a_target(run, monkeypatch, tmp_path, target):
    targets = {name: name != target for name in ("float_accuracy", "int8_accuracy", "exact")}
    monkeypatch.setattr("eagerq.demo.run_demo", lambda *args, **options: {"targets": targets})
    assert run("demo", "--out", str(tmp_path))[0] == (0 if target is None else 1)


@pytest.mark.parametrize("spec", ["timm:resnet18", "torchvision.models:resnet18"])
def test_without_the_timm_extra(run, monkeypatch, spec):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    code, _, err = run("inspect", spec)
    assert code == 1
    assert "pip install 'eagerq[timm]'" in one_line(err)


@pytest.mark.parametrize(
    ("source", "said"), [("raise RuntimeError('two\\nlines')", "two lines"), ("import not_there_either", "not_there_either")]
)
def test_a_package_that_is_there_and_fails(monkeypatch, tmp_path, source, said):
    (tmp_path / "half_installed.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match=said) as caught:
        require("half_installed", "demo")
    assert "cannot be imported" in str(caught.value)


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "eagerq", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("eagerq ")
