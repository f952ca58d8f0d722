"""What follows a deploy that failed: never the removal of something that was there before."""

import json
from typing import Any

import pytest
from msgspec import convert, to_builtins
from msgspec.structs import replace

from sim.world.time import VirtualLoop
from skep.api.client.client import ApiClient
from skep.errors import FailedPrecondition, InvalidArgument, PermissionDenied, Unavailable
from skep.model.container import ContainerSpec
from skep.model.options.freezes import ADMIN_OVERRIDES
from skep.model.service import ServiceSpec, TaskSpec
from skep.stack import removing
from skep.stack.created import CreatedObjects
from skep.stack.planning import Existing, PlanAction, PlannedChange, StackPlan, plan_of
from skep.stack.recording import _record, undo
from tests.support.harness.clocks import on_virtual_time
from tests.unit.stack.test_revisions import a_stack, body, config


class Cluster(ApiClient):
    """Has configs, and notes what would be changed."""

    def __init__(self, *configs: dict[str, Any]) -> None:
        super().__init__("http://nowhere")
        self._configs = configs
        self.changes: list[str] = []

    async def request(self, method: str, path: str, **_: Any) -> Any:
        if method != "GET":
            self.changes.append(f"{method} {path}")
        if path == "/skep/access":
            return {"Limit": "operator:shop"}
        return list(self._configs) if path == "/configs" else []


async def undone(cluster: Cluster) -> str:
    plan = StackPlan(stack="shop", changes=(), is_new=False)
    return await undo(cluster, plan, lambda *_: None, 1.0, lambda _: None)


FAILED = config(body(1), **{"skep.stack.state": "failed: x"})


@pytest.mark.parametrize(
    ("configs", "problem"),
    [
        ([], "no earlier revision of shop was deployed"),
        ([FAILED], "no earlier revision of shop was deployed"),
        ([config(body(1), **{"skep.stack.state": "deployed"})], "does not exist: create it first"),
        ([config(body(1) | {"Data": "!"}, **{"skep.stack.state": "deployed"})], "revision 1 cannot be read"),
    ],
)
async def test_a_stack_that_was_there_is_left_when_it_cannot_be_deployed_again(
    configs: list[dict[str, Any]], problem: str
) -> None:
    cluster = Cluster(*configs)
    with pytest.raises(InvalidArgument, match=problem):
        await undone(cluster)
    assert cluster.changes == []


class Changed(Cluster):
    """Someone has given the service the image ``fixed`` since the deploy."""

    async def request(self, method: str, path: str, **options: Any) -> Any:
        if path == "/services/shop_web":
            return {"ID": "w", "Version": {"Index": 9}, "Spec": to_builtins(a_spec("fixed"))}
        return await super().request(method, path, **options)


def a_spec(image: str) -> ServiceSpec:
    return ServiceSpec(name="shop_web", task_template=TaskSpec(container_spec=ContainerSpec(image=image)))


async def test_an_undo_leaves_a_service_that_someone_else_has_changed() -> None:
    change = PlannedChange(
        action=PlanAction.UPDATE, kind="service", name="shop_web", spec=a_spec("bad"), id="w"
    )
    created = CreatedObjects(updated={"shop_web": (a_spec("good"), a_spec("bad"))})
    plan = StackPlan(stack="shop", changes=(change,), is_new=False)
    cluster = Changed()
    text = await undo(cluster, plan, lambda *_: None, 1.0, lambda _: None, created)
    assert text.endswith("previous specs again, except for shop_web (someone else has changed it)")
    assert cluster.changes == []


class Forced(Cluster):
    """Someone has run the job once more since the deploy (``docker service update --force``)."""

    def __init__(self) -> None:
        super().__init__()
        spec = a_spec("bad")
        self.spec = to_builtins(replace(spec, task_template=replace(spec.task_template, force_update=4)))

    async def request(self, method: str, path: str, **options: Any) -> Any:
        if path == "/services/w/update":
            self.spec = json.loads(bytes(options["body"]))
        if path == "/services/shop_web":
            return {"ID": "w", "Version": {"Index": 9}, "Spec": self.spec}
        return await super().request(method, path, **options)


