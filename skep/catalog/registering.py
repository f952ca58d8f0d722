"""Registers a service of this machine while its health check passes.

The registration is a lease: it is renewed after a third of its time, removed as soon as the check fails, and ends by
itself if this machine or its network fails.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final
from urllib.parse import quote

import aiohttp
import msgspec

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.groups import errors_as_they_are
from skep.api.client.requests import Requests
from skep.catalog.following import of_a_manager
from skep.errors import InvalidArgument, NotFound, SkepError, reason_of
from skep.linux.commands import communicate
from skep.model.catalog import ServiceRegistration
from skep.model.networks.addresses import joined

LEAVE_S: Final = 5.0
"""Longest time in seconds for the last request when the command ends."""
REQUEST_S: Final = 10.0
"""Longest time in seconds for a renewal."""
WAIT_S_MIN: Final = 0.05
"""Shortest wait in seconds for a renewal, so that rounded times cause no busy loop."""
RETRY_S: Final = 0.5, 10.0
"""First and longest delay in seconds, with jitter, after a request that failed."""

Check = Callable[[], Awaitable[str]]
"""Returns why the service is unhealthy, or an empty text."""


class CheckRules(msgspec.Struct, frozen=True, kw_only=True):
    """Rules of a health check: its period, and how many results in a row change the state."""

    interval_s: float = 2.0
    timeout_s: float = 2.0
    rise: int = 2
    fall: int = 2


class CheckState(msgspec.Struct, frozen=True):
    """The state of a service, and the number of results in a row that contradict it."""

    is_up: bool = False
    contrary: int = 0


def after_check(state: CheckState, *, passed: bool, rules: CheckRules) -> CheckState:
    """Return the state after one more result."""
    if passed is state.is_up:
        return CheckState(state.is_up)
    contrary = state.contrary + 1
    needed = rules.rise if passed else rules.fall
    return CheckState(passed) if contrary >= needed else CheckState(state.is_up, contrary)


class ServiceRegistrar:
    """Keeps one registration in accordance with the results of its check.

    Args:
        report: Takes a line about each change and each failure.
    """

    def __init__(
        self,
        client: Requests,
        registration: ServiceRegistration,
        check: Check,
        rules: CheckRules,
        clock: Clock,
        report: Callable[[str], None],
    ) -> None:
        self._client = client
        self._registration = registration
        self._check = check
        self._rules = rules
        self._clock = clock
        self._report = report
        self._name = f"{registration.service}@{registration.instance}"
        self._path = f"/skep/registrations/{quote(self._name, safe='@')}"
        self._state = CheckState()
        self._reason = ""
        self._shown_reason = ""
        self._is_registered: bool | None = None
        """None if the managers may have a registration: of an earlier command, or by a request without a response."""
        self._was_accepted = False
        self._renew_at = 0.0
        self._retry_at = 0.0
        self._backoff = Backoff(*RETRY_S)
        self._is_failing = False
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        """Check and register until cancelled, and then remove the registration.

        Raises: InvalidArgument: the managers refuse a first registration that they can never accept.
        """
        try:
            async with errors_as_they_are(), asyncio.TaskGroup() as group:
                group.create_task(self._check_again(), name="checks")
                group.create_task(self._renew_meanwhile(), name="renewals")
        finally:
            if self._is_registered is not False:
                await asyncio.shield(self._leave())

    async def _check_again(self) -> None:
        while True:
            await self.step()
            await self._clock.sleep(self._rules.interval_s)

    async def _renew_meanwhile(self) -> None:
        """Renew the lease between two checks and during one, which may take longer than the lease."""
        while True:
            now, third_s = self._clock.monotonic(), self._registration.ttl / 3
            due_at = max(self._renew_at, self._retry_at) if self._state.is_up else now + third_s
            await self._clock.sleep(max(due_at - now, WAIT_S_MIN))
            if self._state.is_up:
                await self._send_due()

    async def step(self) -> None:
        """Run the check once, and send what follows from it.  Raises: see ``run``."""
        try:
            async with asyncio.timeout(self._rules.timeout_s):
                self._reason = await self._check()
        except TimeoutError:
            self._reason = f"the check took more than {self._rules.timeout_s:g} s"
        self._state = after_check(self._state, passed=not self._reason, rules=self._rules)
        self._show_failure()
        await self._send_due()

    async def _send_due(self) -> None:
        """Send what follows from the state, unless the next attempt has to wait.  Raises: see ``run``."""
        async with self._sending:
            if self._clock.monotonic() >= self._retry_at:
                await self._try_to_send(self._clock.monotonic())

    async def _try_to_send(self, now: float) -> None:
        try:
            await self._send(now)
        except SkepError as error:
            if isinstance(error, InvalidArgument) and not self._was_accepted:
                self._is_registered = False
                raise
            self._retry_at = now + self._backoff.next_delay_s()
            if not self._is_failing:
                why = of_a_manager(error)
                self._report(f"{self._name}: the managers do not accept it, will retry: {why}")
            self._is_failing = True
        else:
            self._is_failing = False
            self._backoff.reset()

    def _show_failure(self) -> None:
        """Report the first failure before a registration.  A later one is reported with the removal."""
        if self._reason and not self._shown_reason and not self._is_registered:
            self._report(f"{self._name} is not registered while its check fails: {self._reason}")
        if self._state.is_up or not self._shown_reason:
            self._shown_reason = self._reason

    async def _send(self, now: float) -> None:
        if not self._state.is_up:
            if self._is_registered is not False and not self._state.contrary:
                await self._remove()
            return
        if self._is_registered and now < self._renew_at:
            return
        if self._is_registered:
            try:
                await self._client.request("POST", f"{self._path}/renew", timeout_s=REQUEST_S)
            except NotFound:  # the lease was over
                self._is_registered = False
        if not self._is_registered:
            self._is_registered = None
            body = msgspec.to_builtins(self._registration)
            await self._client.request("PUT", self._path, body=body, timeout_s=REQUEST_S)
            self._report(f"{self._name} registered")
        self._is_registered = self._was_accepted = True
        self._renew_at = now + self._registration.ttl / 3

    async def _remove(self) -> None:
        try:
            await self._client.delete(self._path, timeout_s=REQUEST_S)
            self._report(f"{self._name} removed: {self._reason}")
        except NotFound:
            if self._is_registered:
                self._report(f"{self._name} removed: {self._reason}")
        self._is_registered = False

    async def _leave(self) -> None:
        try:
            await self._client.delete(self._path, timeout_s=LEAVE_S)
            self._report(f"{self._name} removed")
        except SkepError as error:
            if self._is_registered:
                self._report(f"{self._name} ends with its lease: {error}")


def tcp_check(address: str, port: int) -> Check:
    """Return a check that connects to the service."""

    async def check() -> str:
        try:
            _, writer = await asyncio.open_connection(address, port)
        except OSError as error:
            return f"{joined(address, port)}: {reason_of(error)}"
        writer.close()
        return ""

    return check


def http_check(address: str, port: int, path: str) -> Check:
    """Return a check that expects a status below 400 for a path.  Redirections are not followed."""
    url = f"http://{joined(address, port)}{path}"

    async def check() -> str:
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.get(url, allow_redirects=False) as response,
            ):
                return "" if response.status < 400 else f"{url}: status {response.status}"
        except (aiohttp.ClientError, OSError) as error:
            return f"{url}: {error}"

    return check


def command_check(command: Sequence[str], timeout_s: float) -> Check:
    """Return a check that expects a command to exit with 0."""

    async def check() -> str:
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
            await communicate(process, timeout_s)
        except OSError as error:
            return f"{command[0]}: {reason_of(error)}"
        return "" if process.returncode == 0 else f"{command[0]} exited with {process.returncode}"

    return check
