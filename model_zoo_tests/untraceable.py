"""Models as people write them, that torch.fx, torch.export or both cannot take; and what eagerq must find in each.

A row states the chains that truly exist, the chains that must be refused and the words of the reason, and what
``torch.fx.symbolic_trace`` and ``torch.export.export`` (strict and not) make of the model in train mode. All of it is
tested, the statements about the tools included; a script can iterate ``UNTRACEABLE``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

C = 8


@dataclasses.dataclass(frozen=True)
class Says:
    """What a tool makes of a model.

    Attributes:
        kind: ``"takes"`` it; ``"refuses"`` it with an error; or gives a graph that is ``"wrong"``: it fails, or gives
            other outputs, gradients or buffers than the model, on one of the row's inputs.
        words: for ``"refuses"`` a regular expression that the error matches, for ``"wrong"`` what is wrong.
    """

    kind: Literal["takes", "refuses", "wrong"]
    words: str = ""


TAKES = Says("takes")


def refuses(words: str) -> Says:
    """It raises an error that matches ``words``."""
    return Says("refuses", words)


def wrong(words: str) -> Says:
    """It gives a graph that is not the model."""
    return Says("wrong", words)


@dataclasses.dataclass(frozen=True)
class Untraceable:
    """A row.

    Attributes:
        name: of the row.
        what: what the model does that is hard to trace.
        build: makes the model.
        inputs: the runs, each a tuple of positional or a dict of keyword arguments; they take every way through the model.
        chains: lines such as ``"conv bn relu -> ConvBnReLU2d"``, all that exist.
        skips: refused chains with words of the reason.
        fx, export, strict: what the tools say; ``strict`` is ``torch.export.export(..., strict=True)``.
        on_meta: whether shapes alone are enough to run it.
    """

    name: str
    what: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], list[Any]]
    chains: tuple[str, ...]
    skips: Mapping[str, str]
    fx: Says
    export: Says
    strict: Says
    on_meta: bool = True

    @property
    def truth(self) -> set[tuple[tuple[str, ...], str]]:
        """(names, fused class) of each chain."""
        pairs = [line.split(" -> ") for line in self.chains]
        return {(tuple(left.split()), fused) for left, fused in pairs}


def image(*shape: int, scale: float = 1.0, seed: int = 7) -> Tensor:
    """Random numbers, the same each time; (2, 3, 8, 8) unless a shape is given."""
    return torch.randn(*(shape or (2, 3, 8, 8)), generator=torch.Generator().manual_seed(seed)) * scale


def one() -> list[Any]:
    """One image batch."""
    return [(image(),)]


def conv(cin: int = C, cout: int = C, k: int = 3, **kwargs: Any) -> nn.Conv2d:
    """A Conv2d that keeps the size."""
    return nn.Conv2d(cin, cout, k, padding=k // 2, bias=False, **kwargs)


def stage(cin: int = C, cout: int = C, **kwargs: Any) -> nn.Sequential:
    """conv, norm, ReLU."""
    return nn.Sequential(conv(cin, cout, **kwargs), nn.BatchNorm2d(cout), nn.ReLU())


def stages(*names: str) -> tuple[str, ...]:
    """The chain of each named stage."""
    return tuple(f"{name}.0 {name}.1 {name}.2 -> ConvBnReLU2d" for name in names)


class Classifier(nn.Module):
    """A stem, and a head on the mean over the image; what is between is the row's."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        self.stem = stage(3)
        for name, child in children.items():
            setattr(self, name, child)
        self.head = nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(self.stem(x)).mean((2, 3)))

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError


# --- control flow on values


