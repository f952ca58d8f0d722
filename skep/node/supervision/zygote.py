"""A process that has the imports done and nothing else, from which node, manager and net are forked.

Forking shares the pages of the interpreter and all libraries: three processes cost 56 MB instead of 141.  It has to
happen from a process with one thread and no event loop.  So what systemd starts becomes the zygote (``host``), forks
the node process, and passes signals on to it; the node process asks it over a socket to fork the others.  What it
forks so lives in sessions of its own and outlives both.

A node process that crashes is forked again: without an interpreter's start and the imports, which take seconds on a
busy machine, it is back before its managers miss it.  If the zygote ends, its node process ends with it.

One request, one answer, with the request's number: ``Fork`` -> pid, ``Reap`` -> how that child ended.

What somebody will wait for can be had *standing by*: forked ahead, with its own imports done, too, and waiting for
its arguments.  ``Fork`` then only hands them over.  What stands by ends with the zygote.
"""

import asyncio
import ctypes
import gc
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
from skep.errors import Unavailable
from skep.node.notify import notify
from skep.node.supervision.detached import set_title

log = structlog.get_logger()

Entry = Callable[[Sequence[str]], None]
"""What a forked process runs: blocks until its work is over.  An exception ends it with exit code 1."""

Preparation = Callable[[], None]
"""What can be done before the arguments are known."""

_MESSAGE_BYTES_MAX = 64 * 1024
_ANSWER_TIMEOUT_S = 10.0
_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

LASTED_S = 3.0
"""A node process that ended sooner is not forked again: what supervises the zygote starts all anew."""
_PAUSE_S = 0.2
"""Before another is forked: what the last one had begun (a call of runc) ends meanwhile."""


class Fork(msgspec.Struct, frozen=True, tag=True):
    entry: str
    arguments: tuple[str, ...]


class Reap(msgspec.Struct, frozen=True, tag=True):
    pid: int


class StandBy(msgspec.Struct, frozen=True, tag=True):
    """Have a process for ``entry`` stand by, or none any more.  Again is harmless."""

    entry: str
    wanted: bool


class Notify(msgspec.Struct, frozen=True, tag=True):
    """Tell systemd, which listens to the process that it started alone.  Has no answer."""

    state: str


class Ask(msgspec.Struct, frozen=True):
    """A request with its number, which its answer repeats: one that nobody waits for any more is known by it."""

    number: int
    request: Fork | Reap | StandBy | Notify


class Told(msgspec.Struct, frozen=True):
    """The answer to the request of that number."""

    number: int
    value: int


class ZygoteGone(Unavailable):
    """Nothing can be started any more: only a new node process has a new zygote."""

    def __init__(self) -> None:
        super().__init__("the process that starts others has ended: restart skep")


class Zygote:
    """The node process's end."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._turn = asyncio.Lock()
        self._asked = 0

    async def fork(self, entry: str, arguments: Sequence[str]) -> int:
        """Start ``entry`` in a process of its own; its pid.  Raises: ZygoteGone, Unavailable."""
        return await self._ask(Fork(entry, tuple(arguments)))

    async def reap(self, pid: int) -> int | None:
        """How a child ended: its exit code, or minus the signal; None: not known.  It must have ended."""
        try:
            status = await self._ask(Reap(pid))
        except Unavailable:
            return None
        return None if status < 0 else os.waitstatus_to_exitcode(status)

    async def stand_by(self, entry: str, *, wanted: bool) -> None:
        """Have a process for ``entry`` ready for its ``fork``; without ``wanted`` none any more.

        Raises: ZygoteGone, Unavailable.
        """
        await self._ask(StandBy(entry, wanted))

    def notify(self, state: str) -> None:
        """Tell systemd (``node.notify``)."""
        with suppress(OSError):
            self._connection.send(msgspec.msgpack.encode(Ask(0, Notify(state))))

    def close(self) -> None:
        """Ask nothing any more."""
        self._connection.close()

    async def _ask(self, request: Fork | Reap | StandBy) -> int:
        loop = asyncio.get_running_loop()
        try:
            async with self._turn, asyncio.timeout(_ANSWER_TIMEOUT_S):
                self._asked += 1
                ask = Ask(self._asked, request)
                await loop.sock_sendall(self._connection, msgspec.msgpack.encode(ask))
                while message := await loop.sock_recv(self._connection, _MESSAGE_BYTES_MAX):
                    told = msgspec.msgpack.decode(message, type=Told)
                    if told.number == ask.number:
                        return told.value
        except TimeoutError as error:
            raise Unavailable("the process that starts others does not answer") from error
        except OSError as error:
            raise ZygoteGone from error
        raise ZygoteGone


def host(
    entries: Mapping[str, Entry], preparations: Mapping[str, Preparation], node: Callable[[Zygote], int]
) -> int:
    """Be the zygote, and have a node process at work: ``node``, in a child; gives the exit code of the last one.

    To be called early: with a single thread and no event loop.  SIGTERM, SIGINT and SIGHUP are the node process's.

    Args:
        preparations: of the entries that can stand by.
    """
    gc.collect()
    gc.freeze()  # what was imported is never looked at again, so its pages stay shared
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
    """Fork a node process and serve it until it has ended; gives its status (``os.waitpid``)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sys.stdout.flush()
    sys.stderr.flush()
    zygote = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # none comes before it is known whose it is
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
    """Run ``node`` in this process, which ends with it, and with the zygote."""
    status = os.EX_SOFTWARE
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != zygote:
            os._exit(status)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it reads everything now
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        status = node(Zygote(connection))
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def serve(connection: socket.socket, children: "Children", ended: int) -> None:
    """Answer requests until the process of the descriptor ``ended`` has ended."""
    looking = select.poll()
    looking.register(connection, select.POLLIN)
    looking.register(ended, select.POLLIN)
    while True:
        ready = {number for number, _ in looking.poll()}
        if connection.fileno() in ready:
            if (ask := _received(connection)) is None:
                looking.unregister(connection)
                continue
            answer = _answer(ask.request, children)
            if answer is not None:
                with suppress(OSError):  # it has ended
                    connection.send(msgspec.msgpack.encode(Told(ask.number, answer)))
        elif ended in ready:
            return


