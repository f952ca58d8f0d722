"""Notices what somebody else changed in a namespace of ours, and has it put right.

The kernel tells of changes (links, addresses, routes, neighbours, nftables): each notice makes its namespace due for a
comparison, which tells our own changes from others'.  A namespace is compared once a second at most.  Beside that one
namespace after the other is compared in a slow round, for what is not told (sysctls) and for a notice that was lost.
"""

import asyncio
import socket
from collections.abc import Callable
from functools import partial

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.first import wait_first
from skep.aio.guard import explain, persist, report
from skep.dataplane.netns import netlink
from skep.dataplane.netns.namespaces import Namespaces
from skep.dataplane.overlay.domain import Domain
from skep.dataplane.overlay.repairs import Repairs

log = structlog.get_logger()

PAUSE_SECONDS = 1.0
"""Between two comparisons of one namespace: somebody who changes much is answered once."""
GATHERING_SECONDS = 0.05
"""What belongs to one change comes as several notices."""
RETRY_SECONDS_MAX = 60.0
"""Between two attempts at a namespace that cannot be put right."""
ROUND_PAUSE_SECONDS_MIN = 0.2
SHARE = 0.02
"""Of the time that the slow round may take, comparisons and repairs included."""

_GROUPS = (
    netlink.GROUP_LINK,
    netlink.GROUP_ADDRESS4,
    netlink.GROUP_ROUTE4,
    netlink.GROUP_ADDRESS6,
    netlink.GROUP_ROUTE6,
    netlink.GROUP_RULE4,
    netlink.GROUP_RULE6,
)
_NEIGHBOUR_MESSAGES = (netlink.NEWNEIGH, netlink.DELNEIGH)
_BYTES_MAX = 1 << 16


class _Failing:
    """A namespace whose last comparison failed."""

    def __init__(self, backoff: Backoff) -> None:
        self.backoff = backoff
        self.again_at = 0.0
        self.reason = ""


