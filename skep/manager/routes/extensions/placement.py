"""``POST /skep/services/placement``: where services would run, and whether they fit.  Nothing is written."""

import asyncio
from collections.abc import AsyncIterator, Callable

from aiohttp import web
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.aio.time_slices import TimeSlices
from skep.api.access.identity import identity_of
from skep.api.access.permissions import sees
from skep.api.formats.service_form import UNRECOGNIZED, settled
from skep.api.http.server import Routes, json_list_response, read_json
from skep.errors import InvalidArgument, ResourceExhausted, SkepError
from skep.manager.control.validation.service_rules import check_service_spec
from skep.manager.routes.access import current_view, plan_slot
from skep.manager.scheduler.explaining.dry_run import DryRun, PlannedPlacement
from skep.manager.scheduler.explaining.explain import reserve_for
from skep.manager.scheduler.nodes.accounting import Accounting
from skep.model.network import Network
from skep.model.node import Node
from skep.model.options.labels import priority_of
from skep.model.permissions.access import Identity
from skep.model.service import REPLICAS_MAX, NetworkAttachmentConfig, Service, ServiceSpec
from skep.model.task import Task
from skep.model.values.stacks import stack_of
from skep.model.volume import Volume
from skep.store.interface import View
from skep.store.transactions.updates import batched

routes = Routes()

_PIECE = 250
"""Number of objects counted between two pauses for the event loop."""
_SERVICES_MAX = 2_000
"""Largest number of services in one request."""
_TASKS_MAX = REPLICAS_MAX
"""Largest number of tasks of all services together.  Placing them takes a manager some seconds, concurrently with its
other work.
"""
_WITHIN_S = 30.0
"""Timeout in seconds, from the moment when the request gets its slot."""


@routes.post("/skep/services/placement")
async def plan_placement(request: web.Request) -> web.StreamResponse:
    """Show where the tasks of each of these specs would be placed, one service after the other.

    The networks, secrets and configs need not exist yet.  The result of a spec that would be refused contains the
    refusal.
    """
    specs = await read_checked(request)
    async with plan_slot(request):
        try:
            async with asyncio.timeout(_WITHIN_S):
                view = await current_view(request)
                named = names_for(identity_of(request))
                dry_run = DryRun(view, await accounting_of(view), named)
                placements = [one async for one in _placements(dry_run, view, specs)]
        except TimeoutError as error:
            raise ResourceExhausted(
                f"placing {len(specs)} services takes more than {_WITHIN_S:g} s: send fewer services at once"
            ) from error
    return json_list_response(placements)


async def read_planned(request: web.Request) -> tuple[ServiceSpec, ...]:
    """Return the specs in the body of ``request``.  Raises: InvalidArgument."""
    return await read_json(request, tuple[ServiceSpec, ...], unrecognized=UNRECOGNIZED)


async def read_checked(request: web.Request) -> tuple[ServiceSpec, ...]:
    """Return the specs of a request.  Raises: InvalidArgument: they are too many for one request."""
    specs = await read_planned(request)
    view = await current_view(request)
    number = len(view.ids(Node))
    if len(specs) > _SERVICES_MAX or sum(_tasks(spec, number) for spec in specs) > _TASKS_MAX:
        raise InvalidArgument(f"too much at once: at most {_SERVICES_MAX} services with {_TASKS_MAX} tasks")
    return specs


def names_for(identity: Identity) -> Callable[[Service], str]:
    """Return a function that names services to ``identity``, and hides the names in stacks that it cannot see."""

    def name_of(service: Service) -> str:
        return (
            service.spec.name if sees(identity, stack_of(service.spec.labels)) else "services of other stacks"
        )

    return name_of


def _tasks(spec: ServiceSpec, nodes: int) -> int:
    job = spec.mode.replicated_job
    if spec.mode.name in ("global", "global-job"):
        return nodes
    return spec.replicas if job is None else job.max_concurrent or 0


async def _placements(
    dry_run: DryRun, view: View, specs: tuple[ServiceSpec, ...]
) -> AsyncIterator[PlannedPlacement]:
    slices = TimeSlices(SystemClock())
    for spec in sorted(specs, key=lambda one: -priority_of(one.labels)):  # in the scheduler's order
        try:
            wanted = settled(_with_ids(view, spec))
            check_service_spec(wanted)
            for step in dry_run.placing(wanted):
                await slices.yield_if_due()
                if step is not None:
                    yield step
        except SkepError as error:
            yield PlannedPlacement(name=spec.name, error=str(error))


def _with_ids(view: View, spec: ServiceSpec) -> ServiceSpec:
    """Replace the names of existing networks by ids.  Secrets and configs need not exist and keep their
    names as ids.
    """

    def resolved(one: NetworkAttachmentConfig) -> NetworkAttachmentConfig:
        found = view.find(Network, name=one.target)
        return replace(one, target=found[0].id) if found else one

    template = spec.task_template
    container = template.container_spec
    if container is not None:
        container = replace(
            container,
            secrets=tuple(replace(one, secret_id=one.secret_name) for one in container.secrets),
            configs=tuple(replace(one, config_id=one.config_name) for one in container.configs),
        )
    networks = tuple(map(resolved, template.networks))
    return replace(spec, task_template=replace(template, container_spec=container, networks=networks))


async def accounting_of(view: View) -> Accounting:
    """Return the resources of the nodes, and the reservations of tasks."""
    accounting = Accounting()
    for service in view.find(Service):
        accounting.affinities.set(service)
    for volume in view.find(Volume):
        accounting.update_volume(volume.id, volume)
    for some_nodes in batched(view.find(Node), _PIECE):
        for node in some_nodes:
            accounting.set_node(node)
        await asyncio.sleep(0)
    for some_tasks in batched(view.find(Task), _PIECE):
        for one in some_tasks:
            reserve_for(accounting, one, view)
        await asyncio.sleep(0)
    return accounting
