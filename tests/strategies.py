"""The one Hypothesis vocabulary: layer geometry, batch-norm state, activations and quantization specs."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from rows import Geometry, NormState, Row
from torch import nn

import eagerq.nn
from eagerq.nn.modules.activation import ELEMENTWISE
from eagerq.quant import PRESETS, QConfig, QuantSpec
from eagerq.quant.spec import OBSERVERS

#: For laws that are run on each row of the table by itself.
per_row = settings(max_examples=max(6, settings.default.max_examples // 4))

presets = st.sampled_from(sorted(PRESETS))


def _axes(values: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(values, values, values)


@st.composite
def geometries(draw: st.DrawFn, row: Row) -> Geometry:
    """Any layer shape that the row's float op accepts."""
    stride = draw(_axes(st.integers(1, 2)))
    dilation = draw(_axes(st.integers(1, 2)))
    kernel = draw(_axes(st.integers(1, 3 if row.dims < 3 else 2)))
    padding: Any = draw(_axes(st.integers(0, 2)))
    output_padding = (0, 0, 0)
    mode = "zeros"
    if row.transposed:
        wish = draw(_axes(st.integers(0, 1)))
        output_padding = tuple(min(w, max(s, d) - 1) for w, s, d in zip(wish, stride, dilation, strict=True))
    elif row.is_conv and row.op is not eagerq.nn.Conv2dSame:
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        padding = draw(st.sampled_from([padding, padding, "same", "valid"]))
        if padding == "same":
            stride = (1, 1, 1)
    return Geometry(
        groups=draw(st.integers(1, 3)),
        in_per_group=draw(st.integers(1, 3)),
        out_per_group=draw(st.integers(1, 3)),
        kernel=kernel,
        stride=stride,
        dilation=dilation,
        padding=padding,
        output_padding=output_padding,
        padding_mode=mode,
        bias=draw(st.booleans()),
        batch=draw(st.integers(2, 3)),
        size=draw(_axes(st.integers(5, 6))),
    )


#: Every kind a training run meets: of both signs, zero, and so small that a shared scale loses them.
gammas = st.one_of(
    st.sampled_from([1.0, -1.0, 0.0, -0.5, 1e-3, 1e-5, -1e-7, 1e-20]),
    st.floats(-2.0, 2.0, allow_subnormal=False),
)
norm_states = st.builds(
    NormState,
    eps=st.sampled_from([1e-5, 1e-3, 0.1]),
    momentum=st.sampled_from([0.1, 0.01, 0.9, None]),
    affine=st.booleans(),
    track=st.booleans(),
    gammas=st.lists(gammas, min_size=1, max_size=5).map(tuple),
    sync=st.booleans(),
    frozen=st.booleans(),
)
#: Norms whose eval form is one affine map.
foldable_norm_states = norm_states.map(lambda n: NormState(**{**vars(n), "track": True}))


def _make(cls: type[nn.Module]) -> nn.Module:
    return cls(0.1, -0.2) if cls is nn.Threshold else cls()


def acts(row: Row) -> st.SearchStrategy[nn.Module | None]:
    """A fresh activation of any elementwise type where the row takes any, else the row's own."""
    if not row.takes_any_act:
        return st.none()
    return st.sampled_from([t for t in ELEMENTWISE if t is not nn.ReLU]).map(_make)


@st.composite
def specs(draw: st.DrawFn, per_channel: bool | None = None) -> QuantSpec:
    """Any spec that is valid."""
    symmetric, signed = draw(st.booleans()), draw(st.booleans())
    channels = per_channel if per_channel is not None else draw(st.booleans())
    symmetric = symmetric or channels
    return QuantSpec(
        bits=draw(st.integers(2, 8)),
        signed=signed,
        symmetric=symmetric,
        per_channel=channels,
        narrow_range=signed and symmetric and draw(st.booleans()),
        observer=draw(st.sampled_from(OBSERVERS)),  # type: ignore[arg-type]
        averaging_constant=draw(st.sampled_from([0.01, 0.1, 0.5, 1.0])),
        percentile=draw(st.sampled_from([90.0, 99.0, 99.9, 99.99, 100.0])),
        power_of_two=draw(st.booleans()),
    )


weight_specs = specs()


@st.composite
def qconfigs(draw: st.DrawFn) -> QConfig:
    """Any config of an activation, a weight and a bias that is valid."""
    activation, weight = draw(specs(per_channel=False)), draw(weight_specs)
    kinds: list[Any] = ["int32", None]
    if all(spec.symmetric and spec.power_of_two for spec in (activation, weight)):
        kinds.append(QuantSpec(bits=draw(st.integers(4, 8)), signed=True, symmetric=True, power_of_two=True, observer="min_max"))
    return QConfig(activation, weight, bias=draw(st.sampled_from(kinds)))
