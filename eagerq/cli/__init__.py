"""Floor 8: the ``eagerq`` command. Typer and rich are imported when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from eagerq.errors import EagerqError
from eagerq.extras import require


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit: 0 if all went well, 1 for an error of eagerq's, 2 for wrong usage or a missing package.

    Args:
        argv: arguments after the program's name; None takes the process's.
    """
    try:
        require("typer", "cli")
        require("rich", "cli")
    except EagerqError as error:
        _fail(error, 2)
    from eagerq.cli.app import app

    try:
        app(args=None if argv is None else list(argv), prog_name="eagerq")
    except EagerqError as error:
        _fail(error, 1)
    sys.exit(0)


def _fail(error: EagerqError, code: int) -> NoReturn:
    """Say in one line what was wrong."""
    print("eagerq: error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)
