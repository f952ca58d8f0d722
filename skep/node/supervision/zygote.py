"""The zygote: a process that has imported all modules and done nothing else, from which node, manager and net are
forked.

Forked processes share the memory pages of the interpreter and all libraries: three processes use 56 MB instead of 141.
A process that forks must have a single thread and no event loop.  So the process that systemd starts becomes the zygote
(``host``), forks the node process, and passes signals on to it.  The node process requests further forks over a socket.
Those processes are in new sessions and outlive zygote and node process.

A node process that crashes is forked again.  Starting an interpreter with all imports would take seconds on a busy
machine.  A fork is back before the managers count the node as down.  If the zygote ends, its node process ends with it.

Each request has a number and one response with the same number: ``Fork`` -> pid, ``Reap`` -> exit status of that child.

A process whose start users wait for can be a *spare*: forked in advance, with its own imports done, and waiting for its
arguments.  ``Fork`` then only sends them.  A spare process ends with the zygote.
"""

import asyncio
import ctypes
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import NamedTuple, NoReturn

import msgspec
import structlog

from skep.aio.clock import SystemClock
from skep.aio.event_loop.gc_settings import freeze
from skep.errors import Unavailable
from skep.linux.detached import set_title

log = structlog.get_logger()

Entry = Callable[[Sequence[str]], None]
"""The function that a forked process runs.

It blocks until its work is done.  An exception ends the process with exit code 1.
"""

Preparation = Callable[[], None]
"""Work of a spare process that can be done before its arguments are known."""

_MESSAGE_BYTES_MAX = 64 * 1024
"""Longest message in bytes between zygote and node process."""
_RESPONSE_TIMEOUT_S = 10.0
"""Time limit in seconds for a fork, which normally takes milliseconds."""
# Source: linux/prctl.h.
_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

LASTED_S = 3.0
"""A node process that ends within this many seconds is not forked again.

The zygote ends too, and its supervisor (systemd) restarts everything.
"""
_PAUSE_S = 0.2
"""Seconds before a crashed node process is forked again, so that commands that it has started (such as runc) end first.
"""


class Fork(msgspec.Struct, frozen=True, tag=True):
    """Start a process: call the function ``entry`` with these arguments in it."""

    entry: str
    arguments: tuple[str, ...]


class Reap(msgspec.Struct, frozen=True, tag=True):
    """Collect the exit status of a process that has ended."""

    pid: int


class KeepSpare(msgspec.Struct, frozen=True, tag=True):
    """Keep a spare process for ``entry``, or end it.  Idempotent."""

    entry: str
    wanted: bool


class Notify(msgspec.Struct, frozen=True, tag=True):
    """Notify systemd, which accepts notifications only from the process that it started.  Has no response."""

    state: str


class ForkRequest(msgspec.Struct, frozen=True):
    """A request with its number.  By the number, a late response to an abandoned request is recognized."""

    number: int
    request: Fork | Reap | KeepSpare | Notify


class ForkResponse(msgspec.Struct, frozen=True):
    """The response to the request with this number."""

    number: int
    value: int


class ZygoteGone(Unavailable):
    """No process can be started.  The node process must be restarted to get a new zygote."""

    def __init__(self) -> None:
        super().__init__("the process that starts others has ended: restart skep")


