"""Finds the reason why a route does not lead to tasks.  Pure."""

from collections.abc import Collection, Mapping
from typing import Final

from skep.errors import InvalidArgument
from skep.model.door.claims import Refusal
from skep.model.door.routes import parsed_routes
from skep.model.network import Network
from skep.model.options.autoscaling import is_at_zero
from skep.model.service import Service, UpdateState
from skep.model.staging.updates import stages_of
from skep.model.task import Task, TaskState

NO_PROXY: Final = "no proxy of the front door runs. Run skep door status"


def label_problem(service: Service) -> str:
    """Return the error in the labels of a service's routes, or an empty text."""
    try:
        parsed_routes(service.spec.labels)
    except InvalidArgument as error:
        return str(error)
    return ""


def route_problem(
    service: Service,
    tasks: Collection[Task],
    door: Network | None,
    refused: Mapping[str, Refusal],
    address: str,
    *,
    has_proxy: bool,
) -> str:
    """Return why a route of ``service`` does not work, with the next step, or an empty text.

    Args:
        tasks: Tasks of the service that shall run.
        door: The network of the front door, or None without a front door.
        refused: Refused routes of the service.
        address: Host and path of the route.
        has_proxy: Whether a proxy runs.
    """
    if door is None:
        return "there is no front door. Create it with skep door up"
    if (refusal := refused.get(address)) is not None:
        return refusal.reason
    if not has_proxy:
        return NO_PROXY
    if is_at_zero(service.spec):
        return ""
    present = [task for task in tasks if task.status.state is TaskState.RUNNING]
    if not present:
        return "no task of the service runs"
    away = [task for task in present if not is_attached(task, door)]
    if away:
        return (
            f"{len(away)} of {len(present)} tasks {'is' if len(away) == 1 else 'are'} not on the network "
            f"{door.spec.name}, and older than the route or the front door. {_replacement(service)}"
        )
    return ""


def _replacement(service: Service) -> str:
    """Return what replaces tasks.  A forced update would begin a staged update in progress once more."""
    status = service.update_status
    is_updating = status is not None and status.state in (UpdateState.UPDATING, UpdateState.PAUSED)
    if is_updating and stages_of(service.spec.labels):
        return f"The update in progress replaces them (skep explain {service.spec.name})"
    return f"Replace them with docker service update --force {service.spec.name}"


def is_attached(task: Task, network: Network) -> bool:
    """Return whether the task is on the network."""
    return any(one.network is not None and one.network.id == network.id for one in task.networks_attachments)
