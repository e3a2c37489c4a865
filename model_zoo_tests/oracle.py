"""Which links truly exist, found by other mechanisms than eagerq's: operators as PyTorch dispatches them, and torch.fx.

In tests only; nothing here imports eagerq. A link is a pair of modules (op -> norm, op -> activation or norm ->
activation): whatever the first gave is read by the second and by nothing else, ``nn.Identity`` aside.

``operator_links`` runs the model under a ``TorchDispatchMode``. A value is a storage between two writes, as the
operators' schemas declare them; a reader is the module in whose call an operator reads it, or the operator. Storages
are held alive, so that none is taken for another. ``fx_links`` reads torch.fx's graph, where torch.fx can trace.
"""

from __future__ import annotations

import contextlib
import gc
import types
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import timm.layers
import timm.models._features_fx as timm_fx
import torch
import torch.fx
import torchvision.ops.misc
from timm.layers import activations
from timm.layers.norm_act import SyncBatchNormAct
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

#: By number of spatial axes: convolutions and the norms that fold into them.
CONVS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, timm.layers.Conv2dSame),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}
NORM_ACTS = (timm.layers.BatchNormAct2d, timm.layers.FrozenBatchNormAct2d, SyncBatchNormAct)
NORMS = {
    1: (nn.BatchNorm1d, nn.SyncBatchNorm),
    2: (nn.BatchNorm2d, nn.SyncBatchNorm, torchvision.ops.misc.FrozenBatchNorm2d, *NORM_ACTS),
    3: (nn.BatchNorm3d, nn.SyncBatchNorm),
}
LINEARS = (nn.Linear, timm.layers.Linear)
OPS = (*CONVS[1], *CONVS[2], *CONVS[3], *LINEARS)
ALL_NORMS = (*NORMS[1], *NORMS[2], *NORMS[3])
ACTS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardtanh,
    nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Threshold, nn.Hardshrink,
    nn.Softshrink, nn.Tanhshrink,
    *(c for c in vars(activations).values() if isinstance(c, type) and issubclass(c, nn.Module)
      and c.__module__ == activations.__name__),
)  # fmt: skip
#: transformers' own elementwise activations, by name: importing them is slow.
HF_ACTS = frozenset(
    f"transformers.activations.{name}"
    for name in (
        "GELUActivation", "GELUTanh", "NewGELUActivation", "FastGELUActivation", "QuickGELUActivation",
        "ClippedGELUActivation", "AccurateGELUActivation", "SiLUActivation", "MishActivation", "ReLUSquaredActivation",
        "SqrtSoftplusActivation",
    )
)  # fmt: skip
#: By name: convolutions that differ from PyTorch's in their constructor only.
PLAIN_CONVS = {
    "torchvision.models.video.resnet.Conv3DSimple": nn.Conv3d,
    "torchvision.models.video.resnet.Conv3DNoTemporal": nn.Conv3d,
    "transformers.models.efficientnet.modeling_efficientnet.EfficientNetDepthwiseConv2d": nn.Conv2d,
    "transformers.models.align.modeling_align.AlignVisionDepthwiseConv2d": nn.Conv2d,
}
#: act(act(x)) == act(x): a shared one may be copied.
IDEMPOTENT = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
RELU = (nn.ReLU,)

Link = tuple[str, str]


def known(module: nn.Module) -> type:
    """A module's type; for those of torchvision and transformers that do the same as another, that one."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name in HF_ACTS:
        return nn.GELU
    if name in PLAIN_CONVS:
        return PLAIN_CONVS[name]
    if name.startswith("transformers.models.") and name.endswith("FrozenBatchNorm2d"):
        return torchvision.ops.misc.FrozenBatchNorm2d
    return type(module)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is a possible member of a chain, looked at from outside only."""
    kind = known(module)
    return kind in OPS or kind in ALL_NORMS or kind in ACTS


@dataclass
class Seen:
    """What one look at a model found.

    Attributes:
        links: for the first of each link the second.
        calls: of each leaf module.
        axes: of the tensor each leaf gave.
    """

    links: dict[str, str] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    axes: dict[str, int] = field(default_factory=dict)


