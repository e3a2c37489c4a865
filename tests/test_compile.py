"""torch.compile traces every QAT forward without a break, and computes what eager mode computes."""

from __future__ import annotations

import copy
import functools
import math
import re
import shutil
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rows import ROWS, Row, attach_quantizers
from timm.layers.activations import GELU
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_leaves

import eagerq
from eagerq.nn import qat as nnqat
from eagerq.nn.intrinsic import qat as nniqat
from eagerq.nn.modules.batchnorm import is_plain_norm
from eagerq.nn.qat.mixins import WithAct, WithBn
from eagerq.quant import FakeQuantize, QuantSpec, fast_kernels
from eagerq.quant.layout import rows_of
from tests.test_exact import Branches

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's own compiler


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_and_eager(q: Any, backend: Any = "aot_eager") -> tuple[Any, Any]:
    return torch.compile(copy.deepcopy(q), fullgraph=True, backend=backend), q


def step(module: Any, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    leaf = x.clone().requires_grad_(x.is_floating_point())
    out = module(leaf)
    out.square().sum().backward()
    grads = [leaf.grad, *(p.grad for p in module.parameters())]
    module.zero_grad(set_to_none=True)
    return out.detach(), grads


def assert_agree(compiled: Any, eager: Any, found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    state = eager.state_dict()
    for key, value in compiled.state_dict().items():
        torch.testing.assert_close(value, state[key.removeprefix("_orig_mod.")], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_class_compiles_whole(row: Row) -> None:
    """With the textbook form where there is a transpose with norm, the direct form elsewhere."""
    preset = "per_tensor" if row.norm is not None and row.transposed else "onnxruntime"
    compiled, eager = compiled_and_eager(row.to_qat(row.chain(), preset))
    for seed in (1, 2):
        x = row.input(seed=seed)
        assert_agree(compiled, eager, step(compiled, x), step(eager, x))
    compiled.eval()
    eager.eval()
    with torch.no_grad():
        assert_agree(compiled, eager, compiled(x), eager(x))


def results_that_alias(module: Any, x: Tensor) -> list[str]:
    """Of the functions with a gradient of their own in the traced forward those whose result lies where another value does."""
    found, functions = [], 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal functions
        for node in graph.graph.nodes:
            if "autograd_function_apply" in str(node.target):
                functions += 1
                inner = getattr(graph, node.args[0].target).graph
                result = tree_leaves(next(n for n in inner.nodes if n.op == "output").args)[0]
                places = {n.meta["example_value"].untyped_storage()._cdata for n in result.all_input_nodes}
                if result.op == "placeholder" or result.meta["example_value"].untyped_storage()._cdata in places:
                    found.append(str(result.target))
        return graph.forward

    torch.compile(module, backend=backend, fullgraph=True)(x)
    assert functions >= 2, "a weight's and an activation's"
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("preset", ["onnxruntime", "per_tensor", "vitis"])
def test_results_of_functions_are_new_tensors(preset: str, dtype: torch.dtype) -> None:
    """torch.compile of PyTorch 2.11 drops the gradient of others without a word; later ones do not, so values cannot tell."""
    row = next(r for r in ROWS if r.name == "ConvBnReLU2d")
    q = row.to_qat(row.chain(), preset).to(dtype)
    attach_quantizers(row, q, preset)
    assert not results_that_alias(q, row.input(seed=1).to(dtype))


@pytest.mark.parametrize("observer", ["min_max", "moving_average", "percentile", "mse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_compiled_quantizer_learns_in_either_precision(observer: Any, dtype: torch.dtype) -> None:
    compiled, eager = compiled_and_eager(FakeQuantize(QuantSpec(observer=observer)).to(dtype))
    for seed in range(3):
        x = torch.randn(30, generator=torch.Generator().manual_seed(seed)).to(dtype)
        assert_agree(compiled, eager, step(compiled, x), step(eager, x))
    assert eager.has_range()


@pytest.mark.parametrize("preset", ["onnxruntime", "per_tensor"])
def test_toggles_reach_the_compiled_module(preset: str) -> None:
    row = next(r for r in ROWS if r.name == "ConvBnReLU2d")
    q = row.to_qat(row.chain(), preset)
    attach_quantizers(row, q, preset)
    compiled, eager = compiled_and_eager(q)
    for i, (verb, quantizes, observes, updates) in enumerate(
        (
            (eagerq.disable_fake_quant, False, True, True),
            (eagerq.freeze_bn_stats, False, True, False),
            (eagerq.disable_observer, False, False, False),
            (eagerq.enable_fake_quant, True, False, False),
            (eagerq.update_bn_stats, True, False, True),
        )
    ):
        compiled.apply(verb)
        eager.apply(verb)
        before = copy.deepcopy(eager.state_dict())
        x = row.input(seed=i)
        found, wanted = step(compiled, x), step(eager, x)
        assert_agree(compiled, eager, found, wanted)
        codes = found[0] / eager.activation_post_process.scale
        assert torch.allclose(codes, codes.round(), atol=1e-3) == quantizes
        assert torch.equal(before["activation_post_process.scale"], eager.activation_post_process.scale) != observes
        assert torch.equal(before["bn.running_mean"], eager.bn.running_mean) != updates
    compiled.eval()
    eager.eval()
    with torch.no_grad():
        assert_agree(compiled, eager, compiled(x), eager(x))


def test_a_whole_model_compiles_whole() -> None:
    model = nn.Sequential(
        nniqat.ConvBnReLU2d(3, 4, 3, padding=1),
        nniqat.ConvBn2d(4, 4, 3, groups=2, qconfig="per_tensor"),
        nn.Flatten(),
        nniqat.LinearReLU(4 * 4 * 4, 5),
    )
    for module, spec in ((model[0], QuantSpec()), (model[3], QuantSpec(bits=4, observer="percentile"))):
        module.activation_post_process = FakeQuantize(spec)
    compiled, eager = compiled_and_eager(model)
    for _ in range(2):  # before and after a range is known
        x = torch.randn(4, 3, 6, 6)
        assert_agree(compiled, eager, step(compiled, x), step(eager, x))


# --- real nets: how many graphs


def _blocks(*stages: str) -> Any:
    return decode_arch_def([[stage] for stage in stages])


_SLIM: Any = {"num_classes": 4, "stem_size": 8, "num_features": 16, "round_chs_fn": lambda c: int(c)}
#: timm's own classes, as narrow and shallow as they can be: tracing takes the time that there are modules.
NETS: dict[str, Any] = {
    "resnet": lambda: ResNet(BasicBlock, (1, 1, 1, 1), num_classes=4, channels=(8, 8, 16, 16)),
    "mobilenetv2": lambda: EfficientNet(
        _blocks("ds_r1_k3_s1_c8", "ir_r2_k3_s2_e2_c8", "ir_r1_k3_s2_e2_c16"), act_layer=nn.ReLU6, **_SLIM
    ),
    "efficientnet": lambda: EfficientNet(
        _blocks("ds_r1_k3_s1_c8_se0.25", "ir_r1_k3_s2_e2_c8_se0.25"), act_layer=nn.SiLU, **_SLIM
    ),
    "branches": Branches,
    "convnext": lambda: ConvNeXt(num_classes=4, depths=(1, 1, 1, 1), dims=(8, 16, 16, 24)),
}
FORMS = ["decomposed", "operators", "mixed"]


class Small(nn.Module):
    """Every way to a quantizer: clamps behind convolutions, depthwise and gated, a residual's ReLU, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.depthwise, self.second, self.gate = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.SiLU()
        self.one, self.six, self.two, self.exit = nn.Conv2d(8, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.ReLU()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        y = self.two(self.six(self.one(self.gate(self.second(self.depthwise(x))))))
        return self.head(self.exit(y + x).mean((2, 3)))


@pytest.fixture
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What compiled code holds: PyTorch's own functions; as on CUDA, the operators (with their plain kernels); or, as there of
    large tensors, a mixture."""
    if request.param != "decomposed":
        monkeypatch.setattr(fast_kernels, "are_fast", lambda x: x.dtype in fast_kernels.DTYPES)
    if request.param == "mixed":
        monkeypatch.setattr(sys.modules[FakeQuantize.__module__], "FEWEST_FUSED", 1)
        monkeypatch.setattr("eagerq.quant.observer._row_of", rows_of)
    return str(request.param)


in_each_form = pytest.mark.parametrize("form", FORMS, indirect=True)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C compiler")
@in_each_form
def test_inductor_agrees(form: str) -> None:
    """Where an operator learns, what the state was before it is read before it."""
    row = next(r for r in ROWS if r.name == "ConvBnReLU2d")
    q = row.to_qat(row.chain(), "onnxruntime")
    attach_quantizers(row, q, "onnxruntime")
    compiled, eager = compiled_and_eager(q, "inductor")
    found, wanted = compiled(row.input(seed=1)), eager(row.input(seed=1))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # no range is known yet
    x = row.input()
    found, wanted = compiled(x), eager(x)
    # another order of float additions may move a value across a rounding boundary: by one code at most, and rarely
    assert float((found - wanted).abs().max()) <= 1.001 * float(eager.activation_post_process.scale)
    assert float(((found - wanted).abs() > 1e-5).float().mean()) < 0.01


CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize(
    ("shape", "format", "bounds", "learns", "fused"),
    [
        ((8, 64, 64, 64), CHANNELS_LAST, (None, None), True, True),
        ((8, 64, 64, 64), CONTIGUOUS, (None, None), True, True),
        ((1 << 20,), CONTIGUOUS, (None, None), True, False),
        ((1 << 20, 2), CONTIGUOUS, (None, None), True, False),
        ((2, 1 << 19), CONTIGUOUS, (None, None), True, True),
        ((8, 64, 64, 64), CHANNELS_LAST, (0.0, None), True, False),
        ((8, 64, 64, 64), CHANNELS_LAST, (0.0, 6.0), False, True),
        ((2, 64, 64, 64), CHANNELS_LAST, (None, None), True, True),
        ((64, 16, 64, 64), CHANNELS_LAST, (None, None), True, False),
        ((64, 16, 64, 64), CHANNELS_LAST, (None, None), False, True),
        ((8, 64, 8, 8), CHANNELS_LAST, (None, None), True, False),
        ((8, 64, 8, 8), CHANNELS_LAST, (None, None), False, True),
    ],
)
def test_what_is_left_to_compilers_on_cuda(
    shape: Any, format: Any, bounds: Any, learns: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_kernels, "are_fast", lambda x: True)
    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    quantizer = FakeQuantize(QuantSpec()).train(learns)
    x = torch.empty(shape).contiguous(memory_format=format)
    torch.compile(lambda x: quantizer.of_activation(x, bounds), fullgraph=True, backend=backend)(x)
    assert ["fake_quantize_activation" in graph for graph in graphs] == [not fused]


if torch.cuda.is_available():

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("format", [CHANNELS_LAST, CONTIGUOUS], ids=str)
    def test_on_cuda_a_large_tensor_learns_as_by_the_kernel(format: torch.memory_format, dtype: torch.dtype) -> None:
        """Inductor's division of float32 is not IEEE's: a quotient beside a tie may become the other code."""
        compiled, eager = compiled_and_eager(FakeQuantize(QuantSpec()).cuda(), "inductor")
        for seed in range(3):
            torch.manual_seed(seed)
            x = torch.randn(8, 64, 64, 64, device="cuda", dtype=dtype).contiguous(memory_format=format)
            x[0, 0, 0, 0] = 9.0  # clipped
            scale, zero = float(eager.scale), int(eager.zero_point)
            state = {name: t.clone() for name, t in eager.state_dict().items()}
            compiled._orig_mod.load_state_dict(state)
            (found, given), (wanted, grads) = step(compiled, x), step(eager, x)
            quotient = x.double() / scale
            beside = ((quotient - quotient.floor() - 0.5).abs() < 1e-5 * (1 + quotient.abs())).to(x.device)
            off = (found - wanted).abs().double()
            assert bool((off[~beside] == 0).all()) and float(off.max()) <= 1.01 * scale, zero
            same = (given[0] == grads[0]) | beside | (off > 0)
            assert bool(same.all())
            for name in ("min_val", "max_val"):
                a, b = (getattr(q.activation_post_process, name) for q in (compiled._orig_mod, eager))
                torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


CHAINS: dict[str, Any] = {
    "alone": nn.Identity,
    "gelu": nn.GELU,
    "softsign": nn.Softsign,
    "linear": lambda: nn.Sequential(nn.Linear(40, 40), nn.GELU()),
}

_AVERAGED = QuantSpec(signed=True, symmetric=True, per_channel=True, observer="moving_average")
QUANTIZERS: dict[str, Any] = {
    "activation": lambda: FakeQuantize(QuantSpec(observer="min_max")),
    "channels": lambda: FakeQuantize(QuantSpec(observer="min_max"), 40, 1),
    "weight": lambda: FakeQuantize(_AVERAGED, 64, memoryless=True),
}


@in_each_form
@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("front", CHAINS)
@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler"))],
)
def test_the_gradient_is_that_of_the_scale_before_the_batch(backend: str, front: str, kind: str, form: str) -> None:
    """A backward that computes anew what comes from a state must not do so from the one that learned meanwhile."""
    torch.manual_seed(0)
    compiled, eager = compiled_and_eager(nn.Sequential(CHAINS[front](), QUANTIZERS[kind]()), backend)
    for wider in (1.0, 3.0):
        x = wider * torch.randn(64, 40)
        (found, given), (wanted, grads) = step(compiled, x), step(eager, x)
    top = wanted.amax() if kind == "activation" else wanted.amax(0) if kind == "channels" else wanted.amax(1, keepdim=True)
    assert (wanted == top).sum() > 9 + 64, "some are clipped"
    torch.testing.assert_close((found, given), (wanted, grads), rtol=1e-5, atol=1e-5)


@in_each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("trains", [True, False])
def test_while_no_range_is_known_everything_passes(trains: bool, dtype: torch.dtype, form: str) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 3e4, 1e-7, -0.0, 0.7, 3e8, 1e-30]).to(dtype).repeat(2, 4)
    compiled, eager = compiled_and_eager(FakeQuantize(QuantSpec()).to(torch.promote_types(dtype, torch.float32)).train(trains))
    found, wanted = ([out, grads[0]] for out, grads in (step(compiled, x), step(eager, x)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wanted[0], x, rtol=0, atol=0, equal_nan=True)


@in_each_form
def test_open_sizes_stay_open(form: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(FakeQuantize(QuantSpec()) for _ in range(4)))
    counter: Any = CompileCounter()
    compiled = torch.compile(net, backend=counter, dynamic=True, fullgraph=True)
    for batch in (4, 8, 31, 32, 33, 100, 2000):
        compiled(torch.randn(batch, 640, 3))
        compiled(torch.randn(batch, 5, 7, 40).permute(0, 3, 1, 2))
    assert counter.frame_count <= 2, "one for each number of axes"


@in_each_form
def test_an_export_in_training_holds_the_batch_open(form: str) -> None:
    quantizer = FakeQuantize(QuantSpec())
    x = torch.randn(8, 64)
    program = torch.export.export(quantizer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=1 << 20)},))
    assert program.module()(x[:3]).shape == (3, 64)


