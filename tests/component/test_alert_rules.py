"""Every packaged alert, by Prometheus' own tests of rules: it fires on series of its cause, and on no others.

Where the cause can be made in a minute, ``tests/integration/test_alerts.py`` makes it; a store that fills up or a disk
that is slow for five minutes cannot.
"""

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.machines.playground_rig import UNPACKED
from tests.support.telemetry.prometheus_rig import RULES

pytestmark = [pytest.mark.needs("promtool"), pytest.mark.timeout(60)]

MINUTES = 30
"""At a sample each."""


def always(value: float) -> str:
    return f"{value:g}x{MINUTES}"


def growing(by: float) -> str:
    return f"0+{by:g}x{MINUTES}"


def spread(name: str, labels: str, fast: float, slow: float) -> dict[str, str]:
    """A histogram in which so many values a minute are below its first bound, and so many above all but the last."""
    inside = f"{labels}," if labels else ""
    return {
        f'{name}_bucket{{{inside}le="0.1"}}': growing(fast),
        f'{name}_bucket{{{inside}le="300"}}': growing(fast + slow),
        f'{name}_bucket{{{inside}le="+Inf"}}': growing(fast + slow),
    }


def a_route(route: str, *, requests: float, errors: float, responses: float) -> dict[str, str]:
    """So many requests a minute to a route, on each of two nodes.  ``responses``: those of tasks."""
    names = {"requests_total": requests, "errors_total": errors, "response_seconds_count": responses}
    return {
        f'skep_door_{name}{{node="{node}",route="{route}"}}': growing(count)
        for name, count in names.items()
        for node in ("m1", "w1")
    }


def a_cluster(**changed: Mapping[str, str]) -> dict[str, str]:
    """Series of one manager and its containers, all well; ``changed``: those of an alert instead."""
    fsync, lag, start = (
        "etcd_disk_wal_fsync_duration_seconds",
        "skep_event_loop_lag_seconds",
        "skep_task_start_seconds",
    )
    series = {
        'up{job="skep",node="m1"}': always(1),
        'skep_manager_up{node="m1"}': always(1),
        'swarm_manager_leader{node="m1"}': always(1),
        'swarm_manager_leader{node="m2"}': always(0),
        'swarm_manager_nodes{state="down"}': always(0),
        'swarm_manager_nodes{state="ready"}': always(5),
        'skep_service_state{service="web",state="degraded"}': always(0),
        'skep_service_running_tasks{service="web"}': always(2),
        'skep_service_desired_tasks{service="web"}': always(2),
        'skep_job_last_run_failed{service="nightly"}': always(0),
        'skep_store_in_use_bytes{node="m1"}': always(10),
        'skep_store_quota_bytes{node="m1"}': always(100),
        'etcd_server_has_leader{node="m1"}': always(1),
        'skep_dns_upstream_errors_total{node="m1",reason="timeout"}': growing(1),
        'skep_disk_used_ratio{node="m1",disk="data"}': always(0.84),
        'skep_disk_inodes_used_ratio{node="m1",disk="data"}': always(0.1),
        'skep_node_session{node="m1"}': always(1),
        'skep_peer_reachable{node="m1",peer="w1"}': always(1),
        'skep_network_repairs_total{node="m1",kind="route"}': always(3),
        'skep_certificate_expires_timestamp_seconds{name="a.example"}': always(7200),
        'skep_certificate_valid_from_timestamp_seconds{name="a.example"}': always(0),
        'skep_certificate_failures{name="a.example"}': always(1),
        **a_route("a.example", requests=100, errors=4, responses=99),
        **a_route("rare.example", requests=1.5, errors=0.5, responses=1.2),
        **a_route("redirect.example", requests=100, errors=0, responses=0),
        'container_memory_working_set_bytes{name="web.1"}': always(50),
        'container_spec_memory_limit_bytes{name="web.1"}': always(100),
        **spread(fsync, 'node="m1"', 100, 0),
        **spread(lag, 'node="m1",process="node"', 100, 0),
        **spread(start, "", 100, 0),
    }
    for replaced in changed.values():
        series |= replaced
    return series


