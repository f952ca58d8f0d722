"""``/networks`` of a node: its own, those of its manager, and on a worker those that its tasks use."""

import asyncio
from collections.abc import AsyncIterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.api.formats.networks import SubnetBody, ipam_status
from skep.dataplane.local.networks import LocalNetworks
from skep.engine.containers.container import Container, ContainerConfig, ContainerState
from skep.manager.allocator.subnets import NetworkAllocations, allocated
from skep.model.network import Network
from skep.model.networks.sandbox import Sandbox
from skep.model.networks.tables import (
    NetworkHead,
    NetworkTable,
    TableEndpoint,
    TableNode,
    TablePort,
    TableService,
)
from skep.model.service import Endpoint as ServiceEndpoint
from skep.model.service import EndpointVirtualIP, NetworkAttachmentConfig
from skep.model.task import AssignedTask, NetworkAttachment, Task, TaskState
from skep.model.values.ids import ContainerId, NetworkId, NodeId, ServiceId, TaskId, new_container_id
from skep.node.cluster.swarm_info import NOT_A_MANAGER, NOT_IN_A_SWARM
from tests.support.builders import a_node, a_service, a_task, an_overlay
from tests.support.networks.network_rigs import Rig, a_rig


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with a_rig(tmp_path) as made:
        yield made


LOCAL = {"bridge", "host", "none", "docker_gwbridge"}


async def test_a_manager_lists_the_clusters_networks_and_its_own(rig: Rig) -> None:
    assert await rig.names() == {*LOCAL, "ingress"}
    assert await rig.names(scope="local") == LOCAL
    assert await rig.names(type="builtin") == {"bridge", "host", "none"}
    assert await rig.names(driver="overlay") == {"ingress"}
    assert await rig.names(name="^in") == {"ingress"}
    assert (await rig.message("GET", '/networks?filters={"bogus":["1"]}')) == (400, "Invalid filter 'bogus'")


async def test_the_ids_of_a_nodes_own_networks_outlive_its_process(rig: Rig, tmp_path: Path) -> None:
    before = {one.name: one.id for one in (*rig.local.predefined(), rig.local.gateway()) if one}
    again = LocalNetworks(tmp_path / "local", rig.gateway, clock=SystemClock(), new_id=new_container_id)
    again.open()
    assert {one.name: one.id for one in (*again.predefined(), again.gateway()) if one} == before
    assert all(len(id) == 64 for id in before.values())


async def test_outside_of_a_swarm_there_are_the_three_that_docker_has(rig: Rig) -> None:
    rig.member.is_manager = rig.member.is_in_swarm = False
    assert await rig.names() == {"bridge", "host", "none"}
    overlay = {"Name": "o1", "Driver": "overlay"}
    assert await rig.message("POST", "/networks/create", overlay) == (503, NOT_IN_A_SWARM)


def on(network: Network, task: Task, address: str) -> Task:
    return replace(task, networks_attachments=(NetworkAttachment(network=network, addresses=(address,)),))


def a_container_of(task: Task, id: str) -> Container:
    endpoint = Sandbox(
        netns="",
        address="172.18.0.2",
        prefix_length=16,
        gateway="172.18.0.1",
        mac_address="02:42:ac:12:00:02",
    )
    return Container(
        id=ContainerId(id),
        name=f"web.1.{task.id}",
        image="busybox:1",
        image_id="",
        config=ContainerConfig(path="sh"),
        labels={"com.docker.swarm.task.id": task.id, "com.docker.swarm.service.name": "web"},
        sandbox=endpoint,
        state=ContainerState.RUNNING,
    )


