"""What a node does for the routing mesh, as a function of the table."""

import re
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.dataplane.netns.nft_table import NftTable, changes, fresh, whole, with_spare_chains
from skep.dataplane.netns.state import Flow, Route, RoutingRule, Tuple
from skep.dataplane.plan.flows import StalePort, is_stale
from skep.dataplane.plan.ingress import (
    IPV4,
    IPV6,
    STICKY_SLOTS,
    Backend,
    Family,
    IngressNode,
    IngressPlan,
    MeshPort,
    ingress_table,
    lose_tcp_backends,
    plan,
    stale_ports,
    sticky_slots,
    unaccepted_ports,
)
from skep.dataplane.plan.reply_routing import IngressEndpoint, reply_routing
from skep.dataplane.proxy.relays import RelayPort, backend_order, relay_ports, sticky_slot
from skep.model.networks.publishing import PublishOptions
from skep.model.networks.tables import (
    NetworkHead,
    NetworkTable,
    Segment,
    TableEndpoint,
    TableNode,
    TablePort,
    TableService,
    TableSplit,
)
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId

N1, N2 = NodeId("n1"), NodeId("n2")
WEB, API = ServiceId("web"), ServiceId("api")


def endpoint(name: str, node: NodeId, address: str, *more: str, serving: bool = True) -> TableEndpoint:
    return TableEndpoint(
        task_id=TaskId(name), node_id=node, service_id=WEB, addresses=(address, *more), is_serving=serving
    )


def table(*endpoints: TableEndpoint, **options: object) -> NetworkTable:
    return NetworkTable(
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
    assert made.nodes == (IngressNode("10.0.0.201"), IngressNode("10.0.0.202"))
    assert made.own == IngressNode("10.0.0.201")


def test_with_the_label_for_local_tasks_the_nodes_own_come_first() -> None:
    both = (endpoint("t1", N1, "10.0.0.5"), endpoint("t2", N2, "10.0.0.6"))
    own = plan(table(*both, prefers_local=True), N2).ports[0]
    assert [backend.task_id for backend in own.ipv4] == ["t2"]
    none = plan(table(both[0], prefers_local=True), N2).ports[0]
    assert [backend.task_id for backend in none.ipv4] == ["t1"]


def split_at(percent: int, **options: object) -> NetworkTable:
    """Return a table with the new task t4 on N2, and old tasks on both nodes."""
    made = table(
        endpoint("t1", N1, "10.0.0.1"),
        endpoint("t2", N1, "10.0.0.2"),
        endpoint("t3", N2, "10.0.0.3"),
        replace(endpoint("t4", N2, "10.0.0.4"), version=2),
        **options,
    )
    return replace(made, services={WEB: replace(made.services[WEB], split=TableSplit(percent, (2,)))})


def test_new_tasks_of_a_staged_update_have_a_share_of_their_own() -> None:
    (port,) = plan(split_at(5), N1).ports
    assert ([one.task_id for one in port.ipv4 if one.is_new], port.percent) == (["t4"], 5)
    text = whole(ingress_table(held(port), IPV4))
    chain = [line.partition("pick_3_1_5 ")[2] for line in text.splitlines() if "rule" in line]
    first, second = filter(None, chain)
    assert first.startswith("numgen random mod 100 < 5 dnat")
    assert "mod 1 offset 32768" in first
    assert "numgen random mod 3 map" in second
    (without,) = plan(split_at(0), N1).ports
    assert [one.task_id for one in without.ipv4] == ["t1", "t2", "t3"]


def test_a_share_is_the_same_on_each_node_where_local_tasks_come_first() -> None:
    (port,) = plan(split_at(5, prefers_local=True), N1).ports
    assert [(one.task_id, one.is_new) for one in port.ipv4] == [("t1", False), ("t2", False), ("t4", True)]


def test_clients_of_a_sticky_port_change_to_new_tasks_and_never_back() -> None:
    before: set[int] = set()
    for percent in (5, 25, 60):
        (port,) = plan(split_at(percent, is_sticky=True), N1).ports
        slots = sticky_slots(port.ipv4, port.percent)
        new = {slot for slot, one in enumerate(slots) if one.is_new}
        assert len(new) == round(STICKY_SLOTS * percent / 100)
        assert before <= new
        before = new


def test_a_relayed_port_has_the_same_share() -> None:
    (port,) = plan(split_at(25, proxy_protocol=1), N1).ports
    relay = relay_ports(held(port))[0]
    firsts = []
    for number in range(100):
        drawn = iter((number / 100, 0.5))
        order = backend_order(relay, "192.0.2.1", lambda drawn=drawn: next(drawn))  # type: ignore[misc]
        assert len(order) == 4, "the others follow in case it cannot be reached"
        firsts.append(order[0])
    assert firsts.count(("10.0.0.4", 80)) == 25


def test_a_node_that_is_not_in_the_table_has_no_address_of_its_own() -> None:
    assert plan(table(), NodeId("new")).own == IngressNode("")


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
    ("host_ip", "addresses"),
    [("", ["", "::"]), ("0.0.0.0", [""]), ("::", ["::"]), ("127.0.0.1", ["127.0.0.1"]), ("::1", ["::1"])],
)
def test_an_address_says_by_which_sockets_a_port_is_held(host_ip: str, addresses: list[str]) -> None:
    port = MeshPort(protocol="tcp", published=1, options=PublishOptions(host_ip=host_ip))
    assert list(port.keys) == [("tcp", 1, address) for address in addresses]


