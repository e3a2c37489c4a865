"""What ``torch.compile`` need not look at again in each step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from eagerq.nn.qat.base import QATBase
from eagerq.quant import FakeQuantize

#: Dynamo's guards on what a module is made of, as opposed to the values that it was set to.
_STRUCTURE = frozenset(
    {
        "DICT_CONTAINS",
        "DICT_KEYS_MATCH",
        "DICT_LENGTH",
        "DICT_NOT_CONTAINS",
        "DUPLICATE_INPUT",
        "EMPTY_NN_MODULE_HOOKS_DICT",
        "NOT_PRESENT_IN_GENERIC_DICT",
        "SEQUENCE_LENGTH",
        "TYPE_MATCH",
    }
)
_ENDS = re.compile(r"[.\[]|$")


def guard_filter(guards: Sequence[Any]) -> list[bool]:
    """Which of its guards a compiled QAT model keeps: ``torch.compile(qat, options={"guard_filter_fn": eagerq.guard_filter})``.

    Before each step compiled code looks at all that it was traced with, which in a QAT model is some hundred things a module and
    can take longer than to launch its kernels. Of eagerq's own modules this drops the guards on structure: that no method was
    replaced and no part exchanged, and what dtype, shape and device buffers have. Values that training code switches stay
    guarded (mode, observers, fake quantization, frozen statistics, momentum), as do parameters and all that is not eagerq's.
    With CUDA graphs: ``options={"triton.cudagraphs": True, "guard_filter_fn": eagerq.guard_filter}``.

    After the first compiled step exchange no part or method of a QAT module, and give no buffer of it alone another dtype; or
    call ``torch.compiler.reset()``.

    Args:
        guards: ``torch._dynamo.types.GuardFilterEntry``, as ``torch.compile`` gives them.

    Returns:
        whether to keep each.
    """
    ours = {guard.name for guard in guards if isinstance(guard.value, (QATBase, FakeQuantize))}
    return [not (_is_structural(guard) and _is_of(guard.name, ours)) for guard in guards]


def _is_structural(guard: Any) -> bool:
    return guard.guard_type in _STRUCTURE or (guard.guard_type == "TENSOR_MATCH" and "_buffers[" in guard.name)


def _is_of(name: str, modules: set[str]) -> bool:
    """Whether a source is one of these modules or what one holds."""
    return any(name[: end.start()] in modules for end in _ENDS.finditer(name))