async def test_a_worker_lists_an_overlay_only_while_a_task_of_its_own_uses_it(rig: Rig) -> None:
    rig.member.is_manager = False
    overlay = an_overlay("net1", subnet="10.0.9.0/24")
    task = on(overlay, a_task("t1", state=TaskState.RUNNING), "10.0.9.3/24")
    assert await rig.names() == LOCAL
    assert (await rig.message("GET", "/networks/net1")) == (404, "network net1 not found")
    rig.work.assigned[task.id] = AssignedTask(task=task, service_name="web")
    rig.work.containers = (a_container_of(task, "c" * 64),)
    rig.work.states[task.id] = task.status
    assert await rig.names() == {*LOCAL, "net1"}
    status, shown = await rig.ask("GET", "/networks/net1")
    assert (status, shown["Scope"], shown["IPAM"]["Config"][0]["Subnet"]) == (200, "swarm", "10.0.9.0/24")
    (entry,) = shown["Containers"].values()
    assert (entry["Name"], entry["IPv4Address"]) == ("web.1.t1", "10.0.9.3/24")
    assert entry["MacAddress"] == "02:42:0a:00:09:03"
    endpoint = TableEndpoint(
        task_id=task.id,
        node_id=NodeId("n2"),
        service_id=ServiceId("web"),
        name="web.1.t1",
        addresses=("10.0.9.3",),
    )
    plain = TableEndpoint(task_id=TaskId("t2"), node_id=NodeId("n3"), name="box", addresses=("10.0.9.4",))
    port = TablePort(protocol="tcp", published=8080, target=80)
    service = TableService(id=ServiceId("web"), name="web", virtual_ips=("10.0.9.2",), ports=(port,))
    rig.work.tables[overlay.id] = NetworkTable(
        head=NetworkHead(id=overlay.id, name="net1"),
        nodes={NodeId("n2"): TableNode(id=NodeId("n2"), underlay="10.77.0.2")},
        endpoints={one.task_id: one for one in (endpoint, plain)},
        services={service.id: service},
    )
    _, shown = await rig.ask("GET", "/networks/net1?verbose=true")
    assert shown["Peers"] == [{"Name": "n2", "IP": "10.77.0.2"}]
    web = shown["Services"]["web"]
    assert (web["VIP"], web["Ports"]) == ("10.0.9.2", ["Target: 80, Publish: 8080"])
    ((line,), (other,)) = web["Tasks"], shown["Services"][""]["Tasks"]
    assert (line["Name"], line["EndpointIP"], line["Info"]) == (
        "web.1.t1",
        "10.0.9.3",
        {"Host IP": "10.77.0.2"},
    )
    assert (other["Name"], other["Info"]) == ("box", {"Host IP": ""})
    assert "Services" not in (await rig.ask("GET", "/networks/net1"))[1]
    rig.work.states[task.id] = replace(task.status, state=TaskState.SHUTDOWN)
    assert await rig.names() == LOCAL


async def test_a_worker_makes_and_removes_no_network_of_the_cluster(rig: Rig) -> None:
    rig.member.is_manager = False
    status, message = await rig.message("POST", "/networks/create", {"Name": "o1", "Driver": "overlay"})
    assert (status, message) == (
        403,
        "Cannot create a multi-host network from a worker node. Please create the network from a manager node.",
    )
    assert await rig.message("POST", "/networks/net1/update", {"SubnetsAdd": [{}]}) == (503, NOT_A_MANAGER)
    assert (await rig.ask("POST", "/networks/prune"))[1] == {"NetworksDeleted": None}


async def test_a_node_without_containers_says_why_it_has_no_bridge_networks(tmp_path: Path) -> None:
    async with a_rig(tmp_path, has_engine=False) as rig:
        status, message = await rig.message("POST", "/networks/create", {"Name": "b1", "Driver": "bridge"})
        assert status == 501
        assert "--engine-socket" in message
        assert await rig.names() == {*LOCAL, "ingress"}


async def test_names_are_free_once_over_the_node_and_the_cluster(rig: Rig) -> None:
    assert (await rig.ask("POST", "/networks/create", {"Name": "o1", "Driver": "overlay"}))[0] == 201
    taken = (409, "network with name o1 already exists")
    assert await rig.message("POST", "/networks/create", {"Name": "o1", "ConfigOnly": True}) == taken
    assert (await rig.ask("POST", "/networks/create", {"Name": "c1", "ConfigOnly": True}))[0] == 201
    taken = (409, "network with name c1 already exists")
    for body, version in (({"CheckDuplicate": True}, "/v1.41"), ({}, "")):
        requested = {"Name": "c1", "Driver": "overlay", **body}
        assert await rig.message("POST", f"{version}/networks/create", requested) == taken
    assert await rig.names() == {*LOCAL, "ingress", "o1", "c1"}
    assert (await rig.ask("DELETE", "/networks/c1"))[0] == 204
    assert (await rig.ask("DELETE", "/networks/o1"))[0] == 204
    assert await rig.message("DELETE", "/networks/o1") == (404, "network o1 not found")


