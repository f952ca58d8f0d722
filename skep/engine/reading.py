"""Looking at containers: the half of ``Containers`` that changes nothing."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from skep.aio.clock import Clock
from skep.engine import logs, top
from skep.engine.bundle import Bundles
from skep.engine.cgroups import Cgroups
from skep.engine.container import Container, LogEntry, LogWish, NotRunning, Top, WaitCondition
from skep.engine.registry import Registry
from skep.engine.stats import Stats, sample
from skep.model.times import ZERO_TIME


class ContainerReader:
    """The containers of a node as they are.  ``word`` means one by id, name or unique prefix of the id."""

    def __init__(self, *, registry: Registry, bundles: Bundles, cgroups: Cgroups, clock: Clock) -> None:
        self._registry = registry
        self._bundles = bundles
        self._cgroups = cgroups
        self._clock = clock

    def list(self) -> Sequence[Container]:
        """All containers, running or not, the newest first (docker's order)."""
        return self._registry.list()

    def get(self, word: str) -> Container:
        """Raises: NotFound: ``No such container: <word>``, or the prefix fits several."""
        return self._registry.get(word)

    def find_by_label(self, label: str, value: str) -> Container | None:
        """The newest container with this label, or None."""
        return next((one for one in self.list() if one.labels.get(label) == value), None)

    async def top(self, word: str, ps_args: str = "") -> Top:
        """The processes of a running container as ``ps`` on the node shows them (``ps_args`` empty: ``-ef``).

        Raises: NotFound; NotRunning; InvalidArgument: ps does not take the arguments.
        """
        container = self.require_running(word)
        return await top.processes(self._cgroups.pids(container.id), ps_args or "-ef")

    async def stats(self, word: str) -> Stats:
        """One sample of what the container uses; zeros when it does not run.  Raises: NotFound."""
        container = self.get(word)
        return await asyncio.to_thread(sample, container, self._cgroups, self._clock.now_ns())

    def logs(self, word: str, wish: LogWish) -> AsyncGenerator[LogEntry, None]:
        """Its output, oldest first; with ``follow`` until it has ended.  Raises: NotFound, at once."""
        id = self.get(word).id

        def has_ended() -> bool:
            present = self._registry.lookup(id)
            return present is None or (present.was_started and not present.is_running)

        async def wait_ended() -> None:
            while not has_ended():  # it may be over before one begins to wait for a change
                await self._registry.wait_changed(id)

        return logs.read(self._bundles.log(id), wish, has_ended=has_ended, wait_ended=wait_ended)

    def changes(self, word: str) -> Sequence[tuple[int, str]]:
        """Paths that differ from the image, sorted: (0 modified, 1 added, 2 deleted).  Raises: NotFound."""
        return self._bundles.changes(self.get(word))

    async def wait(self, word: str, condition: WaitCondition = WaitCondition.NOT_RUNNING) -> Container:
        """Return the container once ``condition`` holds; exit code and error are in it.  Raises: NotFound."""
        container = first = self.get(word)
        while True:
            match condition:
                case WaitCondition.NOT_RUNNING if not container.is_running:
                    return container
                case WaitCondition.NEXT_EXIT if container.finished_at not in (first.finished_at, ZERO_TIME):
                    return container
                case _:
                    await self._registry.wait_changed(container.id)
            present = self._registry.lookup(container.id)
            if present is None:  # removed: as it was last seen
                return container
            container = present

    def require_running(self, word: str) -> Container:
        """Raises: NotFound; NotRunning."""
        container = self.get(word)
        if not container.is_running:
            raise NotRunning(f"Container {container.id} is not running")
        return container
