"""Write a deployed model as ONNX with integer weights and QuantizeLinear / DequantizeLinear pairs."""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import io
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eagerq.checks import check_model
from eagerq.deploy.kernels import Export, kernels_of
from eagerq.deploy.rewrites import keep_float, pair_moves, sum_hardsigmoids
from eagerq.deploy.subpixel import in_subpixel_form
from eagerq.deploy.verification import numbered
from eagerq.errors import ExportError, InputsError, MissingExtraError, StateError
from eagerq.extras import require
from eagerq.inputs import Inputs, runs_for
from eagerq.nn.modules.batchnorm import is_foldable
from eagerq.nn.qat.split import SplitActivation
from eagerq.nn.quantized import QuantizedModule, is_deployed
from eagerq.record import record_of

OPSETS = range(17, 24)
#: torch's exporter writes no older one; ONNX's own converter takes it down from there.
_OLDEST_WRITTEN = 18


def export_onnx(
    model: nn.Module, path: str | os.PathLike[str], example_inputs: Any = None, *, opset: int = 18, strict: bool = False
) -> Export:
    """Write ``model`` to ``path`` as an ONNX file that integer engines run as integers.

    Weights are int8 and biases int32 initializers behind DequantizeLinear; every fixed quantizer is
    a QuantizeLinear, DequantizeLinear pair. The batch axis (axis 0 of each input) is dynamic where the
    model allows. The graph is checked by ONNX's checker and written beside ``path``, then renamed.

    Where ONNX Runtime is installed it is asked which operations it runs as integer kernels; the result lists the others
    with their reasons. On x86 processors without VNNI its u8 x s8 kernels saturate: set the session option
    ``session.x64quantprecision`` to ``1`` there.

    Args:
        model: what ``convert`` returned.
        path: the file to write.
        example_inputs: as for ``plan_fusion``; None takes those the model was fused or converted with.
        opset: ONNX operator set, 17 to 23.
        strict: refuse a file in which ONNX Runtime runs, in float, a linear map with integer weights or another operation
            between quantized tensors (norms and layers that stayed float are known to run so).

    Returns:
        An ``Export``: the path written, which it can be used as, and the engine's kernels.

    Raises:
        StateError: if the model is not deployed, or no float32 model.
        InputsError: if there are no example inputs.
        ExportError: if torch.export cannot capture the model, the checker rejects the graph, ``strict`` refuses it or
            the file cannot be written; no file is left.
        MissingExtraError: without ``onnx`` or ``onnxscript``; with ``strict``, without ``onnxruntime``.
    """
    onnx = require("onnx", "onnx")
    require("onnx.version_converter", "onnx")
    require("onnxscript", "onnx")
    check_model(model)
    if not is_deployed(model):
        raise StateError("wanted a deployed model, found one without integer weights; call eagerq.convert first.")
    kinds = {m.dtype for m in model.modules() if isinstance(m, QuantizedModule)} - {torch.float32}
    if kinds:
        raise StateError(f"wanted a float32 model, as engines take it, found {kinds.pop()}; call .float() on a copy of it.")
    if opset not in OPSETS:
        raise ExportError(f"wanted an opset from {OPSETS.start} to {OPSETS.stop - 1}, found {opset!r}.")
    target = Path(path)
    if not target.parent.is_dir():
        raise ExportError(f"wanted an existing folder for {target}, found none at {target.parent}; create it first.")
    if target.is_dir():
        raise ExportError(f"wanted a file to write, found the folder {target}; add a file name.")
    proto = _exported(model, _example(model, example_inputs), max(opset, _OLDEST_WRITTEN))
    _tidy(onnx, proto)
    sums = {name for name, module in model.named_modules() if isinstance(module, SplitActivation) and module.sums}
    sum_hardsigmoids(onnx, proto, {node.name for node in proto.graph.node if _scope(node) in sums})
    pair_moves(onnx, proto)
    keep_float(onnx, proto)
    _unshare(proto)
    _name_codes(proto)
    # ONNX Runtime names what it makes of a node after that, or after its result
    modules = {name: _scope(node) or "" for node in proto.graph.node for name in (node.name, *node.output)}
    if opset < _OLDEST_WRITTEN:
        proto = _older(onnx, proto, opset)
    _describe(proto)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise ExportError(f"ONNX's checker rejects the exported graph: {error}") from error
    export = _asked(model, proto, target, modules, strict)
    _write(target, proto.SerializeToString())
    return export


