"""What `skep status` says."""

from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from skep.cli.output import Screen, width_of
from skep.cli.see.quorum import no_leader, silence, way_out
from skep.cli.see.status import (
    DEGRADED,
    LEADERLESS,
    ClusterStatus,
    StatusScreen,
    _cluster,
    about_node,
    as_of,
    cluster_health,
    lines_of,
    node_health,
    node_rows,
    service_rows,
    status_of_state,
)
from skep.cli.visibility import empty_text, none_visible, sees_all_services
from skep.errors import NotFound
from skep.manager.routes import ManagerApi
from skep.model.node import UNKNOWN_STATE
from skep.model.service import HealthState, JobStatus, ReplicatedJob, ServiceMode
from skep.model.task import TaskState
from skep.node.cluster.swarm_info import NO_LEADER, lost_quorum
from tests.support import builders

NOW = 1_769_860_800.0
"""2026-01-31T12:00:00Z"""
REASON, COURSE = 'exit 3, last line "boom: cannot connect to db"', "crash loop, 5 failures in a row"


def an_info(**swarm: Any) -> dict[str, Any]:
    return {
        "Name": "m1",
        "ServerVersion": "0.1.0",
        "NCPU": 2,
        "MemTotal": 4 << 30,
        "ContainersRunning": 3,
        "Images": 1,
        "Swarm": swarm,
    }


def a_service(name: str, running: int, wanted: int, completed: int = 0, **mode: Any) -> dict[str, Any]:
    status = {"RunningTasks": running, "DesiredTasks": wanted, "CompletedTasks": completed}
    health = mode.pop("health", None) or {
        "State": "healthy" if running + completed >= wanted else "converging"
    }
    return {
        "ID": f"id-{name}",
        "Spec": {"Name": name, "Mode": mode},
        "ServiceStatus": {**status, "Health": health},
    }


def a_node(name: str, state: str = "ready", leader: bool = False) -> dict[str, Any]:
    manager = {"ManagerStatus": {"Leader": True}} if leader else {}
    return {"ID": name, "Description": {"Hostname": name}, "Status": {"State": state}, **manager}


def test_a_node_outside_a_swarm_says_how_to_get_into_one() -> None:
    rows = dict(about_node(an_info(LocalNodeState="inactive")))
    assert "skep swarm init" in rows["swarm"]


def test_the_reason_why_a_node_is_not_well_is_shown() -> None:
    rows = dict(about_node(an_info(LocalNodeState="error", NodeID="n1", Error="the manager crashed 5 times")))
    assert rows["error"] == "the manager crashed 5 times"


def a_status(nodes: list[Any], services: list[Any]) -> StatusScreen:
    cluster = ClusterStatus(
        id="c1",
        leader="m1",
        nodes=tuple(node_rows(nodes, ["m1", "m1", "w1"])),
        services=tuple(service_rows(services, NOW)),
    )
    return StatusScreen(
        health=cluster_health(cluster).value, node=(("node", "m1, skep 0.1.0"),), cluster=cluster
    )


def a_degraded_one() -> StatusScreen:
    nodes = [a_node("w1", "down") | {"Load": 0.2}, a_node("m1", leader=True) | {"Load": 0.9}]
    nodes[0]["Status"]["Message"] = "heartbeat failure"
    web = a_service("web", 2, 2)
    web["UpdateStatus"] = {"State": "completed", "CompletedAt": "2026-01-31T11:57:00Z"}
    health = {"State": "degraded", "Reason": REASON, "RestartSummary": COURSE, "Weight": 0}
    return a_status(nodes, [web, a_service("boom", 0, 2, health=health)])


