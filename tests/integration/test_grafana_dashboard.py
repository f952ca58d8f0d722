"""The packaged dashboard: each query of its panels, run by a real Prometheus, says what the cluster's API says."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from math import nan
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.support.harness.documents import ROOT
from tests.support.machines.daemon_rig import wait_until
from tests.support.machines.playground_rig import (
    TestNode,
    a_playground,
    create,
    nodes_by_name,
    running,
    wait_running,
)
from tests.support.telemetry.prometheus_rig import Prometheus

pytestmark = [pytest.mark.slow, pytest.mark.needs("prometheus"), pytest.mark.timeout(400)]

DASHBOARD = json.loads((ROOT / "packaging/grafana/skep.json").read_text())
NODES = ("m1", "w1", "w2", "w3")
HELD_BYTES = 24 << 20
"""Memory that each task of a service holds.  Everything else that it needs is smaller than that."""
HOLD = f"dd if=/dev/zero of=/dev/shm/held bs=1M count={HELD_BYTES >> 20} 2>/dev/null; sleep 10000"
SERVE = "mkdir /w; dd if=/dev/zero of=/w/index.html bs=64k count=4 2>/dev/null; exec httpd -f -p 80 -h /w"
ASK = "while :; do wget -q -O /dev/null http://web/; sleep 0.05; done"


class Panels:
    """What the dashboard shows."""

    def __init__(self, prometheus: Prometheus) -> None:
        self._prometheus = prometheus

    def series(self, title: str) -> list[dict[tuple[tuple[str, str], ...], float]]:
        """Return the current value of each series, by its labels, for each query of a panel.

        Every series has the labels from which its legend is made.
        """
        (panel,) = (one for one in DASHBOARD["panels"] if one["title"] == title)
        found = []
        for target in panel["targets"]:
            query = target["expr"].replace("$service", ".*")
            answer = self._prometheus.asked(f"query?query={quote(query)}") or {"result": []}
            legend = set(re.findall(r"{{(\w+)}}", target.get("legendFormat", "")))
            assert all(legend <= one["metric"].keys() for one in answer["result"]), f"{title}: {legend}"
            found.append(
                {tuple(sorted(one["metric"].items())): float(one["value"][1]) for one in answer["result"]}
            )
        return found

    def number(self, title: str) -> float | None:
        """Return the value of a panel that is one number."""
        (values,) = self.series(title)
        return next(iter(values.values()), None)

    def by(self, label: str, title: str, query: int = 0) -> Mapping[str, float]:
        """Return the values of a panel by one label."""
        return {dict(labels)[label]: value for labels, value in self.series(title)[query].items()}


def tasks(m1: TestNode) -> Counter[str]:
    """Return the number of tasks in each state, as the API has it."""
    return Counter(task["Status"]["State"] for task in m1.client().api.tasks())


def test_each_panel_says_what_the_api_says(tmp_path: Path) -> None:
    configured = dict.fromkeys(NODES, 'metrics-addr = ":9323"\n')
    with a_playground("panels", configured=configured, managers=1, workers=3) as cluster:
        m1 = cluster.node("m1")
        m1.docker("network", "create", "-d", "overlay", "inside")
        create(m1, "holding", 2, command=("sh", "-c", HOLD))
        create(m1, "web", 1, "--network", "inside", command=("sh", "-c", SERVE))
        create(m1, "client", 1, "--network", "inside", command=("sh", "-c", ASK))
        create(m1, "nowhere", 3, "--constraint", "node.labels.x==y")
        m1.docker(
            *("service", "create", "--detach", "--name", "ended", "--restart-condition", "none"),
            *("busybox:1", "true"),
        )
        for name, count in {"holding": 2, "web": 1, "client": 1}.items():
            wait_running(m1, name, count, 120)
        prometheus = Prometheus(("nsenter", f"--net={m1.description['netns']}"))
        with prometheus.running(tmp_path):
            wait_until(lambda: prometheus.targets() == len(NODES), "all nodes are found", 60)
            panels = Panels(prometheus)
            wait_until(lambda: panels.number("Nodes ready") == len(NODES), "all nodes are ready", 60)
            numbers_are_the_apis(panels, m1)
            series_are_what_tasks_do(panels, prometheus, m1)
            cluster.skep("kill", "w3")
            wait_until(lambda: panels.number("Nodes down") == 1, "the loss of a node is shown", 90)
            assert panels.number("Nodes ready") == len(NODES) - 1
            states = Counter(node["Status"]["State"] for node in nodes_by_name(m1).values())
            assert states == {"ready": len(NODES) - 1, "down": 1}


def numbers_are_the_apis(panels: Panels, m1: TestNode) -> None:
    assert panels.number("Nodes down") in (0, None)
    assert panels.number("Leading managers") == 1
    wait_until(lambda: panels.number("Degraded services") == 1, "the service without a node is degraded", 60)
    wait_until(lambda: panels.by("service", "Missing tasks by service") == {"nowhere": 3}, "its tasks", 60)
    usage = panels.number("Store usage")
    assert usage is not None
    assert 0 < usage < 1
    names = [service["Spec"]["Name"] for service in m1.client().api.services()]
    wait_until(
        lambda: panels.number("Tasks running") == sum(len(running(m1, name)) for name in names) == 4,
        "the running tasks are counted",
        60,
    )
    wait_until(
        lambda: panels.by("state", "Tasks by state") == tasks(m1), "tasks are counted by their states", 60
    )
    assert tasks(m1).keys() >= {"running", "pending", "complete"}


def series_are_what_tasks_do(panels: Panels, prometheus: Prometheus, m1: TestNode) -> None:
    working = {"holding", "web", "client"}
    wait_until(lambda: panels.by("service", "CPU by service").keys() == working, "services have CPU", 60)
    wait_until(
        lambda: (cpu := panels.by("service", "CPU by service"))["client"] > 5 * cpu["holding"],
        "one works, and one sleeps",
        60,
    )
    wait_until(
        lambda: 2 * HELD_BYTES < panels.by("service", "Memory by service")["holding"] < 3 * HELD_BYTES,
        "both hold their memory",
        60,
    )
    assert 0 < panels.by("service", "Memory by service")["web"] < HELD_BYTES

    def received_is_sent() -> bool:
        received = panels.by("service", "Network by service").get("client", 0.0)
        sent = panels.by("service", "Network by service", 1).get("web", 0.0)
        return received > 100_000 and 0.7 < received / sent < 1.4

    wait_until(received_is_sent, "the client gets what the server sends", 120)
    assert panels.by("service", "Disk by service").keys() == working
    assert panels.by("service", "Disk by service", 1).keys() == working
    assert panels.by("node", "Node load").keys() == {*NODES}
    lags = [dict(labels) for labels in panels.series("Event loop lag, 99th percentile")[0]]
    assert {one["node"] for one in lags} == {*NODES}
    assert {one["process"] for one in lags} >= {"manager", "node"}
    assert panels.by("node", "Network repairs").keys() == {*NODES}
    choices = prometheus.asked("label/service/values?match[]=container_cpu_usage_seconds_total")
    assert set(choices) - {""} == working, "the choices of the dashboard's variable"
    create(m1, "later", 2)
    wait_running(m1, "later", 2, 60)

    def have_started() -> bool:
        median, slowest = (next(iter(values.values()), nan) for values in panels.series("Task start time"))
        return 0 < median <= slowest < 120

    wait_until(have_started, "the start of two tasks was measured", 60)
