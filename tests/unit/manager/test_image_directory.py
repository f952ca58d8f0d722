"""Which nodes may have an image."""

from random import Random
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import PermissionDenied
from skep.manager.nodes.image_directory import (
    ANSWERED_S,
    GRANTED_S,
    SOURCES_MAX,
    ImageDirectory,
    candidates,
    chosen,
    image_address,
    needed_images,
)
from skep.model.container import ContainerSpec
from skep.model.networks.data_planes import IMAGES_LABEL
from skep.model.node import EngineDescription, ManagerStatus, Node, NodeRole, NodeState
from skep.model.service import Service, ServiceSpec, TaskSpec
from skep.model.task import Task, TaskState
from skep.model.values.ids import ClusterId, NodeId
from skep.security.identity import NodeIdentity
from skep.store.interface import Transaction
from skep.store.memory import MemoryCluster, MemoryStore
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from tests.support.builders import a_node, a_service, a_task
from tests.support.managers.counted_calls import counting_calls_of_callbacks

DIGEST = "sha256:" + "a" * 64


def serving(id: str, *, port: str = "2374", role: NodeRole = NodeRole.WORKER, **fields: object) -> Node:
    node = msgspec.structs.replace(a_node(id, role=role), **fields)
    engine = EngineDescription(engine_version="1", labels={IMAGES_LABEL: port})
    return msgspec.structs.replace(node, description=msgspec.structs.replace(node.description, engine=engine))


def a_spec(image: str) -> ServiceSpec:
    return ServiceSpec(
        name=image[:5].replace(":", "-"), task_template=TaskSpec(container_spec=ContainerSpec(image=image))
    )


async def found(
    *objects: Node | Service | Task, spellings: tuple[str, ...] = ("app:1",), asking: str = "n0"
) -> list[str]:
    store = MemoryStore(SystemClock())

    def put(tx) -> None:  # type: ignore[no-untyped-def]
        for one in objects:
            tx.put(one)

    await store.update(put)
    found = candidates(store.view(), frozenset(spellings))
    return [node.id for node in chosen(found, NodeId(asking), Random(1))]


async def test_managers_and_nodes_with_tasks_of_the_image_are_found_in_this_order() -> None:
    web = a_service("web", spec=a_spec("app:1"))
    other = a_service("other", spec=a_spec("app:2"))
    nodes = [serving(name) for name in ("n1", "n2", "n3")]
    tasks = [
        a_task(node="n1", service=web),
        a_task(slot=2, node="n2", service=other),
        a_task(slot=3, node="n3", service=web, desired=TaskState.SHUTDOWN),
    ]
    manager = serving("n9", role=NodeRole.MANAGER)
    assert await found(manager, web, other, *nodes, *tasks) == ["n9", "n1"]


async def test_a_digest_stands_for_every_name_with_it_and_previous_specs_count() -> None:
    web = a_service("web", spec=a_spec("app:2"), previous=a_spec(f"registry:5000/app:1@{DIGEST}"))
    task = a_task(node="n1", service=web)
    assert await found(serving("n1"), web, task, spellings=("app@sha256:b", DIGEST)) == ["n1"]
    assert await found(serving("n1"), web, task, spellings=("app@sha256:b",)) == []


@pytest.mark.parametrize("port", ["", "0", "65536", "9" * 5000, "x"])
def test_a_port_that_is_none_is_not_given_to_others(port: str) -> None:
    assert image_address(serving("n1", port=port, role=NodeRole.WORKER)) == ""


async def test_nodes_that_do_not_serve_are_down_or_are_asking_are_left_out() -> None:
    web = a_service("web", spec=a_spec("app:1"))
    nodes = (
        a_node("n1"),
        serving("n2", status=msgspec.structs.replace(a_node().status, state=NodeState.DOWN)),
        serving("n0"),
        serving("n3", port="no port"),
        serving("n4"),
    )
    tasks = [a_task(slot=number, node=node.id, service=web) for number, node in enumerate(nodes)]
    assert await found(web, *nodes, *tasks) == ["n4"]


async def test_of_many_nodes_some_are_chosen_and_managers_never_take_all_places() -> None:
    web = a_service("web", spec=a_spec("app:1"))
    managers = [serving(f"m{number}", role=NodeRole.MANAGER) for number in range(SOURCES_MAX)]
    nodes = [serving(f"w{number}") for number in range(3 * SOURCES_MAX)]
    tasks = [a_task(slot=number, node=node.id, service=web) for number, node in enumerate(nodes)]
    chosen = await found(web, *managers, *nodes, *tasks)
    assert len(set(chosen)) == SOURCES_MAX
    assert sum(id.startswith("m") for id in chosen) == SOURCES_MAX // 2


def test_a_manager_is_reached_where_it_is_advertised() -> None:
    advertised = ManagerStatus(addr="10.0.0.7:2377")
    assert image_address(serving("m1", manager_status=advertised)) == "10.0.0.7:2374"
    assert image_address(serving("w1")) == "127.0.0.1:2374"
    assert image_address(serving("w1", status=msgspec.structs.replace(a_node().status, addr=""))) == ""


async def test_images_of_present_and_previous_specs_are_needed() -> None:
    store = MemoryStore(SystemClock())
    await store.update(lambda tx: tx.put(a_service("web", spec=a_spec("app:3"), previous=a_spec("app:2"))))
    assert needed_images(store.view()) == {"app:3", "app:2"}


