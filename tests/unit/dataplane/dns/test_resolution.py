"""What names stand for."""

import socket
from collections.abc import Sequence
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.dataplane.dns.index import Index
from skep.dataplane.dns.resolution import Decision, Foreign, FoundName, Missing, decide, links_of, rotated
from skep.dataplane.plan.vip import vip_backends
from skep.model.networks.dns_messages import AAAA, MX, PTR, SRV, A, Query, encoded
from skep.model.networks.tables import NetworkTable
from skep.model.values.ids import NetworkId, ServiceId
from tests.support.networks.tables import a_container, a_network, a_served

TXT = 16
FRONT = a_network(
    a_served(
        "web", "10.0.1.2", ["10.0.1.3", "10.0.1.4"], aliases=["www"], starting=["10.0.1.5"], unhealthy=["10.0.1.6"]
    ),
    a_served("rr", (), ["10.0.1.10", "10.0.1.11", "10.0.1.12"], unhealthy=["10.0.1.13"]),
    a_served("idle", "10.0.1.20"),
    a_served("away", (), [], unhealthy=["10.0.1.21"]),
    a_served("both", ["10.0.1.30", "fd00::30"], [("10.0.1.31", "fd00::31")]),
    containers=[a_container("Tool", "10.0.1.40", aliases=["hammer"])],
)  # fmt: skip
BACK = a_network(
    a_served("web", "10.0.2.2", ["10.0.2.3"]),
    a_served("db", "10.0.2.4", ["10.0.2.5"]),
    name="back",
    subnets=["10.0.2.0/24"],
)


def decided(
    name: str, type: int = A, *, tables: Sequence[NetworkTable] = (FRONT, BACK), rng: float = 0
) -> Decision:
    return decide(Query(1, 0, name, type, 1, b""), [Index(table) for table in tables], rng)


def found(
    name: str, type: int = A, *, tables: Sequence[NetworkTable] = (FRONT, BACK), rng: float = 0
) -> FoundName:
    decision = decided(name, type, tables=tables, rng=rng)
    assert isinstance(decision, FoundName), decision
    return decision


def addresses(
    name: str, type: int = A, *, tables: Sequence[NetworkTable] = (FRONT, BACK), rng: float = 0
) -> list[str]:
    family = socket.AF_INET6 if type == AAAA else socket.AF_INET
    answers = found(name, type, tables=tables, rng=rng).answers
    return [socket.inet_ntop(family, record.data) for record in answers]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("web", ["10.0.1.2"]),
        ("www", ["10.0.1.2"]),
        ("web.front", ["10.0.1.2"]),
        ("web.back", ["10.0.2.2"]),
        ("tasks.web", ["10.0.1.3", "10.0.1.4"]),
        ("tasks.www", ["10.0.1.3", "10.0.1.4"]),
        ("tasks.web.back", ["10.0.2.3"]),
        ("all.tasks.web", ["10.0.1.3", "10.0.1.4", "10.0.1.6"]),
        ("1.web", ["10.0.1.3"]),
        ("2.www.front", ["10.0.1.4"]),
        ("web.1.t1", ["10.0.1.3"]),
        ("web.1.t1.front", ["10.0.1.3"]),
        ("rr", ["10.0.1.10", "10.0.1.11", "10.0.1.12"]),
        ("all.tasks.rr", ["10.0.1.10", "10.0.1.11", "10.0.1.12", "10.0.1.13"]),
        ("idle", ["10.0.1.20"]),
        ("tool", ["10.0.1.40"]),
        ("hammer.front", ["10.0.1.40"]),
        ("db", ["10.0.2.4"]),
    ],
)
def test_names_stand_for_addresses(name: str, expected: list[str]) -> None:
    assert addresses(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("web", ["10.0.1.2"]),
        ("tasks.web", ["10.0.1.3", "10.0.1.4", "10.0.1.6"]),
        ("rr", ["10.0.1.10", "10.0.1.11", "10.0.1.12", "10.0.1.13"]),
        ("away", ["10.0.1.21"]),
        ("1.away", ["10.0.1.21"]),
    ],
)
def test_names_of_tasks_resolve_before_they_are_healthy_where_their_service_wants_that(
    name: str, expected: list[str]
) -> None:
    early = {
        id: replace(one, is_named_early=one.is_running and not one.is_serving)
        for id, one in FRONT.endpoints.items()
    }
    assert addresses(name, tables=[replace(FRONT, endpoints=early)]) == expected
    srv = found("_80._tcp.web", SRV, tables=[replace(FRONT, endpoints=early)])
    assert len(srv.answers) == 2  # those that serve


@pytest.mark.parametrize("name", ["3.web", "4.web", "web.4.t4", "away", "tasks.away", "tasks.idle"])
def test_what_does_not_serve_is_known_and_has_no_address(name: str) -> None:
    assert addresses(name) == []


