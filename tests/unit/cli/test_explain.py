"""What `skep explain` prints of services, tasks, nodes and networks: the headline first, ages, names before ids."""

from typing import Any

import pytest

from skep.cli.see.explain import about_network, about_node, about_service, about_task
from skep.model.swarm import FROZEN

NOW = 1_769_860_800.0
"""2026-01-31T12:00:00Z"""


def test_a_task_begins_with_its_headline_and_says_for_how_long() -> None:
    task = {
        "Summary": "no suitable node (insufficient resources on 2 nodes)",
        "State": "pending",
        "DesiredState": "running",
        "Since": "2026-01-31T11:56:50Z",
        "Nodes": [
            {
                "Hostname": name,
                "NodeID": name,
                "Reasons": ["512000 MiB of memory requested, 24106 not reserved"],
            }
            for name in ("w2", "m1")
        ],
    }
    assert list(about_task("web.1", task, NOW)) == [
        "web.1: no suitable node (insufficient resources on 2 nodes)",
        "  pending for 3m 10s, desired: running",
        "  all 2 nodes: 512000 MiB of memory requested, 24106 not reserved",
    ]
    task["Nodes"] = [{"Hostname": "w2", "Reasons": ["small"]}, {"Hostname": "m1", "Reasons": ["drained"]}]
    assert list(about_task("web.1", task, NOW))[2:] == ["  NODE  REASON", "  m1    drained", "  w2    small"]


@pytest.mark.parametrize(
    ("kind", "reason", "last"),
    [
        ("waiting", "it waits for shop_db to be healthy", "  Next: skep explain shop_db"),
        (
            "dependency",
            "it waits for shop_m to complete, which has failed",
            "  Next: skep explain shop_m",
        ),
        (
            "dependency",
            "it waits for shop_web to be started, which waits for shop_m to complete, which has failed",
            "  Next: skep explain shop_m",
        ),
        ("waiting", "it waits for service db, which has 0 of 1 tasks", "  Next: skep explain db"),
        ("progressing", "it waits for its networks and ports", "web: s"),
    ],
)
def test_a_service_that_waits_for_another_one_names_the_command_about_that_one(
    kind: str, reason: str, last: str
) -> None:
    service = {"Summary": "s", "Reason": reason, "Problem": {"Kind": kind}, "Reasons": [], "Failures": []}
    assert list(about_service("web", service, NOW))[-1] == last


def test_a_service_names_the_task_to_look_at_and_an_update_says_for_how_long_it_may_go_on() -> None:
    service = {
        "Summary": "0 of 1 tasks run",
        "Update": {
            "Step": "0 of 1 tasks are new",
            "WaitingFor": "task x",
            "Deadline": "2026-01-31T12:09:40Z",
        },
        "Reasons": [{"Tasks": 1, "Summary": "it waits", "Example": "4pwj9jbl5hxo", "Name": "web.1"}],
        "Failures": [{"Tasks": 2, "Summary": "exit 3", "Example": "9x1"}],
    }
    assert list(about_service("web", service, NOW)) == [
        "web: 0 of 1 tasks run",
        "  update: 0 of 1 tasks are new, waiting for task x, for 9m 40s more",
        "  1 waiting: it waits  (skep explain web.1)",
        "  2 failed: exit 3  (skep explain 9x1)",
    ]


def test_the_sentence_of_the_headline_is_not_said_again_and_the_output_is_below_it() -> None:
    reason = 'unhealthy: its health check "exit 1" failed 2 times in a row, last: exit 1, output "no"'
    service: dict[str, Any] = {
        "Summary": f"{reason}; 0 of 1 tasks run",
        "Reason": reason,
        "Reasons": [{"Tasks": 1, "Summary": reason, "Example": "t2", "Name": "web.1"}],
        "Failures": [
            {"Tasks": 5, "Summary": reason, "Example": "t1"},
            {"Tasks": 1, "Summary": "exit 3", "Example": "t0"},
        ],
        "Problem": {
            "End": {
                "Cause": "unhealthy",
                "HealthOutput": "no",
                "Lines": [{"Text": "listening"}],
            }
        },
    }
    assert list(about_service("web", service, NOW)) == [
        f"web: {reason}; 0 of 1 tasks run",
        "  1 waiting  (skep explain web.1)",
        "  5 failed  (skep explain t1)",
        "  1 failed: exit 3  (skep explain t0)",
        "  last failed health check:",
        "    | no",
        "  last lines of output:",
        "    | listening",
    ]


