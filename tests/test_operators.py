"""One pass equals many: the Triton kernels are the plain kernels bit for bit, and those are the modules' own steps."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import interpreted
import pytest
import strategies
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from eagerq.quant import FakeQuantize, QuantSpec, fast_kernels, gradients, library, operators, plain_kernels
from eagerq.quant.functional import Bounds, _first_clipped, fake_quantize
from eagerq.quant.layout import dense, has_channels_last, memory_format
from eagerq.quant.spec import Grid

#: Triton's interpreter on CPU tensors stands in for its compiler where there is nothing to compile for.
DEVICES = ["cuda" if torch.cuda.is_available() else "interpreter"]
on_each_device = pytest.mark.parametrize("device", DEVICES)

#: The interpreter truncates when it stores bfloat16: such inputs have a test of their own there.
DTYPES = {
    "interpreter": [torch.float32, torch.float16],
    "cuda": [torch.float32, torch.bfloat16, torch.float16],
}
BLOCK = 2048
#: More blocks than the programs of an interpreted launch, so that each takes several, and a rest.
LONG = 2 * 16 * BLOCK + 13


@contextlib.contextmanager
def kernels(device: str) -> Iterator[str]:
    """The Triton kernels serve the operators; where tensors are to lie."""
    with pytest.MonkeyPatch.context() as patch:
        if device == "interpreter":
            patch.setattr(fast_kernels, "_triton", interpreted.kernels)
            patch.setattr(fast_kernels, "is_plain", lambda x: fast_kernels.is_tensor(x) and not x.is_meta)
        yield "cpu" if device == "interpreter" else device


# --- vocabulary

bounds_of: Any = st.sampled_from([(None, None), (0.0, None), (0.0, 6.0), (-1.0, 1.0), (None, 1.0), (-0.5, None), (-0.1, 0.3)])
grids = strategies.specs(per_channel=False).map(lambda s: s.grid)
constants = st.sampled_from([None, 0.01, 0.1, 0.5, 1.0])
#: Empty, one value, fewer than a byte of the mask, no multiple of 8 or of the block, multiples of the block, of any rank.
shapes: Any = st.sampled_from(
    [(0,), (3, 0, 2), (), (1,), (7,), (8,), (3, 5), (2, 3, 7), (2, 3, 4, 5), (1, 4, 1, 6), (2, 4, 3, 3, 2), (BLOCK,),
     (2, 8, 16, 16), (BLOCK // 2,), (2 * BLOCK + 8,), (BLOCK + 3,)]
)  # fmt: skip
layouts: Any = st.sampled_from(["contiguous", "channels_last", "transposed", "strided", "expanded"])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """``x`` with these strides; expanded, its first entry again and again."""
    if layout == "channels_last" and x.dim() in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and x.dim():
        return torch.stack([x, x], -1)[..., 1]
    if layout == "expanded" and x.dim() and x.shape[0]:
        return x[:1].expand(x.shape)
    return x


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[float, bool, int]]:
    """Batches: their size (zero for one without a range), whether some values are not finite, their seed."""
    one = st.tuples(st.sampled_from([0.0, 1e-3, 1.0, 10.0, 1e4]), st.booleans(), st.integers(0, 99))
    return draw(st.lists(one, min_size=2, max_size=4))


def batch(shape: tuple[int, ...], step: tuple[float, bool, int], scale: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
    """Normal values, ties between two codes of ``scale``, the bounds of activations, and NaN and infinity if asked for."""
    size, wild, seed = step
    generator = torch.Generator().manual_seed(seed)
    x = size * torch.randn(shape, generator=generator)
    kind = torch.randint(0, 8, shape, generator=generator)
    ties = (torch.randint(-260, 260, shape, generator=generator) + 0.5) * scale.cpu().reshape(scale.shape if x.dim() else ())
    ends = torch.tensor([0.0, 6.0, -1.0, 1.0, -0.1, 0.3])[torch.randint(0, 6, shape, generator=generator)]
    if size:
        x = torch.where(kind == 0, ties, torch.where(kind == 1, ends, x))
    if wild:
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(0, 3, shape, generator=generator)]
        x = torch.where((kind == 2) & (torch.rand(shape, generator=generator) < 0.3), odd, x)
    return laid_out(x.to(dtype), layout)


def fresh(grid: Grid, channels: int | None = None, place: str = "cpu") -> plain_kernels.State:
    size, shape = (channels or 1,), () if channels is None else (channels,)
    zero = torch.full(size, grid.fixed_zero_point if grid.symmetric else 0, dtype=torch.int32, device=place)
    return torch.ones(size, device=place), zero, torch.zeros(shape, device=place), torch.zeros(shape, device=place)


def scratch(place: str = "cpu") -> Tensor:
    return torch.zeros(plain_kernels.WORDS, dtype=torch.int32, device=place)


def assert_identical(found: Tensor, wanted: Tensor) -> None:
    """Values, NaN for NaN and zero for either zero, and where they lie in memory."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    steps = [[step for step, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (found, wanted)]
    assert steps[0] == steps[1] or not found.numel()
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.0, equal_nan=True)


def assert_all_identical(found: Any, wanted: Any) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert_identical(mine, theirs)


def assert_learned_alike(mine: plain_kernels.State, own: Tensor, theirs: plain_kernels.State, other: Tensor) -> None:
    """The states, those before them, and scratch memory that is ready for the next launch."""
    assert_all_identical((*mine, *plain_kernels.state_before(own)), (*theirs, *plain_kernels.state_before(other)))
    assert own[:3].tolist() == other[:3].tolist() == [0, 0, 0]


# --- the Triton kernels


@on_each_device
@given(
    data=st.data(), grid=grids, bounds=bounds_of, constant=constants, shape=shapes, layout=layouts, batches=steps(),
    needs_mask=st.booleans(), observes=st.booleans(),
)  # fmt: skip
def test_an_activations_kernel_is_the_plain_one(
    device: str, data: st.DataObject, grid: Grid, bounds: Bounds, constant: float | None, shape: tuple[int, ...], layout: str,
    batches: list[Any], needs_mask: bool, observes: bool,
) -> None:  # fmt: skip
    dtype = data.draw(st.sampled_from(DTYPES[device]))
    with kernels(device) as place:
        (mine, own), (theirs, other) = ((fresh(grid, None, place), scratch(place)) for _ in range(2))
        for i, step in enumerate(batches):
            x = batch(shape, step, theirs[0], dtype, layout).to(place)
            learns = observes or i == 0
            rest = (*bounds, constant, *grid, needs_mask)
            out, mask = fast_kernels.activation(x, *mine, own if learns else None, *rest)
            wanted, wanted_mask = plain_kernels.activation(x, *theirs, other if learns else None, *rest)
            assert_identical(out, wanted)
            assert_identical(mask, wanted_mask)
            assert_learned_alike(mine, own, theirs, other)
            if needs_mask:
                grad = torch.randn(x.shape, device=place).to(dtype).contiguous(memory_format=memory_format(out))
                assert_identical(fast_kernels.masked_gradient(grad, mask), plain_kernels.masked_gradient(grad, mask))


@pytest.mark.parametrize("constant", [None, 0.01, 0.1, 0.5, 1.0])
@on_each_device
def test_ranges_are_merged_to_the_last_bit(device: str, constant: float | None) -> None:
    grid = QuantSpec().grid
    with kernels(device) as place:
        (mine, own), (theirs, other) = ((fresh(grid, None, place), scratch(place)) for _ in range(2))
        for seed in range(20):
            x = torch.randn(9, generator=torch.Generator().manual_seed(seed)).to(place)
            fast_kernels.activation(x, *mine, own, None, None, constant, *grid, False)
            plain_kernels.activation(x, *theirs, other, None, None, constant, *grid, False)
            assert_learned_alike(mine, own, theirs, other)


@on_each_device
@given(
    data=st.data(), bounds=st.tuples(st.floats(-2.0, -0.125, width=32), st.floats(0.125, 2.0, width=32)), up=st.integers(-2, 2)
)  # fmt: skip
def test_bounds_are_rounded_as_pytorchs_clamps_round_them(
    device: str, data: st.DataObject, bounds: tuple[float, float], up: int
) -> None:
    """A bound that the dtype does not have is the nearest that it has, in the value, the range and the mask."""
    dtype = data.draw(st.sampled_from(DTYPES[device][1:]))
    grid = QuantSpec().grid
    ends = torch.tensor(bounds).to(dtype)
    x = torch.cat([ends, (ends.view(torch.int16) + up).view(dtype)])  # and neighbours
    with kernels(device) as place:
        (mine, own), (theirs, other) = ((fresh(grid, None, place), scratch(place)) for _ in range(2))
        found = fast_kernels.activation(x.to(place), *mine, own, *bounds, 0.01, *grid, True)
        wanted = plain_kernels.activation(x.to(place), *theirs, other, *bounds, 0.01, *grid, True)
        assert_all_identical(found, wanted)
        assert_learned_alike(mine, own, theirs, other)


if "interpreter" in DEVICES:

    @given(grid=grids, bounds=bounds_of, constant=constants, shape=shapes, batches=steps())
    def test_an_activations_kernel_reads_bfloat16(
        grid: Grid, bounds: Bounds, constant: float | None, shape: tuple[int, ...], batches: list[Any]
    ) -> None:
        """What it would store, rounded here: the interpreter truncates. The bounds are what operators hand to it."""
        bounds = tuple(None if end is None else float(torch.tensor(end).bfloat16()) for end in bounds)  # type: ignore[assignment]
        with kernels("interpreter"):
            (mine, own), (theirs, other) = ((fresh(grid), scratch()) for _ in range(2))
            for step in batches:
                x = batch(shape, step, theirs[0], torch.bfloat16, "contiguous")
                out, mask = torch.empty(shape), plain_kernels.mask_like(x, True)
                interpreted.kernels("kernels").Activation(x, *mine, own, *bounds, constant, *grid).launch(x, out, mask)
                wanted, wanted_mask = plain_kernels.activation(x, *theirs, other, *bounds, constant, *grid, True)
                assert_identical(out.bfloat16(), wanted)
                assert_identical(mask, wanted_mask)
                assert_learned_alike(mine, own, theirs, other)