def test_the_screen_has_the_headline_nodes_services_and_the_reason_beside_what_is_not_well() -> None:
    found = a_degraded_one()
    assert list(lines_of(found, Screen())) == [
        "cluster  DEGRADED  1 manager (leader m1), 1 worker, 1 of 2 nodes ready  1 of 2 services healthy",
        "node  m1, skep 0.1.0",
        "",
        "NODE  ROLE    STATE  TASKS  LOAD  REASON",
        "m1    leader  ready  2      90%",
        "w1    worker  DOWN   1      -     heartbeat failure",
        "",
        "SERVICE  TASKS  UPDATE            REASON",
        f"boom     0/2                      {REASON}; {COURSE}",
        "web      2/2    completed 3m ago",
        "Next: skep explain boom",
    ]
    assert found.exit_code == DEGRADED


def a_problem(weight: int, since: str) -> dict[str, Any]:
    state = "degraded" if weight < 3 else "converging"
    return {"State": state, "Reason": "r", "Weight": weight, "Since": since}


def next_command(nodes: list[Any], problems: dict[str, Any]) -> str:
    services = [a_service(name, 0, 1, health=health) for name, health in problems.items()]
    return list(lines_of(a_status(nodes, services), Screen()))[-1]


def test_next_names_the_oldest_failure_before_what_a_lost_node_has_left() -> None:
    m1 = a_node("m1", leader=True)
    late, old = a_problem(0, "2026-01-31T11:59:00Z"), a_problem(0, "2026-01-31T11:20:00Z")
    moving, lost = a_problem(4, "2026-01-31T11:00:00Z"), a_problem(2, "2026-01-31T11:00:00Z")
    found = {"a": moving, "b": late, "c": old, "d": lost}
    assert next_command([m1], found) == "Next: skep explain c"
    down = [m1, a_node("w1", "down")]
    assert next_command(down, found) == "Next: skep explain c"
    assert next_command(down, {"a": moving, "d": lost}) == "Next: skep explain w1"
    assert next_command([m1], {"a": moving, "d": lost}) == "Next: skep explain d"
    left = a_node("m1", "down") | {"ID": "8x2k"}
    assert next_command([m1, left], {}) == "Next: skep explain 8x2k", "the machine has joined again"
    unreachable = a_node("m2") | {"ManagerStatus": {"Reachability": "unreachable"}}
    assert next_command([m1, unreachable], {}) == "Next: skep explain m2"


def test_jobs_and_one_shot_services_show_what_is_done() -> None:
    total = {"ReplicatedJob": {"MaxConcurrent": 2, "TotalCompletions": 6}}
    replicated, everywhere = a_service("a", 0, 0, 6, **total), a_service("b", 1, 1, 5, GlobalJob={})
    everywhere["ServiceStatus"]["TotalTasks"] = 6
    once, half = a_service("c", 0, 1, 1, Replicated={}), a_service("d", 1, 2, 1, Replicated={})
    rows = list(service_rows([replicated, everywhere, once, half, a_service("e", 2, 3)], NOW))
    assert [row.tasks for row in rows] == ["6/6 done", "5/6 done", "1/1 done", "1/2 done", "2/3"]


def test_the_message_of_a_node_is_in_plain_words_with_the_last_heartbeat() -> None:
    w1, w2 = a_node("w1", "down"), a_node("w2", "unknown")
    w1["Status"]["Message"], w1["SilentSince"] = "heartbeat failure", "2026-01-31T11:59:59.123Z"
    w2["Status"]["Message"] = UNKNOWN_STATE
    assert [row.reason for row in node_rows([w1, w2])] == [
        "heartbeat failure; not heard since 2026-01-31 11:59:59 UTC",
        "not heard from since the cluster has another leader",
    ]


def test_a_narrow_terminal_is_kept_to_and_has_colors() -> None:
    narrow = list(lines_of(a_degraded_one(), Screen(columns=60)))
    assert max(map(width_of, narrow)) <= 60
    assert any(line.endswith("…") for line in narrow)
    colored = "\n".join(lines_of(a_degraded_one(), Screen(has_colors=True)))
    assert "\x1b[33m\x1b[1mDEGRADED" in colored
    assert "\x1b[31mDOWN" in colored


