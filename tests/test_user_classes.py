"""QAT classes of a user's own whose bases are not what their chain wants are refused where patterns are made."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

import eagerq
from eagerq.errors import PatternError
from eagerq.nn import qat as nnqat
from eagerq.nn.intrinsic import Fused
from eagerq.nn.intrinsic.qat import WithAct, WithBn


class Doubled(nn.Conv2d):
    """A float module of a user's own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, 2 * self.weight, self.bias, self.stride, self.padding)


class Plain(nn.Conv2d):
    """One that computes what its base does."""


class QATDoubled(nnqat.Conv2d, converts=Doubled):
    def effective_weight(self) -> Tensor:
        return 2 * self.weight


CHAINS = {
    "norm": (nn.BatchNorm2d,),
    "activation": (nn.ReLU,),
    "both": (nn.BatchNorm2d, nn.ReLU),
}
WANTED = {"norm": (WithBn,), "activation": (WithAct,), "both": (WithAct, WithBn)}
MIXINS = [(), (WithAct,), (WithBn,), (WithAct, WithBn), (WithBn, WithAct)]


def built(chain: str, mixins: Any, host: type, first: type = Doubled) -> Any:
    fused: Any = type("MyFused", (Fused,), {}, chain=(first, *CHAINS[chain]))
    return fused, type("MyQAT", (*mixins, host), {}, converts=fused)


@pytest.mark.parametrize("host", [QATDoubled, nnqat.Conv2d])
@pytest.mark.parametrize(("chain", "mixins"), itertools.product(CHAINS, MIXINS))
def test_a_class_is_taken_if_its_bases_are_those_of_its_chain(chain: str, mixins: Any, host: type) -> None:
    fused, qat = built(chain, mixins, host)
    if (mixins, host) == (WANTED[chain], QATDoubled):
        assert eagerq.DEFAULT_PATTERNS.extended(fused, qat, QATDoubled).converts[fused] is qat
        return
    with pytest.raises(PatternError, match=r"MyQAT.*(WithAct|WithBn|QAT form of .*Doubled)"):
        eagerq.DEFAULT_PATTERNS.extended(fused, qat, QATDoubled)


def test_a_subclass_that_computes_the_same_needs_no_base_of_its_own() -> None:
    fused, qat = built("both", (WithAct, WithBn), nnqat.Conv2d, Plain)
    assert eagerq.DEFAULT_PATTERNS.extended(fused, qat).converts[fused] is qat


class Adopting(WithAct, nnqat.Conv2d):
    """One that takes its chain apart by itself."""

    def _adopt(self, members: list[nn.Module]) -> None:
        super()._adopt([members[0], members[2]])


def test_a_class_that_takes_its_chain_apart_by_itself_may() -> None:
    fused, qat = built("both", (), Adopting, nn.Conv2d)
    assert eagerq.Patterns((fused,), (qat,)).converts[fused] is qat


class Computing:
    """A mixin that says what is computed."""

    weight: Tensor

    def effective_weight(self) -> Tensor:
        return 2 * self.weight


def test_a_class_may_say_what_it_computes_without_a_host_of_its_own() -> None:
    fused, qat = built("both", (WithAct, Computing, WithBn), nnqat.Conv2d)
    assert eagerq.DEFAULT_PATTERNS.extended(fused, qat).converts[fused] is qat


class ByItself(nnqat.Conv2d):
    @classmethod
    def from_float(cls, mod: Any, qconfig: Any = None) -> Any:
        return nnqat.Conv2d.from_float(mod[0], qconfig)


def test_a_class_may_convert_by_itself() -> None:
    fused, qat = built("both", (), ByItself)
    assert eagerq.DEFAULT_PATTERNS.extended(fused, qat).converts[fused] is qat


class Within(nn.Conv2d):
    """One that computes something else by a method of its base."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        return super()._conv_forward(x, weight.abs(), bias)


def test_a_method_that_the_forward_calls_counts_too() -> None:
    fused, qat = built("both", (WithAct, WithBn), nnqat.Conv2d, Within)
    with pytest.raises(PatternError, match=r"QAT form of .*Within"):
        eagerq.DEFAULT_PATTERNS.extended(fused, qat)
