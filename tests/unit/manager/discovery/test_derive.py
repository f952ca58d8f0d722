"""What is in a network's table, and what is not."""

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.model.network import Network
from skep.model.networks.data_planes import (
    DATA_PATH_LABEL,
    LOCAL_ADDRESSES_LABEL,
    PATHS_LABEL,
    TUNNEL_LABEL,
    tunnel_address,
    underlay_of,
)
from skep.model.networks.tables import NetworkTable, TablePort
from skep.model.networks.wireguard import PUBLIC_KEYS_LABEL, PublicKey, public_keys_label
from skep.model.node import EngineDescription, Node, NodeState, NodeStatus
from skep.model.service import (
    Endpoint,
    EndpointVirtualIP,
    NetworkAttachmentConfig,
    NetworkAttachmentSpec,
    PortConfig,
    PublishMode,
    Service,
    TaskSpec,
)
from skep.model.task import ContainerStatus, NetworkAttachment, Task, TaskState, TaskStatus
from skep.model.task_end import EndCause, TaskEnd
from skep.model.values.ids import ServiceId, TaskId
from skep.model.values.meta import Driver
from skep.model.values.times import Timestamp
from skep.store.memory import MemoryStore
from tests.support.builders import a_docker_node, a_node, a_service, a_task, an_overlay
from tests.support.networks.derived_tables import table_of

NET = an_overlay("net1")
INGRESS = an_overlay("ingress", subnet="10.0.0.0/24", ingress=True)
WEB = replace(
    a_service("web"),
    endpoint=Endpoint(virtual_ips=(EndpointVirtualIP(network_id=NET.id, addr="10.0.1.2/24"),)),
)


def a_skep_node(id: str = "n1", address: str = "192.168.0.1", **requested: Any) -> Node:
    node = a_node(id, **requested)
    return replace(node, status=replace(node.status, addr=address))


def on(network: Network, task: Task, address: str = "10.0.1.5/24", aliases: tuple[str, ...] = ()) -> Task:
    place = NetworkAttachment(network=network, addresses=(address,), aliases=aliases)
    return replace(task, networks_attachments=(*task.networks_attachments, place))


def derived(network: Network, *objects: Any) -> NetworkTable:
    async def run() -> NetworkTable:
        store = MemoryStore(SystemClock())
        await store.update(lambda tx: [tx.put(one) for one in (network, *objects)])
        return table_of(store.view(), network)

    return asyncio.run(run())


def endpoint(task: Task, *objects: Any) -> Any:
    return derived(NET, a_skep_node(), WEB, *objects, on(NET, task)).endpoints.get(task.id)


def test_a_container_is_in_the_table_with_its_name_its_address_and_its_short_id() -> None:
    task = a_task("t1", slot=3, node="n1", service=WEB)
    status = replace(task.status, container_status=ContainerStatus(container_id="abcdef0123456789"))
    found = endpoint(replace(task, status=status))
    assert (found.name, found.slot, found.service_id) == ("web.3.t1", 3, "web")
    assert found.addresses == ("10.0.1.5",)
    assert found.aliases == ("abcdef012345",)


def test_a_global_services_container_is_named_by_its_node() -> None:
    assert endpoint(a_task("t1", slot=0, node="n1", service=WEB)).name == "web.n1.t1"


@pytest.mark.parametrize(
    ("state", "desired", "expected"),
    [
        (TaskState.PENDING, TaskState.RUNNING, None),
        (TaskState.ASSIGNED, TaskState.RUNNING, (False, False)),
        (TaskState.READY, TaskState.READY, (False, False)),
        (TaskState.STARTING, TaskState.RUNNING, (True, False)),
        (TaskState.RUNNING, TaskState.RUNNING, (True, True)),
        (TaskState.RUNNING, TaskState.COMPLETE, (True, True)),
        (TaskState.RUNNING, TaskState.SHUTDOWN, (True, False)),
        (TaskState.RUNNING, TaskState.REMOVE, (True, False)),
        (TaskState.SHUTDOWN, TaskState.SHUTDOWN, None),
        (TaskState.FAILED, TaskState.RUNNING, None),
        (TaskState.ORPHANED, TaskState.RUNNING, None),
    ],
)
def test_from_its_assignment_until_it_has_ended_and_serving_while_it_runs_and_is_wanted(
    state: TaskState, desired: TaskState, expected: tuple[bool, bool] | None
) -> None:
    found = endpoint(a_task("t1", node="n1", state=state, desired=desired, service=WEB))
    assert (found and (found.is_running, found.is_serving)) == expected


