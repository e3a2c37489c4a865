"""Moving a module's hooks to the module that takes its place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

#: What runs before the forward, and what runs on its result or its gradients.
PRE_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
POST_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def share_hooks(target: nn.Module, sources: Sequence[nn.Module], groups: tuple[str, ...]) -> None:
    """Let ``target`` run the sources' hooks, in that order.

    A lone source's dicts become the target's own, so the handles users hold still remove hooks.
    """
    found = [source for source in dict.fromkeys(sources) if any(getattr(source, group) for group in groups)]
    adopt = len(found) == 1 and not any(getattr(target, group) for group in groups)
    for source in found:
        for group in groups:
            hooks = getattr(source, group)
            if adopt:
                target.__dict__[group] = hooks
            else:
                getattr(target, group).update(hooks)
        if source._is_full_backward_hook is not None:
            target._is_full_backward_hook = source._is_full_backward_hook


def release_hooks(module: nn.Module, groups: tuple[str, ...]) -> None:
    """Take these hooks off ``module``, whose place another has taken; the dicts themselves stay as they are."""
    for group in groups:
        module.__dict__[group] = OrderedDict()
