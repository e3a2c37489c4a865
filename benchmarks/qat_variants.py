"""What ``qat_step.py`` compares: each variant makes a model of a float model, or raises.

All take the float model in train mode, on its device and in its dtype, and one batch. A peer is imported when it is asked for.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclasses.dataclass(frozen=True)
class Built:
    """A model to train and what there is to know about it, in a few words."""

    module: nn.Module
    note: str = ""


Variant = Callable[[nn.Module, Tensor], Built]


def float_model(name: str, x: Tensor, memory_format: torch.memory_format) -> nn.Module:
    """timm's model with random weights, every norm's gamma 1: at 0, where timm begins, torch.ao's and torchao's QAT is NaN."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).train()
    for norm in (module for module in model.modules() if isinstance(module, _BatchNorm) and module.affine):
        nn.init.ones_(norm.weight)
    moved: nn.Module = model.to(device=x.device, dtype=x.dtype, memory_format=memory_format)
    return moved


def as_it_is(model: nn.Module, x: Tensor) -> Built:
    """The float model."""
    return Built(model)


def eagerq_qat(model: nn.Module, x: Tensor) -> Built:
    """eagerq, with its default preset."""
    import eagerq

    qat = eagerq.convert_qat(eagerq.fuse_modules(model, example_inputs=x[:2], inplace=True), inplace=True)
    report = eagerq.report(qat)
    modules = sum(state == "QAT" for _, _, state, _ in report.rows)
    return Built(qat, f"{modules} QAT modules, {len(report.quantizers)} quantized tensors")


#: Prefixes of eagerq's chains that ``torch.ao.quantization.fuse_modules_qat`` takes, by exact type.
TORCH_AO_CHAINS = {
    (nn.Conv1d, nn.BatchNorm1d),
    (nn.Conv1d, nn.BatchNorm1d, nn.ReLU),
    (nn.Conv2d, nn.BatchNorm2d),
    (nn.Conv2d, nn.BatchNorm2d, nn.ReLU),
    (nn.Conv3d, nn.BatchNorm3d),
    (nn.Conv3d, nn.BatchNorm3d, nn.ReLU),
    (nn.Conv2d, nn.ReLU),
    (nn.Conv3d, nn.ReLU),
    (nn.Linear, nn.ReLU),
}


def torch_ao_lists(model: nn.Module, x: Tensor) -> tuple[list[list[str]], int]:
    """The lists of names that a user of torch.ao writes by hand, read off eagerq's plan; and how many chains the plan has."""
    import eagerq

    modules = dict(model.named_modules(remove_duplicate=False))
    matches = eagerq.plan_fusion(model, example_inputs=x[:2]).matches
    lists = []
    for match in matches:
        names = [name for name in match.names if name not in match.copied]
        while len(names) > 1 and tuple(type(modules[name]) for name in names) not in TORCH_AO_CHAINS:
            names.pop()
        if len(names) > 1:
            lists.append(names)
    return lists, len(matches)


def torch_ao(model: nn.Module, x: Tensor) -> Built:
    """torch.ao's eager mode: ``fuse_modules_qat`` and ``prepare_qat``. Sums and other functions are not quantized."""
    import torch.ao.quantization as ao

    lists, chains = torch_ao_lists(model, x)
    model.qconfig = ao.get_default_qat_qconfig("x86")
    prepared: nn.Module = ao.prepare_qat(ao.fuse_modules_qat(model, lists) if lists else model)
    return Built(prepared.to(x.device), f"fused {len(lists)} of {chains} chains")


def torchao_pt2e(model: nn.Module, x: Tensor) -> Built:
    """torchao's export path with the x86 Inductor quantizer."""
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    graph = torch.export.export(model, (x,), strict=True).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    prepared = prepare_qat_pt2e(graph, quantizer)
    moved: nn.Module = move_exported_model_to_train(prepared)
    with torch.no_grad():
        moved(x)  # its observers take their shapes in the first forward, which torch.compile would take for fixed
    quantized = sum("FakeQuant" in type(module).__name__ for module in moved.modules())
    return Built(moved, f"{quantized} fake quantizers, batch size fixed")


def brevitas_qat(model: nn.Module, x: Tensor) -> Built:
    """Brevitas' ``layerwise_quantize``, weights per channel, calibrated on eight images.

    Uncalibrated, its first 300 steps take a percentile of each tensor; these are the steps after them, with learned scales.
    Norms stay unfolded, and inputs of convolutions and linear layers are quantized.
    """
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import LAYERWISE_COMPUTE_LAYER_MAP, layerwise_quantize
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    layers = copy.copy(LAYERWISE_COMPUTE_LAYER_MAP)
    given = {"input_quant": Int8ActPerTensorFloat, "weight_quant": Int8WeightPerChannelFloat, "return_quant_tensor": False}
    layers.update({nn.Conv2d: (qnn.QuantConv2d, given), nn.Linear: (qnn.QuantLinear, given)})
    dtype = x.dtype
    quantized: nn.Module = layerwise_quantize(model, layers).to(device=x.device, dtype=dtype).train()
    with torch.no_grad(), calibration_mode(quantized):
        quantized(x[:8])
    kinds = Counter(type(module).__name__ for module in quantized.modules())
    counted = kinds["QuantConv2d"] + kinds["QuantLinear"]
    return Built(quantized, f"{counted} layers, their inputs and weights")


VARIANTS: dict[str, Variant] = {
    "float": as_it_is,
    "eagerq": eagerq_qat,
    "torch.ao": torch_ao,
    "torchao-pt2e": torchao_pt2e,
    "brevitas": brevitas_qat,
}
