"""Per-container Engine API sockets, for containers that mount the API's socket or a directory that contains it.

A mount of the API's socket is replaced by a mount of a socket that belongs to this container only.  If a mounted
directory contains the node's run directory, the run directory is covered by a directory with only the container's
socket.  An API socket elsewhere stays visible, and the node recognizes a container behind a connection by its process.

A mounted socket refers to its inode, so the listening socket must outlive the node process.  The container's conmon
inherits the descriptor and keeps it until the container ends.  The next node process borrows it from conmon.
"""

import errno
import os
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple, Protocol

import msgspec
import structlog

from skep.engine.containers.container import Container, MountPoint, ProcessName
from skep.engine.runtime.processes import open_pidfd
from skep.errors import FailedPrecondition, InvalidArgument
from skep.linux.descriptors import set_aside
from skep.linux.processes import borrowed
from skep.linux.unix_sockets import let_group_in, private_socket
from skep.model.container import Mount
from skep.model.permissions.rights import API_LABEL, ApiAccess, api_access
from skep.model.values.ids import ContainerId

log = structlog.get_logger()

NAME: Final = "skep.sock"
"""File name of the API socket that belongs to one container."""
_USUAL: Final = ("/var/run/docker.sock", "/run/docker.sock")
"""Docker's default paths of the API socket.  A mount of them means this node's API even if it listens elsewhere."""
_VOLUMES: Final = Path("/var/lib/docker/volumes")
"""Docker's directory of volumes.  Unless the path exists, a mount of it means this node's directory of volumes."""
_BACKLOG = 64
"""Limit for connections that wait while the node process restarts."""
_DRIVERS: Final = "csi"
"""Subdirectory of the run directory for sockets of CSI drivers (``Paths.csi_sockets``), which may run in containers."""
_ENDED = (errno.ENOENT, errno.ESRCH, errno.EBADF)
_REFUSED = (errno.EPERM, errno.EACCES, errno.ENOSYS)


class ApiServer(Protocol):
    """Serves the sockets of containers."""

    def serve(self, container: Container, listener: socket.socket) -> None:
        """Take over ``listener`` and serve it instead of any earlier one.  Any thread may call it."""

    def forget(self, id: ContainerId) -> None:
        """Stop serving the container's socket, if it has one.  Any thread may call it."""


class Given(NamedTuple):
    """A container's mounts with the API socket replaced.

    ``has_socket`` tells whether the container's socket is among them.
    """

    mounts: tuple[MountPoint, ...]
    has_socket: bool


