"""How many tasks a user below administrator may ask for, on each path that gives a service its number of tasks."""

import asyncio
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from skep.manager.services.quotas import USERS_TASKS_MAX
from skep.model.node import Node
from skep.model.service import Service
from skep.model.values.ids import NodeId, ServiceId
from skep.store.level import USERS
from tests.component.test_users_on_a_manager import OPERATOR, SHOP, Rig, a_spec, labeled
from tests.component.test_users_on_a_manager import rig as rig
from tests.support.builders import a_node, a_service
from tests.support.store.store_transactions import put

OF_SHOP = "operator:shop"
HALF = USERS_TASKS_MAX // 2


def spec_of(mode: dict[str, Any], name: str = "shop_web", **labels: str) -> dict[str, Any]:
    return a_spec() | {"Name": name, "Mode": mode, "Labels": SHOP | labels}


def replicas(number: int, name: str = "shop_web", **labels: str) -> dict[str, Any]:
    return spec_of({"Replicated": {"Replicas": number}}, name, **labels)


async def has(rig: Rig, name: str, number: int) -> Service:
    """Store a service with this number of replicas, as if an administrator had created it."""
    made = replace(a_service(name, replicas=number), id=ServiceId(f"id{name.replace('_', '')}"))
    await rig.api.store.update(put, labeled(made, SHOP))
    return rig.api.store.view().resolve(Service, name)


def update(service: Service, rollback: str = "") -> str:
    more = f"&rollback={rollback}" if rollback else ""
    return f"POST /services/{service.id}/update?version={service.version.index}{more}"


async def test_objects_outside_of_stacks_are_bounded_together(rig: Rig) -> None:
    def outside(name: str) -> dict[str, Any]:
        return a_spec() | {"Name": name, "Mode": {"Replicated": {"Replicas": HALF + 1}}, "Labels": {}}

    assert (await rig.exchange(OPERATOR, "POST /services/create", outside("one")))[0] == 201
    status, text, _ = await rig.exchange(OPERATOR, "POST /services/create", outside("two"))
    refusal = f"the cluster outside of stacks has {HALF + 1} tasks and may have {USERS_TASKS_MAX}"
    assert (status, refusal in text) == (403, True), text
    assert (await rig.exchange("admin", "POST /services/create", outside("two")))[0] == 201


async def test_of_two_requests_at_a_time_that_exceed_the_bound_together_one_is_refused(rig: Rig) -> None:
    for path, bodies in (
        ("POST /services/create", [replicas(HALF + 1, "shop_a"), replicas(HALF + 1, "shop_b")]),
        ("POST /skep/services/changes", [[{"Spec": replicas(HALF + 1, f"shop_{name}")}] for name in "cd"]),
        (
            "POST /networks/create",
            [
                {
                    "Name": f"shop_{name}",
                    "Driver": "overlay",
                    "Labels": SHOP,
                    "IPAM": {"Config": [{"Subnet": subnet}]},
                }
                for name, subnet in (("a", "10.8.0.0/16"), ("b", "10.9.0.0/16"))
            ],
        ),
    ):
        answers = await asyncio.gather(*(rig.exchange(OF_SHOP, path, body) for body in bodies))
        refused = [text for _, text, _ in answers if "an administrator can set a quota" in text]
        assert len(refused) == 1, answers
        for service in rig.api.store.view().find(Service):
            await rig.api.store.update(lambda tx, one: tx.delete(Service, one), service.id)


@pytest.mark.parametrize("role", [OPERATOR, OF_SHOP])
async def test_a_user_creates_no_service_beyond_the_bound_and_an_administrator_does(
    rig: Rig, role: str
) -> None:
    await has(rig, "shop_db", HALF)
    status, text, _ = await rig.exchange(role, "POST /services/create", replicas(HALF + 1))
    assert status == 403
    assert (
        f"the stack shop has {HALF} tasks and may have {USERS_TASKS_MAX} without a quota, {HALF + 1} more wanted"
        in text
    )
    assert "an administrator can set a quota" in text
    assert (await rig.exchange(role, "POST /services/create", replicas(HALF)))[0] == 201
    status, text, _ = await rig.exchange("admin", "POST /services/create", replicas(100_000, "shop_big"))
    assert status == 201, text
    assert (await rig.exchange("operator:blog", "POST /services/create", replicas(1)))[0] == 403, "its stack"


@pytest.mark.parametrize(
    "large",
    [
        spec_of({"ReplicatedJob": {"MaxConcurrent": 1, "TotalCompletions": USERS_TASKS_MAX + 1}}),
        spec_of({"ReplicatedJob": {"MaxConcurrent": USERS_TASKS_MAX + 1, "TotalCompletions": 1}}),
        replicas(1, **{"skep.autoscale": f"1..{USERS_TASKS_MAX + 1}"}),
    ],
    ids=("completions", "concurrent", "autoscaled"),
)
async def test_a_service_counts_the_most_tasks_that_it_can_get(rig: Rig, large: dict[str, Any]) -> None:
    status, text, _ = await rig.exchange(OF_SHOP, "POST /services/create", large)
    assert (status, f"{USERS_TASKS_MAX + 1} more wanted" in text) == (403, True), text
    status, text, _ = await rig.exchange("admin", "POST /services/create", large)
    assert status == 201, text


