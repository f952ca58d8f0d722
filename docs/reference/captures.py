"""Screens of the command, printed by its own code for a cluster with problems."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from click import unstyle

from docs.reference.captured_runs import (
    compared_revisions,
    deployed,
    happened,
    made,
    upgrade_planned,
    upgraded,
)
from skep.cli.cluster.recover import StoredCluster, plan
from skep.cli.maintain.doctor import shown as paths_shown
from skep.cli.maintain.version import versions
from skep.cli.output import Screen
from skep.cli.see.explain import about_service, about_task
from skep.cli.see.history import lines_of as history_lines
from skep.cli.see.runs import shown
from skep.cli.see.status import ClusterStatus, StatusScreen, lines_of, node_rows, service_rows
from skep.cli.stack.stack_screens import planned, revisions
from skep.errors import Unavailable
from skep.model.options.labels import STACK_CHANGES, STACK_STATE
from skep.model.service import ServiceSpec, UpdateConfig, UpdateOrder
from skep.stack.planning import (
    Difference,
    NodeShare,
    PlacementRefusal,
    PlanAction,
    PlannedChange,
    PredictedPlacement,
    StackPlan,
)
from skep.stack.revisions import StackRevision, state_after

NOW = 1_769_860_800.0
"""2026-01-31T12:00:00Z"""
_AT = datetime.fromtimestamp(NOW, UTC)
_COLUMNS = 110
_CRASH = 'exit 3, last line "boom: cannot connect to db"'
_COURSE = "crash loop, 8 failures in a row since 11:48:02 UTC, the last on m2; next attempt at 12:00:04 UTC"
_REFUSED = "no suitable node (insufficient resources on 3 nodes)"


def screens() -> str:
    """The page."""
    return "\n".join(
        [
            "# Screens",
            "",
            "<!-- Written by `make reference`; edit the code, or docs/reference/captures.py. -->",
            "",
            "This page shows what `skep` prints about a cluster with problems, on a terminal of 110 columns. Terminals",
            "also show problems in color. Tables are cut to its width, but events, progress and errors are not. See",
            "[cli.md](cli.md) for the commands.",
            "",
            *_capture("skep status", lines_of(_status(), Screen(columns=_COLUMNS))),
            *_capture("skep explain boom", about_service("boom", _boom(), NOW)),
            *_capture("skep explain stuck.1", about_task("stuck.1", _stuck(), NOW)),
            *_capture("skep runs boom", shown("boom", {"Runs": [_run()]}, Screen(columns=_COLUMNS), NOW)),
            *_capture("skep history boom", history_lines(_HISTORY, Screen(columns=_COLUMNS), _AT)),
            *_capture("skep stack plan", planned(_PLAN).lines(Screen(columns=_COLUMNS))),
            *_capture("skep stack deploy -c compose.yaml shop", deployed()),
            *_capture(
                "skep stack deploy -c compose.yaml shop",
                deployed(fails=True),
                ", of an image that fails",
            ),
            *_capture(
                "skep stack history shop", revisions(_revisions(), NOW).lines(Screen(columns=_COLUMNS))
            ),
            *_capture("skep stack diff shop 1 2", compared_revisions()),
            *_capture("skep events", happened()),
            *_capture("skep doctor network", paths_shown(_PATHS, Screen(columns=_COLUMNS))),
            *_capture("skep version --all", versions(_VERSIONS).lines(Screen(columns=_COLUMNS))),
            *_capture(
                "skep upgrade --dry-run --package skep_0.2.0_amd64.deb",
                upgrade_planned(),
                ", with a manager down",
            ),
            *_capture("skep upgrade --package skep_0.2.0_amd64.deb", upgraded()),
            *_capture(
                "skep upgrade --package skep_0.2.0_amd64.deb",
                upgraded(breaks="m1"),
                ", to one that fails",
            ),
            *_capture("skep up --package skep_0.2.0_amd64.deb root@m1 root@w1 root@w2", made()),
            *_capture(
                "skep up --package skep_0.2.0_amd64.deb root@m1 root@w1 root@w2",
                made(kernel="4.19.0", free_kib=200 << 10),
                ", of which one is not suitable",
            ),
            *_capture(
                "skep cluster recover --dry-run",
                (f"{word.ljust(11)}{text}" for word, text in plan(_INFO, _QUORUM, _KEPT)),
            ),
        ]
    )


def _capture(command: str, lines: Iterable[str], circumstances: str = "") -> list[str]:
    return [f"## `{command}`{circumstances}", "", "```text", *map(unstyle, lines), "```", ""]


def _node(name: str, state: str = "ready", message: str = "", **more: Any) -> dict[str, Any]:
    engine = {"EngineVersion": "skep 0.1.0"}
    status = {"State": state, "Message": message}
    return {"ID": name, "Description": {"Hostname": name, "Engine": engine}, "Status": status, **more}


def _service(
    name: str, running: int, wanted: int, problem: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    health = {"State": "degraded", **problem} if problem is not None else {"State": "healthy"}
    status = {"RunningTasks": running, "DesiredTasks": wanted, "Health": health}
    return {"ID": name, "Spec": {"Name": name, "Mode": {}}, "ServiceStatus": status, **more}


def _status() -> StatusScreen:
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
    crash = {"Reason": _CRASH, "RestartSummary": _COURSE, "Since": "2026-01-31T11:48:02Z", "Weight": 0}
    stuck = {"Reason": _REFUSED, "Weight": 1}
    services = [
        _service(
            "api", 3, 3, {"Reason": "manually paused", "Since": paused["StartedAt"]}, UpdateStatus=paused
        ),
        _service("boom", 0, 2, crash),
        _service("stuck", 0, 3, stuck),
        _service("web", 4, 4, UpdateStatus=updated),
    ]
    running = ["m1", "m1", "m2", "m2", "m2", "m3", "m3"]
    cluster = ClusterStatus(
        leader="m2",
        nodes=tuple(node_rows(nodes, running)),
        services=tuple(service_rows(services, NOW)),
    )
    about = (
        ("node", "m1, skep 0.1.0, 2 CPUs, 23.5 GiB"),
        ("swarm", "active, this node is a manager with the id 7me94608blfye704qouf525ku"),
        ("containers", "2 running, 4 images"),
        ("store", "1 % in use, file 12 MiB"),
    )
    return StatusScreen(health="degraded", node=about, cluster=cluster)


def _entry(clock: str, message: str, severity: str = "info", **more: Any) -> dict[str, Any]:
    return {"Time": f"2026-01-31T{clock}Z", "Message": message, "Severity": severity, **more}


_HISTORY = {
    "Entries": [
        _entry("11:48:01", "create service boom", By={"User": "root", "UID": 0, "Node": "m1"}),
        _entry("11:48:01", "service boom created: 2 × shop/api:7, replicated"),
        _entry("11:48:02", f"task boom.1 on m2 failed: {_CRASH}", "error"),
        _entry(
            "11:48:07",
            f"task boom.1 (5rtugg83s0k5e2d81lhsb36fe) is replaced: it failed: {_CRASH}",
            "warning",
        ),
        _entry("11:59:30", "node w1 is down: heartbeat failure", "error"),
    ],
    "Next": "",
    "Total": 5,
}


def _boom() -> dict[str, Any]:
    lines = [{"Text": "starting"}, {"Text": "boom: cannot connect to db"}]
    return {
        "Summary": f"{_CRASH}; {_COURSE}; 0 of 2 tasks run",
        "Reason": _CRASH,
        "RestartSummary": _COURSE,
        "IsHealthy": False,
        "Problem": {"Since": "2026-01-31T11:48:02Z", "Weight": 0, "End": {"Cause": "exit", "Lines": lines}},
        "Reasons": [{"Tasks": 2, "Summary": _CRASH, "Name": "boom.1", "Example": ""}],
        "Failures": [{"Tasks": 8, "Summary": _CRASH, "Example": "5rtugg83s0k5e2d81lhsb36fe"}],
    }


def _stuck() -> dict[str, Any]:
    refusal = "insufficient resources: 512000 MiB of memory requested, 24106 not reserved"
    return {
        "Summary": _REFUSED,
        "State": "pending",
        "DesiredState": "running",
        "Since": "2026-01-31T11:56:50Z",
        "Nodes": [{"Hostname": name, "Reasons": [refusal]} for name in ("m1", "m2", "m3")]
        + [{"Hostname": "w1", "Reasons": ["the node is down (heartbeat failure)"]}],
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
_KEPT = StoredCluster(revision=48213, counts=_COUNTS)
_QUORUM = {
    "Managers": [
        {"ID": "m1", "Hostname": "m1", "Addr": "192.0.2.11:2377", "IsReachable": True},
        {
            "ID": "m2",
            "Hostname": "m2",
            "Addr": "192.0.2.12:2377",
            "IsReachable": False,
            "UnreachableSeconds": 372.0,
        },
        {
            "ID": "m3",
            "Hostname": "m3",
            "Addr": "192.0.2.13:2377",
            "IsReachable": False,
            "UnreachableSeconds": 372.0,
        },
    ]
}

_PLAN = StackPlan(
    stack="shop",
    changes=(
        PlannedChange(action=PlanAction.CREATE, kind="config", name="shop_site-4cb2984f1f"),
        PlannedChange(
            action=PlanAction.UPDATE,
            kind="service",
            name="shop_web",
            spec=ServiceSpec(update_config=UpdateConfig(parallelism=2, order=UpdateOrder.START_FIRST)),
            differences=(
                Difference("TaskTemplate.ContainerSpec.Image", "shop/web:7", "shop/web:8"),
                Difference("Mode.Replicated.Replicas", "2", "3"),
            ),
        ),
        PlannedChange(action=PlanAction.CREATE, kind="service", name="shop_search"),
        PlannedChange(action=PlanAction.REMOVE, kind="service", name="shop_old"),
    ),
    placements={
        "shop_web": PredictedPlacement(
            name="shop_web", desired=3, nodes=(NodeShare("m1", 2), NodeShare("m3", 1))
        ),
        "shop_search": PredictedPlacement(
            name="shop_search",
            desired=1,
            error="no suitable node (insufficient resources on 2 nodes)",
            verdicts=tuple(
                PlacementRefusal(
                    name, ("insufficient resources: 64000 MiB of memory requested, 24106 not reserved",)
                )
                for name in ("m1", "m3")
            ),
        ),
    },
)


def _revision(number: int, at: str, changes: str, state: str) -> StackRevision:
    labels = {STACK_CHANGES: changes, STACK_STATE: state}
    return StackRevision(number=number, id="", version=1, created_at=at, labels=labels, data="", of="shop")


def _revisions() -> list[StackRevision]:
    failure = Unavailable(deployed(fails=True)[-1].removeprefix("Error: "))
    return [
        _revision(1, "2026-01-30T09:00:00Z", "5 created", "deployed"),
        _revision(2, "2026-01-31T11:20:00Z", "1 created, 1 updated", state_after(failure)),
        _revision(3, "2026-01-31T11:57:00Z", "1 created, 1 updated", "deployed"),
    ]


def _path(peer: str, **found: Any) -> dict[str, Any]:
    finding = {"Check": "overlay", "Port": "4789/udp", "Sent": 3, "Lost": 0, "Failing": False, **found}
    return {"PeerID": peer, "Peer": peer, "MTU": 1450, "Findings": [finding]}


_LOST = {"Lost": 3, "Failing": True, "Detail": "no response: is UDP port 4789 open between these nodes?"}
_PATHS = [
    {"ID": "m1", "Hostname": "m1", "Paths": [_path("m2", RoundTripMs=0.4), _path("w1", **_LOST)]},
    {"ID": "m2", "Hostname": "m2", "Paths": [_path("m1", RoundTripMs=0.4), _path("w1", RoundTripMs=0.6)]},
    {"ID": "w1", "Hostname": "w1", "Paths": [_path("m1", **_LOST), _path("m2", RoundTripMs=0.6)]},
]


def _versioned(name: str, role: str, version: str) -> dict[str, Any]:
    return _node(name) | {
        "Description": {"Hostname": name, "Engine": {"EngineVersion": version}},
        "Spec": {"Role": role},
    }


_VERSIONS = [
    _versioned("m1", "manager", "0.2.0"),
    _versioned("w1", "worker", "0.2.0"),
    _versioned("w2", "worker", "0.1.0"),
]