def test_a_task_that_its_node_stops_as_unhealthy_serves_no_longer() -> None:
    task = a_task("t1", node="n1", state=TaskState.RUNNING, service=WEB)
    failing = replace(task, status=replace(task.status, end=TaskEnd(cause=EndCause.UNHEALTHY.value)))
    assert endpoint(task).is_serving
    assert (endpoint(failing).is_running, endpoint(failing).is_serving) == (True, False)


@pytest.mark.parametrize(
    ("label", "state", "desired", "expected"),
    [
        ("true", TaskState.READY, TaskState.RUNNING, False),
        ("true", TaskState.STARTING, TaskState.RUNNING, True),
        ("true", TaskState.STARTING, TaskState.SHUTDOWN, False),
        ("true", TaskState.RUNNING, TaskState.RUNNING, False),  # it serves
        ("false", TaskState.STARTING, TaskState.RUNNING, False),
    ],
)
def test_a_task_that_is_not_healthy_yet_has_names_where_its_service_wants_that(
    label: str, state: TaskState, desired: TaskState, expected: bool
) -> None:
    labeled = replace(WEB, spec=replace(WEB.spec, labels={"skep.publish-not-ready": label}))
    found = endpoint(a_task("t1", node="n1", state=state, desired=desired, service=WEB), labeled)
    assert found.is_named_early is expected
    assert found.is_serving is (state is TaskState.RUNNING)


def test_what_is_on_engines_and_on_nodes_that_are_down_is_not_in_the_table() -> None:
    tasks = [a_task(f"t{n}", node=node, service=WEB) for n, node in enumerate(("n1", "n2", "d1", "gone"))]
    nodes = [a_skep_node("n1"), a_skep_node("n2", state=NodeState.DOWN), a_docker_node("d1")]
    table = derived(NET, WEB, *nodes, *(on(NET, task) for task in tasks))
    assert {one.node_id for one in table.endpoints.values()} == {"n1"}
    assert set(table.nodes) == {"n1"}


def test_a_service_has_its_aliases_its_address_and_stays_between_two_tasks() -> None:
    wanted = (NetworkAttachmentConfig(target=NET.id, aliases=("db", "store", "db")),)
    template = replace(WEB.spec.task_template, networks=wanted)
    web = replace(WEB, spec=replace(WEB.spec, task_template=template))
    task = a_task("t1", node="n1", service=web)
    table = derived(NET, web, a_skep_node(), on(NET, task, aliases=("db", "store")))
    service = table.services[web.id]
    assert (service.name, service.aliases, service.virtual_ips) == ("web", ("db", "store"), ("10.0.1.2",))
    assert table.endpoints[task.id].aliases == ()  # they are names of the service, as in Docker
    assert set(derived(NET, web).services) == {"web"}


def test_without_a_virtual_address_a_service_is_there_with_its_tasks_and_a_removed_one_is_not() -> None:
    plain = a_service("plain")
    task = on(NET, a_task("t1", node="n1", service=plain))
    assert derived(NET, plain, a_skep_node()).services == {}
    assert derived(NET, plain, a_skep_node(), task).services[plain.id].virtual_ips == ()
    removed = replace(plain, removed_at=Timestamp("2026-01-01T00:00:00Z"))
    table = derived(NET, removed, a_skep_node(), task)
    assert (set(table.services), set(table.endpoints)) == (set(), {"t1"})


def test_a_plain_container_has_its_name_its_aliases_and_its_short_id() -> None:
    attachment = TaskSpec(network_attachment_spec=NetworkAttachmentSpec(container_id="c0ffee" * 4))
    task = replace(a_task("t1", node="n1"), service_id=ServiceId(""), slot=0, spec=attachment)
    found = derived(NET, a_skep_node(), on(NET, task, aliases=("box", "db"))).endpoints[TaskId("t1")]
    assert (found.service_id, found.name, found.aliases) == ("", "box", ("c0ffeec0ffee", "db"))
    of_an_engine = derived(NET, a_skep_node(), on(NET, task)).endpoints[TaskId("t1")]
    assert (of_an_engine.name, of_an_engine.aliases) == ("", ("c0ffeec0ffee",))


