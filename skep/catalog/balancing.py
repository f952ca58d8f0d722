"""Keeps the HAProxy of a machine in accordance with the catalog."""

import asyncio
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.catalog.following import KnownCatalog
from skep.catalog.haproxy import HEAD, BalancedPort, configuration
from skep.errors import FailedPrecondition, SkepError, Unavailable, reason_of
from skep.linux.commands import communicate
from skep.linux.files import replace_file
from skep.model.catalog import CatalogService
from skep.model.values.counts import counted

PACE_S: Final = 2.0
"""Least seconds between two reloads.  Each leaves a process behind until its last connection ends."""
RETRY_S: Final = 2.0, 60.0
"""First and longest delay in seconds, with jitter, after a refused configuration or a failed reload."""
COMMAND_S: Final = 30.0
"""Longest time in seconds for HAProxy's check of a file, and for a reload."""


class HaproxyFiles(msgspec.Struct, frozen=True, kw_only=True):
    """The places of one HAProxy.

    Attributes:
        file: Its configuration.
        socket: Its socket, over which a new process takes the listening sockets.
        user: User and group of its worker, or empty.
        reload: Command that reloads it.
    """

    file: Path
    socket: str
    user: str
    reload: str


class Balancer:
    """Writes the configuration of an HAProxy, and reloads it.

    Args:
        report: Takes a line about each change and each failure.
        pace_s: Least seconds between two reloads.
    """

    def __init__(
        self,
        listeners: Sequence[BalancedPort],
        files: HaproxyFiles,
        clock: Clock,
        report: Callable[[str], None],
        pace_s: float = PACE_S,
    ) -> None:
        self._listeners = listeners
        self._files = files
        self._clock = clock
        self._report = report
        self._pace_s = pace_s
        self._applied = ""
        """The configuration of the last reload.  Empty at first and after a failed reload, whose effect is unknown."""

    async def run(self, known: KnownCatalog) -> None:
        """Follow the catalog until cancelled."""
        backoff, index = Backoff(*RETRY_S), 0
        while True:
            await known.wait_changed(index)
            index = known.index
            try:
                if await self.apply(known.services):
                    self._report(self.summary(known.services))
                backoff.reset()
                await self._clock.sleep(self._pace_s)
            except SkepError as error:
                self._report(f"the configuration was not changed, will retry: {error}")
                index = 0
                await backoff.sleep(self._clock)

    async def apply(self, services: Mapping[str, CatalogService]) -> bool:
        """Write the configuration and reload HAProxy, unless it has this one.  Return whether it was reloaded.

        Raises:
            FailedPrecondition: The file is not this command's, HAProxy refuses it, or the reload failed.
            Unavailable: A command does not respond.
        """
        text = configuration(self._listeners, services, self._files.socket, self._files.user)
        if text == self._applied:
            return False
        self.require_own_file()
        await self._check(text)
        self._applied = ""  # a reload that fails, or does not end in time, may have taken effect
        try:
            await asyncio.to_thread(replace_file, self._files.file, text.encode())
        except OSError as error:
            raise FailedPrecondition(
                f"{self._files.file} cannot be written: {reason_of(error)}. Choose another --file."
            ) from error
        await _run(shlex.split(self._files.reload), "choose another command with --reload")
        self._applied = text
        return True

    def require_own_file(self) -> None:
        """Refuse to overwrite a file of somebody else.  Raises: FailedPrecondition."""
        try:
            with self._files.file.open(errors="replace") as file:
                first = file.readline().rstrip("\n")
        except FileNotFoundError:
            return
        except OSError as error:
            raise FailedPrecondition(
                f"{self._files.file} cannot be read: {reason_of(error)}. Choose another --file."
            ) from error
        if first not in ("", HEAD):
            raise FailedPrecondition(
                f"{self._files.file} was not written by skep balance. Move it away, or choose another --file."
            )

    async def _check(self, text: str) -> None:
        with tempfile.NamedTemporaryFile("w", prefix="skep-balance-", suffix=".cfg") as file:
            file.write(text)
            file.flush()
            await _run(["haproxy", "-c", "-q", "-f", file.name], "install HAProxy 2.4 or later")

    def summary(self, services: Mapping[str, CatalogService]) -> str:
        """Return a line with the number of servers of each listener."""
        parts = []
        for one in self._listeners:
            service = services.get(one.service)
            count = sum(bool(each.port) for each in service.instances) if service is not None else 0
            part = f"{one.address}:{one.port} has {counted(count, 'server')} of {one.service}"
            if service is None:
                part += ", which is not in the catalog (see skep catalog ls)"
            elif not count and service.instances:
                part += ", which publishes no port"
            parts.append(part)
        return f"HAProxy reloaded: {'; '.join(parts)}"


async def _run(command: Sequence[str], step: str) -> None:
    """Run a command.  ``step`` is the next step in the error.  Raises: FailedPrecondition, Unavailable."""
    shown = shlex.join(command)
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await communicate(process, COMMAND_S)
    except TimeoutError:
        raise Unavailable(f"{shown} took more than {COMMAND_S:g} s: {step}") from None
    except OSError as error:
        raise FailedPrecondition(f"{shown} cannot be run: {reason_of(error)}: {step}") from error
    if process.returncode:
        lines = output.decode(errors="replace").strip().splitlines()
        raise FailedPrecondition(f"{shown} failed: {lines[-1] if lines else process.returncode}: {step}")
