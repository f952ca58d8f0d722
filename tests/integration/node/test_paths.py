"""Probes between nodes: what is closed is named, with its port; who may not ask gets no answer; nothing is left."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from skep.dataplane.addresses import mac_of
from skep.dataplane.plan.probe import PORT, address_of
from skep.dataplane.probe.packets import (
    REQUEST_BYTES_MIN,
    PeerMeasurements,
    decode_response,
    encode_request,
    encode_response,
)
from skep.model.networks.paths import PROBE_VNI, PathCheck, PathReport, ProbeTargets
from tests.support.encryption.secure_lab import SecureLab, encrypt
from tests.support.networks.overlay_lab import OverlayLab, shell, try_shell
from tests.support.networks.paths_lab import a_peer, failing, report_until, served_ports, set_all_targets

INSIDE = {PathCheck.OVERLAY, PathCheck.LARGE_PACKETS, PathCheck.CHECKSUM_OFFLOAD}
EVERYTHING = INSIDE | {PathCheck.CONTROL, PathCheck.ETCD, PathCheck.GOSSIP, PathCheck.ENCRYPTED}


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[OverlayLab]:
    async with OverlayLab(tmp_path).running(3) as lab:
        secure = SecureLab(lab)
        try:
            yield lab
        finally:
            await secure.close()


def is_whole(report: PathReport) -> bool:
    return {one.check for one in report.findings} >= INSIDE and not report.failing


@pytest.mark.parametrize(
    "is_v6",
    [
        pytest.param(False, id="IPv4 between nodes"),
        pytest.param(True, id="IPv6 between nodes", marks=pytest.mark.slow),
    ],
)
async def test_open_ways_are_found_open(tmp_path: Path, is_v6: bool) -> None:
    async with OverlayLab(tmp_path, is_v6=is_v6).running(2) as lab, lab.networks() as networks:
        set_all_targets(lab, networks)
        for network, peer in zip(networks, reversed(lab.nodes), strict=True):
            # In the first round the other's device may not be there yet.
            report = await report_until(network, peer, lambda one: is_whole(one) and one.is_settled)
            assert (report.mtu, report.throughput) == (1500, 0)
            assert all(one.detail == "" and one.lost == 0 for one in report.findings)
            assert all(one.port == "4789/udp" for one in report.findings)


@pytest.mark.parametrize(
    ("rule", "check", "port"),
    [
        ("udp dport 4789 drop", PathCheck.OVERLAY, "4789/udp"),
        pytest.param("tcp dport 2377 drop", PathCheck.CONTROL, "2377/tcp", marks=pytest.mark.slow),
        pytest.param("tcp dport 2378 drop", PathCheck.ETCD, "2378/tcp", marks=pytest.mark.slow),
        pytest.param("tcp dport 7946 drop", PathCheck.GOSSIP, "7946/tcp", marks=pytest.mark.slow),
        pytest.param("udp dport 4799 drop", PathCheck.ENCRYPTED, "4799/udp", marks=pytest.mark.slow),
        pytest.param("udp dport 4799 reject", PathCheck.ENCRYPTED, "4799/udp", marks=pytest.mark.slow),
    ],
)
async def test_a_closed_port_between_two_nodes_is_named_and_nothing_else(
    lab: OverlayLab, tmp_path: Path, rule: str, check: PathCheck, port: str
) -> None:
    first, second, third = lab.nodes
    await shell(
        second.home,
        "nft 'add table ip other; add chain ip other in { type filter hook input priority 0; };"
        f" add rule ip other in ip saddr {first.underlay} {rule}'",
    )
    async with served_ports(lab, tmp_path / "certificates"), lab.networks() as networks:
        await encrypt(lab, networks)
        set_all_targets(lab, networks, has_ports=True)
        report = await report_until(networks[0], second, lambda one: bool(one.failing) and one.is_settled)
        assert failing(report) == {check: port}
        (finding,) = report.failing
        assert f"port {port.partition('/')[0]}" in finding.detail
        assert "host-n2" in finding.detail
        if check is PathCheck.OVERLAY:
            assert (
                "its own probes arrived here until lately: the path to it is blocked, or it has just failed"
                in finding.detail
            )
        for network, peer in ((networks[0], third), (networks[1], third), (networks[2], first)):
            whole = await report_until(network, peer, lambda one: one.is_settled)
            assert whole.failing == ()
            assert {one.check for one in whole.findings} == EVERYTHING


@pytest.mark.slow
async def test_a_listener_gets_changed_and_settled_results_only(lab: OverlayLab) -> None:
    second = lab.nodes[1]
    rules = "add table ip other; add chain ip other in { type filter hook input priority 0; };"
    await shell(second.home, f"nft '{rules} add rule ip other in udp dport 4789 drop'")
    async with lab.networks() as networks:
        set_all_targets(lab, networks)
        received: list[tuple[bool, int]] = []
        async with asyncio.timeout(60):
            while (False, 2) not in received:
                changes = await networks[0].prober.next_reports()
                received += [(bool(one.failing), one.rounds) for one in changes if one.peer == second.id]
                if (True, 2) in received:
                    await shell(second.home, "nft delete table ip other; true")
        assert received == [(True, 1), (True, 2), (False, 1), (False, 2)]
        assert is_whole(networks[0].prober.reports[second.id])


async def test_diagnostics_are_made_at_once_with_throughput(lab: OverlayLab) -> None:
    """Results of peers without earlier targets are shown too, if they have the same targets."""
    first, second, third = lab.nodes
    async with lab.networks() as networks:
        set_all_targets(lab, networks)
        await report_until(networks[0], third, is_whole)
        await shell(third.home, "ip link set under down")
        reports = await networks[0].prober.diagnose((a_peer(second), a_peer(third)), throughput=True)
        assert [report.peer for report in reports] == [second.id, third.id]
        assert is_whole(reports[0])
        assert reports[0].throughput > 1 << 20
        assert failing(reports[1]) == {PathCheck.OVERLAY: "4789/udp"}
        assert reports[1].throughput == 0
        assert first.id not in networks[0].prober.reports


def asked(source: str, target: str, *datagrams: bytes) -> list[bytes]:
    """What is answered within a second, asked from the calling thread's namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.bind((source, 0))
        asking.settimeout(1)
        found = []
        for one in datagrams:
            asking.sendto(one, (target, PORT))
        with suppress(TimeoutError):
            while True:
                found.append(asking.recv(1 << 16))
        return found