def published(*ports: PortConfig) -> Service:
    service = a_service("pub", ports=ports)
    vip = EndpointVirtualIP(network_id=INGRESS.id, addr="10.0.0.2/24")
    return replace(service, endpoint=Endpoint(ports=ports, virtual_ips=(vip,)))


def test_ports_of_the_mesh_and_every_node_are_on_the_ingress_network_alone() -> None:
    mesh = PortConfig(target_port=80, published_port=8080)
    host = PortConfig(target_port=81, published_port=8081, publish_mode=PublishMode.HOST)
    service = published(host, mesh)
    own = (NetworkAttachment(network=INGRESS, addresses=("10.0.0.9/24",)),)
    labeled = replace(service, spec=replace(service.spec, labels={"skep.publish.8080.local": "true"}))
    (port,) = derived(INGRESS, labeled).services[service.id].ports
    assert port.options.prefers_local, "labels say how"
    nodes = [
        replace(a_skep_node("n1"), attachments=own),
        a_skep_node("n2", "192.168.0.2"),
        a_docker_node("d1"),
        a_skep_node("n3", state=NodeState.DOWN),
    ]
    table = derived(INGRESS, service, *nodes)
    assert table.services[service.id].ports == (TablePort(protocol="tcp", published=8080, target=80),)
    assert {id: node.addresses for id, node in table.nodes.items()} == {"n1": ("10.0.0.9",), "n2": ()}
    assert derived(INGRESS, WEB, *nodes).nodes == {}  # no service publishes a port


def test_where_a_nodes_vxlan_arrives_is_what_it_says_itself_or_where_it_connects_from() -> None:
    def saying(word: str) -> Node:
        node = a_skep_node()
        engine = EngineDescription(engine_version="1", labels={"skep.node": "true", DATA_PATH_LABEL: word})
        return replace(node, description=replace(node.description, engine=engine))

    assert underlay_of(saying("10.9.0.1")) == "10.9.0.1"
    assert underlay_of(saying("fd00::1")) == "fd00::1"
    assert underlay_of(saying("not; an address")) == "192.168.0.1"
    for word in ("fe80::1%x", "fe80::1", "127.0.0.1", "224.0.0.1", "0.0.0.0", "::", "::ffff:10.0.0.1"):
        assert underlay_of(saying(word)) == "192.168.0.1", word
    unseen = replace(a_node("n9"), status=NodeStatus())
    assert set(derived(NET, WEB, unseen, on(NET, a_task("t1", node="n9", service=WEB))).nodes) == set()


def test_nodes_of_an_encrypted_network_come_with_their_public_keys() -> None:
    key = PublicKey(bytes(range(32)), 4799)
    node = a_skep_node()
    engine = node.description.engine
    labels = {**engine.labels, PUBLIC_KEYS_LABEL: public_keys_label([key])}
    node = replace(node, description=replace(node.description, engine=replace(engine, labels=labels)))
    driver = replace(NET.spec.driver_configuration or Driver(), options={"encrypted": ""})
    secure = replace(NET, spec=replace(NET.spec, driver_configuration=driver))
    for network, keys in ((NET, ()), (secure, (key,))):
        task = on(network, a_task("t1", node="n1", service=WEB))
        assert derived(network, WEB, node, task).nodes[node.id].wireguard_keys == keys


def test_nodes_behind_one_nat_have_an_address_of_their_own() -> None:
    """They connect from the same address, which would belong to one of them."""
    key = public_keys_label([PublicKey(bytes(range(32)), 4802)])

    def behind(id: str, number: int) -> Node:
        node = a_skep_node(id, "203.0.113.1")
        labels = {PATHS_LABEL: "1", LOCAL_ADDRESSES_LABEL: f"10.0.0.{number}", TUNNEL_LABEL: key}
        return replace(node, description=replace(node.description, engine=EngineDescription(labels=labels)))

    nodes = (behind("n1", 1), behind("n2", 2))
    tasks = [on(NET, a_task(f"t{node.id}", node=node.id, service=WEB)) for node in nodes]
    found = derived(NET, WEB, *nodes, *tasks).nodes
    assert {id: one.underlay for id, one in found.items()} == {
        node.id: tunnel_address(node.id) for node in nodes
    }