class Pair:
    """A QAT net, compiled as one graph, and its twin that is not; and what one more step compiles."""

    def __init__(
        self, model: nn.Module, preset: str = "onnxruntime", size: int = 32, patterns: Any = None, **options: Any
    ) -> None:
        self.size, self.steps = size, 0
        example = self.batch()
        fused = eagerq.fuse_modules(model, patterns or eagerq.DEFAULT_PATTERNS, example_inputs=example)
        self.eager: Any = eagerq.convert_qat(fused, preset, example_inputs=example)
        self.eager.train()
        self.net = copy.deepcopy(self.eager)
        self.counter: Any = CompileCounter()
        self.compiled = torch.compile(self.net, fullgraph=True, backend=self.counter, options=options)

    def batch(self) -> Tensor:
        self.steps += 1
        return torch.randn(2, 3, self.size, self.size, generator=torch.Generator().manual_seed(self.steps))

    def apply(self, change: Any) -> None:
        change(self.net)
        change(self.eager)

    def step(self, with_gradient: bool = True) -> int:
        """Graphs compiled in a step that both nets make, alike."""
        before, x = self.counter.frame_count, self.batch()
        if with_gradient:
            assert_agree(self.compiled, self.eager, step(self.compiled, x), step(self.eager, x))
        else:
            with torch.no_grad():
                assert_agree(self.compiled, self.eager, self.compiled(x), self.eager(x))
        return int(self.counter.frame_count - before)


