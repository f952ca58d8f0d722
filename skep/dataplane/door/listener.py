"""Applies the table of the door's network to the HAProxy that runs on this node.

The door's task mounts a volume of this node.  Its files are written there, and its sockets are in it.  Certificates are
elsewhere (``Keys``), where no other container can mount them.  Files are written before the commands are sent, so that
a HAProxy that starts in between reads the current ones.

Tasks and challenges are added and removed by commands, which also replace renewed certificates.  All other changes are
a reload, after which the former process serves its open connections on.  The description in the configuration tells
which one HAProxy runs.
"""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import structlog

from skep.aio.clock import Clock, tick
from skep.aio.failures import isolate
from skep.dataplane.door.configuration import (
    DoorState,
    commands,
    description_of,
    every_command,
    files,
    use_newest,
    version_of,
)
from skep.dataplane.door.derivation import counted_services, proxies_on, state_of
from skep.dataplane.door.holding import HeldRequests, connect
from skep.dataplane.door.idleness import BackendCounters, IdleWatch
from skep.dataplane.door.losses import LostTasks, endings
from skep.dataplane.door.reading import counters_in, questions, wanted_of
from skep.dataplane.door.statistics import RequestWindow, ServiceWindow
from skep.dataplane.door.traffic import RouteCounters
from skep.errors import Unavailable
from skep.model.door.payloads import DoorPayload
from skep.model.door.settings import DIRECTORY, KEYS_DIRECTORY, DoorSettings
from skep.model.door.traffic import RouteTraffic
from skep.model.measures.readings import ServiceRequests
from skep.model.networks.tables import NetworkTable
from skep.model.staging.updates import TaskRequests
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId

log = structlog.get_logger(__name__)

COMMANDS_S_MAX = 2.0
"""Seconds for commands.  HAProxy responds within milliseconds, and other networks wait meanwhile."""
RELOAD_S_MAX = 10.0
"""Seconds for a reload.  HAProxy reads 10,000 routes in two to three."""
LOOK_S = 0.02
"""Pause in seconds between two looks at whether HAProxy has reloaded."""
SAMPLE_S = 5.0
"""Seconds between two readings of counters.  A heartbeat reports them every few seconds."""
_BATCH = 200
"""Commands in one connection.  HAProxy reads at most 16 KiB at once."""
_RESPONSE_MAX = 1 << 20
"""Bytes of a response.  Those of a batch and of ``show info`` have less than 64 KiB."""
_STATISTICS_MAX = 8 << 20
"""Bytes of the statistics of all backends.  Those of 10,000 have 5 MiB."""
_MISSED_MAX = 3
"""Responses that a reading may miss, because each takes ``COMMANDS_S_MAX``.  After that, HAProxy counts as silent."""

_CONNECTIONS = re.compile(r"^CurrConns: (\d+)", re.MULTILINE)
_DESCRIPTION = re.compile(r"^Description: (\S+)", re.MULTILINE | re.IGNORECASE)
_WORKER = re.compile(r"^(\d+) +worker ", re.MULTILINE)
_STOPPING = re.compile(r"^Stopping: 1$|Can't find the target", re.MULTILINE)
_DONE = ("changed from", "no need to change", "Transaction created", "Committing", "Success!")
_ADMIN, _MASTER = "admin.sock", "master.sock"
_UNREAD = "statistics of the front door not read"
_IPV6 = Path("/proc/sys/net/ipv6")
"""Exists if the kernel has IPv6."""


Keys = Callable[[], DoorPayload]
"""Writes the certificates that the front door's tasks can read, and returns them with the challenges.  It is called in
a thread.
"""


