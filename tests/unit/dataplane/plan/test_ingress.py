"""What a node does for the routing mesh, as a function of the table."""

import re
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.ingress.flows import Misled, is_misled
from skep.dataplane.netns.conntrack import Tuple
from skep.dataplane.plan.ingress import Backend, Gate, MeshPort, Plan, plan, sticky_slots
from skep.dataplane.plan.ingress_tables import IPV4, IPV6, Family, difference, mesh_rules, whole
from skep.dataplane.plan.reply_routing import difference as path_difference
from skep.dataplane.plan.reply_routing import return_path, routes, uses_udp_route
from skep.dataplane.plan.reply_routing import whole as path_whole
from skep.dataplane.proxy.relays import RelayPort, relay_ports, sticky_slot
from skep.model.ids import NetworkId, NodeId, ServiceId, TaskId
from skep.model.publishing import PublishOptions
from skep.model.tables import (
    NetworkHead,
    Segment,
    Table,
    TableEndpoint,
    TableNode,
    TablePort,
    TableService,
)

N1, N2 = NodeId("n1"), NodeId("n2")
WEB, API = ServiceId("web"), ServiceId("api")


def endpoint(name: str, node: NodeId, address: str, *more: str, serving: bool = True) -> TableEndpoint:
    return TableEndpoint(
        task_id=TaskId(name), node_id=node, service_id=WEB, addresses=(address, *more), is_serving=serving
    )


def table(*endpoints: TableEndpoint, **options: object) -> Table:
    return Table(
        head=NetworkHead(
            id=NetworkId("ingress0"),
            name="ingress",
            is_ingress=True,
            segments=(Segment(subnet="10.0.0.0/24", gateway="10.0.0.1", vni=4096),),
        ),
        nodes={
            node: TableNode(id=node, underlay=f"192.0.2.{number}", addresses=(f"10.0.0.{200 + number}",))
            for number, node in enumerate((N1, N2), 1)
        },
        endpoints={one.task_id: one for one in endpoints},
        services={
            WEB: TableService(
                id=WEB,
                name="web",
                ports=(
                    TablePort(
                        protocol="tcp",
                        published=8080,
                        target=80,
                        options=msgspec.convert(options, PublishOptions),
                    ),
                ),
            )
        },
    )


def test_the_serving_tasks_of_all_nodes_stand_behind_a_port() -> None:
    made = plan(
        table(
            endpoint("t2", N2, "10.0.0.6"),
            endpoint("t1", N1, "10.0.0.5"),
            endpoint("t3", N1, "10.0.0.7", serving=False),
        ),
        N1,
    )
    assert made.ports == (
        MeshPort(
            protocol="tcp",
            published=8080,
            ipv4=(Backend(TaskId("t1"), "10.0.0.5", 80), Backend(TaskId("t2"), "10.0.0.6", 80)),
        ),
    )
    assert made.subnets == ("10.0.0.0/24",)
    assert made.gates == (Gate("10.0.0.201"), Gate("10.0.0.202"))
    assert made.own == Gate("10.0.0.201")


def test_the_nodes_own_tasks_come_first_where_that_is_wished() -> None:
    both = (endpoint("t1", N1, "10.0.0.5"), endpoint("t2", N2, "10.0.0.6"))
    own = plan(table(*both, prefers_local=True), N2).ports[0]
    assert [backend.task_id for backend in own.ipv4] == ["t2"]
    none = plan(table(both[0], prefers_local=True), N2).ports[0]
    assert [backend.task_id for backend in none.ipv4] == ["t1"]


def test_a_node_that_is_not_in_the_table_has_no_address_of_its_own() -> None:
    assert plan(table(), NodeId("new")).own == Gate("")


