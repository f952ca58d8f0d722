"""Compile the ``.proto`` files: ``python -m skep.wire.compile`` after changing one; needs the ``dev`` extra.

Writes one descriptor set (``messages.binpb``), which is loaded at import, and type stubs for the checkers.  Both are
committed.
"""

from pathlib import Path

from skep.protobuf.protoc import compile_protos

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PROTO_FILES = ("skep/wire/swarm.proto", "skep/wire/skep.proto")
DESCRIPTORS = "messages.binpb"


def compile_into(directory: Path) -> None:
    """Write the descriptor set and the stubs for all ``PROTO_FILES`` into ``directory``."""
    compile_protos(ROOT, PROTO_FILES, directory / DESCRIPTORS, command="skep.wire.compile")


if __name__ == "__main__":
    compile_into(HERE)
