"""Checks the sources of bind mounts, which may be on a network file system whose server does not respond.

Sources are checked when a container is created.  They are checked again before its start takes a start slot, because
otherwise runc would wait for them and keep the slot.
"""

import os
from collections.abc import Callable, Iterable
from functools import partial

from skep.aio.blocking import BlockingCalls
from skep.aio.failures import describe_error
from skep.engine.containers.container import MountPoint
from skep.errors import InvalidArgument, SkepError
from skep.model.container import Mount

_DEADLINE_S = 10.0
"""Time limit in seconds for one access to a source, because its server may not respond."""


class SourceSilent(SkepError):
    """The source did not respond in time."""


class BindSources:
    """Checks each source in a thread.  The thread is abandoned when the time limit has passed."""

    def __init__(self) -> None:
        self.deadline_s = _DEADLINE_S
        self._calls = BlockingCalls()

    async def check(
        self, mounts: Iterable[Mount], others: Callable[[Iterable[Mount]], list[Mount]] = list
    ) -> None:
        """Check that the sources of ``mounts`` exist.  Create missing sources where the mount allows it.

        ``others`` returns the mounts whose source must exist on this machine.  It may access the sources.
        Raises: InvalidArgument, in Docker's words: a source does not exist; SourceSilent; Unavailable.
        """
        for mount in mounts:
            if mount.type == "bind":
                await self._look_at(mount.source, partial(_check, mount, others))

    async def wait(self, points: Iterable[MountPoint]) -> None:
        """Wait until the sources of ``points`` respond, even if they do not exist.

        Raises: SourceSilent; Unavailable.
        """
        for point in points:
            if point.type == "bind" and not point.internal:
                await self._look_at(point.source, partial(os.path.lexists, point.source))

    async def _look_at(self, source: str, look: Callable[[], object]) -> None:
        try:
            await self._calls.call(look, self.deadline_s)
        except TimeoutError as error:
            raise SourceSilent(
                f"error while mounting {source}: it does not respond within {self.deadline_s:g} s"
            ) from error


def _check(mount: Mount, others: Callable[[Iterable[Mount]], list[Mount]]) -> None:
    """Raise InvalidArgument if the source does not exist or cannot be accessed."""
    try:
        if not others([mount]) or os.path.exists(mount.source):
            return
    except (OSError, ValueError) as error:  # ValueError: it contains a zero byte
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
