"""Tables that are kept up commit by commit are those that the store's state gives, for every reader."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.discovery import versioned_table
from skep.manager.discovery.derive import is_publishing, overlay_attachments, table_session
from skep.manager.discovery.network_tables import KINDS, TableBuilder
from skep.model.container import ContainerSpec
from skep.model.network import IPAMConfig, Network
from skep.model.networks.data_planes import NODE_LABEL, is_docker_node
from skep.model.networks.tables import NetworkTable, changed
from skep.model.node import EngineDescription, Node, NodeState, SessionOwner
from skep.model.service import Endpoint, EndpointVirtualIP, PortConfig, Service
from skep.model.swarm import Swarm
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.model.values.ids import NetworkId, NodeId, ServiceId, SessionId, TaskId
from skep.model.values.meta import Driver, Version
from skep.model.values.times import Timestamp
from skep.store.interface import Transaction, View
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_service_spec, a_task, an_overlay
from tests.support.networks.derived_tables import table_of

NETWORKS = [
    an_overlay("net1"),
    an_overlay("net2", subnet="10.0.2.0/24"),
    an_overlay("ingress", subnet="10.0.0.0/24", ingress=True),
]
NETWORKS[1] = replace(NETWORKS[1], spec=replace(NETWORKS[1].spec, labels={"skep.door": "true"}))
NODES = ("n1", "n2", "n3")
SERVICES = ("a", "b")
TASKS = tuple(f"t{number}" for number in range(6))
REMOVED_AT = Timestamp("2026-01-01T00:00:00Z")
STATES = (TaskState.PENDING, TaskState.ASSIGNED, TaskState.RUNNING, TaskState.FAILED)

Step = Callable[[Transaction], Any]


def put_node(
    id: str, state: NodeState, is_engine: bool, has_place: bool, address: str, manager: str = ""
) -> Step:
    node = a_node(id, state=state)
    labels = {} if is_engine else {NODE_LABEL: "true"}
    engine = EngineDescription(engine_version="1", labels=labels)
    own = (
        (NetworkAttachment(network=NETWORKS[2], addresses=(f"10.0.0.{ord(id[1])}/24",)),) if has_place else ()
    )
    return lambda tx: tx.put(
        replace(
            node,
            description=replace(node.description, engine=engine),
            status=replace(node.status, addr=address),
            attachments=own,
            session=SessionOwner(manager_id=NodeId(manager), session_id=SessionId("s")) if manager else None,
        )
    )


def put_service(id: str, publishes: bool, is_removed: bool, is_routed: bool, networks: set[int]) -> Step:
    ports = (PortConfig(target_port=80, published_port=8000 + ord(id)),) if publishes else ()
    vips = tuple(
        EndpointVirtualIP(network_id=NETWORKS[one].id, addr=f"10.0.{one}.{ord(id)}/24")
        for one in sorted(networks)
    )
    made = a_service(id, ports=ports)
    service = replace(
        made,
        spec=replace(made.spec, labels={"skep.http": "a.example"} if is_routed else {}),
        endpoint=Endpoint(ports=ports, virtual_ips=vips),
        removed_at=REMOVED_AT if is_removed else None,
    )
    return lambda tx: tx.put(service)


def put_task(id: str, service: str, node: str, state: TaskState, wanted: bool, networks: set[int]) -> Step:
    desired = TaskState.RUNNING if wanted else TaskState.SHUTDOWN
    places = tuple(
        NetworkAttachment(network=NETWORKS[one], addresses=(f"10.0.{one}.1{id[1]}/24",))
        for one in sorted(networks)
    )
    task = replace(
        a_task(id, node=node, state=state, desired=desired, service=service), networks_attachments=places
    )
    return lambda tx: tx.put(task)


def put_network(number: int, mtu: int) -> Step:
    network = NETWORKS[number]
    options = {**network.driver_state.options, "com.docker.network.driver.mtu": str(mtu)}
    return lambda tx: tx.put(replace(network, driver_state=Driver(name="overlay", options=options)))


def delete(kind: type[Any], id: str) -> Step:
    return lambda tx: tx.delete(kind, id) if tx.lookup(kind, id) is not None else None


def put_swarm(port: int) -> Step:
    return lambda tx: tx.put(Swarm(id="c", data_path_port=port))  # type: ignore[arg-type]


def put_marker(number: int) -> Step:
    service = a_service("marker")
    return lambda tx: tx.put(replace(service, spec=replace(service.spec, labels={"number": str(number)})))


SOME_NETWORKS = st.sets(st.integers(0, 2), max_size=2)
STEPS = st.one_of(
    st.builds(
        put_node,
        st.sampled_from(NODES),
        st.sampled_from([NodeState.READY, NodeState.READY, NodeState.DOWN]),
        st.booleans(),
        st.booleans(),
        st.sampled_from(["", "192.168.0.1", "192.168.0.2"]),
        st.sampled_from(["", "m1", "m2"]),
    ),
    st.builds(
        put_service, st.sampled_from(SERVICES), st.booleans(), st.booleans(), st.booleans(), SOME_NETWORKS
    ),
    st.builds(
        put_task,
        st.sampled_from(TASKS),
        st.sampled_from(SERVICES),
        st.sampled_from(NODES),
        st.sampled_from(STATES),
        st.booleans(),
        SOME_NETWORKS,
    ),
    st.builds(put_network, st.integers(0, 2), st.sampled_from([0, 1400])),
    st.builds(delete, st.just(Node), st.sampled_from(NODES)),
    st.builds(delete, st.just(Service), st.sampled_from(SERVICES)),
    st.builds(delete, st.just(Task), st.sampled_from(TASKS)),
    st.builds(delete, st.just(Network), st.sampled_from([one.id for one in NETWORKS])),
    st.builds(put_swarm, st.sampled_from([4789, 4790])),
)


def from_scratch(view: View) -> dict[NetworkId, NetworkTable]:
    """Tables of the networks that there are, and of those that were removed while tasks use them."""
    networks = {network.id: network for network in view.find(Network)}
    for task in view.find(Task):
        for id, place in overlay_attachments(task).items():
            assert place.network is not None
            networks.setdefault(id, place.network)
    return {id: table_of(view, network) for id, network in networks.items()}


def resubscribed(view: View) -> dict[NodeId, list[NetworkId]]:
    """The networks whose tables each node gets."""
    publishes = any(map(is_publishing, view.find(Service)))
    everywhere = {id for id, table in from_scratch(view).items() if table.head.is_ingress and publishes}
    nodes = {node.id for node in view.find(Node)} | {task.node_id for task in view.find(Task)}
    return {
        id: sorted(everywhere.union(*map(overlay_attachments, view.find(Task, node_id=id))))
        for id in sorted(nodes)
    }


def managers_on(view: View, network_id: NetworkId, nodes: Iterable[NodeId]) -> set[NodeId]:
    """The managers that send the network's table to some of ``nodes``."""
    on_it = {id for id, networks in resubscribed(view).items() if network_id in networks}
    found = (view.lookup(Node, id) for id in on_it.intersection(nodes))
    sessions = (table_session(node) for node in found if node is not None)
    return {session.manager_id for session in sessions if session is not None}


