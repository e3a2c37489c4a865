"""Graph rewrites: the forms of a quantized graph that ONNX Runtime runs on codes."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch

from eagerq.quant.engine import Grid, hardsigmoid_terms

#: Operators whose result holds only values of their first input, and that ONNX Runtime 1.32 runs on codes between a
#: DequantizeLinear and a QuantizeLinear of the same grid. GatherND, Pad and SpaceToDepth it does not.
_PAIRED = frozenset("Concat DepthToSpace Expand Flatten Gather ReduceMax Resize Split Tile".split())
_CLAMPS = frozenset({"Relu", "Clip"})
#: What ends the name of a node that only keeps its neighbours in float.
KEPT = "/kept_float"
#: Such operators that it moves the DequantizeLinear behind by itself.
_PASSED = frozenset("Identity MaxPool Reshape Slice Squeeze Transpose Unsqueeze".split())


def _readers(graph: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            found[name].append(node)
    return found


def _keeps_values(node: Any) -> bool:
    modes = [attribute.s for attribute in node.attribute if attribute.name == "mode"]
    return node.op_type != "Resize" or modes in ([], [b"nearest"])


def pair_moves(onnx: Any, proto: Any) -> None:
    """Write a quantizer's own grid again behind what only moves its values: engines drop both sides and move codes.

    Without it such an operator runs in float, and the convolution that reads its result with it. Q(D(q)) is q: the real
    value of a code of eight bits, over its scale, is nearer to the code than a half in float32.

    The shape of a quantized tensor is read from its codes, so that no real values are made for it.
    """
    graph = proto.graph
    stored = {initializer.name for initializer in graph.initializer}
    readers = _readers(graph)
    grids: dict[str, tuple[str, str]] = {}  # scale and zero point of each real value on a grid
    codes: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "DequantizeLinear" and node.input[0] not in stored and len(node.input) == 3:
            grids[node.output[0]] = (node.input[1], node.input[2])
            codes[node.output[0]] = node.input[0]
        if node.op_type == "Shape":
            node.input[0] = codes.get(node.input[0], node.input[0])
        if node.op_type not in _PAIRED | _PASSED or not _keeps_values(node):
            continue
        sources = {grids.get(name) for name in (node.input if node.op_type == "Concat" else node.input[:1])}
        grid = sources.pop()
        if sources or grid is None:
            continue
        outputs = node.output[:1] if node.op_type == "MaxPool" else node.output
        grids.update(dict.fromkeys(outputs, grid))
        # a quantizer of its own behind it stays: of two pairs in a row ONNX Runtime makes one, on a third grid
        if node.op_type in _PASSED or any(r.op_type == "QuantizeLinear" for name in outputs for r in readers[name]):
            continue
        for i, name in enumerate(node.output):
            moved, again = f"{name}/moved", f"{name}/again"
            node.output[i] = moved
            nodes.append(onnx.helper.make_node("QuantizeLinear", [moved, *grid], [again], name=again))
            nodes.append(onnx.helper.make_node("DequantizeLinear", [again, *grid], [name], name=f"{name}/pair"))
            codes[name] = again
    del graph.node[:]
    graph.node.extend(nodes)


def keep_float(onnx: Any, proto: Any) -> None:
    """Write Max(x, -inf), which is x, where ONNX Runtime's optimiser would compute something else on codes.

    It makes integer kernels of three things that are none: a convolution or Gemm whose weights are float, between quantized
    tensors (it quantizes the weights itself); two quantizers in a row (it makes one of them, on a third grid); an average pool
    with ``ceil_mode`` that counts padding (its integer kernel counts otherwise). Behind a Max they run in float, as in the model.
    Where such a pool's windows fit, ``ceil_mode`` says nothing and is taken away.
    """
    graph = proto.graph
    values = {initializer.name: onnx.numpy_helper.to_array(initializer) for initializer in graph.initializer}
    shapes = {v.name: v.type.tensor_type for v in (*graph.value_info, *graph.input, *graph.output)}
    producers = {name: node for node in graph.node for name in node.output}
    readers = _readers(graph)
    constants = {*values, ""}
    for node in graph.node:
        if all(name in constants for name in node.input):
            constants.update(node.output)

    def changes_nothing(node: Any) -> bool:
        neutral = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}.get(node.op_type)
        return neutral is not None and any(bool((values[name] == neutral).all()) for name in node.input if name in values)

    def source(name: str, past: frozenset[str]) -> Any:
        """The node that made a value, past those that move it."""
        node = producers.get(name)
        while node is not None and (node.op_type in past or changes_nothing(node)):
            node = producers.get(next((name for name in node.input if name not in constants), ""))
        return node

    def is_read_from_codes(node: Any) -> bool:
        before = source(node.input[0], _PASSED | _PAIRED | _CLAMPS)
        return before is not None and before.op_type == "DequantizeLinear"

    def has_float_weight(node: Any) -> bool:
        weight = producers.get(node.input[1])
        return node.input[1] in constants and (weight is None or weight.op_type != "DequantizeLinear")

    def attributes(node: Any) -> dict[str, Any]:
        return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}

    def fits(node: Any) -> bool:
        """Whether a pool's windows end where its padded input does."""
        given = attributes(node)
        kernel = given["kernel_shape"]
        n = len(kernel)
        strides, pads, dilations = given.get("strides", [1] * n), given.get("pads", [0] * 2 * n), given.get("dilations", [1] * n)
        kind = shapes.get(node.input[0])
        sizes = [] if kind is None else [d.dim_value for d in kind.shape.dim][-n:]
        if len(sizes) != n or not all(sizes):
            return False
        axes = zip(sizes, pads[:n], pads[n:], kernel, dilations, strides, strict=True)
        return all((size + a + b - ((k - 1) * d + 1)) % stride == 0 for size, a, b, k, d, stride in axes)

    def counts_padding(node: Any) -> bool:
        """Whether it is a pool that ONNX Runtime counts otherwise."""
        given = attributes(node) if node.op_type == "AveragePool" else {}
        return bool(given.get("ceil_mode") and given.get("count_include_pad"))

    def other_grids(name: str) -> list[Any]:
        """Quantizers that put a value, which is on a grid, on another."""
        before = source(name, _PASSED | _PAIRED - {"Concat"})
        if before is None or before.op_type != "DequantizeLinear" or before.input[0] in constants:
            return []
        return [n for n in readers[name] if n.op_type == "QuantizeLinear" and [*n.input[1:]] != [*before.input[1:]]]

    def kept(source: str, target: str, node: Any) -> Any:
        made = onnx.helper.make_node("Max", [source, lowest], [target], name=f"{target}{KEPT}")
        made.metadata_props.extend(node.metadata_props)
        return made

    lowest, nodes = f"lowest{KEPT}", []
    for node in graph.node:
        nodes.append(node)
        if counts_padding(node) and fits(node):
            node.attribute.remove(next(attribute for attribute in node.attribute if attribute.name == "ceil_mode"))
        linear = node.op_type in ("Conv", "ConvTranspose", "Gemm") and has_float_weight(node) and is_read_from_codes(node)
        if linear or counts_padding(node):
            name = node.output[0]
            node.output[0] = f"{name}/float"
            nodes.append(kept(node.output[0], name, node))
            continue
        for name in node.output:
            again = other_grids(name)
            if again:
                nodes.append(kept(name, f"{name}/float", node))
            for quantizer in again:
                quantizer.input[0] = f"{name}/float"
    if len(nodes) > len(graph.node):
        graph.initializer.append(onnx.helper.make_tensor(lowest, onnx.TensorProto.FLOAT, [], [float("-inf")]))
        nodes = [copy.deepcopy(node) for node in nodes]
        del graph.node[:]
        graph.node.extend(nodes)


