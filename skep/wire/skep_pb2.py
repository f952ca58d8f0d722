"""The messages of ``skep.proto``.  The stub in the same folder lists them."""

from skep.protobuf.messages import module_of
from skep.wire.descriptors import POOL

globals().update(module_of(POOL, "skep/wire/skep.proto"))
