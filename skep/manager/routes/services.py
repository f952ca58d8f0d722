"""``/services``: services and their specs.

Source: moby 20.10, api/server/router/swarm/cluster_routes.go and daemon/cluster/services.go.
"""

from collections.abc import Iterable, Iterator
from functools import partial

from aiohttp import web
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.api.access.identity import identity_of
from skep.api.access.permissions import shown_error
from skep.api.errors import Untranslated
from skep.api.formats.service_form import UNRECOGNIZED, settled
from skep.api.http.server import (
    ApiVersion,
    Filters,
    Routes,
    api_version,
    json_list_response,
    json_response,
    known_list_response,
    read_json,
)
from skep.errors import InvalidArgument, SkepError
from skep.manager.allocator.addresses import NEARLY_FULL, usage_of
from skep.manager.allocator.subnets import has_addresses
from skep.manager.control import services as control
from skep.manager.control.deploys import fenced, require_current
from skep.manager.control.quotas import bounded
from skep.manager.control.validation.new_objects import visible_to
from skep.manager.diagnosis.service_health import service_status, status_with_health
from skep.manager.diagnosis.service_warnings import spec_warnings
from skep.manager.routes.access import current_view, manager_of, version_parameter, wrapped_flag
from skep.manager.routes.guard.audit import CHANGED_SERVICES, author_of
from skep.manager.routes.guard.strict_freezes import unfrozen
from skep.manager.routes.representations import has_labels, problems_of, shown_service
from skep.manager.services.freezes import stack_of_service
from skep.manager.services.registry_auth import dropped_warnings, shown_auth
from skep.model.container import ContainerSpec, Mount
from skep.model.network import Network
from skep.model.networks.data_planes import is_overlay
from skep.model.node import Node
from skep.model.options.secret_env import secret_env_warning
from skep.model.permissions.access import REVISION_HEADER
from skep.model.service import Service, ServiceSpec
from skep.model.values.encoding import ApiObject
from skep.model.values.ids import ServiceId
from skep.model.values.stacks import stack_of
from skep.store.interface import Transaction, View

routes = Routes()

_V1_40, _V1_41 = ApiVersion("1.40"), ApiVersion("1.41")
_TOGETHER_MAX = 1_000
"""Largest number of services in one request."""
_V1_44, _V1_46, _V1_52 = ApiVersion("1.44"), ApiVersion("1.46"), ApiVersion("1.52")


@routes.get("/services")
async def list_services(request: web.Request) -> web.StreamResponse:
    """List the services that match the filters, in order of id.

    With ``status``, include their task counts, and with ``health`` as well, a Skep extension, their health.
    """
    filters = Filters.of(request)
    filters.refuse_unknown("name", "id", "label", "mode", "runtime")
    status = wrapped_flag(request, "status") if api_version(request) >= _V1_41 else False
    view = await current_view(request)
    services = list(_fitting(view, filters) if filters else _all(view))
    problems = problems_of(view, Service)
    if not status and not filters:
        return known_list_response(services, shown_service, problems, manager_of(request).services)
    if not status:
        return json_list_response(services, partial(shown_service, problems))
    store, clock = manager_of(request).store, SystemClock()
    if wrapped_flag(request, "health"):
        found = [
            await status_with_health(store.view(), service, clock.now_ns(), clock) for service in services
        ]
    else:
        found = [await service_status(store.view(), service) for service in services]
    shown = zip(services, found, strict=True)
    return json_list_response([shown_service(problems, service, status=status) for service, status in shown])


def _all(view: View) -> Iterator[Service]:
    return (service for service in view.find(Service) if service.removed_at is None)


def _fitting(view: View, filters: Filters) -> Iterator[Service]:
    for service in view.find(Service):
        if (
            service.removed_at is None
            and filters.matches_prefix("name", service.spec.name)
            and filters.matches_prefix("id", service.id)
            and has_labels(service.spec.labels, filters["label"])
            and filters.matches("mode", service.spec.mode.name)
            and filters.matches("runtime", service.spec.task_template.runtime)
        ):
            yield service


