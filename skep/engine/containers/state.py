"""Keeps the records of a node's containers, in memory for reading and on disk for the next process."""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from skep.aio.clock import Clock
from skep.aio.failures import log_error, retry
from skep.engine.containers.container import (
    BeingRemoved,
    Container,
    ContainerState,
    PlainOptions,
    WaitCondition,
)
from skep.engine.runtime.bundle import Bundles
from skep.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from skep.model.values.ids import ContainerId
from skep.model.values.name_generator import NameSource, free_name
from skep.model.values.times import ZERO_TIME


class ContainerStore:
    """Finds containers by id, name or id prefix, and changes their records.

    A change is written to disk before it is visible.
    """

    def __init__(self, bundles: Bundles) -> None:
        self._bundles = bundles
        self._containers: dict[ContainerId, Container] = {}
        self._ids_by_name: dict[str, ContainerId] = {}
        self._changed: dict[ContainerId, asyncio.Event] = {}
        self._pending: set[ContainerId] = set()
        self._unsaved = asyncio.Event()

    def list(self) -> Sequence[Container]:
        """Return all containers, newest first."""
        return sorted(self._containers.values(), key=lambda one: (one.created_at, one.id), reverse=True)

    def lookup(self, id: ContainerId) -> Container | None:
        """Return the container with exactly this id, or None."""
        return self._containers.get(id)

    def get(self, word: str) -> Container:
        """Return the container whose full id, name or unique id prefix is ``word``, in this order.

        Raises: NotFound: ``No such container: <word>``; InvalidArgument: the prefix is ambiguous.

        Source: moby 28, daemon/container/view.go (GetByPrefix).
        """
        exact = self._containers.get(ContainerId(word))
        if exact is not None:
            return exact
        by_name = self._ids_by_name.get(word.removeprefix("/"))
        if by_name is not None:
            return self._containers[by_name]
        matches = [id for id in self._containers if word and id.startswith(word)]
        if len(matches) > 1:
            raise InvalidArgument(f"multiple IDs found with provided prefix: {word}")
        if not matches:
            raise NotFound(f"No such container: {word}")
        return self._containers[matches[0]]

    def require(self, id: ContainerId) -> Container:
        """Return the container with exactly this id.  Raises: NotFound."""
        container = self._containers.get(id)
        if container is None:
            raise NotFound(f"No such container: {id}")
        return container

    def require_kept(self, id: ContainerId, refusal: str) -> Container:
        """Return a container that is not being removed.  Raises: NotFound; BeingRemoved, with the text ``refusal``."""
        container = self.require(id)
        if container.state is ContainerState.REMOVING:
            raise BeingRemoved(refusal)
        return container

    def require_startable(self, id: ContainerId) -> Container:
        """Return a container that may be started.  Raises: NotFound; BeingRemoved.  Source: moby, daemon/start.go."""
        return self.require_kept(id, "container is marked for removal and cannot be started")

    def require_plain(self, word: str) -> tuple[Container, PlainOptions]:
        """Return a plain container and its options.  Raises: NotFound; FailedPrecondition: it belongs to a task."""
        container = self.get(word)
        if container.plain is None:
            raise FailedPrecondition(f"container {container.name} belongs to a task")
        return container, container.plain

    def free_name(self, new_name: NameSource) -> str:
        """Return a name that no container has.  Raises: ResourceExhausted: none was found."""
        name = free_name(new_name, self._ids_by_name.__contains__, attempts=100)
        if name is None:
            raise ResourceExhausted("no free name was found: give the container one (--name)")
        return name

    def add(self, container: Container) -> None:
        """Add a new container or a container of an earlier process.  Raises: AlreadyExists: the name is taken."""
        self.check_free(container.name)
        self._containers[container.id] = container
        self._ids_by_name[container.name] = container.id

    def put(self, container: Container) -> None:
        """Replace a record on disk and in memory, and wake waiters.

        A renamed container keeps its old name as well, until ``release_name``.
        Raises: OSError, AlreadyExists: the name is taken: nothing has changed.
        """
        if self._ids_by_name.get(container.name) != container.id:
            self.check_free(container.name)
        self._bundles.save(container)
        self._containers[container.id] = container
        self._ids_by_name[container.name] = container.id
        self._pending.discard(container.id)
        self._notify(container.id)

    def note(self, container: Container) -> None:
        """Replace a record on disk and in memory.

        If it cannot be written, it is valid anyway, and the write is retried.
        """
        try:
            self.put(container)
        except OSError as error:
            if container.id not in self._pending:  # log only once for as long as the disk refuses
                log_error(error, "record not written", container=container.id)
            self.keep(container)

    def keep(self, container: Container) -> None:
        """Replace a record in memory, and write it in the background."""
        self._containers[container.id] = container
        self._pending.add(container.id)
        self._unsaved.set()
        self._notify(container.id)

    def change(self, id: ContainerId, **fields: Any) -> Container:
        """Replace fields of a record on disk and in memory.  Raises: NotFound; OSError."""
        container = msgspec.structs.replace(self.require(id), **fields)
        self.put(container)
        return container

    def observe(self, id: ContainerId, **fields: Any) -> Container:
        """Replace fields of a record by an observed fact.  A failed write is retried.  Raises: NotFound."""
        container = msgspec.structs.replace(self.require(id), **fields)
        self.note(container)
        return container

    async def run(self, clock: Clock) -> None:
        """Retry failed writes until cancelled."""
        while True:
            await self._unsaved.wait()
            self._unsaved.clear()
            await retry(self._write, "records not written", clock=clock, longest_s=5.0)

    async def _write(self) -> None:
        """Write all pending records.  If some fail, the first error is raised after all were tried."""
        errors = []
        for id in tuple(self._pending):
            container = self._containers.get(id)
            try:
                if container is not None:
                    self._bundles.save(container)
            except Exception as error:
                errors.append(error)
            else:
                self._pending.discard(id)
        if errors:
            raise errors[0]

    def restore(self, container: Container) -> None:
        """Add a container of an earlier process.  If another container has its name, append its id to the name."""
        if container.name in self._ids_by_name:
            container = msgspec.structs.replace(container, name=f"{container.name}-{container.id[:12]}")
        self.add(container)

    def release_name(self, id: ContainerId) -> None:
        """Release the other name of a container that has been renamed, or could not be."""
        present = self._containers.get(id)
        for name in [name for name, owner in self._ids_by_name.items() if owner == id]:
            if present is None or name != present.name:
                del self._ids_by_name[name]

    def check_free(self, name: str) -> None:
        """Raise AlreadyExists, in Docker's words, if a container has ``name``."""
        taken = self._ids_by_name.get(name)
        if taken is not None:
            raise AlreadyExists(
                f'Conflict. The container name "/{name}" is already in use by container "{taken}".'
                " You have to remove (or rename) that container to be able to reuse that name."
            )

    def forget(self, id: ContainerId) -> None:
        """Drop a container whose directory was removed."""
        container = self._containers.pop(id, None)
        if container is not None:
            del self._ids_by_name[container.name]
        self._pending.discard(id)
        self._notify(id)

    async def wait(
        self,
        id: ContainerId,
        condition: WaitCondition = WaitCondition.NOT_RUNNING,
        *,
        since: Container | None = None,
    ) -> Container:
        """Wait until ``condition`` holds, and return the container.

        ``since`` is an earlier record, whose run counts although it may have ended and another run may have begun.
        If it was removed, return its last state.  Raises: NotFound: it does not exist, without ``since``.
        """
        first = self.require(id) if since is None else since
        container = self._containers.get(id, first)
        while True:
            match condition:
                case WaitCondition.NOT_RUNNING if not container.is_active or _has_ended(first, container):
                    return container
                case WaitCondition.NEXT_EXIT if _has_ended(first, container):
                    return container
                case _:
                    await self.wait_changed(container.id)
            present = self.lookup(container.id)
            if present is None:
                return container
            container = present

    async def wait_changed(self, id: ContainerId) -> None:
        """Wait for the next change or removal of the container."""
        await self._changed.setdefault(id, asyncio.Event()).wait()

    def _notify(self, id: ContainerId) -> None:
        changed = self._changed.pop(id, None)
        if changed is not None:
            changed.set()


def _has_ended(before: Container, present: Container) -> bool:
    """Return whether a run has ended since ``before``, or the policy has given up restarting.

    Source: moby, container/state.go (SetRestarting, SetStopped).
    """
    was_given_up = before.is_active and not present.is_active
    runs_again = before.is_running and present.process != before.process
    return was_given_up or runs_again or present.finished_at not in (before.finished_at, ZERO_TIME)