def applied(verb: Any) -> Any:
    return functools.partial(nn.Module.apply, fn=verb)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((n, "decomposed") for n in NETS),
        *((n, "operators") for n in ("mobilenetv2", "efficientnet", "branches", "convnext")),
        *((n, "mixed") for n in ("efficientnet", "convnext")),
    ],
    indirect=["form"],
)
def test_a_real_net_is_one_graph(name: str, form: str) -> None:
    torch.manual_seed(0)
    pair = Pair(NETS[name]())
    assert [pair.step() for _ in range(3)] == [1, 0, 0]
    pair.apply(nn.Module.eval)
    assert [pair.step(False) for _ in range(2)] == [1, 0]
    pair.apply(nn.Module.train)
    assert pair.step() == 0


SWITCHES = (
    (eagerq.disable_observer, eagerq.enable_observer),
    (eagerq.disable_fake_quant, eagerq.enable_fake_quant),
    (eagerq.freeze_bn_stats, eagerq.update_bn_stats),
)


FILTERED = {"guard_filter_fn": eagerq.guard_filter}


@in_each_form
@pytest.mark.parametrize("options", [{}, FILTERED], ids=["all guards", "filtered"])
@pytest.mark.parametrize("preset", ["onnxruntime", "tensorrt"])
def test_a_switch_compiles_once_and_never_on_the_way_back(preset: str, options: dict[str, Any], form: str) -> None:
    torch.manual_seed(0)
    pair = Pair(Small(), preset, 8, **options)
    assert [pair.step() for _ in range(3)] == [1, 0, 0]
    for most in (1, 0):  # the second time all is compiled
        for there, back in SWITCHES:
            pair.apply(applied(there))
            assert pair.step() <= most
            assert pair.step() == 0
            pair.apply(applied(back))
            assert pair.step() == 0
        pair.apply(nn.Module.eval)
        for with_gradient in (True, False):
            assert pair.step(with_gradient) <= most
            assert pair.step(with_gradient) == 0
        pair.apply(nn.Module.train)
        assert pair.step() == 0


