"""The records of all containers of a node: in memory for reading, on disk for the next process."""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from skep.aio.clock import Clock
from skep.aio.guard import persist, report
from skep.engine.bundle import Bundles
from skep.engine.container import Container
from skep.errors import AlreadyExists, NotFound
from skep.model.ids import ContainerId


class Registry:
    """Containers by id, name and prefix.  Every change is written before it is seen."""

    def __init__(self, bundles: Bundles) -> None:
        self._bundles = bundles
        self._containers: dict[ContainerId, Container] = {}
        self._ids_by_name: dict[str, ContainerId] = {}
        self._changed: dict[ContainerId, asyncio.Event] = {}
        self._unwritten: set[ContainerId] = set()
        self._something = asyncio.Event()

    def list(self) -> Sequence[Container]:
        """All of them, the newest first."""
        return sorted(self._containers.values(), key=lambda one: (one.created_at, one.id), reverse=True)

    def lookup(self, id: ContainerId) -> Container | None:
        """The container with exactly this id."""
        return self._containers.get(id)

    def get(self, word: str) -> Container:
        """What a user means by ``word``: full id, else name, else unique prefix of an id.

        Raises: NotFound: ``No such container: <word>``, or the prefix fits several.
        """
        exact = self._containers.get(ContainerId(word))
        if exact is not None:
            return exact
        by_name = self._ids_by_name.get(word.removeprefix("/"))
        if by_name is not None:
            return self._containers[by_name]
        matches = [id for id in self._containers if word and id.startswith(word)]
        if len(matches) > 1:
            raise NotFound(f"multiple IDs found with provided prefix: {word}")
        if not matches:
            raise NotFound(f"No such container: {word}")
        return self._containers[matches[0]]

    def add(self, container: Container) -> None:
        """A new container, or one of an earlier process.  Raises: AlreadyExists: the name is taken."""
        self.check_free(container.name)
        self._containers[container.id] = container
        self._ids_by_name[container.name] = container.id

    def change(self, id: ContainerId, **fields: Any) -> Container:
        """Replace fields of a record, on disk and here, and wake who waits for it.  Raises: NotFound: it is gone."""
        before = self._containers.get(id)
        if before is None:
            raise NotFound(f"No such container: {id}")
        container = msgspec.structs.replace(before, **fields)
        self._bundles.save(container)
        self._containers[id] = container
        self._unwritten.discard(id)
        self._notify(id)
        return container

    def observe(self, id: ContainerId, **fields: Any) -> Container:
        """Like ``change`` for what is so, whether it can be written down now or not: it is written as soon as it can.

        Raises: NotFound: it is gone.
        """
        try:
            return self.change(id, **fields)
        except OSError as error:
            report(error, "record not written", container=id)
        container = self._containers[id] = msgspec.structs.replace(self._containers[id], **fields)
        self._unwritten.add(id)
        self._something.set()
        self._notify(id)
        return container

    async def run(self, clock: Clock) -> None:
        """Write what could not be written, until cancelled."""
        while True:
            await self._something.wait()
            self._something.clear()
            await persist(self._write, "records not written", clock=clock, longest_s=5.0)

    async def _write(self) -> None:
        """Raises: what the first that is refused is refused for, once all others are written."""
        refusals = []
        for id in tuple(self._unwritten):
            container = self._containers.get(id)
            try:
                if container is not None:
                    self._bundles.save(container)
            except Exception as error:
                refusals.append(error)
            else:
                self._unwritten.discard(id)
        if refusals:
            raise refusals[0]

    def restore(self, container: Container) -> None:
        """Know a container of an earlier process; should its name be another's, it gets one of its own."""
        if container.name in self._ids_by_name:
            container = msgspec.structs.replace(container, name=f"{container.name}-{container.id[:12]}")
        self.add(container)

    def rename(self, id: ContainerId, name: str) -> Container:
        """Give a container another name, on disk and here.  Raises: NotFound; AlreadyExists: it is taken."""
        before = self.get(id).name
        self.check_free(name)
        container = self.change(id, name=name)
        del self._ids_by_name[before]
        self._ids_by_name[name] = id
        return container

    def check_free(self, name: str) -> None:
        """Raises: AlreadyExists, in Docker's words: a container has ``name``."""
        taken = self._ids_by_name.get(name)
        if taken is not None:
            raise AlreadyExists(
                f'Conflict. The container name "/{name}" is already in use by container "{taken}".'
                " You have to remove (or rename) that container to be able to reuse that name."
            )

    def forget(self, id: ContainerId) -> None:
        """Drop a container whose directory is gone."""
        container = self._containers.pop(id, None)
        if container is not None:
            del self._ids_by_name[container.name]
        self._unwritten.discard(id)
        self._notify(id)

    async def wait_changed(self, id: ContainerId) -> None:
        """Return when the container next changes or goes."""
        await self._changed.setdefault(id, asyncio.Event()).wait()

    def _notify(self, id: ContainerId) -> None:
        changed = self._changed.pop(id, None)
        if changed is not None:
            changed.set()
