"""Looks up the objects that requests refer to, for authorization."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

from aiohttp import web
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.aio.time_slices import TimeSlices, result_in_slices
from skep.api.access.authorization import stack_label_of
from skep.api.access.identity import identity_of
from skep.api.access.permissions import (
    KnownObject,
    NewObject,
    PermissionRule,
    PermissionScope,
    RequestFacts,
    sees,
)
from skep.api.formats.networks import NetworkBody
from skep.api.formats.service_form import settled
from skep.api.http.server import read_json
from skep.errors import NotFound, PermissionDenied, ResourceExhausted
from skep.manager.catalog.registrations import record_in
from skep.manager.control.targets import target_of, task_named
from skep.manager.control.validation.new_objects import (
    known_service,
    known_task,
    new_object,
    new_service,
    planned_service,
    stacks_of,
    visible_to,
)
from skep.manager.routes.access import current_view, manager_of
from skep.manager.routes.extensions.placement import read_planned
from skep.manager.routes.extensions.stacks import SizedConfig, SizedSecret, read_check
from skep.manager.routes.files import SecretBody
from skep.manager.routes.networks import spec_of_body
from skep.manager.routes.services import ServiceChange, read_changes, read_spec
from skep.manager.services.quotas import UserBounds, usage_of_file, usage_of_network
from skep.model.catalog import ServiceRegistration
from skep.model.network import Network, NetworkSpec
from skep.model.permissions.access import Identity
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import Service, ServiceSpec
from skep.model.values.ids import ServiceId
from skep.model.values.stacks import stack_of
from skep.model.volume import Volume
from skep.store.interface import Store, View

_DRY_RUNS = ("/placement", "/what-if/services", "/what-if/survive")
"""Ends of the paths whose specs are never written."""
_PLANNED_MAX = 500
"""Objects of one plan by a user below administrator.

They take half a second of a manager's time.  Larger deploys are not checked and get a warning.
"""


class ClusterObjects:
    """Objects of the cluster (``api.access.authorization.Objects``)."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def facts(self, request: web.Request, rule: PermissionRule) -> RequestFacts:
        """See ``Objects``."""
        bodies = (
            await _READERS[rule.kind](request)
            if rule.scope in (PermissionScope.NEW, PermissionScope.CHANGE)
            else ()
        )
        if rule.kind != "stack" or not bodies:
            return await self._facts(request, rule, bodies)
        async with manager_of(request).checks.hold():  # the handler takes another slot for its own check
            return await self._facts(request, rule, bodies)

    async def _facts(
        self, request: web.Request, rule: PermissionRule, bodies: tuple[Any, ...]
    ) -> RequestFacts:
        # Check the settled spec, which is stored: a user may write a protocol differently.
        bodies = tuple(settled(one) if isinstance(one, ServiceSpec) else one for one in bodies)
        view = await current_view(request)
        identity = identity_of(request)
        among = visible_to(view, identity)
        known = None
        if rule.scope in (PermissionScope.OBJECT, PermissionScope.CHANGE):
            key = "id" if "id" in request.match_info else "name"
            known = await _known(view, rule.kind, request.match_info[key], identity)
            request.match_info[key] = known.id
            bodies = _restored(request, view, known) or bodies
        is_new = rule.scope is PermissionScope.NEW
        is_placement = _path(request).endswith(_DRY_RUNS)
        is_plan = is_placement or _path(request).endswith("/stacks/check")
        # A plan removes these services before it changes others.
        removed = (await read_check(request)).removed if rule.kind == "stack" and bodies else ()
        bounds, slices, new = UserBounds(view, removed), TimeSlices(SystemClock()), []
        for one in bodies:
            if isinstance(one, ServiceSpec):
                found = planned_service(view, one, among) if is_plan else new_service(view, one, among)
                if not is_placement:
                    found = replace(found, excess=bounds.service_refusal(one))
                new.append(found)
            else:
                new.append(_new_object(view, one, bounds, is_new=is_new))
            await slices.yield_if_due()
        return RequestFacts(known=known, new=tuple(new), stacks=stacks_of(view))

    def stack_of(self, kind: str, item: Mapping[str, Any]) -> str:
        """See ``Objects``."""
        if kind != "task":
            return stack_label_of(item)
        service = self._store.view().lookup(Service, item.get("ServiceID") or "")
        return stack_of(service.spec.labels) if service is not None else ""


async def _known(view: View, kind: str, word: str, identity: Identity) -> KnownObject:
    """Return the object that a path names.  An object that ``identity`` may not see counts as missing.

    Raises:
        NotFound, InvalidArgument, FailedPrecondition: No such object, several, or none that fits.
    """
    among = visible_to(view, identity)
    match kind:
        case "stack":
            if not sees(identity, word):
                raise NotFound(f"stack {word} has no quota")
            return KnownObject(id=word, stack=word)
        case "service":
            return known_service(view, view.resolve(Service, word, among))
        case "task":
            return known_task(view, task_named(view, word, among))
        case "registration":
            return _known_registration(view, word, identity)
        case "target":
            return known_task(view, await result_in_slices(target_of(view, word, among), SystemClock()))
        case _:
            found = view.resolve(_KINDS[kind], word, among)
            return KnownObject(id=found.id, stack=stack_of(found.spec.labels))


