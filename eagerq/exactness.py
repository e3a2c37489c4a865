"""``exact_mode``: a model's eval forward in an integer engine's own arithmetic."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from eagerq.errors import SpecError, StateError
from eagerq.nn import int8, integer
from eagerq.nn.qat.base import QATOp
from eagerq.nn.quantized import QuantizedModule, is_deployed, is_qat
from eagerq.quant import code_values
from eagerq.quant.codes import decode
from eagerq.quant.engine import EngineProfile, FollowsEngine, get_profile
from eagerq.tables import table

#: What ``exact_mode`` computes with.
KERNELS = ("float", "int8")


@dataclasses.dataclass
class ExactRun:
    """What ran in float inside ``exact_mode``. Printing it gives a table.

    Attributes:
        profile: the engine followed.
        floats: how often each function ran on real values though it was given codes, by (function, module).
        refused: linear maps whose exact sums were computed in floating point though ``kernels`` was ``"int8"``, by module:
            the reason. Their codes are the same.
    """

    profile: EngineProfile
    floats: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        rows = [(name, module or "(model)", str(n)) for (name, module), n in self.floats.items()]
        text = table(("function", "module", "times in float"), rows)
        if self.refused:
            text += "\n" + table(("no integer kernel for", "because"), [(n or "(model)", why) for n, why in self.refused.items()])
        return text


@contextlib.contextmanager
def exact_mode(model: nn.Module, profile: EngineProfile | str = "onnxruntime-x64", kernels: str = "float") -> Iterator[ExactRun]:
    """Inside, the eval forward of a QAT or deployed model computes the codes that the engine computes.

    Quantizers give tensors that carry codes, and the model's own forward takes them along: linear maps, add, mul, ReLU,
    ReLU6 and other clips, max pooling, global average pooling, concatenation, nearest interpolation and whatever moves
    values without changing them. Any other function runs on real values and is listed. Outputs are plain tensors.
    Gradients do not flow. Modules in train mode do as always. Compiled models run eagerly. What is written in place is seen by
    every tensor that shares the memory; where another one does, those go on in real values.

    Args:
        model: QAT or deployed, called as a whole inside.
        profile: an ``EngineProfile`` or its name.
        kernels: ``"float"`` holds codes in float32 and sums them in float32, or float64 where that is not exact.
            ``"int8"`` computes the same codes in less memory on CPUs: codes between modules are one byte each, a
            deployed model's weights stay int8, and convolutions and matrix products run in PyTorch's integer kernels.
            What those do not take (transposed convolutions; everything on x86 processors without VNNI) is summed as
            with ``"float"``, and listed.

    Yields:
        An ``ExactRun``, which lists what ran in float.

    Raises:
        StateError: for a float model, or one of another dtype than float32.
        SpecError: for an unknown profile or other kernels.
    """
    engine = get_profile(profile)
    if kernels not in KERNELS:
        raise SpecError(f"wanted kernels of {' or '.join(map(repr, KERNELS))}, found {kernels!r}.")
    if kernels != engine.kernels:
        engine = dataclasses.replace(engine, kernels=kernels)
    if not (is_qat(model) or is_deployed(model)):
        raise StateError("wanted a QAT or deployed model, found a float one; call eagerq.convert_qat first.")
    followers = [m for m in model.modules() if isinstance(m, FollowsEngine)]
    for module in followers:
        dtype = _dtype_of(module)
        if dtype not in (None, torch.float32):
            raise StateError(f"wanted a float32 model, as the engine's file is, found {dtype}; call .float() on a copy of it.")
    run = ExactRun(engine)
    names = {module: name for name, module in model.named_modules()}
    inside: list[str] = []

    def enter(module: nn.Module, args: Any) -> None:
        inside.append(names.get(module, inside[-1] if inside else ""))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if inside:
            inside.pop()

    def note(function: str) -> None:
        run.floats[function, inside[-1] if inside else ""] += 1

    def refuse(reason: str) -> None:
        run.refused[inside[-1] if inside else ""] = reason

    before = code_values.on_float, integer.on_refusal
    profiles = [module.profile for module in followers]
    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
        model.register_forward_hook(_plain),
    ]
    dynamo = sys.modules.get("torch._dynamo")  # compiled code would round elsewhere than the engine
    eager: Any = contextlib.nullcontext() if dynamo is None else torch.compiler.set_stance("force_eager")
    try:
        code_values.on_float, integer.on_refusal = note, refuse
        for module in followers:
            module.profile = engine
        with eager:
            yield run
    finally:
        code_values.on_float, integer.on_refusal = before
        for module, profile_before in zip(followers, profiles, strict=True):
            if profile_before is None:
                del module.profile
            else:
                module.profile = profile_before
        int8.forget(followers)
        for handle in handles:
            handle.remove()


def _plain(module: nn.Module, args: Any, output: Any) -> Any:
    return decode(output)


def _dtype_of(module: Any) -> torch.dtype | None:
    if isinstance(module, QuantizedModule):
        return module.dtype
    return module.weight.dtype if isinstance(module, QATOp) else None
