"""The laws on real tensors, for any model: fusing changes no bit, QAT learns what the float model learns, deployed is QAT.

The model is used up: it is fused and converted in place, so that a model of half the machine's memory can be checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import eagerq
from eagerq.errors import StateError
from eagerq.inputs import Inputs, as_runs

from .oracle import tensors

#: Relative to the largest entry. Without fake quantization a QAT module runs the operators of the float chain, so that
#: over the zoo the difference was exactly 0; this leaves room for the few classes that fold before they quantize.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


#: Of the random numbers that weights take, each from a place of its own, and large ones repeat, since to draw them anew took as
#: long as two forwards; a prime, so that no two rows or channels of a weight are alike.
_PERIOD = 1_000_003


class _WithoutInit(TorchFunctionMode):
    """While a model is built: large random initialisations, all overwritten afterwards, are left out."""

    SLOW = frozenset({"uniform_", "normal_", "trunc_normal_", "erfinv_", "mul_", "add_", "clamp_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = args[0] if args else (kwargs or {}).get("tensor")
        slow = getattr(func, "__name__", "") in self.SLOW or getattr(func, "__module__", "") == "torch.nn.init"
        if slow and isinstance(given, nn.Parameter) and given.numel() > 4096:
            return given
        return func(*args, **(kwargs or {}))


def randomised(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model in which no default hides an error: gammas of both signs, zero and tiny, statistics away from 0 and 1."""
    with _WithoutInit():
        model = build()
    randomise(model, seed)
    return model


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Overwrite every parameter, and the running statistics of batch norms."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.empty(_PERIOD).uniform_(-1.0, 1.0, generator=generator).repeat(2)
    with torch.no_grad():
        for parameter in model.parameters():
            data = parameter.data
            if data.numel() <= 3 or not data.is_floating_point():
                data.fill_(0.5)
            elif data.dim() == 1:
                data.normal_(0.6, 0.4, generator=generator)
                data[:3] = torch.tensor([0.0, 1e-6, -0.5])
            else:
                fan_in = max(data[0].numel(), 1)
                bound = (4.5 / fan_in) ** 0.5
                start = int(torch.randint(_PERIOD, (), generator=generator))
                _repeat(data, numbers[start : start + min(max(data.numel(), 1), _PERIOD)] * bound)
        for module in model.modules():
            if isinstance(getattr(module, "running_mean", None), Tensor):
                module.running_mean.uniform_(-0.2, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)


def _repeat(data: Tensor, numbers: Tensor) -> None:
    """Fill a tensor with numbers over and over."""
    flat = data.view(-1) if data.is_contiguous() else torch.empty(data.numel(), dtype=data.dtype)
    whole = flat.numel() // numbers.numel() * numbers.numel()
    flat[:whole].view(-1, numbers.numel()).copy_(numbers)
    flat[whole:].copy_(numbers[: flat.numel() - whole])
    if not data.is_contiguous():
        data.copy_(flat.view(data.shape))


def run(model: nn.Module, inputs: Inputs, dtype: torch.dtype | None = None, seed: int = 2) -> list[Tensor]:
    """The floating-point tensors of the output, with dropout and stochastic depth of one seed."""
    given = inputs.copied(None)
    args, kwargs = given.args, given.kwargs
    if dtype is not None:
        args, kwargs = _cast((args, kwargs), dtype)
    torch.manual_seed(seed)
    return [t for t in tensors(model(*args, **kwargs)) if t.is_floating_point()]


def _cast(obj: Any, dtype: torch.dtype) -> Any:
    if isinstance(obj, Tensor):
        return obj.to(dtype) if obj.is_floating_point() else obj
    if isinstance(obj, dict):
        return {key: _cast(value, dtype) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)) and type(obj) in (list, tuple):
        return type(obj)(_cast(value, dtype) for value in obj)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return dataclasses.replace(obj, **{f.name: _cast(getattr(obj, f.name), dtype) for f in dataclasses.fields(obj)})
    return obj


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running statistics under the float model's keys, copied."""
    state = eagerq.float_state_dict(model)
    return {key: value.clone() for key, value in state.items() if "running_" in key or "num_batches" in key}


