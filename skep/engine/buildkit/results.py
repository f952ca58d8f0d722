"""Results of builds for their clients: the records of ``buildx history``, and images as LLB definitions.

A client sends a definition back as a context (``target:`` of a bake file).  A definition of this engine is one source
operation that names an image by its id.  Other definitions are refused.

Source: buildkit, solver/llbsolver/history.go, solver/pb/ops.proto, client/llb/definition.go; buildx, build/build.go
(waitContextDeps).
"""

import hashlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence

import msgspec
from google.protobuf.message import DecodeError

from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.images.digest import Digest, is_digest
from skep.engine.images.platforms import parse_platform
from skep.errors import InvalidArgument, NotFound, Unimplemented

RECORDS_MAX = 50
"""BuildKit's limit."""
BYTES_MAX = 16 << 20
"""Size of all records together.  A record has the options of its build, which may be as long as a whole message."""

_IMAGE = "docker-image://"


class BuiltImages(msgspec.Struct, frozen=True):
    """Result of a build: an image, or several that are named together.

    Args:
        images: Images by platform.  One with an empty platform if the build is not for several.
        here: The image that the tags mean on this machine.
    """

    images: Mapping[str, Digest]
    here: Digest

    @property
    def index(self) -> Sequence[Digest]:
        """Images that are named together.  Empty for the one image."""
        return () if "" in self.images else tuple(self.images.values())

    def describe(self, name_of: Callable[[], str]) -> tuple[pb.Result, Collection[str]]:
        """Return the result for a client, and its new names for the images.

        Source: buildkit, exporter/containerimage/exptypes/types.go (Platforms).
        """
        result = pb.Result()
        if not self.index:
            result.ref.id = name_of()
            getattr(result.ref, "def").CopyFrom(definition_of(self.here))
            return result, (result.ref.id,)
        listed = []
        for name, id in self.images.items():
            result.refs.refs[name].id = name_of()
            getattr(result.refs.refs[name], "def").CopyFrom(definition_of(id))
            platform = parse_platform(name)
            shown = {"architecture": platform.architecture, "os": platform.os, "variant": platform.variant}
            listed.append({"ID": name, "Platform": {key: word for key, word in shown.items() if word}})
        result.metadata["refs.platforms"] = msgspec.json.encode({"Platforms": listed})
        return result, [one.id for one in result.refs.refs.values()]


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


def definition_of(image: Digest) -> pb.Definition:
    """Return the definition of an image of this engine."""
    source = pb.Op(source=pb.SourceOp(identifier=_IMAGE + image)).SerializeToString(deterministic=True)
    digest = "sha256:" + hashlib.sha256(source).hexdigest()
    end = pb.Op(inputs=[pb.Input(digest=digest)]).SerializeToString(deterministic=True)
    definition = pb.Definition()
    definition.MergeFrom(pb.Definition(metadata={digest: pb.OpMetadata()}))
    getattr(definition, "def").extend([source, end])
    return definition


def image_of(definition: pb.Definition) -> Digest:
    """Return the image that a definition names.

    Raises: InvalidArgument: it cannot be read; Unimplemented: another engine made it.
    """
    for encoded in getattr(definition, "def"):
        try:
            operation = pb.Op.FromString(encoded)
        except DecodeError as error:
            raise InvalidArgument("the definition cannot be decoded") from error
        name = operation.source.identifier.removeprefix(_IMAGE)
        if operation.source.identifier.startswith(_IMAGE) and is_digest(name):
            return Digest(name)
    raise Unimplemented("LLB definitions are not supported, only Dockerfiles")
