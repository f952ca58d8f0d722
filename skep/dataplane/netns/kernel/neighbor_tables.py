"""Raises the limits of the kernel's neighbor tables, which all network namespaces of a machine share.

A container needs an entry for each container that it talks to.  Linux keeps 1,024 entries, so some forty containers
that all talk to each other fill the table, and connections then fail at random.  Entries that Skep adds for overlays
are permanent and do not count.  So the limits are raised at start (never lowered), and the counter of overflows is
watched.

Limits and counters belong to the first network namespace of the machine.  If this node is in another namespace, as in a
playground, they are reached through the namespace of process 1, if this process may enter it.

Source: linux, net/core/neighbour.c (neigh_alloc; neigh_sysctl_register: gc_thresh of the first namespace only).
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import structlog

from skep.aio.clock import Clock
from skep.dataplane.netns.kernel.namespaces import inside

log = structlog.get_logger()

T = TypeVar("T")

LIMITS = {"gc_thresh3": 65536, "gc_thresh2": 32768, "gc_thresh1": 8192}
"""New limits as numbers of entries.  The hard limit comes first, so that the others never exceed it."""
WATCH_SECONDS = 10.0
"""Seconds between two reads of the kernel's count of overflows."""
CALM_SECONDS = 300.0
"""Seconds without an overflow after which the condition is cleared."""
_SPACES = (Path("/proc/thread-self/ns/net"), Path("/proc/1/ns/net"))
_SETTINGS = Path("/proc/sys/net")
_COUNTERS = Path("/proc/thread-self/net/stat")
_TABLES = {"ipv4": "arp_cache", "ipv6": "ndisc_cache"}


class NeighborTables:
    """Raises the limits, and reports overflows as a node condition."""

    def __init__(
        self,
        say: Callable[[str], None],
        clock: Clock,
        *,
        raise_limits: Callable[[], str] | None = None,
        count: Callable[[], int] | None = None,
    ) -> None:
        """Make the watcher of this machine's tables.

        Args:
            say: Sets the node's condition.  An empty text clears it.
            raise_limits: Replaces ``raised``, which blocks.
            count: Replaces ``overflows``, which blocks.
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
            log.warning("limits of the neighbor table not raised", reason=refusal)
        try:
            await self._watch(refusal)
        except (OSError, ValueError) as error:  # an older kernel does not count overflows
            log.warning("kernel does not count neighbor table overflows", reason=str(error))

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
    """Return the condition's text.

    ``refusal`` is the reason why the limits could not be raised, or empty if they were.
    """
    why = f", which this node could not raise ({refusal})" if refusal else ""
    return (
        "the kernel's table of neighbors overflows, so connections between containers fail at random: "
        f"raise net.ipv4.neigh.default.gc_thresh3 and net.ipv6.neigh.default.gc_thresh3{why}"
    )


def at_machine(work: Callable[[], T]) -> T:
    """Run ``work`` in the first namespace that does not raise FileNotFoundError.  Raises: OSError."""
    for space in _SPACES[:-1]:
        try:
            return inside(space, work)
        except FileNotFoundError:
            continue
    return inside(_SPACES[-1], work)


def raised(settings: Path = _SETTINGS) -> str:
    """Raise the limits.  Return why one could not be raised, or an empty text.

    Raises: FileNotFoundError: this namespace has no limits.
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
    """Return how often the table was full since boot.  Raises: OSError: this kernel does not count that."""
    total = 0
    for table in _TABLES.values():
        path = counters / table
        if table == "ndisc_cache" and not path.exists():
            continue
        head, *lines = path.read_text().splitlines()
        column = head.split().index("table_fulls")
        total += sum(int(line.split()[column], 16) for line in lines)
    return total