class FrontDoor:
    """The HAProxy of this node."""

    def __init__(
        self,
        directory: Callable[[], Path | None],
        clock: Clock,
        keys: Keys,
        *,
        seen_at: tuple[str, str] = (DIRECTORY, KEYS_DIRECTORY),
        settings: DoorSettings | None = None,
        held: HeldRequests | None = None,
    ) -> None:
        """Make the listener.

        Args:
            directory: Returns the directory of the volume, or None if this node has none.
            seen_at: The same directory, and the one of the certificates, as HAProxy sees them.
            settings: Used instead of the labels of the door's service.
            held: Holds the requests for services without a task.
        """
        self._directory = directory
        self._clock = clock
        self._keys = keys
        self._seen_at = seen_at
        self._settings = settings
        self._state = DoorState()
        self._lost = LostTasks(clock)
        self._applied: DoorState | None = None
        """The state that HAProxy has for certain."""
        self._window = RequestWindow()
        self.routes = RouteCounters()
        self._counted: frozenset[ServiceId] = frozenset()
        self._service_window = ServiceWindow()
        self._idle = IdleWatch()
        self._reading = asyncio.Lock()
        """Held during a reading.  Older counters after newer ones would look like a reload."""
        self.held = held or HeldRequests()

    async def apply(
        self, node_id: NodeId, tables: Mapping[NetworkId, NetworkTable], changed: frozenset[NetworkId]
    ) -> None:
        """Apply the table of the door's network (``TableListener``).

        Raises:
            Unavailable: The door's task runs, and its HAProxy does not respond or does not accept the configuration.
            OSError: A file cannot be written.
        """
        door = min((one for one in tables.values() if one.head.is_door), key=_network, default=None)
        proxies = proxies_on(door, node_id) if door is not None else []
        if door is None or not proxies:
            self._applied, self._counted = None, frozenset()
            self._lost.follow(None)
            return
        self._counted = counted_services(door)
        if door.head.id not in changed and self._applied is not None:
            return
        directory = self._directory()
        if directory is None:
            self._applied = None
            if any(one.is_running for one in proxies):
                raise Unavailable("the front door's task has no volume skep-door on this node")
            return
        self._lost.follow(door)
        # In a thread, because ten thousand routes take a second.
        payload = await asyncio.to_thread(self._keys)
        lost = frozenset(self._lost.present())
        derive = partial(
            state_of, door, self._state, self._settings, payload, has_ipv6=_IPV6.exists(), lost=lost
        )
        state = self._state = await asyncio.to_thread(derive)
        self.held.apply(state, is_reached=False)
        self.held.listen(directory)
        if state == self._applied:
            self.held.apply(state, is_reached=True)
            return
        await asyncio.to_thread(write_files, directory, files(state, *self._seen_at))
        before, self._applied = self._applied, None
        try:
            await self._bring(directory, before, state)
        except Unavailable:
            if any(one.is_running for one in proxies):
                raise
            return  # it reads the files when it starts
        finally:
            # Also after a failure, because HAProxy may have it.  If not, requests are sent again.
            self.held.apply(state, is_reached=True)
        self._applied = state

    def serves(self) -> bool:
        """Return whether HAProxy has the routes and certificates of the last table."""
        return self._applied is not None

    def requests(self) -> Mapping[TaskId, TaskRequests]:
        """Return the recent requests of new tasks in staged updates."""
        return self._window.present(self._clock.monotonic())

    def service_requests(self) -> Mapping[ServiceId, ServiceRequests]:
        """Return the recent requests of services that are autoscaled by them."""
        return self._service_window.present(self._clock.monotonic())

    def idle(self) -> Mapping[ServiceId, float]:
        """Return the seconds without a request of services that may be scaled to zero, as far as they are known."""
        return self._idle.present(self._clock.monotonic())

    async def run(self) -> None:
        """Count requests and hold them until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.held.run(), name="held requests")
            group.create_task(self.end_connections(), name="connections to lost tasks")
            while True:
                await tick(self._clock, SAMPLE_S)
                # HAProxy can be any image, and write anything.  Requests are held all the same.
                await isolate(self.read_statistics(), _UNREAD, on_error=self._forget_idle)

    def _forget_idle(self, _: Exception) -> None:
        self._idle.forget()

    async def read_statistics(self) -> None:
        """Read HAProxy's counters once.  A missing or malformed response loses only its own counters."""
        async with self._reading:
            await self._read(self._applied)

    async def _read(self, state: DoorState | None) -> None:
        directory = self._directory()
        if state is None or directory is None:
            self._idle.forget()
            return
        wanted = wanted_of(state, self._counted)
        texts = await self._responses(directory, questions(wanted))
        if not texts:
            self._idle.forget()
            return
        former: list[str] | None = None  # idle times are not known without all former processes
        with suppress(Unavailable):
            former = [text async for text in self._statistics_of_former(directory)] if wanted.idle else []
        # In a thread, because hundreds of routes take some milliseconds.
        found = await asyncio.to_thread(counters_in, wanted, texts, former)
        now = self._clock.monotonic()
        self._window.add(now, found.lines)
        self.routes.add(now, found.routes, found.unread)
        self._service_window.add(now, wanted.services, found.services)
        if found.idle is None:
            self._idle.forget()
            return
        open_now, opened = self.held.open(), self.held.opened
        self._idle.add(
            now,
            {id: one + BackendCounters(open_now.get(id, 0), opened[id]) for id, one in found.idle.items()},
        )

    async def _responses(self, directory: Path, wanted: Iterable[str]) -> list[str]:
        """Return the responses to questions, until HAProxy has missed ``_MISSED_MAX`` of them."""
        found, missed = [], 0
        for one in wanted:
            try:
                found.append(await self._ask(directory / _ADMIN, one, _STATISTICS_MAX))
            except Unavailable as error:
                log.debug(_UNREAD, error=str(error))
                missed += 1
                if missed >= _MISSED_MAX:
                    break
        return found

    async def _statistics_of_former(self, directory: Path) -> AsyncIterator[str]:
        """Yield the statistics of all backends in former processes that have connections.  Raises: Unavailable."""
        for pid in await self._former(directory):
            about = await self._ask(directory / _MASTER, f"@!{pid} show info\n")
            if (found := _CONNECTIONS.search(about)) is not None and found[1] != "0":
                yield about + await self._ask(
                    directory / _MASTER, f"@!{pid} show stat -1 2 -1\n", _STATISTICS_MAX
                )

    def recent_routes(self) -> Sequence[RouteTraffic]:
        """Return the requests of the last minute by route."""
        return self.routes.recent(self._clock.monotonic())

    async def end_connections(self) -> None:
        """End the connections to lost tasks until cancelled.  A HAProxy that does not respond keeps them."""
        while True:
            lost = await self._lost.due()
            if (directory := self._directory()) is not None:
                await isolate(
                    self._end(directory, endings(self._state, lost)), "connections not ended", tasks=lost
                )
            self._lost.forget(lost)

    async def _end(self, directory: Path, wanted: Sequence[str]) -> None:
        """End connections by commands.  A HAProxy that has other servers refuses them.  Raises: Unavailable."""
        for batch in _batches(wanted):
            await self._ask(directory / _ADMIN, ";".join(batch) + "\n")

    async def _bring(self, directory: Path, before: DoorState | None, state: DoorState) -> None:
        """Bring the running HAProxy to ``state``, whose files are written.  Raises: Unavailable."""
        wanted = description_of(state)
        running = await self._description(directory)
        if running.partition(".")[0] == version_of(state):
            found = commands(before, state, *self._seen_at) if before is not None else None
            if found is None and running == wanted:
                found = every_command(state, self._seen_at[0])
            with suppress(_Refused):
                # This HAProxy may refuse a certificate while it runs.
                if found is not None:
                    await self._run(directory, found)
                    return
        # A new process counts from 0, and the former process may end before its counters are read.
        async with self._reading:
            await isolate(self._read(before), _UNREAD, on_error=self._forget_idle)
            self._idle.expect_reload()
        await self._ask(directory / _MASTER, "reload\n")
        log.info("front door reloaded", routes=len(state.routes), version=wanted)
        until = self._clock.monotonic() + RELOAD_S_MAX
        while self._clock.monotonic() < until:
            with suppress(Unavailable):
                if await self._description(directory) == wanted and await self._is_alone(directory):
                    await self._connect_former(directory)
                    return
            await self._clock.sleep(LOOK_S)
        raise Unavailable("the front door's HAProxy does not run the new configuration: see its log")

    async def _is_alone(self, directory: Path) -> bool:
        """Return whether former processes no longer accept connections, which would follow former routes."""
        for pid in await self._former(directory):
            if _STOPPING.search(await self._ask(directory / _MASTER, f"@!{pid} show info\n")) is None:
                return False
        return True

    async def _connect_former(self, directory: Path) -> None:
        """Let former processes send requests of idle connections to the newest one, which knows later tasks."""
        for pid in await self._former(directory):
            await self._ask(directory / _MASTER, f"@!{pid} {use_newest(self._seen_at[0])}\n")

    async def _former(self, directory: Path) -> Sequence[str]:
        """Return the ids of former processes."""
        found: Sequence[str] = _WORKER.findall(
            (await self._ask(directory / _MASTER, "show proc\n")).partition("# old workers")[2]
        )
        return found

    async def _description(self, directory: Path) -> str:
        """Return the description of the configuration that HAProxy runs."""
        found = _DESCRIPTION.search(await self._ask(directory / _ADMIN, "show info\n"))
        return found[1] if found is not None else ""

    async def _run(self, directory: Path, wanted: list[str]) -> None:
        """Send commands.  Raises: _Refused, Unavailable."""
        for batch in _batches(wanted):
            response = await self._ask(directory / _ADMIN, ";".join(batch) + "\n")
            # HAProxy responds to these commands with empty lines, or with the change.
            lines = filter(None, response.splitlines())
            refused = [line for line in lines if not any(word in line for word in _DONE)]
            if refused:
                raise _Refused(f"the front door's HAProxy refused a command: {refused[0][:200]}")

    async def _ask(self, socket: Path, request: str, bytes_max: int = _RESPONSE_MAX) -> str:
        """Return the response to commands.  Raises: Unavailable."""
        try:
            async with asyncio.timeout(COMMANDS_S_MAX):
                reader, writer = await connect(socket)
                try:
                    writer.write(request.encode())
                    writer.write_eof()
                    await writer.drain()
                    found = bytearray()
                    while part := await reader.read(1 << 16):
                        found += part
                        if len(found) > bytes_max:
                            raise Unavailable("the front door's HAProxy sends too long a response")
                finally:
                    writer.close()
        except (OSError, TimeoutError) as error:
            raise Unavailable(f"the front door's HAProxy does not respond: {error or 'timeout'}") from error
        return found.decode(errors="replace")


class _Refused(Unavailable):
    """Raised if HAProxy refuses a command."""


def _batches(wanted: Sequence[str]) -> Iterator[list[str]]:
    """Yield commands that are sent together.  A command with several lines is sent alone."""
    batch: list[str] = []
    for command in wanted:
        if batch and (len(batch) == _BATCH or "\n" in command or "\n" in batch[-1]):
            yield batch
            batch = []
        batch.append(command)
    if batch:
        yield batch


def _network(table: NetworkTable) -> str:
    return table.head.id


def write_files(directory: Path, wanted: Mapping[str, str]) -> None:
    """Write changed files into ``directory``.  Raises: OSError.

    The container can put links into the directory.  They are replaced and never followed.
    """
    top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for name, text in wanted.items():
            _replace(top, name, text.encode())
    finally:
        os.close(top)


def _replace(directory: int, name: str, data: bytes) -> None:
    """Replace a file at once, so that HAProxy never reads a part of it."""
    temporary = f".{name}.new"
    with suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=directory)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(temporary, flags, 0o644, dir_fd=directory), "wb") as file:
        file.write(data)
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
