"""Every call of the ``.proto`` files is in the table."""

import pytest
from google.protobuf import descriptor_pb2

from skep.protobuf.compile import WIRE
from skep.wire import methods
from skep.wire.descriptors import POOL
from skep.wire.methods import MethodAccess

TABLE = {
    entry.path: entry
    for entry in vars(methods).values()
    if isinstance(
        entry, methods.UnaryMethod | methods.ServerStreaming | methods.ClientStreaming | methods.BothStream
    )
}


def rpcs():
    for file in WIRE.protos:
        for service in POOL.FindFileByName(file).services_by_name.values():
            for rpc in service.methods:
                yield f"/{service.full_name}/{rpc.name}", rpc


@pytest.mark.parametrize(("path", "rpc"), list(rpcs()), ids=lambda value: str(getattr(value, "name", value)))
def test_every_call_of_the_proto_files_is_in_the_table_with_its_types(path, rpc):
    entry = TABLE[path]
    kinds = {
        (False, False): methods.UnaryMethod,
        (False, True): methods.ServerStreaming,
        (True, False): methods.ClientStreaming,
        (True, True): methods.BothStream,
    }
    assert type(entry) is kinds[rpc.client_streaming, rpc.server_streaming]
    assert entry.request.DESCRIPTOR.full_name == rpc.input_type.full_name
    assert entry.reply.DESCRIPTOR.full_name == rpc.output_type.full_name


def test_only_joining_and_coming_back_are_open_to_strangers():
    assert {
        path.rpartition("/")[2] for path, entry in TABLE.items() if entry.access is MethodAccess.OPEN
    } == {
        "GetRootCACertificate",
        "IssueNodeCertificate",
        "NodeCertificateStatus",
        "RenewExpired",  # the caller proves to have the key of a certificate that was valid
    }


def test_the_pool_is_our_own():
    files = descriptor_pb2.FileDescriptorSet.FromString((WIRE.directory / WIRE.descriptors).read_bytes()).file
    assert {file.name for file in files} >= set(WIRE.protos)
    with pytest.raises(KeyError):
        descriptor_pool_default().FindMessageTypeByName("docker.swarmkit.v1.Task")


def descriptor_pool_default():
    from google.protobuf import descriptor_pool

    return descriptor_pool.Default()
