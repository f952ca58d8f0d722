"""Draws the backend of a new flow in nftables.  Pure.

The draw is exactly even among the backends.  During a staged update it first decides whether a flow is among the share
of connections for the new backends.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import NamedTuple, TypeVar

from skep.model.staging.shares import ALL_PERCENT

T = TypeVar("T")

NEW_FROM = 1 << 15
"""First number of new backends, which is half of the numbers that the type of the maps allows."""


class Draw(NamedTuple):
    """Numbers of backends, for which a chain is needed.  ``new`` and ``percent`` are 0 without a staged update.

    ``prefix``: beginning of the chain's name.
    """

    prefix: str
    even: int
    new: int = 0
    percent: int = 0

    @property
    def chain(self) -> str:
        """The name of the chain."""
        return f"{self.prefix}_{self.even}" + (f"_{self.new}_{self.percent}" if self.new else "")

    def rules(self, send: Callable[[str], str]) -> Iterator[str]:
        """Yield the chain's rules.  ``send``: returns the statement that sends a packet to the backend of a number."""
        if self.new:
            number = f"numgen random mod {self.new} offset {NEW_FROM}"
            yield f"numgen random mod {ALL_PERCENT} < {self.percent} {send(number)}"
        yield send(f"numgen random mod {self.even}")


def numbered(even: Iterable[T], new: Iterable[T]) -> Iterator[tuple[int, T]]:
    """Yield the backends with their numbers."""
    return chain(enumerate(even), enumerate(new, NEW_FROM))
