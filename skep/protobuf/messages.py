"""Message classes from a committed descriptor set, in a pool of their own.

A private pool cannot clash with another library's registration of the same messages, and works with every protobuf
runtime from 4.25 on.  Standard messages (timestamps, durations) exist in each pool anew: only these may be put into
its messages.
"""

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper


def pool_of(descriptors: Path) -> descriptor_pool.DescriptorPool:
    """A pool of all files in a descriptor set."""
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(descriptors.read_bytes()).file:
        pool.Add(file)
    return pool


def module_of(pool: descriptor_pool.DescriptorPool, file: str) -> dict[str, Any]:
    """Return the content of a generated module for ``file``: message classes, enum wrappers, enum values."""
    descriptor = pool.FindFileByName(file)
    names: dict[str, Any] = {"DESCRIPTOR": descriptor}
    for name, message in descriptor.message_types_by_name.items():
        names[name] = message_factory.GetMessageClass(message)
    for name, enum in descriptor.enum_types_by_name.items():
        names[name] = EnumTypeWrapper(enum)
        names.update({value.name: value.number for value in enum.values})
    return names
