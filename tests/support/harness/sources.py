"""Python files of the project, parsed once for all tests that inspect them."""

import ast
import gc
from functools import cache
from pathlib import Path


@cache
def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a file, which no test may change.

    Garbage is collected afterwards: a finalizer that formats a traceback also parses, and nested parsing is an error
    in Python 3.11 (gh-106905).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(path.read_text(), str(path))
    finally:
        if was_enabled:
            gc.enable()
