"""Finds the smallest change that would let a refused task run: on the node with the fewest unmet conditions."""

from collections.abc import Iterator
from math import ceil

from skep.aio.time_slices import STEP, SlicedWork
from skep.manager.scheduler.nodes.accounting import Account, Accounting
from skep.manager.scheduler.nodes.filters import Filter, filters_for
from skep.manager.scheduler.nodes.requirements import Requirements
from skep.model.node_reports.node_refusals import NodeRefusal
from skep.model.options.constraints import meets
from skep.model.values.counts import counted

CHANGES_MAX = 2
"""Largest number of changes that a person would consider.  A node with more does not come close."""
_EASIEST = (NodeRefusal.CONSTRAINTS, NodeRefusal.MAX_REPLICAS, NodeRefusal.RESOURCES, NodeRefusal.HOST_PORT)
"""Conditions that a user can change in the spec.  The first ones come first among equal numbers of changes."""


def finding_smallest_change(requirements: Requirements, accounting: Accounting) -> SlicedWork[str]:
    """Return a sentence such as ``w2 would run it with 512 MiB more free memory``, or an empty text.

    It is empty if each node would need more than ``CHANGES_MAX`` changes.
    """
    copies = accounting.copies(requirements.service_id)
    filters = filters_for(requirements)
    best: tuple[tuple[int, int, float, str], Account, list[Filter]] | None = None
    for number, account in enumerate(accounting.accounts.values(), 1):
        if number % STEP == 0:
            yield
        node = account.node
        refusing = [one for one in filters if not one.passes(requirements, account, copies[node.id])]
        changes = sum(_count(one, requirements, account) for one in refusing)
        if not changes or changes > CHANGES_MAX:
            continue
        if copies[node.id] and any(one.refusal is NodeRefusal.HOST_PORT for one in refusing):
            continue  # a task of the service itself has the port, so that freeing it would not add a task
        hardest = max(map(_rank, refusing))
        rank = changes, hardest, _missing_share(requirements, account), node.shown_name
        if best is None or rank < best[0]:
            best = rank, account, refusing
    if best is None:
        return ""
    (*_, name), account, refusing = best
    copies_there = copies[account.node.id]
    phrases = [phrase for one in refusing for phrase in _phrases(one, requirements, account, copies_there)]
    return f"{name} would run it {' and '.join(phrases)}"


def _rank(filter: Filter) -> int:
    return _EASIEST.index(filter.refusal) if filter.refusal in _EASIEST else len(_EASIEST)


def _count(filter: Filter, requirements: Requirements, account: Account) -> int:
    if filter.refusal is not NodeRefusal.CONSTRAINTS:
        return 1
    return sum(not meets((one,), account.node) for one in requirements.constraints)


def _missing_share(requirements: Requirements, account: Account) -> float:
    """Return the largest missing share of the processors and the memory that the task needs."""
    amounts = (
        (requirements.nano_cpus, account.free_nano_cpus),
        (requirements.memory_bytes, account.free_memory_bytes),
    )
    return max(((wanted - free) / wanted for wanted, free in amounts if wanted), default=0.0)


def _phrases(filter: Filter, requirements: Requirements, account: Account, copies: int) -> Iterator[str]:
    """Yield the changes that would satisfy one filter."""
    match filter.refusal:
        case NodeRefusal.CONSTRAINTS:
            unmet = (one for one in requirements.constraints if not meets((one,), account.node))
            yield from (f"without the constraint {one.text}" for one in unmet)
        case NodeRefusal.RESOURCES if amounts := ", ".join(_amounts(requirements, account)):
            yield f"with {amounts} more"
        case NodeRefusal.HOST_PORT:
            taken = [one for one in requirements.host_ports if account.has_port(one)]
            yield f"if port {', '.join(f'{number}/{protocol}' for protocol, number in taken)} were free"
        case NodeRefusal.MAX_REPLICAS:
            yield f"with more than {counted(requirements.max_replicas, 'replica')} per node"
        case _:
            yield f"except for this: {filter.detail(requirements, account, copies)}"


def _amounts(requirements: Requirements, account: Account) -> Iterator[str]:
    if (cpus := requirements.nano_cpus - account.free_nano_cpus) > 0:
        yield counted(cpus / 1e9, "CPU")
    if (memory := requirements.memory_bytes - account.free_memory_bytes) > 0:
        yield f"{ceil(memory / (1 << 20))} MiB of memory"
