"""``POST /skep/stacks/check``: everything that the managers would refuse of a deploy, and nothing is written."""

from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from skep.manager.control.quotas import set_quota
from skep.manager.routes import application
from skep.model.network import Network
from skep.model.quota import QuotaSpec
from skep.model.secret import Config, Secret
from skep.model.service import Service
from skep.model.values.ids import new_id
from skep.model.values.times import ZERO_TIME
from skep.store.level import USERS
from tests.conformance.manager import a_manager_api

LABELS = {"com.docker.stack.namespace": "shop"}


@pytest.fixture
async def cluster():
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        yield api, client


def a_spec(name: str, *, port: int = 0, **container: Any) -> dict[str, Any]:
    endpoint = {"Ports": [{"TargetPort": 80, "PublishedPort": port}]} if port else {}
    return {
        "Name": name,
        "Labels": LABELS,
        "TaskTemplate": {"ContainerSpec": {"Image": "busybox:1", **container}},
        "EndpointSpec": endpoint,
    }


async def created(client: Any, spec: dict[str, Any]) -> str:
    async with client.post("/services/create", json=spec) as response:
        assert response.status == 201, await response.text()
        return (await response.json())["ID"]


async def refused(client: Any, **wanted: Any) -> dict[str, str]:
    async with client.post("/skep/stacks/check", json=wanted) as response:
        assert response.status == 200, await response.text()
        return {f"{one['Kind']} {one['Name']}": one["Error"] for one in await response.json()}


async def test_ports_names_and_images_are_refused_as_by_the_requests_themselves(cluster) -> None:
    _, client = cluster
    labels = {"Labels": {"com.docker.stack.namespace": "other"}}
    other = await created(client, a_spec("other_web", port=8080) | labels)
    await created(client, a_spec("shop_e"))
    services = [
        {"Spec": a_spec("shop_a", port=8080)},
        {"Spec": a_spec("shop_b", port=8081)},
        {"Spec": a_spec("shop_c", port=8081)},
        {"Spec": a_spec("other_web")},
        {"Spec": a_spec("shop_d", Image="Not An Image")},
        {"Spec": a_spec("shop_e")},  # another deploy of the stack was faster: this one updates it
    ]
    found = await refused(client, Services=services)
    assert "port '8081' is already in use by service 'shop_b'" in found.pop("service shop_c")
    assert found == {
        "service shop_a": f"port '8080' is already in use by service 'other_web' ({other}) as an ingress port",
        "service other_web": "name conflicts with an existing object: service other_web already exists",
        "service shop_d": 'ContainerSpec: "Not An Image" is not a valid repository/tag',
    }


async def test_a_port_of_a_service_that_is_removed_first_is_free(cluster) -> None:
    _, client = cluster
    id = await created(client, a_spec("shop_old", port=8080))
    wanted = [{"Spec": a_spec("shop_new", port=8080)}]
    assert list(await refused(client, Services=wanted)) == ["service shop_new"]
    assert await refused(client, Services=wanted, Removed=[id]) == {}


async def test_objects_of_one_plan_are_there_for_those_behind_them_and_nothing_is_written(cluster) -> None:
    api, client = cluster
    spec = a_spec(
        "shop_web",
        Secrets=[{"SecretName": "shop_s", "File": {"Name": "s", "UID": "0", "GID": "0", "Mode": 292}}],
        Configs=[{"ConfigName": "shop_c", "File": {"Name": "/c", "UID": "0", "GID": "0", "Mode": 292}}],
    )
    spec["TaskTemplate"]["Networks"] = [{"Target": "shop_default"}]
    objects: dict[str, Any] = {
        "Networks": [{"Name": "shop_default", "Driver": "overlay", "Labels": LABELS}],
        "Secrets": [{"Name": "shop_s", "Labels": LABELS, "DataBytes": 5}],
        "Configs": [{"Name": "shop_c", "Labels": LABELS, "DataBytes": 5}],
    }
    before = api.store.view().revision
    assert await refused(client, Services=[{"Spec": spec}], **objects) == {}
    assert await refused(client, Services=[{"Spec": spec}]) == {
        "service shop_web": "network shop_default not found"
    }
    view = api.store.view()
    assert (view.revision, view.find(Service), view.find(Secret), view.find(Config)) == (before, [], [], [])
    assert not view.find(Network, name="shop_default")
    too_large = {**objects, "Secrets": [{"Name": "shop_s", "Labels": LABELS, "DataBytes": 600_000}]}
    assert list(await refused(client, **too_large)) == ["secret shop_s"]


async def test_quotas_count_the_whole_plan(cluster) -> None:
    api, client = cluster
    await api.store.update(lambda tx: tx.raise_level(USERS))
    await api.store.update(set_quota, QuotaSpec(name="shop", tasks=1), new_id=new_id, now=ZERO_TIME)
    found = await refused(client, Services=[{"Spec": a_spec("shop_a")}, {"Spec": a_spec("shop_b")}])
    assert list(found) == ["service shop_b"]
    assert "quota" in found["service shop_b"]


async def test_an_update_at_another_version_is_no_refusal_and_one_of_another_mode_is(cluster) -> None:
    _, client = cluster
    id = await created(client, a_spec("shop_web"))
    changed = a_spec("shop_web", Image="busybox:2")
    assert await refused(client, Services=[{"Spec": changed, "ID": id, "Version": 0}]) == {}
    changed["Mode"] = {"Global": {}}
    found = await refused(client, Services=[{"Spec": changed, "ID": id, "Version": 0}])
    assert found == {"service shop_web": "service mode change is not allowed"}


@pytest.mark.parametrize(
    "body",
    [
        {"Secrets": [{"Name": "s", "DataBytes": -1}]},
        {"Secrets": [{"Name": f"s{n}", "DataBytes": 1 << 22} for n in range(17)]},
        {"Services": [{"Spec": {"Name": f"s{n}"}} for n in range(2001)]},
        {"Services": "no list"},
        {
            "Configs": [
                {"Name": f"c{n}", "Labels": LABELS | {"skep.stack.revision": f"{n}"}, "DataBytes": 1}
                for n in range(2)
            ]
        },
    ],
)
async def test_what_no_deploy_asks_for_is_a_bad_request(cluster, body: dict[str, Any]) -> None:
    _, client = cluster
    async with client.post("/skep/stacks/check", json=body) as response:
        assert response.status == 400
