"""ONNX Runtime as this package runs it: one thread, every optimisation, sums that do not saturate."""

from __future__ import annotations

import functools
import os
from typing import Any

from eagerq.extras import require


@functools.cache
def saturates() -> bool:
    """Whether ONNX Runtime's u8 x s8 products saturate on this processor, found out by computing one.

    x86 without VNNI adds two products in 16 bits; there the session option ``session.x64quantprecision`` has to be set,
    which costs time everywhere else.

    Raises:
        MissingExtraError: without ``onnx`` or ``onnxruntime``.
    """
    onnx, runtime = require("onnx", "onnx"), require("onnxruntime", "onnx")
    numpy = require("numpy", "onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    length = 64
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("a", kinds.UINT8, [1, length])],
        [helper.make_tensor_value_info("y", kinds.INT32, [1, length])],
        [onnx.numpy_helper.from_array(numpy.full((length, length), 127, numpy.int8), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    engine = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = engine.run(None, {"a": numpy.full((1, length), 255, numpy.uint8)})
    return bool((y != 255 * 127 * length).any())


def session(model: str | os.PathLike[str] | bytes, *, optimized: str | None = None) -> Any:
    """An ``InferenceSession`` of a file, or of a serialized model, on the CPU; exact sums on any processor.

    Args:
        model: path or bytes.
        optimized: where ONNX Runtime writes the graph that it runs, if anywhere.

    Raises:
        MissingExtraError: without ``onnx`` or ``onnxruntime``.
    """
    runtime = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # exact sums want weights made u8, which meet no s8 activations: those are made u8 too or stay float; else s8 stays, as on ARM
    exact = "session.x64quantprecision" if saturates() else "session.qdqisint8allowed"
    options.add_session_config_entry(exact, "1")
    if optimized is not None:
        options.optimized_model_filepath = optimized
    given = model if isinstance(model, bytes) else os.fspath(model)
    return runtime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