def _known_registration(view: View, name: str, identity: Identity) -> KnownObject:
    stack = record_in(view, name).registration.stack
    if not sees(identity, stack):
        raise NotFound(f"registration {name} not found")
    return KnownObject(id=name, stack=stack)


def _restored(request: web.Request, view: View, known: KnownObject) -> tuple[ServiceSpec, ...]:
    """Return the previous spec of the service if the request returns to it.  It counts instead of the request's body.

    An administrator may have written it, with objects that the user may not use.
    """
    is_abort = _path(request).endswith("/update/abort")
    if not is_abort and request.query.get("rollback") != "previous":
        return ()
    service = view.lookup(Service, ServiceId(known.id))
    previous = service.previous_spec if service is not None else None
    return (previous,) if previous is not None else ()


def _new_object(view: View, body: Any, bounds: UserBounds, *, is_new: bool) -> NewObject:
    match body:
        case NetworkBody():
            network = spec_of_body(body)
            spec: NetworkSpec | SecretSpec | ConfigSpec = network
            usage = usage_of_network(view, network)
        case SecretBody():
            spec = body.spec
            usage = usage_of_file(spec, len(body.data or b""))
        case SizedSecret() | SizedConfig():
            spec = body.spec
            usage = usage_of_file(spec, body.data_bytes)
        case ConfigSpec():
            spec = body
            usage = usage_of_file(spec, len(body.data))
        case ServiceRegistration():
            return NewObject(name=body.service, stack=body.stack)
        case _:
            raise AssertionError(f"no object: {type(body).__name__}")
    new = new_object(spec)
    if isinstance(body, NetworkBody) and not body.is_of_cluster:
        new = replace(new, machine_rights=new.machine_rights or "a network of a single node")
    return replace(new, excess=bounds.refusal(new.stack, usage)) if is_new else new


async def _services(request: web.Request) -> tuple[ServiceSpec, ...]:
    """Return the service specs in a request's body, read as the path's handler reads them.  Raises:
    PermissionDenied.
    """
    if _path(request).endswith(_DRY_RUNS):
        return await read_planned(request)
    if not _path(request).endswith("/changes"):
        return (await read_spec(request),)
    return await _checked_changes(request, await read_changes(request))


async def _stack(request: web.Request) -> tuple[Any, ...]:
    """Return all objects of a plan.  Raises: PermissionDenied."""
    wanted = await read_check(request)
    if (number := len(wanted.bodies) + len(wanted.removed)) > _PLANNED_MAX:
        raise ResourceExhausted(
            f"a plan has {number} objects: only administrators may check more than {_PLANNED_MAX}"
        )
    view, stacks = await current_view(request), {stack_of(one.labels) for one in wanted.bodies}
    for id in (*wanted.removed, *(one.id for one in wanted.services if one.id)):
        service = view.lookup(Service, id)
        # Use the same refusal for all cases, so that it does not reveal which ids exist.
        if (
            service is None
            or stack_of(service.spec.labels) not in stacks
            or not sees(identity_of(request), stack_of(service.spec.labels))
        ):
            raise PermissionDenied(f"service {id} does not belong to the stack")
    await _checked_changes(request, wanted.services)
    return wanted.bodies


async def _checked_changes(request: web.Request, changes: Iterable[ServiceChange]) -> tuple[ServiceSpec, ...]:
    """Return the specs of service changes after a check of the services' stack and rights.

    Raises:
        NotFound: The client sees no such service.
        PermissionDenied: A service would move to another stack, or has rights on its machine.
    """
    view, slices = await current_view(request), TimeSlices(SystemClock())
    among = visible_to(view, identity_of(request))
    for change in changes:
        await slices.yield_if_due()
        # Updates of services by this path are by id.
        service = view.lookup(Service, change.id) if change.id else None
        if change.id and among is not None and (service is None or not among(service)):
            raise NotFound(f"service {change.id} not found")
        if service is not None:
            if stack_of(service.spec.labels) != stack_of(change.spec.labels):
                raise PermissionDenied(f"service {change.spec.name} cannot be moved to another stack")
            if why := known_service(view, service).machine_rights:
                raise PermissionDenied(
                    f"service {service.spec.name} has {why}, which only administrators may give"
                )
    return tuple(change.spec for change in changes)


def _path(request: web.Request) -> str:
    """Return the path of the route, such as ``/services/{id}``."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else ""


def _reader(type_: type[Any]) -> Callable[[web.Request], Awaitable[tuple[Any, ...]]]:
    async def read_body(request: web.Request) -> tuple[Any, ...]:
        return (await read_json(request, type_),)

    return read_body


_READERS: Final[Mapping[str, Callable[[web.Request], Awaitable[tuple[Any, ...]]]]] = {
    "service": _services,
    "network": _reader(NetworkBody),
    "secret": _reader(SecretBody),
    "config": _reader(ConfigSpec),
    "stack": _stack,
    "registration": _reader(ServiceRegistration),
}
_KINDS: Final[Mapping[str, type[Any]]] = {
    "network": Network,
    "secret": Secret,
    "config": Config,
    "volume": Volume,
}
