"""Finds nodes that serve an image, and checks that a node reads only images of its own tasks.

Nodes do not announce their images.  The assigned tasks show which nodes have an image or will have it soon.  Images
that were built or loaded for the cluster are on managers.  A node that does not have an image after all responds
accordingly.

A node reads an image of another node only if it has a task of it, or had one within an hour.  Images may contain code
and keys, or were pulled with other users' credentials, so a compromised worker must not read all of them.
"""

from collections.abc import Collection, Sequence
from random import Random

import msgspec

from skep.aio.clock import Clock
from skep.errors import InvalidArgument, PermissionDenied, Unavailable
from skep.manager.ca.caller_check import check_caller, is_manager
from skep.model.needs import images_of
from skep.model.networks.addresses import host_of, joined
from skep.model.networks.data_planes import IMAGES_LABEL, is_reached_by_tunnels, underlay_of, usable_address
from skep.model.node import Node, NodeRole, NodeState
from skep.model.options.labels import shares_images
from skep.model.service import Service, ServiceSpec
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState
from skep.model.values.ids import ClusterId, NodeId
from skep.security.identity import NodeIdentity
from skep.store.interface import Store, View
from skep.store.kinds import specs_in_use
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.methods import MethodAccess
from skep.wire.service import Handler, unary

SOURCES_MAX = 16
"""Largest number of nodes in one response.  Managers come first and fill at most half of it."""
SPELLINGS_MAX = 8
"""Largest number of names of one image in a request for its nodes."""
NAMES_MAX = 1000
"""Largest number of image names in one request of a node about its own images."""
CHARACTERS_MAX = 512
"""Longest image name, in characters."""
ANSWERED_S = 0.25
"""Seconds for which the nodes with an image are cached.

If a service starts on all nodes, each of them requests the same image, and each response requires reading all tasks of
the image.
"""
ANSWERS_MAX = 1024
"""Largest number of images whose nodes are cached."""
GRANTED_S = 3600.0
"""Seconds for which a node may still read an image after its last task with that image has ended, because a fetch may
take longer than the task.
"""
GRANTS_MAX = 65_536
"""Largest number of pairs of node and image that are remembered for that."""


class ImageHolders(msgspec.Struct, frozen=True):
    """Nodes that may have an image and serve it: managers, and others with a task of it."""

    managers: Sequence[Node] = ()
    others: Sequence[Node] = ()


class ImageDirectory:
    """Serves ``ImageDirectory`` on every manager."""

    def __init__(
        self,
        store: Store,
        cluster_id: ClusterId,
        clock: Clock,
        random: Random,
        answered_s: float = ANSWERED_S,
    ) -> None:
        """``answered_s``: seconds for which the nodes with an image are cached."""
        self._store = store
        self._cluster_id = cluster_id
        self._clock = clock
        self._random = random
        self._answered_s = answered_s
        self._answers: dict[frozenset[str], tuple[float, ImageHolders]] = {}
        """Lookup time and nodes by image names, the oldest first."""
        self._granted: dict[tuple[NodeId, str], float] = {}
        """Time at which a task was last seen, by its node and image name, the oldest first."""

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (
            unary(methods.FIND_IMAGE, self.find),
            unary(methods.CHECK_NODE, self.check),
            unary(methods.NEEDED_IMAGES, self._list_needed),
        )

    async def find(self, request: skep.FindImageRequest, caller: Caller) -> skep.FindImageResponse:
        spellings = _names(request.images, SPELLINGS_MAX)
        if not await self._may_read(caller.node_id, spellings):
            return skep.FindImageResponse()
        nodes = chosen(self._candidates(spellings), caller.node_id, self._random)
        return skep.FindImageResponse(
            sources=[
                skep.ImageSource(node_id=node.id, addr=image_address(node), manager=is_manager(node))
                for node in nodes
            ]
        )

    async def check(self, request: skep.CheckNodeRequest, _caller: Caller) -> skep.CheckNodeResponse:
        identity = NodeIdentity(
            node_id=NodeId(request.node_id),
            cluster_id=self._cluster_id,
            role=NodeRole.WORKER,
            serial=request.serial,
        )
        if not check_caller(self._store.view(), identity, MethodAccess.NODE):
            await self._store.barrier()  # another manager may have admitted the node a moment ago
            if not check_caller(self._store.view(), identity, MethodAccess.NODE):
                raise PermissionDenied(f"Permission denied: node {identity.node_id} is not part of the swarm")
        names = _names(request.images, NAMES_MAX)
        if names and not await self._may_read(identity.node_id, names):
            raise PermissionDenied(f"Permission denied: node {identity.node_id} has no task of this image")
        return skep.CheckNodeResponse()

    async def _list_needed(
        self, request: skep.NeededImagesRequest, caller: Caller
    ) -> skep.NeededImagesResponse:
        view = self._store.view()
        if request.images:
            names, known = _names(request.images, NAMES_MAX), needed_images(view)
            found = {name for image in known for name in _forms(image)} & names
        else:
            tasks = view.find(Task, node_id=caller.node_id)
            found = {image for task in tasks for image in images_of(task.spec)}
        return skep.NeededImagesResponse(images=sorted(found))

    async def _may_read(self, node: NodeId, names: Collection[str]) -> bool:
        if self._is_granted(node, names):
            return True
        await self._store.barrier()  # a manager with a newer replica may have sent the task
        return self._is_granted(node, names)

    def _is_granted(self, node: NodeId, names: Collection[str]) -> bool:
        """Return whether the node may read an image with one of ``names``."""
        now, view = self._clock.monotonic(), self._store.view()
        images = {image for task in view.find(Task, node_id=node) for image in images_of(task.spec)}
        # Only the requested ones: a node with many tasks asks for each of its images, layer by layer.
        for name in {form for image in images for form in _forms(image)}.intersection(names):
            self._granted.pop((node, name), None)
            self._granted[node, name] = now
        while len(self._granted) > GRANTS_MAX:
            del self._granted[next(iter(self._granted))]
        return reads_all_images(view, node) or any(
            now - self._granted.get((node, name), -GRANTED_S) < GRANTED_S for name in names
        )

    def _candidates(self, spellings: frozenset[str]) -> ImageHolders:
        now = self._clock.monotonic()
        at, found = self._answers.get(spellings, (float("-inf"), ImageHolders()))
        if now - at >= self._answered_s:
            found = candidates(self._store.view(), spellings)
            self._answers.pop(spellings, None)
            self._answers[spellings] = now, found
            while len(self._answers) > ANSWERS_MAX:
                del self._answers[next(iter(self._answers))]
        return found