def test_a_signal_that_skep_sent_is_not_named() -> None:
    task = {
        "Summary": "unhealthy",
        "State": "failed",
        "DesiredState": "shutdown",
        "Since": "2026-01-31T11:59:50Z",
    }
    unhealthy = {**task, "End": {"Cause": "unhealthy", "Signal": "SIGKILL"}}
    assert "SIGKILL" not in "".join(about_task("web.1", unhealthy, NOW))
    killed = {**task, "End": {"Cause": "signal", "Signal": "SIGKILL"}}
    assert "  cause: signal (SIGKILL)" in list(about_task("web.1", killed, NOW))


def test_an_autoscaled_service_says_what_it_follows_and_what_was_done_last() -> None:
    service: dict[str, Any] = {"Summary": "4 of 4 tasks run: healthy", "Reasons": [], "Failures": []}
    service["Autoscaling"] = {
        "Min": 2,
        "Max": 10,
        "Metrics": [{"Name": "cpu", "Target": 60, "Average": 58.2}, {"Name": "memory", "Target": 80}],
        "Unmeasured": 0,
        "Summary": "cpu 58%, target 60%, over 4 tasks",
        "LastChange": {
            "Before": 2,
            "After": 4,
            "Reason": "cpu 113%, target 60%",
            "At": "2026-01-31T11:48:00Z",
        },
    }
    assert list(about_service("web", service, NOW))[1:] == [
        "  autoscaling, 2 to 10 tasks: cpu 58%, target 60%, memory not known, target 80%",
        "    now: cpu 58%, target 60%, over 4 tasks",
        "    last: 2 → 4, 12m ago: cpu 113%, target 60%",
    ]


def test_measures_of_a_whole_service_have_their_total_and_the_target_of_a_task() -> None:
    service: dict[str, Any] = {"Summary": "4 of 4 tasks run: healthy", "Reasons": [], "Failures": []}
    metrics = [
        {"Name": "requests", "Target": 50.0, "Total": 123.4},
        {"Name": "query", "Target": 2.5, "Problem": "timeout"},
    ]
    service["Autoscaling"] = {"Min": 2, "Max": 10, "Metrics": metrics, "Unmeasured": 0, "Summary": "why"}
    shown = "requests 123.4, target 50 for each task, query not known, target 2.5 for each task"
    assert f"  autoscaling, 2 to 10 tasks: {shown}" in list(about_service("web", service, NOW))


def test_a_paused_update_names_the_commands_that_go_on() -> None:
    service: dict[str, Any] = {"Summary": "2 of 2 tasks run: healthy", "Reasons": [], "Failures": []}
    service["UpdateStatus"] = {"State": "paused", "Message": "manually paused"}
    line = "  it is paused. Run skep update resume web, or skep update abort web."
    assert line in list(about_service("web", service, NOW))
    service["UpdateStatus"]["State"] = "rollback_paused"
    assert "  it is paused. Run skep update resume web." in list(about_service("web", service, NOW))


def test_a_lost_manager_is_demoted_before_it_is_forgotten() -> None:
    node = {
        "ID": "n1",
        "CreatedAt": "2026-01-31T10:00:00Z",
        "Description": {"Hostname": "m1"},
        "Status": {"State": "down"},
        "Spec": {"Role": "manager", "Availability": "active"},
        "TaskStates": {},
    }
    lines = list(about_node("m1", node, NOW))
    assert lines[1].endswith("run docker node demote m1 and then skep node forget m1.")
    lines = list(about_node("m1", {**node, "HasLeader": False}, NOW))
    assert lines[1] == "  nothing replaces its tasks while there is no leader."
    assert "forget" not in "".join(lines), "no manager accepts changes"