# --- a GELU and what quantizes it


@contextlib.contextmanager
def rounding_kernels(device: str) -> Iterator[str]:
    """``kernels``, and an interpreter that casts bfloat16 as processors do: its own truncates and loses subnormals."""
    with kernels(device) as place, pytest.MonkeyPatch.context() as patch:
        if device == "interpreter":
            import triton.language as tl
            from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

            cast = InterpreterBuilder.cast_impl

            def rounded(self: Any, source: Any, kind: Any) -> Any:
                pair = (source.dtype.scalar, kind.scalar)
                if pair == (tl.float32, tl.bfloat16):
                    return TensorHandle(torch.tensor(source.data).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)
                if pair == (tl.bfloat16, tl.float32):
                    return TensorHandle(torch.tensor(source.data).view(torch.bfloat16).float().numpy(), tl.float32)
                return cast(self, source, kind)

            patch.setattr(InterpreterBuilder, "cast_impl", rounded)
        yield place


FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def within(exact: Tensor, slack: Tensor, found: Tensor) -> Tensor:
    """Whether each value is a rounding to its dtype of a number this near: rounding is monotone. NaN is NaN, infinity itself."""
    low, high = ((exact + side * slack).to(found.dtype) for side in (-1, 1))
    same = (found == exact.to(found.dtype)) | (found.isnan() & exact.isnan())
    return same | ((low <= found) & (found <= high))


def is_gelu_of(x: Tensor, a: Tensor) -> Tensor:
    """Whether ``a`` is GELU in float32, then in its dtype.

    The error function is right to two units in its last place, 2^-23 at most; the rounding of what it is given moves it by less
    than one, that of the sum with 1 is half of one: less than 2^-22 in the sum, which is halved and multiplied by x. The
    product is rounded, below the normal numbers by 2^-149 at most.
    """
    wide = x.double()
    exact = torch.where(wide == -math.inf, math.nan, 0.5 * wide * torch.special.erfc(-wide * math.sqrt(0.5)))
    return within(exact, 2.0**-23 * wide.abs() + 2.0**-24 * exact.abs() + 2.0**-149, a)


def is_gelus_gradient(grad: Tensor, x: Tensor, found: Tensor) -> Tensor:
    """Whether this is the gradient by GELU's derivative in float32, then in its dtype.

    The distribution is right to 2^-23, as above. The exponential of -y is so to (1 + y) 2^-21.5 of itself, and |x| (1 + x^2/2)
    times the density is less than 0.41: 2^-22.7 in all. With the sum's rounding that is less than 2^-21, of a slope of about one.
    """
    wide = x.double()
    density = torch.exp(-0.5 * wide * wide) * math.sqrt(0.5 / math.pi)
    exact = grad.double() * (0.5 * torch.special.erfc(-wide * math.sqrt(0.5)) + wide * density)
    return within(exact, 2.0**-21 * grad.double().abs() + 2.0**-24 * exact.abs() + 2.0**-148, found)


