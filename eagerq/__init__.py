"""eagerq: quantization-aware training for PyTorch by module swap, without tracing."""

from eagerq import errors
from eagerq.checkpoint import load_checkpoint
from eagerq.compiling import guard_filter
from eagerq.deploy import Export, Kernel, Verification, export_onnx, verify_deployment
from eagerq.errors import EagerqError, GuardError
from eagerq.exactness import ExactRun, exact_mode
from eagerq.guarding import guard
from eagerq.nn.modules.batchnorm import freeze_bn_stats, update_bn_stats
from eagerq.patterns import DEFAULT_PATTERNS, Patterns
from eagerq.plan import FusionPlan, Match, Skip
from eagerq.quant import (
    PRESETS,
    EngineProfile,
    FakeQuantize,
    QConfig,
    QConfigMapping,
    QuantSpec,
    disable_fake_quant,
    disable_observer,
    disable_observer_sync,
    enable_fake_quant,
    enable_observer,
    enable_observer_sync,
    sync_observers,
)
from eagerq.record import float_state_dict
from eagerq.unfusing import unfuse_modules
from eagerq.verify import Comparison, compare_modules
from eagerq.workflow import Report, convert, convert_qat, fuse_modules, plan_fusion, report

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_PATTERNS",
    "PRESETS",
    "Comparison",
    "EagerqError",
    "EngineProfile",
    "ExactRun",
    "Export",
    "FakeQuantize",
    "FusionPlan",
    "GuardError",
    "Kernel",
    "Match",
    "Patterns",
    "QConfig",
    "QConfigMapping",
    "QuantSpec",
    "Report",
    "Skip",
    "Verification",
    "compare_modules",
    "convert",
    "convert_qat",
    "disable_fake_quant",
    "disable_observer",
    "disable_observer_sync",
    "enable_fake_quant",
    "enable_observer",
    "enable_observer_sync",
    "errors",
    "exact_mode",
    "export_onnx",
    "float_state_dict",
    "freeze_bn_stats",
    "fuse_modules",
    "guard",
    "guard_filter",
    "load_checkpoint",
    "plan_fusion",
    "report",
    "sync_observers",
    "unfuse_modules",
    "update_bn_stats",
    "verify_deployment",
]