def sum_hardsigmoids(onnx: Any, proto: Any, names: Collection[str]) -> None:
    r"""Write :math:`\mathrm{clip}(x/6 + 1/2, 0, 1)` between quantizers as an Add of a sixth of the codes' scale and one half.

    ONNX Runtime has QLinearAdd and no integer HardSigmoid. The clip is that of the codes, where there are
    ``hardsigmoid_terms``; elsewhere the node stays.

    Args:
        onnx: the library.
        proto: the model, changed in place.
        names: of the HardSigmoid nodes that may become sums.
    """
    graph = proto.graph
    values = {initializer.name: initializer for initializer in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    readers = _readers(graph)
    outputs = {output.name for output in graph.output}
    array = onnx.numpy_helper

    def grid_of(node: Any, op: str) -> Grid | None:
        if node.op_type != op or len(node.input) < 3 or not {*node.input[1:3]} <= values.keys():
            return None
        scale, zero = (array.to_array(values[name]) for name in node.input[1:3])
        kinds = {"uint8": (0, 255), "int8": (-128, 127)}
        if zero.dtype.name not in kinds or scale.size != 1 or zero.size != 1:
            return None
        low, high = kinds[zero.dtype.name]
        return Grid(torch.tensor(float(scale.item())), torch.tensor(float(zero.item())), low, high)

    def sum_of(node: Any) -> tuple[Any, tuple[Grid, Grid]] | None:
        """The DequantizeLinear before a node that can be a sum, and the grids of its terms."""
        before, after = producers.get(node.input[0]), readers[node.output[0]]
        if before is None or len(after) != 1 or outputs & {*node.output}:
            return None
        of_x, grid = grid_of(before, "DequantizeLinear"), grid_of(after[0], "QuantizeLinear")
        terms = None if of_x is None or grid is None else hardsigmoid_terms(of_x, grid)
        return None if terms is None else (before, terms)

    def constant(name: str, value: float, kind: int) -> str:
        if name not in values:
            values[name] = onnx.helper.make_tensor(name, kind, [], [value])
            graph.initializer.append(values[name])
        return name

    nodes = []
    for node in graph.node:
        found = sum_of(node) if node.op_type == "HardSigmoid" and node.name in names else None
        if found is not None:
            before, terms = found
            scale, zero = before.input[1:3]
            kind, real = values[zero].data_type, onnx.TensorProto.FLOAT
            sixth = [before.input[0], constant(f"{scale}/6", float(terms[0].scale), real), zero]
            half = [
                constant(f"half/code/{kind}", 1, kind),
                constant("half/scale", float(terms[1].scale), real),
                constant(f"half/zero/{kind}", int(terms[1].zero_point), kind),
            ]
            for i, inputs in enumerate((sixth, half)):
                term = f"{node.output[0]}/{i}"
                nodes.append(onnx.helper.make_node("DequantizeLinear", inputs, [term], name=term))
                node.input[i:] = [term]
            nodes[-2].metadata_props.extend(before.metadata_props)  # the codes keep their quantizer's name
            node.op_type = "Add"
            del node.attribute[:]
        nodes.append(node)
    read = {name for node in nodes for name in node.input} | outputs
    del graph.node[:]
    graph.node.extend(node for node in nodes if read & {*node.output})
