"""The buffer between the files of a container's output and a remote that takes nothing."""

from skep.engine.containers.container import StandardStream
from skep.engine.log_drivers.forwarder import _Buffer
from skep.engine.log_drivers.message import LogMessage
from skep.engine.logs.log_files import LogPosition


async def test_a_full_buffer_that_drops_does_not_grow() -> None:
    buffer = _Buffer(1000, drops=True)
    for number in range(1000):
        await buffer.put(
            [LogMessage(number, StandardStream.STDOUT, b"x" * 100)], LogPosition(b"first", number)
        )
    assert len(buffer.chunks) <= 10
    assert buffer.dropped == 995
    assert buffer.chunks[-1].position == LogPosition(b"first", 999), "what was dropped is not read again"
