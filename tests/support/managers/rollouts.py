"""Rolling updates of a service on ``World``: its specs, its desired tasks, and the progress of an update."""

from skep.model.service import (
    RestartPolicy,
    ServiceSpec,
    UpdateConfig,
    UpdateState,
)
from skep.model.task import Task, TaskState
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.managers.worlds import World

RUNNING = TaskState.RUNNING
AT_ONCE = RestartPolicy(delay=0)


def a_spec(
    image: str = "app:1",
    *,
    replicas: int = 4,
    update: UpdateConfig | None = None,
    restart: RestartPolicy = AT_ONCE,
) -> ServiceSpec:
    return a_service_spec(replicas=replicas, image=image, update=update, rollback=update, restart=restart)


def a_world(
    update: UpdateConfig | None = None, *, replicas: int = 4, restart: RestartPolicy = AT_ONCE
) -> World:
    """Return a world in which all replicas of app:1 run on n1."""
    service = a_service(spec=a_spec(update=update, replicas=replicas, restart=restart))
    world = World(service, nodes=[a_node("n1")])
    for slot in range(1, replicas + 1):
        world.put(a_task(slot=slot, node="n1", service=service))
    return world


def wanted(world: World, image: str = "") -> list[Task]:
    return [
        t for t in world.tasks.values() if t.desired_state <= RUNNING and (not image or image_of(t) == image)
    ]


def image_of(task: Task) -> str:
    return task.spec.container_spec.image if task.spec.container_spec else ""


def state(world: World) -> UpdateState | None:
    return world.service.update_status.state if world.service.update_status else None


def message(world: World) -> str:
    return world.service.update_status.message if world.service.update_status else ""


def advance(world: World) -> None:
    """Carry out the decisions: prepare successors, stop retired tasks, run desired tasks."""
    world.settle()
    world.prepare_all()
    world.settle()
    world.stop_all()
    world.settle()
    world.run_all()
    world.settle()