class ApiSockets:
    """The per-container API sockets of this node.

    Args:
        hosts: Sockets at which the API is served.
        run: The node's run directory.  Its other sockets are hidden from containers.
        volumes: The directory of the node's volumes.
        docker_volumes: The directory of volumes of a Docker Engine.
    """

    def __init__(
        self,
        hosts: Collection[Path],
        run: Path,
        server: ApiServer,
        volumes: Path | None = None,
        docker_volumes: Path = _VOLUMES,
    ) -> None:
        self._names = {*_USUAL, *map(str, hosts)}
        self._run = run
        self.server = server
        self._volumes = volumes
        self._docker_volumes = str(docker_volumes)
        self._opened: dict[ContainerId, socket.socket] = {}
        """Duplicates of sockets, for the conmons of containers that have not started yet."""

    def is_api(self, source: str) -> bool:
        """Return whether a bind mount of ``source`` mounts the API's socket."""
        return os.path.normpath(source) in self._names or _real(source) in set(map(_real, self._names))

    def access(self, labels: Mapping[str, str], points: Iterable[MountPoint], *, is_plain: bool) -> ApiAccess:
        """Return what a new container may call on its own socket.

        A plain container that mounts the socket itself has full access, because only an administrator can create it and
        has named the socket.  A label can reduce the access.  A mount of a directory that contains the socket (``/``,
        ``/run``) gets only read access, and so does any mount of a task, because users below administrator may write
        the task's spec.

        Raises: InvalidArgument: the label cannot be read.
        """
        is_named = any(point.type == "bind" and self.is_api(point.source) for point in points)
        if is_plain and is_named and API_LABEL not in labels:
            return ApiAccess.FULL
        return api_access(labels)

    def others(self, mounts: Iterable[Mount]) -> list[Mount]:
        """Return those ``mounts`` whose source is not replaced, so that the source must exist."""
        return [
            mount
            for mount in mounts
            if mount.type != "bind" or not (self.is_api(mount.source) or self._means_volumes(mount.source))
        ]

    def _means_volumes(self, source: str) -> bool:
        return (
            self._volumes is not None
            and os.path.normpath(source) == self._docker_volumes
            and not os.path.exists(self._docker_volumes)
        )

    def give(self, points: Sequence[MountPoint], own: Path) -> Given:
        """Return a container's mounts with the API's socket replaced.  ``own`` is the directory of its own socket.

        Raises: InvalidArgument: the node's own files are mounted; FailedPrecondition: the covering mount would
        propagate to the machine.
        """
        run = PurePosixPath(_real(str(self._run)))
        given: list[MountPoint] = []
        has_socket = False
        for point in points:
            if point.type != "bind" or point.internal:
                given.append(point)
                continue
            if self.is_api(point.source):
                given.append(msgspec.structs.replace(point, source=str(own / NAME)))
                has_socket = True
                continue
            if self._means_volumes(point.source):
                given.append(msgspec.structs.replace(point, source=str(self._volumes)))
                continue
            source = PurePosixPath(_real(point.source))
            if run in source.parents and not source.is_relative_to(run / _DRIVERS):
                raise InvalidArgument(
                    f'invalid mount config for type "bind": {point.source} belongs to this node'
                )
            given.append(point)
            if run.is_relative_to(source):
                given.append(_cover(point, run.relative_to(source), own))
                has_socket = True
        return Given(tuple(given), has_socket)

    def open(self, container: Container, own: Path) -> None:
        """Create the socket of a container that is about to start.  Raises: OSError."""
        own.mkdir(mode=0o755, exist_ok=True)
        listener = _bound(own)
        # The whole API stays closed to the mapped root, as in Docker.
        if container.users is not None and container.config.api is not ApiAccess.FULL:
            os.chown(own / NAME, *container.users.root)
        listener.listen(_BACKLOG)
        self._keep(container.id, set_aside(listener.dup()))
        self.server.serve(container, set_aside(listener))

    def take(self, id: ContainerId) -> socket.socket | None:
        """Return the socket that the container's conmon inherits.  The caller closes it."""
        return self._opened.pop(id, None)

    def adopt(self, container: Container, own: Path) -> None:
        """Serve the socket of a container that an earlier process started, borrowed from the container's conmon.

        Raises: OSError: descriptors or memory are short at the moment.
        """
        if container.monitor is None or not self.give(container.config.mounts, own).has_socket:
            return
        listener = _inherited(container.monitor)
        if listener is None:
            log.warning("API socket lost until the container's next start", container=container.name)
        else:
            self.server.serve(container, set_aside(listener))

    def close(self, id: ContainerId) -> None:
        """Release the socket of an ended container."""
        self._keep(id, None)
        self.server.forget(id)

    def _keep(self, id: ContainerId, opened: socket.socket | None) -> None:
        if (before := self._opened.pop(id, None)) is not None:
            before.close()
        if opened is not None:
            self._opened[id] = opened


def _cover(point: MountPoint, inside: PurePosixPath, own: Path) -> MountPoint:
    if point.propagation in ("shared", "rshared"):
        raise FailedPrecondition(
            f"path {point.source} contains sockets of this node: it cannot be mounted with propagation "
            f"{point.propagation}, but with rslave"
        )
    destination = str(PurePosixPath(point.destination) / inside)
    return MountPoint(type="bind", source=str(own), destination=destination, read_only=True, internal=True)


def _bound(own: Path) -> socket.socket:
    """Create a socket with the API socket's owner and mode.  The path may be longer than a socket address allows."""
    directory = os.open(own, os.O_PATH | os.O_DIRECTORY)
    try:
        bound = private_socket(Path(f"/proc/self/fd/{directory}") / NAME)
    finally:
        os.close(directory)
    try:
        let_group_in(own / NAME)
    except BaseException:
        bound.close()
        raise
    return bound


def _inherited(monitor: ProcessName) -> socket.socket | None:
    """Return the listening API socket among a conmon's descriptors, or None if it has none or has ended.

    Raises: OSError: that cannot be determined now.
    """
    process = open_pidfd(monitor)
    if process is None:
        return None
    try:
        for number in map(int, os.listdir(f"/proc/{monitor.pid}/fd")):
            if not os.readlink(f"/proc/{monitor.pid}/fd/{number}").startswith("socket:"):
                continue
            found = socket.socket(fileno=borrowed(process, number))
            if _is_own(found):
                return found
            found.close()
    except OSError as error:
        if error.errno not in _ENDED and error.errno not in _REFUSED:
            raise
        log.warning("API socket not adopted", conmon=monitor.pid, error=str(error))
    finally:
        os.close(process)
    return None


def _is_own(found: socket.socket) -> bool:
    return (
        found.family == socket.AF_UNIX
        and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        and str(found.getsockname()).endswith(f"/{NAME}")
    )


def _real(path: str) -> str:
    return os.path.realpath(path)


class _NotServed:
    """Serves no sockets."""

    def serve(self, container: Container, listener: socket.socket) -> None:
        """Close the listener."""
        listener.close()

    def forget(self, id: ContainerId) -> None:
        """Do nothing."""


NONE: Final = ApiSockets((), Path("/nonexistent"), _NotServed())
"""Stand-in for an engine without a node.  It does not serve sockets."""
