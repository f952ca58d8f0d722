"""Decides when a task starts to drain, because it must stop and may still have connections."""

from skep.model.networks.data_planes import is_overlay
from skep.model.task import Task, TaskState


def begins_to_drain(old: Task, new: Task) -> bool:
    """Return whether ``new`` must stop, ``old`` did not, and it serves on a cluster network."""
    if not old.is_wanted or new.is_wanted or new.status.state is not TaskState.RUNNING:
        return False
    networks = (one.network for one in new.networks_attachments if one.addresses)
    return any(network is not None and is_overlay(network) for network in networks)
