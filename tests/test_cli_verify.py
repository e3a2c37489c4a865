"""The eagerq verify command: data in every form, differences found, files that nobody trusts left unread."""

import dataclasses
import functools
import json
import pickle
import sys
import textwrap

import numpy as np
import onnx
import pytest
import torch

import eagerq
from tests.test_cli import called, one_line

FACTORIES = """
    import torch
    from torch import nn
    import eagerq

    def quantized(model, inputs):
        qat = eagerq.convert_qat(eagerq.fuse_modules(model.train(), example_inputs=inputs), example_inputs=inputs)
        with torch.no_grad():
            qat(*(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in inputs))
        return qat

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    def one():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
        return quantized(nn.Sequential(*layers), (torch.zeros(2, 3, 8, 8),))

    def deployed():
        return eagerq.convert(one())

    def two():
        torch.manual_seed(0)
        return quantized(Two(), (torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)))

    def words():
        model, x = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2), nn.ReLU()).train(), torch.zeros(2, 3, dtype=torch.long)
        return eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=x))

    def shapeless():
        return eagerq.convert_qat(nn.Sequential(nn.Linear(4, 2)).train())

    def plain():
        return nn.Sequential(nn.Conv2d(3, 6, 3))

    def unobserved():
        return eagerq.convert_qat(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()).train(), example_inputs=torch.zeros(2, 3, 8, 8))
"""
#: Codes of one example of the model ``one``: its input, the convolution after its ReLU, and the pooled values.
CODES = 3 * 8 * 8 + 6 * 6 * 6 + 6


class Attack:
    """Runs code when it is read."""

    def __reduce__(self):
        return (exec, ("open('attacked', 'w').close()",))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with factories of models, their ONNX files, saved models and data."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "verify_factories.py").write_text(textwrap.dedent(FACTORIES))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import verify_factories

        one, two = verify_factories.one(), verify_factories.two()
    for name, model in (("one", one), ("two", two)):
        eagerq.export_onnx(eagerq.convert(model), folder / f"{name}.onnx")
    torch.save(one, folder / "qat.pt")
    torch.save(eagerq.convert(one), folder / "deployed.pth")
    torch.save(one.state_dict(), folder / "state.pt")
    x, y = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2)).chunk(2)
    np.save(folder / "x.npy", x.numpy())
    np.save(folder / "double.npy", x.double().numpy())
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(folder / "batches.npz", x.numpy(), y.numpy())
    np.savez(folder / "names.npz", y=y.numpy(), x=x.numpy())
    np.savez(folder / "none.npz")
    for name, held in {
        "tensor": x, "list": [x, y], "nested": [[x], (y,)], "dict": {"input": x}, "pair": (x, y), "empty": [], "text": "text",
        "uneven": (x, y[:2]), "attack": Attack(),
    }.items():  # fmt: skip
        torch.save(held, folder / f"{name}.pt")
    (folder / "damaged.npz").write_bytes(b"PK")
    (folder / "damaged.pt").write_bytes(b"nothing of torch's")
    (folder / "pickle.pt").write_bytes(pickle.dumps(Attack()))
    (folder / "notes.txt").write_text("")
    changed(folder / "one.onnx", "0.weight_codes", folder / "bad.onnx")
    changed(folder / "one.onnx", "5.weight_codes", folder / "bad_head.onnx")
    changed(folder / "two.onnx", "b.weight_codes", folder / "bad_two.onnx")
    return folder


def changed(path, name, target):
    """The same file with other weights under ``name``."""
    proto = onnx.load(path)
    weight = next(i for i in proto.graph.initializer if i.name == name)
    codes = onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(np.where(codes > 0, codes - 9, codes + 9).astype(np.int8), name))
    onnx.save(proto, target)


