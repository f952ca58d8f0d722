"""Observes changes of virtual addresses' rules in many namespaces, from another process than their writer."""

import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.names_load import question
from skep.dataplane.netns.kernel import netlink
from skep.dataplane.netns.kernel.namespaces import inside
from skep.dataplane.netns.kernel.nft_changes import ForeignChanges, open_notifications
from skep.dataplane.plan.vip import FAMILIES, NAME

_NICENESS = -15
"""Niceness of this process.  High priority, because a late notification would count as a late change."""
_ANSWER_S = 5.0
_RECEIVE_BYTES = 1 << 16
_TRIES = 3
_TABLES = {f"{family} {NAME}" for family in FAMILIES}
_NEIGHBOR = struct.Struct("=BBHiHBB")
_DESTINATION = 1


class Watch:
    """Time of the last change of virtual addresses' rules, by namespace, in seconds of ``time.time``."""

    def __init__(self, sockets: Mapping[Path, socket.socket]) -> None:
        self._heard = dict.fromkeys(sockets, 0.0)
        self._sockets = sockets
        self._selector = selectors.DefaultSelector()
        for path, opened in sockets.items():
            # This process writes no rules, so each transaction counts.
            notifications = ForeignChanges("")
            self._selector.register(opened, selectors.EVENT_READ, (path, notifications))
        self._is_over = threading.Event()
        self._has_heard = threading.Condition()
        self._thread = threading.Thread(target=self._listen, name="watch")
        self._thread.start()

    def wait(self, since: float, paths: Iterable[Path] | None = None, *, within_s: float = 30.0) -> float:
        """Return the time of the last change once all namespaces (or all of ``paths``) have changed since ``since``.

        Raises: TimeoutError.
        """
        wanted = list(self._heard if paths is None else paths)

        def have_all() -> bool:
            return all(self._heard[path] > since for path in wanted)

        with self._has_heard:
            if not self._has_heard.wait_for(have_all, within_s):
                late = sum(self._heard[path] <= since for path in wanted)
                raise TimeoutError(f"{late} of {len(wanted)} namespaces did not change within {within_s:g} s")
            return max(self._heard[path] for path in wanted)

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._selector.close()
        for opened in self._sockets.values():
            opened.close()

    def _listen(self) -> None:
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while not self._is_over.is_set():
            ready = self._selector.select(0.2)
            now = time.time()
            changed = []
            for key, _ in ready:
                path, notifications = key.data
                opened = key.fileobj
                assert isinstance(opened, socket.socket)
                if _TABLES & notifications.parse(opened.recv(_RECEIVE_BYTES)):
                    changed.append(path)
            if changed:
                with self._has_heard:
                    self._heard.update(dict.fromkeys(changed, now))
                    self._has_heard.notify_all()


@contextmanager
def watching(namespaces: Iterable[Path], name: str) -> Iterator[Watch]:
    """Use the address of the service ``name`` in all ``namespaces`` of containers, then watch them."""
    sockets = {}
    for path in namespaces:
        inside(path, lambda: _ask(name))
        sockets[path] = inside(path, open_notifications)
    watch = Watch(sockets)
    try:
        yield watch
    finally:
        watch.close()


def leads_to(namespace: Path, address: str) -> int:
    """Return how many MAC addresses the overlay's namespace sends to the node at ``address``.  Raises: OSError."""
    wanted = socket.inet_aton(address)
    body = _NEIGHBOR.pack(netlink.AF_BRIDGE, 0, 0, 0, 0, 0, 0)
    entries = inside(namespace, lambda: netlink.dump(netlink.GETNEIGH, body))
    return sum(
        bytes(dict(netlink.attributes(entry[_NEIGHBOR.size :])).get(_DESTINATION, b"")) == wanted
        for _, entry in entries
    )


def _ask(name: str) -> None:
    """Ask the container's name server for an address.  Raises: OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(_ANSWER_S)
        asking.connect(("127.0.0.11", 53))
        for number in range(_TRIES):
            asking.send(number.to_bytes(2, "big") + question(name))
            with suppress(TimeoutError):
                answer = asking.recv(_RECEIVE_BYTES)
                if int.from_bytes(answer[6:8], "big"):
                    return
                time.sleep(1)  # this node does not know the service yet
    raise TimeoutError(f"{name} has no address here")
