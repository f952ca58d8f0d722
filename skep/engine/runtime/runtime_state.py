"""Reads the runtime's state of a container, and does two of its steps here, without starting the runtime.

Every command of runc is a separate Go process, which takes about 10 ms of processor time.  Two of the steps that each
container needs are only a read and a few removals, so they are done here:

* **start**: after ``create``, the container's first process waits at the fifo ``<root>/<id>/exec.fifo``.

  * runc: it waits until it can open the fifo for writing.  When another process opens the fifo for reading, the first
    process writes one byte and becomes the container's command, which closes the fifo.  ``runc start`` only reads up
    to the end of file and removes the fifo.
  * crun: it has opened the fifo for reading and waits for a byte.  Then it closes the fifo, and becomes the command
    within a moment.  ``crun start`` removes the fifo and writes the byte.

  To both, the existence of the fifo means "created".
* **delete** of an ended container: remove its empty control groups, then ``<root>/<id>``.

Tested with runc 1.1.5 and crun 1.8.1.  With another runtime or an unexpected state, the methods return False, and the
caller uses the runtime's own commands.

Source: runc, libcontainer/container_linux.go (exec, handleFifoResult, destroy), libcontainer/standard_init_linux.go;
crun, src/libcrun/status.c (libcrun_status_write_exec_fifo), src/libcrun/container.c (container_init).
"""

import asyncio
import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from skep.engine.containers.container import ProcessName
from skep.engine.runtime.processes import open_pidfd
from skep.errors import SkepError
from skep.linux.trees import remove_tree
from skep.model.values.ids import ContainerId

_FIFO = "exec.fifo"
_STATES = {"runc": "state.json", "crun": "status"}
"""Name of each runtime's file about a container."""
_DEAD = "the container's first process is already dead"


class ProcessEnded(SkepError):
    """The container's first process ended before it became the container's command."""


class RuntimeState:
    """The state directory, ``--root``, of all runtimes.  Container ids are unique among them."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def has(self, id: ContainerId) -> bool:
        """Return whether a runtime has a container with this id."""
        return (self._root / id).exists()

    def runtime(self, id: ContainerId) -> str:
        """Return the name of the runtime that has created a container, or "" for an unknown container."""
        home = self._root / id
        return next((name for name, file in _STATES.items() if (home / file).is_file()), "")

    def stage(self, id: ContainerId) -> str:
        """Return ``created`` until the first process starts the command, then ``running``, or "" if no runtime
        knows the container.
        """
        if not self.runtime(id):
            return ""
        return "created" if (self._root / id / _FIFO).exists() else "running"

    async def start(self, id: ContainerId, process: ProcessName) -> bool:
        """Start a created container's command.  Return False if it cannot be done here and the runtime has to do it.

        Raises: ProcessEnded.
        """
        path, name = self._root / id / _FIFO, self.runtime(id)
        try:
            if not (name and stat.S_ISFIFO(path.stat().st_mode)):
                return False
            if name == "crun":
                await _write(path, process)
            else:
                await _read(path, process)
        except FileNotFoundError:
            return False
        path.unlink(missing_ok=True)
        return True

    def forget(self, id: ContainerId) -> None:
        """Remove the runtime's state of an ended container, whose control groups were removed."""
        remove_tree(self._root / id)


async def _read(path: Path, process: ProcessName) -> None:
    """Read runc's fifo until its writer has closed it.  Raises: FileNotFoundError; ProcessEnded."""
    fifo = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    received = b""

    def is_closed() -> bool:
        nonlocal received
        try:
            piece = os.read(fifo, 16)
        except BlockingIOError:
            return False
        received += piece
        return not piece

    try:
        # A fifo does not become readable before its first writer has opened it.
        await _wait_closed(fifo, is_closed, process)
        if not received:
            with suppress(BlockingIOError):  # the command may have started and ended in between
                received = os.read(fifo, 16)
    finally:
        os.close(fifo)
    if not received:
        raise ProcessEnded(_DEAD)


async def _write(path: Path, process: ProcessName) -> None:
    """Write to crun's fifo, and wait until its reader has closed it.  Raises: FileNotFoundError; ProcessEnded."""
    try:
        fifo = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise ProcessEnded(_DEAD) from error  # nobody has the fifo open for reading
    try:
        path.unlink()  # before the byte, as crun does
        os.write(fifo, b"\0")
        # The end without readers is reported as an error of the descriptor, which ``add_reader`` sees.
        await _wait_closed(fifo, lambda: True, process)
    except BrokenPipeError as error:
        raise ProcessEnded(_DEAD) from error
    finally:
        os.close(fifo)


async def _wait_closed(fifo: int, is_closed: Callable[[], bool], process: ProcessName) -> None:
    """Wait until ``is_closed``, called for each event of ``fifo``, returns True, or until ``process`` has ended."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def look() -> None:
        if is_closed():
            end()

    def end() -> None:
        if not ended.done():
            ended.set_result(None)

    loop.add_reader(fifo, look)
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
