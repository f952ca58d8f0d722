"""A worker with real container files, and a runtime and a network in memory."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from msgspec.structs import replace

from skep.agent.executor.interface import Controller, Running, TaskExit
from skep.aio.clock import Clock, SystemClock
from skep.engine.capacity import Programs, capacity_of
from skep.engine.confinement.apparmor import SYSFS
from skep.engine.confinement.cgroups import Cgroups
from skep.engine.confinement.selinux import Policy
from skep.engine.containers.container import Container, ContainerConfig, NewContainer, ProcessName
from skep.engine.engine import Engine, EngineConfig
from skep.engine.images.store import ImageStore
from skep.engine.networks.networking import Networking
from skep.engine.runtime.bundle import Bundles
from skep.engine.runtime.runtime import CreatedProcess, Ended, Runtime
from skep.engine.runtime.runtime_spec import NOTHING_SHARED, Shared
from skep.errors import NotFound
from skep.model.networks.sandbox import EndpointRequest, Sandbox, SandboxConfig
from skep.model.options.labels import LABEL_TASK_ID
from skep.model.task import AssignedTask, ContainerStatus
from skep.model.task_end import TaskEnd
from skep.model.values.ids import ContainerId, TaskId
from tests.support.engine.stub_engine import NoImages, Steps, StepVolumes

Fault = Callable[[str, str], None]
"""Called with a verb and the container's id before each call.  Raises the error that the call should meet."""


def _none(verb: str, id: str) -> None:
    """Raise no error."""


class QuickClock(SystemClock):
    """A clock that runs a thousand times as fast, so that pauses after failures are short."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / 1000)


class Machine:
    """State that outlives the node process: processes, and the network's record of them.

    ``is_stuck``: whether processes ignore all signals.  ``sysfs`` is its directory of the kernel's.
    """

    def __init__(self, sysfs: Path = SYSFS) -> None:
        self.sysfs = sysfs
        self.ended: dict[str, asyncio.Event] = {}
        self.is_stuck = False
        self.next_pid = 1 << 24
        self.by_pid: dict[int, str] = {}
        self.attached: set[str] = set()
        self.fault: Fault = _none
        self.unapplied: Sequence[str] = ()
        """Warnings of the runtime about limits that it could not apply."""
        self.steps = Steps()

    def end(self, id: str) -> None:
        self.ended[id].set()


class MemoryRuntime:
    """Stub of ``Runtime``."""

    def __init__(self, machine: Machine, bundles: Bundles, cgroups: Cgroups) -> None:
        self._machine = machine
        self.bundles = bundles
        self.cgroups = cgroups

    def close(self) -> None:
        """Do nothing, because nothing is held."""

    def name_of(self, requested: str) -> str:
        return requested or "runc"

    def signal(self, process: ProcessName, number: int) -> None:
        if self._machine.is_stuck:
            return
        self._machine.end(self._machine.by_pid[process.pid])

    def has(self, id: ContainerId) -> bool:
        return False

    def is_alive(self, process: ProcessName) -> bool:
        return not self._machine.ended[self._machine.by_pid[process.pid]].is_set()

    def is_frozen(self, container: Container) -> bool:
        return False

    async def create(self, container: Container) -> CreatedProcess:
        self._machine.fault("create", container.id)
        self._machine.next_pid += 1
        self._machine.by_pid[self._machine.next_pid] = container.id
        self._machine.ended[container.id] = asyncio.Event()
        name = ProcessName(self._machine.next_pid, 1, "boot")
        return CreatedProcess(name, name)

    async def start(self, id: ContainerId, process: ProcessName) -> None:
        self._machine.fault("start", id)
        await self._machine.steps.begin("runtime.start")

    async def wait(self, container: Container) -> Ended:
        self._machine.fault("wait", container.id)
        await self._machine.ended[container.id].wait()
        self._machine.fault("ended", container.id)
        return Ended(0)

    async def delete(self, container: Container) -> None:
        await self.delete_unknown(container.id)

    async def delete_unknown(self, id: ContainerId) -> None:
        self._machine.fault("delete", id)
        if id in self._machine.ended:
            self._machine.end(id)

    async def clear(self, container: Container) -> None:
        self._machine.fault("clear", container.id)

    async def status(self, id: ContainerId) -> str:
        self._machine.fault("status", id)
        return "running" if id in self._machine.ended and not self._machine.ended[id].is_set() else ""

    async def update(self, container: Container) -> Sequence[str]:
        self._machine.fault("update", container.id)
        await self._machine.steps.begin("runtime.update", container)
        return self._machine.unapplied

    def expect_exec(self) -> None:
        """Do nothing, because no program is prepared."""

    def reopen_log(self, id: ContainerId) -> None:
        self._machine.fault("reopen", id)


class MemoryNetwork:
    """Stub of ``ContainerNetwork``."""

    host_gateway = ""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.predefined_ids: dict[str, str] = {}

    async def connect(self, config: SandboxConfig, sandbox: Sandbox, request: EndpointRequest) -> Sandbox:
        return Sandbox(netns="")

    async def disconnect(self, config: SandboxConfig, sandbox: Sandbox, network_id: str) -> Sandbox:
        return Sandbox(netns="")

    async def rename(self, config: SandboxConfig, sandbox: Sandbox | None) -> None:
        """Do nothing, because there are no names."""

    def is_present(self, sandbox: Sandbox) -> bool:
        return False

    async def restore(self, live: Sequence[tuple[SandboxConfig, Sandbox]]) -> None:
        self._machine.fault("restore", "")

    async def attach(self, config: SandboxConfig) -> Sandbox:
        self._machine.fault("attach", config.id)
        self._machine.attached.add(config.id)
        return Sandbox(netns="")

    async def holders(self) -> Collection[ContainerId]:
        return ()

    async def sweep(self) -> None:
        """Do nothing, because everything belongs to a container."""

    async def detach(self, container_id: ContainerId, endpoint: Sandbox) -> None:
        self._machine.fault("detach", container_id)
        self._machine.attached.discard(container_id)


class MemoryBundles(Bundles):
    """Bundles in which nothing is mounted, with a test's steps."""

    def __init__(
        self, directory: Path, cgroups: Cgroups, machine: Machine, policy: Policy | None = None
    ) -> None:
        capacity = capacity_of(cgroups, Programs(), sysfs=machine.sysfs)
        super().__init__(
            directory / "containers",
            directory / "bundles",
            cgroups,
            replace(capacity, selinux_policy=policy),
            directory / "resolv.conf",
        )
        self._steps = machine.steps

    def mount(self, container: Container) -> None:
        self.rootfs(container.id).mkdir(parents=True, exist_ok=True)

    def prepare(self, container: Container, shared: Shared = NOTHING_SHARED) -> tuple[str, ...]:
        self._steps.begin_now("bundles.prepare")
        return super().prepare(container, shared)

    def refresh_name_files(self, before: Container, after: Container) -> None:
        self._steps.begin_now("bundles.refresh_name_files")
        super().refresh_name_files(before, after)

    async def discard(self, id: ContainerId) -> None:
        await self._steps.begin("bundles.discard", id)
        await super().discard(id)