def every(dtype: torch.dtype) -> Tensor:
    """Each value of 16 bits; of float32 some of each size, and those around where error functions change their formula."""
    if dtype != torch.float32:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    some = torch.randint(-(2**31), 2**31, (20_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32).view(dtype)
    return torch.cat([some, torch.linspace(-15.0, 15.0, 20_001), torch.tensor([0.0, math.inf, -math.inf, math.nan])])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_each_device
def test_every_gelu_is_right_to_float32s_digits(device: str, dtype: torch.dtype) -> None:
    """The kernels' and PyTorch's own, and their gradients. (PyTorch's on CPUs is not: of infinity it is NaN.)"""
    x, grid = every(dtype), QuantSpec().grid
    with rounding_kernels(device) as place:
        x = x.to(place)
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(place, dtype)
        for by in (fast_kernels, plain_kernels) if device == "cuda" else (fast_kernels,):
            a, mask = by.gelu(x, *fresh(grid, None, place), None, None, *grid, True)  # no range: the activation itself
            assert is_gelu_of(x, a).all()
            assert is_gelus_gradient(grad, x, by.gelu_gradient(grad, x, mask)).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_each_device
@given(
    grid=grids, constant=constants, shape=shapes, layout=layouts, batches=steps(), needs_mask=st.booleans(),
    observes=st.booleans(),
)  # fmt: skip
def test_a_gelus_kernel_is_the_plain_one_behind_it(
    device: str, dtype: torch.dtype, grid: Grid, constant: float | None, shape: tuple[int, ...], layout: str, batches: list[Any],
    needs_mask: bool, observes: bool,
) -> None:  # fmt: skip
    """Of the activation as the kernel gives it while no range is known, bit for bit: value, mask, state, and the gradient."""
    with rounding_kernels(device) as place:
        (mine, own), (theirs, other) = ((fresh(grid, None, place), scratch(place)) for _ in range(2))
        for i, step in enumerate(batches):
            x = batch(shape, step, theirs[0], dtype, layout).to(place)
            learns = observes or i == 0
            rest = (constant, *grid, needs_mask)
            a, whole = fast_kernels.gelu(x, *fresh(grid, None, place), None, *rest[:-1], True)
            assert is_gelu_of(x, a).all()
            out, mask = fast_kernels.gelu(x, *mine, own if learns else None, *rest)
            wanted = plain_kernels.activation(a, *theirs, other if learns else None, None, None, *rest)
            assert_all_identical((out, mask), wanted)
            assert_learned_alike(mine, own, theirs, other)
            assert plain_kernels.unpacked(whole, out).all()
            if needs_mask:
                grad = laid_out(torch.randn(x.shape).to(dtype), layout).to(place)
                passed = plain_kernels.masked_gradient(grad.contiguous(memory_format=memory_format(a)), mask)
                found = fast_kernels.gelu_gradient(grad, x, mask)
                assert_identical(found, fast_kernels.gelu_gradient(passed, x, whole))
                assert is_gelus_gradient(passed, x, found).all()
                wanted = torch.ops.aten.gelu_backward(passed, dense(x))
                assert_identical(plain_kernels.gelu_gradient(grad, x, mask), wanted)


@on_each_device
@pytest.mark.parametrize("size", [LONG, 2 * 16 * BLOCK])
def test_each_program_takes_many_blocks_of_a_gelu(device: str, size: int) -> None:
    grid = QuantSpec().grid
    with kernels(device) as place:
        (mine, own), (theirs, other) = ((fresh(grid, None, place), scratch(place)) for _ in range(2))
        for seed in (1, 2):
            x = batch((size,), (3.0, False, seed), theirs[0], torch.float32, "contiguous").to(place)
            a, _ = fast_kernels.gelu(x, *fresh(grid, None, place), None, 0.01, *grid, False)
            found = fast_kernels.gelu(x, *mine, own, 0.01, *grid, True)
            assert_all_identical(found, plain_kernels.activation(a, *theirs, other, None, None, 0.01, *grid, True))
            assert_learned_alike(mine, own, theirs, other)
            passed = plain_kernels.masked_gradient(x, found[1])
            assert is_gelus_gradient(passed, x, fast_kernels.gelu_gradient(x, x, found[1])).all()


if torch.cuda.is_available():

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_on_cuda_a_gelu_in_one_pass_is_pytorchs_and_the_operator(dtype: torch.dtype) -> None:
        """Codes and mask but where two roundings of one number lie on two sides of a tie; within a step there too."""
        grid, x = QuantSpec().grid, every(dtype).cuda()
        x = x[x.isfinite() & (x.abs() < 100.0)]
        state = known(grid, -0.17, 6.0, "cuda")
        a = torch.nn.functional.gelu(x)
        mine = fast_kernels.gelu(x, *fresh(grid, None, "cuda"), None, None, *grid, False)[0]
        found, mask = fast_kernels.gelu(x, *state, None, None, *grid, True)
        wanted, wanted_mask = fast_kernels.activation(a, *state, None, None, None, None, *grid, True)
        same, bits = a == mine, [plain_kernels.unpacked(m, x) for m in (mask, wanted_mask)]
        assert_identical(found[same], wanted[same])
        assert torch.equal(bits[0][same], bits[1][same])
        assert ((found - wanted).abs() <= 1.01 * state[0] + torch.finfo(dtype).eps * wanted.abs()).all()
        assert float((found != wanted).float().mean()) < 1e-3
        grad = torch.randn(x.shape, device="cuda").to(dtype)
        gradient = torch.ops.aten.gelu_backward(plain_kernels.masked_gradient(grad, mask), x)
        apart = (fast_kernels.gelu_gradient(grad, x, mask).double() - gradient.double()).abs()
        assert (apart <= 2.0**-20 * grad.double().abs() + torch.finfo(dtype).eps * gradient.double().abs() + 2.0**-147).all()


# --- a sigmoid of codes


def assert_sigmoid_of(a: Tensor, hard: bool, y: Tensor) -> None:
    """A hard one bit for bit; else a sigmoid in float32, then in its dtype.

    Its exponential is right to 2^-22 of itself, before a correction that is rounded to 2^-24 as the sum with 1 is, and the
    quotient to 2^-22: less than 2^-20 in all. Below the normal numbers it may be zero.
    """
    if hard:
        assert_identical(y, plain_kernels._gate(a, True))
    exact = torch.sigmoid(a.double())
    assert hard or within(exact, 2.0**-20 * exact + 2.0**-126, y).all()


def assert_sigmoids_gradient(grad: Tensor, a: Tensor, passes: Tensor, hard: bool, found: Tensor) -> None:
    """By f - f^2 with f as above: its error is at most that of f, half as much what is rounded; zero where none passes."""
    if hard:
        assert_identical(found, torch.where(passes, grad.float() * plain_kernels._slope(a, True), 0.0).to(found.dtype))
        return
    f = torch.sigmoid(a.double())
    exact = torch.where(passes, grad.double() * (f * (1 - f)), 0.0)
    slack = grad.double().abs() * (1.5 * 2.0**-20 * f + 2.0**-126) + 2.0**-24 * exact.abs() + 2.0**-148
    assert within(exact, torch.where(passes, slack, 0.0), found).all()


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_each_device
def test_every_sigmoid_is_right_to_float32s_digits(device: str, dtype: torch.dtype, hard: bool) -> None:
    """The kernels' and PyTorch's own, and their gradients."""
    x, grid = every(dtype), QuantSpec().grid
    with rounding_kernels(device) as place:
        x = x.to(place)
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(place, dtype)
        whole = torch.ones_like(x, dtype=torch.bool)
        for by in (fast_kernels, plain_kernels):
            y, used = by.sigmoid(x, [*fresh(grid, None, place)] * 2, [], hard, None, *grid)  # no range: the sigmoid itself
            assert_sigmoid_of(x, hard, y)
            gradient = by.sigmoid_gradient(grad, x, used, hard, grid.quant_min, grid.quant_max)
            assert_sigmoids_gradient(grad, x, whole, hard, gradient)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@on_each_device
@given(
    grid=grids, hard=st.booleans(), constant=constants, shape=shapes, layout=layouts, batches=steps(), observes=st.booleans(),
    learned=st.tuples(st.booleans(), st.booleans()),
)  # fmt: skip
@example(
    grid=QuantSpec().grid, hard=False, constant=0.01, shape=(LONG,), layout="contiguous", batches=[(3.0, False, 1)] * 2,
    observes=True, learned=(False, False),
)  # fmt: skip
@example(
    grid=QuantSpec().grid, hard=True, constant=None, shape=(2 * 16 * BLOCK,), layout="contiguous", batches=[(3.0, True, 1)] * 2,
    observes=True, learned=(True, True),
)  # fmt: skip
def test_a_sigmoids_kernel_is_the_plain_ones_around_it(
    device: str, dtype: torch.dtype, grid: Grid, hard: bool, constant: float | None, shape: tuple[int, ...], layout: str,
    batches: list[Any], observes: bool, learned: tuple[bool, bool],
) -> None:  # fmt: skip
    """Of the sigmoid as the kernel gives it while the second quantizer has no range, bit for bit: value, what it keeps, both
    states, and where the gradient passes."""
    ranges = ((-3.0, 4.1), (0.0, 0.9))
    with rounding_kernels(device) as place:
        mine, theirs = (
            [known(grid, *ends, place) if known_ else fresh(grid, None, place)
             for known_, ends in zip(learned, ranges, strict=True)]
            for _ in range(2)
        )  # fmt: skip
        own, other = ([scratch(place) for _ in range(2)] for _ in range(2))
        for i, step in enumerate(batches):
            x = batch(shape, step, theirs[0][0], dtype, layout).to(place)
            learns = bool(x.numel()) and (observes or i == 0)
            flat = [t for state in mine for t in state]
            y, _ = fast_kernels.sigmoid(x, [*mine[0], *fresh(grid, None, place)], [], hard, None, *grid)
            a, passes = plain_kernels._fake_quantized(dense(x), theirs[0], grid)
            assert_sigmoid_of(a, hard, y)
            wanted, y_passes = plain_kernels._fake_quantized(y, theirs[1], grid)
            wanted_used = plain_kernels._numbers([t for state in theirs for t in state])
            out, used = fast_kernels.sigmoid(x, flat, own if learns else [], hard, constant, *grid)
            assert_identical(out, wanted)
            if x.numel():
                assert_identical(used, wanted_used)
            for seen, state, words in zip((dense(x), y), theirs, other, strict=True):
                if learns:
                    plain_kernels._learn(seen, state, plain_kernels.state_before(words), constant, grid)
            for state, words, wanted_state, wanted_words in zip(mine, own, theirs, other, strict=True):
                assert_learned_alike(state, words, wanted_state, wanted_words)
            grad = laid_out(torch.randn(x.shape).to(dtype), layout).to(place)
            found = fast_kernels.sigmoid_gradient(grad, x, used, hard, grid.quant_min, grid.quant_max)
            grad = grad.contiguous(memory_format=memory_format(a))
            assert_sigmoids_gradient(grad, a, passes & y_passes, hard, found)


@on_each_device
@given(
    data=st.data(), grid=grids, constant=constants, shape=shapes, layout=layouts, batches=steps(),
)  # fmt: skip
def test_a_hard_sigmoids_kernel_is_the_plain_one(
    device: str, data: st.DataObject, grid: Grid, constant: float | None, shape: tuple[int, ...], layout: str, batches: list[Any]
) -> None:
    dtype = data.draw(st.sampled_from(FLOATS))
    with rounding_kernels(device) as place:
        (mine, own), (theirs, other) = (
            ([fresh(grid, None, place) for _ in range(2)], [scratch(place) for _ in range(2)]) for _ in range(2)
        )
        for step in batches:
            x = batch(shape, step, theirs[0][0], dtype, layout).to(place)
            out, used = fast_kernels.sigmoid(x, [*mine[0], *mine[1]], own, True, constant, *grid)
            wanted, wanted_used = plain_kernels.sigmoid(x, [*theirs[0], *theirs[1]], other, True, constant, *grid)
            assert_identical(out, wanted)
            for state, words, wanted_state, wanted_words in zip(mine, own, theirs, other, strict=True):
                assert_learned_alike(state, words, wanted_state, wanted_words)
            grad, ends = torch.randn(x.shape).to(place, dtype), (grid.quant_min, grid.quant_max)
            assert_identical(
                fast_kernels.sigmoid_gradient(grad, x, used, True, *ends),
                plain_kernels.sigmoid_gradient(grad, x, wanted_used, True, *ends),
            )


@on_each_device
@given(data=st.data(), grid=grids, shape=shapes, layout=layouts, batches=steps())
def test_a_weights_kernel_is_the_plain_one(
    device: str, data: st.DataObject, grid: Grid, shape: tuple[int, ...], layout: str, batches: list[Any]
) -> None:
    """Into any dtype, from any; a row that is not finite keeps the range that it had."""
    shape = shape if len(shape) > 1 else (3, *(shape or (1,)))
    if 0 in shape:
        return  # a module never asks for it
    dtype, result = (data.draw(st.sampled_from(DTYPES[device])) for _ in range(2))
    with kernels(device) as place:
        mine, theirs = (fresh(grid, shape[0], place) for _ in range(2))
        for step in batches:
            weight = batch(shape, step, theirs[0].reshape(-1, *[1] * (len(shape) - 1)), dtype, layout).to(place)
            found = fast_kernels.weight_by_its_range(weight, *mine, *grid, result)
            assert_identical(found, plain_kernels.weight_by_its_range(weight, *theirs, *grid, result))
            assert_all_identical(mine, theirs)


@on_each_device
@pytest.mark.parametrize("size", [LONG, 2 * 16 * BLOCK])
def test_each_program_takes_many_blocks(device: str, size: int) -> None:
    grid = QuantSpec().grid
    with kernels(device) as place:
        (mine, own), (theirs, other) = ((fresh(grid, None, place), scratch(place)) for _ in range(2))
        for seed in (1, 2):
            x = batch((size,), (3.0, False, seed), theirs[0], torch.float32, "contiguous").to(place)
            found = fast_kernels.activation(x, *mine, own, 0.0, 6.0, 0.01, *grid, True)
            wanted = plain_kernels.activation(x, *theirs, other, 0.0, 6.0, 0.01, *grid, True)
            assert_all_identical(found, wanted)
            assert_learned_alike(mine, own, theirs, other)
            assert_identical(fast_kernels.masked_gradient(x, found[1]), plain_kernels.masked_gradient(x, found[1]))
        weight = torch.randn(2, 4096 + 5, device=place)  # more than a program's step
        mine, theirs = (fresh(grid, 2, place) for _ in range(2))
        found, wanted = (f(weight, *s, *grid, torch.float32) for f, s in
                         ((fast_kernels.weight_by_its_range, mine), (plain_kernels.weight_by_its_range, theirs)))  # fmt: skip
        assert_all_identical([found, *mine], [wanted, *theirs])


if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 20 * 2**30:

    def test_offsets_are_64_bits_wide() -> None:
        """Beyond 2^31 values; what lies there is what a short tensor gives."""
        grid, size = QuantSpec().grid, 2**31 + 2**20 + 5
        state = fresh(grid, None, "cuda")
        x = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
        tail = torch.randn(999, device="cuda").bfloat16()
        x[-999:] = tail
        for _ in range(2):  # before and after a range is known
            out, mask = fast_kernels.activation(x, *state, words := scratch("cuda"), 0.0, 6.0, 0.01, *grid, True)
            before = tuple(t.clone() for t in plain_kernels.state_before(words))
            assert_identical(out[-999:], plain_kernels.activation(tail, *before, None, 0.0, 6.0, 0.01, *grid, False)[0])
            gradient = fast_kernels.masked_gradient(x, mask)
            assert_identical(gradient[-999:], torch.where(tail > 0, tail, 0.0))
            assert not out[:-999].any() and not gradient[:-999].any()
            assert [float(t) for t in state[2:]] == [0.0, float(tail.max())]


def known(grid: Grid, low: float, high: float, place: str) -> plain_kernels.State:
    """A state that learned this range."""
    state = fresh(grid, None, place)
    x = torch.tensor([low, high], device=place)
    plain_kernels.activation(x, *state, scratch(place), None, None, 0.01, *grid, False)
    return state


@on_each_device
@given(
    data=st.data(), grid=grids, hard=st.booleans(), constant=constants, shape=shapes, layout=layouts, seed=st.integers(0, 99),
    size=st.sampled_from([0.0, 0.1, 1.0, 3.0]), learned=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    observes=st.booleans(),
)  # fmt: skip
@example(
    data=None, grid=QuantSpec().grid, hard=False, constant=0.01, shape=(BLOCK + 3,), layout="contiguous", seed=1,
    size=3.0, learned=(True, True, True), observes=True,
)  # fmt: skip
def test_a_gated_kernel_is_the_plain_one(
    device: str, data: Any, grid: Grid, hard: bool, constant: float | None, shape: tuple[int, ...], layout: str, seed: int,
    size: float, learned: tuple[bool, bool, bool], observes: bool,
) -> None:  # fmt: skip
    """Of a hard gate bit for bit. A sigmoid is another rounding of the same number, so the result is one that a gate nearby
    gives: all steps behind the gate are monotone in it."""
    dtype = data.draw(st.sampled_from(DTYPES[device])) if data else torch.float32
    of_gate = data.draw(st.sampled_from([(0.0, 1.0), (-0.1, 0.6)])) if data and hard else (0.0, 1.0)
    wild = hard and (data is None or data.draw(st.booleans()))
    ranges = ((-3 * size, 4 * size + 0.1), of_gate, (-0.2, 4 * size + 0.1))
    with kernels(device) as place:
        states = [
            [t for known_, ends in zip(learned, ranges, strict=True)
             for t in (known(grid, *ends, place) if known_ else fresh(grid, None, place))]
            for _ in range(2)
        ]  # fmt: skip
        words = [[scratch(place) for _ in range(3)] if observes else [] for _ in range(2)]
        before = [t.clone() for t in states[1]]
        x = batch(shape, (size, wild, seed), before[0], dtype, layout).to(place)
        found, used = fast_kernels.gated(x, states[0], words[0], hard, constant, *grid)
        wanted, wanted_used = plain_kernels.gated(x, states[1], words[1], hard, constant, *grid)
        if x.numel():
            assert_identical(used[: plain_kernels.NUMBERS], wanted_used[: plain_kernels.NUMBERS])
        for own in words[0]:
            assert own[:3].tolist() == [0, 0, 0]
        grad = torch.randn(x.shape, device=place).to(dtype)
        ends = (grid.quant_min, grid.quant_max)
        gradient = fast_kernels.gated_gradient(grad, x, used, hard, *ends)
        wanted_gradient = plain_kernels.gated_gradient(grad, x, wanted_used, hard, *ends)
        if hard:
            assert_all_identical([found, *states[0]], [wanted, *states[1]])
            for mine, theirs in zip(*words, strict=True):
                assert_all_identical(plain_kernels.state_before(mine), plain_kernels.state_before(theirs))
            assert_identical(gradient, wanted_gradient)
            return
        # a gate's exponential is right to two units in its last place, and so is its sum; then it has the dtype's digits
        slack = 2.0**-21
        (least, low_gradient), (greatest, high_gradient) = (nudged(x, grad, before, grid, 1 + s) for s in (-slack, slack))
        assert ((found >= torch.minimum(least, greatest)) & (found <= torch.maximum(least, greatest))).all()
        sure = (least == greatest) & (low_gradient == high_gradient)
        if all(learned):
            assert torch.equal(found[least == greatest], wanted[least == greatest])
        torch.testing.assert_close(gradient[sure], wanted_gradient[sure], rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
        for mine, theirs in zip(*states, strict=True):
            if mine.dtype == torch.int32:
                assert (mine - theirs).abs().max() <= 1  # a zero point near a tie
            else:
                torch.testing.assert_close(mine, theirs, rtol=4 * torch.finfo(dtype).eps, atol=1e-9)


@on_each_device
def test_a_plain_forward_has_a_plain_gradient(device: str) -> None:
    """Of a dtype that no kernel computes in, whatever the gradient's dtype."""
    grid = QuantSpec().grid
    with kernels(device) as place:
        states = [t for ends in ((-3.0, 3.0), (0.0, 1.0), (-0.3, 3.0)) for t in known(grid, *ends, place)]
        x, grad = torch.randn(40, dtype=torch.float64, device=place), torch.randn(40, device=place)
        _, used = fast_kernels.gated(x, states, [], True, None, *grid)
        found = fast_kernels.gated_gradient(grad, x, used, True, grid.quant_min, grid.quant_max)
        assert found.any()
        assert_identical(found, plain_kernels.gated_gradient(grad, x, used, True, grid.quant_min, grid.quant_max))


@on_each_device
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("is_known", [True, False])
def test_a_gate_far_from_zero_is_zero_or_one(device: str, hard: bool, is_known: bool) -> None:
    grid = QuantSpec().grid
    with kernels(device) as place:
        x = torch.tensor([-1e30, -1e4, -200.0, -178.0, -130.0, -95.0, -89.0, -80.0, 80.0, 95.0, 200.0, 1e4], device=place)
        states = [[t for _ in range(3) for t in (known(grid, -300.0, 300.0, place) if is_known else fresh(grid, None, place))]
                  for _ in range(2)]  # fmt: skip
        found, used = fast_kernels.gated(x, states[0], [], hard, None, *grid)
        wanted, _ = plain_kernels.gated(x, states[1], [], hard, None, *grid)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-30)
        gradient = fast_kernels.gated_gradient(torch.ones_like(x), x, used, hard, grid.quant_min, grid.quant_max)
        wanted = plain_kernels.gated_gradient(torch.ones_like(x), x, used, hard, grid.quant_min, grid.quant_max)
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-30)