class Slope(nn.Module):
    """An activation of the user's own, which a QAT module holds."""

    slope = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0.0) * self.slope


class Doubled(nn.Module):
    factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Changing(nn.Module):
    """Chains with an activation of torch's and of the user's, a module outside of them, and two convolutions of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.second, self.slope, self.doubled = nn.Conv2d(4, 4, 1), Slope(), Doubled()
        self.one, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.doubled(self.slope(self.second(self.relu(self.bn(self.conv(x))))))
        return self.other(self.one(x))


def _of(net: nn.Module, kind: Any) -> Any:
    return next(m for m in net.modules() if isinstance(m, kind))


def _more(module: Any, args: Any, out: Tensor) -> Tensor:
    return out + 1.0


def _untied(net: Any) -> None:
    net.other.weight = nn.Parameter(net.one.weight.detach() + 1.0)


#: What training code does to a model, by name.
CHANGES: dict[str, Any] = {
    "momentum": lambda net: setattr(_of(net, nn.BatchNorm2d), "momentum", 0.5),
    "a frozen weight": lambda net: _of(net, WithBn).weight.requires_grad_(False),
    "a value of a module outside": lambda net: setattr(net.doubled, "factor", 3.0),
    "a method of a module outside": lambda net: setattr(net.doubled, "forward", lambda x: x + 1.0),
    "a value of an activation of the user's": lambda net: setattr(_of(net, Slope), "slope", 3.0),
    "a method of an activation of the user's": lambda net: setattr(_of(net, Slope), "forward", lambda x: x + 1.0),
    "a hook on an activation": lambda net: _of(net, nn.ReLU).register_forward_hook(_more),
    "a hook on a quantizer": lambda net: _of(net, WithBn).activation_post_process.register_forward_hook(_more),
    "weights that were one": _untied,
    "observers of all ranks": lambda net: net.apply(eagerq.enable_observer_sync),
}


#: What PyTorch itself does not look at again in its oldest supported version, as all guards tell.
UNSEEN_ONCE = frozenset({"a frozen weight", "a hook on an activation", "a hook on a quantizer"})


def changed(change: str, **options: Any) -> list[int] | None:
    """Graphs compiled in the two steps after a change; None if compiled code went on as before and was wrong."""
    torch.manual_seed(0)
    pair = Pair(Changing(), size=8, patterns=eagerq.DEFAULT_PATTERNS.extended(activations=(Slope,)), **options)
    assert any(isinstance(m, WithAct) and isinstance(m.act, Slope) for m in pair.net.modules())
    assert [pair.step() for _ in range(3)] == [1, 0, 0]
    pair.apply(CHANGES[change])
    try:
        return [pair.step() for _ in range(2)]
    except AssertionError:
        return None


@pytest.mark.parametrize("change", CHANGES)
def test_a_filtered_model_sees_what_training_code_changes(change: str) -> None:
    """As one with all guards does."""
    found = changed(change)
    torch._dynamo.reset()
    assert changed(change, **FILTERED) == found
    newest = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
    assert found == [1, 0] or (change in UNSEEN_ONCE and not newest)


def test_a_filter_drops_what_only_surgery_changes() -> None:
    """Of the guards on eagerq's modules all that are neither values nor hooks; of others none."""
    torch.manual_seed(0)
    dropped, kept = [], []

    def keep(guards: Any) -> list[bool]:
        found = eagerq.guard_filter(guards)
        for guard, stays in zip(guards, found, strict=True):
            (kept if stays else dropped).append(guard)
        return found

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), Doubled())
    Pair(net, size=8, guard_filter_fn=keep).step()
    ours = re.compile(r"((dict\()?type\()?[\w\[\]']+\._modules\['0'\]")  # whatever the frame's local is called
    left = [guard.guard_type for guard in kept if ours.match(guard.name) and "_hooks" not in guard.name]
    assert dropped
    assert all(ours.match(guard.name) for guard in dropped)
    assert {"DICT_CONTAINS", "DICT_NOT_CONTAINS", "NOT_PRESENT_IN_GENERIC_DICT", "TYPE_MATCH"}.isdisjoint(left)
    assert {"TENSOR_MATCH", "CONSTANT_MATCH"} <= {*left}


