"""Manual changes in a namespace of the data plane are repaired within five seconds, and counted."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import msgspec
import pytest
from structlog.testing import capture_logs

from skep.dataplane.dataplane import DataPlane
from skep.dataplane.netns import nft_table
from skep.dataplane.netns.kernel import nft
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.netns.observation import EXCLUSIVE
from skep.dataplane.netns.reconciler import NetnsReconciler
from skep.dataplane.netns.repair_counts import Repairs
from skep.dataplane.netns.state import Address, Link, NamespaceState
from skep.dataplane.plan.packet_filter import vxlan_filter
from skep.dataplane.tables.validation import valid_table
from skep.model.networks.sandbox import Sandbox
from skep.model.networks.tables import TableNode
from skep.model.values.ids import NodeId
from tests.support.networks.overlay_lab import DUAL, INGRESS, OverlayLab, place, reaches, shell

HEALED_SECONDS_MAX = 5.0
TWO_ROUNDS = 10
"""Comparisons of a node in two rounds: its own namespace, those of two networks and of one or two containers."""
UNSTEADY = "s/@[^ :]*//; s/,LOWER_UP//; s/,M-DOWN//; s/NO-CARRIER,//; s/qdisc [a-z]*//; s/ state.*//"


class Scene(msgspec.Struct):
    """Two nodes, a container on each, on a network of both IP versions and on ingress."""

    lab: OverlayLab
    networks: list[DataPlane]
    here: Sandbox
    there: Sandbox

    @property
    def overlay(self) -> Path:
        return self.lab.nodes[0].paths.overlays / DUAL.id

    @property
    def home(self) -> Path:
        return self.lab.nodes[0].home

    def namespace(self, name: str) -> Path:
        return {"overlay": self.overlay, "home": self.home, "container": Path(self.here.netns)}[name]

    async def picture(self) -> dict[str, list[str]]:
        """All that matters, without what changes by itself or is made anew (indices, MACs that chance gave)."""
        commands = (
            f"ip -o link 2>&- | sed '{UNSTEADY}' | cut -d: -f2- | sort",
            "ip -o link 2>&- | grep -E ' (br0|eth[0-9]|skep-gw|skep-ingress)[:@]' | grep -o 'ether [^ ]*' | sort",
            f"bridge -o -d link 2>&- | grep -o ' [^ ]*: .*\\|learning [a-z]* flood [a-z]*' | sed '{UNSTEADY}' | sort",
            "ip -o addr | grep -v 'scope link' | awk '{print $2,$4}' | sort",
            "ip route | sort; ip -6 route | grep -v fe80 | sort",
            "bridge fdb | grep -E 'static|dst' | sed 's/ link-netnsid.*//' | sort",
            "ip neigh | grep PERMANENT | sort; ip -6 neigh | grep PERMANENT | sort",
            "nft list tables | sort | while read -r one; do nft list $one; done",
            "cat /proc/sys/net/ipv4/conf/*/rp_filter",
        )
        spaces = ("overlay", "home", "container")
        return {name: [await shell(self.namespace(name), command) for command in commands] for name in spaces}

    async def connects(self) -> bool:
        return (
            await reaches(self.here, "10.0.4.6")
            and await reaches(self.there, "fd04::5")
            and await reaches(self.there, "10.0.0.5")
        )


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with OverlayLab(tmp_path).running(2) as lab, lab.networks() as networks:
        ends = []
        for number, (node, network) in enumerate(zip(lab.nodes, networks, strict=True), 5):
            ends.append(
                await node.attach(
                    network,
                    place(INGRESS, f"10.0.0.{number}/24"),
                    place(DUAL, f"10.0.4.{number}/24", f"fd04::{number}/64"),
                )
            )
        lab.tell(DUAL)
        lab.tell(INGRESS, ingress_addresses={"n1": "10.0.0.2", "n2": "10.0.0.3"})
        await lab.apply(networks)
        yield Scene(lab, networks, ends[0], ends[1])


def port_of(scene: Scene, network: str) -> str:
    return next((one.port for one in scene.here.endpoints if one.network_name == network), scene.here.port)


DAMAGE = [
    ("link", "overlay", "ip link del br0"),
    ("link", "overlay", "ip link del vx4100"),
    ("link", "overlay", "ip link del {dual}"),
    ("link", "overlay", "ip link set vx4100 down"),
    ("link", "overlay", "ip link set {dual} nomaster"),
    ("link", "overlay", "ip link set vx4100 mtu 1300"),
    ("link", "overlay", "ip link set br0 address 02:00:00:00:00:01"),
    ("link", "overlay", "bridge link set dev {dual} learning on flood on"),
    ("forwarding", "overlay", "bridge fdb del 02:42:0a:00:04:06 dev vx4100 dst 192.0.2.2 self"),
    (
        "forwarding",
        "overlay",
        "bridge fdb replace 02:42:0a:00:04:06 dev vx4100 dst 192.0.2.77 self permanent",
    ),
    ("forwarding", "overlay", "bridge fdb add 02:42:0a:00:04:63 dev vx4100 dst 192.0.2.77 self permanent"),
    ("bridge_entry", "overlay", "bridge fdb del 02:42:0a:00:04:06 dev vx4100 master"),
    ("bridge_entry", "overlay", "bridge fdb del 02:42:0a:00:04:05 dev {dual} master"),
    ("neighbor", "overlay", "ip neigh del 10.0.4.6 dev vx4100"),
    ("neighbor", "overlay", "ip -6 neigh del fd04::6 dev vx4100"),
    ("address", "overlay", "ip addr del 10.0.4.1/24 dev br0"),
    ("address", "overlay", "ip addr flush dev br0"),
    ("rules", "overlay", "nft delete table bridge skep"),
    ("rules", "overlay", "nft flush chain bridge skep from_containers"),
    ("rules", "overlay", "nft flush set bridge skep addresses4"),
    ("link", "home", "ip link del skep-ingress"),
    ("link", "home", "ip link del skep-vx4096"),
    ("link", "home", "ip link del skep-gw"),
    ("link", "home", "ip link del {gateway}"),
    ("forwarding", "home", "bridge fdb del 02:42:0a:00:00:06 dev skep-vx4096 dst 192.0.2.2 self"),
    ("neighbor", "home", "ip neigh del 10.0.0.6 dev skep-vx4096"),
    ("address", "home", "ip addr flush dev skep-ingress"),
    ("address", "home", "ip addr flush dev skep-gw"),
    ("rules", "home", "nft flush ruleset"),
    ("rules", "home", "nft delete table inet skep_overlay"),
    ("rules", "home", "nft flush chain ip skep post"),
    ("link", "container", "ip link del eth1"),
    ("link", "container", "ip link set eth1 down"),
    ("link", "container", "ip link set eth0 down && ip link set eth0 name other"),
    ("link", "container", "ip link del eth2"),
    ("link", "container", "ip link set lo down"),
    ("address", "container", "ip addr del 10.0.4.5/24 dev eth1"),
    ("address", "container", "ip addr del fd04::5/64 dev eth1"),
    ("route", "container", "ip route del default"),
]


@pytest.mark.parametrize(("kind", "where", "command"), DAMAGE, ids=[f"{one[1]}: {one[2]}" for one in DAMAGE])
async def test_what_is_changed_by_hand_is_healed(scene: Scene, kind: str, where: str, command: str) -> None:
    assert await scene.connects()
    before = await scene.picture()
    repairs = scene.networks[0].repairs
    count = repairs.total
    names = {"dual": port_of(scene, "dual"), "gateway": scene.here.port}
    await shell(scene.namespace(where), command.format(**names))
    began = time.monotonic()
    while await scene.picture() != before or repairs.total == count:
        if time.monotonic() - began > HEALED_SECONDS_MAX:
            assert await scene.picture() == before
            assert repairs.total > count
        await asyncio.sleep(0.05)
    assert await scene.connects()
    assert repairs.counts.get(kind.replace("_", " "), 0) > 0


async def test_a_sysctl_is_healed_by_the_slow_round(scene: Scene) -> None:
    await shell(scene.overlay, "echo 1 > /proc/sys/net/ipv4/conf/br0/rp_filter")
    began = time.monotonic()
    while "1" in await shell(scene.overlay, "cat /proc/sys/net/ipv4/conf/br0/rp_filter"):
        assert time.monotonic() - began < 10
        await asyncio.sleep(0.05)


async def test_without_changes_nothing_is_repaired(scene: Scene) -> None:
    """Containers come and go, tables change, names are asked: none of that is a deviation."""
    repairs, (network, other) = scene.networks[0].repairs, scene.networks
    node = scene.lab.nodes[0]
    for number in range(20, 24):
        end = await node.attach(network, place(DUAL, f"10.0.4.{number}/24", f"fd04::{number}/64"))
        scene.lab.tell(DUAL)
        await scene.lab.apply([network, other], DUAL.id)
        assert await reaches(end, "10.0.4.6")
        await node.detach(network, end)
    scene.lab.tell(DUAL)
    await scene.lab.apply([network, other], DUAL.id)
    enough = repairs.comparisons + TWO_ROUNDS
    while repairs.comparisons < enough:  # noqa: ASYNC110  # there is no event
        await asyncio.sleep(0.05)
    assert dict(repairs.counts) == {}


async def test_a_link_that_is_removed_while_others_change_is_made_again_with_the_next_change(
    tmp_path: Path,
) -> None:
    namespaces = Namespaces(tmp_path / "spaces")
    space = await namespaces.create("one", {})
    try:
        reconciler = NetnsReconciler("one", space, namespaces, Repairs(), EXCLUSIVE)
        bridge = Link(name="br", kind="bridge")
        for number in range(1, 6):
            other = Link(name=f"other{number}", kind="bridge")
            reconciler.set_part("other", NamespaceState(links={other.name: other}))
            where = f"10.9.{number}.1/24"
            reconciler.set_part(
                "bridge", NamespaceState(links={"br": bridge}, addresses=frozenset({Address("br", where)}))
            )
            await asyncio.gather(reconciler.apply(), reconciler.remove("br"))
            await reconciler.apply()
            assert where in await shell(space, "ip -4 address show dev br")
    finally:
        await namespaces.destroy("one")
        namespaces.close()


async def test_a_rule_that_cannot_be_is_left_out_alone(scene: Scene) -> None:
    """A table with a node at no address: containers start, the others are reached, nothing is tried for ever."""
    network, lab = scene.networks[0], scene.lab
    bad = TableNode(id=NodeId("bad"), underlay="fe80::1%x")
    table = lab.tables[DUAL.id]
    lab.tables[DUAL.id] = msgspec.structs.replace(table, nodes={**table.nodes, bad.id: bad})
    with capture_logs() as logs:
        await lab.apply([network], DUAL.id)
        end = await lab.nodes[0].attach(network, place(DUAL, "10.0.4.20/24", "fd04::20/64"))
        await lab.apply([network], DUAL.id)
    lab.tell(DUAL)
    await lab.apply(scene.networks[1:], DUAL.id)
    assert await reaches(end, "10.0.4.6")
    said = [one["elements"] for one in logs if one["event"] == "elements refused by nftables left out"]
    assert said == [["peers6 fe80::1%x . 4100"]]
    repairs = network.repairs
    enough = repairs.comparisons + TWO_ROUNDS
    while repairs.comparisons < enough:  # noqa: ASYNC110  # there is no event
        await asyncio.sleep(0.05)
    assert dict(repairs.counts) == {}


async def test_whatever_a_node_says_of_its_address_nft_takes_the_rules(scene: Scene) -> None:
    """Labels by the hundred, as managers and nodes take them in, in one table with the one that is good."""
    words = [
        "fe80::1%x",
        "fd00::1%x }",
        "fd00::1%a;b",
        "::ffff:10.0.0.1",
        "224.0.0.1",
        "",
        "x . y",
        "fd09::1",
    ]
    random = Random(7)
    words += ["".join(random.choices("0123456789abcdef:.%{} ;,", k=random.randrange(20))) for _ in range(300)]
    said = {NodeId(f"w{n}"): TableNode(id=NodeId(f"w{n}"), underlay=word) for n, word in enumerate(words)}
    table = scene.lab.tables[DUAL.id]
    said_table = msgspec.structs.replace(table, nodes={**table.nodes, **said})
    table = valid_table(said_table, lambda _: None)
    assert {"n1", "n2", "w7"} <= table.nodes.keys() < said_table.nodes.keys()
    text = nft_table.whole(vxlan_filter({DUAL.id: table}, NodeId("n1"), ["br0"]))
    namespaces = scene.lab.nodes[0].namespaces
    await namespaces.run(scene.home, nft.run, text.replace("skep_overlay", "skep_checked"))
