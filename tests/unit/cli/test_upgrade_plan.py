"""What `skep upgrade` does next, and what forbids it."""

from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.cli.maintain.upgrade_plan import (
    RunningService,
    UpgradableNode,
    degraded_of,
    jobs_of,
    lines_of,
    members_of,
    plan,
    running_of,
)

OLD, NEW = "1.0.0", "1.1.0"


def is_due(node: UpgradableNode) -> bool:
    return node.version != NEW


def a_member(name: str, **fields: Any) -> UpgradableNode:
    return UpgradableNode(id=f"id-{name}", name=name, **{"version": OLD, **fields})


def managers(count: int) -> list[UpgradableNode]:
    return [a_member(f"m{number}", is_manager=True, is_leader=number == 1) for number in range(1, count + 1)]


def a_service(
    name: str, on: dict[str, int], *, away_max: int = 1, replicas: int | None = None
) -> RunningService:
    count = sum(on.values()) if replicas is None else replicas
    return RunningService(
        id=f"id-{name}",
        name=name,
        replicas=count,
        away_max=away_max,
        on={f"id-{k}": v for k, v in on.items()},
    )


CLUSTER = [*managers(3), a_member("w2"), a_member("w1")]


def names(
    members: Sequence[UpgradableNode], services: Sequence[RunningService] = (), **options: Any
) -> list[str]:
    return [step.node.name for step in plan(members, services, is_due, **{"drains": True, **options}).steps]


def test_workers_come_first_then_managers_the_leader_last() -> None:
    assert names(CLUSTER) == ["w1", "w2", "m2", "m3", "m1"]


def test_what_has_the_version_is_done_and_docker_nodes_and_lost_workers_are_left_out() -> None:
    members = [
        *managers(1),
        a_member("w1", version=NEW),
        a_member("w2", is_ours=False),
        a_member("w3", is_ready=False),
    ]
    found = plan(members, [], is_due, drains=False)
    assert ([step.node.name for step in found.steps], found.done, found.left_out) == (
        ["m1"],
        ("w1",),
        ("w2", "w3"),
    )


def test_with_a_manager_away_nothing_is_begun() -> None:
    members = [replace(CLUSTER[0], is_ready=False), *CLUSTER[1:]]
    assert plan(members, [], is_due, drains=True).refusals == (
        "the manager m1 is unreachable. Restart it first.",
    )


def test_of_two_managers_none_may_be_away_and_one_alone_may() -> None:
    (refusal,) = plan(managers(2), [], is_due, drains=False).refusals
    assert "two managers need each other" in refusal
    assert plan(managers(1), [], is_due, drains=False).refusals == ()


def test_two_managers_do_not_keep_workers_from_their_turn() -> None:
    assert plan([*managers(2), a_member("w1")], [], is_due, drains=True).refusals == ()


def test_an_interrupted_node_goes_on_first_even_if_it_is_away() -> None:
    members = [replace(one, is_ready=one.name != "m3") for one in CLUSTER]
    found = plan(members, [], is_due, drains=True, first="id-m3")
    assert (found.steps[0].node.name, found.refusals) == ("m3", ())


def test_a_worker_whose_turn_was_interrupted_is_not_left_out_while_it_is_away() -> None:
    members = [replace(one, is_ready=one.name != "w2") for one in CLUSTER]
    found = plan(members, [], is_due, drains=True, first="id-w2")
    assert (found.steps[0].node.name, found.left_out) == ("w2", ())


def test_a_service_that_lacks_tasks_forbids_a_drain_but_not_an_upgrade_under_running_containers() -> None:
    web = a_service("web", {"w1": 1}, replicas=3)
    (refusal,) = plan(CLUSTER, [web], is_due, drains=True).refusals
    assert refusal == "web runs 1 of 3 tasks. Run skep explain web."
    assert plan(CLUSTER, [web], is_due, drains=False).refusals == ()


def test_a_degraded_service_forbids_a_drain_by_its_reason_and_is_named_once() -> None:
    web = a_service("web", {"w1": 1}, replicas=3)
    degraded = {"agent": 'exit 7, last line "no disk"', "web": "No such image: web:9."}
    assert plan(CLUSTER, [web], is_due, drains=True, degraded=degraded).refusals == (
        'agent is degraded: exit 7, last line "no disk". Run skep explain agent.',
        "web is degraded: No such image: web:9. Run skep explain web.",
    )
    assert plan(CLUSTER, [web], is_due, drains=False, degraded=degraded).refusals == ()


