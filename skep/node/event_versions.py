"""Events in the form of each version of the Engine API.

Source: moby, api/docs/CHANGELOG.md, daemon/server/router/system/system_routes.go (getEvents, backFillLegacy),
daemon/server/httputils/contenttype.
"""

from collections.abc import Mapping
from typing import Any

from skep.api.http.responses import JSON_SEQUENCE
from skep.api.http.versions import ApiVersion

_V1_52 = ApiVersion("1.52")
_V1_53 = ApiVersion("1.53")
_NEWLINE_DELIMITED, _JSON_LINES = "application/x-ndjson", "application/jsonl"
_LEGACY = ("status", "id", "from")
"""Fields that only clients before API 1.22 need, and that versions before 1.52 still have."""


def known_to(version: ApiVersion, message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an event in the form of API ``version``.

    Events of a new Docker Engine on the machine lack the legacy fields, so older versions get them here.
    """
    if version >= _V1_52:
        return {name: value for name, value in message.items() if name not in _LEGACY}
    type, actor = message["Type"], message["Actor"]
    if type not in ("container", "image"):
        return message
    legacy = {"status": message["Action"], "id": actor["ID"]}
    if type == "container":
        legacy["from"] = actor["Attributes"].get("image", "")
    return {**legacy, **message}


def content_type_for(version: ApiVersion, accept: str) -> str:
    """Return the media type of the stream, which ``accept`` prefers by name, or else the version's default.

    Wildcards do not count, because clients that send them may not know the newer media types.
    """
    if version < _V1_52:
        return "application/json"
    known = (_NEWLINE_DELIMITED, JSON_SEQUENCE, *((_JSON_LINES,) if version >= _V1_53 else ()))
    preferred, best = known[-1] if version >= _V1_53 else _NEWLINE_DELIMITED, 0.0
    for part in accept.split(","):
        name, *parameters = (word.strip() for word in part.lower().split(";"))
        quality = _quality(parameters)
        if name in known and quality > best:
            preferred, best = name, quality
    return preferred


def _quality(parameters: list[str]) -> float:
    for one in parameters:
        name, _, value = one.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0
