"""The responses of a manager whose store is nearly full."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from skep.manager.routes import application
from skep.model.secret import Config, ConfigSpec
from skep.model.values.encoding import to_json
from skep.model.values.ids import ConfigId
from skep.store.space import MemberSpace
from tests.conformance.manager import a_manager_api
from tests.support.builders import a_service, a_service_spec

QUOTA = 1024**3


class Api:
    def __init__(self, client: TestClient[Any, Any], store: Any) -> None:
        self.client = client
        self.store = store

    def fill(self, share: float, *, has_alarm: bool = False) -> None:
        async def space() -> MemberSpace:
            return MemberSpace(size=QUOTA, in_use=int(share * QUOTA), quota=QUOTA, has_alarm=has_alarm)

        self.store.space = space

    async def create_config(self, name: str) -> tuple[int, str]:
        body = {"Name": name, "Data": "eA=="}
        response = await self.client.post("/configs/create", json=body)
        return response.status, await response.text()


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with a_manager_api() as manager, TestClient(TestServer(application(manager))) as client:
        await manager.store.update(lambda tx: tx.put(a_service("web")))
        await manager.store.update(lambda tx: tx.put(Config(id=ConfigId("c0"), spec=ConfigSpec(name="c0"))))
        yield Api(client, manager.store)


async def update_service(api: Api) -> int:
    version = (await (await api.client.get("/services/web")).json())["Version"]["Index"]
    spec = to_json(a_service_spec("web", replicas=2))
    headers = {"Content-Type": "application/json"}
    path = f"/services/web/update?version={version}"
    return (await api.client.post(path, data=spec, headers=headers)).status


async def test_from_four_fifths_on_nothing_is_created_and_everything_else_goes_on(api: Api) -> None:
    api.fill(0.79)
    assert (await api.create_config("c1"))[0] == 201
    api.fill(0.81)
    status, text = await api.create_config("c2")
    assert status == 500
    assert "the cluster's store is 81 % full (0.8 of 1.0 GiB): remove configs" in text
    assert await update_service(api) == 200
    assert (await api.client.delete("/configs/c0")).status == 204
    assert (await api.client.delete("/services/web")).status == 200


async def test_when_hardly_anything_is_left_services_are_not_updated_either(api: Api) -> None:
    api.fill(0.96)
    assert await update_service(api) == 500
    assert (await api.client.delete("/services/web")).status == 200


async def test_it_is_shown_and_warned_of(api: Api) -> None:
    async def warnings() -> list[str]:
        found: list[str] = await (await api.client.get("/_skep/warnings")).json()
        return [warning for warning in found if "store" in warning]

    api.fill(0.5)
    assert await warnings() == []
    api.fill(0.75)
    assert await warnings() == ["WARNING: the cluster's store is 75 % full (0.8 of 1.0 GiB)"]
    shown = await (await api.client.get("/skep/cluster/store")).json()
    assert shown == {
        "Size": QUOTA,
        "InUse": QUOTA * 3 // 4,
        "Quota": QUOTA,
        "Summary": "75 % full (0.8 of 1.0 GiB)",
    }
    api.fill(0.2, has_alarm=True)
    assert "reached its quota" in (await warnings())[0]
