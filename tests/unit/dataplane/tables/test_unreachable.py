"""Unreachable peers are excluded from the tables while there is no manager."""

import asyncio
from collections.abc import Mapping
from typing import cast

from skep.agent.session.session_state import SessionState
from skep.aio.clock import SystemClock
from skep.dataplane.tables.unreachable import (
    FRESH_SECONDS,
    LOST_SECONDS,
    NONE_UNREACHABLE,
    URGENT_SECONDS,
    Unreachable,
    restored,
    unreachable_peers,
    watch,
    without,
)
from skep.manager.nodes.heartbeats import DEFAULT_PERIOD_S, grace_after_absence
from skep.model.networks.paths import PathCheck, PathFinding, PathReport
from skep.model.networks.tables import NetworkHead, NetworkTable, TableEndpoint, TablePort, TableService
from skep.model.node_reports.node_removal import NodeRemoval
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId
from skep.wire.client import ManagerChannel
from tests.unit.dataplane.tables.test_network_tables import Part, received, running, some_tables

CHANNEL = cast("ManagerChannel", object())


def nodes(*names: str) -> frozenset[NodeId]:
    return frozenset(map(NodeId, names))


def a_report(*, fails: bool, rounds: int = 2, check: PathCheck = PathCheck.OVERLAY) -> PathReport:
    finding = PathFinding(check=check, port="4789/udp", sent=3, lost=3 if fails else 0)
    return PathReport(peer=NodeId("any"), findings=(finding,), rounds=rounds)


def reports(**fails: bool) -> dict[NodeId, PathReport]:
    return {NodeId(name): a_report(fails=one) for name, one in fails.items()}


def a_table(*endpoints: TableEndpoint, is_encrypted: bool = False) -> NetworkTable:
    head = NetworkHead(id=NetworkId("net"), name="net", is_encrypted=is_encrypted)
    return NetworkTable(head=head, revision=1, endpoints={one.task_id: one for one in endpoints})


def serving(task: str, node: str, service: str = "web", *, is_serving: bool = True) -> TableEndpoint:
    return TableEndpoint(
        task_id=TaskId(task),
        node_id=NodeId(node),
        service_id=ServiceId(service),
        is_running=True,
        is_serving=is_serving,
    )


def serves(table: NetworkTable) -> set[str]:
    return {str(id) for id, one in table.endpoints.items() if one.is_serving}


def test_peers_that_fail_by_a_settled_verdict_are_unreachable() -> None:
    found = reports(m2=True, m3=True, w1=False) | {NodeId("w2"): a_report(fails=True, rounds=1)}
    assert unreachable_peers(found) == Unreachable(plain=nodes("m2", "m3"))


def test_an_unreachable_peer_stays_so_until_it_responds_whatever_else_changes() -> None:
    """The new leader of ``skep cluster recover`` no longer probes manager ports of the lost managers."""
    before = Unreachable(plain=nodes("m2", "m3"))
    new = {NodeId("m2"): a_report(fails=True, rounds=1), NodeId("m3"): a_report(fails=False, rounds=1)}
    assert unreachable_peers(reports(w1=False) | new, before) == Unreachable(plain=nodes("m2"))
    assert unreachable_peers(reports(w1=False) | new) == NONE_UNREACHABLE


def test_a_node_without_any_answer_has_lost_its_own_link() -> None:
    assert unreachable_peers(reports(m2=True, m3=True)) == NONE_UNREACHABLE
    assert unreachable_peers({}) == NONE_UNREACHABLE


def test_encrypted_networks_go_by_the_forwarders_answers() -> None:
    found = {
        NodeId("m2"): a_report(fails=True, check=PathCheck.ENCRYPTED),
        NodeId("m3"): a_report(fails=False, check=PathCheck.ENCRYPTED),
    }
    assert unreachable_peers(found) == Unreachable(encrypted=nodes("m2"))
    assert unreachable_peers(found).of(a_table(is_encrypted=True)) == nodes("m2")
    assert unreachable_peers(found).of(a_table()) == nodes()


def test_what_silent_nodes_serve_is_left_out_and_comes_back() -> None:
    table = a_table(serving("t1", "m1"), serving("t2", "m2"), serving("t3", "m3"))
    left = without(table, nodes("m2", "m3"))
    assert serves(left) == {"t1"}
    assert left.endpoints.keys() == table.endpoints.keys(), "they can be reached by their addresses"
    assert restored(left) == table
    assert without(table, nodes()) is table


def test_the_last_that_serve_a_service_stay() -> None:
    table = a_table(
        serving("t2", "m2"),
        serving("t3", "m3"),
        serving("t1", "m1", is_serving=False),
        serving("o", "m1", "other"),
    )
    assert without(table, nodes("m2", "m3")) is table


def test_a_container_without_a_service_stays() -> None:
    table = a_table(serving("plain", "m2", ""), serving("t1", "m1", ""))
    assert without(table, nodes("m2")) is table


async def test_the_keeper_hands_on_what_is_left_and_then_all_again() -> None:
    part = Part()
    network_tables = some_tables(part)
    table = a_table(serving("t1", "m1"), serving("t2", "m2"))
    network_tables.update(received(table), 1)
    async with running(network_tables):
        await part.wait(lambda: part.tables)
        network_tables.exclude(Unreachable(plain=nodes("m2")))
        await part.wait(lambda: serves(part.tables[NetworkId("net")]) == {"t1"})
        assert network_tables.tables[NetworkId("net")] == table, "what the managers said is kept"
        network_tables.exclude(NONE_UNREACHABLE)
        await part.wait(lambda: part.tables[NetworkId("net")] == table)
        asked = len(part.asked)
        network_tables.exclude(NONE_UNREACHABLE)
        network_tables.exclude(Unreachable(plain=nodes("elsewhere")))
        await asyncio.sleep(0)
        assert len(part.asked) == asked, "nothing that concerns a network has changed"