# --- rules ------------------------------------------------------------------------------------------------------------


def a_port(*names: str, published: int = 80, protocol: str = "tcp", **options: object) -> MeshPort:
    return MeshPort(
        protocol=protocol,
        published=published,
        options=msgspec.convert(options, PublishOptions),
        ipv4=tuple(Backend(TaskId(name), f"10.0.0.{name[1:]}", 8000) for name in sorted(names)),
    )


def held(*ports: MeshPort, subnets: tuple[str, ...] = ()) -> IngressPlan:
    """A plan whose ports the node holds."""
    return IngressPlan(
        ports=ports, subnets=subnets, held=frozenset(key for port in ports for key in port.keys)
    )


def elements_of(table: NftTable) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, element in table.elements:
        found.setdefault(name, set()).add(element)
    return found


def test_a_port_goes_to_a_choice_among_as_many_as_there_are() -> None:
    made = ingress_table(held(a_port("t1", "t2", "t3")), IPV4)
    assert ("pick_3", "") in made.chains
    assert elements_of(made) == {
        "ports": {"tcp . 80 : goto pick_3"},
        "backends": {f"tcp . 80 . {n} : 10.0.0.{n + 1}" for n in range(3)},
        "targets": {"tcp . 80 : 8000"},
    }
    assert "numgen random mod 3 map @backends" in whole(made)


def test_a_change_of_backends_touches_elements_only() -> None:
    before = ingress_table(held(a_port("t1", "t2"), a_port("t5", "t6", "t7", published=81)), IPV4)
    wanted = held(a_port("t1", "t2", "t3"), a_port("t5", "t6", "t7", published=81))
    after = with_spare_chains(before, ingress_table(wanted, IPV4))
    assert ("pick_2", "") in after.chains
    assert changes(before, after).splitlines() == [
        "delete element ip skep_ingress ports { tcp . 80 }",
        "add element ip skep_ingress backends { tcp . 80 . 2 : 10.0.0.3 }",
        "add element ip skep_ingress ports { tcp . 80 : goto pick_3 }",
    ]
    assert changes(after, after) == ""


def test_a_port_without_backends_is_refused_and_a_relayed_one_is_not_redirected() -> None:
    empty = held(a_port(), a_port(published=81, host_ip="127.0.0.1"))
    assert elements_of(ingress_table(empty, IPV4)) == {
        "refused": {"tcp . 80"},
        "bound_refused": {"127.0.0.1 . tcp . 81"},
    }
    assert elements_of(ingress_table(empty, IPV6)) == {"refused": {"tcp . 80"}}
    proxied = ingress_table(held(a_port("t1", proxy_protocol=2)), IPV4)
    assert not proxied.elements
    assert not ingress_table(held(a_port("t1")), IPV6).elements


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
    lambda chosen: held(*chosen)
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
            elif line.startswith(("create table", "delete table")):
                self.elements, self.chains = {}, set()
            elif match := re.match(r"add chain \S+ \S+ (\w+)", line):
                self.chains.add(match[1])


@given(st.lists(plans, min_size=1, max_size=4), st.sampled_from([IPV4, IPV6]))
def test_any_row_of_changes_leads_to_what_the_last_plan_says(made: list[IngressPlan], family: Family) -> None:
    kernel, direct = Kernel(), Kernel()
    now = ingress_table(made[0], family)
    kernel.run(fresh(now))
    for one in made[1:]:
        wanted = with_spare_chains(now, ingress_table(one, family))
        assert "delete table" not in changes(now, wanted)
        kernel.run(changes(now, wanted))
        now = wanted
    direct.run(whole(ingress_table(made[-1], family)))
    assert {name: held for name, held in kernel.elements.items() if held} == direct.elements
    assert direct.chains <= kernel.chains


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


# --- reply routing ----------------------------------------------------------------------------------------------------


