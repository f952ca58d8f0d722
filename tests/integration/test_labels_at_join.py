"""Labels of ``skep.toml`` and facts of the machine are known as soon as a node has joined, on real nodes."""

import platform
from collections import Counter

import pytest

from tests.support.machines.playground_rig import (
    TestCluster,
    a_playground,
    create,
    nodes_by_name,
    wait_running,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

CONFIGURED = {name: f'labels = ["zone={zone}"]\n' for name, zone in (("m1", "a"), ("w1", "a"), ("w2", "b"))}


def places(cluster: TestCluster, service: str, count: int) -> Counter[str]:
    m1 = cluster.node("m1")
    names = {node["ID"]: name for name, node in nodes_by_name(m1).items()}
    return Counter(names[task["NodeID"]] for task in wait_running(m1, service, count, 60))


def test_services_are_placed_by_the_labels_and_facts_with_which_nodes_join() -> None:
    with a_playground("labels", managers=1, workers=2, configured=CONFIGURED) as cluster:
        m1 = cluster.node("m1")
        found = {name: node["Description"]["Engine"]["Labels"] for name, node in nodes_by_name(m1).items()}
        assert {name: labels["zone"] for name, labels in found.items()} == {"m1": "a", "w1": "a", "w2": "b"}
        assert {node["Spec"]["Labels"] == {} for node in nodes_by_name(m1).values()} == {True}

        facts = (
            f"node.facts.kernel == {platform.release()}",
            "node.facts.cpus >= 1",
            "node.facts.memory > 100",
        )
        wanted = ("engine.labels.zone in (b, c)", f"node.facts.arch == {platform.machine()}", *facts)
        create(m1, "report", 2, *(word for one in wanted for word in ("--constraint", one)))
        assert places(cluster, "report", 2) == {"w2": 2}
        create(m1, "even", 4, "--label", "skep.max-skew=1@engine.labels.zone")
        assert places(cluster, "even", 4)["w2"] == 2
        create(m1, "near", 3, "--label", "skep.affinity=report@engine.labels.zone")
        assert places(cluster, "near", 3) == {"w2": 3}
        create(m1, "apart", 2, "--label", "skep.anti-affinity=report@engine.labels.zone")
        assert places(cluster, "apart", 2) == {"m1": 1, "w1": 1}
