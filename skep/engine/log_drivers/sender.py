"""The process that sends containers' output to their log drivers' remotes.

The node process (``engine.logs.log_forwarding``) runs it while a container needs it.  It reads orders from its standard
input, and ends when the input ends.  The position in each log is on disk, so the next process continues there.
"""

import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec

from skep.aio.clock import SystemClock
from skep.aio.failures import describe_error
from skep.engine.log_drivers import fluentd, gelf, journald, splunk, syslog
from skep.engine.log_drivers.facts import LogFacts
from skep.engine.log_drivers.forwarder import Forwarder
from skep.engine.log_drivers.message import LogSink
from skep.engine.log_drivers.options import Options, buffer_bytes
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
from skep.engine.log_drivers.spool import Spool
from skep.linux.filewatch import FileWatch
from skep.linux.network.guard import Guard

SINKS: Mapping[str, Callable[[Options, LogFacts, Guard], LogSink]] = MappingProxyType(
    {
        "fluentd": fluentd.Fluentd,
        "gelf": gelf.Gelf,
        "journald": journald.Journald,
        "splunk": splunk.Splunk,
        "syslog": syslog.Syslog,
    }
)
_HELD_S = 60.0
"""Seconds for sending the rest of a removed container's output."""
_END_S = 5.0
"""Seconds for sending the rest when this process ends."""


class Sender:
    """All forwarders.  ``respond`` sends a response."""

    def __init__(self, respond: Callable[[Response], None], held_s: float = _HELD_S) -> None:
        """``held_s``: Seconds for sending the rest of a removed container's output."""
        self._respond = respond
        self._held_s = held_s
        self._forwarders: dict[str, Forwarder] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._later: dict[str, Forward] = {}
        """Orders for containers that were started again while the output of their last run is still being sent."""
        self._held: set[asyncio.Task[None]] = set()
        self._deadlines: dict[asyncio.Task[None], asyncio.TimerHandle] = {}
        """When the tasks of removed containers are cancelled."""
        self._peers: frozenset[str] = frozenset()
        self._is_ending = False
        self._clock = SystemClock()

    def take(self, order: Order) -> None:
        """Execute an order."""
        match order:
            case Forward():
                if (forwarder := self._forwarders.get(order.id)) is not None:
                    forwarder.release()
                    self._later[order.id] = order
                else:
                    self._start(order)
            case End(id):
                if (later := self._later.get(id)) is not None:
                    self._later[id] = msgspec.structs.replace(later, has_ended=True)
                elif (forwarder := self._forwarders.get(id)) is not None:
                    forwarder.end()
            case Hold(id):
                self._later.pop(id, None)
                if (forwarder := self._forwarders.get(id)) is not None:
                    self._hold(id, forwarder)
                self._respond(Held(id))
            case Peers(addresses):
                self._peers = frozenset(addresses)

    async def end(self) -> None:
        """Send the output of removed containers for up to ``_END_S``, then stop everything."""
        self._is_ending = True
        for task in [task for task in self._tasks.values() if task not in self._held]:
            task.cancel()
        if self._held:
            await asyncio.wait(self._held, timeout=_END_S)
        for task in (*self._tasks.values(), *self._held):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), *self._held, return_exceptions=True)

    def _start(self, order: Forward) -> None:
        def report(event: str, reason: str, lines: int) -> None:
            self._respond(Report(id=order.id, driver=order.driver, event=event, reason=reason, lines=lines))

        try:
            guard = Guard(lambda: self._peers, is_restricted=order.is_restricted)
            sink = SINKS[order.driver](order.options, order.facts, guard)
            bytes_max = buffer_bytes(order.options)
            current = Path(order.current)
            forwarder = Forwarder(Spool(current), FileWatch(current.parent), sink, self._clock, report)
        except Exception as error:  # e.g. a file that was removed since creation; others are unaffected
            report("log driver cannot be used", describe_error(error), 0)
            self._respond(Done(order.id))
            return
        if bytes_max:
            forwarder.bound(bytes_max)
        if order.has_ended:
            forwarder.end()
        self._forwarders[order.id] = forwarder
        task = asyncio.get_running_loop().create_task(self._run(forwarder, report), name=order.id)
        self._tasks[order.id] = task
        task.add_done_callback(lambda done: self._forget(order.id, done))

    async def _run(self, forwarder: Forwarder, report: Callable[[str, str, int], None]) -> None:
        try:
            await forwarder.run()
        except Exception as error:  # one container's error must not affect others
            report("log forwarding stopped", describe_error(error), 0)

    def _hold(self, id: str, forwarder: Forwarder) -> None:
        task = self._tasks[id]
        self._held.add(task)
        if (earlier := self._deadlines.get(task)) is not None:  # of a removal that lost against a start
            earlier.cancel()
        self._deadlines[task] = asyncio.get_running_loop().call_later(self._held_s, task.cancel)
        try:
            forwarder.hold()
        except Exception as error:  # the same
            reason = describe_error(error)
            self._respond(
                Report(
                    id=id, driver="", event="log of a removed container may be lost", reason=reason, lines=0
                )
            )

    def _forget(self, id: str, task: asyncio.Task[None]) -> None:
        self._held.discard(task)
        self._deadlines.pop(task, None)
        if self._tasks.get(id) is task:
            del self._tasks[id], self._forwarders[id]
            later = self._later.pop(id, None)
            if (
                later is not None and not self._is_ending
            ):  # a removal that lost against a start has cancelled the task
                self._start(later)
            else:
                self._respond(Done(id))


async def _main() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=LINE_BYTES_MAX)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(0, "rb", 0))
    encoder = msgspec.json.Encoder()
    sender = Sender(lambda response: _write(encoder.encode(response)))
    decoder = msgspec.json.Decoder(Order)
    try:
        while line := await reader.readline():
            sender.take(decoder.decode(line))
    finally:
        await sender.end()


def _write(line: bytes) -> None:
    try:
        os.write(1, line + b"\n")
    except OSError:  # the node process has ended
        return


if __name__ == "__main__":
    asyncio.run(_main())
    sys.stdout.flush()
