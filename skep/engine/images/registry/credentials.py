"""Registry credentials, as clients send them or helper programs provide them.

The node's configuration names the programs (``docker-credential-NAME``).  Tokens of large registries expire within
hours, so the token that a service was created with does not help a task that is placed later.  A program on the node
provides a fresh token whenever an image is pulled.  Its output is kept in memory for some seconds, so many tasks that
start together run it once.

Source: docker/docker-credential-helpers, README (Development), client/client.go, credentials/error.go; docker/cli,
cli/config/credentials/native_store.go.
"""

import asyncio
import os
import signal
from contextlib import suppress
from functools import partial
from weakref import WeakValueDictionary

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.aio.race import unless_done
from skep.engine.images.reference import DEFAULT_DOMAIN
from skep.model.permissions.registry_auth import decoded_auth, registry_at

log = structlog.get_logger()

_DEADLINE_S = 30.0
"""Time limit in seconds for a credential helper, which may call a cloud service."""
_END_S = 5.0
"""Seconds to wait for the end of a helper's output after it was killed."""
_OUTPUT_BYTES_MAX = 1 << 20
"""Longest answer of a helper in bytes.  A token has some kilobytes."""
_KEPT_S = 30.0
"""Seconds for which an answer is used again, so that several pulls run the helper once."""
_KEPT_MAX = 256
"""Limit for the answers that are kept."""
_PROBLEM_LENGTH_MAX = 300
"""Number of characters of a helper's error that are shown."""
_NONE_STORED = "credentials not found in native keychain"
_TOKEN_USER = "<token>"
"""User name that marks the secret as an identity token."""
_INDEX = "https://index.docker.io/v1/"
"""Name of Docker Hub in credential stores."""


class RegistryCredentials(msgspec.Struct, frozen=True, rename=lambda name: name.replace("_", "")):
    """Credentials from ``X-Registry-Auth``.  Never stored, never logged."""

    username: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""
    server_address: str = ""
    """Address of the registry that they are for.  Empty if the client sent them with the image's name."""

    def for_registry(self, domain: str) -> "RegistryCredentials":
        """Return these credentials if they may be sent to the registry ``domain``, else none."""
        if not self.server_address or registry_at(self.server_address) == registry_at(domain):
            return self
        return RegistryCredentials()

    def __repr__(self) -> str:
        return f"Credentials(username={self.username!r})"

    def __bool__(self) -> bool:
        """Return whether there are any credentials."""
        return bool(self.username or self.identity_token or self.registry_token)


def decode_credentials(header: str) -> RegistryCredentials:
    """Return the credentials in ``X-Registry-Auth``.  An invalid value means none, as in Docker."""
    try:
        return msgspec.convert(decoded_auth(header), RegistryCredentials)
    except (ValueError, RecursionError):
        return RegistryCredentials()


class Provided(msgspec.Struct, frozen=True):
    """Result of a helper.

    Args:
        problem: Reason for missing credentials, or empty.
        is_kept: Whether it comes from an earlier call.
    """

    credentials: RegistryCredentials
    problem: str = ""
    is_kept: bool = False


class _Output(msgspec.Struct, frozen=True, rename="pascal"):
    username: str = ""
    secret: str = ""


class CredentialHelpers:
    """Runs credential helpers.  Credentials stay in memory, and are never logged."""

    def __init__(self, clock: Clock, deadline_s: float = _DEADLINE_S) -> None:
        self._clock = clock
        self._deadline_s = deadline_s
        self._kept: dict[tuple[str, str], tuple[float, Provided]] = {}
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def provide(self, helper: str, domain: str, *, fresh: bool = False) -> Provided:
        """Return the credentials of ``docker-credential-<helper>`` for the registry ``domain``.

        ``fresh`` runs the helper again, because the registry has refused the kept credentials.  If a helper fails, the
        result has the problem and no credentials.
        """
        key = helper, domain
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        asked_at = self._clock.monotonic()
        async with lock:
            found_at, found = self._kept.get(key, (0.0, None))
            # If several pulls were refused at once, the first one gets new credentials for all.
            is_recent = self._clock.monotonic() - found_at < _KEPT_S and (not fresh or found_at > asked_at)
            if found is not None and is_recent:
                return msgspec.structs.replace(found, is_kept=True)
            server = _INDEX if domain == DEFAULT_DOMAIN else domain
            provided = await _run_helper(helper, server, self._deadline_s)
            if provided.problem:
                log.warning(
                    "credential helper failed", helper=helper, registry=domain, reason=provided.problem
                )
            self._kept.pop(key, None)
            while len(self._kept) >= _KEPT_MAX:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = self._clock.monotonic(), provided
            return provided


async def _run_helper(helper: str, server: str, deadline_s: float) -> Provided:
    """Run ``docker-credential-<helper> get``, within bounds of time and output."""
    name = f"docker-credential-{helper}"
    try:
        process = await asyncio.create_subprocess_exec(
            *(name, "get"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # so that its child processes are killed with it
        )
    except OSError as error:
        return _failed(name, (error.strerror or str(error)).lower())
    try:
        async with unless_done(partial(_end, process)), asyncio.timeout(deadline_s):
            output = await _output(process, server)
            status = await process.wait()
    except TimeoutError:
        return _failed(name, f"no response within {deadline_s:g} s")
    except _TooLong:
        return _failed(name, f"its output is longer than {_OUTPUT_BYTES_MAX} bytes")
    text = output.decode(errors="replace").strip()
    if status != 0:
        if text == _NONE_STORED:
            return Provided(RegistryCredentials())
        return _failed(name, f"exit code {status}: {text[:_PROBLEM_LENGTH_MAX]!r}")
    return _read(name, output)


def _read(name: str, output: bytes) -> Provided:
    """Parse the output of a helper that succeeded."""
    try:
        found = msgspec.json.decode(output, type=_Output)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # Do not show the output, which may contain a secret.
        return _failed(name, "its output is not JSON with Username and Secret")
    if found.username == _TOKEN_USER:
        return Provided(RegistryCredentials(identity_token=found.secret))
    return Provided(RegistryCredentials(username=found.username, password=found.secret))


class _TooLong(Exception):
    """The output exceeds its limit."""


async def _output(process: asyncio.subprocess.Process, server: str) -> bytes:
    assert process.stdin is not None, "it is a pipe"
    assert process.stdout is not None, "it is a pipe"
    with suppress(ConnectionError):  # the helper may not read its input; its output still counts
        process.stdin.write(f"{server}\n".encode())
        await process.stdin.drain()
    process.stdin.close()
    output = bytearray()
    while piece := await process.stdout.read(1 << 16):
        output += piece
        if len(output) > _OUTPUT_BYTES_MAX:
            raise _TooLong
    return bytes(output)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill a helper with its child processes, which may hold its output open."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    assert process.stdout is not None, "it is a pipe"
    with suppress(TimeoutError):  # a process that left the session may hold the output open
        async with asyncio.timeout(_END_S):
            # asyncio reports the end of the process only after its output was read to the end.
            while await process.stdout.read(1 << 16):
                pass
            await process.wait()


def _failed(name: str, reason: str) -> Provided:
    return Provided(RegistryCredentials(), f"{name}: {reason}")
