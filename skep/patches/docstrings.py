"""Leaves docstrings, and annotations of functions, out of the memory of a process: 2 MB of a node's 49.

Python's option ``-OO`` would leave out assertions as well.  Only Skep's modules are concerned, because some libraries
read their own docstrings.  A process asks for it by ``-X`` and the name of this option (``skep daemon`` does), so that
tests and commands keep their docstrings.
"""

import sys
from importlib.machinery import SourceFileLoader
from types import FunctionType, ModuleType

WITHOUT_DOCSTRINGS = "skep_without_docstrings"
"""The name of the option."""
_PACKAGE = "skep."

_exec_module = SourceFileLoader.exec_module


def install() -> None:
    """Apply it to all modules that are imported from now on, if the process asks for it."""
    if WITHOUT_DOCSTRINGS in sys._xoptions:
        SourceFileLoader.exec_module = _exec_module_without  # type: ignore[method-assign,assignment]


def _exec_module_without(loader: SourceFileLoader, module: ModuleType) -> None:
    _exec_module(loader, module)
    if module.__name__.startswith(_PACKAGE):
        forget(module, module.__name__)


def forget(owner: ModuleType | type, module: str) -> None:
    """Remove what describes a module or class and everything in it that is defined in ``module``."""
    owner.__doc__ = None
    for value in list(vars(owner).values()):
        found = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        found = found.fget if isinstance(found, property) else found
        if isinstance(found, FunctionType) and found.__module__ == module:
            _forget_function(found)
        elif isinstance(found, type) and found.__module__ == module and _is_within(found, owner):
            forget(found, module)


def _is_within(kind: type, owner: ModuleType | type) -> bool:
    """Return whether a class is defined in ``owner``, and is not a mere attribute, such as a reference to itself."""
    outer, _, _ = kind.__qualname__.rpartition(".")
    return outer == (owner.__qualname__ if isinstance(owner, type) else "")


def _forget_function(function: FunctionType) -> None:
    del function.__annotations__
    code, text = function.__code__, function.__doc__
    if text is not None and code.co_consts and code.co_consts[0] == text:
        function.__doc__ = None
        function.__code__ = code.replace(co_consts=(None, *code.co_consts[1:]))
