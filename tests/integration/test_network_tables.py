"""Tables of networks on three managers and two workers: every node knows the same, and a stop waits for all of them."""

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from skep.model.networks.tables import NetworkTable
from tests.support.machines.playground_rig import IDLE, IMAGE, TestCluster, a_playground, wait_until

NODES = ("m1", "m2", "m3", "w1", "w2")


@pytest.fixture
def large() -> Iterator[TestCluster]:
    with a_playground("tables", managers=3, workers=2) as cluster:
        yield cluster


def table(cluster: TestCluster, node: str) -> NetworkTable | None:
    """The only one that the net process of the node finds."""
    holder = cluster.node(node).description["pids"][0]
    there = Path(f"/proc/{holder}/root/run/skep/tables")
    found = [path for path in there.iterdir() if path.suffix != ".new"] if there.is_dir() else []
    assert len(found) <= 1, found
    return msgspec.msgpack.decode(found[0].read_bytes(), type=NetworkTable) if found else None


def serving(cluster: TestCluster, node: str) -> set[str]:
    known = table(cluster, node)
    return {id for id, one in known.endpoints.items() if one.is_serving} if known else set()


@pytest.mark.timeout(150)
def test_every_node_has_the_same_tables_and_a_stop_waits_for_all_of_them(large: TestCluster) -> None:
    m1 = large.node("m1")
    publish = ("--detach", "--publish", "8080:80", "--label", "skep.drain=30s")
    m1.docker("service", "create", "--name", "web", "--replicas", "6", *publish, IMAGE, *IDLE)
    wait_until(lambda: all(len(serving(large, node)) == 6 for node in NODES), "all nodes know all tasks")
    known = table(large, "m1")
    assert known is not None
    assert len(known.nodes) == len(NODES)
    assert len({node.underlay for node in known.nodes.values()}) == len(NODES)
    own = {address for node in known.nodes.values() for address in node.addresses}
    tasks = {address for endpoint in known.endpoints.values() for address in endpoint.addresses}
    assert len(own | tasks) == len(NODES) + 6
    for node in NODES:
        theirs = table(large, node)
        assert theirs is not None
        assert (theirs.endpoints, theirs.services, theirs.nodes) == (
            known.endpoints,
            known.services,
            known.nodes,
        )

    began = int(time.time()) - 1
    # With 30 s to wait at most, a stop that came of that would be seen: it comes of the acknowledgements.
    m1.docker("service", "scale", "--detach", "web=2")
    wait_until(lambda: all(len(serving(large, node)) == 2 for node in NODES), "all nodes know who is left")
    running = {"desired-state": "running"}
    wait_until(lambda: len(m1.client().api.tasks(running)) == 2, "the others are not wanted")
    wait_until(lambda: len(m1.client().api.tasks()) == 2, "the others have stopped", within_s=15)

    past = large.node("m2").client().events(since=began, until=int(time.time()) + 1, decode=True)
    drained = [event for event in past if (event["Type"], event["Action"]) == ("task", "drain")]
    assert len(drained) == 4
    addresses = {event["Actor"]["Attributes"]["addresses"] for event in drained}
    assert len(addresses) == 4
    assert addresses < tasks
    m1.docker("service", "rm", "web")
    wait_until(lambda: not any(table(large, node) for node in NODES), "nothing is published any more")
