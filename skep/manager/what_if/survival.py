"""Finds out which single loss takes which service down: a node, a zone, a manager, a registry or a local volume.

Each loss of nodes is a rehearsal of its own.  Only nodes with tasks of the services, and managers, can matter.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

from skep.errors import ResourceExhausted
from skep.manager.what_if.answer import Question, SupposedOutcome
from skep.manager.what_if.rehearsal import Rehearsal
from skep.manager.what_if.suppositions import label_of, lose, quorum_after
from skep.model.needs import images_of
from skep.model.node import Node, NodeState
from skep.model.options.labels import ZONE
from skep.model.options.slot_volumes import local_volumes
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NodeId, ServiceId
from skep.model.values.images import registry_of
from skep.store.interface import View

ZONE_LABELS = ("zone", ZONE)
"""Node labels whose values are zones.  The first that a node has counts."""
LOSSES_MAX = 300
"""Largest number of rehearsals for one answer.  Each takes half a second in a cluster of 100,000 tasks."""


class LossEffect(ApiObject):
    """What one loss does to services, by their names."""

    kind: str
    """node, zone, manager, registry or volume."""
    name: str = always("")
    down: tuple[str, ...] = always(())
    """Services without any available task afterwards."""
    reduced: tuple[str, ...] = always(())
    """Services with fewer available tasks afterwards."""
    interrupted: tuple[str, ...] = always(())
    """Services without any available task for a while."""
    without_data: tuple[str, ...] = always(())
    """Services whose tasks lose the data of a local volume."""
    not_startable: tuple[str, ...] = always(())
    """Services whose image only one node has, so that no other node could start their tasks."""
    seconds: float = always(0.0)
    """Estimated seconds until all services that recover have done so."""
    note: str = ""


class Survival(ApiObject):
    """Response of ``/skep/what-if/survive``."""

    services: tuple[str, ...] = always(())
    losses: tuple[LossEffect, ...] = always(())


class SurvivalQuestion:
    """Tries each loss on a copy of ``view``, a state that does not change meanwhile."""

    def __init__(self, view: View, now_ns: int, services: Collection[ServiceId]) -> None:
        self._view = view
        self._now_ns = now_ns
        self._services = services
        self._tasks = [
            task
            for id in sorted(services)
            for task in view.find(Task, service_id=id)
            if task.is_active and task.node_id
        ]
        self.answer = Survival()

    def steps(self) -> Iterator[None]:
        """Try all losses, and compose ``answer``.  Raises: ResourceExhausted: there are too many."""
        losses = self._losses_of_nodes()
        if len(losses) > LOSSES_MAX:
            raise ResourceExhausted(
                f"{len(losses)} nodes and zones would have to be tried, and at most {LOSSES_MAX} can be: "
                "choose a smaller stack"
            )
        found: list[LossEffect] = []
        for kind, name, nodes in losses:
            yield from self._try(kind, name, nodes, found)
        found += [*self._registries(), *self._volumes()]
        names = (self._name(id) for id in self._services)
        self.answer = Survival(services=tuple(sorted(names)), losses=tuple(found))

    def _losses_of_nodes(self) -> list[tuple[str, str, tuple[NodeId, ...]]]:
        used = {task.node_id for task in self._tasks}
        zones: dict[str, list[NodeId]] = defaultdict(list)
        losses: list[tuple[str, str, tuple[NodeId, ...]]] = []
        for node in self._view.find(Node):
            if node.status.state is NodeState.DOWN:
                continue
            labels = (label_of(node, name) for name in ZONE_LABELS)
            if zone := next(filter(None, labels), ""):
                zones[zone].append(node.id)
            is_manager = node.manager_status is not None
            if is_manager or node.id in used:
                name = node.shown_name
                losses.append(("manager" if is_manager else "node", name, (node.id,)))
        for zone, nodes in sorted(zones.items()):
            if used.intersection(nodes):
                losses.append(("zone", zone, tuple(nodes)))
        return sorted(losses)

    def _try(self, kind: str, name: str, nodes: Sequence[NodeId], found: list[LossEffect]) -> Iterator[None]:
        question = Question(Rehearsal(self._view, self._now_ns), lambda service: service.id in self._services)
        yield
        yield from question.begin()
        left, needed = quorum_after(self._view, nodes)
        lose(question.rehearsal, nodes)
        yield from question.settle(has_leader=left >= needed)
        note = "no quorum is left, so nothing is replaced" if left < needed else ""
        found.append(loss_of(kind, name, question.answer, note))

    def _registries(self) -> Iterator[LossEffect]:
        """Yield for each registry the services whose image is on one node only."""
        holders: dict[str, set[NodeId]] = defaultdict(set)
        for task in self._view.find(Task):
            if task.node_id and TaskState.READY <= task.status.state <= TaskState.RUNNING:
                for image in images_of(task.spec):
                    holders[image].add(task.node_id)
        lost: dict[str, set[str]] = defaultdict(set)
        for task in self._tasks:
            for image in images_of(task.spec):
                if len(holders[image]) <= 1:
                    lost[registry_of(image) or "docker.io"].add(self._name(task.service_id))
        for registry, names in sorted(lost.items()):
            yield LossEffect(kind="registry", name=registry, not_startable=tuple(sorted(names)))

    def _volumes(self) -> Iterator[LossEffect]:
        """Yield for each local volume on a node the services that keep data there."""
        lost: dict[tuple[str, NodeId], set[str]] = defaultdict(set)
        for task in self._tasks:
            for name in local_volumes(task.spec):
                lost[name, task.node_id].add(self._name(task.service_id))
        for (volume, node_id), names in sorted(lost.items()):
            node = self._view.lookup(Node, node_id)
            where = node.description.hostname if node is not None else node_id
            yield LossEffect(kind="volume", name=f"{volume} on {where}", without_data=tuple(sorted(names)))

    def _name(self, id: ServiceId) -> str:
        service = self._view.lookup(Service, id)
        return service.spec.name if service is not None else id


def loss_of(kind: str, name: str, answer: SupposedOutcome, note: str = "") -> LossEffect:
    """Return the effect of one loss of nodes.  Services without a task before it are left out."""
    running = [one for one in answer.services if one.before]
    return LossEffect(
        kind=kind,
        name=name,
        down=tuple(one.name for one in running if not one.after),
        reduced=tuple(one.name for one in running if 0 < one.after < min(one.before, one.desired)),
        interrupted=tuple(one.name for one in running if one.after and one.lowest <= 0),
        seconds=max((one.seconds for one in running), default=0.0),
        note=note,
    )