@routes.post("/services/create")
async def create_service(request: web.Request) -> web.StreamResponse:
    """Create a service.  The response has its id and does not wait for tasks."""
    manager = manager_of(request)
    spec = await read_spec(request)
    auth = request.headers.get("X-Registry-Auth", "")
    if control.names_networks(spec):  # without names of networks, only the transaction has to read the store
        view = await current_view(request)
        spec = control.with_network_ids(view, spec, visible_to(view, identity_of(request)))
    await manager.require_room(creates=True)
    stack, by_admin = stack_of(spec.labels), identity_of(request).is_admin
    service = await manager.update(
        unfrozen(
            request,
            fenced(bounded(control.create_service, stack, is_admin=by_admin), deploy_of(request), stack),
            stack,
            is_fenced=True,
        ),
        settled(spec),
        new_id=manager.new_id,
        new_name=manager.new_name,
        now=manager.now(),
        registry_auth=auth,
        by_admin=by_admin,
        by=author_of(request),
    )
    view = manager.store.view()
    warnings = room_warnings(view, service) if control.names_networks(spec) else []
    warnings += [*_secret_warnings(spec), *spec_warnings(spec, view.find(Node))]
    warnings += dropped_warnings(view, service, auth, "")
    return json_response({"ID": service.id, **({"Warnings": warnings} if warnings else {})}, 201)


@routes.get("/services/{id}")
async def inspect_service(request: web.Request) -> web.StreamResponse:
    """Show one service.  With ``insertDefaults``, include defaults of omitted fields."""
    insert_defaults = wrapped_flag(request, "insertDefaults")
    view = await current_view(request)
    service = view.resolve(Service, request.match_info["id"])
    return json_response(shown_service(problems_of(view, Service), service, insert_defaults=insert_defaults))


@routes.post("/services/{id}/update")
async def update_service(request: web.Request) -> web.StreamResponse:
    """Replace the spec of a service, or swap it with the previous one (``rollback=previous``)."""
    manager = manager_of(request)
    await manager.require_room(creates=False)
    spec = await read_spec(request)
    version = version_parameter(request, "service")
    view = await current_view(request)
    spec = settled(control.with_network_ids(view, spec, visible_to(view, identity_of(request))))
    service = view.resolve(Service, request.match_info["id"])
    auth_from = control.auth_source(request.query.get("registryAuthFrom", ""), service)
    auth, kept = request.headers.get("X-Registry-Auth", ""), shown_auth(view, service.id)
    stack, by_admin = stack_of(spec.labels), identity_of(request).is_admin
    match request.query.get("rollback", ""):
        case "" | "none":
            await manager.update(
                unfrozen(
                    request,
                    fenced(
                        bounded(control.update_service, stack, is_admin=by_admin), deploy_of(request), stack
                    ),
                    stack_of(service.spec.labels),
                    stack,
                    is_fenced=True,
                ),
                service.id,
                spec,
                version,
                now=manager.now(),
                registry_auth=auth,
                registry_auth_from=auth_from,
                by_admin=by_admin,
                by=author_of(request),
            )
        case "previous":
            roll_back = bounded(control.rollback_service, stack_of(service.spec.labels), is_admin=by_admin)
            await manager.update(
                unfrozen(request, roll_back, stack_of(service.spec.labels)),
                service.id,
                spec,
                version,
                now=manager.now(),
                by=author_of(request),
            )
        case word:
            raise Untranslated(f"unrecognized rollback option {word}")
    view = manager.store.view()
    changed = view.lookup(Service, service.id)
    warnings = []
    if changed is not None:
        warnings = room_warnings(view, changed) + _secret_warnings(changed.spec)
        warnings += [*spec_warnings(changed.spec, view.find(Node))]
        warnings += dropped_warnings(view, changed, auth, kept)
    return json_response({"Warnings": warnings or None})


class ServiceChange(ApiObject):
    """A service to create, or a service at ``version`` to update."""

    spec: ServiceSpec
    id: ServiceId = ServiceId("")
    version: int = 0
    registry_auth: str = ""
    """Same as the header ``X-Registry-Auth``."""


class ServiceChanged(ApiObject):
    """Result of one change.

    ``error`` tells why the service was not changed.  ``warnings`` are the same as in responses to single requests.
    """

    id: ServiceId = ServiceId("")
    error: str = ""
    warnings: tuple[str, ...] = ()