@pytest.mark.parametrize("name", ["bridge", "host", "none"])
async def test_predefined_networks_stay(rig: Rig, name: str) -> None:
    words = f"{name} is a pre-defined network and cannot be removed"
    assert await rig.message("DELETE", f"/networks/{name}") == (403, words)


async def test_for_an_old_client_a_network_of_the_cluster_may_have_the_name_of_one_here(rig: Rig) -> None:
    own = (await rig.ask("POST", "/networks/create", {"Name": "c1", "ConfigOnly": True}))[1]["Id"]
    status, made = await rig.ask("POST", "/v1.43/networks/create", {"Name": "c1", "Driver": "overlay"})
    assert (status, made["Warning"]) == (201, "network with name c1 already exists")
    ambiguous = (400, "2 matches found based on name: network c1 is ambiguous")
    assert await rig.message("GET", "/networks/c1") == ambiguous
    assert await rig.message("DELETE", "/networks/c1") == ambiguous
    assert (await rig.ask("GET", "/networks/c1?scope=swarm"))[1]["Id"] == made["Id"]
    assert (await rig.ask("GET", "/networks/c1?scope=local"))[1]["Id"] == own
    for id in (own, made["Id"]):
        assert (await rig.ask("GET", f"/networks/{id}"))[1]["Id"] == id
    assert (await rig.ask("DELETE", f"/networks/{made['Id']}"))[0] == 204
    assert (await rig.ask("DELETE", "/networks/c1"))[0] == 204


async def test_networks_of_the_node_have_events(rig: Rig) -> None:
    id = (await rig.ask("POST", "/networks/create", {"Name": "c1", "ConfigOnly": True}))[1]["Id"]
    await rig.ask("DELETE", f"/networks//{id}/")
    events = rig.work.events.recent(0)
    assert [(one.type, one.action, one.container_id) for one in events] == [
        ("network", "create", id),
        ("network", "destroy", id),
    ]
    assert events[0].attributes["name"] == "c1"


async def test_the_gateway_bridge_is_removed_and_made_again_with_another_subnet(rig: Rig) -> None:
    assert (await rig.ask("DELETE", "/networks/docker_gwbridge"))[0] == 204
    assert "docker_gwbridge" not in await rig.names()
    requested = {"Name": "docker_gwbridge", "IPAM": {"Config": [{"Subnet": "172.29.0.0/16"}]}}
    assert (await rig.ask("POST", "/networks/create", requested))[0] == 201
    _, shown = await rig.ask("GET", "/networks/docker_gwbridge")
    assert shown["IPAM"]["Config"] == [{"Subnet": "172.29.0.0/16", "Gateway": "172.29.0.1"}]
    taken = (409, "network with name docker_gwbridge already exists")
    assert await rig.message("POST", "/networks/create", requested) == taken


async def test_the_gateway_bridge_stays_while_containers_are_on_it(rig: Rig) -> None:
    task = a_task("t1")
    rig.work.containers = (a_container_of(task, "c" * 64),)
    rig.gateway.on_it = ("c" * 64,)
    _, shown = await rig.ask("GET", "/networks/docker_gwbridge")
    assert shown["Containers"]["c" * 64]["Name"] == "gateway_cccccccccccc"
    status, message = await rig.message("DELETE", "/networks/docker_gwbridge")
    assert status == 403
    assert message == (
        f"error while removing network: network docker_gwbridge id {shown['Id']} has active endpoints"
    )


async def test_the_gateway_bridge_is_back_when_a_container_needs_it(rig: Rig) -> None:
    before = (await rig.ask("GET", "/networks/docker_gwbridge"))[1]["Id"]
    await rig.ask("DELETE", "/networks/docker_gwbridge")
    assert (await rig.message("DELETE", "/networks/docker_gwbridge"))[0] == 404
    rig.gateway.on_it = ("c" * 64,)
    _, shown = await rig.ask("GET", "/networks/docker_gwbridge")
    assert shown["Id"] != before
    rig.gateway.on_it = ()
    assert (await rig.ask("GET", "/networks/docker_gwbridge"))[1]["Id"] == shown["Id"]


