"""Cluster volumes under faults, on virtual time, with the leader's own loops and one storage for all nodes.

Whatever fails, nothing is ever mounted where it is not published, deleted while it is in use, published on two nodes
where one may have it, or made twice; and once faults end, volumes are published exactly where tasks need them.
"""

import asyncio
from collections.abc import Mapping, Sequence
from random import Random

import pytest
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.errors import FailedPrecondition, SkepError, Unavailable
from skep.manager.control.volumes import create_volume, remove_volume
from skep.manager.dispatcher.assignments import SentState, difference, everything
from skep.manager.dispatcher.statuses import record_unpublished
from skep.manager.scheduler.loop import Scheduler
from skep.manager.storage.recovery import doubt_volumes
from skep.manager.volumes.driver_calls import skip_confirmation
from skep.manager.volumes.loop import VolumeManager
from skep.model.assignment import AssignmentSet
from skep.model.container import ContainerSpec, Mount
from skep.model.node import CSIInfo, Node, NodeState, NodeStatus, SessionOwner
from skep.model.service import TaskSpec
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId, SessionId, TaskId, VolumeId
from skep.model.values.meta import Driver
from skep.model.values.times import timestamp
from skep.model.volume import (
    AccessMode,
    PublishState,
    TypeMount,
    Volume,
    VolumeAssignment,
    VolumeInfo,
    VolumeScope,
    VolumeSharing,
    VolumeSpec,
)
from skep.store.interface import Transaction
from skep.store.level import CLUSTER_VOLUMES
from skep.store.memory import MemoryStore
from tests.support.builders import a_node
from tests.support.storage.csi_storage import Refused, Storage

NODES = ("n1", "n2", "n3")
SESSION = SessionId("s")
MODES = {
    "one": AccessMode(mount_volume=TypeMount()),
    "shared": AccessMode(scope=VolumeScope.MULTI, sharing=VolumeSharing.ALL, mount_volume=TypeMount()),
    "writer": AccessMode(sharing=VolumeSharing.ONE_WRITER, mount_volume=TypeMount()),
}


