"""Shares of new connections during a staged update.  Pure.

The virtual addresses, the published ports and the front door each divide the serving tasks of a service in this way.
"""

from collections.abc import Iterable
from math import gcd

import msgspec

from skep.model.networks.tables import TableEndpoint, TableService

ALL_PERCENT = 100
"""All connections, in percent."""
WEIGHT_MAX = 256
"""Largest weight of a server.  Source: HAProxy, Configuration Manual, ``weight``."""


class Shares(msgspec.Struct, frozen=True):
    """Serving tasks.  A connection leads to one of ``new`` in ``percent`` of all cases, and otherwise to ``even``.

    Without ``new``, ``percent`` is 0.  With ``new``, it is from 1 to 99, and ``even`` is not empty.
    """

    even: tuple[TableEndpoint, ...]
    new: tuple[TableEndpoint, ...] = ()
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


def shares_of(service: TableService | None, serving: Iterable[TableEndpoint]) -> Shares:
    """Return the shares of a service's ``serving`` tasks, in their order.

    While only old or only new tasks serve, they get all connections.  Withdrawn tasks get some if no others serve.
    """
    tasks = tuple(serving)
    if service is None or service.split is None:
        return Shares(tasks)
    versions, withdrawn = frozenset(service.split.versions), frozenset(service.split.withdrawn)
    tasks = tuple(one for one in tasks if one.version not in withdrawn) or tasks
    new = tuple(one for one in tasks if one.version in versions)
    old = tuple(one for one in tasks if one.version not in versions)
    if not new or not old:
        return Shares(tasks)
    percent = service.split.percent
    if percent <= 0:
        return Shares(old)
    return Shares(new) if percent >= ALL_PERCENT else Shares(old, new, percent)