def _answer(request: Fork | Reap | StandBy | Notify, children: "Children") -> int | None:
    match request:
        case Fork(entry, arguments):
            return children.fork(entry, arguments)
        case Reap(pid):
            return _status_of(pid)
        case StandBy(entry, wanted):
            children.stand_by(entry, wanted=wanted)
            return 0
        case Notify(state):
            notify(state)
            return None


class _Standby(NamedTuple):
    """A process that waits for its arguments at the other end of ``pipe``."""

    pid: int
    pipe: int

    def take(self, arguments: Sequence[str]) -> bool:
        """Hand over what it waits for; False: it has ended."""
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
        """End it, whatever it is at."""
        os.close(self.pipe)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


class Children:
    """What a zygote forks, and has standing by."""

    def __init__(self, entries: Mapping[str, Entry], preparations: Mapping[str, Preparation]) -> None:
        self._entries = entries
        self._preparations = preparations
        self._standing_by: dict[str, _Standby] = {}

    def fork(self, name: str, arguments: Sequence[str]) -> int:
        """A process that runs ``name``: the one that stands by for it, or a new one; its pid."""
        standby = self._standing_by.pop(name, None)
        if standby is not None and standby.take(arguments):
            return standby.pid
        entry = self._entries[name]
        pid = os.fork()
        if pid == 0:
            _become(lambda: entry(arguments))
        return pid

    def forget(self) -> None:
        """In a node process: what stands by waits for the zygote's word, and for its end."""
        for standby in self._standing_by.values():
            os.close(standby.pipe)
        self._standing_by.clear()

    def stand_by(self, name: str, *, wanted: bool) -> None:
        """Have one process for ``name`` waiting, or none."""
        if wanted and name not in self._standing_by:
            waits, hands_over = os.pipe()
            pid = os.fork()
            if pid == 0:
                _become(partial(_wait, self._entries[name], self._preparations[name]), waits)
            os.close(waits)
            self._standing_by[name] = _Standby(pid, hands_over)
        elif not wanted and (standby := self._standing_by.pop(name, None)) is not None:
            standby.dismiss()


def _wait(entry: Entry, prepare: Preparation) -> None:
    """Stand by for ``entry``: without a word from the zygote it ends with it."""
    set_title("skep-standby")
    prepare()
    gc.collect()
    gc.freeze()
    said = os.read(_KEPT, _MESSAGE_BYTES_MAX)
    os.close(_KEPT)
    if said:
        entry(msgspec.msgpack.decode(said, type=tuple[str, ...]))


def _received(connection: socket.socket) -> Ask | None:
    try:
        message = connection.recv(_MESSAGE_BYTES_MAX)
    except ConnectionError:
        return None
    return msgspec.msgpack.decode(message, type=Ask) if message else None


def _how(status: int) -> str:
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "by an exception"


def _status_of(pid: int) -> int:
    try:
        return os.waitpid(pid, 0)[1]
    except ChildProcessError:
        return -1


_KEPT = 3
"""The only descriptor besides the standard ones that a forked process may have from its origin."""


def _become(work: Callable[[], None], kept: int | None = None) -> NoReturn:
    """Run ``work`` as a process that shares nothing with its origin but the imports and standard error.

    Args:
        kept: a descriptor that it does share; it is ``_KEPT`` from then on.
    """
    status = 1
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(
                number, signal.SIG_DFL
            )  # SIGHUP stays ignored until there is something that reads again
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
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
