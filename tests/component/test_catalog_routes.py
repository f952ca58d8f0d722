"""The catalog of services in the API of a manager, and registrations of services on machines outside."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from skep.manager.catalog.registrations import register
from skep.model.catalog import REGISTRATIONS_MAX, STACK_REGISTRATIONS_MAX, ServiceRegistration
from skep.model.network import Network
from skep.model.node import Node, NodeState
from skep.model.service import (
    Endpoint,
    PortConfig,
    PublishMode,
    Service,
    UpdateSplit,
    UpdateState,
    UpdateStatus,
)
from skep.model.task import NetworkAttachment, PortStatus, Task, TaskState
from skep.model.values.ids import TaskId
from skep.model.values.meta import Version
from skep.model.values.stacks import STACK_LABEL
from skep.store.kinds import Payload
from tests.component.test_users_on_a_manager import Rig, _a_rig, labeled, running
from tests.support.builders import a_node, a_service, an_overlay
from tests.support.store.store_transactions import eventually, put, raise_level


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with _a_rig() as made:
        await made.api.store.update(raise_level)
        yield made


async def catalog(rig: Rig, role: str = "viewer", query: str = "") -> dict[str, Any]:
    """The services of a response by their names."""
    status, text, _ = await rig.exchange(role, f"GET /skep/catalog{query}")
    assert status == 200, text
    answer = json.loads(text)
    return {one["Name"]: one for one in (answer.get("Catalog") or {}).get("Services", [])} | {
        "": answer["Digest"]
    }


def a_registration(service: str = "db", instance: str = "db1", **fields: Any) -> dict[str, Any]:
    return {"Service": service, "Instance": instance, "Address": "192.0.2.7", "Port": 5432, **fields}


async def deploy(rig: Rig, service: Service, *tasks: Task) -> None:
    for one in (a_node("n1"), service, *tasks):
        await rig.api.store.update(put, one)


def published(service: Service, mode: PublishMode = PublishMode.INGRESS) -> Service:
    port = PortConfig(target_port=80, published_port=8080, publish_mode=mode)
    return replace(service, endpoint=Endpoint(ports=(port,)))


def on_port(id: str, service: Service, number: int) -> Task:
    """A task whose node has reported that it opened a port in host mode."""
    task, port = running(id, service), PortConfig(published_port=number, publish_mode=PublishMode.HOST)
    return replace(task, status=replace(task.status, port_status=PortStatus(ports=(port,))))


async def test_a_service_is_reached_at_the_nodes_that_run_it(rig: Rig) -> None:
    web = labeled(
        published(a_service("web")), {"traefik.enable": "true", "api-password": "abc", "skep.drain": "1s"}
    )
    await deploy(rig, web, running("t1", web), running("t2", web))
    found = (await catalog(rig))["web"]
    node = a_node("n1")
    assert [(one["Address"], one["Port"], one["Node"]) for one in found["Instances"]] == [
        (node.status.addr, 8080, node.shown_name)
    ]
    assert found["Tags"] == ["api-password=***", "traefik.enable=true"]


async def test_a_port_of_host_mode_is_the_one_that_the_node_opened(rig: Rig) -> None:
    web = published(a_service("web"), PublishMode.HOST)
    await deploy(rig, web, on_port("t1", web, 30001), on_port("t2", web, 30002))
    assert [one["Port"] for one in (await catalog(rig))["web"]["Instances"]] == [30001, 30002]


async def test_a_stored_port_that_cannot_be_leaves_out_its_task_alone(rig: Rig) -> None:
    web = published(a_service("web"), PublishMode.HOST)
    await deploy(rig, web, on_port("t1", web, 99_999), on_port("t2", web, 30002))
    assert [one["Port"] for one in (await catalog(rig))["web"]["Instances"]] == [30002]


async def test_a_task_that_does_not_serve_is_left_out(rig: Rig) -> None:
    web = published(a_service("web"))
    starting = running("t1", web)
    starting = replace(starting, status=replace(starting.status, state=TaskState.STARTING))
    stopping = replace(running("t2", web), desired_state=TaskState.SHUTDOWN)
    await deploy(rig, web, starting, stopping)
    assert (await catalog(rig))["web"]["Instances"] == []


def staged(service: Service, split: UpdateSplit) -> Service:
    return replace(service, update_status=UpdateStatus(state=UpdateState.UPDATING, split=split))


def of_version(task: Task, version: int, network: Network) -> Task:
    """The task with its own address on a network, created from a spec version."""
    place = NetworkAttachment(network=network, addresses=(f"10.0.9.{task.id[1:]}/24",))
    return replace(task, spec_version=Version(version), networks_attachments=(place,))


def weights(found: dict[str, Any], name: str = "web") -> dict[str, int]:
    return {one["ID"]: one["Weight"] for one in found[name]["Instances"]}


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (UpdateSplit(percent=5, versions=(2,)), {"t1": 19, "t2": 19, "t3": 2}),
        (UpdateSplit(percent=0, versions=(2,)), {"t1": 1, "t2": 1}),
        (UpdateSplit(percent=100, versions=(2,)), {"t3": 1}),
        (UpdateSplit(percent=None, versions=(2,)), {"t1": 1, "t2": 1, "t3": 1}),
        (UpdateSplit(percent=50, versions=(3,), withdrawn=(2,)), {"t1": 1, "t2": 1}),
    ],
)
async def test_tasks_of_a_staged_update_have_their_weights_at_the_door_and_none_without_a_share(
    rig: Rig, split: UpdateSplit, expected: dict[str, int]
) -> None:
    web, network = staged(a_service("web"), split), an_overlay("shop")
    tasks = (
        of_version(running(id, web), version, network) for id, version in (("t1", 1), ("t2", 1), ("t3", 2))
    )
    await deploy(rig, web, *tasks)
    body = a_registration("web", "old-machine")
    assert (await rig.exchange("operator", "PUT /skep/registrations/web@old-machine", body))[0] == 204
    found = weights(await catalog(rig))
    assert found.pop("old-machine") == (19 if split.percent == 5 else 1), "as much as an old task"
    assert found == expected


async def test_the_mesh_divides_connections_itself_so_its_nodes_have_equal_weights(rig: Rig) -> None:
    web = staged(published(a_service("web")), UpdateSplit(percent=5, versions=(2,)))
    network = an_overlay("shop")
    new = replace(of_version(running("t3", web), 2, network), node_id=a_node("n2").id)
    idle = replace(of_version(running("t4", web), 9, network), node_id=a_node("n3").id)
    web = staged(web, UpdateSplit(percent=5, versions=(2,), withdrawn=(9,)))
    await deploy(rig, web, of_version(running("t1", web), 1, network), new, idle)
    await rig.api.store.update(put, a_node("n2"))
    await rig.api.store.update(put, a_node("n3"))
    assert weights(await catalog(rig)) == {"t1": 1, "t3": 1}


async def test_nodes_with_one_host_name_have_a_name_each(rig: Rig) -> None:
    def named(id: str, name: str, state: NodeState = NodeState.READY) -> Node:
        node = a_node(id)
        description = replace(node.description, hostname=name)
        status = replace(node.status, addr=f"10.0.0.{id[1]}", state=state)
        return replace(node, description=description, status=status)

    web = published(a_service("web"))
    nodes = (named("n1", "a"), named("n2", "A"), named("n3", "b"), named("n4", "b", NodeState.DOWN))
    await deploy(rig, web)
    for node in nodes:
        await rig.api.store.update(put, node)
    for number in (1, 2, 3):
        task = replace(running(f"t{number}", web), id=TaskId(f"t{number}"), node_id=nodes[number - 1].id)
        await rig.api.store.update(put, task)
    _, text, _ = await rig.exchange("viewer", "GET /skep/catalog")
    found = json.loads(text)["Catalog"]
    addresses = {name: address for name, address in found["Nodes"].items() if address.startswith("10.0.0.")}
    assert addresses == {"a-n1": "10.0.0.1", "A-n2": "10.0.0.2", "b": "10.0.0.3"}
    [service] = [one for one in found["Services"] if one["Name"] == "web"]
    assert [one["Node"] for one in service["Instances"]] == ["a-n1", "A-n2", "b"]


async def test_a_reader_waits_for_a_change(rig: Rig) -> None:
    digest = (await catalog(rig))[""]
    assert (await catalog(rig, query=f"?after={digest}&wait=0.05")) == {"": digest}
    waiting = asyncio.create_task(catalog(rig, query=f"?after={digest}&wait=20"))
    await eventually(lambda: rig.api.catalog_readers.held)
    web = published(a_service("web"))
    await deploy(rig, web, running("t1", web))
    async with asyncio.timeout(5):
        changed = await waiting
    assert changed["web"]["Instances"]
    assert changed[""] != digest


async def test_a_service_outside_is_registered_renewed_and_removed(rig: Rig) -> None:
    body = a_registration(Tags=["primary"])
    assert (await rig.exchange("operator", "POST /skep/registrations/db@db1/renew"))[0] == 404
    assert (await rig.exchange("operator", "PUT /skep/registrations/db@db1", body))[0] == 204
    assert (await rig.exchange("operator", "POST /skep/registrations/db@db1/renew"))[0] == 204
    [instance] = (await catalog(rig))["db"]["Instances"]
    assert (instance["Address"], instance["Port"], instance["Tags"]) == ("192.0.2.7", 5432, ["primary"])
    recorded = [entry.action for entry in rig.journal.entries]
    assert len([one for one in recorded if one]) <= 2, "renewals are not recorded"
    assert (await rig.exchange("operator", "DELETE /skep/registrations/db@db1"))[0] == 204
    assert "db" not in await catalog(rig)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"Address": "db.example.org"}, "expected an IP address"),
        ({"Address": "127.0.0.1"}, "expected an address that other machines reach"),
        ({"Port": 0}, "invalid port 0"),
        ({"TTL": 1}, "expected 5 to 3600 s"),
        ({"Tags": ["a b"]}, "invalid tag"),
        ({"Service": "no/name"}, "DNS name"),
        ({"Instance": "db2"}, "use the same name"),
    ],
)
async def test_a_registration_that_cannot_work_is_refused(
    rig: Rig, fields: dict[str, Any], reason: str
) -> None:
    body = a_registration() | fields
    status, text, _ = await rig.exchange("operator", "PUT /skep/registrations/db@db1", body)
    assert (status, reason in text) == (400, True), text


async def test_a_user_of_a_stack_registers_and_sees_its_services_alone(rig: Rig) -> None:
    put_it = "PUT /skep/registrations/{}@db1"
    own, others = a_registration("shop_db", Stack="shop"), a_registration("blog_db", Stack="blog")
    assert (await rig.exchange("operator:shop", put_it.format("shop_db"), own))[0] == 204
    assert (await rig.exchange("operator", put_it.format("blog_db"), others))[0] == 204
    for body in (others, a_registration("db", Stack="shop"), a_registration("shop_db")):
        path = put_it.format(body["Service"])
        assert (await rig.exchange("operator:shop", path, body))[0] == 403, body
    assert (await rig.exchange("viewer:shop", put_it.format("shop_db"), own))[0] == 403
    for request in ("DELETE /skep/registrations/blog_db@db1", "POST /skep/registrations/blog_db@db1/renew"):
        assert (await rig.exchange("operator:shop", request))[0] == 404
    web = labeled(a_service("shop_web"), {STACK_LABEL: "shop"})
    await deploy(rig, web)
    await deploy(rig, labeled(a_service("blog_web"), {STACK_LABEL: "blog"}))
    assert (await catalog(rig, "viewer:shop")).keys() == {"", "shop_db", "shop_web"}
    taken = a_registration("blog_db", Stack="")
    assert (await rig.exchange("operator", put_it.format("blog_db"), taken))[0] == 409


async def addresses(rig: Rig, name: str, role: str = "viewer") -> list[str]:
    """The addresses of a service for a reader, or none if the reader sees no such service."""
    return [one["Address"] for one in (await catalog(rig, role)).get(name, {"Instances": []})["Instances"]]


@pytest.mark.parametrize("labels", [{}, {STACK_LABEL: "blog"}])
@pytest.mark.parametrize("name", ["shop_web", "shop_WEB"])
async def test_a_registration_joins_no_service_of_another_stack(
    rig: Rig, name: str, labels: dict[str, str]
) -> None:
    web = labeled(published(a_service("shop_web")), labels)
    evil = a_registration(name, "evil", Stack="shop")
    await deploy(rig, web, running("t1", web))
    status, text, _ = await rig.exchange("operator:shop", f"PUT /skep/registrations/{name}@evil", evil)
    assert (status, "belongs to another stack or to none" in text) == (409, True), text
    for role in ("viewer", "viewer:shop"):
        assert "192.0.2.7" not in await addresses(rig, name, role)


@pytest.mark.parametrize("name", ["shop_web", "shop_WEB"])
async def test_a_registration_whose_name_becomes_a_service_is_left_out_and_says_so(
    rig: Rig, name: str
) -> None:
    path = f"/skep/registrations/{name}@evil"
    evil = a_registration(name, "evil", Stack="shop")
    assert (await rig.exchange("operator:shop", f"PUT {path}", evil))[0] == 204
    assert await addresses(rig, name, "viewer:shop") == ["192.0.2.7"]
    web = published(a_service("shop_web"))
    await deploy(rig, web, running("t1", web))
    assert await addresses(rig, "shop_web") == [a_node("n1").status.addr]
    assert await addresses(rig, name, "viewer:shop") == []
    status, text, _ = await rig.exchange("operator:shop", f"POST {path}/renew")
    assert (status, "belongs to another stack or to none" in text) == (409, True), text


async def test_a_registration_joins_a_service_and_registrations_of_its_stack_alone(rig: Rig) -> None:
    web = labeled(a_service("shop_web"), {STACK_LABEL: "shop"})
    await deploy(rig, web)
    first = a_registration("shop_web", "a", Stack="shop")
    assert (await rig.exchange("operator:shop", "PUT /skep/registrations/shop_web@a", first))[0] == 204
    assert await addresses(rig, "shop_web") == ["192.0.2.7"]
    outside = a_registration("shop_db", "a")
    assert (await rig.exchange("operator", "PUT /skep/registrations/shop_db@a", outside))[0] == 204
    for name, instance in (("shop_db", "evil"), ("shop_DB", "evil"), ("shop_DB", "a"), ("shop_web", "A")):
        body = a_registration(name, instance, Stack="shop")
        request = f"PUT /skep/registrations/{name}@{instance}"
        assert (await rig.exchange("operator:shop", request, body))[0] == 409, request
    misspelled = a_registration("shop_Db", "b")
    status, text, _ = await rig.exchange("operator", "PUT /skep/registrations/shop_Db@b", misspelled)
    assert (status, "called shop_db: use this spelling" in text) == (409, True), text


async def test_one_stack_leaves_room_for_the_registrations_of_others(rig: Rig) -> None:
    def request(stack: str, number: int) -> tuple[str, str, dict[str, Any]]:
        body = a_registration(f"{stack}_db", f"m{number}", Stack=stack)
        return f"operator:{stack}", f"PUT /skep/registrations/{stack}_db@m{number}", body

    for number in range(STACK_REGISTRATIONS_MAX):
        one = ServiceRegistration(service="shop_db", instance=f"m{number}", stack="shop")
        await rig.api.store.update(register, one)
    status, text, _ = await rig.exchange(*request("shop", STACK_REGISTRATIONS_MAX))
    assert (status >= 400, "stack shop can have at most 100 registrations" in text) == (True, True), text
    assert (await rig.exchange(*request("shop", 1)))[0] == 204, "an instance that is registered already"
    assert (await rig.exchange(*request("blog", 0)))[0] == 204


async def test_a_leader_that_would_end_no_lease_gets_no_registration() -> None:
    async with _a_rig() as rig:
        status, text, _ = await rig.exchange("operator", "PUT /skep/registrations/db@db1", a_registration())
        assert (status, "upgrade the others first" in text) == (400, True), text


async def test_the_number_of_registrations_is_bounded(rig: Rig) -> None:
    assert (await rig.exchange("operator", "PUT /skep/registrations/db@db1", a_registration()))[0] == 204
    for number in range(1, REGISTRATIONS_MAX):
        await rig.api.store.update(put, Payload(id=f"registration/more@m{number}", data=b"{}"))
    again = a_registration(Port=5433)
    assert (await rig.exchange("operator", "PUT /skep/registrations/db@db1", again))[0] == 204
    further = a_registration(instance="db2")
    status, text, _ = await rig.exchange("operator", "PUT /skep/registrations/db@db2", further)
    assert status >= 400
    assert "at most 500 registrations" in text
