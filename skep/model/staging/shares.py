"""Shares of new connections during a staged update.  Pure.

The virtual addresses, the published ports, the front door and the catalog each divide the serving tasks of a service
in this way.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from math import gcd
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

import msgspec

T = TypeVar("T")

ALL_PERCENT = 100
"""All connections, in percent."""
WEIGHT_MAX = 256
"""Largest weight of a server.  Source: HAProxy, Configuration Manual, ``weight``."""


class Split(Protocol):
    """The share of new connections for the tasks of some spec versions.  ``percent``: None to treat all alike."""

    @property
    def percent(self) -> int | None: ...
    @property
    def versions(self) -> Sequence[int]: ...
    @property
    def withdrawn(self) -> Sequence[int]: ...


class StagedService(Protocol):
    """A service of the store or of a network table."""

    @property
    def split(self) -> Split | None: ...


class Shares(msgspec.Struct, Generic[T], frozen=True):
    """Serving tasks.  A connection leads to one of ``new`` in ``percent`` of all cases, and otherwise to ``even``.

    Without ``new``, ``percent`` is 0.  With ``new``, it is from 1 to 99, and ``even`` is not empty.
    """

    even: tuple[T, ...]
    new: tuple[T, ...] = ()
    percent: int = 0

    @property
    def weights(self) -> tuple[int, int]:
        """Weights from 1 to ``WEIGHT_MAX`` of each task of ``even`` and of ``new``, which result in ``percent``.

        The numbers of tasks may differ so much that no weights in this range do.  Then these are the nearest ones.
        """
        if not self.new:
            return 1, 1
        even = (ALL_PERCENT - self.percent) * len(self.new)
        new = self.percent * len(self.even)
        divisor = gcd(even, new)
        even, new = even // divisor, new // divisor
        if (largest := max(even, new)) > WEIGHT_MAX:
            even, new = (max(1, round(one * WEIGHT_MAX / largest)) for one in (even, new))
        return even, new

    def weighted(self) -> Iterator[tuple[T, int]]:
        """Yield each task that gets new connections, with its weight."""
        even, new = self.weights
        return chain(((one, even) for one in self.even), ((one, new) for one in self.new))


def shares_of(
    service: StagedService | None,
    serving: Iterable[T],
    version_of: Callable[[T], int] = attrgetter("version"),
) -> Shares[T]:
    """Return the shares of a service's ``serving`` tasks, in their order.

    While only old or only new tasks serve, they get all connections.  Withdrawn tasks get some if no others serve.

    Args:
        version_of: Returns the index of the spec version that a task was created from.
    """
    tasks = tuple(serving)
    split = service.split if service is not None else None
    if split is None or split.percent is None:
        return Shares(tasks)
    versions, withdrawn = frozenset(split.versions), frozenset(split.withdrawn)
    tasks = tuple(one for one in tasks if version_of(one) not in withdrawn) or tasks
    new = tuple(one for one in tasks if version_of(one) in versions)
    old = tuple(one for one in tasks if version_of(one) not in versions)
    if not new or not old:
        return Shares(tasks)
    percent = split.percent
    if percent <= 0:
        return Shares(old)
    return Shares(new) if percent >= ALL_PERCENT else Shares(old, new, percent)
