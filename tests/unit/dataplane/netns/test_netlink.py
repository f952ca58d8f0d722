"""Messages of netlink: what is written is what is read, and nonsense ends nothing."""

import socket
import struct

from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.netns.kernel.netlink import attribute, attributes, messages
from skep.dataplane.netns.state import EntryKind, NeighborEntry
from skep.dataplane.netns.write import entry_message

MAC = "02:42:0a:00:01:05"
NDMSG = struct.Struct("=BxxxiHBB")


@given(st.lists(st.tuples(st.integers(1, 100), st.binary(max_size=20))))
def test_attributes_are_read_as_they_were_written(written: list[tuple[int, bytes]]) -> None:
    data = b"".join(attribute(kind, value) for kind, value in written)
    assert [(kind, bytes(value)) for kind, value in attributes(memoryview(data))] == written


@given(st.binary(max_size=200))
def test_whatever_arrives_is_read_to_an_end(data: bytes) -> None:
    for _, body in messages(memoryview(data)):
        list(attributes(body))


def test_entries_are_written_as_the_kernel_takes_them() -> None:
    forward = entry_message(NeighborEntry(EntryKind.FORWARD, "vx1", MAC, "192.0.2.7"), 3)
    assert NDMSG.unpack_from(forward) == (7, 3, 0xC0, 0x02, 0), "permanent, and of the device itself"
    found = dict(attributes(memoryview(forward)[NDMSG.size :]))
    assert (bytes(found[2]).hex(":"), socket.inet_ntoa(found[1])) == (MAC, "192.0.2.7")
    port = entry_message(NeighborEntry(EntryKind.PORT, "vs1", MAC), 4)
    assert NDMSG.unpack_from(port) == (7, 4, 0x40, 0x04, 0), "static: permanent would be the bridge itself"
    neighbor = entry_message(NeighborEntry(EntryKind.NEIGHBOR, "vx1", MAC, "fd00::5"), 5)
    assert NDMSG.unpack_from(neighbor) == (socket.AF_INET6, 5, 0x80, 0, 0)
