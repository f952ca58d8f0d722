"""Dry run of placement, which shows where the tasks of specs would run, and why some would not.

It uses the scheduler's own decision and writes nothing.  Specs are placed one after the other into one accounting, so
each leaves fewer resources for the next.  An existing service keeps the tasks that its new spec does not replace.  With
``stop-first``, the resources of the replaced tasks count as free.  With ``start-first``, or if a label has the same
effect (``starts_first``), as many old and new tasks as are updated at a time must fit together, unless they exclude
each other: then the old tasks are stopped first.  In a staged update, so must all old tasks and the new ones of its
largest step.

A task whose slot has data in a local volume returns to that node if it fits.  A dry run ignores everything that only
time shows: tasks that wait for other services or for the node of their data, and future changes of nodes.
"""

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import count, islice

from msgspec.structs import replace

from skep.aio.time_slices import STEP, collect_in_slices
from skep.manager.diagnosis.unmet_needs import fits_no_node, unknown_names, with_needs
from skep.manager.scheduler.explaining.explain import (
    NodeVerdict,
    ServiceNames,
    preempts,
    priorities_of,
    verdict,
    victims_by_service,
    with_shown_names,
)
from skep.manager.scheduler.nodes.accounting import Accounting
from skep.manager.scheduler.nodes.requirements import Requirements, planes_of, requirements_of
from skep.manager.scheduler.nodes.spread import CachedSpreads
from skep.manager.scheduler.placement import Assignment, Placed, PlacementRefused, confirm, placing_slots
from skep.manager.scheduler.preemption.preemption import (
    Nomination,
    Occupants,
    making_nominations,
    reserve_candidate,
)
from skep.manager.scheduler.returning import data_homes
from skep.manager.services.disruption_budget import starts_first
from skep.model.needs import host_ports
from skep.model.network import Network, NetworkSpec
from skep.model.node import Availability, Node, NodeState
from skep.model.node_reports.node_refusals import FREED, NodeRefusal, node_refusals_in
from skep.model.options.constraints import is_satisfied
from skep.model.options.labels import priority_of
from skep.model.options.slot_volumes import SlotVolumeIndex, local_volumes
from skep.model.service import (
    EndpointSpec,
    Placement,
    Service,
    ServiceSpec,
    TaskSpec,
    UpdateConfig,
)
from skep.model.staging.updates import stages_of, tasks_of_step
from skep.model.task import NetworkAttachment, Task
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId, VolumeId
from skep.model.values.meta import Driver, Version
from skep.model.volume import Volume
from skep.store.interface import View
from skep.store.kinds import spec_of

BATCH = 50
"""Tasks placed between two pauses."""
PREEMPTED_MAX = 100_000
"""Maximum tasks that one service may preempt over time."""
VERDICTS_MAX = 20
"""Maximum nodes for which reasons are returned."""


class PlannedShare(ApiObject):
    """Number of a service's tasks that a node would have."""

    node_id: NodeId
    hostname: str = always("")
    tasks: int = always(0)


class PreemptedTasks(ApiObject):
    """Number of a service's tasks that would be stopped for another service."""

    name: str = always("")
    tasks: int = always(0)


class PlannedPlacement(ApiObject):
    """Planned placement of one service.  Without ``refusal`` all its tasks fit."""

    name: str = always("")
    desired: int = always(0)
    nodes: tuple[PlannedShare, ...] = always(())
    """Nodes with all tasks that fit, including existing tasks that stay."""
    error: str = always("")
    old: int = 0
    """Tasks of the former spec that stay, because new tasks do not fit next to them."""
    verdicts: tuple[NodeVerdict, ...] = always(())
    """Reasons why nodes refuse another task, if a task is refused."""
    preempted: tuple[PreemptedTasks, ...] = ()
    """Services with a lower priority whose tasks would be stopped."""


