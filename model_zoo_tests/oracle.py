"""Which chains truly exist, by another mechanism than eagerq's: torch.fx's graph of the model.

In tests only. It serves for the models torch.fx can trace, which eagerq does not need.
"""

from __future__ import annotations

from collections import Counter

import timm.layers
import torch
import torch.fx
from timm.layers import activations
from torch import nn

CONVS = (nn.Conv2d, timm.layers.Conv2dSame)
OPS = (*CONVS, nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, timm.layers.Linear)
ACTS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
    nn.Sigmoid, nn.Tanh, nn.Softplus,
    *(c for c in vars(activations).values() if isinstance(c, type) and issubclass(c, nn.Module)),
)  # fmt: skip
IDEMPOTENT = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
LEAVES = (*OPS, *ACTS, nn.BatchNorm2d, timm.layers.BatchNormAct2d, timm.layers.DropPath)


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in LEAVES or super().is_leaf_module(m, module_qualified_name)


def true_chains(model: nn.Module) -> set[tuple[str, ...]]:
    """Names of every op -> norm -> activation, op -> norm, op -> activation and norm -> ReLU chain, longest first."""
    graph = _Tracer().trace(model)
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    taken: set[str] = set()
    chains: set[tuple[str, ...]] = set()

    def reader(node: torch.fx.Node) -> torch.fx.Node | None:
        """The one module that alone reads ``node``, identities aside."""
        while True:
            users = list(node.users)
            if len(users) != 1 or users[0].op != "call_module" or users[0].all_input_nodes != [node]:
                return None
            node = users[0]
            if type(modules[node.target]) is not nn.Identity:
                return node

    def kind(node: torch.fx.Node) -> tuple[str, bool]:
        """op, norm, norm+act or act; and whether this is the module's only call."""
        module, once = modules[node.target], calls[node.target] == 1
        if type(module) in OPS:
            return "op", once
        if type(module) is nn.BatchNorm2d:
            return "norm", once
        if type(module) is timm.layers.BatchNormAct2d:
            return ("norm" if type(module.act) is nn.Identity else "norm+act"), once
        if type(module) in ACTS:
            return "act", once or type(module) in IDEMPOTENT
        return "other", once

    nodes = [node for node in graph.nodes if node.op == "call_module"]
    for first in ("op", "norm"):
        for node in nodes:
            if kind(node) == ("norm+act", True) and first == "norm" and node.target not in taken:
                if type(modules[node.target].act) is nn.ReLU:
                    chains.add((node.target,))
                continue
            if kind(node) != (first, True) or node.target in taken:
                continue
            names, at, state = [node.target], node, first
            while state in ("op", "norm"):
                following = reader(at)
                if following is None:
                    break
                what, usable = kind(following)
                fits = what in ("norm", "norm+act", "act") if state == "op" else what == "act"
                if state == "op" and type(modules[names[0]]) in (nn.Linear, timm.layers.Linear) and what != "act":
                    fits = False  # on tokens a norm's channel axis is not the features' axis
                if first == "norm" and fits:
                    fits = type(modules[following.target]) is nn.ReLU
                if not fits or not usable or following.target in taken:
                    break
                names.append(following.target)
                at, state = following, what
            if len(names) > 1:
                chains.add(tuple(names))
                taken.update(n for n in names if calls[n] == 1)
    return chains