async def test_what_strangers_send_does_not_arrive(lab: OverlayLab) -> None:
    """A machine that is no target pretends to be a peer whose machine is off."""
    first, second, stranger = lab.nodes
    target, forged = address_of(first.id), address_of(second.id)
    async with first.running() as one:
        await shell(second.home, "ip link set under down")
        one.prober.set_targets(ProbeTargets(node=a_peer(first), peers=(a_peer(second),)))
        await report_until(one, second, lambda report: bool(report.failing))
        await shell(
            stranger.home,
            f"ip link add vx type vxlan id {PROBE_VNI} dstport 4789 local {stranger.underlay}"
            f" remote {first.underlay} && ip link set vx address {mac_of(IPv4Address(forged))} up"
            f" && ip addr add {forged}/8 dev vx"
            f" && ip neigh replace {target} lladdr {mac_of(IPv4Address(target))} dev vx nud permanent",
        )
        inside, received = first.paths.probes / "probe", "grep probe: /proc/net/dev | awk '{print $3}'"
        questions = (encode_request(1, 0), encode_request(2, 1000))
        assert await stranger.namespaces.run(stranger.home, asked, forged, target, *questions) == []
        assert (await shell(inside, received)).strip() == "0"
        known = (a_peer(second), a_peer(stranger))
        one.prober.set_targets(ProbeTargets(node=a_peer(first), peers=known))
        async with asyncio.timeout(10):
            while (await shell(inside, received)).strip() == "0":
                await stranger.namespaces.run(stranger.home, asked, forged, target, encode_request(3, 0))


@pytest.mark.slow
async def test_nonsense_of_a_peer_does_no_harm(lab: OverlayLab) -> None:
    first, second, third = lab.nodes
    target, source = address_of(first.id), address_of(second.id)
    async with first.running() as one, second.running() as other, third.running() as another:
        set_all_targets(lab, [one, other, another])
        await report_until(one, second, is_whole)
        inside, ask = second.paths.probes / "probe", second.namespaces.run
        garbage = [os.urandom(size) for size in (1, 15, 16, 300, 1400)]
        garbage += [
            encode_request(1, 0)[:255],
            encode_request(1, 0)[:4] + os.urandom(400),
            b"",
            encode_response(1, PeerMeasurements(9, {1: 2})),
        ]
        assert await ask(inside, asked, source, target, *garbage) == []
        (reply,) = await ask(inside, asked, source, target, encode_request(7, 1000))
        assert len(reply) < REQUEST_BYTES_MIN
        found = decode_response(reply)
        assert found is not None
        assert found[0] == 7
        flood = [encode_request(number, 0) for number in range(2000)]
        responses = await ask(inside, asked, source, target, *flood)
        assert 100 <= len(responses) <= 500, "so many questions of one peer are not answered"
        assert is_whole((await one.prober.diagnose((a_peer(third),)))[0])
        async with asyncio.timeout(20):  # until that peer may ask again
            while not is_whole((await other.prober.diagnose((a_peer(first),)))[0]):
                pass


@pytest.mark.slow
async def test_nothing_is_left_at_the_end_and_the_next_process_goes_on(lab: OverlayLab) -> None:
    first, second, _ = lab.nodes
    listing = (
        "ip -o link | grep -v skep-gw | sed 's/mode.*//'; nft list ruleset | grep -A9 skep_overlay;"
        " ss -uanH | grep 4789; true"
    )
    del lab.nodes[2:]
    async with second.running() as other:
        async with first.running() as one:
            before = await shell(first.home, listing)
            set_all_targets(lab, [one, other])
            await report_until(one, second, is_whole)
            assert "4789" in await shell(first.home, listing)
        inside = first.paths.probes / "probe"
        device = await shell(inside, "ip -o link show probe")
        code, _ = await try_shell(inside, "ss -uanlH | grep -q 4787")
        assert code != 0, "without a process there is no answer"
        async with first.running() as one:
            set_all_targets(lab, [one, other])
            await report_until(one, second, is_whole)
            assert await shell(inside, "ip -o link show probe") == device
            assert one.repairs.total == 0
            one.prober.set_targets(None)
            async with asyncio.timeout(10):
                while await shell(first.home, listing) != before or inside.exists():  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert one.prober.reports == {}