@pytest.mark.parametrize("name", ["9.web", "9.www.front", "77.rr"])
def test_a_slot_that_there_is_not_is_missing_at_once(name: str) -> None:
    assert decided(name) == Missing()


def test_a_link_is_a_name_of_one_container_alone_on_its_network() -> None:
    links = {FRONT.head.id: links_of(["/Tool:Friend", "web"])}
    indices = [Index(table) for table in (BACK, FRONT)]

    def linked(name: str) -> Decision:
        return decide(Query(1, 0, name, A, 1, b""), indices, 0, links)

    for name in ("friend", "friend.front"):
        answer = linked(name)
        assert isinstance(answer, FoundName)
        assert [socket.inet_ntop(socket.AF_INET, one.data) for one in answer.answers] == ["10.0.1.40"]
    assert isinstance(linked("friend.back"), Foreign)
    assert isinstance(decided("friend"), Foreign)


def test_the_first_network_that_has_a_name_answers() -> None:
    assert addresses("web", tables=(BACK, FRONT)) == ["10.0.2.2"]


SIX = a_network(
    a_served("web", ["fd00:2::2"], ["fd00:2::3"]),
    a_served("idle", (), []),
    name="six",
    subnets=["fd00:2::/64"],
)


@pytest.mark.parametrize("name", ["web", "1.web", "tasks.web"])
def test_a_name_without_addresses_of_the_ip_version_is_asked_for_on_the_next_network(name: str) -> None:
    both_orders = ((FRONT, BACK, SIX), (SIX, FRONT, BACK))
    four, six = {
        "web": (["10.0.1.2"], ["fd00:2::2"]),
        "1.web": (["10.0.1.3"], ["fd00:2::3"]),
        "tasks.web": (["10.0.1.3", "10.0.1.4"], ["fd00:2::3"]),
    }[name]
    for tables in both_orders:
        assert addresses(name, AAAA, tables=tables) == six
        assert addresses(name, tables=tables) == four


def test_the_name_of_one_network_is_asked_for_there_alone() -> None:
    assert found("web.front", AAAA, tables=(FRONT, SIX)) == FoundName()
    assert addresses("web.six", AAAA, tables=(FRONT, SIX)) == ["fd00:2::2"]
    assert found("2.web", AAAA, tables=(FRONT, SIX)) == FoundName()  # of the second, which has one slot


def test_a_name_without_any_address_is_not_asked_for_on_the_next_network() -> None:
    assert found("idle", tables=(SIX, FRONT)) == FoundName()


@pytest.mark.parametrize("type", [AAAA, MX, TXT, SRV])
def test_a_name_of_ours_is_never_asked_for_elsewhere(type: int) -> None:
    assert found("web", type) == FoundName()
    assert found("1.web", type).answers == ()


def test_both_families_have_their_own_answers() -> None:
    assert addresses("both") == ["10.0.1.30"]
    assert addresses("both", AAAA) == ["fd00::30"]
    assert addresses("tasks.both", AAAA) == ["fd00::31"]
    assert [len(record.data) for record in found("both", 255).answers] == [4, 16]


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("2.1.0.10.in-addr.arpa", "web.front"),
        ("2.2.0.10.in-addr.arpa", "web.back"),
        ("3.1.0.10.in-addr.arpa", "web.1.t1.front"),
        ("6.1.0.10.in-addr.arpa", "web.4.t4.front"),
        ("40.1.0.10.in-addr.arpa", "Tool.front"),
        (".".join(reversed("fd00" + "0" * 26 + "31")) + ".ip6.arpa", "both.1.t1.front"),
    ],
)
def test_addresses_have_names(address: str, name: str) -> None:
    assert [record.data for record in found(address, PTR).answers] == [encoded(name)]


def test_a_reverse_lookup_of_an_unused_network_address_fails_at_once() -> None:
    assert decided("99.1.0.10.in-addr.arpa", PTR) == Missing()
    assert decided("1.2.0.192.in-addr.arpa", PTR) == Foreign(is_single_label=False)
    assert decided("10.in-addr.arpa", PTR) == Foreign(is_single_label=False), "a part of an address"
    assert decided("x.1.0.10.in-addr.arpa", PTR) == Foreign(is_single_label=False)


def test_a_port_of_a_service_is_found_at_its_tasks() -> None:
    answer = found("_8080._tcp.web.front", SRV)
    assert [record.data for record in answer.answers] == [
        b"\0\0\0\0\x1f\x90" + encoded("web.1.t1.front"),
        b"\0\0\0\0\x1f\x90" + encoded("web.2.t2.front"),
    ]
    assert [socket.inet_ntoa(record.data) for record in answer.extra] == ["10.0.1.3", "10.0.1.4"]
    assert decided("_0._tcp.web", SRV) == Foreign(is_single_label=False)
    assert decided("_99999._tcp.web", SRV) == Foreign(is_single_label=False)
    assert decided("_http._tcp.elsewhere", SRV) == Foreign(is_single_label=False)