def sessions_of(tables: TableBuilder) -> dict[NodeId, SessionOwner | None]:
    return {NodeId(id): tables.table_sessions.of(NodeId(id)) for id in NODES}


class Reader:
    """Knows one table as of some revision, and catches up now and then."""

    def __init__(self) -> None:
        self.tables: dict[NetworkId, NetworkTable] = {}
        self.reported: dict[NetworkId, int] = {}

    def catch_up(self, tables: TableBuilder) -> None:
        for id in self.tables.keys() - tables.tables.keys():
            del self.tables[id], self.reported[id]
        for id, table in tables.tables.items():
            reported = self.reported.get(id)
            if table.has_changed_since(reported):
                self.tables[id] = changed(self.tables.get(id), table.since(reported, tables.revision))
            self.reported[id] = tables.revision


def without_revision(tables: dict[NetworkId, NetworkTable]) -> dict[NetworkId, NetworkTable]:
    return {id: replace(table, revision=0) for id, table in tables.items()}


@settings(max_examples=100, deadline=None)
@given(
    batches=st.lists(st.tuples(st.lists(STEPS, min_size=1, max_size=4), st.booleans()), max_size=25),
    remembered=st.sampled_from([1, 3, 1000]),
    begin=st.integers(0, 5),
)
@example(  # the task comes to another service
    batches=[
        ([put_task("t0", "a", "n3", TaskState.ASSIGNED, False, {0, 2})], False),
        (
            [
                put_task("t0", "b", "n3", TaskState.ASSIGNED, False, {0, 2}),
                put_service("a", False, False, False, set()),
            ],
            False,
        ),
    ],
    remembered=1,
    begin=0,
)
@example(  # an ingress network that only a task still knows
    batches=[
        ([put_task("t0", "a", "n2", TaskState.ASSIGNED, False, {2})], False),
        (
            [
                put_service("a", True, False, False, set()),
                put_node("n1", NodeState.READY, False, False, "192.168.0.1"),
            ],
            False,
        ),
    ],
    remembered=1,
    begin=0,
)
@example(  # a node that is not on the network changes its manager
    batches=[
        ([put_network(0, 0), put_node("n1", NodeState.READY, False, False, "192.168.0.1", "m1")], False),
        ([put_node("n1", NodeState.READY, False, False, "192.168.0.1", "m2")], False),
    ],
    remembered=1,
    begin=0,
)
def test_what_is_kept_up_is_what_is_derived_from_scratch(
    batches: list[tuple[list[Step], bool]], remembered: int, begin: int
) -> None:
    async def run() -> None:
        store = MemoryStore(SystemClock())
        often, seldom = Reader(), Reader()
        for steps, _ in batches[:begin]:
            await store.update(lambda tx, steps=steps: [step(tx) for step in steps])
        async with store.watch(*KINDS) as watch:
            tables = TableBuilder()
            for _ in tables.begin(watch.snapshot):
                pass
            often.catch_up(tables)
            for number, (steps, is_read) in enumerate(batches[begin:]):
                # One thing that changes in any case, so that there is a commit to wait for.
                steps = [*steps, put_marker(number)]
                await store.update(lambda tx, steps=steps: [step(tx) for step in steps])
                known = {id: table.table(0) for id, table in tables.tables.items()}
                told_before = {id: tables.networks_of(id) for id in map(NodeId, NODES)}
                before, sessions = tables.revision, sessions_of(tables)
                stirred = tables.note(await anext(aiter(watch)))
                moved = [id for id, session in sessions_of(tables).items() if sessions[id] != session]
                for id in tables.tables:
                    assert {*tables.managers_on(id)} == managers_on(store.view(), id, map(NodeId, NODES))
                    assert tables.managers_of_moved(id, before) == managers_on(store.view(), id, moved)
                now = {id: table.table(0) for id, table in tables.tables.items()}
                assert now == without_revision(from_scratch(store.view()))
                differing = {id for id in known.keys() | now.keys() if known.get(id) != now.get(id)}
                assert stirred.networks >= differing
                expected = resubscribed(store.view())
                for id in map(NodeId, NODES):
                    assert tables.networks_of(id) == expected.get(id, tables.networks_of(id))
                    if tables.networks_of(id) != told_before[id]:
                        assert stirred.all_nodes or id in stirred.nodes or differing & {*told_before[id]}
                often.catch_up(tables)
                if is_read:
                    seldom.catch_up(tables)
                assert without_revision(often.tables) == now
            seldom.catch_up(tables)
            assert without_revision(seldom.tables) == without_revision(often.tables)

    minimum, versioned_table.KEPT_MIN = versioned_table.KEPT_MIN, remembered
    try:
        asyncio.run(run())
    finally:
        versioned_table.KEPT_MIN = minimum


