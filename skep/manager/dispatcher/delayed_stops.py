"""Wakes the streams of assignments; delays a task's stop while nodes may still send it new connections.

A serving task is removed from its networks' tables as soon as it is to stop.  The stop is sent to its node when no
node uses a table with it any more, or when its service's ``skep.drain`` has passed (docs/architecture.md,
"Stopping").  Nothing is delayed if the service itself is removed, or if the task does not serve.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.aio.event import Event
from skep.aio.race import Preempted, run_unless
from skep.errors import SkepError
from skep.manager.cluster import etcds_behind
from skep.manager.dispatcher.assignments import affects_node
from skep.manager.dispatcher.sessions import Sessions
from skep.manager.failures import isolated
from skep.model.draining import begins_to_drain
from skep.model.ids import NodeId, TaskId
from skep.model.labels import drain_s
from skep.model.node import Node
from skep.model.planes import is_docker_node
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.store.interface import Store, View

log = structlog.get_logger(__name__)

WITHHELD_MAX = 2_000
"""At the same time; further tasks stop at once."""

WaitUnused = Callable[[Task, int], Awaitable[None]]
"""Returns when no node sends new connections to the task, which is to stop since that revision of the store."""
RESTART_S_MAX = 10.0
"""How much longer a stop may be delayed at most because an etcd restarts."""
LOOK_S = 0.1
"""Between two looks whether it has."""


class Stops:
    """Which tasks the streams of assignments have to send, and when."""

    def __init__(
        self, store: Store, sessions: Sessions, clock: Clock, wait_unused: WaitUnused | None
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._clock = clock
        self._wait_unused = wait_unused
        self._withheld: dict[TaskId, None] = {}
        self._pending: list[_PendingStop] = []
        self._has_pending = Event()
        self._etcds = (0, False)
        """Whether an etcd is to restart, as of a revision: thousands of stops may ask."""

    def on_update(self, old: Task, new: Task, revision: int) -> None:
        """A task changed with this revision of the store: wake its node's streams, now or later."""
        if new.id in self._withheld:
            if new.status.state.is_terminal:
                self.release(new)
            return
        if not affects_node(old, new):
            return
        seconds = drain_of(self._store.view(), old, new) if self._wait_unused is not None else 0.0
        is_here = self._sessions.live(new.node_id) is not None
        if not (seconds and is_here) or len(self._withheld) >= WITHHELD_MAX:
            self.wake(new.node_id, (new.id,))
            return
        self._withheld[new.id] = None
        self._pending.append(_PendingStop(new, revision, seconds))
        self._has_pending.set()

    def release(self, task: Task) -> None:
        """A task was created, deleted or has ended: wake its node's streams at once."""
        self._withheld.pop(task.id, None)
        self.wake(task.node_id, (task.id,))

    def wake(self, node_id: NodeId, task_ids: Iterable[TaskId]) -> None:
        """Wake the node's streams for tasks, except for those whose stop is delayed."""
        session = self._sessions.live(node_id)
        if session is not None:
            session.wake_assignments(id for id in task_ids if id not in self._withheld)

    async def run(self) -> None:
        """Delay stops, until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                pending, self._pending = self._pending, []
                for one in pending:
                    group.create_task(self._withhold(one), name=f"drain {one.task.id}")
                self._has_pending.clear()
                await self._has_pending.wait()

    async def _withhold(self, pending: "_PendingStop") -> None:
        assert self._wait_unused is not None, "nothing is withheld without it"
        task = pending.task
        with isolated("drain of a task", task.id):
            try:
                unused = self._wait_unused(task, pending.revision)
                await run_unless(_awaited(unused), self._sleep_at_least(pending.seconds))
            except Preempted:
                log.info(
                    "drain time is over: task stops though connections may still be sent to it",
                    task=task.id,
                    after_s=pending.seconds,
                )
            except SkepError as error:
                log.warning(
                    "drain failed: task stops though connections may still be sent to it",
                    task=task.id,
                    reason=str(error),
                )
            finally:
                self.release(task)

    async def _sleep_at_least(self, seconds: float) -> None:
        """Longer while a manager's etcd restarts for a new root: that manager's nodes get no tables meanwhile."""
        await self._clock.sleep(seconds)
        until = self._clock.monotonic() + RESTART_S_MAX
        while self._restarts_etcd() and self._clock.monotonic() < until:
            await self._clock.sleep(LOOK_S)

    def _restarts_etcd(self) -> bool:
        view = self._store.view()
        if self._etcds[0] != view.revision:
            self._etcds = view.revision, bool(view.find(Swarm) and etcds_behind(view))
        return self._etcds[1]


class _PendingStop(msgspec.Struct, frozen=True):
    """A task that is to stop since ``revision``, after ``seconds`` at the latest."""

    task: Task
    revision: int
    seconds: float


def drain_of(view: View, old: Task, new: Task) -> float:
    """Seconds for which the stop of a task is delayed at most; 0: not at all."""
    if not begins_to_drain(old, new):
        return 0.0
    service, node = view.lookup(Service, new.service_id), view.lookup(Node, new.node_id)
    if service is None or service.removed_at is not None or node is None or is_docker_node(node):
        return 0.0
    return drain_s(service.spec.labels)


async def _awaited(wait: Awaitable[None]) -> None:
    await wait