async def test_a_manager_that_restarts_is_waited_for(tmp_path: Path) -> None:
    async with a_rig(tmp_path) as rig, asyncio.TaskGroup() as group:
        (tmp_path / "m.sock").rename(tmp_path / "away")
        asked = group.create_task(rig.names())
        answered, _ = await asyncio.wait([asked], timeout=0.2)
        assert not answered
        (tmp_path / "away").rename(tmp_path / "m.sock")
        assert "ingress" in await asked


@pytest.mark.parametrize(
    "config",
    [
        [{"Subnet": "nonsense/24"}],
        [{"Subnet": "10.1.0.0/31"}],
        [{"Subnet": "fd00::/64"}],
        [{"Subnet": "10.1.0.0/24", "Gateway": "10.1.0.9"}],
        [{"Subnet": "10.1.0.0/24"}, {"Subnet": "10.2.0.0/24"}],
    ],
)
async def test_a_gateway_bridge_that_cannot_be_is_refused(rig: Rig, config: Any) -> None:
    await rig.ask("DELETE", "/networks/docker_gwbridge")
    requested = {"Name": "docker_gwbridge", "IPAM": {"Config": config}}
    status, _ = await rig.message("POST", "/networks/create", requested)
    assert status in (400, 500)
    assert rig.gateway.subnet == IPv4Network("172.18.0.0/16")
    assert "docker_gwbridge" not in await rig.names()


async def test_containers_of_tasks_are_not_connected_by_hand(rig: Rig) -> None:
    rig.work.containers = (a_container_of(a_task("t1"), "c" * 64),)
    await rig.ask("POST", "/networks/create", {"Name": "o1", "Driver": "overlay", "Attachable": True})
    for verb in ("connect", "disconnect"):
        status, message = await rig.message("POST", f"/networks/o1/{verb}", {"Container": "c" * 64})
        assert status == 400
        assert "docker service update --network-add" in message
        unknown = (404, "No such container: nosuch")
        assert await rig.message("POST", f"/networks/o1/{verb}", {"Container": "nosuch"}) == unknown
        nameless = (400, 'invalid name or ID supplied: ""')
        assert await rig.message("POST", f"/networks/o1/{verb}", {}) == nameless


@pytest.mark.parametrize("name", ["bridge", "host"])
async def test_what_every_node_has_is_the_nodes_unless_the_clusters_is_asked_for(rig: Rig, name: str) -> None:
    assert (await rig.ask("GET", f"/networks/{name}"))[1]["Scope"] == "local"
    assert (await rig.ask("GET", f"/networks/{name}?scope=swarm"))[1]["Scope"] == "swarm"
    assert (await rig.ask("GET", "/networks/none?scope=swarm"))[0] == 404
    assert (await rig.ask("GET", "/networks/ingress?scope=local"))[0] == 404


async def allocate(rig: Rig, name: str) -> Network:
    """As the leader does."""
    view = rig.manager.store.view()
    book = NetworkAllocations()
    for other in view.find(Network):
        book.enter(other)
    network = view.find(Network, name=name)[0]
    return await rig.manager.store.update(lambda tx: tx.put(allocated(network, book, ("10.0.0.0/8",), 24)))


