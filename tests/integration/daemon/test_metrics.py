"""A real Prometheus finds a node by ``/sd``, reads its page, and its alerts fire."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.support.daemon_rig import INIT, DaemonRig, wait_until
from tests.support.documents import ROOT
from tests.support.playground_rig import UNPACKED

pytestmark = [pytest.mark.needs("prometheus", "promtool"), pytest.mark.timeout(150)]

RULES = ROOT / "packaging/prometheus/skep-alerts.yml"
ADDR = "127.0.0.1:9323"


def within(rig: DaemonRig, *command: str) -> list[str]:
    """A command in the daemon's network namespace."""
    assert rig.process is not None
    return ["nsenter", "-t", str(rig.process.pid), "-n", *command]


def fetched(rig: DaemonRig, url: str) -> str:
    script = (
        "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=10).read().decode(), end='')"
    )
    done = subprocess.run(
        within(rig, sys.executable, "-c", script, url),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.stdout if done.returncode == 0 else ""


def asked(rig: DaemonRig, path: str) -> Any:
    text = fetched(rig, f"http://127.0.0.1:9090/api/v1/{path}")
    return json.loads(text)["data"] if text else None


def a_service(name: str, constraint: str) -> dict[str, Any]:
    template = {
        "ContainerSpec": {"Image": "sleep", "Command": ["sleep", "600"]},
        "Placement": {"Constraints": [constraint]},
    }
    return {"Name": name, "TaskTemplate": template, "Mode": {"Replicated": {"Replicas": 2}}}


def test_prometheus_finds_the_nodes_reads_them_and_alerts(rig: DaemonRig, tmp_path: Path) -> None:
    rig.start("--metrics-addr", ADDR)
    assert rig.ask("POST", "/swarm/init", INIT)[0] == 200
    wait_until(
        lambda: "swarm_manager_leader 1" in fetched(rig, f"http://{ADDR}/metrics"), "the manager is on it"
    )
    for name, constraint in (("web", "node.role==manager"), ("nowhere", "node.labels.x==y")):
        status, answer = rig.ask("POST", "/services/create", a_service(name, constraint))
        assert status == 201, answer
    wait_until(
        lambda: 'skep_service_running_tasks{service="web"} 2' in fetched(rig, f"http://{ADDR}/metrics"),
        "its tasks run",
    )
    page = fetched(rig, f"http://{ADDR}/metrics")
    assert 'skep_service_desired_tasks{service="nowhere"} 2' in page
    assert "skep_task_start_seconds_count 2" in page
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

    # The packaged files, but for the times: an alert may not wait for minutes here.
    rules = [line for line in RULES.read_text().splitlines() if not line.strip().startswith("for:")]
    (tmp_path / "skep-alerts.yml").write_text("\n".join(rules))
    packaged = (ROOT / "packaging/prometheus/prometheus.yml").read_text()
    (tmp_path / "prometheus.yml").write_text(packaged.replace("15s", "1s"))
    command = within(
        rig,
        *(str(UNPACKED / "prometheus"), f"--config.file={tmp_path}/prometheus.yml"),
        *(f"--storage.tsdb.path={tmp_path}/data", "--web.listen-address=127.0.0.1:9090"),
    )
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as prometheus:
        try:

            def fired() -> set[str]:
                alerts = (asked(rig, "alerts") or {"alerts": []})["alerts"]
                return {one["labels"]["alertname"] for one in alerts if one["state"] == "firing"}

            wait_until(lambda: "SkepServiceNotAsWanted" in fired(), "the alert fires", within_s=60)
            (node,) = rig.get("/nodes")[1]
            query = quote('up{job="skep"}')
            value = asked(rig, f"query?query={query}")["result"]
            assert [(one["metric"]["node"], one["metric"]["role"], one["value"][1]) for one in value] == [
                (node["Description"]["Hostname"], "manager", "1")
            ]
            assert fired().isdisjoint({"SkepNodeUnreachable", "SkepNoLeader", "SkepManagerUnreachable"})
        finally:
            prometheus.terminate()


def test_the_packaged_rules_are_rules_and_their_names_are_on_the_page() -> None:
    done = subprocess.run(
        [UNPACKED / "promtool", "check", "rules", RULES],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
