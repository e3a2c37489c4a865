"""A call that is made to stop at any line of eagerq's own, as an interrupt or a lack of memory would."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import eagerq

_HERE = str(Path(eagerq.__file__).parent)


def lines_run(call: Callable[[], Any], outside: Collection[str], stop_at: int | None = None) -> int:
    """How many lines of eagerq ``call`` runs; those of functions named ``outside`` are not counted, what they call is.

    Raises:
        MemoryError: at line ``stop_at``, counted from 1.
    """
    count = 0

    def at_line(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count == stop_at:
                raise MemoryError(f"in {frame.f_code.co_name}, line {frame.f_lineno}")
        return at_line

    def at_call(frame: Any, event: str, arg: Any) -> Any:
        own = frame.f_code.co_filename.startswith(_HERE) and frame.f_code.co_name not in outside
        return at_line if own else None

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        call()
    finally:
        sys.settrace(before)
    return count
