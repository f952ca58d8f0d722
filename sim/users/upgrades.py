"""Upgrades of all workers, concurrent with all other requests of users.

Each upgrade is the production command.  It may be killed or suspended between any two requests, lose responses, wait
for a node that does not return, and be continued by another command.

Some of them are system upgrades, which reboot machines (``reboots``).

Rules: one upgrade has the lock, only one node is upgraded at a time, and an upgrade that has succeeded leaves no ready
worker on another version.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from random import Random
from typing import Any, cast

import msgspec

from sim.cluster import SimulatedCluster
from sim.invariants.acknowledgements import Acknowledgements
from sim.trace import COMMAND
from sim.users.client_runs import SimulatedMeans, run_upgrade, show_version
from sim.users.clients import ApiClient, Apis, Host
from sim.users.reboots import Boots, SimulatedReboots
from sim.users.reference import SetNode, Update
from sim.users.responses import ResponseCheck
from sim.world.committed import Change
from skep.api.formats.service_form import settled
from skep.cli.endpoint import HostOptions
from skep.cli.maintain import maintenance
from skep.cli.maintain.upgrade import abort
from skep.cli.maintain.upgrade_plan import UpgradableNode
from skep.errors import SkepError, Unavailable
from skep.manager.control.nodes import NodeUpdateBody, node_spec
from skep.manager.control.services import with_network_ids
from skep.model.networks.data_planes import NODE_LABEL
from skep.model.node import Node, NodeRole, NodeState
from skep.model.options.labels import MAINTENANCE
from skep.model.service import ServiceSpec
from skep.model.swarm import Swarm
from skep.model.values.ids import NodeId, ServiceId
from skep.store.interface import Created, Deleted, Updated, View

WITHIN_S = 20.0
AT_ONCE = 2
"""Number of commands that may run at the same time."""
KILLED_BY = 60
"""Largest number of the request at which a command is killed or suspended.  The upgrade of a node takes some 30
requests.
"""
PAUSE_S = 20.0
SYSTEM = 0.4
"""Share of the upgrades that reboot machines."""
LOST = 0.1
"""Probability that a machine does not return from its reboot in time."""
RETRY_S = 1.0


class Upgrades:
    """The upgrades of one cluster."""

    def __init__(
        self,
        cluster: SimulatedCluster,
        random: Random,
        responses: ResponseCheck,
        acknowledgements: Acknowledgements,
    ) -> None:
        self._responses = responses
        self._acknowledgements = acknowledgements
        self._eligible: dict[NodeId, float] = {}
        """Time since which nodes have been ready and have shown a version."""
        cluster.committed.watchers.append(self._watch)
        self._cluster = cluster
        self._random = random
        self._apis = Apis(cluster)
        self._running: dict[asyncio.Task[None], ApiClient] = {}
        self._numbers = 1
        self._installing: set[str] = set()
        """Nodes that are being upgraded."""
        self._contested: set[str] = set()
        """Nodes that an upgrade took over while another one still installed there: either may end last."""
        self._boots = Boots(cluster)
        for id in cluster.nodes:
            show_version(cluster, id, "1")
            self._boots.start(id)

    def act(self) -> None:
        """Begin an upgrade, or continue an interrupted one.  Half of the time, begin two."""
        for _ in range(self._random.randint(1, AT_ONCE)):
            self._begin()

    def _begin(self) -> None:
        live = [client for task, client in self._running.items() if not task.done() and not client.is_killed]
        if len(live) >= AT_ONCE:
            return
        if not live:
            self._numbers += 1
        version, name = str(self._numbers), f"upgrade {len(self._running)} to {self._numbers}"
        broken = [id for id in self._cluster.workers if self._random.random() < 0.1]
        client = self._client(name)
        client.disturb(self._random, KILLED_BY, PAUSE_S)
        self._cluster.trace.add(f"user: {name}")
        task = self._cluster.loop.create_task(self._carry_out(client, name, version, broken), name=name)
        self._running[task] = client

    async def end(self) -> None:
        """End all upgrades, and abort an interrupted upgrade, with retries."""
        for task, client in self._running.items():
            client.is_killed = True
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
        COMMAND.set("abort")
        host = cast("HostOptions", Host(self._client("abort")))
        while any(MAINTENANCE in one.spec.labels for one in self._cluster.view.find(Swarm)):
            with suppress(SkepError):
                await abort(host)
            await asyncio.sleep(RETRY_S)

    async def _carry_out(self, client: ApiClient, name: str, version: str, broken: Iterable[NodeId]) -> None:
        COMMAND.set(name)
        began = self._cluster.loop.time()
        random = Random(f"{name} at {began}")
        is_system = random.random() < SYSTEM
        try:
            if is_system:
                await self._run_reboots(client, name, random)
            else:
                await self._run(client, name, version, broken)
        except (SkepError, TimeoutError) as error:
            self._cluster.trace.add(f"user: {name}: {error}")
        else:
            self._cluster.trace.add(f"user: {name} is done")
            if not is_system:
                self._note(self._left_behind(version, began))

    async def _run(self, client: ApiClient, name: str, version: str, broken: Iterable[NodeId]) -> None:
        """Run ``skep upgrade --continue``."""
        means = _CheckedMeans(
            version=version,
            command="true",
            rollback="true",
            cluster=self._cluster,
            broken=frozenset(broken),
            installing=self._installing,
            contested=self._contested,
            note=self._note,
        )
        await run_upgrade(client, name, means, within_s=WITHIN_S, continues=True)

    async def _run_reboots(self, client: ApiClient, name: str, random: Random) -> None:
        """Run ``skep upgrade --system --continue`` after some machines need a reboot."""
        workers = [id for id in self._cluster.workers if id in self._cluster.nodes]
        self._boots.require(random.sample(workers, random.randint(0, len(workers))))
        means = _CheckedReboots(
            command="true",
            boots=self._boots,
            lost=frozenset(id for id in workers if random.random() < LOST),
            installing=self._installing,
            note=self._note,
        )
        await run_upgrade(client, name, means, within_s=WITHIN_S, continues=True)

    def _left_behind(self, version: str, began: float) -> Iterable[str]:
        """Yield the workers that were not upgraded although that was possible all the time.

        A manager that cannot read a node's status shows the node as not ready, and the upgrade skips it by name.
        """
        unreadable = self._cluster.unreadable_nodes()
        for id, since in self._eligible.items():
            if id in unreadable or id in self._contested:
                continue
            node = self._cluster.view.get(Node, id)
            shown = node.description.engine.engine_version
            if since < began and shown != version and node.spec.role is NodeRole.WORKER:
                yield f"the upgrade to {version} has succeeded, and {id} has {shown}"

    def _watch(self, change: Change, _: View) -> None:
        for event in change.events:
            match event:
                case Updated(Node() as old, Node() as node) if (
                    old.spec.availability is not node.spec.availability
                ):
                    self._boots.changes[node.id] += 1
            match event:
                case Created(Node() as node) | Updated(_, Node() as node):
                    if node.status.state is NodeState.READY and NODE_LABEL in node.description.engine.labels:
                        self._eligible.setdefault(node.id, change.time_s)
                    else:
                        self._eligible.pop(node.id, None)
                case Deleted(Node() as node):
                    self._eligible.pop(node.id, None)
                case Updated(_, Swarm() as swarm):
                    holders = maintenance.read(swarm.spec.labels.get(MAINTENANCE, ""))
                    upgrades = [one.by for one in holders if one.is_upgrade]
                    if len(upgrades) > 1:
                        self._note([f"{upgrades} have the lock of upgrades"])

    def _client(self, name: str) -> ApiClient:
        return _RecordedClient(self._apis, name, self._record)

    def _record(self, kind: str, id: str, version: int, body: Any) -> None:
        if kind == "nodes":
            spec = node_spec(msgspec.convert(body, NodeUpdateBody))
            self._responses.requested(SetNode(NodeId(id), spec, version), self._responses.present)
            return
        view = self._cluster.view
        forced = settled(with_network_ids(view, msgspec.convert(body, ServiceSpec)))
        self._acknowledgements.requested(ServiceId(id), forced)
        self._responses.requested(Update(ServiceId(id), forced, version), self._responses.present)

    def _note(self, violations: Iterable[str]) -> None:
        self._cluster.observer.note(self._cluster.loop.time(), violations)


class _RecordedClient(ApiClient):
    """A client whose updates are recorded as requests, like users' updates."""

    def __init__(self, apis: Apis, name: str, record: Callable[[str, str, int, Any], None]) -> None:
        super().__init__(apis, name)
        self._record = record

    async def request(self, method: str, path: str, **options: Any) -> Any:
        """See ``Requests``."""
        kind, _, rest = path.removeprefix("/").partition("/")
        if method == "POST" and kind in ("nodes", "services"):
            self._record(kind, rest.partition("/")[0], int(options["query"]["version"]), options["body"])
        return await super().request(method, path, **options)


