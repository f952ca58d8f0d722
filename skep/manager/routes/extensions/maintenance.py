"""Maintenance of a cluster: ``/skep/cluster/evict``, ``/skep/cluster/rotate-keys`` and ``/skep/backup``, and times in
which Skep changes nothing by itself: ``/skep/cluster/freezes``, ``/skep/cluster/freeze``, ``/skep/cluster/window``,
``/skep/stacks/{name}/freeze`` and ``/skep/stacks/{name}/window``.

``/skep/rebalance`` shows the moves that would spread tasks more evenly (``GET``), and starts or stops the run that
makes them (``POST``, ``DELETE``).  ``PUT`` of ``/skep/cluster/rebalance`` sets whether a run starts after nodes return.

``/skep/cluster/addresses`` lists (``GET``), adds (``POST``) and removes (``DELETE``) failover addresses.

An eviction removes a node and revokes every secret it has had.  All of them are Skep extensions.
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import TypeVar

import structlog
from aiohttp import web

from skep.aio.race import run_to_end
from skep.aio.time_slices import result_in_slices
from skep.api.access.identity import identity_of
from skep.api.access.permissions import sees
from skep.api.backups import BackupRequest
from skep.api.http.server import Routes, flag, json_response, read_json
from skep.errors import NotFound, ResourceExhausted, SkepError
from skep.manager.cluster import cluster_of
from skep.manager.eviction.steps import TEXTS, Eviction, begin, eviction_of
from skep.manager.failover.editing import add_address, remove_address, shown_addresses
from skep.manager.notify.records import note_backup
from skep.manager.rebalance.plan import Balance, loads_of
from skep.manager.rebalance.records import (
    RebalancePlan,
    Rebalancing,
    rebalancing_in,
    set_after_return,
    start_run,
    stop_run,
)
from skep.manager.routes.access import ManagerApi, current_view, manager_of, plan_slot
from skep.manager.routes.guard.audit import SENT_RESPONSE, author_of
from skep.manager.services.freezes import end_freeze, held_by, set_freeze, set_window
from skep.model.networks.failover import AddressRequest
from skep.model.options.freezes import CLUSTER, FreezeRequest, FreezesResponse, MaintenanceWindow
from skep.model.values.encoding import ApiObject, always
from skep.model.values.times import Timestamp
from skep.store.level import NOTIFICATIONS

T = TypeVar("T")
log = structlog.get_logger(__name__)

BY_CHARACTERS_MAX = 200
"""Characters of the requesting user's name."""

_BACKUP_RECORD_S = 5.0
"""Time limit in seconds for the record of a backup.  The backup itself is complete by then."""

_PLANNED_WITHIN_S = 60.0
"""Timeout of a plan in seconds, from the moment when the request gets its slot."""

routes = Routes()


class EvictionBody(ApiObject):
    """Body of the request: the node to evict, and the user who requests it."""

    node: str = ""
    """Id or name.  For a node that was already removed, its full id."""
    requested_by: str = ""
    keep_containers: bool = False
    """Keep the node's containers running alongside their replacements."""
    by: str = ""
    keep: bool = False
    """Former names of the two fields, which commands of earlier versions send."""

    @property
    def user(self) -> str:
        """The user who requests the eviction."""
        return self.requested_by or self.by

    @property
    def is_kept(self) -> bool:
        """Whether the node's containers keep running."""
        return self.keep_containers or self.keep


class ShownStep(ApiObject):
    """One step, described by its result."""

    text: str = always("")
    done: bool = always(False)


class ShownEviction(ApiObject):
    """An eviction and its progress.  ``requested_*`` tell which user requested it, through which manager, and when."""

    node_id: str = always("")
    hostname: str = always("")
    requested_by: str = always("")
    requested_via: str = always("")
    requested_at: Timestamp = always(Timestamp(""))
    steps: tuple[ShownStep, ...] = always(())
    waiting_for: str = always("")
    damaged: tuple[str, ...] = always(())
    """Keys of unreadable values in the store, which are not changed."""
    keep_containers: bool = always(False)
    """Whether the node's containers keep running."""
    complete: bool = always(False)


