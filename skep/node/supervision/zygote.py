"""A process that has the imports done and nothing else, from which manager and net are forked.

Forking shares the pages of the interpreter and all libraries: three processes cost 56 MB instead of 141.  It has to
happen from a process with one thread and no event loop, so the node process forks the zygote before it does
anything, and asks it over a socket.  What the zygote forks lives in sessions of its own and outlives both.

One request, one answer, with the request's number: ``Fork`` -> pid, ``Reap`` -> how that child ended.  The zygote ends
when the node process does.

What somebody will wait for can be had *standing by*: forked ahead, with its own imports done, too, and waiting for
its arguments.  ``Fork`` then only hands them over.  What stands by ends with the zygote.
"""

import asyncio
import gc
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, NoReturn

import msgspec

from skep.errors import Unavailable
from skep.node.supervision.detached import set_title

Entry = Callable[[Sequence[str]], None]
"""What a forked process runs: blocks until its work is over.  An exception ends it with exit code 1."""

Preparation = Callable[[], None]
"""What can be done before the arguments are known."""

_MESSAGE_BYTES_MAX = 64 * 1024
_ANSWER_TIMEOUT_S = 10.0


class Fork(msgspec.Struct, frozen=True, tag=True):
    entry: str
    arguments: tuple[str, ...]


class Reap(msgspec.Struct, frozen=True, tag=True):
    pid: int


class StandBy(msgspec.Struct, frozen=True, tag=True):
    """Have a process for ``entry`` stand by, or none any more.  Again is harmless."""

    entry: str
    wanted: bool


class Ask(msgspec.Struct, frozen=True):
    """A request with its number, which its answer repeats: one that nobody waits for any more is known by it."""

    number: int
    request: Fork | Reap | StandBy


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

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._connection = connection
        self._pid = pid
        self._turn = asyncio.Lock()
        self._asked = 0

    @property
    def pid(self) -> int:
        return self._pid

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

    def end(self) -> None:
        """Let it go and wait for its end; what it forked goes on."""
        self._connection.close()
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

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


def start(
    entries: Mapping[str, Entry], preparations: Mapping[str, Preparation] = MappingProxyType({})
) -> Zygote:
    """Fork the zygote.  To be called once, early: with a single thread and no event loop.

    Args:
        preparations: of the entries that can stand by.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    gc.collect()
    gc.freeze()  # what was imported is never looked at again, so its pages stay shared
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _live(theirs, _Children(entries, preparations))
    theirs.close()
    ours.setblocking(False)
    return Zygote(ours, pid)


def _live(connection: socket.socket, children: "_Children") -> NoReturn:
    """The zygote: answer requests until the node process has gone."""
    os.setsid()
    set_title("skep-zygote")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it goes with its node process, not before
    while ask := _received(connection):
        match ask.request:
            case Fork(entry, arguments):
                answer = children.fork(entry, arguments)
            case Reap(pid):
                answer = _status_of(pid)
            case StandBy(entry, wanted):
                children.stand_by(entry, wanted=wanted)
                answer = 0
        connection.send(msgspec.msgpack.encode(Told(ask.number, answer)))
    os._exit(0)


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


class _Children:
    """What the zygote forks, and has standing by."""

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
