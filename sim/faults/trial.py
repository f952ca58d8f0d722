"""Checks in a cluster at rest that an update gets nodes for all its tasks if the dry run accepts it."""

from collections.abc import Callable, Iterable
from random import Random

from sim.cluster import SimulatedCluster
from sim.faults.damping import is_steady, pass_time
from sim.invariants.nodes.placement import homes_of
from sim.invariants.services.dependencies import missing_dependencies
from sim.users.users import Users, forced
from skep.manager.routes.extensions.placement import accounting_of
from skep.manager.scheduler.explaining.dry_run import DryRun, PlannedPlacement
from skep.model.options.affinity import has_affinities
from skep.model.options.autoscaling import AUTOSCALE
from skep.model.options.dependencies import DEPENDS_ON
from skep.model.options.labels import OnDisconnect, VolumeAffinity, disconnect_policy, volume_affinity
from skep.model.service import Service, ServiceSpec, UpdateOrder
from skep.model.staging.updates import stages_of
from skep.model.task import Task, TaskState
from skep.model.values.ids import ServiceId, TaskId
from skep.store.interface import View

PLACED_S = 25.0
"""Time limit until all new tasks have nodes.  An update replaces them one after the other, with delays."""

EARLIER_LEADER_S = 75.0
"""Time after which a new leader may take a volume from a node, because the previous leader's calls have ended."""


def try_an_update(cluster: SimulatedCluster, users: Users, random: Random) -> None:
    """Force an update of a steady service.  If the dry run accepts it, no task may stay without a node.

    Most runs end without a steady service, because images are broken, jobs have ended, or numbers of tasks change.
    In that case users create a service that can be steady, and its creation is checked in the same way.
    """
    if not (services := _tryable(cluster)):
        _try_a_service(cluster, users)
        services = _tryable(cluster)
    if not services or cluster.observer.violations:
        return
    # A task with a cluster volume competes with the task that it replaces.
    sharing = [one for one in services if any(task.volumes for task in cluster.wanted(one.id))]
    id = random.choice(sharing or services).id
    check_planned(
        cluster, id, forced(cluster.view.get(Service, id).spec), lambda: cluster.do(users.force(id))
    )


def _tryable(cluster: SimulatedCluster) -> list[Service]:
    return [one for one in cluster.view.find(Service) if _can_be_tried(cluster, one)]


def _try_a_service(cluster: SimulatedCluster, users: Users) -> None:
    """Create a service.  If the dry run accepts it, no task may stay without a node."""
    if (spec := users.a_free_spec(_can_be_steady)) is None:
        return
    id = users.next_id()
    check_planned(cluster, id, spec, lambda: cluster.do(users.create(id, spec)))


def check_planned(
    cluster: SimulatedCluster, id: ServiceId, spec: ServiceSpec, update: Callable[[], object]
) -> None:
    """Note a violation if the dry run accepts ``spec`` for a service, and a task stays without a node.

    A task of another service that waits for longer may take the place first.

    Args:
        update: called to update the service to that spec.
    """
    planned = cluster.do(_plan(cluster.view, spec))
    is_accepted = not planned.error and not planned.preempted
    waiting = [service.id for service in cluster.view.find(Service) if _pending(cluster, service.id)]
    placed = _placed(cluster, waiting)
    update()
    pass_time(cluster, PLACED_S)
    if not is_accepted or _placed(cluster, waiting) - placed:
        return
    if _pending(cluster, id):
        pass_time(cluster, EARLIER_LEADER_S)
    for task in _pending(cluster, id):
        problem = f"the dry run accepts {spec.name}, and task {task.id} has no node: {task.status.err}"
        cluster.observer.note(cluster.loop.time(), [problem])


def _placed(cluster: SimulatedCluster, ids: Iterable[ServiceId]) -> set[TaskId]:
    """Return the tasks with places of the services that wait for one, which the update may free.

    A global service's task has a node before it has a place there.
    """
    tasks = (task for id in ids for task in cluster.view.find(Task, service_id=id))
    return {task.id for task in tasks if task.status.state >= TaskState.ASSIGNED}


def _pending(cluster: SimulatedCluster, id: ServiceId) -> list[Task]:
    tasks = cluster.view.find(Task, service_id=id)
    return [task for task in tasks if task.is_wanted and task.status.state is TaskState.PENDING]


def _can_be_steady(spec: ServiceSpec) -> bool:
    """Return whether the dry run considers all criteria for the placement of a new service's tasks."""
    update, labels = spec.update_config, spec.labels
    return (
        spec.mode.name in ("replicated", "global")
        and (update is None or update.order is UpdateOrder.STOP_FIRST)
        and not labels.keys() & {AUTOSCALE, DEPENDS_ON}
        and not has_affinities(labels)
        and volume_affinity(labels) is not VolumeAffinity.REQUIRED
        and disconnect_policy(labels).action is not OnDisconnect.STOP
    )


def _can_be_tried(cluster: SimulatedCluster, service: Service) -> bool:
    """Return whether the dry run considers all criteria for the placement of the service's tasks."""
    view, update = cluster.view, service.spec.update_config
    return (
        is_steady(cluster, service)
        and not any(has_affinities(one.spec.labels) for one in view.find(Service))
        and (update is None or update.order is UpdateOrder.STOP_FIRST)
        and not stages_of(service.spec.labels)  # it starts tasks first, whatever the order
        and not any(missing_dependencies(service, view))
        and not any(homes_of(task, service, view) for task in view.find(Task, service_id=service.id))
    )


async def _plan(view: View, spec: ServiceSpec) -> PlannedPlacement:
    dry_run = DryRun(view, await accounting_of(view), lambda service: service.spec.name)
    (planned,) = [step for step in dry_run.placing(spec) if step is not None]
    return planned
