"""What every verb asks of the model it is given."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from eagerq.errors import ModelError
from eagerq.nn.intrinsic.fused import type_name

_WRAPPERS = {
    "DataParallel": "pass model.module, and wrap the result again",
    "DistributedDataParallel": "pass model.module, and wrap the result again",
    "FullyShardedDataParallel": "convert first, then shard",
    "OptimizedModule": "pass the module that was given to torch.compile, and compile the result",
}
#: torch.ao's containers of functions, which compute in float until torch.ao converts them (torchvision's quantizable models).
_FLOAT_IN_AO = {"FloatFunctional"}
_FOREIGN = {
    "ScriptModule": "a scripted module has no Python forward to swap modules in",
    "GraphModule": "a graph module is what another quantizer or tracer left; pass the eager model it came from",
    "FSDPModule": "convert before fully_shard; to deploy, load its full state_dict into the same QAT model without sharding",
}


def check_model(model: Any) -> None:
    """Refuse what is no eager float (or eagerq) model.

    Raises:
        ModelError: naming what was found and what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"wanted an nn.Module, found {type(model).__name__}; pass the model itself.")
    for cls in type(model).__mro__:
        if cls.__name__ in _WRAPPERS:
            raise ModelError(f"wanted the bare model, found it wrapped in {cls.__name__}; {_WRAPPERS[cls.__name__]}.")
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "the model"
        for cls in type(module).__mro__:
            if cls.__name__ in _FOREIGN:
                raise ModelError(f"wanted eager modules, found {where} to be a {cls.__name__}: {_FOREIGN[cls.__name__]}.")
        path = type(module).__module__.split(".")
        if type(module).__name__ in _FLOAT_IN_AO:
            continue
        if path[:2] == ["torch", "ao"] and {"qat", "quantized", "fake_quantize", "observer"}.intersection(path):
            raise ModelError(
                f"wanted float modules, found {where} to be torch.ao's {type_name(type(module))};"
                " build the float model and load its weights with eagerq.load_checkpoint."
            )
        for pname, parameter in module._parameters.items():
            if is_lazy(parameter):  # type: ignore[no-untyped-call]
                raise ModelError(
                    f"wanted shaped parameters, found {name + '.' if name else ''}{pname} uninitialized (a lazy module);"
                    " run one forward first."
                )
    if next(model.parameters(), None) is None and next(model.buffers(), None) is None:
        raise ModelError(f"wanted a model with parameters, found {type(model).__name__} without any; nothing can be quantized.")
