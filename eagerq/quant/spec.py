"""What a tensor is quantized to: ``QuantSpec``, ``QConfig``, presets and per-module rules."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import nn

from eagerq.errors import SpecError

ObserverName = Literal["min_max", "moving_average", "percentile", "mse"]
Placement = Literal["outputs", "inputs"]

OBSERVERS: tuple[str, ...] = ("min_max", "moving_average", "percentile", "mse")
PLACEMENTS: tuple[str, ...] = ("outputs", "inputs")
GATES: tuple[str, ...] = ("sigmoid", "hardsigmoid")


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    r"""How one kind of tensor becomes integer codes.

    A real value :math:`x` has the code
    :math:`q = \mathrm{clip}(\mathrm{rint}(x / s) + z,\; q_{min},\; q_{max})` and stands for
    :math:`\hat x = (q - z)\, s` (round half to even; Jacob et al., 2018, arXiv:1712.05877).

    Args:
        bits: width of the code, 2 to 8.
        signed: codes start at :math:`-2^{bits-1}` rather than 0.
        symmetric: the zero point is fixed (0 if signed, else :math:`2^{bits-1}`).
        per_channel: one scale for each output channel (weights only).
        narrow_range: leave out the lowest signed code, so that negation is exact (-127..127).
        observer: ``"min_max"`` (all values seen), ``"moving_average"`` (of each batch's minimum
            and maximum), ``"percentile"`` (moving average of each batch's percentiles) or
            ``"mse"`` (moving average of the range that quantizes each batch with the least
            squared error). A weight's range is always taken from the weight of the moment,
            except with ``"moving_average"``.
        averaging_constant: weight of the newest batch in a moving average, in (0, 1].
        percentile: share of values inside the range, in percent, for ``"percentile"``.
        power_of_two: the scale is :math:`2^{k}`, the least that leaves the range without overflow (engines that
            shift instead of multiply; what AMD's quantizers call ``NonOverflow``).

    Raises:
        SpecError: for a combination that no integer grid has.
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    per_channel: bool = False
    narrow_range: bool = False
    observer: ObserverName = "moving_average"
    averaging_constant: float = 0.01
    percentile: float = 99.99
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 2 <= self.bits <= 8:
            raise SpecError(f"bits must be an integer from 2 to 8, found {self.bits!r}; pass for example bits=8.")
        if self.observer not in OBSERVERS:
            raise SpecError(f"observer must be one of {', '.join(OBSERVERS)}, found {self.observer!r}.")
        if self.narrow_range and not self.signed:
            raise SpecError(
                "narrow_range leaves out the lowest signed code, but signed=False; pass signed=True or narrow_range=False."
            )
        if self.narrow_range and not self.symmetric:
            raise SpecError("narrow_range exists for symmetric codes; pass symmetric=True or narrow_range=False.")
        if self.per_channel and not self.symmetric:
            raise SpecError(
                "per_channel codes must be symmetric: integer engines take one zero point a tensor; pass symmetric=True."
            )
        for field in ("averaging_constant", "percentile"):
            value = getattr(self, field)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise SpecError(f"{field} must be a number, found {value!r}.")
        if not 0.0 < self.averaging_constant <= 1.0:
            raise SpecError(f"averaging_constant must lie in (0, 1], found {self.averaging_constant!r}.")
        if not 50.0 < self.percentile <= 100.0:
            raise SpecError(f"percentile must lie in (50, 100], found {self.percentile!r}; pass for example 99.99.")

    @property
    def quant_min(self) -> int:
        """Lowest code."""
        return int(self.narrow_range) - int(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def quant_max(self) -> int:
        """Highest code."""
        return int(2 ** (self.bits - 1)) - 1 if self.signed else int(2**self.bits) - 1

    @property
    def fixed_zero_point(self) -> int:
        """The zero point of a symmetric grid, in codes."""
        return 0 if self.signed else int(2 ** (self.bits - 1))

    @property
    def levels(self) -> int:
        """Codes on either side of a symmetric grid's zero point that have an opposite."""
        return int(2 ** (self.bits - 1)) - 1

    @property
    def grid(self) -> Grid:
        """The codes, and how a range becomes their scale."""
        return Grid(
            self.quant_min, self.quant_max, self.levels, self.fixed_zero_point, self.symmetric, self.power_of_two
        )

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "affine"
        kind += " power-of-two" if self.power_of_two else ""
        where = " per channel" if self.per_channel else ""
        return f"{'s' if self.signed else 'u'}{self.bits} {kind}{where} [{self.quant_min}, {self.quant_max}] by {self.observer}"


class Grid(NamedTuple):
    """The codes of a spec and how a range becomes their scale: what operators take of it."""

    quant_min: int
    quant_max: int
    levels: int
    fixed_zero_point: int
    symmetric: bool
    power_of_two: bool


@dataclasses.dataclass(frozen=True)
class QConfig:
    """The specs of one module: its activations and its weight.

    Args:
        activation: spec of the tensors between modules; None leaves them float (weight only).
        weight: spec of the weight; None leaves it float.
        placement: ``"outputs"`` quantizes a tensor once, where it is produced (ONNX Runtime, most
            integer engines); ``"inputs"`` quantizes where a quantized module reads, and the shortcut of a residual
            add that a linear map can take in (TensorRT).
        split_activations: quantize between a linear map and an activation that the engine runs as an integer
            kernel of its own (sigmoid, LeakyReLU; SiLU and Hardswish as x times their gate), rather than
            after both (ONNX Runtime: without it such a convolution runs in float).
        bias: ``"int32"`` stores the bias on the grid of the sums it is added to, input scale times weight scale; a
            ``QuantSpec`` on a grid of its own, which only shifts can reach, so that all three grids must be
            powers of two (DPUs); None leaves it float (TensorRT).
        gates: of SiLU (``"sigmoid"``) and Hardswish (``"hardsigmoid"``), those that are split into x times their gate; the
            other is quantized before and after, and stays whole (engines with a kernel of its own for it). Where
            ``"hardsigmoid"`` is named, a hard sigmoid is exported as x/6 + 1/2, which its quantizer's ends clip.
        quantize_last: quantize the results of the last linear layers too, for engines that compute nothing in float.

    Raises:
        SpecError: if a spec is not a ``QuantSpec``, the activations' or the bias's spec is per channel, or the bias's
            grid cannot be reached by shifts.
    """

    activation: QuantSpec | None
    weight: QuantSpec | None
    placement: Placement = "outputs"
    split_activations: bool = False
    bias: QuantSpec | Literal["int32"] | None = "int32"
    gates: tuple[str, ...] = GATES
    quantize_last: bool = False

    def __post_init__(self) -> None:
        for field in ("activation", "weight"):
            value = getattr(self, field)
            if value is not None and not isinstance(value, QuantSpec):
                raise SpecError(f"QConfig.{field} must be a QuantSpec or None, found {type(value).__name__}.")
        if self.activation is not None and self.activation.per_channel:
            raise SpecError("activations have one scale a tensor; pass per_channel=False in QConfig.activation.")
        if isinstance(self.bias, QuantSpec):
            specs = {"activation": self.activation, "weight": self.weight, "bias": self.bias}
            other = [name for name, spec in specs.items() if spec is None or not (spec.symmetric and spec.power_of_two)]
            if other or self.bias.fixed_zero_point or self.bias.per_channel:
                raise SpecError(
                    "a bias has a grid of its own only where shifts reach it: activation, weight and bias symmetric, each scale"
                    f" a power of two, the bias signed with one scale a tensor; found {', '.join(other) or 'bias'} otherwise."
                    " Pass bias='int32' or bias=None."
                )
        elif self.bias not in ("int32", None):
            raise SpecError(f"QConfig.bias must be 'int32', a QuantSpec or None, found {self.bias!r}.")
        if not isinstance(self.gates, tuple) or not set(self.gates) <= set(GATES):
            raise SpecError(f"gates must be a tuple of some of {', '.join(GATES)}, found {self.gates!r}.")
        if self.placement not in PLACEMENTS:
            raise SpecError(f"placement must be one of {', '.join(PLACEMENTS)}, found {self.placement!r}.")

    def override(self, rule: Rule, qconfig: QConfigLike | None) -> QConfigMapping:
        """This config for all modules but those that ``rule`` selects; see ``QConfigMapping.override``."""
        return QConfigMapping(self).override(rule, qconfig)

    def __str__(self) -> str:
        rest = f"; bias {self.bias or 'float'}" if self.bias != "int32" else ""
        rest += f"; at {self.placement}"
        if self.split_activations:
            rest += "; split activations" + ("" if self.gates == GATES else f" (gates: {', '.join(self.gates) or 'none'})")
        rest += "; last outputs quantized" if self.quantize_last else ""
        return f"activation {self.activation or 'float'}; weight {self.weight or 'float'}{rest}"


#: Selects modules: a name with ``*`` and ``?`` as in a shell, or a module type (matched exactly).
Rule = str | type[nn.Module]

_WEIGHT = QuantSpec(signed=True, symmetric=True, per_channel=True, narrow_range=True, observer="min_max")
_SHIFTED = QuantSpec(signed=True, symmetric=True, power_of_two=True)
_SHIFTED_WEIGHT = dataclasses.replace(_SHIFTED, observer="min_max")

#: Each is what an engine's documentation asks for; ``docs/presets.md`` says what was run and what was only checked.
PRESETS: Mapping[str, QConfig] = {
    "onnxruntime": QConfig(QuantSpec(), _WEIGHT, split_activations=True),
    "onnxruntime-arm": QConfig(QuantSpec(signed=True), _WEIGHT, split_activations=True),
    "openvino": QConfig(QuantSpec(), _WEIGHT),
    "tensorrt": QConfig(QuantSpec(signed=True, symmetric=True), _WEIGHT, placement="inputs", bias=None),
    "qnn": QConfig(
        QuantSpec(), QuantSpec(observer="min_max"), split_activations=True, gates=("sigmoid",), quantize_last=True
    ),
    "vitis": QConfig(
        _SHIFTED, _SHIFTED_WEIGHT, split_activations=True, bias=_SHIFTED_WEIGHT, gates=("sigmoid",), quantize_last=True
    ),
    "per_tensor": QConfig(QuantSpec(), QuantSpec(signed=True, observer="min_max"), split_activations=True),
}


def get_qconfig(value: QConfigLike) -> QConfig:
    """The ``QConfig`` that ``value`` (a ``QConfig`` or a preset's name) stands for.

    Raises:
        SpecError: for a name that is no preset, or another type.
    """
    if isinstance(value, QConfig):
        return value
    if isinstance(value, str):
        if value in PRESETS:
            return PRESETS[value]
        raise SpecError(f"unknown preset {value!r}; the presets are {', '.join(PRESETS)}.")
    raise SpecError(f"wanted a QConfig or a preset's name, found {type(value).__name__}; pass for example 'onnxruntime'.")


QConfigLike = QConfig | str


@dataclasses.dataclass(frozen=True)
class QConfigMapping:
    """A default ``QConfig`` and rules for some modules; the last rule that selects a module wins.

    Args:
        default: for every module that no rule selects; None keeps those float.
        rules: pairs of (name pattern or module type, ``QConfig`` or None to keep float). A name
            pattern selects modules by their full name, a type by the module's exact float type,
            or the type of any member of a fused module.
    """

    default: QConfig | None
    rules: tuple[tuple[Rule, QConfig | None], ...] = ()

    def override(self, rule: Rule, qconfig: QConfigLike | None) -> QConfigMapping:
        """A copy with one more rule, which wins over the earlier ones.

        Raises:
            SpecError: if the rule is neither a string nor a module type.
        """
        if not isinstance(rule, str) and not (isinstance(rule, type) and issubclass(rule, nn.Module)):
            raise SpecError(f"a rule is a name pattern or a module type, found {rule!r}.")
        if rule == "":
            raise SpecError("the empty name selects the model itself; give its qconfig as the default instead.")
        value = None if qconfig is None else get_qconfig(qconfig)
        return dataclasses.replace(self, rules=(*self.rules, (rule, value)))

    def lookup(self, name: str, types: tuple[type, ...]) -> QConfig | None:
        """The config of the module ``name`` whose float member types are ``types``."""
        for rule, qconfig in reversed(self.rules):
            if selects(rule, name, types):
                return qconfig
        return self.default

    def __str__(self) -> str:
        lines = [f"default: {self.default or 'float'}"]
        for rule, qconfig in self.rules:
            lines.append(f"{rule if isinstance(rule, str) else rule.__qualname__}: {qconfig or 'float'}")
        return "\n".join(lines)


def selects(rule: Rule, name: str, types: tuple[type, ...]) -> bool:
    """Whether ``rule`` selects the module ``name`` with the float types ``types``."""
    return fnmatch.fnmatchcase(name, rule) if isinstance(rule, str) else rule in types


def as_mapping(qconfig: QConfigLike | QConfigMapping | Mapping[Rule, QConfigLike | None] | None) -> QConfigMapping:
    """What ``convert_qat`` takes as ``qconfig``, in its general form.

    None is the preset ``"onnxruntime"``. A mapping holds rules, and the default under ``""``.

    Raises:
        SpecError: for anything that is not a config, preset, mapping or ``QConfigMapping``.
    """
    if qconfig is None:
        return QConfigMapping(PRESETS["onnxruntime"])
    if isinstance(qconfig, QConfigMapping):
        return qconfig
    if isinstance(qconfig, Mapping):
        rules = dict(qconfig)
        default = rules.pop("", "onnxruntime")
        mapping = QConfigMapping(None if default is None else get_qconfig(default))
        for rule, value in rules.items():
            mapping = mapping.override(rule, value)
        return mapping
    return QConfigMapping(get_qconfig(qconfig))