@routes.post("/skep/cluster/evict")
async def evict(request: web.Request) -> web.StreamResponse:
    """Start an eviction, or resume an interrupted one."""
    manager = manager_of(request)
    body = await read_json(request, EvictionBody)
    by = "".join(filter(str.isprintable, body.user))[:BY_CHARACTERS_MAX] or "a client of the API"
    eviction = await manager.update(
        begin, body.node, by, manager.own, manager.now(), keeps_containers=body.is_kept
    )
    log.warning(
        "eviction requested",
        node=eviction.node_id,
        name=eviction.hostname,
        by=by,
        manager=manager.own,
    )
    return json_response(shown(eviction))


@routes.get("/skep/cluster/evict")
async def show_eviction(request: web.Request) -> web.StreamResponse:
    """Show the last eviction.  Raises: NotFound: no node was evicted yet."""
    eviction = eviction_of(await current_view(request))
    if eviction is None:
        raise NotFound("no node was evicted yet")
    return json_response(shown(eviction))


def shown(eviction: Eviction) -> ShownEviction:
    """Return ``eviction`` for a response."""
    return ShownEviction(
        node_id=eviction.node_id,
        hostname=eviction.hostname,
        requested_by=eviction.asked_by,
        requested_via=eviction.asked_through,
        requested_at=eviction.asked_at,
        steps=tuple(ShownStep(text=TEXTS[step], done=step in eviction.done) for step in eviction.steps),
        waiting_for=eviction.waits_for,
        damaged=eviction.damaged,
        keep_containers=eviction.node_id in eviction.keeping,
        complete=eviction.next_step is None,
    )


@routes.post("/skep/backup")
async def backup(request: web.Request) -> web.StreamResponse:
    """Send a backup file.  If it is interrupted, its last piece is missing, which marks the file as incomplete.

    With ``dryRun``, only check whether the client may create a backup and whether it could be restored.
    """
    backups = manager_of(request).backups
    if flag(request, "dryRun"):
        backups.check()
        return web.Response()
    sealer = backups.begin(await read_json(request, BackupRequest))
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
    await response.prepare(request)
    try:
        async for piece in backups.pieces(sealer):
            await response.write(piece)
        await response.write_eof()
    except SkepError as error:
        await _record(manager_of(request), str(error))
        raise
    request[SENT_RESPONSE] = response
    await run_to_end(_record(manager_of(request)))
    return response


async def _record(manager: ManagerApi, error: str = "") -> None:
    """Record the end of a backup for notifications, unless the managers have no quorum: a backup needs none."""
    if manager.store.view().level < NOTIFICATIONS:
        return
    with suppress(SkepError, TimeoutError):
        async with asyncio.timeout(_BACKUP_RECORD_S):
            await manager.update(note_backup, error, manager.clock.now_ns())


@routes.post("/skep/cluster/rotate-keys")
async def rotate_keys(request: web.Request) -> web.StreamResponse:
    """Start a rotation of the data keys."""
    await manager_of(request).store.rotate_data_key()
    return web.Response()


@routes.get("/skep/cluster/freezes")
async def list_freezes(request: web.Request) -> web.StreamResponse:
    """Show the freezes in force, and the windows.  Users see those of the cluster and of their stacks."""
    swarm, identity = cluster_of(await current_view(request)), identity_of(request)

    def seen(found: Mapping[str, T]) -> Mapping[str, T]:
        return {
            scope: one for scope, one in sorted(found.items()) if scope == CLUSTER or sees(identity, scope)
        }

    return json_response(
        FreezesResponse(
            freezes=seen(swarm.change_freezes), window=swarm.window, stack_windows=seen(swarm.stack_windows)
        )
    )


@routes.put("/skep/cluster/freeze")
async def freeze_cluster(request: web.Request) -> web.StreamResponse:
    """Freeze the cluster, or renew its freeze."""
    return await _freeze(request, CLUSTER)


@routes.put("/skep/stacks/{name}/freeze")
async def freeze_stack(request: web.Request) -> web.StreamResponse:
    """Freeze a stack, or renew its freeze."""
    return await _freeze(request, request.match_info["name"])


async def _freeze(request: web.Request, scope: str) -> web.StreamResponse:
    manager, wanted = manager_of(request), await read_json(request, FreezeRequest)
    now_ns = manager.clock.now_ns()
    made = await manager.update(set_freeze, scope, wanted, by=author_of(request), now_ns=now_ns)
    return json_response(made)


