"""Small nets written by hand, each with the chains that truly exist in it and those that must be refused, with the words.

A row's ``chains`` are lines such as ``"conv bn relu -> ConvBnReLU2d"``; a star marks a shared module
of which a copy is fused. Its ``skips`` map refused chains to words that the reason must hold.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy
import timm.layers
import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import eagerq
from eagerq.nn import Conv2dSame, FrozenBatchNorm2d
from eagerq.plan import FusionPlan

C = 4

gc.freeze()  # watching collects garbage where a net keeps tensors; what the imports made need not be looked through


def image(*shape: int) -> Tensor:
    """Random numbers, the same each time; ``(2, 4, 6, 6)`` unless a shape is given."""
    return torch.randn(*(shape or (2, C, 6, 6)), generator=torch.Generator().manual_seed(7))


def conv(cin: int = C, cout: int = C, k: int = 3, **kwargs: Any) -> nn.Conv2d:
    """A Conv2d that keeps the size."""
    return nn.Conv2d(cin, cout, k, padding=k // 2, **kwargs)


def bn() -> nn.BatchNorm2d:
    """A BatchNorm2d of the usual width."""
    return nn.BatchNorm2d(C)


class Made(nn.Module):
    """A module of given children, in registration order, and a forward function."""

    def __init__(self, run: Callable[..., Any], **children: Any) -> None:
        super().__init__()
        self.run = run
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Net:
    """A row: how to build a net, what it is run on, and the truth about its chains."""

    name: str
    build: Callable[[], nn.Module]
    chains: tuple[str, ...] = ()
    skips: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inputs: Callable[[], tuple[Any, ...]] = lambda: (image(),)
    on_meta: bool = True

    @property
    def truth(self) -> set[tuple[tuple[str, ...], str, frozenset[str]]]:
        """(names, fused class, copied names) of each chain."""
        found = set()
        for line in self.chains:
            left, fused = line.split(" -> ")
            names = tuple(n.rstrip("*") for n in left.split())
            found.add((names, fused, frozenset(n.rstrip("*") for n in left.split() if n.endswith("*"))))
        return found

    def model(self) -> nn.Module:
        """A fresh model with random norms, in train mode, the same each time."""
        torch.manual_seed(0)
        return randomise(self.build())


def found(plan: FusionPlan) -> set[tuple[tuple[str, ...], str, frozenset[str]]]:
    """A plan's matches, as ``Net.truth`` writes them."""
    return {(m.names, m.fused.__name__, m.copied) for m in plan.matches}


# --- running and comparing


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm gammas of both signs, zero and tiny, and statistics away from 0 and 1; biases and scales too."""
    draw = torch.Generator().manual_seed(seed)
    special = torch.tensor([0.0, 1e-3, -1e-5, -0.7])
    with torch.no_grad():
        for module in model.modules():
            mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
                continue
            n = mean.numel()
            mean.copy_(torch.randn(n, generator=draw) * 0.5)
            var.copy_(torch.rand(n, generator=draw) + 0.3)
            if isinstance(module.weight, Tensor):
                weight = torch.randn(n, generator=draw) * 0.3 + 0.9
                where = torch.randint(0, n, (min(len(special), n // 2),), generator=draw)
                weight[where] = special[: len(where)]
                module.weight.copy_(weight)
                module.bias.copy_(torch.randn(n, generator=draw) * 0.3)
        for name, parameter in model.named_parameters():
            if name.rsplit(".", 1)[-1] in {"gamma", "gamma_1", "gamma_2", "layer_scale"}:  # LayerScale starts at 1e-6
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3 + 0.5)
    return model


def tensors(obj: Any) -> Iterator[Tensor]:
    """The tensors in an output of any form, in order."""
    if isinstance(obj, Tensor):
        yield obj
    elif isinstance(obj, Mapping):
        for key in obj:
            yield from tensors(obj[key])
    elif isinstance(obj, (list, tuple)):
        for item in obj:
            yield from tensors(item)
    elif dataclasses.is_dataclass(obj):
        yield from tensors(vars(obj))


def cloned(inputs: Any) -> Any:
    """The inputs, copied; floating tensors among them take a gradient."""
    inputs = copy.deepcopy(inputs)
    for x in tensors(inputs):
        if x.is_floating_point():
            x.requires_grad_()
    return inputs


def call(model: nn.Module, inputs: Any) -> Any:
    """The model on a tuple of positional arguments or a dict of keyword arguments, from one random state."""
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


@dataclasses.dataclass
class Step:
    """What one forward and backward gave: outputs, gradients by the float model's parameter names, state by its keys."""

    outputs: list[Tensor]
    input_grads: list[Tensor | None]
    grads: dict[str, Tensor | None]
    state: dict[str, Tensor]