@routes.post("/skep/services/changes")
async def change_services(request: web.Request) -> web.StreamResponse:
    """Create or update services independently, like single requests but with far fewer writes.

    An update without registry credentials keeps the service's credentials, if its image stays on that registry.
    """
    changes = await read_changes(request)
    manager = manager_of(request)
    await manager.require_room(creates=any(not one.id for one in changes))
    view = await current_view(request)
    now, by_admin, revision = manager.now(), identity_of(request).is_admin, deploy_of(request)
    by = author_of(request)
    among = visible_to(view, identity_of(request))

    def change(tx: Transaction, one: ServiceChange) -> Service:
        stack = stack_of(one.spec.labels)
        if revision:
            require_current(tx, revision, stack)
        spec = settled(control.with_network_ids(view, one.spec, among))
        if one.id:
            return bounded(control.update_service, stack, is_admin=by_admin)(
                tx,
                one.id,
                spec,
                one.version,
                now=now,
                registry_auth=one.registry_auth,
                by_admin=by_admin,
                by=by,
            )
        return bounded(control.create_service, stack, is_admin=by_admin)(
            tx,
            spec,
            new_id=manager.new_id,
            new_name=manager.new_name,
            now=now,
            registry_auth=one.registry_auth,
            by_admin=by_admin,
            by=by,
        )

    kept = {one.id: shown_auth(view, one.id) for one in changes if one.id}

    def unless_frozen(tx: Transaction, one: ServiceChange) -> Service:
        before = stack_of_service(tx.lookup(Service, one.id))
        return unfrozen(request, change, before, stack_of(one.spec.labels), is_fenced=True)(tx, one)

    results = await manager.store.update_each(unless_frozen, changes)
    after = manager.store.view()
    request[CHANGED_SERVICES] = [one.spec.name for one in results if isinstance(one, Service)]

    def changed(one: ServiceChange, result: Service | SkepError) -> ServiceChanged:
        if isinstance(result, SkepError):
            error = shown_error(identity_of(request), result)
            return ServiceChanged(error=str(error) or type(error).__name__)
        warnings = [*spec_warnings(result.spec, after.find(Node))]
        warnings += dropped_warnings(after, result, one.registry_auth, kept.get(one.id, ""))
        return ServiceChanged(id=result.id, warnings=tuple(warnings))

    return json_response([changed(*pair) for pair in zip(changes, results, strict=True)])


async def read_changes(request: web.Request) -> tuple[ServiceChange, ...]:
    """Return the changes in the body of ``request``.  Raises: InvalidArgument."""
    changes = await read_json(request, tuple[ServiceChange, ...], unrecognized=UNRECOGNIZED)
    if len(changes) > _TOGETHER_MAX:
        raise InvalidArgument(f"a request can change at most {_TOGETHER_MAX} services")
    return changes


@routes.delete("/services/{id}")
async def remove_service(request: web.Request) -> web.StreamResponse:
    """Remove a service, if it is at ``version`` or none is given.  Its tasks are stopped afterwards."""
    manager = manager_of(request)
    version = version_parameter(request, "service") if "version" in request.query else None
    service = (await current_view(request)).resolve(Service, request.match_info["id"])
    remove = fenced(control.remove_service, deploy_of(request), stack_of(service.spec.labels))
    remove = unfrozen(request, remove, stack_of(service.spec.labels), is_fenced=True)
    await manager.update(remove, service.id, now=manager.now(), version=version)
    return web.Response()


def deploy_of(request: web.Request) -> str:
    """Return the id of the stack revision whose deploy sent ``request``, or an empty text."""
    return request.headers.get(REVISION_HEADER, "")


async def read_spec(request: web.Request) -> ServiceSpec:
    """Return the spec in the body of ``request``.  Raises: InvalidArgument."""
    spec = await read_json(request, ServiceSpec, unrecognized=UNRECOGNIZED)
    return known_to(api_version(request), spec)