@routes.delete("/skep/cluster/freeze")
async def unfreeze_cluster(request: web.Request) -> web.StreamResponse:
    """End the cluster's freeze."""
    await manager_of(request).update(end_freeze, CLUSTER)
    return web.Response(status=204)


@routes.delete("/skep/stacks/{name}/freeze")
async def unfreeze_stack(request: web.Request) -> web.StreamResponse:
    """End the freeze of a stack."""
    await manager_of(request).update(end_freeze, request.match_info["name"])
    return web.Response(status=204)


@routes.put("/skep/cluster/window")
async def put_window(request: web.Request) -> web.StreamResponse:
    """Set the maintenance window."""
    return await _set_window(request, CLUSTER)


@routes.put("/skep/stacks/{name}/window")
async def put_stack_window(request: web.Request) -> web.StreamResponse:
    """Set the maintenance window of a stack."""
    return await _set_window(request, request.match_info["name"])


async def _set_window(request: web.Request, scope: str) -> web.StreamResponse:
    manager, wanted = manager_of(request), await read_json(request, MaintenanceWindow)
    window = await manager.update(set_window, wanted, scope, now_ns=manager.clock.now_ns())
    return json_response(window)


@routes.delete("/skep/cluster/window")
async def remove_window(request: web.Request) -> web.StreamResponse:
    """Remove the maintenance window, so that Skep may act by itself at any time."""
    manager = manager_of(request)
    await manager.update(set_window, None, now_ns=manager.clock.now_ns())
    return web.Response(status=204)


@routes.delete("/skep/stacks/{name}/window")
async def remove_stack_window(request: web.Request) -> web.StreamResponse:
    """Remove the maintenance window of a stack."""
    manager = manager_of(request)
    await manager.update(set_window, None, request.match_info["name"], now_ns=manager.clock.now_ns())
    return web.Response(status=204)


@routes.get("/skep/rebalance")
async def plan_rebalance(request: web.Request) -> web.StreamResponse:
    """Show the moves.  Raises: ResourceExhausted: too many plans are made, or this one takes too long."""
    async with plan_slot(request):
        view = await current_view(request)
        try:
            async with asyncio.timeout(_PLANNED_WITHIN_S):
                clock = manager_of(request).clock
                planning = Balance(view, loads_of(view), clock.now_ns()).planning()
                moves = await result_in_slices(planning, clock)
        except TimeoutError as error:
            raise ResourceExhausted(f"the plan takes more than {_PLANNED_WITHIN_S:g} s") from error
    return json_response(
        RebalancePlan(moves=tuple(moves), rebalancing=rebalancing_in(view), held=held_by(view))
    )


@routes.post("/skep/rebalance")
async def start_rebalance(request: web.Request) -> web.StreamResponse:
    """Start a run.  Raises: FailedPrecondition: one is in progress, or the cluster is frozen."""
    manager = manager_of(request)
    return json_response(await manager.update(start_run, author_of(request), manager.now()))


@routes.delete("/skep/rebalance")
async def stop_rebalance(request: web.Request) -> web.StreamResponse:
    """Stop the run.  Raises: NotFound: there is none."""
    await manager_of(request).update(stop_run)
    return web.Response(status=204)


@routes.put("/skep/cluster/rebalance")
async def set_rebalance(request: web.Request) -> web.StreamResponse:
    """Set the wait after the return of a node.  Raises: InvalidArgument."""
    wanted = await read_json(request, Rebalancing)
    await manager_of(request).update(set_after_return, wanted.after_return_s)
    return web.Response(status=204)


@routes.get("/skep/cluster/addresses")
async def list_addresses(request: web.Request) -> web.StreamResponse:
    """List the failover addresses with their nodes."""
    return json_response(shown_addresses(await current_view(request)))


@routes.post("/skep/cluster/addresses")
async def create_address(request: web.Request) -> web.StreamResponse:
    """Add a failover address.  Raises: InvalidArgument: a node or network has it."""
    manager, wanted = manager_of(request), await read_json(request, AddressRequest)
    await manager.require_room(creates=True)
    await manager.update(add_address, wanted)
    return web.Response(status=201)


@routes.delete("/skep/cluster/addresses/{address}")
async def delete_address(request: web.Request) -> web.StreamResponse:
    """Remove a failover address.  Raises: NotFound."""
    await manager_of(request).update(remove_address, request.match_info["address"])
    return web.Response(status=204)
