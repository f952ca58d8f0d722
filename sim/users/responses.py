"""Compares the responses to simulated users, and the effects of their requests, with Docker's (``reference``).

Requests are concurrent, so a response is checked against all states between the request and the response.  A refusal
is correct if the reference refuses with the same status in one of these states.  A change is correct if the reference
makes the same change in the state in which it was committed.  A change of specs without a request must be a rollback
that the settings allow.
"""

from collections.abc import Callable, Iterable

import msgspec
from msgspec.structs import replace

from sim.invariants.acknowledgements import is_of_commands
from sim.users.reference import (
    BAD,
    FORBIDDEN,
    Accepted,
    Create,
    Refused,
    Remove,
    Request,
    Rollback,
    ServiceState,
    SetNode,
    State,
    Update,
    automatic_rollback,
    is_staged,
    respond,
)
from sim.world.committed import Change
from skep.model.network import Network
from skep.model.networks.data_planes import nat_of
from skep.model.node import Availability, Node, NodeRole, NodeSpec
from skep.model.options.labels import DRAIN_NOW, JOB_TTL
from skep.model.options.schedules import CRON
from skep.model.quota import StackQuota
from skep.model.secret import Secret
from skep.model.service import Service, UpdateState
from skep.model.values.ids import ServiceId
from skep.model.volume import Volume, VolumeSharing
from skep.store.interface import Created, Deleted, Event, Updated, View

_SHARED = (VolumeSharing.READ_ONLY, VolumeSharing.ALL)
MANUAL_ROLLBACK = "manually requested rollback"
"""Docker's message for a rollback by request."""


class PendingRequest(msgspec.Struct, eq=False):
    """A request that can still take effect, or has taken effect."""

    request: Request
    since: int
    """Number of the first state in which the request can take effect."""
    is_done: bool = False
    """Whether this request, or an equal one, has taken effect."""
    is_acknowledged: bool = False
    """Whether the response has been received."""


