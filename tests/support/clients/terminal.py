"""A command on its own terminal, as a person would use it."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


class Terminal:
    """The person's side of a terminal."""

    def __init__(self, process: "subprocess.Popen[bytes]", descriptor: int) -> None:
        self.process = process
        self._descriptor = descriptor
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def resize(self, rows: int, columns: int) -> None:
        """Resize the window.  Only a session with this terminal as its own notices."""
        fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait_shown(self, text: str, within_s: float = 20) -> None:
        """Read until ``text`` is on the screen.  Fail the test after ``within_s``."""
        deadline = time.monotonic() + within_s
        while text not in self.shown:
            left = deadline - time.monotonic()
            assert left > 0, f"not within {within_s} s: {text!r} in {self.shown!r}"
            if select.select([self._descriptor], [], [], left)[0]:
                try:
                    self.shown += os.read(self._descriptor, 4096).decode(errors="replace")
                except OSError as error:  # the command's end is closed
                    raise AssertionError(f"ended without {text!r}: {self.shown!r}") from error

    def wait_end(self, within_s: float = 20) -> int:
        """Wait for the command's end, and return its exit code."""
        return self.process.wait(within_s)


@contextmanager
def terminal(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[Terminal]:
    """Run ``command`` on a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "TERM": "xterm", **environment},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait(10)
        os.close(ours)
