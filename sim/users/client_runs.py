"""Commands of people and pipelines in a simulated cluster: concurrent deploys, rollbacks and rotations.

Each command is the production coroutine on the production API (``clients``).  A command can be killed or suspended
between any two requests, and responses can be lost.  The control loops, including the autoscaler, keep running.

Rules that hold in every run:

* an object that existed before stays, unless a command was asked to remove it;
* the autoscaler sets the number of tasks of an autoscaled service, also during a deploy;
* services of an acknowledged command exist, with all objects they refer to.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator
from typing import Any

from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.trace import COMMAND
from sim.users.clients import ApiClient, Apis
from sim.world.committed import Change
from sim.world.images import BROKEN
from skep.cli.apps.rotation import FileKind, _Rotation
from skep.cli.maintain.upgrade import _Upgrade
from skep.cli.maintain.upgrade_means import Means
from skep.cli.maintain.upgrade_plan import UpgradableNode
from skep.errors import FailedPrecondition, SkepError, Unavailable
from skep.manager.control.tasks import is_up_to_date
from skep.model.network import Network
from skep.model.networks.data_planes import NODE_LABEL
from skep.model.options.autoscaling import AUTOSCALE
from skep.model.options.schedules import CRON
from skep.model.secret import Config, Secret
from skep.model.service import Service
from skep.model.task import TaskState
from skep.model.values.ids import NodeId
from skep.model.values.stacks import STACK_LABEL
from skep.stack.claims import Replaced
from skep.stack.cluster_state import config_names, existing_of
from skep.stack.created import CreatedObjects
from skep.stack.planning import plan_of
from skep.stack.project import Stack
from skep.stack.recording import carry_out, undo
from skep.store.interface import Deleted, Updated, View

KILLED_BY = 40
"""Largest number of the request at which a command is killed or suspended."""
PAUSE_S = 4.0
"""Longest suspension in seconds.  It is longer than the leader needs to act on the command's writes."""
_KINDS: tuple[type[Any], ...] = (Service, Secret, Config, Network)


class Rules:
    """Checks the rules at every commit, and records which deploys were acknowledged."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self.violations: list[str] = []
        self._cluster = cluster
        self._before = {(kind, one.id) for kind in _KINDS for one in cluster.view.find(kind)}
        """Objects that existed before the commands began."""
        self._acknowledged: set[str] = set()
        """Names of the services of successful deploys."""
        cluster.committed.watchers.append(self._check)

    def acknowledge(self, stack: Stack, *, is_alone: bool) -> None:
        """Record that a deploy of ``stack`` has succeeded.  ``is_alone``: whether no other command is running."""
        names = {one.spec.name for one in stack.services.values()}
        self._acknowledged |= names
        self.violations += self._missing(names)
        if is_alone:
            self.violations += self._outdated(names)

    def finish(self) -> None:
        """Check the rules after all commands have ended.  Raises: AssertionError: a rule was broken."""
        self.violations += self._missing(self._acknowledged)
        assert not self.violations, "\n".join(self.violations)

    def _check(self, change: Change, _: View) -> None:
        for event in change.events:
            match event:
                case Deleted(Service() | Secret() | Config() | Network() as gone):
                    self._check_removal(gone)
                case Updated(Service() as old, Service() as new):
                    if new.removed_at is not None and old.removed_at is None:
                        self._check_removal(new)
                    self._check_number(old, new)

    def _check_removal(self, gone: Any) -> None:
        if (type(gone), gone.id) in self._before:
            self.violations.append(
                f"{type(gone).__name__} {gone.spec.name} was there before, and was removed"
            )

    def _check_number(self, old: Service, new: Service) -> None:
        if AUTOSCALE not in old.spec.labels or old.spec.replicas == new.spec.replicas:
            return
        if old.autoscaled == new.autoscaled:
            text = f"{new.spec.name} had {old.spec.replicas} tasks by the autoscaler, and was given {new.spec.replicas}"
            self.violations.append(text)

    def _missing(self, names: set[str]) -> Iterator[str]:
        view = self._cluster.view
        there = {one.spec.name: one for one in view.find(Service) if one.removed_at is None}
        for name in sorted(names):
            if name not in there:
                yield f"service {name} was acknowledged, and is not there"
                continue
            container = there[name].spec.task_template.container_spec
            for one in container.secrets if container is not None else ():
                if view.lookup(Secret, one.secret_id) is None:
                    yield f"service {name} was acknowledged, and its secret {one.secret_name} is not there"

    def _outdated(self, names: set[str]) -> Iterator[str]:
        view = self._cluster.view
        for service in view.find(Service):
            if service.spec.name not in names or CRON in service.spec.labels:
                continue
            for task in self._cluster.tasks(service.id):
                is_wanted = task.desired_state is TaskState.RUNNING
                if is_wanted and not is_up_to_date(view, task):
                    yield f"{service.spec.name} was acknowledged, and its task {task.id} is of an earlier spec"


class Commands:
    """Starts concurrent commands."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self.rules = Rules(cluster)
        self.outcomes: list[str] = []
        """Result of each command."""
        self._cluster = cluster
        self._apis = Apis(cluster)
        for node in cluster.nodes.values():
            node.broken_images.add(BROKEN)
        self._running: dict[asyncio.Task[None], ApiClient] = {}

    def client(self, name: str) -> ApiClient:
        """Return a client without injected faults."""
        return ApiClient(self._apis, name)

    def deploy(self, name: str, stack: Stack, *, undoes: bool, wait_s: float = 30.0) -> ApiClient:
        """Begin ``skep stack deploy``.  ``undoes``: with ``--rollback-on-failure``."""

        async def run(client: ApiClient) -> None:
            await deploy(client, stack, undoes=undoes, wait_s=wait_s)
            self.rules.acknowledge(stack, is_alone=len(self._running) == 1)

        return self._begin(name, run)

    def rotate(self, name: str, kind: FileKind, root: str, data: bytes | None) -> ApiClient:
        """Begin ``skep secret rotate``."""

        async def run(client: ApiClient) -> None:
            await rotate(client, kind, root, data)

        return self._begin(name, run)

    def upgrade(self, name: str, version: str, *, continues: bool, broken: Collection[str] = ()) -> ApiClient:
        """Begin ``skep upgrade`` of all workers.

        Args:
            broken: workers that report another version afterwards.
        """
        means = SimulatedMeans(
            version=version, command="true", rollback="true", cluster=self._cluster, broken=frozenset(broken)
        )

        async def run(client: ApiClient) -> None:
            await run_upgrade(client, name, means, within_s=30.0, continues=continues)

        return self._begin(name, run)

    def _begin(self, name: str, run: Callable[[ApiClient], Awaitable[None]]) -> ApiClient:
        client = self.client(name)

        async def run_guarded() -> None:
            COMMAND.set(name)
            try:
                await run(client)
            except (SkepError, TimeoutError) as error:
                self.outcomes.append(f"{name}: {error}")
            else:
                self.outcomes.append(f"{name}: done")

        task = self._cluster.loop.create_task(run_guarded(), name=name)
        self._running[task] = client
        return client

    def disturb(self, client: ApiClient) -> None:
        """Kill or suspend the command at a random request, or lose some of its responses."""
        client.disturb(self._cluster.random, KILLED_BY, PAUSE_S)

    def finish(self, within_s: float = 300.0) -> None:
        """Let all commands end, and check the rules."""

        def is_over() -> bool:
            return all(task.done() or client.is_killed for task, client in self._running.items())

        self._cluster.run_until(is_over, within_s=within_s)
        for task in self._running:
            if task.done() and not task.cancelled():
                task.result()
        self._cluster.run_for(1.0)
        self.rules.finish()


