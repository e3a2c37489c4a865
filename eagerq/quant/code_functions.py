"""What functions do to codes, as engines do it. A handler takes and gives ``Value``s where the function has tensors.

It gives ``NotImplemented`` where engines compute in float.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from eagerq.quant.code_values import Coded, Pending, Value, note_float
from eagerq.quant.engine import EXACT_FLOAT32, Grid
from eagerq.quant.pieces import in_pieces, max_pool, moved


@dataclasses.dataclass
class InPlace:
    """A result that takes the place of what its function's first argument held."""

    value: Value


def _operand(x: Any) -> Coded | None:
    return x if isinstance(x, Coded) else None


def _moved(func: Any, args: Any, kwargs: Any) -> Any:
    """A function that only moves values: it runs on the codes."""
    if not args or any(isinstance(a, Value) for a in (*args[1:], *kwargs.values())):
        return NotImplemented
    x = args[0]
    if isinstance(x, Pending):
        return _moved_pending(x, func, args[1:], kwargs)
    if not isinstance(x, Coded):
        return NotImplemented
    out = moved(func, x.codes, args[1:], kwargs)
    if out is x.codes:
        return x
    if isinstance(out, Tensor):
        return dataclasses.replace(x, codes=out) if out.dtype == x.codes.dtype else NotImplemented
    if isinstance(out, (tuple, list)) and all(isinstance(part, Tensor) for part in out):
        return type(out)(dataclasses.replace(x, codes=part) for part in out)
    return NotImplemented


def _moved_pending(x: Pending, func: Any, args: Any, kwargs: Any) -> Any:
    """A result that waits, moved: where engines would not compute it in float for want of a quantizer right behind it."""
    if x.kind:
        return NotImplemented
    shapes = func(torch.empty(x.size, device="meta"), *args, **kwargs)

    def part(shape: torch.Size, pick: Callable[[Any], Tensor]) -> Value:
        def value() -> Tensor:
            return pick(func(x.value(), *args, **kwargs))

        def codes(grid: Grid) -> Tensor:
            return pick(moved(func, x.codes(grid), args, kwargs))

        return dataclasses.replace(x, size=shape, value=value, codes=codes)

    if isinstance(shapes, Tensor):
        return part(shapes.shape, lambda moved: moved)
    if isinstance(shapes, (tuple, list)) and all(isinstance(shape, Tensor) for shape in shapes):
        return type(shapes)(part(shape.shape, operator.itemgetter(i)) for i, shape in enumerate(shapes))
    return NotImplemented


def _same(func: Any, args: Any, kwargs: Any) -> Any:
    """Dropout in eval: the tensor itself."""
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    return NotImplemented if training else args[0]


def _pooled_max(func: Any, args: Any, kwargs: Any) -> Any:
    """Max pooling: of codes, padded with minus infinity as that of reals is."""
    x = _operand(args[0])
    if kwargs.get("return_indices", args[6] if len(args) > 6 else False):
        return NotImplemented
    if x is None or x.codes.is_floating_point() or func.__name__.startswith("adaptive"):
        return _moved(func, args, kwargs)
    shape = func(torch.empty(x.codes.shape, device="meta"), *args[1:], **kwargs).shape
    pooled = shape[-int(func.__name__[8]) :]
    names = ("kernel_size", "stride", "padding", "dilation")
    given = dict(zip(names, args[1:])) | {name: kwargs[name] for name in names if name in kwargs}  # noqa: B905
    return dataclasses.replace(x, codes=max_pool(x.codes, pooled, **given))


def _clip(low: float, high: float, args: Any, in_place: bool) -> Any:
    value = args[0]
    if not isinstance(value, (Coded, Pending)):
        return NotImplemented
    result: Value
    if isinstance(value, Pending):
        result = value.clipped(low, high)
    else:
        bounds = value.profile.quantize(torch.tensor([low, high]).to(value.codes.device), value.grid).tolist()
        result = dataclasses.replace(value, codes=value.codes.clamp(*bounds))
    return InPlace(result) if in_place else result


def _relu(func: Any, args: Any, kwargs: Any) -> Any:
    in_place = kwargs.get("inplace", args[1] if len(args) > 1 else False) or func.__name__ == "relu_"
    return _clip(0.0, math.inf, args, in_place)


