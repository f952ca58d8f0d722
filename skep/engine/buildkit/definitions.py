"""Results of builds as LLB definitions, which a client sends back as contexts (``target:`` of a bake file).

A definition of this engine is one source operation that names an image by its id.  Other definitions are refused.

Source: buildkit, solver/pb/ops.proto, client/llb/definition.go; buildx, build/build.go (waitContextDeps).
"""

import hashlib

from google.protobuf.message import DecodeError

from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.images.digest import Digest, is_digest
from skep.errors import InvalidArgument, Unimplemented

_IMAGE = "docker-image://"


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