def known_to(version: ApiVersion, spec: ServiceSpec) -> ServiceSpec:
    """Return ``spec`` without the fields that API ``version`` does not have.

    Source: moby 20.10 and 28.5, api/server/router/swarm/helpers.go (adjustForAPIVersion).
    """
    template = spec.task_template
    container, placement, resources = template.container_spec, template.placement, template.resources
    if container is not None:
        container = _container_known_to(version, container)
    if version < _V1_40 and placement is not None:
        placement = replace(placement, max_replicas=0)
    mode = spec.mode
    if version < _V1_41:
        if resources is not None and resources.limits is not None:
            resources = replace(resources, limits=replace(resources.limits, pids=0))
        mode = replace(mode, replicated_job=None, global_job=None)
    if version < _V1_52 and resources is not None:
        resources = replace(resources, swap_bytes=None, memory_swappiness=None)
    return replace(
        spec,
        mode=mode,
        task_template=replace(template, container_spec=container, placement=placement, resources=resources),
    )


def _container_known_to(version: ApiVersion, container: ContainerSpec) -> ContainerSpec:
    privileges = container.privileges
    if version < _V1_40:
        if privileges is not None and privileges.credential_spec is not None:
            credential = replace(privileges.credential_spec, config="")
            privileges = replace(privileges, credential_spec=credential)
        configs = tuple(replace(config, runtime=None) for config in container.configs)
        container = replace(container, sysctls={}, configs=configs)
    if version < _V1_41:
        container = replace(container, capability_add=(), capability_drop=(), ulimits=())
    if version < _V1_44:
        if container.healthcheck is not None:
            container = replace(container, healthcheck=replace(container.healthcheck, start_interval=0))
        if privileges is not None:
            privileges = replace(privileges, seccomp=None, app_armor=None, no_new_privileges=False)
    if version < _V1_46:
        mounts = tuple(map(_without_tmpfs_options, container.mounts))
        container = replace(container, oom_score_adj=0, mounts=mounts)
    return replace(container, privileges=privileges)


def _without_tmpfs_options(mount: Mount) -> Mount:
    tmpfs = mount.tmpfs_options
    return mount if tmpfs is None else replace(mount, tmpfs_options=replace(tmpfs, options=()))


# -- whether the networks have addresses for all replicas ------------------------------------------------------------


_SERVICES_MAX = 2_000
"""If the cluster has more services, the check is skipped, because a create request must not block the event loop."""


def _secret_warnings(spec: ServiceSpec) -> list[str]:
    return [text] if (text := secret_env_warning(spec.task_template.container_spec)) else []


def room_warnings(view: View, service: Service) -> list[str]:
    """Return a warning for each network of ``service`` that it nearly fills or overfills."""
    services = view.find(Service)
    wanted = dict.fromkeys(_targets(service), 0)
    if not wanted or len(services) > _SERVICES_MAX:
        return []
    nodes = len(view.find(Node))
    for one in services:
        if one.removed_at is None and (shared := wanted.keys() & _targets(one)):
            number = _addresses(one, nodes)
            for target in shared:
                wanted[target] += number
    warnings = []
    for target, number in wanted.items():
        network = view.lookup(Network, target)
        if network is None or not is_overlay(network) or not has_addresses(network):
            continue
        size = usage_of(network, 0).size
        if number >= NEARLY_FULL * size:
            state = "too small" if number > size else "nearly full"
            warnings.append(
                f"network {network.spec.name} is {state}: its services need {number} addresses, and it has {size}: "
                f"add a subnet with skep network update --subnet-add SUBNET {network.spec.name}"
            )
    return warnings


def _targets(service: Service) -> list[str]:
    wanted: Iterable[str] = (
        one.target for one in service.spec.task_template.networks or service.spec.networks
    )
    return list(wanted)


def _addresses(service: Service, nodes: int) -> int:
    """Return the number of addresses: one per task, and a virtual one unless the name resolves to the
    tasks' addresses.
    """
    mode, endpoint = service.spec.mode, service.spec.endpoint_spec
    virtual = 0 if endpoint is not None and endpoint.mode == "dnsrr" else 1
    if mode.global_ is not None or mode.global_job is not None:
        return nodes + virtual
    if mode.replicated_job is not None:
        return (mode.replicated_job.max_concurrent or 1) + virtual
    return service.spec.replicas + virtual
