"""The executor interface: an executor runs tasks, with one controller of seven verbs per task.

``oci`` (containers under runc), ``process`` (plain commands) and ``simulated`` pass one contract suite
(``tests/contract/test_executor.py``).  The worker creates a controller for each assigned task.  Only
``agent/tasks/task.py`` decides the order of the verbs.

After a restart of the node process, controllers are created again for the same tasks.  Running processes are not
interrupted, and the verbs find them (*adoption*).  So every verb may be called when its work is already done, and then
returns at once.

Source: swarmkit, agent/exec/controller.go (the verbs and their order).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeAlias

import msgspec

from skep.errors import SkepError
from skep.model.service import PortConfig
from skep.model.task import AssignedTask, ContainerStatus
from skep.model.task_end import TaskEnd
from skep.model.values.ids import TaskId


class Rejected(SkepError):
    """The task can never run on this node (image missing, mount source absent): REJECTED with this message."""


class TaskExit(msgspec.Struct, frozen=True, kw_only=True):
    """End of a task's process.

    ``message`` is the text that Docker would write into ``Status.Err``: ``task: non-zero exit (7)``, followed by the
    engine's text if there is one, and empty for exit code 0.  ``oom_killed`` is the kernel's report.
    """

    exit_code: int
    message: str = ""
    oom_killed: bool = False


OnUnhealthy: TypeAlias = Callable[[TaskEnd], None]
"""Receives the reason why a running process is going to be stopped."""


def ignored(_: TaskEnd) -> None:
    """Ignore the reason.  An ``OnUnhealthy``."""


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """The observed state of a started task."""

    container: ContainerStatus
    warnings: tuple[str, ...] = ()
    """Options of the task that this node could not apply."""
    ports: tuple[PortConfig, ...] = ()
    """Host-mode ports as opened, with the port that the node has chosen if the spec has 0."""
    failed_check: str = ""
    """Last failed health check of a process that was not healthy yet, in words, or empty."""


class Controller(Protocol):
    """Runs one task."""

    def observed(self) -> Running | None:
        """Return the known state of the task's process with its exit code, or None if no process was created yet."""

    async def prepare(self) -> None:
        """Prepare everything for the start: image, file system, network namespace, reserved host ports.

        Raises:
            Rejected: The task can never run here.
            SkepError: The preparation failed this time.
        """

    async def start(self) -> Running:
        """Start the process.  Returns only once it runs (``runc start`` has returned).

        Raises:
            SkepError: The start failed, in the runtime's words.  ``observed`` then has the exit code (127/126 as in
                Docker).
        """

    async def wait(self, on_unhealthy: OnUnhealthy = ignored) -> TaskExit:
        """Wait until the process has ended for any reason.  May be awaited any number of times.

        A process that becomes unhealthy is stopped, and ``on_unhealthy`` gets the reason before that.

        Raises:
            NotFound: The process does not exist, or was never started.
        """

    async def fetch_end(self) -> TaskEnd | None:
        """Return why the process ended, with its last lines.

        Called after the process has ended.  Returns None if the reason is unknown, or if the process was stopped and
        ended in time.
        """

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Send the stop signal, and kill the process after the task's grace period.

        Returns when the process has ended.

        The stop waits at most ``drain_s`` for the task's clients to disconnect.
        """

    async def terminate(self) -> None:
        """Kill the process now.  Returns when it has ended."""

    async def update(self, task: AssignedTask) -> None:
        """Apply changes of the assignment (limits, last lines to keep) without a restart."""

    async def remove(self) -> None:
        """Free everything that the task holds: file system, namespace, ports, cgroup, logs.

        A running process is killed.
        """


class Executor(Protocol):
    """Creates controllers of tasks."""

    @property
    def name(self) -> str:
        """``oci``, ``process`` or ``simulated``."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """Adopt what an earlier process of this node left.  The verbs work inside the block.

        Running tasks are not stopped when the block ends.
        """

    def controller(self, task: AssignedTask, registry_auth: str = "") -> Controller:
        """Return a controller for ``task``, which adopts a process that already runs for it.

        ``registry_auth`` are credentials for the image (``X-Registry-Auth``), kept only in memory.
        """

    async def leftovers(self) -> Sequence[TaskId]:
        """Return the tasks for which this executor still holds resources.

        The worker removes tasks that it does not know.
        """

    async def discard(self, task_id: TaskId) -> None:
        """Free everything held for a task that is no longer assigned, as ``remove`` does."""
