"""Compile ``csi.proto``: ``python -m skep.csi.compile`` after changing it; needs the ``dev`` extra.

Writes the descriptor set (``csi.binpb``), which is loaded at import, and the type stub.  Both are committed.
"""

from pathlib import Path

from skep.protobuf.protoc import compile_protos

HERE = Path(__file__).parent
PROTO = "csi.proto"
DESCRIPTORS = "csi.binpb"
STUB = "csi_pb2.pyi"


def compile_into(directory: Path) -> None:
    """Write the descriptor set and the stub into ``directory``."""
    compile_protos(HERE, (PROTO,), directory / DESCRIPTORS, command="skep.csi.compile")


if __name__ == "__main__":
    compile_into(HERE)
