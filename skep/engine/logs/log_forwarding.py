"""Runs the sender process, which sends containers' output to the destinations of their log drivers.

Level-triggered: the orders sent to the process are compared with the existing containers.  A process that ends is
restarted with growing pauses.  No output is lost, because the new process continues where the last one stopped.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from functools import partial

import msgspec
import structlog

from skep.aio.groups import errors_as_they_are
from skep.aio.race import afterwards
from skep.engine.containers.container import Container, ContainerEvent
from skep.engine.events import Events
from skep.engine.log_drivers.facts import facts_of
from skep.engine.log_drivers.options import FILE_DRIVERS
from skep.engine.log_drivers.orders import (
    LINE_BYTES_MAX,
    Done,
    End,
    Forward,
    Held,
    Hold,
    Order,
    Peers,
    Report,
    Response,
)
from skep.engine.runtime.bundle import Bundles
from skep.errors import Unavailable
from skep.model.values.ids import ContainerId

log = structlog.get_logger()

HOLD_DEADLINE_S = 10.0
"""Seconds to wait until the process has opened the files of a container that is about to be removed."""
_END_S = 7.0
"""Seconds to wait for the end of the process.  Longer than the process's own limit (``sender._END_S``)."""
_SENDER = "skep.engine.log_drivers.sender"
"""The module of the process, which is not imported here, because few nodes have such drivers."""
_ACTIONS = frozenset({"start", "die", "destroy"})


def is_sent(container: Container) -> bool:
    """Return whether the log driver sends the output to another program or machine, and output may exist."""
    return container.config.log.type not in (*FILE_DRIVERS, "none") and container.was_started


def encoded(order: Order) -> bytes | None:
    """Encode an order as a line for the process, or return None if it exceeds the process's line limit."""
    line = msgspec.json.encode(order) + b"\n"
    return line if len(line) <= LINE_BYTES_MAX else None


class LogForwarding:
    """Runs the sender process.  ``hostname`` is the node's name.  ``containers`` returns all current containers."""

    def __init__(
        self, bundles: Bundles, hostname: str, events: Events, containers: Callable[[], Iterable[Container]]
    ) -> None:
        self._bundles = bundles
        self._hostname = hostname
        self._events = events
        self._containers = containers
        self._sent: dict[ContainerId, bool] = {}
        """Containers that the current process knows, and whether it also knows that the container has ended."""
        self._sending: set[str] = set()
        """Containers whose output is not completely sent, including removed ones."""
        self.pid = 0
        """Pid of the process, or 0 if none is needed."""
        self._changed = asyncio.Event()
        self._holding: dict[str, asyncio.Future[None]] = {}
        self._peers = Peers(())

    def set_peers(self, addresses: Iterable[str]) -> None:
        """Set the addresses of the other nodes.  Restricted logs are not sent there."""
        self._peers = Peers(tuple(sorted(set(addresses))))
        self._changed.set()

    async def run(self) -> None:
        """Run the process while it is needed, until cancelled.  Raises: Unavailable: the process has ended."""
        with self._events.subscribed() as events:
            async with errors_as_they_are(), asyncio.TaskGroup() as group:
                watching = group.create_task(self._watch(aiter(events)), name="containers with sent logs")
                try:
                    while True:
                        while not any(map(is_sent, self._containers())):
                            await self._wait_changed()
                        await self._run_process()
                finally:
                    watching.cancel()

    async def hold(self, container: Container) -> None:
        """Wait until the container's files may be removed.  Their content is still sent."""
        if not is_sent(container):
            return
        held = self._holding.get(container.id)
        if held is None:
            held = self._holding[container.id] = asyncio.get_running_loop().create_future()
        self._changed.set()
        try:
            async with asyncio.timeout(HOLD_DEADLINE_S):
                await asyncio.shield(held)  # other removals wait for it as well
        except TimeoutError:
            log.warning("logs of a removed container may be lost", container=container.id)
        finally:
            self._holding.pop(container.id, None)

    async def _watch(self, events: AsyncIterator[ContainerEvent]) -> None:
        async for event in events:
            if event.action in _ACTIONS:
                self._changed.set()

    async def _wait_changed(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    async def _run_process(self) -> None:
        async with _run_sender() as process:
            self._sent, self._sending, self.pid = {}, set(), process.pid
            peers = Peers(())
            assert process.stdin is not None, "orders go through a pipe"
            async with errors_as_they_are(), asyncio.TaskGroup() as group:
                listening = group.create_task(self._listen(process), name="responses of the log sender")
                try:
                    while True:
                        if self._peers != peers:
                            peers = self._peers
                            process.stdin.write(msgspec.json.encode(peers) + b"\n")
                        for order in self._orders(self._wanted()):
                            self._send(process.stdin, order)
                        if not self._sent and not self._sending:
                            break
                        with suppress(ConnectionError):  # the listener notices its end
                            await process.stdin.drain()
                        await self._wait_changed()
                finally:
                    self.pid = 0
                    listening.cancel()

    def _send(self, stdin: asyncio.StreamWriter, order: Forward | End | Hold) -> None:
        line = encoded(order)
        if line is None:
            log.warning("log not sent: labels and variables too large", container=order.id)
            return
        stdin.write(line)
        if isinstance(order, Forward):
            self._sending.add(order.id)

    def _wanted(self) -> dict[ContainerId, Container]:
        return {one.id: one for one in self._containers() if is_sent(one)}

    def _orders(self, wanted: dict[ContainerId, Container]) -> list[Forward | End | Hold]:
        """Return the orders that bring the process up to date with ``wanted``."""
        orders: list[Forward | End | Hold] = []
        for id, container in wanted.items():
            has_ended, known = not container.is_running, self._sent.get(id)
            if known is None or (known and not has_ended):
                orders.append(self._forward(container))
            elif has_ended and not known:
                orders.append(End(id))
            self._sent[id] = has_ended
            if id in self._holding:
                orders.append(Hold(id))
        removed = [id for id in self._sent if id not in wanted]
        return orders + [End(id) for id in removed if not self._sent.pop(id)]

    def _forward(self, container: Container) -> Forward:
        return Forward(
            id=container.id,
            current=str(self._bundles.log(container.id)),
            driver=container.config.log.type,
            options=container.config.log.options,
            facts=facts_of(container, self._hostname),
            has_ended=not container.is_running,
            is_restricted=container.config.log.is_restricted,
        )

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None, "responses come in a pipe"
        while line := await process.stdout.readline():
            match msgspec.json.decode(line, type=Response):
                case Held(id):
                    held = self._holding.get(id)
                    if held is not None and not held.done():
                        held.set_result(None)
                case Done(id):
                    self._sending.discard(id)
                    self._changed.set()
                case Report() as report:
                    keys = {"reason": report.reason} if report.reason else {}
                    if report.lines:
                        keys["lines"] = str(report.lines)
                    log.warning(report.event, container=report.id, driver=report.driver, **keys)
        raise Unavailable("the process that sends logs has ended")


@asynccontextmanager
async def _run_sender() -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-m", _SENDER),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_BYTES_MAX,
        start_new_session=True,
        cwd="/",
        env={"LANG": "C.UTF-8"},
    )
    async with afterwards(partial(_end, process)):
        yield process


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None, "its end is the sign"
    process.stdin.close()
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
