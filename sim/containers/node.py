"""One node process: the production engine, on stubs that act on the world until the process crashes."""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from msgspec.structs import replace

from sim.containers.faults import EFFECT, Crash, Faults
from sim.containers.world import ExecProcess, World
from skep.aio.clock import Clock
from skep.engine.containers.attachment import Attachment
from skep.engine.containers.container import (
    Container,
    ContainerState,
    ExecConfig,
    Interruption,
    MountPoint,
    ProcessName,
)
from skep.engine.engine import Engine, EngineConfig
from skep.engine.events import Events
from skep.engine.images.store import ImageStore
from skep.engine.lifecycle.background import Background
from skep.engine.lifecycle.effects import Action, Program
from skep.engine.lifecycle.life_events import LifeEvent
from skep.engine.lifecycle.machine import Effect
from skep.engine.networks.networking import Networking
from skep.engine.runtime.bundle import FoundContainers
from skep.engine.runtime.conmon import RuntimeFailed, StartError
from skep.engine.runtime.runtime import CreatedProcess, Ended, Runtime, StartedExec
from skep.engine.volumes.volumes import MountFailed, Volumes
from skep.errors import AlreadyExists, FailedPrecondition, SkepError, Unavailable
from skep.model.networks.sandbox import (
    Endpoint,
    EndpointConfig,
    EndpointRequest,
    NetworkMode,
    PublishedPort,
    Sandbox,
    SandboxConfig,
)
from skep.model.networks.tables import NetworkHead
from skep.model.values.ids import ContainerId, NetworkId

T = TypeVar("T")

STARTS_MAX = 1
RESTORES_S = (0.0, 0.0, 0.3, 3.0)
"""Seconds from the reading of the records until the networks of earlier processes are restored.  Users' requests reach
containers meanwhile.
"""
BRIDGE = NetworkMode.BRIDGE.value
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

    def name_of(self, requested: str) -> str:
        return requested or "runc"

    def forget_environment(self, id: ContainerId, entries: Sequence[str]) -> None:
        """Do nothing: containers have no secrets."""

    async def create(self, container: Container) -> CreatedProcess:
        def create() -> CreatedProcess:
            try:
                process = self._world.create(container.id, container.config.pids)
            except RuntimeError as error:
                raise StartError(str(error)) from error
            return CreatedProcess(process.name, process.name)

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
        ended = Ended(255, error="no monitor", interruption=Interruption.MONITOR_LOST)
        if code is not None:
            ended = Ended(code)
        self._world.reported[container.id] = ended
        return ended

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
        def update() -> tuple[str, ...]:
            if container.is_running and container.id in self._world.processes:
                self._world.limits[container.id] = container.config.pids
                self._world.unfreed.add(("limit", container.id))  # until its record has it
            return ()

        return await self._call("update", update)

    def expect_exec(self) -> None:
        """Do nothing, because nothing is prepared."""

    async def exec(
        self, container: Container, exec_id: str, path: Path, *, terminal: bool, stdin: bool
    ) -> StartedExec:
        def begin() -> StartedExec:
            try:
                process = self._world.exec(container.id, exec_id)
            except RuntimeError as error:
                raise StartError(str(error), "exec") from error
            return StartedExec(process.pid, None, cast("Attachment", SimulatedStreams(process)))

        return await self._call("exec", begin)

    def kill_exec(self, container: Container, pid: int) -> None:
        self._now("kill exec", lambda: self._world.kill_exec(pid))

    async def end_exec(self, container: Container, path: Path) -> None:
        if self._node.is_alive and (process := self._world.execs.get(path.name)) is not None:
            process.end(137)

    async def wait_exec(self, container: Container, path: Path, monitor: ProcessName | None) -> int:
        process = self._world.execs[path.name]
        await process.ended.wait()
        self._now("wait exec", lambda: None)
        return process.exit_code or 0

    def reopen_log(self, id: ContainerId) -> None:
        """Do nothing, because nothing is logged."""

    def close(self) -> None:
        """Do nothing, because the stub holds no resources."""


class SimulatedStreams:
    """Stub of ``Attachment``: streams without output, until the process ends."""

    def __init__(self, process: ExecProcess) -> None:
        self._process = process

    async def read(self) -> None:
        await self._process.ended.wait()

    def close(self) -> None:
        """Do nothing, because nothing is held."""


