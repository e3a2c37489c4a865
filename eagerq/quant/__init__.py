"""Numbers: specs and qconfigs, observers, fake quantizers."""

from eagerq.quant.engine import PROFILES, EngineProfile, get_profile
from eagerq.quant.fake_quantize import (
    FakeQuantize,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
)
from eagerq.quant.functional import dequantize, fake_quantize, quantization_params, quantize
from eagerq.quant.observer import Observer
from eagerq.quant.spec import PRESETS, QConfig, QConfigMapping, QuantSpec, get_qconfig

__all__ = [
    "PRESETS",
    "PROFILES",
    "EngineProfile",
    "FakeQuantize",
    "Observer",
    "QConfig",
    "QConfigMapping",
    "QuantSpec",
    "dequantize",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
    "fake_quantize",
    "get_profile",
    "get_qconfig",
    "quantization_params",
    "quantize",
]
