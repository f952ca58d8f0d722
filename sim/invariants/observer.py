"""Checks every invariant at every commit."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable

from sim.invariants.acknowledgements import Acknowledgements
from sim.invariants.bookkeeping import CachesMatchStore
from sim.invariants.budget import minimum_stays_available
from sim.invariants.causes import UpdateEndsHaveCauses, replacements_are_recorded
from sim.invariants.failures import FailedServices
from sim.invariants.freezes import FreezesHold
from sim.invariants.liveness import NoFalseDown
from sim.invariants.nodes.affinity import AffinitiesHold
from sim.invariants.nodes.allocations import UniqueAllocations, networks_are_apart
from sim.invariants.nodes.containers import Containers
from sim.invariants.nodes.disconnection import DisconnectPolicies
from sim.invariants.nodes.disks import FullNodesGetNoNewTasks
from sim.invariants.nodes.placement import ReservesAreKept, devices_are_exclusive, global_jobs_run_once
from sim.invariants.nodes.preemption import PreemptionsAreJust
from sim.invariants.nodes.volumes import LocalVolumesStay
from sim.invariants.objects import FewWrites, used_secrets_stay
from sim.invariants.services.attempts import NoRedundantTasks
from sim.invariants.services.autoscaling import AutoscalingIsCalm
from sim.invariants.services.damping import DecisionsAreStable
from sim.invariants.services.dependencies import DependenciesComeFirst
from sim.invariants.services.removals import TimesToLive
from sim.invariants.services.restarts import RestartPolicies
from sim.invariants.services.revisions import RevisionsAreKept
from sim.invariants.services.schedules import DueTimesAreDecidedOnce, RetriesAreBounded, RunsKeepTheirNodes
from sim.invariants.services.serving import UpdateParallelism
from sim.invariants.services.tasks import (
    TasksAreSpread,
    UpdatesKeepServing,
    jobs_keep_within_bounds,
    names_are_unique,
    nodes_are_not_overcommitted,
    slots_are_filled_once,
    tasks_move_forward,
)
from sim.invariants.writers import (
    SingleWriters,
    one_leader_writes,
    session_owners_report,
    sessions_are_claimed,
)
from sim.trace import Trace
from sim.world.committed import Change, CommittedState
from sim.world.links import Isolation, Uptime
from skep.model.task import Task
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.store.interface import Created, Updated, View

Rule = Callable[[Change, View], Iterable[str]]


class Observer:
    """Collects the violations of a run."""

    def __init__(
        self,
        committed: CommittedState,
        trace: Trace,
        calm_since: Callable[[], float],
        uptime: Uptime,
        manager_uptime: Uptime,
        isolation: Isolation,
        unreadable: Callable[[], Collection[NodeId]],
    ) -> None:
        """Observe a cluster.

        Args:
            calm_since: returns the end of the last fault, or infinity while a fault is active.
            uptime: uptime of node processes.
            manager_uptime: uptime of manager processes.
            isolation: isolation of nodes from all managers.
            unreadable: returns the nodes whose values are damaged on some manager's disk.
        """
        self.containers = Containers(uptime.since, isolation.since, unreadable)
        self.restarts = RestartPolicies()
        self.due_times = DueTimesAreDecidedOnce()
        self.dependencies = DependenciesComeFirst(self._is_removal_asked)
        self.failures = FailedServices()
        self.times_to_live = TimesToLive(self._is_removal_asked)
        self.preemptions = PreemptionsAreJust()
        self.volumes = SingleWriters()
        self.caches = CachesMatchStore()
        self.acknowledgements = Acknowledgements()
        """Rules on acknowledged requests, added when there are simulated users."""
        self.traced: list[str] = []
        """The events before the first violation."""
        self._committed = committed
        self._calm_since = calm_since
        self._trace = trace
        self.violations: list[str] = []
        """Violations in chronological order."""
        self.created: Counter[ServiceId] = Counter()
        """Number of tasks created, by service."""
        self.preempted: Counter[ServiceId] = Counter()
        """Number of tasks preempted, by service."""
        self.started: Counter[ServiceId] = Counter()
        """Number of containers started, by service."""
        self.rules: list[Rule] = [
            tasks_move_forward,
            slots_are_filled_once,
            jobs_keep_within_bounds,
            names_are_unique,
            nodes_are_not_overcommitted,
            devices_are_exclusive,
            ReservesAreKept(),
            used_secrets_stay,
            FewWrites(),
            one_leader_writes,
            session_owners_report,
            sessions_are_claimed,
            TasksAreSpread(unreadable),
            UpdatesKeepServing(),
            UpdateParallelism(),
            UpdateEndsHaveCauses(),
            replacements_are_recorded,
            NoFalseDown(calm_since, uptime.since, manager_uptime.began),
            DecisionsAreStable(),
            NoRedundantTasks(),
            DisconnectPolicies(),
            global_jobs_run_once,
            AffinitiesHold(),
            self.containers,
            self.restarts,
            self.dependencies,
            UniqueAllocations(),
            networks_are_apart,
            minimum_stays_available,
            FreezesHold(),
            LocalVolumesStay(unreadable),
            FullNodesGetNoNewTasks(),
            AutoscalingIsCalm(),
            RevisionsAreKept(),
            self.due_times,
            RunsKeepTheirNodes(),
            RetriesAreBounded(),
            self.failures,
            self.times_to_live,
            self.preemptions,
        ]
        committed.watchers.append(self._check)

    def _is_removal_asked(self, id: ServiceId) -> bool:
        record = self.acknowledgements.services.get(id)
        return record is not None and record.is_removal_asked

    def note(self, time_s: float, violations: Iterable[str]) -> None:
        """Record violations."""
        try:
            found = [f"{time_s:.3f} s: {violation}" for violation in violations]
        except Exception as error:  # otherwise a bug in a rule would look like a bug in the simulation
            found = [f"{time_s:.3f} s: a rule raised {type(error).__name__}: {error}"]
        if found and not self.violations:
            self.traced = self._trace.lines()
        self.violations += found

    def check_durations(self) -> None:
        """Check the invariants on durations."""
        now = self._committed.now()
        self.note(now, self.containers.lasting(now, self._calm_since(), self._committed.view))
        self.note(now, self.containers.outlasting(now, self._committed.view))

    # -- events of containers: see node.ContainerWatcher --------------------------------------------------------------

    def container_started(self, node_id: NodeId, task: Task) -> None:
        now = self._committed.now()
        self._trace.add(f"{node_id} starts task {task.id[:6]}")
        self.started[task.service_id] += 1
        self.dependencies.started(task)
        self.note(now, self.volumes.started(node_id, task, self._committed.view))
        self.note(now, self.containers.started(node_id, task, now, self._committed.view))

    def container_stopped(self, node_id: NodeId, task_id: TaskId) -> None:
        self._trace.add(f"{node_id} stops task {task_id[:6]}")
        self.note(self._committed.now(), self.containers.stopped(node_id, task_id, self._committed.view))

    def container_ended(self, node_id: NodeId, task_id: TaskId) -> None:
        self.containers.ended(task_id)
        self.volumes.ended(task_id)
        self.dependencies.ended(task_id, self._committed.now())

    def _check(self, change: Change, view: View) -> None:
        self._trace.commit(change, view)
        for event in change.events:
            match event:
                case Created(Task() as task):
                    self.created[task.service_id] += 1
                case Updated(Task() as old, Task() as new) if (
                    old.preemption is None and new.preemption is not None
                ):
                    self.preempted[new.service_id] += 1
        for rule in self.rules:
            self.note(change.time_s, rule(change, view))
