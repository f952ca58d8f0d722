"""What a packet costs on its whole way from one container to another, in processor time.

On one machine the sender's call does all of it, since nothing on the way between namespaces waits for a device: the
kernel works in the sender's time until the packet lies at the receiver.  So this does not depend on who else is busy.
"""

import socket
import time
from pathlib import Path

from skep.dataplane.netns.namespaces import inside

PACKETS = 4000
_FIRST = 200
"""What looks up the way once is no part of it."""
_PORT = 9
_DATA = bytes(1000)


def packet_us(source: Path, target: Path, address: str) -> float:
    """Microseconds for a datagram of 1,000 bytes to ``address`` in ``target``.  Blocks; a thread's own business."""

    def listen() -> socket.socket:
        opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        opened.bind((address, _PORT))  # never read: packets beyond the buffer are dropped at the receiver
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
