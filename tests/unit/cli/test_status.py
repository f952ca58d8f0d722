"""What `skep status` says."""

from typing import Any

from skep.cli.quorum import no_leader
from skep.cli.status import about_cluster, about_node, about_services, is_as_wanted
from skep.node.swarm_info import NO_LEADER, lost_quorum


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
    return {"ID": f"id-{name}", "Spec": {"Name": name, "Mode": mode}, "ServiceStatus": status}


def a_node(name: str, state: str = "ready", leader: bool = False) -> dict[str, Any]:
    manager = {"ManagerStatus": {"Leader": True}} if leader else {}
    return {"ID": name, "Description": {"Hostname": name}, "Status": {"State": state}, **manager}


def test_a_node_outside_a_swarm_says_how_to_get_into_one() -> None:
    rows = dict(about_node(an_info(LocalNodeState="inactive")))
    assert "docker swarm init" in rows["swarm"]


def test_the_reason_why_a_node_is_not_well_is_shown() -> None:
    rows = dict(about_node(an_info(LocalNodeState="error", NodeID="n1", Error="the manager crashed 5 times")))
    assert rows["error"] == "the manager crashed 5 times"


def test_a_node_that_is_down_is_named() -> None:
    rows = list(about_cluster([a_node("w1", "down"), a_node("m1", leader=True)]))
    assert ("nodes", "1 down, 1 ready") in rows
    assert ("leader", "m1") in rows
    assert ("node", "w1 is down") in rows


def test_the_busiest_nodes_are_named_and_those_that_say_nothing_are_not() -> None:
    quiet = [a_node("w3") | {"Load": 0.0}, a_node("d1")]
    rows = dict(about_cluster([a_node("w1") | {"Load": 0.2}, a_node("w2") | {"Load": 0.9}, *quiet]))
    assert rows["load"] == "w2 90 %, w1 20 %"
    assert "load" not in dict(about_cluster(quiet))
    many = [a_node(f"n{number}") | {"Load": 0.5} for number in range(30)]
    assert len(dict(about_cluster(many))["load"].split(", ")) == 10


def test_services_that_are_not_as_wanted_are_named_with_the_reason() -> None:
    services = [a_service("web", 2, 3), a_service("db", 1, 1), a_service("api", 0, 2)]
    wanting = {"id-web": "", "id-api": "0 of 2 tasks run; 2 wait: no suitable node"}
    assert list(about_services(services, wanting)) == [
        ("services", "3, 1 of them as wanted"),
        ("service", "api: 0 of 2 tasks run; 2 wait: no suitable node"),
        ("service", "web: 2 of 3 tasks run"),
    ]


def test_a_job_is_as_wanted_when_it_has_completed() -> None:
    job = {"ReplicatedJob": {"MaxConcurrent": 1, "TotalCompletions": 3}}
    assert is_as_wanted(a_service("job", 0, 1, completed=3, **job))
    assert not is_as_wanted(a_service("job", 1, 1, completed=2, **job))
    assert not is_as_wanted(a_service("job", 1, 1, **job))
    assert is_as_wanted(a_service("web", 2, 2, Replicated={"Replicas": 2}))


def test_a_locked_manager_and_one_in_error_are_not_called_workers() -> None:
    locked = dict(about_node(an_info(LocalNodeState="locked", Error="Swarm is encrypted")))
    assert locked["swarm"] == "locked: this manager waits for its key: docker swarm unlock"
    failed = dict(about_node(an_info(LocalNodeState="error", NodeID="n1", Error="an earlier incarnation")))
    assert failed["swarm"] == "error: this node (n1) takes no part in the swarm"
    assert failed["error"] == "an earlier incarnation"


def test_a_node_that_finds_no_manager_says_where_it_looks_and_how_to_tell_it_another_place() -> None:
    info = an_info(LocalNodeState="pending", NodeID="n1", RemoteManagers=[{"Addr": "192.0.2.1:2377"}])
    reported = dict(about_node(info))["swarm"]
    assert "it tries 192.0.2.1:2377" in reported
    assert 'managers = ["address:2377"]' in reported


def a_quorum(*answers: bool) -> dict[str, Any]:
    managers = [{"Hostname": f"m{number}", "Answers": it} for number, it in enumerate(answers, 1)]
    return {"HasLeader": False, "Since": "2026-11-21T18:38:04.123Z", "Managers": managers}


def test_without_a_leader_the_missing_managers_and_the_ways_out_are_named() -> None:
    reported = list(no_leader(a_quorum(True, False, False)))
    assert reported[0] == "NO LEADER since 2026-11-21 18:38:04 UTC: 1 of 3 managers answers (m2, m3 do not)"
    assert "start 1 of them again" in reported[2]
    assert "docker swarm init --force-new-cluster" in reported[3]
    reported = list(no_leader(a_quorum(True, True, False)))
    assert reported[0].endswith("2 of 3 managers answer (m3 does not)")
    assert "force-new-cluster" not in "".join(reported)


def test_a_manager_that_lacks_something_itself_says_what() -> None:
    """The others may be well: neither `docker info` nor `skep status` of this one may blame them alone."""
    full = {**a_quorum(True, True, True), "Trouble": "/data: 40 MB of disk space are missing."}
    assert "this manager itself: /data: 40 MB of disk space are missing." in no_leader(full)
    assert lost_quorum(full) == f"{NO_LEADER} /data: 40 MB of disk space are missing."
