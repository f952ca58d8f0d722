"""What ``skep top`` says before it changes something, and what it sends."""

import copy

import pytest

from skep.errors import FailedPrecondition, InvalidArgument
from skep.top.actions import roll_back, scale, set_availability, update_image
from tests.support.clients.top_clusters import a_node, a_service, a_shop, a_snapshot, a_task


def test_scaling_says_how_many_start_or_stop_and_changes_nothing_else() -> None:
    service = a_service("web", 3, 3)
    more = scale(service, "+2")
    assert more.title == "Scale web from 3 to 5 replicas?"
    assert more.consequences == ("Starts 2 more tasks.",)
    assert more.change(service) == {**service["Spec"], "Mode": {"Replicated": {"Replicas": 5}}}
    none = scale(service, "0")
    assert none.consequences[1] == "No tasks remain: the service stops until you scale it up."
    assert scale(service, "-1").change(a_service("web", 2, 2)) is None  # somebody else was as quick


def test_a_job_is_scaled_by_its_completions() -> None:
    job = a_service("job", 0, 3, mode={"ReplicatedJob": {"MaxConcurrent": 1, "TotalCompletions": 3}})
    assert scale(job, "5").change(job)["Mode"] == {
        "ReplicatedJob": {"MaxConcurrent": 1, "TotalCompletions": 5}
    }


@pytest.mark.parametrize("typed", ["", "x", "-4", "1.5", "٣", "99999999", "+", "3"])
def test_what_is_no_number_of_replicas_is_refused(typed: str) -> None:
    with pytest.raises(InvalidArgument):
        scale(a_service("web", 3, 3), typed)


def test_a_global_service_is_not_scaled_in_dockers_words() -> None:
    with pytest.raises(
        InvalidArgument, match="scale can only be used with replicated or replicated-job mode"
    ):
        scale(a_service("agent", mode={"Global": {}}), "3")


def test_an_update_says_how_tasks_are_replaced() -> None:
    settings = {"UpdateConfig": {"Parallelism": 2, "Order": "start-first", "FailureAction": "rollback"}}
    service = a_service("web", 3, 3, settings=settings)
    action = update_image(service, "busybox:2")
    assert action.consequences == (
        "busybox:1 -> busybox:2",
        "Replaces 3 tasks, 2 at a time, starting new tasks first.",
        "If a new task fails, the change is rolled back.",
    )
    assert action.change(service)["TaskTemplate"]["ContainerSpec"]["Image"] == "busybox:2"


def test_the_same_image_replaces_the_tasks_and_keeps_the_digest() -> None:
    service = a_service("web")
    template = update_image(service, "busybox:1").change(service)["TaskTemplate"]
    assert (template["ForceUpdate"], template["ContainerSpec"]["Image"]) == (1, "busybox:1@sha256:00")


@pytest.mark.parametrize("typed", ["", "two words", "tab\tbed", "bell\x07"])
def test_what_is_no_image_is_refused(typed: str) -> None:
    with pytest.raises(InvalidArgument):
        update_image(a_service("web"), typed)


def test_a_rollback_shows_the_fields_that_change() -> None:
    service = a_service("web", image="busybox:2", previous=a_service("web")["Spec"])
    action = roll_back(service)
    assert action.consequences[0] == "Image: busybox:2 -> busybox:1@sha256:00"
    assert action.consequences[1] == "Replaces 2 tasks, 1 at a time, stopping old tasks first."
    assert action.query == {"rollback": "previous"}
    with pytest.raises(FailedPrecondition, match="service web does not have a previous spec"):
        roll_back(a_service("web"))


def test_a_drain_says_which_tasks_stop_and_where_they_go() -> None:
    shop = a_shop()
    action = set_availability(shop, shop.nodes["id-m1"], "drain")
    assert action.consequences == (
        "Stops 4 tasks: agent.m1, api.5, web.1, web.3.",
        "Starts 3 tasks on the other node if the free resources suffice.",
        "1 task stays stopped: global services run no replacement elsewhere.",
    )
    assert action.change(shop.nodes["id-m1"])["Availability"] == "drain"


def test_a_drain_without_another_node_says_that_the_tasks_wait() -> None:
    nodes = (a_node("m1"), a_node("w1", availability="pause"))
    snapshot = a_snapshot(nodes, (a_service("web"),), (a_task("web", 1, "m1"),))
    action = set_availability(snapshot, nodes[0], "drain")
    assert action.consequences[1] == "No other node accepts tasks. 1 task waits until one does."
    with pytest.raises(InvalidArgument, match="m1 is already active"):
        set_availability(snapshot, nodes[0], "active")


def test_what_has_changed_since_it_was_asked_is_left_alone() -> None:
    """Three to five was confirmed: not ten to five."""
    service = a_service("web", 3, 3)
    with pytest.raises(
        FailedPrecondition, match=r"web has changed since you were asked\. It has 10 replicas now\."
    ):
        scale(service, "5").change(a_service("web", 10, 10))
    other = copy.deepcopy(service)
    other["Spec"]["TaskTemplate"]["ContainerSpec"]["Image"] = "busybox:3"
    for typed in ("busybox:1", "busybox:2"):
        with pytest.raises(FailedPrecondition, match=r"Its image is busybox:3 now\. Nothing was done\."):
            update_image(service, typed).change(other)
    before = {**service, "PreviousSpec": service["Spec"]}
    assert roll_back(before).change(before) == service["Spec"]
    for changed in (
        {**before, "PreviousSpec": other["Spec"]},
        {**other, "PreviousSpec": service["Spec"]},
        service,
    ):
        with pytest.raises(FailedPrecondition, match=r"Its spec is different now\."):
            roll_back(before).change(changed)