def test_a_large_cluster_shows_first_what_is_not_well() -> None:
    nodes = [a_node(f"n{number:03}") for number in range(100)] + [a_node("z", "down")]
    services = [a_service(f"s{number:03}", 1, 1) for number in range(100)] + [
        a_service("zz", 0, 1, health={"State": "converging", "Reason": "its tasks are not created yet"})
    ]
    found = a_status(nodes, services)
    lines = list(lines_of(found, Screen()))
    assert len(lines) < 62
    assert "81 more nodes. To show all, run skep status -o wide." in lines
    assert "71 more services. To show all, run skep status -o wide." in lines
    assert any(line.startswith("z ") for line in lines)
    assert any(line.startswith("zz ") and "its tasks are not created yet" in line for line in lines)
    assert len(list(lines_of(found, Screen(is_wide=True)))) > 200


def test_a_cluster_in_which_all_is_well_says_so_and_a_drained_node_is_well() -> None:
    node = a_node("m1", leader=True) | {"Spec": {"Availability": "drain"}}
    found = a_status([node], [a_service("web", 1, 1)])
    assert (found.health, found.exit_code) == ("healthy", 0)
    assert "ready, drained" in "\n".join(lines_of(found, Screen()))


def test_a_paused_update_is_not_well() -> None:
    web = a_service("web", 2, 2, health={"State": "degraded", "Reason": "manually paused"})
    web["UpdateStatus"] = {"State": "paused", "StartedAt": "2026-01-31T11:00:00Z"}
    (row,) = service_rows([web], NOW)
    assert (row.is_healthy, row.update, row.reason) == (False, "paused, started 1h ago", "manually paused")


def test_a_manager_that_is_not_reached_is_not_well() -> None:
    (row,) = node_rows([a_node("m2") | {"ManagerStatus": {"Reachability": "unreachable"}}])
    assert (row.role, row.is_healthy, row.reason) == ("manager", False, "the manager is unreachable")


def test_a_cluster_that_only_converges_is_called_so_and_has_the_exit_code_of_an_unhealthy_one() -> None:
    services = [a_service("web", 1, 1), a_service("new", 0, 1)]
    found = a_status([a_node("m1", leader=True)], services)
    assert (found.health, found.exit_code) == ("converging", DEGRADED)
    services.append(a_service("bad", 0, 1, health={"State": "degraded"}))
    assert a_status([a_node("m1", leader=True)], services).health == "degraded"


def test_a_service_without_a_health_is_not_called_healthy() -> None:
    """An earlier manager does not report it."""
    web = a_service("web", 2, 2)
    del web["ServiceStatus"]["Health"]
    (row,) = service_rows([web], NOW)
    assert not row.is_healthy
    assert "older than this command" in row.reason


def test_a_locked_manager_and_one_in_error_are_not_called_workers() -> None:
    locked = dict(about_node(an_info(LocalNodeState="locked", Error="Swarm is encrypted")))
    assert locked["swarm"] == "locked. Run skep swarm unlock."
    failed = dict(about_node(an_info(LocalNodeState="error", NodeID="n1", Error="an earlier incarnation")))
    assert failed["swarm"] == "error: this node (n1) is not part of the swarm"
    assert failed["error"] == "an earlier incarnation"


def test_a_node_that_finds_no_manager_shows_its_addresses_and_how_to_set_others() -> None:
    info = an_info(LocalNodeState="pending", NodeID="n1", RemoteManagers=[{"Addr": "192.0.2.1:2377"}])
    reported = dict(about_node(info))["swarm"]
    assert "It tries 192.0.2.1:2377" in reported
    assert 'managers = ["address:2377"] in its configuration file (default: /etc/skep/skep.toml)' in reported


def a_quorum(*responses: bool) -> dict[str, Any]:
    managers = [{"Hostname": f"m{number}", "IsReachable": it} for number, it in enumerate(responses, 1)]
    return {"HasLeader": False, "Since": "2026-11-21T18:38:04.123Z", "Managers": managers}