def nudged(x: Tensor, grad: Tensor, flat: list[Tensor], grid: Grid, factor: float) -> tuple[Tensor, Tensor]:
    """SiLU in quantized steps, with the gate times a factor; and what its codes say of the gradient."""
    of_x, of_gate, of_y = plain_kernels._states(flat)
    x = dense(x)
    a, _ = plain_kernels._fake_quantized(x, of_x, grid)
    gate = (torch.sigmoid(a.float()) * factor).to(x.dtype)
    b, gate_passes = plain_kernels._fake_quantized(gate, of_gate, grid)
    out, passes = plain_kernels._fake_quantized(a * b, of_y, grid)
    return out, b * 4 + gate_passes * 2 + passes


normed: Any = st.sampled_from(
    [(2, 1), (300, 3), (70, 33), (2, 3, 5), (2, 5, 6, 7), (3, 16, 4, 4), (40, 3, 9, 9), (2, 70, 2, 3), (2, 4, 3, 3, 2)]
)  # fmt: skip


def assert_near(found: Tensor, wanted: Tensor, size: float) -> None:
    """Within some last digits of each value, some of its terms' size, or a step of the dtype's least values."""
    about = torch.finfo(found.dtype)
    atol = 1e-5 * size + 2 * about.smallest_normal * about.eps
    torch.testing.assert_close(found, wanted, rtol=4 * about.eps, atol=atol)


def sizes_of(grad: Tensor, kept: Tensor, weight: Tensor | None) -> tuple[float, float]:
    """Of what a norm's gradient and its sums are made: what cancels leaves its last digits."""
    inverse = kept[plain_kernels.KEPT :].reshape(2, -1)[1]
    factor = inverse if weight is None else inverse * weight
    return float(grad.float().abs().max() * factor.abs().max()), float(grad.float().abs().sum())


