"""Delay and loss between the subnets of a playground, without the kernel's netem, which not every machine has.

Packets between subnets are routed into a tun device, and a process writes each of them back after a while, or drops it.
Run as ``python distance.py DELAY_MS LOSS_PERCENT BRIDGE...`` in the namespace of the switch.
"""

import asyncio
import fcntl
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

DEVICE = "distance"
# Source: linux/if_tun.h: TUNSETIFF, IFF_TUN, IFF_NO_PI.
_SET_DEVICE, _TUN, _NO_HEADER = 0x400454CA, 0x0001, 0x1000
_PACKET_BYTES_MAX = 1 << 16
_TABLE = "200"


@contextmanager
def distant_subnets(
    switch: str, *, delay_ms: float, loss_percent: float, bridges: Sequence[str] = ("br0", "br1")
) -> Iterator[None]:
    """Delay packets between the subnets, in each direction, while the block runs.

    Args:
        switch: name of the namespace with the bridges.
        bridges: bridges of the subnets.
    """
    program = [sys.executable, __file__, str(delay_ms), str(loss_percent), *bridges]
    words = ["ip", "netns", "exec", switch, *program]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            process.terminate()  # the device disappears with its process, and its routes with the device
            for bridge in bridges:
                rule = ["ip", "-n", switch, "rule", "del", "iif", bridge, "lookup", _TABLE]
                subprocess.run(rule, check=False, capture_output=True, timeout=20)


def open_device(bridges: Sequence[str]) -> int:
    """Create the device and the routes into it.  Return its file."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _SET_DEVICE, struct.pack("16sH14x", DEVICE.encode(), _TUN | _NO_HEADER))
    settings = [
        ["link", "set", DEVICE, "up", "txqueuelen", "10000"],
        ["route", "add", "default", "dev", DEVICE, "table", _TABLE],
        *(["rule", "add", "iif", bridge, "lookup", _TABLE] for bridge in bridges),
    ]
    for words in settings:
        subprocess.run(["ip", *words], check=True, timeout=20)
    return tun


async def carry(tun: int, delay_s: float, loss: float) -> None:
    """Write packets back until cancelled."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        while True:
            try:
                packet = os.read(tun, _PACKET_BYTES_MAX)
            except BlockingIOError:
                return
            if random.random() >= loss:
                loop.call_later(delay_s, write, packet)

    def write(packet: bytes) -> None:
        try:
            os.write(tun, packet)
        except OSError:
            pass  # the kernel's queue is full, or nothing has this address

    loop.add_reader(tun, read)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(carry(open_device(sys.argv[3:]), float(sys.argv[1]) / 1000, float(sys.argv[2]) / 100))
