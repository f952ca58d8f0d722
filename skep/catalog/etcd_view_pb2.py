"""The messages of ``etcd_view.proto``.  The stub in the same folder lists them."""

from pathlib import Path

from skep.protobuf.messages import module_of, pool_of

globals().update(module_of(pool_of(Path(__file__).parent / "etcd_view.binpb"), "etcd_view.proto"))
