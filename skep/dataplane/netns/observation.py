"""Reads one namespace, and leaves out items that the kernel adds or removes by itself."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from skep.dataplane.netns import read
from skep.dataplane.netns.desired_state import without
from skep.dataplane.netns.diff import Operation, Put
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.kernel_made import is_link_local
from skep.dataplane.netns.read import Selection
from skep.dataplane.netns.state import Link, NamespaceState, Route

_DEPARTING_READS_MAX = 25
"""Number of reads (at least five seconds) for which a link may still be disappearing.

The kernel frees namespaces one by one, and slowly if they have many rules.
"""


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """Determines which items of a namespace are compared with the desired state.

    Args:
        selects: Links that are compared in addition to the wanted ones, or None.
        is_exclusive: Whether unwanted items are removed.
        has_own_routes: Whether all routes on these links, and the rules of a new namespace, belong to the desired
            state.
        is_container: Whether it is a container's namespace, where the container's processes may add items.
    """

    selects: Selection | None = None
    is_exclusive: bool = False
    has_own_routes: bool = True
    is_container: bool = False


def _is_not_loopback(link: Link) -> bool:
    return link.kind != "loopback"


EXCLUSIVE = Scope(selects=_is_not_loopback, is_exclusive=True)
"""A namespace that Skep owns, with all of its links."""
CONTAINER = Scope(is_container=True)


class NamespaceObserver:
    """Reads one namespace, and remembers which links are disappearing from it."""

    def __init__(self, path: Path, namespaces: Namespaces, scope: Scope) -> None:
        self._path = path
        self._namespaces = namespaces
        self._scope = scope
        self._departing: dict[str, int] = {}
        """Links that disappear by themselves, with the number of reads that still showed them."""
        self._missing: frozenset[object] = frozenset()
        self.needs_recheck = False
        """Whether items were missing for the first time, so that they must be compared again soon."""
        self.indices: frozenset[int] | None = None
        """Indices of the links that are compared, or None if unknown at present."""

    def expect_removal(self, link: str) -> None:
        """Leave out the link from now on, because it will disappear."""
        self._departing[link] = 0

    async def read(self, wanted: NamespaceState, selects: Selection) -> NamespaceState:
        """Return the present state of the links that ``selects`` selects.  Raises: OSError."""
        found = await self._namespaces.run(self._path, read.read_namespace, selects, wanted)
        self.indices = frozenset(found.indices[name] for name in found.state.links)
        state = found.state
        if not self._scope.has_own_routes:
            state = msgspec.structs.replace(state, routes=state.routes & wanted.routes)
        # In these namespaces, others may use IPv6 on our links.
        if not self._scope.has_own_routes or self._scope.is_container:
            held = frozenset(
                one for one in state.addresses if one in wanted.addresses or not is_link_local(one)
            )
            state = msgspec.structs.replace(state, addresses=held)
        return state

    def confirmed(self, operations: Sequence[Operation]) -> list[Operation]:
        """Return ``operations`` without IPv6 routes of the kernel that are missing for the first time.

        The kernel adds them a moment after their address (addrconf_dad_work).  Only a route that is missing twice was
        removed.
        """
        missing = {one: one.item for one in operations if isinstance(one, Put) and _is_made_late(one.item)}
        unconfirmed = set(missing.values()) - self._missing
        self._missing = frozenset(missing.values())
        self.needs_recheck = bool(unconfirmed)
        return [one for one in operations if one not in missing or missing[one] not in unconfirmed]

    def without_departing(self, found: NamespaceState) -> NamespaceState:
        """Return ``found`` without links that disappear by themselves.

        A link that still exists after many reads is included again.
        """
        for link in tuple(self._departing):
            if link not in found.links or self._departing[link] >= _DEPARTING_READS_MAX:
                del self._departing[link]
            else:
                self._departing[link] += 1
                found = without(found, link)
        return found


def _is_made_late(item: object) -> bool:
    return isinstance(item, Route) and item.is_kernels and ":" in item.destination
