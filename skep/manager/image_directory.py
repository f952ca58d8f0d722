"""Where a node may fetch an image from: the managers, and the nodes with tasks of it.

Nothing is announced or kept for it: which nodes have an image, or will have it soon, follows from their tasks, and an
image that was built or loaded for the cluster is on a manager.  A node that turns out not to have it says so.
"""

from collections.abc import Callable, Collection, Sequence
from random import Random

from skep.errors import InvalidArgument, PermissionDenied, Unavailable
from skep.manager.ca.caller_check import check_caller, is_manager
from skep.model.addresses import host_of, joined
from skep.model.ids import ClusterId, NodeId
from skep.model.needs import images_of
from skep.model.node import Node, NodeRole, NodeState
from skep.model.planes import IMAGES_LABEL, usable_address
from skep.model.service import Service, ServiceSpec
from skep.model.task import Task, TaskState
from skep.security.identity import Identity
from skep.store.interface import View
from skep.store.kinds import specs_in_use
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.methods import Access
from skep.wire.service import Handler, unary

SOURCES_MAX = 16
"""In one response; the managers, up to half of them, come first."""
SPELLINGS_MAX = 8
CHARACTERS_MAX = 512
"""Of one spelling."""


class ImageDirectory:
    """Serves ``ImageDirectory`` on every manager."""

    def __init__(self, view: Callable[[], View], cluster_id: ClusterId, random: Random) -> None:
        self._view = view
        self._cluster_id = cluster_id
        self._random = random

    def services(self) -> Sequence[Handler]:
        """The handlers for ``wire.server.serve``."""
        return (
            unary(methods.FIND_IMAGE, self._find),
            unary(methods.CHECK_NODE, self._check),
            unary(methods.NEEDED_IMAGES, self._needed),
        )

    async def _find(self, request: skep.FindImageRequest, caller: Caller) -> skep.FindImageResponse:
        if len(request.images) > SPELLINGS_MAX or any(len(one) > CHARACTERS_MAX for one in request.images):
            raise InvalidArgument("too many or too long names of an image")
        nodes = sources(self._view(), frozenset(request.images), caller.node_id, self._random)
        return skep.FindImageResponse(
            sources=[
                skep.ImageSource(node_id=node.id, addr=image_address(node), manager=is_manager(node))
                for node in nodes
            ]
        )

    async def _check(self, request: skep.CheckNodeRequest, _caller: Caller) -> skep.CheckNodeResponse:
        identity = Identity(
            node_id=NodeId(request.node_id),
            cluster_id=self._cluster_id,
            role=NodeRole.WORKER,
            serial=request.serial,
        )
        if not check_caller(self._view(), identity, Access.NODE):
            raise PermissionDenied(f"Permission denied: node {identity.node_id} is not part of the swarm")
        return skep.CheckNodeResponse()

    async def _needed(self, _request: skep.NeededImagesRequest, _caller: Caller) -> skep.NeededImagesResponse:
        return skep.NeededImagesResponse(images=sorted(needed_images(self._view())))


def needed_images(view: View) -> frozenset[str]:
    """The images of the specs from which tasks of services are made, or may be, as they name them.

    Raises: Unavailable: a service cannot be read, so that its images are not known.
    """
    if view.unreadable(Service):
        raise Unavailable("not all services can be read")
    specs = (spec for service in view.find(Service) for spec in specs_in_use(view, service))
    return frozenset(image for spec in specs for image in images_of(spec))


def image_address(node: Node) -> str:
    """``ip:port`` where the node serves its images; empty: it does not, or has no usable address."""
    port = node.description.engine.labels.get(IMAGES_LABEL, "")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 1 << 16):
        return ""
    advertised = host_of(node.manager_status.addr) if node.manager_status is not None else ""
    host = usable_address(advertised) or usable_address(node.status.addr, may_be_loopback=True)
    return joined(host, port) if host else ""


def sources(view: View, spellings: Collection[str], asking: NodeId, random: Random) -> Sequence[Node]:
    """The nodes, ``asking`` left out, that may have an image; when there are many, some of them at random."""
    managers = [node for node in view.find(Node) if is_manager(node)]
    with_tasks = {
        task.node_id
        for service in view.find(Service)
        if any(_is_of(spec, spellings) for spec in specs_in_use(view, service))
        for task in view.find(Task, service_id=service.id)
        if task.node_id and task.desired_state <= TaskState.RUNNING
    }
    with_tasks -= {node.id for node in managers}
    others = [node for id in sorted(with_tasks) if (node := view.lookup(Node, id)) is not None]
    chosen = _some(_usable(managers, asking), SOURCES_MAX // 2, random)
    return (*chosen, *_some(_usable(others, asking), SOURCES_MAX - len(chosen), random))


def _is_of(spec: ServiceSpec, spellings: Collection[str]) -> bool:
    images = images_of(spec)
    return any(image in spellings or image.rpartition("@")[2] in spellings for image in images)


def _usable(nodes: Sequence[Node], asking: NodeId) -> Sequence[Node]:
    return [
        node
        for node in nodes
        if node.id != asking and node.status.state is NodeState.READY and image_address(node)
    ]


def _some(nodes: Sequence[Node], count: int, random: Random) -> Sequence[Node]:
    return nodes if len(nodes) <= count else random.sample(nodes, count)
