"""The leader's loop for notifications: reads changed objects, keeps incidents, and sends due messages.  Leader only."""

from collections.abc import Awaitable, Callable
from random import Random

from skep.aio.clock import Clock
from skep.manager.control_loops.loop_driver import LoopDriver
from skep.manager.diagnosis.service_health import status_with_health
from skep.manager.notify.deliveries import due_at_ns
from skep.manager.notify.outbox import Outbox, Send
from skep.manager.notify.problems import (
    Problem,
    problems_of_cluster,
    problems_of_node,
    problems_of_service,
)
from skep.manager.notify.records import (
    Target,
    backup_in,
    delivery_in,
    expects_backups_since_ns,
    incidents_in,
    targets_in,
)
from skep.manager.notify.state import CLUSTER, STEP, WATCHED, NotifyState, node_of, service_of
from skep.manager.notify.writing import forget_incidents, write_changes
from skep.model.node import Node
from skep.model.service import Service, ServiceHealth
from skep.model.values.times import SECOND_NS
from skep.store.interface import LoopStore

BATCH = 50
"""Objects read before a step.  A step follows each batch, so a batch takes about as long as a step."""
REST, REST_S_MAX = 10.0, 5.0
"""Pause after a batch as a multiple of its duration, and in seconds.  A tenth of a processor is enough for reports."""
RETRY_S = 5.0
"""Seconds after a refused write.  The store usually elects a leader within that time."""


class Notifications:
    """Notifies targets of incidents.  ``confirm`` confirms the term before a message is sent again."""

    def __init__(
        self,
        term: LoopStore,
        clock: Clock,
        random: Random,
        send: Send,
        confirm: Callable[[], Awaitable[None]],
    ) -> None:
        self._term = term
        self._clock = clock
        self._outbox = Outbox(term, clock, random, send, confirm)
        self.state = NotifyState(term.view, clock, random)
        self._driver = LoopDriver(term, clock, self.state, WATCHED, BATCH)

    async def run(self) -> None:
        """Notify until cancelled."""
        await self._driver.run(self._work)

    async def _work(self, keys: list[str]) -> None:
        began = self._clock.monotonic()
        failures = self.state.failures
        for key in (*(key for key in keys if key != STEP and self.state.is_active), STEP):
            with failures.caught(key):
                if key == STEP:
                    await self._step()
                elif self._is_readable(key):
                    self.state.note(key, await self._problems(key))
                else:
                    self.state.read_later(key)
            if (failure := failures.of(key)) is not None:
                self.state.queue.add_at(key, failure.retry_at)
        cost_s = self._clock.monotonic() - began
        await self._clock.sleep(min(REST * cost_s, REST_S_MAX))

    def _is_readable(self, key: str) -> bool:
        """Return whether the store can read an object.  Otherwise its problems are unknown, and none is over."""
        view = self._term.view()
        return node_of(key) not in view.unreadable(Node) and service_of(key) not in view.unreadable(Service)

    async def _problems(self, key: str) -> list[Problem]:
        view, now_ns = self._term.view(), self._clock.now_ns()
        if key == CLUSTER:
            since_ns = expects_backups_since_ns(targets_in(view))
            return list(problems_of_cluster(view, backup_in(view), since_ns, now_ns))
        if (node_id := node_of(key)) is not None:
            node = view.lookup(Node, node_id)
            return list(problems_of_node(node)) if node is not None else []
        service = view.lookup(Service, service_of(key) or "")
        if service is None or service.removed_at is not None:
            return []
        status = await status_with_health(view, service, now_ns, self._clock)
        return list(problems_of_service(service, status.health or ServiceHealth()))

    async def _step(self) -> None:
        """Begin and end incidents, and start to send due messages."""
        view = self._term.view()
        targets, incidents = targets_in(view), incidents_in(view)
        if not targets:
            if incidents:
                await self._term.update(forget_incidents)
            return
        changes = self.state.due(incidents)
        if changes or any(delivery_in(view, one) is None for one in targets):
            await self._term.update(write_changes, changes, self._clock.now_ns())
        view, now_ns = self._term.view(), self._clock.now_ns()
        for target in targets:
            delivery = delivery_in(view, target)
            due_ns = due_at_ns(delivery, now_ns) if delivery is not None else None
            if due_ns is None or self._outbox.is_busy(target):
                continue
            if due_ns <= now_ns:
                self._driver.spawn(self._deliver(target), f"notify {target.name}")
            else:
                self.state.queue.add_at(STEP, self._clock.monotonic() + (due_ns - now_ns) / SECOND_NS)

    async def _deliver(self, target: Target) -> None:
        """Send the next message to a target.  Others do not wait for it."""
        is_recorded = await self._outbox.deliver(target)
        self.state.queue.add_at(STEP, self._clock.monotonic() + (0.0 if is_recorded else RETRY_S))
