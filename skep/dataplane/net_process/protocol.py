"""The messages of ``net.sock``: one request, one response, each preceded by its length (4 bytes, big-endian).

Hand-over is the exception.  ``HandedOver`` is followed by single bytes that carry the sockets in ancillary data
(``SCM_RIGHTS``): first the sockets of ``labels``, in their order, then the sockets of reservations.  A socket's address
identifies its reservation.  The two processes may be of consecutive versions, so fields are only ever added, and
a request or response keeps its tag even if its class is renamed.
"""

from typing import cast

import msgspec

from skep.dataplane.net_process.ipc import framed
from skep.model.values.ids import NetworkId, TaskId

FRAME_BYTES_MAX = 4 * 1024 * 1024
"""Longest message in bytes, enough for the names of some ten thousand tasks."""


class Reservation(msgspec.Struct, frozen=True):
    """A reserved host port.

    Args:
        token: Identifies the call that reserved the port.  If the call is repeated, it gets the same port.
        address: The address that it is bound to, or empty for every IPv4 address.
        target: The address and port to which the net process relays traffic (``proxy/host_ports.py``).
    """

    protocol: str
    port: int
    token: str = ""
    address: str = ""
    target: tuple[str, int] | None = None

    @property
    def owner(self) -> str:
        """The owner of the reservation (``client.NetClient``).

        Empty for ports of containers and for tokens of older versions.
        """
        return self.token.rpartition(":")[0]


class NameServer(msgspec.Struct, frozen=True):
    """A name server that queries are forwarded to."""

    address: str
    port: int = 53


class ContainerEndpoint(msgspec.Struct, frozen=True):
    """A container's endpoint on a network."""

    network: NetworkId
    task: TaskId = TaskId("")
    addresses: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    """Links as ``container:alias``.  Only this container resolves them."""


class Named(msgspec.Struct, frozen=True, kw_only=True):
    """A container with names and virtual addresses in its namespace."""

    id: str
    netns: str
    """Path of the namespace."""
    networks: tuple[ContainerEndpoint, ...]
    """The networks in which names are looked up, in the order of the lookup."""
    servers: tuple[NameServer, ...] = ()
    """Servers for other names.

    A server on one of the container's networks is reached from the container's namespace, and all others from the
    node's namespace.
    """
    forwards: bool = True
    """Whether queries are forwarded from the node's namespace.  False if the container has no egress."""
    forwards_single_labels: bool = True
    """Whether single-label names are forwarded.  False if ``ndots`` makes clients try search domains."""


class Reserve(msgspec.Struct, frozen=True, tag=True):
    """Reserve a port, or any free port if 0.  Answered with ``Reserved`` or ``RequestRefused``."""

    protocol: str
    port: int
    token: str
    address: str = ""
    target: tuple[str, int] | None = None


class ReleasePort(msgspec.Struct, frozen=True, tag="Release"):
    """Release a port if it is held.  Answered with ``Done``.

    ``owner``: releases the port only if this owner holds it.  None, from earlier versions: whoever does.
    """

    protocol: str
    port: int
    address: str = ""
    owner: str | None = None


class List(msgspec.Struct, frozen=True, tag=True):
    """List everything held and served.  Answered with ``ServedListing``."""


class Serve(msgspec.Struct, frozen=True, tag=True):
    """Serve names and virtual addresses in a container's namespace, replacing earlier ones.

    Answered with ``Done`` when queries are answered, or with ``RequestRefused``."""

    named: Named


class ForgetContainer(msgspec.Struct, frozen=True, tag="Forget"):
    """Stop serving a container, because its namespace is removed or needs no names.  Answered with ``Done``."""

    id: str


class Refresh(msgspec.Struct, frozen=True, tag=True):
    """Reload the tables of these networks, or of all networks if empty.

    Answered with ``Done`` when names and virtual addresses follow the new tables in every namespace, or with
    ``RequestRefused`` if that failed."""

    networks: tuple[NetworkId, ...] = ()


class HandOverSockets(msgspec.Struct, frozen=True, tag="HandOver"):
    """Hand everything over to the client and exit.  Answered with ``HandedOver``."""


class Reserved(msgspec.Struct, frozen=True, tag=True):
    """The port was reserved."""

    port: int


class RequestRefused(msgspec.Struct, frozen=True, tag="Refused"):
    """The request failed.

    Args:
        message: A sentence for the task's status.
        is_taken: Whether another program has the port.
        is_elsewhere: Whether the node lacks the address.
    """

    message: str
    is_taken: bool
    is_elsewhere: bool = False


class Done(msgspec.Struct, frozen=True, tag=True):
    """The request was carried out."""


class NameCounts(msgspec.Struct, frozen=True):
    """Counters of the name servers since the process started.

    Args:
        questions: Number of questions by type.
        responses: Source, code and number of responses (``dns.counts``).
        in_flight: Queries that currently wait for other servers.
    """

    questions: tuple[tuple[str, int], ...] = ()
    responses: tuple[tuple[str, str, int], ...] = ()
    upstream_timeouts: int = 0
    upstream_failures: int = 0
    in_flight: int = 0


class ServedListing(msgspec.Struct, frozen=True, tag="Listing"):
    """Everything that the process holds and serves.

    Args:
        repairs: How often tables in containers' namespaces were repaired after another program had changed them.
        names: Counters of the name servers.  A process of an older version does not send them.
    """

    reservations: tuple[Reservation, ...]
    served: tuple[Named, ...] = ()
    repairs: int = 0
    names: NameCounts = NameCounts()


class SocketLabel(msgspec.Struct, frozen=True):
    """Identifies a socket by its container and its kind, ``udp`` or ``tcp``."""

    container: str
    kind: str


class WaitingQuery(msgspec.Struct, frozen=True):
    """A DNS query that was read and not yet answered."""

    container: str
    address: str
    port: int
    message: bytes


class HandedOver(msgspec.Struct, frozen=True, tag=True):
    """Everything that the process held.  The sockets follow."""

    reservations: tuple[Reservation, ...]
    labels: tuple[SocketLabel, ...] = ()
    waiting: tuple[WaitingQuery, ...] = ()


Request = Reserve | ReleasePort | List | Serve | ForgetContainer | Refresh | HandOverSockets
Response = Reserved | RequestRefused | Done | ServedListing | HandedOver


def frame(message: Request | Response) -> bytes:
    """Return ``message`` preceded by its length."""
    return framed(msgspec.msgpack.encode(message))


def decode_request(body: bytes) -> Request:
    """Decode a request.  Raises: msgspec.DecodeError; UnicodeDecodeError."""
    return cast("Request", msgspec.msgpack.decode(body, type=Request))


def decode_response(body: bytes) -> Response:
    """Decode a response.  Raises: msgspec.DecodeError; UnicodeDecodeError."""
    return cast("Response", msgspec.msgpack.decode(body, type=Response))