class ValueBranch(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        block = self.bright if x.mean() > 1 else self.dark
        return self.head(block(self.stem(x)).mean((2, 3)))


class EarlyExit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([stage(3), stage(), stage()])
        self.heads = nn.ModuleList(nn.Linear(C, 4) for _ in range(3))
        self.sure = 1.5

    def forward(self, x: Tensor) -> Tensor:
        for block, head in zip(self.stages, self.heads, strict=True):
            x = block(x)
            logits = head(x.mean((2, 3)))
            if logits.detach().abs().max() > self.sure:
                break
        return logits


class DynamicDepth(Classifier):
    def forward(self, x: Tensor, depth: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks[: int(depth)]:
            x = block(x)
        return self.head(x.mean((2, 3)))


class UntilSmall(Classifier):
    """Recursion whose depth the values decide."""

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 1:
            return self.forward(x * 0.25)
        return self.head(self.body(self.stem(x), x.abs().max()).mean((2, 3)))

    def body(self, x: Tensor, left: Tensor) -> Tensor:
        return self.last(x) if left < 0.3 else self.body(self.shrink(x), left / 2)


class Tree(nn.Module):
    """A module that holds smaller ones of its own kind (DLA)."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.left = Tree(depth - 1) if depth else stage()
        self.right = Tree(depth - 1) if depth else stage()

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(x)
        return self.right(y) + (y if y.norm() > 1e-3 else x)


class Recursive(Classifier):
    def body(self, x: Tensor) -> Tensor:
        return self.tree(x)


class Experts(Classifier):
    """Each image goes to the expert its values choose."""

    def forward(self, x: Tensor) -> Tensor:
        choice = (x.mean((1, 2, 3)) * 2).round().clamp(0, 2).long()
        x = self.stem(x)
        out = torch.zeros_like(x)
        for i in choice.unique().tolist():
            chosen = choice == i
            out[chosen] = self.experts[i](x[chosen])
        return self.head(out.mean((2, 3)))


class StochasticDepth(Classifier):
    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.training and torch.rand(()).item() < 0.3:
                continue
            x = x + block(x)
        return x


class Fallback(Classifier):
    """Tries the wide kernel, which small images refuse."""

    def body(self, x: Tensor) -> Tensor:
        try:
            return self.wide(x)
        except RuntimeError:
            return self.narrow(x)


class ChecksValues(Classifier):
    def forward(self, x: Tensor) -> Any:
        if not torch.isfinite(x).all():
            raise ValueError("the image holds NaN or infinity")
        return super().forward(x)

    def body(self, x: Tensor) -> Tensor:
        return self.block(x)


class Sliced(Classifier):
    """Crops to as many columns as the mask says."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        width = int(mask.sum().item())
        return self.head(self.block(self.stem(x[..., :width])).mean((2, 3)))


class Logged(Classifier):
    """Keeps a history of numbers, as people do for plots."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__(**children)
        self.history: list[float] = []

    def body(self, x: Tensor) -> Tensor:
        self.history.append(float(x.detach().abs().mean()))
        return self.block(x)


# --- Python between the modules


class Numpy(Classifier):
    """Numpy chooses the channels to keep."""

    def body(self, x: Tensor) -> Tensor:
        scores = x.detach().abs().mean((0, 2, 3)).numpy()
        best = numpy.sort(numpy.argsort(-scores)[: C // 2])
        return self.block(x[:, torch.from_numpy(best)])


class BoundMethod(Classifier):
    """Calls its second norm through a method kept from before."""

    def __init__(self) -> None:
        super().__init__(conv=conv(), bn=nn.BatchNorm2d(C), relu=nn.ReLU())
        self.normalise = self.bn.__call__

    def body(self, x: Tensor) -> Tensor:
        return self.relu(self.normalise(self.conv(x)))


def clipped(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    """A forward hook that changes an output where it is too large."""
    return output.clamp(-1, 1) if output.detach().abs().max() > 1 else None


class Hooked(Classifier):
    """Hooks change outputs: inside a chain, and at its end."""

    def __init__(self) -> None:
        super().__init__(inside=stage(), end=stage(), block=nn.Sequential(stage()))
        self.inside[0].register_forward_hook(clipped)
        self.end[2].register_forward_hook(clipped)
        self.block.register_forward_hook(clipped)

    def body(self, x: Tensor) -> Tensor:
        return self.block(self.end(self.inside(x)))


class Yields(nn.Module):
    """The forward yields a feature map after another."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([stage(3), stage(), stage()])
        self.out = conv()

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        for block in self.stages:
            x = block(x)
            yield x
        yield self.out(x)


class Backbone(Yields):
    pass


class EatsGenerator(nn.Module):
    """Reads the features of a generating backbone until it has enough."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(x.shape[0], C, dtype=x.dtype)
        for feature in self.backbone(x):
            total = total + feature.mean((2, 3))
            if total.detach().sum() > 1e6:
                break
        return self.head(total)


class Checkpointed(Classifier):
    """An activation checkpoint around each block."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__(blocks=nn.ModuleList([stage(), stage()]))
        self.use_reentrant = use_reentrant

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


class Taps(nn.Module):
    """A parent that runs the members of its Sequential itself and keeps some of what they give (perceptual losses)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*stage(3), *stage(), nn.MaxPool2d(2), *stage())
        self.taps = (2, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        kept = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                kept.append(x)
        return [*kept, x]


class Children(Classifier):
    """Runs its children in the order of their registration, whatever they are."""

    def forward(self, x: Tensor) -> Tensor:
        for name, child in self.named_children():
            x = child(x.mean((2, 3)) if name == "head" else x)
        return x


class Partial(Classifier):
    """Its forward, and that of one of its convolutions, are replaced on the instance (accelerate does so)."""

    def __init__(self) -> None:
        super().__init__(block=stage(), patched=stage())
        for module in (self, self.patched[0]):
            module.forward = functools.partial(_scaled, module, type(module).forward, scale=0.5)  # type: ignore[method-assign]

    def body(self, x: Tensor) -> Tensor:
        return self.patched(self.block(x))


def _scaled(module: nn.Module, forward: Callable[..., Any], *args: Any, scale: float) -> Any:
    return forward(module, *args) * scale


class Lambdas(Classifier):
    """A table of functions, chosen by what the image looks like."""

    def __init__(self) -> None:
        super().__init__(block=stage(), other=stage())
        self.table = {
            "wide": lambda m, x: m.block(F.avg_pool2d(x, (1, 2))),
            "tall": lambda m, x: m.block(F.avg_pool2d(x, (2, 1))),
            "flat": lambda m, x: m.other(x),
        }

    def forward(self, x: Tensor) -> Tensor:
        kind = "flat" if float(x.detach().std()) < 0.1 else "wide" if x.shape[3] > x.shape[2] else "tall"
        return self.head(self.table[kind](self, self.stem(x)).mean((2, 3)))


class Task(Classifier):
    """The task's name chooses the modules."""

    def forward(self, x: Tensor, task: str = "classify") -> Tensor:
        x = self.stem(x)
        for name in {"classify": ["encode", "pool"], "segment": ["encode", "decode"]}[task]:
            x = getattr(self, name)(x)
        return x


class RoundToGrid(torch.autograd.Function):
    """Rounds; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class StraightThrough(Classifier):
    """An autograd.Function of the user's own, between a conv and its norm, and between two blocks."""

    def body(self, x: Tensor) -> Tensor:
        x = RoundToGrid.apply(x)
        return self.relu(self.bn(RoundToGrid.apply(self.conv(x))))


class FrozenBackbone(Classifier):
    """Features without gradients."""

    def body(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.frozen(x)
        return self.block(x)


class TiedByFunction(Classifier):
    """The decoder is a function of the encoder's weight."""

    def body(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(self.encode(x)))
        return self.after(F.conv_transpose2d(y, self.encode.weight, padding=1))


# --- state


class Cached(Classifier):
    """Positions made once for each size and kept."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__(**children)
        self.grids: dict[Any, Tensor] = {}

    def body(self, x: Tensor) -> Tensor:
        key = (tuple(x.shape[2:]), x.dtype, x.device)
        if key not in self.grids:
            self.grids[key] = torch.linspace(-1, 1, x.shape[3], dtype=x.dtype, device=x.device)
        return self.block(x + self.grids[key])


class Centred(Classifier):
    """Keeps a moving centre of its features, in place, and starts anew when it drifts away (DINO)."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__(**children)
        self.register_buffer("centre", torch.zeros(C))

    def body(self, x: Tensor) -> Tensor:
        y = self.block(x)
        with torch.no_grad():
            self.centre.mul_(0.9).add_(y.mean((0, 2, 3)), alpha=0.1)
            if self.centre.abs().max() > 100:
                self.centre.zero_()
        return y - self.centre[:, None, None]


# --- forms of arguments and results


class DictOfImages(Classifier):
    """As many images as the dict holds, and a dict back."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        features = {
            key: self.block(self.stem(x)) if i == 1 else self.stem(x) for i, (key, x) in enumerate(batch["views"].items())
        }
        return {"logits": {key: self.head(x.mean((2, 3))) for key, x in features.items()}, "count": len(features)}


@dataclasses.dataclass
class Batch:
    """An input type of the model's own."""

    image: Tensor
    weight: float = 1.0


@dataclasses.dataclass
class Result:
    """An output type of the model's own."""

    logits: Tensor
    features: list[Tensor]


class Dataclasses(Classifier):
    def forward(self, batch: Batch) -> Result:
        if not isinstance(batch, Batch):
            raise TypeError(f"a Batch is wanted, found {type(batch).__name__}")
        x = self.stem(batch.image)
        y = self.block(x) * batch.weight
        return Result(self.head(y.mean((2, 3))), [x, y])


class KeywordsOnly(Classifier):
    def forward(self, *, image: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.stem(image)
        if context is not None:
            x = x + self.side(context)
        return self.head(self.block(x).mean((2, 3)))


class AnyNumber(Classifier):
    """As many images, of any sizes, as positional arguments."""

    def forward(self, *images: Tensor) -> Tensor:
        crops = [F.interpolate(x, (8, 8)) for x in images if x.shape[-1] > 4]
        return self.head(self.block(self.stem(torch.cat(crops))).mean((2, 3)))


class Found(NamedTuple):
    """An output type of the model's own."""

    scores: Tensor
    boxes: list[list[float]]


class Detector(Classifier):
    """A list of images of their own sizes in, boxes as Python numbers out."""

    def forward(self, images: list[Tensor]) -> Found:
        side = max(max(x.shape[1:]) for x in images)
        batch = torch.stack([F.pad(x, (0, side - x.shape[2], 0, side - x.shape[1])) for x in images])
        scores = self.score(self.block(self.stem(batch))).flatten(1)
        boxes = [[float(v) for v in divmod(int(i), side)] for i in scores.argmax(1)]
        return Found(scores, boxes)


DATA = r"[Dd]ata-dependent"
CONTROL_FLOW = "symbolically traced variables cannot be used as inputs to control flow"

UNTRACEABLE: tuple[Untraceable, ...] = (
    Untraceable(
        "value_branch",
        "an if on the values of a tensor",
        lambda: ValueBranch(bright=stage(), dark=stage()),
        lambda: [(image(),), (image() + 2,)],
        stages("stem", "bright", "dark"),
        {},
        fx=refuses(CONTROL_FLOW),
        export=refuses(DATA),
        strict=refuses(DATA),
        on_meta=False,
    ),
    Untraceable(
        "early_exit",
        "stops at the first head that is sure",
        EarlyExit,
        lambda: [(image(),), (image(scale=30),)],
        stages("stages.0", "stages.1", "stages.2"),
        {},
        fx=refuses(CONTROL_FLOW),
        export=refuses(DATA),
        strict=refuses(DATA),
        on_meta=False,
    ),
    Untraceable(
        "dynamic_depth",
        "a loop over as many modules of a list as a tensor says",
        lambda: DynamicDepth(blocks=nn.ModuleList([stage(), stage(), stage()])),
        lambda: [(image(), torch.tensor(3)), (image(), torch.tensor(1))],
        stages("stem", "blocks.0", "blocks.1", "blocks.2"),
        {},
        fx=refuses("int"),
        export=refuses(DATA),
        strict=refuses(DATA),
        on_meta=False,
    ),
    Untraceable(
        "until_small",
        "recursion whose depth the values decide",
        lambda: UntilSmall(shrink=stage(), last=stage()),
        lambda: [(image(),), (image(scale=1e3),)],
        stages("stem", "last"),
        {"shrink.0 shrink.1": "times in one forward", "shrink.1 shrink.2": "times in one forward"},
        fx=refuses(CONTROL_FLOW),
        export=refuses(DATA),
        strict=refuses(DATA),
        on_meta=False,
    ),
    Untraceable(
        "recursive",
        "modules that hold modules of their own kind, and an if on a norm in each",
        lambda: Recursive(tree=Tree(1)),
        one,
        stages("stem", "tree.left.left", "tree.left.right", "tree.right.left", "tree.right.right"),
        {},
        fx=refuses(CONTROL_FLOW),
        export=refuses(DATA),
        strict=refuses(DATA),
        on_meta=False,
    ),
    Untraceable(
        "experts",
        "each image goes to the expert its values choose",
        lambda: Experts(experts=nn.ModuleList([stage(), stage(), stage()])),
        lambda: [(image(6, 3, 8, 8) + torch.arange(6.0).remainder(n)[:, None, None, None] / 2,) for n in (3, 2)],
        stages("stem", "experts.0", "experts.1", "experts.2"),
        {},
        fx=refuses("iterat"),
        export=refuses(DATA),
        strict=refuses(DATA),
        on_meta=False,
    ),
    Untraceable(
        "stochastic_depth",
        "blocks left out at random, in Python",
        lambda: StochasticDepth(blocks=nn.ModuleList([stage(), stage(), stage()])),
        lambda: [(image(seed=seed),) for seed in range(3)],
        stages("stem", "blocks.0", "blocks.1", "blocks.2"),
        {},
        fx=wrong("which blocks run is drawn once, while tracing"),
        export=refuses(DATA),
        strict=refuses(DATA),
    ),
    Untraceable(
        "fallback",
        "try, and another module in the except",
        lambda: Fallback(wide=nn.Sequential(nn.Conv2d(C, C, 7), nn.BatchNorm2d(C), nn.ReLU()), narrow=stage()),
        lambda: [(image(),), (image(2, 3, 6, 6),)],
        stages("stem", "wide", "narrow"),
        {},
        fx=wrong("the except is not in the graph"),
        export=wrong("the except is not in the graph"),
        strict=wrong("the except is not in the graph"),
    ),
    Untraceable(
        "checks_values",
        "raises for NaN in its input",
        lambda: ChecksValues(block=stage()),
        one,
        stages("stem", "block"),
        {},
        fx=refuses(CONTROL_FLOW),
        export=refuses(DATA),
        strict=refuses(DATA),
        on_meta=False,
    ),
    Untraceable(
        "sliced",
        "slices by .item()",
        lambda: Sliced(block=stage()),
        lambda: [(image(), (torch.arange(8) < n).float()) for n in (8, 5)],
        stages("stem", "block"),
        {},
        fx=refuses("int"),
        export=refuses(DATA),
        strict=TAKES,
        on_meta=False,
    ),
    Untraceable(
        "logged",
        "keeps float(y.mean()) for a plot",
        lambda: Logged(block=stage()),
        one,
        stages("stem", "block"),
        {},
        fx=refuses("float"),
        export=refuses(DATA),
        strict=TAKES,
        on_meta=False,
    ),
    Untraceable(
        "numpy",
        "numpy chooses channels",
        lambda: Numpy(block=stage(C // 2)),
        one,
        stages("stem", "block"),
        {},
        fx=refuses("__array_struct__"),
        export=refuses("numpy"),
        strict=TAKES,
        on_meta=False,
    ),
    Untraceable(
        "bound_method",
        "a norm called through a bound method kept from before",
        BoundMethod,
        one,
        stages("stem"),
        {"conv bn relu": "fused"},
        fx=refuses(CONTROL_FLOW),
        export=TAKES,
        strict=TAKES,
    ),
    Untraceable(
        "hooks",
        "forward hooks that change outputs, depending on values",
        Hooked,
        lambda: [(image(),), (image(scale=1e-3),)],
        (*stages("stem", "end", "block.0"), "inside.1 inside.2 -> BNReLU2d"),
        {"inside.0 inside.1": "hooks"},
        fx=refuses(CONTROL_FLOW),
        export=refuses(DATA),
        strict=refuses(DATA),
        on_meta=False,
    ),
    Untraceable(
        "yields",
        "a forward that is a generator",
        Yields,
        one,
        stages("stages.0", "stages.1", "stages.2"),
        {},
        fx=refuses("generator"),
        export=refuses("generator"),
        strict=refuses("LocalGeneratorObjectVariable"),
    ),
    Untraceable(
        "eats_generator",
        "a backbone that yields features, read until there is enough",
        EatsGenerator,
        one,
        stages("backbone.stages.0", "backbone.stages.1", "backbone.stages.2"),
        {},
        fx=refuses("zeros"),
        export=refuses(DATA),
        strict=refuses(DATA),
        on_meta=False,
    ),
    Untraceable(
        "checkpoint",
        "activation checkpoints",
        lambda: Checkpointed(False),
        one,
        stages("stem", "blocks.0", "blocks.1"),
        {},
        fx=wrong("the checkpoint is lost, and with it the norm's second update"),
        export=wrong("the checkpoint is lost, and with it the norm's second update"),
        strict=refuses("_checkpoint_context_fn"),
    ),
    Untraceable(
        "checkpoint_reentrant",
        "activation checkpoints of the older kind",
        lambda: Checkpointed(True),
        one,
        stages("stem", "blocks.0", "blocks.1"),
        {},
        fx=wrong("the checkpoint is lost, and with it the norm's second update"),
        export=wrong("what is in a checkpoint gives no gradient"),
        strict=refuses("_checkpoint_context_fn"),
    ),
    Untraceable(
        "taps",
        "a parent that runs the members of its Sequential itself and keeps some outputs",
        Taps,
        one,
        (
            "features.0 features.1 features.2 -> ConvBnReLU2d",
            "features.4 features.5 -> BNReLU2d",
            "features.7 features.8 features.9 -> ConvBnReLU2d",
        ),
        {"features.3 features.4": "output of the model"},
        fx=TAKES,
        export=TAKES,
        strict=TAKES,
    ),
    Untraceable(
        "children",
        "runs its children in the order of their registration",
        lambda: Children(block=stage()),
        one,
        stages("stem", "block"),
        {},
        fx=TAKES,
        export=TAKES,
        strict=TAKES,
    ),
    Untraceable(
        "partial",
        "forward replaced on the instance by a functools.partial",
        Partial,
        one,
        (*stages("stem", "block"), "patched.1 patched.2 -> BNReLU2d"),
        {"patched.0 patched.1": "forward of its own"},
        fx=wrong("it traces the forward of the class"),
        export=TAKES,
        strict=TAKES,
    ),
    Untraceable(
        "lambdas",
        "a dict of lambdas, chosen by values and shape",
        Lambdas,
        lambda: [(image(2, 3, 8, 16),), (image(2, 3, 16, 8),), (image(scale=1e-3),)],
        stages("stem", "block", "other"),
        {},
        fx=refuses("float"),
        export=refuses(DATA),
        strict=refuses(DATA),
        on_meta=False,
    ),
    Untraceable(
        "task",
        "a string argument chooses the modules",
        lambda: Task(encode=stage(), pool=nn.AdaptiveAvgPool2d(1), decode=stage()),
        lambda: [(image(), "classify"), (image(), "segment")],
        stages("stem", "encode", "decode"),
        {},
        fx=refuses("KeyError|Proxy|unhashable"),
        export=wrong("it holds one task"),
        strict=wrong("it holds one task"),
    ),
    Untraceable(
        "straight_through",
        "an autograd.Function of the user's own in the middle",
        lambda: StraightThrough(conv=conv(), bn=nn.BatchNorm2d(C), relu=nn.ReLU()),
        one,
        (*stages("stem"), "bn relu -> BNReLU2d"),
        {"conv bn": "read by"},
        fx=wrong("the function's own gradient is lost"),
        export=wrong("the function's own gradient is lost"),
        strict=wrong("the function's own gradient is lost"),
    ),
    Untraceable(
        "frozen_backbone",
        "part of it runs under no_grad",
        lambda: FrozenBackbone(frozen=stage(), block=stage()),
        one,
        stages("stem", "frozen", "block"),
        {},
        fx=wrong("no_grad is lost, so the frozen part is trained"),
        export=TAKES,
        strict=TAKES,
    ),
    Untraceable(
        "tied_by_function",
        "a function reads a conv's weight",
        lambda: TiedByFunction(encode=conv(), bn=nn.BatchNorm2d(C), relu=nn.ReLU(), after=stage()),
        one,
        (*stages("stem", "after"), "encode bn relu -> ConvBnReLU2d"),
        {},
        fx=TAKES,
        export=TAKES,
        strict=TAKES,
    ),
    Untraceable(
        "cached",
        "keeps what it made for a size in a dict",
        lambda: Cached(block=stage()),
        lambda: [(image(),), (image(2, 3, 6, 6),)],
        stages("stem", "block"),
        {},
        fx=refuses("."),
        export=wrong("it holds one size"),
        strict=wrong("it holds one size"),
    ),
    Untraceable(
        "centred",
        "a buffer updated in place, and set back where its values say so",
        lambda: Centred(block=stage()),
        one,
        stages("stem", "block"),
        {},
        fx=wrong("no_grad is lost, and the if is decided once"),
        export=refuses(DATA),
        strict=refuses(DATA),
        on_meta=False,
    ),
    Untraceable(
        "dict_of_images",
        "a dict of as many images as there are, and a dict back",
        lambda: DictOfImages(block=stage()),
        lambda: [({"views": {"a": image(), "b": image(seed=1)}},), ({"views": {"a": image(), "b": image(), "c": image()}},)],
        stages("block"),
        {"stem.0 stem.1": "times in one forward", "stem.1 stem.2": "times in one forward"},
        fx=refuses("iterat"),
        export=wrong("it holds one set of keys"),
        strict=wrong("it holds one set of keys"),
    ),
    Untraceable(
        "dataclasses",
        "dataclasses of the model's own as argument and result",
        lambda: Dataclasses(block=stage()),
        lambda: [(Batch(image(), 0.5),)],
        stages("stem", "block"),
        {},
        fx=refuses("a Batch is wanted, found Proxy"),
        export=refuses("[Uu]nsupported"),
        strict=refuses("not supported or pytree-flattenable"),
    ),
    Untraceable(
        "keywords_only",
        "keyword arguments only, one of them optional",
        lambda: KeywordsOnly(block=stage(), side=stage(3)),
        lambda: [{"image": image()}, {"image": image(), "context": image(seed=1)}],
        stages("stem", "block", "side"),
        {},
        fx=wrong("an argument left out is taken for a given one"),
        export=wrong("it holds one set of arguments"),
        strict=wrong("it holds one set of arguments"),
    ),
    Untraceable(
        "any_number",
        "any number of images, of any sizes",
        lambda: AnyNumber(block=stage()),
        lambda: [(image(), image(2, 3, 6, 6)), (image(2, 3, 4, 4), image(2, 3, 12, 12), image())],
        stages("stem", "block"),
        {},
        fx=refuses("iterat"),
        export=wrong("it holds one number of images"),
        strict=wrong("it holds one number of images"),
    ),
    Untraceable(
        "detector",
        "a list of images of their own sizes in, Python numbers out",
        lambda: Detector(block=stage(), score=conv(C, 1)),
        lambda: [([image(3, 8, 6), image(3, 6, 8)],), ([image(3, 9, 4)] * 3,)],
        stages("stem", "block"),
        {},
        fx=refuses("iterat"),
        export=refuses(DATA),
        strict=refuses("Observed exception"),
        on_meta=False,
    ),
)
