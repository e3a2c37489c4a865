"""Loading checkpoints: a float model's, eagerq's own at any stage, torch.ao's of the same classes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eagerq.checks import check_model
from eagerq.errors import CheckpointError
from eagerq.surgery import full_copy

_NESTED = ("state_dict", "model_state_dict", "model", "state_dict_ema", "ema_state_dict")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")


def load_checkpoint(model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = True) -> nn.Module:
    """Load a state_dict into ``model`` and return it; if anything does not fit, the model is as it was.

    Keys may be those of the float model before fusing, of the fused or of the QAT model, and
    torch.ao's for the same classes. A checkpoint without quantizer state leaves the quantizers alone.

    Args:
        model: float, fused or QAT model.
        source: a file written by ``torch.save`` (read with ``weights_only=True``), or a state_dict; either may
            hold it under ``"state_dict"`` or ``"model"``, and behind ``module.`` of a parallel wrapper.
        strict: every key of the model must be there and no other.

    Raises:
        CheckpointError: if the file is missing, damaged or holds more than tensors, or the keys or
            shapes are another architecture's.
    """
    check_model(model)
    state = dict(_state(source))
    for trial in (full_copy(model), model):
        try:
            trial.load_state_dict(state, strict=strict)
        except (RuntimeError, TypeError, ValueError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise CheckpointError(
                f"wanted a checkpoint of {type(model).__name__}, found one that does not fit: {' '.join(lines[1:4])[:600]}"
                " Pass one of the same architecture, or strict=False to load what fits."
            ) from error
    return model


def _state(source: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Tensor]:
    where = "the mapping"
    if not isinstance(source, Mapping):
        where = os.fspath(source)
        try:
            source = torch.load(source, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise CheckpointError(f"wanted a checkpoint at {where}, found no file; check the path.") from error
        except Exception as error:
            raise CheckpointError(
                f"{where} is damaged or holds more than tensors: reading it with weights_only=True raises {type(error).__name__}."
                " Save it again with torch.save(model.state_dict(), path)."
            ) from error
    for key in _NESTED:
        if isinstance(source, Mapping) and isinstance(source.get(key), Mapping):
            source = source[key]
            break
    if not isinstance(source, Mapping) or not source or not all(isinstance(v, Tensor) for v in source.values()):
        raise CheckpointError(f"wanted a state_dict of tensors in {where}, found {type(source).__name__} of something else.")
    state: Mapping[str, Tensor] = source
    for prefix in _WRAPPER_PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