def reads_all_images(view: View, id: NodeId) -> bool:
    """Return whether a node may read every image: a manager may, and any node if the cluster shares images."""
    node = view.lookup(Node, id)
    if node is not None and is_manager(node):
        return True
    return any(shares_images(swarm.spec.labels) for swarm in view.find(Swarm))


def _names(images: Collection[str], most: int) -> frozenset[str]:
    """Check the number and length of image names.  Raises: InvalidArgument."""
    if len(images) > most or any(len(one) > CHARACTERS_MAX for one in images):
        raise InvalidArgument("the request has too many image names, or one is too long")
    return frozenset(images)


def _forms(image: str) -> tuple[str, ...]:
    """Return the name in a spec, and also its digest if it has one.  The digest matches every name with it."""
    _, at, digest = image.rpartition("@")
    return (image, digest) if at else (image,)


def needed_images(view: View) -> frozenset[str]:
    """Return the images of all specs from which tasks of services are or may be created.

    Raises:
        Unavailable: A service cannot be read, so its images are unknown.
    """
    if view.unreadable(Service):
        raise Unavailable("a service cannot be read, so its images are unknown")
    specs = (spec for service in view.find(Service) for spec in specs_in_use(view, service))
    return frozenset(image for spec in specs for image in images_of(spec.task_template))


def image_address(node: Node) -> str:
    """Return ``ip:port`` where the node serves its images, or an empty text if it does not or has no usable address."""
    port = node.description.engine.labels.get(IMAGES_LABEL, "")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 1 << 16):
        return ""
    advertised = host_of(node.manager_status.addr) if node.manager_status is not None else ""
    host = usable_address(advertised) or usable_address(node.status.addr, may_be_loopback=True)
    if is_reached_by_tunnels(node):
        host = underlay_of(node)
    return joined(host, port) if host else ""


def candidates(view: View, spellings: Collection[str]) -> ImageHolders:
    """Return the nodes that may have an image.  Reads all services, all nodes and the image's tasks."""
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
    return ImageHolders(_usable(managers), _usable(others))


def chosen(found: ImageHolders, asking: NodeId, random: Random) -> Sequence[Node]:
    """Return the nodes to which ``asking`` is referred, managers first.  If there are many nodes, they are a random
    sample.
    """
    managers = _some(found.managers, SOURCES_MAX // 2, asking, random)
    return (*managers, *_some(found.others, SOURCES_MAX - len(managers), asking, random))


def _is_of(spec: ServiceSpec, spellings: Collection[str]) -> bool:
    return any(form in spellings for image in images_of(spec.task_template) for form in _forms(image))


def _usable(nodes: Sequence[Node]) -> Sequence[Node]:
    return [node for node in nodes if node.status.state is NodeState.READY and image_address(node)]


def _some(nodes: Sequence[Node], count: int, asking: NodeId, random: Random) -> Sequence[Node]:
    drawn = nodes if len(nodes) <= count else random.sample(nodes, count + 1)
    return [node for node in drawn if node.id != asking][:count]
