"""Serves a playground's published ports at an address of its machine, 127.0.0.1 unless another was chosen.

The nodes' addresses exist only in the playground's namespaces.  The machine itself would route packets for them to its
own network.  So a relay process listens there for each published TCP and UDP port, and connects to the nodes from
the switch's namespace.  It runs until the playground is removed, and reads the published ports from the managers once a
second.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from random import SystemRandom
from socket import AF_INET, SO_REUSEADDR, SOCK_DGRAM, SOCK_STREAM, SOL_SOCKET, socket
from typing import Any

import msgspec

from skep.aio.clock import Clock, SystemClock
from skep.api.client.client import ApiClient
from skep.dataplane.netns.kernel.namespaces import inside
from skep.dataplane.proxy.relays import RelayPort
from skep.dataplane.proxy.tcp import TcpRelay
from skep.dataplane.proxy.udp import UdpRelay
from skep.errors import SkepError, Unavailable
from skep.linux.processes import start_ticks_of
from skep.playground import names, node
from skep.playground.commands import wait_until
from skep.playground.description import DescriptionFile, PlaygroundDescription
from skep.playground.tls import PORT as API_PORT
from skep.playground.underlay import NETNS_ROOT

LOOPBACK = "127.0.0.1"
_LOOK_S = 1.0
"""Seconds between two reads of the published ports."""
_ASK_S = 2.0
"""Time limit in seconds for one request to a manager."""
_READY_WITHIN_S = 20
"""Time limit in seconds until the relay serves."""
_PORTS_MAX = 256
"""Limit for the published ports that are relayed."""

PROTOCOLS = ("tcp", "udp")
"""Relayed protocols.  SCTP is only served by the nodes."""

Port = tuple[int, str]
"""A published port: number and protocol."""

Targets = Mapping[Port, tuple[tuple[str, int], ...]]
"""For each published port, the address and port of each node that serves it."""


class RelayState(msgspec.Struct, frozen=True, kw_only=True):
    """Content of ``DIR/relay.json``: the relay process, and its local port for each published TCP and UDP port."""

    pid: int
    started: int
    ports: Mapping[int, int] = {}
    udp: Mapping[int, int] = {}


def state_file(directory: Path) -> Path:
    """Return the file with the relay's ``RelayState`` as JSON."""
    return directory / "relay.json"


def read_state(directory: Path) -> RelayState | None:
    """Return the relay's state, or None without a relay or with an unreadable state."""
    try:
        return msgspec.json.decode(state_file(directory).read_bytes(), type=RelayState)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


async def start(directory: Path, address: str) -> None:
    """Start the relay at an ``address`` of this machine.  Return once it serves the playground.

    Raises: Unavailable: it ended at once.
    """
    process = _spawn(directory, address)

    async def has_begun() -> bool:
        if process.poll() is not None:
            raise Unavailable(f"the relay of the playground ended at once: see {directory / 'relay.log'}")
        return state_file(directory).exists()

    await wait_until(has_begun, "the relay of the playground begins", _READY_WITHIN_S)


