"""Machines of one system, alike in all but their daemon; three managers and two workers if nothing else is said.

Both systems live in a playground: the same namespaces, the same network, the same way to take a machine's power or
cable.  A machine of Docker's runs the distribution's dockerd with its default configuration.
"""

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from bench.engine import Engine, EngineError
from bench.machine import daemons, memory_mib
from skep.playground.description import Node
from skep.playground.playground import Playground

MANAGERS, WORKERS = 3, 2
PORT = 2377
RESPONSE_S = 3.0
"""Patience with one request: without a leader dockerd does not refuse a write, it holds it."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
System = Literal["docker", "skep"]


class ClusterLab:
    """The machines of one system; ``up`` makes them, ``init`` and ``join`` a cluster of them."""

    def __init__(
        self, system: System, directory: Path, managers: int = MANAGERS, workers: int = WORKERS
    ) -> None:
        self.system = system
        self._size = managers, workers
        self._playground = Playground(directory, f"{system}of{managers + workers}", lambda _: None)
        self.image = ""

    def up(self) -> None:
        """Machines that are in no swarm yet, with the image on each."""
        self.down()
        managers, workers = self._size
        kinds: list[Any] = [("manager", self.system)] * managers + [("worker", self.system)] * workers
        self.image = asyncio.run(self._playground.plug_in(kinds)).image

    def down(self) -> None:
        """Remove everything, however far ``up`` came."""
        asyncio.run(self._playground.down())

    # -- the swarm -------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self._playground.cluster().nodes

    @property
    def managers(self) -> list[Node]:
        return [node for node in self.nodes if node.role == "manager"]

    @property
    def workers(self) -> list[Node]:
        return [node for node in self.nodes if node.role == "worker"]

    def init(self) -> None:
        first = self.nodes[0]
        requested = {"ListenAddr": f"0.0.0.0:{PORT}", "AdvertiseAddr": first.addr}
        engine(first).post("/swarm/init", requested)

    def join(self, node: Node) -> None:
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
        """One cluster of all machines; returns when all are ready."""
        self.init()
        for node in self.nodes[1:]:
            self.join(node)
        first = self.nodes[0]
        until(lambda: self.ready(first) == len(self.nodes), "all nodes are ready")

    def ids(self) -> dict[str, str]:
        """Name of a machine -> its node id."""
        return {node.name: engine(node).get("/info")["Swarm"]["NodeID"] for node in self.nodes}

    def ready(self, through: Node) -> int:
        """Nodes that are ready; of managers, also reachable."""
        known = engine(through).get("/nodes")
        return sum(
            one["Status"]["State"] == "ready"
            and (one.get("ManagerStatus") or {}).get("Reachability", "reachable") == "reachable"
            for one in known
        )

    def leader(self) -> Node:
        """Raises: LookupError: there is no leader."""
        by_id = {id: name for name, id in self.ids().items()}
        for one in engine(self.nodes[0]).get("/nodes"):
            if (one.get("ManagerStatus") or {}).get("Leader"):
                return next(node for node in self.nodes if node.name == by_id[one["ID"]])
        raise LookupError(f"{self.system}: no leader")

    # -- what is taken from a machine, and given back --------------------------------------------------------------

    def kill(self, node: Node) -> None:
        """SIGKILL of all its processes at once."""
        asyncio.run(self._playground.kill(node.name))

    def start(self, node: Node) -> None:
        asyncio.run(self._playground.start(node.name))

    def cable(self, node: Node, *, connected: bool) -> None:
        asyncio.run(self._playground.mend(node.name) if connected else self._playground.cut(node.name))

    # -- what it costs ---------------------------------------------------------------------------------------------

    def version(self) -> str:
        response: dict[str, Any] = engine(self.nodes[0]).get("/version")
        return f"{self.system} {response['Version']}"

    def memory_mib(self, node: Node) -> float:
        """PSS of the machine's daemons."""
        return memory_mib(Path(node.netns), list(node.pids))["daemons"]

    def processor_s(self, node: Node) -> float:
        """Processor time of the machine's daemons until now, children that have ended included."""
        ticks = 0
        for pid in daemons(Path(node.netns), list(node.pids)):
            with suppress(OSError):  # it has just ended
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(int(word) for word in fields[11:15])
        return ticks / _TICKS_PER_S


def engine(node: Node, timeout_s: float = 60.0) -> Engine:
    """A connection of its own to the machine's API."""
    return Engine(Path(node.endpoint.removeprefix("unix://")), timeout_s)


def answered(ask: Callable[[], Any], otherwise: Any) -> Any:
    """What ``ask`` gives, or ``otherwise`` while the cluster cannot answer."""
    try:
        return ask()
    except (OSError, EngineError, LookupError):
        return otherwise


def until(condition: Callable[[], bool], what: str, timeout_s: float = 120.0, poll_s: float = 0.02) -> None:
    """Wait.  Raises TimeoutError with ``what`` was waited for."""
    deadline = time.monotonic() + timeout_s
    while not answered(condition, otherwise=False):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(poll_s)
