"""Containers as older versions of the Engine API show them.

The other modules of this folder return all fields.  These functions remove the fields that a version does not have.

Source: moby, api/docs/CHANGELOG.md, daemon/server/router/container/{container_routes,inspect}.go.
"""

from collections.abc import Mapping
from typing import Any

from skep.api.http.versions import ApiVersion

_V1_42 = ApiVersion("1.42")
_V1_44 = ApiVersion("1.44")
_V1_45 = ApiVersion("1.45")
_V1_46 = ApiVersion("1.46")
_V1_48 = ApiVersion("1.48")
_V1_52 = ApiVersion("1.52")
_LEGACY_SETTINGS = (
    *("Bridge", "HairpinMode", "LinkLocalIPv6Address", "LinkLocalIPv6PrefixLen", "SecondaryIPAddresses"),
    *(
        "SecondaryIPv6Addresses",
        "EndpointID",
        "Gateway",
        "GlobalIPv6Address",
        "GlobalIPv6PrefixLen",
        "IPAddress",
    ),
    *("IPPrefixLen", "IPv6Gateway", "MacAddress"),
)
"""Fields of ``NetworkSettings`` with the values of the network ``bridge``."""


def container_known_to(version: ApiVersion, shown: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``GET /containers/{id}/json`` in the form of API ``version``."""
    settings = shown["NetworkSettings"]
    if version < _V1_45:
        settings = _with_id_as_alias(shown, settings)
    older = {**shown, "NetworkSettings": _with_networks(version, settings)}
    if version >= _V1_42:
        older["HostConfig"] = _without(shown["HostConfig"], "KernelMemory", "KernelMemoryTCP")
    if version >= _V1_52:
        config = _without(
            shown["Config"], "MacAddress", *(() if shown["Config"]["OnBuild"] else ("OnBuild",))
        )
        older["Config"] = config
        older["NetworkSettings"] = _without(older["NetworkSettings"], *_LEGACY_SETTINGS)
    return older


def line_known_to(version: ApiVersion, shown: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return one line of ``docker ps`` in the form of API ``version``."""
    older = dict(shown) if version >= _V1_52 else _without(shown, "Health")
    if version < _V1_46:
        older["HostConfig"] = _without(shown["HostConfig"], "Annotations")
    return {**older, "NetworkSettings": _with_networks(version, shown["NetworkSettings"])}


def _with_networks(version: ApiVersion, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    newer = (("DNSNames", _V1_44), ("GwPriority", _V1_48))
    names = [name for name, since in newer if version < since]
    if not names:
        return settings
    networks = {network: _without(one, *names) for network, one in settings["Networks"].items()}
    return {**settings, "Networks": networks}


def _with_id_as_alias(shown: Mapping[str, Any], settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``settings`` with the container's short id and hostname among its aliases where it has names."""
    own = (shown["Id"][:12], shown["Config"]["Hostname"])
    networks = {
        name: {**one, "Aliases": list(filter(None, dict.fromkeys((*(one["Aliases"] or ()), *own))))}
        if one["DNSNames"]
        else one
        for name, one in settings["Networks"].items()
    }
    return {**settings, "Networks": networks}


def _without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}
