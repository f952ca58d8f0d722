"""What the node's tables are after a set of changes.  Pure."""

from collections.abc import Mapping

from skep.errors import InvalidArgument
from skep.model.ids import NetworkId
from skep.model.tables import Table, TableSet, changed, difference, keeping_unread


def merged(
    tables: Mapping[NetworkId, Table], news: TableSet
) -> tuple[Mapping[NetworkId, Table], frozenset[NetworkId]]:
    """The tables after ``news``, and which of them are not what they were (or are no more).

    A table that is told again and says the same has changed in nothing but its revision.
    Raises: InvalidArgument: a difference to a table that is not here.
    """
    after = dict(tables)
    for change in news.changes:
        id = change.head.id
        before = after.get(id)
        if before is None and not change.is_whole:
            raise InvalidArgument(f"a change of network {id}, whose table this node does not have")
        after[id] = changed(before, change)
    gone = set(news.removed)
    if news.is_complete:
        gone |= after.keys() - {change.head.id for change in news.changes}
    for id in gone:
        after.pop(id, None)
    for id in {change.head.id for change in news.changes} & after.keys():
        after[id] = keeping_unread(tables.get(id), after[id])
    differing = {
        id for id in {change.head.id for change in news.changes} if _differ(tables.get(id), after.get(id))
    }
    return after, frozenset(differing | (gone & tables.keys()))


def _differ(before: Table | None, after: Table | None) -> bool:
    if before is None or after is None:
        return before is not after
    return difference(before, after) is not None
