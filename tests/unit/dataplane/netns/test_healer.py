"""When namespaces are compared, and what that may cost."""

import asyncio
import errno
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from skep.dataplane.netns.deferred import DeferredChanges
from skep.dataplane.netns.diff import AddLink, DeleteLink, Put, SetSysctl
from skep.dataplane.netns.healer import ROUND_SECONDS_MIN, SHARE, Healer
from skep.dataplane.netns.kernel import nft
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.nft_table import NftTable, changes, fits, whole
from skep.dataplane.netns.observation import CONTAINER, EXCLUSIVE
from skep.dataplane.netns.read import ReadState
from skep.dataplane.netns.reconciler import NetnsReconciler
from skep.dataplane.netns.repair_counts import Repairs, kind_of
from skep.dataplane.netns.state import Address, EntryKind, Link, NamespaceState, NeighborEntry, Route
from skep.dataplane.overlays import Overlays
from skep.errors import Unavailable
from tests.unit.dataplane.plan.test_overlay import HEAD


class Stopwatch:
    """A clock that stands still but for who sleeps, or says that he worked."""

    def __init__(self) -> None:
        self.now, self.slept, self.worked = 0.0, 0.0, 0.0

    def now_ns(self) -> int:
        return round(self.now * 1e9)

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0)
        self.slept += max(seconds, 0)
        await asyncio.sleep(0)

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.worked += seconds


class Slow(NetnsReconciler):
    """A namespace whose comparison takes ``seconds``."""

    def __init__(self, clock: Stopwatch, seconds: float) -> None:
        super().__init__("slow", Path("/none"), Namespaces(Path("/none")), Repairs(), CONTAINER)
        self._clock, self._seconds, self.compared = clock, seconds, 0

    async def heal(self, *, is_thorough: bool = True) -> int:
        self._clock.work(self._seconds)
        self.compared += 1
        return 0


async def healed(healing: Healer, last: Slow) -> None:
    """Until the slow round has compared ``last`` twenty times."""
    task = asyncio.get_running_loop().create_task(healing.run())
    while last.compared < 20:  # noqa: ASYNC110  # there is no event
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize("seconds", [0.001, 0.01, 0.5])
async def test_the_slow_round_keeps_to_its_share_and_leaves_none_out(seconds: float) -> None:
    clock = Stopwatch()
    healing = Healer(
        Namespaces(Path("/none")), clock, Repairs(), rng=lambda: 0.5, processor_s=lambda: clock.worked
    )
    reconcilers = [Slow(clock, seconds) for _ in range(5)]
    for reconciler in reconcilers:
        healing.take_turns(reconciler)
    await healed(healing, reconcilers[-1])
    assert clock.worked / (clock.worked + clock.slept) <= SHARE * 1.05
    assert max(one.compared for one in reconcilers) - min(one.compared for one in reconcilers) <= 1


class Waiting(Slow):
    """Its comparison waits for a busy processor most of the time."""

    async def heal(self, *, is_thorough: bool = True) -> int:
        self._clock.now += 1.0
        return await super().heal(is_thorough=is_thorough)


async def test_a_wait_for_a_busy_processor_does_not_put_off_the_slow_round() -> None:
    clock = Stopwatch()
    healing = Healer(
        Namespaces(Path("/none")), clock, Repairs(), rng=lambda: 0.5, processor_s=lambda: clock.worked
    )
    reconciler = Waiting(clock, 0.01)
    healing.take_turns(reconciler)
    await healed(healing, reconciler)
    assert clock.now <= reconciler.compared * max(1.0 + 0.01 / SHARE, ROUND_SECONDS_MIN) * 1.05


async def test_a_node_with_few_namespaces_compares_them_every_other_second() -> None:
    clock = Stopwatch()
    healing = Healer(
        Namespaces(Path("/none")), clock, Repairs(), rng=lambda: 0.5, processor_s=lambda: clock.worked
    )
    few = [Slow(clock, 0.005), Slow(clock, 0.005)]
    for reconciler in few:
        healing.take_turns(reconciler)
    await healed(healing, few[-1])
    assert 19 * ROUND_SECONDS_MIN <= clock.now <= 20 * ROUND_SECONDS_MIN


class Broken(Slow):
    """A namespace in which the node meets a bug of its own."""

    async def heal(self, *, is_thorough: bool = True) -> int:
        await super().heal(is_thorough=is_thorough)
        raise KeyError("net1")