async def test_an_undo_does_not_undo_a_forced_update_which_would_start_another_run_of_a_job() -> None:
    change = PlannedChange(
        action=PlanAction.UPDATE, kind="service", name="shop_web", spec=a_spec("bad"), id="w"
    )
    created = CreatedObjects(updated={"shop_web": (a_spec("good"), a_spec("bad"))})
    plan, cluster = StackPlan(stack="shop", changes=(change,), is_new=False), Forced()
    with pytest.raises(Unavailable, match="not done within"):  # nothing runs the task
        await undo(cluster, plan, lambda *_: None, 0.1, lambda _: None, created)
    template = cluster.spec["TaskTemplate"]
    assert (template["ContainerSpec"]["Image"], template["ForceUpdate"]) == ("good", 4)


class Nightly(Forced):
    """The service is a job with a schedule, whose last run has failed."""

    def __init__(self) -> None:
        super().__init__()
        self.spec |= {"Labels": {"skep.cron": "0 3 * * *"}, "Mode": {"ReplicatedJob": {}}}
        self.spec["TaskTemplate"]["RestartPolicy"] = {"Condition": "none"}

    async def request(self, method: str, path: str, **options: Any) -> Any:
        if path == "/tasks":
            failed = {"ID": "t", "ServiceID": "w", "Slot": 1, "Status": {"State": "failed"}}
            return [failed | {"DesiredState": "shutdown"}]
        return await super().request(method, path, **options)


@on_virtual_time
async def test_an_undo_does_not_fail_because_the_last_run_of_a_scheduled_job_did() -> None:
    cluster = Nightly()
    bad = convert(cluster.spec, ServiceSpec)
    good = replace(bad, task_template=a_spec("good").task_template)
    change = PlannedChange(action=PlanAction.UPDATE, kind="service", name="shop_web", spec=bad, id="w")
    created = CreatedObjects(updated={"shop_web": (good, bad)})
    plan = StackPlan(stack="shop", changes=(change,), is_new=False)
    text = await undo(cluster, plan, lambda *_: None, 30.0, lambda _: None, created)
    assert text.endswith("its updated services have their previous specs again")
    assert cluster.spec["TaskTemplate"]["ContainerSpec"]["Image"] == "good"


class RolledBack(Cluster):
    """The cluster has rolled the service back by itself after its new tasks failed."""

    async def request(self, method: str, path: str, **options: Any) -> Any:
        if path == "/services/shop_web":
            status = {"State": "rollback_completed", "Message": "update rolled back due to failure of task t"}
            return {
                "ID": "w",
                "Version": {"Index": 9},
                "Spec": to_builtins(a_spec("good")),
                "UpdateStatus": status,
            }
        if path == "/tasks":
            running = {"ID": "t", "ServiceID": "w", "Slot": 1, "Status": {"State": "running"}}
            return [running | {"DesiredState": "running"}]
        return await super().request(method, path, **options)


@on_virtual_time
async def test_an_undo_succeeds_after_a_rollback_by_the_service_itself() -> None:
    change = PlannedChange(
        action=PlanAction.UPDATE, kind="service", name="shop_web", spec=a_spec("bad"), id="w"
    )
    created = CreatedObjects(updated={"shop_web": (a_spec("good"), a_spec("bad"))})
    plan, cluster = StackPlan(stack="shop", changes=(change,), is_new=False), RolledBack()
    text = await undo(cluster, plan, lambda *_: None, 30.0, lambda _: None, created)
    assert text.endswith("its updated services have their previous specs again")
    assert cluster.changes == []


class Full(Cluster):
    """The stack has no room for another config."""

    async def request(self, method: str, path: str, **options: Any) -> Any:
        if path == "/configs/create":
            raise PermissionDenied("the quota of shop allows 3 configs")
        return await super().request(method, path, **options)


async def test_a_deploy_without_room_for_its_revision_says_so_and_goes_on() -> None:
    warnings: list[str] = []
    stack = a_stack()
    plan = plan_of(stack, Existing(), images={}, prune=False)
    assert await _record(Full(), stack, plan, warnings.append) == ""
    assert warnings == ["the quota of shop allows 3 configs. You cannot roll back to this deploy."]


