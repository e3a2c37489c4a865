"""The exact mode: codes as the engine computes them, on any eager forward; checked in ONNX Runtime and by slow integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import eagerq
from eagerq.nn.integer import integer_map
from eagerq.quant.code_values import Coded, Pending
from eagerq.quant.codes import CodeTensor, encode
from eagerq.quant.engine import PROFILES, Grid, fma, get_profile
from tests.nets import Made, conv, image, randomise

PROFILE = PROFILES["onnxruntime-x64"]
U8 = eagerq.QuantSpec()


def qat_of(model: nn.Module, x: Tensor, steps: int = 3) -> nn.Module:
    """A QAT model in eval mode whose quantizers have seen some data."""
    qat = eagerq.convert_qat(eagerq.fuse_modules(randomise(model.train()), example_inputs=x), example_inputs=x)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(steps):
            qat(torch.randn(x.shape, generator=generator))
    return qat.eval()


class Block(nn.Module):
    """Two branches, joined by ``join``; a residual, an activation, a pool and a linear layer behind it."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], act: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.join = join
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8), act)
        self.right = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.last = nn.Conv2d(width, 6, 1)
        self.pool, self.flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.flat(self.pool(self.last(self.join(self.left(x), self.right(x))))))


class Added(nn.Module):
    """A residual add in place with its ReLU behind it, as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.two, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act, self.act2, self.pool = nn.ReLU(inplace=True), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.last, self.head = nn.Conv2d(8, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.bn(self.one(x))))
        shortcut = x
        x = self.bn2(self.two(x))
        x += shortcut
        return self.head(self.last(self.act2(x)).mean((2, 3)))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.one, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.down, self.relu, self.up, self.gate = nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), gate
        self.last = nn.Conv2d(8, 4, 1)
        self.pool, self.flat, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.one(x))
        s = x.mean((2, 3), keepdim=True)
        x = x * self.gate(self.up(self.relu(self.down(s))))
        return self.head(self.flat(self.pool(self.last(x))))


class Branches(nn.Module):
    """A block of RepVGG: two convolutions and a norm of the input itself, added; behind it a norm that nothing is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.narrow = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.identity, self.sum, self.act = nn.BatchNorm2d(8), nn.Identity(), nn.ReLU(inplace=True)
        self.pool, self.norm, self.last, self.head = nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.mean, self.flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.sum(self.narrow(x) + self.wide(x))
        y += self.identity(x)
        x = self.last(self.norm(self.pool(self.act(y))))
        return self.head(self.flat(self.mean(x)))


def plus(a: Tensor, b: Tensor) -> Tensor:
    return a + b


def half(a: Tensor, b: Tensor) -> Tensor:
    """Sliced, and moved about."""
    a, b = torch.cat([a, b], 1).chunk(2, 1)
    return a.permute(0, 1, 3, 2).permute(0, 1, 3, 2)


class Pyramid(nn.Module):
    """Features of two sizes, joined as in a feature pyramid (nearest, added) and as in a U-Net (nearest, concatenated)."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = (nn.Sequential(nn.Conv2d(i, 8, 3, s, 1), nn.ReLU()) for i, s in ((3, 1), (8, 2)))
        self.lateral, self.smooth = nn.Conv2d(8, 8, 1), nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.up, self.joined = nn.Upsample(scale_factor=2), nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fine(x)
        y = self.coarse(x)
        z = self.smooth(self.lateral(x) + F.interpolate(y, size=x.shape[2:], mode="nearest"))
        return self.head(self.joined(torch.cat([self.up(z), x], 1)))


class Spatial(nn.Module):
    """Halves that go separate ways, pooled and joined: all on one grid."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.two, self.act2, self.pool = nn.Conv2d(16, 8, 1), nn.ReLU(), nn.MaxPool2d(5, 1, 2)
        self.three, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.act(self.one(x)).chunk(2, 1)
        x = self.act2(self.two(torch.cat([right, self.pool(left), self.pool(self.pool(right)), left], 1)))
        left, right = x.split(4, 1)
        return self.head(torch.cat([self.three(left), right], 1))