def _relu6(func: Any, args: Any, kwargs: Any) -> Any:
    return _clip(0.0, 6.0, args, kwargs.get("inplace", args[1] if len(args) > 1 else False))


def _hardtanh(func: Any, args: Any, kwargs: Any) -> Any:
    given = dict(zip(("min_val", "max_val", "inplace"), args[1:])) | kwargs  # noqa: B905
    return _clip(given.get("min_val", -1.0), given.get("max_val", 1.0), args, given.get("inplace", False))


def _clamp(func: Any, args: Any, kwargs: Any) -> Any:
    given = dict(zip(("min", "max"), args[1:])) | kwargs  # noqa: B905
    low, high = given.get("min"), given.get("max")
    if isinstance(low, (Tensor, Value)) or isinstance(high, (Tensor, Value)):
        return NotImplemented
    return _clip(-math.inf if low is None else low, math.inf if high is None else high, args, func.__name__ == "clamp_")


def _pair(args: Any, kwargs: Any) -> tuple[Coded, Coded] | None:
    if len(args) != 2 or any(value is not None for value in kwargs.values()):
        return None
    a, b = map(_operand, args)
    return None if a is None or b is None else (a, b)


def _add(func: Any, args: Any, kwargs: Any) -> Any:
    pair = _pair(args, kwargs)
    if pair is None:
        return NotImplemented
    a, b = pair
    name = func.__name__
    if name == "__radd__":
        a, b = b, a
    result = Pending(
        torch.broadcast_shapes(a.codes.shape, b.codes.shape),  # type: ignore[no-untyped-call]
        a.codes.device,
        lambda: a.real() + b.real(),
        lambda grid: in_pieces(lambda p, q: a.profile.add(p, a.grid, q, b.grid, grid), a.codes, b.codes),
        a.profile,
        "add",
    )
    return InPlace(result) if name in ("__iadd__", "add_") else result


def _mul(func: Any, args: Any, kwargs: Any) -> Any:
    pair = _pair(args, kwargs)
    if pair is None:
        return NotImplemented
    a, b = pair
    result = Pending(
        torch.broadcast_shapes(a.codes.shape, b.codes.shape),  # type: ignore[no-untyped-call]
        a.codes.device,
        lambda: a.real() * b.real(),
        lambda grid: in_pieces(lambda p, q: a.profile.mul(p, a.grid, q, b.grid, grid), a.codes, b.codes),
        a.profile,
        "mul",
    )
    return InPlace(result) if func.__name__ in ("__imul__", "mul_") else result


def _averaged(x: Coded, keepdim: bool) -> Value:
    """The mean over the last two of four axes, as engines pool globally."""
    count = x.codes.shape[2] * x.codes.shape[3]
    values = x.about_zero()
    total = (values if count * 256 < EXACT_FLOAT32 else values.double()).sum((2, 3), keepdim=keepdim)
    return Pending(
        total.shape,
        total.device,
        lambda: x.real().mean((2, 3), keepdim=keepdim),
        lambda grid: x.profile.average(total, count, x.grid, grid),
        x.profile,
        "mean",
    )


def _mean(func: Any, args: Any, kwargs: Any) -> Any:
    given = dict(zip(("dim", "keepdim"), args[1:])) | kwargs  # noqa: B905
    x, dims = _operand(args[0]), given.get("dim", given.get("axis"))
    if x is None or x.codes.dim() != 4 or not isinstance(dims, (tuple, list)) or given.get("dtype") is not None:
        return NotImplemented
    return _averaged(x, bool(given.get("keepdim"))) if sorted(d % 4 for d in dims) == [2, 3] else NotImplemented


def _adaptive_average(func: Any, args: Any, kwargs: Any) -> Any:
    x, size = _operand(args[0]), kwargs.get("output_size", args[1] if len(args) > 1 else None)
    if x is None or x.codes.dim() != 4:
        return NotImplemented
    if size in (1, (1, 1), [1, 1]):
        return _averaged(x, True)
    sizes = x.codes.shape[2:]
    wanted = [n or given for n, given in zip(_window(size), sizes, strict=True)]
    if any(given % n for n, given in zip(wanted, sizes, strict=True)):
        return NotImplemented
    height, width = (given // n for n, given in zip(wanted, sizes, strict=True))
    if height == width == 1:
        return x
    shape = torch.Size((*x.codes.shape[:2], *wanted))
    return _over_windows(x, shape, (height, width), (height, width), (0, 0), [0, 0], True)


def _window(value: Any) -> tuple[int, int]:
    height, width = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, value)
    return (height[0], width[0]) if isinstance(height, (tuple, list)) else (height, width)


