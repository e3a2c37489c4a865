"""Where tensors are quantized: decided from a watched forward, as data.

Each tensor that a quantized module reads is quantized once, where it is produced; so are the results of residual
adds and average pools of quantized tensors, which integer engines compute as integers. With placement at inputs
a tensor is quantized where it is read, but for shortcuts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

from torch import nn

from eagerq.nn.modules.ops import EmbeddingOp, LinearOp
from eagerq.nn.qat.mixins import HoldsAct
from eagerq.quant.spec import QConfig, QuantSpec
from eagerq.trace import Call, Trace

Kind = Literal["output", "exit", "input", "model_input"]

#: Functions whose result holds only values of their first argument: it is on the same integer grid.
_PRESERVING = frozenset(
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d flatten"
    " unflatten view reshape permute transpose swapaxes swapdims movedim squeeze unsqueeze contiguous"
    " clone detach getitem chunk split unbind narrow select expand repeat tile roll flip pixel_shuffle"
    " pixel_unshuffle channel_shuffle dropout T mT dropout1d dropout2d dropout3d to".split()
)
_CATS = frozenset({"cat", "concat", "concatenate"})
#: Activations an engine runs inside the op before them, so the tensor to quantize comes after.
_ACTIVATIONS = frozenset("relu relu6 hardtanh clamp clamp_min leaky_relu silu hardswish gelu mish elu prelu".split())
_ADDS = frozenset({"add", "iadd", "radd"})
#: Functions of one quantized tensor that engines compute on its codes, with a grid of their own for the result.
_POOLS = frozenset({"avg_pool2d", "adaptive_avg_pool2d", "mean"})


def _preserves(call: Call) -> bool:
    return call.name in _PRESERVING or (call.name == "interpolate" and "'nearest'" in call.constants)


@dataclasses.dataclass(frozen=True)
class Site:
    """A place where a tensor is quantized.

    Attributes:
        kind: ``"output"`` and ``"input"`` of a QAT module, ``"exit"`` of another module, or
            ``"model_input"``.
        module: full name; for ``"model_input"`` the position or keyword of the argument.
        spec: the grid.
    """

    kind: Kind
    module: str
    spec: QuantSpec


@dataclasses.dataclass(frozen=True)
class Placement:
    """All sites, and for each QAT module the one that quantizes its input."""

    sites: tuple[Site, ...]
    source: Mapping[str, Site]


@dataclasses.dataclass(frozen=True)
class Quantizable:
    """A module that becomes a QAT module: its config and what its QAT class is."""

    qconfig: QConfig
    qat: type[nn.Module]

    @property
    def has_activation(self) -> bool:
        """Whether its output is that of an activation it holds."""
        return issubclass(self.qat, HoldsAct)

    @property
    def reads(self) -> QuantSpec | None:
        """The grid it wants its input on, or None."""
        if issubclass(self.qat, EmbeddingOp) or not hasattr(self.qat, "op"):
            return None
        return self.qconfig.activation


def place_at_inputs(modules: Mapping[str, Quantizable]) -> Placement:
    """Quantize at every reader; right without any knowledge of the dataflow."""
    sites = {n: Site("input", n, q.reads) for n, q in modules.items() if q.reads is not None}
    return Placement(tuple(sites.values()), sites)


def place(
    traces: tuple[Trace, ...], modules: Mapping[str, Quantizable], may_hold: Callable[[str], bool], default: QConfig | None
) -> Placement:
    """Decide from the traces; where they disagree on a module's input, it is quantized at that module.

    Args:
        traces: watched forwards with the quantizable modules as leaves.
        modules: by full name.
        may_hold: whether a quantizer can be attached to the named module: to its output, or to the model's input (``""``).
        default: config of results that no quantized module reads.
    """
    found = [_One(trace, modules, may_hold, default).placement() for trace in traces]
    source: dict[str, Site] = {}
    sites: dict[tuple[Kind, str], Site] = {(s.kind, s.module): s for p in found for s in p.sites}
    for name, q in modules.items():
        choices = {p.source[name] for p in found if name in p.source}
        if len(choices) > 1:
            choices = {Site("input", name, q.reads)} if q.reads is not None else set()
        for site in choices:
            source[name] = site
            sites[(site.kind, site.module)] = site
    return Placement(tuple(sites.values()), source)


class _One:
    """The placement one trace asks for."""

    def __init__(
        self, trace: Trace, modules: Mapping[str, Quantizable], may_hold: Callable[[str], bool], default: QConfig | None
    ) -> None:
        self.trace = trace
        self.modules = modules
        self.may_hold = may_hold
        self.default = default
        self.sites: dict[tuple[Kind, str], Site] = {}
        self.source: dict[str, set[Site]] = {}
        self.settled: dict[int, Site] = {}  # values that are quantized, and where

    def placement(self) -> Placement:
        self._outputs()
        reads = [
            (c, q)
            for c in self.trace.calls
            if c.is_module and (q := self.modules.get(c.name)) and q.reads is not None and c.inputs
        ]
        for call, q in reads:
            if q.qconfig.placement == "outputs":
                self._settle(self.origin(call.inputs[0]), q.reads)
        self._integer_results()
        self._shortcuts()
        source: dict[str, Site] = {}
        for call, q in reads:
            site = None if call.name in self.trace.changed_inputs else self.settled.get(self.origin(call.inputs[0]))
            own = Site("input", call.name, q.reads)  # type: ignore[arg-type]
            chosen = own if site is None or site.spec != q.reads else site
            if source.setdefault(call.name, chosen) != chosen:
                source[call.name] = own  # called on differently quantized tensors
        for name, site in source.items():
            if site.kind == "input":
                self.sites[("input", name)] = site
        return Placement(tuple(self.sites.values()), source)

    # --- values

    def origin(self, value: int) -> int:
        """The value that ``value`` is a rearrangement of."""
        while True:
            call = self.trace.producer.get(value)
            if value in self.settled or call is None or call.is_module or not call.inputs:
                return value
            on_grid = _preserves(call) or (call.name == "relu" and self.origin(call.inputs[0]) in self.settled)
            if not on_grid:
                origins = {self.origin(v) for v in set(call.inputs)} if call.name in _CATS else ()
                return origins.pop() if len(origins) == 1 else value
            value = call.inputs[0]

    def only_reader(self, value: int) -> Call | None:
        """The one call that reads ``value``, if nothing else sees it."""
        readers = self.trace.readers.get(value, [])
        if len(readers) != 1 or value in self.trace.outputs or value in self.trace.kept:
            return None
        return readers[0]

    def activated(self, value: int) -> int:
        """``value`` after the activation functions that alone read it."""
        while True:
            call = self.only_reader(value)
            if call is None or call.is_module or call.name not in _ACTIVATIONS or len(call.outputs) != 1:
                return value
            value = call.outputs[0]

    def useful(self, value: int, seen: set[int] | None = None) -> bool:
        """Whether ``value`` reaches a quantized module."""
        seen = set() if seen is None else seen
        stack = [value]
        while stack:
            for call in self.trace.readers.get(stack.pop(), []):
                if call.is_module and call.name in self.modules:
                    return True
                fresh = [v for v in call.outputs if v not in seen]
                seen.update(fresh)
                stack += fresh
        return False

    # --- decisions

    def _put(self, value: int, site: Site) -> None:
        self.sites[(site.kind, site.module)] = site
        self.settled[value] = site

    def _outputs(self) -> None:
        """A QAT module's output, after its activation; not that of the last linear layers, unless the config asks for it."""
        for call in self.trace.calls:
            q = self.modules.get(call.name) if call.is_module else None
            if q is None or len(call.outputs) != 1 or q.qconfig.activation is None or q.qconfig.placement != "outputs":
                continue
            (value,) = call.outputs
            if issubclass(q.qat, LinearOp) and not q.qconfig.quantize_last and not self.useful(value):
                continue
            after = value if q.has_activation else self.activated(value)
            if after == value:
                if call.name in self.trace.changed_outputs:  # by a hook, which runs behind the module's own quantizer
                    continue
                self._put(value, Site("output", call.name, q.qconfig.activation))
            elif not self._settle_at_exit(after, q.qconfig.activation):
                # a function without a module of its own activates: quantized where it is read
                continue

    def _settle(self, value: int, spec: QuantSpec | None) -> None:
        """Quantize ``value`` where it is made, if there is such a place."""
        if spec is None or value in self.settled:
            return
        if value in self.trace.inputs:
            self._settle_model_input(value, spec)
            return
        self._settle_at_exit(value, spec)

    def _settle_at_exit(self, value: int, spec: QuantSpec) -> bool:
        first: int | None = value
        while first is not None:
            readers = self.trace.readers.get(first, [])
            for leaving in self.trace.exits.get(first, []):
                if (
                    leaving.name
                    and leaving.name not in self.modules
                    and self.may_hold(leaving.name)
                    and all(r.index >= leaving.index for r in readers)
                ):
                    self._put(first, Site("exit", leaving.name, spec))
                    return True
            call = self.only_reader(first)
            first = (
                call.outputs[0]
                if call is not None and not call.is_module and _preserves(call) and len(call.outputs) == 1
                else None
            )
        return False

    def _settle_model_input(self, value: int, spec: QuantSpec) -> None:
        readers = self.trace.readers.get(value, [])
        if len(readers) > 1 and value in self.trace.arguments and self.may_hold(""):
            self._put(value, Site("model_input", self.trace.arguments[value], spec))

    def _integer_results(self) -> None:
        """Results of adding two quantized tensors, after their activation, and of average pools of one."""
        for call in self.trace.calls:
            operands = 2 if call.name in _ADDS else 1 if call.name in _POOLS else 0
            if call.is_module or len(call.inputs) != operands or not operands or len(call.outputs) != 1:
                continue
            shapes = {self.trace.shapes[v] for v in call.inputs}
            sites = [self.settled.get(self.origin(v)) for v in call.inputs]
            if len(shapes) != 1 or None in sites or not self.useful(call.outputs[0]):
                continue
            spec = next(site.spec for site in sites if site is not None)
            after = self.activated(call.outputs[0])
            if self.origin(after) not in self.settled:
                self._settle_at_exit(after, spec)

    def _shortcuts(self) -> None:
        """Placement at inputs: what is added to a convolution's result, so that the engine adds it in the same kernel.

        The convolution's own result stays as it is; of two convolutions the first operand's does (NVIDIA, TensorRT,
        "Explicit Quantization": quantize the residual input in skip connections).
        """
        for call in self.trace.calls:
            if call.is_module or call.name not in _ADDS or len(call.inputs) != 2 or len(call.outputs) != 1:
                continue
            if len({self.trace.shapes[v] for v in call.inputs}) != 1:
                continue
            main = next((v for v in call.inputs if self._takes_an_addend(v)), None)
            for shortcut in [v for v in call.inputs if main is not None and v != main and v not in self.settled]:
                spec = self.modules[self.trace.producer[main].name].qconfig.activation  # type: ignore[index]
                maker = self.trace.producer.get(shortcut)
                if spec is None or maker is None or not maker.is_module or maker.name not in self.modules:
                    self._settle(shortcut, spec)
                elif len(maker.outputs) == 1 and maker.name not in self.trace.changed_outputs:
                    self._put(shortcut, Site("output", maker.name, spec))

    def _takes_an_addend(self, value: int) -> bool:
        """Whether it is a quantized convolution's bare result that only one add reads."""
        call = self.trace.producer.get(value)
        q = self.modules.get(call.name) if call is not None and call.is_module else None
        if q is None or q.reads is None or q.has_activation or q.qconfig.placement != "inputs":
            return False
        return not issubclass(q.qat, LinearOp) and self.only_reader(value) is not None
