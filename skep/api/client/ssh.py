"""Connects to a node's API over ssh, by forwarding a local socket to the API socket of another machine.

The docker command runs ``docker system dial-stdio`` on that machine.  OpenSSH can forward sockets by itself, so that
the machine needs only an ssh server.
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
"""Seconds that ssh may take to connect to one address."""
_READY_S = 60.0
"""Timeout in seconds for the connection.  The user may have to type a passphrase meanwhile."""
_END_S = 5.0
"""Seconds for ssh to end after SIGTERM, before it is killed."""
_LOOK_S = 0.02
"""Seconds between checks for the socket, which ssh creates without a notice."""


class SshDestination(msgspec.Struct, frozen=True, kw_only=True):
    """The destination in ``ssh://[user@]machine[:port][/path/of.sock]``."""

    machine: str
    user: str = ""
    port: int | None = None
    socket: str = _SOCKET

    @classmethod
    def of(cls, url: str) -> Self:
        """Parse a URL.  Raises: InvalidArgument: the URL has another form, or a password."""
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
        """Return the ssh command that forwards ``local`` until it ends, with the user's own ssh configuration."""
        options = ("ExitOnForwardFailure=yes", f"ConnectTimeout={_CONNECT_S}", "ControlPath=none")
        return [
            *("ssh", "-n", "-N", "-T"),
            *(word for option in options for word in ("-o", option)),
            *(("-p", str(self.port)) if self.port else ()),
            *(("-l", self.user) if self.user else ()),
            *("-L", f"{local}:{self.socket}", "--", self.machine),
        ]


@asynccontextmanager
async def forward_socket(destination: SshDestination) -> AsyncGenerator[str, None]:
    """Forward a local socket to ``destination`` within the block, and yield its address.

    Raises: Unavailable: the connection failed.  The error has the last line of ssh's output.
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


async def _wait_forwarding(process: Process, local: Path, destination: SshDestination) -> None:
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
