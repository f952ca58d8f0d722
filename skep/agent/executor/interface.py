"""The executor: what runs one task.  Seven verbs, one controller per task.

``oci`` (containers under runc), ``process`` (plain commands) and ``simulated`` pass one contract suite
(``tests/contract/test_executor.py``).  A controller is made for a task whose assignment is known to the
node; ``agent/task.py`` alone decides the order of the verbs.

A controller can be made again for the same task after a restart of the node process: what runs is not interrupted, and
the verbs find it (*adoption*).  Every verb may therefore be called on work already done, and then returns
at once.

Source: swarmkit, agent/exec/controller.go (the verbs and their order).
"""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from skep.errors import SkepError
from skep.model.ids import TaskId
from skep.model.service import PortConfig
from skep.model.task import AssignedTask, ContainerStatus
from skep.model.task_end import TaskEnd


class Rejected(SkepError):
    """The task can never run on this node (image missing, mount source absent): REJECTED with this message."""


class TaskExit(msgspec.Struct, frozen=True, kw_only=True):
    """How a task's process ended.

    ``message`` is what Docker would write into ``Status.Err``: ``task: non-zero exit (7)``, with the engine's
    text behind it if there is one; empty for exit code 0.  ``oom_killed`` as the kernel reported it.
    """

    exit_code: int
    message: str = ""
    oom_killed: bool = False


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """What a started task looks like from outside."""

    container: ContainerStatus
    warnings: tuple[str, ...] = ()
    """What of the task's options this node could not give it."""
    ports: tuple[PortConfig, ...] = ()
    """Host-mode ports as opened, with the published port that the node has picked where the spec has 0."""


class Controller(Protocol):
    """Runs one task."""

    def observed(self) -> Running | None:
        """What is known of the task's process at this moment, its exit code included; None before there is
        one."""

    async def prepare(self) -> None:
        """Make everything ready to start: image, file system, network namespace, reserved host ports.

        Raises: Rejected: it can never work here; any other SkepError: it failed this time.
        """

    async def start(self) -> Running:
        """Start the process; return after it runs (``runc start`` returned), never before.

        Raises: SkepError with the runtime's words; ``observed`` has the exit code then (127/126 as in Docker).
        """

    async def wait(self) -> TaskExit:
        """Return when the process has ended, however that came.  May be awaited any number of times."""

    async def ended(self) -> TaskEnd | None:
        """Why the process ended, with its last lines, asked after its end; None: nothing is known, or it was
        stopped and ended in time."""

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Stop signal, then kill after the task's grace period; return when the process is gone.

        ``drain_s``: for so long at most the stop waits until the task's clients have gone.
        """

    async def terminate(self) -> None:
        """Kill now; return when the process is gone."""

    async def update(self, task: AssignedTask) -> None:
        """Take over what changed in the assignment (limits, last lines to keep) without a restart."""

    async def remove(self) -> None:
        """Free everything the task holds: file system, namespace, ports, cgroup, logs.  Nothing may be left.

        What still runs is killed.
        """


class Executor(Protocol):
    """Makes controllers of tasks."""

    @property
    def name(self) -> str:
        """``oci``, ``process`` or ``simulated``."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """Find again what an earlier process of this node left; the verbs work inside the block.

        What runs is not stopped when the block ends.
        """

    def controller(self, task: AssignedTask, registry_auth: str = "") -> Controller:
        """A controller for ``task``; adopts what already runs for it.

        ``registry_auth``: credentials for the image (``X-Registry-Auth``); kept in memory only.
        """

    async def leftovers(self) -> Sequence[TaskId]:
        """Tasks of which this executor still holds something; the worker removes unknown ones."""

    async def discard(self, task_id: TaskId) -> None:
        """Free everything held for a task that is assigned no more, as ``remove`` does."""
