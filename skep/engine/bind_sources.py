"""Sources of bind mounts: paths of the machine, which may be on a file system whose server is silent.

They are looked at when a container is created, and again before its start takes one of the places for starts: runc
would wait for them with it.
"""

import os
from collections.abc import Callable, Iterable
from functools import partial

from skep.aio.blocking import BlockingCalls
from skep.aio.failures import describe_error
from skep.engine.container import MountPoint
from skep.errors import InvalidArgument, SkepError
from skep.model.container import Mount

_DEADLINE_S = 10.0


class SourceSilent(SkepError):
    """It does not say in time whether it is there."""


class BindSources:
    """Looks at them, each in a thread that is left behind at the deadline."""

    def __init__(self, deadline_s: float = _DEADLINE_S) -> None:
        self.deadline_s = deadline_s
        self._calls = BlockingCalls()

    async def check(
        self, mounts: Iterable[Mount], others: Callable[[Iterable[Mount]], list[Mount]] = list
    ) -> None:
        """Look whether those of ``mounts`` are there; those that may be made are.

        ``others``: leaves out those that mean something else; it may look at the sources, too.
        Raises: InvalidArgument, in Docker's words: one is not; SourceSilent; Unavailable.
        """
        for mount in mounts:
            if mount.type == "bind":
                await self._looked_at(mount.source, partial(_check, mount, others))

    async def wait(self, points: Iterable[MountPoint]) -> None:
        """Return when those of ``points`` respond, be they there or not.  Raises: SourceSilent; Unavailable."""
        for point in points:
            if point.type == "bind" and not point.internal:
                await self._looked_at(point.source, partial(os.path.lexists, point.source))

    async def _looked_at(self, source: str, look: Callable[[], object]) -> None:
        try:
            await self._calls.call(look, self.deadline_s)
        except TimeoutError as error:
            raise SourceSilent(
                f"error while mounting {source}: it does not respond within {self.deadline_s:g} s"
            ) from error


def _check(mount: Mount, others: Callable[[Iterable[Mount]], list[Mount]]) -> None:
    """Raises: InvalidArgument: the source is not there, or cannot be looked at."""
    try:
        if not others([mount]) or os.path.exists(mount.source):
            return
    except (OSError, ValueError) as error:  # ValueError: it has a zero byte
        reason = error.strerror if isinstance(error, OSError) else "invalid argument"
        raise InvalidArgument(
            f'invalid mount config for type "bind": stat {mount.source}: {reason}'
        ) from error
    options = mount.bind_options
    if options is None or not options.create_mountpoint:
        raise InvalidArgument(
            f'invalid mount config for type "bind": bind source path does not exist: {mount.source}'
        )
    try:
        os.makedirs(mount.source, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(
            f"error while creating mount source path '{mount.source}': {describe_error(error)}"
        ) from error