@in_each_form
def test_an_observer_that_no_kernel_learns_compiles_once(form: str) -> None:
    """The batch is quantized by an operator and observed beside it."""
    config = eagerq.QConfig(QuantSpec(observer="percentile"), eagerq.PRESETS["onnxruntime"].weight, split_activations=True)
    torch.manual_seed(0)
    pair = Pair(Small(), config, 8)  # type: ignore[arg-type]
    assert [pair.step() for _ in range(3)] == [1, 0, 0]


@in_each_form
def test_a_backward_ahead_of_time_agrees(form: str) -> None:
    """Gradients of the operators as compilers see them: masks in PyTorch's own functions."""
    torch.manual_seed(0)
    pair = Pair(Small(), size=8)
    compiled, eager = compiled_and_eager(pair.eager)
    for _ in range(3):
        x = pair.batch()
        assert_agree(compiled, eager, step(compiled, x), step(eager, x))


# --- a norm and what follows it, where kernels serve


NORMED = ("ConvBn2d", "ConvBnReLU2d", "ConvBnReLU3d", "LinearBnReLU1d", "ConvTransposeBnReLU2d", "BNReLU2d")


def channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))


def graphs(q: Any) -> tuple[Any, Any, list[torch.fx.GraphModule]]:
    """``q`` compiled, ``q``, and the graphs that compilers will see: forwards and backwards."""
    seen: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        seen.append(graph)
        return graph

    return *compiled_and_eager(q, aot_autograd(fw_compiler=keep, bw_compiler=keep)), seen


