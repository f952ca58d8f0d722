"""Applies the restart policies of plain containers, and removes containers with ``--rm``: the rules and their loop.

Source: moby 20.10, restartmanager/restartmanager.go (delays and counted failures), daemon/monitor.go, daemon/daemon.go
(restore).
"""

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol, TypeAlias, assert_never

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.aio.failures import describe_error, log_error, retry
from skep.aio.race import LostRace, run_unless
from skep.engine.containers.container import BeingRemoved, Container, PlainOptions, StillRunning
from skep.engine.events import Events
from skep.errors import NotFound, ResourceExhausted, SkepError
from skep.model.values.ids import ContainerId
from skep.model.values.times import unix_ns

log = structlog.get_logger()

FIRST_DELAY_S = 0.1
"""Docker's first delay (moby, restartmanager)."""
LONGEST_DELAY_S = 60.0
"""The first and the longest delay in seconds before a restart.  The delay doubles each time, as in Docker."""
LASTED_S = 10.0
"""A run of at least this many seconds resets the delay to ``FIRST_DELAY_S``."""


class StayEnded(msgspec.Struct, frozen=True):
    """Leave the container ended."""


class RemoveEnded(msgspec.Struct, frozen=True):
    """Remove the container (``--rm``)."""


class RestartContainer(msgspec.Struct, frozen=True):
    """Start the container after ``delay_s``, unless the user stops or starts it earlier.

    With ``ignore_stop``, an earlier stop by the user does not prevent the start.
    """

    delay_s: float
    ignore_stop: bool = False


Next: TypeAlias = StayEnded | RemoveEnded | RestartContainer


def after_end(plain: PlainOptions, exit_code: int, ran_s: float, delay_before_s: float = 0.0) -> Next:
    """Return the next action after a container's exit.

    Args:
        exit_code: Exit code of its process or of the failed start.
        ran_s: Length of the run in seconds.
        delay_before_s: Delay of the previous restart.  0 for the first restart.
    """
    if plain.auto_remove:
        return RemoveEnded()
    if not plain.wants_restart(exit_code):
        return StayEnded()
    if not delay_before_s or ran_s >= LASTED_S:
        return RestartContainer(FIRST_DELAY_S)
    return RestartContainer(min(2 * delay_before_s, LONGEST_DELAY_S))


def after_node_restart(plain: PlainOptions, exit_code: int, *, was_started: bool) -> Next:
    """Return the next action for a container that had already exited when the node process started.

    The policy ``always`` starts it even if the user has stopped it.
    """
    if not was_started:
        return StayEnded()
    if plain.restart.name == "always":
        return RestartContainer(0.0, ignore_stop=plain.is_stopped)
    return after_end(plain, exit_code, LASTED_S)


class RestartableContainers(Protocol):
    """The engine's interface for the restart monitor."""

    events: Events

    def plain_containers(self) -> Sequence[Container]:
        """Return the containers that do not belong to a task."""

    def get(self, word: str) -> Container:
        """Return a container.  Raises: NotFound."""

    async def restart(self, id: ContainerId, *, ignore_stop: bool) -> None:
        """Start it by its policy, unless it runs or the user has stopped it.

        Raises: NotFound; BeingRemoved; SkepError; OSError.
        """

    async def remove(self, word: str, *, force: bool = False, with_volumes: bool = False) -> None:
        """Remove a container.  Raises: NotFound; StillRunning; SkepError; OSError."""


