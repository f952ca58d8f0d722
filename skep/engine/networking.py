"""What containers need of the node's network."""

import os
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from skep.engine.container import Container, ContainerState
from skep.engine.processes import is_alive
from skep.model.ids import ContainerId
from skep.model.sandbox import Sandbox


class Networking(Protocol):
    """Gives containers their places on networks (``dataplane/container_network.py``)."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """Keep what containers are given, whatever others change, until the block ends."""

    async def restore(self, live: Collection[Container]) -> None:
        """Make the node ready, keep what belongs to the ``live`` containers, free everything else."""

    async def attach(self, container: Container) -> Sandbox:
        """A network namespace with its places and a way out, its host-mode ports published.  Raises: SkepError."""

    async def detach(self, container_id: ContainerId, sandbox: Sandbox) -> None:
        """Free all of it.  Harmless when nothing is left."""

    async def sweep(self, is_needed: Callable[[ContainerId], bool]) -> Collection[ContainerId]:
        """Free what is held for containers that ``is_needed`` denies, and say so; gives their ids.

        ``is_needed`` is asked for each at the moment it would be freed.  Raises: SkepError, OSError.
        """


def kept(containers: Iterable[Container]) -> list[Container]:
    """Those of an earlier process that run, or may still be started, and so keep their places."""
    return [
        one
        for one in containers
        if one.sandbox is not None
        and one.state is not ContainerState.REMOVING
        and os.path.ismount(one.sandbox.netns)
        and (not one.was_started or (one.process is not None and is_alive(one.process)))
    ]