@pytest.mark.parametrize(
    "port",
    [
        TablePort(protocol="tcp", published=70000, target=80),
        TablePort(protocol="tcp", published=80, target=0),
        TablePort(protocol="icmp", published=80, target=80),
    ],
)
def test_a_port_that_cannot_be_keeps_no_other_from_being_published(port: TablePort) -> None:
    good = table(endpoint("t1", N1, "10.0.0.5"))
    service = good.services[WEB]
    both = msgspec.structs.replace(service, ports=(port, *service.ports))
    assert plan(msgspec.structs.replace(good, services={WEB: both}), N1) == plan(good, N1)


@pytest.mark.parametrize(
    ("host_ip", "ipv4", "ipv6", "only"),
    [
        ("", True, True, ""),
        ("0.0.0.0", True, False, ""),
        ("::", False, True, ""),
        ("127.0.0.1", True, False, "127.0.0.1"),
        ("::1", False, True, "::1"),
    ],
)
def test_an_address_says_which_family_answers(host_ip: str, ipv4: bool, ipv6: bool, only: str) -> None:
    port = MeshPort(protocol="tcp", published=1, options=PublishOptions(host_ip=host_ip))
    assert (port.answers_ipv4, port.answers_ipv6, port.only_address) == (ipv4, ipv6, only)


# --- rules ------------------------------------------------------------------------------------------------------------


def a_port(*names: str, published: int = 80, protocol: str = "tcp", **options: object) -> MeshPort:
    return MeshPort(
        protocol=protocol,
        published=published,
        options=msgspec.convert(options, PublishOptions),
        ipv4=tuple(Backend(TaskId(name), f"10.0.0.{name[1:]}", 8000) for name in sorted(names)),
    )


def test_a_port_goes_to_a_choice_among_as_many_as_there_are() -> None:
    rules = mesh_rules(Plan(ports=(a_port("t1", "t2", "t3"),)), IPV4)
    assert rules.counts == {3}
    assert rules.elements["ports"] == {"tcp . 80": "goto pick_3"}
    assert rules.elements["backends"] == {f"tcp . 80 . {n}": f"10.0.0.{n + 1}" for n in range(3)}
    assert rules.elements["targets"] == {"tcp . 80": "8000"}
    assert "numgen random mod 3 map @backends" in whole(rules, IPV4)


def test_a_change_of_backends_touches_elements_only() -> None:
    before = mesh_rules(Plan(ports=(a_port("t1", "t2"), a_port("t5", "t6", "t7", published=81))), IPV4)
    after = mesh_rules(Plan(ports=(a_port("t1", "t2", "t3"), a_port("t5", "t6", "t7", published=81))), IPV4)
    text = difference(before, after, IPV4)
    assert text.splitlines() == [
        "delete element ip skep_ingress ports { tcp . 80 }",
        "add element ip skep_ingress ports { tcp . 80 : goto pick_3 }",
        "add element ip skep_ingress backends { tcp . 80 . 2 : 10.0.0.3 }",
    ]
    assert difference(after, after, IPV4) == ""


def test_a_port_that_nobody_serves_is_refused_and_one_that_user_space_serves_is_led_nowhere() -> None:
    empty = Plan(ports=(a_port(), a_port(published=81, host_ip="127.0.0.1")))
    assert mesh_rules(empty, IPV4).elements["refused"] == {"tcp . 80": ""}
    assert mesh_rules(empty, IPV4).elements["bound_refused"] == {"127.0.0.1 . tcp . 81": ""}
    assert mesh_rules(empty, IPV6).elements["refused"] == {"tcp . 80": ""}
    assert mesh_rules(empty, IPV6).elements["bound_refused"] == {}
    proxied = mesh_rules(Plan(ports=(a_port("t1", proxy_protocol=2),)), IPV4)
    assert not any(proxied.elements.values())
    assert not any(mesh_rules(Plan(ports=(a_port("t1"),)), IPV6).elements.values())