class FaultyDriver:
    """The storage's controller: calls fail before or after their work, and answers get lost."""

    def __init__(self, storage: Storage, clock: VirtualClock, random: Random) -> None:
        self.storage, self.clock, self.random = storage, clock, random
        self.fails = 0.0

    async def __call__(self, name: str) -> "FaultyDriver":
        if self.random.random() < self.fails / 4:
            raise Unavailable("no driver")
        return self

    async def create(self, volume: Volume, secrets: Mapping[str, str]) -> VolumeInfo:
        await self._before()
        made = self.storage.create(volume.spec.name, 0, 0, 1, [])
        await self._after()
        id = "v-another" if self.random.random() < self.fails / 10 else made["id"]
        if id != made["id"]:
            raise Unavailable("a driver that lies is refused by its client")
        return VolumeInfo(volume_id=id)

    async def delete(self, volume_id: str, secrets: Mapping[str, str]) -> None:
        await self._before()
        self._checked(lambda: self.storage.delete(volume_id))
        await self._after()

    async def publish(
        self, volume: Volume, driver_node_id: str, secrets: Mapping[str, str]
    ) -> Mapping[str, str]:
        await self._before()
        assert volume.info is not None
        mode = 5 if volume.spec.access_mode.scope is VolumeScope.MULTI else 1
        context: dict[str, str] = {}
        id = volume.info.volume_id
        self._checked(lambda: context.update(self.storage.publish(id, driver_node_id, mode)))
        await self._after()
        return context

    async def unpublish(self, volume_id: str, driver_node_id: str, secrets: Mapping[str, str]) -> None:
        await self._before()
        self.storage.unpublish(volume_id, driver_node_id)
        await self._after()

    def _checked(self, work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except Refused as error:
            kind = FailedPrecondition if error.code == "FAILED_PRECONDITION" else SkepError
            raise kind(str(error)) from error

    async def _before(self) -> None:
        await self.clock.sleep(self.random.uniform(0, 2))
        if self.random.random() < self.fails:
            raise Unavailable("it failed")

    async def _after(self) -> None:
        await self.clock.sleep(self.random.uniform(0, 1))
        if self.random.random() < self.fails:
            raise Unavailable("the answer was lost")


class FakeNode:
    """Mounts what it is assigned, runs tasks whose volumes are there, and gives volumes up when none has them."""

    def __init__(
        self, id: str, store: MemoryStore, storage: Storage, clock: VirtualClock, random: Random
    ) -> None:
        self.id, self.store, self.storage, self.clock = NodeId(id), store, storage, clock
        self.random = random
        self.sent: SentState | None = None
        self.has: dict[VolumeId, VolumeAssignment] = {}
        self.leaving: dict[VolumeId, VolumeAssignment] = {}
        self.asked_for: dict[VolumeId, VolumeAssignment] = {}
        self.mounted: dict[VolumeId, str] = {}
        """With the driver's ids."""
        self.containers: dict[TaskId, frozenset[VolumeId]] = {}
        self.is_cut_off = False

    def connect(self, store: MemoryStore) -> None:
        """The managers have another store from now on."""
        self.store, self.sent = store, None

    async def run(self) -> None:
        while True:
            await self.clock.sleep(0.5)
            if self.is_cut_off:
                continue
            change: AssignmentSet | None
            if self.sent is None:
                change, self.sent = everything(self.store.view(), self.id)
            else:
                ids = [task.id for task in self.store.view().find(Task)]
                change, self.sent = difference(self.store.view(), self.id, self.sent, ids)
            if change is not None:
                self._take(change)
            for volume in self.has.values():
                self.storage.mount(volume.volume_id, self.id, dict(volume.publish_context))
                self.mounted[volume.id] = volume.volume_id
            await self._run_tasks()
            await self._give_up()

    def _take(self, change: AssignmentSet) -> None:
        for volume in change.volumes:
            self.has[volume.id] = volume
            self.leaving.pop(volume.id, None)
            self.asked_for.pop(volume.id, None)
        for volume in change.removed_volumes:
            self.asked_for[volume.id] = volume
            self.has.pop(volume.id, None)
            self.leaving[volume.id] = volume
        if change.complete:
            named = {volume.id for volume in (*change.volumes, *change.removed_volumes)}
            for id in self.has.keys() - named:
                self.leaving[id] = self.has.pop(id)

    async def _give_up(self) -> None:
        used = frozenset[VolumeId]().union(*self.containers.values())
        for id in self.leaving.keys() - used:
            disk = self.mounted.pop(id, None)
            if disk is not None and disk not in self.mounted.values():
                self.storage.unmount(disk, self.id)
            del self.leaving[id]
        for volume in list(self.asked_for.values()):
            if volume.id not in self.leaving and volume.volume_id not in self.mounted.values():
                del self.asked_for[volume.id]
                await self.store.update(record_unpublished, (self.id, SESSION, volume.id))

    async def _run_tasks(self) -> None:
        tasks = {task.id: task for task in self.store.view().find(Task, node_id=self.id)}
        for id in list(self.containers):
            is_wanted = id in tasks and tasks[id].desired_state is not TaskState.SHUTDOWN
            if not is_wanted and self.random.random() < 0.3:
                del self.containers[id]
        for task in tasks.values():
            state = task.status.state
            if task.id in self.containers and state is TaskState.ASSIGNED:
                await self.store.update(_reach, task.id, TaskState.RUNNING)
            if state.is_terminal or task.id in self.containers:
                continue
            if task.desired_state is TaskState.SHUTDOWN:
                await self.store.update(_reach, task.id, TaskState.SHUTDOWN)
            elif all(VolumeId(one.id) in self.has and one.id in self.mounted for one in task.volumes):
                self.containers[task.id] = frozenset(VolumeId(one.id) for one in task.volumes)
                await self.store.update(_reach, task.id, TaskState.RUNNING)


def _reach(tx: Transaction, id: TaskId, state: TaskState) -> None:
    if (task := tx.lookup(Task, id)) is not None:
        tx.put(replace(task, status=TaskStatus(state=state)))


class World:
    def __init__(self, loop: VirtualLoop, seed: int, *, restores: bool = False) -> None:
        self.restores = restores
        self.random, self.clock = Random(seed), VirtualClock(loop)
        self.store, self.storage = MemoryStore(self.clock), Storage()
        self.driver = FaultyDriver(self.storage, self.clock, self.random)
        self.nodes = {
            id: FakeNode(id, self.store, self.storage, self.clock, Random(seed + number))
            for number, id in enumerate(NODES)
        }
        self.made = 0
        self.modes: dict[str, str] = {}
        """By the volumes' names."""
        self.is_removing = True
        self.made_again: set[str] = set()

    async def run(self) -> None:
        await self.store.update(self._found)
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(node.run()) for node in self.nodes.values()]
            leader = group.create_task(self._lead())
            self.driver.fails = 0.3
            backup: Sequence[Node | Volume | Task] = ()
            for number in range(60):
                await self.clock.sleep(self.random.uniform(0, 6))
                await self._disturb()
                if self.restores and number == 20:
                    backup = self._backup()
                    self.is_removing = False  # what is deleted cannot come back
                if self.restores and number == 40:
                    leader.cancel()
                    await asyncio.wait([leader])
                    await self._restore(backup)
                    leader = group.create_task(self._lead())
                if self.random.random() < 0.1:
                    leader.cancel()
                    await asyncio.wait([leader])
                    leader = group.create_task(self._lead())
                assert self.storage.violations == []
            self.driver.fails = 0.0
            for node in self.nodes.values():
                node.is_cut_off = False
                await self.store.update(_state, node.id, NodeState.READY)
            await self.clock.sleep(300)
            if self.restores:
                await self._make_lost_ones_again()
                await self.clock.sleep(300)
            self.check()
            await self.store.update(_end_all)
            await self.clock.sleep(300)
            for volume in self.store.view().find(Volume):
                await self.store.update(lambda tx, one=volume: remove_volume(tx, one.id, force=False))
            await self.clock.sleep(300)
            assert not self.store.view().find(Volume)
            assert self.storage.volumes == {}
            assert self.storage.violations == []
            for task in (*running, leader):
                task.cancel()

    def _backup(self) -> Sequence[Node | Volume | Task]:
        view = self.store.view()
        return (*view.find(Node), *view.find(Volume), *view.find(Task))

    async def _restore(self, backup: Sequence[Node | Volume | Task]) -> None:
        """What happened since is in no store any more, and nodes and storage are as they are."""
        self.store = MemoryStore(self.clock)
        self.storage.is_asked_in_doubt = True

        def put(tx: Transaction) -> None:
            tx.raise_level(CLUSTER_VOLUMES)
            for one in backup:
                tx.put(one)

        await self.store.update(put)
        await doubt_volumes(self.store)
        for node in self.nodes.values():
            await self.store.update(_state, node.id, NodeState.DOWN if node.is_cut_off else NodeState.READY)
            node.connect(self.store)

    async def _make_lost_ones_again(self) -> None:
        """The user creates volumes that came after the backup by their names, and finds their data."""
        known = {volume.spec.name for volume in self.store.view().find(Volume)}
        for name in sorted({one["name"] for one in self.storage.volumes.values()} - known):
            self.made_again.add(name)
            await self._create(name, self.modes[name])
            mount = Mount(type="cluster", source=name, target="/d")
            await self.store.update(_put_task, f"again-{name}", mount)

    async def _create(self, name: str, mode: str) -> None:
        self.made += 1
        self.modes[name] = mode
        spec = VolumeSpec(name=name, driver=Driver(name="d"), group="g", access_mode=MODES[mode])
        now = timestamp(self.clock.now_ns())
        await self.store.update(create_volume, spec, new_id=lambda: f"id{self.made}", now=now)

    async def _lead(self) -> None:
        random = Random(self.random.random())
        async with asyncio.TaskGroup() as group:
            group.create_task(Scheduler(self.store, self.clock, str, random).run())
            group.create_task(
                VolumeManager(self.store, self.clock, random, self.driver, skip_confirmation).run()
            )

    def _found(self, tx: Transaction) -> None:
        tx.raise_level(CLUSTER_VOLUMES)
        for id in NODES:
            node = a_node(id)
            info = CSIInfo(plugin_name="d", node_id=id, max_volumes_per_node=2)
            description = replace(node.description, csi_info=(info,))
            session = SessionOwner(manager_id=NodeId("m1"), session_id=SESSION)
            tx.put(replace(node, description=description, session=session))

    async def _disturb(self) -> None:
        match self.random.choice(("volume", "task", "task", "task", "end", "end", "node", "remove", "pass")):
            case "volume":
                await self._create(f"v{self.made + 1}", self.random.choice(sorted(MODES)))
            case "task":
                self.made += 1
                source = self.random.choice(("group:g", f"v{self.random.randint(1, self.made)}"))
                mount = Mount(
                    type="cluster", source=source, target="/d", read_only=self.random.random() < 0.3
                )
                await self.store.update(_put_task, f"t{self.made}", mount)
            case "end":
                if tasks := self.store.view().find(Task):
                    task = self.random.choice(tasks)
                    await self.store.update(_end, task.id, delete=self.random.random() < 0.2)
            case "node":
                node = self.random.choice(list(self.nodes.values()))
                node.is_cut_off = not node.is_cut_off
                await self.store.update(
                    _state, node.id, NodeState.DOWN if node.is_cut_off else NodeState.READY
                )
            case "remove" if self.is_removing:
                if volumes := self.store.view().find(Volume):
                    volume = self.random.choice(volumes)
                    try:
                        await self.store.update(lambda tx: remove_volume(tx, volume.id, force=False))
                    except SkepError:
                        pass  # it is in use

    def check(self) -> None:
        """Published exactly where tasks need it, mounted exactly there, nothing twice, each volume made once."""
        needed: dict[str, set[str]] = {}
        for task in self.store.view().find(Task):
            if task.node_id and not task.status.state.is_terminal:
                assert task.status.state is TaskState.RUNNING, task
                for one in task.volumes:
                    needed.setdefault(one.id, set()).add(task.node_id)
        for volume in self.store.view().find(Volume):
            published = {one.node_id for one in volume.publish_status if one.state is PublishState.PUBLISHED}
            assert len(published) == len(volume.publish_status)
            assert published == needed.get(volume.id, set())
            assert volume.info is not None
            stored = self.storage.volumes[volume.info.volume_id]
            assert set(stored["mounted"]) == published
            # A volume that was made again is where the driver has it from before, until that is in the way.
            has = set(stored["published"])
            assert has == published or (volume.spec.name in self.made_again and has > published)
            assert not any((volume.message, *(one.message for one in volume.publish_status)))
        assert len(self.storage.volumes) == len(self.store.view().find(Volume))
        assert len(self.storage.created) == len(set(self.storage.created))


