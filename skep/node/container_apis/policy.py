"""Which requests a container may make on its own socket of the Engine API: a table of what is allowed, and no more."""

import re
from enum import Enum
from urllib.parse import parse_qsl, unquote

import msgspec

from skep.api.framing import path_of
from skep.errors import PermissionDenied
from skep.model.rights import API_LABEL, ApiAccess


class Passing(Enum):
    """How a response reaches the container."""

    AS_IT_IS = "as it is"
    REDACTED = "redacted"
    """A JSON document without its secrets (``redaction``)."""


class _Rule(msgspec.Struct, frozen=True):
    """Requests whose path matches are allowed with ``access`` and more."""

    pattern: re.Pattern[str]
    access: ApiAccess
    is_document: bool
    """One JSON document, which may contain secrets."""


def check(access: ApiAccess, method: str, target: str) -> Passing:
    """How the response to a request is passed on.  Raises: PermissionDenied: the container may not make it."""
    if access is ApiAccess.FULL:
        return Passing.AS_IT_IS
    path, query = path_of(target), target.partition("?")[2]
    if method not in ("GET", "HEAD"):
        raise _refusal(access, f"{method} {path} changes something")
    if not _is_plain(path):
        raise _refusal(access, f"the path {path} is not one of its paths")
    for rule in _RULES:
        if rule.pattern.fullmatch(path) and (rule.access is ApiAccess.READ or access is ApiAccess.INSPECT):
            if access is ApiAccess.READ and not _is_harmless(path, query):
                raise _refusal(access, "options of ps can show environment variables")
            # Join tokens make whoever has them a manager: they are shown with full access only.
            is_redacted = rule.is_document and (access is ApiAccess.READ or path == "/swarm")
            return Passing.REDACTED if is_redacted else Passing.AS_IT_IS
    raise _refusal(access, f"{method} {path} can show what others keep secret")


def _refusal(access: ApiAccess, why: str) -> PermissionDenied:
    needed = "full" if access is ApiAccess.INSPECT else "inspect or full"
    return PermissionDenied(
        f"this container's API socket is limited to {access.value} access: {why} "
        f"(the container label {API_LABEL}={needed} gives more, where the cluster allows it)"
    )


def _is_plain(path: str) -> bool:
    """Whether servers behind cannot read another path in it."""
    words = unquote(path).split("/")
    return path.startswith("/") and not {".", ".."} & set(words) and "%2f" not in path.lower()


_PS_OPTIONS = frozenset(("", "-ef", "aux", "-aux"))


def _is_harmless(path: str, query: str) -> bool:
    """Whether processes, if it is they that are listed, are listed without their environment (``ps e``)."""
    if not path.endswith("/top"):
        return True
    return all(name != "ps_args" or value in _PS_OPTIONS for name, value in parse_qsl(query, True))


def _rule(pattern: str, access: ApiAccess = ApiAccess.READ, *, is_document: bool = True) -> _Rule:
    return _Rule(re.compile(pattern), access, is_document)


_RULES = (
    _rule(r"/(?:_ping|version|events)", is_document=False),
    _rule(r"/info"),
    _rule(r"/containers/json"),
    _rule(r"/containers/[^/]+/(?:json|top)"),
    _rule(r"/containers/[^/]+/stats", is_document=False),
    _rule(r"/images/json"),
    _rule(r"/images/.+/json"),
    _rule(r"/(?:networks|volumes|services|tasks|nodes|secrets|configs)(?:/[^/]+)?"),
    _rule(r"/swarm"),
    # what others have as secrets may be in these
    _rule(r"/(?:containers|services|tasks)/[^/]+/logs", ApiAccess.INSPECT, is_document=False),
    _rule(r"/containers/[^/]+/changes", ApiAccess.INSPECT),
    _rule(r"/images/.+/history", ApiAccess.INSPECT),  # its lines have the values of ENV and ARG
    _rule(r"/exec/[^/]+/json", ApiAccess.INSPECT),
    _rule(r"/system/df", ApiAccess.INSPECT),
)