@on_each_device
@given(
    data=st.data(), grid=grids, bounds=bounds_of, constant=constants, shape=normed, layout=layouts, batches=steps(),
    affine=st.booleans(), takes=st.sampled_from(["nothing", "ends", "all"]),
)  # fmt: skip
def test_a_norms_kernels_are_the_plain_ones(
    device: str, data: st.DataObject, grid: Grid, bounds: Bounds, constant: float | None, shape: tuple[int, ...], layout: str,
    batches: list[Any], affine: bool, takes: str,
) -> None:  # fmt: skip
    """Statistics within their rounding; of the same statistics the same values, ranges and places where the gradient passes."""
    dtype, channels = data.draw(st.sampled_from(DTYPES[device])), shape[1]
    axes = [0, *range(2, len(shape))]
    with kernels(device) as place:
        (mine, own), (theirs, other) = ((fresh(grid, None, place), scratch(place)) for _ in range(2))
        parameters = [torch.randn(channels, device=place) if affine else None for _ in range(2)]
        running = [torch.zeros(channels, device=place), torch.ones(channels, device=place), torch.tensor(0, device=place)]
        for i, step in enumerate(batches):
            x = batch(shape, step, theirs[0], dtype, layout).to(place)
            learns = takes == "all" or i == 0
            observes = learns or takes == "ends"
            before, wanted_running = [t.clone() for t in mine], [t.clone() for t in running]
            rest = (0.1, 1e-5)
            flags = (own, observes, learns)
            out, kept = fast_kernels.norm_activation(x, *parameters, *running, *rest, *mine, *flags, *bounds, constant, *grid)
            scale, zero, known = before[0].reshape(()), before[1].reshape(()), (before[2] != 0) | (before[3] != 0)
            assert kept[:3].tolist() == [float(scale), float(zero), float(known)]
            mean, inverse = kept[plain_kernels.KEPT :].reshape(2, -1)
            var, wanted_mean = torch.var_mean(x.double(), axes, correction=0)
            apart = float(x.double().nan_to_num(0.0, 0.0, 0.0).abs().max()) if x.numel() else 0.0
            alive = wanted_mean.isfinite()  # the rest is lost: NaN here, infinite elsewhere
            assert not mean[~alive].isfinite().any()
            torch.testing.assert_close(mean.double()[alive], wanted_mean[alive], rtol=1e-6, atol=1e-6 * apart)
            slack = 1e-5 * var + 1e-12 * apart**2  # of the variance
            exact = (var + 1e-5).rsqrt()
            fine = (inverse - exact).abs() <= 1e-6 * exact + 0.5 * slack * exact**3
            assert fine[alive].all()
            n = x.numel() // channels
            moments = (wanted_mean, 1e-6 * apart), (var * n / (n - 1), 1e-6 * apart**2)
            for new, old, (moment, atol) in zip(running[:2], wanted_running[:2], moments, strict=True):
                mixed = 0.1 * moment + 0.9 * old
                sound = mixed.isfinite()
                torch.testing.assert_close(new.double()[sound], mixed[sound], rtol=1e-5, atol=atol)
                assert not new[~sound].isfinite().any()
            assert int(running[2]) == i + 1
            # of these statistics, bit for bit
            a = plain_kernels.normalised(dense(x), *parameters, mean, inverse)
            a = a if bounds == (None, None) else a.clamp(*bounds)
            assert_identical(out, plain_kernels._fake_quantized(a, theirs, grid)[0])
            if learns:
                plain_kernels._learn(a, theirs, plain_kernels.state_before(other), constant, grid)
                assert_learned_alike(mine, own, theirs, other)
            else:
                assert_all_identical(mine, theirs)
                ends = torch.stack(a.aminmax())
                if observes and bool(ends.isfinite().all()):
                    assert_identical(kept[4:6], ends.float())
            counts = own[plain_kernels.COUNTS :], kept[8 : 8 + -(-channels // 32)]  # one for each block of channels
            assert not own[:3].any()
            assert not any(map(torch.any, counts))
            below, above = _first_clipped(scale, zero, grid.quant_min, grid.quant_max) if known else (-math.inf, math.inf)
            low, high = (None if b is None else float(torch.tensor(b, dtype=dtype)) for b in bounds)
            wanted_ends = [below if low is None else max(below, low), above if high is None else min(above, high)]
            if has_channels_last(x):
                assert kept[6:8].tolist() == wanted_ends
            grad = torch.randn(x.shape, device=place).to(dtype)
            ends_of_codes = (grid.quant_min, grid.quant_max)
            found, again = (fast_kernels.norm_gradient(grad, x, *parameters, kept, *bounds, *ends_of_codes) for _ in range(2))
            assert_all_identical(found, again)
            assert not counts[1].any()
            sums = plain_kernels.norm_sums(grad, x, *parameters, kept, *bounds, *ends_of_codes)
            wanted = plain_kernels.norm_gradient(grad, x, *parameters, kept, sums, *bounds, *ends_of_codes), sums
            if bool(kept[plain_kernels.KEPT :].isfinite().all()):
                for mine_, theirs_, size in zip(found, wanted, sizes_of(grad, kept, parameters[0]), strict=True):
                    assert_near(mine_, theirs_, size)


@on_each_device
@given(
    data=st.data(), grid=grids, constant=constants, shape=normed, layout=layouts, batches=steps(), affine=st.booleans(),
    hard=st.booleans(), learns=st.booleans(),
)  # fmt: skip
def test_a_norm_and_its_gate_are_the_norm_and_then_the_gate(
    device: str, data: st.DataObject, grid: Grid, constant: float | None, shape: tuple[int, ...], layout: str,
    batches: list[Any], affine: bool, hard: bool, learns: bool,
) -> None:  # fmt: skip
    """Of the same statistics, bit for bit: value, ranges, and the gradient that reaches the norm."""
    dtype, channels = data.draw(st.sampled_from(DTYPES[device])), shape[1]
    ends = (grid.quant_min, grid.quant_max)
    with kernels(device) as place:
        (mine, own), (theirs, other) = (
            ([t for _ in range(3) for t in fresh(grid, None, place)], [scratch(place) for _ in range(3)]) for _ in range(2)
        )
        parameters = [torch.randn(channels, device=place) if affine else None for _ in range(2)]
        running, moved = (
            [torch.zeros(channels, device=place), torch.ones(channels, device=place), torch.tensor(0, device=place)]
            for _ in range(2)
        )
        for i, step in enumerate(batches):
            x = batch(shape, step, theirs[0], dtype, layout).to(place)
            teaches = learns or i == 0
            out, used, kept = fast_kernels.norm_gated(
                x, *parameters, *running, 0.1, 1e-5, mine, own, teaches, hard, constant, *grid
            )
            flags = (False, False, None, None, None)
            statistics = fast_kernels.norm_statistics(
                x, *parameters, *moved, 0.1, 1e-5, *theirs[:4], other[0], *flags, *grid
            )
            assert_all_identical([*running, kept[plain_kernels.KEPT :]], [*moved, statistics[plain_kernels.KEPT :]])
            by = fast_kernels if has_channels_last(x) else plain_kernels
            y = plain_kernels.normalised(
                dense(x), *parameters, *kept[plain_kernels.KEPT :].reshape(2, -1)
            )
            wanted, wanted_used = by.gated(y, theirs, other if teaches else [], hard, constant, *grid)
            numbers, wanted_numbers = (numbers_of[: plain_kernels.NUMBERS] for numbers_of in (used, wanted_used))
            assert_all_identical([out, numbers, *mine], [wanted, wanted_numbers, *theirs])
            assert out.stride() == wanted.stride()
            if teaches:
                for ours, its in zip(own, other, strict=True):
                    assert_all_identical(plain_kernels.state_before(ours), plain_kernels.state_before(its))
            assert not any(map(torch.any, (*(words[:3] for words in own), own[0][plain_kernels.COUNTS :])))
            grad = torch.randn(x.shape, device=place).to(dtype)
            found, again = (
                fast_kernels.norm_gated_gradient(grad, x, *parameters, kept, used, hard, *ends) for _ in range(2)
            )
            assert_all_identical(found, again)
            reached = by.gated_gradient(grad, y, used, hard, *ends).float()
            sums = plain_kernels._norm_sums(reached, dense(x), kept)
            of_x = plain_kernels._norm_gradient(reached, dense(x), parameters[0], kept, sums).to(dtype)
            if bool(kept[plain_kernels.KEPT :].isfinite().all()) and bool(reached.isfinite().all()):
                for ours, its, size in zip(found, (of_x, sums), sizes_of(reached, kept, parameters[0]), strict=True):
                    assert_near(ours, its, size)


def test_the_interpreter_leaves_triton_as_it_was() -> None:
    """So that other tests of this process compile."""
    triton = pytest.importorskip("triton")
    from triton.language import core, standard

    def everything() -> list[dict[str, Any]]:
        kinds = (core.tensor, core.dtype, core.tensor_descriptor_base)
        return [dict(vars(of)) for of in (triton.language, core, standard, triton.language.math, *kinds)]

    before = everything()  # it adds names of its own to modules
    grid = QuantSpec().grid
    with kernels("interpreter"):
        fast_kernels.activation(torch.randn(9), *fresh(grid), scratch(), 0.0, None, 0.01, *grid, True)
        fast_kernels.weight_by_its_range(torch.randn(2, 9), *fresh(grid, 2), *grid, torch.float32)
    for now, then in zip(everything(), before, strict=True):
        assert {name: now.get(name) for name in then} == then
    assert "TRITON_INTERPRET" not in os.environ
    assert not triton.knobs.runtime.interpret


# --- the plain kernels


def modules_own(module: FakeQuantize, x: Tensor, bounds: Bounds) -> Tensor:
    """The module's own steps, one after the other, behind the activation as PyTorch computes it."""
    if bounds == (0.0, None):
        x = torch.relu(x)
    elif bounds != (None, None):
        x = torch.nn.functional.hardtanh(x, *bounds)  # type: ignore[arg-type]
    return module(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(
    spec=strategies.specs(per_channel=False), observer=st.sampled_from(["min_max", "moving_average"]),
    bounds=st.sampled_from([(None, None), (0.0, None), (0.0, 6.0), (-1.0, 1.0), (-0.125, 0.375)]),
    shape=shapes, layout=layouts, batches=steps(),
)  # fmt: skip
def test_an_activations_operator_is_the_module_behind_the_activation(
    dtype: torch.dtype, spec: QuantSpec, observer: Any, bounds: Bounds, shape: tuple[int, ...], layout: str, batches: list[Any]
) -> None:
    """Value, state and gradient. (Without NaN: its gradient stops at the operator's clamp, not at PyTorch's.)"""
    module = FakeQuantize(spec := dataclasses.replace(spec, observer=observer))
    module._is_fast_on_cpu = lambda x: False  # type: ignore[method-assign]
    state, words, grid = fresh(spec.grid), scratch(), spec.grid
    for size, _, seed in batches:
        x = batch(shape, (size, False, seed), state[0], dtype, layout)
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        module._known = False  # batches of one value each may average to the range that none has
        out = operators.fake_quantize_activation(leaf, state, words, bounds, module.constant, grid)
        wanted = modules_own(module, other, bounds)
        torch.testing.assert_close(out, wanted, rtol=0.0, atol=0.0)
        grad = torch.randn(shape).to(dtype)
        out.backward(grad)
        wanted.backward(grad)
        assert leaf.grad is not None and other.grad is not None
        torch.testing.assert_close(leaf.grad, other.grad, rtol=0.0, atol=0.0)
        assert_all_identical(state, module.state)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@given(
    spec=strategies.specs(per_channel=False), observer=st.sampled_from(["min_max", "moving_average"]), shape=shapes,
    layout=layouts, of_grad=layouts, batches=steps(),
)  # fmt: skip
def test_a_gelus_operator_is_the_module_behind_it(
    dtype: torch.dtype, spec: QuantSpec, observer: Any, shape: tuple[int, ...], layout: str, of_grad: str, batches: list[Any]
) -> None:
    """Value, state and gradient, bit for bit of tensors that lie alike; and those of second order: by the gradient that flows in,
    and by x. (How PyTorch's GELU rounds on CPUs depends on where values lie.)"""
    module = FakeQuantize(spec := dataclasses.replace(spec, observer=observer))
    module._is_fast_on_cpu = lambda x: False  # type: ignore[method-assign]
    state, words, grid = fresh(spec.grid), scratch(), spec.grid
    for size, _, seed in batches:
        x = batch(shape, (size, False, seed), state[0], dtype, layout)
        leaves = [t.clone().requires_grad_() for t in (x, dense(x))]
        module._known = False
        outs = (
            operators.fake_quantize_gelu(leaves[0], state, words, module.constant, grid),
            module(torch.nn.functional.gelu(leaves[1])),
        )
        torch.testing.assert_close(*outs, rtol=0.0, atol=0.0, equal_nan=True)
        assert_all_identical(state, module.state)
        grad = laid_out(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype), of_grad)
        grads = grad, grad.contiguous(memory_format=memory_format(outs[0]))
        once, twice = [], []
        for out, leaf, grad in zip(outs, leaves, grads, strict=True):
            once += torch.autograd.grad(out, leaf, grad, retain_graph=True)
            grad = grad.clone().requires_grad_()
            (first,) = torch.autograd.grad(out, leaf, grad, create_graph=True)
            twice.append((first.detach(), *torch.autograd.grad(first, (grad, leaf), torch.ones_like(first))))
        torch.testing.assert_close(*once, rtol=0.0, atol=0.0, equal_nan=True)
        slack, calm = 8 * torch.finfo(dtype).eps, x.abs() < 100.0  # the square of more overflows in float16, and is NaN behind
        for mine, theirs in zip(*twice, strict=True):
            torch.testing.assert_close(mine[calm], theirs[calm], rtol=slack, atol=slack)


@pytest.mark.parametrize("hard", [True, False])
@given(grid=grids, seed=st.integers(0, 99), size=st.sampled_from([0.1, 1.0, 5.0]), shape=shapes, layout=layouts)
def test_a_gated_operator_is_its_steps_and_their_gradient(
    hard: bool, grid: Grid, seed: int, size: float, shape: tuple[int, ...], layout: str
) -> None:
    ranges = ((-2 * size, 3 * size), (0.0, 0.9), (-0.2 * size, 2 * size))
    states: Any = tuple(known(grid, *ends, "cpu") for ends in ranges)
    x = batch(shape, (size, False, seed), states[0][0], torch.float32, layout)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()

    def q(value: Tensor, state: plain_kernels.State) -> Tensor:
        return fake_quantize(value, state[0].reshape(()), state[1].reshape(()), grid.quant_min, grid.quant_max)

    a = q(other, states[0])
    wanted = q(a * q((torch.nn.functional.hardsigmoid(a) if hard else torch.sigmoid(a)), states[1]), states[2])
    out = operators.fake_quantize_gated(leaf, states, [], hard, None, grid)
    torch.testing.assert_close(out, wanted, rtol=0.0, atol=0.0)
    grad = torch.randn(shape)
    out.backward(grad)
    wanted.backward(grad)
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@given(
    spec=strategies.specs(per_channel=False), observer=st.sampled_from(["min_max", "moving_average"]), shape=shapes,
    layout=layouts, of_grad=layouts, batches=steps(),
)  # fmt: skip
def test_a_sigmoids_operator_is_the_modules_around_it(
    dtype: torch.dtype, hard: bool, spec: QuantSpec, observer: Any, shape: tuple[int, ...], layout: str, of_grad: str,
    batches: list[Any],
) -> None:  # fmt: skip
    """Value and states, bit for bit of tensors that lie alike; gradients, and those of second order, in the digits of float32 and
    of the dtype, in which PyTorch holds the sigmoid that its slope is made of. (Of a hard one it has no second derivative.)"""
    function = torch.nn.functional.hardsigmoid if hard else torch.sigmoid
    spec = dataclasses.replace(spec, observer=observer)
    modules, states, words, grid = [FakeQuantize(spec) for _ in range(2)], [fresh(spec.grid) for _ in range(2)], [], spec.grid
    for module in modules:
        module._is_fast_on_cpu = lambda x: False  # type: ignore[method-assign]
        words.append(scratch())
    for size, _, seed in batches:
        x = batch(shape, (size, False, seed), states[0][0], dtype, layout)
        leaves = [t.clone().requires_grad_() for t in (x, dense(x))]
        for module in modules:
            module._known = False
        outs = (
            operators.fake_quantize_sigmoid(leaves[0], tuple(states), words, hard, modules[0].constant, grid),  # type: ignore[arg-type]
            modules[1](function(modules[0](leaves[1]))),
        )
        torch.testing.assert_close(*outs, rtol=0.0, atol=0.0)
        for state, module in zip(states, modules, strict=True):
            assert_all_identical(state, module.state)
        grad = laid_out(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype), of_grad)
        grads = grad, grad.contiguous(memory_format=memory_format(outs[0]))
        once, twice = [], []
        for out, leaf, grad in zip(outs, leaves, grads, strict=True):
            once += torch.autograd.grad(out, leaf, grad, retain_graph=True)
            grad = grad.clone().requires_grad_()
            (first,) = torch.autograd.grad(out, leaf, grad, create_graph=True)
            if hard:
                with pytest.raises(RuntimeError, match="derivative for aten::hardsigmoid_backward is not implemented"):
                    torch.autograd.grad(first, leaf, torch.ones_like(first))
            second = () if hard else torch.autograd.grad(first, (grad, leaf), torch.ones_like(first))
            twice.append((first.detach(), *second))
        slack = 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        torch.testing.assert_close(*once, rtol=slack, atol=slack)
        for mine, theirs in zip(*twice, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=slack, atol=slack)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@given(grid=grids, seed=st.integers(0, 99), shape=normed, layout=layouts)
def test_a_norm_and_its_gate_are_their_steps_and_their_gradient(
    hard: bool, affine: bool, grid: Grid, seed: int, shape: tuple[int, ...], layout: str
) -> None:
    """As PyTorch's own norm, gate and their derivatives give them."""
    torch.manual_seed(seed)
    kind = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}[len(shape)]
    norm, other_norm = (kind(shape[1], affine=affine).double() for _ in range(2))
    states: Any = tuple(known(grid, *ends, "cpu") for ends in ((-2.0, 2.9), (0.0, 0.9), (-0.3, 2.0)))
    x = batch(shape, (1.0, False, seed), states[0][0], torch.float64, layout)
    if float(x.transpose(0, 1).flatten(1).var(1).min()) < 1e-3:  # then a last digit is many in the gradient
        x = x + torch.randn(shape).double()
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()

    def q(value: Tensor, state: plain_kernels.State) -> Tensor:
        return fake_quantize(value, state[0].reshape(()), state[1].reshape(()), grid.quant_min, grid.quant_max)

    a = q(other_norm(other), states[0])
    wanted = q(a * q((torch.nn.functional.hardsigmoid(a) if hard else torch.sigmoid(a)), states[1]), states[2])
    out = operators.batch_norm_gated(leaf, norm, states, [scratch() for _ in range(3)], False, hard, None, grid)
    apart = (out - wanted).abs().detach()
    assert float((apart > 1e-5).double().mean()) <= 0.05  # a value near a tie goes either way
    for mine, theirs in zip(norm.buffers(), other_norm.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    if float(apart.max()) <= 1e-5:
        grad = torch.randn(shape).double()
        out.backward(grad)
        wanted.backward(grad)
        for mine_, theirs_ in zip((leaf, *norm.parameters()), (other, *other_norm.parameters()), strict=True):
            torch.testing.assert_close(mine_.grad, theirs_.grad, rtol=1e-3, atol=1e-3)


@given(spec=strategies.specs(per_channel=True), shape=shapes, batches=steps())
def test_a_weights_operator_is_the_module(spec: QuantSpec, shape: tuple[int, ...], batches: list[Any]) -> None:
    shape = shape if len(shape) > 1 else (3, *(shape or (1,)))
    if 0 in shape:
        return
    spec = dataclasses.replace(spec, observer="min_max")
    module, state = FakeQuantize(spec, shape[0], memoryless=True), fresh(spec.grid, shape[0])
    for step in batches:
        weight = batch(shape, step, torch.tensor(0.1), torch.float32, "contiguous")
        leaf = weight.clone().requires_grad_()
        out = operators.fake_quantize_weight(leaf, state, spec.grid, torch.float32)
        torch.testing.assert_close(out, module(weight), rtol=0.0, atol=0.0, equal_nan=True)
        assert_all_identical(state, module.state)
        grad = torch.randn(shape)
        out.backward(grad)
        assert leaf.grad is not None and torch.equal(leaf.grad, grad)  # nothing lies outside its own range


@on_each_device
@given(
    grid=strategies.specs(per_channel=True).map(lambda s: s.grid), shape=st.sampled_from([(3, 5), (2, 3, 4, 5), (70, 33)]),
    layout=layouts, seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.float16]),
)  # fmt: skip
def test_a_weight_is_written_in_the_dtype_asked_for_and_its_gradient_passes_whole(
    device: str, grid: Grid, shape: tuple[int, ...], layout: str, seed: int, dtype: torch.dtype
) -> None:
    with kernels(device) as place:
        weight = batch(shape, (1.0, False, seed), torch.tensor(0.1), torch.float32, layout).to(place)
        leaf, (mine, theirs) = weight.clone().requires_grad_(), (fresh(grid, shape[0], place) for _ in range(2))
        before = leaf.detach().clone()
        out = operators.fake_quantize_weight(leaf, mine, grid, dtype)
        assert_identical(out.detach(), plain_kernels.weight_by_its_range(leaf.detach(), *theirs, *grid, dtype))
        assert_all_identical(mine, theirs)
        grad = torch.randn(shape, device=place).to(dtype)
        out.backward(grad)
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, grad.float())
        assert torch.equal(leaf, before)