@contextlib.contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers are put back as they were."""
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in saved:
            buffer.copy_(value)


class RefusedInput(RuntimeError):
    """The model's own forward or backward failed on this input."""


class Step:
    """Output, gradients and statistics of one training step's forward and backward, the loss scaled as in mixed precision."""

    def __init__(self, model: nn.Module, inputs: Inputs, dtype: torch.dtype, keep: bool = True, scale: float = 1.0) -> None:
        model.to(dtype).train()
        with kept_buffers(model) if keep else contextlib.nullcontext():
            out = run(model, inputs, dtype)
            loss = sum((o.square().mean() for o in out if o.requires_grad), torch.zeros(()))
            if isinstance(loss, Tensor) and loss.requires_grad:
                (loss * scale).backward()
            self.outputs = [o.detach() for o in out]
            self.statistics = statistics(model)
        self.gradients = [parameter.grad for parameter in model.parameters()]
        self.parameters = list(model.parameters())
        for parameter in self.parameters:
            parameter.grad = None

    def to_one(self) -> float:
        """A power of two that brings the largest gradient down to about one, so that gradients of a like model stay in range."""
        largest = max((float(g.abs().max()) for g in self.gradients if g is not None and g.numel()), default=0.0)
        return 2.0 ** -max(math.frexp(largest)[1], 0) if math.isfinite(largest) else 2.0**-128

    def difference(self, other: Step) -> tuple[float, str]:
        """The largest difference relative to the largest entry, and where it is; infinite for a different structure."""
        worst = (0.0, "nowhere")
        if len(self.outputs) != len(other.outputs):
            return float("inf"), "the number of outputs"
        for i, (a, b) in enumerate(zip(self.outputs, other.outputs, strict=True)):
            worst = max(worst, (relative(a, b), f"output {i}"))
        if self.statistics.keys() != other.statistics.keys():
            return float("inf"), "the keys of the statistics"
        for key, value in self.statistics.items():
            worst = max(worst, (relative(value, other.statistics[key]), key))
        theirs = {id(p): g for p, g in zip(other.parameters, other.gradients, strict=True)}
        floor: float | None = None
        for i, (parameter, grad) in enumerate(zip(self.parameters, self.gradients, strict=True)):
            if id(parameter) not in theirs or (theirs[id(parameter)] is None) != (grad is None):
                return float("inf"), f"whether parameter {i} of {tuple(parameter.shape)} has a gradient"
            if grad is None or torch.equal(grad, theirs[id(parameter)]):
                continue
            if floor is None:
                floor = max(g.abs().max().item() for g in self.gradients if g is not None and g.numel()) * 1e-9
            worst = max(worst, (relative(grad, theirs[id(parameter)], floor), f"gradient {i} of {tuple(parameter.shape)}"))
        return worst