def step(model: nn.Module, parameters: Mapping[str, nn.Parameter], inputs: Any, mode: bool) -> Step:
    """Run forward and backward in train or eval mode; frozen norms stay as they are.

    Args:
        model: as it is now.
        parameters: those of the float model it was, by name; they are the same objects.
        inputs: copied first.
        mode: whether to train.
    """
    flags = [(m, m.training) for m in model.modules()]
    for parameter in parameters.values():
        parameter.grad = None
    inputs = cloned(inputs)
    try:
        if mode != model.training:
            model.train(mode)
        raw = call(model, inputs)
        outputs = list(tensors(raw))
        weights = torch.Generator().manual_seed(3)
        loss = sum((t * torch.randn(t.shape, generator=weights, dtype=t.dtype)).sum() for t in outputs if t.requires_grad)
        if isinstance(loss, Tensor):
            loss.backward()
    finally:
        for module, training in flags:
            module.training = training
    return Step(
        [t.detach().clone() for t in outputs],
        [x.grad for x in tensors(inputs)],
        {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()},
        {key: value.clone() for key, value in eagerq.float_state_dict(model).items()},
    )


def differences(a: Step, b: Step, tolerance: float = 0.0) -> list[str]:
    """What differs between two steps: by a single bit, or beyond ``tolerance`` times the largest magnitude."""
    pairs: list[tuple[str, Tensor | None, Tensor | None]] = []
    if len(a.outputs) != len(b.outputs):
        return [f"{len(a.outputs)} and {len(b.outputs)} outputs"]
    pairs += [(f"output {i}", x, y) for i, (x, y) in enumerate(zip(a.outputs, b.outputs, strict=True))]
    pairs += [(f"gradient of input {i}", x, y) for i, (x, y) in enumerate(zip(a.input_grads, b.input_grads, strict=True))]
    for what, one, other in (("gradient of", a.grads, b.grads), ("state", a.state, b.state)):
        if one.keys() != other.keys():
            return [f"{what}: keys {sorted(one.keys() ^ other.keys())}"]
        pairs += [(f"{what} {key}", one[key], other[key]) for key in one]
    return [name for name, x, y in pairs if not same(x, y, tolerance)]


def same(x: Tensor | None, y: Tensor | None, tolerance: float = 0.0) -> bool:
    """Whether two tensors (or their absences) agree."""
    if x is None or y is None:
        return x is y
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    if not tolerance or not x.is_floating_point():
        return torch.equal(x, y)
    if not x.numel():
        return True
    scale = max(1.0, x.abs().max().item())
    return bool(((x - y).abs().max() <= tolerance * scale).item())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that planning must leave alone; equal snapshots mean nothing changed."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "modules": [(name, id(m), type(m), m.training) for name, m in model.named_modules(remove_duplicate=False)],
        "attributes": [(name, sorted(map(str, vars(m)))) for name, m in model.named_modules()],
        "hooks": [(name, h, list(getattr(m, h))) for name, m in model.named_modules() for h in hooks],
        "tensors": [
            (name, id(t), t._version, t.requires_grad, t.dtype, str(t.device), t.detach().numpy().tobytes())
            for name, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        ],
        "grads": [(name, p.grad is None) for name, p in model.named_parameters()],
    }


# --- the nets


@dataclasses.dataclass
class Result:
    """An output type of a model's own."""

    logits: Tensor
    extra: dict[str, list[Tensor]]


class ConvOfOwn(nn.Conv2d):
    """A Conv2d with code of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 2)


class NormOfOwn(nn.BatchNorm2d):
    """A BatchNorm2d with code of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class ReLUOfOwn(nn.ReLU):
    """A ReLU with code of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input - 1)


class Backwards(nn.Sequential):
    """An nn.Sequential whose forward is not the chain."""

    def forward(self, x: Tensor) -> Tensor:
        return self[0](self[2](self[1](x)))


class Plain(nn.Sequential):
    """An nn.Sequential subclass without a forward of its own."""


class Basic(nn.Module):
    """timm's BasicBlock: act2 is registered behind bn2 and runs behind the residual add."""

    def __init__(self, down: bool = False) -> None:
        super().__init__()
        self.conv1 = conv(bias=False)
        self.bn1 = bn()
        self.drop_block = nn.Identity()
        self.act1 = nn.ReLU(inplace=True)
        self.aa = nn.Identity()
        self.conv2 = conv(bias=False)
        self.bn2 = bn()
        self.act2 = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(conv(k=1, bias=False), bn()) if down else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.act1(self.drop_block(self.bn1(self.conv1(x))))
        x = self.bn2(self.conv2(self.aa(x)))
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act2(x)


class Visions(nn.Module):
    """torchvision's BasicBlock: one ReLU for both places."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv1 = conv(bias=False)
        self.bn1 = bn()
        self.relu = act
        self.conv2 = conv(bias=False)
        self.bn2 = bn()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class TwoLists(nn.Module):
    """Convs and norms in two ModuleLists (res2net), the activation held by the parent (repvit)."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv(1, 1) for _ in range(C - 1))
        self.bns = nn.ModuleList(nn.BatchNorm2d(1) for _ in range(C - 1))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(torch.split(x, 1, 1))
        out: list[Tensor] = []
        for i, (c, b) in enumerate(zip(self.convs, self.bns, strict=True)):
            part = parts[i] if not out else out[-1] + parts[i]
            out.append(self.relu(b(c(part))))
        return torch.cat([*out, parts[-1]], 1)