@on_each_device
@given(
    channels=st.sampled_from([1, 3, 40]), affine=st.booleans(), seed=st.integers(0, 99),
    bounds=st.sampled_from([(None, None), (0.0, None), (0.0, 1.0)]), needs=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    kind=st.sampled_from([torch.float32, torch.float16]),
)  # fmt: skip
def test_a_norms_launches_are_its_plain_steps(
    device: str, channels: int, affine: bool, bounds: Bounds, seed: int, needs: tuple[bool, ...], kind: torch.dtype
) -> None:
    """Value, statistics, range and the gradients wanted of an eager step by kernels, and of one by what compilers are given."""
    grid, results = QuantSpec().grid, []
    for fast in (True, False):
        torch.manual_seed(seed)
        with kernels(device if fast else "cpu") as place:
            norm = torch.nn.BatchNorm2d(channels, affine=affine).to(place)
            state, words = known(grid, -0.5, 1.5, place), scratch(place)
            leaf = torch.randn(4, channels, 3, 5).to(place).contiguous(memory_format=torch.channels_last)
            wanted = [leaf, *norm.to(kind).parameters()]
            for tensor, need in zip(wanted, needs, strict=False):
                tensor.requires_grad_(need)
            out, _ = operators.batch_norm_activation(leaf, norm, state, words, True, True, bounds, 0.01, grid)
            assert out.requires_grad == any(needs[: len(wanted)])
            if out.requires_grad:
                out.backward(torch.randn(out.shape).to(place))
            assert [t.grad is not None and t.grad.dtype == t.dtype for t in wanted] == [t.requires_grad for t in wanted]
            found = (out.detach(), *norm.buffers(), *state, *(t.grad for t in wanted))
            results.append([t.cpu() for t in found if t is not None])
    assert len(results[0]) == len(results[1])
    apart = (results[0][0] - results[1][0]).abs()
    assert float((apart > 1e-6).float().mean()) <= 0.02  # a value near a tie goes either way
    if float(apart.max()) <= 1e-6:
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4 if theirs.dtype == torch.float32 else 1e-2, atol=1e-4)


