"""The messages of ``csi.proto``; the stub beside this file lists them."""

from pathlib import Path

from skep.protobuf.messages import module_of, pool_of

globals().update(module_of(pool_of(Path(__file__).parent / "csi.binpb"), "csi.proto"))
