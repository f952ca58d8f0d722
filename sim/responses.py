"""Compares the responses to users, and their effects, with Docker's (``reference``).

Requests run beside each other, so an answer is judged by the states between the request and its answer: a refusal is
right if the reference refuses likewise in one of them, a change if the reference makes the same in the state in which
it was committed.  What the cluster changes by itself, a service's specs, is a rollback that its settings allow.
"""

from collections.abc import Callable, Iterable

import msgspec
from msgspec.structs import replace

from sim.committed import Change
from sim.reference import (
    BAD,
    Create,
    Held,
    Refused,
    Remove,
    Request,
    Rollback,
    SetNode,
    State,
    Update,
    answer,
    rolled_back_by_itself,
)
from skep.model.network import Network
from skep.model.node import Node, NodeRole
from skep.model.secret import Secret
from skep.model.service import Service
from skep.store.interface import Created, Deleted, Event, Updated, View

BY_HAND = "manually requested rollback"
"""Docker's message of a rollback that a user asked for."""


class Asked(msgspec.Struct, eq=False):
    """A request that may still take effect, or has."""

    request: Request
    since: int
    """The first of the states in which it may take effect."""
    is_done: bool = False
    """It has taken effect, or one like it has."""
    is_told: bool = False
    """Its user has got the response."""


class ResponseCheck:
    """A rule on commits; and users tell it what they ask and are answered."""

    def __init__(self, view: View) -> None:
        """``view``: the state before the first request."""
        self._states = [
            State(
                nodes={node.id: (node.spec, node.version.index) for node in view.find(Node)},
                networks=frozenset(network.id for network in view.find(Network)),
                secrets=frozenset(secret.id for secret in view.find(Secret)),
            )
        ]
        self._open: list[Asked] = []
        self._done: list[Asked] = []

    @property
    def present(self) -> int:
        """The number of the present state."""
        return len(self._states) - 1

    def asked(self, request: Request, since: int) -> Asked:
        """Somebody asks.  ``since``: the state that was present when they chose what to ask."""
        asked = Asked(request, since)
        self._open.append(asked)
        return asked

    def accepted(self, asked: Asked) -> Iterable[str]:
        """It was acknowledged."""
        if not asked.is_done:
            self._exchange(asked, [one for one in self._done if not one.is_told])
        asked.is_told = True
        if not asked.is_done:
            yield f"{_said(asked.request)} was acknowledged and has not happened"

    def refused(self, asked: Asked, status: int) -> Iterable[str]:
        """It was refused, and will never happen."""
        if asked.is_done:
            self._exchange(asked, self._open)
        if asked.is_done:
            yield f"{_said(asked.request)} was refused with {status} and has happened"
        else:
            self._open.remove(asked)
        answers = [answer(state, asked.request) for state in self._states[asked.since :]]
        if Refused(status) not in answers and not self._is_refused_demotion(asked, status):
            expected = sorted({one.status if isinstance(one, Refused) else 200 for one in answers})
            yield f"{_said(asked.request)} was answered {status}, not {' or '.join(map(str, expected))}"

    def _is_refused_demotion(self, asked: Asked, status: int) -> bool:
        """Whether the others can do without a manager depends on who is reachable, which is not told here."""
        request = asked.request
        if not isinstance(request, SetNode) or status != BAD or request.spec.role is not NodeRole.WORKER:
            return False
        known = [state.nodes.get(request.id) for state in self._states[asked.since :]]
        return any(one is not None and one[0].role is NodeRole.MANAGER for one in known)

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            before = self._states[-1]
            after = _after(before, event)
            if after == before:
                continue
            yield from self._changed(before, event)
            self._states.append(after)

    # -- inside --------------------------------------------------------------------------------------------

    def _changed(self, before: State, event: Event) -> Iterable[str]:
        match event:
            case Created(Service() as new):
                yield from self._happened(before, _held(new), lambda one: isinstance(one, Create), new.id)
            case Updated(Service() as old, Service() as new) if old.removed_at != new.removed_at:
                yield from self._happened(before, None, lambda one: isinstance(one, Remove), new.id)
            case Updated(Service() as old, Service() as new) if _specs(old) != _specs(new):
                yield from self._respecified(before, old, new)
            case Updated(Node() as node, Node() as other) if node.spec != other.spec:
                wish = other.spec
                yield from self._happened(
                    before, None, lambda one: isinstance(one, SetNode) and one.spec == wish, other.id
                )

    def _respecified(self, before: State, old: Service, new: Service) -> Iterable[str]:
        held = _held(new)
        if new.update_status is not None and new.update_status.message == BY_HAND:
            version = old.version.index
            yield from self._happened(
                before, held, lambda one: isinstance(one, Rollback) and one.version == version, new.id
            )
        elif any(isinstance(one.request, Update) and one.request.spec == new.spec for one in self._open):
            yield from self._happened(
                before, held, lambda one: isinstance(one, Update) and one.spec == new.spec, new.id
            )
        else:
            if _unversioned(rolled_back_by_itself(before.services[new.id])) != _unversioned(held):
                yield f"service {new.id} changed its specs by itself"

    def _exchange(self, asked: Asked, others: list[Asked]) -> None:
        """Of two equal requests it is unknown which one took effect."""
        for other in others:
            if other.request == asked.request:
                mine, its = (self._done, self._open) if asked.is_done else (self._open, self._done)
                mine[mine.index(asked)], its[its.index(other)] = other, asked
                asked.is_done, other.is_done = other.is_done, asked.is_done
                return

    def _happened(
        self, before: State, held: Held | None, is_it: Callable[[Request], bool], id: str
    ) -> Iterable[str]:
        asked = next((one for one in self._open if one.request.id == id and is_it(one.request)), None)
        if asked is None:
            yield f"{id} was changed, which nobody asked for"
            return
        self._open.remove(asked)
        self._done.append(asked)
        asked.is_done = True
        promised = answer(before, asked.request)
        if isinstance(promised, Refused):
            yield f"{_said(asked.request)} has happened, which is to be refused with {promised.status}"
        elif _unversioned(promised.service) != _unversioned(held):
            yield f"{_said(asked.request)} made {held}, not {promised.service}"


def _after(state: State, event: Event) -> State:
    match event:
        case Created(Service() as service) | Updated(_, Service() as service):
            services = dict(state.services)
            if service.removed_at is None:
                services[service.id] = _held(service)
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
        case Deleted(Node() as node):
            return replace(state, nodes={id: one for id, one in state.nodes.items() if id != node.id})
    return state


def _held(service: Service) -> Held:
    runs = service.job_status.job_iteration.index if service.job_status is not None else 0
    return Held(service.spec, service.previous_spec, service.version.index, runs)


def _unversioned(held: Held | None) -> Held | None:
    return replace(held, version=0) if held is not None else None


def _specs(service: Service) -> object:
    return service.spec, service.previous_spec


def _said(request: Request) -> str:
    return f"{type(request).__name__.lower()} of {request.id}"
