"""Runs the hook of a failover address, and kills it with its child processes when the lease is over.

It is a process of its own, because the node process may be stopped or killed while the hook runs.  The node process
writes the end of the lease (seconds since boot) to a pipe whenever it changes.  Without it, the pipe ends.

Usage: ``python -m skep.dataplane.failover.hook_guard PIPE COMMAND [ARGUMENT...]``, in a session of its own.
"""

import os
import select
import signal
import subprocess
import sys
import time

_LINE_BYTES = 4096
"""More than the node process writes before this process reads it."""


def main() -> int:
    """Return the exit code of the command."""
    pipe, command = int(sys.argv[1]), subprocess.Popen(sys.argv[2:])
    ended = os.pidfd_open(command.pid)
    until = _read(pipe)
    while command.poll() is None:
        left_s = until - time.clock_gettime(time.CLOCK_BOOTTIME)
        if left_s <= 0:
            os.killpg(0, signal.SIGKILL)
        if pipe in select.select([pipe, ended], [], [], left_s)[0]:
            until = _read(pipe)
    return command.returncode if command.returncode >= 0 else 128 - command.returncode


def _read(pipe: int) -> float:
    """Wait for the end of the lease, which is now if the node process has ended."""
    lines = os.read(pipe, _LINE_BYTES).split()
    return float(lines[-1]) if lines else 0.0


if __name__ == "__main__":
    sys.exit(main())