class SimulatedBundles(Part):
    """Stub of ``Bundles``."""

    def __init__(self, node: "NodeProcess") -> None:
        super().__init__(node)
        self.apis = SimpleNamespace(adopt=lambda *_: None)
        self.users = self.selinux_policy = None

    def load(self) -> FoundContainers:
        world = self._world
        unknown = sorted(world.directories - world.records.keys())
        return FoundContainers(known=list(world.records.values()), unknown=unknown)

    def read(self, id: ContainerId) -> Container | None:
        return self._world.records.get(id)

    def make(self, container: Container) -> None:
        self._now("make", lambda: self._world.directories.add(container.id))

    def save(self, container: Container) -> None:
        try:
            self._now("save", lambda: self._world.save(container))
        except OSError:
            self._world.unwritten.add(container.id)
            self._world.refused_writes[container.id] += 1
            raise

    def prepare(self, container: Container, shared: object) -> tuple[str, ...]:
        def prepare() -> None:
            self._world.roots.add(container.id)
            self._world.prepared[container.id] = container.config.env
            self._world.prepared_for[container.id] = container.sandbox.netns if container.sandbox else ""
            self._world.name_files[container.id] = _named_in(container)

        self._now("prepare", prepare)
        return WARNINGS

    def prepare_exec(self, container: Container, exec_id: str, exec: ExecConfig) -> Path:
        self._now("prepare exec", lambda: None)
        return self.exec_path(container.id, exec_id)

    def exec_path(self, id: ContainerId, exec_id: str) -> Path:
        return self.bundle(id) / exec_id

    def refresh_name_files(self, before: Container, after: Container) -> None:
        id, named = after.id, _named_in(after)
        self._world.unfreed.add(("name files", id))
        self._now("name files", lambda: self._world.name_files.update({id: named}))
        self._world.unfreed.discard(("name files", id))

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

    def bundle(self, id: ContainerId) -> Path:
        return Path("/nonexistent")

    api = path = shm = log = rootfs = bundle


class SimulatedNetwork(Part):
    """Stub of the data plane.  A container has at most one host port, which its record names."""

    def __init__(self, node: "NodeProcess") -> None:
        super().__init__(node)
        self._renaming: set[ContainerId] = set()
        """Containers whose last rename has failed."""

    host_gateway = ""
    predefined_ids: Mapping[str, str] = {}

    def is_present(self, sandbox: Sandbox) -> bool:
        return sandbox.netns in self._world.namespaces.values()

    async def attach(self, config: SandboxConfig) -> Sandbox:
        port = config.ports[0].published_port if config.ports else 0
        held = frozenset(self._world.namespaces)
        self._node.attached.add(config.id)

        def attach() -> Sandbox:
            try:
                self._world.attach(config.id, port, _networks_of(config), config.name)
            except RuntimeError as error:
                raise AlreadyExists(str(error)) from error
            return Sandbox(
                netns=self._world.namespaces[config.id],
                endpoints=tuple(_endpoint(one.network) for one in config.networks),
            )

        try:
            return await self._call("attach", attach)
        except SkepError:  # as in the data plane, a failure leaves nothing
            if config.id not in held:
                self._world.detach(config.id)
            raise

    async def connect(self, config: SandboxConfig, sandbox: Sandbox, request: EndpointRequest) -> Sandbox:
        if any(one.network_id == request.network for one in sandbox.endpoints):
            raise FailedPrecondition("it is there")
        await self._change("connect", config, {**self._held(config.id), request.network: config.name})
        return replace(sandbox, endpoints=(*sandbox.endpoints, _endpoint(request.network)))

    async def disconnect(self, config: SandboxConfig, sandbox: Sandbox, network_id: str) -> Sandbox:
        left = {one: name for one, name in self._held(config.id).items() if one != network_id}
        await self._change("disconnect", config, left)
        kept = tuple(one for one in sandbox.endpoints if one.network_id != network_id)
        return replace(sandbox, endpoints=kept)

    async def change_bridge(self, config: SandboxConfig, sandbox: Sandbox) -> Sandbox:
        held = {one: name for one, name in self._held(config.id).items() if one != BRIDGE}
        if config.mode is NetworkMode.BRIDGE:
            held[BRIDGE] = config.name
        await self._change("bridge", config, held)
        return sandbox

    def _held(self, id: ContainerId) -> Mapping[str, str]:
        return self._world.networks.get(id, {})

    async def _change(self, name: str, config: SandboxConfig, held: dict[str, str]) -> None:
        """Change the networks of a namespace.  As in the data plane, a failure leaves them as they were."""
        before = dict(self._held(config.id))

        def change() -> None:
            if config.id not in self._world.namespaces:
                # An earlier process has freed it at the end of the run.
                raise Unavailable("its namespace does not exist")
            self._world.networks[config.id] = held

        try:
            await self._call(name, change)
        except SkepError:
            if config.id in self._world.namespaces:
                self._world.networks[config.id] = before
            raise

    async def detach(self, container_id: ContainerId, sandbox: Sandbox) -> None:
        self._world.unfreed.add(("namespace", container_id))
        await self._call("detach", lambda: self._world.detach(container_id))
        self._world.unfreed.discard(("namespace", container_id))

    async def rename(self, config: SandboxConfig, sandbox: Sandbox | None) -> None:
        """Register a name.  One that failed twice, there and back, may be either."""
        id = config.id

        def rename() -> None:
            self._world.networks[id] = dict.fromkeys(self._held(id), config.name)

        try:
            await self._call("rename", rename if sandbox is not None else lambda: None)
        except SkepError:
            if id in self._renaming:
                self._world.unfreed.add(("name", id))
            self._renaming.add(id)
            raise
        self._renaming.discard(id)
        self._world.unfreed.discard(("name", id))

    async def restore(self, live: Sequence[tuple[SandboxConfig, Sandbox]]) -> None:
        kept = {config.id for config, _ in live}

        def free() -> None:
            for id in sorted(self._world.namespaces.keys() - kept):
                self._world.detach(id)
            for config, _ in live:
                self._world.networks[config.id] = dict.fromkeys(_networks_of(config), config.name)

        await self._node.clock.sleep(self._node.random.choice(RESTORES_S))
        await self._call("restore", free)

    async def holders(self) -> Collection[ContainerId]:
        return sorted(self._world.namespaces)

    async def free(self, id: ContainerId) -> None:
        await self._call("free", lambda: self._world.detach(id))

    async def sweep(self) -> None:
        """Do nothing, because every port has its container's namespace."""


