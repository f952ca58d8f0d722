"""Whether containers resolve names as the store has them: queried as a container does, in its namespace."""

import asyncio
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import structlog

from skep.aio.clock import Clock
from skep.dataplane.dns.messages import (
    AAAA,
    UDP_BYTES_MAX,
    A,
    addresses_in,
    asked,
    encoded,
    is_answer,
    question_of,
)
from skep.dataplane.dns.rules import ADDRESS
from skep.dataplane.netns.namespaces import inside
from skep.model.ids import NetworkId
from skep.model.paths import DETAIL_CHARACTERS_MAX, NetworkNames, PathCheck, PathFinding
from skep.model.sandbox import Sandbox

log = structlog.get_logger(__name__)

PORT = 53
ANSWER_S = 0.5
UNANSWERED_MAX = 3
"""Questions of one network without an answer; then the others are not asked any more."""
AGAIN_S = 1.0
"""What a name stands for may have changed a moment ago."""

Told = Mapping[str, tuple[str, ...]]


class NameChecks:
    """Asks in the namespaces of this node's containers.  ``sandboxes``: those of running containers."""

    def __init__(self, sandboxes: Callable[[], Iterable[Sandbox]], clock: Clock) -> None:
        self._sandboxes = sandboxes
        self._clock = clock

    async def look(self, truth: Sequence[NetworkNames]) -> tuple[PathFinding, ...]:
        """A finding for each network that a container here is on; twice wrong is wrong."""
        findings = []
        for network in truth:
            namespace = self._namespace_on(network.network_id)
            if namespace is None or not network.names:
                continue
            wrong = await self._wrong(namespace, network)
            if wrong:
                await self._clock.sleep(AGAIN_S)
                wrong = await self._wrong(namespace, network)
            findings.append(finding_of(network, wrong))
        return tuple(findings)

    def _namespace_on(self, network: NetworkId) -> Path | None:
        for sandbox in self._sandboxes():
            if any(one.network_id == network for one in sandbox.endpoints):
                return Path(sandbox.netns)
        return None

    async def _wrong(self, namespace: Path, network: NetworkNames) -> Told:
        """The names that are told otherwise than the store has them, and what is told."""
        names = [name for name in network.names if _is_name(name)]
        try:
            told = await asyncio.to_thread(inside, namespace, partial(_ask_all, names, network.network))
        except OSError as error:
            log.info("names cannot be asked for", network=network.network, reason=str(error))
            return {}  # the container has gone meanwhile
        return {name: told[name] for name in told if told[name] != _spelled(network.names[name])}


def finding_of(network: NetworkNames, wrong: Told) -> PathFinding:
    """All of a network's names count as lost if one is wrong."""
    sent = len(network.names)
    return PathFinding(
        check=PathCheck.NAMES,
        port=f"{PORT}/udp",
        sent=sent,
        lost=sent if wrong else 0,
        detail=_sentence(network, wrong)[:DETAIL_CHARACTERS_MAX] if wrong else "",
    )


def _sentence(network: NetworkNames, wrong: Told) -> str:
    name, told = next(iter(sorted(wrong.items())))
    here, there = ", ".join(told) or "no address", ", ".join(network.names[name])
    others = len(wrong) - 1
    more = f", and {others} more are wrong" if others > 1 else ", and one more is wrong" if others else ""
    return (
        f"on network {network.network}, {name} is {here} to containers here and {there} to the managers{more}"
    )


def _spelled(addresses: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(str(ip_address(one)) for one in addresses))


def _is_name(name: str) -> bool:
    try:
        encoded(name)
    except ValueError:
        return False
    return True


def _ask_all(names: Sequence[str], network: str) -> Told:
    """What the container's name server says, for as long as it answers.  Raises: OSError: there is no way to ask."""
    told: dict[str, tuple[str, ...]] = {}
    unanswered = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(ANSWER_S)
        asking.connect((ADDRESS, PORT))
        for name in names:
            answers = [_ask(asking, f"{name}.{network}", kind) for kind in (A, AAAA)]
            told[name] = tuple(sorted(address for answer in answers for address in answer or ()))
            unanswered += None in answers
            if unanswered >= UNANSWERED_MAX:
                break
    return told


def _ask(asking: socket.socket, name: str, kind: int) -> tuple[str, ...] | None:
    """None: no answer."""
    id = int.from_bytes(os.urandom(2), "big")
    question = question_of(name, kind)
    asking.send(asked(id, question))
    for data in _received(asking):
        if is_answer(data, id, question):
            return addresses_in(data, question)
    return None


def _received(asking: socket.socket) -> Iterator[bytes]:
    """What comes within the socket's time."""
    while True:
        try:
            yield asking.recv(UDP_BYTES_MAX)
        except OSError:  # its time is over, or nobody listens there
            return
