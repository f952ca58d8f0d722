"""``/swarm``: the cluster as a whole.  The node serves joining and leaving.

Source: moby 20.10, api/server/router/swarm/cluster_routes.go.
"""

from aiohttp import web
from msgspec.structs import replace

from skep.api.access.identity import identity_of
from skep.api.formats.swarm_requests import check_swarm_name
from skep.api.http.server import Routes, json_response, read_json
from skep.errors import AlreadyExists, InvalidArgument, PermissionDenied
from skep.manager.cluster import cluster_of, is_last_rotation_known
from skep.manager.control import pools
from skep.manager.control import swarm as control
from skep.manager.control.pools import PoolChange
from skep.manager.routes.access import ManagerApi, current_view, manager_of, strict_flag, version_parameter
from skep.manager.routes.representations import shown_swarm
from skep.model.swarm import JoinTokens, SwarmSpec, UnlockRequest
from skep.model.values.times import moment
from skep.security.locking import shown_unlock_key
from skep.security.rotation import is_about_roots
from skep.store.interface import View

KNOWN_WITHIN_S = 40.0
"""Seconds for which a root rotation waits until nodes and etcds know the previous one.  Nine managers take 30 s to
restart their etcds."""

LOOK_S = 0.2
"""Seconds between two checks of the etcds."""

routes = Routes()


@routes.get("/swarm")
async def inspect_swarm(request: web.Request) -> web.StreamResponse:
    """Show the cluster.  Its join tokens, with which a machine can become a manager, are for administrators only.

    Users below administrator are refused, because ``docker swarm join-token`` would print a command without a token.
    Containers and workers with read access get the cluster without its tokens.
    """
    view = await current_view(request)
    swarm = shown_swarm(view, cluster_of(view))
    identity = identity_of(request)
    if not identity.is_admin:
        if identity.is_user:
            raise PermissionDenied(
                f"{identity.name} may not GET /swarm: only administrators may see join tokens "
                "(docker info shows the cluster's settings)"
            )
        ca = replace(swarm.spec.ca_config, external_cas=())
        swarm = replace(swarm, join_tokens=JoinTokens(), spec=replace(swarm.spec, ca_config=ca))
    return json_response(swarm)


@routes.post("/swarm/update")
async def update_swarm(request: web.Request) -> web.StreamResponse:
    """Replace the cluster's settings, and rotate the tokens that the query names."""
    manager = manager_of(request)
    spec = await read_json(request, SwarmSpec)
    version = version_parameter(request, "swarm")
    rotations = control.Rotations(
        worker_token=_rotation(request, "rotateWorkerToken"),
        manager_token=_rotation(request, "rotateManagerToken"),
        unlock_key=_rotation(request, "rotateManagerUnlockKey"),
    )
    check_swarm_name(spec)
    now = moment(manager.clock.now_ns())
    was_locked = control.unlock_key_of(manager.store.view()) is not None
    view = await current_view(request)
    if is_about_roots(cluster_of(view).spec.ca_config, spec.ca_config):
        view = await _with_last_rotation_known(manager)
    swarm = cluster_of(view)
    prepared = await manager.external.prepare(swarm, control.roots_of(view, swarm), spec.ca_config)
    await manager.update(
        control.update_swarm, spec, version, rotations, new_id=manager.new_id, now=now, prepared=prepared
    )
    if spec.encryption_config.auto_lock_managers and not was_locked:
        # Until now, the keys on disks were not locked, so they must not decrypt data that is written from now on.
        await manager.store.rotate_data_key()
    return web.Response()


async def _with_last_rotation_known(manager: ManagerApi) -> View:
    """Return the view once all nodes and etcds trust the current root.  After ``KNOWN_WITHIN_S``, return it
    nevertheless, and the request is refused.
    """
    until = manager.clock.monotonic() + KNOWN_WITHIN_S
    while not is_last_rotation_known(view := manager.store.view()) and manager.clock.monotonic() < until:
        await manager.clock.sleep(LOOK_S)
    return view


def _rotation(request: web.Request, name: str) -> bool:
    try:
        return bool(strict_flag(request, name))
    except ValueError as error:
        raise InvalidArgument(f"invalid value for {name}: {error}") from error


@routes.post("/skep/cluster/resume")
async def resume_replacement(request: web.Request) -> web.StreamResponse:
    """Resume the replacement of tasks of down nodes."""
    await manager_of(request).update(control.resume_replacement)
    return web.Response()


@routes.post("/skep/cluster/pools")
async def change_pools(request: web.Request) -> web.StreamResponse:
    """Add and remove address pools.  Returns all resulting pools, in the form of ``GET /swarm``."""
    change = await read_json(request, PoolChange)
    swarm = await manager_of(request).update(pools.change_pools, change)
    return json_response({"DefaultAddrPool": swarm.default_addr_pool, "SubnetSize": swarm.subnet_size})


@routes.get("/swarm/unlockkey")
async def show_unlock_key(request: web.Request) -> web.StreamResponse:
    """Show the key that unlocks managers after a restart, or none while they are not locked."""
    key = control.unlock_key_of(await current_view(request))
    return json_response(UnlockRequest(unlock_key=shown_unlock_key(key) if key is not None else ""))


@routes.post("/swarm/unlock")
async def unlock_swarm(request: web.Request) -> web.StreamResponse:
    """Refuse to unlock: a manager that serves requests is not locked."""
    await read_json(request, UnlockRequest)
    raise AlreadyExists("swarm is not locked")
