"""An engine with stubs for runc, the disk and the network.  A test decides when a process ends and what fails."""

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias, cast

from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.aio.clock import Clock
from skep.engine.containers.container import (
    Container,
    ContainerConfig,
    ContainerState,
    MountPoint,
    PlainOptions,
    ProcessName,
)
from skep.engine.engine import Engine, EngineConfig
from skep.engine.images.store import ImageStore
from skep.engine.networks.networking import Networking
from skep.engine.runtime.bundle import FoundContainers
from skep.engine.runtime.runtime import CreatedProcess, Ended, Runtime
from skep.engine.volumes.volumes import Volumes, VolumeSubpath
from skep.model.container import Mount
from skep.model.networks.sandbox import Endpoint, EndpointConfig, EndpointRequest, Sandbox, SandboxConfig
from skep.model.networks.tables import NetworkHead
from skep.model.values.ids import ContainerId, NetworkId
from skep.model.values.times import timestamp
from skep.model.values.user_map import UserMap

ID = ContainerId("c" * 64)
NO_PROCESS = 2**30
"""A pid that the kernel never assigns."""


def disk_full() -> OSError:
    """Return a new error each time, because its traceback grows where it is raised."""
    return OSError(errno.ENOSPC, "No space left on device")


def a_process(number: int = 0) -> ProcessName:
    """Return a process that receives no signals."""
    return ProcessName(NO_PROCESS + number, 1, "no boot")


def an_endpoint(name: str, id: str = "") -> Endpoint:
    head = NetworkHead(id=NetworkId(id or name), name=name)
    return Endpoint(config=EndpointConfig(head=head, addresses=()), interface="", port="", mac_address="")


def a_container(**fields: Any) -> Container:
    """Return a plain running container, unless ``fields`` change that."""
    present: dict[str, Any] = {
        "state": ContainerState.RUNNING,
        "process": a_process(),
        "started_at": timestamp(1),
        "plain": PlainOptions(),
        "config": ContainerConfig(path="sh"),
    }
    return Container(id=ID, name="c", image="i", image_id="sha256:i", **{**present, **fields})


class Steps(dict[str, Callable[..., Any]]):
    """Actions of a test at the beginning of a stub's steps, by the step's name: they wait, record or fail.

    The step follows the action.
    """

    async def begin(self, name: str, *arguments: object) -> None:
        if name in self:
            await self[name](*arguments)

    def begin_now(self, name: str, *arguments: object) -> None:
        """Begin a step that cannot wait."""
        if name in self:
            self[name](*arguments)


class StubBundles:
    """Stub of ``Bundles``.  ``is_full``: whether all writes fail."""

    def __init__(self, *containers: Container, steps: Steps, unreadable: Container | None = None) -> None:
        """``unreadable``: its record could not be read when the process began, and can be read later."""
        self.saved = {one.id: one for one in containers}
        self.is_full = False
        self.adopted: list[ContainerId] = []
        self.apis = SimpleNamespace(adopt=lambda one, _: self.adopted.append(one.id))
        self.users = self.selinux_policy = None
        self._steps, self._unreadable = steps, unreadable

    def load(self) -> FoundContainers:
        unreadable = [self._unreadable.id] if self._unreadable else []
        return FoundContainers(known=list(self.saved.values()), unreadable=unreadable)

    def read(self, id: ContainerId) -> Container:
        assert self._unreadable is not None
        return self._unreadable

    def save(self, container: Container) -> None:
        if self.is_full:
            raise disk_full()
        self.saved[container.id] = container

    def make(self, container: Container, *_: object) -> None:
        if self.is_full:
            raise disk_full()

    def prepare(self, container: Container, shared: object) -> tuple[str, ...]:
        if self.is_full:
            raise disk_full()
        return ()

    def parts(self, container: Container) -> tuple[()]:
        return ()

    def release(self, id: ContainerId) -> None:
        self._steps.begin_now("bundles.release", id)

    def is_mounted(self, id: ContainerId) -> bool:
        self._steps.begin_now("bundles.is_mounted", id)
        return False

    async def discard(self, id: ContainerId) -> None:
        await self._steps.begin("bundles.discard", id)
        del self.saved[id]

    def bundle(self, id: ContainerId) -> Path:
        return Path("/nonexistent")

    api = path = shm = log = rootfs = bundle


