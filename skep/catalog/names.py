"""A read-only view of the catalog in DNS, with the names of Consul's DNS interface.

``NAME.service.consul`` has addresses, and with SRV also ports.  ``TAG.NAME.service.consul`` has the instances with a
tag, ``_NAME._TAG.service.consul`` is the same in the form of RFC 2782, and ``NODE.node.consul`` is a node.

Source: Consul's documentation, "DNS usage overview"; RFC 2782.
"""

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, ip_address
from typing import Final

from skep.catalog.consul import DATACENTER, has_tags
from skep.catalog.following import KnownCatalog
from skep.errors import Unavailable, reason_of
from skep.model.catalog import CatalogInstance
from skep.model.networks.addresses import joined
from skep.model.networks.dns_messages import (
    AAAA,
    ANY,
    IN,
    NOERROR,
    NXDOMAIN,
    QUERY_BYTES_MAX,
    REFUSED,
    SRV,
    TCP_BYTES_MAX,
    A,
    Query,
    Record,
    encoded,
    parse,
    reply,
)

ZONE: Final = "consul"
_TCP_PROTOCOL: Final = "_tcp"
IDLE_S: Final = 10.0
"""Seconds without a query after which a TCP connection is closed."""
CONNECTIONS_MAX: Final = 64
"""Largest number of TCP connections, which clients open only after a truncated response."""

Shuffle = Callable[[list[CatalogInstance]], None]


def weighted_shuffle(draw: Callable[[], float]) -> Shuffle:
    """Return a shuffle in which each instance is first as often as its weight demands.

    Args:
        draw: Returns a random number from 0 to 1.

    Source: Efraimidis and Spirakis, Weighted random sampling with a reservoir, 2006.
    """
    return lambda found: found.sort(key=lambda one: draw() ** (1 / one.weight), reverse=True)


class DnsView:
    """Answers queries from the known catalog.

    Args:
        shuffle: Orders instances, because many clients use the first address only.  See ``weighted_shuffle``.
    """

    def __init__(self, known: KnownCatalog, shuffle: Shuffle) -> None:
        self._known = known
        self._shuffle = shuffle

    def respond(self, data: bytes, *, is_tcp: bool = False) -> bytes | None:
        """Return the response to a message, or None if no response is sent."""
        query = parse(data)
        if not isinstance(query, Query):
            return query
        size = TCP_BYTES_MAX if is_tcp else query.udp_bytes_max
        if query.class_ != IN or not f".{query.name}".endswith(f".{ZONE}"):
            return reply(query, REFUSED, bytes_max=size)
        found = self._records(query)
        if found is None:
            return reply(query, NXDOMAIN, bytes_max=size)
        answers, extra = found
        return reply(query, NOERROR, tuple(answers), tuple(extra), bytes_max=size)

    def _records(self, query: Query) -> tuple[list[Record], list[Record]] | None:
        """Return answers and additional records, or None for an unknown name."""
        labels = query.name.split(".")[:-1]
        if len(labels) > 1 and labels[-1] == DATACENTER:
            labels.pop()
        match labels:
            case [address, "addr"]:
                return _of_address(address, query.type)
            case [*name, "node"]:
                return self._of_node(".".join(name), query.type)
            case [service, tag, "service"] if service.startswith("_") and tag.startswith("_"):
                return self._of_service(service[1:], "" if tag == _TCP_PROTOCOL else tag[1:], query.type)
            case [service, "service"]:
                return self._of_service(service, "", query.type)
            case [*tag, service, "service"]:
                return self._of_service(service, ".".join(tag), query.type)
        return None

    def _of_node(self, name: str, type: int) -> tuple[list[Record], list[Record]] | None:
        for node, address in self._known.nodes.items():
            if node.lower() == name:
                return list(_addresses([address], type)), []
        return None

    def _of_service(self, name: str, tag: str, type: int) -> tuple[list[Record], list[Record]] | None:
        service = next((one for key, one in self._known.services.items() if key.lower() == name), None)
        chosen = [one for one in service.instances if not tag or has_tags(one.tags, [tag])] if service else []
        if not chosen:
            return None
        self._shuffle(chosen)
        if type not in (SRV, ANY):
            return list(_addresses(dict.fromkeys(one.address for one in chosen), type)), []
        answers, extra = [], []
        for one in chosen:
            target = encoded(_target(one.address))
            answers.append(Record(SRV, struct.pack("!HHH", 1, one.weight, one.port) + target))
            packed = ip_address(one.address)
            extra.append(Record(A if packed.version == 4 else AAAA, packed.packed, owner=target))
        return answers, extra


def _target(address: str) -> str:
    """Return the name of an address: ``0a000001.addr.dc1.consul``."""
    return f"{ip_address(address).packed.hex()}.addr.{DATACENTER}.{ZONE}"


def _of_address(text: str, type: int) -> tuple[list[Record], list[Record]] | None:
    try:
        address = ip_address(bytes.fromhex(text))
    except ValueError:
        return None
    return list(_addresses([str(address)], type)), []


def _addresses(addresses: Iterable[str], type: int) -> Iterable[Record]:
    for one in map(ip_address, addresses):
        own = A if isinstance(one, IPv4Address) else AAAA
        if type in (own, ANY):
            yield Record(own, one.packed)


class _Datagrams(asyncio.DatagramProtocol):
    """Answers each datagram at once."""

    def __init__(self, view: DnsView) -> None:
        self._view = view
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        response = self._view.respond(data)
        if response is not None and self._transport is not None:
            self._transport.sendto(response, addr)


@asynccontextmanager
async def serving_names(view: DnsView, host: str, port: int) -> AsyncIterator[int]:
    """Serve over UDP and TCP during the block, and yield the port.  Raises: Unavailable: the address is taken."""
    loop = asyncio.get_running_loop()
    try:
        server = await asyncio.start_server(_Streams(view).serve, host, port)
        bound = int(server.sockets[0].getsockname()[1])
        transport, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(view), local_addr=(host, bound))
    except OSError as error:
        raise Unavailable(
            f"cannot listen on {joined(host, port)}: {reason_of(error)}. Choose another port."
        ) from error
    async with server:
        try:
            yield bound
        finally:
            transport.close()


class _Streams:
    """Answers queries over TCP, each with its length before it."""

    def __init__(self, view: DnsView) -> None:
        self._view = view
        self._count = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._count >= CONNECTIONS_MAX:
            writer.close()
            return
        self._count += 1
        try:
            while True:
                async with asyncio.timeout(IDLE_S):
                    (size,) = struct.unpack("!H", await reader.readexactly(2))
                    if size > QUERY_BYTES_MAX:
                        return
                    response = self._view.respond(await reader.readexactly(size), is_tcp=True)
                    if response is None:
                        return
                    writer.write(struct.pack("!H", len(response)) + response)
                    await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._count -= 1
            writer.close()
