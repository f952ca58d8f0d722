"""Client services for build steps: secrets, the ssh agent, registry credentials.

Source: moby/buildkit, session/secrets, session/sshforward, session/auth.
"""

import asyncio
import os
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path

import msgspec

from skep.aio.groups import errors_as_they_are
from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.buildkit.protocol.sessions import BuildSession, Messages
from skep.errors import NotFound, SkepError, Unimplemented
from skep.rpc.status import CallFailed, Lost

_GET_SECRET = "/moby.buildkit.secrets.v1.Secrets/GetSecret"
_CHECK_AGENT = "/moby.sshforward.v1.SSH/CheckAgent"
_FORWARD_AGENT = "/moby.sshforward.v1.SSH/ForwardAgent"
_CREDENTIALS = "/moby.filesync.v1.Auth/Credentials"

SECRET_BYTES_MAX = 500 << 10
"""BuildKit's limit."""
_AGENT_CONNECTIONS_MAX = 16
"""Connections of one step to the client's SSH agent.  Git makes one for each submodule that it fetches at once."""
_PIECE_BYTES = 32 << 10
"""Messages of the SSH agent are smaller: they have at most 256 KiB, and mostly some hundred bytes."""
_HUB_HOST = "registry-1.docker.io"


class ClientProvider:
    """Calls the client of one build.  ``scratch``: Creates directories for sockets, private to this engine."""

    def __init__(
        self, session: BuildSession, scratch: Callable[[], AbstractAsyncContextManager[Path]]
    ) -> None:
        self._session = session
        self._scratch = scratch

    async def secret(self, id: str) -> bytes | None:
        """Return the content of a secret, or None if the client has none with this id.  Raises: SkepError."""
        try:
            response = await self._session.call(_GET_SECRET, pb.GetSecretRequest(id=id), pb.GetSecretResponse)
        except (NotFound, Unimplemented):
            return None
        if len(response.data) > SECRET_BYTES_MAX:
            raise SkepError(f"secret {id} is larger than {SECRET_BYTES_MAX} bytes")
        return response.data

    @asynccontextmanager
    async def ssh(self, id: str) -> AsyncIterator[Path | None]:
        """Provide a socket of the client's ssh agent while the block runs.

        Yields None if the client forwards none with this id.
        """
        id = id or "default"
        try:
            await self._session.call(_CHECK_AGENT, pb.CheckAgentRequest(id=id), pb.CheckAgentResponse)
        except SkepError:
            # Clients use different errors to say that there is no agent with this id.
            yield None
            return
        async with self._scratch() as place, _listening(place, self._session, id):
            yield place / "agent"

    async def credentials(self, domain: str) -> str:
        """Return the value of ``X-Registry-Auth`` for a registry.  Empty if the client has none for it."""
        host = _HUB_HOST if domain == "docker.io" else domain
        try:
            found = await self._session.call(
                _CREDENTIALS, pb.CredentialsRequest(host=host), pb.CredentialsResponse
            )
        except SkepError:
            return ""  # as in BuildKit: the registry decides whether credentials are needed
        if not found.secret:
            return ""
        if found.username:
            login = {"username": found.username, "password": found.secret, "serveraddress": domain}
        else:
            login = {"identitytoken": found.secret, "serveraddress": domain}
        return urlsafe_b64encode(msgspec.json.encode(login)).decode()


@asynccontextmanager
async def _listening(place: Path, session: BuildSession, id: str) -> AsyncIterator[None]:
    """Accept connections on ``place/agent`` while the block runs, and forward each to the client's agent."""
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        try:
            if len(serving) <= _AGENT_CONNECTIONS_MAX:
                await _forward(session, id, reader, writer)
        finally:
            serving.discard(task)
            writer.close()

    # A socket's path is limited to 107 bytes, and the directory's path may be longer.
    directory = os.open(place, os.O_PATH | os.O_DIRECTORY)
    try:
        server = await asyncio.start_unix_server(serve, f"/proc/self/fd/{directory}/agent")
    finally:
        os.close(directory)
    try:
        yield
    finally:
        server.close()
        for task in serving:
            task.cancel()
        if serving:
            await asyncio.wait(set(serving))


async def _forward(
    session: BuildSession, id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Copy data in both directions until the agent ends, which it does when the other direction is closed."""
    with suppress(SkepError, CallFailed, Lost, ConnectionError):
        async with (
            session.stream(_FORWARD_AGENT, [("buildkit.ssh.id", id)], silent_s=None) as messages,
            errors_as_they_are(),
            asyncio.TaskGroup() as group,
        ):
            asking = group.create_task(_to_client(reader, messages), name="to the client's ssh agent")
            await _from_client(messages, writer)
            asking.cancel()


async def _to_client(reader: asyncio.StreamReader, messages: Messages) -> None:
    while data := await reader.read(_PIECE_BYTES):
        await messages.send(pb.BytesMessage(data=data))
    await messages.end()


async def _from_client(messages: Messages, writer: asyncio.StreamWriter) -> None:
    while (data := await messages.receive()) is not None:
        writer.write(pb.BytesMessage.FromString(data).data)
        await writer.drain()