class Spread(nn.Module):
    """A conv in one child, its norm in another, the activation in the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU(inplace=True)
        self.norms = nn.ModuleDict({"a": bn()})
        self.inner = nn.Sequential(nn.Sequential(conv(groups=2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norms["a"](self.inner(x)))


class PythonList(nn.Module):
    """Calls its convs through plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()
        self.later, self.relu = conv(), nn.ReLU()
        self.order = {"first": (None, [self.conv])}

    def forward(self, x: Tensor) -> Tensor:
        for member in self.order["first"][1]:
            x = member(x)
        return self.relu(self.later(self.bn(x)))


class BoundMethod(nn.Module):
    """Calls its norm through a method kept from before."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()
        self.normalise = self.bn.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(self.conv(x))


class BoundCall(nn.Module):
    """Calls its norm, hooks and all, through a method kept from before."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()
        self.later, self.relu = conv(), nn.ReLU()
        self.normalise = self.bn.__call__

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.later(self.normalise(self.conv(x))))


class BoundConv(BoundCall):
    """Calls its conv so."""

    def __init__(self) -> None:
        super().__init__()
        self.convolve = self.conv.__call__

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.later(self.bn(self.convolve(x))))


class ReadsNorm(nn.Module):
    """Reads the norm's weight from outside, as an L1 penalty on gammas does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = conv(), bn(), nn.ReLU()
        self.conv2, self.bn2 = conv(), bn()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        return self.bn2(self.conv2(x)) * self.bn.weight.abs().sum()


class ReadsConv(nn.Module):
    """Reads facts and the weight of the conv from outside, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = conv(), bn(), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x.to(self.conv.weight.dtype)))
        return self.head(x / self.conv.out_channels * self.conv.weight.mean() * self.conv.stride[0])


@torch.jit.script
def hidden_mean(x: Tensor) -> Tensor:
    return x.mean()