class SimulatedMeans(Means, frozen=True, kw_only=True):
    """Simulated upgrade: a worker reports the new version some seconds after its installation began."""

    cluster: SimulatedCluster
    broken: frozenset[str] = frozenset()

    async def check(self, node: UpgradableNode) -> bool:
        """See ``Means``."""
        return True

    async def upgrade(self, node: UpgradableNode) -> None:
        """See ``Means``."""
        await asyncio.sleep(self.cluster.random.uniform(0.1, 3.0))
        show_version(
            self.cluster, node.id, f"{self.version}-broken" if node.id in self.broken else self.version
        )

    async def roll_back(self, node: UpgradableNode) -> None:
        """See ``Means``."""
        await asyncio.sleep(self.cluster.random.uniform(0.1, 3.0))
        show_version(self.cluster, node.id, node.version)


async def run_upgrade(client: ApiClient, by: str, means: Means, *, within_s: float, continues: bool) -> None:
    """Run ``skep upgrade`` as the command does."""
    upgrade = _Upgrade(client, means, drains=True, within_s=within_s)  # type: ignore[arg-type]
    upgrade.holder = replace(upgrade.holder, by=by)
    await upgrade.take(continues=continues)
    try:
        await upgrade.run()
    except FailedPrecondition:
        await upgrade.end()
        raise
    await upgrade.release()


def show_version(cluster: SimulatedCluster, id: str, version: str) -> None:
    """Set the Skep version that a worker reports."""
    node = cluster.nodes.get(NodeId(id))
    if node is None:
        return  # the worker was removed meanwhile
    engine = node._description.engine
    engine = replace(engine, engine_version=version, labels={**engine.labels, NODE_LABEL: "1"})
    node._description = replace(node._description, engine=engine)


async def deploy(client: ApiClient, stack: Stack, *, undoes: bool, wait_s: float) -> None:
    """Run ``skep stack deploy`` without its files.  Raises: SkepError: it failed."""
    created = CreatedObjects()
    existing = await existing_of(client, stack.name, config_names(stack))
    plan = plan_of(stack, existing, images={}, prune=False)
    try:
        await carry_out(client, stack, plan, _say, wait_s, _warn, created=created)
    except Replaced:
        raise
    except SkepError:
        if undoes:
            await undo(client, plan, _say, wait_s, _warn, created)
        raise


async def rotate(client: ApiClient, kind: FileKind, root: str, data: bytes | None) -> str:
    """Run ``skep secret rotate``, and return the name of the new version.  Raises: SkepError, TimeoutError."""
    rotation = _Rotation(kind, client)  # type: ignore[arg-type]
    new, old = await rotation.next_version(root, data)
    ids = await rotation.move(old, new)
    async with asyncio.timeout(30.0):
        await rotation.wait(ids, new)
    if rotation.problems:
        raise Unavailable("; ".join(rotation.problems))
    return str(new["Spec"]["Name"])


def label_of(stack: str) -> dict[str, str]:
    """Return the label that all objects of a stack have."""
    return {STACK_LABEL: stack}


def _say(*_: str) -> None:
    pass


def _warn(_: object) -> None:
    pass
