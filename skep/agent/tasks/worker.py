"""Runs the tasks assigned to this node.  Each has a driver, is recorded on disk, and is removed with its assignment.

A complete set of assignments replaces all tasks: any other task is removed, even if an earlier process left it without
a file.  An incremental set adds and removes tasks.  Until the first complete set, unknown tasks are left alone, and the
node continues with the tasks on its disk.

Source: swarmkit, agent/worker.go.
"""

import asyncio
import math
from collections.abc import Collection, Coroutine, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import structlog

from skep.agent.executor.interface import (
    Controller,
    Executor,
    OnUnhealthy,
    Rejected,
    Running,
    TaskExit,
    ignored,
)
from skep.agent.session.reports import Reports
from skep.agent.session.session_state import SessionState
from skep.agent.tasks.cluster_volumes import ClusterVolumes
from skep.agent.tasks.task import TaskDriver
from skep.agent.tasks.task_files import RememberedTask, TaskFiles
from skep.aio.clock import Clock, tick
from skep.aio.failures import describe_error, isolate, log_error, retry
from skep.model.assignment import AssignmentSet, ConfigFile, SecretFile
from skep.model.container import ContainerSpec
from skep.model.node_reports.node_removal import NodeRemoval
from skep.model.options.labels import ON_DISCONNECT, OnDisconnect, disconnect_policy
from skep.model.task import AssignedTask, TaskState, TaskStatus
from skep.model.values.ids import ConfigId, SecretId, TaskId
from skep.model.values.times import SECOND_NS, unix_ns

log = structlog.get_logger()

CUT_OFF_CHECK_S = 0.5
"""Seconds between two checks for tasks that have to stop without a session."""


REMOVED_GRACE_S = 20.0
"""Longest time in seconds from the removal of a node until its containers have stopped.

Managers publish its volumes elsewhere soon after (``manager.volumes.steps.REMOVED_S``).
"""


def kill_time(removal: NodeRemoval, clock: Clock) -> float:
    """Return when the containers of this removed node are killed, on the monotonic clock of ``clock``.

    The grace period counts from the removal, as the managers' wait does, not from when this node noticed it.
    """
    since_s = (clock.now_ns() - unix_ns(removal.at)) / SECOND_NS if removal.at else 0.0
    # If this node's clock is behind the manager's clock, the grace period must not become longer.
    return clock.monotonic() + min(max(REMOVED_GRACE_S - since_s, 0.0), REMOVED_GRACE_S)


def stop_reason(assigned: AssignedTask, silence_s: float, removal: NodeRemoval | None = None) -> str:
    """Return why a task stops after ``silence_s`` without a manager, or an empty text if it continues.

    ``removal`` is set if the node was removed from its cluster.  All its tasks then stop, because the cluster replaces
    them.  Plain containers continue, because they do not belong to the cluster.
    """
    is_plain = assigned.task.spec.network_attachment_spec is not None
    if removal is not None and not removal.keeps_containers and not is_plain:
        return f"stopped by its node: {removal.summary}"
    policy = disconnect_policy(assigned.service_labels)
    if policy.action is not OnDisconnect.STOP or silence_s < policy.delay_s:
        return ""
    return f"stopped by its node: no manager was reached for {policy.delay_s:g} s ({ON_DISCONNECT}=stop)"


class PayloadSink(Protocol):
    """Keeps the data of secrets and configs (``agent/executor/payloads.py``)."""

    def put(self, secrets: Iterable[SecretFile], configs: Iterable[ConfigFile]) -> None:
        """Keep the data of these secrets and configs.  Raises: OSError."""

    def drop(self, secrets: Iterable[SecretId], configs: Iterable[ConfigId]) -> None:
        """Forget the data of these secrets and configs.  Unknown ones are ignored."""

    def keep_only(self, secrets: Iterable[SecretId], configs: Iterable[ConfigId]) -> None:
        """Forget the data of all others."""

    def has(self, container: ContainerSpec) -> bool:
        """Return whether the data of all secrets and configs of a container are kept."""