ports = st.builds(
    lambda published, protocol, names, options: a_port(
        *names, published=published, protocol=protocol, **options
    ),
    st.integers(80, 83),
    st.sampled_from(["tcp", "udp", "sctp"]),
    st.sets(st.sampled_from([f"t{number}" for number in range(1, 7)])),
    st.fixed_dictionaries(
        {},
        optional={
            "host_ip": st.sampled_from(["", "127.0.0.1", "::1"]),
            "is_sticky": st.booleans(),
            "proxy_protocol": st.sampled_from([0, 1, 2]),
        },
    ),
)
plans = st.lists(ports, max_size=5, unique_by=lambda port: (port.protocol, port.published)).map(
    lambda chosen: Plan(ports=tuple(chosen))
)


class Kernel:
    """Applies texts to maps and chains as nftables does: what is added twice or removed unseen fails."""

    def __init__(self) -> None:
        self.elements: dict[str, dict[str, str]] = {}
        self.chains: set[str] = set()

    def run(self, text: str) -> None:
        for line in text.splitlines():
            if match := re.match(r"(add|delete) element \S+ \S+ (\w+) { (.*) }$", line):
                verb, name, listed = match.groups()
                held = self.elements.setdefault(name, {})
                for one in listed.split(", "):
                    key, _, value = one.partition(" : ")
                    if verb == "delete":
                        del held[key]
                    else:
                        assert key not in held
                        if value.startswith("goto "):
                            assert value.removeprefix("goto ") in self.chains
                        held[key] = value
            elif match := re.match(r"add chain \S+ \S+ (\w+)", line):
                self.chains.add(match[1])


@given(st.lists(plans, min_size=1, max_size=4), st.sampled_from([IPV4, IPV6]))
def test_any_row_of_changes_leads_to_what_the_last_plan_says(made: list[Plan], family: Family) -> None:
    kernel, fresh = Kernel(), Kernel()
    now = mesh_rules(made[0], family)
    kernel.run(whole(now, family))
    for one in made[1:]:
        wanted = mesh_rules(one, family)
        kernel.run(difference(now, wanted, family))
        now = msgspec.structs.replace(wanted, counts=wanted.counts | now.counts)
    fresh.run(whole(mesh_rules(made[-1], family), family))
    assert {name: held for name, held in kernel.elements.items() if held} == fresh.elements
    assert fresh.chains <= kernel.chains


# --- stickiness -------------------------------------------------------------------------------------------------------


@given(st.sets(st.integers(1, 250), min_size=2, max_size=20), st.data())
def test_only_the_slots_of_a_backend_that_goes_move(numbers: set[int], data: st.DataObject) -> None:
    backends = tuple(Backend(TaskId(f"t{number}"), f"10.0.0.{number}", 80) for number in sorted(numbers))
    gone = data.draw(st.sampled_from(backends))
    before = sticky_slots(backends)
    after = sticky_slots(tuple(one for one in backends if one != gone))
    assert gone not in after
    assert all(new == old for old, new in zip(before, after, strict=True) if old != gone)


def test_slots_are_spread_over_all_backends() -> None:
    backends = tuple(Backend(TaskId(f"task{number}"), "10.0.0.9", 80) for number in range(4))
    counts = Counter(sticky_slots(backends))
    assert all(30 <= counts[backend] <= 100 for backend in backends)
    assert sticky_slots(()) == ()


def test_a_clients_slot_is_always_the_same_and_clients_are_spread() -> None:
    slots = [sticky_slot(f"192.0.2.{number}") for number in range(256)]
    assert slots == [sticky_slot(f"192.0.2.{number}") for number in range(256)]
    assert len(set(slots)) > 100
    assert all(0 <= slot < 256 for slot in slots)


# --- the way back -----------------------------------------------------------------------------------------------------


