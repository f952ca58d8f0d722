"""Connects this command's terminal to a process in a container: raw mode, size, input and output."""

import asyncio
import os
import shutil
import signal
import sys
import termios
import threading
import tty
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from typing import BinaryIO

from skep.aio.groups import first_alone
from skep.api.client.raw import READ_BYTES, Exchange
from skep.errors import SkepError, Unavailable

RESIZE_S = 0.05
"""Seconds between two size changes.  Of a thousand changes in a second, only the last in each interval is sent."""

_STDOUT = 1
"""Stream number in Docker's frames of an attached container without a terminal.  The other is stderr."""
_BROKEN_PIPE = 141
"""Exit code after SIGPIPE, as in shells."""

Resize = Callable[[int, int], Awaitable[None]]
"""Sets the size of the process's terminal: rows and columns."""


def size() -> tuple[int, int]:
    """Return the rows and columns of this terminal."""
    columns, rows = shutil.get_terminal_size()
    return rows, columns


@contextmanager
def raw_terminal() -> Iterator[None]:
    """Pass every key to the process, including Ctrl+C, within the block, and restore the terminal afterwards."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@asynccontextmanager
async def follow_size(resize: Resize) -> AsyncIterator[None]:
    """Send the process the size of this terminal whenever it changes, within the block."""
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()

    async def follow() -> None:
        while True:
            await changed.wait()
            changed.clear()
            with suppress(SkepError):  # the process may not have started yet, or have ended
                await resize(*size())
            await asyncio.sleep(RESIZE_S)

    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    # A window that is resized sends hundreds of signals.  If the buffer is full, a signal is pending anyway.
    signal.set_wakeup_fd(signal.set_wakeup_fd(-1), warn_on_full_buffer=False)
    try:
        async with asyncio.TaskGroup() as group:
            following = group.create_task(follow(), name="size of the terminal")
            yield
            following.cancel()
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


@asynccontextmanager
async def controlling(resize: Resize) -> AsyncIterator[None]:
    """Connect this command's terminal to the process within the block, including its size, if input and output are a
    terminal.
    """
    with raw_terminal() if sys.stdin.isatty() else nullcontext():
        if not sys.stdout.isatty():
            yield
            return
        with suppress(SkepError):
            await resize(*size())
        async with follow_size(resize):
            yield


async def join(stream: Exchange, *, takes_input: bool, is_tty: bool) -> None:
    """Copy input and output until the output ends.  Raises: Unavailable: the connection was lost."""
    with first_alone(SkepError):
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(_send_input(stream), name="input") if takes_input else None
            pieces = stream.raw_pieces()
            await (print_pieces(pieces) if is_tty else print_frames(pieces))
            if sending is not None:
                sending.cancel()


async def _send_input(stream: Exchange) -> None:
    typed = _Input(asyncio.get_running_loop())
    while data := await typed.next_piece():
        stream.writer.write(data)
        try:
            await stream.writer.drain()
        except OSError:
            return  # the output contains the reason
    if stream.writer.can_write_eof():
        with suppress(OSError):
            stream.writer.write_eof()


class _Input:
    """Standard input, read by a thread.

    A thread is needed because the input may be a file, and because a terminal would share its non-blocking mode with
    the shell.  The thread may wait in a read forever, so nothing waits for its end.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pieces: asyncio.Queue[bytes] = asyncio.Queue()
        self._room = threading.Semaphore(4)
        threading.Thread(target=self._read_all, name="standard input", daemon=True).start()

    async def next_piece(self) -> bytes:
        """Return the next piece of input, or an empty one at the end."""
        piece = await self._pieces.get()
        self._room.release()
        return piece

    def _read_all(self) -> None:
        piece = b"-"
        while piece:
            self._room.acquire()
            try:
                piece = os.read(sys.stdin.fileno(), READ_BYTES)
            except (OSError, ValueError):
                piece = b""
            with suppress(RuntimeError):  # the loop has been closed
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


async def print_pieces(pieces: AsyncIterator[bytes]) -> None:
    """Print the output of a terminal."""
    async for data in pieces:
        _print(sys.stdout.buffer, data)


async def print_frames(pieces: AsyncIterator[bytes]) -> None:
    """Print standard output and standard error.  Raises: Unavailable: the stream ended within a frame."""
    received = bytearray()
    async for piece in pieces:
        received += piece
        while len(received) >= 8 and len(received) >= (end := 8 + int.from_bytes(received[4:8], "big")):
            _print(sys.stdout.buffer if received[0] == _STDOUT else sys.stderr.buffer, bytes(received[8:end]))
            del received[:end]
    if received:
        raise Unavailable(
            "the connection to the container was lost. Run skep service ps SERVICE to see its task."
        )


def _print(file: BinaryIO, data: bytes) -> None:
    """Write output.  Raises: SystemExit: the reader of the output has ended."""
    try:
        file.write(data)
        file.flush()
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), file.fileno()
        )  # otherwise the interpreter prints an error at exit
        raise SystemExit(_BROKEN_PIPE) from None
