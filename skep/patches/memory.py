"""Keeps unused modules out of memory.  To be imported before structlog, pyroute2 and protobuf.

* structlog imports ``rich`` and ``colorama`` where they are installed, to format tracebacks on terminals: 3.8 MB.
  structlog has no setting against it (its ``dev`` module imports them at the top level).
* ``pyroute2`` imports in its ``__init__`` its database, sqlite, unittest and multiprocessing: 5 MB.  Only its netlink
  sockets are used here, so its package gets no ``__init__`` and one name.  pyroute2 has no smaller package that
  contains ``AsyncIPRoute``.
* pyroute2's route sockets import ``unittest.mock`` for one attribute of a class for remote namespaces (0.8 MB), and
  ``multiprocessing`` for sockets in other namespaces (0.5 MB).  Messages about traffic control take 0.6 MB.
* ``aiohttp`` imports its client in its ``__init__``: 1.3 MB.  Servers import submodules, and the client's names are
  imported when one is read.  Its file responses read the machine's list of media types (0.9 MB), its helpers import
  ``urllib.request`` for proxies (0.5 MB).  No daemon sends files or uses proxies.
* protobuf always imports its implementation in Python (``python_message``), also beside the one in C: 1.5 MB.  Here
  that happens at the first use, and the one in C uses nothing of it.
* attrs always imports its validators, and html its table of entities: 0.6 MB.  aiohttp uses neither.
* yarl imports idna, for names of hosts that are not ASCII, and subprocess imports locale, for text: 0.4 MB.
* ctypes imports sysconfig since Python 3.14, for other systems than Linux: 0.3 MB.
* structlog imports pickle for one error, and aiohttp for files of cookies: 0.3 MB.
* glibc gives every thread a heap of its own.  The few threads here wait for the kernel and can share one; the limit can
  otherwise be set in the environment only, before the interpreter starts.
"""

import importlib
import importlib.machinery
import importlib.util
import re
import sys
import threading
import types
from _pickle import PicklingError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from skep.patches import docstrings

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
    _import_at_first_use("pyroute2.netlink.rtnl.tcmsg", "tcmsg", plugins={})
    processes = {"Pipe": None, "Queue": None, "Process": None}
    with (
        _stand_in("unittest", mock=types.SimpleNamespace(Mock=object)),
        _stand_in("multiprocessing", **processes),
    ):
        package.AsyncIPRoute = importlib.import_module("pyroute2.iproute.linux").AsyncIPRoute  # type: ignore[attr-defined]


@contextmanager
def _stand_in(name: str, **attributes: object) -> Iterator[None]:
    """Replace the module ``name`` by one with these attributes only, unless the real one is imported already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = module = types.ModuleType(name)
    vars(module).update(attributes)
    try:
        yield
    finally:
        del sys.modules[name]


def _import_names_of_aiohttp_at_first_use() -> None:
    """Import ``aiohttp/__init__.py`` when one of its names is read that is not a submodule."""
    spec = importlib.util.find_spec("aiohttp")
    if (
        spec is None
        or spec.loader is None
        or spec.submodule_search_locations is None
        or "aiohttp" in sys.modules
    ):
        return
    version = re.search(r'^__version__ = "(.+)"$', Path(str(spec.origin)).read_text(), re.MULTILINE)
    if version is None:
        return
    package = importlib.util.module_from_spec(spec)
    package.__version__ = version[1]  # type: ignore[attr-defined]
    loader, turn = spec.loader, threading.RLock()
    begun: list[bool] = []

    def read(attribute: str) -> object:
        is_submodule = importlib.machinery.PathFinder.find_spec(f"aiohttp.{attribute}", package.__path__)
        if attribute.startswith("__") or is_submodule is not None:
            raise AttributeError(attribute)  # the import system imports a submodule that is missing
        with turn:  # another thread may read a name at this moment
            if not begun:
                begun.append(True)
                loader.exec_module(package)
        if attribute not in vars(package):
            raise AttributeError(f"module 'aiohttp' has no attribute {attribute!r}")
        return vars(package)[attribute]

    vars(package)["__getattr__"] = read
    sys.modules["aiohttp"] = package


def _import_at_first_use(name: str, *functions: str, **values: object) -> None:
    """Put a module in the place of ``name`` that imports the real one when an attribute of it is read.

    ``functions`` may be imported from it earlier, and import the real ones when they are called.  ``values`` stand for
    the real values.  ``importlib.util.LazyLoader`` would import it at once, because an import statement reads
    ``__spec__`` of what it finds.
    """
    if name in sys.modules:
        return
    placeholder = types.ModuleType(name)

    def read(attribute: str) -> object:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if sys.modules.get(name) is placeholder:  # the import sets the attribute of its package as well
            del sys.modules[name]
        return getattr(importlib.import_module(name), attribute)

    def late(function: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            real: Any = read(function)
            return real(*args, **kwargs)

        return call

    vars(placeholder).update(values, **{function: late(function) for function in functions})
    vars(placeholder)["__getattr__"] = read  # called for what the module has not (PEP 562)
    sys.modules[name] = placeholder
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, placeholder)


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


docstrings.install()
_import_at_first_use("sysconfig")  # before pyroute2 and structlog, which import ctypes
_import_at_first_use("locale")  # before pyroute2, which imports subprocess
for _name in ("rich", "colorama"):
    sys.modules.setdefault(_name, None)  # type: ignore[arg-type]
_import_at_first_use("pickle", PicklingError=PicklingError)
_import_only_sockets_of_pyroute2()
_import_at_first_use("google.protobuf.internal.python_message")
_import_at_first_use("attr.validators")
_import_at_first_use("idna")
_import_html_without_entities()
_import_at_first_use("mimetypes")
_import_at_first_use("urllib.request", "getproxies", "getproxies_environment", "proxy_bypass")
_import_names_of_aiohttp_at_first_use()
_import_at_first_use("aiohttp.web_fileresponse", "FileResponse")
importlib.import_module("ctypes").CDLL(None).mallopt(_M_ARENA_MAX, 1)
