"""An engine with stubs for runc, the disk and the network.  A test decides when a process ends and what fails."""

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias, cast

from sim.world.time import VirtualClock, VirtualLoop
from skep.aio.clock import Clock
from skep.engine.containers.container import (
    Container,
    ContainerConfig,
    ContainerState,
    PlainOptions,
    ProcessName,
)
from skep.engine.engine import Engine, EngineConfig
from skep.engine.images.store import ImageStore
from skep.engine.networks.networking import Networking
from skep.engine.runtime.bundle import FoundContainers
from skep.engine.runtime.runtime import CreatedProcess, Ended, Runtime
from skep.engine.volumes.volumes import Volumes
from skep.model.networks.sandbox import Sandbox
from skep.model.values.ids import ContainerId
from skep.model.values.times import timestamp

ID = ContainerId("c" * 64)
NO_PROCESS = 2**30
"""A pid that the kernel never assigns."""


def disk_full() -> OSError:
    """Return a new error each time, because its traceback grows where it is raised."""
    return OSError(errno.ENOSPC, "No space left on device")


def a_process(number: int = 0) -> ProcessName:
    """Return a process that receives no signals."""
    return ProcessName(NO_PROCESS + number, 1, "no boot")


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


class StubBundles:
    """Stub of ``Bundles``.  ``is_full``: whether all writes fail."""

    def __init__(self, *containers: Container) -> None:
        self.saved = {one.id: one for one in containers}
        self.is_full = False
        self.apis = SimpleNamespace(adopt=lambda *_: None)

    def load(self) -> FoundContainers:
        return FoundContainers(known=list(self.saved.values()))

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
        pass

    def is_mounted(self, id: ContainerId) -> bool:
        return False

    async def discard(self, id: ContainerId) -> None:
        del self.saved[id]

    def bundle(self, id: ContainerId) -> Path:
        return Path("/nonexistent")

    api = path = shm = log = rootfs = bundle


class StubRuntime:
    """Stub of ``Runtime``, in which ``end`` ends the process.

    ``during``: called in ``runc pause|resume``.  ``frozen``: calls of both.
    """

    def __init__(self, bundles: StubBundles) -> None:
        self.bundles, self.cgroups = bundles, SimpleNamespace()
        self.during: Callable[[], Awaitable[object]] | None = None
        self.starts = self.frozen = 0
        self._exits: asyncio.Queue[Ended] = asyncio.Queue()

    def name_of(self, requested: str) -> str:
        return requested or "runc"

    def signal(self, process: ProcessName, number: int) -> None:
        """Do nothing, because the test ends processes."""

    def has(self, id: ContainerId) -> bool:
        return False

    def is_frozen(self, container: Container) -> bool:
        return container.state is ContainerState.PAUSED

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
        return CreatedProcess(a_process(self.starts + 1), a_process())

    async def start(self, id: ContainerId, process: ProcessName) -> None:
        self.starts += 1

    async def clear(self, container: Container) -> None:
        pass

    delete = clear

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
    """Stub of the data plane that provides everything at once."""

    predefined_ids: Mapping[str, str] = {}

    def is_present(self, sandbox: Sandbox) -> bool:
        return False

    async def attach(self, config: object) -> Sandbox:
        return Sandbox(netns="/nonexistent")

    async def restore(self, live: object) -> None:
        pass

    async def detach(self, id: ContainerId, sandbox: Sandbox) -> None:
        pass

    async def holders(self) -> tuple[()]:
        return ()

    async def sweep(self) -> None:
        pass


class NoImages:
    """Stub of ``ImageStore``."""

    async def sweep(self, in_use: object) -> None:
        pass


class StubEngine:
    """The engine with its stubs, and a record of operations on its container."""

    def __init__(self, clock: Clock, directory: Path, *containers: Container) -> None:
        self.bundles = StubBundles(*containers)
        self.runtime = StubRuntime(self.bundles)
        self.network = StubNetwork()
        self.clock = clock
        self.engine = Engine(
            runtime=cast("Runtime", self.runtime),
            images=cast("ImageStore", StubImages()),
            volumes=Volumes(directory / "volumes"),
            network=cast("Networking", self.network),
            clock=clock,
            config=EngineConfig(starts_max=1),
        )

    async def end(self, exit_code: int = 0) -> None:
        """End its process, and return when the engine has recorded that."""
        self.runtime.end(exit_code)
        await self.engine.wait(ID)


Body: TypeAlias = Callable[[StubEngine], Coroutine[Any, Any, None]]


def on_virtual_time(body: Body, directory: Path, *containers: Container, within_s: float = 3600) -> None:
    """Run a test's ``body`` with an engine that has ``containers``.  ``within_s``: virtual time."""
    loop = VirtualLoop()

    async def whole() -> None:
        stubs = StubEngine(VirtualClock(loop), directory, *containers)
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