async def test_a_bug_met_in_one_namespace_ends_no_other_ones_healing() -> None:
    clock = Stopwatch()
    healing = Healer(Namespaces(Path("/none")), clock, Repairs(), rng=lambda: 0.5)
    broken, well = Broken(clock, 0.001), Slow(clock, 0.001)
    for reconciler in (broken, well):
        healing.take_turns(reconciler)
    healing.expect(broken)
    task = asyncio.get_running_loop().create_task(healing.run())
    while min(broken.compared, well.compared) < 5 and not task.done():  # noqa: ASYNC110  # there is no event
        await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    await asyncio.wait([task])


class Sockets:
    """In the place of ``Namespaces``: the socket number ``fails`` cannot be opened."""

    def __init__(self, fails: int) -> None:
        self.opened: list[socket.socket] = []
        self._left = fails

    async def run(self, _path: Path, _open: object, *_arguments: object) -> socket.socket:
        if not self._left:
            self._left -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        self._left -= 1
        mine, _ = pair = socket.socketpair()
        mine.setblocking(False)
        self.opened += pair
        return mine


@pytest.mark.parametrize("fails", [0, 1], ids=["links", "tables"])
async def test_a_watch_that_failed_is_tried_anew_and_the_slow_round_goes_on_meanwhile(fails: int) -> None:
    namespaces: Any = Sockets(fails)
    healing = Healer(namespaces, Stopwatch(), Repairs(), rng=lambda: 0.5)
    reconciler = NetnsReconciler("net", Path("/none"), Namespaces(Path("/none")), Repairs(), EXCLUSIVE)
    with pytest.raises(OSError, match="Too many"):
        await healing.watch(reconciler)
    assert healing.watched == {reconciler: []}
    assert [one.fileno() for one in namespaces.opened[::2]] == [-1] * fails, "closed"
    await healing.watch(reconciler)
    assert len(healing.watched[reconciler]) == 2
    before = len(namespaces.opened)
    await healing.watch(reconciler)
    assert len(namespaces.opened) == before
    healing.close()
    for one in namespaces.opened:
        one.close()


async def test_a_network_whose_changes_cannot_be_watched_is_written_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def made(*_: object) -> None:
        """As if its namespace were there."""

    monkeypatch.setattr("skep.dataplane.overlays.pinned.make_where_missing", made)
    namespaces: Any = Sockets(0)
    healing = Healer(namespaces, Stopwatch(), Repairs(), rng=lambda: 0.5)
    others = dict.fromkeys(("home", "deferred", "tunnels", "measurements"), cast("Any", None))
    spaces = Namespaces(Path("/none"))
    overlays = Overlays(namespaces=spaces, pins=spaces, healer=healing, **others)
    first = await overlays.ready_reconciler(HEAD.id, HEAD)
    assert healing.watched == {first: []}
    assert await overlays.ready_reconciler(HEAD.id, HEAD) is first
    assert len(healing.watched[first]) == 2, "as soon as it can be"
    healing.close()
    for one in namespaces.opened:
        one.close()


async def test_a_namespace_that_cannot_be_put_right_is_tried_less_and_less_often() -> None:
    clock = Stopwatch()
    healing = Healer(Namespaces(Path("/none")), clock, Repairs(), rng=lambda: 1.0)
    broken, well = Broken(clock, 0.001), Slow(clock, 0.001)
    for reconciler in (broken, well):
        healing.take_turns(reconciler)
        healing.expect(reconciler)
    task = asyncio.get_running_loop().create_task(healing.run())
    while clock.now < 600:  # there is no event
        healing.expect(broken)  # as before many changes in it
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert 7 <= broken.compared <= 6 + 600 / 60
    assert well.compared > 2 * broken.compared


class Failing(Healer):
    """Its first rounds meet ``bugs``."""

    bugs: list[Exception]

    async def check_all(self) -> None:
        if self.bugs:
            raise self.bugs.pop()
        await super().check_all()