class RestartMonitor:
    """Restarts or removes plain containers after their exit."""

    def __init__(
        self, containers: RestartableContainers, clock: Clock, rng: Callable[[], float] = random.random
    ) -> None:
        self._containers = containers
        self._clock = clock
        self._rng = rng
        self._delays_s: dict[ContainerId, float] = {}
        self._pending: set[ContainerId] = set()
        """Containers that a task of ``run`` is restarting or removing."""
        self._stopped: set[ContainerId] | None = set()
        """Containers that users have stopped since this process started.  None after the first decision."""
        self._resets: dict[ContainerId, asyncio.Event] = {}
        """For each waiting restart, the event that ends its delay."""
        self._user_restarts: defaultdict[ContainerId, list[asyncio.Event]] = defaultdict(list)
        """For each restart by a user that is in progress, the event of its end."""

    async def run(self) -> None:
        """Work until cancelled.  The containers keep running afterwards."""
        self._pending.clear()  # the tasks of an earlier run have ended
        async with asyncio.TaskGroup() as group:
            for container in self._containers.plain_containers():
                has_ended = not container.is_running and container.id not in (self._stopped or ())
                if has_ended and container.plain is not None:
                    first = after_node_restart(
                        container.plain, container.exit_code, was_started=container.was_started
                    )
                    self._schedule(group, container.id, first)
            self._stopped = None
            while True:
                try:
                    with self._containers.events.subscribed() as subscription:
                        for container in self._containers.plain_containers():
                            self._check(group, container)
                        async for event in subscription:
                            if event.action == "die":
                                self._check_id(group, event.container_id)
                except ResourceExhausted as error:  # events were missed, so check all containers again
                    log.warning("container exit events missed", reason=str(error))
                    await self._clock.sleep(FIRST_DELAY_S)

    def note_stop(self, id: ContainerId) -> None:
        """Record that the user stops a container, so that the policy ``always`` does not start it when this process
        starts.
        """
        if self._stopped is not None:
            self._stopped.add(id)

    def reset(self, id: ContainerId) -> None:
        """Reset the delay and end a waiting restart, because the user starts or removes the container."""
        self._delays_s.pop(id, None)
        if self._stopped is not None:
            self._stopped.discard(id)
        if (waiting := self._resets.get(id)) is not None:
            waiting.set()

    @contextmanager
    def restarting(self, id: ContainerId) -> Iterator[None]:
        """Do not remove the container for the block, in which its user restarts it.

        Source: moby, daemon/restart.go.
        """
        ended = asyncio.Event()
        self._user_restarts[id].append(ended)
        try:
            yield
        finally:
            ended.set()
            self._user_restarts[id].remove(ended)
            if not self._user_restarts[id]:
                del self._user_restarts[id]

    def _check_id(self, group: asyncio.TaskGroup, id: ContainerId) -> None:
        for container in self._containers.plain_containers():
            if container.id == id:
                self._check(group, container)

    def _check(self, group: asyncio.TaskGroup, container: Container) -> None:
        self._schedule(group, container.id, self._next(container))

    def _next(self, container: Container) -> Next:
        """Return the next action, by the container's current state."""
        if container.plain is None or container.is_running or not container.was_started:
            return StayEnded()
        ran_s = (unix_ns(container.finished_at) - unix_ns(container.started_at)) / 1e9
        before_s = self._delays_s.get(container.id, 0.0)
        next_ = after_end(container.plain, container.exit_code, ran_s, before_s)
        return StayEnded() if isinstance(next_, RestartContainer) and container.is_at_rest else next_

    def _schedule(self, group: asyncio.TaskGroup, id: ContainerId, next_: Next) -> None:
        if id in self._pending or isinstance(next_, StayEnded):
            return
        group.create_task(self._carry_out(id, next_), name=f"restart {id[:12]}")
        self._pending.add(id)

    async def _carry_out(self, id: ContainerId, next_: Next) -> None:
        """Restart or remove a container until nothing more is due.

        It handles the container's exits itself meanwhile.
        """
        spread = 1.0
        try:
            while True:
                match next_:
                    case StayEnded():
                        return
                    case RemoveEnded():
                        next_ = await self._remove(id)
                    case RestartContainer(delay_s):
                        self._delays_s[id] = delay_s
                        next_ = await self._start_again(id, next_, delay_s * spread)
                    case _:
                        assert_never(next_)
                # Many containers may fail for the same reason, such as a full disk.  Do not retry them all at the same
                # moment.
                spread = 0.5 + 0.5 * self._rng()
        except (NotFound, BeingRemoved):
            pass  # removed by the user meanwhile
        except Exception as error:
            log_error(error, "restart policy not applied", container=id)
        finally:
            # Here and not in a callback of the task, which would miss an exit between the last check and the callback.
            self._pending.discard(id)

    async def _remove(self, id: ContainerId) -> Next:
        """Remove the container, and retry as long as that fails.  Return the next action.  Raises: NotFound."""
        while id in self._user_restarts:
            await self._user_restarts[id][0].wait()
        try:
            await retry(
                partial(self._containers.remove, id, with_volumes=True),
                "ended container not removed",
                clock=self._clock,
                first_s=FIRST_DELAY_S,
                longest_s=LONGEST_DELAY_S,
                rng=self._rng,
                passes=(NotFound, StillRunning),
                container=id,
            )
        except StillRunning:  # the user has started it meanwhile
            return self._next(self._containers.get(id))
        return StayEnded()

    async def _start_again(self, id: ContainerId, due: RestartContainer, wait_s: float) -> Next:
        """Restart the container after ``wait_s``.  Return the next action.  Raises: NotFound; BeingRemoved."""
        reset = self._resets[id] = asyncio.Event()
        try:
            await run_unless(self._clock.sleep(wait_s), reset.wait())
        except LostRace:  # handle its exits from now on, because the user's start may fail
            return self._next(self._containers.get(id))
        finally:
            del self._resets[id]
        try:
            await self._containers.restart(id, ignore_stop=due.ignore_stop)
        except BeingRemoved:
            raise
        except (SkepError, OSError) as error:  # a full disk, for example
            container = self._containers.get(
                id
            )  # check again, because NotFound may be about one of its networks
            log.info("plain container not restarted", container=id, reason=describe_error(error))
            if container.plain is None:
                return StayEnded()
            return after_end(container.plain, container.exit_code or 1, 0.0, due.delay_s)
        return self._next(self._containers.get(id))  # the container may have exited again
