"""Tasks that wait for what the allocator gives, and what they ask for."""

from skep.manager.allocator.attachments import Networks, wanted_networks
from skep.manager.allocator.subnets import is_allocated
from skep.model.ids import NetworkId
from skep.model.network import Network
from skep.model.planes import is_overlay
from skep.model.service import ServiceSpec
from skep.model.task import Task, TaskState
from skep.store.interface import View
from skep.store.kinds import spec_of


def is_new(task: Task) -> bool:
    return task.status.state is TaskState.NEW and task.is_wanted


def overlays_of(view: View, task: Task, networks: Networks) -> list[Network]:
    """Networks on which a new task will get an address."""
    wanted = wanted_networks(spec_or_template(view, task), networks.ingress)
    found = (networks.find(NetworkId(one.target)) for one in wanted)
    return [network for network in found if network and is_overlay(network) and is_allocated(network)]


def spec_or_template(view: View, task: Task) -> ServiceSpec:
    """The spec that the task was made from; the task's own template when that is no longer kept."""
    return spec_of(view, task) or ServiceSpec(task_template=task.spec)
