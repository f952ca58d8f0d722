"""Keeps unused modules out of memory.  To be imported before structlog, pyroute2 and protobuf.

* structlog imports ``rich`` where that is installed, to format tracebacks on terminals: 3.7 MB.  structlog has no
  setting against it (its ``dev`` module imports it at the top level).
* ``pyroute2`` imports in its ``__init__`` its database, sqlite, unittest and multiprocessing: 5 MB.  Only its netlink
  sockets are used here, so its package gets no ``__init__`` and one name.  pyroute2 has no smaller package that
  contains ``AsyncIPRoute``.
* pyroute2's route sockets import ``unittest.mock`` for one attribute of a class for remote namespaces: 0.8 MB.
* protobuf always imports its implementation in Python (``python_message``), also beside the one in C: 1.5 MB.  Here
  that happens at the first use, and the one in C uses nothing of it.
* attrs always imports its validators, and html its table of entities: 0.6 MB.  aiohttp uses neither.
* yarl imports idna, for names of hosts that are not ASCII, and subprocess imports locale, for text: 0.4 MB.
* glibc gives every thread a heap of its own.  The few threads here wait for the kernel and can share one; the limit can
  otherwise be set in the environment only, before the interpreter starts.
"""

import ctypes
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

_M_ARENA_MAX = -8
"""Option of ``mallopt`` in glibc's ``malloc.h``."""


def _import_only_sockets_of_pyroute2() -> None:
    spec = importlib.util.find_spec("pyroute2")
    if spec is None or spec.submodule_search_locations is None or "pyroute2" in sys.modules:
        return
    package = types.ModuleType("pyroute2")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    sys.modules["pyroute2"] = package
    with _no_mocks():
        package.AsyncIPRoute = importlib.import_module("pyroute2.iproute.linux").AsyncIPRoute  # type: ignore[attr-defined]


@contextmanager
def _no_mocks() -> Iterator[None]:
    """An empty ``unittest`` while the context is open, unless the real one is imported already."""
    if "unittest" in sys.modules:
        yield
        return
    unittest = types.ModuleType("unittest")
    unittest.mock = types.SimpleNamespace(Mock=object)  # type: ignore[attr-defined]
    sys.modules["unittest"] = unittest
    try:
        yield
    finally:
        del sys.modules["unittest"]


def _import_at_first_use(name: str) -> None:
    """Put a module in the place of ``name`` that imports the real one when an attribute of it is read.

    ``importlib.util.LazyLoader`` would import it at once: an import statement reads ``__spec__`` of what it finds.
    """
    if name in sys.modules:
        return
    placeholder = types.ModuleType(name)

    def read(attribute: str) -> object:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if sys.modules.get(name) is placeholder:
            del sys.modules[name]
        return getattr(importlib.import_module(name), attribute)

    vars(placeholder)["__getattr__"] = read  # called for what the module has not (PEP 562)
    sys.modules[name] = placeholder


class _EntitiesAtFirstUse(dict[str, str]):
    """The names of HTML's characters.  ``html.unescape`` asks for a name before it reads one."""

    def __contains__(self, name: object) -> bool:
        if not self:
            self.update(importlib.import_module("html.entities").html5)
        return super().__contains__(name)


def _import_html_without_entities() -> None:
    if "html" in sys.modules:
        return
    entities = types.ModuleType("html.entities")
    entities.html5 = _EntitiesAtFirstUse()  # type: ignore[attr-defined]
    sys.modules["html.entities"] = entities
    try:
        importlib.import_module("html")
    finally:
        del sys.modules["html.entities"]


_import_at_first_use("locale")  # before pyroute2, which imports subprocess
if "rich" not in sys.modules:
    sys.modules["rich"] = None  # type: ignore[assignment]
_import_only_sockets_of_pyroute2()
_import_at_first_use("google.protobuf.internal.python_message")
_import_at_first_use("attr.validators")
_import_at_first_use("idna")
_import_html_without_entities()
ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
