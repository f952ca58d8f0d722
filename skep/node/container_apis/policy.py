"""Decides by ``api.access.permissions`` which requests a container may make on its socket of the Engine API."""

from enum import Enum
from urllib.parse import unquote

from skep.api.access.permissions import rule_for
from skep.api.http.framing import path_of, plain_path, raw_path_of
from skep.errors import PermissionDenied
from skep.model.permissions.rights import API_LABEL, ApiAccess


class ResponsePassing(Enum):
    """Way of passing a response to the container."""

    AS_IT_IS = "as it is"
    REDACTED = "redacted"
    """A JSON document without its secrets (``redaction``)."""


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