def operators_in(graph: torch.fx.GraphModule) -> list[str]:
    called = [str((n.target, *(n.args[:1] if "functionalized" in str(n.target) else ()))) for n in graph.graph.nodes]
    names = (
        "batch_norm_statistics", "batch_norm_sums", "batch_norm_activation", "batch_norm_gated_gradient", "batch_norm_gated",
        "fake_quantize_activation", "fake_quantize_gelu", "gelu_gradient", "fake_quantize_gated", "gated_gradient",
        "fake_quantize_sigmoid", "sigmoid_gradient",
        "native_batch_norm", "gelu_backward",
    )  # fmt: skip
    return [found for text in called if (found := next((name for name in names if name in text), None))]


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("form", ["operators"], indirect=True)
def test_the_first_pass_over_a_norm_is_an_operator(name: str, form: str) -> None:
    """In the forward and in the backward; what follows is PyTorch's own functions."""
    row = next(r for r in ROWS if r.name == name)
    q = row.to_qat(row.chain(), "onnxruntime")
    q.activation_post_process = FakeQuantize(QuantSpec())
    compiled, eager, seen = graphs(q)
    for seed in (1, 2, 3):
        x = channels_last(row.input(seed=seed))
        assert_agree(compiled, eager, step(compiled, x), step(eager, x))
    assert [operators_in(graph) for graph in seen] == [["batch_norm_statistics"], ["batch_norm_sums"]]


