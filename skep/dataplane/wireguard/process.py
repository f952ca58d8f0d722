"""Starts wireguard-go: one process per WireGuard device, forked by the zygote and supervised like the others.

The process outlives the node process.  The node process configures the device through the socket that wireguard-go
serves (``devices.UserSpaceDevices``).
"""

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from skep.dataplane.plan.wireguard import device_name
from skep.linux.detached import identify, write_pid_file
from skep.model.networks.reserved_ports import TUNNEL_SLOT
from skep.paths import Paths

PROGRAM = "wireguard-go"
VERSION = "wireguard-go"
"""Version in the pid file, in place of Skep's version.  So the process keeps running when Skep is upgraded."""
SLOTS = (0, 1, TUNNEL_SLOT)
"""Slots of the devices of encrypted networks and of tunnels through NAT."""
_NICENESS = -10
"""Niceness of wireguard-go.

WireGuard in the kernel never waits for a processor, and busy containers must not slow down tunnels in user space
either.
"""


def process_name(slot: int) -> str:
    """Return the name of the process for its supervisor and its pid file."""
    return f"wireguard-{slot}"


def enter(slot: int, arguments: Sequence[str]) -> None:
    """Become wireguard-go for the device in ``slot``.  ``arguments`` are the data and run directories.

    Raises: OSError: the program cannot be started.
    """
    data, run = map(Path, arguments)
    this = identify(os.getpid(), VERSION)
    assert this is not None, "this process is alive"
    write_pid_file(Paths(data, run).pid_file(process_name(slot)), this)
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    # Without this variable, it would print the advice to use the kernel's WireGuard, which this machine does not have.
    environment = {**os.environ, "LOG_LEVEL": "error", "WG_PROCESS_FOREGROUND": "1"}
    os.execvpe(PROGRAM, [PROGRAM, "--foreground", device_name(run, slot)], environment)
