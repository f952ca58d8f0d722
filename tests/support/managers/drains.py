"""Services with a task per slot, and nodes that are drained."""

from msgspec.structs import replace

from skep.model.container import Mount
from skep.model.node import Availability
from skep.model.options.labels import DRAIN_NOW, MIN_AVAILABLE
from skep.model.service import (
    RestartCondition,
    RestartPolicy,
    Service,
    ServiceSpec,
    UpdateConfig,
    UpdateOrder,
)
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, TaskId
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.managers.worlds import World

RUNNING = TaskState.RUNNING
N1 = NodeId("n1")
DRAINED = a_node("n1", availability=Availability.DRAIN)
DRAINED_NOW = a_node("n1", availability=Availability.DRAIN, labels={DRAIN_NOW: "true"})


def a_spec(
    replicas: int = 1,
    *,
    minimum: str | None = None,
    data: bool = False,
    order: UpdateOrder | None = None,
    parallelism: int = 1,
    image: str = "app:1",
    condition: RestartCondition = RestartCondition.ANY,
) -> ServiceSpec:
    spec = a_service_spec(
        replicas=replicas,
        image=image,
        update=UpdateConfig(parallelism=parallelism, order=order),
        restart=RestartPolicy(condition=condition, delay=0),
    )
    container = spec.task_template.container_spec
    assert container is not None
    if data:
        container = replace(container, mounts=(Mount(type="volume", source="data", target="/data"),))
    template = replace(spec.task_template, container_spec=container)
    labels = {} if minimum is None else {MIN_AVAILABLE: minimum}
    return replace(spec, task_template=template, labels=labels)


def a_world(spec: ServiceSpec, nodes: tuple[str, ...] = ("n1",)) -> World:
    """Return a service with a running task per slot: slot 1 on the first node, and the others on the next ones."""
    service = a_service(spec=spec)
    world = World(service, nodes=[*map(a_node, dict.fromkeys((*nodes, "n9")))])
    for slot in range(1, spec.replicas + 1):
        world.put(running(service, slot, nodes[min(slot, len(nodes)) - 1]))
    return world


def running(service: Service, slot: int, node: str) -> Task:
    return a_task(f"old{slot}", slot=slot, node=node, service=service, state=RUNNING)


def wanted(world: World) -> list[Task]:
    return sorted((task for task in world.tasks.values() if task.is_wanted), key=lambda task: task.id)


def drain(world: World, node: str = "n1", *, labels: dict[str, str] | None = None) -> None:
    world.nodes[NodeId(node)] = a_node(node, availability=Availability.DRAIN, labels=labels or {})
    world.settle()


def assign(world: World, id: TaskId, node: str = "n9", state: TaskState = TaskState.STARTING) -> None:
    world.put(replace(world.tasks[id], node_id=NodeId(node)))
    world.report(id, state)
    world.settle()


def new_ones(world: World) -> list[Task]:
    return [task for task in wanted(world) if task.id.startswith("new")]
