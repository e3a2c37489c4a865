"""What engines that cannot be run here ask of an ONNX file, one function of rules an engine; each gives the faults it finds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx

WEIGHTED = ("Conv", "ConvTranspose", "Gemm")
#: They move codes: engines carry a DequantizeLinear in front of them to behind them.
MOVING = ("MaxPool", "Reshape", "Flatten", "Transpose", "Slice", "Split")
CLIPPING = ("Relu", "Clip")


class Graph:
    """An ONNX graph with its constants, producers and readers by tensor name."""

    def __init__(self, file: Any) -> None:
        self.proto = file if isinstance(file, onnx.ModelProto) else onnx.load(file)
        self.nodes = list(self.proto.graph.node)
        self.constants = {i.name: onnx.numpy_helper.to_array(i) for i in self.proto.graph.initializer}
        self.producer = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def of(self, *kinds: str) -> Iterator[Any]:
        return (node for node in self.nodes if node.op_type in kinds)

    def source(self, name: str, through: tuple[str, ...] = ()) -> Any:
        """The node that made a tensor, found back through nodes of the given kinds; None for inputs and constants."""
        node = self.producer.get(name)
        while node is not None and node.op_type in through:
            node = self.producer.get(node.input[0])
        return node

    def is_dequantized(self, name: str, through: tuple[str, ...] = MOVING) -> bool:
        node = self.source(name, through)
        return node is not None and node.op_type == "DequantizeLinear"

    def is_quantized(self, name: str, through: tuple[str, ...] = CLIPPING) -> bool:
        """Whether all that reads a tensor is a QuantizeLinear, perhaps behind an activation that clips."""
        readers = self.readers.get(name, [])
        deeper = [r for r in readers if r.op_type in through]
        if any(not self.is_quantized(r.output[0], through) for r in deeper):
            return False
        return bool(readers) and all(r.op_type == "QuantizeLinear" or r in deeper for r in readers)

    def scale(self, node: Any) -> Any:
        return self.constants[node.input[1]]

    def zero_point(self, node: Any) -> Any:
        return self.constants[node.input[2]]

    def stored(self, name: str) -> Any:
        """The integers behind a dequantized constant, or None."""
        node = self.producer.get(name)
        return self.constants.get(node.input[0]) if node is not None and node.op_type == "DequantizeLinear" else None

    def axis(self, node: Any) -> int:
        return next((a.i for a in node.attribute if a.name == "axis"), 1)


def every_map_reads_codes(g: Graph) -> Iterator[str]:
    for node in g.of(*WEIGHTED):
        if not g.is_dequantized(node.input[0]):
            yield f"the input of {node.name} is not quantized"
        if g.stored(node.input[1]) is None:
            yield f"the weight of {node.name} is not stored as integers"


def every_map_gives_codes(g: Graph) -> Iterator[str]:
    for node in g.of(*WEIGHTED):
        if not g.is_quantized(node.output[0]):
            yield f"the output of {node.name} is not quantized"


def bias_on_the_grid_of_the_sums(g: Graph) -> Iterator[str]:
    """ONNX, QLinearConv: the bias is int32 with scale x_scale * w_scale and zero point 0."""
    for node in g.of(*WEIGHTED):
        if len(node.input) < 3 or not g.is_dequantized(node.input[0]) or g.stored(node.input[1]) is None:
            continue  # for which every_map_reads_codes has a word
        codes = g.stored(node.input[2])
        if codes is None or codes.dtype != np.int32:
            yield f"the bias of {node.name} is not int32"
            continue
        x, weight, bias = g.source(node.input[0], MOVING), g.producer[node.input[1]], g.producer[node.input[2]]
        if not np.array_equal(np.broadcast_to(g.scale(x) * g.scale(weight), g.scale(bias).shape), g.scale(bias)):
            yield f"the bias of {node.name} is on another grid than input scale * weight scale"
        if g.zero_point(bias).any():
            yield f"the bias of {node.name} has a zero point"


def all_codes_are(g: Graph, *kinds: str) -> Iterator[str]:
    for node in g.of("QuantizeLinear", "DequantizeLinear"):
        if g.zero_point(node).dtype.name not in kinds:
            yield f"{node.name} has codes of type {g.zero_point(node).dtype}"


def adds_with_a_convolution(g: Graph) -> Iterator[tuple[Any, str, str]]:
    """(add, the convolution's result that it alone reads, the other operand)."""
    for add in g.of("Add"):
        sums = [n for n in add.input if g.producer.get(n) is not None and g.producer[n].op_type in WEIGHTED[:2]]
        sums = [n for n in sums if len(g.readers[n]) == 1]
        for name in sums:
            yield add, name, next(n for n in add.input if n != name)


# --- engines --------------------------------------------------------------------------------------------


def onnxruntime_arm(g: Graph) -> list[str]:
    """ONNX Runtime with int8 activations.

    - int8 for both: "S8S8 with QDQ is the default setting [...] should be the first choice" (onnxruntime,
      docs/performance/model-optimizations/quantization.md, Data type selection).
    - input, weight and output of one type, else the node group is not taken as a whole
      (onnxruntime/core/optimizer/qdq_transformer/selectors_actions/qdq_selectors.cc, ConvNodeGroupSelector).
    - weights symmetric, one scale a channel: what its kernels for ARM take with int8 (mlas, QLinearConv).
    """
    faults = [*every_map_reads_codes(g), *bias_on_the_grid_of_the_sums(g), *all_codes_are(g, "int8", "int32")]
    for node in g.of("Conv"):
        if not g.is_quantized(node.output[0]):
            faults.append(f"the output of {node.name} is not quantized")
        if g.zero_point(g.producer[node.input[1]]).any():
            faults.append(f"the weight of {node.name} has a zero point")
    return faults


def tensorrt(g: Graph) -> list[str]:
    """TensorRT's parser and its advice on explicit quantization.

    Parser: onnx-tensorrt, onnxOpImporters.cpp, QuantDequantLinearHelper. Advice: NVIDIA TensorRT documentation, "Working
    with Quantized Types", "Explicit Quantization", Q/DQ layer-placement recommendations.
    """
    faults = [*every_map_reads_codes(g)]
    # Parser: int8 only (no uint8; int32 is no activation type, so that no bias is dequantized: microsoft/onnxruntime#14229).
    faults += all_codes_are(g, "int8")
    for node in g.of("QuantizeLinear", "DequantizeLinear"):
        scale, zero = g.scale(node), g.zero_point(node)
        # Parser: "Non-zero zero point is not supported".
        if zero.any():
            faults.append(f"{node.name} has a zero point other than 0")
        # Parser: "The scale and zero point must have the same volume".
        if zero.size != scale.size:
            faults.append(f"{node.name} has {scale.size} scales and {zero.size} zero points")
        # Parser: "Scale coefficients must all be positive".
        if scale.dtype != np.float32 or not (scale > 0).all():
            faults.append(f"{node.name} has scales that are not positive float32")
        # Parser: "The number of scales is not equal to the number of output channels".
        codes = g.constants.get(node.input[0])
        if scale.size > 1 and (codes is None or codes.shape[g.axis(node)] != scale.size):
            faults.append(f"{node.name} has not one scale for each output channel")
    for node in g.of(*WEIGHTED):
        # Parser and builder: a float bias is a constant of the layer.
        if len(node.input) > 2 and (node.input[2] not in g.constants or g.constants[node.input[2]].dtype != np.float32):
            faults.append(f"the bias of {node.name} is not a float constant")
        # Advice: per-tensor for activations, per-channel for weights.
        weight = g.producer.get(node.input[1])
        if weight is not None and weight.op_type == "DequantizeLinear" and g.scale(weight).size == 1:
            faults.append(f"the weight of {node.name} has one scale")
    # Advice: quantize the residual input in skip connections, so that the convolution, the add and what follows fuse;
    # by default do not quantize the outputs of weighted operations.
    for add, _, other in adds_with_a_convolution(g):
        if not g.is_dequantized(other) and g.producer.get(other) is not None:
            faults.append(f"the shortcut of {add.name} is not quantized")
    for add in g.of("Add"):
        if all(g.is_dequantized(name, ()) for name in add.input):
            faults.append(f"no convolution can take in {add.name}: both operands are quantized")
    return faults


#: onnxruntime, docs/execution-providers/QNN-ExecutionProvider.md, Supported ONNX operators (those that these nets could hold).
QNN_OPERATORS = frozenset(
    "Add AveragePool BatchNormalization Clip Concat Conv ConvTranspose DequantizeLinear Flatten Gelu Gemm GlobalAveragePool"
    " HardSwish LeakyRelu MatMul MaxPool Mul Pad Prelu QuantizeLinear ReduceMean Relu Reshape Resize Sigmoid Slice Softmax Split"
    " Squeeze Sub Tanh Transpose Unsqueeze".split()
)


QNN_COMPUTING = ("Add", "Mul", "Sigmoid", "HardSwish", "LeakyRelu", "GlobalAveragePool", "AveragePool", "ReduceMean", "Concat")


def qnn(g: Graph) -> list[str]:
    """Qualcomm's HTP by ONNX Runtime's QNN execution provider.

    - "The QNN HTP backend only supports quantized models" (QNN-ExecutionProvider.md): every operator reads and gives codes.
      Those that move codes get theirs from ONNX Runtime itself (qdq_transformer/qdq_propagation.cc).
    - all of a map's inputs are dequantized, its bias too, or it is no unit (onnxruntime/onnxruntime-qnn#483).
    - "QNN operators typically support the uint8 and uint16 data types" (same page), and get_qnn_qdq_config
      (onnxruntime.quantization.execution_providers.qnn) has uint8 weights with one affine scale a tensor.
    - no shape is left open (same page, Model requirements).
    """
    faults = [*every_map_reads_codes(g), *every_map_gives_codes(g), *bias_on_the_grid_of_the_sums(g)]
    faults += all_codes_are(g, "uint8", "int32")
    faults += [f"{n.op_type} is no operator of the provider" for n in g.nodes if n.op_type not in QNN_OPERATORS]
    for node in g.of(*WEIGHTED):
        if g.scale(g.producer[node.input[1]]).size > 1:
            faults.append(f"the weight of {node.name} has several scales")
    for node in g.of(*QNN_COMPUTING):
        if not all(g.is_dequantized(name) for name in node.input if name not in g.constants):
            faults.append(f"an operand of {node.name} is not quantized")
        if not g.is_quantized(node.output[0]):
            faults.append(f"the output of {node.name} is not quantized")
    for value in (*g.proto.graph.input, *g.proto.graph.output):
        if any(d.dim_param for d in value.type.tensor_type.shape.dim):
            faults.append(f"{value.name} has an open shape")
    return faults


def vitis(g: Graph) -> list[str]:
    """AMD's DPU. "For DPU devices": Vitis AI 3.5, src/vai_quantizer/vai_q_onnx/README.md; compiler constraints: refine.py there.

    - activations, weights and biases int8, symmetric, one scale a tensor, that a power of two (README.md: activation_type,
      weight_type, per_channel, PowerOfTwoMethod; nndct_shared/quantization/quant_config.py, target DPU; AMD Quark,
      Int32Bias, QuantizeBias).
    - shifts: 0 <= shift_cut <= 16 and min(0, shift_cut - 16) <= shift_bias <= 16 of a convolution, with the positions
      p = -log2(scale), shift_cut = p_w + p_x - p_y and shift_bias = p_w + p_x - p_b; of an add or product
      max p_x - min p_x <= 15 and |min p_x - p_y| <= 15.
    """
    faults = [*every_map_reads_codes(g), *every_map_gives_codes(g), *all_codes_are(g, "int8")]
    for node in g.of("QuantizeLinear", "DequantizeLinear"):
        scale = g.scale(node)
        if scale.size != 1 or math.frexp(float(scale.reshape(-1)[0]))[0] != 0.5:
            faults.append(f"{node.name} has a scale that is no power of two")
        if g.zero_point(node).any():
            faults.append(f"{node.name} has a zero point")
    if faults:
        return faults

    def position(node: Any) -> int:
        return 1 - math.frexp(float(g.scale(node)))[1]

    def behind(name: str) -> int:
        while g.readers[name][0].op_type != "QuantizeLinear":
            name = g.readers[name][0].output[0]
        return position(g.readers[name][0])

    for node in g.of(*WEIGHTED):
        inside = position(g.source(node.input[0], MOVING)) + position(g.producer[node.input[1]])
        cut, shift = inside - behind(node.output[0]), inside - position(g.producer[node.input[2]])
        if not 0 <= cut <= 16:
            faults.append(f"{node.name} shifts its sum by {cut}")
        if not min(0, cut - 16) <= shift <= 16:
            faults.append(f"{node.name} shifts its bias by {shift}")
    for node in g.of("Add", "Mul"):
        places = [position(g.source(name, MOVING)) for name in node.input]
        if max(places) - min(places) > 15 or abs(min(places) - behind(node.output[0])) > 15:
            faults.append(f"{node.name} has operands or a result too far apart")
    return faults