def _asked(model: nn.Module, proto: Any, target: Path, modules: dict[str, str], strict: bool) -> Export:
    """What ONNX Runtime, if it is there, makes of the graph."""
    try:
        runtime = require("onnxruntime", "onnx")
    except MissingExtraError:
        if strict:
            raise
        return Export(target, None, ())
    named = dict(model.named_modules())
    quantized = frozenset(n for n, m in named.items() if isinstance(m, QuantizedModule) and m.weight_scale is not None)
    norms = frozenset(n for n, m in named.items() if is_foldable(m))
    try:
        kernels = kernels_of(proto, modules, quantized, norms)
    except Exception as error:
        text = " ".join(str(error).split())
        raise ExportError(f"ONNX Runtime {runtime.__version__} does not take the exported graph: {text[:200]}") from error
    export = Export(target, f"ONNX Runtime {runtime.__version__}", tuple(kernels))
    wrong = [kernel for kernel in export.floats if not kernel.expected]
    if strict and wrong:
        found = "; ".join(f"{k.op} of {k.module or 'the model'} ({k.reason})" for k in wrong[:5])
        raise ExportError(
            f"strict=True wants integer kernels, found {len(wrong)} operations in float: {found}."
            " Pass strict=False to write the file all the same, or a qconfig that quantizes around them."
        )
    return export


def _example(model: nn.Module, example_inputs: Any) -> Inputs:
    record = record_of(model)
    runs = runs_for(model, example_inputs, None if record is None else record.runs)
    if runs is None:
        raise InputsError("export_onnx wants example inputs, found none; pass example_inputs as model(...) takes them.")
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))

    def real(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_meta:
            value = torch.zeros_like(value, device=device)
        # torch.export takes a batch of one for a constant
        return torch.cat([value, value]) if opens and value.dim() > 1 and value.shape[0] == 1 else value

    run = runs[0]
    opens = _batches(model, run) is not None
    return Inputs(tuple(real(v) for v in run.args), {k: real(v) for k, v in run.kwargs.items()})


def _batches(model: nn.Module, run: Inputs) -> Any:
    """Which axes are to stay open, as torch.export takes it; None where it can be told of none."""

    def batch(value: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.dim() else None

    values = (*run.args, *run.kwargs.values())
    if not all(isinstance(v, (Tensor, bool, int, float, str, type(None))) for v in values) or (run.args and run.kwargs):
        return None
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if run.kwargs:
        return {k: batch(v) for k, v in run.kwargs.items()} if {*run.kwargs} <= {*named} else None
    placed = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    first, rest = run.args[:placed], run.args[placed:]  # what ``*args`` takes is one entry
    return (*map(batch, first), tuple(map(batch, rest))) if rest else tuple(map(batch, first))


def _exported(model: nn.Module, run: Inputs, opset: int) -> Any:
    was_training = model.training
    try:
        with _quiet(), torch.no_grad(), in_subpixel_form(model.eval()) as form:
            shapes = _batches(form, run)
            program = torch.onnx.export(
                form, run.args, kwargs=run.kwargs, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False
            )
        return program.model_proto  # type: ignore[union-attr]
    except Exception as error:
        why = _unknown_output(model, run) or _reason(error)
        raise ExportError(f"torch.export could not make an ONNX graph of {type(model).__name__}: {why}") from error
    finally:
        model.train(was_training)


def _unknown_output(model: nn.Module, run: Inputs) -> str | None:
    """What to do about an output of a type that torch.export does not look into, of which PyTorch's versions say other things."""
    try:
        with torch.no_grad():
            leaves = torch.utils._pytree.tree_leaves(model(*run.args, **run.kwargs))
    except Exception:  # then the exporter says more
        return None
    kinds = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, bool, int, float, complex, str, type(None)))]
    if not kinds:
        return None
    return f"it gives a {kinds[0]}; give tensors, tuples or dicts, or make that type known by torch.export.register_dataclass."


def _reason(error: BaseException) -> str:
    """The first line of what the exporter's own error goes back to, and what to do about the usual one."""
    while error.__cause__ is not None and type(error).__module__.startswith("torch.onnx"):
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}".splitlines()[0])
    if "data-dependent" in text:
        return f"{text} A model with control flow on tensor values has no ONNX graph; export the part that has none."
    return text


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and warns of its own internals."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _write(target: Path, data: bytes) -> None:
    try:
        handle, beside = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(beside, 0o666 & ~umask)
            os.replace(beside, target)
        except BaseException:
            os.unlink(beside)
            raise
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror or error}; choose a path that can be written.") from error


# --- graph clean-up: forms that engines fuse ------------------------------------------------------


def _tidy(onnx: Any, proto: Any) -> None:
    """Drop activations that change nothing, and name global pooling as engines know it."""
    graph = proto.graph
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    producers = {out: node for node in graph.node for out in node.output}
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        if node.op_type == "Relu" and _is_nonnegative(node.input[0], producers, constants):
            renamed[node.output[0]] = node.input[0]
            continue
        if node.op_type == "ReduceMean" and _is_global_pool(node, constants, graph):
            node.op_type = "GlobalAveragePool"
            del node.input[1:]
            del node.attribute[:]
        kept.append(node)
    outputs = {o.name for o in graph.output}
    if outputs & set(renamed):  # an output keeps its name
        return
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in graph.node for name in node.input} | outputs
    unused = [i for i in graph.initializer if i.name not in used]
    for initializer in unused:
        graph.initializer.remove(initializer)