NETS: dict[str, Callable[[], nn.Module]] = {
    "added": Added,
    **{
        f"{type(act).__name__}": lambda act=act: Block(plus, act)  # type: ignore[misc]
        for act in (nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0.0, 2.0), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(0.1), nn.Sigmoid())
    },
    "timm_swish": lambda: Block(plus, timm.layers.activations.Swish()),
    "moved": lambda: Block(half, nn.ReLU()),
    "gate": lambda: Gate(nn.Sigmoid()),
    "hard_gate": lambda: Gate(nn.Hardsigmoid()),
    "pyramid": Pyramid,
    "spatial": Spatial,
    "branches": Branches,
    "mobilenet": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
    "resnet": lambda: timm.create_model("resnet10t", num_classes=10),
}


@pytest.mark.parametrize("name", NETS)
def test_the_engine_computes_the_same_codes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    qat = qat_of(NETS[name](), x)
    deployed = eagerq.convert(qat)
    batches = [torch.randn(3, 3, 32, 32) for _ in range(2)]
    path = eagerq.export_onnx(deployed, tmp_path / "model.onnx", x)
    for model in (qat, deployed):
        found = eagerq.verify_deployment(model, path, batches)
        assert found.compared > 20_000
        assert found.differing == 0, str(found)
        assert not found.exact.floats, str(found)
        assert found.output_difference == 0.0
        assert found.missing == ()
        assert found.first is None
        assert "0 of " in str(found)


@pytest.mark.parametrize("name", NETS)
def test_qat_evaluates_as_deployed(name: str) -> None:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    qat = qat_of(NETS[name](), x)
    deployed = eagerq.convert(qat)
    with torch.no_grad():
        float_before = qat(x)
        with eagerq.exact_mode(qat):
            trained = qat(x)
        with eagerq.exact_mode(deployed, PROFILE) as run:
            assert run.profile is PROFILE
            exact = deployed(x)
        assert type(exact) is Tensor
        assert torch.equal(trained, exact)
        assert torch.equal(qat(x), float_before)  # outside, all is as it was
        # the fake-quantized forward is near, a few codes at most
        assert (exact - float_before).abs().max() < 0.15 * float_before.abs().max()


