"""A task's places on its networks.

Networks of the node itself (``host``, ``bridge``, ``none``) need nothing from the cluster: the task is attached and
that is all.  Overlay networks need subnets, addresses and VXLAN ids, which the cluster does not give out yet; a
task on such a network stays NEW and says so, rather than running without the network it asked for.
"""

from collections.abc import Callable, Iterable

import msgspec

from skep.model.ids import NetworkId
from skep.model.network import Network
from skep.model.service import NetworkAttachmentConfig, ServiceSpec
from skep.model.task import NetworkAttachment

NODE_DRIVERS = frozenset({"host", "bridge", "null", "none"})
"""Drivers of networks that live on one node."""


class Attached(msgspec.Struct, frozen=True):
    """Every network of the task is ready for it."""

    attachments: tuple[NetworkAttachment, ...] = ()


class NotAttached(msgspec.Struct, frozen=True):
    """The task has to wait; ``reason`` is what the user reads on it."""

    reason: str


def attachments_for(
    spec: ServiceSpec, network: Callable[[NetworkId], Network | None]
) -> Attached | NotAttached:
    """The attachments of a task made from ``spec``, or why there are none yet."""
    attachments = []
    for wanted in _wanted(spec):
        found = network(NetworkId(wanted.target))
        if found is None:
            return NotAttached(f"network {wanted.target} not found")
        if _driver(found) not in NODE_DRIVERS:
            return NotAttached(
                f"network {found.spec.name or found.id} is not allocated: no overlay networks yet"
            )
        attachments.append(NetworkAttachment(network=found, aliases=wanted.aliases))
    return Attached(tuple(attachments))


def _wanted(spec: ServiceSpec) -> Iterable[NetworkAttachmentConfig]:
    """The task template's networks; the service's own list is the older spelling of the same."""
    return spec.task_template.networks or spec.networks


def _driver(network: Network) -> str:
    driver = network.spec.driver_configuration
    return network.driver_state.name or (driver.name if driver else "") or "overlay"
