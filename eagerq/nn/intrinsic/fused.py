"""What every nni module shares: a checked chain in an ``nn.Sequential``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from eagerq.errors import PatternError
from eagerq.nn.modules.batchnorm import HoldsNorm

Alternatives = tuple[type[nn.Module], ...]


def type_name(cls: type) -> str:
    """The full path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def misfit(cls: type[Fused], members: Sequence[nn.Module]) -> str | None:
    """What these modules are beside the chain of ``cls`` (what it wants, what was found), or None if they are its members."""
    if len(members) != len(cls.chain):
        return f"{cls.__name__} wants {len(cls.chain)} modules, found {len(members)}"
    for i, (member, types) in enumerate(zip(members, cls.chain, strict=True)):
        if not isinstance(member, types):
            return (
                f"{cls.__name__} wants {' or '.join(t.__name__ for t in types)} as member {i}, found {type_name(type(member))}"
            )
    return None


class Fused(nn.Sequential):
    """A chain of modules that integer hardware runs as one; computes what the chain computes.

    A subclass names its chain in the class line: one entry a member, each a type or a tuple of
    alternative types. ``class MyConvBn2d(Fused, chain=(MyConv2d, NORMS_2D))`` is a whole pattern.

    The first member's attributes can be read from the fused module (``fused.weight``,
    ``fused.out_channels``), since it stands in the first member's place.

    Raises:
        PatternError: if the modules given are not of the chain's types.
    """

    chain: ClassVar[tuple[Alternatives, ...]] = ()

    def __init_subclass__(cls, chain: tuple[Any, ...] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if chain is not None:
            cls.chain = tuple(entry if isinstance(entry, tuple) else (entry,) for entry in chain)

    def __init__(self, *members: nn.Module) -> None:
        wrong = misfit(type(self), members)
        if wrong is not None:
            raise PatternError(f"{wrong}; pass such modules or use another fused class.")
        super().__init__(*members)
        self.training = any(member.training for member in members)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            first = self.__dict__.get("_modules", {}).get("0")
            if first is None or name.startswith("__") or name.isdigit():  # digits are the chain's own members
                raise
            return getattr(first, name)

    def __setattr__(self, name: str, value: Any) -> None:
        first = self.__dict__.get("_modules", {}).get("0")
        if first is not None and name not in self.__dict__ and not hasattr(type(self), name) and hasattr(first, name):
            setattr(first, name, value)  # what is read from the first member is written there too
        else:
            super().__setattr__(name, value)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the chain; further arguments go to the first member (``output_size`` of a ConvTranspose)."""
        first, *rest = self
        value = first(input, *args, **kwargs)
        for member in rest:
            value = member(value)
        return value


class FusedNorm(HoldsNorm, Fused):
    """A fused chain with a batch norm as member ``norm_index``.

    A norm that is in eval mode beside a first member in train mode is frozen, and stays so.
    """

    norm_index: ClassVar[int] = 1

    def __init__(self, *members: nn.Module) -> None:
        super().__init__(*members)
        self.freeze_bn = self.training and not self.norm().training

    def norm(self) -> nn.Module:
        return self[self.norm_index]
