"""Failover addresses on real interfaces: lifetimes in the kernel, announcements to a neighbor, and hooks."""

import asyncio
import errno
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from skep.agent.session.address_stream import SERVES_S_MAX, HeldAddresses
from skep.aio.clock import SystemClock
from skep.dataplane.failover import interfaces, machine
from skep.dataplane.failover.machine import AddressHook, DoorWatch, MachineAddresses, require_of_root
from skep.dataplane.netns.kernel import conntrack, netlink, nft
from skep.dataplane.netns.kernel.namespaces import Namespaces, inside
from skep.errors import FailedPrecondition, Unavailable
from skep.model.door.settings import DOOR
from skep.model.networks.failover import KERNEL_LATE_S, KERNEL_S, AddressOrder
from skep.model.networks.tables import NetworkHead, NetworkTable, TableEndpoint, TableService
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId
from skep.wire import skep_pb2 as skep

pytestmark = pytest.mark.needs("root")

FOUR = AddressOrder(address="10.0.0.100", prefix=24, epoch=1)
SIX = AddressOrder(address="fd00::100", prefix=64, epoch=1)
WRONG = "02:00:00:00:00:99"
"""Hardware address of the former holder."""
HOOK = """#!/bin/sh
echo "$@" >> {log}
[ ! -e {log}.fails ]
"""


PUBLISHED = """
add table {family} published
add chain {family} published pre {{ type nat hook prerouting priority -100; }}
add rule {family} published pre fib daddr type local tcp dport 443 dnat to {at}:8443
"""
"""The rules of a published port (``dataplane.plan.gateway``)."""

NODE = """
import asyncio, sys
from pathlib import Path
from skep.aio.clock import SystemClock
from skep.dataplane.failover.machine import AddressHook
hook = AddressHook(Path(sys.argv[1]), "w1", SystemClock(), lambda: 0.0)
asyncio.run(hook.run("10.0.0.100", "take", 30.0, lambda: 0.5))
"""


class Lab:
    """A machine with the interface ``n``, and its neighbor with the interface ``p``."""

    def __init__(self, directory: Path) -> None:
        self.pins = Namespaces(directory / "netns")
        self.hook = directory / "hook"
        self.log = directory / "log"
        self.reports: list[str] = []

    async def begin(self) -> None:
        (self.log.parent / "netns").mkdir()
        self.node, self.peer = await self.pins.create("node", {}), await self.pins.create("peer", {})
        self.run(
            "node", "ip link add n0 type veth peer name p0; ip link set p0 netns {peer}; ip link set lo up"
        )
        for name, device, last in (("node", "n0", 1), ("peer", "p0", 2)):
            self.run(name, f"ip link set {device} up; ip addr add 10.0.0.{last}/24 dev {device}")
            self.run(name, f"ip addr add fd00::{last}/64 dev {device} nodad")
        clock = SystemClock()
        self.addresses = MachineAddresses(
            Namespaces(self.pins.path("x").parent, self.node),
            clock,
            AddressHook(self.hook, "w1", clock, lambda: 0.0),
            self.reports.append,
        )

    def run(self, name: str, command: str) -> str:
        inside = ["nsenter", f"--net={self.pins.path(name)}", "sh", "-ec", command.format(peer=self.peer)]
        return subprocess.run(inside, check=True, capture_output=True, text=True, timeout=10).stdout

    def has(self, order: AddressOrder) -> bool:
        return f" {order.address}/" in self.run("node", "ip -o addr show dev n0")

    def neighbor(self, order: AddressOrder) -> str:
        return self.run("peer", f"ip neigh show {order.address} dev p0").lower()

    def write_hook(self) -> None:
        self.hook.write_text(HOOK.format(log=self.log))
        self.hook.chmod(0o700)


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    made = Lab(tmp_path)
    await made.begin()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(made.addresses.run())
        await asyncio.sleep(0)
        yield made
        running.cancel()
    for name in ("node", "peer"):
        await made.pins.destroy(name)


async def until(condition: object, within_s: float = 5.0) -> float:
    """Wait until ``condition()`` holds.  Return the seconds."""
    assert callable(condition)
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within_s, "it did not happen"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


@pytest.mark.parametrize("order", [FOUR, SIX])
async def test_an_address_is_added_once_and_extended(lab: Lab, order: AddressOrder) -> None:
    assert await lab.addresses.hold(order, lambda: True)
    began = time.monotonic()
    while time.monotonic() - began < KERNEL_S + 0.5:
        assert not await lab.addresses.hold(order, lambda: True)
        assert lab.has(order)
        await asyncio.sleep(0.2)
    assert "noprefixroute" in lab.run("node", f"ip addr show to {order.address}")
    await lab.addresses.drop(order)
    assert not lab.has(order)
    assert await lab.addresses.hold(order, lambda: True)


