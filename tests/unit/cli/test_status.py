"""What `skep status` says."""

from typing import Any

from skep.cli.status import about_cluster, about_node, about_services


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


def a_service(name: str, running: int, wanted: int) -> dict[str, Any]:
    return {"Spec": {"Name": name}, "ServiceStatus": {"RunningTasks": running, "DesiredTasks": wanted}}


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


def test_a_service_that_lacks_tasks_is_named() -> None:
    rows = list(about_services([a_service("web", 2, 3), a_service("db", 1, 1)]))
    assert rows == [("services", "2, 1 of them as wanted"), ("service", "web has 2 of 3 tasks running")]
