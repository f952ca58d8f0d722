"""What a node's tables are after what a manager said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.dataplane.tables.network_tables import merged
from skep.errors import InvalidArgument
from skep.model.networks.tables import (
    NetworkHead,
    NetworkTable,
    TableChange,
    TableNode,
    TableSet,
    difference,
    whole,
)
from skep.model.values.ids import NetworkId, NodeId

IDS = [NetworkId(name) for name in ("a", "b", "c")]


def a_table(id: str, *nodes: str, revision: int = 1) -> NetworkTable:
    known = {NodeId(one): TableNode(id=NodeId(one), underlay="192.168.0.1") for one in nodes}
    return NetworkTable(head=NetworkHead(id=NetworkId(id), name=id), revision=revision, nodes=known)


def reported(*changes: TableChange, is_complete: bool = False, removed: tuple[str, ...] = ()) -> TableSet:
    return TableSet(
        revision=2, is_complete=is_complete, changes=changes, removed=tuple(map(NetworkId, removed))
    )


A, B = a_table("a", "n1"), a_table("b")
BOTH = {A.head.id: A, B.head.id: B}


def test_a_complete_set_leaves_nothing_else() -> None:
    again = replace(A, revision=2)
    assert merged(BOTH, reported(whole(again), is_complete=True)) == ({"a": again}, {"b"})
    assert merged(BOTH, reported(is_complete=True)) == ({}, {"a", "b"})


def test_a_difference_leaves_the_rest() -> None:
    more = a_table("a", "n1", "n2", revision=2)
    change = difference(A, more)
    assert change is not None
    assert merged(BOTH, reported(change)) == ({"a": more, "b": B}, {"a"})
    assert merged(BOTH, reported(removed=("b", "unknown"))) == ({"a": A}, {"b"})


def test_a_network_in_several_changes_is_put_together() -> None:
    first = TableChange(head=A.head, revision=2, is_whole=True, nodes=tuple(A.nodes.values()))
    more = a_table("a", "n2")
    second = TableChange(head=A.head, revision=2, nodes=tuple(more.nodes.values()))
    after, changed = merged({}, reported(first, second, is_complete=True))
    assert (set(after[A.head.id].nodes), changed) == ({"n1", "n2"}, {"a"})


def test_a_difference_to_what_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="this node does not have its table"):
        merged({}, reported(TableChange(head=A.head, revision=2)))


TABLES = st.dictionaries(st.sampled_from(IDS), st.sets(st.sampled_from(["n1", "n2", "n3"])), max_size=3)


@given(before=TABLES, after=TABLES, is_complete=st.booleans())
def test_whatever_is_said_leads_there_and_names_what_differs(
    before: dict[NetworkId, set[str]], after: dict[NetworkId, set[str]], is_complete: bool
) -> None:
    old = {id: a_table(id, *nodes) for id, nodes in before.items()}
    new = {id: a_table(id, *nodes, revision=2) for id, nodes in after.items()}
    ways = (
        difference(old[id], table) if id in old and not is_complete else whole(table)
        for id, table in new.items()
    )
    gone = () if is_complete else tuple(old.keys() - new.keys())
    got, changed = merged(old, reported(*(way for way in ways if way), is_complete=is_complete, removed=gone))
    assert {id: table.nodes for id, table in got.items()} == {id: table.nodes for id, table in new.items()}
    assert changed == {id for id in old.keys() | new.keys() if before.get(id) != after.get(id)}