def test_a_node_and_a_network_are_explained_as_well() -> None:
    node = {
        "ID": "n1",
        "CreatedAt": "2026-01-31T10:00:00Z",
        "Description": {"Hostname": "w1", "Resources": {"NanoCPUs": 2 * 10**9, "MemoryBytes": 4 << 30}},
        "Status": {"State": "down", "Message": "heartbeat failure", "Addr": "192.0.2.1"},
        "Spec": {"Role": "worker", "Availability": "drain"},
        "TaskStates": {"running": 2},
    }
    lines = list(about_node("w1", node, NOW))
    assert lines[0] == "w1: down: heartbeat failure"
    assert lines[1].endswith("If the node is lost for good, run skep node forget w1.")
    assert "availability is drain" in lines[2]
    assert lines[2].endswith("Run skep node update --availability active w1.")
    assert lines[3:] == [
        "  worker, at 192.0.2.1, 2 CPUs, 4.0 GiB, ",
        "  tasks: 2 running",
        "  joined 2h ago, ID n1",
    ]
    frozen = {**node, "Status": {"State": "down", "Message": f"heartbeat failure; {FROZEN}"}}
    _, fate, *_ = about_node("w1", frozen, NOW)
    assert "services replace its tasks" not in fate
    assert "run skep cluster resume" in fate
    assert fate.endswith("then run skep node forget w1.")
    lost = {
        **node,
        "Silence": "no response for 9 s",
        "ManagerStatus": {"Leader": True, "Reachability": "reachable"},
    }
    lost["Status"] = {"State": "ready", "Addr": "192.0.2.1"}
    headline, _, role, *_ = about_node("m1", lost, NOW)
    assert (headline, role.split(" at ")[0]) == ("w1: unreachable: no response for 9 s", "  manager,")
    network = {
        "Id": "x1",
        "Name": "back",
        "Driver": "overlay",
        "Scope": "swarm",
        "Created": "2026-01-31T11:00:00Z",
        "Internal": True,
        "IPAM": {"Config": [{"Subnet": "10.0.1.0/24", "Gateway": "10.0.1.1"}]},
        "ServiceNames": ["db", "web"],
    }
    assert list(about_network("back", network, NOW)) == [
        "back: overlay network of the swarm, used by db, web",
        "  10.0.1.0/24, gateway 10.0.1.1",
        "  internal",
        "  created 1h ago, ID x1",
    ]
    full = "250 of 253 addresses are in use: give the network another subnet"
    assert list(about_network("back", {**network, "Warnings": [full]}, NOW))[1] == f"  {full}"


def test_a_node_shows_what_it_keeps_and_labels_without_effect() -> None:
    labels = {
        "skep.reserve.cpus": "0.5",
        "skep.reserve.memory": "256MiB",
        "skep.reserve.cpu": "1",
        "skep.zzzz": "",
        "zone": "a",
    }
    node = {
        "ID": "n1",
        "CreatedAt": "2026-01-31T10:00:00Z",
        "Description": {"Hostname": "w1"},
        "Status": {"State": "ready"},
        "Spec": {"Role": "worker", "Availability": "active", "Labels": labels},
        "TaskStates": {},
    }
    assert list(about_node("w1", node, NOW))[2:5] == [
        "  keeps 0.5 CPUs and 256 MiB for the system, which tasks cannot reserve",
        "  unknown label skep.reserve.cpu: it has no effect, did you mean skep.reserve.cpus?",
        "  unknown label skep.zzzz: it has no effect",
    ]


def test_the_smallest_change_is_shown_for_a_service_and_for_a_task() -> None:
    change = "w2 would run it with 512 MiB of memory more"
    service = {"Summary": "0 of 1 tasks run", "Reasons": [], "Failures": [], "SmallestChange": change}
    assert f"  smallest change: {change}" in list(about_service("web", service, 0.0))
    task = {"Summary": "no suitable node", "State": "pending", "DesiredState": "running"}
    shown = about_task("web.1", task | {"Since": "2026-01-01T00:00:00Z", "SmallestChange": change}, 0.0)
    assert f"  smallest change: {change}" in list(shown)


def test_the_age_of_a_jobs_end_follows_its_result() -> None:
    job = {"Summary": "1 of 1 completed; not on w2, which is down", "EndedAt": "2026-01-31T11:48:00Z"}
    (line,) = about_service("scan", {**job, "Reasons": [], "Failures": []}, NOW)
    assert line == "scan: 1 of 1 completed, 12m ago; not on w2, which is down"
