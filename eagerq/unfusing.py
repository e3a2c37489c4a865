"""Give back the float model that a fused one was made of."""

from __future__ import annotations

from torch import nn

from eagerq import integrations
from eagerq.checks import check_model
from eagerq.errors import StateError
from eagerq.guarding import stop_guarding
from eagerq.nn.intrinsic.fused import Fused, misfit
from eagerq.nn.modules.hooks import POST_HOOKS, PRE_HOOKS, share_hooks
from eagerq.nn.quantized import is_deployed, is_qat
from eagerq.plan import Match
from eagerq.record import Record, detach, records_in
from eagerq.surgery import BOOKKEEPING, all_or_nothing, full_copy, replace_modules


def unfuse_modules(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The float model again: the modules that ``fuse_modules`` fused, each at its own name.

    Types, names, Parameter objects, state_dict keys and their order, hooks and modes are those of the
    model before it was fused, once or several times. What was done since is kept: training,
    ``requires_grad_``, ``.to(...)``, ``eval()``, ``load_state_dict``. Hooks registered on a fused module since go
    to the ends of its chain, those before the forward to its first module, the others to its last.

    Args:
        inplace: change ``model`` itself rather than a copy.

    Raises:
        ModelError: for something that is no eager model.
        StateError: for a QAT or deployed model, one without a record of ``fuse_modules``, or a chain
            that was changed since so that it cannot be taken apart (members put in or taken out, attributes, parameters
            or buffers put on a fused module or a placeholder); the model is then as it was.
    """
    check_model(model)
    if is_qat(model) or is_deployed(model):
        kind = "deployed" if is_deployed(model) else "QAT"
        remedy = (
            "keep the fused or QAT model"
            if kind == "deployed"
            else "build the float model and load eagerq.float_state_dict(model) into it"
        )
        raise StateError(f"wanted a fused float model, found a {kind} one, which has no float modules to give back; {remedy}.")
    if not any(True for _ in records_in(model)):
        raise StateError(
            f"wanted a fused model, found a {type(model).__name__} without a record of fuse_modules, so the names of its"
            " modules are not known; pass the model that fuse_modules returned."
        )
    model = model if inplace else full_copy(model)
    records = list(records_in(model))
    originals = [original for _, _, record in records for original in record.originals.values()]
    with all_or_nothing(model, *originals):
        for module in model.modules():
            stop_guarding(module)
        for _, holder, record in records:
            unfused = _unfused(holder, record)
            if holder is model:
                model = unfused
            else:
                replace_modules(model, {holder: unfused})
    return model


def _unfused(model: nn.Module, record: Record) -> nn.Module:
    """``model`` with the chains of its record taken apart, the last fused first."""
    there = dict(model.named_modules(remove_duplicate=False))
    now = dict(there)
    detach(model)
    for match in reversed(record.matches):
        if any(name in now for name in match.names):  # else the part they were in is gone
            now.update(_apart(now, match, record))
    new = {there[name]: module for name, module in now.items() if module is not there[name]}
    return replace_modules(model, new)


def _apart(now: dict[str, nn.Module], match: Match, record: Record) -> dict[str, nn.Module]:
    """The modules of one chain by name."""
    chain = " + ".join(match.names)
    first = match.names[0]
    fused = now.get(first)
    if not isinstance(fused, Fused) or any(name not in now for name in match.names):
        found = "nothing" if fused is None else f"a {type(fused).__name__}"
        raise StateError(
            f"wanted the {match.fused.__name__} of {chain} at {first!r} and a module at each other name, found {found} there;"
            " it was replaced since. Put it back, or take the parts you need from the fused model."
        )
    parts = list(fused)
    wrong = misfit(match.fused, parts)
    if wrong is not None:
        raise StateError(
            f"wanted the {match.fused.__name__} of {chain} at {first!r} with the members it was made of, but {wrong}; they were"
            " changed since. Put the members back, or take the parts you need from the fused model."
        )
    _nothing_added(first, fused, match.fused(*parts))
    for name in match.names[1:]:
        if name in match.copied:
            continue
        original = record.originals.get(name)
        placeholder = (None if original is None else integrations.expand(original).rest) or nn.Identity()
        if type(now[name]) is not type(placeholder):
            raise StateError(
                f"wanted the placeholder that fusing {chain} left at {name!r}, found a {type(now[name]).__name__}, which would be"
                " lost; it was put there since. Put nn.Identity() back, or take the parts you need from the fused model."
            )
        _nothing_added(name, now[name], placeholder)
    apart: dict[str, nn.Module] = {}
    for name in match.names:
        original = record.originals.get(name)
        if original is None:
            if name not in match.copied:
                apart[name] = parts[0]
            del parts[0]
            continue
        members = integrations.expand(original).members
        for part, member in zip(parts, members, strict=False):
            if type(part) is not type(member):
                raise StateError(
                    f"wanted the {type(member).__name__} that was made of {name}, found a {type(part).__name__};"
                    " it was replaced or parametrized since. Undo that first (parametrize.remove_parametrizations)."
                )
        _carry_over(parts[0], original, {*parts, *now[name].modules()})
        apart[name] = original
        del parts[: len(members)]
    _hand_back_hooks(now, match, fused, apart)
    return apart


def _nothing_added(name: str, found: nn.Module, new: nn.Module) -> None:
    """Refuse what was put on a module that goes, beside what one has when it is ``new``."""
    added = sorted(_held(found) - _held(new))
    if added:
        raise StateError(
            f"wanted nothing on the {type(found).__name__} at {name!r} beside what fusing put there, found {', '.join(added)},"
            " which would be lost; it was put there since. Move it to a module that stays, and un-fuse then."
        )


def _held(module: nn.Module) -> set[str]:
    """The names of a module's attributes, parameters and buffers, and of the groups it has hooks on its state in."""
    hooks = {name for name in BOOKKEEPING if name.endswith("_hooks") and "state_dict" in name and vars(module).get(name)}
    return {*(vars(module).keys() - BOOKKEEPING), *module._parameters, *module._buffers, *hooks}


def _carry_over(part: nn.Module, original: nn.Module, running: set[nn.Module]) -> None:
    """Bring a module that an adapter took apart up to date with what stood in for it; ``running`` has modes of its own."""
    for name, value in vars(part).items():
        if name in vars(original) and name not in BOOKKEEPING:
            vars(original)[name] = value
    original._parameters.update(part._parameters)
    original._buffers.update(part._buffers)
    for module in original.modules():
        if module not in running:
            module.training = part.training


def _hand_back_hooks(now: dict[str, nn.Module], match: Match, fused: Fused, apart: dict[str, nn.Module]) -> None:
    """Move hooks registered since to where they see the same tensors.

    Raises:
        StateError: for those on a placeholder that would see others.
    """
    first, last = match.names[0], match.names[-1]
    _move(fused, apart[first], PRE_HOOKS, ahead=True)
    for name in match.names[1:]:
        if name in match.copied or now[name] in apart.values():
            continue
        groups = PRE_HOOKS if name == last else (*PRE_HOOKS, *POST_HOOKS)
        if any(getattr(now[name], group) for group in groups):
            raise StateError(
                f"wanted no hooks on the placeholder {name} of {' + '.join(match.names)}, found some that were registered since"
                " it was fused; un-fused they would see other tensors. Remove them, and register them again afterwards."
            )
    ends = [(first, fused)] if last in match.copied else [(first, fused), (last, now[last])]
    for name, module in ends:
        if last in apart:
            _move(module, apart[last], POST_HOOKS)
        elif any(getattr(module, group) for group in POST_HOOKS):
            raise StateError(
                f"wanted no hooks on {name}, found some on its output that were registered since it was fused; un-fused they"
                f" would go to {last}, which the model uses elsewhere too. Remove them, and register them again afterwards."
            )


def _move(source: nn.Module, target: nn.Module, groups: tuple[str, ...], ahead: bool = False) -> None:
    if source is target:
        return
    if getattr(source, groups[0]) is getattr(target, groups[0]):  # a module taken apart shared its own all along
        target._is_full_backward_hook = source._is_full_backward_hook
        return
    own = {group: list(getattr(target, group)) for group in groups}
    share_hooks(target, [source], groups)
    if ahead:
        for group, keys in own.items():
            for key in keys:
                getattr(target, group).move_to_end(key)
