"""Message classes from the committed descriptor set, in a pool of their own.

A private pool cannot clash with anybody else's registration of SwarmKit's messages, and it works with every
protobuf runtime from 4.25 on.  Standard messages (timestamps, durations) exist here a second time: only these
may be put into our messages.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from skep.wire.compile import DESCRIPTORS

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration as Duration
    from google.protobuf.timestamp_pb2 import Timestamp as Timestamp
    from google.protobuf.wrappers_pb2 import BoolValue as BoolValue

POOL = descriptor_pool.DescriptorPool()


def _load() -> None:
    encoded = (Path(__file__).parent / DESCRIPTORS).read_bytes()
    for file in descriptor_pb2.FileDescriptorSet.FromString(encoded).file:
        POOL.Add(file)


def module_of(file: str) -> dict[str, Any]:
    """What a generated module of ``file`` would hold: message classes, enum wrappers, enum values."""
    from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

    descriptor = POOL.FindFileByName(file)
    names: dict[str, Any] = {
        name: message_factory.GetMessageClass(message)
        for name, message in descriptor.message_types_by_name.items()
    }
    for name, enum in descriptor.enum_types_by_name.items():
        names[name] = EnumTypeWrapper(enum)
        names.update({value.name: value.number for value in enum.values})
    return names


_load()

if not TYPE_CHECKING:
    Duration = module_of("google/protobuf/duration.proto")["Duration"]
    Timestamp = module_of("google/protobuf/timestamp.proto")["Timestamp"]
    BoolValue = module_of("google/protobuf/wrappers.proto")["BoolValue"]