def _state(tx: Transaction, id: NodeId, state: NodeState) -> None:
    tx.put(replace(tx.get(Node, id), status=NodeStatus(state=state)))


def _put_task(tx: Transaction, id: str, mount: Mount) -> None:
    tx.put(
        Task(
            id=TaskId(id),
            spec=TaskSpec(container_spec=ContainerSpec(mounts=(mount,))),
            status=TaskStatus(state=TaskState.PENDING),
            desired_state=TaskState.RUNNING,
        )
    )


def _end(tx: Transaction, id: TaskId, *, delete: bool) -> None:
    task = tx.lookup(Task, id)
    if task is None:
        return
    if not task.node_id or (delete and task.status.state.is_terminal):
        tx.delete(Task, id)
    else:
        tx.put(replace(task, desired_state=TaskState.SHUTDOWN))


def _end_all(tx: Transaction) -> None:
    for task in tx.find(Task):
        if not task.node_id:
            tx.delete(Task, task.id)
        elif not task.status.state.is_terminal:
            tx.put(replace(task, desired_state=TaskState.SHUTDOWN))


@pytest.mark.parametrize("seed", range(8))
def test_volumes_are_published_exactly_where_tasks_need_them_whatever_fails(seed: int) -> None:
    _run(seed)


@pytest.mark.parametrize("seed", range(8))
def test_after_a_restore_of_an_older_backup_no_volume_is_lost_made_twice_or_mounted_twice(seed: int) -> None:
    """Volumes that have moved or were made since, tasks of which the store has nothing, nodes that are cut off."""
    _run(seed, restores=True)


def _run(seed: int, *, restores: bool = False) -> None:
    loop = VirtualLoop(seed=seed)
    try:
        loop.run_until_complete(World(loop, seed, restores=restores).run())
    finally:
        loop.close()
