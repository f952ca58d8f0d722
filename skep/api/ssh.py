"""A node's API on another machine, by the machine's own ssh: its socket is forwarded to one of ours.

The docker command starts ``docker system dial-stdio`` over there; OpenSSH forwards sockets by itself, so nothing but
an ssh server is needed on the other side.
"""

import asyncio
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

import msgspec

from skep.errors import InvalidArgument, Unavailable

_SOCKET = "/run/skep/skep.sock"
_CONNECT_S = 10
_READY_S = 60.0
"""A user may have to type a passphrase."""
_END_S = 5.0
_LOOK_S = 0.02


class Destination(msgspec.Struct, frozen=True, kw_only=True):
    """What ``ssh://[user@]machine[:port][/path/of.sock]`` names."""

    machine: str
    user: str = ""
    port: int | None = None
    socket: str = _SOCKET

    @classmethod
    def of(cls, url: str) -> Self:
        """Raises: InvalidArgument: it is no such URL, or has a password."""
        parts = urlsplit(url)
        if not parts.hostname or parts.password or parts.query or parts.fragment:
            raise InvalidArgument(f"unable to parse docker host `{url}`: write ssh://user@machine")
        return cls(
            machine=parts.hostname,
            user=unquote(parts.username or ""),
            port=parts.port,
            socket=parts.path if parts.path not in ("", "/") else _SOCKET,
        )

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        return f"ssh://{user}{self.machine}{f':{self.port}' if self.port else ''}{self.socket}"

    def command(self, local: Path) -> list[str]:
        """Forward ``local`` until it is ended, with the user's own ssh configuration."""
        options = ("ExitOnForwardFailure=yes", f"ConnectTimeout={_CONNECT_S}", "ControlPath=none")
        return [
            *("ssh", "-n", "-N", "-T"),
            *(word for option in options for word in ("-o", option)),
            *(("-p", str(self.port)) if self.port else ()),
            *(("-l", self.user) if self.user else ()),
            *("-L", f"{local}:{self.socket}", "--", self.machine),
        ]


@asynccontextmanager
async def forward_socket(destination: Destination) -> AsyncGenerator[str, None]:
    """A local socket connected to ``destination``, in the block.

    Raises: Unavailable: with the last line of ssh's output.
    """
    with tempfile.TemporaryDirectory(prefix="skep-ssh-") as directory:
        local = Path(directory) / "api.sock"
        try:
            process = await asyncio.create_subprocess_exec(
                *destination.command(local), stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE
            )
        except OSError as error:
            raise Unavailable(f"{destination}: the command ssh cannot be run: {error.strerror}") from error
        try:
            await _wait_forwarding(process, local, destination)
            yield str(local)
        finally:
            await _end(process)


async def _wait_forwarding(process: Process, local: Path, destination: Destination) -> None:
    try:
        async with asyncio.timeout(_READY_S):
            while not local.exists():
                if process.returncode is not None:
                    assert process.stderr is not None
                    output = (await process.stderr.read()).decode(errors="replace").strip().splitlines()
                    raise Unavailable(f"{destination}: {output[-1].strip() if output else 'ssh ended'}")
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        raise Unavailable(f"{destination}: no connection within {_READY_S:g} s") from None


async def _end(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