def test_the_site_of_nodes_and_services_that_prefer_it_are_in_the_table() -> None:
    near = replace(WEB, spec=replace(WEB.spec, labels={"skep.near": "true"}))
    for labels, site in (({"zone": "z"}, "z"), ({"zone": "z", "site": "s"}, "s"), ({}, "")):
        node = a_skep_node(labels=labels)
        table = derived(NET, near, node, on(NET, a_task("t1", node="n1", service=near)))
        assert table.nodes[node.id].site == site
        assert table.services[near.id].is_near
    assert not derived(NET, WEB).services[WEB.id].is_near


def test_a_node_that_connects_over_a_link_is_in_no_table() -> None:
    task = on(NET, a_task("t1", node="n1", service=WEB))
    assert derived(NET, WEB, a_skep_node("n1", "fe80::1%eth0"), task).nodes == {}
    assert set(derived(NET, WEB, a_skep_node("n1", "127.0.0.1"), task).nodes) == {"n1"}


def test_of_two_nodes_at_one_address_one_has_it() -> None:
    """The one that connects from there; else the first.  One that is down claims nothing."""

    def at(id: str, address: str, seconds: int, label: str = "", **requested: Any) -> Node:
        node = a_skep_node(id, address, **requested)
        labels = {"skep.node": "true", **({DATA_PATH_LABEL: label} if label else {})}
        engine = EngineDescription(engine_version="1", labels=labels)
        return replace(
            node,
            created_at=Timestamp(f"2026-01-01T00:00:0{seconds}Z"),
            description=replace(node.description, engine=engine),
        )

    def kept(*nodes: Node) -> set[str]:
        tasks = [on(NET, a_task(f"t{node.id}", node=node.id, service=WEB)) for node in nodes]
        return set(derived(NET, WEB, *nodes, *tasks).nodes)

    victim = at("n2", "192.168.0.2", 2)
    assert kept(at("n1", "192.168.0.1", 1, label="192.168.0.2"), victim) == {"n2"}
    first, second = (at(f"n{n}", f"192.168.0.{n}", n, label="10.9.0.1") for n in (1, 2))
    assert kept(first, second) == {"n1"}
    assert kept(replace(first, status=replace(first.status, state=NodeState.DOWN)), second) == {"n2"}


def test_an_unknown_status_is_not_down() -> None:
    node = replace(a_skep_node(), status=NodeStatus(state=NodeState.UNKNOWN, addr="192.168.0.1"))
    table = derived(NET, WEB, node, on(NET, a_task("t1", node="n1", service=WEB)))
    assert set(table.endpoints) == {"t1"}


def test_a_task_without_an_address_is_not_reached() -> None:
    task = replace(
        a_task("t1", node="n1", service=WEB), networks_attachments=(NetworkAttachment(network=NET),)
    )
    assert (
        derived(NET, WEB, a_skep_node(), replace(task, status=TaskStatus(state=TaskState.RUNNING))).endpoints
        == {}
    )


def test_labels_of_routes_are_on_the_network_of_the_front_door_alone() -> None:
    door = replace(NET, spec=replace(NET.spec, labels={"skep.door": "true"}))
    labels = {
        "skep.http": "a.example",
        "com.docker.stack.namespace": "shop",
        "skep.autoscale.rps": "5",
        "other": "x",
    }
    web = replace(WEB, spec=replace(WEB.spec, labels=labels), created_at=Timestamp("2026-01-01T00:00:00Z"))
    (there,) = derived(door, web).services.values()
    assert there.labels == {name: text for name, text in labels.items() if name != "other"}
    assert there.created_at == "2026-01-01T00:00:00Z"
    (here,) = derived(NET, web).services.values()
    assert (here.labels, here.created_at) == ({}, "")
    assert derived(door).head.is_door


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        ({"skep.autoscale": "0..3"}, {"skep.autoscale": "0..3"}),
        ({"skep.autoscale": "1..3"}, {}),
        ({"skep.autoscale": "0..3", "skep.stopped": "true"}, {}),
    ],
)
def test_a_service_with_routes_is_at_the_front_door_without_tasks_and_held_if_a_request_wakes_it(
    labels: dict[str, str], shown: dict[str, str]
) -> None:
    door = replace(NET, spec=replace(NET.spec, labels={"skep.door": "true"}))
    routed = {"skep.http": "a.example", **labels}
    web = replace(WEB, spec=replace(WEB.spec, labels=routed), endpoint=Endpoint())
    (there,) = derived(door, web).services.values()
    assert there.labels == {"skep.http": "a.example", **shown}
    assert not derived(NET, web).services