def _average_pooled(func: Any, args: Any, kwargs: Any) -> Any:
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given = dict(zip(names, args[1:])) | kwargs  # noqa: B905
    x = _operand(args[0])
    if x is None or x.codes.dim() != 4 or given.get("divisor_override") is not None:
        return NotImplemented
    kernel = _window(given["kernel_size"])
    stride = _window(given.get("stride") or kernel)
    padding = _window(given.get("padding", 0))
    of_pads = bool(given.get("count_include_pad", True))
    shape = func(torch.empty(x.codes.shape, device="meta"), *args[1:], **kwargs).shape
    sizes = x.codes.shape[2:]
    # how far the last windows reach past the padding, which ceil_mode lets them
    axes = zip(shape[2:], stride, kernel, sizes, padding, strict=True)
    past = [max(0, (n - 1) * s + k - size - 2 * p) for n, s, k, size, p in axes]
    if of_pads and any(past):
        return NotImplemented
    return _over_windows(x, shape, kernel, stride, padding, past, of_pads)


def _over_windows(
    x: Coded,
    shape: torch.Size,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    past: list[int],
    of_pads: bool,
) -> Value:
    edges = (padding[1], padding[1] + past[1], padding[0], padding[0] + past[0])

    def places(values: Tensor) -> Iterator[Tensor]:
        padded = torch.nn.functional.pad(values, edges)
        for i in range(kernel[0]):
            for j in range(kernel[1]):
                yield padded[..., i :: stride[0], j :: stride[1]][..., : shape[2], : shape[3]]

    def count() -> Tensor:
        if of_pads:
            return torch.tensor(float(kernel[0] * kernel[1]), device=x.codes.device)
        return torch.stack(list(places(torch.ones_like(x.codes[:1, :1])))).sum(0)

    def value() -> Tensor:
        return sum(places(x.real()), torch.zeros(())) / count()

    return Pending(
        shape,
        x.codes.device,
        value,
        lambda grid: x.profile.window_average(places(x.real()), count(), grid),
        x.profile,
        "avg_pool2d",
    )


def _normalised(func: Any, args: Any, kwargs: Any) -> Any:
    """A batch norm with no linear map before it: engines run it in float, by this formula."""
    names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = dict(zip(names, args[1:])) | kwargs  # noqa: B905
    x, mean, var = args[0], given.get("running_mean"), given.get("running_var")
    ours = func is torch.nn.functional.batch_norm  # torch.batch_norm takes its arguments in another order
    if not ours or given.get("training") or mean is None or var is None or not isinstance(x, Value):
        return NotImplemented
    real = x.real()
    note_float("batch_norm")
    weight, bias = given.get("weight"), given.get("bias")
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    return x.profile.batch_norm(real, mean, var, weight, bias, given.get("eps", 1e-5))


def _tabled(name: str) -> Callable[[Any, Any, Any], Any]:
    """An elementwise function of codes: a table."""

    def handler(func: Any, args: Any, kwargs: Any) -> Any:
        x = _operand(args[0])
        if x is None:
            return NotImplemented
        own = getattr(x.profile, name, None)
        rest = {key: value for key, value in kwargs.items() if key != "inplace"}

        def function(real: Tensor) -> Tensor:
            out: Tensor = func(real, *args[1:2], **rest) if own is None else own(real)
            return out

        result = Pending(
            x.codes.shape,
            x.codes.device,
            lambda: function(x.real()),
            lambda grid: in_pieces(lambda part: x.profile.table(function, part, x.grid, grid), x.codes),
            x.profile,
            name,
        )
        return InPlace(result) if kwargs.get("inplace") else result

    return handler


def hardsigmoid_sum(x: Coded) -> Value:
    """The hard sigmoid of codes, as engines compute it that have no kernel of it: see ``EngineProfile.hardsigmoid_sum``."""
    return Pending(
        x.codes.shape,
        x.codes.device,
        lambda: x.profile.hardsigmoid(x.real()),
        lambda grid: in_pieces(lambda part: x.profile.hardsigmoid_sum(part, x.grid, grid), x.codes),
        x.profile,
        "hardsigmoid",
    )


