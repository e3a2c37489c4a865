"""What is known of a model before chains are sought: its modules one by one, and the watched links between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from eagerq import integrations
from eagerq.dataflow import Mode, watch
from eagerq.inputs import Inputs
from eagerq.nn.intrinsic.fused import Fused
from eagerq.nn.modules.activation import IDEMPOTENT
from eagerq.nn.modules.batchnorm import NORMS_1D, NORMS_2D, NORMS_3D, is_foldable
from eagerq.nn.modules.hooks import POST_HOOKS, PRE_HOOKS
from eagerq.nn.qat.base import QATBase
from eagerq.patterns import Patterns
from eagerq.surgery import computed_tensor, is_parametrized, names_of, own_method
from eagerq.trace import Trace, upwards

NORMS = frozenset((*NORMS_1D, *NORMS_2D, *NORMS_3D))
PARAMETRIZED = "carries a parametrization, which fusion would lose; remove it first (parametrize.remove_parametrizations)"
_ALL_HOOKS = (*PRE_HOOKS, *POST_HOOKS)


class Evidence:
    """A model watched, and what its modules and links say of whether they may be fused."""

    def __init__(self, model: nn.Module, patterns: Patterns, runs: tuple[Inputs, ...] | None) -> None:
        self.model = model
        self.patterns = patterns
        self.runs = runs
        self.chains = patterns.chains
        self.vocabulary = {t for chain in self.chains for t in chain}
        self.prefixes = {chain[:n] for chain in self.chains for n in range(1, len(chain) + 1)}
        self.names = names_of(model)
        inside = {m for leaf in self.names if self._is_leaf(leaf) for m in leaf.modules() if m is not leaf}
        self.modules = {names[0]: m for m, names in self.names.items() if m not in inside}
        self.types = {name: self._types(module) for name, module in self.modules.items()}
        self.notes: list[str] = []
        self.next_sibling = self._siblings()
        self.in_sequential = {
            f"{name}.{child}" if name else child
            for name, m in self.modules.items()
            if all(type(self.modules[outer]) is nn.Sequential for outer in ("", *upwards(name)))  # else a parent may read between
            for child in m._modules
        }
        self.traces: tuple[Trace, ...] = ()
        self.positions: tuple[int, ...] = ()
        self.on_meta = True
        if runs is not None:
            # a forward may ask whether gradients are recorded, and in eval mode they may be or not
            modes = (Mode(model.training), Mode(not model.training), Mode(False, gradients=False))
            watched = watch(model, runs, self._is_leaf, modes)
            self.traces, self.on_meta, self.runs = watched.traces, watched.on_meta, watched.runs
            self.positions = watched.positions
            self.notes += watched.notes
        else:
            self.notes.append(
                "no example inputs: only chains of a model that is all nn.Sequential are fused; pass example_inputs for others"
            )

    # --- facts about single modules

    def _types(self, module: nn.Module) -> tuple[type[nn.Module], ...]:
        return tuple(type(part) for part in integrations.expand(module).members)

    def _is_leaf(self, module: nn.Module) -> bool:
        if isinstance(module, (Fused, QATBase)):
            return True
        return all(t in self.vocabulary for t in self._types(module))

    def _siblings(self) -> dict[str, str]:
        """For each module the next one its parent registers, identities aside."""
        following: dict[str, str] = {}
        for parent_name, parent in self.modules.items():
            if isinstance(parent, (Fused, QATBase)):
                continue
            prefix = f"{parent_name}." if parent_name else ""
            last = None
            for child_name, child in parent._modules.items():
                if child is None or type(child) is nn.Identity:
                    continue
                if last is not None:
                    following[last] = prefix + child_name
                last = prefix + child_name
        return following

    def counts(self, name: str) -> int:
        """The most calls of a module in one run."""
        return max((trace.counts[name] for trace in self.traces), default=0)

    def refusal(self, name: str, first: bool) -> str | None:
        """Why this module cannot be a member of any chain, or None."""
        module = self.modules[name]
        shared = self.names[module]
        idempotent = all(t in IDEMPOTENT for t in self.types[name]) and not first
        if is_parametrized(module):
            return f"{name} {PARAMETRIZED}"
        computed, method = computed_tensor(module), own_method(module)
        if computed is not None:
            return (
                f"{name}.{computed} is computed before each forward (weight_norm, spectral_norm, pruning), which fusion would"
                " lose; remove it"
            )
        if first and self.leaves_rest(name):
            return f"{name} does more after its norm, which would be lost"
        if method is not None:
            return f"{name} has a {method} of its own on the instance (a profiler's or wrapper's patch); remove it first"
        elsewhere = {module for trace in self.traces for module in trace.elsewhere}
        if elsewhere:
            return (
                f"the forward runs {min(elsewhere)!r} in a thread of its own, where it is not seen who reads what;"
                " plan with the work done in one thread"
            )
        other = next((trace.reassigned[name] for trace in self.traces if name in trace.reassigned), None)
        if other is not None:
            return f"{name}.{other} is another tensor when it runs, put there by the forward; fusion would lose that"
        if any(name in trace.transformed for trace in self.traces):
            return f"{name} runs under torch.vmap or a transform of torch.func, where it is not seen who reads its output"
        settings = [trace.settings[name] for trace in self.traces]
        if self.is_shared(name) and any(setting != calls[0] for calls in settings for setting in calls):
            return f"{name} is called several times, and the forward changes its settings between"
        if len(shared) > 1 and not idempotent:
            return f"{name} is shared under several names: {', '.join(shared)}"
        if self.traces:
            calls = self.counts(name)
            if calls == 0:
                return self._never_ran(name)
            if calls > 1 and not idempotent:
                return f"{name} runs {calls} times in one forward"
        return None

    def lost_hooks(self, name: str, first: bool, last: bool) -> str | None:
        """Why this member's hooks keep it out of a chain at that position, or None."""
        module = self.modules[name]
        if self.is_shared(name):
            groups: tuple[str, ...] = _ALL_HOOKS
        else:
            groups = (() if first else PRE_HOOKS) + (() if last else POST_HOOKS)
        if any(getattr(module, group) for group in groups):
            return f"{name} carries hooks, which fusion would lose; remove them, or register them after fusing"
        return None

    def hooks_around(self, name: str, following: str) -> str | None:
        """Why a module around one of these two and not the other keeps them apart: its hooks would see other gradients."""
        for outer in sorted(({*upwards(name)} ^ {*upwards(following)}) - {name, following}):
            module = self.modules[outer]
            if module._backward_hooks or module._backward_pre_hooks:
                return f"{outer} around one of them carries hooks on its gradients, which would see others; remove them"
        return None

    def _may_be_copied(self, name: str) -> bool:
        return name in self.types and all(t in IDEMPOTENT for t in self.types[name])

    def is_shared(self, name: str) -> bool:
        """Whether the module has other uses, so that only a copy of it may be fused."""
        return len(self.names[self.modules[name]]) > 1 or self.counts(name) > 1

    def leaves_rest(self, name: str) -> bool:
        """Whether the module does more than its members (drops before its activation), so that no chain goes on behind it."""
        return integrations.expand(self.modules[name]).rest is not None

    # --- links

    def follower(self, name: str) -> tuple[str | None, str]:
        """The one module that reads ``name``'s output in every run, or None and the reason there is none."""
        if not self.traces:
            following = self.next_sibling.get(name)
            if following is not None and name in self.in_sequential:
                return following, ""
            return None, "no forward was watched to confirm the chain; pass example_inputs"
        found: str | None = None
        for trace in self.traces:
            for call in trace.calls_of(name):
                reader, reason = self._reader(trace, name, call.outputs)
                if reader is None:
                    return None, reason
                if found not in (None, reader):
                    return None, f"the output of {name} goes to {found} in one run and to {reader} in another"
                found = reader
        return found, "" if found else self._never_ran(name)

    def _never_ran(self, name: str) -> str:
        runs = len(self.positions)
        return f"{name} did not run in {f'any of the {runs} watched runs' if runs > 1 else 'the watched forward'}"

    def _reader(self, trace: Trace, name: str, outputs: tuple[int, ...]) -> tuple[str | None, str]:
        if len(outputs) != 1:
            return None, f"{name} returns {len(outputs)} tensors"
        (value,) = outputs
        readers = trace.readers.get(value, [])
        others = [str(call) for call in readers[:3]]
        if value in trace.outputs:
            seen = ["an output of the model", *(f"read by {other}" for other in others)]
            return None, f"the output of {name} is also {' and '.join(seen)}"
        if value in trace.kept:
            return None, f"the output of {name} is kept beyond the forward (in an attribute, a list or a hook)"
        if not readers:
            return None, f"nothing reads the output of {name}"
        if len(readers) > 1:
            return None, f"the output of {name} has {len(readers)} readers: {', '.join(others)}"
        (call,) = readers
        if not call.is_module:
            return None, f"the output of {name} is read by {call}"
        if call.inputs != (value,):
            return None, f"{call.name} reads other tensors beside the output of {name}"
        return call.name, ""

    def apart(self, first: str, member: str) -> str | None:
        """Why a chain from ``first`` cannot hold ``member``, which also runs without it, or None."""
        for i, trace in enumerate(self.traces):
            if not self.is_shared(member) and trace.counts[first] != trace.counts[member]:
                mode = "train" if trace.training else "eval"
                which = f" on input {self.positions[i % len(self.positions)]}" if len(self.positions) > 1 else ""
                counts = trace.counts
                return f"in {mode} mode{which} {first} runs {counts[first]} times and {member} {counts[member]} times"
        return None

    def other_context(self, name: str, following: str) -> str | None:
        """Why these two cannot become one module, if gradients or checkpoints treat them differently."""
        normalises = not NORMS.isdisjoint(self.types[following])  # a checkpoint would count a batch twice in its statistics
        for trace in self.traces:
            before, after = trace.contexts[name], trace.contexts[following]
            written_to = any(v in trace.rewritten for call in trace.calls_of(following) for v in call.outputs)
            if not normalises and not written_to:  # else outside of a checkpoint autograd would keep what is then changed
                before, after = ({(grad, 0, cast, modes) for grad, _, cast, modes in contexts} for contexts in (before, after))
            if not before <= after:
                break
        else:
            return None
        return f"{name} and {following} run under other gradient modes, activation checkpoints or autocasts, or function modes"

    def channels(self, chain: Sequence[str]) -> str | None:
        """Why op and norm of this chain do not fit each other, or None."""
        parts = [(n, part) for n in chain for part in integrations.expand(self.modules[n]).members]
        for (op_name, op), (norm_name, norm) in itertools.pairwise(parts):
            if type(norm) not in NORMS:
                continue
            if not is_foldable(norm):
                return f"{norm_name} keeps no running statistics, so it cannot be folded; use track_running_stats=True"
            width = getattr(op, "out_channels", getattr(op, "out_features", None))
            features = norm.running_mean.shape[0]  # type: ignore[union-attr,index]
            if width is not None and width != features:
                return f"{op_name} gives {width} channels and {norm_name} normalises {features}"
            axes = None if width is None else op.weight.dim()  # type: ignore[operator]
            for trace in self.traces:
                for call in trace.calls_of(op_name):
                    found = len(trace.shapes[call.outputs[0]])
                    if axes is not None and found != axes:
                        return (
                            f"{op_name} gives a tensor of {found} axes, whose channels {norm_name} does not see on axis 1;"
                            f" {axes} axes are wanted"
                        )
        return None
