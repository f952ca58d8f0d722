"""One node process: the production engine, on stubs that act on the world until the process crashes."""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from sim.containers.faults import Crash, Faults
from sim.containers.world import World
from skep.aio.clock import Clock
from skep.engine.background import Background
from skep.engine.bundle import Found
from skep.engine.conmon import RuntimeFailed, StartError
from skep.engine.container import Container, ContainerState, MountPoint, ProcessName
from skep.engine.engine import Engine, EngineConfig
from skep.engine.events import Events
from skep.engine.images.store import ImageStore
from skep.engine.networking import Networking
from skep.engine.runtime import Ended, Runtime, Started
from skep.engine.volumes import MountFailed, Volumes
from skep.errors import AlreadyExists, SkepError
from skep.model.ids import ContainerId
from skep.model.sandbox import PublishedPort, Sandbox, SandboxConfig

T = TypeVar("T")

STARTS_MAX = 1
WARNINGS = ("limit discarded",)
"""Warnings of each preparation."""


class Part:
    """A stub of one neighbor of the engine.  Its calls reach the world while the process is alive."""

    def __init__(self, node: "NodeProcess") -> None:
        self._node = node
        self._world = node.world

    async def _call(self, name: str, do: Callable[[], T]) -> T:
        return await self._node.faults.call(lambda: self._node.is_alive, name, do)

    def _now(self, name: str, do: Callable[[], T]) -> T:
        return self._node.faults.call_now(self._node.is_alive, name, do)


class SimulatedRuntime(Part):
    """Stub of ``Runtime``."""

    def __init__(self, node: "NodeProcess", bundles: "SimulatedBundles") -> None:
        super().__init__(node)
        self.bundles = bundles
        self._creating = 0
        self.cgroups = SimpleNamespace()

    async def create(self, container: Container) -> Started:
        def create() -> Started:
            try:
                process = self._world.create(container.id)
            except RuntimeError as error:
                raise StartError(str(error)) from error
            return Started(process.name, process.name)

        self._creating += 1
        if self._creating > STARTS_MAX:
            self._world.violations.append("more containers start at one time than there are slots")
        try:
            return await self._call("create", create)
        finally:
            self._creating -= 1

    async def start(self, id: ContainerId, process: ProcessName) -> None:
        def start() -> None:
            found = self._world.processes.get(id)
            if found is None or found.exit_code is not None:
                raise StartError("already dead", "start")
            self._world.start(id)

        await self._call("start", start)

    async def wait(self, container: Container) -> Ended:
        for process in list(self._world.processes.values()):
            if process.name == container.process:
                await process.ended.wait()
        self._now("wait", lambda: None)
        code = self._world.exits.get(container.process) if container.process is not None else None
        return Ended(255) if code is None else Ended(code)

    def signal(self, process: ProcessName, number: int) -> None:
        self._now("signal", lambda: self._world.signal(process, number))

    def is_alive(self, process: ProcessName) -> bool:
        return any(one.name == process and one.exit_code is None for one in self._world.processes.values())

    def has(self, id: ContainerId) -> bool:
        return id in self._world.processes or id in self._world.cgroups

    def is_frozen(self, container: Container) -> bool:
        process = self._world.processes.get(container.id)
        return process is not None and process.is_frozen

    async def delete(self, container: Container) -> None:
        await self.delete_unknown(container.id)

    async def delete_unknown(self, id: ContainerId) -> None:
        self._world.unfreed.add(("process", id))
        await self._call("delete", lambda: self._world.delete(id))
        self._world.unfreed.discard(("process", id))

    async def clear(self, container: Container) -> None:
        self._world.unfreed.add(("process", container.id))
        await self._call("clear", lambda: self._world.delete(container.id))
        self._world.unfreed.discard(("process", container.id))

    async def status(self, id: ContainerId) -> str:
        return await self._call("status", partial(self._status, id))

    def _status(self, id: ContainerId) -> str:
        process = self._world.processes.get(id)
        if process is None:
            return ""
        if process.exit_code is not None:
            return "stopped" if process.is_started else "created"
        if process.is_frozen:
            return "paused"
        return "running" if process.is_started else "created"

    async def pause(self, id: ContainerId) -> None:
        await self._freeze("pause", id, is_frozen=True)

    async def resume(self, id: ContainerId) -> None:
        await self._freeze("resume", id, is_frozen=False)

    async def _freeze(self, name: str, id: ContainerId, *, is_frozen: bool) -> None:
        def freeze() -> None:
            try:
                self._world.set_frozen(id, is_frozen=is_frozen)
            except RuntimeError as error:
                raise RuntimeFailed(str(error)) from error

        await self._call(name, freeze)

    async def update(self, container: Container) -> Sequence[str]:
        return await self._call("update", lambda: ())

    def reopen_log(self, id: ContainerId) -> None:
        """Do nothing, because nothing is logged."""

    def close(self) -> None:
        """Do nothing, because nothing is held."""