class StubRuntime:
    """Stub of ``Runtime``, in which ``end`` ends the process.

    ``during``: called in ``runc pause|resume``.  ``frozen``: calls of both.  ``is_all_frozen``: what the kernel says of
    each container, None for its record.  ``signals``: the sent signals, which have no effect.  ``has_all``: whether
    there is state of each container.
    """

    def __init__(self, bundles: StubBundles, steps: Steps) -> None:
        self.bundles, self.cgroups = bundles, SimpleNamespace()
        self.during: Callable[[], Awaitable[object]] | None = None
        self.starts = self.frozen = 0
        self.is_all_frozen: bool | None = None
        self.has_all = False
        self.signals: list[int] = []
        self._steps = steps
        self._exits: asyncio.Queue[Ended] = asyncio.Queue()

    def name_of(self, requested: str) -> str:
        return requested or "runc"

    def signal(self, process: ProcessName, number: int) -> None:
        """Record it, because the test ends processes."""
        self.signals.append(number)

    def has(self, id: ContainerId) -> bool:
        return self.has_all

    def is_frozen(self, container: Container) -> bool:
        in_record = container.state is ContainerState.PAUSED
        return in_record if self.is_all_frozen is None else self.is_all_frozen

    def end(self, exit_code: int = 0) -> None:
        self._exits.put_nowait(Ended(exit_code))

    async def wait(self, container: Container) -> Ended:
        if container.process is None:  # as runc does
            return Ended(255, error="its exit code is not known")
        return await self._exits.get()

    async def pause(self, id: ContainerId) -> None:
        self.frozen += 1
        if self.during is not None:
            await self.during()

    resume = pause

    async def create(self, container: Container) -> CreatedProcess:
        await self._steps.begin("runtime.create", container)
        return CreatedProcess(a_process(self.starts + 1), a_process())

    async def start(self, id: ContainerId, process: ProcessName) -> None:
        await self._steps.begin("runtime.start")
        self.starts += 1

    async def status(self, id: ContainerId) -> str:
        await self._steps.begin("runtime.status")
        return "running"

    async def clear(self, container: Container) -> None:
        await self._steps.begin("runtime.clear", container)

    async def delete(self, container: Container) -> None:
        await self._steps.begin("runtime.delete", container)

    async def delete_unknown(self, id: ContainerId) -> None:
        pass

    def forget_environment(self, *_: object) -> None:
        self._steps.begin_now("runtime.forget_environment")

    def close(self) -> None:
        pass

    reopen_log = release_parts = lambda *_: None


class StubImages:
    """Stub of ``ImageStore`` without images."""

    def lookup(self, word: str) -> None:
        pass

    async def sweep(self, used: object) -> None:
        pass


class StubNetwork:
    """Stub of the data plane that provides everything at once.

    ``has_all``: whether each sandbox is present.  ``changes``: of running containers.
    """

    predefined_ids: Mapping[str, str] = {}

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self.has_all = False
        self.changes: list[str] = []

    def is_present(self, sandbox: Sandbox) -> bool:
        return self.has_all

    async def attach(self, config: SandboxConfig) -> Sandbox:
        await self._steps.begin("network.attach", config)
        return Sandbox(netns="/nonexistent")

    async def restore(self, live: object) -> None:
        await self._steps.begin("network.restore")

    async def detach(self, id: ContainerId, sandbox: Sandbox) -> None:
        await self._steps.begin("network.detach", id)

    async def connect(self, config: SandboxConfig, sandbox: Sandbox, request: EndpointRequest) -> Sandbox:
        self._change(f"connect {request.network}")
        return replace(sandbox, endpoints=(*sandbox.endpoints, an_endpoint(request.network)))

    async def disconnect(self, config: SandboxConfig, sandbox: Sandbox, network_id: str) -> Sandbox:
        self._change(f"disconnect {network_id}")
        kept = tuple(one for one in sandbox.endpoints if one.network_id != network_id)
        return replace(sandbox, endpoints=kept)

    async def change_bridge(self, config: SandboxConfig, sandbox: Sandbox) -> Sandbox:
        self._change("bridge")
        return sandbox

    def _change(self, text: str) -> None:
        self.changes.append(text)
        self._steps.begin_now("network.change")

    async def holders(self) -> tuple[()]:
        return ()

    async def sweep(self) -> None:
        pass