async def test_global_services_count_a_task_for_each_node(rig: Rig) -> None:
    for number in range(2):
        await rig.api.store.update(put, replace(a_node(f"n{number}"), id=NodeId(f"n{number}")))
    nodes = len(rig.api.store.view().ids(Node))
    await has(rig, "shop_db", USERS_TASKS_MAX - nodes + 1)
    for mode in ("Global", "GlobalJob"):
        status, text, _ = await rig.exchange(OF_SHOP, "POST /services/create", spec_of({mode: {}}))
        assert (status, f"{nodes} more wanted" in text) == (403, True), text


async def test_an_update_grows_to_the_bound_and_shrinks_from_above_it(rig: Rig) -> None:
    service = await has(rig, "shop_web", USERS_TASKS_MAX + 500)
    status, text, _ = await rig.exchange(OF_SHOP, update(service), replicas(USERS_TASKS_MAX + 501))
    assert (status, "1 more wanted" in text) == (403, True), text
    for number in (USERS_TASKS_MAX + 500, USERS_TASKS_MAX + 1, 3):
        service = rig.api.store.view().resolve(Service, "shop_web")
        status, text, _ = await rig.exchange(OF_SHOP, update(service), replicas(number))
        assert status == 200, text
    service = rig.api.store.view().resolve(Service, "shop_web")
    assert (await rig.exchange(OF_SHOP, update(service), replicas(USERS_TASKS_MAX + 1)))[0] == 403
    autoscaled = replicas(3, **{"skep.autoscale": f"1..{USERS_TASKS_MAX + 1}"})
    assert (await rig.exchange(OF_SHOP, update(service), autoscaled))[0] == 403


async def test_a_rollback_counts_the_tasks_of_the_previous_spec(rig: Rig) -> None:
    service = await has(rig, "shop_web", USERS_TASKS_MAX + 1)
    small = replicas(2)
    assert (await rig.exchange(OF_SHOP, update(service), small))[0] == 200
    service = rig.api.store.view().resolve(Service, "shop_web")
    status, text, _ = await rig.exchange(OF_SHOP, update(service, "previous"), small)
    assert (status, f"{USERS_TASKS_MAX - 1} more wanted" in text) == (403, True), text
    assert (await rig.exchange("admin", update(service, "previous"), small))[0] == 200


async def test_a_deploy_and_its_check_count_all_services_of_the_request(rig: Rig) -> None:
    for path, field in (("changes", ""), ("check", "Services")):
        kind = "services" if path == "changes" else "stacks"
        wanted: list[Any] = [{"Spec": replicas(HALF, f"shop_{number}")} for number in range(3)]
        body = {field: wanted} if field else wanted
        status, text, _ = await rig.exchange(OF_SHOP, f"POST /skep/{kind}/{path}", body)
        assert (status, f"has {USERS_TASKS_MAX} tasks" in text) == (403, True), (path, text)
        body = {field: wanted[:2]} if field else wanted[:2]
        status, text, _ = await rig.exchange(OF_SHOP, f"POST /skep/{kind}/{path}", body)
        assert status == 200, (path, text)


async def test_a_plan_does_not_count_the_services_that_it_removes(rig: Rig) -> None:
    old = await has(rig, "shop_old", USERS_TASKS_MAX)
    wanted: dict[str, Any] = {"Services": [{"Spec": replicas(USERS_TASKS_MAX, "shop_new")}]}
    assert (await rig.exchange(OF_SHOP, "POST /skep/stacks/check", wanted))[0] == 403
    status, text, _ = await rig.exchange(OF_SHOP, "POST /skep/stacks/check", wanted | {"Removed": [old.id]})
    assert (status, msgspec.json.decode(text)) == (200, []), text


async def test_a_quota_of_tasks_replaces_the_bound(rig: Rig) -> None:
    await rig.api.store.update(lambda tx: tx.raise_level(USERS))
    quota = "PUT /skep/stacks/shop/quota"
    assert (await rig.exchange("admin", quota, {"Services": 5}))[0] == 200
    assert (await rig.exchange(OF_SHOP, "POST /services/create", replicas(USERS_TASKS_MAX + 1)))[0] == 403
    assert (await rig.exchange("admin", quota, {"Tasks": USERS_TASKS_MAX + 1}))[0] == 200
    status, text, _ = await rig.exchange(OF_SHOP, "POST /services/create", replicas(USERS_TASKS_MAX + 1))
    assert status == 201, text
