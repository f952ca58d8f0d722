"""Bodies and filters of ``/networks``, for both a cluster's networks and a node's own.

Source: moby 20.10, api/types/network, api/server/router/network/filter.go, daemon/network.go, daemon/network/filter.go,
libnetwork/network.go (validateConfiguration), libnetwork/controller.go (NewNetwork).
"""

import re
from collections.abc import Iterable, Mapping
from ipaddress import ip_interface, ip_network
from typing import Any

import msgspec

from skep.api.errors import Forbidden, Untranslated
from skep.api.formats.filters import Filters
from skep.api.http.versions import ApiVersion
from skep.errors import InvalidArgument, NotFound
from skep.model.network import ConfigReference
from skep.model.networks.addresses import is_subnet
from skep.model.values.encoding import ApiObject, always

NAMES_OF_THE_ENGINE = frozenset({"bridge", "host", "none", "default"})
"""Names that a user's network cannot have."""
BUILTIN = frozenset({"bridge", "host", "none"})
DRIVERS_OF_NODES = frozenset({"bridge", "macvlan", "ipvlan", "host", "null"})
LIST_FILTERS = ("dangling", "driver", "id", "label", "name", "scope", "type")
PRUNE_FILTERS = ("label", "label!", "until")
SWARM, LOCAL = "swarm", "local"
_V1_48 = ApiVersion("1.48")
_V1_52 = ApiVersion("1.52")
_UINT64_MAX = 2**64 - 1
"""Largest number in the response, because clients decode it as Go's ``uint64``."""
PREDEFINED_LABEL = "com.docker.swarm.predefined"
"""Label of a cluster network that represents a network of every node."""


class SubnetBody(ApiObject):
    """One subnet of a network, in the spelling of ``/networks``."""

    __go_name__ = "network.IPAMConfig"

    subnet: str = ""
    ip_range: str = msgspec.field(name="IPRange", default="")
    gateway: str = ""
    auxiliary_addresses: Mapping[str, str] = {}


class IPAMBody(ApiObject):
    """The addresses of a network, as in requests and responses."""

    __go_name__ = "network.IPAM"

    driver: str = always("")
    options: Mapping[str, str] | None = always(None)
    config: tuple[SubnetBody, ...] = always(())


class NetworkBody(ApiObject):
    """Body of ``POST /networks/create``."""

    __go_name__ = "types.NetworkCreateRequest"

    name: str = ""
    check_duplicate: bool = False
    driver: str = ""
    scope: str = ""
    enable_ipv4: bool | None = None
    enable_ipv6: bool = False
    ipam: IPAMBody | None = None
    internal: bool = False
    attachable: bool = False
    ingress: bool = False
    config_only: bool = False
    config_from: ConfigReference | None = None
    options: Mapping[str, str] = {}
    labels: Mapping[str, str] = {}

    @property
    def config_source(self) -> str:
        """Name of the node-local network from which this network takes its settings, or empty."""
        return self.config_from.network if self.config_from is not None else ""

    @property
    def is_of_cluster(self) -> bool:
        """Whether the managers create the network.  Otherwise the node creates it for itself."""
        return not self.config_only and (self.driver == "overlay" or self.scope == SWARM or self.ingress)


class ConnectBody(ApiObject):
    """Body of ``POST /networks/{id}/connect`` and ``/disconnect``, without the settings of the endpoint."""

    __go_name__ = "types.NetworkConnect"

    container: str = ""
    force: bool = False


class SubnetsBody(ApiObject):
    """Body of ``POST /networks/{id}/update``, a Skep extension: subnets to add."""

    subnets_add: tuple[SubnetBody, ...] = ()


def check_name(name: str) -> None:
    """Refuse the names of the engine's own networks.  Raises: Forbidden, in the engine's words."""
    if name in NAMES_OF_THE_ENGINE:
        raise Forbidden(f"operation is not permitted on predefined {name} network ")


def check_form(body: NetworkBody) -> None:
    """Refuse everything that the engine refuses before it searches a free subnet, with the same messages in the same
    order.

    Raises:
        Forbidden, NotFound: The engine refuses the settings.
        Untranslated: A subnet is invalid.
    """
    for config in body.ipam.config if body.ipam is not None else ():
        if config.subnet and not is_subnet(config.subnet):
            raise Untranslated(f"Invalid subnet {config.subnet} : invalid CIDR address: {config.subnet}")
    if body.enable_ipv4 is False:
        raise InvalidArgument("IPv4 cannot be disabled: leave EnableIPv4 out")
    if body.config_only:
        if body.ingress or body.internal or body.attachable or body.scope:
            raise Forbidden(
                "configuration network can only contain network specific fields. Network operator fields like "
                "[ ingress | internal | attachable | scope ] are not supported."
            )
        if body.config_source:
            raise Forbidden("a configuration network cannot depend on another configuration network")
        return
    if body.config_source:
        _check_dependent(body)
    if body.driver and body.driver not in DRIVERS_OF_NODES | {"overlay"}:
        raise NotFound(f'plugin "{body.driver}" not found')
    if body.scope not in ("", LOCAL, SWARM):
        raise InvalidArgument(f"invalid scope: {body.scope}")
    if body.scope == LOCAL and body.driver == "overlay":
        raise Forbidden("cannot downgrade network scope for overlay networks")
    if body.ingress and body.driver in DRIVERS_OF_NODES:
        raise Forbidden("Ingress network can only be global scope network")