def test_the_mark_of_a_connection_is_the_node_it_came_by() -> None:
    state, (table4, _) = reply_routing(plan(table(), N1), IngressEndpoint("eth0", "172.18.0.9"))
    assert table4.elements == {
        ("gates", "02:42:0a:00:00:c9 : 167772361"),
        ("gates", "02:42:0a:00:00:ca : 167772362"),
    }
    text = whole(table4)
    assert (
        'iifname "eth0" ip saddr != { 10.0.0.0/24 } ct state new ct mark set ether saddr map @gates' in text
    )
    assert "meta l4proto udp dnat to 172.18.0.9" in text
    assert state.rules == {RoutingRule(4, 1042, mark, mark) for mark in (167772361, 167772362)}
    assert state.routes == {
        Route("eth0", "0.0.0.0/0", "10.0.0.201", table=167772361),
        Route("eth0", "0.0.0.0/0", "10.0.0.202", table=167772362),
    }


def test_a_container_with_a_default_route_by_ipv6_replies_as_by_ipv4() -> None:
    """Its default route would choose another address for a reply over UDP."""
    own = IngressNode("10.0.0.201", "fd00::1")
    six = IngressPlan(subnets=("10.0.0.0/24", "fd00::/64"), nodes=(own,), own=own)
    without, (_, refusing) = reply_routing(six, IngressEndpoint("eth0", "172.18.0.9"))
    having, (_, leading) = reply_routing(six, IngressEndpoint("eth0", "172.18.0.9", "fd12::9"))
    assert "reject with icmpv6 no-route" in whole(refusing)
    assert RoutingRule(6, 32999, 1042, protocol=17) in without.rules
    assert "ip6 saddr != { fd00::/64 } meta l4proto udp dnat to fd12::9" in whole(leading)
    assert "reject" not in whole(leading)
    assert not any(rule.protocol for rule in having.rules)


def test_nodes_that_come_and_go_change_elements_only() -> None:
    endpoint, made = IngressEndpoint("eth0", "172.18.0.9"), plan(table(), N1)
    moved = msgspec.structs.replace(
        made, nodes=(IngressNode("10.0.0.201"), IngressNode("10.0.0.203", "fd00::3"))
    )
    _, (before, _) = reply_routing(made, endpoint)
    state, (after, _) = reply_routing(moved, endpoint)
    assert changes(before, after).splitlines() == [
        "delete element ip skep_return gates { 02:42:0a:00:00:ca }",
        "add element ip skep_return gates { 02:42:0a:00:00:cb : 167772363 }",
    ]
    assert changes(before, before) == ""
    assert Route("eth0", "::/0", "fd00::3", table=167772363) in state.routes
    _, (other, _) = reply_routing(made, IngressEndpoint("eth1", "172.18.0.9"))
    assert changes(before, other) == whole(other)


# --- flows and relays -------------------------------------------------------------------------------------------------


def held_flow(port: int, answers_from: str, *, by: str = "192.0.2.1", from_port: int = 53) -> Flow:
    original = Tuple(17, "192.0.2.100", 4000, by, port)
    return Flow(original, Tuple(17, answers_from, from_port, "192.0.2.100", 4000), b"")


STALE = StalePort(53, frozenset({("10.0.0.5", 53)}), ("10.0.0.0/24",))


def is_local(address: str) -> bool:
    return address.startswith("192.0.2.")


@pytest.mark.parametrize(
    ("port", "answers_from", "from_port", "expected"),
    [
        (53, "10.0.0.5", 53, False),  # serves
        (53, "10.0.0.5", 54, True),  # the task's port before an update
        (53, "10.0.0.6", 53, True),  # served
        (53, "192.0.2.1", 53, True),  # the node itself
        (53, "203.0.113.9", 53, False),  # led elsewhere by another program
        (54, "10.0.0.6", 53, False),
    ],
)
def test_a_flow_is_stale_when_its_task_serves_no_more(
    port: int, answers_from: str, from_port: int, expected: bool
) -> None:
    flow = held_flow(port, answers_from, from_port=from_port)
    assert is_stale(flow, [STALE], is_local) == expected
    of_tcp = msgspec.structs.replace(flow, original=msgspec.structs.replace(flow.original, protocol=6))
    assert not is_stale(of_tcp, [STALE], is_local)


def test_flows_by_another_address_than_the_ports_own_are_left_alone() -> None:
    bound = msgspec.structs.replace(STALE, address="192.0.2.1")
    assert is_stale(held_flow(53, "10.0.0.6"), [bound], is_local)
    assert not is_stale(held_flow(53, "10.0.0.6", by="192.0.2.2"), [bound], is_local)