class SimulatedBundles(Part):
    """Stub of ``Bundles``."""

    def __init__(self, node: "NodeProcess") -> None:
        super().__init__(node)
        self.apis = SimpleNamespace(adopt=lambda *_: None)

    def load(self) -> Found:
        world = self._world
        unknown = sorted(world.directories - world.records.keys())
        return Found(known=list(world.records.values()), unknown=unknown)

    def read(self, id: ContainerId) -> Container | None:
        return self._world.records.get(id)

    def make(self, container: Container) -> None:
        self._now("make", lambda: self._world.directories.add(container.id))

    def save(self, container: Container) -> None:
        self._now("save", lambda: self._world.save(container))

    def prepare(self, container: Container, shared: object) -> tuple[str, ...]:
        self._now("prepare", lambda: self._world.roots.add(container.id))
        return WARNINGS

    def parts(self, container: Container) -> tuple[()]:
        return ()

    def release(self, id: ContainerId) -> None:
        self._world.unfreed.add(("root", id))
        self._now("release", lambda: self._world.roots.discard(id))
        self._world.unfreed.discard(("root", id))

    def is_mounted(self, id: ContainerId) -> bool:
        return id in self._world.roots

    async def discard(self, id: ContainerId) -> None:
        self._world.unfreed.add(("directory", id))
        try:
            await self._call("discard", lambda: self._world.discard(id))
            self._world.unfreed.discard(("directory", id))
        except SkepError as error:
            raise OSError(16, "Device or resource busy") from error

    def forget_environment(self, id: ContainerId, entries: Sequence[str]) -> None:
        """Do nothing: containers have no secrets."""

    def bundle(self, id: ContainerId) -> Path:
        return Path("/nonexistent")

    api = path = shm = log = rootfs = bundle


class SimulatedNetwork(Part):
    """Stub of the data plane.  A container's only host port is its record's."""

    host_gateway = ""
    predefined_ids: Mapping[str, str] = {}

    def is_present(self, sandbox: Sandbox) -> bool:
        return ContainerId(sandbox.netns) in self._world.namespaces

    async def attach(self, config: SandboxConfig) -> Sandbox:
        port = config.ports[0].published_port if config.ports else 0

        def attach() -> Sandbox:
            try:
                self._world.attach(config.id, port)
            except RuntimeError as error:
                raise AlreadyExists(str(error)) from error
            return Sandbox(netns=config.id)

        return await self._call("attach", attach)

    async def detach(self, container_id: ContainerId, sandbox: Sandbox) -> None:
        await self._call("detach", lambda: self._world.detach(container_id))

    async def rename(self, config: SandboxConfig, sandbox: Sandbox | None) -> None:
        await self._call("rename", lambda: None)

    async def restore(self, live: Sequence[tuple[SandboxConfig, Sandbox]]) -> None:
        kept = {config.id for config, _ in live}

        def free() -> None:
            for id in sorted(self._world.namespaces - kept):
                self._world.detach(id)

        await self._call("restore", free)

    async def holders(self) -> Collection[ContainerId]:
        return sorted(self._world.namespaces)

    async def free(self, id: ContainerId) -> None:
        await self._call("free", lambda: self._world.detach(id))

    async def sweep(self) -> None:
        """Do nothing, because every port has its container's namespace."""


