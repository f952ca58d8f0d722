"""What the daemon keeps out of its memory, each in a fresh interpreter: this one has imported everything."""

import subprocess
import sys

import pytest

UNUSED = (
    *("rich", "sqlite3", "unittest", "unittest.mock", "google.protobuf.text_format", "difflib"),
    *("attr.validators", "html.entities", "idna", "locale", "zoneinfo", "sysconfig"),
    *("skep.engine.buildkit.routes", "skep.engine.buildkit.buildkit_pb2"),
)


@pytest.mark.parametrize("role", ["skep.daemon", "skep.daemon, skep.manager.process"])
def test_a_process_imports_nothing_of_what_its_role_does_not_use(role: str) -> None:
    code = (
        f"import sys, {role}; print([one for one in {UNUSED!r} "
        "if getattr(sys.modules.get(one), '__file__', None)])"  # what stands for a module has none
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
