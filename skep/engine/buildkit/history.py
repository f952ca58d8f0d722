"""Records for ``buildx history``: the latest builds of this engine process.

Source: moby/buildkit, solver/llbsolver/history.go.
"""

from collections import OrderedDict
from collections.abc import AsyncGenerator

from skep.engine.buildkit import buildkit_pb2 as pb
from skep.errors import NotFound, Unimplemented

RECORDS_MAX = 50
"""BuildKit's limit."""
BYTES_MAX = 16 << 20
"""Size of all records together.  A record has the options of its build, which may be as long as a whole message."""


class BuildHistory:
    """Records of builds, the oldest first.  Requests that a client marks as internal are not recorded."""

    def __init__(self) -> None:
        self.records: OrderedDict[str, pb.BuildHistoryRecord] = OrderedDict()

    def keep(self, record: pb.BuildHistoryRecord) -> None:
        """Record a build that has started or ended."""
        self.records[record.ref] = record
        while len(self.records) > RECORDS_MAX or self._size_bytes() > BYTES_MAX:
            self.records.popitem(last=False)

    def _size_bytes(self) -> int:
        return sum(record.ByteSize() for record in self.records.values())

    def update(self, request: pb.UpdateBuildHistoryRequest) -> None:
        """Remove a record.  Raises: NotFound, Unimplemented."""
        if request.ref not in self.records:
            raise NotFound(f"failed to find build record {request.ref}")
        if request.pinned:
            raise Unimplemented("build records cannot be pinned")
        if request.delete:
            del self.records[request.ref]

    async def listen(self, request: pb.BuildHistoryRequest) -> AsyncGenerator[pb.BuildHistoryEvent, None]:
        """Yield the present records.  Raises: Unimplemented: filters or future records are requested."""
        if request.filter:
            raise Unimplemented(f"filters of build records are not supported: {', '.join(request.filter)}")
        if not request.early_exit:
            raise Unimplemented("build records cannot be followed")
        found = [
            record
            for record in reversed(self.records.values())
            if (not request.ref or record.ref == request.ref)
            and (not request.active_only or not record.HasField("completed_at"))
        ]
        for record in found[: request.limit or None]:
            kind = pb.COMPLETE if record.HasField("completed_at") else pb.STARTED
            yield pb.BuildHistoryEvent(type=kind, record=record)