def _concatenated(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = args[0] if args else kwargs.get("tensors")
    parts = [_operand(t) for t in tensors] if isinstance(tensors, (tuple, list)) else [None]
    if not parts or any(part is None for part in parts):
        return NotImplemented
    held = [part for part in parts if part is not None]
    rest = {key: value for key, value in kwargs.items() if key != "tensors"}
    first = held[0]

    def joined(pieces: list[Tensor]) -> Tensor:
        out: Tensor = func(pieces, *args[1:], **rest)
        return out

    if all(part.grid.is_same(first.grid) for part in held):
        return dataclasses.replace(first, codes=joined([part.codes for part in held]))
    shape = joined([part.codes.to("meta") for part in held]).shape
    return Pending(
        shape,
        first.codes.device,
        lambda: joined([part.real() for part in held]),
        lambda grid: joined([part.on(grid) for part in held]),
        first.profile,
    )


def _resized(func: Any, args: Any, kwargs: Any) -> Any:
    given = dict(zip(("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor"), args[1:])) | kwargs  # noqa: B905
    if not isinstance(args[0], Value) or given.get("mode", "nearest") != "nearest":
        return NotImplemented
    profile, factor = args[0].profile, given.get("scale_factor")
    if given.get("recompute_scale_factor"):
        factor = None

    def nearest(x: Tensor, *rest: Any, **named: Any) -> Tensor:
        wanted = func(torch.empty(x.shape, device="meta"), *rest, **named).shape[2:]
        if wanted == x.shape[2:]:
            return x
        factors = factor if isinstance(factor, (tuple, list)) else [factor] * len(wanted)
        for axis, (outputs, by) in enumerate(zip(wanted, factors, strict=True), 2):
            x = x.index_select(axis, profile.nearest(x.shape[axis], outputs, by).to(x.device))
        return x

    return _moved(nearest, args, kwargs)


def _padded(func: Any, args: Any, kwargs: Any) -> Any:
    given = dict(zip(("pad", "mode", "value"), args[1:])) | kwargs  # noqa: B905
    x = _operand(args[0])
    if x is None:
        return NotImplemented
    if given.get("mode", "constant") != "constant":
        return _moved(func, args, kwargs)
    if given.get("value") not in (None, 0, 0.0):
        return NotImplemented
    padded = func(x.codes, given["pad"], value=float(x.grid.zero_point))
    return dataclasses.replace(x, codes=padded)


_MOVING = (
    "flatten unflatten view reshape permute transpose swapaxes swapdims movedim squeeze unsqueeze contiguous clone detach"
    " __getitem__ chunk split unbind narrow select expand repeat tile roll flip pixel_shuffle pixel_unshuffle channel_shuffle"
    " split_with_sizes tensor_split expand_as view_as reshape_as index_select permute_reversed mT data"
).split()
_DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d")
#: Those whose result may share its argument's memory.
VIEWS = {*_MOVING, *_DROPOUTS}.difference("clone roll flip repeat tile pixel_shuffle pixel_unshuffle index_select".split())
HANDLERS: dict[str, Callable[[Any, Any, Any], Any]] = {
    **dict.fromkeys(_MOVING, _moved),
    **dict.fromkeys(_DROPOUTS, _same),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d"), _pooled_max),
    **dict.fromkeys(("relu", "relu_"), _relu),
    "relu6": _relu6,
    "hardtanh": _hardtanh,
    **dict.fromkeys(("clamp", "clamp_", "clip"), _clamp),
    **dict.fromkeys(("add", "__add__", "__radd__", "__iadd__", "add_"), _add),
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "__imul__", "mul_"), _mul),
    "sigmoid": _tabled("sigmoid"),
    "hardsigmoid": _tabled("hardsigmoid"),
    "hardswish": _tabled("hardswish"),
    "leaky_relu": _tabled("leaky_relu"),
    "mean": _mean,
    "avg_pool2d": _average_pooled,
    "batch_norm": _normalised,
    "adaptive_avg_pool2d": _adaptive_average,
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenated),
    "interpolate": _resized,
    "pad": _padded,
}
