"""What the daemon keeps out of its memory, each in a fresh interpreter: this one has imported everything."""

import subprocess
import sys

UNUSED = ("rich", "sqlite3", "unittest", "unittest.mock", "google.protobuf.text_format", "difflib")


def test_the_daemon_imports_nothing_of_what_it_does_not_use() -> None:
    code = f"import sys, skep.daemon; print([one for one in {UNUSED!r} if sys.modules.get(one) is not None])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_kept_out_can_be_imported_later() -> None:
    code = (
        "import skep.daemon, unittest.mock\n"
        "from google.protobuf.internal import python_message\n"
        "print(unittest.mock.Mock.__name__, python_message.GeneratedProtocolMessageType.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Mock", "GeneratedProtocolMessageType"]
