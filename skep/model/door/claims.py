"""Decides which service has a host and path, if several want it.  Pure.

The oldest service keeps it.  Managers refuse later claims before they are stored.  Two claims that are stored at the
same moment are decided by age and id here, with the same result on every node.

A host belongs to the stack of its oldest claim, because a path below it sees the cookies of its other paths.  Services
of other stacks can add paths only if the owner's route has the option ``share``.
"""

from collections.abc import Collection, Iterable, Mapping

import msgspec

from skep.model.door.routes import HttpRoute
from skep.model.values.ids import ServiceId


class Claimant(msgspec.Struct, frozen=True, kw_only=True):
    """A service with its routes.  ``stack``: empty outside of stacks.  ``created_at``: sorts by time."""

    id: ServiceId
    name: str
    stack: str = ""
    created_at: str = ""
    routes: tuple[HttpRoute, ...] = ()


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """The reason why a service does not get a route.

    Args:
        stack: Stack of the service that has it.
        unnamed: The same reason for users who may not see that service.
    """

    reason: str
    unnamed: str
    stack: str = ""


class Claims(msgspec.Struct, frozen=True, kw_only=True):
    """The result: the routes of each service, and the reasons of the refused ones by their address."""

    accepted: Mapping[ServiceId, tuple[HttpRoute, ...]] = {}
    refused: Mapping[ServiceId, Mapping[str, Refusal]] = {}


class _Host(msgspec.Struct, frozen=True):
    owner: Claimant
    is_shared: bool


def settled(claimants: Iterable[Claimant]) -> Claims:
    """Return which routes each service has."""
    hosts: dict[str, _Host] = {}
    taken: dict[str, Claimant] = {}
    accepted: dict[ServiceId, tuple[HttpRoute, ...]] = {}
    refused: dict[ServiceId, Mapping[str, Refusal]] = {}
    for claimant in sorted(claimants, key=lambda one: (one.created_at, one.id)):
        reasons: dict[str, Refusal] = {}
        kept = []
        for route in claimant.routes:
            if (refusal := _refusal(claimant, route, hosts, taken)) is not None:
                reasons[route.address] = refusal
                continue
            kept.append(route)
            taken[route.address] = claimant
            known = hosts.get(route.host)
            if known is None or (known.owner is claimant and route.options.is_shared):
                hosts[route.host] = _Host(claimant, route.options.is_shared)
        accepted[claimant.id] = tuple(kept)
        if reasons:
            refused[claimant.id] = reasons
    return Claims(accepted=accepted, refused=refused)


def refusals(claimant: Claimant, others: Iterable[Claimant]) -> Mapping[str, Refusal]:
    """Return why a service cannot have some of its routes, because of others of any age."""
    newest = msgspec.structs.replace(claimant, created_at="~")  # sorts after every time
    return settled((*others, newest)).refused.get(claimant.id, {})


def reserved(host: str, stack: str, hosts_of: Mapping[str, Collection[str]]) -> Refusal | None:
    """Return why the quotas of stacks refuse a host to a service of ``stack``.

    An exact host comes before the wildcard that includes it.  A wildcard is refused if it includes a host of another
    stack.

    Args:
        hosts_of: Hosts by stack, with the stacks that have any.
    """
    owner_of = {one: name for name, hosts in hosts_of.items() for one in hosts}
    owner, own = owner_of.get(host), hosts_of.get(stack, ())
    if owner is None and own:
        if _wildcard(host) in own:
            return None
        reason = f"the quota of the stack {stack} allows only the hosts {', '.join(own)}, and not {host}"
        return Refusal(reason=reason, unnamed=reason, stack=stack)
    if owner is None:
        owner = owner_of.get(_wildcard(host))
    if owner is None and host.startswith("*."):
        owner = next((name for one, name in sorted(owner_of.items()) if _wildcard(one) == host), None)
    if owner is None or owner == stack:
        return None
    return Refusal(
        reason=f"the host {host} is reserved by the quota of the stack {owner}",
        unnamed=f"the host {host} is reserved for another stack",
        stack=owner,
    )


def may_conflict(wanted: Iterable[HttpRoute], labels: Iterable[str]) -> bool:
    """Return whether a service with these values of labels may want a host of ``wanted``.

    Comparing texts is much faster than parsing the routes of all services.
    """
    hosts = {name for route in wanted for name in (route.host, _wildcard(route.host))}
    return any(host in value.lower() for value in labels for host in hosts)


def _refusal(
    claimant: Claimant, route: HttpRoute, hosts: Mapping[str, _Host], taken: Mapping[str, Claimant]
) -> Refusal | None:
    if (owner := taken.get(route.address)) is not None and owner is not claimant:
        return Refusal(
            reason=f"{route.address} belongs to service {owner.name}",
            unnamed=f"{route.address} belongs to a service of another stack",
            stack=owner.stack,
        )
    for host in (route.host, _wildcard(route.host)):
        known = hosts.get(host)
        if known is None or known.owner.stack == claimant.stack or known.is_shared:
            continue
        where = f"stack {known.owner.stack}" if known.owner.stack else "no stack"
        return Refusal(
            reason=(
                f"the host {host} belongs to service {known.owner.name} of {where}, which does not share it "
                "(skep.http.share=true)"
            ),
            unnamed=f"the host {host} belongs to a service of another stack, which does not share it",
            stack=known.owner.stack,
        )
    return None


def _wildcard(host: str) -> str:
    """Return the wildcard that includes ``host``."""
    return f"*.{host.partition('.')[2]}"
