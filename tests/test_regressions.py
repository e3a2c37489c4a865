"""Ways of use that once went wrong, each as a law of its own."""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import eagerq
from eagerq.errors import ExportError, InputsError, StateError
from eagerq.nn import intrinsic as nni
from eagerq.nn import qat as nnqat


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).train()


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def qat_of(model: nn.Module, x: Tensor) -> nn.Module:
    return eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=x), example_inputs=x)


def prune_half(module: nn.Module) -> nn.Module:
    return prune.l1_unstructured(module, "weight", 0.5)


def test_an_average_of_weights_holds_finite_ranges() -> None:
    """An exponential average starts from buffers that saw nothing: infinite ones would stay infinite for ever."""
    qat = qat_of(small(), images())
    average = AveragedModel(qat, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for _ in range(3):
        qat(images()).sum().backward()
        average.update_parameters(qat)
    assert all(torch.isfinite(t).all() for t in average.module.state_dict().values())
    assert torch.isfinite(average.module.eval()(images())).all()
    assert torch.isfinite(eagerq.convert(average.module)(images())).all()


class Checked(nn.Module):
    """Looks at its input's values, so that it is watched on data."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        if not torch.isfinite(x).all():
            raise ValueError("NaN or infinity")
        return self.net(x)


@pytest.mark.parametrize("on_data", [False, True])
def test_checkpointed_densenet_counts_each_batch_once(on_data: bool) -> None:
    """timm's memory-efficient DenseNet recomputes conv and norm in backward; fusing must not move a norm in or out."""
    torch.manual_seed(0)
    model = timm.create_model("densenet121", memory_efficient=True, num_classes=4).train()
    model = Checked(model) if on_data else model
    x = torch.randn(2, 3, 32, 32)
    fused = eagerq.fuse_modules(model, example_inputs=x)
    for m in (model, fused):
        m(x).square().sum().backward()
    state = eagerq.float_state_dict(fused)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Frozen(nn.Module):
    """Its stem takes no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.conv(x)
        return self.relu(self.bn(x))


def test_a_gradient_boundary_is_kept() -> None:
    model = Frozen().train()
    plan = eagerq.plan_fusion(model, example_inputs=images())
    assert [match.names for match in plan.matches] == [("bn", "relu")]
    assert "gradient modes" in next(skip.reason for skip in plan.skips if skip.names == ("conv", "bn"))


def test_a_model_that_is_one_module_is_converted_itself() -> None:
    linear = nn.Linear(6, 3)
    qat = eagerq.convert_qat(linear, example_inputs=torch.randn(4, 6))
    assert type(qat) is nnqat.Linear
    assert qat.weight is not linear.weight
    qat.train()(torch.randn(4, 6))
    deployed = eagerq.convert(qat)
    x = torch.randn(4, 6)
    assert torch.equal(deployed(x), qat.eval()(x))


def test_a_fused_part_of_a_larger_model_takes_float_checkpoints() -> None:
    torch.manual_seed(0)
    state = nn.Sequential(small(), nn.Linear(5, 2)).state_dict()
    model = nn.Sequential(qat_of(small(), images()), nn.Linear(5, 2))
    model.load_state_dict(state, strict=True)
    found = eagerq.float_state_dict(model)
    assert found.keys() == state.keys()
    assert all(torch.equal(value, found[key]) for key, value in state.items())


class Tied(nn.Module):
    """A head that is the embedding's weight, through a function."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(11, 6), nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.mix(self.embedding(tokens)), self.embedding.weight)


def test_a_weight_that_a_function_reads_stays_float() -> None:
    model, tokens = Tied(), torch.randint(0, 11, (2, 5))
    qat = eagerq.convert_qat(model, example_inputs=tokens)
    assert type(qat.embedding) is nn.Embedding
    assert type(qat.mix) is nnqat.Linear
    assert dict(eagerq.report(qat).left_float)["embedding"].startswith("embedding.weight is also read by function linear")


def test_what_is_written_through_a_fused_module_reaches_the_member() -> None:
    fused = nni.ConvBnReLU2d(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    fused.stride = (2, 2)
    assert fused[0].stride == (2, 2)
    assert fused(images()).shape == (4, 8, 3, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_deployed_model_changes_dtype_without_losing_codes(dtype: torch.dtype) -> None:
    qat = qat_of(small(), images())
    qat(images())
    deployed = eagerq.convert(qat)
    cast = copy.deepcopy(deployed).to(dtype)
    for name, tensor in deployed.state_dict().items():
        found = cast.state_dict()[name]
        if not tensor.is_floating_point():
            assert torch.equal(found, tensor), name
    out = cast(images().to(dtype))
    assert out.dtype == dtype
    wanted = deployed(images())
    assert (out.float() - wanted).square().mean() <= 0.01 * wanted.square().mean()


def test_switched_off_quantizers_are_not_deployed() -> None:
    qat = qat_of(small(), images())
    qat(images())
    qat.apply(eagerq.disable_fake_quant)
    with pytest.raises(StateError, match="fake quantization disabled"):
        eagerq.convert(qat)


@pytest.mark.parametrize("buffers", [True, False])
def test_an_average_of_weights_deploys_as_it_evaluates(buffers: bool) -> None:
    """Its quantizers never observed: their buffers are another's."""
    qat = qat_of(small(), images())
    average = AveragedModel(qat, use_buffers=buffers)
    for _ in range(3):
        qat(images()).sum().backward()
        average.update_parameters(qat)
        if not buffers:
            for mine, theirs in zip(average.module.buffers(), qat.buffers(), strict=True):
                mine.copy_(theirs)
    deployed = eagerq.convert(average.module)
    assert torch.equal(deployed(images()), average.module.eval()(images()))
    assert deployed.state_dict().keys() == eagerq.convert(qat).state_dict().keys()


def test_a_model_whose_observers_agree_in_a_group_is_saved(tmp_path: Path) -> None:
    """A process group cannot be written to a file."""
    qat = qat_of(small(), images())
    qat.apply(functools.partial(eagerq.enable_observer_sync, process_group=threading.Lock()))
    torch.save(qat, tmp_path / "qat.pt")
    loaded = torch.load(tmp_path / "qat.pt", weights_only=False)
    observers = [m.ranks for m in loaded.modules() if isinstance(m, eagerq.quant.Observer)]
    assert any(ranks is not None and ranks.group is None for ranks in observers)


def test_a_report_knows_what_was_replaced_since() -> None:
    qat = qat_of(small(), images())
    name = next(n for n, m in qat.named_modules() if isinstance(m, nnqat.Linear))
    assert name not in dict(eagerq.report(qat).left_float)
    setattr(qat, name, nn.Linear(8 * 36, 3))
    assert "replaced since" in dict(eagerq.report(qat).left_float)[name]
    setattr(qat, name, nnqat.Linear(8 * 36, 3))
    assert name not in dict(eagerq.report(qat).left_float)
    delattr(qat, name)
    assert "no longer" in dict(eagerq.report(qat).left_float)[name]


def patches() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3).train()


@pytest.mark.parametrize("given", [True, False])
def test_a_net_of_timm_is_watched_at_the_size_it_is_made_for(given: bool) -> None:
    fused = eagerq.fuse_modules(patches(), example_inputs=torch.randn(2, 3, 32, 32) if given else None)
    qat = eagerq.convert_qat(fused)
    assert torch.isfinite(qat(torch.randn(2, 3, 32, 32))).all()


def test_what_a_net_was_fused_with_counts_more_than_what_its_library_says() -> None:
    x = torch.randn(3, 3, 40, 40)
    fused = eagerq.fuse_modules(timm.create_model("resnet18", num_classes=3), example_inputs=x)
    seen: list[torch.Size] = []
    fused.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    eagerq.convert_qat(fused)
    assert set(seen) == {x.shape}


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.LeakyReLU])
@pytest.mark.parametrize("trains", [True, False])
def test_transforms_of_torch_func_see_what_autograd_sees(trains: bool, act: type[nn.Module]) -> None:
    """In training as far as nothing is learned: PyTorch's transforms take no writes to buffers."""
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    qat = qat_of(nn.Sequential(nn.Linear(8, 8), act(), nn.Linear(8, 3)), x)
    qat(x)
    qat.apply(eagerq.disable_observer).train(trains)
    named = dict(qat.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(qat, parameters, (x,)).square().sum()

    wanted = torch.autograd.grad(qat(1.5 * x).square().sum(), [*named.values()])
    assert any(grad.any() for grad in wanted)
    torch.testing.assert_close([*torch.func.grad(loss)(named, 1.5 * x).values()], [*wanted])
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(named, 1.5 * x[:, None])
    torch.testing.assert_close([grad.sum(0) for grad in each.values()], [*wanted])
    torch.testing.assert_close(torch.func.vmap(qat)(x[:, None])[:, 0], qat(x))
    compiled = torch.compile(torch.func.grad(loss), backend="aot_eager")
    torch.testing.assert_close([*compiled(named, 1.5 * x).values()], [*wanted])


class Twice(nn.Module):
    """One module under two parents."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()
        self.head = nn.Sequential(nn.Linear(5, 5), nn.ReLU())
        self.again = nn.ModuleList([self.head])

    def forward(self, x: Tensor) -> Tensor:
        return self.again[0](self.head(self.net(x)))


@pytest.fixture
def dirty_memory() -> Iterator[None]:
    """Memory that nobody wrote is NaN, and the greatest of integers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("way", ["to_empty", "reset_parameters"])
@pytest.mark.parametrize("net", [small, Twice])
def test_memory_that_nobody_wrote_holds_no_ranges(net: Callable[[], nn.Module], way: str, dirty_memory: None) -> None:
    """Built on the meta device, given memory and a float checkpoint, quantizers are fresh: whatever the memory held."""
    source = net().train()
    with torch.device("meta"):
        qat = qat_of(net().train(), images())
    qat.to_empty(device="cpu")
    if way == "reset_parameters":
        for buffer in qat.buffers():
            buffer.fill_(77)
        for module in qat.modules():
            if callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()
    qat.load_state_dict(source.state_dict())
    fresh = qat_of(source, images())
    assert qat.state_dict().keys() == fresh.state_dict().keys()
    torch.testing.assert_close(dict(qat.named_buffers()), dict(fresh.named_buffers()), rtol=0.0, atol=0.0)
    assert torch.equal(qat.eval()(images()), fresh.eval()(images()))
    for model in (qat.train(), fresh.train()):
        model(images())
    torch.testing.assert_close(dict(qat.named_buffers()), dict(fresh.named_buffers()), rtol=0.0, atol=0.0)


def test_a_model_made_for_inference_goes_where_it_is() -> None:
    """PyTorch allows no write to tensors of its inference mode outside of it."""
    with torch.inference_mode():
        qat = qat_of(small(), images())
    state = {key: value.clone() for key, value in qat.state_dict().items()}
    torch.testing.assert_close(dict(qat.to("cpu").state_dict()), state, rtol=0.0, atol=0.0)


def test_what_was_put_into_a_model_without_memory_stays(dirty_memory: None) -> None:
    """A loader puts tensors in their places one by one, and gives the rest, in no checkpoint, memory."""
    trained = qat_of(small(), images())
    trained(images())
    with torch.device("meta"):
        qat = qat_of(small(), images())
    for key, value in trained.state_dict().items():
        owner, _, name = key.rpartition(".")
        module = qat.get_submodule(owner)
        for held in (module._parameters, module._buffers):
            if name in held:
                held[name] = nn.Parameter(value) if held is module._parameters else value.clone()  # type: ignore[assignment]
    qat._apply(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t)
    torch.testing.assert_close(dict(qat.named_buffers()), dict(trained.named_buffers()), rtol=0.0, atol=0.0)
    assert torch.equal(qat.eval()(images()), trained.eval()(images()))


@pytest.mark.parametrize("computes", [prune_half, torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
def test_a_weight_that_a_hook_computes_is_not_deployed(computes: Callable[[nn.Module], nn.Module]) -> None:
    qat = qat_of(small(), images())
    qat(images())
    name = next(n for n, m in qat.named_modules() if isinstance(m, nnqat.Linear))
    computes(qat.get_submodule(name))
    qat(images()).sum().backward()
    state = {key: value.clone() for key, value in qat.state_dict().items()}
    with pytest.raises(StateError, match=rf"{name} was to hold a weight.*prune\.remove"):
        eagerq.convert(qat, inplace=True)
    torch.testing.assert_close(dict(qat.state_dict()), state, rtol=0.0, atol=0.0)
    if computes is prune_half:
        prune.remove(qat.get_submodule(name), "weight")
        assert torch.equal(eagerq.convert(qat)(images()), qat.eval()(images()))


def test_what_asks_for_data_is_told_when_the_remembered_inputs_hold_none() -> None:
    fused = eagerq.fuse_modules(small(), example_inputs=images())
    means: list[float] = []
    fused[0].register_forward_hook(lambda module, args, out: means.append(out.mean().item()))
    with pytest.raises(InputsError, match=r"without data and raised.*Pass example_inputs with data"):
        eagerq.convert_qat(fused)
    assert torch.isfinite(eagerq.convert_qat(fused, example_inputs=images())(images())).all()


def test_a_way_taken_for_want_of_data_is_in_the_report() -> None:
    fused = eagerq.fuse_modules(small(), example_inputs=images())
    means: list[float] = []
    fused[0].register_forward_hook(lambda module, args, out: None if module.training else means.append(out.mean().item()))
    assert any("hold no data" in note for note in eagerq.report(eagerq.convert_qat(fused)).notes)
    assert not any("train mode" in note for note in eagerq.report(eagerq.convert_qat(fused, example_inputs=images())).notes)


def test_inputs_without_data_are_enough_for_what_asks_for_no_values() -> None:
    class Asking(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2.0 if x.is_cuda else 1.0)

    net = Asking(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    inputs = torch.empty(4, 3, 8, 8, device="meta")
    qat = eagerq.convert_qat(eagerq.fuse_modules(net, example_inputs=inputs), example_inputs=inputs)
    assert torch.isfinite(qat(images())).all()


def test_a_pruned_norm_is_called_by_its_name() -> None:
    qat = qat_of(small(), images())
    qat(images())
    prune.l1_unstructured(qat[0].bn, "weight", 0.5)
    with pytest.raises(StateError, match=r"0\.bn was to hold a weight"):
        eagerq.convert(qat)


def test_a_parametrized_part_of_a_fused_module_keeps_that_float() -> None:
    fused = eagerq.fuse_modules(small(), example_inputs=images())
    chain, linear = fused[0], fused[4]
    parametrizations.weight_norm(chain[0])
    qat = eagerq.convert_qat(fused, example_inputs=images())
    assert "parametrization" in dict(eagerq.report(qat).left_float)["0"]
    assert type(qat[0]) is type(chain) and type(linear) is nn.Linear and type(qat[4]) is nnqat.Linear
    assert torch.isfinite(qat(images())).all()


@dataclasses.dataclass
class Logits:
    logits: Tensor


class Wrapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Tensor) -> Logits:
        return Logits(self.net(x))


def test_an_export_that_fails_says_why(tmp_path: Path) -> None:
    qat = qat_of(Wrapping(), images())
    qat(images())
    with pytest.raises(ExportError, match=r"gives a Logits.*register_dataclass") as caught:
        eagerq.export_onnx(eagerq.convert(qat), tmp_path / "wrapping.onnx", images())
    assert "\x1b" not in str(caught.value) and "control flow" not in str(caught.value)


class Refusing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise ValueError("no export with opt=1; set opt=0") from KeyError("opt")
        return self.net(x)


def test_an_export_that_the_model_refuses_says_so_in_its_words(tmp_path: Path) -> None:
    qat = qat_of(Refusing(), images())
    qat(images())
    with pytest.raises(ExportError, match="set opt=0"):
        eagerq.export_onnx(eagerq.convert(qat), tmp_path / "refusing.onnx", images())
