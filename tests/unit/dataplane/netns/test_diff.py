"""Changes that bring a namespace to its wanted state, on a model of the kernel with the kernel's refusals."""

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.netns.diff import (
    AddLink,
    ChangeLink,
    DeleteLink,
    Operation,
    Put,
    Remove,
    SetSysctl,
    difference,
)
from skep.dataplane.netns.state import Address, EntryKind, Link, NamespaceState, NeighborEntry, Route, Vxlan

BRIDGES, DEVICES, PORTS = ("br0", "br1"), ("vx1", "vx2"), ("vs1", "vs2", "vs3")
MACS = ("02:42:0a:00:00:02", "02:42:0a:00:00:03")
NODES = ("192.0.2.1", "192.0.2.2")


class Kernel:
    """One namespace.  Raises AssertionError where the kernel would answer with an error, or do it wrongly."""

    def __init__(self, state: NamespaceState) -> None:
        self.links = dict(state.links)
        self.addresses = set(state.addresses)
        self.routes = set(state.routes)
        self.entries = set(state.entries)
        self.sysctls = dict(state.sysctls)

    @property
    def state(self) -> NamespaceState:
        return NamespaceState(
            links=self.links,
            addresses=frozenset(self.addresses),
            routes=frozenset(self.routes),
            entries=frozenset(self.entries),
            sysctls=self.sysctls,
        )

    def apply(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            self._do(operation)

    def _do(self, operation: Operation) -> None:
        match operation:
            case AddLink(link):
                assert link.name not in self.links, "EEXIST"
                assert not link.master or link.master in self.links, "ENODEV"
                self.links[link.name] = msgspec.structs.replace(link, peer=None)
                self.sysctls[f"net/ipv4/conf/{link.name}/rp_filter"] = "2"
            case ChangeLink(link):
                old = self.links[link.name]
                assert (old.kind, old.vxlan) == (link.kind, link.vxlan), "EOPNOTSUPP"
                assert not link.master or link.master in self.links, "ENODEV"
                if link.master and link.master != old.master:
                    self._leave_bridge(link.name)
                self.links[link.name] = msgspec.structs.replace(
                    link,
                    peer=None,
                    master=link.master or old.master,
                    mtu=link.mtu or old.mtu,
                    mac=link.mac or old.mac,
                    is_closed_port=link.is_closed_port or old.is_closed_port,
                )
            case DeleteLink(name):
                del self.links[name]
                self.addresses = {one for one in self.addresses if one.link != name}
                self.routes = {one for one in self.routes if one.link != name}
                self.entries = {one for one in self.entries if one.link != name}
                self.sysctls.pop(f"net/ipv4/conf/{name}/rp_filter", None)
                for port, link in self.links.items():
                    if link.master == name:
                        self._leave_bridge(port)
                        self.links[port] = msgspec.structs.replace(link, master="", is_closed_port=False)
            case SetSysctl(name, value):
                assert name in self.sysctls, "ENOENT"
                self.sysctls[name] = value
            case Put(item):
                assert item.link in self.links, "ENODEV"
                match item:
                    case NeighborEntry(EntryKind.PORT, link, mac):
                        bridge = self.links[link].master
                        assert bridge, "EINVAL: no port"
                        taken = {
                            one.mac
                            for one in self.entries
                            if one.kind is EntryKind.PORT and self.links[one.link].master == bridge
                        }
                        assert mac not in taken, "a bridge has one port for an address"
                    case NeighborEntry(EntryKind.FORWARD, link, mac):
                        # Written with NLM_F_REPLACE: a VXLAN device has one node for an address.
                        self.entries = {
                            one
                            for one in self.entries
                            if (one.kind, one.link, one.mac) != (EntryKind.FORWARD, link, mac)
                        }
                    case NeighborEntry(kind, link, mac, address):
                        key = mac if kind is EntryKind.FORWARD else address
                        held = {
                            one.mac if kind is EntryKind.FORWARD else one.address
                            for one in self.entries
                            if one.kind is kind and one.link == link
                        }
                        assert key not in held, "two answers to one question"
                self._held(item).add(item)
            case Remove(item):
                self._held(item).remove(item)

    def _leave_bridge(self, port: str) -> None:
        self.entries = {one for one in self.entries if not (one.kind is EntryKind.PORT and one.link == port)}

    def _held(
        self, item: Address | Route | NeighborEntry
    ) -> "set[Address] | set[Route] | set[NeighborEntry] | set[object]":
        match item:
            case NeighborEntry():
                return self.entries
            case Address():
                return self.addresses
            case _:
                return self.routes


@st.composite
def states(draw: st.DrawFn) -> NamespaceState:
    """A namespace that can be: entries only where they make sense, and one answer to each question."""
    bridges = draw(st.sets(st.sampled_from(BRIDGES), min_size=1))
    links = {
        name: Link(name=name, kind="bridge", mtu=draw(st.sampled_from((1400, 1450)))) for name in bridges
    }
    for name in draw(st.sets(st.sampled_from(DEVICES))):
        vxlan = Vxlan(vni=draw(st.integers(1, 2)), port=4789, local=draw(st.sampled_from(NODES)))
        links[name] = _port(draw, name, "vxlan", bridges, vxlan)
    for name in draw(st.sets(st.sampled_from(PORTS))):
        links[name] = _port(draw, name, "veth", bridges, None)
    entries: dict[object, NeighborEntry] = {}
    for name, link in links.items():
        for mac in draw(st.sets(st.sampled_from(MACS))) if link.kind != "bridge" else ():
            entries.setdefault((link.master, mac), NeighborEntry(EntryKind.PORT, name, mac))
            if link.kind == "vxlan":
                node, address = draw(st.sampled_from(NODES)), f"10.0.0.{draw(st.integers(2, 4))}"
                entries[(name, mac)] = NeighborEntry(EntryKind.FORWARD, name, mac, node)
                entries[(name, address)] = NeighborEntry(EntryKind.NEIGHBOR, name, mac, address)
    addresses = {
        Address(draw(st.sampled_from(sorted(bridges))), f"10.0.{number}.1/24")
        for number in draw(st.sets(st.integers(0, 3)))
    }
    routes = {
        Route(name, f"10.1.{number}.0/24")
        for number, name in draw(st.dictionaries(st.integers(0, 3), st.sampled_from(sorted(links)))).items()
    }
    return NamespaceState(
        links=links,
        addresses=frozenset(addresses),
        routes=frozenset(routes),
        entries=frozenset(entries.values()),
        sysctls={f"net/ipv4/conf/{name}/rp_filter": draw(st.sampled_from("012")) for name in links},
    )


def _port(draw: st.DrawFn, name: str, kind: str, bridges: set[str], vxlan: Vxlan | None) -> Link:
    return Link(
        name=name,
        kind=kind,
        mtu=draw(st.sampled_from((1400, 1450))),
        mac=draw(st.sampled_from(MACS)),
        master=draw(st.sampled_from(sorted(bridges))),
        is_up=draw(st.booleans()),
        is_closed_port=True,
        vxlan=vxlan,
    )


@given(wanted=states(), actual=states())
def test_applying_the_difference_gives_what_is_wanted(wanted: NamespaceState, actual: NamespaceState) -> None:
    kernel = Kernel(actual)
    kernel.apply(difference(wanted, actual))
    assert kernel.state == wanted
    assert difference(wanted, kernel.state) == []


@given(wanted=states(), actual=states())
def test_in_a_namespace_of_others_nothing_of_theirs_is_lost(
    wanted: NamespaceState, actual: NamespaceState
) -> None:
    operations = difference(wanted, actual, is_exclusive=False)
    assert not [one for one in operations if isinstance(one, Remove)]
    deleted = {one.name for one in operations if isinstance(one, DeleteLink)}
    assert deleted <= wanted.links.keys(), "only what has to be made anew is deleted"
    assert set(wanted.links) <= set(actual.links) | {
        one.link.name for one in operations if isinstance(one, AddLink)
    }


@given(wanted=states(), actual=states())
def test_what_goes_goes_before_anything_comes(wanted: NamespaceState, actual: NamespaceState) -> None:
    operations = difference(wanted, actual)
    comes = [isinstance(one, AddLink | Put | ChangeLink | SetSysctl) for one in operations]
    assert comes == sorted(comes)


@given(actual=states())
def test_nothing_wanted_leaves_nothing(actual: NamespaceState) -> None:
    kernel = Kernel(actual)
    kernel.apply(difference(NamespaceState(), actual))
    assert kernel.state == NamespaceState()


def test_a_sysctl_that_the_kernel_does_not_have_is_left_out() -> None:
    wanted = NamespaceState(sysctls={"net/bridge/bridge-nf-call-iptables": "0"})
    assert difference(wanted, NamespaceState()) == []


@pytest.mark.parametrize("change", [{"port": 4790}, {"vni": 2}, {"local": "192.0.2.9"}])
def test_a_vxlan_with_other_numbers_is_made_anew_with_all_that_is_on_it(change: dict[str, object]) -> None:
    old = Vxlan(vni=1, port=4789, local="192.0.2.1")
    device = Link(name="vx1", kind="vxlan", vxlan=old)
    entry = NeighborEntry(EntryKind.FORWARD, "vx1", MACS[0], NODES[1])
    new = msgspec.structs.replace(device, vxlan=msgspec.structs.replace(old, **change))
    actual = NamespaceState(links={"vx1": device}, entries=frozenset({entry}))
    wanted = NamespaceState(links={"vx1": new}, entries=frozenset({entry}))
    assert difference(wanted, actual) == [DeleteLink("vx1"), AddLink(new), Put(entry)]


def test_a_changed_device_is_not_set_to_the_address_it_has() -> None:
    """The kernel forgets a device's neighbors when its address is set, to the same one even."""
    link = Link(name="probe", kind="vxlan", mtu=1450, mac="02:42:0a:00:00:01", offloads=True)
    smaller = msgspec.structs.replace(link, mtu=1350)
    (change,) = difference(NamespaceState(links={"probe": smaller}), NamespaceState(links={"probe": link}))
    assert change == ChangeLink(msgspec.structs.replace(smaller, mac=""))
    other = msgspec.structs.replace(link, mac="02:42:0a:00:00:02")
    (change,) = difference(NamespaceState(links={"probe": other}), NamespaceState(links={"probe": link}))
    assert change == ChangeLink(other)


def test_checksum_offload_stays_unless_it_is_configured() -> None:
    link = Link(name="vx", kind="vxlan", offloads=False)
    as_it_is = msgspec.structs.replace(link, offloads=None)
    left = msgspec.structs.replace(link, offloads=True)
    assert difference(NamespaceState(links={"vx": as_it_is}), NamespaceState(links={"vx": link})) == []
    assert difference(NamespaceState(links={"vx": link}), NamespaceState(links={"vx": left})) == [
        ChangeLink(link)
    ]
