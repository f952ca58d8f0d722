"""Whether a task still matches its service's spec."""

from msgspec.structs import replace

from skep.manager.orchestrator.decision_inputs import Situation
from skep.model.options.constraints import is_satisfied
from skep.model.service import EndpointSpec, Placement, TaskSpec
from skep.model.task import Task


def is_dirty(task: Task, situation: Situation) -> bool:
    """Return whether ``task`` must be replaced to match its service's current spec.

    Only the task template and the endpoint matter.  A change of labels, replicas or update settings replaces no task.
    After a change of placement alone, a task stays on its node if the node meets the new constraints.

    Source: swarmkit, manager/orchestrator/task.go (IsTaskDirty).
    """
    if is_same(task, situation):
        return False
    spec = situation.service.spec
    if _has_other_ports(task, situation):
        return True
    if _without_placement(task.spec) != _without_placement(spec.task_template):
        return True
    node = situation.node_of(task)
    constraints = (spec.task_template.placement or Placement()).constraints
    return node is None or not is_satisfied(constraints, node)


def is_old_one(task: Task, situation: Situation) -> bool:
    """Return whether ``task`` is one of the old tasks of a staged update, which the last step replaces."""
    split = situation.service.split
    if split is None or split.old is None or not is_dirty(task, situation):
        return False
    return task.spec_version is None or task.spec_version.index not in split.withdrawn


def is_same(task: Task, situation: Situation) -> bool:
    """Return whether the current spec would create the same task, on any node.  All tasks of a version have the same
    result.

    A task is not replaced if its earlier spec version is unreadable (decision 21).
    """
    service = situation.service
    if task.spec_version == service.spec_version or situation.is_unknown(task):
        return True
    return task.spec == service.spec.task_template and not _has_other_ports(task, situation)


def _has_other_ports(task: Task, situation: Situation) -> bool:
    made_from = situation.spec_of(task)
    wanted = _ports(situation.service.spec.endpoint_spec)
    return made_from is not None and _ports(made_from.endpoint_spec) != wanted


def _without_placement(spec: TaskSpec) -> TaskSpec:
    return replace(spec, placement=None)


def _ports(spec: EndpointSpec | None) -> EndpointSpec:
    return spec or EndpointSpec()