def test_opset_17_holds_the_same_codes(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    qat = qat_of(Added(), x)
    path = eagerq.export_onnx(eagerq.convert(qat), tmp_path / "model.onnx", x, opset=17)
    assert [entry.version for entry in onnx.load(path).opset_import if entry.domain == ""] == [17]
    assert eagerq.verify_deployment(qat, path, x).differing == 0


def test_the_file_says_who_wrote_it_and_not_where(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    path = eagerq.export_onnx(eagerq.convert(qat_of(Added(), x)), tmp_path / "model.onnx", x)
    proto = onnx.load(path)
    assert (proto.producer_name, proto.producer_version) == ("eagerq", eagerq.__version__)
    assert b"site-packages" not in path.path.read_bytes()
    assert {node.output[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"} >= {
        "one.activation_post_process.codes",
        "two.activation_post_process.codes",
    }


def test_a_changed_file_is_found_out(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    qat = qat_of(Added(), x)
    path = eagerq.export_onnx(eagerq.convert(qat), tmp_path / "model.onnx", x)
    proto = onnx.load(path)
    weight = next(i for i in proto.graph.initializer if i.name == "two.weight_codes")
    changed = onnx.numpy_helper.to_array(weight).copy()
    changed[0] = np.clip(changed[0] + 3, -127, 127)
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    onnx.save(proto, path)
    found = eagerq.verify_deployment(qat, path, x)
    assert found.differing > 0
    assert found.first is not None
    assert found.first.name == "two.activation_post_process"
    assert found.rows[0].differing == 0
    assert found.first.name in str(found)
    assert found.output_difference > 0


def test_verify_refuses_what_it_cannot_compare(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    qat = qat_of(Added(), x)
    path = eagerq.export_onnx(eagerq.convert(qat), tmp_path / "model.onnx", x)
    with pytest.raises(eagerq.errors.StateError, match=r"convert_qat first"):
        eagerq.verify_deployment(Added(), path, x)
    with pytest.raises(eagerq.errors.ExportError, match="cannot read"):
        eagerq.verify_deployment(qat, tmp_path / "nothing.onnx", x)
    with pytest.raises(eagerq.errors.ExportError, match="no quantized tensor of this model"):
        eagerq.verify_deployment(qat_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), x), path, x)
    with pytest.raises(eagerq.errors.InputsError, match="takes 1 tensors"):
        eagerq.verify_deployment(qat, path, (x, x))


# --- what falls to float is listed; what was set is taken back --------------------------------------


def test_functions_outside_the_set_run_on_real_values_and_are_listed() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return torch.tanh(net.one(x)) + net.two(x).softmax(1)

    model = Made(forward, one=conv(), two=conv())
    qat = qat_of(model, image())
    with torch.no_grad(), eagerq.exact_mode(qat) as run:
        out = qat(image())
    assert type(out) is Tensor
    assert {"tanh", "softmax"} <= {name for name, _ in run.floats}
    assert "softmax" in str(run)


def test_a_failing_forward_takes_everything_back() -> None:
    qat = qat_of(Added(), torch.randn(2, 3, 32, 32))
    hooks = sum(len(m._forward_hooks) for m in qat.modules())
    with pytest.raises(RuntimeError), eagerq.exact_mode(qat):
        qat(torch.randn(2, 4, 32, 32))
    assert not any("profile" in vars(m) for m in qat.modules())
    assert sum(len(m._forward_hooks) for m in qat.modules()) == hooks
    with pytest.raises(eagerq.errors.StateError, match="float one"), eagerq.exact_mode(Added()):
        pass
    with pytest.raises(eagerq.errors.SpecError, match="onnxruntime-x64"), eagerq.exact_mode(qat, "abacus"):
        pass


def test_outputs_keep_their_structure() -> None:
    @dataclasses.dataclass
    class Out:
        logits: Tensor
        aside: dict[str, Any]

    def forward(net: Any, x: Tensor) -> Out:
        y = net.one(x)
        return Out(net.two(y), {"taps": [y, (y, 3)]})

    qat = qat_of(Made(forward, one=conv(), two=conv()), image())
    with torch.no_grad(), eagerq.exact_mode(qat):
        out = qat(image())
    assert type(out) is Out
    taps = out.aside["taps"]
    assert [type(t) for t in (out.logits, taps[0], taps[1][0])] == [Tensor] * 3
    assert taps[1][1] == 3


# --- the arithmetic, beside slow exact integers ------------------------------------------------------

scales = st.floats(2.0**-9, 0.5, width=32)
zero_points = st.integers(0, 255)


def grid(scale: float, zero_point: int) -> Grid:
    return Grid.of(U8, torch.tensor(scale), torch.tensor(zero_point))


@given(seed=st.integers(0, 999), groups=st.sampled_from([1, 2]), big=st.booleans(), bias=st.booleans(), zero=zero_points)
def test_sums_are_those_of_int64(seed: int, groups: int, big: bool, bias: bool, zero: int) -> None:
    """float32 where it holds the sums, float64 beyond, never a wrong integer."""
    generator = torch.Generator().manual_seed(seed)
    channels = 520 if big else 4  # 520 * 9 * 127 * 255 > 2**24
    host = nn.Conv2d(channels * groups, 2 * groups, 3, groups=groups, bias=False)
    qat = eagerq.nn.qat.Conv2d.from_float(host)
    codes = torch.randint(0, 256, (1, channels * groups, 4, 4), generator=generator).float()
    weight = torch.randint(-127, 128, host.weight.shape, generator=generator).float()
    offsets = torch.randint(-(2**24), 2**24, (2 * groups,), generator=generator).double() if bias else None
    x = Coded(codes, grid(0.1, zero), PROFILE)
    found = integer_map(qat, x, weight, torch.tensor([0.5]), offsets, (), {})
    total = F.conv2d((codes - zero).long(), weight.long(), None, groups=groups)
    if offsets is not None:
        total = total + offsets.long().reshape(-1, 1, 1)
    assert isinstance(found.value, Pending)
    assert torch.equal(found.value.real(), total.float() * (torch.tensor(0.1) * torch.tensor(0.5)))


@given(
    seed=st.integers(0, 999),
    a=st.tuples(scales, zero_points),
    b=st.tuples(scales, zero_points),
    out=st.tuples(scales, zero_points),
)
def test_kernels_round_real_arithmetic_to_the_nearest_code(
    seed: int, a: tuple[float, int], b: tuple[float, int], out: tuple[float, int]
) -> None:
    """Each formula is the exact real result's code, up to one where that lies on the edge between two."""
    generator = torch.Generator().manual_seed(seed)
    of_a, of_b, to = grid(*a), grid(*b), grid(*out)
    x, y = (torch.randint(0, 256, (64,), generator=generator).float() for _ in range(2))
    real = [((q - g.zero_point).double() * g.scale.double()) for q, g in ((x, of_a), (y, of_b))]
    pairs = [
        (PROFILE.add(x, of_a, y, of_b, to), real[0] + real[1]),
        (PROFILE.mul(x, of_a, y, of_b, to), real[0] * real[1]),
        (PROFILE.table(PROFILE.sigmoid, x, of_a, to), torch.sigmoid(real[0])),
        (PROFILE.table(PROFILE.hardsigmoid, x, of_a, to), F.hardsigmoid(real[0])),
        (PROFILE.average((x - of_a.zero_point).sum(0, keepdim=True), 64, of_a, to), real[0].mean(0, keepdim=True)),
    ]
    for codes, wanted in pairs:
        place = (wanted / to.scale.double() + to.zero_point.double()).clamp(0, 255)
        assert torch.equal(codes, codes.round())
        assert ((codes.double() - place).abs() <= 0.5 + 2e-3).all()


@given(a=st.floats(-1e3, 1e3, width=32), b=st.floats(-1e3, 1e3, width=32), c=st.floats(-1e3, 1e3, width=32))
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    from fractions import Fraction

    found = fma(*(torch.tensor(v) for v in (a, b, c)))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    below, above = (torch.nextafter(found, torch.tensor(end)) for end in (-torch.inf, torch.inf))
    distance = abs(Fraction(found.item()) - exact)
    assert all(distance <= abs(Fraction(near.item()) - exact) for near in (below, above))


MOVES: tuple[Callable[[Tensor], Any], ...] = (
    lambda x: x.flatten(1),
    lambda x: x.reshape(2, -1),
    lambda x: x.permute(0, 2, 3, 1),
    lambda x: x.transpose(1, 2),
    lambda x: x.chunk(2, 1)[1],
    lambda x: x.split([1, 3], 1)[1],
    lambda x: x[:, 1:, ::2],
    lambda x: x.unsqueeze(0).squeeze(0),
    lambda x: x.contiguous().clone(),
    lambda x: F.max_pool2d(x, 3, 2, 1),
    lambda x: F.pixel_shuffle(x, 2),
    lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    lambda x: F.pad(x, (1, 2, 0, 1)),
    lambda x: F.dropout(x, 0.5, False),
    lambda x: torch.cat([x, x], 1),
    lambda x: F.relu(x),
    lambda x: F.relu6(x),
    lambda x: F.hardtanh(x, -0.5, 0.75),
    lambda x: x.clamp(min=-0.25),
)


@pytest.mark.parametrize("move", MOVES, ids=range(len(MOVES)))
@given(seed=st.integers(0, 99), scale=scales, zero=zero_points)
def test_what_moves_or_clips_codes_is_what_it_does_to_their_values(
    move: Callable[[Tensor], Any], seed: int, scale: float, zero: int
) -> None:
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(seed)) * scale * 100
    coded = encode(x, U8, torch.tensor(scale), torch.tensor(zero), PROFILE)
    assert isinstance(coded, CodeTensor)
    found = move(coded)
    assert isinstance(found, CodeTensor)
    wanted = move(coded.value.real())
    assert found.shape == wanted.shape
    assert found.dim() == wanted.dim()
    assert isinstance(found.value, Coded)
    # a clip's bound is rounded to a code
    assert torch.allclose(found.value.real(), wanted, rtol=0, atol=0.51 * scale)
    assert torch.equal(found.value.codes, found.value.grid.clip(found.value.codes).round())


def test_profiles_are_named() -> None:
    assert get_profile("onnxruntime-x64") is PROFILE
    assert get_profile(PROFILE) is PROFILE
    with pytest.raises(eagerq.errors.SpecError, match="onnxruntime-x64"):
        get_profile(3)  # type: ignore[arg-type]


def test_dropout_that_drops_is_no_identity() -> None:
    coded = encode(torch.randn(2, 3, 4, 4), U8, torch.tensor(0.1), torch.tensor(100), PROFILE)
    assert isinstance(F.dropout(coded, 0.5, False), CodeTensor)
    assert not isinstance(F.dropout(coded, 0.5), CodeTensor)  # PyTorch's default is to drop


def test_in_place_functions_keep_the_tensor() -> None:
    a, b = (encode(torch.randn(2, 3), U8, torch.tensor(0.1), torch.tensor(100), PROFILE) for _ in range(2))
    before = a
    a += b
    assert a is before
    assert F.relu(a, inplace=True) is before
    real = torch.zeros(2, 3)
    assert torch.equal(torch.maximum(real, a), torch.maximum(real, a.value.real()))  # code tensors behind a real one
