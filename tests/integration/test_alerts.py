"""The packaged alerts of a real Prometheus fire where their cause is made, and end with it."""

from pathlib import Path

import pytest

from tests.support.machines.daemon_rig import wait_until
from tests.support.machines.playground_rig import a_playground
from tests.support.telemetry.prometheus_rig import Prometheus

pytestmark = [pytest.mark.slow, pytest.mark.needs("prometheus"), pytest.mark.timeout(400)]

_MADE = {
    "SkepServiceDegraded",
    "SkepPeerUnreachable",
    "SkepNodeDown",
    "SkepNodeUnreachable",
    "SkepManagerWithoutQuorum",
}
_NODES = ("m1", "m2", "m3", "w1", "w2")
_SETTING = 'metrics-addr = ":9323"\n'
_BLOCK = """
table inet blocked {
  chain in { type filter hook input priority -400; ip saddr ADDRESS udp dport 4789 drop; }
  chain out { type filter hook output priority -400; ip daddr ADDRESS udp dport 4789 drop; }
}
"""


def test_a_service_a_path_a_node_and_the_quorum(tmp_path: Path) -> None:
    configured = dict.fromkeys(_NODES, _SETTING)
    with a_playground("alerts", configured=configured, managers=3, workers=2) as cluster:
        m1, w1, w2 = (cluster.node(name) for name in ("m1", "w1", "w2"))
        prometheus = Prometheus(("nsenter", f"--net={m1.description['netns']}"))
        with prometheus.running(tmp_path):
            wait_until(
                lambda: prometheus.targets() == len(_NODES),
                "all nodes are found",
                within_s=60,
            )
            wait_until(lambda: prometheus.fired().isdisjoint(_MADE), "all is well", within_s=60)

            m1.docker(
                "service",
                "create",
                "-d",
                "--name",
                "nowhere",
                "--constraint",
                "node.labels.x==y",
                "busybox:1",
            )
            wait_until(lambda: "SkepServiceDegraded" in prometheus.fired(), "a service", within_s=60)
            m1.docker("service", "rm", "nowhere")
            wait_until(lambda: "SkepServiceDegraded" not in prometheus.fired(), "it is over", within_s=60)

            cluster.skep("exec", "w1", "--", "nft", _BLOCK.replace("ADDRESS", w2.description["addr"]))
            wait_until(lambda: "SkepPeerUnreachable" in prometheus.fired(), "a path", within_s=120)
            cluster.skep("exec", "w1", "--", "nft", "delete table inet blocked")
            wait_until(lambda: "SkepPeerUnreachable" not in prometheus.fired(), "it is over", within_s=120)

            cluster.skep("kill", w1.name)
            lost = {"SkepNodeDown", "SkepNodeUnreachable"}
            wait_until(lambda: lost <= prometheus.fired(), "a node", within_s=90)
            assert "SkepManagerWithoutQuorum" not in prometheus.fired()

            cluster.skep("kill", "m2")
            cluster.skep("kill", "m3")
            lost = {"SkepManagerWithoutQuorum", "SkepNoLeader"}
            wait_until(lambda: lost <= prometheus.fired(), "the quorum", within_s=90)
