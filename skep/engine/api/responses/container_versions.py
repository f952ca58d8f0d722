"""Containers as older versions of the Engine API show them.

The other modules of this folder return all fields.  These functions remove the fields that a version does not have.

Source: moby, api/docs/CHANGELOG.md, daemon/server/router/container/{container_routes,inspect}.go.
"""

from collections.abc import Mapping
from typing import Any

from skep.api.http.versions import ApiVersion

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
    older = {**shown, "NetworkSettings": _with_networks(version, shown["NetworkSettings"])}
    if version >= _V1_52:
        config = _without(
            shown["Config"], "MacAddress", *(() if shown["Config"]["OnBuild"] else ("OnBuild",))
        )
        older["Config"] = config
        older["HostConfig"] = _without(shown["HostConfig"], "KernelMemoryTCP")
        older["NetworkSettings"] = _without(older["NetworkSettings"], *_LEGACY_SETTINGS)
    return older


def line_known_to(version: ApiVersion, shown: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return one line of ``docker ps`` in the form of API ``version``."""
    older = shown if version >= _V1_52 else _without(shown, "Health")
    return {**older, "NetworkSettings": _with_networks(version, shown["NetworkSettings"])}


def _with_networks(version: ApiVersion, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    if version >= _V1_48:
        return settings
    networks = {name: _without(one, "GwPriority") for name, one in settings["Networks"].items()}
    return {**settings, "Networks": networks}


def _without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}
