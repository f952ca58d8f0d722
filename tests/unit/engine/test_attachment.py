"""The standard streams of a process, over conmon's socket."""

import socket

from skep.engine.containers.attachment import Attachment
from skep.engine.containers.container import StandardStream


def connected() -> tuple[Attachment, socket.socket]:
    """Ours, and conmon's end."""
    ours, conmons = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return Attachment(ours), conmons


async def test_output_is_read_to_its_end_where_the_input_was_not() -> None:
    """The kernel reports unread input before it delivers the earlier output."""
    attachment, conmon = connected()
    conmon.send(b"\x02out")
    conmon.send(b"\x03err")
    await attachment.write(b"nobody reads this")
    conmon.close()
    assert await attachment.read() == (StandardStream.STDOUT, b"out")
    assert await attachment.read() == (StandardStream.STDERR, b"err")
    assert await attachment.read() is None
    assert await attachment.read() is None
    attachment.close()


async def test_packets_of_no_known_stream_are_passed_over() -> None:
    attachment, conmon = connected()
    conmon.send(b"\x09?")
    conmon.send(b"\x02out")
    conmon.close()
    assert await attachment.read() == (StandardStream.STDOUT, b"out")
    assert await attachment.read() is None
    attachment.close()
