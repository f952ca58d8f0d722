"""Reads runc's state of a container, and does two of runc's steps here, without starting runc.

Every runc command is a separate Go process, which takes about 10 ms of processor time.  Two of the steps that each
container needs are only a read and a few removals, so they are done here:

* **start**: after ``create``, the container's first process waits until it can open the fifo ``<root>/<id>/exec.fifo``
  for writing.  When another process opens the fifo for reading, the first process writes one byte and becomes the
  container's command, which closes the fifo.  ``runc start`` only reads up to the end of file and removes the fifo.
  (The existence of the fifo means "created" to runc.)
* **delete** of an ended container: remove its empty control groups, then ``<root>/<id>``.

Tested with runc 1.1.5.  With another runtime or an unexpected state, the methods return False, and the caller uses the
runtime's own commands.

Source: runc, libcontainer/container_linux.go (exec, handleFifoResult, destroy), libcontainer/standard_init_linux.go.
"""

import asyncio
import os
import stat
from contextlib import suppress
from pathlib import Path

from skep.engine.containers.container import ProcessName
from skep.engine.runtime.processes import open_pidfd
from skep.errors import SkepError
from skep.linux.trees import remove_tree
from skep.model.values.ids import ContainerId

_FIFO = "exec.fifo"
_STATE = "state.json"


class ProcessEnded(SkepError):
    """The container's first process ended before it became the container's command."""


class RuncState:
    """runc's state directory, ``--root``."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def has(self, id: ContainerId) -> bool:
        """Return whether runc has a container with this id."""
        return (self._root / id).exists()

    def stage(self, id: ContainerId) -> str:
        """Return ``created`` until the first process starts the command, then ``running``, or "" if runc does not know
        the container.
        """
        home = self._root / id
        if not (home / _STATE).is_file():
            return ""
        return "created" if (home / _FIFO).exists() else "running"

    async def start(self, id: ContainerId, process: ProcessName) -> bool:
        """Start a created container's command.  Return False if it cannot be done here and the runtime has to do it.

        Raises: ProcessEnded.
        """
        path = self._root / id / _FIFO
        try:
            if not (path.with_name(_STATE).is_file() and stat.S_ISFIFO(path.stat().st_mode)):
                return False
            fifo = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            await _wait_executed(fifo, process)
        finally:
            os.close(fifo)
        path.unlink(missing_ok=True)
        return True

    def forget(self, id: ContainerId) -> None:
        """Remove runc's state of an ended container, whose control groups were removed."""
        remove_tree(self._root / id)


async def _wait_executed(fifo: int, process: ProcessName) -> None:
    """Wait until the writer of ``fifo`` has written and closed it.  Raises: ProcessEnded."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    received = b""

    def read() -> None:
        nonlocal received
        try:
            piece = os.read(fifo, 16)
        except BlockingIOError:
            return
        received += piece
        if not piece:
            end()

    def end() -> None:
        if not ended.done():
            ended.set_result(None)

    # A fifo does not become readable before its first writer has opened it.
    loop.add_reader(fifo, read)
    pidfd = open_pidfd(process)
    try:
        if pidfd is not None:
            loop.add_reader(pidfd, end)
            await ended
    finally:
        loop.remove_reader(fifo)
        if pidfd is not None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
    if not received:
        with suppress(BlockingIOError):  # the command may have started and ended in between
            received = os.read(fifo, 16)
    if not received:
        raise ProcessEnded("the container's first process is already dead")