class Doubled(torch.autograd.Function):
    """A function of the user's own, whose reading no torch function shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def _with(model: nn.Module, change: Callable[[Any], object]) -> nn.Module:
    change(model)
    return model


def _straight(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.bn(m.conv(x)))


def straight(**children: nn.Module) -> nn.Module:
    """conv, bn, relu; some replaced."""
    return Made(_straight, **{"conv": conv(), "bn": bn(), "relu": nn.ReLU(), **children})


def _shared(**children: nn.Module) -> nn.Module:
    model = straight(**children)
    model.alias = next(iter(children.values())) if children else model.conv
    return model


def _tied() -> nn.Module:
    model = Made(
        lambda m, x: m.bn2(m.conv2(m.relu(m.bn(m.conv(x))))), conv=conv(), bn=bn(), relu=nn.ReLU(), conv2=conv(), bn2=bn()
    )
    model.conv2.weight = model.conv.weight
    model.bn2.bias = model.bn.bias
    return model


def _stored(m: Any, x: Tensor) -> Tensor:
    m.seen = m.conv(x)
    return m.bn(m.seen)


def _penalty(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    m.penalty = float(y.detach().sum().item())
    return m.bn(y)


def _branchy(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.relu(m.bn(y)) if m.training else m.bn(m.relu(y))


def _aux(m: Any, x: Tensor) -> Any:
    y = m.relu(m.bn(m.conv(x)))
    return (y, m.aux_bn(m.aux(y))) if m.training else y


def _values(m: Any, x: Tensor) -> Tensor:
    y = m.relu(m.bn(m.conv(x)))
    return m.bn2(m.conv2(y)) if y.sum() > -1e30 else y


def _random(m: Any, x: Tensor) -> Tensor:
    x = x + torch.rand(1) + random.random() + float(numpy.random.rand())
    return m.drop(m.relu(m.bn(m.conv(x))))


def _generator(m: Any, x: Tensor) -> Iterator[Tensor]:
    y = m.conv(x)
    yield m.bn(y)
    yield m.relu(m.conv2(y))


def _unassigned(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    m.relu(y)  # in place: its result is y
    return y


def _appended(m: Any, x: Tensor) -> Tensor:
    features: list[Tensor] = []
    features.append(m.conv(x))
    features.append(m.bn(features[-1]))
    return torch.cat(features[1:])


def _attended(m: Any, x: Tensor) -> Tensor:
    y, _ = m.attention(x, x, x)
    return m.fc2(m.act(m.fc1(x + y)))


NETS: tuple[Net, ...] = (
    # what there is to find
    Net("straight", straight, ("conv bn relu -> ConvBnReLU2d",)),
    Net(
        "registered_backwards",
        lambda: Made(_straight, relu=nn.ReLU(), bn=bn(), conv=conv()),
        ("conv bn relu -> ConvBnReLU2d",),
    ),
    Net("inplace_relu", lambda: straight(relu=nn.ReLU(inplace=True)), ("conv bn relu -> ConvBnReLU2d",)),
    Net(
        "inplace_result_unused",
        lambda: Made(_unassigned, conv=conv(), bn=bn(), relu=nn.ReLU(inplace=True)),
        ("conv bn relu -> ConvBnReLU2d",),
    ),
    Net(
        "inplace_read_under_its_old_name",
        lambda: Made(
            lambda m, x: (y := m.bn(m.conv(x))) is not None and m.relu(y) + y, conv=conv(), bn=bn(), relu=nn.ReLU(inplace=True)
        ),
        ("conv bn relu -> ConvBnReLU2d",),
    ),
    Net("other_act", lambda: straight(relu=nn.Hardswish(inplace=True)), ("conv bn relu -> ConvBnAct2d",)),
    Net("prelu", lambda: straight(relu=nn.PReLU(C)), ("conv bn relu -> ConvBnAct2d",)),
    Net("conv_act", lambda: Made(lambda m, x: m.act(m.conv(x)), conv=conv(), act=nn.ReLU6()), ("conv act -> ConvAct2d",)),
    Net("conv_relu", lambda: Made(lambda m, x: m.act(m.conv(x)), conv=conv(), act=nn.ReLU()), ("conv act -> ConvReLU2d",)),
    Net(
        "linear",
        lambda: Made(
            lambda m, x: m.fc3(m.act(m.fc2(m.relu(m.norm(m.fc1(x)))))),
            fc1=nn.Linear(5, 6),
            norm=nn.BatchNorm1d(6),
            relu=nn.ReLU(),
            fc2=nn.Linear(6, 6, bias=False),
            act=nn.GELU(),
            fc3=nn.Linear(6, 2),
        ),
        ("fc1 norm relu -> LinearBnReLU1d", "fc2 act -> LinearAct"),
        inputs=lambda: (image(8, 5),),
    ),
    Net(
        "transposed_grouped",
        lambda: straight(conv=nn.ConvTranspose2d(C, 2 * C, 3, stride=2, groups=2), bn=nn.BatchNorm2d(2 * C), relu=nn.SiLU()),
        ("conv bn relu -> ConvTransposeBnAct2d",),
    ),
    Net(
        "transposed_output_size",
        lambda: Made(
            lambda m, x: m.relu(m.bn(m.conv(x, output_size=[12, 12]))),
            conv=nn.ConvTranspose2d(C, C, 3, stride=2, padding=1),
            bn=bn(),
            relu=nn.ReLU(),
        ),
        ("conv bn relu -> ConvTransposeBnReLU2d",),
    ),
    Net(
        "one_axis",
        lambda: straight(conv=nn.Conv1d(C, C, 3), bn=nn.BatchNorm1d(C)),
        ("conv bn relu -> ConvBnReLU1d",),
        inputs=lambda: (image(2, C, 8),),
    ),
    Net(
        "three_axes",
        lambda: straight(conv=nn.Conv3d(C, C, 2), bn=nn.BatchNorm3d(C)),
        ("conv bn relu -> ConvBnReLU3d",),
        inputs=lambda: (image(2, C, 4, 4, 4),),
    ),
    Net(
        "sequential",
        lambda: nn.Sequential(conv(), bn(), nn.ReLU(), conv(), nn.LeakyReLU(), bn(), conv()),
        ("0 1 2 -> ConvBnReLU2d", "3 4 -> ConvAct2d"),
    ),
    Net("sequential_of_own", lambda: Plain(conv(), bn(), nn.ReLU()), ("0 1 2 -> ConvBnReLU2d",)),
    Net("two_lists", TwoLists, tuple(f"convs.{i} bns.{i} relu* -> ConvBnReLU2d" for i in range(3))),
    Net("spread", Spread, ("inner.0.0 norms.a act -> ConvBnAct2d",)),
    Net(
        "nested",
        lambda: nn.Sequential(nn.Sequential(conv(), bn()), nn.Sequential(nn.Identity(), nn.ReLU())),
        ("0.0 0.1 1.1 -> ConvBnReLU2d",),
    ),
    Net(
        "residual",
        lambda: nn.Sequential(Basic(), Basic(down=True)),
        (
            "0.conv1 0.bn1 0.act1 -> ConvBnReLU2d",
            "0.conv2 0.bn2 -> ConvBn2d",
            "1.conv1 1.bn1 1.act1 -> ConvBnReLU2d",
            "1.conv2 1.bn2 -> ConvBn2d",
            "1.downsample.0 1.downsample.1 -> ConvBn2d",
        ),
        {"0.conv2 0.bn2 0.act2": "add", "1.conv2 1.bn2 1.act2": "add"},
    ),
    Net("shared_relu", lambda: Visions(nn.ReLU(inplace=True)), ("conv1 bn1 relu* -> ConvBnReLU2d", "conv2 bn2 -> ConvBn2d")),
    Net("shared_relu6", lambda: Visions(nn.ReLU6()), ("conv1 bn1 relu* -> ConvBnAct2d", "conv2 bn2 -> ConvBn2d")),
    Net(
        "relu_under_two_names",
        lambda: (lambda act: nn.Sequential(conv(), bn(), act, conv(), bn(), act))(nn.ReLU()),
        ("0 1 2* -> ConvBnReLU2d", "3 4 2* -> ConvBnReLU2d"),
    ),
    Net(
        "preactivation",
        lambda: Made(lambda m, x: x + m.conv(m.relu(m.bn(x))), bn=bn(), relu=nn.ReLU(), conv=conv()),
        ("bn relu -> BNReLU2d",),
    ),
    Net(
        "identity_between",
        lambda: Made(lambda m, x: m.relu(m.gap(m.bn(m.gap(m.conv(x))))), conv=conv(), gap=nn.Identity(), bn=bn(), relu=nn.ReLU()),
        ("conv bn relu -> ConvBnReLU2d",),
    ),
    Net("functional_relu", lambda: Made(lambda m, x: F.relu(m.bn(m.conv(x))), conv=conv(), bn=bn()), ("conv bn -> ConvBn2d",)),
    Net("method_relu", lambda: Made(lambda m, x: m.bn(m.conv(x)).relu_(), conv=conv(), bn=bn()), ("conv bn -> ConvBn2d",)),
    Net(
        "swiglu",
        lambda: Made(
            lambda m, x: m.fc2(m.act(m.gate(x)) * m.fc1(x)),
            gate=nn.Linear(5, 6),
            fc1=nn.Linear(5, 6),
            act=nn.SiLU(),
            fc2=nn.Linear(6, 5),
        ),
        ("gate act -> LinearAct",),
        {"fc1 act": "mul"},
        inputs=lambda: (image(3, 2, 5),),
    ),
    Net("tied", _tied, ("conv bn relu -> ConvBnReLU2d", "conv2 bn2 -> ConvBn2d")),
    Net("frozen_norm", lambda: _with(straight(), lambda m: m.bn.eval()), ("conv bn relu -> ConvBnReLU2d",)),
    Net(
        "frozen_first",
        lambda: _with(Made(lambda m, x: m.relu(m.bn(x)), bn=bn(), relu=nn.ReLU()), lambda m: m.bn.eval()),
        ("bn relu -> BNReLU2d",),
    ),
    Net("frozen_module", lambda: straight(bn=FrozenBatchNorm2d(C)), ("conv bn relu -> ConvBnReLU2d",)),
    Net("torchvision_frozen", lambda: straight(bn=torchvision.ops.FrozenBatchNorm2d(C)), ("conv bn relu -> ConvBnReLU2d",)),
    Net("torchvision_block", lambda: torchvision.ops.Conv2dNormActivation(C, C, 3), ("0 1 2 -> ConvBnReLU2d",)),
    Net("sync_norm", lambda: straight(bn=nn.SyncBatchNorm(C)), ("conv bn relu -> ConvBnReLU2d",)),
    Net(
        "norm_without_affine",
        lambda: straight(bn=nn.BatchNorm2d(C, affine=False, momentum=None)),
        ("conv bn relu -> ConvBnReLU2d",),
    ),
    Net(
        "timm_norm_act",
        lambda: Made(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=timm.layers.BatchNormAct2d(C)),
        ("conv bn -> ConvBnReLU2d",),
    ),
    Net(
        "timm_norm_silu",
        lambda: Made(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=timm.layers.BatchNormAct2d(C, act_layer="silu")),
        ("conv bn -> ConvBnAct2d",),
    ),
    Net(
        "timm_norm_alone",
        lambda: Made(
            lambda m, x: m.relu(m.bn(m.conv(x))), conv=conv(), bn=timm.layers.BatchNormAct2d(C, apply_act=False), relu=nn.ReLU()
        ),
        ("conv bn relu -> ConvBnReLU2d",),
    ),
    Net(
        "timm_norm_drop",
        lambda: Made(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=timm.layers.BatchNormAct2d(C, drop_layer=nn.Dropout)),
        ("conv bn -> ConvBn2d",),
    ),
    Net(
        "timm_norm_drop_then_relu",
        lambda: straight(bn=timm.layers.BatchNormAct2d(C, act_layer="silu", drop_layer=nn.Dropout)),
        ("conv bn -> ConvBn2d",),
    ),
    Net(
        "timm_norm_drop_first",
        lambda: Made(
            lambda m, x: m.relu(m.bn(x)),
            bn=timm.layers.BatchNormAct2d(C, act_layer="silu", drop_layer=nn.Dropout),
            relu=nn.ReLU(),
        ),
        (),
        {"bn relu": "more after its norm"},
    ),
    Net(
        "timm_frozen",
        lambda: Made(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=timm.layers.FrozenBatchNormAct2d(C)),
        ("conv bn -> ConvBnReLU2d",),
    ),
    Net("timm_same", lambda: straight(conv=timm.layers.Conv2dSame(C, C, 3, stride=2)), ("conv bn relu -> ConvBnReLU2d",)),
    Net("same", lambda: straight(conv=Conv2dSame(C, C, 3, stride=2)), ("conv bn relu -> ConvBnReLU2d",)),
    Net(
        "timm_linear",
        lambda: Made(lambda m, x: m.act(m.fc(x)), fc=timm.layers.Linear(6, 3), act=nn.ReLU()),
        ("fc act -> LinearReLU",),
    ),
    Net("reads_conv", ReadsConv, ("conv bn -> ConvBn2d",)),
    Net(
        "data_dependent",
        lambda: Made(_values, conv=conv(), bn=bn(), relu=nn.ReLU(), conv2=conv(), bn2=bn()),
        ("conv bn relu -> ConvBnReLU2d", "conv2 bn2 -> ConvBn2d"),
        on_meta=False,
    ),
    Net(
        "random",
        lambda: Made(_random, conv=conv(), bn=bn(), relu=nn.ReLU(), drop=nn.Dropout()),
        ("conv bn relu -> ConvBnReLU2d",),
        on_meta=False,
    ),
    Net(
        "aux_head",
        lambda: Made(_aux, conv=conv(), bn=bn(), relu=nn.ReLU(), aux=conv(), aux_bn=bn()),
        ("conv bn relu -> ConvBnReLU2d", "aux aux_bn -> ConvBn2d"),
    ),
    Net(
        "checkpointed",
        lambda: Made(
            lambda m, x: m.relu(checkpoint(lambda y: m.bn(m.conv(y)), x, use_reentrant=False)),
            conv=conv(),
            bn=bn(),
            relu=nn.ReLU(),
        ),
        ("conv bn relu -> ConvBnReLU2d",),
    ),
    Net(
        "checkpointed_act_rewritten",
        lambda: Made(
            lambda m, x: m.last(checkpoint(m.relu, m.conv(x), use_reentrant=False)),
            conv=conv(),
            relu=nn.ReLU(),
            last=nn.ReLU6(inplace=True),
        ),
        (),
        {"conv relu": "checkpoints"},
    ),
    Net(
        "checkpointed_act",
        lambda: Made(
            lambda m, x: m.last(checkpoint(m.relu, m.conv(x), use_reentrant=False)),
            conv=conv(),
            relu=nn.ReLU(),
            last=nn.ReLU6(),
        ),
        ("conv relu -> ConvReLU2d",),
    ),
    Net(
        "autocast",
        lambda: Made(lambda m, x: _autocast(m, x), conv=conv(), bn=bn(), relu=nn.ReLU()),
        ("conv bn relu -> ConvBnReLU2d",),
        on_meta=False,  # where nothing is cast
    ),
    Net(
        "views_around",
        lambda: Made(
            lambda m, x: m.relu(m.bn(m.conv(x.flip(2).transpose(2, 3))))[:, ::2].flatten(1), conv=conv(), bn=bn(), relu=nn.ReLU()
        ),
        ("conv bn relu -> ConvBnReLU2d",),
    ),
    Net(
        "attention",
        lambda: Made(
            _attended,
            attention=nn.MultiheadAttention(4, 2, batch_first=True),
            fc1=nn.Linear(4, 6),
            act=nn.GELU(),
            fc2=nn.Linear(6, 4),
        ),
        ("fc1 act -> LinearAct",),
        {"attention.out_proj": "NonDynamicallyQuantizableLinear"},
        inputs=lambda: (image(2, 3, 4),),
    ),
    # another reader
    Net("read_by_function", lambda: Made(lambda m, x: m.bn(y := m.conv(x)) + y, conv=conv(), bn=bn()), (), {"conv bn": "add"}),
    Net(
        "read_by_modules",
        lambda: Made(lambda m, x: m.bn(y := m.conv(x)) + m.bn2(y), conv=conv(), bn=bn(), bn2=bn()),
        (),
        {"conv bn": "2 readers"},
    ),
    Net(
        "read_by_view",
        lambda: Made(lambda m, x: m.bn(y := m.conv(x)).flatten(1) + y.flatten(1), conv=conv(), bn=bn()),
        (),
        {"conv bn": "flatten"},
    ),
    Net(
        "read_by_script",
        lambda: Made(lambda m, x: m.bn(y := m.conv(x)) + hidden_mean(y), conv=conv(), bn=bn()),
        (),
        {"conv bn": "readers"},
    ),
    Net(
        "read_by_autograd_function",
        lambda: Made(lambda m, x: m.bn(y := m.conv(x)) + Doubled.apply(y), conv=conv(), bn=bn()),
        (),
        {"conv bn": "readers"},
    ),
    Net(
        "read_by_operator",
        lambda: Made(lambda m, x: m.bn(y := m.conv(x)) + torch.ops.aten.relu(y), conv=conv(), bn=bn()),
        (),
        {"conv bn": "readers"},
    ),
    Net("read_as_number", lambda: Made(_penalty, conv=conv(), bn=bn()), (), {"conv bn": "readers"}, on_meta=False),
    Net(
        "read_as_list",
        lambda: Made(lambda m, x: m.bn(y := m.conv(x)) + sum(y.detach().flatten().tolist()), conv=conv(), bn=bn()),
        (),
        {"conv bn": "readers"},
        on_meta=False,
    ),
    Net(
        "changed_in_place_later",
        lambda: Made(lambda m, x: m.relu(y := m.conv(x)) * y.add_(1), conv=conv(), relu=nn.ReLU()),
        (),
        {"conv relu": "readers"},
    ),
    Net(
        "output_in_tuple",
        lambda: Made(lambda m, x: (y := m.conv(x), m.bn(y)), conv=conv(), bn=bn()),
        (),
        {"conv bn": "output of the model"},
    ),
    Net(
        "output_in_dict",
        lambda: Made(lambda m, x: {"a": [{"b": (y := m.conv(x))}], "c": m.bn(y)}, conv=conv(), bn=bn()),
        (),
        {"conv bn": "output of the model"},
    ),
    Net(
        "output_in_dataclass",
        lambda: Made(lambda m, x: Result(m.bn(y := m.conv(x)), {"z": [y]}), conv=conv(), bn=bn()),
        (),
        {"conv bn": "output of the model"},
    ),
    Net("kept_on_self", lambda: Made(_stored, conv=conv(), bn=bn()), (), {"conv bn": "kept beyond the forward"}),
    Net(
        "generator",
        lambda: Made(lambda m, x: list(_generator(m, x)), conv=conv(), bn=bn(), conv2=conv(), relu=nn.ReLU()),
        ("conv2 relu -> ConvReLU2d",),
        {"conv bn": "readers"},
    ),
    Net("listed_inside", lambda: Made(_appended, conv=conv(), bn=bn()), ("conv bn -> ConvBn2d",)),
    # how often, under how many names
    Net("runs_twice", lambda: Made(lambda m, x: m.bn(m.conv(m.conv(x))), conv=conv(), bn=bn()), (), {"conv bn": "2 times"}),
    Net("norm_runs_twice", lambda: Made(lambda m, x: m.bn(m.bn(m.conv(x))), conv=conv(), bn=bn()), (), {"conv bn": "2 times"}),
    Net("never_runs", lambda: Made(lambda m, x: m.other(x), conv=conv(), bn=bn(), other=conv()), (), {"conv bn": "did not run"}),
    Net("conv_under_two_names", _shared, ("bn relu -> BNReLU2d",), {"conv bn": "shared under several names: conv, alias"}),
    Net(
        "norm_under_two_names",
        lambda: _shared(bn=bn()),
        (),
        {"conv bn": "shared under several names: bn, alias", "bn relu": "shared under several names: bn, alias"},
    ),
    Net(
        "act_under_two_names",
        lambda: _shared(relu=nn.SiLU()),
        ("conv bn -> ConvBn2d",),
        {"conv bn relu": "shared under several names: relu, alias"},
    ),
    Net(
        "shared_silu",
        lambda: Visions(nn.SiLU()),
        ("conv1 bn1 -> ConvBn2d", "conv2 bn2 -> ConvBn2d"),
        {"conv1 bn1 relu": "2 times"},
    ),
    Net(
        "shared_prelu",
        lambda: Visions(nn.PReLU()),
        ("conv1 bn1 -> ConvBn2d", "conv2 bn2 -> ConvBn2d"),
        {"conv1 bn1 relu": "2 times"},
    ),
    # types not exactly known
    Net("conv_of_own", lambda: straight(conv=ConvOfOwn(C, C, 1)), ("bn relu -> BNReLU2d",), {"conv": "ConvOfOwn"}),
    Net("norm_of_own", lambda: straight(bn=NormOfOwn(C)), (), {"bn": "NormOfOwn"}),
    Net("act_of_own", lambda: straight(relu=ReLUOfOwn()), ("conv bn -> ConvBn2d",)),
    Net("std_conv", lambda: straight(conv=timm.layers.StdConv2d(C, C, 3)), ("bn relu -> BNReLU2d",), {"conv": "StdConv2d"}),
    Net("sequential_backwards", lambda: Backwards(bn(), conv(), nn.ReLU()), ("1 2 -> ConvReLU2d",)),
    # what fusion would lose
    Net(
        "hook_inside",
        lambda: _with(straight(), lambda m: m.bn.register_forward_hook(lambda *a: None)),
        ("conv bn -> ConvBn2d",),
        {"conv bn relu": "bn carries hooks"},
    ),
    Net(
        "hook_behind_first",
        lambda: _with(straight(), lambda m: m.conv.register_forward_hook(lambda *a: None)),
        ("bn relu -> BNReLU2d",),
        {"conv bn": "conv carries hooks"},
    ),
    Net(
        "hook_before_second",
        lambda: _with(straight(), lambda m: m.bn.register_forward_pre_hook(lambda *a: None)),
        ("bn relu -> BNReLU2d",),
        {"conv bn": "bn carries hooks"},
    ),
    Net(
        "backward_hook_inside",
        lambda: _with(straight(), lambda m: m.bn.register_full_backward_hook(lambda *a: None)),
        ("conv bn -> ConvBn2d",),
        {"conv bn relu": "bn carries hooks"},
    ),
    Net(
        "backward_hook_at_the_end",
        lambda: _with(
            Made(lambda m, x: m.act(m.fc(x)), fc=nn.Linear(6, 6), act=nn.ReLU()),
            lambda m: m.act.register_full_backward_hook(lambda *a: None),
        ),
        ("fc act -> LinearReLU",),
    ),
    Net(
        "hook_on_shared_relu",
        lambda: _with(Visions(nn.ReLU()), lambda m: m.relu.register_forward_hook(lambda *a: None)),
        ("conv1 bn1 -> ConvBn2d", "conv2 bn2 -> ConvBn2d"),
        {"conv1 bn1 relu": "relu carries hooks"},
    ),
    Net(
        "hooks_at_the_ends",
        lambda: _with(
            straight(),
            lambda m: (m.conv.register_forward_pre_hook(lambda *a: None), m.relu.register_forward_hook(lambda *a: None)),
        ),
        ("conv bn relu -> ConvBnReLU2d",),
    ),
    Net(
        "weight_norm",
        lambda: straight(conv=parametrizations.weight_norm(conv())),
        ("bn relu -> BNReLU2d",),
        {"conv": "parametrization"},
    ),
    Net(
        "spectral_norm",
        lambda: straight(conv=parametrizations.spectral_norm(conv())),
        ("bn relu -> BNReLU2d",),
        {"conv": "parametrization"},
    ),
    Net(
        "old_weight_norm",
        lambda: straight(conv=_old(nn.utils.weight_norm)),
        ("bn relu -> BNReLU2d",),
        {"conv bn": "weight_norm, spectral_norm"},
    ),
    Net(
        "old_spectral_norm",
        lambda: straight(conv=_old(nn.utils.spectral_norm)),
        ("bn relu -> BNReLU2d",),
        {"conv bn": "weight_norm, spectral_norm"},
    ),
    # channels
    Net(
        "no_statistics",
        lambda: straight(bn=nn.BatchNorm2d(C, track_running_stats=False)),
        ("bn relu -> BNReLU2d",),
        {"conv bn": "running statistics"},
    ),
    Net(
        "linear_bn_of_sequence",
        lambda: Made(lambda m, x: m.bn(m.fc(x)), fc=nn.Linear(5, 6), bn=nn.BatchNorm1d(3)),
        (),
        {"fc bn": "gives 6 channels and bn normalises 3"},
        inputs=lambda: (image(2, 3, 5),),
    ),
    Net(
        "linear_bn_of_square_sequence",
        lambda: Made(lambda m, x: m.bn(m.fc(x)), fc=nn.Linear(5, 3), bn=nn.BatchNorm1d(3)),
        (),
        {"fc bn": "3 axes"},
        inputs=lambda: (image(2, 3, 5),),
    ),
    Net(
        "conv_without_batch",
        lambda: Made(lambda m, x: m.bn(m.conv(x)), conv=nn.Conv1d(C, C, 3), bn=nn.BatchNorm1d(4)),
        (),
        {"conv bn": "2 axes"},
        inputs=lambda: (image(C, 6),),
    ),
    # registration order is not dataflow
    Net(
        "act_after_add",
        lambda: Made(lambda m, x: m.relu(m.bn(m.conv(x)) + x), conv=conv(), bn=bn(), relu=nn.ReLU()),
        ("conv bn -> ConvBn2d",),
        {"conv bn relu": "add"},
    ),
    Net(
        "repvgg",
        lambda: Made(lambda m, x: m.bn(m.conv(x) + m.conv1(x) + x), conv=conv(), conv1=conv(k=1), bn=bn()),
        (),
        {"conv1 bn": "add"},
    ),
    Net("norm_first", lambda: Made(lambda m, x: m.conv(m.bn(x)), conv=conv(), bn=bn()), (), {"conv bn": "output of the model"}),
    Net(
        "train_eval_wiring",
        lambda: Made(_branchy, conv=conv(), bn=bn(), relu=nn.ReLU()),
        (),
        {"conv bn": "in one run and to", "bn relu": "output of the model"},
    ),
    Net("dropout_between", lambda: Made(lambda m, x: m.bn(m.drop(m.conv(x))), conv=conv(), drop=nn.Dropout(), bn=bn()), (), {}),
    # what only the trial shows
    Net("reads_norm", ReadsNorm, ("conv2 bn2 -> ConvBn2d",), {"conv bn relu": "'Identity' object has no attribute 'weight'"}),
    Net("python_list", PythonList, ("conv bn -> ConvBn2d", "later relu -> ConvReLU2d")),
    Net("bound_conv", BoundConv, ("later relu -> ConvReLU2d",), {"conv bn": "conv ran 1 times and runs 0 times once fused"}),
    Net("bound_method", BoundMethod, (), {"conv bn": "read by function batch_norm"}),
    Net("bound_call", BoundCall, ("later relu -> ConvReLU2d",), {"conv bn": "does not arrive where bn was"}),
)


def _old(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return norm(conv())


def _autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return _straight(m, x)


BY_NAME = {net.name: net for net in NETS}
