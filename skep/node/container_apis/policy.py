"""Decides by ``api.access.permissions`` which requests a container may make on its socket of the Engine API.

With read-only access, values that may be secrets are removed from JSON documents.  Names of variables and options stay,
so that a dashboard still shows which ones exist.
"""

import re
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Final
from urllib.parse import unquote

import msgspec

from skep.aio.time_slices import SlicedWork
from skep.api.access.permissions import rule_for
from skep.api.http.framing import path_of, plain_path, raw_path_of
from skep.errors import PermissionDenied, Unavailable
from skep.model.permissions.rights import API_LABEL, ApiAccess

_OUTPUT = re.compile(r"(last health check: |, last line |, last: ).*", re.DOTALL)
"""Matches the part of a task's error that quotes output of a container or health check (``manager.diagnosis.reasons``).
"""
_USER = re.compile(r"//[^/]*@")


class ResponsePassing(Enum):
    """Way of passing a response to the container."""

    AS_IT_IS = "as it is"
    REDACTED = "redacted"
    """A JSON document without its secrets (``redacted``)."""


def check(access: ApiAccess, method: str, target: str) -> ResponsePassing:
    """Return how to pass a response on.  Raises: PermissionDenied: the container may not make the request."""
    if access is ApiAccess.FULL:
        return ResponsePassing.AS_IT_IS
    path = path_of(target)
    if method not in ("GET", "HEAD"):
        raise _refusal(access, f"{method} {path} changes something")
    if not _is_plain(raw_path_of(target)):
        raise _refusal(access, f"the path {path} is not a path that it serves")
    rule = rule_for(method, path)
    if rule.container is ApiAccess.READ or rule.container is access:
        # Join tokens are shown only with full access, because a machine with a token can become a manager.
        is_redacted = rule.is_document and (access is ApiAccess.READ or path == "/swarm")
        return ResponsePassing.REDACTED if is_redacted else ResponsePassing.AS_IT_IS
    raise _refusal(access, f"{method} {path} can reveal other users' secrets")


def _refusal(access: ApiAccess, why: str) -> PermissionDenied:
    needed = "full" if access is ApiAccess.INSPECT else "inspect or full"
    return PermissionDenied(
        f"this container's API socket is limited to {access.value} access: {why} "
        f"(the container label {API_LABEL}={needed} grants more, if the cluster allows it)"
    )


def _is_plain(path: str) -> bool:
    """Return whether no server can interpret ``path`` as another path."""
    words = unquote(path).split("/")
    is_clean = plain_path(path) == path and "%2f" not in path.lower()
    return path.startswith("/") and not {".", ".."} & set(words) and is_clean


def redacted(document: bytes) -> SlicedWork[bytes]:
    """Return ``document`` without values of environment variables, driver options, config data, and tokens.

    Raises: Unavailable: it is not JSON.
    """
    try:
        if not document.lstrip().startswith(b"["):
            return _encoded(document)
        found: list[bytes] = []
        for part in msgspec.json.decode(document, type=list[msgspec.Raw]):
            found.append(_encoded(part))
            yield  # pause, because lists of services and tasks can be long
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unavailable("the response cannot be shown to this container: it is not JSON") from error
    return b"[" + b",".join(found) + b"]\n"


def _encoded(document: bytes | msgspec.Raw) -> bytes:
    return msgspec.json.encode(_clean(msgspec.json.decode(document)))


def _clean(value: Any) -> Any:
    if isinstance(value, list):
        return [_clean(one) for one in value]
    if not isinstance(value, dict):
        return value
    cleaned = {key: _RULES[key](one) if key in _RULES else _clean(one) for key, one in value.items()}
    if "Mountpoint" in cleaned:  # a volume
        cleaned["Options"] = _emptied(value.get("Options"))
    return cleaned


def _names(value: Any) -> Any:
    """Return ``["A="]`` for ``["A=1"]``, because programs read a variable without ``=`` as unset."""
    if not isinstance(value, list):
        return None
    return [f"{str(one).partition('=')[0]}=" for one in value]


def _emptied(value: Any) -> Any:
    """Return the same names with empty values.  Values may be tokens and passwords."""
    return dict.fromkeys(value, "") if isinstance(value, dict) else None


def _of_driver(value: Any) -> Any:
    """Remove the values of a driver's ``Options``.  A driver that is given only by name has no options."""
    if not isinstance(value, dict):
        return value
    secret = {key: _emptied(value[key]) for key in ("Options", "Config") if key in value}
    return {**_clean(value), **secret}


def _empty(value: Any) -> Any:
    """Remove a config's data.  ``GraphDriver.Data`` of a container stays, because it only has directories."""
    return _clean(value) if isinstance(value, dict) else ""


def _of_health(value: Any) -> Any:
    """Remove the output of health checks, which counts as log output."""
    if not isinstance(value, dict) or not isinstance(value.get("Log"), list):
        return _clean(value)
    return {**_clean(value), "Log": [{**_clean(one), "Output": ""} for one in value["Log"]]}


def _of_end(value: Any) -> Any:
    """Remove the last lines from the end of a task, which are log output."""
    return (
        {**_clean(value), "Lines": [], "HealthOutput": "", "HealthCommand": ""}
        if isinstance(value, dict)
        else value
    )


def _of_error(value: Any) -> Any:
    """Remove the output of the task or its health check with which the reason of a failure may end."""
    return _OUTPUT.sub(r"\1", value) if isinstance(value, str) else _clean(value)


def _of_authorities(value: Any) -> Any:
    """Remove the options of external certificate authorities, which may have credentials."""
    return [_of_driver(one) for one in value] if isinstance(value, list) else None


def _without_user(value: Any) -> Any:
    return _USER.sub("//", value) if isinstance(value, str) else value


_RULES: Final[Mapping[str, Callable[[Any], Any]]] = {
    "Env": _names,
    "Data": _empty,
    "JoinTokens": _emptied,
    "SigningCAKey": _empty,
    "Driver": _of_driver,
    "DriverConfig": _of_driver,
    "Templating": _of_driver,
    "ExternalCAs": _of_authorities,
    "Health": _of_health,
    "End": _of_end,
    "Err": _of_error,
    "Message": _of_error,
    "LogDriver": _of_driver,
    "LogConfig": _of_driver,
    "HttpProxy": _without_user,
    "HttpsProxy": _without_user,
}