def test_a_tasks_report_costs_no_look_at_the_others() -> None:
    """500 services with 20 tasks each: one report is taken in without reading anything of 9,999 tasks."""
    looked_at = 0

    class Counting(dict[TaskId, Task]):
        def get(self, key: TaskId, default: Any = None) -> Any:  # type: ignore[override]
            nonlocal looked_at
            looked_at += 1
            return super().get(key, default)

        def __iter__(self) -> Any:
            raise AssertionError("all tasks are gone through")

    async def run() -> None:
        nonlocal looked_at
        store = MemoryStore(SystemClock())
        await store.update(lambda tx: tx.put(NETWORKS[0]))
        await store.update(lambda tx: put_node("n1", NodeState.READY, False, False, "192.168.0.1")(tx))
        tables = TableBuilder()
        for number in range(500):
            service = replace(a_service(f"s{number}"), id=ServiceId(f"s{number:03}"))
            await store.update(lambda tx, service=service: tx.put(service))
            tasks = [
                put_task(f"t{n}x{number:03}", service.id, "n1", TaskState.ASSIGNED, True, {0})
                for n in range(20)
            ]
            await store.update(lambda tx, tasks=tasks: [task(tx) for task in tasks])
        async with store.watch(*KINDS) as watch:
            for _ in tables.begin(watch.snapshot):
                pass
            reported = tables.revision
            tables._tasks = Counting(tables._tasks)
            tables.tables[NETWORKS[0].id].endpoints = table = _Unread(tables.tables[NETWORKS[0].id].endpoints)
            await store.update(put_task("t7x123", "s123", "n1", TaskState.RUNNING, True, {0}))
            stirred = tables.note(await anext(aiter(watch)))
            assert (stirred.networks, looked_at) == ({"net1"}, 1)
            change = tables.tables[NETWORKS[0].id].since(reported, tables.revision)
            assert [one.task_id for one in change.endpoints] == ["t7x123"]
            assert (change.nodes, change.services, change.is_whole) == ((), (), False)
            assert len(table) == 10_000

    asyncio.run(run())


