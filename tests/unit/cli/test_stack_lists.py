"""``skep stack ls``, ``services`` and ``ps``."""

from typing import Any

from skep.cli.output import OutputOptions, Screen
from skep.cli.stack.stack_lists import services_listed, stacks, task_rows
from skep.cli.stack.stack_screens import revisions
from skep.model.values.stacks import STACK_LABEL
from skep.stack.revisions import StackRevision

NOW = 1_769_860_800.0  # 2026-01-31T12:00:00Z


def a_service(stack: str, name: str, running: int, desired: int, **mode: Any) -> dict[str, Any]:
    template = {"ContainerSpec": {"Image": "registry.example.com/web:2@sha256:0123"}}
    spec = {"Name": f"{stack}_{name}", "Labels": {STACK_LABEL: stack}, "TaskTemplate": template, "Mode": mode}
    status = {"RunningTasks": running, "DesiredTasks": desired}
    return {"ID": f"id-{name}", "Spec": spec, "ServiceStatus": status}


def a_task(slot: int, state: str, created: str, **more: Any) -> dict[str, Any]:
    status = {"State": state, "Timestamp": "2026-01-31T11:56:00Z", **more}
    spec = {"ContainerSpec": {"Image": "web:2"}}
    return {
        "ID": f"t{slot}{created}",
        "ServiceID": "id-web",
        "Slot": slot,
        "NodeID": "n1",
        "DesiredState": "running",
        "CreatedAt": f"2026-01-31T11:5{created}:00Z",
        "Spec": spec,
        "Status": status,
    }


def test_stacks_are_those_of_the_labels_of_services() -> None:
    found = stacks(
        [a_service("shop", "web", 1, 2), a_service("blog", "web", 1, 1), a_service("shop", "db", 1, 1)]
    )
    assert list(found.lines(Screen())) == [
        "NAME  SERVICES  TASKS",
        "blog  1         1/1",
        "shop  2         2/3",
    ]
    assert OutputOptions(template="{{.Name}} {{.Services}}").lines(found) == ["blog 1", "shop 2"]


def test_tasks_that_are_done_are_no_missing_tasks() -> None:
    migrate = a_service("shop", "migrate", 0, 1, Replicated={"Replicas": 1})
    job = a_service("shop", "nightly", 0, 0, ReplicatedJob={"TotalCompletions": 3})
    migrate["ServiceStatus"]["CompletedTasks"], job["ServiceStatus"]["CompletedTasks"] = 1, 3
    services = [a_service("shop", "web", 2, 2, Replicated={"Replicas": 2}), migrate, job]
    assert list(stacks(services).lines(Screen()))[1] == "shop  3         6/6"
    listed = services_listed(services)
    of_docker = OutputOptions(template="{{.Replicas}}").lines(listed)
    assert of_docker == ["0/1", "0/0 (3/3 completed)", "2/2"]
    assert [line for line in listed.lines(Screen()) if "migrate" in line and "0/1 (1/1 completed)" in line]
    half = a_service("shop", "migrate", 2, 3, Replicated={"Replicas": 3})
    half["ServiceStatus"]["CompletedTasks"] = 1
    assert list(stacks([half]).lines(Screen()))[1] == "shop  1         3/3"


def test_services_have_dockers_fields() -> None:
    web = a_service("shop", "web", 1, 2, Replicated={"Replicas": 2})
    web["Endpoint"] = {"Ports": [{"PublishedPort": 8080, "TargetPort": 80}, {"TargetPort": 81}]}
    job = a_service("shop", "nightly", 0, 0, ReplicatedJob={"TotalCompletions": 3})
    job["ServiceStatus"]["CompletedTasks"] = 3
    found = services_listed([web, job])
    template = "{{.Name}}|{{.Mode}}|{{.Replicas}}|{{.Image}}|{{.Ports}}"
    assert OutputOptions(template=template).lines(found) == [
        "shop_nightly|replicated job|0/0 (3/3 completed)|registry.example.com/web:2|",
        "shop_web|replicated|1/2|registry.example.com/web:2|*:8080->80/tcp",
    ]
    assert list(services_listed([web], is_quiet=True).lines(Screen())) == ["id-web"]


def test_tasks_are_named_by_service_and_slot_the_latest_of_a_slot_first() -> None:
    tasks = [
        a_task(10, "running", "1"),
        a_task(2, "failed", "1", Err="task: non-zero exit (3)"),
        a_task(2, "running", "3"),
    ]
    rows = task_rows(tasks, {"id-web": "shop_web"}, {"n1": "m1"}, NOW)
    assert [(row["Name"], row["Node"], row["CurrentState"], row["Error"]) for row in rows] == [
        ("shop_web.2", "m1", "Running 4m ago", ""),
        ("shop_web.2", "m1", "Failed 4m ago", "task: non-zero exit (3)"),
        ("shop_web.10", "m1", "Running 4m ago", ""),
    ]
    (unresolved, *_) = task_rows(tasks, {}, {}, NOW)
    assert (unresolved["Name"], unresolved["Node"]) == ("id-web.2", "n1")


def test_the_first_task_of_a_job_has_its_slot_and_that_of_a_global_service_its_node() -> None:
    job, agent = (
        {key: value for key, value in a_task(0, "running", "1").items() if key != "Slot"} for _ in "ja"
    )
    job |= {"ServiceID": "id-job"}
    rows = task_rows(
        [job, agent], {"id-job": "shop_job", "id-web": "shop_web"}, {"n1": "m1"}, NOW, ["id-job"]
    )
    assert [row["Name"] for row in rows] == ["shop_job.0", "shop_web.m1"]


def test_revisions_have_their_ages_and_for_programs_their_times() -> None:
    labels = {"skep.stack.state": "interrupted", "skep.stack.changes": "1 created"}
    created = "2026-01-31T11:56:00Z"
    one = StackRevision(number=7, id="c", version=1, created_at=created, labels=labels, data="", of="shop")
    found = revisions([one], NOW)
    assert list(found.lines(Screen())) == [
        "REVISION  DEPLOYED  CHANGES    STATE",
        "7         4m ago    1 created  interrupted",
    ]
    assert found.data[0]["Deployed"] == created