@pytest.mark.parametrize("order", [FOUR, SIX])
async def test_the_kernel_drops_what_nobody_extends(lab: Lab, order: AddressOrder) -> None:
    """Also in the worst case, in which the kernel has looked for expired addresses a moment before."""
    await lab.addresses.hold(order, lambda: True)
    added_at = time.monotonic()
    await asyncio.sleep(0.93)
    other = AddressOrder(address=order.address[:-1] + "1", prefix=order.prefix, epoch=1)
    await lab.addresses.hold(other, lambda: True)
    await until(lambda: not lab.has(order))
    assert time.monotonic() - added_at <= KERNEL_S + KERNEL_LATE_S + 0.1, "0.1 s for this test's own command"


@pytest.mark.parametrize("order", [FOUR, SIX])
async def test_a_connection_that_begins_while_the_address_is_away_is_served(
    lab: Lab, order: AddressOrder
) -> None:
    """The neighbor still sends to this machine, which forwards the first packet.  It is repeated after a second."""
    family, at = (socket.AF_INET, "10.0.0.1") if order is FOUR else (socket.AF_INET6, "[fd00::1]")
    node, peer = lab.pins.path("node"), lab.pins.path("peer")
    lab.run("node", "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
    inside(node, partial(nft.run, PUBLISHED.format(family="ip" if order is FOUR else "ip6", at=at)))
    keeping = asyncio.create_task(keep(lab, order))
    await until(lambda: lab.has(order))
    with (
        inside(node, lambda: socket.create_server(("", 8443), family=family)) as server,
        inside(peer, lambda: socket.create_connection((order.address, 443), 5)) as before,
        inside(peer, lambda: socket.socket(family)) as during,
    ):
        keeping.cancel()
        await asyncio.wait((keeping,))
        await until(lambda: not lab.has(order))
        during.setblocking(False)
        assert during.connect_ex((order.address, 443)) == errno.EINPROGRESS
        await until(lambda: inside(node, partial(own_flows, order, family)))
        keeping = asyncio.create_task(keep(lab, order))
        server.setblocking(False)
        async with asyncio.timeout(10):
            served = [(await asyncio.get_running_loop().sock_accept(server))[0] for _ in range(2)]
        assert during.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        before.send(b"as before")
        served[0].settimeout(5)
        assert served[0].recv(9) == b"as before"
        keeping.cancel()
        for one in served:
            one.close()


async def keep(lab: Lab, order: AddressOrder) -> None:
    while True:
        await lab.addresses.hold(order, lambda: True)
        await asyncio.sleep(0.2)


def own_flows(order: AddressOrder, family: int) -> bool:
    """Return whether a flow leads to the address itself."""
    with conntrack.opened(5) as connection:
        return any(one.reply.source == order.address for one in conntrack.flows(connection, family))


async def test_nothing_is_left_if_it_is_too_late(lab: Lab) -> None:
    assert not await lab.addresses.hold(FOUR, lambda: False)
    assert not lab.has(FOUR)
    answers = iter([True, False])  # the process stood still between the two
    assert not await lab.addresses.hold(FOUR, lambda: next(answers))
    assert not lab.has(FOUR)


@pytest.mark.parametrize("order", [FOUR, SIX])
async def test_neighbors_learn_the_new_holder(lab: Lab, order: AddressOrder) -> None:
    lab.run("peer", f"ip neigh replace {order.address} lladdr {WRONG} dev p0 nud reachable")
    assert WRONG in lab.neighbor(order)
    await lab.addresses.hold(order, lambda: True)
    lab.addresses.took(order, lambda: 1.0)
    await until(lambda: WRONG not in lab.neighbor(order))
    own = lab.run("node", "cat /dev/null; ip -br link show n0").lower()
    assert lab.neighbor(order).split()[2] in own


async def test_addresses_of_the_machine_are_left_alone(lab: Lab) -> None:
    own = AddressOrder(address="10.0.0.1", prefix=24, epoch=1)
    with pytest.raises(FailedPrecondition, match="an address of the machine itself, on n0"):
        await lab.addresses.hold(own, lambda: True)
    await lab.addresses.drop(own)
    assert lab.has(own)


async def test_a_machine_without_the_subnet_refuses(lab: Lab) -> None:
    far = AddressOrder(address="10.7.0.1", prefix=24, epoch=1)
    with pytest.raises(FailedPrecondition, match=r"no interface with a subnet of 10\.7\.0\.1"):
        await lab.addresses.hold(far, lambda: True)
    named = AddressOrder(address="10.7.0.1", prefix=32, interface="n0", epoch=1)
    assert await lab.addresses.hold(named, lambda: True)
    unknown = AddressOrder(address="10.7.0.1", prefix=32, interface="x", epoch=1)
    with pytest.raises(FailedPrecondition, match="no interface x"):
        await lab.addresses.hold(unknown, lambda: True)


async def test_a_holder_whose_interface_is_down_refuses(lab: Lab) -> None:
    await lab.addresses.hold(FOUR, lambda: True)
    lab.run("peer", "ip link set p0 down")
    with pytest.raises(FailedPrecondition, match="its interface n0 is down"):
        await lab.addresses.hold(FOUR, lambda: True)


async def test_the_hook_runs_until_it_succeeds(lab: Lab) -> None:
    lab.write_hook()
    fails = lab.log.with_name("log.fails")
    fails.touch()
    await lab.addresses.hold(FOUR, lambda: True)
    lab.addresses.took(FOUR, lambda: 1.0)
    await until(lambda: any("exit code 1" in one for one in lab.reports))
    fails.unlink()
    await until(lambda: lab.reports[-1] == "")
    await lab.addresses.drop(FOUR)
    await lab.addresses.release(FOUR, lambda: 1.0)
    lines = lab.log.read_text().splitlines()
    assert set(lines[:-1]) == {"10.0.0.100 w1 take"}
    assert lines[-1] == "10.0.0.100 w1 release"


class CutOff:
    """A node with one confirmed renewal, and without a manager from then on."""

    def __init__(self, lab: Lab) -> None:
        self.serves = True
        self.ahead_s = 0.0
        clock = SystemClock()
        self.held = HeldAddresses(
            lab.addresses, lambda: clock.since_boot() + self.ahead_s, lambda: self.serves
        )
        self.leaving = [skep.AddressOrders.Order(address=FOUR.address, prefix=24, epoch=1, leaving=True)]
        self.orders = [skep.AddressOrders.Order(address=FOUR.address, prefix=24, epoch=1)]
        self.epochs = [skep.AddressEpoch(address=FOUR.address, epoch=1)]

    async def confirm(self, orders: list[skep.AddressOrders.Order] | None = None) -> None:
        await self.held.take(skep.AddressOrders(orders=orders or self.orders))
        report = self.held.next_report()
        assert report is not None
        confirmed = skep.AddressOrders(
            confirmed=report.number, held=self.epochs, orders=orders or self.orders
        )
        await self.held.take(confirmed)

    async def extend_for(self, seconds: float) -> None:
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            self.held.next_report()
            await self.held.extend()
            await asyncio.sleep(0.1)


async def test_a_new_address_waits_for_the_proxy_and_a_held_one_stays(lab: Lab) -> None:
    node = CutOff(lab)
    node.serves = False
    await node.confirm()
    assert not lab.has(FOUR)
    node.serves = True
    await node.held.extend()
    assert lab.has(FOUR)
    node.serves = False  # a reload
    await node.confirm()
    assert lab.has(FOUR)
    await node.held.take(skep.AddressOrders())
    assert not lab.has(FOUR)
    await node.confirm()
    assert not lab.has(FOUR)
    node.ahead_s = SERVES_S_MAX
    await node.confirm()
    assert lab.has(FOUR), "a proxy that never tells may serve as well"


async def test_announcements_and_hooks_end_with_the_lease(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    announced = []

    def announce(address: str, *_: object) -> None:
        announced.append(any(one.address == address for one in interfaces._addresses()))

    monkeypatch.setattr(machine, "ANNOUNCED_AFTER_S", (0.0, *[0.01] * 300))
    monkeypatch.setattr(machine, "announce", announce)
    lab.hook.write_text(
        f"#!/bin/sh\necho began >>{lab.log}; sh -c 'sleep 1.8; echo moved >>{lab.log}'; exit 1\n"
    )
    lab.hook.chmod(0o700)
    node = CutOff(lab)
    await node.confirm()
    await node.extend_for(2.4)
    assert len(announced) >= 5
    assert all(announced)
    assert lab.log.read_text() == "began\n"
    before = len(announced)
    await node.confirm()  # it was cut off only for a moment, and no other node was named
    await until(lambda: lab.log.read_text() == "began\nbegan\n" and len(announced) > before)


async def test_a_confirmation_after_the_lease_announces_again(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may be late, and still have the address."""
    held = []

    async def hold(order: AddressOrder, is_allowed: object) -> bool:
        return not held

    monkeypatch.setattr(lab.addresses, "hold", hold)
    monkeypatch.setattr(lab.addresses, "took", lambda order, left_s: held.append(left_s() > 0))
    node = CutOff(lab)
    await node.confirm()
    await node.confirm()
    assert held == [True]
    await asyncio.sleep(1.05)
    await node.confirm()
    assert held == [True, True]


async def test_the_hook_of_a_release_ends_with_the_lease(lab: Lab) -> None:
    lab.hook.write_text(f"#!/bin/sh\nsleep 2; echo $3 >>{lab.log}\n")
    lab.hook.chmod(0o700)
    node = CutOff(lab)
    running = asyncio.create_task(node.held.run())
    await asyncio.sleep(0)
    await node.confirm()
    await node.held.take(skep.AddressOrders(orders=node.leaving))
    await until(lambda: bool(report := node.held.next_report()) and bool(report.released), within_s=1.8)
    assert not lab.log.exists()
    running.cancel()


async def test_an_address_that_the_kernel_keeps_is_not_reported_as_released(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = [errno.EBUSY] * 3
    real = netlink.send_changes

    def send_changes(requests: list[tuple[int, int, bytes]]) -> list[int]:
        is_removal = any(kind == netlink.DELADDR for kind, _, _ in requests)
        return [refused.pop()] if is_removal and refused else real(requests)

    monkeypatch.setattr(interfaces, "send_changes", send_changes)
    node = CutOff(lab)
    running = asyncio.create_task(node.held.run())
    await asyncio.sleep(0)
    await node.confirm()
    await node.held.take(skep.AddressOrders(orders=node.leaving))
    await until(lambda: bool(report := node.held.next_report()) and bool(report.released))
    assert not lab.has(FOUR)
    assert not refused
    running.cancel()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_hook_ends_with_the_lease_if_the_node_process_is_lost(lab: Lab, how: signal.Signals) -> None:
    lab.hook.write_text(f"#!/bin/sh\necho began >>{lab.log}; sh -c 'sleep 1; echo moved >>{lab.log}'\n")
    lab.hook.chmod(0o700)
    node = await asyncio.create_subprocess_exec(sys.executable, "-c", NODE, str(lab.hook))
    try:
        await until(lab.log.exists)
        node.send_signal(how)
        await asyncio.sleep(1.2)
        assert lab.log.read_text() == "began\n"
    finally:
        if node.returncode is None:
            node.kill()
        await node.wait()


async def test_a_hook_that_others_can_change_is_not_run(lab: Lab, tmp_path: Path) -> None:
    lab.write_hook()
    lab.hook.chmod(0o722)
    with pytest.raises(FailedPrecondition, match="others than root may change"):
        require_of_root(lab.hook)
    lab.hook.chmod(0o700)
    link = tmp_path / "link"
    link.symlink_to(lab.hook)
    with pytest.raises(FailedPrecondition, match="others than root may change"):
        require_of_root(link)


async def test_a_hook_has_a_deadline(lab: Lab) -> None:
    lab.hook.write_text("#!/bin/sh\nexec sleep 60\n")
    lab.hook.chmod(0o700)
    hook = AddressHook(lab.hook, "w1", SystemClock(), lambda: 0.0)
    with pytest.raises(Unavailable, match=r"no end within 0\.2 s"):
        await hook.run("10.0.0.100", "take", 0.2, lambda: 9.0)


async def test_only_nodes_with_a_proxy_may_be_named() -> None:
    wanted: list[bool] = []
    door = TableService(id=ServiceId("d"), name="skep-door", labels={DOOR: "true"})
    proxy = TableEndpoint(task_id=TaskId("t"), node_id=NodeId("w1"), service_id=door.id)
    head = NetworkHead(id=NetworkId("n"), name="skep-door", is_door=True)
    table = NetworkTable(head=head, services={door.id: door}, endpoints={proxy.task_id: proxy})
    watch = DoorWatch(wanted.append)
    for node in ("w1", "w2"):
        await watch.apply(NodeId(node), {head.id: table}, frozenset({head.id}))
    await watch.apply(NodeId("w1"), {}, frozenset({head.id}))
    assert wanted == [True, False, False]
