"""TAP devices in networks' namespaces: they stay when the forwarder ends, and the next one takes them up again."""

import fcntl
import os
import struct
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from skep.dataplane.netns.namespaces import inside

_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
_TUNSETOFFLOAD = 0x400454D0
_TUNGETIFF = 0x800454D2
_TUNSETVNETHDRSZ = 0x400454D8
_TUNSETVNETLE = 0x400454DC
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_OFFLOAD_CHECKSUM, _OFFLOAD_TSO4, _OFFLOAD_TSO6 = 1, 2, 4
_NAME_BYTES_MAX = 15
_INTERFACE_REQUEST_BYTES = 40


def open_tap(namespace: Path, name: str) -> int:
    """A descriptor of the TAP ``name`` in ``namespace``, made if it is not there; not blocking.

    TCP's segments come whole through it (virtio header of 10 bytes, little-endian on every machine), so that one
    seal covers up to 64 KiB.  The device outlives the descriptor: the bridge keeps its port while a forwarder is
    replaced.

    Raises: OSError.
    """
    if not 0 < len(name.encode()) <= _NAME_BYTES_MAX:
        raise OSError(f"{name!r} is no name for a device")
    return inside(namespace, lambda: _open(name))


def is_attached(descriptor: int) -> bool:
    """Whether the device behind ``descriptor`` is still there: somebody may have deleted it."""
    request = bytearray(_INTERFACE_REQUEST_BYTES)
    try:
        fcntl.ioctl(descriptor, _TUNGETIFF, request)
    except OSError:
        return False
    return True


def try_carrier() -> None:
    """Do once what the path in user space needs, in the present namespace, which has to be a scratch one.

    Raises: OSError: what is missing.
    """
    descriptor = _open("probe0")
    try:
        fcntl.ioctl(descriptor, _TUNSETPERSIST, 0)
    finally:
        os.close(descriptor)
    nonce, key = bytes(12), bytes(32)
    try:
        AESGCM(key).decrypt(nonce, AESGCM(key).encrypt(nonce, b"probe", b""), b"")
    except UnsupportedAlgorithm as error:
        raise OSError(f"AES-256-GCM: {error}") from error


def _open(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(descriptor, _TUNSETVNETHDRSZ, struct.pack("i", 10))
        fcntl.ioctl(descriptor, _TUNSETVNETLE, struct.pack("i", 1))
        fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _OFFLOAD_CHECKSUM | _OFFLOAD_TSO4 | _OFFLOAD_TSO6)
        fcntl.ioctl(descriptor, _TUNSETPERSIST, 1)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
