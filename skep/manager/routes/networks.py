"""``/networks``: those of the cluster.  The front adds a node's own.

Source: moby 20.10, api/server/router/network/network_routes.go, daemon/cluster/convert/network.go.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from aiohttp import web

from skep.api.errors import Untranslated
from skep.api.server import Filters, Routes, json_answer, json_list_answer, read_json
from skep.errors import AlreadyExists, InvalidArgument, NotFound
from skep.manager.control import networks as control
from skep.manager.routes.access import current_view, manager_of, wrapped_flag
from skep.manager.routes.shown import damage_of
from skep.model.encoding import ApiObject, always
from skep.model.meta import Driver
from skep.model.network import ConfigReference, IPAMConfig, IPAMOptions, Network, NetworkSpec
from skep.store.interface import View

routes = Routes()


class _Addresses(ApiObject):
    """One range of a network's addresses, in the spelling of ``/networks``."""

    __go_name__ = "network.IPAMConfig"

    subnet: str = ""
    ip_range: str = ""
    gateway: str = ""
    auxiliary_addresses: Mapping[str, str] = {}


class _IPAM(ApiObject):
    __go_name__ = "network.IPAM"

    driver: str = always("")
    options: Mapping[str, str] | None = always(None)
    config: tuple[_Addresses, ...] = always(())


class _NetworkBody(ApiObject):
    """Body of ``POST /networks/create``."""

    __go_name__ = "types.NetworkCreateRequest"

    name: str = ""
    check_duplicate: bool = False
    driver: str = ""
    scope: str = ""
    enable_ipv6: bool = False
    ipam: _IPAM | None = None
    internal: bool = False
    attachable: bool = False
    ingress: bool = False
    config_only: bool = False
    config_from: ConfigReference | None = None
    options: Mapping[str, str] = {}
    labels: Mapping[str, str] = {}


@routes.get("/networks")
async def list_networks(request: web.Request) -> web.StreamResponse:
    """The cluster's networks that fit the filters."""
    filters = Filters.of(request)
    filters.refuse_unknown("dangling", "driver", "id", "label", "name", "scope", "type")
    view = await current_view(request)
    return json_list_answer(
        [network for network in _visible(view) if _fits(network, filters)], partial(_shown, view)
    )


@routes.get("/networks/{id}")
async def inspect_network(request: web.Request) -> web.StreamResponse:
    """One network of the cluster."""
    wrapped_flag(request, "verbose")
    view = await current_view(request)
    return json_answer(_shown(view, _resolve(view, request.match_info["id"])))


@routes.post("/networks/create")
async def create_network(request: web.Request) -> web.StreamResponse:
    """Create a network of the cluster."""
    manager = manager_of(request)
    body = await read_json(request, _NetworkBody)
    _check_free(await current_view(request), body.name)
    _check_subnets(body)
    control.check_name(body.name)
    network = await manager.update(
        control.create_network, _spec(body), new_id=manager.new_id, now=manager.now()
    )
    return json_answer({"Id": network.id, "Warning": ""}, 201)


@routes.delete("/networks/{id}")
async def remove_network(request: web.Request) -> web.StreamResponse:
    """Remove a network that no service uses."""
    network = _resolve(await current_view(request), request.match_info["id"])
    await manager_of(request).update(control.remove_network, network.id)
    return web.Response(status=204)


def _visible(view: View) -> list[Network]:
    """The node-local networks every cluster has are shown by each node for itself."""
    return [
        network
        for network in view.find(Network)
        if network.spec.labels.get(control.PREDEFINED_LABEL) != "true"
    ]


def _resolve(view: View, word: str) -> Network:
    """Raises: NotFound in the network router's words; InvalidArgument: several ids begin like this."""
    try:
        return view.resolve(Network, word)
    except NotFound:
        raise NotFound(f"network {word} not found") from None


