"""The page of a node, and the list of nodes for Prometheus."""

import asyncio
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from sim.world.time import VirtualClock, VirtualLoop
from skep.aio.clock import SystemClock
from skep.api.telemetry.exposition import render
from skep.configuration.values import listening_addr
from skep.dataplane.net_process.protocol import NameCounts, ServedListing
from skep.model.networks.paths import SETTLED_ROUNDS, PathCheck, PathFinding, PathReport
from skep.model.values.ids import NodeId
from skep.node.telemetry.metrics import KEPT_S, KeptPage, NodeMetrics, dns_families, network_families
from skep.node.telemetry.metrics_server import targets
from tests.support.managers.counted_calls import calls_of


def test_each_node_is_a_target_with_its_labels() -> None:
    nodes = [
        {
            "ID": "n1",
            "Spec": {"Role": "manager", "Availability": "active", "Labels": {"zone/a": "x"}},
            "Description": {"Hostname": "m1"},
            "Status": {"State": "down", "Addr": "fd00::1"},
            "ManagerStatus": {"Leader": True},
        }
    ]
    (found,) = targets(nodes, 9323)
    assert found["targets"] == ["[fd00::1]:9323"]
    assert found["labels"] == {
        "__meta_skep_node_id": "n1",
        "__meta_skep_node_name": "m1",
        "__meta_skep_node_role": "manager",
        "__meta_skep_node_leader": "true",
        "__meta_skep_node_availability": "active",
        "__meta_skep_node_state": "down",
        "__meta_skep_node_label_zone_a": "x",
    }


def test_a_node_without_an_address_is_no_target() -> None:
    node = {"ID": "n1", "Spec": {}, "Description": {}, "Status": {"State": "unknown"}}
    assert targets([node], 9323) == []


def test_a_peer_is_unreachable_when_enough_rounds_agree() -> None:
    lost = PathFinding(check=next(iter(PathCheck)), port="4789/udp", sent=5, lost=5, detail="no answer")
    reports = {
        NodeId("a"): PathReport(peer=NodeId("a"), mtu=1450),
        NodeId("b"): PathReport(peer=NodeId("b"), findings=(lost,), rounds=SETTLED_ROUNDS),
        NodeId("c"): PathReport(peer=NodeId("c"), findings=(lost,), rounds=SETTLED_ROUNDS - 1),
    }
    text = render(network_families({"route": 3}, reports)).decode()
    assert 'skep_network_repairs_total{kind="route"} 3' in text
    assert 'skep_network_repairs_total{kind="link"} 0' in text, (
        "a counter that begins at 1 hides its first repair"
    )
    assert 'skep_peer_reachable{peer="a"} 1' in text
    assert 'skep_peer_reachable{peer="b"} 0' in text
    assert 'skep_peer_reachable{peer="c"} 1' in text
    assert 'skep_peer_mtu_bytes{peer="a"} 1450' in text


def test_name_servers_are_counted_by_what_they_answered() -> None:
    names = NameCounts(
        (("A", 3),), (("network", "NOERROR", 2), ("forwarded", "SERVFAIL", 1)), upstream_timeouts=4
    )
    text = render(dns_families(ServedListing((), (), 5, names))).decode()
    assert 'skep_dns_requests_total{type="A"} 3' in text
    assert 'skep_dns_responses_total{source="network",code="NOERROR"} 2' in text
    assert 'skep_dns_responses_total{source="forwarded",code="SERVFAIL"} 1' in text
    assert 'skep_dns_upstream_errors_total{reason="timeout"} 4' in text
    assert 'skep_network_repairs_total{kind="container rules"} 5' in text
    older = msgspec.msgpack.decode(
        msgspec.msgpack.encode({"type": "Listing", "reservations": ()}), type=ServedListing
    )
    assert "skep_dns_containers 0" in render(dns_families(older)).decode(), "a process of the version before"


def test_an_address_to_listen_on_has_a_port() -> None:
    assert listening_addr("127.0.0.1:9323") == ("127.0.0.1", 9323)
    assert listening_addr("[::1]:9323") == ("::1", 9323)
    assert listening_addr(":9323") == ("", 9323)
    for wrong in ("127.0.0.1", "localhost:9323", "127.0.0.1:0", "127.0.0.1:70000"):
        with pytest.raises(ValueError, match="write an IP address and a port"):
            listening_addr(wrong)


def test_pages_are_made_one_at_a_time_and_those_who_ask_within_a_second_get_the_same() -> None:
    loop = VirtualLoop()
    made = 0

    async def make() -> bytes:
        nonlocal made
        made += 1
        await asyncio.sleep(0.5)
        return b"page %d" % made

    async def body() -> None:
        clock = VirtualClock(loop)
        page = KeptPage(make, clock)
        assert await asyncio.gather(*(page.text() for _ in range(50))) == [b"page 1"] * 50
        await clock.sleep(KEPT_S / 2)
        assert await page.text() == b"page 1"
        await clock.sleep(KEPT_S)
        assert await page.text() == b"page 2"

    try:
        loop.run_until_complete(body())
    finally:
        loop.close()


async def test_a_page_is_joined_outside_of_the_event_loop() -> None:
    """A manager of thousands of services has megabytes of text, which would hold up every request."""
    machine = SimpleNamespace(
        architecture="x86_64", kernel="6.1", os_name="Linux", os_version="1", cpus=1, memory_bytes=1
    )
    sources: Any = SimpleNamespace(
        node=SimpleNamespace(id="n1", machine=machine),
        engine=None,
        events=SimpleNamespace(published=0, readers=0),
        conditions=SimpleNamespace(present=dict),
        session=SimpleNamespace(has_session=True),
        load=lambda: None,
        data_plane=None,
        usage=None,
        membership=SimpleNamespace(is_manager=False, node=None),
        exporter=None,
        disks=tuple,
        reports=lambda: 0,
        door=tuple,
    )
    with calls_of(render) as here:
        page = await NodeMetrics(sources, SystemClock()).text()
    assert b"skep_node_session 1" in page
    assert not here.of(render)


def test_no_metric_has_a_path_as_label() -> None:
    """Viewers of the cluster read the page, and paths of machines are an administrator's."""
    page = Path("docs/reference/metrics.md").read_text()
    labels = {
        label for row in page.splitlines() if row.startswith("| `") for label in row.split("|")[3].split(", ")
    }
    assert "`disk`" in {label.strip() for label in labels}
    assert not {label for label in labels if re.search("path|file|director|mount", label)}
