"""The page of a node with containers."""

import re

import pytest

from tests.support.harness.documents import ROOT
from tests.support.machines.daemon_rig import Connection
from tests.support.machines.playground_rig import TestNode, create, wait_running, wait_until

pytestmark = pytest.mark.timeout(120)

_NAME = re.compile(r"\b(?:skep|swarm|engine|container|process|etcd)_[a-z_]+\b")


def page(node: TestNode) -> str:
    connection = Connection(node.socket.removeprefix("unix://"))
    try:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return response.read().decode()
    finally:
        connection.close()


def test_containers_are_on_the_page_by_service_and_every_name_is_in_the_reference(m1: TestNode) -> None:
    failed = re.compile(r"^engine_daemon_health_checks_failed_total \d+$", re.MULTILINE)
    failed_before = failed.findall(page(m1))
    create(m1, "web", 1, "--health-cmd", "true", "--health-interval", "1s")
    wait_running(m1, "web", 1)
    used = re.compile(
        r'^container_memory_usage_bytes\{name="web\.1\.\w+",image="busybox:1[^"]*",service="web",'
        r'task="web\.1\.\w+",stack=""\} [1-9]\d+$',
        re.MULTILINE,
    )
    wait_until(lambda: used.search(page(m1)), "its memory is on the page")
    found = page(m1)
    assert re.search(r"^etcd_disk_wal_fsync_duration_seconds_count [1-9]", found, re.MULTILINE)
    assert re.search(r"^engine_daemon_health_checks_total [1-9]", found, re.MULTILINE)
    assert failed.findall(found) == failed_before != []
    assert "swarm_node_manager 1" in found
    cluster = m1.docker("info", "--format", "{{.Swarm.Cluster.ID}}").stdout.strip()
    assert re.search(rf'^swarm_node_info\{{node_id="\w+",swarm_id="{cluster}"\}} 1$', found, re.MULTILINE)
    started = r'^engine_daemon_container_actions_seconds_count\{action="start"\} [1-9]'
    assert re.search(started, found, re.MULTILINE)
    assert "skep_store_in_use_bytes" in found
    assert 'skep_service_running_tasks{service="web"} 1' in found
    assert 'engine_daemon_container_states_containers{state="running"} 1' in found
    assert 'process_resident_memory_bytes{process="manager"}' in found
    named = set(_NAME.findall((ROOT / "docs/reference/metrics.md").read_text()))
    shown = {line.split()[2] for line in found.splitlines() if line.startswith("# TYPE ")}
    assert shown <= named
    packaged = ("packaging/prometheus/skep-alerts.yml", "packaging/grafana/skep.json")
    wanted = {name for path in packaged for name in _NAME.findall((ROOT / path).read_text())}
    assert {name.removesuffix("_bucket").removesuffix("_count") for name in wanted} - {
        "container_cpu_usage_seconds_total"
    } <= named


def test_what_containers_ask_for_names_is_counted(m1: TestNode) -> None:
    """By the process that answers them, which is not the node's."""
    m1.docker("network", "create", "--driver", "overlay", "names")
    create(m1, "web", 1, "--network", "names")
    (task,) = wait_running(m1, "web", 1)

    def counted(*labels: str) -> int:
        line = re.compile(
            rf"^skep_dns_\w+_total{{{','.join(re.escape(label) for label in labels)}}} (\d+)$", re.MULTILINE
        )
        return sum(map(int, line.findall(page(m1))))

    in_network = ('source="network"', 'code="NOERROR"')
    questions, responses = counted('type="A"'), counted(*in_network)
    container = task["Status"]["ContainerStatus"]["ContainerID"]
    m1.docker("exec", container, "nslookup", "-type=a", "web")
    # A page is made once a second at most.
    wait_until(lambda: counted('type="A"') > questions, "the question is counted")
    assert counted(*in_network) > responses
