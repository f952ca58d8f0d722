"""Measures the processor time of a packet on its whole path from one container to another.

Within one machine, the sender's system call does all the work until the packet is at the receiver, because no part of
the path waits for a device.  So the sender's processor time is the result, and other load does not change it.
"""

import socket
import time
from pathlib import Path

from skep.dataplane.netns.kernel.namespaces import inside

PACKETS = 4000
_FIRST = 200
"""Number of packets that are sent first and not counted, because the kernel has to look up the path."""
_PORT = 9
_DATA = bytes(1000)


def packet_us(source: Path, target: Path, address: str) -> float:
    """Return the microseconds for a datagram of 1,000 bytes to ``address`` in ``target``.  Blocks, so run it in a
    thread.
    """

    def listen() -> socket.socket:
        opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        opened.bind((address, _PORT))  # never read, so packets beyond the buffer are dropped at the receiver
        return opened

    def send() -> float:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
            opened.connect((address, _PORT))
            for _ in range(_FIRST):
                opened.send(_DATA)
            began = time.thread_time()
            for _ in range(PACKETS):
                opened.send(_DATA)
            return (time.thread_time() - began) / PACKETS * 1e6

    with inside(target, listen):
        return inside(source, send)