def test_a_degraded_service_does_not_stop_the_drained_node_of_an_interrupted_upgrade() -> None:
    members = [*managers(3), a_member("w1", availability="drain")]
    degraded = {"web": "exit 1"}
    assert plan(members, [], is_due, drains=True, first="id-w1", degraded=degraded).refusals == ()
    assert plan(members, [], is_due, drains=True, degraded=degraded).refusals != ()


def test_more_tasks_on_a_node_than_the_update_policy_takes_away_are_distributed_first_and_then_refused() -> (
    None
):
    web = a_service("web", {"w1": 3, "w2": 1}, away_max=2)
    found = plan(CLUSTER, [web], is_due, drains=True)
    assert (found.steps[0].spread, found.refusals) == (("web",), ())
    (refusal,) = plan(CLUSTER, [web], is_due, drains=True, spread=["web"]).refusals
    assert refusal.startswith("web has 3 of its 4 tasks on w1, but its update policy stops 2 at a time")


def test_tasks_that_return_to_their_data_are_not_distributed_in_vain() -> None:
    db = replace(a_service("db", {"w1": 2}), returns=True)
    found = plan(CLUSTER, [db], is_due, drains=True)
    assert [step.spread for step in found.steps] == [()] * len(found.steps)
    (refusal,) = found.refusals
    assert refusal.startswith("db has 2 of its 2 tasks on w1, but its update policy stops 1 at a time")
    assert refusal.endswith("The label skep.volume-affinity=none allows them to move.")
    assert (
        plan(
            CLUSTER, [replace(a_service("db", {"w1": 1, "w2": 1}), returns=True)], is_due, drains=True
        ).refusals
        == ()
    )


def test_an_update_policy_of_zero_takes_all_away() -> None:
    found = plan(CLUSTER, [a_service("web", {"w1": 4}, away_max=0)], is_due, drains=True)
    assert (found.steps[0].spread, found.refusals) == ((), ())


def test_tasks_need_another_node_to_go_to() -> None:
    (refusal,) = plan(managers(1), [a_service("web", {"m1": 1})], is_due, drains=True).refusals
    assert "no other node can run the tasks of m1" in refusal


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[UpgradableNode], list[RunningService]]:
    members = managers(draw(st.integers(1, 5))) + [
        a_member(f"w{number}") for number in range(draw(st.integers(0, 4)))
    ]
    members = [replace(one, is_ready=draw(st.integers(0, 9)) > 0) for one in members]
    services = [
        a_service(
            f"s{number}",
            {one.name: draw(st.integers(0, 3)) for one in members if one.is_ready},
            away_max=draw(st.integers(0, 3)),
        )
        for number in range(draw(st.integers(0, 3)))
    ]
    return members, services


@given(clusters(), st.booleans())
def test_carried_out_it_keeps_the_quorum_and_every_services_policy(
    cluster: tuple[list[UpgradableNode], list[RunningService]], drains: bool
) -> None:
    """Step by step, each planned anew; tasks of a drained node go to another one and stay there."""
    members, services = cluster
    turns: list[UpgradableNode] = []
    spread: tuple[str, ...] = ()
    while (
        found := plan(members, services, is_due, drains=drains, spread=spread)
    ).steps and not found.refusals:
        step = found.steps[0]
        if set(step.spread) - set(spread):
            services = [distributed(one, members) for one in services]
            spread = step.spread
            continue
        spread = ()
        away = step.node
        voters = [one for one in members if one.is_manager]
        present = [one for one in voters if one.is_ready and one.id != away.id]
        assert not away.is_manager or len(voters) == 1 or len(present) == len(voters) - 1 > len(voters) // 2
        if drains:
            for one in services:
                left = sum(count for node, count in one.on.items() if node != away.id)
                assert left >= one.replicas - (one.away_max or one.replicas)
            services = [moved(one, away, members) for one in services]
        turns.append(away)
        members = [replace(one, version=NEW, is_ready=True) if one.id == away.id else one for one in members]
    assert len({one.id for one in turns}) == len(turns)
    order = [(one.is_manager, one.is_leader) for one in turns]
    assert order == sorted(order)


def moved(service: RunningService, away: UpgradableNode, members: Sequence[UpgradableNode]) -> RunningService:
    on = dict(service.on)
    count = on.pop(away.id, 0)
    others = [one.id for one in members if one.is_ready and one.id != away.id]
    if count and others:
        on[others[0]] = on.get(others[0], 0) + count
    return replace(service, on=on)


def distributed(service: RunningService, members: Sequence[UpgradableNode]) -> RunningService:
    ready = [one.id for one in members if one.is_ready]
    on = {
        id: service.replicas // len(ready) + (place < service.replicas % len(ready))
        for place, id in enumerate(ready)
    }
    return replace(service, on=on)


