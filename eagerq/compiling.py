"""What ``torch.compile`` need not look at again in each step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from eagerq.nn.qat.base import QATBase
from eagerq.quant import FakeQuantize

#: Dynamo's guards on what a module is made of, as opposed to the values that it was set to.
_STRUCTURE = frozenset(
    {
        "DICT_CONTAINS",
        "DICT_KEYS_MATCH",
        "DICT_LENGTH",
        "DICT_NOT_CONTAINS",
        "NOT_PRESENT_IN_GENERIC_DICT",
        "SEQUENCE_LENGTH",
        "TYPE_MATCH",
    }
)
_LIBRARIES = ("eagerq.", "torch.nn.")
_ENDS = re.compile(r"[.\[)]|$")
#: Of a module's class PyTorch 2.11 asks in another form: ``dict(type(module).__mro__[0].__dict__)``.
_OF_CLASS = re.compile(r"^(?:dict\()?type\(")


def guard_filter(guards: Sequence[Any]) -> list[bool]:
    """Which of its guards a compiled QAT model keeps: ``torch.compile(qat, options={"guard_filter_fn": eagerq.guard_filter})``.

    Before each step compiled code looks at all that it was traced with, which in a QAT model is some hundred things a module and
    can take longer than to launch its kernels. Of eagerq's own modules, and PyTorch's that these hold, this drops the guards on
    structure: that no method was replaced and no part exchanged, and what dtype, shape and device buffers have. Values stay
    guarded (mode, observers, fake quantization, frozen statistics, momentum), as do parameters, hooks, and modules of the user's
    own, wherever they are. With CUDA graphs: ``options={"triton.cudagraphs": True, "guard_filter_fn": eagerq.guard_filter}``,
    a new dict for each call, since ``torch.compile`` takes the filter out of the one it is given.

    After the first compiled step exchange no part or method of a QAT module, and give no buffer of it alone another dtype; or
    call ``torch.compiler.reset()``.

    Args:
        guards: ``torch._dynamo.types.GuardFilterEntry``, as ``torch.compile`` gives them.

    Returns:
        whether to keep each.
    """
    modules = {guard.name: guard.value for guard in guards if isinstance(guard.value, nn.Module)}
    return [not (_is_structural(guard) and _is_ours(guard.name, modules)) for guard in guards]


def _is_structural(guard: Any) -> bool:
    if guard.guard_type == "TENSOR_MATCH":
        return "_buffers[" in guard.name
    if guard.guard_type == "DUPLICATE_INPUT":  # that two objects are one: of tensors it decides what gradients there are
        return "_parameters[" not in guard.name and "_buffers[" not in guard.name
    return guard.guard_type in _STRUCTURE and "_hooks" not in guard.name


def _is_ours(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a source is what a QAT module holds, and no module of the user's own, or what such a one holds."""
    name = _OF_CLASS.sub("", name)
    holders = [modules[path] for end in _ENDS.finditer(name) if (path := name[: end.start()]) in modules]
    qat = any(isinstance(module, (QATBase, FakeQuantize)) for module in holders)
    return qat and str(type(holders[-1]).__module__).startswith(_LIBRARIES)