@pytest.fixture
def run(capsys, files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return functools.partial(called, capsys, "verify")


def factory(name):
    return f"verify_factories:{name}"


@pytest.mark.parametrize(
    "spec",
    [[factory("one")], [factory("deployed")], ["qat.pt", "--trust"], ["deployed.pth", "--trust"]],
    ids=" ".join,
)
@pytest.mark.parametrize(
    ("data", "examples"),
    [
        ("--data x.npy", 3),
        ("--data double.npy", 3),
        ("--data batches.npz", 6),
        ("--data tensor.pt", 3),
        ("--data list.pt", 6),
        ("--data nested.pt --batch 2", 6),
        ("--data dict.pt --batch 2", 3),
        ("--data x.npy --data list.pt", 9),
        ("--random 3", 6),
        ("--random 3 --batch 5", 15),
        ("--random 1 --input 3x8x8", 2),
    ],
)
def test_every_form_of_model_and_data(run, spec, data, examples):
    code, out, err = run(*spec, "one.onnx", *data.split(), "--json")
    found = json.loads(out)
    assert code == 0, err
    assert found["same"]
    assert found["differing"] == 0
    assert found["compared"] == examples * CODES
    assert found["output_difference"] == 0


@pytest.mark.parametrize("file", ["one.onnx", "bad.onnx", "bad_head.onnx"])
def test_json_is_what_verify_deployment_returns(run, files, file):
    code, out, _ = run("qat.pt", file, "--data", "tensor.pt", "--json", "--trust")
    model = torch.load(files / "qat.pt", weights_only=False)
    found = eagerq.verify_deployment(model, files / file, torch.load(files / "tensor.pt"))
    assert json.loads(out) == {"model": "qat.pt", "file": file, **found.as_dict()}
    assert code == (0 if found.same else 1)


@pytest.mark.parametrize("file", ["one.onnx", "bad.onnx"])
def test_a_verification_is_plain_data(files, file):
    model = torch.load(files / "qat.pt", weights_only=False)
    found = eagerq.verify_deployment(model, files / file, torch.load(files / "list.pt"))
    data = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert data == found.as_dict()
    for total in ("compared", "differing"):
        assert data[total] == sum(row[total] for row in data["tensors"]) == getattr(found, total)
    assert [row["name"] for row in data["tensors"]] == [row.name for row in found.rows]
    assert data["first"] == next((row["name"] for row in data["tensors"] if row["differing"]), None)
    assert data["profile"] == {"name": "onnxruntime-x64", "version": found.exact.profile.version}


def test_a_difference_that_is_not_finite_is_none_in_json(files):
    model = torch.load(files / "qat.pt", weights_only=False)
    found = eagerq.verify_deployment(model, files / "one.onnx", torch.load(files / "tensor.pt"))
    broken = dataclasses.replace(found, output_difference=float("inf"))
    assert json.loads(json.dumps(broken.as_dict(), allow_nan=False))["output_difference"] is None
    assert not broken.same
    assert not dataclasses.replace(found, rows=()).same
    assert "no code" in str(dataclasses.replace(found, rows=()))


def test_the_same_seed_draws_the_same_numbers(run):
    results = [run(factory("one"), "bad.onnx", "--random", "2", "--json", "--seed", seed)[1] for seed in ("0", "0", "1")]
    assert results[0] == results[1] != results[2]


def test_two_arguments_in_the_order_of_the_model(run):
    """The convolutions are of one shape: arguments that change places would go unnoticed but for the codes."""
    for data in ("names.npz", "pair.pt"):
        code, out, _ = run(factory("two"), "two.onnx", "--data", data, "--batch", "2", "--json")
        found = json.loads(out)
        assert code == 0
        assert found["compared"] == 3 * 2 * (3 * 8 * 8 + 4 * 6 * 6)
        assert found["in_float"] == [{"function": "add", "module": "", "times": 2}]
    assert run(factory("two"), "two.onnx", "--random", "1")[0] == 0


def test_differences(run, monkeypatch):
    code, out, _ = run(factory("one"), "bad.onnx", "--data", "x.npy")
    assert code == 1
    assert "first difference: 0.activation_post_process" in out
    code, out, _ = run(factory("one"), "bad_head.onnx", "--data", "x.npy")  # no code shows it, but the output
    assert code == 1
    assert out.startswith("0 of ")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(factory("one"), "bad.onnx", "--data", "x.npy")
    assert code == 1
    assert "Tensors that differ" in out
    assert "0.activation_post_process" in out
    code, out, _ = run(factory("two"), "bad_two.onnx", "--random", "1")
    assert code == 1
    assert "b.activation_post_process" in out
    assert "a.activation_post_process" not in out
    assert "Computed in float" in out
    code, out, _ = run(factory("one"), "one.onnx", "--data", "x.npy")
    assert code == 0
    assert f"0 of {3 * CODES:,} codes in 3 tensors differ" in out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["qat.pt"],
        ["qat.pt", "one.onnx"],
        ["qat.pt", "one.onnx", "--random", "1", "--data", "x.npy"],
        ["qat.pt", "one.onnx", "--random", "0"],
        ["qat.pt", "one.onnx", "--random", "1", "--batch", "0"],
        ["qat.pt", "one.onnx", "--data", "x.npy", "--input", "3x8x8"],
    ],
)
def test_wrong_usage(run, argv):
    code, out, err = run(*argv)
    assert code == 2
    assert out == ""
    assert "Usage: eagerq verify" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["qat.pt", "one.onnx", "--random", "1"], "pass --trust"),
        (["attack.pt", "one.onnx", "--random", "1"], "pass --trust"),
        (["pickle.pt", "one.onnx", "--random", "1"], "pass --trust"),
        (["state.pt", "one.onnx", "--random", "1"], "wanted a whole model in state.pt, found a OrderedDict"),
        (["state.pt", "one.onnx", "--random", "1", "--trust"], "found a OrderedDict"),
        (["nothing.pt", "one.onnx", "--random", "1"], "found no file"),
        (["damaged.pt", "one.onnx", "--random", "1", "--trust"], "damaged.pt cannot be read"),
        ([factory("plain"), "one.onnx", "--random", "1", "--input", "3x8x8"], "convert_qat first"),
        ([factory("shapeless"), "one.onnx", "--random", "1"], "pass --input"),
        ([factory("words"), "one.onnx", "--random", "1"], "torch.int64; pass --data"),
        ([factory("one"), "nothing.onnx", "--random", "1"], "cannot read nothing.onnx"),
        ([factory("one"), "two.onnx", "--random", "1"], "no quantized tensor of this model"),
        ([factory("one"), "one.onnx", "--random", "1", "--input", "2x8x8"], "3 channels"),
        ([factory("one"), "one.onnx", "--data", "nothing.npy"], "found none"),
        ([factory("one"), "one.onnx", "--data", "notes.txt"], ".npy, .npz or .pt"),
        ([factory("one"), "one.onnx", "--data", "damaged.npz"], "damaged"),
        ([factory("one"), "one.onnx", "--data", "objects.npy"], "more than numbers"),
        ([factory("one"), "one.onnx", "--data", "attack.pt"], "more than numbers"),
        ([factory("one"), "one.onnx", "--data", "qat.pt"], "more than numbers"),
        ([factory("one"), "one.onnx", "--data", "none.npz"], "(empty)"),
        ([factory("one"), "one.onnx", "--data", "empty.pt"], "(empty)"),
        ([factory("one"), "one.onnx", "--data", "text.pt"], "found str"),
        ([factory("one"), "one.onnx", "--data", "pair.pt"], "the file takes 1 tensors (input), found 2"),
        ([factory("two"), "two.onnx", "--data", "uneven.pt", "--batch", "1"], "found 2, 3"),
    ],
)
def test_errors_end_with_one_line(run, files, argv, said):
    code, out, err = run(*argv)
    assert code == 1
    assert out == ""
    assert said in one_line(err)
    assert not (files / "attacked").exists()


def test_a_model_whose_quantizers_observed_nothing_is_not_called_the_same(run):
    assert run(factory("unobserved"), "one.onnx", "--random", "1")[0] == 1


def test_without_the_onnx_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = run(factory("one"), "one.onnx", "--random", "1")
    assert code == 1
    assert one_line(err) == "eagerq: error: ONNX export needs onnxruntime; run: pip install 'eagerq[onnx]'\n"