def test_what_the_api_shows_is_read() -> None:
    node = {
        "ID": "n1",
        "Spec": {"Role": "manager", "Availability": "drain"},
        "Description": {"Hostname": "m1", "Engine": {"EngineVersion": OLD, "Labels": {"skep.node": "1"}}},
        "Status": {"State": "ready", "Addr": "192.0.2.1"},
        "ManagerStatus": {"Leader": True, "Reachability": "unreachable"},
    }
    assert members_of([node]) == [
        UpgradableNode(
            id="n1",
            name="m1",
            version=OLD,
            address="192.0.2.1",
            is_manager=True,
            is_leader=True,
            is_ready=False,
            availability="drain",
        )
    ]
    services = [
        {
            "ID": "s1",
            "Spec": {
                "Name": "web",
                "Mode": {"Replicated": {"Replicas": 2}},
                "UpdateConfig": {"Parallelism": 0},
            },
        },
        {"ID": "s2", "Spec": {"Name": "agent", "Mode": {"Global": {}}}},
    ]
    mounts = {"ContainerSpec": {"Mounts": [{"Type": "volume", "Source": "data", "Target": "/data"}]}}
    for id, labels in (("s3", {}), ("s4", {"skep.volume-affinity": "none"})):
        spec = {"Name": id, "Labels": labels, "Mode": {"Replicated": {}}, "TaskTemplate": mounts}
        services.append({"ID": id, "Spec": spec})
    states = ["running", "running", "failed"]
    tasks = [
        {"ServiceID": "s1", "NodeID": "n1", "Status": {"State": state}, "DesiredState": "running"}
        for state in states
    ]
    s3, s4 = (RunningService(id=id, name=id, replicas=1, away_max=1, on={}) for id in ("s3", "s4"))
    web = RunningService(id="s1", name="web", replicas=2, away_max=0, on={"n1": 2})
    assert running_of(services, tasks) == [replace(s3, returns=True), s4, web]


def test_a_plan_names_the_jobs_that_a_drain_stops() -> None:
    modes = {"web": "Replicated", "report": "ReplicatedJob", "scan": "GlobalJob"}
    services = [a_response(name, mode, "healthy") for name, mode in modes.items()]
    tasks = [
        {
            "ServiceID": name,
            "NodeID": "id-w1",
            "Status": {"State": "running"},
            "DesiredState": "running" if name == "web" else "complete",
        }
        for name in modes
    ]
    tasks.append({**tasks[1], "NodeID": "id-w2", "Status": {"State": "complete"}})
    jobs = jobs_of(services, tasks)
    assert jobs == {"id-w1": ("report", "scan")}
    drained, kept = (plan(CLUSTER, [], is_due, drains=drains, jobs=jobs) for drains in (True, False))
    line = "   stops tasks of jobs, which start from the beginning: report, scan"
    assert list(lines_of(drained, lambda _: ""))[:2] == ["1. w1 (worker): ", line]
    assert line not in list(lines_of(kept, lambda _: ""))


def a_response(name: str, mode: str, state: str, **status: Any) -> dict[str, Any]:
    health = {"State": state, "Reason": "exit 7" if state == "degraded" else ""}
    return {
        "ID": name,
        "Spec": {"Name": name, "Mode": {mode: {}}},
        "ServiceStatus": {"Health": health, **status},
    }


def test_degraded_services_are_read_whatever_their_mode_but_jobs_are_not() -> None:
    services = [
        a_response("web", "Replicated", "degraded"),
        a_response("agent", "Global", "degraded"),
        a_response("moving", "Replicated", "converging"),
        a_response("nightly", "ReplicatedJob", "degraded"),
        a_response("cleanup", "GlobalJob", "degraded"),
        {"ID": "old", "Spec": {"Name": "old", "Mode": {"Replicated": {}}}},
    ]
    assert degraded_of(services) == {"agent": "exit 7", "web": "exit 7"}


def test_a_one_shot_that_has_completed_lacks_no_task() -> None:
    migrate = a_response("migrate", "Replicated", "healthy", CompletedTasks=1)
    web = a_service("web", {"w1": 1, "w2": 1})
    assert plan(CLUSTER, [web, *running_of([migrate], [])], is_due, drains=True).refusals == ()


def test_a_stopped_service_lacks_no_task() -> None:
    stopped = a_response("stopped", "Replicated", "healthy")
    stopped["Spec"]["Labels"] = {"skep.stopped": "true"}
    web = a_service("web", {"w1": 1, "w2": 1})
    assert plan(CLUSTER, [web, *running_of([stopped], [])], is_due, drains=True).refusals == ()
