"""The standard streams of a process, over conmon's socket."""

import asyncio
import socket
from pathlib import Path

from skep.aio.clock import SystemClock
from skep.engine.containers.attachment import Attachment
from skep.engine.containers.container import ContainerState, StandardStream
from skep.model.values.times import ZERO_TIME
from tests.support.engine.stub_engine import ID, StubEngine, a_container


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


async def test_a_client_that_comes_while_the_command_starts_gets_its_output(tmp_path: Path) -> None:
    created = a_container(state=ContainerState.CREATED, process=None, started_at=ZERO_TIME)
    stubs, attached = StubEngine(SystemClock(), tmp_path, created), list[Attachment]()
    stubs.bundles.bundle = lambda _: tmp_path  # type: ignore[method-assign]

    async def come() -> None:
        attached.append(await stubs.engine.attach(ID))

    stubs.steps["runtime.start"] = come
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as conmon:
        conmon.bind(str(tmp_path / "attach"))
        conmon.listen()
        async with asyncio.timeout(10), stubs.engine.running():
            await stubs.engine.start(ID)
            with conmon.accept()[0] as client:
                client.send(b"\x02out")
                assert await attached[0].read() == (StandardStream.STDOUT, b"out")
        attached[0].close()
