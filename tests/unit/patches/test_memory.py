"""What the daemon keeps out of its memory, each in a fresh interpreter: this one has imported everything."""

import subprocess
import sys
import types
from typing import Any

import pytest

from skep.patches import docstrings

UNUSED = (
    *("rich", "sqlite3", "unittest", "unittest.mock", "google.protobuf.text_format", "difflib"),
    *("attr.validators", "html.entities", "idna", "locale", "zoneinfo", "sysconfig"),
    *("aiohttp.client", "aiohttp.connector", "aiohttp.web_fileresponse", "mimetypes", "urllib.request"),
    *("multiprocessing", "pickle", "colorama", "pyroute2.netlink.rtnl.tcmsg"),
    *("skep.engine.buildkit.routes", "skep.engine.buildkit.buildkit_pb2", "skep.engine.api.builds"),
    *("skep.engine.build.builder", "skep.engine.build.dockerfile.config", "skep.dataplane.rootless_ports"),
    *("skep.engine.log_drivers.fluentd", "skep.engine.log_drivers.sender", "skep.dashboard.server"),
)


@pytest.mark.parametrize("role", ["skep.daemon", "skep.daemon, skep.manager.process"])
def test_a_process_imports_nothing_of_what_its_role_does_not_use(role: str) -> None:
    code = (
        f"import sys, {role}; print([one for one in {UNUSED!r} "
        "if getattr(sys.modules.get(one), '__file__', None)])"  # what stands for a module has none
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_of_the_packages_that_are_kept_out_are_found_when_they_are_read() -> None:
    code = (
        "import sys, skep.daemon, aiohttp, urllib.request, mimetypes\n"
        "from aiohttp import web\n"
        "from pyroute2.netlink.rtnl import marshal\n"
        "print(aiohttp.ClientSession.__name__, aiohttp.web is web, hasattr(aiohttp, 'nothing'))\n"
        "print(type(web.FileResponse('/etc/hostname')).__name__, aiohttp.__version__ in aiohttp.http.SERVER_SOFTWARE)\n"
        "print(urllib.request.Request('http://a.example').host, mimetypes.guess_type('a.html')[0])\n"
        "print(type(marshal.tcmsg()).__module__)\n"
        "import sysconfig\n"
        "print(hasattr(sysconfig, '__file__'), sysconfig.get_python_version() in sys.version)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "ClientSession True False",
        "FileResponse True",
        "a.example text/html",
        "pyroute2.netlink.rtnl.tcmsg",
        "False True",
    ]


DESCRIBED = '''
def function(value: int) -> str:
    """Describe it."""
    return f"{value}"


class Kind:
    """Describe it."""

    field: int = 1
    own = None

    @property
    def text(self) -> str:
        """Describe it."""
        return "text"

    @staticmethod
    def first(value: str) -> str:
        return f"first {value}"


Kind.own = Kind
'''


def test_a_daemon_forgets_docstrings_and_annotations_and_its_functions_work() -> None:
    described: Any = types.ModuleType("skep.described")
    exec(DESCRIBED, vars(described))
    docstrings.forget(described, "skep.described")
    assert (described.__doc__, described.function.__doc__, described.Kind.__doc__) == (None, None, None)
    assert described.Kind.text.fget.__code__.co_consts[0] is None, "the code has it as well"
    assert described.function.__annotations__ == {}
    assert described.Kind.__annotations__ == {"field": int}, "structs read those of classes"
    assert (described.function(1), described.Kind().text, described.Kind.first("a")) == (
        "1",
        "text",
        "first a",
    )


def test_only_the_option_of_the_daemon_makes_a_process_forget() -> None:
    code = "import asyncio, skep.daemon as one; print(one.Node.__doc__ is None, bool(asyncio.run.__doc__))"
    for options, shown in (((), "False True"), (("-X", docstrings.WITHOUT_DOCSTRINGS), "True True")):
        command = [sys.executable, *options, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == shown


def test_what_is_kept_out_can_be_imported_later() -> None:
    code = (
        "import skep.daemon, unittest.mock\n"
        "from google.protobuf.internal import python_message\n"
        "import attr, html, html.entities, idna, locale\n"
        "print(unittest.mock.Mock.__name__, python_message.GeneratedProtocolMessageType.__name__)\n"
        "print(attr.validators.instance_of.__name__, html.unescape('&eacute;&zzz;'), '' in html.entities.html5)\n"
        "print(idna.encode('b\u00fccher.example').decode(), locale.getencoding() != '')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second, third = done.stdout.splitlines()
    assert first.split() == ["Mock", "GeneratedProtocolMessageType"]
    assert second.split() == ["instance_of", "\u00e9&zzz;", "False"]
    assert third.split() == ["xn--bcher-kva.example", "True"]
