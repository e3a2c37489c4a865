"""The errors eagerq raises. Each is also the builtin a caller would catch."""

from __future__ import annotations


class EagerqError(Exception):
    """Base of every error eagerq raises; its text says what was wanted, what was found and what to do."""


class ModelError(EagerqError, TypeError):
    """The object handed over is not a model eagerq can work on."""


class PatternError(EagerqError, ValueError):
    """A pattern is empty, in conflict with another, or names a type, chain or module nobody knows."""


class InputsError(EagerqError, ValueError):
    """``example_inputs`` are of no known form, or the model rejects them."""


class SpecError(EagerqError, ValueError):
    """A quantization spec, qconfig or preset makes no sense, or a rule of one matches nothing."""


class StateError(EagerqError, RuntimeError):
    """The model is not in the state the call needs (converted twice, never observed, ...)."""


class GuardError(EagerqError, RuntimeError):
    """Within ``eagerq.guard``, a forward went a way that a fused chain does not survive."""


class CheckpointError(EagerqError, RuntimeError):
    """A checkpoint is damaged, or belongs to another architecture."""


class ExportError(EagerqError, RuntimeError):
    """The model cannot be written as ONNX."""


class MissingExtraError(EagerqError, ImportError):
    """An optional dependency is absent; the text names the pip command that brings it."""