async def test_inspect_shows_services_tasks_peers_and_that_the_network_is_nearly_full(rig: Rig) -> None:
    requested = {
        "Name": "o1",
        "Driver": "overlay",
        "IPAM": {"Config": [{"Subnet": "10.9.0.0/29"}]},
    }
    assert (await rig.ask("POST", "/networks/create", requested))[0] == 201
    network = await allocate(rig, "o1")
    node = replace(a_node("n2"), status=replace(a_node("n2").status, addr="10.77.0.2"))
    service = a_service("web")
    spec = replace(
        service.spec,
        task_template=replace(
            service.spec.task_template, networks=(NetworkAttachmentConfig(target=network.id),)
        ),
    )
    virtual = EndpointVirtualIP(network_id=NetworkId(network.id), addr="10.9.0.2/29")
    service = replace(service, spec=spec, endpoint=ServiceEndpoint(virtual_ips=(virtual,)))
    tasks = [
        on(network, a_task(f"t{host}", service=service, slot=host, node="n2"), f"10.9.0.{host}/29")
        for host in (3, 4)
    ]
    await rig.manager.store.update_each(lambda tx, one: tx.put(one), (node, service, *tasks))
    _, shown = await rig.ask("GET", "/networks/o1?verbose=true")
    assert shown["Peers"] == [{"Name": node.description.hostname or "n2", "IP": "10.77.0.2"}]
    entry = shown["Services"]["web"]
    assert (entry["VIP"], entry["Ports"]) == ("10.9.0.2", [])
    assert [(one["Name"], one["EndpointIP"], one["Info"]) for one in entry["Tasks"]] == [
        ("web.3.t3", "10.9.0.3", {"Host IP": "10.77.0.2"}),
        ("web.4.t4", "10.9.0.4", {"Host IP": "10.77.0.2"}),
    ]
    assert "Warnings" not in shown
    fourth = on(network, a_task("t5", service=service, slot=5, node="n2"), "10.9.0.5/29")
    await rig.manager.store.update(lambda tx: tx.put(fourth))
    _, shown = await rig.ask("GET", "/networks/o1")
    assert shown["Warnings"] == [
        "4 of 5 addresses are in use: give the network another subnet (skep network update --subnet-add SUBNET o1)"
    ]
    assert "Services" not in shown
    assert (await rig.ask("POST", "/networks/o1/update", {"SubnetsAdd": [{"Subnet": "10.9.1.0/24"}]}))[
        0
    ] == 200
    await allocate(rig, "o1")
    assert "Warnings" not in (await rig.ask("GET", "/networks/o1"))[1]


async def test_a_clash_with_a_node_that_came_later_is_reported(rig: Rig) -> None:
    requested = {"Name": "o1", "Driver": "overlay", "IPAM": {"Config": [{"Subnet": "10.9.0.0/24"}]}}
    assert (await rig.ask("POST", "/networks/create", requested))[0] == 201
    await allocate(rig, "o1")
    node = a_node("n9")
    engine = replace(node.description.engine, labels={"skep.node": "true", "skep.routes": "10.9.0.0/16=eth3"})
    late = replace(node, description=replace(node.description, hostname="late", engine=engine))
    await rig.manager.store.update(lambda tx: tx.put(late))
    _, shown = await rig.ask("GET", "/networks/o1")
    assert shown["Warnings"] == [
        "10.9.0.0/24 overlaps with 10.9.0.0/16 on eth3 of node late: containers there cannot reach that network"
    ]
    other = {"Name": "o2", "Driver": "overlay", "IPAM": {"Config": [{"Subnet": "10.9.7.0/24"}]}}
    status, message = await rig.message("POST", "/networks/create", other)
    assert status == 400
    assert "10.9.7.0/24 overlaps with 10.9.0.0/16 on eth3 of node late" in message


async def test_prune_removes_unused_networks_that_match_the_filters(rig: Rig) -> None:
    for name, labels in (("o1", {"keep": "1"}), ("o2", {}), ("o3", {})):
        body = {"Name": name, "Driver": "overlay", "Labels": labels}
        assert (await rig.ask("POST", "/networks/create", body))[0] == 201
    used = rig.manager.store.view().find(Network, name="o3")[0]
    service = a_service("web")
    template = replace(service.spec.task_template, networks=(NetworkAttachmentConfig(target=used.id),))
    attached = replace(service, spec=replace(service.spec, task_template=template))
    await rig.manager.store.update(lambda tx: tx.put(attached))
    prune = "/networks/prune?filters="
    assert (await rig.ask("POST", prune + '{"label":["nosuch"]}'))[1] == {"NetworksDeleted": None}
    assert (await rig.ask("POST", prune + '{"until":["1h"]}'))[1] == {"NetworksDeleted": None}
    assert (await rig.message("POST", prune + '{"bogus":["1"]}'))[0] == 400
    twice = (400, "more than one until filter specified")
    assert await rig.message("POST", prune + '{"until":["1m","1s"]}') == twice
    assert (await rig.ask("POST", prune + '{"label!":[]}'))[1] == {"NetworksDeleted": None}
    assert (await rig.ask("POST", prune + '{"label!":["keep"]}'))[1] == {"NetworksDeleted": ["o2"]}
    assert (await rig.ask("POST", "/networks/prune"))[1] == {"NetworksDeleted": ["o1"]}
    assert await rig.names(scope="swarm") == {"ingress", "o3"}
    assert await rig.names(dangling="true", scope="swarm") == {"ingress"}


