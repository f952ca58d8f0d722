"""Changes to containers that neither start nor end them: the part of ``Containers`` between looking and living."""

import msgspec

from skep.aio.clock import Clock
from skep.engine.bundle import Bundles
from skep.engine.cgroups import Cgroups
from skep.engine.container import Container, ContainerState
from skep.engine.events import Events
from skep.engine.options import Plain
from skep.engine.reading import ContainerReader
from skep.engine.registry import Registry
from skep.engine.runtime import Runtime
from skep.model.ids import ContainerId
from skep.model.sandbox import Sandbox


class ContainerChanger(ContainerReader):
    """Pauses, limits, names."""

    def __init__(
        self,
        *,
        registry: Registry,
        bundles: Bundles,
        cgroups: Cgroups,
        clock: Clock,
        runtime: Runtime,
        events: Events,
    ) -> None:
        super().__init__(registry=registry, bundles=bundles, cgroups=cgroups, clock=clock)
        self._runtime = runtime
        self.events = events

    async def resize(self, word: str, height: int, width: int) -> None:
        """Tell the size of its terminal, in characters.  Raises: NotFound; NotRunning."""
        container = self.require_running(word)
        self._runtime.resize(self._bundles.bundle(container.id), height, width)
        self.events.publish("resize", container, height=str(height), width=str(width))

    async def pause(self, word: str) -> None:
        """Freeze its processes.  Raises: NotFound; NotRunning; RuntimeFailed."""
        container = self.require_running(word)
        await self._runtime.pause(container.id)
        self.events.publish("pause", self._registry.observe(container.id, state=ContainerState.PAUSED))

    async def unpause(self, word: str) -> None:
        """Let its processes go on.  Raises: NotFound; NotRunning; RuntimeFailed."""
        container = self.require_running(word)
        await self._runtime.resume(container.id)
        self.events.publish("unpause", self._registry.observe(container.id, state=ContainerState.RUNNING))

    async def update(self, word: str, *, nano_cpus: int, memory_bytes: int, pids: int) -> Container:
        """Change its limits without a restart; 0 lifts one.  Raises: NotFound; RuntimeFailed."""
        container = self.get(word)
        config = msgspec.structs.replace(
            container.config, nano_cpus=nano_cpus, memory_bytes=memory_bytes, pids=pids
        )
        if config == container.config:
            return container
        if container.is_running:
            await self._runtime.update(container.id, config)
        container = self._registry.observe(container.id, config=config)
        self.events.publish("update", container)
        return container

    def check_free(self, name: str) -> None:
        """Raises: AlreadyExists: a container has ``name``."""
        self._registry.check_free(name)

    def rename(self, word: str, name: str) -> Container:
        """Give it another name.  Raises: NotFound; AlreadyExists: the name is taken."""
        container = self._registry.rename(self.get(word).id, name)
        self.events.publish("rename", container)
        return container

    def change_plain(self, id: ContainerId, plain: Plain) -> Container:
        """Replace what is noted of a plain container.  Raises: NotFound."""
        return self._registry.change(self.get(id).id, plain=plain)

    def change_sandbox(self, id: ContainerId, sandbox: Sandbox) -> Container:
        """Note that a running container is on other networks now.  Raises: NotFound."""
        return self._registry.observe(self.get(id).id, sandbox=sandbox)
