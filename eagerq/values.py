"""Tensors as values, and which torch functions read them."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

#: Properties of a tensor that give values; every other property is a fact about it.
_VALUE_PROPERTIES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag", "grad", "_base", "__cuda_array_interface__"})
#: Properties that give a tensor other values when they are set.
_VALUES_SET = frozenset({"data", "real", "imag"})
#: Functions that read facts about a tensor, not its values.
_FACTS = frozenset(
    "size dim ndimension stride numel nelement is_contiguous is_floating_point is_complex is_signed"
    " element_size get_device storage_offset is_same_size is_tensor result_type can_cast is_inference"
    " is_conj is_neg __len__ __hash__".split()
)
#: Properties that say on what device a tensor is, which a copy on the meta device answers otherwise.
_DEVICE_PROPERTIES = frozenset("is_cpu is_cuda is_meta is_mps is_xpu is_vulkan is_xla is_mtia is_maia is_hpu is_ipu".split())
#: Functions that may return their very argument; when they do, nothing happened.
MAYBE_NOTHING = frozenset(
    "contiguous to float double half bfloat16 type type_as cpu cuda dropout dropout1d dropout2d dropout3d"
    " alpha_dropout feature_alpha_dropout requires_grad_ expand view_as".split()
)


class Values:
    """Numbers the values: a tensor that is alive, at one version."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}
        self._tensors: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._next = 0
        self._new: list[weakref.ref[Tensor]] = []  # not yet looked up by memory
        self._places: dict[int, list[weakref.ref[Tensor]]] = {}
        self.shapes: dict[int, tuple[int, ...]] = {}

    def number(self, tensor: Tensor) -> int:
        found = self._tensors.get(id(tensor))
        if found is None or found[0]() is not tensor:
            self._next += 1
            found = (weakref.ref(tensor), self._next)
            self._tensors[id(tensor)] = found
            self._new.append(found[0])
        try:
            version = tensor._version
        except RuntimeError:  # inference tensors count no versions, so no two looks at one are the same value
            self._next += 1
            version = self._next
        key = (found[1], version)
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self.shapes[self._numbers[key]] = tuple(tensor.shape)
        return self._numbers[key]

    def known(self, tensor: Tensor) -> int | None:
        """The number of a tensor that has one."""
        found = self._tensors.get(id(tensor))
        if found is None or found[0]() is not tensor or tensor.is_inference():
            return None
        return self._numbers.get((found[1], tensor._version))

    def sharing(self, tensor: Tensor) -> list[int]:
        """The numbers of the tensors alive that lie in the same memory, in the order they were seen in."""
        for ref in self._new:
            other = ref()
            if other is not None and (place := _memory(other)) is not None:
                self._places.setdefault(place, []).append(ref)
        self._new.clear()
        place = _memory(tensor)
        there = [] if place is None else [other for ref in self._places.get(place, ()) if (other := ref()) is not None]
        return [self.number(other) for other in there if other is not tensor and _memory(other) == place]

    def rewritten(self) -> frozenset[int]:
        """The values whose tensors were changed in place afterwards."""
        last = dict(sorted(self._numbers))  # the highest version of each tensor
        return frozenset(n for (uid, version), n in self._numbers.items() if version < last[uid])

    def alive(self) -> set[int]:
        numbers = set()
        for ref, uid in self._tensors.values():
            tensor = ref()
            if tensor is not None and not tensor.is_inference():
                number = self._numbers.get((uid, tensor._version))
                if number is not None:
                    numbers.add(number)
        return numbers


def _memory(tensor: Tensor) -> int | None:
    """What tells the memory a tensor lies in, or None where it has none of its own (sparse, under a transform)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def reading_function(func: Any) -> str | None:
    """The name of a torch function that reads values; None for one that reads facts about tensors only."""
    name: str = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        return name if name in _VALUE_PROPERTIES else None
    if name == "__set__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        return name if name in _VALUES_SET else None
    return None if name in _FACTS else name


def asks_for_device(func: Any) -> bool:
    """Whether a torch function asks on what kind of device a tensor is."""
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _DEVICE_PROPERTIES
    return name == "get_device"