def test_a_worker_that_reaches_no_manager_is_not_healthy() -> None:
    swarm = {"LocalNodeState": "active", "Error": ""}
    warnings = ["WARNING: no manager answers: this node tries 192.0.2.1:2377. Containers keep running."]
    assert node_health({"Swarm": swarm, "Warnings": warnings}) is HealthState.DEGRADED
    assert node_health({"Swarm": swarm, "Warnings": ["WARNING: no swap limit"]}) is HealthState.HEALTHY
    assert node_health({"Swarm": {"LocalNodeState": "inactive"}}) is HealthState.HEALTHY
    assert node_health({"Swarm": {**swarm, "Error": "removed"}}) is HealthState.DEGRADED


def test_only_managers_that_do_not_respond_are_silent() -> None:
    quorum = {"Managers": [{"ID": "m1", "IsReachable": True}, {"ID": "m2", "IsReachable": False}]}
    quorum["Managers"][1]["UnreachableSeconds"] = 95.2
    assert [silence(quorum, id) for id in ("m1", "m2", "w1")] == ["", "no response for 1m 35s", ""]


def test_without_a_leader_the_missing_managers_and_the_ways_out_are_named() -> None:
    reported = list(no_leader(a_quorum(True, False, False)))
    assert reported[0] == "NO LEADER since 2026-11-21 18:38:04 UTC: 1 of 3 managers responds (m2, m3 do not)"
    assert "restart 1 of them" in reported[2]
    assert "skep cluster recover" in reported[3]
    reported = list(no_leader(a_quorum(True, True, False)))
    assert reported[0].endswith("2 of 3 managers respond (m3 does not)")
    assert "cluster recover" not in "".join(reported)


def test_a_manager_that_alone_has_lost_its_leader_leads_to_the_others() -> None:
    quorum = a_quorum(True, True, True)
    for manager in quorum["Managers"][1:]:
        manager["HasQuorum"] = True
    reported = list(no_leader(quorum))
    assert (
        reported[0]
        == "NO LEADER for this manager since 2026-11-21 18:38:04 UTC: m2 and m3 have contact with a quorum"
    )
    assert "skep doctor network" in reported[2]
    assert reported[-1] == "Until then, run your commands on m2."
    assert way_out(quorum) == "skep status on m2"
    full = list(no_leader(quorum | {"Error": "/data: 40 MB of disk space are missing."}))
    assert "Error of this manager: /data: 40 MB of disk space are missing." in full
    assert "skep doctor" not in "".join(full)


def test_without_a_leader_rows_say_of_when_they_are_and_what_is_known_now() -> None:
    quorum = a_quorum(True, False, False)
    for manager in quorum["Managers"]:
        manager |= {"ID": manager["Hostname"], "UnreachableSeconds": 0 if manager["IsReachable"] else 95.2}
    nodes = [a_node(name, leader=name == "m1") for name in ("m1", "m2", "m3", "w1")]
    for node in nodes[1:3]:
        node["ManagerStatus"] = {"Reachability": "reachable"}
    found = a_status(
        nodes, [a_service("web", 0, 2, health={"State": "converging", "Reason": "no node is ready"})]
    )
    assert found.cluster is not None
    stale = StatusScreen(
        health="no leader",
        node=found.node,
        notes=tuple(no_leader(quorum)),
        cluster=as_of(found.cluster, quorum),
        next=way_out(quorum),
    )
    assert [line for line in lines_of(stale, Screen()) if line not in stale.notes] == [
        "cluster  NO LEADER  as of 18:38:04 UTC:  3 managers, 1 worker, 2 of 4 nodes ready  0 of 1 service healthy",
        "node  m1, skep 0.1.0",
        "",
        "NODE  ROLE     STATE AT 18:38:04 UTC  TASKS  LOAD  REASON",
        "m1    manager  ready                  2      -",
        "m2    manager  UNREACHABLE            0      -     no response for 1m 35s",
        "m3    manager  UNREACHABLE            0      -     no response for 1m 35s",
        "w1    worker   ready                  1      -",
        "",
        "SERVICE  TASKS AT 18:38:04 UTC  UPDATE  REASON",
        "web      0/2                            no node is ready",
        "Next: skep cluster recover --dry-run",
    ]
    assert stale.exit_code == LEADERLESS


