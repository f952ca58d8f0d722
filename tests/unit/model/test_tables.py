"""Network tables: applied differences give the same result as the complete table."""

from hypothesis import given
from hypothesis import strategies as st

from skep.model.networks.tables import (
    NetworkHead,
    NetworkTable,
    Segment,
    TableEndpoint,
    TableNode,
    TableService,
    changed,
    difference,
    whole,
)
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId

WORDS = st.sampled_from(["a", "b", "c", "d"])
HEADS = st.builds(
    lambda mtu: NetworkHead(
        id=NetworkId("n"), name="net", segments=(Segment("10.0.1.0/24", "10.0.1.1", 4097),), mtu=mtu
    ),
    st.sampled_from([0, 1450]),
)
NODES = st.dictionaries(WORDS.map(NodeId), st.sampled_from(["192.0.2.1", "192.0.2.2"]))
ENDPOINTS = st.dictionaries(WORDS.map(TaskId), st.tuples(WORDS.map(NodeId), st.booleans()))
SERVICES = st.dictionaries(WORDS.map(ServiceId), WORDS)


@st.composite
def tables(draw: st.DrawFn) -> NetworkTable:
    return NetworkTable(
        head=draw(HEADS),
        revision=draw(st.integers(1, 9)),
        nodes={id: TableNode(id=id, underlay=underlay) for id, underlay in draw(NODES).items()},
        endpoints={
            id: TableEndpoint(task_id=id, node_id=node, is_serving=is_serving)
            for id, (node, is_serving) in draw(ENDPOINTS).items()
        },
        services={id: TableService(id=id, name=name) for id, name in draw(SERVICES).items()},
    )


@given(tables(), tables())
def test_the_difference_makes_the_old_table_the_new_one(old: NetworkTable, new: NetworkTable) -> None:
    change = difference(old, new)

    if change is None:
        assert (old.head, old.nodes, old.endpoints, old.services) == (
            new.head,
            new.nodes,
            new.endpoints,
            new.services,
        )
    else:
        assert changed(old, change) == new


@given(tables(), tables())
def test_a_whole_table_replaces_whatever_there_was(old: NetworkTable, new: NetworkTable) -> None:
    assert changed(old, whole(new)) == new
    assert changed(None, whole(new)) == new


def test_a_table_that_differs_only_in_its_revision_is_unchanged() -> None:
    head = NetworkHead(id=NetworkId("n"), name="net")

    assert difference(NetworkTable(head=head, revision=1), NetworkTable(head=head, revision=2)) is None


def test_a_change_of_nothing_known_gives_what_it_names() -> None:
    head = NetworkHead(id=NetworkId("n"), name="net")
    change = difference(
        NetworkTable(head=head),
        NetworkTable(
            head=head, revision=3, services={ServiceId("s"): TableService(id=ServiceId("s"), name="web")}
        ),
    )
    assert change is not None

    assert changed(None, change).services[ServiceId("s")].name == "web"
