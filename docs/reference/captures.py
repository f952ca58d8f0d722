"""What the screens of the command look like: the code that prints them, on a cluster with something wrong."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from skep.cli.explain import about_service, about_task
from skep.cli.history import lines_of as history_lines
from skep.cli.output import Screen
from skep.cli.recover import Kept, plan
from skep.cli.runs import shown
from skep.cli.status import Cluster, Status, lines_of, node_rows, service_rows

NOW = 1_769_860_800.0
"""2026-01-31T12:00:00Z"""
_AT = datetime.fromtimestamp(NOW, UTC)
_COLUMNS = 110
_CRASH = (
    '0 of 2 tasks run; crash loop, 8 failures in a row: exit 3, last line "boom: cannot connect to db"; '
    "next attempt at 12:00:04 UTC"
)
_REFUSED = "no suitable node (insufficient resources on 3 nodes)"


def screens() -> str:
    """The page."""
    return "\n".join(
        [
            "# Screens",
            "",
            "<!-- Written by `make reference`; edit the code, or docs/reference/captures.py. -->",
            "",
            "What `skep` prints on a terminal of 110 columns about a cluster with something wrong; there, what is not",
            "well is coloured. The commands: [cli.md](cli.md).",
            "",
            *_capture("skep status", lines_of(_status(), Screen(columns=_COLUMNS))),
            *_capture("skep explain boom", about_service("boom", _boom(), NOW)),
            *_capture("skep explain stuck.1", about_task("stuck.1", _stuck(), NOW)),
            *_capture("skep runs boom", shown({"Runs": [_run()]}, Screen(columns=_COLUMNS), NOW)),
            *_capture("skep history boom", history_lines(_HISTORY, Screen(columns=_COLUMNS), _AT)),
            *_capture(
                "skep cluster recover --dry-run",
                (f"{word.ljust(11)}{text}" for word, text in plan(_INFO, _QUORUM, _KEPT)),
            ),
        ]
    )


def _capture(command: str, lines: Iterable[str]) -> list[str]:
    return [f"## `{command}`", "", "```text", *lines, "```", ""]


def _node(name: str, state: str = "ready", message: str = "", **more: Any) -> dict[str, Any]:
    engine = {"EngineVersion": "skep 0.1.0"}
    status = {"State": state, "Message": message}
    return {"ID": name, "Description": {"Hostname": name, "Engine": engine}, "Status": status, **more}


def _service(name: str, running: int, wanted: int, **more: Any) -> dict[str, Any]:
    status = {"RunningTasks": running, "DesiredTasks": wanted}
    return {"ID": name, "Spec": {"Name": name, "Mode": {}}, "ServiceStatus": status, **more}


def _status() -> Status:
    manager = {"ManagerStatus": {"Reachability": "reachable"}}
    leader = {"ManagerStatus": {"Reachability": "reachable", "Leader": True}}
    nodes = [
        _node("m1", Load=0.12, **manager),
        _node("m2", Load=0.08, **leader),
        _node("m3", Load=0.31, **manager),
        _node("w1", "down", "heartbeat failure"),
    ]
    updated = {"State": "completed", "CompletedAt": "2026-01-31T11:57:00Z"}
    paused = {"State": "paused", "Message": "manually paused", "StartedAt": "2026-01-31T11:48:00Z"}
    services = [
        _service("api", 3, 3, UpdateStatus=paused),
        _service("boom", 0, 2),
        _service("stuck", 0, 3),
        _service("web", 4, 4, UpdateStatus=updated),
    ]
    explained = {
        "boom": {"Summary": _CRASH, "IsAsWanted": False},
        "stuck": {"Summary": f"0 of 3 tasks run; 3 wait: {_REFUSED}", "IsAsWanted": False},
    }
    running = ["m1", "m1", "m2", "m2", "m2", "m3", "m3"]
    cluster = Cluster(
        leader="m2",
        nodes=tuple(node_rows(nodes, running)),
        services=tuple(service_rows(services, explained, NOW)),
    )
    about = (
        ("node", "m1, skep 0.1.0, 2 CPUs, 23.5 GiB"),
        ("swarm", "active, this node is a manager with the id 7me94608blfye704qouf525ku"),
        ("containers", "2 running, 4 images"),
        ("store", "1 % in use, file 12 MiB"),
    )
    return Status(health="degraded", node=about, cluster=cluster)


def _entry(clock: str, message: str, severity: str = "info", **more: Any) -> dict[str, Any]:
    return {"Time": f"2026-01-31T{clock}Z", "Message": message, "Severity": severity, **more}


_HISTORY = {
    "Entries": [
        _entry("11:48:01", "create service boom", By={"User": "root", "UID": 0, "Node": "m1"}),
        _entry("11:48:01", "service boom created: 2 × shop/api:7, replicated"),
        _entry("11:48:02", "task boom.1 on m2 failed: exit code 3", "error"),
        _entry(
            "11:48:07",
            "task boom.1 (5rtugg83s0k5e2d81lhsb36fe) is replaced: it failed: exit code 3",
            "warning",
        ),
        _entry("11:59:30", "node w1 is down: heartbeat failure", "error"),
    ],
    "Next": "",
    "Total": 5,
}


def _boom() -> dict[str, Any]:
    waits = {
        "Tasks": 2,
        "Summary": "next attempt at 12:00:04 UTC (crash loop, 8th)",
        "Name": "boom.1",
        "Example": "",
    }
    failed = {
        "Tasks": 8,
        "Summary": "its process ended with code 3: task: non-zero exit (3)",
        "Example": "5rtugg83s0k5e2d81lhsb36fe",
    }
    return {"Summary": _CRASH, "Reasons": [waits], "Failures": [failed]}


def _stuck() -> dict[str, Any]:
    refusal = "insufficient resources: 512000 MiB of memory wanted, 24106 not reserved"
    return {
        "Summary": _REFUSED,
        "State": "pending",
        "DesiredState": "running",
        "Since": "2026-01-31T11:56:50Z",
        "Nodes": [{"Hostname": name, "Refusals": [refusal]} for name in ("m1", "m2", "m3")]
        + [{"Hostname": "w1", "Refusals": ["the node is down (heartbeat failure)"]}],
    }


def _run() -> dict[str, Any]:
    return {
        "Name": "boom.1",
        "Hostname": "m3",
        "State": "failed",
        "ExitCode": 3,
        "EndedAt": "2026-01-31T11:59:52Z",
        "TaskID": "5rtugg83s0k5e2d81lhsb36fe",
        "Lines": ["starting", "boom: cannot connect to db"],
    }


_INFO = {"Name": "m1", "Swarm": {"NodeID": "m1"}}
_COUNTS = {"services": 4, "tasks": 12, "nodes": 4, "networks": 3, "secrets": 2, "configs": 1}
_KEPT = Kept(revision=48213, counts=_COUNTS)
_QUORUM = {
    "Managers": [
        {"ID": "m1", "Hostname": "m1", "Addr": "192.0.2.11:2377", "Answers": True},
        {"ID": "m2", "Hostname": "m2", "Addr": "192.0.2.12:2377", "Answers": False, "SilentSeconds": 372.0},
        {"ID": "m3", "Hostname": "m3", "Addr": "192.0.2.13:2377", "Answers": False, "SilentSeconds": 372.0},
    ]
}
