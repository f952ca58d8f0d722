"""What a filter looked at, in words and figures: one node's refusal of one task, for a user who asks why."""

from collections.abc import Iterator

from skep.manager.resources import kind_and_amount
from skep.manager.scheduler.accounting import Account
from skep.manager.scheduler.requirements import Requirements
from skep.model.constraints import meets
from skep.model.labels import IGNORE_PATHS
from skep.model.node import NodeState

_CPU_NANO = 1_000_000_000
_MEBIBYTE = 1024**2


def readiness(wish: Requirements, account: Account, copies: int) -> str:
    """The node's state, or its availability if that is what keeps tasks away."""
    node = account.node
    if node.status.state is not NodeState.READY:
        return f"the node is {node.status.state.value}" + (
            f" ({node.status.message})" if node.status.message else ""
        )
    return f"the node's availability is {node.spec.availability.value}"


def shortages(wish: Requirements, account: Account, copies: int) -> str:
    """What is wanted and how much of it is not reserved yet."""
    return "insufficient resources: " + "; ".join(_shortages(wish, account))


def unmet_constraints(wish: Requirements, account: Account, copies: int) -> str:
    """The constraints that the node does not meet."""
    unmet = [one for one in wish.constraints if not meets((one,), account.node)]
    words = (f"{one.key} {'!=' if one.negated else '=='} {one.value}" for one in unmet)
    return f"constraints not satisfied: {', '.join(words)}"


def plugins(wish: Requirements, account: Account, copies: int) -> str:
    """The plugins that are asked for; at least one is missing."""
    return f"missing plugin: it needs {', '.join(f'{kind} {name}' for kind, name in wish.plugins)}"


def data_plane(wish: Requirements, account: Account, copies: int) -> str:
    """To which kind of nodes the task's overlay networks belong."""
    return f"its overlay networks belong to {' and '.join(sorted(wish.planes))} nodes"


def paths(wish: Requirements, account: Account, copies: int) -> str:
    """Which way to which nodes fails, and how to have the task there all the same."""
    failing = [one.summary for one in account.node.cut_off if one.check in wish.paths]
    return f"{'; '.join(failing)} (the node's label {IGNORE_PATHS}=true would allow it)"


def platform(wish: Requirements, account: Account, copies: int) -> str:
    """The platforms that are asked for, and the node's."""
    wanted = ", ".join(f"{one.os or 'any'}/{one.architecture or 'any'}" for one in wish.platforms)
    actual = account.node.description.platform
    return f"unsupported platform: {wanted} wanted, this is {actual.os}/{actual.architecture}"


def ports(wish: Requirements, account: Account, copies: int) -> str:
    """The host-mode ports that somebody else holds here."""
    taken = [
        f"{number}/{protocol}" for protocol, number in wish.host_ports if account.host_ports[protocol, number]
    ]
    return f"host-mode port already in use: {', '.join(taken)}"


def replicas(wish: Requirements, account: Account, copies: int) -> str:
    """How many tasks of the service are here."""
    return f"max replicas per node: {copies} of {wish.max_replicas} are there"


def cluster_volumes(wish: Requirements, account: Account, copies: int) -> str:
    """The cluster volumes that are asked for, none of which exists."""
    return f"no such cluster volume: {', '.join(wish.cluster_volumes)}"


def _shortages(wish: Requirements, account: Account) -> Iterator[str]:
    if wish.nano_cpus > account.free_nano_cpus:
        wanted, free = wish.nano_cpus / _CPU_NANO, max(account.free_nano_cpus, 0) / _CPU_NANO
        yield f"{wanted:g} CPUs wanted, {free:g} not reserved"
    if wish.memory_bytes > account.free_memory_bytes:
        wanted, free = wish.memory_bytes / _MEBIBYTE, max(account.free_memory_bytes, 0) / _MEBIBYTE
        yield f"{wanted:.0f} MiB of memory wanted, {free:.0f} not reserved"
    for resource in wish.generic:
        if not account.generic.has(resource):
            kind, amount = kind_and_amount(resource)
            yield f"{amount} of {kind} wanted, fewer are left"
