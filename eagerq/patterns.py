"""Which chains of module types become which fused module, and which QAT module converts which float one."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import nn

from eagerq import integrations
from eagerq.errors import PatternError
from eagerq.nn import intrinsic as nni
from eagerq.nn import qat as nnqat
from eagerq.nn.intrinsic import qat as nniqat
from eagerq.nn.intrinsic.fused import Fused, type_name
from eagerq.nn.modules.activation import ELEMENTWISE
from eagerq.nn.modules.batchnorm import NORMS_1D, NORMS_2D, NORMS_3D
from eagerq.nn.modules.conv import Conv2dSame
from eagerq.nn.qat.base import QATBase, QATOp
from eagerq.nn.qat.mixins import WithAct, WithBn

#: By what a float module computes, and by what a QAT class of a user's says that it computes something else.
_FORWARD = ("forward", "_conv_forward", "_output_padding")
_SAYING = frozenset({"effective_weight", "op", "compute", "train_compute", "forward"})
_NORMS = (*NORMS_1D, *NORMS_2D, *NORMS_3D)


@dataclasses.dataclass(frozen=True)
class Patterns:
    """An immutable set of fused classes and QAT classes; each class states its own chain or float class.

    Args:
        fused: subclasses of ``eagerq.nn.intrinsic.Fused``; each names its chain of types.
        qat: QAT classes; each names the float or fused class it converts.
        activations: types that stand, beside PyTorch's own, wherever a chain takes any elementwise activation.
        only: the chains to fuse; None for all that the fused classes state.

    Raises:
        PatternError: if two fused classes claim one chain, two QAT classes one float class, a class states none, or a QAT
            class has not the bases that its chain wants.
    """

    fused: tuple[type[Fused], ...]
    qat: tuple[type[QATBase], ...] = ()
    activations: tuple[type[nn.Module], ...] = ()

    only: frozenset[tuple[type, ...]] | None = None

    def __post_init__(self) -> None:
        for cls in self.fused:
            if not (isinstance(cls, type) and issubclass(cls, Fused) and cls.chain):
                raise PatternError(
                    f"a fused class is a subclass of eagerq.nn.intrinsic.Fused with a chain, found {cls!r};"
                    " write class MyFused(Fused, chain=(MyConv, nn.BatchNorm2d))."
                )
        for qat in self.qat:
            if not (isinstance(qat, type) and issubclass(qat, QATBase)) or qat._FLOAT_MODULE is nn.Module:
                raise PatternError(
                    f"a QAT class is a subclass of eagerq.nn.qat.QATBase that converts a float class, found {qat!r};"
                    " write class MyConvQAT(nnqat.Conv2d, converts=MyConv)."
                )
            wrong = _misbuilt(qat)
            if wrong is not None:
                raise PatternError(f"{type_name(qat)}, which converts {type_name(qat._FLOAT_MODULE)}, {wrong}.")
        self.chains, self.converts  # noqa: B018  refuses conflicts now, not at first use

    @property
    def chains(self) -> Mapping[tuple[type, ...], type[Fused]]:
        """Each chain of exact types with its fused class."""
        return _chains(self, integrations.activations())

    @property
    def converts(self) -> Mapping[type, type[QATBase]]:
        """Each float or fused class with the QAT class that converts it."""
        return _converts(self)

    def extended(self, *classes: type[nn.Module], activations: Iterable[type[nn.Module]] = ()) -> Patterns:
        """A new ``Patterns`` with more fused and QAT classes (in any order) and activation types.

        Raises:
            PatternError: if one conflicts with what is here.
        """
        fused, qat = _sorted(classes)
        return Patterns((*self.fused, *fused), (*self.qat, *qat), (*self.activations, *activations), self.only)

    def replacing(self, *classes: type[nn.Module]) -> Patterns:
        """A new ``Patterns`` where these classes take the place of those that claim the same chain or float class."""
        fused, qat = _sorted(classes)
        extra = integrations.activations()
        claimed = {chain for cls in fused for chain in self._exact_chains(cls, extra)}
        floats = {cls._FLOAT_MODULE for cls in qat}
        kept = tuple(cls for cls in self.fused if not claimed.intersection(self._exact_chains(cls, extra)))
        kept_qat = tuple(cls for cls in self.qat if cls._FLOAT_MODULE not in floats)
        return Patterns((*kept, *fused), (*kept_qat, *qat), self.activations, self.only)

    def _exact_chains(self, cls: type[Fused], extra: tuple[type[nn.Module], ...]) -> Iterator[tuple[type[nn.Module], ...]]:
        """The chains of exact types ``cls`` stands for; nn.Module in an entry opens it to further activations."""
        more = dict.fromkeys((*self.activations, *extra))
        entries = [
            dict.fromkeys((*(t for t in types if t is not nn.Module), *(more if nn.Module in types else ())))
            for types in cls.chain
        ]
        return itertools.product(*entries)

    def selecting(self, chains: Iterable[Sequence[type[nn.Module]]]) -> Patterns:
        """A new ``Patterns`` that fuses only the given chains of exact types.

        Raises:
            PatternError: if there are none, or one is unknown.
        """
        known = self.chains
        wanted = [tuple(chain) for chain in chains]
        if not wanted:
            raise PatternError("patterns are empty; pass None for eagerq.DEFAULT_PATTERNS, or name at least one chain.")
        for chain in wanted:
            if chain not in known:
                near = sorted({chain_name(k) for k in known if k[:1] == chain[:1]})
                hint = f" Known chains that begin so: {'; '.join(near[:8])}." if near else ""
                raise PatternError(
                    f"no fused class is known for the chain {chain_name(chain)}.{hint}"
                    " Add one with eagerq.DEFAULT_PATTERNS.extended(YourFusedClass)."
                )
        return dataclasses.replace(self, only=frozenset(wanted))

    def __repr__(self) -> str:
        return f"Patterns({len(self.fused)} fused classes, {len(self.qat)} QAT classes, {len(self.chains)} chains)"


@functools.lru_cache(maxsize=64)
def _chains(patterns: Patterns, extra: tuple[type[nn.Module], ...]) -> Mapping[tuple[type, ...], type[Fused]]:
    table: dict[tuple[type, ...], type[Fused]] = {}
    for cls in patterns.fused:
        for chain in patterns._exact_chains(cls, extra):
            other = table.setdefault(chain, cls)
            if other is not cls:
                raise PatternError(
                    f"{chain_name(chain)} is claimed by both {type_name(other)} and {type_name(cls)};"
                    " use Patterns.replacing to put one in the place of the other."
                )
    only = patterns.only
    return types.MappingProxyType(table if only is None else {k: v for k, v in table.items() if k in only})


@functools.lru_cache(maxsize=64)
def _converts(patterns: Patterns) -> Mapping[type, type[QATBase]]:
    table: dict[type, type[QATBase]] = {}
    for qat in patterns.qat:
        other = table.setdefault(qat._FLOAT_MODULE, qat)
        if other is not qat:
            raise PatternError(
                f"{type_name(qat._FLOAT_MODULE)} is converted by both {type_name(other)} and {type_name(qat)};"
                " use Patterns.replacing to put one in the place of the other."
            )
    return types.MappingProxyType(table)


def chain_name(chain: Sequence[type]) -> str:
    """``Conv2d + BatchNorm2d + ReLU``."""
    return " + ".join(getattr(t, "__name__", repr(t)) for t in chain)


def _sorted(classes: Iterable[Any]) -> tuple[list[type[Fused]], list[type[QATBase]]]:
    fused: list[type[Fused]] = []
    qat: list[type[QATBase]] = []
    for cls in classes:
        if isinstance(cls, type) and issubclass(cls, Fused):
            fused.append(cls)
        elif isinstance(cls, type) and issubclass(cls, QATBase):
            qat.append(cls)
        else:
            raise PatternError(f"a pattern is a subclass of eagerq.nn.intrinsic.Fused or eagerq.nn.qat.QATBase, found {cls!r}.")
    return fused, qat


def _misbuilt(cls: type[QATBase]) -> str | None:
    """What is wrong with the bases of a class that takes a chain apart by mixins; None for one that does so by itself."""
    chain = getattr(cls._FLOAT_MODULE, "chain", ())
    adopting = [c for c in cls.__mro__ if "_adopt" in vars(c)]
    converts_itself = next(c for c in cls.__mro__ if "from_float" in vars(c)) is not QATBase
    if not chain or converts_itself or not issubclass(cls, QATOp) or not {*adopting} <= {WithAct, WithBn, QATOp, QATBase}:
        return None
    mixins = [c for c in adopting if c in (WithAct, WithBn)]
    if len(mixins) != len(chain) - 1:
        found = ", ".join(c.__name__ for c in mixins) or "none"
        return f"wants a WithAct or WithBn for each of the {len(chain) - 1} members behind the chain's first, found {found}"
    for mixin, types_ in zip(mixins, reversed(chain), strict=False):
        norms = any(issubclass(t, _NORMS) for t in types_)
        if norms if mixin is WithAct else any(t in ELEMENTWISE for t in types_):
            return f"takes {types_[0].__name__} for its {mixin.__name__}; name mixins from the chain's last member to its second"
    hosts = [c._FLOAT_MODULE for c in cls.__mro__ if issubclass(c, QATOp) and "_FLOAT_MODULE" in vars(c)]
    if any(not c.__module__.startswith(("eagerq.", "torch.")) and _SAYING & {*vars(c)} for c in cls.__mro__):
        return None  # it says by itself what it computes
    if nn.Conv2d in hosts:
        hosts.append(Conv2dSame)  # every convolution takes over how it pads
    for t in chain[0]:
        if t not in hosts and not any(all(getattr(t, n, None) is getattr(h, n, None) for n in _FORWARD) for h in hosts):
            return f"wants the QAT form of {type_name(t)}, whose forward is its own, among its bases"
    return None


def _public(module: ModuleType) -> tuple[Any, ...]:
    return tuple(getattr(module, name) for name in module.__all__)


#: Every class of ``eagerq.nn.intrinsic``, ``eagerq.nn.qat`` and ``eagerq.nn.intrinsic.qat``.
DEFAULT_PATTERNS = Patterns(
    tuple(cls for cls in _public(nni) if cls.chain),
    tuple(cls for cls in (*_public(nnqat), *_public(nniqat)) if cls._FLOAT_MODULE is not nn.Module),
)


def parse_patterns(patterns: Any, default: Patterns) -> tuple[Patterns, list[list[str]] | None]:
    """What ``patterns`` stands for: a ``Patterns``, and the chains listed by module name, if they are.

    Raises:
        PatternError: if it is empty, mixed or of another form.
    """
    if patterns is None:
        return default, None
    if isinstance(patterns, Patterns):
        if not patterns.chains:
            raise PatternError("patterns are empty; pass None for eagerq.DEFAULT_PATTERNS, or name at least one chain.")
        return patterns, None
    wanted = "patterns are a Patterns, tuples of module types, or lists of module names"
    if isinstance(patterns, (str, bytes, Mapping)):
        raise PatternError(f"{wanted}; found a {type(patterns).__name__}.")
    try:
        entries = list(patterns)
    except TypeError:
        raise PatternError(f"{wanted}; found {type(patterns).__name__}.") from None
    if not entries:
        raise PatternError("patterns are empty; pass None for eagerq.DEFAULT_PATTERNS, or name at least one chain.")
    if all(isinstance(e, (str, type)) for e in entries):
        entries = [entries]  # one chain, given bare
    chains: list[list[Any]] = []
    for entry in entries:
        if isinstance(entry, (str, bytes)) or not isinstance(entry, Sequence):
            raise PatternError(f"{wanted}; found {entry!r} among them.")
        chains.append(list(entry))
    if all(chain and all(isinstance(x, str) for x in chain) for chain in chains):
        return default, chains
    for chain in chains:
        for item in chain:
            if not (isinstance(item, type) and issubclass(item, nn.Module)):
                raise PatternError(f"{wanted}, not mixed; found {item!r} in {chain!r}.")
    return default.selecting(chains), None