class ResponseCheck:
    """A rule on commits, which also receives the requests and responses."""

    def __init__(self, view: View) -> None:
        """``view``: the state before the first request."""
        self._states = [
            State(
                nodes={node.id: (node.spec, node.version.index) for node in view.find(Node)},
                networks=frozenset(network.id for network in view.find(Network)),
                secrets=frozenset(secret.id for secret in view.find(Secret)),
            )
        ]
        self._open: list[PendingRequest] = []
        self._done: list[PendingRequest] = []
        self._behind_nat = {node.id for node in view.find(Node) if nat_of(node)}
        """Nodes that were behind NAT at some time, which cannot become managers then."""

    @property
    def present(self) -> int:
        """Return the number of the current state."""
        return len(self._states) - 1

    def requested(self, request: Request, since: int) -> PendingRequest:
        """Record a request.  ``since``: number of the state that was current when the user decided on it."""
        pending = PendingRequest(request, since)
        self._open.append(pending)
        return pending

    def accepted(self, pending: PendingRequest) -> Iterable[str]:
        """Record an acknowledgement."""
        if not pending.is_done:
            self._exchange(pending, [one for one in self._done if not one.is_acknowledged])
        pending.is_acknowledged = True
        if not pending.is_done:
            yield f"{_describe(pending.request)} was acknowledged and has not taken effect"

    def refused(self, pending: PendingRequest, status: int) -> Iterable[str]:
        """Record a refusal.  The request must never take effect."""
        if pending.is_done:
            self._exchange(pending, self._open)
        if pending.is_done:
            yield f"{_describe(pending.request)} was refused with {status} and has taken effect"
        else:
            self._open.remove(pending)
        responses = [respond(state, pending.request) for state in self._states[pending.since :]]
        if Refused(status) not in responses and not self._is_refused_role(pending, status):
            expected = sorted({one.status if isinstance(one, Refused) else 200 for one in responses})
            yield f"{_describe(pending.request)} got status {status}, not {' or '.join(map(str, expected))}"

    def _is_refused_role(self, pending: PendingRequest, status: int) -> bool:
        """Return whether a change of the role may be refused because of something that is not modeled.

        A demotion depends on the reachability of managers, and a promotion on the NAT in front of the node.
        """
        request = pending.request
        if not isinstance(request, SetNode) or status != BAD:
            return False
        if request.spec.role is NodeRole.MANAGER:
            return request.id in self._behind_nat
        known = [state.nodes.get(request.id) for state in self._states[pending.since :]]
        return any(one is not None and one[0].role is NodeRole.MANAGER for one in known)

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            present = event.new if isinstance(event, Updated) else event.object
            if isinstance(present, Node) and nat_of(present):
                self._behind_nat.add(present.id)
            before = self._states[-1]
            after = _after(before, event)
            if after == before:
                continue
            yield from self._changed(before, event)
            self._states.append(after)

    # -- inside --------------------------------------------------------------------------------------------

    def _changed(self, before: State, event: Event) -> Iterable[str]:
        match event:
            case Created(Service() as new) | Updated(_, Service() as new) if is_of_commands(new):
                return
            case Created(Service() as new):
                yield from self._took_effect(
                    before, _state_of(new), lambda one: isinstance(one, Create), new.id
                )
            case Updated(Service() as old, Service() as new) if old.removed_at != new.removed_at:
                if not self._is_removal_asked(new) and JOB_TTL in new.spec.labels:
                    return  # the leader has removed a finished job
                yield from self._took_effect(before, None, lambda one: isinstance(one, Remove), new.id)
            case Updated(Service() as old, Service() as new) if _specs(old) != _specs(new):
                yield from self._respecified(before, old, new)
            case Updated(Node() as node, Node() as other) if node.spec != other.spec:
                spec = other.spec
                yield from self._took_effect(
                    before, None, lambda one: isinstance(one, SetNode) and _kept(one.spec) == spec, other.id
                )

    def _is_removal_asked(self, service: Service) -> bool:
        return any(isinstance(one.request, Remove) and one.request.id == service.id for one in self._open)

    def _respecified(self, before: State, old: Service, new: Service) -> Iterable[str]:
        held = _state_of(new)
        if _is_manual_rollback(old, new):
            version = old.version.index
            yield from self._took_effect(
                before, held, lambda one: isinstance(one, Rollback) and one.version == version, new.id
            )
        elif any(isinstance(one.request, Update) and one.request.spec == new.spec for one in self._open):
            yield from self._took_effect(
                before, held, lambda one: isinstance(one, Update) and one.spec == new.spec, new.id
            )
        elif old.autoscaled != new.autoscaled and replace(new.spec, mode=old.spec.mode) == old.spec:
            return  # ``AutoscalingIsCalm`` checks the number
        else:
            if _unversioned(automatic_rollback(before.services[new.id])) != _unversioned(held):
                yield f"the specs of service {new.id} were changed without a request"

    def _exchange(self, pending: PendingRequest, others: list[PendingRequest]) -> None:
        """Swap ``pending`` with an equal request, because either of the two may have taken effect."""
        for other in others:
            if other.request == pending.request:
                mine, its = (self._done, self._open) if pending.is_done else (self._open, self._done)
                mine[mine.index(pending)], its[its.index(other)] = other, pending
                pending.is_done, other.is_done = other.is_done, pending.is_done
                return

    def _took_effect(
        self, before: State, held: ServiceState | None, is_it: Callable[[Request], bool], id: str
    ) -> Iterable[str]:
        found = [one for one in self._open if one.request.id == id and is_it(one.request)]
        if not found:
            yield f"{id} was changed without a request"
            return
        # A request of unknown outcome may request the same change with an earlier version.
        acceptable = (one for one in found if isinstance(respond(before, one.request), Accepted))
        pending = next(acceptable, found[0])
        self._open.remove(pending)
        self._done.append(pending)
        pending.is_done = True
        expected = respond(before, pending.request)
        if expected == Refused(FORBIDDEN) and self._was_acceptable(pending):
            return  # the quota was set while the request was in progress
        if isinstance(expected, Refused):
            yield f"{_describe(pending.request)} has taken effect, but must be refused with {expected.status}"
        elif _unversioned(expected.service) != _unversioned(held) and not _keeps_previous(
            before.services.get(ServiceId(id)), expected.service, held
        ):
            yield f"{_describe(pending.request)} made {held}, not {expected.service}"

    def _was_acceptable(self, pending: PendingRequest) -> bool:
        states = self._states[pending.since :]
        return any(isinstance(respond(state, pending.request), Accepted) for state in states)