@pytest.mark.parametrize("gate", [nn.SiLU, nn.Hardswish])
@pytest.mark.parametrize("form", ["operators"], indirect=True)
def test_a_norm_and_its_gate_are_one_operator_for_compilers(gate: type[nn.Module], form: str) -> None:
    """In the forward and in the backward."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), gate())
    fused = eagerq.fuse_modules(net, example_inputs=torch.randn(2, 3, 5, 5))
    compiled, eager, seen = graphs(eagerq.convert_qat(fused, example_inputs=torch.randn(2, 3, 5, 5)))
    for seed in (1, 2, 3):
        x = channels_last(torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(seed)))
        assert_agree(compiled, eager, step(compiled, x), step(eager, x))
    found = [{name for name in operators_in(graph) if name != "fake_quantize_activation"} for graph in seen]
    assert found == [{"batch_norm_gated"}, {"batch_norm_gated_gradient"}]


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Hardsigmoid])
@pytest.mark.parametrize("form", ["operators"], indirect=True)
def test_compilers_are_given_a_sigmoid_itself(act: type[nn.Module], form: str) -> None:
    torch.manual_seed(0)
    q = nniqat.LinearAct(7, 5, act=act())
    q.activation_post_process = FakeQuantize(QuantSpec())
    q.split_activation()
    compiled, eager, seen = graphs(q)
    for seed in (1, 2, 3):
        x = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(seed))
        assert_agree(compiled, eager, step(compiled, x), step(eager, x))
    assert [operators_in(graph) for graph in seen] == [["fake_quantize_activation"] * 2, []]


@pytest.mark.parametrize("act", [nn.GELU, GELU])
@pytest.mark.parametrize("form", ["operators"], indirect=True)
def test_compilers_keep_a_gelu_of_their_own(act: type[nn.Module], form: str) -> None:
    """Forward and backward."""
    torch.manual_seed(0)
    q = nniqat.LinearAct(7, 5, act=act())
    q.activation_post_process = FakeQuantize(QuantSpec())
    compiled, eager, seen = graphs(q)
    for seed in (1, 2, 3):
        x = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(seed))
        assert_agree(compiled, eager, step(compiled, x), step(eager, x))
    assert [operators_in(graph) for graph in seen] == [["fake_quantize_activation"], ["gelu_backward"]]
    eager.act.register_forward_hook(_more)  # before it is compiled: PyTorch 2.11 sees no later one
    compiled, eager, _ = graphs(eager)
    assert_agree(compiled, eager, step(compiled, x), step(eager, x))


def _norms(dims: int, channels: int, affine: bool) -> Any:
    return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims](channels, affine=affine)


@given(
    dims=st.integers(0, 3), channels=st.integers(1, 4), batch=st.integers(2, 4), affine=st.booleans(), seed=st.integers(0, 2**16),
    learns=st.booleans(), bounds=st.sampled_from([(None, None), (0.0, None), (0.0, 1.0)]),
)  # fmt: skip
def test_the_operator_is_the_norm_the_clamp_and_the_quantizer(
    dims: int, channels: int, batch: int, affine: bool, seed: int, learns: bool, bounds: Any
) -> None:
    """Value, gradients, statistics, count and range, over batches, of gammas of both signs and zero."""
    torch.manual_seed(seed)
    norm = _norms(dims, channels, affine)
    if affine:
        with torch.no_grad():
            norm.weight.copy_(torch.randn(channels).sign() * torch.rand(channels) * torch.randint(0, 2, (channels,)))
            norm.bias.normal_()
    other, mine, theirs = copy.deepcopy(norm), FakeQuantize(QuantSpec()), FakeQuantize(QuantSpec())
    for module in (mine, theirs):
        module.observer_enabled = learns
    for _ in range(2):
        x = torch.randn(batch, channels, *(3,) * dims) * torch.rand(channels).reshape(-1, *(1,) * dims)
        assert is_plain_norm(norm, x)
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:  # as on CUDA
            patch.setattr(fast_kernels, "are_fast", lambda x: True)
            patch.setitem(FakeQuantize.of_norm.__globals__, "has_channels_last", lambda x: True)
            found = mine.of_norm(norm, one, bounds)
        y = other(two)
        low, high = bounds
        wanted = theirs(y if bounds == (None, None) else nn.functional.hardtanh(y, low, high or torch.inf))
        step = float(theirs.scale) if mine.observed else 0.0
        apart = (found - wanted).abs().detach()
        assert float(apart.max()) <= 1.001 * step + 1e-5
        assert float((apart > 1e-5).float().mean()) <= 0.1  # a value near a tie goes either way
        for key, value in norm.state_dict().items():
            torch.testing.assert_close(value, other.state_dict()[key], rtol=1e-5, atol=1e-5)
        for key, value in mine.state_dict().items():
            torch.testing.assert_close(value, theirs.state_dict()[key], rtol=1e-5, atol=1e-5)
        if float(apart.max()) <= 1e-5:
            grad = torch.randn_like(x)
            found.backward(grad)
            wanted.backward(grad)
            for a, b in ((one, two), *zip(norm.parameters(), other.parameters(), strict=True)):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


def test_a_cumulative_average_is_the_norms_own() -> None:
    assert not is_plain_norm(nn.BatchNorm1d(2, momentum=None), torch.ones(3, 2))


def _without(name: str) -> Any:
    def change(norm: nn.Module) -> None:
        value = norm._buffers.pop(name)
        norm.__dict__[name] = value

    return change


def _with(name: str, value: Any) -> Any:
    return lambda norm: norm._parameters.__setitem__(name, value) if name in norm._parameters else setattr(norm, name, value)


@pytest.mark.parametrize(
    "change",
    [
        _with("weight", nn.Parameter(torch.ones(6))), _with("weight", nn.Parameter(torch.ones(6)[::2])),
        _with("bias", None), _with("running_mean", torch.zeros(1).expand(3)), _with("running_var", torch.ones(3, device="meta")),
        _with("num_batches_tracked", torch.tensor(0, dtype=torch.int32)),
        _with("num_batches_tracked", torch.tensor(0, device="meta")), _without("running_mean"),
        lambda norm: nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity()),
    ],
    ids=[
        "longer", "strided", "no bias", "expanded", "elsewhere", "another count", "a count elsewhere", "no buffer",
        "parametrized",
    ],
)  # fmt: skip
def test_what_lies_otherwise_is_the_norms_own(change: Any) -> None:
    """Kernels read by address alone."""
    norm, x = nn.BatchNorm2d(3), torch.ones(2, 3, 2, 2)
    assert is_plain_norm(norm, x)
    change(norm)
    assert not is_plain_norm(norm, x)


@pytest.mark.parametrize("shape", [(1, 2), (3,), (3, 3), (3, 2, 2, 2)], ids=str)
def test_of_a_wrong_input_the_norm_says_what_is_wrong(shape: tuple[int, ...]) -> None:
    norm, x = nn.BatchNorm1d(2), torch.ones(shape)
    assert not is_plain_norm(norm, x)
    with pytest.raises((ValueError, RuntimeError)):
        norm(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.bn.eval(),
        lambda m: setattr(m, "bn", nn.BatchNorm2d(4, track_running_stats=False)),
        lambda m: setattr(m.bn, "track_running_stats", False),
        lambda m: setattr(m, "bn", eagerq.nn.FrozenBatchNorm2d(4)),
        lambda m: setattr(m.activation_post_process, "spec", QuantSpec(observer="percentile")),
        lambda m: setattr(m, "act", nn.GELU()),
        lambda m: m.act.register_forward_hook(lambda *_: None) and None,
        lambda m: m.bn.register_forward_hook(lambda *_: None) and None,
        lambda m: m.activation_post_process.register_forward_hook(lambda *_: None) and None,
        lambda m: m.activation_post_process.apply(eagerq.disable_fake_quant),
    ],
    ids=[
        "frozen", "no statistics", "paused", "frozen class", "percentile", "no clamp", "hook", "norm's hook", "quantizer's hook",
        "no quantizer",
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["operators"], indirect=True)
def test_what_the_operator_is_not_is_left_to_the_modules(change: Any, form: str) -> None:
    """A norm that does not learn, an activation that does more, a quantizer that wants more or nothing."""
    torch.manual_seed(0)
    q = nniqat.ConvBnReLU2d(3, 4, 3)
    q.activation_post_process = FakeQuantize(QuantSpec())
    change(q)
    compiled, eager, seen = graphs(q)
    for seed in (1, 2):
        x = channels_last(torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed)))
        assert_agree(compiled, eager, step(compiled, x), step(eager, x))
    assert not any("batch_norm_statistics" in operators_in(graph) for graph in seen)


@pytest.mark.parametrize("form", ["operators"], indirect=True)
def test_channels_that_lie_apart_are_left_to_the_modules(form: str) -> None:
    torch.manual_seed(0)
    q = nniqat.ConvBnReLU2d(3, 4, 3)
    q.activation_post_process = FakeQuantize(QuantSpec())
    compiled, eager, seen = graphs(q)
    x = torch.randn(2, 3, 6, 6)
    assert_agree(compiled, eager, step(compiled, x), step(eager, x))
    assert not any("batch_norm_statistics" in operators_in(graph) for graph in seen)


@pytest.mark.parametrize("form", ["operators"], indirect=True)
def test_an_observer_that_is_off_is_not_taught(form: str) -> None:
    torch.manual_seed(0)
    q = nniqat.ConvBnReLU2d(3, 4, 3)
    q.activation_post_process = quantizer = FakeQuantize(QuantSpec())
    x = channels_last(torch.randn(2, 3, 6, 6))
    q(x)
    q.apply(eagerq.disable_observer)
    before = [t.clone() for t in quantizer.state]
    q(2 * x)
    assert all(torch.equal(a, b) for a, b in zip(before, quantizer.state, strict=True))


class _Doubled(nniqat.ConvBnReLU2d):
    """A user's own class, which computes something else before the activation."""

    def preactivation(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().preactivation(input, *args, **kwargs)


class _Shifted(nniqat.ConvBn2d):
    """In training."""

    def train_compute(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 1 + super().train_compute(input, *args, **kwargs)


class _Scaled(nniqat.ConvBn2d):
    """Behind the norm."""

    def compute(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().compute(input, *args, **kwargs)


class _ScaledThenReLU(WithAct, _Scaled):
    """With an activation on top."""


class _Wrapped(nniqat.ConvBn2d):
    """Under the name of what it wraps."""

    @functools.wraps(nniqat.ConvBn2d.compute)
    def compute(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().compute(input, *args, **kwargs)


class _Moved(nnqat.Conv2d):
    """Before the norm."""

    def compute(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().compute(input + 1, *args, **kwargs)


class _MovedThenNorm(WithBn, _Moved):
    """With a norm on top."""


def _patched(cls: Any, name: str, of_norm: bool = False) -> Any:
    """One instance computes something else."""

    def build(*args: Any) -> Any:
        q = cls(*args)
        on = q.bn if of_norm else q
        original = getattr(type(on), name)
        setattr(on, name, types.MethodType(lambda self, *a: 3 * original(self, *a), on))
        return q

    return build


OWN = [
    _Doubled, _Shifted, _Scaled, _Wrapped, _ScaledThenReLU, _MovedThenNorm,
    _patched(nniqat.ConvBn2d, "compute"), _patched(nniqat.ConvBn2d, "train_compute"),
    _patched(nniqat.ConvBnReLU2d, "preactivation"), _patched(nniqat.ConvBnReLU2d, "forward", of_norm=True),
]  # fmt: skip


@pytest.mark.parametrize("cls", OWN)
@in_each_form
def test_a_users_own_computing_is_done_as_it_is(cls: Any, form: str) -> None:
    torch.manual_seed(0)
    q = cls(3, 4, 3)
    q.activation_post_process = FakeQuantize(QuantSpec())
    compiled, eager, seen = graphs(q)
    for seed in (1, 2):
        x = channels_last(torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed)))
        assert_agree(compiled, eager, step(compiled, x), step(eager, x))
    assert not any("batch_norm_statistics" in operators_in(graph) for graph in seen)


@pytest.mark.parametrize("form", ["operators"], indirect=True)
def test_a_method_put_on_a_class_is_obeyed(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = nniqat.ConvBn2d(3, 4, 3)
    q.activation_post_process = FakeQuantize(QuantSpec())
    x = channels_last(torch.randn(2, 3, 6, 6))
    assert q.asks_kernels(x, q.activation_post_process)
    monkeypatch.setattr(nniqat.ConvBn2d, "compute", lambda self, x: 0 * x)
    assert not q.asks_kernels(x, q.activation_post_process)
    assert not q(x).any()


class _Joined(nnqat.QATBase, converts=nn.Bilinear):
    """Of several inputs."""

    def __init__(self) -> None:
        super().__init__()
        self._init_quantizers(None)

    def compute(self, input: Any, *args: Any, **kwargs: Any) -> Tensor:
        return torch.cat(input)


def test_an_input_may_be_a_list() -> None:
    q = _Joined()
    q.activation_post_process = FakeQuantize(QuantSpec())
    assert q([torch.ones(2), torch.ones(3)]).shape == (5,)  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", [nniqat.ConvBn2d, nniqat.ConvBnReLU2d])
@in_each_form
def test_a_quantizer_with_a_scale_a_channel_compiles(cls: Any, form: str) -> None:
    torch.manual_seed(0)
    q = cls(3, 4, 3)
    q.activation_post_process = FakeQuantize(QuantSpec(), channels=4, axis=1)
    compiled, eager = compiled_and_eager(q)
    for seed in (1, 2):
        x = channels_last(torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed)))
        assert_agree(compiled, eager, step(compiled, x), step(eager, x))


def test_an_activation_may_be_a_function() -> None:
    torch.manual_seed(0)
    q, wanted = nniqat.ConvBnReLU2d(3, 4, 3), nniqat.ConvBnReLU2d(3, 4, 3)
    wanted.load_state_dict(q.state_dict())
    del q.act
    q.act = torch.relu  # type: ignore[assignment]
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(q(x), wanted(x), rtol=0.0, atol=0.0)