class _CheckedMeans(SimulatedMeans, frozen=True, kw_only=True):
    """Checks on each upgrade that no other node is being upgraded."""

    installing: set[str]
    contested: set[str]
    note: Callable[[Iterable[str]], None]

    async def upgrade(self, node: UpgradableNode) -> None:
        """See ``Means``."""
        await self._alone(node, super().upgrade)

    async def roll_back(self, node: UpgradableNode) -> None:
        """See ``Means``."""
        await self._alone(node, super().roll_back)

    async def _alone(
        self, node: UpgradableNode, install: Callable[[UpgradableNode], Awaitable[None]]
    ) -> None:
        if others := self.installing - {node.id}:
            self.note([f"{node.id} is upgraded while {sorted(others)} is"])
        if node.id not in self.cluster.nodes:
            raise Unavailable(f"{node.id} is gone")
        if node.id in self.installing:
            self.contested.add(node.id)
        self.installing.add(node.id)
        try:
            await install(node)
        finally:
            self.installing.discard(node.id)


class _CheckedReboots(SimulatedReboots, frozen=True, kw_only=True):
    """Checks on each reboot that no other node is being upgraded."""

    installing: set[str]

    async def upgrade(self, node: UpgradableNode) -> None:
        """See ``Means``."""
        if others := self.installing - {node.id}:
            self.note([f"{node.id} reboots while {sorted(others)} is upgraded"])
        self.installing.add(node.id)
        try:
            await super().upgrade(node)
        finally:
            self.installing.discard(node.id)