async def test_a_removed_node_publishes_nothing_and_keeps_the_tables_of_other_networks() -> None:
    part = Part()
    network_tables = some_tables(part)
    service = TableService(
        id=ServiceId("web"), name="web", ports=(TablePort(protocol="tcp", published=8080, target=80),)
    )
    endpoint = serving("t1", "m1")
    overlay, ingress = (
        NetworkTable(
            head=NetworkHead(id=NetworkId(name), name=name, is_ingress=name == "ingress"),
            revision=1,
            endpoints={endpoint.task_id: endpoint},
            services={service.id: service},
        )
        for name in ("net", "ingress")
    )
    network_tables.update(received(overlay, ingress), 1)
    async with running(network_tables):
        await part.wait(lambda: part.tables.get(ingress.head.id) == ingress)
        network_tables.exclude(Unreachable(is_removed=True))
        await part.wait(lambda: not part.tables[ingress.head.id].services)
        assert part.tables[ingress.head.id].head == ingress.head
        assert part.tables[overlay.head.id] == overlay
        network_tables.exclude(NONE_UNREACHABLE)
        await part.wait(lambda: part.tables[ingress.head.id] == ingress)


class HandClock(SystemClock):
    """Time passes in ``sleep``; ``steps`` are executed at their seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        for _ in range(5):
            await asyncio.sleep(0)


async def watched(
    until_s: float,
    urgency: list[float] | None = None,
    removal: NodeRemoval | None = None,
    **happens: float,
) -> list[tuple[float, Unreachable]]:
    """What is left out, and when.

    ``gained``, ``lost``: times of a session; ``responses``: when m2 responds again; ``changes``: when another check of
    m2 changes its result.

    ``urgency``: gets the times at which probes became urgent, and were no longer.
    """
    clock = HandClock()
    session_state = SessionState(clock)
    said: list[tuple[float, Unreachable]] = []

    class Peers:
        @property
        def reports(self) -> Mapping[NodeId, PathReport]:
            responding = reports(w1=False)
            is_new = 0 <= clock.now - happens.get("changes", 1e9) < 4
            m2 = a_report(fails=clock.now < happens.get("responses", 1e9), rounds=1 if is_new else 2)
            return {**responding, NodeId("m2"): m2}

        def set_urgent(self, is_urgent: bool) -> None:
            if urgency is not None and is_urgent != (len(urgency) % 2 == 1):
                urgency.append(clock.now)

    def exclude(silence: Unreachable) -> None:
        if not said or said[-1][1] != silence:
            said.append((clock.now, silence))

    session_state.begin(CHANNEL)
    session_state.end()
    session_state.removal = removal
    task = asyncio.create_task(watch(session_state, Peers(), exclude, clock))
    for _ in range(5000):  # with a manager there is nothing to wait for, and no time passes
        if clock.now >= until_s or task.done():
            break
        if clock.now >= happens.get("gained", 1e9) and not session_state.has_session:
            session_state.begin(CHANNEL)
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    return [one for one in said if one[0] < until_s]


async def test_probes_count_only_after_a_time_without_a_manager() -> None:
    (first, *rest) = await watched(30)
    assert first == (LOST_SECONDS, Unreachable(plain=nodes("m2")))
    assert not rest


async def test_the_first_answer_brings_a_peer_back() -> None:
    assert await watched(30, responses=20) == [
        (LOST_SECONDS, Unreachable(plain=nodes("m2"))),
        (20, NONE_UNREACHABLE),
    ]


async def test_a_node_that_knows_its_removal_publishes_nothing_until_a_cluster_accepts_it() -> None:
    found = await watched(60, removal=NodeRemoval(), responses=0, gained=20)
    assert found == [
        (LOST_SECONDS, Unreachable(is_removed=True)),
        (found[1][0], NONE_UNREACHABLE),
    ]
    assert 20 <= found[1][0] <= 22
    kept = await watched(60, removal=NodeRemoval(keeps_containers=True), responses=0)
    assert {one for _, one in kept} == {NONE_UNREACHABLE}


async def test_a_managers_tables_win_when_they_are_fresh() -> None:
    (_, (at, last)) = await watched(60, gained=20)
    assert last == NONE_UNREACHABLE
    assert FRESH_SECONDS <= at - 20 <= FRESH_SECONDS + 2


async def test_peers_stay_excluded_until_a_leader_that_returned_has_marked_lost_nodes_down() -> None:
    (_, (at, _)) = await watched(60, gained=20)
    assert at - 20 > grace_after_absence(DEFAULT_PERIOD_S)


async def test_peers_stay_excluded_while_another_check_of_them_changes() -> None:
    """It changes on the new leader of ``skep cluster recover``, 5 s after its node's session has returned."""
    (_, (at, _)) = await watched(60, gained=20, changes=25)
    assert at - 20 > grace_after_absence(DEFAULT_PERIOD_S)


async def test_a_session_that_moves_leaves_no_node_out() -> None:
    assert not [one for _, one in await watched(40, gained=2) if one != NONE_UNREACHABLE]


async def test_probes_are_urgent_from_soon_after_the_loss_of_the_manager_until_there_is_one() -> None:
    urgency: list[float] = []
    await watched(60, urgency, gained=20)
    begun, ended = urgency
    assert URGENT_SECONDS <= begun < LOST_SECONDS
    assert 20 <= ended <= 22
    short: list[float] = []
    await watched(40, short, gained=1)
    assert short == [], "a session that moves costs no probe"
