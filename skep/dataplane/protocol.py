"""The messages of ``net.sock``: one request, one response, each with its length (4 bytes, big-endian) before it.

Hand-over is the exception: ``HandedOver`` is followed by single bytes that carry the sockets in ancillary data
(``SCM_RIGHTS``): first those of ``labels``, in their order, then those of reservations; a socket's address
says which reservation it is.  The processes may be of two consecutive versions, so fields are only ever added, and the
names of the requests and responses, which are their tags, stay.
"""

from typing import cast

import msgspec

from skep.dataplane.ipc import framed
from skep.model.ids import NetworkId, TaskId

FRAME_BYTES_MAX = 4 * 1024 * 1024


class Reservation(msgspec.Struct, frozen=True):
    """A host port that is held.

    ``token``: of the call that reserved it, so that the call may be repeated; ``address`` empty: every IPv4 address;
    ``target``: the address and port to which the net process relays what comes there (``proxy/host_ports.py``).
    """

    protocol: str
    port: int
    token: str = ""
    address: str = ""
    target: tuple[str, int] | None = None

    @property
    def owner(self) -> str:
        """Who reserved it (``client.NetClient``): empty for the ports of containers, and of former versions' tokens."""
        return self.token.rpartition(":")[0]


class NameServer(msgspec.Struct, frozen=True):
    """A name server to forward to."""

    address: str
    port: int = 53


class Place(msgspec.Struct, frozen=True):
    """A container's endpoint on a network."""

    network: NetworkId
    task: TaskId = TaskId("")
    addresses: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    """``container:alias``: names of this container alone."""


class Named(msgspec.Struct, frozen=True, kw_only=True):
    """A container whose namespace has names and virtual addresses."""

    id: str
    netns: str
    """Path of its namespace."""
    networks: tuple[Place, ...]
    """In the order in which names are looked up."""
    servers: tuple[NameServer, ...] = ()
    """Servers for other names, from the node's namespace, or from the container's if they are on a network of
    its own."""
    forwards: bool = True
    """False: the container has no way out, so no query is forwarded from the node's namespace."""
    forwards_single_labels: bool = True
    """False: ``ndots`` was set, so that clients try their search domains instead."""


class Reserve(msgspec.Struct, frozen=True, tag=True):
    """Hold a port (0: any free one); answered with ``Reserved`` or ``Refused``."""

    protocol: str
    port: int
    token: str
    address: str = ""
    target: tuple[str, int] | None = None


class Release(msgspec.Struct, frozen=True, tag=True):
    """Let a port go, if it is held; answered with ``Done``."""

    protocol: str
    port: int
    address: str = ""


class List(msgspec.Struct, frozen=True, tag=True):
    """Answered with ``Listing``."""


class Serve(msgspec.Struct, frozen=True, tag=True):
    """Have names and virtual addresses in a container's namespace, instead of what it had; answered with ``Done`` when
    queries are answered, or with ``Refused``."""

    named: Named


class Forget(msgspec.Struct, frozen=True, tag=True):
    """A container's namespace goes, or needs no names any more; answered with ``Done``."""

    id: str


class Refresh(msgspec.Struct, frozen=True, tag=True):
    """The tables of these networks have changed (all, if none is named); answered with ``Done`` when names and
    virtual addresses of theirs are served by them in every namespace, with ``Refused`` where that failed."""

    networks: tuple[NetworkId, ...] = ()


class HandOver(msgspec.Struct, frozen=True, tag=True):
    """Give everything to the client, and end; answered with ``HandedOver``."""


class Reserved(msgspec.Struct, frozen=True, tag=True):
    """The port that is held now."""

    port: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """``message`` is a sentence for the task's status.

    ``is_taken``: because another program has the port; ``is_elsewhere``: because the node has no such address.
    """

    message: str
    is_taken: bool
    is_elsewhere: bool = False


class Done(msgspec.Struct, frozen=True, tag=True):
    """The request was carried out."""


class NameCounts(msgspec.Struct, frozen=True):
    """What the name servers have done since the process began.

    ``questions``: by type; ``responses``: source, code and number (``dns.counts``); ``in_flight``: queries at other
    servers now.
    """

    questions: tuple[tuple[str, int], ...] = ()
    responses: tuple[tuple[str, str, int], ...] = ()
    upstream_timeouts: int = 0
    upstream_failures: int = 0
    in_flight: int = 0


class Listing(msgspec.Struct, frozen=True, tag=True):
    """``repairs``: how often tables in a container's namespace were repaired that another program had changed.

    ``names``: a process of an older version has none.
    """

    reservations: tuple[Reservation, ...]
    served: tuple[Named, ...] = ()
    repairs: int = 0
    names: NameCounts = NameCounts()


class Label(msgspec.Struct, frozen=True):
    """Which socket of which container it is: ``udp`` or ``tcp``."""

    container: str
    kind: str


class Waiting(msgspec.Struct, frozen=True):
    """A DNS query that was read and not yet answered."""

    container: str
    address: str
    port: int
    message: bytes


class HandedOver(msgspec.Struct, frozen=True, tag=True):
    """Everything that the process held; the sockets follow."""

    reservations: tuple[Reservation, ...]
    labels: tuple[Label, ...] = ()
    waiting: tuple[Waiting, ...] = ()


Request = Reserve | Release | List | Serve | Forget | Refresh | HandOver
Response = Reserved | Refused | Done | Listing | HandedOver


def frame(message: Request | Response) -> bytes:
    """``message`` with its length before it."""
    return framed(msgspec.msgpack.encode(message))


def decode_request(body: bytes) -> Request:
    """Raises: msgspec.DecodeError; UnicodeDecodeError."""
    return cast("Request", msgspec.msgpack.decode(body, type=Request))


def decode_response(body: bytes) -> Response:
    """Raises: msgspec.DecodeError; UnicodeDecodeError."""
    return cast("Response", msgspec.msgpack.decode(body, type=Response))