def _unshare(proto: Any) -> None:
    """Give each module its own weight codes and zero point: ONNX Runtime replaces them one by one where it turns s8 into u8.

    The exporter stores equal ones once: the zero points of most weights, and the codes of many norms that fold into nothing.
    """
    stored = {i.name: i for i in proto.graph.initializer}
    taken: set[str] = set()
    nodes = list(proto.graph.node)
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    kept: list[Any] = []
    for node in nodes:
        kept.append(node)
        if node.op_type != "DequantizeLinear" or len(node.input) < 3 or not {node.input[0], node.input[2]} <= set(stored):
            continue
        made, dequantizers = readers.get(node.output[0], []), [node]
        for i, scope in enumerate(list(dict.fromkeys(map(_scope, made)))[1:], 1):  # modules whose scales are equal too
            own = copy.deepcopy(node)
            own.name, own.output[0] = f"{node.name}.{i}", f"{node.output[0]}.{i}"
            for reader in made:
                if _scope(reader) == scope:
                    reader.input[:] = [own.output[0] if name == node.output[0] else name for name in reader.input]
            del own.metadata_props[:]
            own.metadata_props.extend(next(reader for reader in made if _scope(reader) == scope).metadata_props)
            dequantizers.append(own)
            kept.append(own)
        for dequantizer in dequantizers:
            for place, kind in ((0, "codes"), (2, "zero_point")):
                name = dequantizer.input[place]
                if name in taken:
                    copied = proto.graph.initializer.add()
                    copied.CopyFrom(stored[name])
                    copied.name = dequantizer.input[place] = f"{dequantizer.output[0]}.own_{kind}"
                taken.add(name)
    if len(kept) > len(nodes):
        kept = [copy.deepcopy(node) for node in kept]
        del proto.graph.node[:]
        proto.graph.node.extend(kept)


def _older(onnx: Any, proto: Any, opset: int) -> Any:
    for node in proto.graph.node:  # the converter leaves a default in place that older reductions do not know
        for attribute in [a for a in node.attribute if a.name == "noop_with_empty_axes" and not a.i]:
            node.attribute.remove(attribute)
    try:
        converted = onnx.version_converter.convert_version(proto, opset)
    except Exception as error:
        text = " ".join(str(error).split())
        raise ExportError(f"this graph has no form in opset {opset}: {text[:200]}; pass opset={_OLDEST_WRITTEN}.") from error
    return converted


def _name_codes(proto: Any) -> None:
    """Name each tensor of codes after its quantizer, so that ``verify_deployment`` finds it: what its DequantizeLinear reads."""
    made = {name for node in proto.graph.node for name in node.output}
    names: dict[str, str] = {}
    calls: dict[str, int] = {}
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in made or node.input[0] in names:
            continue
        quantizer = _scope(node)
        if quantizer is not None:
            names[node.input[0]] = numbered(quantizer, calls)
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in proto.graph.value_info:
        value.name = names.get(value.name, value.name)


def _scope(node: Any) -> str | None:
    """Full name of the module that made this node, as torch's exporter notes it."""
    noted = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), None)
    scopes = [] if noted is None else ast.literal_eval(noted)
    return scopes[-2] if len(scopes) > 1 else None


def _describe(proto: Any) -> None:
    """Who wrote it; what torch's exporter notes of its own run (source paths, stack traces) is left out."""
    proto.producer_name, proto.producer_version = "eagerq", version("eagerq")
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del part.metadata_props[:]
    for initializer in proto.graph.initializer:
        del initializer.metadata_props[:]


def _is_nonnegative(name: str, producers: Any, constants: Any) -> bool:
    """Whether the value comes off a quantizer whose lowest code stands for zero."""
    node = producers.get(name)
    while node is not None and node.op_type in ("MaxPool", "Reshape", "Flatten", "Transpose", "Relu"):
        node = producers.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear" or len(node.input) < 3:
        return False
    zero = constants.get(node.input[2])
    lowest = {"uint8": 0, "int8": -128}.get("" if zero is None else zero.dtype.name)
    return lowest is not None and bool((zero == lowest).all())


def _is_global_pool(node: Any, constants: Any, graph: Any) -> bool:
    """A mean over axes 2 and 3 of four that keeps them."""
    keep = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
    axes = constants.get(node.input[1]) if len(node.input) > 1 else None
    if axes is None or not keep:
        return False
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.value_info, *graph.input)}
    return ranks.get(node.input[0]) == 4 and sorted(int(a) % 4 for a in axes.reshape(-1)) == [2, 3]
