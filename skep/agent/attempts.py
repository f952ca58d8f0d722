"""What a node does without a manager about a task whose process ended: another attempt at the *same* task, or nothing.

With a manager the leader replaces what has ended.  Without one, the restart policy of the task is followed here:
the state stays RUNNING and each attempt is counted; when the policy gives up, the task has failed, and the leader
receives that state with the next session.

Source: swarmkit, manager/orchestrator/restart/restart.go (the policy's meaning).
"""

from collections.abc import Sequence

from skep.model.service import RestartCondition, RestartPolicy
from skep.model.task import Task
from skep.model.times import SECOND_NS

DEFAULT_DELAY_S = 5.0
CUT_OFF_S = 10.0
"""An outage shorter than this is left to the leader: managers restart and move."""


def next_attempt(task: Task, exit_code: int, attempts: Sequence[float], now: float) -> float | None:
    """Seconds to wait before the process is started once more; None: the policy allows no further attempt.

    Args:
        exit_code: of the process that has ended; a failure that has none counts as 1.
        attempts: when earlier attempts were made (any clock, that of ``now``).

    A job's task runs once: the leader decides about further runs.  The attachment of a plain container to a
    network is requested by that container only.
    """
    policy = task.spec.restart_policy or RestartPolicy()
    if task.job_iteration is not None or task.spec.network_attachment_spec is not None:
        return None
    match policy.condition or RestartCondition.ANY:
        case RestartCondition.NONE:
            return None
        case RestartCondition.ON_FAILURE if exit_code == 0:
            return None
    if policy.max_attempts:
        opens_at = now - policy.window / SECOND_NS if policy.window else float("-inf")
        if sum(at > opens_at for at in attempts) >= policy.max_attempts:
            return None
    return DEFAULT_DELAY_S if policy.delay is None else policy.delay / SECOND_NS
