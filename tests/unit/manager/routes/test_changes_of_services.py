"""Many services created and updated by one request: each for itself."""

from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from skep.manager.routes import application
from skep.model.service import Service
from skep.store.kinds import Payload, previous_registry_auth_id, registry_auth_id, spec_history_id
from tests.conformance.manager import a_manager_api
from tests.support.builders import an_auth


@pytest.fixture
async def cluster():
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        yield api, client


def a_spec(name: str, image: str = "busybox:1", **fields: Any) -> dict[str, Any]:
    return {"Name": name, "TaskTemplate": {"ContainerSpec": {"Image": image}}, **fields}


async def changed(client: Any, *changes: dict[str, Any]) -> list[dict[str, str]]:
    async with client.post("/skep/services/changes", json=changes) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def test_each_is_created_updated_or_refused_for_itself(cluster) -> None:
    api, client = cluster
    a, b = await changed(client, {"Spec": a_spec("a")}, {"Spec": a_spec("b")})
    view = api.store.view()
    assert view.resolve(Service, "a").id == a["ID"]
    index = view.get(Service, b["ID"]).version.index
    results = await changed(
        client,
        {"Spec": a_spec("a")},
        {"Spec": a_spec("b", "busybox:2"), "ID": b["ID"], "Version": index},
        {"Spec": a_spec("a", "busybox:2"), "ID": a["ID"], "Version": 0},
        {"Spec": a_spec("c", "Not An Image")},
        {"Spec": a_spec("d", Networks=[{"Target": "nowhere"}])},
        {"Spec": a_spec("e")},
    )
    assert [one.get("Error", "") for one in results] == [
        "name conflicts with an existing object: service a already exists",
        "",
        "update out of sequence",
        'ContainerSpec: "Not An Image" is not a valid repository/tag',
        "network nowhere not found",
        "",
    ]
    found = {
        one.spec.name: one.spec.task_template.container_spec.image for one in api.store.view().find(Service)
    }
    assert found == {"a": "busybox:1", "b": "busybox:2", "e": "busybox:1"}


async def test_credentials_are_kept_apart_and_stay_without_new_ones(cluster) -> None:
    api, client = cluster
    (made,) = await changed(client, {"Spec": a_spec("a"), "RegistryAuth": "secret"})
    index = api.store.view().get(Service, made["ID"]).version.index
    await changed(client, {"Spec": a_spec("a", "busybox:2"), "ID": made["ID"], "Version": index})
    kept = {one.id: one.data for one in api.store.view().find(Payload)}
    del kept[spec_history_id(made["ID"])]
    assert kept == {registry_auth_id(made["ID"]): b"secret", previous_registry_auth_id(made["ID"]): b"secret"}


async def test_an_update_that_loses_its_credentials_says_so(cluster) -> None:
    api, client = cluster
    headers = {"X-Registry-Auth": an_auth()}
    async with client.post("/services/create", json=a_spec("a", "corp.example/a:1"), headers=headers) as got:
        made = await got.json()
    assert "Warnings" not in made

    async def updated(image: str) -> Any:
        index = api.store.view().get(Service, made["ID"]).version.index
        url = f"/services/{made['ID']}/update?version={index}"
        async with client.post(url, json=a_spec("a", image)) as got:
            return (await got.json())["Warnings"]

    assert await updated("corp.example/a:2") is None
    assert await updated("other.example/a:2") == [
        "image other.example/a:2 is pulled without credentials: the service's credentials are for another registry"
    ]
    assert await updated("other.example/a:3") is None


async def test_a_change_that_loses_its_credentials_says_so(cluster) -> None:
    api, client = cluster
    (made,) = await changed(client, {"Spec": a_spec("a", "corp.example/a:1"), "RegistryAuth": an_auth()})
    assert "Warnings" not in made
    index = api.store.view().get(Service, made["ID"]).version.index
    spec = a_spec("a", "other.example/a:2")
    (moved,) = await changed(client, {"Spec": spec, "ID": made["ID"], "Version": index})
    assert moved["Warnings"] == [
        "image other.example/a:2 is pulled without credentials: the service's credentials are for another registry"
    ]


async def test_too_many_are_refused(cluster) -> None:
    _, client = cluster
    async with client.post(
        "/skep/services/changes", json=[{"Spec": a_spec(f"s{n}")} for n in range(1001)]
    ) as response:
        assert response.status == 400