class Zygote:
    """The node process's end of the socket."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._turn = asyncio.Lock()
        self._last_number = 0

    async def fork(self, entry: str, arguments: Sequence[str]) -> int:
        """Start ``entry`` in a process of its own and return its pid.  Raises: ZygoteGone, Unavailable."""
        return await self._request(Fork(entry, tuple(arguments)))

    async def reap(self, pid: int) -> int | None:
        """Return the exit code of a child that has ended, or minus its signal, or None if unknown."""
        try:
            status = await self._request(Reap(pid))
        except Unavailable:
            return None
        return None if status < 0 else os.waitstatus_to_exitcode(status)

    async def keep_spare(self, entry: str, *, wanted: bool) -> None:
        """Keep a spare process for ``entry``, which ``fork`` uses, or end it if not ``wanted``.

        Raises: ZygoteGone, Unavailable.
        """
        await self._request(KeepSpare(entry, wanted))

    def notify(self, state: str) -> None:
        """Notify systemd (``notify``)."""
        with suppress(OSError):
            self._connection.send(msgspec.msgpack.encode(ForkRequest(0, Notify(state))))

    def close(self) -> None:
        """Close the socket."""
        self._connection.close()

    async def _request(self, request: Fork | Reap | KeepSpare) -> int:
        loop = asyncio.get_running_loop()
        try:
            async with self._turn, asyncio.timeout(_RESPONSE_TIMEOUT_S):
                self._last_number += 1
                sent = ForkRequest(self._last_number, request)
                await loop.sock_sendall(self._connection, msgspec.msgpack.encode(sent))
                while message := await loop.sock_recv(self._connection, _MESSAGE_BYTES_MAX):
                    response = msgspec.msgpack.decode(message, type=ForkResponse)
                    if response.number == sent.number:
                        return response.value
        except TimeoutError as error:
            raise Unavailable("the zygote, which starts processes, does not respond") from error
        except OSError as error:
            raise ZygoteGone from error
        raise ZygoteGone


def host(
    entries: Mapping[str, Entry], preparations: Mapping[str, Preparation], node: Callable[[Zygote], int]
) -> int:
    """Become the zygote and run ``node`` in a child, again after crashes.  Return the exit code of the last child.

    Call it early: with a single thread and no event loop.  Passes SIGTERM, SIGINT and SIGHUP to the node process.
    ``preparations`` belong to the entries that can have a spare process.
    """
    freeze()
    children = Children(entries, preparations)
    relay = _Relay()
    for number in _SIGNALS:
        signal.signal(number, relay.take)
    clock = SystemClock()
    while True:
        started = clock.monotonic()
        status = _run_node(node, children, relay)
        has_crashed = os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == os.EX_SOFTWARE
        if relay.is_stopping or not has_crashed or clock.monotonic() - started < LASTED_S:
            return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        log.error("node process crashed", how=_how(status))
        time.sleep(_PAUSE_S)


class _Relay:
    """Passes signals on to the node process."""

    def __init__(self) -> None:
        self.pid = 0
        self.is_stopping = False

    def take(self, number: int, _frame: FrameType | None) -> None:
        self.is_stopping |= number != signal.SIGHUP
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


def _run_node(node: Callable[[Zygote], int], children: "Children", relay: _Relay) -> int:
    """Fork a node process and serve it until it has ended.  Return its status (``os.waitpid``)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sys.stdout.flush()
    sys.stderr.flush()
    zygote = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # no signal may arrive before the pid is known
    if relay.is_stopping:
        return 0
    pid = os.fork()
    if pid == 0:
        ours.close()
        children.forget()
        _be_node(node, theirs, zygote)
    relay.pid = pid
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    set_title("skep-zygote")
    theirs.close()
    ended = os.pidfd_open(pid)
    try:
        with ours:
            serve(ours, children, ended)
        relay.pid = 0
        return os.waitpid(pid, 0)[1]
    finally:
        os.close(ended)


def _be_node(node: Callable[[Zygote], int], connection: socket.socket, zygote: int) -> NoReturn:
    """Run ``node`` in this forked process.  The process ends when ``node`` returns or the zygote ends."""
    status = os.EX_SOFTWARE
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != zygote:
            os._exit(status)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the configuration is about to be read anyway
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        status = node(Zygote(connection))
    except BaseException:
        traceback.print_exc()
    finally:
        _exit(status)


def serve(connection: socket.socket, children: "Children", ended: int) -> None:
    """Serve requests until the process of the descriptor ``ended`` has ended."""
    looking = select.poll()
    looking.register(connection, select.POLLIN)
    looking.register(ended, select.POLLIN)
    while True:
        ready = {number for number, _ in looking.poll()}
        if connection.fileno() in ready:
            if (request := _received(connection)) is None:
                looking.unregister(connection)
                continue
            value = _value(request.request, children)
            if value is not None:
                with suppress(OSError):  # the process has ended
                    connection.send(msgspec.msgpack.encode(ForkResponse(request.number, value)))
        elif ended in ready:
            return