def _spawn(directory: Path, address: str) -> "subprocess.Popen[bytes]":
    with (directory / "relay.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "skep.playground.relay", str(directory), address],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


async def wait_served(directory: Path, port: int) -> int:
    """Return the local port that serves the published TCP ``port``.  Raises: Unavailable: it is not served."""

    async def is_served() -> bool:
        state = read_state(directory)
        return state is not None and port in state.ports

    await wait_until(is_served, f"port {port} is relayed to this machine", _READY_WITHIN_S)
    state = read_state(directory)
    assert state is not None, "it was there a moment ago"
    return state.ports[port]


def targets(
    cluster: PlaygroundDescription,
    nodes: Sequence[Mapping[str, Any]],
    services: Sequence[Mapping[str, Any]],
    tasks: Sequence[Mapping[str, Any]],
) -> Targets:
    """Return the nodes that serve each published port: all nodes in ingress mode, the nodes of its tasks in host
    mode.
    """
    alive = {known.name: known.addr for known in cluster.nodes if node.is_up(known)}
    hostnames = {one["ID"]: one["Description"].get("Hostname", "") for one in nodes}
    found: dict[Port, set[tuple[str, int]]] = {}
    for service in services:
        for port in (service.get("Endpoint") or {}).get("Ports") or ():
            number, protocol = port.get("PublishedPort", 0), port.get("Protocol", "tcp")
            if protocol in PROTOCOLS and port.get("PublishMode") == "ingress" and number:
                found.setdefault((number, protocol), set()).update((addr, number) for addr in alive.values())
    if cluster.tls:
        managers = {known.addr for known in cluster.nodes if known.role == "manager" and node.is_up(known)}
        found[API_PORT, "tcp"] = {(addr, API_PORT) for addr in managers}
    for task in tasks:
        if task["Status"]["State"] != "running":
            continue
        addr = alive.get(hostnames.get(task.get("NodeID", ""), ""))
        for port in (task["Status"].get("PortStatus") or {}).get("Ports") or ():
            number, protocol = port.get("PublishedPort", 0), port.get("Protocol", "tcp")
            if addr is not None and protocol in PROTOCOLS and number:
                found.setdefault((number, protocol), set()).add((addr, number))
    return {port: tuple(sorted(found[port])) for port in sorted(found)[:_PORTS_MAX]}


def relay_port(published: Port, backends: tuple[tuple[str, int], ...], address: str = LOOPBACK) -> RelayPort:
    """Return the object that relays one published port from ``address``."""
    number, protocol = published
    return RelayPort(
        protocol=protocol,
        address=address,
        port=number,
        backends=backends,
        # All connections of one client use the same node: docker sends the requests of one command, such as docker
        # exec, on several connections, and only the container's own node knows the container and the exec.
        is_sticky=published == (API_PORT, "tcp"),
    )


class PortRelay:
    """The relay process of one playground."""

    def __init__(self, directory: Path, address: str, clock: Clock) -> None:
        self._file = DescriptionFile(directory)
        self._directory, self._address = directory, address
        self._clock = clock
        self._random = SystemRandom()
        self._relays: dict[Port, TcpRelay | UdpRelay] = {}
        self._ports: dict[Port, int] = {}

    async def run(self) -> None:
        """Serve until the playground is removed."""
        self._write()
        while (cluster := self._file.read()) is not None:
            try:
                await self._settle(cluster, await _ask(cluster))
            except SkepError as error:
                # Keep serving the known ports, because without a manager they do not change.
                print(f"no manager answers: {error}", file=sys.stderr)
            await self._clock.sleep(_LOOK_S)

    async def _settle(self, cluster: PlaygroundDescription, wanted: Targets) -> None:
        switch = NETNS_ROOT / names.namespace(cluster.name, names.SWITCH)
        before = dict(self._ports)
        for published in self._relays.keys() - wanted.keys():
            self._relays.pop(published).close(ends_connections=True)
            del self._ports[published]
        for published, backends in wanted.items():
            port = relay_port(published, backends, self._address)
            if (relay := self._relays.get(published)) is not None:
                relay.update(port)
                continue
            listener = _listener(self._address, published)
            self._ports[published] = listener.getsockname()[1]
            if port.protocol == "udp":
                self._relays[published] = UdpRelay(
                    port, listener, self._clock, self._random.random, partial(inside, switch)
                )
            else:
                relay = TcpRelay(port, self._random.random, partial(inside, switch))
                await relay.open(listener)
                self._relays[published] = relay
        if before != self._ports:
            self._write()

    def _write(self) -> None:
        pid = os.getpid()
        tcp, udp = (
            {number: local for (number, used), local in self._ports.items() if used == protocol}
            for protocol in PROTOCOLS
        )
        state = RelayState(pid=pid, started=start_ticks_of(pid) or 0, ports=tcp, udp=udp)
        temporary = state_file(self._directory).with_suffix(".json.new")
        temporary.write_bytes(msgspec.json.encode(state))
        temporary.replace(state_file(self._directory))


async def _ask(cluster: PlaygroundDescription) -> Targets:
    """Return the published ports.  Raises: Unavailable: no manager responds."""
    error_before: SkepError = Unavailable("there is none")
    for known in cluster.nodes:
        if known.role != "manager" or not node.is_up(known):
            continue
        try:
            async with ApiClient.at(known.endpoint) as client:
                nodes, services, tasks = [
                    await client.get(path, timeout_s=_ASK_S, headers={"X-Skep-Stale": "1"})
                    for path in ("/nodes", "/services", "/tasks")
                ]
            return targets(cluster, nodes, services, tasks)
        except SkepError as error:
            error_before = error
    raise Unavailable(str(error_before))


def _listener(address: str, published: Port) -> socket:
    """Listen on ``address`` at the same port number, or at any free port if that is taken or not permitted."""
    number, protocol = published
    for port in (number, 0):
        listener = socket(AF_INET, SOCK_STREAM if protocol == "tcp" else SOCK_DGRAM)
        if protocol == "tcp":  # otherwise two UDP sockets could share one port
            listener.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
        except OSError:
            listener.close()
            continue
        listener.setblocking(False)
        return listener
    raise Unavailable(f"no port of {address} is free")


if __name__ == "__main__":
    asyncio.run(PortRelay(Path(sys.argv[1]), sys.argv[2], SystemClock()).run())