class _Unkept:
    """Secrets and configs whose data must still be stored, possibly after a failed attempt."""

    def __init__(self) -> None:
        self.secrets: dict[SecretId, SecretFile] = {}
        self.configs: dict[ConfigId, ConfigFile] = {}
        self.is_retried = False

    def add(self, change: AssignmentSet) -> None:
        """Add the secrets and configs of an assignment."""
        self.secrets.update((one.id, one) for one in change.secrets)
        self.configs.update((one.id, one) for one in change.configs)

    def drop(self, secrets: Iterable[SecretId], configs: Iterable[ConfigId]) -> None:
        """Remove secrets and configs that are stored or no longer needed."""
        for secret in secrets:
            self.secrets.pop(secret, None)
        for config in configs:
            self.configs.pop(config, None)

    def keep_only(self, secrets: Collection[SecretId], configs: Collection[ConfigId]) -> None:
        """Remove all others."""
        self.drop(self.secrets.keys() - set(secrets), self.configs.keys() - set(configs))

    def clear(self) -> None:
        """Remove all: everything is stored."""
        self.secrets.clear()
        self.configs.clear()
        self.is_retried = False


class Worker:
    """Runs the tasks assigned to this node.  The agent's ``AssignmentSink``.

    An executor's error about one task affects no other task.
    """

    def __init__(
        self,
        *,
        executor: Executor,
        files: TaskFiles,
        reports: Reports,
        clock: Clock,
        session_state: SessionState,
        payloads: PayloadSink | None = None,
        volumes: ClusterVolumes | None = None,
    ) -> None:
        """``payloads`` and ``volumes`` are None for an executor without mounts."""
        self.volumes = volumes
        self.executor = executor
        self._files = files
        self._reports = reports
        self._clock = clock
        self._payloads = payloads
        self._unkept = _Unkept()
        self.session_state = session_state
        self._drivers: dict[TaskId, TaskDriver] = {}
        self._running: dict[TaskId, asyncio.Task[None]] = {}
        self.removals: dict[TaskId, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None
        self._ready = asyncio.Event()
        self._assigned = asyncio.Event()
        """Set by the first assignment, which brings the secrets and configs of all tasks."""

    async def run(self) -> None:
        """Load the recorded tasks, then run them until cancelled.  Containers keep running after that."""
        async with self.executor.running(), asyncio.TaskGroup() as group:
            self._group = group
            load = partial(asyncio.to_thread, self._files.load)
            for remembered in await retry(load, "task files not read", clock=self._clock, longest_s=10.0):
                self._add(
                    remembered.assigned, remembered.status, attempts=remembered.attempts, is_remembered=True
                )
            # a session may have started before these statuses were known
            for id, status in self.statuses().items():
                self._reports.report(id, status)
            self._spawn(self._stop_when_cut_off(), "stop-when-cut-off")
            self._spawn(self._files.run(), "task-files")
            self._ready.set()

    async def wait_ready(self) -> None:
        """Wait until everything that an earlier process left is known."""
        await self._ready.wait()

    async def assign(self, change: AssignmentSet) -> None:
        """Apply ``change``.  Returns when it is accepted, not when its tasks run."""
        await self._ready.wait()
        if self._payloads is not None:
            self._put_payloads(self._payloads, change)
        self._assigned.set()
        if self.volumes is not None:
            await self.volumes.wait_ready()
            self.volumes.assign(change)
        named = {assigned.task.id for assigned in change.tasks}
        if change.complete:
            found = await isolate(self.executor.leftovers(), "leftovers not listed")
            unknown = set(found or ()) - set(self._drivers) - named
            for id in sorted(unknown - set(self.removals)):
                log.info("leftover removed", task=id)
                self._spawn_removal(id, None)
            gone: Iterable[TaskId] = sorted(set(self._drivers) - named)
        else:
            gone = change.removed_tasks
        for id in gone:
            self._remove(id)
        for assigned in change.tasks:
            self._assign_one(assigned, change.registry_auths.get(assigned.task.id, ""))
        await isolate(self._drop_payloads(change), "secrets and configs not dropped")

    async def clear(self) -> None:
        """Kill and remove every task without a grace period, because this node leaves its swarm.

        Returns when the removal has started.  Source: moby 20.10, daemon/cluster/swarm.go (Leave).
        """
        await self._ready.wait()
        for id in sorted(self._drivers):
            self._remove(id, at_once=True)
        await self.assign(AssignmentSet(complete=True))

    def statuses(self) -> Mapping[TaskId, TaskStatus]:
        """Return the current status of every task here."""
        return {id: driver.status for id, driver in self._drivers.items()}

    def tasks(self) -> Mapping[TaskId, AssignedTask]:
        """Return every task here in its current assignment."""
        return {id: driver.task for id, driver in self._drivers.items()}

    # --- single tasks -----------------------------------------------------------------------------------------

    def _assign_one(self, assigned: AssignedTask, registry_auth: str) -> None:
        id = assigned.task.id
        driver = self._drivers.get(id)
        if driver is None:
            self._add(assigned, assigned.task.status, registry_auth)
            self._remember(id)
            return
        if driver.lacks_credentials:
            driver.take_credentials(self._controller(assigned, registry_auth))
        if driver.task == assigned:
            return
        if driver.assign(assigned) and not driver.status.state.is_terminal:
            self._spawn(self._update(driver), f"update-{id}")
        self._remember(id)

    def _controller(self, assigned: AssignedTask, registry_auth: str) -> Controller:
        try:
            return self.executor.controller(assigned, registry_auth)
        except Exception as error:
            log_error(error, "task without a controller", task=assigned.task.id)
            return BrokenController(error)

    def _add(
        self,
        assigned: AssignedTask,
        status: TaskStatus,
        registry_auth: str = "",
        attempts: int = 0,
        *,
        is_remembered: bool = False,
    ) -> None:
        id = assigned.task.id
        driver = TaskDriver(
            assigned,
            status,
            self._controller(assigned, registry_auth),
            clock=self._clock,
            on_status=self._on_status,
            session_state=self.session_state,
            attempts=attempts,
        )
        driver.lacks_credentials = is_remembered
        self._drivers[id] = driver
        self._running[id] = self._spawn(self._drive(driver), f"task-{id}")

    async def _drive(self, driver: TaskDriver) -> None:
        removal = self.removals.get(driver.task.task.id)
        if removal is not None:  # assigned again while its earlier containers are being removed
            await asyncio.wait([removal])
        if not self._assigned.is_set() and self._lacks_payloads(driver.task):
            # Secrets are kept in memory only.  After a power loss, a start fails until a manager has sent them again.
            await self._assigned.wait()
        await retry(driver.run, "task not driven", clock=self._clock, task=driver.task.task.id)

    async def _update(self, driver: TaskDriver) -> None:
        """Apply a newer assignment to a running container.  If the new limits are refused, the old limits stay."""
        await isolate(driver.controller.update(driver.task), "task not updated", task=driver.task.task.id)

    def _remove(self, id: TaskId, *, at_once: bool = False) -> None:
        """Stop a task that is no longer assigned, or kill it (``at_once``), and free its resources."""
        driver = self._drivers.pop(id, None)
        if driver is not None:
            running = self._running.pop(id)
            running.cancel()
            self._spawn_removal(id, driver, running, at_once=at_once)
        self._files.forget(id)

    def _spawn_removal(
        self,
        id: TaskId,
        driver: TaskDriver | None,
        running: asyncio.Task[None] | None = None,
        *,
        at_once: bool = False,
    ) -> None:
        # A removal that ends later would remove what the next assignment of the task creates.
        before = [one for one in (running, self.removals.get(id)) if one is not None]
        task = self._spawn(self._free(id, driver, before, at_once=at_once), f"remove-{id}")
        self.removals[id] = task
        task.add_done_callback(lambda done: self.forget_removal(id, done))

    def forget_removal(self, id: TaskId, done: asyncio.Task[None]) -> None:
        if self.removals.get(id) is done:  # the task may have been assigned and removed again
            del self.removals[id]

    async def _free(
        self, id: TaskId, driver: TaskDriver | None, before: Collection[asyncio.Task[None]], *, at_once: bool
    ) -> None:
        """Free a task's resources once its driver and an earlier removal (``before``) have ended.

        Retries after a failure.
        """
        if before:
            # A verb that cannot be interrupted may still be creating resources.
            await asyncio.wait(before)

        async def free() -> None:
            if driver is None:
                await self.executor.discard(id)
                return
            if not at_once:
                await driver.controller.shutdown(driver.drain_s)
            await driver.controller.remove()

        await retry(free, "task not removed", clock=self._clock, task=id)

    async def _stop_when_cut_off(self) -> None:
        """Stop the tasks of each service that requires it (``skep.on-disconnect``) once the node was disconnected for
        the service's delay.
        """
        kill_at: float | None = None
        last: NodeRemoval | None = None
        while True:
            await self.session_state.wait_no_session()
            silence_s, removal = self.session_state.total_silence_s(), self.session_state.removal
            if removal != last:  # This loop may not have seen a session between two removals.
                last, kill_at = removal, None
            for driver in self._drivers.values():
                reason = stop_reason(driver.task, silence_s, removal)
                if reason and not driver.status.state.is_terminal:
                    driver.stop(reason)
            if removal is None or removal.keeps_containers:
                kill_at = None
            elif kill_at is None:
                kill_at = kill_time(removal, self._clock)
                self._spawn(self._give_up_volumes(), "give-up-volumes")
            elif self._clock.monotonic() >= kill_at:
                kill_at = math.inf
                self._kill_stopped()
            await tick(self._clock, CUT_OFF_CHECK_S)

    async def _give_up_volumes(self) -> None:
        """Unmount cluster volumes once no container uses them, because managers soon publish them on another node."""
        if self.volumes is not None:
            await self.volumes.wait_ready()
            if self.session_state.removal is not None:  # the node may have joined again in the meantime
                self.volumes.assign(AssignmentSet(complete=True))

    def _kill_stopped(self) -> None:
        """Kill the tasks that have not stopped in time."""
        for id, driver in self._drivers.items():
            if driver.is_stopped and not driver.status.state.is_terminal:
                self._spawn(driver.controller.terminate(), f"kill-{id}")

    # --- around them ------------------------------------------------------------------------------------------

    def _on_status(self, id: TaskId, status: TaskStatus) -> None:
        log.info("task", task=id, state=status.state.value, error=status.err)
        self._reports.report(id, status)
        # States before the start are not recorded, because the container's own record has them.
        if status.state >= TaskState.RUNNING:
            self._remember(id)

    def _remember(self, id: TaskId) -> None:
        driver = self._drivers.get(id)
        if driver is not None:
            self._files.remember(RememberedTask(driver.task, driver.status, driver.attempts))

    def _put_payloads(self, payloads: PayloadSink, change: AssignmentSet) -> None:
        """Store the data of secrets and configs.  A failure is retried, and a task that needs the data fails."""
        unkept = self._unkept
        unkept.add(change)
        try:
            payloads.put(change.secrets, change.configs)
        except Exception as error:
            log_error(error, "secrets and configs not kept, trying again")

            async def put() -> None:
                # A later assignment may have removed or replaced the data.
                payloads.put(unkept.secrets.values(), unkept.configs.values())
                unkept.clear()

            if not unkept.is_retried:
                unkept.is_retried = True
                self._spawn(retry(put, "secrets and configs not kept", clock=self._clock), "payloads")
        else:
            unkept.drop([secret.id for secret in change.secrets], [config.id for config in change.configs])

    def _lacks_payloads(self, assigned: AssignedTask) -> bool:
        container = assigned.task.spec.container_spec
        return self._payloads is not None and container is not None and not self._payloads.has(container)

    async def _drop_payloads(self, change: AssignmentSet) -> None:
        if self._payloads is None:
            return
        if change.complete:
            kept = [secret.id for secret in change.secrets], [config.id for config in change.configs]
            self._unkept.keep_only(*kept)
            self._payloads.keep_only(*kept)
        else:
            self._unkept.drop(change.removed_secrets, change.removed_configs)
            self._payloads.drop(change.removed_secrets, change.removed_configs)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        assert self._group is not None, "run sets the group"
        return self._group.create_task(isolate(work, "work of the worker ended", name=name), name=name)


class BrokenController:
    """The controller of a task for which the executor could not create one.  Every verb raises the reason."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def observed(self) -> None:
        """Return None: no process exists."""

    async def prepare(self) -> None:
        """Raise Rejected."""
        raise Rejected(describe_error(self._error)) from self._error

    async def start(self) -> Running:
        """Raise Rejected."""
        raise Rejected(describe_error(self._error)) from self._error

    async def wait(self, on_unhealthy: OnUnhealthy = ignored) -> TaskExit:
        """Return the error as the end of the task."""
        return TaskExit(exit_code=1, message=describe_error(self._error))

    async def fetch_end(self) -> None:
        """Return None: no end is known."""

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Do nothing: no process runs."""

    async def terminate(self) -> None:
        """Do nothing: no process runs."""

    async def update(self, task: AssignedTask) -> None:
        """Do nothing: no process runs."""

    async def remove(self) -> None:
        """Do nothing: no resources exist."""
