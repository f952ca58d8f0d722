"""Pieces become units again, in whatever order they come."""

from collections.abc import Sequence

from skep.dataplane.encrypted.frames import Header

UNITS_MAX = 64
"""Unfinished units that are kept per session; the one begun first gives way, and is lost."""


class Reassembly:
    """The unfinished units of one session.  One thread's.  ``lost``: units that gave way."""

    def __init__(self) -> None:
        self._units: dict[Header, dict[int, bytes]] = {}
        self.lost = 0

    def add(self, header: Header, parts: Sequence[bytes]) -> Sequence[bytes] | None:
        """All parts of the unit in their order, if these were the last that were missing.

        ``parts``: of the positions from the header's on, none of them beyond the unit's end.  Pieces whose headers
        differ in more than their position are of different units.
        """
        key = header._replace(position=0)
        unit = self._units.get(key)
        if unit is None:
            if len(self._units) >= UNITS_MAX:
                del self._units[next(iter(self._units))]
                self.lost += 1
            unit = self._units[key] = {}
        unit.update(enumerate(parts, header.position))
        if len(unit) < header.pieces:
            return None
        del self._units[key]
        return [unit[number] for number in range(header.pieces)]