@on_each_device
def test_a_norm_is_computed_again_in_a_checkpoint(device: str) -> None:
    results = []
    for checkpointed in (True, False):
        torch.manual_seed(0)
        with kernels(device) as place:
            norm, words = torch.nn.BatchNorm2d(3).to(place), scratch(place)
            state = known(QuantSpec().grid, -0.5, 1.5, place)
            x = torch.randn(4, 3, 5, 5).to(place).contiguous(memory_format=torch.channels_last).requires_grad_()

            def forward(x: Tensor, norm: Any = norm, state: Any = state, words: Tensor = words) -> Tensor:
                rest = (state, words, False, False, (0.0, None), None, QuantSpec().grid)
                return operators.batch_norm_activation(x, norm, *rest)[0]

            out = checkpoint(forward, x, use_reentrant=False) if checkpointed else forward(x)
            out.square().sum().backward()
            results.append([x.grad, *(p.grad for p in norm.parameters())])
    assert_all_identical(*results)


# --- masks and gradients


@given(shape=shapes, layout=st.sampled_from(["contiguous", "channels_last"]), seed=st.integers(0, 99))
def test_masks_are_unpacked_as_packed(shape: tuple[int, ...], layout: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inside = laid_out(torch.rand(shape, generator=generator) < 0.5, layout)
    mask = plain_kernels.packed(inside)
    assert mask.shape == plain_kernels.mask_like(inside, True).shape
    assert_identical(plain_kernels.unpacked(mask, inside), inside)
    assert torch.equal(plain_kernels.packed(plain_kernels.unpacked(mask, inside)), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@given(shape=shapes, layout=st.sampled_from(["contiguous", "channels_last"]), seed=st.integers(0, 99))
def test_the_gradient_for_compilers_is_the_kernels(dtype: torch.dtype, shape: tuple[int, ...], layout: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grad = laid_out(torch.randn(shape, generator=generator).to(dtype), layout)
    mask = plain_kernels.packed(laid_out(torch.rand(shape, generator=generator) < 0.5, layout))
    wanted = plain_kernels.masked_gradient(grad, mask)
    assert_identical(gradients._traced_gradient(grad, mask, memory_format(grad)), wanted)
    assert_identical(torch.ops.eagerq.masked_gradient(grad, mask), wanted)


@given(shape=shapes, layout=layouts, seed=st.integers(0, 99))
def test_a_gradient_of_any_layout_meets_its_mask(shape: tuple[int, ...], layout: str, seed: int) -> None:
    """The mask lies as the output does, whatever the gradient does."""
    grid = QuantSpec().grid
    state = known(grid, -1.0, 1.0, "cpu")
    for of_x in ("contiguous", "channels_last"):
        x = batch(shape, (1.0, False, seed), state[0], torch.float32, of_x).requires_grad_()
        grad = laid_out(torch.randn(shape), layout)
        (found,) = torch.autograd.grad(operators.fake_quantize_activation(x, state, None, (None, 0.5), None, grid), x, grad)
        q = torch.round(x.detach() / state[0].reshape(())) + state[1].reshape(())
        inside = (q >= grid.quant_min) & (q <= grid.quant_max) & (x.detach() < 0.5)
        torch.testing.assert_close(found, torch.where(inside, grad, 0.0), rtol=0.0, atol=0.0)


def test_a_masked_gradient_is_its_own_derivative() -> None:
    """Linear: a difference of small integers is its derivative, with no digit lost. Twice differentiated it is zero."""
    grad, mask = torch.arange(1.0, 14.0).requires_grad_(), torch.tensor([0b10110100, 0b00101], dtype=torch.uint8)
    inside = plain_kernels.unpacked(mask, grad).float()
    out = torch.ops.eagerq.masked_gradient(grad, mask)
    back = torch.arange(3.0, 16.0).requires_grad_()
    (first,) = torch.autograd.grad(out, grad, back, create_graph=True)
    assert torch.equal(first, back * inside)
    for i in range(grad.numel()):
        step = torch.zeros_like(grad)
        step[i] = 2.0
        difference = torch.ops.eagerq.masked_gradient(grad.detach() + step, mask) - out.detach()
        assert float((difference * back.detach()).sum()) == 2.0 * float(first[i].detach())
    (second,) = torch.autograd.grad(first, back, torch.arange(1.0, 14.0))
    assert torch.equal(second, torch.arange(1.0, 14.0) * inside)


def test_an_activation_is_differentiated_twice() -> None:
    """By the gradient that flows in, in which its derivative is linear."""
    grid = QuantSpec().grid
    x = torch.randn(3, 8, requires_grad=True)
    grad = torch.randn(3, 8, requires_grad=True)
    out = operators.fake_quantize_activation(x, known(grid, -1.0, 1.0, "cpu"), None, (0.0, 6.0), None, grid)
    (first,) = torch.autograd.grad(out, x, grad, create_graph=True)
    (second,) = torch.autograd.grad(first, grad, torch.ones_like(x))
    assert torch.equal(first, grad * second)
    assert set(second.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("bounds", [(None, None), (0.0, 1.0)])
def test_a_norm_is_differentiated_twice(bounds: Bounds) -> None:
    """As the modules one after the other are."""
    torch.manual_seed(0)
    grid, norm, start = QuantSpec().grid, torch.nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    results = []
    for fused in (True, False):
        state, x = known(grid, -0.5, 1.5, "cpu"), start.clone().requires_grad_()
        if fused:
            out, _ = operators.batch_norm_activation(x, norm, state, scratch(), False, False, bounds, None, grid)
        else:
            y = norm(x)
            y = y if bounds == (None, None) else torch.nn.functional.hardtanh(y, *bounds)  # type: ignore[arg-type]
            out = fake_quantize(y, state[0].reshape(()), state[1].reshape(()), grid.quant_min, grid.quant_max)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        (first,) = torch.autograd.grad((out * weights).sum(), x, create_graph=True)
        results.append([first, *torch.autograd.grad(first.square().sum(), [x, norm.weight])])
    for mine, theirs in zip(*results, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_kernels_keep_float32_whatever_pytorchs_default_is(dtype: torch.dtype) -> None:
    grid = QuantSpec().grid
    x = torch.randn(3, 4, 2, 2)
    running = [torch.zeros(4), torch.ones(4), torch.tensor(0)]
    with kernels(DEVICES[0]) as place:
        moved = [t.to(place) for t in running]
        args = (None, None, *moved, 0.1, 1e-5, *fresh(grid, None, place), scratch(place), True, True, 0.0, None, 0.01, *grid)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            _, kept = fast_kernels.norm_activation(x.to(place), *args)
            gradient, *_ = fast_kernels.norm_gradient(x.to(place), x.to(place), None, None, kept, 0.0, None, 0, 255)
        finally:
            torch.set_default_dtype(before)
    assert kept.dtype == gradient.dtype == torch.float32


@pytest.mark.parametrize("of_norm", [False, True])
def test_a_gated_gradient_has_none_of_its_own_and_pytorch_says_so(of_norm: bool) -> None:
    grid = QuantSpec().grid
    states: Any = tuple(known(grid, -1.0, 1.0, "cpu") for _ in range(3))
    x = torch.randn(8, 2, requires_grad=True)
    if of_norm:
        words = [scratch() for _ in range(3)]
        out = operators.batch_norm_gated(x, torch.nn.BatchNorm1d(2), states, words, False, True, None, grid)
    else:
        out = operators.fake_quantize_gated(x, states, [], True, None, grid)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.warns(UserWarning, match="eagerq::gated_gradient: an autograd kernel was not registered"):
        torch.autograd.grad(grad.sum(), x)


def test_a_norm_before_a_gate_keeps_its_second_derivatives() -> None:
    """As the norm and then the gate's operator: what PyTorch knows of them is the same."""
    grid, found = QuantSpec().grid, []
    for together in (True, False):
        torch.manual_seed(0)
        states: Any = tuple(known(grid, *ends, "cpu") for ends in ((-3.0, 3.0), (0.0, 1.0), (-0.3, 3.0)))
        norm, x = torch.nn.BatchNorm2d(3), torch.randn(4, 3, 5, 2, requires_grad=True)
        if together:
            out = operators.batch_norm_gated(x, norm, states, [scratch() for _ in range(3)], False, False, None, grid)
        else:
            out = operators.fake_quantize_gated(norm(x), states, [], False, None, grid)
        first = torch.autograd.grad(out.square().sum(), (x, *norm.parameters()), create_graph=True)
        with pytest.warns(UserWarning, match="an autograd kernel was not registered"):
            second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), (x, *norm.parameters()))
        found.append([*first, *second])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


# --- what PyTorch asks of an operator

_GRID, _WEIGHT = QuantSpec().grid, QuantSpec(signed=True, symmetric=True, narrow_range=True).grid


def _arguments(layout: str) -> dict[str, tuple[Any, ...]]:
    def x() -> Tensor:
        return laid_out(torch.randn(3, 2, 4, 5), layout).requires_grad_()

    mask = torch.randint(0, 256, (15,), dtype=torch.uint8)
    numbers = [0.1, 100.0, 1.0, 0.01, 0.0, 1.0, 0.02, 20.0, 1.0]
    used = torch.tensor([*numbers, *[0.0] * (plain_kernels.USED - len(numbers))])
    three = [t for _ in range(3) for t in fresh(_GRID)]
    affine = [torch.randn(2), torch.randn(2)]
    running = [torch.zeros(2), torch.ones(2), torch.tensor(0)]
    kept = torch.tensor([0.1, 100.0, 1.0, *[0.0] * (plain_kernels.KEPT - 3), 0.1, 0.2, 1.0, 0.9])
    learns = (*fresh(_GRID), scratch(), True, True, 0.0, 6.0, 0.01, *_GRID)
    checked = {
        "fake_quantize_activation": (x(), *fresh(_GRID), scratch(), 0.0, 6.0, 0.01, *_GRID, True),
        "fake_quantize_activation that learns nothing": (x().detach(), *fresh(_GRID), None, None, None, None, *_GRID, False),
        "masked_gradient": (x(), mask),
        "fake_quantize_gelu": (x(), *fresh(_GRID), scratch(), 0.01, *_GRID, True),
        "fake_quantize_gelu that learns nothing": (x().detach(), *fresh(_GRID), None, None, *_GRID, False),
        "gelu_gradient": (torch.randn(3, 2, 4, 5), x().detach(), mask),
        "fake_quantize_gated": (x(), three, [scratch() for _ in range(3)], True, 0.01, *_GRID),
        "fake_quantize_gated that learns nothing": (x(), three, [], False, None, *_GRID),
        "gated_gradient": (torch.randn(3, 2, 4, 5), x().detach(), used, True, 0, 255),
        "fake_quantize_sigmoid": (x(), three[:8], [scratch() for _ in range(2)], False, 0.01, *_GRID),
        "fake_quantize_sigmoid that learns nothing": (x(), three[:8], [], True, None, *_GRID),
        "sigmoid_gradient": (torch.randn(3, 2, 4, 5), x().detach(), used[:6].clone(), False, 0, 255),
        "batch_norm_activation": (x(), *affine, *running, 0.1, 1e-5, *learns),
        "batch_norm_activation that keeps ends": (
            x(), None, None, *running, 0.1, 1e-5, *fresh(_GRID), scratch(), True, False, None, None, 0.01, *_GRID
        ),
        "batch_norm_activation that takes nothing": (
            x().detach(), *affine, *running[:2], None, 0.1, 1e-5, *fresh(_GRID), scratch(), False, False, 0.0, None, None, *_GRID
        ),
        "batch_norm_gated": (x(), *affine, *running, 0.1, 1e-5, three, [scratch() for _ in range(3)], True, True, 0.01, *_GRID),
        "batch_norm_gated that learns nothing": (
            x(), None, None, *running[:2], None, 0.1, 1e-5, three, [scratch() for _ in range(3)], False, False, None, *_GRID
        ),
        "batch_norm_gated_gradient": (torch.randn(3, 2, 4, 5), x().detach(), *affine, kept, used, True, 0, 255),
        "batch_norm_statistics": (x().detach(), *affine, *running, 0.1, 1e-5, *learns),
        "batch_norm_sums": (torch.randn(3, 2, 4, 5), x().detach(), *affine, kept, 0.0, None, 0, 255),
        "quantizer_state": tuple(fresh(_GRID)),
        "quantizer_state of channels": tuple(fresh(_WEIGHT, 3)),
        "fake_quantize_weight": (x(), *fresh(_WEIGHT, 3), *_WEIGHT, torch.float32),
        "fake_quantize_weight in bfloat16": (x(), *fresh(_WEIGHT, 3), *_WEIGHT, torch.bfloat16),
    }  # fmt: skip
    below = {f"{name} below autograd": args for name, args in checked.items() if name in library.WITH_BELOW}
    return checked | {name: tuple(t.detach() if isinstance(t, Tensor) else t for t in args) for name, args in below.items()}


def _operator(name: str) -> str:
    return name.split()[0] + (library.BELOW if name.endswith("below autograd") else "")


def test_every_operator_is_checked() -> None:
    names = [line.split("(")[0].split("::")[1] for line in map(str, _schemas())]
    assert {_operator(name) for name in _arguments("contiguous")} == set(names)


def _schemas() -> list[Any]:
    return [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("eagerq::")]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("name", _arguments("contiguous"))
def test_operators_keep_pytorchs_contract(name: str, layout: str) -> None:
    """Schema, shapes alone, autograd and ahead-of-time dispatch: none of ``opcheck`` is left out."""
    torch.library.opcheck(getattr(torch.ops.eagerq, _operator(name)).default, _arguments(layout)[name])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing_but_a_weight_asked_for(kind: torch.dtype) -> None:
    x, weight = torch.randn(4, 6), torch.randn(4, 6, requires_grad=True)
    state, other = (known(_GRID, -1.0, 1.0, "cpu") for _ in range(2))
    wanted = operators.fake_quantize_activation(x, state, None, (None, None), None, _GRID)
    whole = operators.fake_quantize_weight(weight.detach(), fresh(_WEIGHT, 4), _WEIGHT, torch.float32)
    with torch.autocast("cpu", kind):
        out = operators.fake_quantize_activation(x, other, None, (None, None), None, _GRID)
        assert_identical(out, wanted)
        gated = operators.fake_quantize_gated(x, (state, state, state), [], True, None, _GRID)
        assert gated.dtype == torch.float32
        assert operators.fake_quantize_sigmoid(x, (state, state), [], False, None, _GRID).dtype == torch.float32
        for dtype in (torch.float32, kind):
            cast = operators.fake_quantize_weight(weight, fresh(_WEIGHT, 4), _WEIGHT, dtype)
            assert_identical(cast.detach(), whole.to(dtype))
            (grad,) = torch.autograd.grad(cast.float().sum(), weight)
            assert grad.dtype == torch.float32


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_tracers_see_one_operator(mode: Any) -> None:
    def activation(x: Tensor, words: Tensor, *state: Tensor) -> Tensor:
        return operators.fake_quantize_activation(x, state, words, (0.0, 6.0), 0.01, _GRID)  # type: ignore[arg-type]

    def gelu(x: Tensor, words: Tensor, *state: Tensor) -> Tensor:
        return operators.fake_quantize_gelu(x, state, words, 0.01, _GRID)  # type: ignore[arg-type]

    def sigmoid(x: Tensor, *rest: Tensor) -> Tensor:
        return operators.fake_quantize_sigmoid(x, (rest[2:6], rest[6:]), list(rest[:2]), False, 0.01, _GRID)  # type: ignore[arg-type]

    def weight(x: Tensor, *state: Tensor) -> Tensor:
        return operators.fake_quantize_weight(x, state, _WEIGHT, torch.bfloat16)  # type: ignore[arg-type]

    for function, args, name in (
        (activation, (torch.randn(3, 5), scratch(), *fresh(_GRID)), "fake_quantize_activation"),
        (gelu, (torch.randn(3, 5), scratch(), *fresh(_GRID)), "fake_quantize_gelu"),
        (sigmoid, (torch.randn(3, 5), scratch(), scratch(), *fresh(_GRID), *fresh(_GRID)), "fake_quantize_sigmoid"),
        (weight, (torch.randn(3, 5), *fresh(_WEIGHT, 3)), "fake_quantize_weight"),
    ):
        kept = [t.clone() for t in args]
        graph = make_fx(function, tracing_mode=mode)(*args)
        called = [node.target for node in graph.graph.nodes if str(node.target).startswith("eagerq")]
        assert called == [getattr(torch.ops.eagerq, name + library.BELOW).default]
        assert_all_identical(args, kept)  # tracing teaches nothing
        assert_identical(graph(*args), function(*kept))
        assert_all_identical(args, kept)


@pytest.mark.parametrize("trains", [True, False])
def test_export_sees_one_operator_at_most(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_kernels, "are_fast", lambda x: x.dtype in fast_kernels.DTYPES)
    module = FakeQuantize(QuantSpec())
    module(torch.randn(9))
    module.train(trains)
    program = torch.export.export(module, (torch.randn(9),))
    called = [node.target for node in program.graph.nodes if str(node.target).startswith("eagerq")]
    assert called == [torch.ops.eagerq.fake_quantize_activation.default] * trains  # else PyTorch's own functions do
    x, own = torch.randn(9), copy.deepcopy(module)
    assert_identical(program.module()(x), own(x))