def relative(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """max|a - b| / max|a|."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel() or torch.equal(a, b):
        return 0.0
    a, b = a.double(), b.double()
    found = ((a - b).abs().max() / max(a.abs().max().item(), floor, 1e-300)).item()
    return found if found == found else float("inf")


def broken_laws(
    model: nn.Module, example_inputs: Any, dtype: torch.dtype = torch.float64, qconfig: Any = None
) -> tuple[list[str], dict[str, Any]]:
    """Every law that does not hold, in words; and what was measured on the way. ``model`` is float32 and is used up.

    ``RefusedInput`` if the model itself does not take the input.
    """
    (inputs,) = as_runs(example_inputs)
    problems: list[str] = []
    facts: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
    try:
        expected = Step(model, inputs, dtype)
    except Exception as error:
        if dtype is torch.float32 or not _is_about_dtype(error):
            raise RefusedInput(str(error)) from error
        facts["dtype"] = f"float32, since: {str(error)[:120]}"
        dtype = torch.float32
        expected = Step(model, inputs, dtype)
    if not all(is_finite(o) for o in expected.outputs):
        return ["the float model itself gives NaN or infinity with these weights"], facts
    model.float()
    known = expected if dtype is torch.float32 else None
    before = _evaluated(model, inputs, known)

    fused = eagerq.fuse_modules(model, example_inputs=example_inputs, inplace=True)
    after = _evaluated(fused, inputs)
    for what in before:
        if before[what].keys() != after[what].keys():
            problems.append(f"fused: other keys in {what}")
        elif not all(_same(before[what][key], after[what][key]) for key in before[what]):
            problems.append(f"fused: {what} differ from the float model's")
    finite = all(is_finite(o) for o in before["eval outputs"].values())
    del before, after

    try:
        qat = eagerq.convert_qat(fused, qconfig, example_inputs=example_inputs, inplace=True)
    except StateError as error:
        if "found nothing to quantize" not in str(error):
            raise
        facts["quantized"] = 0
        return problems, facts
    facts["quantized"] = sum(row[2] == "QAT" for row in eagerq.report(qat).rows)
    qat.apply(eagerq.disable_fake_quant).apply(eagerq.disable_observer)
    error, where = expected.difference(Step(qat, inputs, dtype))
    facts["learning"] = error
    if error > TOLERANCE[dtype]:
        problems.append(f"QAT without fake quantization: {where} differs by {error:.1e}")
    scale = expected.to_one()  # deep nets without norms, nfnet_f7, have gradients of 1e25 and more
    del expected

    qat.float().apply(eagerq.enable_fake_quant).apply(eagerq.enable_observer)
    with torch.no_grad():
        run(qat.train(), inputs)  # activations are quantized once a range is known
    step = Step(qat, inputs, torch.float32, keep=False, scale=scale)
    if not all(is_finite(t) for t in (*step.outputs, *(g for g in step.gradients if g is not None))):
        problems.append("QAT: output or gradients hold NaN or infinity")
    del step
    if not facts["quantized"]:
        return problems, facts
    with torch.no_grad():
        qat.eval()
        with kept_buffers(qat):
            wanted = run(qat, inputs)
        try:
            deployed = eagerq.convert(qat, inplace=True)
        except StateError as error:
            problems.append(f"convert: {error}")
            return problems, facts
        given = run(deployed, inputs)
    if not (len(wanted) == len(given) and all(_same(a, b) for a, b in zip(wanted, given, strict=True))):
        problems.append("deployed: output differs from the QAT model's in eval")
    if finite and not all(is_finite(o) for o in given):
        problems.append("deployed: output holds NaN or infinity, the float model's does not")
    return problems, facts


def _evaluated(model: nn.Module, inputs: Inputs, trained: Step | None = None) -> dict[str, dict[str, Tensor]]:
    """float32 outputs in eval and in train mode, and the statistics after; those of training may be known from a step."""
    found: dict[str, dict[str, Tensor]] = {}
    with torch.no_grad(), kept_buffers(model):
        found["eval outputs"] = {str(i): o.clone() for i, o in enumerate(run(model.eval(), inputs))}
        with torch.enable_grad():  # some attention kernels depend on it
            outputs = trained.outputs if trained else [o.detach() for o in run(model.train(), inputs)]
        found["train outputs"] = {str(i): o.clone() for i, o in enumerate(outputs)}
        found["statistics"] = trained.statistics if trained else statistics(model)
    return found


def is_finite(t: Tensor) -> bool:
    """No NaN and no infinity; one pass, where ``isfinite`` takes four."""
    return not t.numel() or all(math.isfinite(end) for end in torch.aminmax(t))


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit; NaN is equal to NaN."""
    if a.shape != b.shape:
        return False
    return torch.equal(a, b) or torch.equal(torch.nan_to_num(a, nan=123.0), torch.nan_to_num(b, nan=123.0))


def _is_about_dtype(error: Exception) -> bool:
    words = str(error).lower()
    return any(word in words for word in ("dtype", "double", "float64", "scalar type"))