@pytest.mark.parametrize(
    ("name", "single"), [("wbe", True), ("example.com", False), ("web.elsewhere", False), ("", False)]
)
def test_the_rest_is_foreign(name: str, single: bool) -> None:
    assert decided(name) == Foreign(is_single_label=single)


@pytest.mark.parametrize("is_door", [False, True])
def test_networks_whose_tasks_open_no_connections_have_no_names(is_door: bool) -> None:
    web = a_served("web", "10.0.0.2", ["10.0.0.3"])
    network = a_network(web, name="shared", is_ingress=not is_door, is_door=is_door)
    assert decided("web", tables=(network,)) == Foreign(is_single_label=True)
    assert addresses("web", tables=(network, FRONT)) == ["10.0.1.2"]
    assert vip_backends(network) == {}


def test_an_answer_with_a_virtual_address_names_its_service() -> None:
    virtual = frozenset({(NetworkId("id-front"), ServiceId("id-web"))})
    assert found("www").virtual == virtual
    assert found("2.1.0.10.in-addr.arpa", PTR).virtual == virtual
    assert found("www", AAAA).virtual == frozenset(), "there was nothing to give"
    assert found("tasks.web").virtual == frozenset()
    assert found("rr").virtual == frozenset()


def test_a_name_of_two_services_stands_for_both() -> None:
    shared = a_network(
        a_served("blue", "10.0.1.2", aliases=["app"]), a_served("green", "10.0.1.3", aliases=["app"])
    )
    assert addresses("app", tables=(shared,)) == ["10.0.1.2", "10.0.1.3"]
    assert len(found("app", tables=(shared,)).virtual) == 2


def test_what_is_no_address_is_left_out() -> None:
    broken = a_network(a_served("web", (), ["10.0.1.3", "10.0.1.400"]), subnets=["nowhere"])
    assert addresses("web", tables=(broken,)) == ["10.0.1.3"]
    assert decided("9.1.0.10.in-addr.arpa", PTR, tables=(broken,)) == Foreign(is_single_label=False)


def test_each_address_comes_first_as_often_as_the_others() -> None:
    firsts = [addresses("rr", rng=number / 300)[0] for number in range(300)]
    assert {firsts.count(address) for address in firsts} == {100}


@given(st.lists(st.integers()), st.floats(0, 1, exclude_max=True))
def test_rotating_loses_nothing(values: list[int], rng: float) -> None:
    turned = rotated(tuple(values), rng)
    assert any(turned == tuple(values[start:] + values[:start]) for start in range(len(values) + 1))


names = st.text("abw.1_", max_size=12) | st.sampled_from(
    ["web", "tasks.web", "all.tasks.www", "1.web", "both", "rr.front", "tool", "web.1.t1", "tasks.rr", "2.rr"]
)


@given(names, st.sampled_from([A, AAAA, PTR, SRV, MX, TXT, 255]), st.floats(0, 1, exclude_max=True))
def test_addresses_given_away_are_the_tables(name: str, type: int, rng: float) -> None:
    """Whatever is asked: only addresses of tasks that run, or of services, and virtual ones are owned up to."""
    decision = decided(name, type, rng=rng)
    if not isinstance(decision, FoundName) or type == PTR:
        return
    given_away = {
        socket.inet_ntop(socket.AF_INET6 if record.type == AAAA else socket.AF_INET, record.data)
        for record in chain(decision.answers, decision.extra)
        if record.type in (A, AAAA)
    }
    running = {a for t in (FRONT, BACK) for e in t.endpoints.values() if e.is_running for a in e.addresses}
    virtual = {a: s.id for t in (FRONT, BACK) for s in t.services.values() for a in s.virtual_ips}
    assert given_away <= running | virtual.keys()
    assert {virtual[one] for one in given_away & virtual.keys()} == {id for _, id in decision.virtual}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("web", ["10.0.1.2"]),
        ("www", ["10.0.1.2"]),
        ("rr", ["10.0.1.3"]),
        ("idle", []),
        ("tasks.web", ["10.0.1.5"]),
        ("1.web", ["10.0.1.5"]),
        ("web.1.t1", ["10.0.1.5"]),
        ("other", ["10.0.1.40"]),
    ],
)
def test_a_container_does_not_get_the_connections_of_a_service(name: str, expected: Sequence[str]):
    """Any node that may attach one to the network gives it whatever aliases it likes."""
    names = ["web", "www", "RR", "idle", "tasks.web", "1.web", "web.1.t1", "other"]
    network = a_network(
        a_served("web", "10.0.1.2", ["10.0.1.5"], aliases=["www"]),
        a_served("rr", (), ["10.0.1.3"]),
        a_served("idle", (), []),
        containers=[a_container("thief", "10.0.1.40", aliases=names)],
    )
    assert addresses(name, tables=[network]) == expected