@pytest.mark.parametrize("length", [4, 12, 25])
async def test_networks_of_the_cluster_are_found_by_the_beginning_of_their_id(rig: Rig, length: int) -> None:
    _, made = await rig.ask("POST", "/networks/create", {"Name": "o1", "Driver": "overlay"})
    assert (await rig.ask("GET", f"/networks/{made['Id'][:length]}"))[1]["Name"] == "o1"
    assert (await rig.ask("DELETE", f"/networks/{made['Id'][:length]}"))[0] == 204


async def test_a_list_that_cannot_be_read_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "local").write_text("{broken")
    local = LocalNetworks(tmp_path / "local", None, clock=SystemClock(), new_id=new_container_id)
    local.open()
    assert [one.name for one in local.predefined()] == ["bridge", "host", "none"]
    assert local.gateway() is None


async def test_1_48_networks_say_that_they_have_ipv4(rig: Rig) -> None:
    await rig.ask("POST", "/networks/create", {"Name": "o1", "Driver": "overlay"})
    for name in ("bridge", "o1", "ingress"):
        assert (await rig.ask("GET", f"/v1.48/networks/{name}"))[1]["EnableIPv4"] is True
        assert "EnableIPv4" not in (await rig.ask("GET", f"/v1.47/networks/{name}"))[1]
    for version, is_shown in (("1.48", True), ("1.47", False)):
        _, found = await rig.ask("GET", f"/v{version}/networks")
        assert {"EnableIPv4" in one for one in found} == {is_shown}
    status, message = await rig.message("POST", "/networks/create", {"Name": "n6", "EnableIPv4": False})
    assert (status, message) == (400, "IPv4 cannot be disabled: leave EnableIPv4 out")


async def test_1_52_networks_say_how_many_addresses_are_free(rig: Rig) -> None:
    config = {
        "Driver": "overlay",
        "IPAM": {"Config": [{"Subnet": "10.7.0.0/24", "IPRange": "10.7.0.128/25"}]},
    }
    await rig.ask("POST", "/networks/create", {"Name": "o1", **config})
    await allocate(rig, "o1")
    (status,) = (await rig.ask("GET", "/v1.52/networks/o1"))[1]["Status"]["IPAM"]["Subnets"].items()
    assert status == ("10.7.0.0/24", {"IPsInUse": 3, "DynamicIPsAvailable": 126})
    (own,) = (await rig.ask("GET", "/v1.52/networks/docker_gwbridge"))[1]["Status"]["IPAM"][
        "Subnets"
    ].values()
    assert own["IPsInUse"] + own["DynamicIPsAvailable"] == 2**16
    for path in ("/v1.51/networks/o1", "/v1.51/networks/docker_gwbridge"):
        assert "Status" not in (await rig.ask("GET", path))[1]
    assert all("Status" not in one for one in (await rig.ask("GET", "/v1.52/networks"))[1])


def test_1_52_users_addresses_count_as_used() -> None:
    configs = [SubnetBody(subnet="10.1.0.0/29", gateway="10.1.0.1"), SubnetBody(subnet="fd00::/64")]
    status = ipam_status(configs, ["10.1.0.2/29", "10.1.0.2", "10.9.0.2/24", "fd00::2/64"])
    assert status["IPAM"]["Subnets"] == {
        "10.1.0.0/29": {"IPsInUse": 4, "DynamicIPsAvailable": 4},
        "fd00::/64": {"IPsInUse": 2, "DynamicIPsAvailable": 2**64 - 2},
    }