class CountingStore(MemoryStore):
    """Counts the looks at all tasks of a service, which grow with the cluster."""

    looks = 0

    def view(self) -> Any:
        store, view = self, super().view()

        class Counting:
            def __getattr__(self, name: str) -> Any:
                return getattr(view, name)

            def find(self, kind: type[Any], **by: str) -> Any:
                store.looks += "service_id" in by
                return view.find(kind, **by)

        return Counting()


class SetClock(SystemClock):
    now = 0.0

    def monotonic(self) -> float:
        return self.now


async def asked(directory: ImageDirectory, node: str, image: str) -> list[str]:
    """The nodes from which the manager says that a worker may get an image."""
    caller = Caller(
        identity=NodeIdentity(node_id=NodeId(node), cluster_id=ClusterId("c"), role=NodeRole.WORKER),
        address="127.0.0.1",
        disconnect=lambda: None,
    )
    response = await directory.find(skep.FindImageRequest(images=[image]), caller)
    return [one.node_id for one in response.sources]


async def test_a_worker_reads_an_image_before_its_task_runs_and_for_an_hour_after_it_is_gone() -> None:
    clock = SetClock()
    store = MemoryStore(clock)
    web = a_service("web", spec=a_spec("app:1"))
    task = a_task("t1", node="n1", service=web, state=TaskState.ASSIGNED)

    def put(tx: Transaction) -> None:
        for one in (web, task, serving("n1"), serving("n2"), serving("m1", role=NodeRole.MANAGER)):
            tx.put(one)

    await store.update(put)
    directory = ImageDirectory(store, ClusterId("c"), clock, Random(1))
    assert await asked(directory, "n1", "app:1") == ["m1"]
    await store.update(lambda tx: tx.delete(Task, task.id))
    clock.now += GRANTED_S - 1
    assert await asked(directory, "n1", "app:1") == ["m1"]
    assert await asked(directory, "n2", "app:1") == [], "it never had the task"
    clock.now += 2
    assert await asked(directory, "n1", "app:1") == []


async def test_a_node_that_another_manager_has_just_admitted_is_no_stranger() -> None:
    cluster, clock = MemoryCluster(), SystemClock()
    ahead, behind = MemoryStore(clock, cluster), MemoryStore(clock, cluster)
    behind.faults.lag_s = 0.05
    web = a_service("web", spec=a_spec("app:1"))
    await ahead.update(
        lambda tx: [tx.put(one) for one in (web, serving("n1"), a_task("t1", node="n1", service=web))]
    )
    directory = ImageDirectory(behind, ClusterId("c"), clock, Random(1))
    caller = Caller(identity=None, address="127.0.0.1", disconnect=lambda: None)
    await directory.check(skep.CheckNodeRequest(node_id="n1", images=["app:1"]), caller)
    with pytest.raises(PermissionDenied, match="node n2 is not part of the swarm"):
        await directory.check(skep.CheckNodeRequest(node_id="n2", images=["app:1"]), caller)


async def test_many_nodes_that_ask_for_one_image_cost_one_look_at_its_tasks_a_second() -> None:
    clock = SetClock()
    store = CountingStore(clock)
    web = a_service("web", spec=a_spec("app:1"))
    nodes = [serving(f"n{number}") for number in range(50)]

    def put(tx: Transaction) -> None:
        tx.put(web)
        for number, node in enumerate(nodes):
            tx.put(node)
            tx.put(a_task(f"t{number}", slot=number + 1, node=node.id, service=web))

    await store.update(put)
    directory = ImageDirectory(store, ClusterId("c"), clock, Random(1))

    async def ask(node: str, image: str = "app:1") -> list[str]:
        return await asked(directory, node, image)

    for node in nodes:
        found = await ask(node.id)
        assert len(found) == SOURCES_MAX
        assert node.id not in found
    assert store.looks == 1
    clock.now += ANSWERED_S
    await ask("n1")
    assert store.looks == 2
    assert await ask("n1", "secret:1") == [], "it has no task of this image"
    assert await ask("n99") == []
    assert store.looks == 2


@pytest.mark.timeout(300)
@pytest.mark.parametrize("many", [500, pytest.param(5_000, marks=pytest.mark.slow)])
async def test_a_request_of_each_node_for_one_image_costs_the_same_however_many_there_are(many: int) -> None:
    """With 20 tasks on each node, as in a cluster of 5,000 nodes and 100,000 tasks.

    A thousand calls take about 0.1 ms.
    """
    store = MemoryStore(SystemClock())
    specs = [replace(a_spec(f"app:{number}"), name=f"s{number}") for number in range(20)]
    services = [a_service(spec.name, spec=spec) for spec in specs]

    def put(tx: Transaction, first: int) -> None:
        for node in range(first, first + 20):
            tx.put(serving(f"n{node}"))
            for service in services:
                tx.put(a_task(f"{service.id}-{node}", slot=node + 1, node=f"n{node}", service=service))

    await store.update(lambda tx: [tx.put(service) for service in services])
    for first in range(0, many, 20):
        await store.update(put, first)
    directory = ImageDirectory(store, ClusterId("c"), SetClock(), Random(1))
    with counting_calls_of_callbacks() as calls:
        for node in range(many):
            assert await asked(directory, f"n{node}", "app:1")
    assert sum(calls) / many < 600