def _check_free(view: View, name: str) -> None:
    """The engine refuses a taken name before it looks at anything else.  Raises: AlreadyExists."""
    if name and view.find(Network, name=name):
        raise AlreadyExists(f"network with name {name} already exists")


def _check_subnets(body: _NetworkBody) -> None:
    """The engine reads subnets before it asks the cluster, and gives that error no class.  Raises: Untranslated."""
    for config in body.ipam.config if body.ipam is not None else ():
        if config.subnet and not control.is_subnet(config.subnet):
            raise Untranslated(f"Invalid subnet {config.subnet} : invalid CIDR address: {config.subnet}")


def _spec(body: _NetworkBody) -> NetworkSpec:
    ipam = None
    if body.ipam is not None:
        ipam = IPAMOptions(
            driver=Driver(name=body.ipam.driver or "default", options=body.ipam.options or {}),
            configs=tuple(
                IPAMConfig(subnet=config.subnet, range=config.ip_range, gateway=config.gateway)
                for config in body.ipam.config
            ),
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
        config_from=body.config_from if body.config_from and body.config_from.network else None,
    )


def _fits(network: Network, filters: Filters) -> bool:
    return (
        filters.matches("driver", _driver(network).name)
        and _matches_pattern(filters["name"], network.spec.name)
        and _matches_pattern(filters["id"], network.id)
        and filters.matches_labels("label", network.spec.labels)
        and filters.matches("scope", "swarm")
        and _is_of_type(filters)
        and _is_dangling(filters)
    )


def _matches_pattern(wanted: tuple[str, ...], text: str) -> bool:
    """The engine takes these for regular expressions; here they are parts of the text.

    A regular expression from outside could keep the manager busy for hours.
    """
    return not wanted or any(re.search(re.escape(word.strip("^$")), text) for word in wanted)


def _is_of_type(filters: Filters) -> bool:
    for word in filters["type"]:
        if word not in {"custom", "builtin"}:
            raise InvalidArgument(f"invalid filter: 'type'='{word}'")
    return filters.matches("type", "custom")


def _is_dangling(filters: Filters) -> bool:
    """Whether anybody uses a cluster's network is not known here; none counts as dangling."""
    match filters["dangling"]:
        case ():
            return True
        case (word,) if word.lower() in {"0", "f", "false"}:
            return True
        case (word,) if word.lower() in {"1", "t", "true"}:
            return False
        case (_,):
            raise InvalidArgument(
                'invalid value for filter \'dangling\', must be "true" (or "1"), or "false" (or "0")'
            )
        case _:
            raise InvalidArgument('got more than one value for filter key "dangling"')


def _driver(network: Network) -> Driver:
    """What was allocated; before that, what was wished for."""
    if network.driver_state.name:
        return network.driver_state
    return network.spec.driver_configuration or Driver()


def _shown(view: View, network: Network) -> dict[str, Any]:
    """A cluster's network in the flat form of ``/networks``."""
    spec, driver = network.spec, _driver(network)
    ipam = network.ipam_options or spec.ipam_options or IPAMOptions()
    return {
        "Name": spec.name,
        "Id": network.id,
        "Created": network.created_at,
        "Scope": "swarm",
        "Driver": driver.name,
        "EnableIPv6": spec.ipv6_enabled,
        "IPAM": {
            "Driver": ipam.driver.name,
            "Options": dict(ipam.driver.options) or None,
            "Config": [
                _Addresses(subnet=config.subnet, ip_range=config.range, gateway=config.gateway)
                for config in ipam.configs
            ],
        },
        "Internal": spec.internal,
        "Attachable": spec.attachable,
        "Ingress": control.is_ingress(network),
        "ConfigFrom": {"Network": spec.config_from.network if spec.config_from else ""},
        "ConfigOnly": False,
        "Containers": None,
        "Options": dict(driver.options) or None,
        "Labels": dict(spec.labels) or None,
        **({"Damage": damage} if (damage := damage_of(view, Network, network.id)) else {}),
    }