async def test_a_loop_that_meets_a_bug_is_begun_again_and_nothing_is_forgotten() -> None:
    clock = Stopwatch()
    healing = Failing(Namespaces(Path("/none")), clock, Repairs(), rng=lambda: 0.5)
    healing.bugs = [KeyError("bug"), OSError(24, "no descriptor")]
    well = Slow(clock, 0.001)
    healing.take_turns(well)
    task = asyncio.get_running_loop().create_task(healing.run())
    while well.compared < 5 and not task.done():  # noqa: ASYNC110  # there is no event
        await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize("error", [Unavailable("not now"), KeyError("net1")])
async def test_deferred_repairs_run_once_and_a_failure_delays_no_other_namespace(
    error: Exception,
) -> None:
    clock, calls = Stopwatch(), []
    settling = DeferredChanges(clock)

    def noting(name: str) -> object:
        async def settle() -> None:
            calls.append(name)
            if name == "bad":
                raise error

        return settle

    for name in ("bad", "net1", "net1", "net1", "net2"):
        settling.soon(name, noting(name))  # type: ignore[arg-type]
    task = asyncio.get_running_loop().create_task(settling.run())
    while len(calls) < 3 and not task.done():  # noqa: ASYNC110  # there is no event
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert calls == ["bad", "net1", "net2"]


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        (AddLink(Link(name="br0", kind="bridge")), "link"),
        (SetSysctl("net/ipv4/ip_forward", "1"), "sysctl"),
        (Put(Address("br0", "10.0.0.1/24")), "address"),
        (Put(Route("br0", "10.0.0.0/24")), "route"),
        (Put(NeighborEntry(EntryKind.FORWARD, "vx", "02:42:0a:00:00:05", "192.0.2.1")), "forwarding"),
        (Put(NeighborEntry(EntryKind.PORT, "vx", "02:42:0a:00:00:05")), "bridge entry"),
        (Put(NeighborEntry(EntryKind.NEIGHBOR, "vx", "02:42:0a:00:00:05", "10.0.0.5")), "neighbor"),
    ],
)
def test_repairs_are_counted_by_kind(operation: AddLink | SetSysctl | Put, kind: str) -> None:
    repairs = Repairs()
    repairs.record("net", [kind_of(operation)] * 2)
    assert (repairs.counts, repairs.total) == ({kind: 2}, 2)


TABLE = NftTable(
    name="inet t",
    sets=(("ports", "type inet_service"), ("targets", "type inet_service : ipv4_addr")),
    chains=(("c", "{ type filter hook input priority 0; }"), ("d", "")),
    rules=(("c", "udp dport @ports jump d"), ("d", "drop")),
    elements=frozenset({("ports", "1"), ("ports", "2"), ("targets", "80 : 10.0.0.1")}),
)
LISTING = """table inet t {
	set ports {
		type inet_service
		elements = { 1,
				2 }
	}

	map targets {
		type inet_service : ipv4_addr
		elements = { 80 : 10.0.0.1 }
	}

	chain c {
		type filter hook input priority filter; policy accept;
		udp dport @ports jump d
	}

	chain d {
		drop
	}
}
"""


def test_a_table_is_written_whole_and_changed_by_its_elements() -> None:
    text = whole(TABLE)
    assert text.startswith("add table inet t\ndelete table inet t\ncreate table inet t\n")
    assert "add map inet t targets { type inet_service : ipv4_addr; }" in text
    fewer = NftTable(
        name=TABLE.name,
        sets=TABLE.sets,
        chains=TABLE.chains,
        rules=TABLE.rules,
        elements=frozenset({("ports", "2"), ("targets", "81 : 10.0.0.1")}),
    )
    assert changes(TABLE, fewer).splitlines() == [
        "delete element inet t ports { 1 }",
        "delete element inet t targets { 80 }",
        "add element inet t targets { 81 : 10.0.0.1 }",
    ]


@pytest.mark.parametrize("missing", ["\t\t\t\t2", "\t\tdrop\n", "\t\tudp dport @ports jump d\n"])
def test_a_listing_that_lacks_something_is_no_measure(missing: str) -> None:
    assert fits(LISTING, TABLE)
    assert not fits(LISTING.replace(missing, "").replace("1,\n", "1\n"), TABLE)


