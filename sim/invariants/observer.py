"""Checks every invariant at every commit."""

from collections import Counter
from collections.abc import Callable, Iterable

from sim.committed import Change, CommittedState
from sim.invariants.acknowledgements import Acknowledgements
from sim.invariants.allocations import HeldByOne, networks_are_apart
from sim.invariants.attempts import OneAttempt
from sim.invariants.bookkeeping import BooksAreKept
from sim.invariants.causes import StopsHaveACause
from sim.invariants.containers import Containers
from sim.invariants.damping import DecisionsStand
from sim.invariants.disconnection import PlacesAreKept
from sim.invariants.liveness import NoFalseAlarm
from sim.invariants.placement import global_jobs_run_once
from sim.invariants.restarts import RestartsAsAsked
from sim.invariants.serving import UpdatesTakeTurns
from sim.invariants.tasks import (
    TasksAreSpread,
    UpdatesKeepServing,
    jobs_keep_within_bounds,
    names_are_unique,
    nodes_are_not_overcommitted,
    slots_are_filled_once,
    tasks_move_forward,
)
from sim.invariants.writers import one_leader_writes, owners_speak_for_their_nodes, sessions_are_taken
from sim.links import Isolation, Uptime
from sim.trace import Trace
from skep.model.ids import NodeId, ServiceId, TaskId
from skep.model.task import Task
from skep.store.interface import Created, View

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
    ) -> None:
        """
        Args:
            calm_since: when the last fault was over; infinity while there is one.
            uptime: of node processes.
            manager_uptime: of manager processes.
            isolation: of nodes from all managers.
        """
        self.containers = Containers(uptime.since, isolation.since)
        self.restarts = RestartsAsAsked()
        self.books = BooksAreKept()
        self.acknowledgements = Acknowledgements()
        """A rule as soon as there are users who keep it."""
        self.traced: list[str] = []
        """The events before the first violation."""
        self._truth = committed
        self._calm_since = calm_since
        self._trace = trace
        self.violations: list[str] = []
        """In order of time."""
        self.created: Counter[ServiceId] = Counter()
        """How many tasks each service has been given."""
        self.started: Counter[ServiceId] = Counter()
        """How many containers of each service were started."""
        self.rules: list[Rule] = [
            tasks_move_forward,
            slots_are_filled_once,
            jobs_keep_within_bounds,
            names_are_unique,
            nodes_are_not_overcommitted,
            one_leader_writes,
            owners_speak_for_their_nodes,
            sessions_are_taken,
            TasksAreSpread(),
            UpdatesKeepServing(),
            UpdatesTakeTurns(),
            StopsHaveACause(),
            NoFalseAlarm(calm_since, manager_uptime.began),
            DecisionsStand(),
            OneAttempt(),
            PlacesAreKept(),
            global_jobs_run_once,
            self.containers,
            self.restarts,
            HeldByOne(),
            networks_are_apart,
        ]
        committed.watchers.append(self._check)

    def note(self, time_s: float, violations: Iterable[str]) -> None:
        """Record violations."""
        try:
            found = [f"{time_s:.3f} s: {violation}" for violation in violations]
        except (
            Exception
        ) as error:  # or it would be taken for a bug of the task, the store, that it was asked in
            found = [f"{time_s:.3f} s: a rule raised {type(error).__name__}: {error}"]
        if found and not self.violations:
            self.traced = self._trace.lines()
        self.violations += found

    def look(self) -> None:
        """Check the invariants on durations."""
        now = self._truth.now()
        self.note(now, self.containers.lasting(now, self._calm_since(), self._truth.view))
        self.note(now, self.containers.outlasting(now, self._truth.view))

    # -- what machines tell: see node.ContainerWatcher ----------------------------------------------------------------

    def container_started(self, node_id: NodeId, task: Task) -> None:
        now = self._truth.now()
        self._trace.add(f"{node_id} starts task {task.id[:6]}")
        self.started[task.service_id] += 1
        self.note(now, self.containers.started(node_id, task, now, self._truth.view))

    def container_stopped(self, node_id: NodeId, task_id: TaskId) -> None:
        self._trace.add(f"{node_id} stops task {task_id[:6]}")
        self.note(self._truth.now(), self.containers.stopped(node_id, task_id, self._truth.view))

    def container_ended(self, node_id: NodeId, task_id: TaskId) -> None:
        self.containers.ended(task_id)

    def _check(self, change: Change, view: View) -> None:
        self._trace.commit(change, view)
        for event in change.events:
            match event:
                case Created(Task() as task):
                    self.created[task.service_id] += 1
        for rule in self.rules:
            self.note(change.time_s, rule(change, view))
