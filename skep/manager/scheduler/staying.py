"""Lets tasks stay on a node whose disk is full if they take over a slot that the node had before.

A node with a full disk receives no new tasks.  A task that replaces a task of the same slot there does not count as
new.  Otherwise, on a cluster with full disks, a crash would end a service that Docker would have restarted.  Other
nodes that can run the task come first, unless the slot has data in local volumes (``returning``).
"""

from msgspec.structs import replace

from skep.manager.scheduler.nodes.accounting import Account, Accounting
from skep.manager.scheduler.nodes.filters import first_refusing
from skep.manager.scheduler.nodes.requirements import Requirements
from skep.manager.scheduler.placement import (
    ASSIGNED,
    CONFIRMED,
    Assignment,
    Placed,
    PlacementRefused,
    assigned,
    confirm,
)
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from skep.model.values.times import unix_ns
from skep.store.interface import View


def confirmed(task: Task, requirements: Requirements, accounting: Accounting, view: View) -> Placed:
    """Run ``confirm`` for a task that was created for its node, and let it take over a slot there."""
    match confirm(task, requirements, accounting):
        case Assignment() as assignment:
            return Placed(assignments=(assignment,))
        case PlacementRefused() as refusal:
            return staying(Placed(refusals=(refusal,)), requirements, accounting, view)


def staying(placed: Placed, requirements: Requirements, accounting: Accounting, view: View) -> Placed:
    """Return ``placed`` with assignments in place of refusals, for tasks whose slot was last on a full node.

    The assignments are reserved in ``accounting``.
    """
    if not placed.refusals or not accounting.full_disks:
        return placed
    kept: list[Assignment] = []
    refusals: list[PlacementRefused] = []
    for refusal in placed.refusals:
        account = _full_account(refusal.task, requirements, accounting, view)
        if account is None:
            refusals.append(refusal)
        else:
            words = CONFIRMED if refusal.task.node_id else ASSIGNED
            kept.append(assigned(refusal.task, account, requirements, accounting, words))
    return replace(placed, assignments=(*placed.assignments, *kept), refusals=tuple(refusals))


def _full_account(
    task: Task, requirements: Requirements, accounting: Accounting, view: View
) -> Account | None:
    """Return the node of the slot's last task, if only its full disk refuses this one."""
    last = _last_node(task, view)
    if last not in accounting.full_disks:
        return None
    account = accounting.accounts[last]
    copies = accounting.copies(task.service_id)[account.node.id]
    spared = replace(requirements, needs_disk=False)
    return account if first_refusing(spared, account, copies) is None else None


def _last_node(task: Task, view: View) -> NodeId:
    """Return the node of the slot's last task.  Another run of a job counts as another slot."""
    past = [
        other
        for other in view.find(Task, slot=f"{task.service_id}/{task.slot or task.node_id}")
        if other.id != task.id
        and other.node_id
        and other.job_iteration == task.job_iteration
        and (other.status.state >= TaskState.ASSIGNED and other.status.container_status is not None)
    ]
    last = max(past, key=lambda one: (unix_ns(one.created_at), one.id), default=None)
    return last.node_id if last is not None else NodeId("")
