"""How Triton's kernels are launched.

Triton looks a compiled kernel up by all its arguments, which takes longer than a small kernel runs. Here what decides is a key:
the sizes, dtypes and flags that a launch is given, and whether the large tensors' addresses divide by 16. Under it lies a plan,
and a launch that has one looks nothing else up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from eagerq.quant.memory import Held, address

_dtype = attrgetter("dtype")


#: What Inductor launches compiled kernels by: it takes no compile-time constants, and none of Triton's Python lies before it.
#: On ROCm kernels take other arguments.
_launcher: Any = None if torch.version.hip else getattr(getattr(torch._C, "_StaticCudaLauncher", None), "_launch_kernel", None)
_CODES = {"i32": "i", "i64": "l", "fp32": "f"}


def _launches(made: Any, given: int) -> Callable[..., None] | None:
    """A compiled kernel's launch, of programs, stream and its tensors' addresses and numbers; None where this knows none.

    Args:
        made: by Triton.
        given: how many arguments it has that are no constants.
    """
    kinds, metadata = [*made.src.signature.values()], made.metadata
    types = "".join("O" if kind.startswith("*") else _CODES.get(kind, "?") for kind in kinds[:given])
    if _launcher is None or "?" in types or getattr(metadata, "num_ctas", 1) != 1 or getattr(metadata, "launch_pdl", False):
        return None
    if getattr(metadata, "launch_cooperative_grid", False) or "gsan" in getattr(metadata, "instrumentation_mode", ""):
        return None
    scratch = [getattr(metadata, name) for name in ("global_scratch_size", "profile_scratch_size") if hasattr(metadata, name)]
    if any(scratch):
        return None
    nothing = (None,) * len(scratch)  # addresses of memory that it does not use
    types += "O" * len(nothing)
    function, warps, shared = made.function, metadata.num_warps, metadata.shared
    launch: Any = _launcher

    def launches(programs: int, stream: int, *arguments: Any) -> None:
        launch(function, programs, 1, 1, warps, shared, types, (*arguments, *nothing), stream)

    return launches


NOTHING = Held()


class Plan:
    """A kernel, its compile-time constants in the order of its parameters, and once it was launched what launches it."""

    def __init__(self, kernel: Any, constants: tuple[Any, ...], **options: Any) -> None:
        self.kernel, self.constants = kernel, constants
        self.options = {"enable_fp_fusion": False, **options}
        self.launches: Callable[..., None] | None = None
        self.made: Any = None  # held, since with it goes the code

    def launch(
        self, stream: int, programs: int, tensors: tuple[Tensor, ...], scalars: tuple[float, ...], held: Held = NOTHING
    ) -> None:
        """So many programs, with arguments in the order of the kernel's parameters: tensors, those held, numbers, constants."""
        if self.launches is not None:
            self.launches(programs, stream, *map(address, tensors), *held.addresses, *scalars)
            return
        tensors = (*tensors, *held.tensors)
        made = self.kernel[(programs,)](*tensors, *scalars, *self.constants, **self.options)
        if made is not None:  # an interpreter gives None
            self.made = made
            self.launches = _launches(made, len(tensors) + len(scalars)) or self._by_triton(made)

    def _by_triton(self, made: Any) -> Callable[..., None]:
        run, function, metadata, constants = made.run, made.function, made.packed_metadata, self.constants

        def launches(programs: int, stream: int, *arguments: Any) -> None:
            run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments, *constants)

        return launches


_PLANS: dict[Any, Any] = {}
_MOST_PLANS = 4096

#: What lies under a key, or None.
planned: Callable[[Any], Any] = _PLANS.get


def remember(key: Any, plan: Any) -> Any:
    """``plan``, under that key."""
    if len(_PLANS) >= _MOST_PLANS:  # of images of ever new sizes
        _PLANS.clear()
    _PLANS[key] = plan
    return plan


def stream_of(x: Tensor) -> int | None:
    """Where Triton, which launches on the current device, launches on what lies as x does: the stream; None on other devices."""
    if not x.is_cuda:
        return 0
    device = x.get_device()
    return torch._C._cuda_getCurrentRawStream(device) if device == torch._C._cuda_getDevice() else None


@functools.cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def processors(x: Tensor) -> int:
    """Multiprocessors of the device that x lies on."""
    return _multiprocessors(x.get_device()) if x.is_cuda else 1


class Over:
    """Launches of a kernel over the values of tensors, bound to its constants.

    Args:
        kernel: its parameters are the tensors, the number of values, the scalars, and constants: ``before``, whether blocks are
            whole, and ``after``.
        before, after: the constants; ``after``, block and warps are the same in all launches of the kernel.
        block: values of one program's step.
        waves: at most so many programs for each multiprocessor.
        warps: of a program.
        fewer: as ``waves``, for other than whole blocks of 16 bits.
    """

    def __init__(
        self, kernel: Any, before: tuple[Any, ...], after: tuple[Any, ...], block: int, waves: int, warps: int,
        fewer: int | None = None,
    ) -> None:  # fmt: skip
        self._kernel, self._before, self._after, self._block, self._warps = kernel, before, after, block, warps
        self._waves = waves, waves if fewer is None else fewer
        self._plans: dict[Any, tuple[Plan, int]] = {}

    def __call__(self, large: tuple[Tensor, ...], scalars: tuple[float, ...] = (), held: Held = NOTHING) -> None:
        """Launch it, if there are any values.

        Args:
            large: tensors of as many values or, as masks are, fewer than the first, which lies where they do; the kernel is
                compiled for their dtypes and alignment.
            scalars: floats, on which nothing is specialized.
            held: tensors of one dtype each, on whose alignment nothing is specialized.
        """
        x = large[0]
        n, stream = x.numel(), stream_of(x)
        if stream is None:
            with torch.cuda.device(x.device):
                self(large, scalars, held)
        elif n:
            apart = 0
            for t in large:
                apart |= address(t)
            at = (n, x.get_device(), apart & 15, *map(_dtype, large))
            if apart & 15:
                at = (*at, *(address(t) & 15 for t in large))
            plan, programs = self._plans.get(at) or self._plan(x, n, at)
            plan.launch(stream, programs, large, (n, *scalars), held)

    def _plan(self, x: Tensor, n: int, at: tuple[Any, ...]) -> tuple[Plan, int]:
        # of the kernel, which goes with one ``after``, its number: Triton hashes its text; of n what Triton specializes on
        even = n % self._block == 0
        key = (id(self._kernel), even, n & 15 == 0, n == 1, n >> 31, self._before, at[1:])
        plan: Plan = planned(key) or remember(
            key, Plan(self._kernel, (*self._before, even, *self._after), num_warps=self._warps)
        )
        waves = self._waves[not (even and x.element_size() == 2)]
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        self._plans[at] = found = plan, min(-(-n // self._block), processors(x) * waves)
        return found
