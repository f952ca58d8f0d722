"""Wakes the streams of assignments; holds a task's stop back while others may still send it new connections.

A task that serves is taken out of its networks' tables as soon as it is to stop; it hears of that when no node uses a
table with it any more, or when its service's ``skep.drain`` has passed (docs/architecture.md,
"Stopping").  Nothing is held back when the service itself goes, or when the task serves nobody.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.aio.event import Event
from skep.aio.first import Overtaken, unless
from skep.errors import SkepError
from skep.manager.dispatcher.assignments import matters
from skep.manager.dispatcher.sessions import Sessions
from skep.model.draining import begins_to_drain
from skep.model.ids import NodeId, TaskId
from skep.model.labels import drain_s
from skep.model.node import Node
from skep.model.planes import is_docker_node
from skep.model.service import Service
from skep.model.task import Task
from skep.store.interface import Store, View

log = structlog.get_logger(__name__)

WITHHELD_MAX = 2_000
"""At the same time; what is beyond that stops at once."""

WaitUnused = Callable[[Task, int], Awaitable[None]]
"""Returns when no node sends new connections to the task, which is to stop since that revision of the store."""


class Stops:
    """What the streams of assignments have to look at, and when."""

    def __init__(
        self, store: Store, sessions: Sessions, clock: Clock, wait_unused: WaitUnused | None
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._clock = clock
        self._wait_unused = wait_unused
        self._withheld: dict[TaskId, None] = {}
        self._begun: list[_Begun] = []
        self._has_begun = Event()

    def note(self, old: Task, new: Task, revision: int) -> None:
        """A task has changed with this revision of the store: its node hears of it, now or later."""
        if new.id in self._withheld:
            if new.status.state.is_terminal:
                self.come_or_go(new)
            return
        if not matters(old, new):
            return
        seconds = drain_of(self._store.view(), old, new) if self._wait_unused is not None else 0.0
        is_here = self._sessions.live(new.node_id) is not None
        if not (seconds and is_here) or len(self._withheld) >= WITHHELD_MAX:
            self.wake(new.node_id, (new.id,))
            return
        self._withheld[new.id] = None
        self._begun.append(_Begun(new, revision, seconds))
        self._has_begun.set()

    def come_or_go(self, task: Task) -> None:
        """A task is new, or has ended or gone: its node hears of it at once."""
        self._withheld.pop(task.id, None)
        self.wake(task.node_id, (task.id,))

    def wake(self, node_id: NodeId, task_ids: Iterable[TaskId]) -> None:
        """Have the node's streams look at tasks, but for those whose stop is held back."""
        session = self._sessions.live(node_id)
        if session is not None:
            session.wake_assignments(id for id in task_ids if id not in self._withheld)

    async def run(self) -> None:
        """Hold back what ``note`` says, until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                begun, self._begun = self._begun, []
                for one in begun:
                    group.create_task(self._withhold(one), name=f"drain {one.task.id}")
                self._has_begun.clear()
                await self._has_begun.wait()

    async def _withhold(self, begun: "_Begun") -> None:
        assert self._wait_unused is not None, "nothing is withheld without it"
        task = begun.task
        try:
            unused = self._wait_unused(task, begun.revision)
            await unless(_awaited(unused), self._clock.sleep(begun.seconds))
        except Overtaken:
            log.info("task stops though it may be in use", task=task.id, after_s=begun.seconds)
        except SkepError as error:
            log.warning("task stops though it may be in use", task=task.id, error=str(error))
        finally:
            self.come_or_go(task)


class _Begun(msgspec.Struct, frozen=True):
    """A task that is to stop since ``revision``, in ``seconds`` at the latest."""

    task: Task
    revision: int
    seconds: float


def drain_of(view: View, old: Task, new: Task) -> float:
    """For how many seconds at most the stop of a task is held back; 0: not at all."""
    if not begins_to_drain(old, new):
        return 0.0
    service, node = view.lookup(Service, new.service_id), view.lookup(Node, new.node_id)
    if service is None or service.removed_at is not None or node is None or is_docker_node(node):
        return 0.0
    return drain_s(service.spec.labels)


async def _awaited(wait: Awaitable[None]) -> None:
    await wait
