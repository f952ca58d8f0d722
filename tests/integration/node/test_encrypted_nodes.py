"""Encrypted networks as a node has them: tables and WireGuard tunnels, over IPv4 and IPv6, healed by hand."""

from pathlib import Path

import msgspec
import pytest

from skep.dataplane.plan.wireguard import device_name
from skep.dataplane.wireguard.methods import EncryptionRefusal
from skep.errors import FailedPrecondition
from tests.support.encryption.secure_lab import SECURE_DUAL, SECURE_TWO, secure_lab, wait_reaches
from tests.support.networks.overlay_lab import carry, place, reaches, shell

pytestmark = [pytest.mark.needs("root", "ip", "nsenter", "wireguard-go"), pytest.mark.timeout(60)]

SIZE = 10_000_000


@pytest.mark.parametrize("is_v6", [False, True], ids=["IPv4 between nodes", "IPv6 between nodes"])
async def test_both_versions_of_ip_inside_and_between(tmp_path: Path, is_v6: bool) -> None:
    async with secure_lab(tmp_path, 2, is_v6=is_v6) as secure:
        lab, networks = secure.lab, secure.networks
        one = await lab.nodes[0].attach(networks[0], place(SECURE_DUAL, "10.0.4.5/24", "fd04::5/64"))
        other = await lab.nodes[1].attach(networks[1], place(SECURE_DUAL, "10.0.4.6/24", "fd04::6/64"))
        lab.tell(SECURE_DUAL)
        await lab.apply(networks)
        await wait_reaches(one, "10.0.4.6")
        await wait_reaches(one, "fd04::6")
        for address in ("10.0.4.6", "fd04::6"):
            assert await carry(lab.nodes[0].namespaces, other, one, address, SIZE) == SIZE
        shown = await shell(one.netns, "ip -d link show eth0")
        assert f"mtu {1338 if is_v6 else 1370} " in shown
        sockets = await shell(lab.nodes[0].home, "ss -Huan")
        assert ":4799" in sockets
        assert ":4789" not in sockets, "no plain VXLAN takes anything"
        assert ":4801" not in sockets, "VXLAN of encrypted networks is in the tunnels' namespace alone"
        assert ":4801" in await shell(networks[0].tunnels.namespace, "ss -Huan")


async def test_subnets_of_an_encrypted_network_reach_each_other(tmp_path: Path) -> None:
    async with secure_lab(tmp_path, 3) as secure:
        lab, networks = secure.lab, secure.networks
        places = [("10.0.2.5/24",), ("10.0.3.6/24",), ("10.0.2.7/24",)]
        ends = [
            await node.attach(network, place(SECURE_TWO, *addresses))
            for node, network, addresses in zip(lab.nodes, networks, places, strict=True)
        ]
        lab.tell(SECURE_TWO)
        await lab.apply(networks)
        for end in ends:
            for (address,) in places:
                await wait_reaches(end, address.partition("/")[0])


@pytest.mark.slow
async def test_what_is_deleted_by_hand_is_back_within_five_seconds(tmp_path: Path) -> None:
    async with secure_lab(tmp_path, 2) as secure:
        lab, networks = secure.lab, secure.networks
        one = await lab.nodes[0].attach(networks[0], place(SECURE_TWO, "10.0.2.5/24"))
        await lab.nodes[1].attach(networks[1], place(SECURE_TWO, "10.0.2.6/24"))
        lab.tell(SECURE_TWO)
        await lab.apply(networks)
        await wait_reaches(one, "10.0.2.6")
        overlay = lab.nodes[0].paths.overlays / SECURE_TWO.id
        tunnels, device = networks[0].tunnels.namespace, device_name(lab.nodes[0].paths.run, 0)
        for namespace, action in (
            (overlay, "ip link del vx4098"),
            (overlay, "ip link set vx4098 nomaster"),
            (overlay, "ip link del br0"),
            (tunnels, f"ip link set {device} down"),
            (tunnels, f"ip -6 addr flush dev {device}"),
            (tunnels, "ip -6 route flush table main"),
            (tunnels, f"ip link del {device}"),
        ):
            await shell(namespace, action)
            assert await wait_reaches(one, "10.0.2.6") < 5.0 + 3.0, f"{action} (a ping waits up to 3 s)"
        secure.processes["n1", 0].kill()
        assert await wait_reaches(one, "10.0.2.6") < 3.0 + 3.0


async def test_a_node_that_cannot_encrypt_takes_no_container_and_leaves_nothing(tmp_path: Path) -> None:
    def refusing(options):  # type: ignore[no-untyped-def]
        return msgspec.structs.replace(options, method=EncryptionRefusal("this node cannot"))

    async with secure_lab(tmp_path, 1, options=refusing) as secure:
        lab, networks = secure.lab, secure.networks
        with pytest.raises(
            FailedPrecondition, match="network two is encrypted, and this node cannot; nothing is sent"
        ):
            await lab.nodes[0].attach(networks[0], place(SECURE_TWO, "10.0.2.5/24"))
        lab.tell(SECURE_TWO)
        await lab.apply(networks)
        assert lab.nodes[0].namespaces.pinned() == []
        assert secure.processes == {}
        assert not networks[0].tunnels.namespace.exists()


async def test_no_packet_is_exchanged_with_a_node_until_its_key_is_known(tmp_path: Path) -> None:
    async with secure_lab(tmp_path, 2) as secure:
        lab, networks = secure.lab, secure.networks
        one = await lab.nodes[0].attach(networks[0], place(SECURE_TWO, "10.0.2.5/24"))
        await lab.nodes[1].attach(networks[1], place(SECURE_TWO, "10.0.2.6/24"))
        published, lab.nodes[1].public_keys = lab.nodes[1].public_keys, tuple
        lab.tell(SECURE_TWO)
        await lab.apply(networks)
        assert not await reaches(one, "10.0.2.6")
        lab.nodes[1].public_keys = published
        lab.tell(SECURE_TWO)
        await lab.apply(networks)
        await wait_reaches(one, "10.0.2.6")


async def test_the_last_encrypted_network_takes_the_tunnels_along(tmp_path: Path) -> None:
    async with secure_lab(tmp_path, 1) as secure:
        lab, networks = secure.lab, secure.networks
        endpoint = await lab.nodes[0].attach(networks[0], place(SECURE_TWO, "10.0.2.5/24"))
        lab.tell(SECURE_TWO)
        await lab.apply(networks)
        assert networks[0].tunnels.namespace.exists()
        await lab.nodes[0].detach(networks[0], endpoint)
        lab.tables.clear()
        await networks[0].overlays.apply(lab.id_of(networks[0]), {}, frozenset({SECURE_TWO.id}))
        process = secure.processes["n1", 0].process
        assert process is not None
        await process.wait()
        assert not networks[0].tunnels.namespace.exists()
