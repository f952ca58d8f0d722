"""Tasks at the own site are preferred."""

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.dataplane.dns.index import Index
from skep.dataplane.plan.vip import vip_backends
from skep.dataplane.tables.unreachable import restored, with_far_tasks, without
from skep.model.networks.tables import (
    NetworkHead,
    NetworkTable,
    Segment,
    TableEndpoint,
    TableNode,
    TableService,
)
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId

HERE = NodeId("n1")
SITES = {"n1": "a", "n2": "a", "n3": "b", "n4": ""}


def a_table(*tasks: tuple[str, str, bool], near: bool = True) -> NetworkTable:
    """Return a table with a service ``web``.  ``tasks``: id, node, and whether it serves."""
    return NetworkTable(
        head=NetworkHead(
            id=NetworkId("net"), name="net", segments=(Segment("10.0.1.0/24", "10.0.1.1", 4097),)
        ),
        nodes={
            NodeId(id): TableNode(id=NodeId(id), underlay=f"192.0.2.{number}", site=site)
            for number, (id, site) in enumerate(SITES.items(), 1)
        },
        endpoints={
            TaskId(id): TableEndpoint(
                task_id=TaskId(id),
                node_id=NodeId(node),
                service_id=ServiceId("web"),
                slot=number,
                name=f"web.{number}",
                addresses=(f"10.0.1.{number + 10}",),
                is_running=True,
                is_serving=serves,
            )
            for number, (id, node, serves) in enumerate(tasks, 1)
        },
        services={
            ServiceId("web"): TableService(
                id=ServiceId("web"), name="web", virtual_ips=("10.0.1.2",), is_near=near
            )
        },
    )


def used(table: NetworkTable) -> set[str]:
    return {id for id, one in table.endpoints.items() if one.gets_connections}


BOTH = a_table(("t1", "n1", True), ("t2", "n2", True), ("t3", "n3", True), ("t4", "n4", True))


def test_tasks_of_the_own_site_are_used_while_one_of_them_serves() -> None:
    assert used(with_far_tasks(BOTH, HERE)) == {"t1", "t2"}
    assert used(with_far_tasks(BOTH, NodeId("n3"))) == {"t3"}


def test_all_tasks_are_used_if_none_is_near_or_the_node_has_no_site() -> None:
    gone = a_table(("t1", "n1", False), ("t3", "n3", True), ("t4", "n4", True))
    assert with_far_tasks(gone, HERE) is gone
    assert with_far_tasks(BOTH, NodeId("n4")) is BOTH
    assert with_far_tasks(BOTH, NodeId("stranger")) is BOTH


def test_a_service_without_the_label_uses_all() -> None:
    plain = a_table(("t1", "n1", True), ("t3", "n3", True), near=False)
    assert with_far_tasks(plain, HERE) is plain


def test_virtual_addresses_and_names_lead_to_near_tasks_and_slots_to_their_task() -> None:
    table = with_far_tasks(BOTH, HERE)
    assert vip_backends(table)[ServiceId("web")]["10.0.1.2"] == ("10.0.1.11", "10.0.1.12")
    index = Index(table)
    near = index.find("tasks.web")
    assert near is not None
    assert [one[-1] for one in near.ipv4] == [11, 12]
    far = index.find("3.web")
    assert far is not None
    assert [one[-1] for one in far.ipv4] == [13]
    every = index.find("all.tasks.web")
    assert every is not None
    assert len(every.ipv4) == 4
    assert {one.task_id for one in index.serving("web")} == {"t1", "t2"}


def test_tasks_on_unreachable_nodes_are_not_near() -> None:
    lost = without(BOTH, frozenset({HERE, NodeId("n2")}))
    assert used(with_far_tasks(lost, HERE)) == {"t3", "t4"}


@given(
    st.lists(st.tuples(st.sampled_from([*SITES]), st.booleans()), max_size=6),
    st.sampled_from([*SITES]),
    st.sets(st.sampled_from([*SITES])),
)
def test_a_service_that_has_backends_keeps_some_and_nothing_stays_changed(
    tasks: list[tuple[str, bool]], own: str, lost: set[str]
) -> None:
    table = a_table(*((f"t{number}", node, serves) for number, (node, serves) in enumerate(tasks)))
    reachable = without(table, frozenset(map(NodeId, lost)))
    near = with_far_tasks(reachable, NodeId(own))
    assert bool(used(near)) == bool(used(reachable)) == bool(used(table))
    assert used(near) <= used(reachable)
    assert restored(near) == table
    assert with_far_tasks(near, NodeId(own)) == near


def test_what_managers_send_marks_nothing() -> None:
    assert not any(one.is_far for one in BOTH.endpoints.values())
    assert replace(BOTH.endpoints[TaskId("t1")], is_far=True).is_serving