class Frozen(Cluster):
    """A strict freeze that only administrators override."""

    async def request(self, method: str, path: str, **options: Any) -> Any:
        if path == "/configs/create":
            raise PermissionDenied(f"the cluster is frozen. {ADMIN_OVERRIDES}")
        return await super().request(method, path, **options)


async def test_a_deploy_that_may_not_override_a_freeze_ends_before_its_first_change() -> None:
    plan = plan_of(a_stack(), Existing(), images={}, prune=False)
    with pytest.raises(PermissionDenied, match="Only administrators may override it"):
        await _record(Frozen(), a_stack(), plan, lambda _: None)


class Ending(Cluster):
    """The tasks of removed services end one after the other, and are removed later."""

    def __init__(self, *looks: tuple[str, ...]) -> None:
        super().__init__()
        self._looks = list(looks)

    async def request(self, method: str, path: str, **options: Any) -> Any:
        if path == "/tasks":
            states = self._looks.pop(0)
            return [{"ID": str(number), "Status": {"State": one}} for number, one in enumerate(states)]
        return await super().request(method, path, **options)


class Lost(Cluster):
    """A task of the stack is on a node that is down."""

    async def request(self, method: str, path: str, **options: Any) -> Any:
        if path == "/tasks":
            return [{"ID": "1", "Status": {"State": "unknown", "Err": "node w1 is down"}}]
        return await super().request(method, path, **options)


def test_a_removal_names_the_node_that_is_down_with_its_tasks_and_ends_after_a_minute() -> None:
    shown, loop = set[str](), VirtualLoop()
    try:
        with pytest.raises(Unavailable, match=r"1 task to stop: node w1 is down\. Rerun the command when"):
            loop.run_until_complete(removing.remove(Lost(), "shop", lambda *text: shown.add(text[1]), 600.0))
        assert loop.time() == pytest.approx(60.0, abs=1.0)
    finally:
        loop.close()
    assert shown == {"waiting for 1 task to stop: node w1 is down"}


class DeployedAgain(Cluster):
    """Another deploy creates the service again once it is removed."""

    async def request(self, method: str, path: str, **options: Any) -> Any:
        id = "new" if "DELETE /services/old" in self.changes else "old"
        if path == "/services":
            return [{"ID": id, "Spec": {"Name": "shop_web"}}]
        if path == "/tasks":
            return [{"ID": "1", "ServiceID": id, "Status": {"State": "running"}}]
        return await super().request(method, path, **options)


@on_virtual_time
async def test_a_removal_ends_when_the_stack_is_deployed_again_and_leaves_what_that_deploy_uses() -> None:
    cluster = DeployedAgain()
    with pytest.raises(FailedPrecondition, match="shop was deployed again meanwhile, so its new services"):
        await removing.remove(cluster, "shop", lambda *_: None, 120.0)
    assert cluster.changes == ["DELETE /services/old"]


class InUse(Cluster):
    """A service of another stack uses the network."""

    async def request(self, method: str, path: str, **options: Any) -> Any:
        if method == "DELETE":
            raise FailedPrecondition("network n1 is in use by service web")
        if path == "/networks":
            return [{"Name": "shop_default", "Id": "n1"}]
        return await super().request(method, path, **options)


def test_a_removal_ends_with_what_uses_an_object_of_the_stack() -> None:
    shown, loop = set[str](), VirtualLoop()
    words = "network n1 is in use by service web"
    try:
        with pytest.raises(
            Unavailable, match=f"network shop_default was not removed: {words}. Remove what uses"
        ):
            loop.run_until_complete(
                removing.remove(InUse(), "shop", lambda *text: shown.add(": ".join(text)), 600.0)
            )
        assert loop.time() < 15.0
    finally:
        loop.close()
    assert shown == {f"shop_default: network not removed yet: {words}"}


@on_virtual_time
async def test_a_removal_counts_the_tasks_that_have_yet_to_stop() -> None:
    shown: list[str] = []
    looks = (("running", "starting", "failed"), ("running", "failed", "rejected"), ("shutdown", "failed"), ())
    await removing.remove(Ending(*looks), "shop", lambda *words: shown.append(words[1]), 5.0)
    assert shown == [
        "waiting for 2 tasks to stop",
        "waiting for 1 task to stop",
        "waiting for the cluster to remove its ended tasks",
    ]
