"""A simulated cluster that is upgraded: its API, and means that install at once."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from skep.api.client.client import ApiClient
from skep.api.client.requests import Filters, Requests
from skep.cli.maintain.upgrade_means import Means
from skep.cli.maintain.upgrade_plan import UpgradableNode
from skep.errors import NotFound, Unavailable


class UpgradedCluster(Requests):
    """Nodes with one version.  Tasks of its one service move at once from a drained node."""

    def __init__(self, *names: str, version: str, leader: str = "m1", replicas: int = 0) -> None:
        """``names``: node names, where managers start with m.  ``replicas``: replicas of the service, or 0 for no
        service.
        """
        self.nodes = {name: self._node(name, version, is_leader=name == leader) for name in names}
        self.swarm: dict[str, Any] = {"Version": {"Index": 1}, "Spec": {"Labels": {}}}
        self.freezes: dict[str, Any] = {}
        self._replicas = replicas
        self.level = 1
        """Level of the data."""
        self.supported = 1
        """Data level that the managers' version supports.  A new version supports one more."""

    @staticmethod
    def _node(name: str, version: str, *, is_leader: bool) -> dict[str, Any]:
        is_manager = name.startswith("m")
        manager = {"ManagerStatus": {"Leader": is_leader, "Reachability": "reachable"}}
        return {
            "ID": name,
            "Version": {"Index": 1},
            "Spec": {"Role": "manager" if is_manager else "worker", "Availability": "active"},
            "Description": {
                "Hostname": name,
                "Engine": {"EngineVersion": version, "Labels": {"skep.node": "1"}},
            },
            "Status": {"State": "ready", "Addr": "192.0.2.1"},
            **(manager if is_manager else {}),
        }

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        filters: Filters | None = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        match method, path.strip("/").split("/"):
            case "GET", ["nodes"]:
                return list(self.nodes.values())
            case "GET", ["nodes", name]:
                if name not in self.nodes:
                    raise NotFound(f"node {name} not found")
                return self.nodes[name]
            case "POST", ["nodes", name, "update"]:
                self.nodes[name]["Spec"] = body
            case "GET", ["skep", "cluster", "level"]:
                return {"Level": self.level, "Managers": dict.fromkeys(self.nodes, self.supported)}
            case "GET", ["skep", "cluster", "freezes"]:
                return self.freezes
            case "GET", ["info"]:
                return {"SystemTime": "2026-01-31T12:00:00Z"}
            case "GET", ["swarm"]:
                return self.swarm
            case "POST", ["swarm", "update"]:
                self.swarm["Spec"] = body
            case "GET", ["services"]:
                return self._services()
            case "GET", ["tasks"]:
                return self._tasks((filters or {}).get("node", []))
            case other:
                raise AssertionError(other)
        return None

    def _services(self) -> list[dict[str, Any]]:
        spec = {
            "Name": "web",
            "Mode": {"Replicated": {"Replicas": self._replicas}},
            "UpdateConfig": {"Parallelism": 1},
        }
        return [{"ID": "web", "Spec": spec}] if self._replicas else []

    def _tasks(self, nodes: Sequence[str]) -> list[dict[str, Any]]:
        active = [name for name, one in self.nodes.items() if one["Spec"]["Availability"] == "active"]
        homes = (active * self._replicas)[: self._replicas]
        return [
            {
                "ID": f"t{slot}",
                "ServiceID": "web",
                "Slot": slot,
                "NodeID": name,
                "DesiredState": "running",
                "Status": {"State": "running"},
            }
            for slot, name in enumerate(homes, 1)
            if not nodes or name in nodes
        ]

    def show(self, name: str, version: str, state: str = "ready") -> None:
        self.nodes[name]["Description"]["Engine"]["EngineVersion"] = version
        self.nodes[name]["Status"]["State"] = state

    @asynccontextmanager
    async def client(self) -> AsyncIterator[ApiClient]:
        """Return the client, as ``HostOptions`` does."""
        yield cast("ApiClient", self)


class Installing(Means, frozen=True, kw_only=True):
    """Installs at once.  ``breaks``: nodes that fail with it.  ``refuses``: nodes that ssh does not reach."""

    cluster: UpgradedCluster
    breaks: frozenset[str] = frozenset()
    refuses: frozenset[str] = frozenset()
    level: int = 1
    """Level of the data afterwards."""

    async def check(self, node: UpgradableNode) -> bool:
        if node.name in self.refuses:
            raise Unavailable("Host key verification failed.")
        return True

    async def upgrade(self, node: UpgradableNode) -> None:
        self.cluster.level = self.level
        self.cluster.show(node.name, self.version, "down" if node.name in self.breaks else "ready")

    async def roll_back(self, node: UpgradableNode) -> None:
        self.cluster.show(node.name, node.version)
