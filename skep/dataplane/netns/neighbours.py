"""The kernel's tables of neighbours, which all network namespaces of a machine share.

Each container that talks to another holds an entry.  Linux keeps 1,024 of them: some forty containers that talk to each
other fill the table, and then connections fail at random.  Entries that Skep makes for overlays are permanent, and do
not count.  So the limits are raised at start, never lowered, and the counter of overflows is watched.

Limits and counters belong to the first network namespace of the machine.  Where this node is in another (a playground's
is), they are reached by the namespace of process 1, if that may be entered.

Source: linux, net/core/neighbour.c (neigh_alloc; neigh_sysctl_register: gc_thresh of the first namespace only).
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import structlog

from skep.aio.clock import Clock
from skep.dataplane.netns.namespaces import inside

log = structlog.get_logger()

T = TypeVar("T")

LIMITS = {"gc_thresh3": 65536, "gc_thresh2": 32768, "gc_thresh1": 8192}
"""The hard limit first, so that the others never exceed it."""
WATCH_SECONDS = 10.0
CALM_SECONDS = 300.0
"""Without an overflow, until the condition ends."""
_SPACES = (Path("/proc/thread-self/ns/net"), Path("/proc/1/ns/net"))
_SETTINGS = Path("/proc/sys/net")
_COUNTERS = Path("/proc/thread-self/net/stat")
_TABLES = {"ipv4": "arp_cache", "ipv6": "ndisc_cache"}


class NeighbourTables:
    """Raises the limits, then names overflows as a condition of the node."""

    def __init__(
        self,
        say: Callable[[str], None],
        clock: Clock,
        *,
        raise_limits: Callable[[], str] | None = None,
        count: Callable[[], int] | None = None,
    ) -> None:
        """``say``: sets the node's condition, an empty text clears it.

        ``raise_limits``, ``count``: blocking; those of this machine by default.
        """
        self._say = say
        self._clock = clock
        self._raise_limits = raise_limits or (lambda: at_machine(raised))
        self._count = count or (lambda: at_machine(overflows))

    async def run(self) -> None:
        """Watch until cancelled."""
        try:
            refusal = await asyncio.to_thread(self._raise_limits)
        except OSError as error:
            refusal = error.strerror or str(error)
        if refusal:
            log.warning("limits of the neighbour table not raised", reason=refusal)
        try:
            await self._watch(refusal)
        except (OSError, ValueError) as error:  # an older kernel counts nothing of the kind
            log.warning("overflows of the neighbour table are not counted here", reason=str(error))

    async def _watch(self, refusal: str) -> None:
        known, overflowed_at = await asyncio.to_thread(self._count), 0.0
        while True:
            await self._clock.sleep(WATCH_SECONDS)
            counted = await asyncio.to_thread(self._count)
            if counted > known:
                overflowed_at = self._clock.monotonic()
                self._say(message_of(refusal))
            elif self._clock.monotonic() - overflowed_at >= CALM_SECONDS:
                self._say("")
            known = counted


def message_of(refusal: str) -> str:
    """The condition's text.  ``refusal``: why the limits could not be raised; empty: they were."""
    why = f", which this node could not raise ({refusal})" if refusal else ""
    return (
        "the kernel's table of neighbours overflows, so connections between containers fail at random: "
        f"raise net.ipv4.neigh.default.gc_thresh3 and net.ipv6.neigh.default.gc_thresh3{why}"
    )


def at_machine(work: Callable[[], T]) -> T:
    """What ``work`` gives in the first of the namespaces in which there is what it looks for.  Raises: OSError."""
    for space in _SPACES[:-1]:
        try:
            return inside(space, work)
        except FileNotFoundError:
            continue
    return inside(_SPACES[-1], work)


def raised(settings: Path = _SETTINGS) -> str:
    """Raise the limits of the present namespace; why one could not be raised, empty: all are high enough.

    Raises: FileNotFoundError: this namespace has none.
    """
    refusal = ""
    for version in _TABLES:
        folder = settings / version / "neigh/default"
        if version == "ipv6" and not folder.exists():
            continue
        for name, wanted in LIMITS.items():
            if int((folder / name).read_text()) >= wanted:
                continue
            try:
                (folder / name).write_text(str(wanted))
            except OSError as error:
                refusal = f"{folder / name}: {error.strerror}"
    return refusal


def overflows(counters: Path = _COUNTERS) -> int:
    """How often an entry found no place since boot.  Raises: OSError: this kernel does not count them."""
    total = 0
    for table in _TABLES.values():
        path = counters / table
        if table == "ndisc_cache" and not path.exists():
            continue
        head, *lines = path.read_text().splitlines()
        column = head.split().index("table_fulls")
        total += sum(int(line.split()[column], 16) for line in lines)
    return total
