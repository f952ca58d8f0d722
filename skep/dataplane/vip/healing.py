"""Notices when somebody else changes our rules in a container's namespace.

nftables tells what each transaction changed and, last, whose it was: a thread that writes for us has a name of its
own (``named``), so what we did ourselves is told from what was done to us.
"""

import ctypes
import errno
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from skep.dataplane.netns import netlink

_SUBSYSTEM_NFTABLES = 10
_NEW_GENERATION = 15
_TABLE_ATTRIBUTE = 1
"""All nftables messages name their table first."""
_GENERATION_PROCESS_NAME = 3
_BUFFER_BYTES = 1 << 20
_SO_RCVBUFFORCE = 33
_PR_SET_NAME, _PR_GET_NAME = 15, 16
_NAME_BYTES_MAX = 15
_READS_MAX = 64


def open_notifications() -> socket.socket:
    """A socket that hears of changes in the namespace of the calling thread.  Raises: OSError."""
    opened = netlink.listening(netlink.NETFILTER, (netlink.GROUP_NFTABLES,))
    try:
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
    except BaseException:
        opened.close()
        raise
    return opened


@contextmanager
def named(name: str) -> Iterator[None]:
    """The calling thread is called ``name`` (15 bytes of it) for the block."""
    library = _library()
    before = ctypes.create_string_buffer(_NAME_BYTES_MAX + 1)
    library.prctl(_PR_GET_NAME, before, 0, 0, 0)
    library.prctl(_PR_SET_NAME, name.encode()[:_NAME_BYTES_MAX], 0, 0, 0)
    try:
        yield
    finally:
        library.prctl(_PR_SET_NAME, before.value, 0, 0, 0)


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class Notifications:
    """What one namespace tells.

    ``ours``: tables that nobody else is to change; ``own_name``: that of threads which write for us.
    """

    def __init__(self, ours: frozenset[str], own_name: str) -> None:
        self._ours = ours
        self._own_name = own_name
        self._is_touched = False

    def heard(self, data: bytes) -> bool:
        """Whether, as of these messages, somebody else has changed a table of ours."""
        was_changed = False
        for type_, body in netlink.messages(data):
            if type_ >> 8 != _SUBSYSTEM_NFTABLES:
                continue
            told = dict(netlink.attributes(body[4:]))
            if type_ & 0xFF != _NEW_GENERATION:
                self._is_touched |= _text(told.get(_TABLE_ATTRIBUTE, b"")) in self._ours
                continue
            if self._is_touched and _text(told.get(_GENERATION_PROCESS_NAME, b"")) != self._own_name:
                was_changed = True
            self._is_touched = False
        return was_changed


def read(opened: socket.socket, notifications: Notifications, changed: Callable[[], None]) -> None:
    """Read what there is; call ``changed`` when somebody else has changed a table of ours, or may have."""
    was_changed = False
    for _ in range(_READS_MAX):
        try:
            data = opened.recv(1 << 16)
        except BlockingIOError:
            break
        except OSError as error:
            if error.errno != errno.ENOBUFS:  # otherwise more was said than there was room for
                raise
            was_changed = True
            continue
        was_changed |= notifications.heard(data)
    if was_changed:
        changed()


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")
