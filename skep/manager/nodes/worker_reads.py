"""Serves read-only requests of clients of workers' APIs, if the cluster allows them.

A proxy on a worker reads services, tasks and networks this way.  It also sees the environment of services, so these
reads are off unless a cluster label enables them.  Events of other nodes' containers are never included, because they
contain the command lines of every ``docker exec``.
"""

import re
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Final

from skep.api.access.identity import IDENTITY_HEADER, packed
from skep.api.client.client import ApiClient
from skep.api.formats.forwarded_requests import TASK_CONTAINER
from skep.api.http.framing import is_readable, path_of
from skep.errors import PermissionDenied, ResourceExhausted
from skep.manager.cluster import known_cluster
from skep.manager.routes.access import WORKER_HEADER
from skep.model.options.labels import allows_worker_reads
from skep.model.permissions.access import Binding, Identity, Origin, Role
from skep.store.interface import View
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.service import Handler, server_stream

READS_MAX = 256
"""Largest number of simultaneous reads of all nodes."""
READS_PER_NODE_MAX = 32
"""Largest number of simultaneous reads of one node."""
PIECE_BYTES = 32 << 10
"""Bytes in one message to a node."""
TAKEN_S = 60.0
"""Timeout in seconds for a node to receive one piece."""
_CONTAINER_TARGET: Final = re.compile(rf"/skep/tasks/(?:{TASK_CONTAINER})/target")
"""Requests for the task of a container."""


class WorkerReads:
    """Serves ``ClusterReads`` on every manager.  ``socket`` is the socket of this manager's API."""

    def __init__(self, view: Callable[[], View], socket: Path) -> None:
        self._view = view
        self._socket = socket
        self.reading: list[str] = []
        """The node of each open read."""

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (server_stream(methods.READ, self.serve_read, taken_s=TAKEN_S),)

    async def serve_read(self, request: skep.ReadRequest, caller: Caller) -> AsyncIterator[skep.ReadPiece]:
        """Yield the API's response to a read.  Raises: PermissionDenied; ResourceExhausted; errors of this manager's
        API.
        """
        self._check(request.target)
        if len(self.reading) >= READS_MAX or self.reading.count(caller.node_id) >= READS_PER_NODE_MAX:
            raise ResourceExhausted("too many clients of workers read from this manager: try again later")
        self.reading.append(caller.node_id)
        try:
            async with (
                ApiClient.local(self._socket, "this manager") as client,
                client.stream(request.target, buffer_bytes=PIECE_BYTES, headers=_headers(caller)) as response,
            ):
                yield skep.ReadPiece()
                async for data in response.pieces():
                    for start in range(0, len(data), PIECE_BYTES):
                        # checked again, because the permission may have been withdrawn during an endless stream of
                        # events
                        self._check(request.target)
                        yield skep.ReadPiece(data=data[start : start + PIECE_BYTES])
        finally:
            self.reading.remove(caller.node_id)

    def _check(self, target: str) -> None:
        """Check that a worker may read ``target``.  Raises: PermissionDenied.

        A worker's claims about its clients are not trusted, so all of them count as viewers.
        """
        if _CONTAINER_TARGET.fullmatch(target):
            return  # a node that knows the id of a container may tell its clients where it runs
        swarm = known_cluster(self._view())
        if swarm is None or not allows_worker_reads(swarm.spec.labels):
            raise PermissionDenied("this cluster does not allow clients of workers to read it")
        if not target.startswith("/") or not is_readable("GET", path_of(target)):
            raise PermissionDenied(f"clients of workers may not read {target[:200]}")


def _headers(caller: Caller) -> dict[str, str]:
    viewer = Identity(name=caller.node_id, origin=Origin.NODE, bindings=(Binding(Role.VIEWER),))
    return {WORKER_HEADER: caller.node_id, IDENTITY_HEADER: packed(viewer).decode()}
