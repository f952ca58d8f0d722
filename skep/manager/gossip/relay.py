"""Port 7946 of a manager: relays the first gossip contact of Docker nodes.

An engine looks for gossip members only at the managers' addresses.  In a Docker swarm, managers are engines and respond
there.  Skep's managers are not engines.  So while Docker nodes exist, every manager relays connections at this port to
another Docker node.  It passes on encrypted bytes without decrypting them.  After the first contact, engines gossip
directly.  They continue to contact the managers' addresses every 60 s, because no gossip member has those addresses,
and this also reconnects gossip after a partition.  UDP is not needed.

Only addresses of Docker nodes are served, few at a time, each for a bounded time and number of bytes.

Source: moby, libnetwork/networkdb/cluster.go (rejoinClusterBootStrap).
"""

import asyncio
from collections import Counter
from collections.abc import Iterable
from contextlib import closing, suppress
from random import Random

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.manager.control_loops.informer import run_informer
from skep.model.networks.data_planes import is_docker_node
from skep.model.networks.reserved_ports import GOSSIP_PORT
from skep.model.node import Node, NodeState
from skep.store.interface import Commit, Created, Deleted, Store, Updated, View

log = structlog.get_logger(__name__)

CONNECTIONS_MAX = 64
"""Largest number of simultaneous connections."""
CONNECTIONS_PER_NODE_MAX = 4
"""Largest number of simultaneous connections of one caller."""
CONNECT_S_MAX = 5.0
"""Seconds to connect to the other Docker node."""
RELAY_S_MAX = 30.0
"""Longest duration of a relayed connection in seconds.  A complete exchange between two engines takes a fraction of a
second.
"""
RELAY_BYTES_MAX = 16 * 1024 * 1024
"""Largest number of bytes in each direction.  A thousand nodes with ten thousand tasks need a tenth of it."""
_PIECE = 16 * 1024
"""Bytes that are read at a time.  They bound the memory of a relayed connection."""


class GossipRelay:
    """Relays gossip between Docker nodes.  Runs on every manager."""

    def __init__(
        self, store: Store, host: str, clock: Clock, random: Random, port: int = GOSSIP_PORT
    ) -> None:
        """``host`` is the address on which the manager listens."""
        self._store = store
        self._host = host
        self._port = port
        self._clock = clock
        self._random = random
        self._nodes: dict[str, Node] = {}
        self._changed = asyncio.Event()
        self._open: Counter[str] = Counter()

    async def run(self) -> None:
        """Listen while Docker nodes exist, until cancelled."""
        await run_informer(
            self._store, (Node,), on_snapshot=self._on_snapshot, on_commit=self._on_commit, work=self._work
        )

    def _on_snapshot(self, view: View) -> None:
        self._nodes = {node.id: node for node in view.find(Node) if is_docker_node(node)}
        self._changed.set()

    def _on_commit(self, commit: Commit) -> None:
        for event in commit.events:
            match event:
                case Created(Node() as node) | Updated(_, Node() as node) if is_docker_node(node):
                    self._nodes[node.id] = node
                case Updated(_, Node() as node) | Deleted(Node() as node):
                    self._nodes.pop(node.id, None)
        self._changed.set()

    async def _work(self) -> None:
        backoff = Backoff(1.0, 60.0, rng=self._random.random)
        while True:
            await self._wait(has_docker_nodes=True)
            try:
                server = await asyncio.start_server(self._relay, self._host, self._port, limit=_PIECE)
            except OSError as error:
                # An engine on this machine may use the port itself. It then responds instead.
                log.warning(
                    "gossip port not available, will retry",
                    port=self._port,
                    reason=error.strerror or str(error),
                )
                await backoff.sleep(self._clock)
                continue
            backoff.reset()
            log.info("relaying gossip", port=self._port)
            with closing(server):  # relayed connections continue until they end
                await self._wait(has_docker_nodes=False)

    async def _wait(self, *, has_docker_nodes: bool) -> None:
        while bool(self._nodes) is not has_docker_nodes:
            self._changed.clear()
            await self._changed.wait()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay one connection from the Docker node that opened it to another Docker node."""
        caller = str(writer.get_extra_info("peername")[0])
        is_refused = self._open.total() >= CONNECTIONS_MAX or self._open[caller] >= CONNECTIONS_PER_NODE_MAX
        targets = peers_of(caller, self._nodes.values())
        self._open[caller] += 1
        try:
            if targets and not is_refused:
                await self._join(reader, writer, self._random.choice(targets))
        finally:
            self._open[caller] -= 1
            self._open += Counter()  # drops the counts of zero
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: str) -> None:
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                there, back = await asyncio.open_connection(target, self._port, limit=_PIECE)
        except (OSError, TimeoutError) as error:
            log.info("gossip target not reached", target=target, reason=str(error))
            return
        try:
            async with asyncio.timeout(RELAY_S_MAX), asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, back), name="gossip there")
                group.create_task(_pump(there, writer), name="gossip back")
        except TimeoutError:
            log.info("gossip connection closed: time limit", target=target)
        finally:
            back.close()
            with suppress(OSError):
                await back.wait_closed()


def peers_of(caller: str, nodes: Iterable[Node]) -> list[str]:
    """Return the addresses of ready Docker nodes that ``caller`` may be relayed to, sorted.

    Empty if the caller is not a Docker node.
    """
    nodes = list(nodes)
    if caller not in {node.status.addr for node in nodes}:
        return []
    ready = {node.status.addr for node in nodes if node.status.state is NodeState.READY}
    return sorted(ready - {caller, ""})


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Copy bytes until the end, at most ``RELAY_BYTES_MAX``.  A lost peer counts as the end."""
    passed = 0
    with suppress(OSError):
        while passed < RELAY_BYTES_MAX and (data := await source.read(_PIECE)):
            passed += len(data)
            target.write(data)
            await target.drain()
        if target.can_write_eof():
            target.write_eof()
