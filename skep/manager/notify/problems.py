"""Problems that notifications report, from the verdicts that ``skep status`` and ``skep explain`` show.  Pure."""

from collections.abc import Iterator

import msgspec

from skep.manager.acme.showing import expiring_soon
from skep.manager.ca.expiry_warnings import expiring
from skep.manager.verify.records import violations_by_rule
from skep.model.history import cut, masked_text
from skep.model.node import Node, NodeState, Reachability, plain_message
from skep.model.node_reports.conditions import ConditionName, condition_label
from skep.model.options.notifications import Topic
from skep.model.service import PAUSED, HealthState, Service, ServiceHealth, UpdateState
from skep.model.swarm import Swarm
from skep.model.task_end import on_one_line
from skep.model.values.stacks import stack_of
from skep.model.values.times import SECOND_NS, moment, unix_ns
from skep.store.interface import View

MESSAGE_CHARACTERS_MAX = 300
"""Longest message of a problem.  A chat shows about three lines of it."""
BACKUP_DAYS = 7
"""Days after which the last complete backup is too old.  The guide recommends a daily backup."""
_DISK = (
    ConditionName.DISK_PRESSURE,
    ConditionName.DISK,
    ConditionName.STORE_FULL,
    ConditionName.DISK_SPACE,
)
"""Conditions about disks.  Only the first condition that a node reports becomes its problem."""
_UPDATES = {
    UpdateState.PAUSED: "was paused",
    UpdateState.ROLLBACK_STARTED: "is being rolled back",
    UpdateState.ROLLBACK_PAUSED: "was rolled back, and the rollback was paused",
    UpdateState.ROLLBACK_COMPLETED: "was rolled back",
}


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One problem at present.

    Attributes:
        key: Identifies the problem while it lasts, and again if it returns.
        is_over: Whether the event has already happened, such as a rollback.  Nobody is reminded of it.
    """

    key: str
    topic: Topic
    message: str
    subject: str = ""
    stack: str = ""
    is_over: bool = False


class LastBackup(msgspec.Struct, frozen=True):
    """The last complete backup and a failed one after it, as Unix times, or 0 without one."""

    complete_ns: int = 0
    failed_ns: int = 0
    error: str = ""


def problems_of_node(node: Node) -> Iterator[Problem]:
    """Yield the problems of one node."""
    name, manager = node.shown_name, node.manager_status
    if node.status.state is NodeState.DOWN:
        reason = _after_colon(plain_message(node.status.message))
        yield _problem(f"node/{node.id}", Topic.NODE, f"node {name} is down{reason}", name)
    elif manager is not None and manager.reachability is Reachability.UNREACHABLE:
        yield _problem(f"node/{node.id}", Topic.NODE, f"manager {name} is unreachable", name)
    labels = node.description.engine.labels
    found = (labels[label] for one in _DISK if (label := condition_label(one)) in labels)
    if (condition := next(found, None)) is not None:
        yield _problem(f"disk/{node.id}", Topic.DISK, f"node {name}: {condition}", name)


def problems_of_service(service: Service, health: ServiceHealth) -> Iterator[Problem]:
    """Yield the problem of a service.  A paused update is the reason why it is degraded, so it is not told twice."""
    name, stack = service.spec.name, stack_of(service.spec.labels)
    update = service.update_status
    state = update.state if update is not None else None
    if update is not None and state in _UPDATES:
        message = f"update of service {name} {_UPDATES[state]}{_after_colon(update.message)}"
        is_over = state is UpdateState.ROLLBACK_COMPLETED
        yield _problem(f"deploy/{service.id}", Topic.DEPLOY, message, name, stack, is_over=is_over)
    if health.state is HealthState.DEGRADED and state not in PAUSED:
        message = f"service {name} is degraded{_after_colon(health.reason)}"
        yield _problem(f"service/{service.id}", Topic.SERVICE, message, name, stack)


def problems_of_cluster(view: View, backup: LastBackup, since_ns: int, now_ns: int) -> Iterator[Problem]:
    """Yield the problems of certificates and backups, which begin without a commit, and violated invariants.

    Args:
        since_ns: Unix time since which backups are expected.
    """
    for expiry in expiring(view, moment(now_ns)):
        message = expiry.warning.removeprefix("WARNING: ")
        yield _problem(f"certificate/{expiry.kind}/{expiry.id}", Topic.CERTIFICATE, message, expiry.name)
    for name, message in expiring_soon(view, now_ns):
        yield _problem(f"certificate/host/{name}", Topic.CERTIFICATE, message, name)
    for swarm in view.find(Swarm):
        if reason := _backup_problem(backup, max(since_ns, unix_ns(swarm.created_at)), now_ns):
            yield _problem(f"backup/{swarm.id}", Topic.BACKUP, reason)
    for rule, texts in violations_by_rule(view).items():
        more = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
        message = f"invariant {rule} is violated: {texts[0]}{more}. Run skep verify"
        yield _problem(f"invariant/{rule}", Topic.INVARIANT, message, rule)


def _backup_problem(backup: LastBackup, since_ns: int, now_ns: int) -> str:
    if backup.failed_ns > backup.complete_ns:
        return f"the last backup of the cluster failed{_after_colon(backup.error)}"
    days = (now_ns - max(backup.complete_ns, since_ns)) // (86_400 * SECOND_NS)
    if days < BACKUP_DAYS:
        return ""
    return f"the cluster has no complete backup from the last {BACKUP_DAYS} days: run skep backup"


def _problem(
    key: str, topic: Topic, message: str, subject: str = "", stack: str = "", *, is_over: bool = False
) -> Problem:
    words = cut(on_one_line(masked_text(message)), MESSAGE_CHARACTERS_MAX)
    return Problem(key=key, topic=topic, message=words, subject=subject, stack=stack, is_over=is_over)


def _after_colon(reason: str) -> str:
    return f": {reason}" if reason else ""