class _Unread(dict[TaskId, Any]):
    def __iter__(self) -> Any:
        raise AssertionError("all endpoints are gone through")


def in_zone(service: Service, zone: str) -> Service:
    return replace(service, spec=replace(service.spec, labels={"zone": zone}))


async def test_host_names_follow_the_labels_of_their_service_on_every_manager() -> None:
    """A manager that has followed all commits has the same names as one that has just started."""
    web = a_service("web")
    container = ContainerSpec(image="web", hostname='{{index .Service.Labels "zone"}}')
    place = NetworkAttachment(network=NETWORKS[0], addresses=("10.0.1.2/24",))
    task = replace(a_task("t1", node="n1", service=web), networks_attachments=(place,))
    task = replace(task, spec=replace(task.spec, container_spec=container))
    store = MemoryStore(SystemClock())
    for one in (NETWORKS[0], a_node("n1"), in_zone(web, "north"), task):
        await store.update(lambda tx, one=one: tx.put(one))
    async with store.watch(*KINDS) as watch:
        tables = TableBuilder()
        for _ in tables.begin(watch.snapshot):
            pass
        await store.update(lambda tx: tx.put(in_zone(web, "south")))
        tables.note(await anext(aiter(watch)))
    now = {id: table.table(0) for id, table in tables.tables.items()}
    assert now[NETWORKS[0].id].endpoints[task.id].aliases[-1:] == ("south",)
    assert now == without_revision(from_scratch(store.view()))


@pytest.mark.parametrize(("slot", "name"), [(1, "job-n1"), (3, "job-2")])
async def test_host_names_of_a_job_have_the_slots_that_its_nodes_know(slot: int, name: str) -> None:
    """As in Docker, the first task has its node's id."""
    spec, store = a_service_spec("job"), MemoryStore(SystemClock())
    container = ContainerSpec(image="web", hostname="job-{{.Task.Slot}}")
    job = a_service(spec=replace(spec, task_template=replace(spec.task_template, container_spec=container)))
    place = NetworkAttachment(network=NETWORKS[0], addresses=("10.0.1.2/24",))
    task = a_task("t1", slot=slot, node="n1", service=job)
    task = replace(task, networks_attachments=(place,), job_iteration=Version(index=2))
    await store.update(lambda tx: [tx.put(one) for one in (NETWORKS[0], a_node("n1"), job, task)])
    assert from_scratch(store.view())[NETWORKS[0].id].endpoints[task.id].aliases[-1:] == (name,)


async def test_a_removed_network_keeps_the_subnets_that_were_added_to_it() -> None:
    """Its earliest task knows the first subnet only, and others have addresses in the second."""
    first = an_overlay("net1")
    assert first.ipam_options is not None
    configs = (*first.ipam_options.configs, IPAMConfig(subnet="10.0.9.0/24", gateway="10.0.9.1"))
    options = {"com.docker.network.driver.overlay.vxlanid_list": "4097,4098"}
    grown = replace(
        first,
        driver_state=Driver(name="overlay", options=options),
        ipam_options=replace(first.ipam_options, configs=configs),
    )
    store = MemoryStore(SystemClock())

    def put(tx: Transaction) -> None:
        tx.put(grown)
        for id, network, address in (("t1", first, "10.0.1.2/24"), ("t2", grown, "10.0.9.2/24")):
            place = NetworkAttachment(network=network, addresses=(address,))
            tx.put(replace(a_task(id, node="n1"), networks_attachments=(place,)))

    await store.update(put)
    async with store.watch(*KINDS) as watch:
        tables = TableBuilder()
        for _ in tables.begin(watch.snapshot):
            pass
        before = tables.tables[first.id].head
        await store.update(lambda tx: tx.delete(Network, first.id))
        tables.note(await anext(aiter(watch)))
        assert before is not None
        assert [one.vni for one in before.segments] == [4097, 4098]
        assert tables.tables[first.id].head == before


def test_docker_engines_get_no_tables() -> None:
    """A docker node's tasks are in no table, and the node gets no tables."""
    engine = put_node("n1", NodeState.READY, True, False, "192.168.0.1")

    async def run() -> NetworkTable:
        store = MemoryStore(SystemClock())
        await store.update(
            lambda tx: [engine(tx), tx.put(NETWORKS[0]), put_task("t1", "a", "n1", STATES[2], True, {0})(tx)]
        )
        assert is_docker_node(store.view().get(Node, "n1"))
        tables = TableBuilder()
        for _ in tables.begin(store.view()):
            pass
        return tables.tables[NETWORKS[0].id].table(0)

    table = asyncio.run(run())
    assert (table.nodes, table.endpoints) == ({}, {})