def test_flows_are_looked_for_where_a_udp_port_is_new_or_lost_a_backend() -> None:
    one, both = a_port("t1", protocol="udp"), a_port("t1", "t2", protocol="udp")
    tcp = a_port("t1", published=81)
    assert stale_ports(None, held(one, tcp), 4) == (StalePort(80, frozenset({("10.0.0.1", 8000)}), ()),)
    assert stale_ports(held(one), held(both), 4) == ()
    assert stale_ports(held(both), held(one), 4) != ()
    none = a_port(protocol="udp")
    assert stale_ports(held(none), held(none), 4) == ()
    assert stale_ports(held(none), held(one), 4) != (), "a client on the node was refused, and has a flow"


def test_flows_of_a_udp_port_that_is_not_published_any_more_are_stale_whatever_their_task() -> None:
    subnets = ("10.0.0.0/24",)
    before = held(a_port("t1", protocol="udp"), a_port("t1", published=81), subnets=subnets)
    for after in (IngressPlan(), held(a_port("t1"), subnets=("10.0.9.0/24",))):
        assert stale_ports(before, after, 4) == (StalePort(80, frozenset(), subnets),)


def test_flows_are_judged_by_the_addresses_on_which_a_port_is_published_now() -> None:
    subnets = ("10.0.0.0/24",)
    everywhere = held(a_port("t1", protocol="udp"), subnets=subnets)
    bound = held(a_port("t1", protocol="udp", host_ip="192.0.2.1"), subnets=subnets)
    by_it, by_another = (
        held_flow(80, "10.0.0.1", by=by, from_port=8000) for by in ("192.0.2.1", "192.0.2.2")
    )
    narrowed, widened = stale_ports(everywhere, bound, 4), stale_ports(bound, everywhere, 4)
    assert [is_stale(one, narrowed, is_local) for one in (by_it, by_another)] == [False, True]
    assert not any(is_stale(one, widened, is_local) for one in (by_it, by_another))


def test_flows_to_a_task_on_the_former_ingress_network_are_stale() -> None:
    """A node may get the table of the removed network and of the new one in a single message."""
    before = held(a_port("t1", protocol="udp"), subnets=("10.0.0.0/24",))
    after = held(a_port("t2", protocol="udp"), subnets=("10.9.0.0/24",))
    flow = held_flow(80, "10.0.0.1", from_port=8000)
    assert is_stale(flow, stale_ports(before, after, 4), is_local)


def test_flows_of_a_family_that_the_node_does_not_hold_are_left_alone() -> None:
    """A program of the machine answers there."""
    port = a_port("t1", protocol="udp")
    half = msgspec.structs.replace(held(port), held=frozenset({("udp", 80, "")}))
    assert stale_ports(None, half, 4) != ()
    assert stale_ports(None, half, 6) == ()
    assert stale_ports(held(port), half, 6) == (StalePort(80, frozenset(), ()),)


def test_connections_that_a_removed_backend_has_not_accepted_are_stale() -> None:
    subnets = ("10.0.0.0/24",)
    both, one = (held(a_port(*names), subnets=subnets) for names in (("t1", "t2"), ("t1",)))
    assert [lose_tcp_backends(*plans) for plans in ((both, one), (one, both), (one, one))] == [
        True,
        False,
        False,
    ]
    assert not lose_tcp_backends(held(a_port("t1", "t2", protocol="udp")), held(a_port("t1", protocol="udp")))
    assert unaccepted_ports(held(a_port()), 4) == (), "every connection is refused"
    flow = held_flow(80, "10.0.0.2", from_port=8000)
    flow = msgspec.structs.replace(flow, original=msgspec.structs.replace(flow.original, protocol=6))
    sent = msgspec.structs.replace(flow, is_answered=False)
    found = [
        is_stale(tried, unaccepted_ports(plan, 4), is_local) for plan in (both, one) for tried in (flow, sent)
    ]
    assert found == [False, False, False, True], "accepted connections keep their backend"


def test_user_space_serves_ipv6_and_ports_with_headers() -> None:
    made = held(
        a_port("t1"),
        a_port("t1", published=81, proxy_protocol=1),
        a_port("t1", published=82, host_ip="127.0.0.1"),
        a_port("t1", published=83, protocol="sctp"),
    )
    backends = (("10.0.0.1", 8000),)
    assert relay_ports(made) == (
        RelayPort(protocol="tcp", address="::", port=80, backends=backends),
        RelayPort(protocol="tcp", address="0.0.0.0", port=81, backends=backends, proxy_protocol=1),
        RelayPort(protocol="tcp", address="::", port=81, backends=backends, proxy_protocol=1),
    )
