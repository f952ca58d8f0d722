"""``/networks``: networks of the cluster.  The node adds its own (``engine/api/networks.py``).

Source: moby 20.10, api/server/router/network/network_routes.go, daemon/cluster/convert/network.go, daemon/prune.go.
"""

import structlog
from aiohttp import web

from skep.api.access.identity import identity_of
from skep.api.formats.filters import is_prunable, until_of
from skep.api.formats.networks import (
    PRUNE_FILTERS,
    NetworkBody,
    SubnetBody,
    SubnetsBody,
    check_form,
    check_list_filters,
    check_name,
    fits,
    known_to,
)
from skep.api.http.server import (
    Filters,
    Routes,
    api_version,
    json_list_response,
    json_response,
    read_json,
)
from skep.errors import AlreadyExists, FailedPrecondition, NotFound
from skep.manager.control import networks as control
from skep.manager.control.quotas import bounded
from skep.manager.routes.access import current_view, manager_of, wrapped_flag
from skep.manager.routes.network_answers import (
    describe_network,
    facts_of,
    is_predefined,
    shown,
    used_networks,
)
from skep.manager.services.quotas import usage_of_others
from skep.model.network import IPAMConfig, IPAMOptions, Network, NetworkSpec, is_ingress
from skep.model.values.meta import Driver
from skep.model.values.stacks import stack_of
from skep.store.interface import View

log = structlog.get_logger()

routes = Routes()


@routes.get("/networks")
async def list_networks(request: web.Request) -> web.StreamResponse:
    """List the cluster's networks that match the filters."""
    filters = Filters.of(request)
    check_list_filters(filters)
    view = await current_view(request)
    used = used_networks(view) if filters["dangling"] else frozenset[str]()
    found = [network for network in _visible(view) if fits(facts_of(network, used), filters)]
    version = api_version(request)
    return json_list_response(found, lambda network: known_to(version, shown(view, network)))


@routes.get("/networks/{id}")
async def inspect_network(request: web.Request) -> web.StreamResponse:
    """Show one network of the cluster."""
    verbose = wrapped_flag(request, "verbose")
    view = await current_view(request)
    network = _resolve(view, request.match_info["id"])
    described = await describe_network(view, network, verbose=verbose)
    return json_response(known_to(api_version(request), described))


@routes.post("/networks/create")
async def create_network(request: web.Request) -> web.StreamResponse:
    """Create a network of the cluster."""
    manager = manager_of(request)
    body = await read_json(request, NetworkBody)
    _check_free(await current_view(request), body.name)
    check_name(body.name)
    check_form(body)
    await manager.require_room(creates=True)
    create = bounded(
        control.create_network,
        stack_of(body.labels),
        is_admin=identity_of(request).is_admin,
        measure=usage_of_others,
    )
    network = await manager.update(create, spec_of_body(body), new_id=manager.new_id, now=manager.now())
    return json_response({"Id": network.id, "Warning": ""}, 201)


@routes.post("/networks/prune")
async def prune_networks(request: web.Request) -> web.StreamResponse:
    """Remove every unused network of the cluster that matches the filters, except the ingress network."""
    filters = Filters.of(request)
    filters.refuse_unknown(*PRUNE_FILTERS)
    manager = manager_of(request)
    until_ns = until_of(filters, manager.clock.now_ns())
    view = await current_view(request)
    removed = []
    for network in _visible(view):
        if is_ingress(network) or not is_prunable(network.created_at, network.spec.labels, filters, until_ns):
            continue
        try:
            await manager.update(control.remove_network, network.id)
        except (FailedPrecondition, NotFound) as error:  # in use, or removed in the meantime
            log.debug("network not pruned", network=network.spec.name, reason=str(error))
            continue
        removed.append(network.spec.name)
    return json_response({"NetworksDeleted": removed or None})


@routes.post("/networks/{id}/update")
async def update_network(request: web.Request) -> web.StreamResponse:
    """Add subnets to a network of the cluster, a Skep extension.  Adding the same subnet twice has no effect."""
    body = await read_json(request, SubnetsBody)
    network = _resolve(await current_view(request), request.match_info["id"])
    await manager_of(request).update(
        control.add_subnets, network.id, [_config(one) for one in body.subnets_add]
    )
    return web.Response(status=200)


@routes.delete("/networks/{id}")
async def remove_network(request: web.Request) -> web.StreamResponse:
    """Remove a network that no service uses."""
    network = _resolve(await current_view(request), request.match_info["id"])
    await manager_of(request).update(control.remove_network, network.id)
    return web.Response(status=204)


def _visible(view: View) -> list[Network]:
    return [network for network in view.find(Network) if not is_predefined(network)]


def _resolve(view: View, word: str) -> Network:
    """Return the network that ``word`` names.

    Raises:
        NotFound: No network matches, in the network router's words.
        InvalidArgument: Several ids start with ``word``.
    """
    try:
        return view.resolve(Network, word)
    except NotFound:
        raise NotFound(f"network {word} not found") from None


def _check_free(view: View, name: str) -> None:
    """Refuse a taken name, which the engine does before any other check.  Raises: AlreadyExists."""
    if name and view.find(Network, name=name):
        raise AlreadyExists(f"network with name {name} already exists")


def spec_of_body(body: NetworkBody) -> NetworkSpec:
    """Return the spec in a request's body."""
    ipam = None
    if body.ipam is not None:
        ipam = IPAMOptions(
            driver=Driver(name=body.ipam.driver or "default", options=body.ipam.options or {}),
            configs=tuple(map(_config, body.ipam.config)),
        )
    return NetworkSpec(
        name=body.name,
        labels=body.labels,
        driver_configuration=Driver(name=body.driver, options=body.options),
        ipv6_enabled=body.enable_ipv6,
        internal=body.internal,
        attachable=body.attachable,
        ingress=body.ingress,
        ipam_options=ipam,
        scope="swarm",
        config_from=body.config_from if body.config_source else None,
    )


def _config(body: SubnetBody) -> IPAMConfig:
    return IPAMConfig(
        subnet=body.subnet,
        range=body.ip_range,
        gateway=body.gateway,
        auxiliary_addresses=body.auxiliary_addresses,
    )
