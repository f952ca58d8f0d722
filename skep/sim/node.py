"""A simulated node: takes the tasks assigned to it through their states and reports each of them.

It stands for dispatcher, agent and executor together: it reads its tasks from one manager's replica and
writes their statuses there, as the owner of its session would.  A container is a name in ``containers``;
those outlive the agent, as real ones do, and die with the machine.
"""

import asyncio
from random import Random

import msgspec
from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.model.ids import NodeId, TaskId
from skep.model.node import Node, NodeState, NodeStatus
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.times import timestamp
from skep.store.interface import Store, Transaction, WatchLagged

RECONNECT_S = 0.2


class Durations(msgspec.Struct, frozen=True, kw_only=True):
    """How long a simulated machine takes, in seconds: (shortest, longest)."""

    prepare: tuple[float, float] = (0.05, 0.5)
    start: tuple[float, float] = (0.02, 0.1)
    stop: tuple[float, float] = (0.05, 1.0)


class Container:
    """What runs on the machine for one task."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.ended = asyncio.Event()
        self.exit_code = 0

    def exit(self, code: int) -> None:
        """The process ends by itself."""
        self.exit_code = code
        self.ended.set()


class SimulatedNode:
    """One worker machine."""

    def __init__(self, id: NodeId, clock: Clock, random: Random, durations: Durations) -> None:
        self.id = id
        self.containers: dict[TaskId, Container] = {}
        self.broken_images: set[str] = set()
        """Images that cannot be prepared here."""
        self.crashing_images: dict[str, float] = {}
        """Images whose containers exit with 1 after so many seconds."""
        self._clock = clock
        self._random = random
        self._durations = durations
        self._lives: dict[TaskId, _Life] = {}

    async def run(self, store: Store) -> None:
        """Be a ready node of the manager with this store, until cancelled; then the containers go on alone."""
        self._lives.clear()
        while True:
            try:
                async with asyncio.TaskGroup() as group, store.watch(Task) as watch:
                    await self._write_state(store, NodeState.READY)
                    self._look(group, store)
                    async for _ in watch:
                        self._look(group, store)
            except* WatchLagged:
                self._lives.clear()

    def lose_power(self) -> None:
        """Every container is gone, and nothing is reported."""
        self.containers.clear()

    def _look(self, group: asyncio.TaskGroup, store: Store) -> None:
        """Compare with what is assigned: new tasks, changed wishes, tasks that are gone."""
        assigned = {
            task.id: task
            for task in store.view().find(Task, node_id=self.id)
            if task.status.state >= TaskState.ASSIGNED
        }
        for id, task in assigned.items():
            if id in self._lives:
                self._lives[id].wish(task)
            elif not task.status.state.is_terminal:
                life = self._lives[id] = _Life(task)
                group.create_task(self._live(life, store), name=f"{self.id}/{id}")
        for id in [id for id in self._lives if id not in assigned]:
            self._lives.pop(id).wish(None)
        for id in [id for id in self.containers if id not in assigned]:
            del self.containers[id]

    async def _live(self, life: "_Life", store: Store) -> None:
        """One task from its assignment to its end.  Adopts a container that runs already."""
        image = life.image
        container = self.containers.get(life.task.id)
        if container is None:
            if life.task.status.state >= TaskState.STARTING:
                # The machine restarted under it.
                await self._report(life, store, TaskState.FAILED, "container lost")
                return
            await self._report(life, store, TaskState.ACCEPTED)
            await self._report(life, store, TaskState.PREPARING)
            if not await life.undisturbed(self._some(self._durations.prepare)):
                await self._report(life, store, TaskState.SHUTDOWN)
                return
            if image in self.broken_images:
                await self._report(life, store, TaskState.REJECTED, f"No such image: {image}")
                return
            await self._report(life, store, TaskState.READY)
            await life.reached(TaskState.RUNNING)
            if life.is_over or not await life.undisturbed(self._some(self._durations.start)):
                await self._report(life, store, TaskState.SHUTDOWN)
                return
            container = self.containers[life.task.id] = Container(life.task)
        await self._report(life, store, TaskState.RUNNING)
        await self._watch_over(container, life, store)

    async def _watch_over(self, container: Container, life: "_Life", store: Store) -> None:
        """Until the process ends, or is to be stopped."""
        lasts_s = self.crashing_images.get(life.image)
        if lasts_s is not None:
            asyncio.get_running_loop().call_later(lasts_s, container.exit, 1)
        await life.disturbed_or(container.ended)
        if not container.ended.is_set():
            await self._clock.sleep(self._some(self._durations.stop))
        self.containers.pop(life.task.id, None)
        if not container.ended.is_set():
            await self._report(life, store, TaskState.SHUTDOWN)
        elif container.exit_code:
            await self._report(life, store, TaskState.FAILED, f"task: non-zero exit ({container.exit_code})")
        else:
            await self._report(life, store, TaskState.COMPLETE)

    async def _report(self, life: "_Life", store: Store, state: TaskState, err: str = "") -> None:
        """Write a status until the store takes it; a task that is gone needs none."""
        status = TaskStatus(
            timestamp=timestamp(self._clock.now_ns()), state=state, message=state.value, err=err
        )
        while True:
            try:
                return await store.update(_write_status, life.task.id, status)
            except SkepError:
                await self._clock.sleep(RECONNECT_S)

    async def _write_state(self, store: Store, state: NodeState) -> None:
        await store.update(write_node_state, self.id, state)

    def _some(self, between: tuple[float, float]) -> float:
        return self._random.uniform(*between)


class _Life:
    """What is wanted of one task, and waiting for that to change."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.is_over = task.desired_state > TaskState.RUNNING
        self._changed = asyncio.Event()

    @property
    def image(self) -> str:
        container = self.task.spec.container_spec
        return container.image if container else ""

    def wish(self, task: Task | None) -> None:
        """The task as it is now; None: it was deleted."""
        if task is not None:
            self.task = task
        self.is_over = task is None or task.desired_state > TaskState.RUNNING
        self._changed.set()

    async def undisturbed(self, seconds: float) -> bool:
        """Let time pass; False as soon as the task is to stop."""
        try:
            async with asyncio.timeout(seconds):
                await self._until_over()
        except TimeoutError:
            return True
        return False

    async def reached(self, desired: TaskState) -> None:
        """Until at least this is wanted."""
        while not self.is_over and self.task.desired_state < desired:
            self._changed.clear()
            await self._changed.wait()

    async def disturbed_or(self, event: asyncio.Event) -> None:
        """Until the task is to stop, or ``event`` is set."""
        async with asyncio.TaskGroup() as group:
            over = group.create_task(self._until_over())
            ended = group.create_task(event.wait())
            await asyncio.wait((over, ended), return_when=asyncio.FIRST_COMPLETED)
            over.cancel()
            ended.cancel()

    async def _until_over(self) -> None:
        while not self.is_over:
            self._changed.clear()
            await self._changed.wait()


def write_node_state(tx: Transaction, id: NodeId, state: NodeState) -> None:
    """What the owner of a node's session finds out about it."""
    node = tx.lookup(Node, id)
    if node is not None and node.status.state is not state:
        tx.put(replace(node, status=NodeStatus(state=state, addr=node.status.addr)))


def _write_status(tx: Transaction, id: TaskId, status: TaskStatus) -> None:
    task = tx.lookup(Task, id)
    if task is not None and status.state > task.status.state:
        tx.put(replace(task, status=status))
