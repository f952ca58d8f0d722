"""Virtual addresses as rules: the difference to what a namespace has, played on a model of nftables."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.dataplane.netns.nft_table import absent, fresh
from skep.dataplane.plan.vip import (
    Elements,
    SplitBackends,
    VipBackends,
    WrittenTable,
    in_place,
    plan,
    vip_backends,
    vip_table,
)
from skep.model.networks.tables import TableSplit
from skep.model.values.ids import ServiceId
from tests.support.networks.tables import a_network, a_served


class Kernel:
    """As much of nftables as the rules need; refuses what the kernel would refuse."""

    def __init__(self) -> None:
        self.maps: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
        self.chains: dict[str, set[str]] = defaultdict(set)
        self.tables: set[str] = set()

    def apply(self, text: str) -> None:
        for line in text.splitlines():
            verb, kind, family, _, *rest = line.split()
            match verb, kind:
                case "add", "table":
                    self.tables.add(family)
                case "create", "table":
                    assert family not in self.tables
                    self.tables.add(family)
                case "delete", "table":
                    self.tables.remove(family)
                    self.chains.pop(family, None)
                    for key in [key for key in self.maps if key[0] == family]:
                        del self.maps[key]
                case "add", "chain":
                    assert family in self.tables
                    self.chains[family].add(rest[0])
                case "flush", "chain":
                    assert rest[0] in self.chains[family]
                case "delete", "chain":
                    used = self.maps[family, "services"].values()
                    assert f"goto {rest[0]}" not in used, "the kernel refuses to delete a chain in use"
                    self.chains[family].remove(rest[0])
                case (("add" | "delete"), "element"):
                    self._element(verb, family, rest[0], line)

    def _element(self, verb: str, family: str, name: str, line: str) -> None:
        there = self.maps[family, name]
        for element in re.findall(r"\{ (.*) \}", line)[0].split(", "):
            key, _, value = element.partition(" : ")
            if verb == "delete":
                del there[key]
                continue
            assert key not in there, f"{key} is in {name}"
            if value.startswith("goto "):
                assert value.removeprefix("goto ") in self.chains[family]
            there[key] = value

    def change(self, changes: Iterable[Elements]) -> None:
        """Elements alone, as they go to the kernel without the language."""
        for one in changes:
            there = self.maps[one.family, one.map]
            for key, value in one.elements:
                if one.is_added:
                    assert key not in there, f"{key} is in {one.map}"
                    there[key] = value
                else:
                    del there[key]

    def leads(self) -> dict[str, set[str]]:
        """Where each address leads, as a packet finds out."""
        found: dict[str, set[str]] = {}
        for family in self.tables:
            for address, guard in self.maps[family, "guards"].items():
                chain = self.maps[family, "services"].get(address, "goto spread_0")
                count = int(chain.removeprefix("goto spread_"))
                assert (guard == "goto empty") is (count == 0)
                backends = self.maps[family, "backends"]
                found[address] = {backends[f"{address} . {number}"] for number in range(count)}
                assert len(found[address]) == count, "no backend has two shares"
            assert len(self.maps[family, "backends"]) == sum(
                len(found[address]) for address in self.maps[family, "guards"]
            ), "nothing is left behind"
        return found


IPV4 = st.integers(2, 9).map(lambda number: f"10.0.1.{number}")
IPV6 = st.integers(2, 5).map(lambda number: f"fd00::{number}")
BACKENDS = st.builds(
    lambda ipv4, ipv6: ipv4 | ipv6,
    st.dictionaries(IPV4, st.lists(IPV4.map(lambda one: one.replace("10.", "11.")), unique=True).map(tuple)),
    st.dictionaries(IPV6, st.lists(IPV6.map(lambda one: one.replace("fd", "fe")), unique=True).map(tuple)),
)


@given(st.lists(BACKENDS, max_size=5), st.lists(st.booleans(), min_size=5, max_size=5))
def test_whatever_was_there_the_plan_leads_where_it_should(
    wanted: list[VipBackends], forgets: list[bool]
) -> None:
    kernel, there = Kernel(), None
    for requested, forgotten in zip(wanted, forgets, strict=False):
        before: Mapping[str, WrittenTable] | None = None if forgotten else there
        planned = plan(before, requested)
        kernel.apply(planned.text)
        there = planned.after
        assert kernel.leads() == {address: set(backends) for address, backends in requested.items()}
        assert plan(there, requested).text == "", "once is enough"


@given(BACKENDS, BACKENDS)
def test_elements_alone_do_what_the_rules_do_unless_there_is_more_to_do(
    old: VipBackends, new: VipBackends
) -> None:
    first = plan({}, old)
    planned = plan(first.after, new)
    lines = planned.text.splitlines()
    assert (planned.elements is None) is any(" element " not in line for line in lines)
    if planned.elements is not None:
        by_text, by_elements = Kernel(), Kernel()
        for kernel in (by_text, by_elements):
            kernel.apply(first.text)
        by_text.apply(planned.text)
        by_elements.change(planned.elements)
        assert by_elements.maps == by_text.maps


@given(BACKENDS, BACKENDS)
def test_flows_to_backends_that_went_are_stale_and_no_others(old: VipBackends, new: VipBackends) -> None:
    planned = plan(plan({}, old).after, new)
    for address in old.keys() | new.keys():
        went = set(old.get(address, ())) - set(new.get(address, ()))
        assert (address in planned.stale) is bool(went)
        assert set(planned.stale.get(address, ())) == (set(new.get(address, ())) if went else set())


@given(st.lists(IPV4, unique=True), st.lists(IPV4, unique=True))
def test_a_backend_that_stays_keeps_its_index(before: list[str], after: list[str]) -> None:
    order = in_place(tuple(before), tuple(after))
    assert sorted(order) == sorted(after)
    short = min(len(before), len(after))
    kept = [one for one in before[:short] if one in after]
    assert [one for one in order[:short] if one in before[:short]] == kept


def test_one_change_costs_one_element_however_many_backends_there_are() -> None:
    many = {"10.0.1.2": tuple(f"10.0.2.{number}" for number in range(200))}
    one_less = {"10.0.1.2": many["10.0.1.2"][1:]}
    there = plan({}, many).after
    text = plan(there, one_less).text
    elements = [element for line in text.splitlines() if "element" in line for element in line.split(",")]
    assert len(elements) <= 6


def test_a_namespace_without_virtual_addresses_has_no_table() -> None:
    assert plan({}, {}).text == ""
    assert plan(None, {}).text == absent("ip skep_virtual") + absent("ip6 skep_virtual")
    assert plan({}, {"10.0.1.2": ()}).text == fresh(vip_table("ip", {"10.0.1.2": ()}))


def test_only_serving_tasks_get_new_connections() -> None:
    web = a_served(
        "web", ["10.0.1.2", "fd00::2"], [("10.0.1.3", "fd00::3"), "10.0.1.4"], unhealthy=["10.0.1.5"]
    )
    table = a_network(web, a_served("rr", (), ["10.0.1.9"]), a_served("idle", "10.0.1.6"))
    assert vip_backends(table) == {
        ServiceId("id-web"): {"10.0.1.2": ("10.0.1.3", "10.0.1.4"), "fd00::2": ("fd00::3",)},
        ServiceId("id-idle"): {"10.0.1.6": ()},
    }
    assert vip_backends(a_network(web, is_ingress=True)) == {}


def test_new_tasks_of_a_staged_update_have_a_share_of_their_own() -> None:
    service, (first, second, third) = a_served("web", "10.0.1.2", ["10.0.1.3", "10.0.1.4", "10.0.1.5"])
    service = replace(service, split=TableSplit(5, (2,)))
    table = a_network((service, [first, replace(second, version=2), third]))
    wanted = vip_backends(table)[service.id]
    assert wanted == {"10.0.1.2": SplitBackends(("10.0.1.3", "10.0.1.5"), ("10.0.1.4",), 5)}
    text = plan({}, wanted).text
    rules = [line.partition("spread_2_1_5 ")[2] for line in text.splitlines() if "rule" in line]
    assert [rule for rule in rules if rule] == [
        "numgen random mod 100 < 5 dnat to ip daddr . numgen random mod 1 offset 32768 map @backends",
        "dnat to ip daddr . numgen random mod 2 map @backends",
    ]
    without = replace(service, split=TableSplit(0, (2,)))
    even = vip_backends(replace(table, services={service.id: without}))[service.id]
    assert even == {"10.0.1.2": ("10.0.1.3", "10.0.1.5")}


def test_chains_of_former_shares_are_deleted() -> None:
    kernel, there = Kernel(), None
    for evens in range(1, 20):
        for percent in (5, 25, 50):
            even = tuple(f"10.0.2.{number}" for number in range(evens))
            planned = plan(there, {"10.0.1.2": SplitBackends(even, ("10.0.1.4",), percent)})
            kernel.apply(planned.text)
            there = planned.after
    assert len(there["ip"].spreads) == 1
    assert [one for one in kernel.chains["ip"] if one.startswith("spread_")] == ["spread_19_1_50"]


def test_another_share_changes_no_backend() -> None:
    backends = SplitBackends(("10.0.1.3", "10.0.1.5"), ("10.0.1.4",), 5)
    there = plan({}, {"10.0.1.2": backends}).after
    planned = plan(there, {"10.0.1.2": replace(backends, percent=25)})
    assert "backends" not in planned.text.replace("map @backends", "")
    assert planned.stale == {}
    gone = plan(planned.after, {"10.0.1.2": backends.even})
    assert gone.stale == {"10.0.1.2": backends.even}
