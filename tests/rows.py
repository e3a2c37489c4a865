"""The one table of cases: a row for each public class of eagerq.nn.intrinsic, .intrinsic.qat and .qat.

A row says which float modules make the chain; ``Geometry`` and ``NormState`` say of which shape and in
which state. Laws over all rows stand in ``test_layers``, ``test_layer_state`` and ``test_compile``.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor, nn

import eagerq.nn
from eagerq.nn import intrinsic as nni
from eagerq.nn import qat as nnqat
from eagerq.nn.intrinsic import qat as nniqat
from eagerq.quant import FakeQuantize, get_qconfig


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A linear map's shape and that of its input; each tuple has an entry a spatial axis and is cut to the row's."""

    groups: int = 1
    in_per_group: int = 3
    out_per_group: int = 4
    kernel: tuple[int, ...] = (3, 3, 2)
    stride: tuple[int, ...] = (1, 1, 1)
    dilation: tuple[int, ...] = (1, 1, 1)
    padding: tuple[int, ...] | str = (1, 1, 1)
    output_padding: tuple[int, ...] = (0, 0, 0)
    padding_mode: str = "zeros"
    bias: bool = True
    batch: int = 3
    size: tuple[int, ...] = (6, 5, 5)

    @property
    def out_channels(self) -> int:
        return self.groups * self.out_per_group


@dataclasses.dataclass(frozen=True)
class NormState:
    """A batch norm's options and state; ``gammas`` repeat over the channels. ``frozen``: in eval mode inside train."""

    eps: float = 1e-5
    momentum: float | None = 0.1
    affine: bool = True
    track: bool = True
    gammas: tuple[float, ...] = (1.0, -0.5, 0.8, 1.5)
    sync: bool = False
    frozen: bool = False


PLAIN = Geometry()
GROUPED = Geometry(groups=2, in_per_group=2, out_per_group=3, bias=False)
GEOMETRIES = {"plain": PLAIN, "grouped": GROUPED}
NORM = NormState()


