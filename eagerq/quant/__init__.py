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
from eagerq.quant.sync import disable_observer_sync, enable_observer_sync, sync_observers

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
    "disable_observer_sync",
    "enable_fake_quant",
    "enable_observer",
    "enable_observer_sync",
    "fake_quantize",
    "get_profile",
    "get_qconfig",
    "quantization_params",
    "quantize",
    "sync_observers",
]
