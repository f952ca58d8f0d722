"""Keeps unused modules out of memory.  To be imported before structlog and pyroute2.

* structlog imports ``rich`` where that is installed, to format tracebacks on terminals: 3.7 MB.  structlog has no
  setting against it (its ``dev`` module imports it at the top level).
* ``pyroute2`` imports in its ``__init__`` its database, sqlite, unittest and multiprocessing: 5 MB.  Only its netlink
  sockets are used here, so its package gets no ``__init__`` and one name.  pyroute2 has no smaller package that
  contains ``AsyncIPRoute``.
* glibc gives every thread a heap of its own.  The few threads here wait for the kernel and can share one; the limit can
  otherwise be set in the environment only, before the interpreter starts.
"""

import ctypes
import importlib
import importlib.util
import sys
import types

_M_ARENA_MAX = -8


def _import_only_sockets_of_pyroute2() -> None:
    spec = importlib.util.find_spec("pyroute2")
    if spec is None or spec.submodule_search_locations is None or "pyroute2" in sys.modules:
        return
    package = types.ModuleType("pyroute2")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    sys.modules["pyroute2"] = package
    package.AsyncIPRoute = importlib.import_module("pyroute2.iproute.linux").AsyncIPRoute  # type: ignore[attr-defined]


if "rich" not in sys.modules:
    sys.modules["rich"] = None  # type: ignore[assignment]
_import_only_sockets_of_pyroute2()
ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
