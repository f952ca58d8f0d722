"""Reads and sets checksum offload of a device: whether checksums are left to the hardware below it.

Without offload, the kernel computes the checksum of each packet before it passes the packet on.  It also splits large
TCP segments then, because it does not offload segmentation without checksums.  All calls work in the calling thread's
network namespace.

Source: linux, include/uapi/linux/ethtool.h (ETHTOOL_GTXCSUM, ETHTOOL_STXCSUM), net/ethtool/ioctl.c.
"""

import array
import errno
import fcntl
import socket
import struct

# Source: linux/sockios.h and linux/ethtool.h: ETHTOOL_GTXCSUM and ETHTOOL_STXCSUM.
_SIOCETHTOOL = 0x8946
_GET, _SET = 0x16, 0x17
_REQUEST = struct.Struct("16sP16x")
_VALUE = struct.Struct("=II")


def offloads(device: str) -> bool:
    """Return whether ``device`` offloads the checksums of sent packets.  True if the device was removed."""
    try:
        return bool(_asked(device, _GET, 0))
    except OSError:
        return True


def set_offloads(device: str, wanted: bool) -> None:
    """Enable or disable checksum offload of ``device``.  Raises: OSError."""
    try:
        _asked(device, _SET, int(wanted))
    except OSError as error:
        if not wanted or error.errno != errno.EOPNOTSUPP:  # a device that cannot offload
            raise


def _asked(device: str, command: int, value: int) -> int:
    held = array.array("B", _VALUE.pack(command, value))
    address, _ = held.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asking:
        fcntl.ioctl(asking, _SIOCETHTOOL, _REQUEST.pack(device.encode(), address))
    _, reply = _VALUE.unpack(held)
    return int(reply)
