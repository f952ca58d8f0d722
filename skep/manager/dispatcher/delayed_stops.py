"""Wakes assignment streams, and delays a task's stop while nodes may still send it new connections.

A serving task is removed from its networks' tables as soon as it is retired.  The stop is sent to its node when no node
uses a table with the task, or when its service's ``skep.drain`` has passed (docs/architecture.md, "Stopping").
Nothing is delayed, or any longer, if the service itself is removed.  Nor is it if the task does not serve.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.aio.event import Event
from skep.aio.race import LostRace, run_unless
from skep.errors import SkepError
from skep.manager.cluster import etcds_behind
from skep.manager.control_loops.failures import isolated
from skep.manager.dispatcher.assignments import affects_node
from skep.manager.dispatcher.node_sessions.sessions import Sessions
from skep.model.networks.data_planes import is_docker_node
from skep.model.node import Node
from skep.model.options.draining import begins_to_drain
from skep.model.options.labels import drain_s
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.values.ids import NodeId, TaskId
from skep.store.interface import Store, View

log = structlog.get_logger(__name__)

DELAYED_MAX = 2_000
"""Maximum delayed stops.  Beyond it, tasks stop at once."""

WaitUnused = Callable[[Task, int], Awaitable[None]]
"""Waits until no node sends new connections to the task.  The number is the store's revision that retired the task."""
RESTART_S_MAX = 10.0
"""Maximum seconds by which a restarting etcd prolongs the delay of a stop."""
CHECK_S = 0.1
"""Seconds between checks whether etcd still restarts."""


class Stops:
    """The tasks that assignment streams have to send, and the delays of their stops."""

    def __init__(
        self, store: Store, sessions: Sessions, clock: Clock, wait_unused: WaitUnused | None
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._clock = clock
        self._wait_unused = wait_unused
        self.delayed: dict[TaskId, None] = {}
        self._pending: list[_PendingStop] = []
        self._has_pending = Event()
        self._etcds = (0, False)
        """Whether an etcd restarts, as of a revision.  Cached because thousands of stops may check it."""

    def on_update(self, old: Task, new: Task, revision: int) -> None:
        """Wake the streams of a changed task's node, now or when the delay of its stop ends."""
        if new.id in self.delayed:
            if new.status.state.is_terminal:
                self.release(new)
            return
        if not affects_node(old, new):
            return
        seconds = drain_of(self._store.view(), old, new) if self._wait_unused is not None else 0.0
        is_here = self._sessions.live(new.node_id) is not None
        if not (seconds and is_here) or len(self.delayed) >= DELAYED_MAX:
            self.wake(new.node_id, (new.id,))
            return
        self.delayed[new.id] = None
        self._pending.append(_PendingStop(new, revision, seconds))
        self._has_pending.set()

    def on_service(self, old: Service, new: Service) -> None:
        """End the delays of a service's stops when it is removed."""
        if new.removed_at is None or old.removed_at is not None:
            return
        tasks = (self._store.view().lookup(Task, id) for id in tuple(self.delayed))
        for task in tasks:
            if task is not None and task.service_id == new.id:
                self.release(task)

    def release(self, task: Task) -> None:
        """Wake the node's streams at once for a task that was created, was deleted or has ended."""
        self.delayed.pop(task.id, None)
        self.wake(task.node_id, (task.id,))

    def wake(self, node_id: NodeId, task_ids: Iterable[TaskId]) -> None:
        """Wake the node's streams for tasks, except for those whose stop is delayed."""
        session = self._sessions.live(node_id)
        if session is not None:
            session.wake_assignments(id for id in task_ids if id not in self.delayed)

    async def run(self) -> None:
        """Delay stops until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                pending, self._pending = self._pending, []
                for one in pending:
                    group.create_task(self._delay(one), name=f"drain {one.task.id}")
                self._has_pending.clear()
                await self._has_pending.wait()

    async def _delay(self, pending: "_PendingStop") -> None:
        assert self._wait_unused is not None, "nothing is withheld without it"
        task = pending.task
        with isolated("drain of a task", task.id):
            try:
                unused = self._wait_unused(task, pending.revision)
                await run_unless(_await(unused), self._sleep_at_least(pending.seconds))
            except LostRace:
                log.info(
                    "drain time is over: task stops although it may still receive connections",
                    task=task.id,
                    after_s=pending.seconds,
                )
            except SkepError as error:
                log.warning(
                    "drain failed: task stops although it may still receive connections",
                    task=task.id,
                    reason=str(error),
                )
            finally:
                self.release(task)

    async def _sleep_at_least(self, seconds: float) -> None:
        """Sleep, and wait for an etcd that restarts for a new root: its manager's nodes get no tables meanwhile."""
        await self._clock.sleep(seconds)
        until = self._clock.monotonic() + RESTART_S_MAX
        while self._restarts_etcd() and self._clock.monotonic() < until:
            await self._clock.sleep(CHECK_S)

    def _restarts_etcd(self) -> bool:
        view = self._store.view()
        if self._etcds[0] != view.revision:
            self._etcds = view.revision, bool(view.find(Swarm) and etcds_behind(view))
        return self._etcds[1]


class _PendingStop(msgspec.Struct, frozen=True):
    """The stop of a task that was retired at ``revision``, delayed by at most ``seconds``."""

    task: Task
    revision: int
    seconds: float


def drain_of(view: View, old: Task, new: Task) -> float:
    """Return the maximum seconds for which a task's stop is delayed.  0 means not at all."""
    if not begins_to_drain(old, new):
        return 0.0
    service, node = view.lookup(Service, new.service_id), view.lookup(Node, new.node_id)
    if service is None or service.removed_at is not None or node is None or is_docker_node(node):
        return 0.0
    return drain_s(service.spec.labels)


async def _await(wait: Awaitable[None]) -> None:
    await wait
