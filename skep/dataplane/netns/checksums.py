"""Whether a device leaves checksums to what lies below it (checksum offload), asked and set.

A device that does not computes them before a packet goes on, and cuts TCP's large segments, too: the kernel leaves
neither to a card alone.  All work in the network namespace of the calling thread.

Source: linux, include/uapi/linux/ethtool.h (ETHTOOL_GTXCSUM, ETHTOOL_STXCSUM), net/ethtool/ioctl.c.
"""

import array
import errno
import fcntl
import socket
import struct

_SIOCETHTOOL = 0x8946
_GET, _SET = 0x16, 0x17
_REQUEST = struct.Struct("16sP16x")
_VALUE = struct.Struct("=II")


def offloads(device: str) -> bool:
    """Whether ``device`` leaves checksums of what it sends to others; one that is gone does."""
    try:
        return bool(_asked(device, _GET, 0))
    except OSError:
        return True


def set_offloads(device: str, wanted: bool) -> None:
    """Have ``device`` leave them, or compute them itself.  Raises: OSError."""
    try:
        _asked(device, _SET, int(wanted))
    except OSError as error:
        if not wanted or error.errno != errno.EOPNOTSUPP:  # it can do nothing else
            raise


def _asked(device: str, command: int, value: int) -> int:
    held = array.array("B", _VALUE.pack(command, value))
    address, _ = held.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asking:
        fcntl.ioctl(asking, _SIOCETHTOOL, _REQUEST.pack(device.encode(), address))
    _, reply = _VALUE.unpack(held)
    return int(reply)
