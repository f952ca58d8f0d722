"""A service that fills its network is made, and says so; a network without addresses says why."""

from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from skep.manager.allocator.subnets import NetworkAllocations, allocated
from skep.manager.routes import ManagerApi, application
from skep.model.network import Network, NetworkSpec
from skep.model.values.ids import NetworkId
from skep.model.values.meta import Driver
from tests.conformance.manager import a_manager_api


@pytest.fixture
async def cluster():
    async with a_manager_api() as api, TestClient(TestServer(application(api))) as client:
        yield api, client


async def a_network(api: ManagerApi, client: TestClient[Any, Any], name: str, subnet: str) -> str:
    body = {"Name": name, "Driver": "overlay", "IPAM": {"Config": [{"Subnet": subnet}]}}
    async with client.post("/networks/create", json=body) as response:
        id = (await response.json())["Id"]
    network = api.store.view().get(Network, id)
    await api.store.update(lambda tx: tx.put(allocated(network, NetworkAllocations(), (), 24)))
    return str(id)


def a_request(name: str, network: str, **fields: Any) -> dict[str, Any]:
    template = {"ContainerSpec": {"Image": "busybox:1"}, "Networks": [{"Target": network}]}
    return {"Name": name, "TaskTemplate": template, **fields}


def replicated(replicas: int) -> dict[str, Any]:
    return {"Mode": {"Replicated": {"Replicas": replicas}}}


async def test_a_service_that_fills_its_network_says_so_when_it_is_made_and_changed(cluster) -> None:
    api, client = cluster
    id = await a_network(api, client, "tiny", "10.9.0.0/28")  # 13 addresses
    async with client.post("/services/create", json=a_request("one", id, **replicated(5))) as response:
        assert "Warnings" not in await response.json()
    async with client.post("/services/create", json=a_request("two", id, **replicated(5))) as response:
        made = await response.json()
    (warning,) = made["Warnings"]
    words = "network tiny is nearly full: its services need 12 addresses, and it has 13: add a subnet with"
    assert warning.startswith(words)
    index = (await (await client.get("/services/two")).json())["Version"]["Index"]
    path = f"/services/two/update?version={index}"
    async with client.post(path, json=a_request("two", id, **replicated(1))) as response:
        assert await response.json() == {"Warnings": None}


async def test_a_network_that_a_service_names_twice_is_warned_of_once(cluster) -> None:
    api, client = cluster
    id = await a_network(api, client, "tiny", "10.9.0.0/28")
    request = a_request("web", id, **replicated(20))
    request["TaskTemplate"]["Networks"] *= 2
    async with client.post("/services/create", json=request) as response:
        (warning,) = (await response.json())["Warnings"]
    assert "its services need 21 addresses" in warning


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"Mode": {"Global": {}}}, 2),  # one node
        ({**replicated(3), "EndpointSpec": {"Mode": "dnsrr"}}, 3),
        ({"Mode": {"ReplicatedJob": {"MaxConcurrent": 4}}}, 5),
    ],
)
async def test_the_number_of_addresses_depends_on_the_mode(cluster, fields, wanted) -> None:
    api, client = cluster
    id = await a_network(api, client, "tiny", "10.9.0.0/30")  # one address
    async with client.post("/services/create", json=a_request("web", id, **fields)) as response:
        (warning,) = (await response.json())["Warnings"]
    assert f"need {wanted} addresses" in warning


async def test_a_network_without_addresses_says_why(cluster) -> None:
    api, client = cluster
    await a_network(api, client, "first", "10.9.0.0/24")
    # Two creates at the same moment both passed; this one comes second.
    options = {"com.docker.network.driver.overlay.vxlanid_list": "1,2"}
    spec = NetworkSpec(name="second", driver_configuration=Driver(name="overlay", options=options))
    await api.store.update(lambda tx: tx.put(Network(id=NetworkId("second"), spec=spec)))
    async with client.get("/networks/second") as response:
        assert (await response.json())["Warnings"] == [
            "not allocated: the network needs free VXLAN ids, one per IPv4 subnet (1), not 1,2"
        ]