def _named_in(container: Container) -> tuple[str, ...]:
    """Return the networks that the name files of a container show."""
    return () if container.sandbox is None else tuple(one.network_id for one in container.sandbox.endpoints)


def _networks_of(config: SandboxConfig) -> Sequence[str]:
    bridge = (BRIDGE,) if config.mode is NetworkMode.BRIDGE else ()
    return (*bridge, *(one.network for one in config.networks))


def _endpoint(network: str) -> Endpoint:
    head = NetworkHead(id=NetworkId(network), name=network)
    return Endpoint(config=EndpointConfig(head=head, addresses=()), interface="", port="", mac_address="")


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
            self._world.unfreed.add(("volume", id))
            raise

    async def unmount(self, user: str, parts: object = ()) -> None:
        id = ContainerId(user)
        self._users.discard(id)
        self._unfinished.add(id)
        try:
            await self._call("unmount", partial(self._world.unmount, id))
        except (SkepError, asyncio.CancelledError):
            self._world.unfreed.add(("volume", id))
            raise
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
            self._world.unmount(id)

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
        self.clock = clock
        self.random = random
        self.is_alive = True
        self.crashed = asyncio.Event()
        self.attached: set[ContainerId] = set()
        """Containers that this process has attached to networks."""
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
        lifecycle = self.engine.lifecycle
        lifecycle.actions = {one: partial(_in_effect, one, act) for one, act in lifecycle.actions.items()}
        # It reads the log files of every container once a second.
        self.engine.log_rotation.run = asyncio.Event().wait  # type: ignore[method-assign,assignment]

    def crash(self) -> None:
        """Crash the process.  Nothing that it still does affects the world."""
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


async def _in_effect(effect: Effect, act: Action, container: Container, program: Program) -> LifeEvent | None:
    """Carry out an effect, and name it to the calls that it makes."""
    token = EFFECT.set(effect)
    try:
        return await act(container, program)
    finally:
        EFFECT.reset(token)


def port_of(number: int) -> tuple[PublishedPort, ...]:
    """Return the host port of a container, or none for 0."""
    return (PublishedPort(protocol="tcp", target_port=80, published_port=number),) if number else ()


def is_up(container: Container) -> bool:
    """Return whether a container has a process according to its record."""
    return container.state in (ContainerState.RUNNING, ContainerState.PAUSED)
