"""Deadlines of an update's new tasks.  They are short for tasks that no node of the cluster can take."""

from skep.manager.orchestrator.decision_inputs import Situation
from skep.manager.orchestrator.replacement.held_places import spec_of
from skep.manager.orchestrator.unplaceable import UNPLACEABLE_S, fails_early
from skep.model.needs import needs_of
from skep.model.options.labels import progress_deadline_s
from skep.model.service import ServiceSpec
from skep.model.task import Task, TaskState


class EarlyFailures:
    """The tasks that fail early in one decision."""

    def __init__(self, situation: Situation) -> None:
        self._situation = situation
        self._found: dict[tuple[str, str], bool] = {}
        """Answers by error and node.  Leads of a version have the same needs, so they share the answer."""
        self.deadline_s = step_seconds_max(situation.service.spec)
        """Seconds that every task may make no progress."""

    def includes(self, lead: Task) -> bool:
        """Return whether the lead fails early, because no node can take it."""
        if lead.status.state is not TaskState.PENDING:
            return False
        key = lead.status.err, lead.node_id
        found = self._found.get(key)
        if found is None:
            situation = self._situation
            own = situation.node_of(lead)
            found = self._found[key] = fails_early(
                lead,
                situation.service.spec,
                needs_of(spec_of(lead, situation)),
                (lambda: (own,)) if own is not None else situation.nodes,
            )
        return found

    def due_at(self, lead: Task, since: float) -> float:
        """Return until when the lead must run or end, if it may start ``since`` a time.

        If a node could take the lead at first, the short time starts when the last such node was lost.  So a node that
        is replaced by another one fails no update.
        """
        due_at = since + self.deadline_s
        if lead.status.state is not TaskState.PENDING:
            return due_at
        is_early, seen = self.includes(lead), self._situation.seen
        seen.note_unplaceable(lead, is_unplaceable=is_early, now=self._situation.now)
        return min(due_at, max(since, seen.unplaceable(lead)) + UNPLACEABLE_S) if is_early else due_at


def step_seconds_max(spec: ServiceSpec) -> float:
    """Return how many seconds a step may make no progress before the update fails.

    The stop grace period is added because the new task may have to wait for tasks of other slots to stop.
    """
    return progress_deadline_s(spec.labels) + spec.task_template.stop_grace_s