class StepVolumes(Volumes):
    """Volumes with a test's steps."""

    def __init__(self, directory: Path, steps: Steps) -> None:
        super().__init__(directory)
        self._steps = steps

    async def create_of_plugins(self, mounts: Iterable[Mount], stack: str = "") -> None:
        await self._steps.begin("volumes.create_of_plugins")
        await super().create_of_plugins(mounts, stack)

    async def fill(
        self,
        user: str,
        points: Sequence[MountPoint],
        mounts: Iterable[Mount],
        root: Path,
        users: UserMap | None = None,
    ) -> None:
        await self._steps.begin("volumes.fill", user)
        await super().fill(user, points, mounts, root, users)

    async def mount(
        self, user: str, points: Iterable[MountPoint], parts: Sequence[VolumeSubpath] = ()
    ) -> None:
        await self._steps.begin("volumes.mount", user)
        await super().mount(user, points, parts)

    async def unmount(self, user: str, parts: Iterable[VolumeSubpath] = ()) -> None:
        await self._steps.begin("volumes.unmount", user)
        await super().unmount(user, parts)

    async def unmount_unused(self) -> None:
        await self._steps.begin("volumes.unmount_unused")
        await super().unmount_unused()


class NoImages:
    """Stub of ``ImageStore``."""

    async def sweep(self, in_use: object) -> None:
        pass


class StubEngine:
    """The engine with its stubs, and a record of operations on its container."""

    def __init__(
        self, clock: Clock, directory: Path, *containers: Container, unreadable: Container | None = None
    ) -> None:
        self.steps = Steps()
        self.bundles = StubBundles(*containers, steps=self.steps, unreadable=unreadable)
        self.runtime = StubRuntime(self.bundles, self.steps)
        self.network = StubNetwork(self.steps)
        self.clock = clock
        self.engine = Engine(
            runtime=cast("Runtime", self.runtime),
            images=cast("ImageStore", StubImages()),
            volumes=StepVolumes(directory / "volumes", self.steps),
            network=cast("Networking", self.network),
            clock=clock,
            config=EngineConfig(starts_max=1),
        )

    async def end(self, exit_code: int = 0) -> None:
        """End its process, and return when the engine has recorded that."""
        self.runtime.end(exit_code)
        await self.engine.wait(ID)


Body: TypeAlias = Callable[[StubEngine], Coroutine[Any, Any, None]]


def on_virtual_time(
    body: Body,
    directory: Path,
    *containers: Container,
    within_s: float = 3600,
    before: Callable[[StubEngine], object] = lambda _: None,
    unreadable: Container | None = None,
) -> None:
    """Run a test's ``body`` with an engine that has ``containers``.

    ``within_s``: virtual time.  ``before``: what the test arranges before the engine adopts its containers.
    """
    loop = VirtualLoop()

    async def whole() -> None:
        stubs = StubEngine(VirtualClock(loop), directory, *containers, unreadable=unreadable)
        before(stubs)
        async with asyncio.timeout(within_s), stubs.engine.running():
            await body(stubs)

    try:
        loop.run_until_complete(whole())
    finally:
        loop.close()


@asynccontextmanager
async def restart_policies(stubs: StubEngine) -> AsyncIterator[None]:
    """Run the restart policies until the block ends."""
    monitoring = asyncio.create_task(stubs.engine.run_restart_policies())
    try:
        yield
    finally:
        monitoring.cancel()
        await asyncio.wait([monitoring])
