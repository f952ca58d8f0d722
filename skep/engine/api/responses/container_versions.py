"""Containers as older versions of the Engine API show them.

The other modules of this folder return the newest form.  These functions remove the fields that a version does not
have, and add those that a later version has removed.

Source: moby, api/docs/CHANGELOG.md, daemon/server/router/container/{container_routes,inspect}.go.
"""

from collections.abc import Mapping
from typing import Any

from skep.api.http.versions import ApiVersion

_V1_48 = ApiVersion("1.48")


def container_known_to(version: ApiVersion, shown: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``GET /containers/{id}/json`` in the form of API ``version``."""
    settings = shown["NetworkSettings"]
    return {**shown, "NetworkSettings": _with_networks(version, settings)}


def line_known_to(version: ApiVersion, shown: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return one line of ``docker ps`` in the form of API ``version``."""
    return {**shown, "NetworkSettings": _with_networks(version, shown["NetworkSettings"])}


def _with_networks(version: ApiVersion, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    if version >= _V1_48:
        return settings
    networks = {name: _without(one, "GwPriority") for name, one in settings["Networks"].items()}
    return {**settings, "Networks": networks}


def _without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}