@dataclasses.dataclass(frozen=True)
class Row:
    """A public class: the types of its float chain; ``act`` is only the example where any activation is taken."""

    name: str
    op: type[nn.Module] | None = None
    norm: type[nn.Module] | None = None
    act: type[nn.Module] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def fused(self) -> type[nni.Fused] | None:
        """The nni class, or None for a standalone op."""
        return getattr(nni, self.name, None)

    @property
    def qat(self) -> Any:
        """The QAT class."""
        return getattr(nniqat if self.fused else nnqat, self.name)

    @property
    def dims(self) -> int:
        """Number of spatial axes."""
        kind = self.op or self.norm
        return int(kind.__name__.removesuffix("Same")[-2]) if kind not in (nn.Linear, nn.Embedding) else 0

    @property
    def transposed(self) -> bool:
        return self.op is not None and "Transpose" in self.op.__name__

    @property
    def is_conv(self) -> bool:
        return self.op is not None and self.dims > 0 and not self.transposed

    @property
    def takes_any_act(self) -> bool:
        return "Act" in self.name

    # --- building

    def make_op(self, g: Geometry, dtype: torch.dtype) -> nn.Module:
        cut = slice(0, self.dims)
        ins, outs = g.groups * g.in_per_group, g.out_channels
        if self.op is nn.Linear:
            return nn.Linear(ins, outs, bias=g.bias, dtype=dtype)
        if self.op is nn.Embedding:
            return nn.Embedding(7, outs, padding_idx=2, dtype=dtype)
        common: dict[str, Any] = {
            "stride": g.stride[cut],
            "dilation": g.dilation[cut],
            "groups": g.groups,
            "bias": g.bias,
            "dtype": dtype,
        }
        if self.op is not eagerq.nn.Conv2dSame:
            common["padding"] = g.padding if isinstance(g.padding, str) else g.padding[cut]
        if self.transposed:
            common["output_padding"] = g.output_padding[cut]
        elif self.op is not eagerq.nn.Conv2dSame:
            common["padding_mode"] = g.padding_mode
        assert self.op is not None
        return self.op(ins, outs, g.kernel[cut], **common)

    def make_norm(self, g: Geometry, n: NormState, dtype: torch.dtype) -> nn.Module:
        kind: Any = nn.SyncBatchNorm if n.sync and self.op is not None else self.norm  # BNReLU names its width by the norm
        return kind(g.out_channels, eps=n.eps, momentum=n.momentum, affine=n.affine, track_running_stats=n.track, dtype=dtype)

    def chain(
        self,
        g: Geometry = PLAIN,
        n: NormState = NORM,
        act: nn.Module | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> list[nn.Module]:
        """The float members in train mode, with random parameters and statistics."""
        generator = torch.Generator().manual_seed(seed)

        def randn(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

        members: list[nn.Module] = []
        with torch.no_grad():
            if self.op is not None:
                op: Any = self.make_op(g, dtype)
                op.weight.copy_(randn(op.weight) * 0.3)
                if getattr(op, "bias", None) is not None:
                    op.bias.copy_(randn(op.bias) * 0.2)
                members.append(op)
            if self.norm is not None:
                norm: Any = self.make_norm(g, n, dtype)
                if n.affine:
                    gammas = itertools.islice(itertools.cycle(n.gammas), g.out_channels)
                    norm.weight.copy_(torch.tensor(list(gammas), dtype=torch.float64))
                    norm.bias.copy_(randn(norm.bias) * 0.3)
                if n.track:
                    norm.running_mean.copy_(randn(norm.running_mean) * 0.3)
                    norm.running_var.copy_(randn(norm.running_var).abs() + 0.3)
                members.append(norm.eval() if n.frozen else norm)
        if self.act is not None:
            made = act if act is not None else self.act()
            members.append(made.to(dtype))
        return members

    def input(self, g: Geometry = PLAIN, *, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        """A random input that fits ``chain(g)``."""
        generator = torch.Generator().manual_seed(seed)
        if self.op is nn.Embedding:
            return torch.randint(0, 7, (g.batch, 5), generator=generator)
        channels = g.out_channels if self.op is None else g.groups * g.in_per_group
        batch = g.batch if self.dims else 4 * g.batch
        x = torch.randn(batch, channels, *g.size[: self.dims], generator=generator, dtype=torch.float64)
        return (x + 0.2).to(dtype)

    def float_module(self, chain: list[nn.Module]) -> nn.Module:
        """What ``from_float`` takes: the fused module, or the op itself."""
        return self.fused(*chain) if self.fused is not None else chain[0]

    def to_qat(self, chain: list[nn.Module], qconfig: Any = "onnxruntime") -> Any:
        """The QAT module over these very members."""
        return self.qat.from_float(self.float_module(chain), qconfig)

    def trained(
        self, g: Geometry = PLAIN, qconfig: Any = "onnxruntime", *, dtype: torch.dtype = torch.float32, quantized_io: bool = True
    ) -> Any:
        """A QAT module, its tensors' quantizers attached, after two training forwards; in train mode."""
        q = self.to_qat(self.chain(g, dtype=dtype), qconfig)
        if quantized_io:
            attach_quantizers(self, q, qconfig, dtype)
        for seed in (1, 2):
            q(self.input(g, dtype=dtype, seed=seed))
        return q


def attach_quantizers(row: Row, q: Any, qconfig: Any, dtype: torch.dtype = torch.float32) -> None:
    """Quantize the module's input and output, as ``convert_qat`` may decide."""
    spec = get_qconfig(qconfig).activation
    if spec is not None:
        if isinstance(q, nnqat.QATOp) and row.op is not nn.Embedding:
            q.input_fake_quant = FakeQuantize(spec).to(dtype)
        q.activation_post_process = FakeQuantize(spec).to(dtype)


def plain(chain: list[nn.Module]) -> nn.Sequential:
    """The unfused chain over a copy of the members."""
    return nn.Sequential(*copy.deepcopy(chain))


def bn_state(norm: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer of a norm."""
    return {k: v.detach().clone() for k, v in norm.state_dict().items()}


_WIDTHS = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}


def _width(d: int) -> tuple[Row, ...]:
    conv, transpose, norm = _WIDTHS[d]
    return (
        Row(f"ConvBn{d}d", conv, norm),
        Row(f"ConvBnReLU{d}d", conv, norm, nn.ReLU),
        Row(f"ConvBnAct{d}d", conv, norm, nn.PReLU),
        Row(f"ConvReLU{d}d", conv, None, nn.ReLU),
        Row(f"ConvAct{d}d", conv, None, nn.PReLU),
        Row(f"ConvTransposeBn{d}d", transpose, norm),
        Row(f"ConvTransposeBnReLU{d}d", transpose, norm, nn.ReLU),
        Row(f"ConvTransposeBnAct{d}d", transpose, norm, nn.PReLU),
        Row(f"ConvTransposeReLU{d}d", transpose, None, nn.ReLU),
        Row(f"ConvTransposeAct{d}d", transpose, None, nn.PReLU),
        Row(f"Conv{d}d", conv),
        Row(f"ConvTranspose{d}d", transpose),
    )


ROWS: tuple[Row, ...] = (
    *_width(1),
    *_width(2),
    *_width(3),
    Row("LinearBn1d", nn.Linear, nn.BatchNorm1d),
    Row("LinearBnReLU1d", nn.Linear, nn.BatchNorm1d, nn.ReLU),
    Row("LinearBnAct1d", nn.Linear, nn.BatchNorm1d, nn.PReLU),
    Row("LinearReLU", nn.Linear, None, nn.ReLU),
    Row("LinearAct", nn.Linear, None, nn.PReLU),
    Row("BNReLU2d", None, nn.BatchNorm2d, nn.ReLU),
    Row("BNReLU3d", None, nn.BatchNorm3d, nn.ReLU),
    Row("BatchNorm2d", None, nn.BatchNorm2d),
    Row("BatchNorm3d", None, nn.BatchNorm3d),
    Row("Conv2dSame", eagerq.nn.Conv2dSame),
    Row("Linear", nn.Linear),
    Row("Embedding", nn.Embedding),
)
#: Classes of those packages that are no case: the parts the others are made of.
PARTS = frozenset({"Fused", "FusedNorm", "LoneNorm", "NormActQAT", "WithAct", "WithBn", "QATBase", "QATOp"})

FUSED_ROWS = tuple(row for row in ROWS if row.fused is not None)
OP_ROWS = tuple(row for row in ROWS if row.op is not None)
LONE_ROWS = tuple(row for row in ROWS if row.op is None and row.fused is None)
HOST_ROWS = (*OP_ROWS, *LONE_ROWS)
NORM_ROWS = tuple(row for row in ROWS if row.norm is not None)
FOLDING_ROWS = tuple(row for row in NORM_ROWS if row.op is not None)
