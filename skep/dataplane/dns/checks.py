"""Checks that containers resolve names to the addresses in the store, by sending queries from a container's
namespace.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import structlog

from skep.aio.clock import Clock
from skep.dataplane.dns.redirection import ADDRESS
from skep.dataplane.netns.kernel.namespaces import inside
from skep.model.networks.dns_messages import (
    AAAA,
    UDP_BYTES_MAX,
    A,
    addresses_in,
    encode_query,
    encode_question,
    encoded,
    is_response,
)
from skep.model.networks.paths import DETAIL_CHARACTERS_MAX, NetworkNames, PathCheck, PathFinding
from skep.model.networks.sandbox import Sandbox
from skep.model.values.ids import NetworkId

log = structlog.get_logger(__name__)

PORT = 53
"""DNS."""
RESPONSE_S = 0.5
"""Time limit in seconds for an answer from the same machine."""
UNANSWERED_MAX = 3
"""Number of names without a response after which the other names of the network are skipped."""
REPEAT_S = 1.0
"""Seconds before a wrong name is queried again, because its addresses may have just changed."""

Resolved = Mapping[str, tuple[str, ...]]
"""Sorted addresses by name."""


class NameChecks:
    """Sends queries from namespaces of this node's containers.

    ``sandboxes`` returns the sandboxes of running containers.
    """

    def __init__(self, sandboxes: Callable[[], Iterable[Sandbox]], clock: Clock) -> None:
        self._sandboxes = sandboxes
        self._clock = clock

    async def check(self, networks: Sequence[NetworkNames]) -> tuple[PathFinding, ...]:
        """Return a finding for each of ``networks`` with a container on this node.  Wrong names are queried twice."""
        findings = []
        for network in networks:
            namespace = self._namespace_on(network.network_id)
            if namespace is None or not network.names:
                continue
            wrong = await self._wrong(namespace, network)
            if wrong:
                await self._clock.sleep(REPEAT_S)
                wrong = await self._wrong(namespace, network)
            findings.append(finding_of(network, wrong))
        return tuple(findings)

    def _namespace_on(self, network: NetworkId) -> Path | None:
        for sandbox in self._sandboxes():
            if any(one.network_id == network for one in sandbox.endpoints):
                return Path(sandbox.netns)
        return None

    async def _wrong(self, namespace: Path, network: NetworkNames) -> Resolved:
        """Return the names whose addresses differ from those in the store, with the addresses that were found."""
        names = [name for name in network.names if _is_name(name)]
        try:
            resolved = await asyncio.to_thread(inside, namespace, partial(_query_all, names, network.network))
        except OSError as error:
            log.info("names cannot be queried", network=network.network, reason=str(error))
            return {}  # the container has ended meanwhile
        return {name: found for name, found in resolved.items() if found != _normalized(network.names[name])}


def finding_of(network: NetworkNames, wrong: Resolved) -> PathFinding:
    """Return the finding for a network, given its ``wrong`` names.

    One wrong name makes the check of the network fail.
    """
    sent = len(network.names)
    return PathFinding(
        check=PathCheck.NAMES,
        port=f"{PORT}/udp",
        sent=sent,
        lost=sent if wrong else 0,
        detail=_detail(network, wrong)[:DETAIL_CHARACTERS_MAX] if wrong else "",
    )


def _detail(network: NetworkNames, wrong: Resolved) -> str:
    name, addresses = next(iter(sorted(wrong.items())))
    here, there = ", ".join(addresses) or "no address", ", ".join(network.names[name])
    others = len(wrong) - 1
    more = f", and {others} more are wrong" if others > 1 else ", and one more is wrong" if others else ""
    return (
        f"on network {network.network}, {name} is {here} to containers here and {there} to the managers{more}"
    )


def _normalized(addresses: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(str(ip_address(one)) for one in addresses))


def _is_name(name: str) -> bool:
    try:
        encoded(name)
    except ValueError:
        return False
    return True


def _query_all(names: Sequence[str], network: str) -> Resolved:
    """Resolve names through the container's name server until it fails to respond.

    Raises: OSError: no query can be sent.
    """
    resolved: dict[str, tuple[str, ...]] = {}
    unanswered = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(RESPONSE_S)
        client.connect((ADDRESS, PORT))
        for name in names:
            responses = [_query(client, f"{name}.{network}", kind) for kind in (A, AAAA)]
            resolved[name] = tuple(sorted(address for found in responses for address in found or ()))
            unanswered += None in responses
            if unanswered >= UNANSWERED_MAX:
                break
    return resolved


def _query(client: socket.socket, name: str, kind: int) -> tuple[str, ...] | None:
    """Return the addresses in the response, or None without a response."""
    id = int.from_bytes(os.urandom(2), "big")
    question = encode_question(name, kind)
    client.send(encode_query(id, question))
    for data in _received(client):
        if is_response(data, id, question):
            return addresses_in(data, question)
    return None


def _received(client: socket.socket) -> Iterator[bytes]:
    """Yield received datagrams until the socket times out."""
    while True:
        try:
            yield client.recv(UDP_BYTES_MAX)
        except OSError:  # the timeout, or a closed port
            return