def test_the_wanted_state_is_the_sum_of_its_parts() -> None:
    reconciler = NetnsReconciler("d", Path("/none"), Namespaces(Path("/none")), Repairs(), CONTAINER)
    reconciler.set_part("one", NamespaceState(links={"a": Link(name="a", kind="bridge")}), TABLE)
    more = NftTable(
        name=TABLE.name,
        sets=TABLE.sets,
        chains=TABLE.chains,
        rules=TABLE.rules,
        elements=frozenset({("ports", "9")}),
    )
    reconciler.set_part("other", NamespaceState(sysctls={"net/x": "1"}), more)
    assert (list(reconciler.wanted.links), reconciler.wanted.sysctls) == (["a"], {"net/x": "1"})
    assert reconciler.wanted_tables["inet t"].elements == TABLE.elements | {("ports", "9")}
    reconciler.remove_part("one")
    assert reconciler.wanted.links == {}


def test_a_link_that_is_going_is_not_wanted_by_the_next_change_of_another_part() -> None:
    reconciler = NetnsReconciler("node", Path("/none"), Namespaces(Path("/none")), Repairs(), CONTAINER)
    going, staying = Link(name="vs1", kind="veth"), Link(name="vs2", kind="veth")
    reconciler.set_part("network", NamespaceState(links={"vs1": going, "vs2": staying}))
    reconciler.adopt()
    reconciler.expect_removal("vs1")
    reconciler.set_part("strangers", NamespaceState())
    assert reconciler.wanted.links == {"vs2": staying}


class Refusing:
    """In the place of ``Namespaces``: nftables takes nothing of the table ``refused``."""

    def __init__(self, refused: str) -> None:
        self._refused = refused
        self.written: list[str] = []

    async def run(self, _path: Path, work: object, *arguments: object) -> object:
        assert work is nft.run
        (text,) = arguments
        assert isinstance(text, str)
        if self._refused in text:
            raise nft.NftFailed("Operation not supported")
        self.written.append(text)
        return ""


async def test_a_table_that_the_kernel_refuses_keeps_no_other_table_back() -> None:
    namespaces: Any = Refusing("ip6 strange")
    reconciler = NetnsReconciler("node", Path("/none"), namespaces, Repairs(), EXCLUSIVE)
    strange = msgspec.structs.replace(TABLE, name="ip6 strange", elements=frozenset())
    reconciler.set_part("published ports", NamespaceState(), strange)
    reconciler.set_part("gateway", NamespaceState(), TABLE)
    for bring_about in (reconciler.apply, reconciler.heal):
        namespaces.written.clear()
        reconciler.reset()
        with pytest.raises(nft.NftFailed):  # and no link is made: what guards it may be missing
            await bring_about()
        assert [text.splitlines()[0] for text in namespaces.written] == [f"add table {TABLE.name}"]


class Departing:
    """In the place of ``Namespaces``: while it works, a container ends whose link is ``vs1``."""

    def __init__(self, holds: NamespaceState) -> None:
        self.reconciler: NetnsReconciler | None = None
        self._holds = holds

    async def run(self, _path: Path, work: object, *_arguments: object) -> object:
        assert self.reconciler is not None
        self.reconciler.expect_removal("vs1")
        if work is nft.run:
            return ""
        return ReadState(self._holds, dict.fromkeys(self._holds.links, 1))


@pytest.mark.parametrize("is_known", [True, False], ids=["known", "read"])
@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "still there"])
async def test_a_link_that_departs_during_a_change_is_neither_made_nor_deleted(
    monkeypatch: pytest.MonkeyPatch, *, is_known: bool, is_gone: bool
) -> None:
    done: list[object] = []

    async def note(_namespaces: object, _path: Path, operations: Sequence[object]) -> None:
        done.extend(operations)

    monkeypatch.setattr("skep.dataplane.netns.reconciler.apply_operations", note)
    old = {name: Link(name=name, kind="veth") for name in ("vs1", "vs2")}
    held = NamespaceState(links={"vs2": old["vs2"]} if is_gone else old)
    namespaces: Any = Departing(held)
    reconciler = NetnsReconciler("net", Path("/none"), namespaces, Repairs(), EXCLUSIVE)
    namespaces.reconciler = reconciler
    reconciler.set_part("network", NamespaceState(links=old))
    reconciler.adopt()
    if is_known:
        reconciler.assume(NamespaceState(links=old))
    new = Link(name="vs3", kind="veth")
    reconciler.set_part("network", NamespaceState(links={**old, "vs3": new}), TABLE)
    await reconciler.apply()
    assert [one for one in done if isinstance(one, AddLink | DeleteLink)] == [AddLink(new)]
