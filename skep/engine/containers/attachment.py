"""Standard streams of a process that conmon monitors.

conmon listens at ``<bundle>/attach`` (SOCK_SEQPACKET).  A packet from conmon is output, and its first byte tells the
stream (2 is stdout, 3 is stderr).  Data sent to conmon is the input of the process.  If the socket is half-closed, the
process reads end of file.
"""

import asyncio
import os
import socket
from pathlib import Path

from skep.engine.containers.container import StandardStream
from skep.errors import NotFound, ResourceExhausted, SkepError
from skep.model.values.ids import ContainerId

_STREAMS = {2: StandardStream.STDOUT, 3: StandardStream.STDERR}
_PACKET_BYTES_MAX = 8192 + 1  # conmon's STDIO_BUF_SIZE and the leading byte
_INPUT_BYTES_MAX = 8192
"""Maximum bytes of input in one packet."""
WAITING_MAX = 64
"""Maximum number of clients that wait for the start of one container."""


class Attachment:
    """An open connection to the standard streams of one process.  It holds a descriptor until it is closed."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._was_reset = False

    async def read(self) -> tuple[StandardStream, bytes] | None:
        """Return the next piece of output, or None once the process has closed its streams or ended."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                packet = await loop.sock_recv(self._connection, _PACKET_BYTES_MAX)
            except ConnectionError:
                if self._was_reset:
                    return None
                # conmon ended before it had read all input.  The kernel reports this once as an error, before the
                # remaining output.
                self._was_reset = True
                continue
            if not packet:
                return None
            stream = _STREAMS.get(packet[0])
            if stream is not None:
                return stream, packet[1:]

    async def write(self, data: bytes) -> None:
        """Send ``data`` to the process as input.  Raises: ConnectionError: the process has ended."""
        loop = asyncio.get_running_loop()
        for start in range(0, len(data), _INPUT_BYTES_MAX):
            await loop.sock_sendall(self._connection, data[start : start + _INPUT_BYTES_MAX])

    def close_input(self) -> None:
        """End the input.  The process reads end of file if it was created to end its input with the client."""
        try:
            self._connection.shutdown(socket.SHUT_WR)
        except OSError:
            return  # the process has ended first

    def close(self) -> None:
        """Close the streams.  The process keeps running."""
        self._connection.close()


async def attach(bundle: Path) -> Attachment:
    """Connect to the process whose conmon has its directory at ``bundle``.  Raises: NotFound: nothing listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setblocking(False)
    try:
        # A socket's path has at most 107 bytes.  Through the directory's descriptor it is always short.
        directory = os.open(bundle, os.O_PATH | os.O_CLOEXEC)
        try:
            await asyncio.get_running_loop().sock_connect(connection, f"/proc/self/fd/{directory}/attach")
        finally:
            os.close(directory)
    except OSError as error:
        connection.close()
        raise NotFound(f"nothing to attach to: {error.strerror}") from error
    except BaseException:
        connection.close()
        raise
    return Attachment(connection)


class WaitingClients:
    """Clients attached to containers that do not run yet: ``docker run`` attaches before it starts the container."""

    def __init__(self) -> None:
        self._waiting: dict[ContainerId, list[asyncio.Future[Attachment]]] = {}

    async def wait(self, id: ContainerId) -> Attachment:
        """Wait for the start of the container, and return its streams from the first byte on.

        Raises: ResourceExhausted; the error passed to ``fail``.
        """
        waiting = self._waiting.setdefault(id, [])
        if len(waiting) >= WAITING_MAX:
            raise ResourceExhausted(f"{WAITING_MAX} clients already wait for the start of the container")
        future: asyncio.Future[Attachment] = asyncio.get_running_loop().create_future()
        waiting.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().close()
            raise
        finally:
            self._forget(id, future)

    async def serve(self, id: ContainerId, bundle: Path) -> None:
        """Give all waiting clients the streams of a created container that is about to run.  Raises: NotFound."""
        for future in tuple(self._waiting.get(id, ())):
            attachment = await attach(bundle)
            if future.done():  # the client was cancelled meanwhile
                attachment.close()
            else:
                future.set_result(attachment)

    def fail(self, id: ContainerId, error: SkepError) -> None:
        """Raise ``error`` in all waiting clients, because the start has failed."""
        for future in self._waiting.get(id, ()):
            if not future.done():
                future.set_exception(error)

    def _forget(self, id: ContainerId, future: "asyncio.Future[Attachment]") -> None:
        waiting = self._waiting.get(id, [])
        if future in waiting:
            waiting.remove(future)
        if not waiting:
            self._waiting.pop(id, None)
