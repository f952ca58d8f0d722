"""Records a node's tasks across restarts: each assignment with its last relevant status.

Each task has one file in ``<data>/tasks``, replaced by rename and synced, without credentials and secrets.  Writes lag
slightly, and only the latest version is written.  A lost write does little harm: a manager sends every assignment
again, and the container's own record has its state.
"""

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec
import structlog

from skep.aio.clock import Clock, SystemClock
from skep.aio.failures import isolate, log_error, retry
from skep.linux.files import NEW_SUFFIX, sync_directory, write_new
from skep.model.task import AssignedTask, TaskStatus
from skep.model.values.ids import TaskId
from skep.model.values.unknown import leniently

log = structlog.get_logger()

_SUFFIX = ".json"


class RememberedTask(msgspec.Struct, frozen=True):
    """One task as it was assigned, and its last status."""

    assigned: AssignedTask
    status: TaskStatus
    attempts: int = 0
    """Number of restarts without a manager."""


class TaskFiles:
    """The tasks of this node on disk."""

    def __init__(self, directory: Path, clock: Clock | None = None) -> None:
        self._directory = directory
        self._clock = clock or SystemClock()
        self._dirty: dict[TaskId, RememberedTask | None] = {}
        self._something = asyncio.Event()
        self._writing = threading.Lock()

    def load(self) -> list[RememberedTask]:
        """Return all tasks in order of id.  Unreadable files are skipped: their tasks will be assigned again."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return read_tasks(self._directory)

    def remember(self, task: RememberedTask) -> None:
        """Queue a task for writing.  It replaces an unwritten earlier version."""
        self._dirty[task.assigned.task.id] = task
        self._something.set()

    def forget(self, id: TaskId) -> None:
        """Queue the removal of a task's file."""
        self._dirty[id] = None
        self._something.set()

    async def run(self) -> None:
        """Write queued changes until cancelled, then write the remaining ones.  Failed writes are retried."""
        try:
            while True:
                await self._something.wait()
                await retry(self._flush, "task files not written", clock=self._clock, longest_s=10.0)
        finally:
            await isolate(asyncio.shield(self._flush()), "task files not written")

    async def _flush(self) -> None:
        self._something.clear()
        batch, self._dirty = self._dirty, {}
        if not batch:
            return
        try:
            await asyncio.to_thread(self.write, batch)
        except BaseException:
            # Part of the batch may have been written.  It is written again unless there is a newer version.
            self._dirty = {**batch, **self._dirty}
            raise

    def write(self, batch: Mapping[TaskId, RememberedTask | None]) -> None:
        with self._writing:
            self._write_batch(batch)

    def _write_batch(self, batch: Mapping[TaskId, RememberedTask | None]) -> None:
        """Write a batch.  If tasks fail, the others are still written, and then the first error is raised."""
        refusals = []
        for id, task in batch.items():
            try:
                self._write_one(id, task)
            except Exception as error:
                refusals.append(error)
        sync_directory(self._directory)  # one sync for the whole batch
        if refusals:
            raise refusals[0]

    def _write_one(self, id: TaskId, task: RememberedTask | None) -> None:
        path = self._directory / f"{id}{_SUFFIX}"
        if task is None:
            path.unlink(missing_ok=True)
            return
        unfinished = path.with_suffix(NEW_SUFFIX)
        write_new(unfinished, msgspec.json.encode(task), mode=0o600)
        unfinished.rename(path)


def read_tasks(directory: Path) -> list[RememberedTask]:
    """Return all tasks in ``directory`` in order of id.  Unreadable files are skipped."""
    tasks = []
    for path in sorted(directory.glob(f"*{_SUFFIX}")):
        try:
            tasks.append(leniently(path.read_bytes(), RememberedTask))
        except Exception as error:  # any error affects only one file
            log_error(error, "task file left out", path=str(path))
    return tasks
