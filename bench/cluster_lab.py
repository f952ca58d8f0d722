"""Machines of one system that differ only in their daemon, by default three managers and two workers.

Both systems use a playground: the same namespaces, the same network, the same way to cut a machine's power or cable.
Docker's machines run the distribution's dockerd with its default configuration.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from bench.engine import Engine, EngineError
from bench.machine import daemons, memory_mib, thread_use
from skep.playground.description import PlaygroundNode
from skep.playground.playground import Playground

MANAGERS, WORKERS = 3, 2
PORT = 2377
RESPONSE_S = 3.0
"""Time limit in seconds for one request.  Without a leader, dockerd does not refuse a write but keeps it waiting."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
System = Literal["docker", "skep"]


class ClusterLab:
    """The machines of one system.  ``up`` creates them, and ``init`` and ``join`` make them a cluster."""

    def __init__(
        self, system: System, directory: Path, managers: int = MANAGERS, workers: int = WORKERS
    ) -> None:
        self.system = system
        self._size = managers, workers
        self._playground = Playground(directory, f"{system}of{managers + workers}", lambda _: None)
        self.image = ""

    def up(self) -> None:
        """Create machines outside of a swarm, with the image on each."""
        self.down()
        managers, workers = self._size
        kinds: list[Any] = [("manager", self.system)] * managers + [("worker", self.system)] * workers
        self.image = asyncio.run(self._playground.plug_in(kinds)).image

    def down(self) -> None:
        """Remove everything, even if ``up`` has failed halfway."""
        asyncio.run(self._playground.down())

    # -- the swarm -------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> tuple[PlaygroundNode, ...]:
        return self._playground.cluster().nodes

    @property
    def managers(self) -> list[PlaygroundNode]:
        return [node for node in self.nodes if node.role == "manager"]

    @property
    def workers(self) -> list[PlaygroundNode]:
        return [node for node in self.nodes if node.role == "worker"]

    def init(self) -> None:
        first = self.nodes[0]
        requested = {"ListenAddr": f"0.0.0.0:{PORT}", "AdvertiseAddr": first.addr}
        engine(first).post("/swarm/init", requested)

    def join(self, node: PlaygroundNode) -> None:
        first = self.nodes[0]
        token = engine(first).get("/swarm")["JoinTokens"][node.role.capitalize()]
        requested = {
            "ListenAddr": f"0.0.0.0:{PORT}",
            "AdvertiseAddr": node.addr,
            "RemoteAddrs": [f"{first.addr}:{PORT}"],
            "JoinToken": token,
        }
        engine(node).post("/swarm/join", requested)

    def form(self) -> None:
        """Form one cluster of all machines, and return when all are ready."""
        self.init()
        for node in self.nodes[1:]:
            self.join(node)
        first = self.nodes[0]
        until(lambda: self.ready(first) == len(self.nodes), "all nodes are ready")

    def ids(self) -> dict[str, str]:
        """Return node ids by machine name."""
        return {node.name: engine(node).get("/info")["Swarm"]["NodeID"] for node in self.nodes}

    def ready(self, through: PlaygroundNode) -> int:
        """Return the number of ready nodes.  Managers must also be reachable."""
        known = engine(through).get("/nodes")
        return sum(
            one["Status"]["State"] == "ready"
            and (one.get("ManagerStatus") or {}).get("Reachability", "reachable") == "reachable"
            for one in known
        )

    def leader(self) -> PlaygroundNode:
        """Return the leader.  Raises: LookupError: there is no leader."""
        by_id = {id: name for name, id in self.ids().items()}
        for one in engine(self.nodes[0]).get("/nodes"):
            if (one.get("ManagerStatus") or {}).get("Leader"):
                return next(node for node in self.nodes if node.name == by_id[one["ID"]])
        raise LookupError(f"{self.system}: no leader")

    # -- faults and their end --------------------------------------------------------------------------------------

    def kill(self, node: PlaygroundNode) -> None:
        """Kill all processes of a machine at once with SIGKILL."""
        asyncio.run(self._playground.kill(node.name))

    def start(self, node: PlaygroundNode) -> None:
        asyncio.run(self._playground.start(node.name))

    def cable(self, node: PlaygroundNode, *, connected: bool) -> None:
        asyncio.run(self._playground.reconnect(node.name) if connected else self._playground.cut(node.name))

    def give_processors(self, nodes: Sequence[PlaygroundNode]) -> None:
        """Let each of these machines use one processor of its own, as far as there are enough, and their children."""
        for processor, node in zip(sorted(os.sched_getaffinity(0)), nodes, strict=False):
            for pid in daemons(Path(node.netns), list(node.pids)):
                with suppress(OSError):  # it has just ended
                    for thread in os.listdir(f"/proc/{pid}/task"):
                        os.sched_setaffinity(int(thread), {processor})

    # -- costs -----------------------------------------------------------------------------------------------------

    def version(self) -> str:
        response: dict[str, Any] = engine(self.nodes[0]).get("/version")
        return f"{self.system} {response['Version']}"

    def memory_mib(self, node: PlaygroundNode) -> float:
        """Return the memory (PSS) of the machine's daemons in MiB."""
        return memory_mib(Path(node.netns), list(node.pids))["daemons"]

    def processor_s(self, node: PlaygroundNode) -> float:
        """Return the processor time of the machine's daemons until now, including children that have ended."""
        own_s, ticks = 0.0, 0
        for pid in daemons(Path(node.netns), list(node.pids)):
            with suppress(OSError):  # it has just ended
                own_s += thread_use(pid)[0]
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(int(word) for word in fields[13:15])
        return own_s + ticks / _TICKS_PER_S


def engine(node: PlaygroundNode, timeout_s: float = 60.0) -> Engine:
    """Open a separate connection to the machine's API."""
    return Engine(Path(node.endpoint.removeprefix("unix://")), timeout_s)


def answered(ask: Callable[[], Any], otherwise: Any) -> Any:
    """Return the result of ``ask``, or ``otherwise`` while the cluster cannot respond."""
    try:
        return ask()
    except (OSError, EngineError, LookupError):
        return otherwise


def until(condition: Callable[[], bool], what: str, timeout_s: float = 120.0, poll_s: float = 0.02) -> None:
    """Wait for ``condition``.  Raises: TimeoutError: with ``what`` in its message."""
    deadline = time.monotonic() + timeout_s
    while not answered(condition, otherwise=False):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(poll_s)
