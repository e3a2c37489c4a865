"""Decide what each module of a model becomes and where tensors are quantized; then swap, all at once."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from eagerq import integrations
from eagerq.dataflow import Mode, Watched, watch, watch_copy
from eagerq.errors import InputsError, SpecError, StateError
from eagerq.inputs import Inputs
from eagerq.nn.intrinsic.fused import Fused, type_name
from eagerq.nn.modules.batchnorm import is_foldable
from eagerq.nn.modules.hooks import POST_HOOKS, PRE_HOOKS, share_hooks
from eagerq.nn.qat.activations import QUANTIZING
from eagerq.nn.qat.base import QATBase, QATOp
from eagerq.nn.qat.mixins import LoneNorm, WithAct
from eagerq.patterns import Patterns
from eagerq.placement import Quantizable, Site, place, place_at_inputs
from eagerq.quant.fake_quantize import FakeQuantize, disable_fake_quant
from eagerq.quant.spec import QConfigMapping, Rule, selects
from eagerq.record import Record, full_name, renamed_keys
from eagerq.surgery import (
    all_or_nothing,
    computed_tensor,
    full_copy,
    is_parametrized,
    meta_copy,
    names_of,
    own_method,
    replace_modules,
)
from eagerq.trace import Trace

#: Functions that would be quantized if a module held them; named in the report.
_HEAVY = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul rmatmul"
    " imatmul bmm mm addmm baddbmm einsum scaled_dot_product_attention multi_head_attention_forward"
    " bilinear".split()
)
#: Names under which a module that stays float holds what quantizes its input and output.
_QUANTIZERS = frozenset({"input_fake_quant", "activation_post_process"})


class Conversion:
    """Which modules of one model become what, and where tensors are quantized."""

    def __init__(self, model: nn.Module, patterns: Patterns, mapping: QConfigMapping) -> None:
        self.model = model
        self.mapping = mapping
        self.converts = patterns.converts
        self.names = names_of(model)
        self.modules = {names[0]: module for module, names in self.names.items()}
        self.why_float: dict[str, str] = {}
        self.notes: list[str] = []
        self.functions: Counter[str] = Counter()
        self.quantizable: dict[str, Quantizable] = {}
        used: set[Rule] = set()
        inside: set[nn.Module] = set()
        for name, module in self.modules.items():
            if module in inside:
                continue
            source = self._source(module)
            qat = self.converts.get(type(source))
            if qat is None:
                continue
            inside.update(m for m in module.modules() if m is not module)
            types = (type(module), type(source), *(type(m) for m in module.children()))
            used.update(rule for rule, _ in mapping.rules if any(selects(rule, alias, types) for alias in self.names[module]))
            refusal = self._refusal(module)
            lone = issubclass(qat, LoneNorm)
            if refusal is None and lone and not is_foldable(source):
                refusal = "it keeps no running statistics, so that it is no fixed map in eval"
            config = next((c for alias in self.names[module] for c in [mapping.lookup(alias, types)]), None)
            if refusal is not None:
                self.why_float[name] = refusal
            elif config is None or (config.activation is None and config.weight is None):
                self.why_float[name] = "kept float by the qconfig"
            elif lone and config.activation is None:
                self.why_float[name] = "the qconfig quantizes weights alone, and a norm has few of them"
            else:
                self.quantizable[name] = Quantizable(config, qat)
        unused = [rule for rule, _ in mapping.rules if rule not in used]
        if unused:
            rule = unused[0]
            shown = repr(rule) if isinstance(rule, str) else type_name(rule)
            raise SpecError(
                f"the qconfig rule {shown} selects none of the modules that can be quantized;"
                f" name patterns are matched against full names such as {next(iter(self.quantizable), 'layer1.0.conv1')!r}"
                " ('layer1.*' for all inside layer1), types exactly."
            )
        if not self.quantizable and not self.why_float:
            raise StateError(
                f"found nothing to quantize in {type(model).__name__}: no module of a type that has a QAT form;"
                " add one with eagerq.DEFAULT_PATTERNS.extended(...)."
            )

    def _source(self, module: nn.Module) -> nn.Module:
        """The module whose class the QAT class converts: itself, or what an adapter takes it for."""
        expansion = integrations.expand(module)
        return expansion.members[0] if len(expansion.members) == 1 and expansion.rest is None else module

    def _refusal(self, module: nn.Module) -> str | None:
        for part in module.modules():
            if is_parametrized(part):
                return f"its {type_name(type(part))} carries a parametrization; remove that first (remove_parametrizations)"
            computed, method = computed_tensor(part), own_method(part)
            if computed is not None:
                return f"its {computed} is computed before each forward (weight_norm, spectral_norm, pruning); remove that first"
            if method is not None:
                return f"it has a {method} of its own on the instance (a profiler's or wrapper's patch); remove that first"
            if any(tensor.is_complex() for tensor in part._parameters.values() if tensor is not None):
                return "its parameters are complex, and integers stand for real numbers only"
        if getattr(module, "max_norm", None) is not None:
            return "max_norm rewrites its weight in each forward"
        return None

    def decide(self, runs: tuple[Inputs, ...] | None) -> None:
        """Watch the model in eval mode and place the quantizers; try the converted copy once."""
        if runs is None:
            self.notes.append(
                "no example inputs: every quantized module quantizes its own input; pass some to quantize at producers"
            )
            self.placement = place_at_inputs(self.quantizable)
            self.apply(meta_copy(self.model), Record())  # what cannot be built fails here, not on the model
            return
        kinds = {type(self.modules[name]) for name in self.quantizable}

        def is_leaf(module: nn.Module) -> bool:
            return type(module) in kinds or isinstance(module, Fused)

        try:
            watched = watch(self.model, runs, is_leaf, (Mode(False),))
        except InputsError:
            watched = watch(self.model, runs, is_leaf, (Mode(True),))
            without = "" if all(run.have_data() for run in runs) else ", which hold no data: pass example_inputs if that is why"
            self.notes.append(f"watched in train mode, since the model does not run in eval mode on these inputs{without}")
        for name in list(self.quantizable):
            if not any(trace.counts[name] for trace in watched.traces):
                self.why_float[name] = "it did not run in the watched forward"
                del self.quantizable[name]
        for trace in watched.traces:
            self._note_functions(trace)
            for key, call in trace.parameter_readers.items():
                for name in [n for n in self.quantizable if key.startswith(f"{n}.")]:
                    self.why_float[name] = f"{key} is also read by {call}, which would not see it quantized"
                    del self.quantizable[name]
        may_hold = functools.partial(self._may_hold, watched.traces)
        while True:
            self.placement = place(watched.traces, self.quantizable, may_hold, self.mapping.default)
            reason, bypassed = self._trial(watched)
            norms = [] if reason is None else [n for n, q in self.quantizable.items() if issubclass(q.qat, LoneNorm)]
            if not bypassed and not norms:
                break
            for name in bypassed:
                self.why_float[name] = (
                    "the model calls it past its name (a bound method or function keeps it), out of reach, or asks for its type;"
                    " call it by its name"
                )
            for name in norms:  # which is no reason to refuse a model
                self.why_float[name] = f"the model does not run with its norms converted: {reason}"
            for name in (*bypassed, *norms):
                del self.quantizable[name]
        if reason is not None:
            self.placement = place_at_inputs(self.quantizable)
            self.notes.append(f"quantized at readers, since quantizing at producers breaks the run: {reason}")
            reason, _ = self._trial(watched)
            if reason is not None:
                raise StateError(
                    f"{type(self.model).__name__} does not run with its modules converted: {reason}."
                    " Keep the module that reads another's internals float with a qconfig rule of None."
                )

    def _note_functions(self, trace: Trace) -> None:
        for call in trace.calls:
            if not call.is_module and call.name in _HEAVY:
                self.functions[f"{call.name} in {call.parent or 'the model'}"] += 1

    def _may_hold(self, traces: tuple[Trace, ...], name: str) -> bool:
        module = self.modules.get(name)
        return (
            module is not None
            and len(self.names[module]) == 1
            and all(trace.counts[name] <= 1 for trace in traces)
            and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        )

    def _trial(self, watched: Watched) -> tuple[str | None, list[str]]:
        """Convert a copy and run it: why it does not run, or which modules run no longer."""
        copied = meta_copy(self.model) if watched.on_meta else full_copy(self.model)
        try:
            copied = self.apply(copied, Record())
        except Exception as error:  # a from_float of the user's own
            return f"{type(error).__name__}: {error}", []
        if watched.on_meta:
            copied.apply(disable_fake_quant)  # without values there is nothing to quantize; whether modules fit is asked
        modes = [Mode(watched.traces[0].training)]
        traces, failures = watch_copy(
            copied, watched.runs, lambda module: isinstance(module, QATBase), modes, on_meta=watched.on_meta
        )
        if failures:
            return "; ".join(map(str, failures.values())), []
        pairs = list(zip(watched.traces, traces, strict=True))
        for a, b in pairs if watched.on_meta else ():  # elsewhere shapes may be those of values
            before, after = (sorted(t.shapes[v] for v in t.outputs) for t in (a, b))
            if before != after:
                return f"its results are of shapes {after} instead of {before}, so it asks modules for their types", []
        return None, [name for name in self.quantizable if any(a.counts[name] != b.counts[name] for a, b in pairs)]

    def apply(self, model: nn.Module, record: Record) -> nn.Module:
        """Build everything and swap it in, or change nothing; returns ``model``, or its QAT form if it is itself converted."""
        with all_or_nothing(model):
            return self._applied(model, record)

    def _applied(self, model: nn.Module, record: Record) -> nn.Module:
        modules = dict(model.named_modules(remove_duplicate=False))
        aliases = names_of(model)
        new: dict[nn.Module, nn.Module] = {}
        qat_modules: dict[str, QATBase] = {}
        renames: dict[str, str] = {}
        for name, q in self.quantizable.items():
            module = modules[name]
            source = self._source(module)
            qat: QATBase = q.qat.from_float(source, q.qconfig)  # type: ignore[attr-defined]
            if source is not module:
                qat.training = module.training
                share_hooks(qat, [module], (*PRE_HOOKS, *POST_HOOKS))
            new[module] = qat_modules[name] = qat
            for alias in aliases[module]:
                old_keys = {id(t): full_name(alias, k) for k, t in module.state_dict(keep_vars=True).items()}
                renames.update(renamed_keys(alias, qat, old_keys))
        quantizers: dict[Site, FakeQuantize] = {}
        attach: list[tuple[Site, nn.Module]] = []
        for site in self.placement.sites:
            like = next(model.parameters(), None)
            quantizer = FakeQuantize(site.spec, device=None if like is None else like.device).train(model.training)
            if like is not None and like.dtype == torch.float64:
                quantizer.double()
            quantizers[site] = quantizer
            holder = model if site.kind == "model_input" else qat_modules.get(site.module) or modules[site.module]
            attach.append((site, holder))
        for site, holder in attach:
            quantizer = quantizers[site]
            if site.kind == "output":
                holder.activation_post_process = quantizer
                if isinstance(holder, WithAct):
                    holder.split_activation()
            elif site.kind == "input":
                holder.input_fake_quant = quantizer
            elif site.kind == "exit" and type(holder) in QUANTIZING:
                new[holder] = QUANTIZING[type(holder)].from_float(holder, quantizer)
            elif site.kind == "exit":
                holder.register_module("activation_post_process", quantizer)
                holder.register_forward_hook(quantize_output)
            else:
                if "input_fake_quant" not in holder._modules:
                    holder.register_module("input_fake_quant", nn.ModuleDict())
                    holder.register_forward_pre_hook(quantize_arguments, with_kwargs=True)
                key = _argument_key(holder, site.module)
                holder.input_fake_quant[key] = quantizer  # type: ignore[operator,index,assignment]
        for layer in model.modules():
            if isinstance(layer, nn.TransformerEncoderLayer) and any(part in new for part in layer.modules()):
                layer.register_forward_hook(_keep_off_the_fast_path)
        for name, found in self.placement.source.items():
            module = qat_modules[name]
            if isinstance(module, QATOp) and found.kind != "input":
                module.set_producer_quantizer(quantizers[found])
        record = record.absorbing(model)
        model = replace_modules(model, new)
        record.renamed(
            renames,
            stage="qat",
            rows=tuple(self._rows()),
            sites=tuple((s.kind, s.module) for s in self.placement.sites),
            notes=tuple(self.notes),
            originals={},
        ).attach(model)
        return model

    def _rows(self) -> list[tuple[str, str, str, str]]:
        rows = []
        inside: set[nn.Module] = set()
        for name, module in self.modules.items():
            if module in inside:
                continue
            q = self.quantizable.get(name)
            if q is not None:
                inside.update(module.modules())
                site = self.placement.source.get(name)
                where = "" if site is None else f"input quantized at {_place(site, name)}"
                rows.append((name, q.qat.__name__, "QAT", where))
            elif name in self.why_float:
                inside.update(module.modules())
                rows.append((name, type(module).__name__, "float", self.why_float[name]))
            elif module._parameters or isinstance(module, nn.modules.batchnorm._NormBase):
                own = [key for key, p in module._parameters.items() if p is not None]
                if own or module._buffers:
                    reason = f"no QAT form is known for {type_name(type(module))}"
                    if own and module._modules.keys() - _QUANTIZERS:  # a whole block, or the model: what of it is meant
                        reason += f" and its own parameters: {', '.join(own)}"
                    rows.append((name, type(module).__name__, "float", reason))
        rows += [(where, "function", "float", f"called {n} times; no module holds it") for where, n in self.functions.items()]
        return rows


def _place(site: Site, reader: str) -> str:
    if site.kind == "model_input":
        return "the model's input"
    if site.kind == "input":
        return "this module" if site.module == reader else site.module
    return f"the output of {site.module}"


def quantize_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Forward hook: quantize what the module returns with its ``activation_post_process``."""
    quantized: Tensor = module.activation_post_process(output)  # type: ignore[operator]
    return quantized


def quantize_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: quantize the model's own arguments with its ``input_fake_quant``."""
    quantizers: nn.ModuleDict = module.input_fake_quant  # type: ignore[assignment]
    new_args, new_kwargs = list(args), dict(kwargs)
    for key, quantizer in quantizers.items():
        position, _, name = key.partition("_")
        if position.isdigit() and int(position) < len(new_args):
            new_args[int(position)] = quantizer(new_args[int(position)])
        elif name in new_kwargs:
            new_kwargs[name] = quantizer(new_kwargs[name])
    return tuple(new_args), new_kwargs


def _argument_key(model: nn.Module, argument: str) -> str:
    """Position and name of an argument that was given by one of them: ``0_x``; callers may use the other."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    if argument.isdigit():
        return f"{argument}_{names[int(argument)] if int(argument) < len(names) else ''}"
    return f"{names.index(argument) if argument in names else 'k'}_{argument}"


def _keep_off_the_fast_path(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook that does nothing: PyTorch's fused encoder, which reads weights past the modules, is off where hooks are."""
