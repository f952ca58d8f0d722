"""Opens ports of the machine that lead into a rootless node's network namespace, by the API of RootlessKit.

RootlessKit listens on the machine, and connects to the same port of 127.0.0.1 in the namespace.  So containers see the
namespace as the address of their clients.  RootlessKit's process outlives this one, so its ports are compared at the
start.

Source: rootlesskit 1.1, pkg/api/router/router.go, pkg/port/portutil/portutil.go (tcp4, tcp6, udp4, udp6).
"""

import socket
from collections.abc import Iterable
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import msgspec

from skep.dataplane.net_process.protocol import Reservation
from skep.dataplane.ports import AddressNotHere
from skep.errors import AlreadyExists, FailedPrecondition, SkepError, Unavailable
from skep.model.networks.addresses import joined

_TIMEOUT_S = 2.0
"""Time limit in seconds for one call, which normally takes a millisecond.  Names are not served meanwhile."""
_LOOPBACK = ("127.0.0.1", "::1")
_EVERY = {"": "0.0.0.0", "0.0.0.0": "0.0.0.0", "::": "::"}


class _Spec(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One port, with RootlessKit's names.  The parent is the machine, and the child is the namespace."""

    proto: str
    parent_ip: str = msgspec.field(name="parentIP", default="")
    parent_port: int
    child_port: int


class _Status(msgspec.Struct, frozen=True):
    id: int
    spec: _Spec


class MachinePorts:
    """The ports of the machine that lead into this node's namespace.  ``api`` is RootlessKit's socket."""

    def __init__(self, api: Path) -> None:
        self._api = api

    def check(self, protocol: str, address: str) -> None:
        """Check the protocol and the address of a port.  Raises: FailedPrecondition: RootlessKit cannot open it."""
        if protocol not in ("tcp", "udp"):
            raise FailedPrecondition(
                f"a rootless node publishes no {protocol} ports: run the container on a node of root"
            )
        if address not in (*_EVERY, *_LOOPBACK):
            raise FailedPrecondition(
                f"a rootless node does not publish on {address}: use 127.0.0.1, or all addresses"
            )

    def open(self, protocol: str, port: int, address: str) -> None:
        """Open a port that ``check`` accepts.  Blocks.

        Raises:
            AlreadyExists: Another program of the machine has it.
            FailedPrecondition: The user may not have it.
            Unavailable: RootlessKit does not respond.
        """
        spec = _spec(protocol, port, address)
        status, body = self._call("POST", "/v1/ports", msgspec.json.encode(spec))
        if status != 201:
            raise refusal(spec.parent_ip, port, body.decode(errors="replace"))

    def close(self, protocol: str, port: int, address: str) -> None:
        """Close a port.  Does nothing if it is not open.  Blocks.  Raises: Unavailable."""
        spec = _spec(protocol, port, address)
        for one in self._list():
            if one.spec == spec:
                self._delete(one)

    def ping(self) -> None:
        """Ask for a response.  Blocks.  Raises: Unavailable."""
        self._list()

    def restore(self, held: Iterable[Reservation]) -> None:
        """Open the ``held`` ports that are not open, and close all others.  Blocks.

        Raises: Unavailable: RootlessKit does not respond; SkepError: the first refusal, after all other ports.
        """
        wanted = {_spec(one.protocol, one.port, one.address): one for one in held}
        present = self._list()
        work = [partial(self._delete, one) for one in present if one.spec not in wanted]
        work += [
            partial(self.open, one.protocol, one.port, one.address)
            for spec, one in wanted.items()
            if spec not in {status.spec for status in present}
        ]
        refused: SkepError | None = None
        for change in work:
            try:
                change()
            except Unavailable:
                raise
            except SkepError as error:
                refused = refused or error
        if refused is not None:
            raise refused

    def _delete(self, port: _Status) -> None:
        status, body = self._call("DELETE", f"/v1/ports/{port.id}")
        if status >= 300:
            where = joined(port.spec.parent_ip, port.spec.parent_port)
            raise FailedPrecondition(
                f"rootlesskit does not close {where}: {body.decode(errors='replace').strip()}: "
                "restart the node if the port is needed"
            )

    def _list(self) -> tuple[_Status, ...]:
        _, body = self._call("GET", "/v1/ports")
        try:
            return msgspec.json.decode(body, type=tuple[_Status, ...] | None) or ()
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unavailable(f"unexpected response of rootlesskit: {error}") from error

    def _call(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        connection = _Connection(self._api)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, HTTPException) as error:
            raise Unavailable(f"rootlesskit does not respond at {self._api}: {error}") from error
        finally:
            connection.close()


class _Connection(HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("rootlesskit", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))


def refusal(address: str, port: int, text: str) -> SkepError:
    """Return the error for RootlessKit's refusal ``text``, in Docker's words where Docker has some.

    Source: rootlesskit, pkg/port/portutil/portutil.go, and Go's errors of listen(2).
    """
    where = joined(address, port)
    if "address already in use" in text or "conflict with ID" in text:
        return AlreadyExists(f"Bind for {where} failed: port is already allocated")
    if "permission denied" in text or "privileged port" in text:
        return FailedPrecondition(
            f"cannot expose privileged port {port} of a rootless node: choose a larger one, "
            f"or set net.ipv4.ip_unprivileged_port_start={port} on its machine"
        )
    if "cannot assign requested address" in text or "address family not supported" in text:
        return AddressNotHere(f"listen {where}: {text.strip()}")
    return FailedPrecondition(f"rootlesskit cannot listen on {where}: {text.strip()}")


def _spec(protocol: str, port: int, address: str) -> _Spec:
    """Return RootlessKit's name for a port."""
    family = "6" if ":" in address else "4"
    place = _EVERY.get(address, address)
    return _Spec(proto=protocol + family, parent_ip=place, parent_port=port, child_port=port)