class _Operators(TorchDispatchMode):
    """Follows values from operator to operator, and says which module call each operator belongs to."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.names = names
        self.owner: tuple[str, int] | None = None  # the leaf call that runs now
        self.steps = 0
        self.held: dict[int, Any] = {}
        self.writes: Counter[int] = Counter()
        self.readers: dict[tuple[int, int], set[tuple[str, int]]] = defaultdict(set)
        self.given: list[tuple[str, int, tuple[int, int] | None, Any]] = []
        self.calls: Counter[str] = Counter()

    def value(self, tensor: Tensor) -> tuple[int, int]:
        storage = tensor.untyped_storage()
        self.held.setdefault(storage._cdata, storage)
        return storage._cdata, self.writes[storage._cdata]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.steps += 1
        reader = self.owner or (f"operator {func}", self.steps)
        for tensor in tensors((args, kwargs)):
            self.readers[self.value(tensor)].add(reader)
        result = func(*args, **kwargs)
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors(given):
                    self.writes[self.value(tensor)[0]] += 1
        return result

    def call(self, module: nn.Module, args: Any, kwargs: Any, original: Any) -> Any:
        """A module call; ``nn.Module.__call__`` stands in for it while the model runs."""
        name = self.names.get(module)
        if name is None or self.owner is not None or not is_leaf(module):
            return original(module, *args, **kwargs)
        self.calls[name] += 1
        self.owner = (name, self.calls[name])
        try:
            result = original(module, *args, **kwargs)
        except BaseException:
            self.calls[name] -= 1  # the model may catch it and go another way
            raise
        finally:
            self.owner = None
        single = isinstance(result, Tensor)
        self.given.append(
            (name, result.dim() if single else 0, self.value(result) if single else None, weakref.ref(result) if single else None)
        )
        return result


def operator_links(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Seen:
    """The links of one forward; BatchNorm statistics and the random state move as in any forward."""
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names.setdefault(module, name)
    recorder = _Operators(names)
    original = nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder.call(self, args, kwargs, original)

    with mock.patch.object(nn.Module, "__call__", call), torch.no_grad(), recorder:
        output = model(*args, **dict(kwargs or {}))
        if isinstance(output, types.GeneratorType):
            output = list(output)
    for tensor in tensors(output):
        recorder.readers[recorder.value(tensor)].add(("the model's output", 0))
    gc.collect()  # what is alive then is kept by the model, or by an output in a form that ``tensors`` does not know
    found: dict[str, set[str]] = defaultdict(set)
    seen = Seen(calls=recorder.calls)
    for name, axes, value, alive in recorder.given:
        readers = recorder.readers[value] - {(name, n) for n in range(recorder.calls[name] + 1)} if value else set()
        tensor = alive() if alive is not None else None
        kept = tensor is not None and recorder.value(tensor) == value
        seen.axes[name] = axes
        found[name].add(next(iter(readers))[0] if len(readers) == 1 and not kept else "")
    seen.links = {name: others.pop() for name, others in found.items() if len(others) == 1 and "" not in others}
    seen.links = {a: b for a, b in seen.links.items() if b in recorder.calls}
    return seen


def tensors(obj: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors in nested containers and plain objects."""
    if isinstance(obj, Tensor):
        yield obj
    elif isinstance(obj, Mapping):
        for item in obj.values():
            yield from tensors(item, depth + 1)
    elif isinstance(obj, (list, tuple, set, frozenset, types.GeneratorType)):
        for item in obj:
            yield from tensors(item, depth + 1)
    elif depth < 5 and not isinstance(obj, (type, nn.Module)) and hasattr(obj, "__dict__"):
        yield from tensors(vars(obj), depth + 1)


class _Tracer(torch.fx.Tracer):
    """torch.fx as timm sets it up: its own leaf modules and functions, and the members of chains."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(timm_fx.get_notrace_functions()))
        self.leaves = (*timm_fx.get_notrace_modules(), timm.layers.DropPath)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)


def fx_links(model: nn.Module) -> Seen | None:
    """The links in torch.fx's graph, or None where it cannot trace."""
    try:
        with contextlib.redirect_stdout(None):
            graph = _Tracer().trace(model)
    except Exception:  # it has as many ways to fail as there are models
        return None
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]

    def reader(node: torch.fx.Node) -> str:
        while True:
            users = list(node.users)
            if len(users) != 1 or users[0].op != "call_module" or users[0].all_input_nodes != [node]:
                return ""
            node = users[0]
            if type(modules[node.target]) is not nn.Identity:
                return str(node.target) if is_leaf(modules[node.target]) else ""

    seen = Seen(calls=Counter(node.target for node in calls if is_leaf(modules[node.target])))
    found: dict[str, set[str]] = defaultdict(set)
    for node in calls:
        if is_leaf(modules[node.target]):
            found[node.target].add(reader(node))
    seen.links = {name: others.pop() for name, others in found.items() if len(others) == 1 and "" not in others}
    return seen


# --- from links to chains