def _is_manual_rollback(old: Service, new: Service) -> bool:
    """Return whether a request has rolled the service back.  The rollback of a job is over at once."""
    status = new.update_status
    if status is None:
        return False
    if new.job_status is not None:
        return status.state is UpdateState.ROLLBACK_COMPLETED and status != old.update_status
    return status.message == MANUAL_ROLLBACK


def _keeps_previous(
    before: ServiceState | None, expected: ServiceState | None, held: ServiceState | None
) -> bool:
    """Return whether an update during a staged one has kept the spec before both as the previous one.

    If it only scales the staged update, the previous spec gets that number of tasks as well.
    """
    if before is None or before.previous is None or expected is None or not is_staged(before.spec):
        return False
    scaled = replace(before.previous, mode=expected.spec.mode)
    kept = (replace(expected, previous=previous) for previous in (before.previous, scaled))
    return _unversioned(held) in map(_unversioned, kept)


def _kept(spec: NodeSpec) -> NodeSpec:
    """Return the spec that managers keep of a request: the end of a drain ends the wish to drain at once."""
    if spec.availability is Availability.DRAIN:
        return spec
    labels = {name: value for name, value in spec.labels.items() if name != DRAIN_NOW}
    return replace(spec, labels=labels)


def _after(state: State, event: Event) -> State:
    match event:
        case Created(Service() as service) | Updated(_, Service() as service):
            services = dict(state.services)
            if service.removed_at is None:
                services[service.id] = _state_of(service)
            else:
                services.pop(service.id, None)
            return replace(state, services=services)
        case Created(Node() as node) | Updated(_, Node() as node):
            return replace(state, nodes={**state.nodes, node.id: (node.spec, node.version.index)})
        case Created(Network() as network):
            return replace(state, networks=state.networks | {network.id})
        case Deleted(Network() as network):
            return replace(state, networks=state.networks - {network.id})
        case Created(Secret() as secret):
            return replace(state, secrets=state.secrets | {secret.id})
        case Deleted(Secret() as secret):
            return replace(state, secrets=state.secrets - {secret.id})
        case Created(StackQuota() as quota) | Updated(_, StackQuota() as quota):
            return replace(state, quotas={**state.quotas, quota.spec.name: quota.spec})
        case Deleted(StackQuota() as quota):
            left = {name: one for name, one in state.quotas.items() if name != quota.spec.name}
            return replace(state, quotas=left)
        case Created(Volume() as volume) if volume.spec.access_mode.sharing not in _SHARED:
            return replace(state, unshared=state.unshared | {volume.spec.name})
        case Deleted(Volume() as volume):
            return replace(state, unshared=state.unshared - {volume.spec.name})
        case Deleted(Node() as node):
            return replace(state, nodes={id: one for id, one in state.nodes.items() if id != node.id})
    return state


def _state_of(service: Service) -> ServiceState:
    job = service.job_status
    runs = job.job_iteration.index if job is not None and CRON not in service.spec.labels else 0
    return ServiceState(service.spec, service.previous_spec, service.version.index, runs)


def _unversioned(held: ServiceState | None) -> ServiceState | None:
    return replace(held, version=0) if held is not None else None


def _specs(service: Service) -> object:
    return service.spec, service.previous_spec


def _describe(request: Request) -> str:
    return f"{type(request).__name__.lower()} of {request.id}"