class SimulatedVolumes(Part):
    """Stub of ``Volumes``.  Each container has one that is mounted while it runs."""

    def __init__(self, node: "NodeProcess", clock: Clock) -> None:
        super().__init__(node)
        self.events = Events(clock)
        self.background = Background()
        self._users: set[ContainerId] = set()
        self._unfinished: set[ContainerId] = set()

    async def mount(self, user: str, points: Iterable[MountPoint], parts: object = ()) -> None:
        id = ContainerId(user)
        self._users.add(id)
        try:
            await self._call("mount", lambda: self._world.volumes.add(id))
        except SkepError as error:
            with suppress(SkepError):
                await self.unmount(user)
            raise MountFailed(f"error while mounting volume: {error}") from error
        except asyncio.CancelledError:
            self._users.discard(id)
            self._unfinished.add(id)
            raise

    async def unmount(self, user: str, parts: object = ()) -> None:
        id = ContainerId(user)
        self._users.discard(id)
        self._unfinished.add(id)
        await self._call("unmount", lambda: self._world.volumes.discard(id))
        self._unfinished.discard(id)

    def adopt(self, user: str, points: object) -> None:
        self._users.add(ContainerId(user))

    async def unmount_unused(self) -> None:
        for id in sorted(self._world.volumes - self._users):
            await self._call("unmount", partial(self._unmount, id))

    async def unmount_unfinished(self) -> None:
        for id in sorted(self._unfinished):
            await self._call("unmount", partial(self._unmount, id))
            self._unfinished.discard(id)

    def _unmount(self, id: ContainerId) -> None:
        if id not in self._users:
            self._world.volumes.discard(id)

    async def sweep(self) -> None:
        """Do nothing, because no volume is removed."""

    async def remove_anonymous(self, points: object, containers: object) -> None:
        """Do nothing: the simulation has none."""

    @staticmethod
    def release_parts(parts: object) -> None:
        """Do nothing: the simulation has none."""


class NoImages:
    """Stub of ``ImageStore``."""

    async def sweep(self, in_use: object) -> None:
        """Do nothing: the simulation has none."""


class NodeProcess:
    """The engine between two crashes."""

    def __init__(self, world: World, faults: Faults, clock: Clock, random: Random) -> None:
        self.world = world
        self.faults = faults
        self.is_alive = True
        self.crashed = asyncio.Event()
        bundles = SimulatedBundles(self)
        self.engine = Engine(
            runtime=cast("Runtime", SimulatedRuntime(self, bundles)),
            images=cast("ImageStore", NoImages()),
            volumes=cast("Volumes", SimulatedVolumes(self, clock)),
            network=cast("Networking", SimulatedNetwork(self)),
            clock=clock,
            config=EngineConfig(
                starts_max=STARTS_MAX,
                new_id=lambda: ContainerId(f"{random.getrandbits(256):064x}"),
                new_name=cast("Any", lambda: f"name{random.getrandbits(64):x}"),
            ),
        )
        # It reads the log files of every container once a second.
        self.engine.log_rotation.run = asyncio.Event().wait  # type: ignore[method-assign,assignment]

    def crash(self) -> None:
        """End the process: nothing that it still does reaches the world."""
        self.is_alive = False
        self.crashed.set()

    @property
    def accepts_requests(self) -> bool:
        """Whether users' requests reach containers: once their records are read, even before they are adopted."""
        return self.is_alive and not self.engine.may_have(ContainerId("unknown"))

    async def run(self) -> None:
        """Run the engine and the restart policies until cancelled, or until the process crashes."""
        with suppress(Crash):
            async with self.engine.running():
                await self.engine.run_restart_policies()


def port_of(number: int) -> tuple[PublishedPort, ...]:
    """Return the host port of a container, or none for 0."""
    return (PublishedPort(protocol="tcp", target_port=80, published_port=number),) if number else ()


def is_up(container: Container) -> bool:
    """Return whether a container has a process according to its record."""
    return container.state in (ContainerState.RUNNING, ContainerState.PAUSED)