def _spatial(kinds: Mapping[int, tuple[type, ...]], module: nn.Module) -> set[int]:
    return {axes for axes, types in kinds.items() if known(module) in types}


def fits(first: nn.Module, second: nn.Module, axes: int | None) -> bool:
    """Whether eagerq claims a link of these two modules, if the first begins a chain or is a norm behind an op."""
    if known(first) in OPS:
        if known(second) in ACTS:
            return True
        if known(first) in LINEARS:
            return axes == 2 and bool(_spatial(NORMS, second) & {1})
        return bool(_spatial(CONVS, first) & _spatial(NORMS, second))
    return known(first) in ALL_NORMS and not _holds_act(first) and known(second) in ACTS


def _holds_act(norm: nn.Module) -> bool:
    return type(norm) in NORM_ACTS and type(norm.act) is not nn.Identity


def _holds_drop(norm: nn.Module) -> bool:
    return type(norm) in NORM_ACTS and type(getattr(norm, "drop", nn.Identity())) is not nn.Identity


def claimed_links(model: nn.Module, looks: list[Seen]) -> dict[str, str]:
    """The links that hold in every look where their first module runs and whose types eagerq claims."""
    modules = dict(model.named_modules())
    axes = {name: n for look in looks for name, n in look.axes.items()}
    found = {a: b for look in looks for a, b in look.links.items()}
    common = {a: b for a, b in found.items() if all(look.links.get(a) == b for look in looks if look.calls[a])}
    return {a: b for a, b in common.items() if fits(modules[a], modules[b], axes.get(a))}


def begins_chain(first: nn.Module, second: nn.Module) -> bool:
    """Whether a chain of these types is claimed that begins with this claimed link: any of an op, of a norm that with a ReLU."""
    if known(first) in OPS:
        return True
    return bool(_spatial(NORMS, first) & {2, 3}) and type(first) is not nn.SyncBatchNorm and type(second) in RELU


def true_chains(model: nn.Module, looks: list[Seen]) -> tuple[set[tuple[str, ...]], dict[Link, str]]:
    """The chains to fuse, and the claimed links that no chain may hold, each with the reason."""
    modules = dict(model.named_modules())
    links = claimed_links(model, looks)
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)

    def obstacle(name: str, first: str) -> str:
        """Why this module cannot be in the chain that begins with ``first``."""
        module = modules[name]
        copied = name != first and type(module) in IDEMPOTENT
        if not copied and len(names[module]) > 1:
            return "shared under several names"
        if not copied and max(look.calls[name] for look in looks) > 1:
            return "runs more than once"
        if not copied and any(look.calls[name] != look.calls[first] for look in looks):
            return "runs in one mode only"
        if known(module) in ALL_NORMS and getattr(module, "running_mean", None) is None:
            return "keeps no running statistics"
        if "forward" in vars(module):
            return "has a forward of its own"
        return ""

    chains: set[tuple[str, ...]] = set()
    refused: dict[Link, str] = {}
    taken: set[str] = set()

    def is_copied(name: str) -> bool:
        return len(names[modules[name]]) > 1 or max(look.calls[name] for look in looks) > 1

    def follow(start: str) -> tuple[str, ...]:
        chain = [start]
        while chain[-1] in links:
            last, following = chain[-1], links[chain[-1]]
            if known(modules[last]) in ACTS or _holds_act(modules[last]) or _holds_drop(modules[last]):
                break
            reason = obstacle(start, start) or obstacle(following, start) or ("taken" if following in taken else "")
            if modules[last]._forward_hooks or modules[following]._forward_pre_hooks:
                reason = reason or "hooks between"
            if reason:
                refused[last, following] = reason
                break
            chain.append(following)
        return tuple(chain)

    ops = [name for name, module in modules.items() if known(module) in OPS]
    for name in ops:
        chain = follow(name)
        if len(chain) > 1:
            chains.add(chain)
            taken.update(n for n in chain if not is_copied(n))
    for name, module in modules.items():
        if known(module) not in ALL_NORMS or name in taken or not _spatial(NORMS, module) & {2, 3}:
            continue
        if type(module) is nn.SyncBatchNorm or getattr(module, "running_mean", None) is None:
            continue
        called = max(look.calls[name] for look in looks) == 1 and len(names[module]) == 1
        if _holds_act(module):
            if called and type(module.act) in RELU and not _holds_drop(module):
                chains.add((name,))
        elif name in links and begins_chain(module, modules[links[name]]):
            chain = follow(name)
            if len(chain) > 1:
                chains.add(chain)
                taken.update(n for n in chain if not is_copied(n))
    return chains, refused