def _check_dependent(body: NetworkBody) -> None:
    ipam = body.ipam or IPAMBody()
    named = any(config != SubnetBody() for config in ipam.config)
    if body.labels or body.enable_ipv6 or ipam.options or named or ipam.driver not in ("", "default"):
        raise Forbidden(
            "user specified configurations are not supported if the network depends on a configuration network"
        )
    if body.options:
        raise Forbidden(
            "network driver options are not supported if the network depends on a configuration network"
        )


def known_to(version: ApiVersion, shown: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a network of a response without the fields that API ``version`` does not have."""
    unknown = {"Status"} if version < _V1_52 else set[str]()
    if version < _V1_48:
        unknown.add("EnableIPv4")
    return {name: value for name, value in shown.items() if name not in unknown}


def ipam_status(configs: Iterable[SubnetBody], addresses: Iterable[str]) -> dict[str, Any]:
    """Return ``Status`` of a network: the used and free addresses of each subnet.

    As in the engine, the subnet's first address, the last of an IPv4 subnet, the gateway and auxiliary addresses count
    as used, and only addresses of the range are free.

    Args:
        addresses: Addresses of the network's users, with or without a prefix length.
    """
    users = {ip_interface(one).ip for one in addresses}
    subnets = {}
    for config in configs:
        subnet = ip_network(config.subnet, strict=False)
        span = ip_network(config.ip_range or config.subnet, strict=False)
        named = [*config.auxiliary_addresses.values(), *([config.gateway] if config.gateway else [])]
        used = {int(ip_interface(one).ip) for one in named} | {int(subnet.network_address)}
        used |= {int(one) for one in users if one in subnet}
        if subnet.version == 4:
            used.add(int(subnet.broadcast_address))
        taken = sum(int(span.network_address) <= one <= int(span.broadcast_address) for one in used)
        subnets[config.subnet] = {
            "IPsInUse": len(used),
            "DynamicIPsAvailable": min(span.num_addresses - taken, _UINT64_MAX),
        }
    return {"IPAM": {"Subnets": subnets}}


class NetworkFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The properties of a network that filters match."""

    id: str
    name: str
    driver: str
    scope: str
    labels: Mapping[str, str] = {}
    is_used: bool = False


def check_list_filters(filters: Filters) -> None:
    """Check the filters of a list.  Raises: InvalidArgument, Untranslated: an unknown filter or value."""
    filters.refuse_unknown(*LIST_FILTERS)
    for word in filters["type"]:
        if word not in {"custom", "builtin"}:
            raise Untranslated(f"invalid filter: 'type'='{word}'")
    _dangling(filters)


def fits(facts: NetworkFacts, filters: Filters) -> bool:
    """Return whether the network matches the filters."""
    dangling = _dangling(filters)
    is_builtin = facts.scope == LOCAL and facts.name in BUILTIN
    is_dangling = not is_builtin and not facts.is_used
    return (
        filters.matches("driver", facts.driver)
        and _matches_part(filters["name"], facts.name)
        and _matches_part(filters["id"], facts.id)
        and filters.matches_labels("label", facts.labels)
        and filters.matches("scope", facts.scope)
        and filters.matches("type", "builtin" if is_builtin else "custom")
        and (dangling is None or dangling == is_dangling)
    )


def _matches_part(wanted: Iterable[str], text: str) -> bool:
    """Return whether ``text`` contains one of ``wanted``, with ``^`` and ``$`` for its start and end.

    The engine uses regular expressions.  Skep does not, because a client's expression could keep the process busy for
    hours.
    """
    words = list(wanted)
    return not words or any(_pattern(word).search(text) for word in words)


def _pattern(word: str) -> re.Pattern[str]:
    start, end = "^" * word.startswith("^"), "$" * word.endswith("$")
    return re.compile(start + re.escape(word.removeprefix("^").removesuffix("$")) + end)


def _dangling(filters: Filters) -> bool | None:
    match filters["dangling"]:
        case ():
            return None
        case (word,) if word.lower() in {"0", "f", "false"}:
            return False
        case (word,) if word.lower() in {"1", "t", "true"}:
            return True
        case (_,):
            raise InvalidArgument(
                'invalid value for filter \'dangling\', must be "true" (or "1"), or "false" (or "0")'
            )
        case _:
            raise InvalidArgument('got more than one value for filter key "dangling"')