def _value(request: Fork | Reap | KeepSpare | Notify, children: "Children") -> int | None:
    match request:
        case Fork(entry, arguments):
            return children.fork(entry, arguments)
        case Reap(pid):
            return _status_of(pid)
        case KeepSpare(entry, wanted):
            children.keep_spare(entry, wanted=wanted)
            return 0
        case Notify(state):
            notify(state)
            return None


class _Spare(NamedTuple):
    """A process that waits for its arguments at the other end of ``pipe``."""

    pid: int
    pipe: int

    def take(self, arguments: Sequence[str]) -> bool:
        """Send the process its arguments.  Return False if it has ended."""
        try:
            has_ended = os.waitpid(self.pid, os.WNOHANG)[0] != 0
            if not has_ended:
                os.write(self.pipe, msgspec.msgpack.encode(arguments))
        except BrokenPipeError:
            has_ended = True
            os.waitpid(self.pid, 0)
        finally:
            os.close(self.pipe)
        return not has_ended

    def dismiss(self) -> None:
        """Kill the process."""
        os.close(self.pipe)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


class Children:
    """The processes that a zygote forks, and its spare ones."""

    def __init__(self, entries: Mapping[str, Entry], preparations: Mapping[str, Preparation]) -> None:
        self._entries = entries
        self._preparations = preparations
        self._spares: dict[str, _Spare] = {}

    def fork(self, name: str, arguments: Sequence[str]) -> int:
        """Start a process that runs ``name`` and return its pid.  Uses the spare process if there is one."""
        spare = self._spares.pop(name, None)
        if spare is not None and spare.take(arguments):
            return spare.pid
        entry = self._entries[name]
        pid = os.fork()
        if pid == 0:
            _become(lambda: entry(arguments))
        return pid

    def forget(self) -> None:
        """Close the pipes to spare processes in a node process, so that they notice the end of the zygote."""
        for spare in self._spares.values():
            os.close(spare.pipe)
        self._spares.clear()

    def keep_spare(self, name: str, *, wanted: bool) -> None:
        """Keep one spare process for ``name``, or end it."""
        if wanted and name not in self._spares:
            waits, hands_over = os.pipe()
            pid = os.fork()
            if pid == 0:
                _become(partial(_wait, self._entries[name], self._preparations[name]), waits)
            os.close(waits)
            self._spares[name] = _Spare(pid, hands_over)
        elif not wanted and (spare := self._spares.pop(name, None)) is not None:
            spare.dismiss()


def _wait(entry: Entry, prepare: Preparation) -> None:
    """Run as a spare process for ``entry`` until arguments arrive or the zygote ends."""
    set_title("skep-standby")
    prepare()
    freeze()
    arguments = os.read(_KEPT, _MESSAGE_BYTES_MAX)
    os.close(_KEPT)
    if arguments:
        entry(msgspec.msgpack.decode(arguments, type=tuple[str, ...]))


def _received(connection: socket.socket) -> ForkRequest | None:
    try:
        message = connection.recv(_MESSAGE_BYTES_MAX)
    except ConnectionError:
        return None
    return msgspec.msgpack.decode(message, type=ForkRequest) if message else None


def _how(status: int) -> str:
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "by an exception"


def _status_of(pid: int) -> int:
    try:
        return os.waitpid(pid, 0)[1]
    except ChildProcessError:
        return -1


_KEPT = 3
"""The only descriptor that a forked process may inherit in addition to the standard ones."""


def _become(work: Callable[[], None], kept: int | None = None) -> NoReturn:
    """Run ``work`` in this process, which shares only the imports and standard error with its parent.

    ``kept`` is a descriptor that it also inherits, as ``_KEPT``.
    """
    status = 1
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # SIGHUP stays ignored until a handler is installed
        if kept is not None:
            os.dup2(kept, _KEPT)
        os.closerange(_KEPT if kept is None else _KEPT + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        _exit(status)


def notify(state: str) -> None:
    """Send ``READY=1``, ``RELOADING=1`` or ``STOPPING=1`` to ``$NOTIFY_SOCKET``.  Does nothing without one.

    Source: systemd, sd_notify(3).
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as line:
        try:
            line.sendto(state.encode(), address)
        except OSError:
            pass  # systemd no longer listens, and the service does not depend on it


def _exit(status: int) -> NoReturn:
    """End a forked process.  Flushes its output, but runs none of the exit handlers inherited from its parent."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
