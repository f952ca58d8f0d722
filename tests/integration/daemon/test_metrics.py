"""A real Prometheus finds a node by ``/sd``, reads its page, and its alerts fire."""

import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.support.machines.daemon_rig import INIT, DaemonRig, wait_until
from tests.support.machines.playground_rig import UNPACKED
from tests.support.telemetry.prometheus_rig import RULES, Prometheus

pytestmark = [pytest.mark.needs("prometheus", "promtool"), pytest.mark.timeout(150)]

ADDR = "127.0.0.1:9323"
UP = 'up{job="skep"}'


def a_service(name: str, constraint: str) -> dict[str, Any]:
    template = {
        "ContainerSpec": {"Image": "sleep", "Command": ["sleep", "600"]},
        "Placement": {"Constraints": [constraint]},
    }
    return {"Name": name, "TaskTemplate": template, "Mode": {"Replicated": {"Replicas": 2}}}


def prometheus_of(rig: DaemonRig) -> Prometheus:
    """In the daemon's network namespace."""
    assert rig.process is not None
    return Prometheus(("nsenter", "-t", str(rig.process.pid), "-n"))


def test_prometheus_finds_the_nodes_reads_them_and_alerts(rig: DaemonRig, tmp_path: Path) -> None:
    rig.start("--metrics-addr", ADDR)
    prometheus = prometheus_of(rig)

    def metrics() -> str:
        return prometheus.fetched(f"http://{ADDR}/metrics")

    assert rig.ask("POST", "/swarm/init", INIT)[0] == 200
    wait_until(lambda: "swarm_manager_leader 1" in metrics(), "the manager is on it")
    for name, constraint in (("web", "node.role==manager"), ("nowhere", "node.labels.x==y")):
        status, response = rig.ask("POST", "/services/create", a_service(name, constraint))
        assert status == 201, response
    wait_until(lambda: 'skep_service_running_tasks{service="web"} 2' in metrics(), "its tasks run")
    page = metrics()
    assert 'skep_service_desired_tasks{service="nowhere"} 2' in page
    assert "skep_task_start_seconds_count 2" in page
    assert "swarm_dispatcher_scheduling_delay_seconds_count 2" in page
    assert "swarm_node_manager 1" in page
    assert rig.get("/metrics")[0] == 200
    checked = subprocess.run(
        [UNPACKED / "promtool", "check", "metrics"],
        input=page,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "error while linting" not in checked.stderr, checked.stderr

    with prometheus.running(tmp_path):
        wait_until(lambda: "SkepServiceDegraded" in prometheus.fired(), "the alert fires", within_s=60)
        (node,) = rig.get("/nodes")[1]
        value = prometheus.asked(f"query?query={quote(UP)}")["result"]
        assert [(one["metric"]["node"], one["metric"]["role"], one["value"][1]) for one in value] == [
            (node["Description"]["Hostname"], "manager", "1")
        ]
        wrong = {"SkepNodeUnreachable", "SkepNoLeader", "SkepManagerUnreachable", "SkepManagerWithoutQuorum"}
        assert prometheus.fired().isdisjoint(wrong)


def test_the_packaged_rules_are_rules_and_their_names_are_on_the_page() -> None:
    done = subprocess.run(
        [UNPACKED / "promtool", "check", "rules", RULES],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