CAUSES: Mapping[str, Mapping[str, str]] = {
    "SkepNodeUnreachable": {'up{job="skep",node="m1"}': always(0)},
    "SkepManagerUnreachable": {'skep_manager_up{node="m1"}': always(0)},
    "SkepNoLeader": {'swarm_manager_leader{node="m1"}': always(0)},
    "SkepNodeDown": {'swarm_manager_nodes{state="down"}': always(1)},
    "SkepServiceDegraded": {'skep_service_state{service="web",state="degraded"}': always(1)},
    "SkepJobFailed": {'skep_job_last_run_failed{service="nightly"}': always(1)},
    "SkepStoreNearlyFull": {'skep_store_in_use_bytes{node="m1"}': always(85)},
    "SkepStoreDiskSlow": spread("etcd_disk_wal_fsync_duration_seconds", 'node="m1"', 50, 50),
    "SkepManagerWithoutQuorum": {'etcd_server_has_leader{node="m1"}': always(0)},
    "SkepDNSUpstreamTimeouts": {'skep_dns_upstream_errors_total{node="m1",reason="timeout"}': growing(120)},
    "SkepNodeCondition": {'skep_node_condition{node="m1",condition="disk"}': always(1)},
    "SkepDiskNearlyFull": {'skep_disk_inodes_used_ratio{node="m1",disk="data"}': always(0.86)},
    "SkepDiskFull": {'skep_node_condition{node="m1",condition="disk-pressure"}': always(1)},
    "SkepNodeWithoutSession": {'skep_node_session{node="m1"}': always(0)},
    "SkepPeerUnreachable": {'skep_peer_reachable{node="m1",peer="w1"}': always(0)},
    "SkepNetworkRepairs": {'skep_network_repairs_total{node="m1",kind="route"}': growing(5)},
    "SkepTaskStartSlow": spread("skep_task_start_seconds", "", 50, 50),
    "SkepEventLoopLag": spread("skep_event_loop_lag_seconds", 'node="m1",process="node"', 50, 50),
    "SkepCertificateNotRenewed": {
        'skep_certificate_expires_timestamp_seconds{name="a.example"}': always(1200)
    },
    "SkepCertificateMissing": {'skep_certificate_failures{name="new.example"}': always(3)},
    "SkepRouteErrors": a_route("a.example", requests=100, errors=6, responses=99),
    "SkepRouteWithoutTask": a_route("a.example", requests=1, errors=1, responses=0),
    "SkepContainerNearMemoryLimit": {'container_memory_working_set_bytes{name="web.1"}': always(97)},
}
"""What is other than in a well cluster."""


def fired(series: Mapping[str, str], directory: Path) -> set[str]:
    """The alerts that fire after half an hour of ``series``: all for which the test of "none" fails."""
    document = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": one, "values": values} for one, values in series.items()],
                "alert_rule_test": [
                    {"alertname": name, "eval_time": f"{MINUTES - 5}m", "exp_alerts": []} for name in CAUSES
                ],
            }
        ],
    }
    file = directory / "rules-test.json"
    file.write_text(json.dumps(document))  # JSON is YAML
    done = subprocess.run(
        [UNPACKED / "promtool", "test", "rules", file],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    shown = done.stdout + done.stderr
    found = set(re.findall(r"alertname:\s*(\w+), time", shown))
    assert (done.returncode == 0) is (found == set()), shown
    return found


def test_a_well_cluster_has_no_alert(tmp_path: Path) -> None:
    assert fired(a_cluster(), tmp_path) == set()


@pytest.mark.parametrize("alert", CAUSES)
def test_each_alert_has_its_cause_alone(alert: str, tmp_path: Path) -> None:
    assert fired(a_cluster(cause=CAUSES[alert]), tmp_path) == {alert}


def test_a_disk_is_nearly_full_by_its_bytes_without_its_inodes(tmp_path: Path) -> None:
    used = {'skep_disk_used_ratio{node="m1",disk="data"}': always(0.86)}
    assert fired(a_cluster(cause=used), tmp_path) == {"SkepDiskNearlyFull"}


def test_every_packaged_alert_is_here() -> None:
    assert set(re.findall(r"- alert: (\w+)", RULES.read_text())) == set(CAUSES)
