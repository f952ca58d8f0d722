"""The messages of ``etcd.proto``, from the committed descriptor set; the stub beside this file lists them.

The pool is private: nobody else's registration of etcd's messages can clash with it.
"""

from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

_pool = descriptor_pool.DescriptorPool()
for _file in descriptor_pb2.FileDescriptorSet.FromString(
    (Path(__file__).parent / "etcd.binpb").read_bytes()
).file:
    _pool.Add(_file)

DESCRIPTOR = _pool.FindFileByName("etcd.proto")

globals().update(
    {
        name: message_factory.GetMessageClass(message)
        for name, message in DESCRIPTOR.message_types_by_name.items()
    }
)
globals().update({name: EnumTypeWrapper(enum) for name, enum in DESCRIPTOR.enum_types_by_name.items()})