def test_enough_managers_without_a_leader_are_not_to_be_recovered() -> None:
    assert way_out(a_quorum(True, True, False)) == "skep doctor network"
    assert way_out(a_quorum(True, False)) == "skep cluster recover --dry-run"


def test_a_manager_that_lacks_something_itself_says_what() -> None:
    """The others may be well: neither `docker info` nor `skep status` of this one may blame them alone."""
    full = {**a_quorum(True, True, True), "Error": "/data: 40 MB of disk space are missing."}
    assert "Error of this manager: /data: 40 MB of disk space are missing." in no_leader(full)
    assert lost_quorum(full) == f"{NO_LEADER} /data: 40 MB of disk space are missing."


def test_an_earlier_state_has_its_time_with_the_name_of_the_zone() -> None:
    state: dict[str, Any] = {
        "Time": "2026-01-31T12:00:00.5Z",
        "Revision": 7,
        "Nodes": [],
        "Services": [],
        "Tasks": [],
    }
    now = datetime.fromtimestamp(NOW, timezone(timedelta(hours=1), "CET"))
    assert status_of_state(state, now).node == (("at", "2026-01-31 13:00:00 CET (revision 7)"),)


def test_a_warning_that_docker_breaks_into_lines_is_one_sentence() -> None:
    info = {"Name": "m1", "ServerVersion": "1", "NCPU": 2, "MemTotal": 1 << 30, "Swarm": {}}
    counts = {
        "ContainersRunning": 0,
        "Images": 1,
        "Warnings": ["WARNING: It provides\n         no fault tolerance."],
    }
    assert dict(about_node(info | counts))["warning"] == "It provides no fault tolerance."


class _Access:
    """An API that knows the roles of its user."""

    def __init__(self, *roles: str) -> None:
        self._roles = roles

    async def get(self, path: str, **_: Any) -> Any:
        assert path == "/skep/access"
        if not self._roles:
            raise NotFound("page not found")
        return {"Roles": list(self._roles)}


@pytest.mark.parametrize(
    ("roles", "sees_all"),
    [
        (("admin",), True),
        (("viewer:plain", "operator:shop"), False),
        (("viewer", "operator:shop"), True),
        ((), True),
    ],
)
async def test_who_sees_the_services_of_stacks_alone(roles: tuple[str, ...], sees_all: bool) -> None:
    client: Any = _Access(*roles)
    assert await sees_all_services(client) is sees_all
    assert await empty_text(client, "absent", "None") == ("absent" if sees_all else none_visible("None"))


def test_a_user_of_a_stack_reads_nothing_about_the_services_of_others() -> None:
    none = a_status([a_node("m1", leader=True)], [])
    assert "No services. Create one with skep service create" in "\n".join(lines_of(none, Screen()))
    shown = "\n".join(lines_of(msgspec.structs.replace(none, sees_all=False), Screen()))
    assert "No services of your stacks, and you do not see others. Run skep user whoami" in shown
    assert "Create one" not in shown


async def test_the_tasks_of_jobs_that_run_on_a_node_are_counted(cluster: tuple[ManagerApi, Any]) -> None:
    manager, host = cluster
    service = builders.a_service("batch")
    job = replace(service, spec=replace(service.spec, mode=ServiceMode(replicated_job=ReplicatedJob())))
    job, complete = replace(job, job_status=JobStatus()), TaskState.COMPLETE
    tasks = [
        builders.a_task("t1", node="w1", service=job, slot=1, desired=complete),
        builders.a_task("t2", node="w1", service=job, slot=2, desired=complete, state=complete),
        builders.a_task("t3", node="w1", service=builders.a_service("web"), slot=1),
    ]
    await manager.store.update(
        lambda tx: [tx.put(one) for one in (builders.a_node("w1"), job, builders.a_service("web"), *tasks)]
    )
    async with host.client() as client:
        found = await _cluster(client, {"Swarm": {}}, {})
    assert {row.name: row.tasks for row in found.nodes}["w1"] == 2