class DryRun:
    """Places specs one after the other into ``accounting``, the cluster's resources and reservations."""

    def __init__(self, view: View, accounting: Accounting, named: ServiceNames) -> None:
        self._view = view
        self._named = named
        self._accounting = accounting
        self._choices = CachedSpreads(accounting)
        self._priorities = priorities_of(view)
        self._preempts = preempts(view)
        self._volumes: dict[VolumeId, Volume] = {}
        """Volumes that left nodes in this run."""
        self._occupants: Occupants | None = None
        """Occupants for the spec that is being placed, or None if it may preempt nothing."""
        self._replaced_on: list[NodeId] = []
        """Nodes of the spec's replaced tasks.  A new task may run there even if the disk is full (``staying``)."""
        self._next_to: Sequence[Task] = ()
        """Replaced tasks that keep running while the new ones start."""

    def placing(self, spec: ServiceSpec) -> Iterator[PlannedPlacement | None]:
        """Yield None at each pause, and finally the placement of the tasks of ``spec``.

        Raises:
            InvalidArgument: The spec is unreadable.
        """
        service = self._service(spec)
        priority = priority_of(spec.labels)
        self._priorities.set(service)
        is_higher = self._preempts and priority > self._priorities.lowest
        self._occupants = Occupants(lambda: self._view, self._priorities, priority) if is_higher else None
        homes: list[NodeId] = []
        yield from self._homes(spec, homes)
        kept: list[Task] = []
        replaced: list[Task] = []
        yield from self._present(service, len(homes), kept, replaced)
        nodes, freed = Counter(task.node_id for task in kept), 0
        is_global = service.spec.mode.name in ("global", "global-job")
        missing = [id for id in homes if not nodes[id]] if is_global else homes[len(kept) :]
        first = self._number_in_steps(spec, replaced, len(homes))
        number = self._number_at_once(service, replaced)
        requirements: Requirements | None = None
        refusal: PlacementRefused | None = None
        preempted: list[TaskId] = []
        if not is_global:
            missing = missing[(yield from self._returning(service, kept, len(missing), replaced, nodes)) :]
        for begin, end in _batches(len(missing), first, number):
            tasks = self._in_slots(self._tasks(service, begin, missing[begin:end]), begin)
            if requirements is None:
                requirements = self._requirements(tasks[0], spec)
            placed = yield from self._placed(tasks, requirements, is_last=end >= len(missing))
            nodes.update(one.node_id for one in placed.assignments)
            yield None
            if placed.refusals:
                found = yield from self._nominated([one.task for one in placed.refusals], requirements)
                nodes.update(one.candidate.node_id for one in found)
                preempted += [victim for one in found for victim in one.candidate.victims]
                if len(found) < len(placed.refusals):
                    refusal = placed.refusals[0]
                    break
            if end >= min(first, len(missing)):
                self._free(replaced[freed:end])
                freed = end
        verdicts: list[NodeVerdict] = []
        if refusal is not None and requirements is not None:
            yield from self._verdicts(requirements, verdicts)
        shares: list[PlannedShare] = []
        yield from collect_in_slices(self._shares(nodes), shares)
        yield PlannedPlacement(
            name=spec.name,
            desired=len(homes),
            nodes=tuple(shares),
            error=self._reason(refusal, spec) if refusal is not None else "",
            old=len(replaced[freed:]) if refusal is not None else 0,
            preempted=tuple(
                PreemptedTasks(name=name, tasks=count)
                for name, count in sorted(victims_by_service(preempted, self._view, self._named).items())
            ),
            verdicts=tuple(verdicts),
        )

    def _number_in_steps(self, spec: ServiceSpec, replaced: Sequence[Task], wanted: int) -> int:
        """Return how many new tasks start in the steps of a staged update, in which all old tasks stay."""
        steps = [stage for stage in stages_of(spec.labels) if stage.keeps_old]
        if not steps or all(self._has_same_tasks(task, spec) for task in replaced):
            return 0
        return max(tasks_of_step(stage, wanted) for stage in steps)

    def _number_at_once(self, service: Service, replaced: list[Task]) -> int:
        """Return how many new tasks start before old ones end.  With ``stop-first``, free the old tasks first."""
        if starts_first(replace(service, update_status=None)):  # a deploy begins another update
            config = service.spec.update_config or UpdateConfig(parallelism=1)
            return min(config.parallelism or BATCH, BATCH)
        self._free(replaced)
        replaced.clear()
        return BATCH

    def _reason(self, refusal: PlacementRefused, spec: ServiceSpec) -> str:
        """Return why no node takes a task, with the text that the service would show after the deploy."""
        status = replace(refusal.task.status, err=refusal.reason)
        task = replace(refusal.task, status=status)
        nodes = [account.node for account in self._accounting.accounts.values()]
        return fits_no_node(task, nodes, spec) or with_needs(task, spec, unknown_names(task, spec, nodes))

    def _service(self, spec: ServiceSpec) -> Service:
        """Return the service with its planned spec, whose affinities count from now on."""
        service = Service(id=ServiceId(f"planned {spec.name}"), spec=spec)
        for one in self._view.find(Service, name=spec.name):
            if one.removed_at is None:
                service = replace(one, spec=spec)
        self._accounting.affinities.set(service)
        return service

    def _present(
        self, service: Service, wanted: int, kept: list[Task], replaced: list[Task]
    ) -> Iterator[None]:
        """Collect the tasks that stay and the tasks that are replaced.  Surplus and stopping ones are freed at once."""
        self._replaced_on = []
        self._next_to = replaced
        for number, task in enumerate(self._view.find(Task, service_id=service.id)):
            if number % STEP == 0:
                yield
            if not task.is_active or not task.node_id:
                self._free((task,))  # it is stopping, or has no reservation
                continue
            if not self._stays(task, service.spec):
                replaced.append(task)
                self._replaced_on.append(task.node_id)
            elif len(kept) < wanted:
                kept.append(task)
            else:
                self._free((task,))

    def _stays(self, task: Task, spec: ServiceSpec) -> bool:
        """Return whether an update keeps the task where it is.  The orchestrator decides the same way
        (``is_dirty``).
        """
        node = self._view.lookup(Node, task.node_id)
        return (
            task.spec.force_update == spec.task_template.force_update
            and self._has_same_tasks(task, spec)
            and node is not None
            and is_satisfied((spec.task_template.placement or Placement()).constraints, node)
        )

    def _has_same_tasks(self, task: Task, spec: ServiceSpec) -> bool:
        """Return whether an update to ``spec`` moves or restarts the task at most (``has_same_tasks``)."""
        made_from = spec_of(self._view, task)
        ports = (made_from.endpoint_spec if made_from is not None else None) or EndpointSpec()
        same_spec = _comparable(task.spec) == _comparable(spec.task_template)
        return same_spec and ports == (spec.endpoint_spec or EndpointSpec())

    def _returning(
        self,
        service: Service,
        kept: Sequence[Task],
        wanted: int,
        replaced: list[Task],
        nodes: Counter[NodeId],
    ) -> Generator[None, None, int]:
        """Place the tasks whose slot has data in a local volume on that node, and count them in ``nodes``.

        Tasks that start next to the ``replaced`` ones of their slots end these.

        Returns: The number of these tasks.
        """
        returned = 0
        if not local_volumes(service.spec.task_template):
            return returned
        index = SlotVolumeIndex(self._view.find(Node))
        used = {task.slot for task in kept}
        slots = (slot for slot in count(1) if slot not in used)
        for number, slot in enumerate(islice(slots, wanted)):
            if number % STEP == 0:
                yield
            task = replace(self._tasks(service, number, [NodeId("")])[0], slot=slot)
            requirements = replace(self._requirements(task, service.spec), needs_disk=False)
            for home in data_homes(task, service, self._view, index):
                found = confirm(replace(task, node_id=home.node_id), requirements, self._accounting)
                if isinstance(found, Assignment):
                    nodes[found.node_id] += 1
                    returned += 1
                    old = [one for one in replaced if one.slot == slot]
                    self._free(old)
                    replaced[:] = [one for one in replaced if one not in old]
                    break
        return returned

    def _free(self, tasks: Iterable[Task]) -> None:
        for task in tasks:
            self._accounting.remove(task.id)
            for one in task.volumes:
                self._unpublish(VolumeId(one.id), task.node_id)

    def _unpublish(self, id: VolumeId, node_id: NodeId) -> None:
        """Unpublish a volume after its last task on a node, so that another node may have it.

        A node that is not ready keeps the volume.
        """
        volume = self._volumes.get(id) or self._view.lookup(Volume, id)
        account = self._accounting.accounts.get(node_id)
        is_ready = account is not None and account.node.status.state is NodeState.READY
        if volume is None or not is_ready or self._accounting.volumes.has_users(id, node_id):
            return
        left = tuple(one for one in volume.publish_status if one.node_id != node_id)
        self._volumes[id] = replace(volume, publish_status=left)
        self._accounting.update_volume(id, self._volumes[id])

    def _in_slots(self, tasks: list[Task], begin: int) -> list[Task]:
        """Return the tasks in the slots of the replaced tasks that they start next to, which then do not count."""
        slots = list(dict.fromkeys(task.slot for task in self._next_to))
        if tasks[0].node_id:
            return tasks
        return [
            replace(task, slot=slots[number]) if number < len(slots) else task
            for number, task in enumerate(tasks, begin)
        ]

    def _placed(
        self, tasks: Sequence[Task], requirements: Requirements, *, is_last: bool
    ) -> Generator[None, None, Placed]:
        placed = yield from self._attempted(tasks, requirements, is_last=is_last)
        if placed.refusals and self._excludes_itself(placed.refusals[0], requirements):
            self._free(self._next_to)
            self._next_to = ()
            left = [replace(one.task, slot=0) for one in placed.refusals]
            again = yield from self._attempted(left, requirements, is_last=is_last)
            placed = replace(again, assignments=(*placed.assignments, *again.assignments))
        return self._in_place(placed, requirements)

    def _excludes_itself(self, refusal: PlacementRefused, requirements: Requirements) -> bool:
        """Return whether a new task cannot run next to an old one, so that the update stops the old task first.  The
        orchestrator decides the same way (``held_places.excludes``).
        """
        refused = node_refusals_in(refusal.reason)
        if not self._next_to or not refused & FREED:
            return False
        held = {port for task in self._next_to for port in host_ports(spec_of(self._view, task))}
        is_full = requirements.max_replicas == 1 or NodeRefusal.MAX_REPLICAS in refused
        return is_full or not held.isdisjoint(requirements.host_ports)

    def _attempted(
        self, tasks: Sequence[Task], requirements: Requirements, *, is_last: bool
    ) -> Generator[None, None, Placed]:
        if not tasks[0].node_id:
            return (
                yield from placing_slots(
                    tasks,
                    requirements,
                    self._choices,
                    self._view,
                    now=0.0,
                    limit=len(tasks),
                    is_last=is_last,
                    explains=True,
                )
            )
        made = [confirm(task, requirements, self._accounting) for task in tasks]
        return Placed(
            assignments=tuple(one for one in made if isinstance(one, Assignment)),
            refusals=tuple(one for one in made if isinstance(one, PlacementRefused)),
        )

    def _in_place(self, placed: Placed, requirements: Requirements) -> Placed:
        """Let refused tasks replace tasks of the service on nodes that only a full disk excludes."""
        spared = replace(requirements, needs_disk=False)
        kept: list[Assignment] = []
        refused: list[PlacementRefused] = []
        for refusal in placed.refusals:
            task = refusal.task
            home = next((id for id in self._replaced_on if task.node_id in ("", id)), None)
            found = confirm(replace(task, node_id=home), spared, self._accounting) if home else refusal
            if isinstance(found, Assignment):
                self._replaced_on.remove(found.node_id)
                kept.append(found)
            else:
                refused.append(refusal)
        return replace(placed, assignments=(*placed.assignments, *kept), refusals=tuple(refused))

    def _nominated(
        self, tasks: Sequence[Task], requirements: Requirements
    ) -> Generator[None, None, list[Nomination]]:
        """Choose nodes for refused tasks by preemption.  The victims are removed at once."""
        if self._occupants is None:
            return []
        made: list[Nomination] = []
        for some in [tasks] if not tasks[0].node_id else [[task] for task in tasks]:
            made += yield from making_nominations(
                some,
                requirements,
                [some[0].node_id] if some[0].node_id else list(self._accounting.accounts),
                self._accounting,
                self._occupants,
                claim=lambda one: self._take_over(one, requirements),
                victims_max=PREEMPTED_MAX,
            )
        return made

    def _take_over(self, nomination: Nomination, requirements: Requirements) -> None:
        for victim in nomination.candidate.victims:
            self._accounting.remove(victim)
        reserve_candidate(self._accounting, nomination.task.id, nomination.candidate, requirements)

    def _homes(self, spec: ServiceSpec, homes: list[NodeId]) -> Iterator[None]:
        """Add one entry for each wanted task: its node for a global service, otherwise an empty id."""
        mode = spec.mode
        if mode.global_ is None and mode.global_job is None:
            job = mode.replicated_job
            wanted = (
                spec.replicas if job is None else min(job.max_concurrent or 0, job.total_completions or 0)
            )
            homes += [NodeId("")] * wanted
            return
        constraints = (spec.task_template.placement or Placement()).constraints
        for number, node in enumerate(self._view.find(Node)):
            if number % STEP == 0:
                yield
            if (
                node.status.state is not NodeState.DOWN
                and node.spec.availability is Availability.ACTIVE
                and is_satisfied(constraints, node)
            ):
                homes.append(node.id)

    def _tasks(self, service: Service, begin: int, homes: Sequence[NodeId]) -> list[Task]:
        """Return the tasks that would be created."""
        attachments = tuple(self._attachments(service.spec))
        return [
            Task(
                id=TaskId(f"{service.id}/{number}"),
                spec=service.spec.task_template,
                service_id=service.id,
                node_id=node_id,
                spec_version=Version(),
                networks_attachments=attachments,
            )
            for number, node_id in enumerate(homes, begin)
        ]

    def _attachments(self, spec: ServiceSpec) -> Iterator[NetworkAttachment]:
        """Yield the network attachments.  Networks that do not exist yet will be overlay networks."""
        for one in spec.task_template.networks:
            found = self._view.lookup(Network, one.target)
            overlay = Driver(name="overlay")
            wanted = NetworkSpec(name=one.target, driver_configuration=overlay)
            yield NetworkAttachment(
                network=found or Network(id=NetworkId(one.target), spec=wanted, driver_state=overlay)
            )

    def _requirements(self, task: Task, spec: ServiceSpec) -> Requirements:
        planes = planes_of(task, lambda network_id: self._view.lookup(Network, network_id))
        return requirements_of(task, spec, planes, self._accounting.affinities.of(task.service_id))

    def _shares(self, nodes: Counter[NodeId]) -> Iterator[PlannedShare]:
        for id, tasks in nodes.items():
            node = self._view.lookup(Node, id)
            hostname = node.description.hostname if node is not None else ""
            yield PlannedShare(node_id=id, hostname=hostname or id, tasks=tasks)

    def _verdicts(self, requirements: Requirements, found: list[NodeVerdict]) -> Iterator[None]:
        copies = self._accounting.copies(requirements.service_id)
        requirements = with_shown_names(requirements, self._view, self._named)
        for number, account in enumerate(list(self._accounting.accounts.values())):
            if number % STEP == 0:
                yield
            one = verdict(requirements, account, copies[account.node.id])
            if one.reasons:
                found.append(one)
            if len(found) == VERDICTS_MAX:
                return


def _batches(total: int, first: int, number: int) -> Iterator[tuple[int, int]]:
    """Yield the first and the end of each batch of new tasks: the ``first`` ones, then ``number`` at a time."""
    begin = 0
    while begin < total:
        end = min(begin + BATCH, first) if begin < first else begin + number
        yield begin, min(end, total)
        begin = end


def _comparable(template: TaskSpec) -> TaskSpec:
    """Return the template without its placement and restarts by force, and without ids, which a plan does not know yet.

    Secrets and configs are compared by their names.
    """
    container = template.container_spec
    if container is not None:
        container = replace(
            container,
            secrets=tuple(replace(one, secret_id="") for one in container.secrets),
            configs=tuple(replace(one, config_id="") for one in container.configs),
        )
    return replace(template, placement=None, force_update=0, container_spec=container)