def memory_engine(
    directory: Path,
    machine: Machine,
    network: Networking | None = None,
    *,
    images: ImageStore | None = None,
    clock: Clock | None = None,
    policy: Policy | None = None,
    config: EngineConfig | None = None,
) -> Engine:
    """Return an engine with its files below ``directory``.  Nothing is mounted, and signals end processes of
    ``machine``.

    Args:
        network: None for a network in memory.
        images: None for a store without images.
        clock: None for a quick one.
        policy: SELinux's, by which containers get labels.
        config: None for the settings of a small node.
    """
    cgroups = Cgroups("none")
    bundles = MemoryBundles(directory, cgroups, machine, policy)
    return Engine(
        runtime=cast("Runtime", MemoryRuntime(machine, bundles, cgroups)),
        images=images or cast("ImageStore", NoImages()),
        volumes=StepVolumes(directory / "volumes", machine.steps),
        network=network or MemoryNetwork(machine),
        clock=clock or QuickClock(),
        config=config or EngineConfig(starts_max=4),
    )


def new_container(name: str, **labels: str) -> NewContainer:
    return NewContainer(
        name=name,
        image="i",
        image_id="sha256:i",
        layers=(),
        config=ContainerConfig(path="true"),
        labels={key.replace("_", "."): value for key, value in labels.items()},
    )


class EngineExecutor:
    """A minimal executor on top of ``Engine``."""

    name = "oci"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self.engine.running():
            yield

    def controller(self, task: AssignedTask, registry_auth: str = "") -> Controller:
        return ContainerController(self.engine, task)

    async def leftovers(self) -> Sequence[TaskId]:
        return [TaskId(one.labels[LABEL_TASK_ID]) for one in self.engine.list()]

    async def discard(self, task_id: TaskId) -> None:
        found = self.engine.find_by_label(LABEL_TASK_ID, task_id)
        if found is not None:
            await self.engine.remove(found.id, force=True)


class ContainerController:
    """Controls one task's container."""

    def __init__(self, engine: Engine, task: AssignedTask) -> None:
        self._engine = engine
        self._id = task.task.id

    def _container(self) -> Container | None:
        return self._engine.find_by_label(LABEL_TASK_ID, self._id)

    def _require(self) -> Container:
        container = self._container()
        if container is None:
            raise NotFound(f"No such container: {self._id}")
        return container

    def observed(self) -> Running | None:
        found = self._container()
        return None if found is None else Running(container=ContainerStatus(container_id=found.id))

    async def prepare(self) -> None:
        if self._container() is None:
            labels: dict[str, Any] = {LABEL_TASK_ID: self._id}
            await self._engine.add(new_container(f"task-{self._id}", **labels))

    async def start(self) -> Running:
        container = self._require()
        if not container.was_started:
            container = await self._engine.start(container.id)
        return Running(container=ContainerStatus(container_id=container.id))

    async def wait(self) -> TaskExit:
        container = await self._engine.wait(self._require().id)
        return TaskExit(exit_code=container.exit_code)

    async def fetch_end(self) -> TaskEnd | None:
        """Return None, because only the exit code is known."""
        return None

    async def shutdown(self, drain_s: float = 0.0) -> None:
        container = self._container()
        if container is not None:
            await self._engine.stop(container.id)

    async def terminate(self) -> None:
        await self.shutdown()

    async def update(self, task: AssignedTask) -> None:
        """Do nothing, because there are no limits."""

    async def remove(self) -> None:
        container = self._container()
        if container is not None:
            await self._engine.remove(container.id, force=True)