def test_the_mark_of_a_connection_is_the_node_it_came_by() -> None:
    path = return_path(plan(table(), N1), "eth0", "172.18.0.9")
    text = path_whole(path)
    assert (
        "add element ip skep_return gates { 02:42:0a:00:00:c9 : 167772361, 02:42:0a:00:00:ca : 167772362 }"
        in text
    )
    assert (
        'iifname "eth0" ct state new ip saddr != { 10.0.0.0/24 } ct mark set ether saddr map @gates' in text
    )
    assert "meta l4proto udp dnat to 172.18.0.9" in text
    assert [(route.mark, route.gateway) for route in routes(path, 4)] == [
        (167772361, "10.0.0.201"),
        (167772362, "10.0.0.202"),
    ]
    assert routes(path, 6) == ()


def test_a_container_with_a_way_out_by_ipv6_answers_as_by_ipv4() -> None:
    """Its default route would choose another address for an answer over UDP."""
    own = Gate("10.0.0.201", "fd00::1")
    six = Plan(subnets=("10.0.0.0/24", "fd00::/64"), gates=frozenset({own}), own=own)
    without, having = (
        return_path(six, "eth0", "172.18.0.9"),
        return_path(six, "eth0", "172.18.0.9", "fd12::9"),
    )
    assert "reject with icmpv6 no-route" in path_whole(without)
    assert uses_udp_route(without)
    assert "ip6 saddr != { fd00::/64 } meta l4proto udp dnat to fd12::9" in path_whole(having)
    assert "reject" not in path_whole(having)
    assert not uses_udp_route(having)


def test_nodes_that_come_and_go_change_elements_only() -> None:
    before = return_path(plan(table(), N1), "eth0", "172.18.0.9")
    after = msgspec.structs.replace(before, gates=(Gate("10.0.0.201"), Gate("10.0.0.203", "fd00::3")))
    text = path_difference(before, after)
    assert text.splitlines()[:2] == [
        "delete element ip skep_return gates { 02:42:0a:00:00:ca }",
        "add element ip skep_return gates { 02:42:0a:00:00:cb : 167772363 }",
    ]
    assert path_difference(before, before) == ""
    assert [(route.mark, route.gateway) for route in routes(after, 6)] == [(167772363, "fd00::3")]
    moved = msgspec.structs.replace(before, interface="eth1")
    assert path_difference(before, moved) == path_whole(moved)


# --- flows and relays -------------------------------------------------------------------------------------------------

MISLED = Misled(53, frozenset({"10.0.0.5"}), ("10.0.0.0/24",))


@pytest.mark.parametrize(
    ("port", "answers_from", "is_one"),
    [
        (53, "10.0.0.5", False),  # serves
        (53, "10.0.0.6", True),  # served
        (53, "192.0.2.1", True),  # the node itself
        (53, "203.0.113.9", False),  # led elsewhere by somebody else
        (54, "10.0.0.6", False),
    ],
)
def test_a_flow_is_misled_when_its_task_serves_no_more(port: int, answers_from: str, is_one: bool) -> None:
    original = Tuple(17, "192.0.2.100", 4000, "192.0.2.1", port)
    assert is_misled(MISLED, original, Tuple(17, answers_from, 53, "192.0.2.100", 4000)) == is_one
    tcp = msgspec.structs.replace(original, protocol=6)
    assert not is_misled(MISLED, tcp, Tuple(6, answers_from, 53, "192.0.2.100", 4000))


def test_user_space_serves_ipv6_and_ports_with_headers() -> None:
    made = Plan(
        ports=(
            a_port("t1"),
            a_port("t1", published=81, proxy_protocol=1),
            a_port("t1", published=82, host_ip="127.0.0.1"),
            a_port("t1", published=83, protocol="sctp"),
        )
    )
    backends = (("10.0.0.1", 8000),)
    assert relay_ports(made) == (
        RelayPort(protocol="tcp", address="::", port=80, backends=backends),
        RelayPort(protocol="tcp", address="0.0.0.0", port=81, backends=backends, proxy_protocol=1),
        RelayPort(protocol="tcp", address="::", port=81, backends=backends, proxy_protocol=1),
    )