class Healing:
    """Comparisons of all namespaces of a node with what is wanted in them."""

    def __init__(
        self,
        namespaces: Namespaces,
        clock: Clock,
        repairs: Repairs,
        *,
        chance: Callable[[], float],
        share: float = SHARE,
    ) -> None:
        """``share``: of one core, for the slow round."""
        self.repairs = repairs
        self._namespaces = namespaces
        self._clock = clock
        self._chance = chance
        self._share = share
        self._sockets: dict[Domain, list[socket.socket]] = {}
        self._due: dict[Domain, None] = {}
        self._failing: dict[Domain, _Failing] = {}
        self._wake = asyncio.Event()

    async def watch(self, domain: Domain) -> None:
        """Notice changes in ``domain`` from now on.  Raises: OSError."""
        if domain in self._sockets:
            return
        self.take_turns(domain)
        groups = list(_GROUPS)
        if not domain.is_container:  # whose neighbours are its own
            groups.append(netlink.GROUP_NEIGHBOUR)
        opened = [await self._namespaces.run(domain.path, netlink.listening, socket.NETLINK_ROUTE, groups)]
        if not domain.is_container:
            tables = netlink.NETFILTER, [netlink.GROUP_NFTABLES]
            opened.append(await self._namespaces.run(domain.path, netlink.listening, *tables))
        if domain not in self._sockets:  # forgotten meanwhile
            for one in opened:
                one.close()
            return
        self._sockets[domain] = opened
        loop = asyncio.get_running_loop()
        for one in opened:
            loop.add_reader(one, self._hear, domain, one)

    def take_turns(self, domain: Domain) -> None:
        """Compare ``domain`` in the slow round, whether it tells of changes or not."""
        self._sockets[domain] = []

    def expect(self, domain: Domain) -> None:
        """Compare ``domain`` soon."""
        self._due[domain] = None
        self._wake.set()

    def forget(self, domain: Domain) -> None:
        """Look at ``domain`` no more."""
        loop = asyncio.get_running_loop()
        for one in self._sockets.pop(domain, ()):
            loop.remove_reader(one)
            one.close()
        self._due.pop(domain, None)
        self._failing.pop(domain, None)

    def close(self) -> None:
        """Forget all."""
        for domain in tuple(self._sockets):
            self.forget(domain)

    async def run(self) -> None:
        """Heal until cancelled."""
        keep = partial(persist, clock=self._clock, chance=self._chance)
        event = "healing of networks failed"
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(keep(self._heal_due, event), name="changed namespaces")
                group.create_task(keep(self._go_round, event), name="all namespaces")
        finally:
            self.close()

    # --- notices ----------------------------------------------------------------------------------------------

    def _hear(self, domain: Domain, source: socket.socket) -> None:
        is_due = False
        while True:
            try:
                data = memoryview(source.recv(_BYTES_MAX))
            except BlockingIOError:
                break
            except OSError:  # ENOBUFS: something was told that did not fit
                is_due = True
                break
            is_due = is_due or any(_concerns(domain, kind, body) for kind, body in netlink.messages(data))
        if is_due:
            self.expect(domain)

    async def _heal_due(self) -> None:
        while True:
            await self._wait_due()
            await self._clock.sleep(GATHERING_SECONDS)
            self._wake.clear()
            for domain in [one for one in self._due if not self._waits(one)]:
                self._due.pop(domain, None)
                await self._heal(domain)
            await self._clock.sleep(PAUSE_SECONDS)

    async def _wait_due(self) -> None:
        """Return when something was told, or one that has failed may be tried again."""
        waiting = [self._failing[domain].again_at for domain in self._due if domain in self._failing]
        if waiting:
            pause_s = max(0.0, min(waiting) - self._clock.monotonic())
            await wait_first(self._wake.wait(), self._clock.sleep(pause_s))
        else:
            await self._wake.wait()

    def _waits(self, domain: Domain) -> bool:
        failing = self._failing.get(domain)
        return failing is not None and self._clock.monotonic() < failing.again_at

    async def _go_round(self) -> None:
        while True:
            domains = tuple(one for one in self._sockets if not self._waits(one))
            for domain in domains:
                began = self._clock.monotonic()
                await self._heal(domain)
                spent = self._clock.monotonic() - began
                await self._clock.sleep(max(spent / self._share - spent, ROUND_PAUSE_SECONDS_MIN))
            if not domains:
                await self._clock.sleep(PAUSE_SECONDS)

    async def _heal(self, domain: Domain) -> None:
        """Have ``domain`` as it shall be; one that fails is tried again later and later, and no other waits for it."""
        if domain not in self._sockets:
            return
        try:
            await domain.heal()
        except Exception as error:
            if domain in self._sockets:  # otherwise it was removed meanwhile
                self._note_failure(domain, error)
            return
        if self._failing.pop(domain, None) is not None:
            log.info("network repaired again", where=domain.name)
        if domain.is_unsure and domain in self._sockets:
            self.expect(domain)

    def _note_failure(self, domain: Domain, error: Exception) -> None:
        failing = self._failing.get(domain)
        if failing is None:
            backoff = Backoff(PAUSE_SECONDS, RETRY_SECONDS_MAX, chance=self._chance)
            failing = self._failing[domain] = _Failing(backoff)
        delay_s = failing.backoff.next_delay_s()
        failing.again_at = self._clock.monotonic() + delay_s
        if failing.reason != explain(error):
            failing.reason = explain(error)
            report(error, "network not repaired yet", where=domain.name, again_in_s=round(delay_s, 1))
        self._due[domain] = None
        self._wake.set()


def _concerns(domain: Domain, kind: int, body: memoryview) -> bool:
    """Whether a notice can mean a deviation: neighbours of other devices come and go all the time."""
    if kind in _NEIGHBOUR_MESSAGES and domain.indices is not None:
        return int.from_bytes(body[4:8], netlink.BYTE_ORDER) in domain.indices
    return True
