"""Requests about a task's container that managers forward to the task's node, in one table for both sides.

A manager forwards the fields that are named here and no others, and encodes them again. A node checks them again,
because the manager may run an older version.
"""

from collections.abc import Mapping
from typing import Final
from urllib.parse import urlencode

import msgspec

from skep.api.access.permissions import why_not_ps
from skep.model.options.labels import EXEC, ExecPolicy, exec_policy
from skep.model.values.encoding import ApiObject

TASK_CONTAINER: Final = r"[0-9a-f]{12,64}|[A-Za-z0-9_.-]+\.[0-9a-z]{25}"
"""Pattern of the words that name a task's container on any node: an id with at least as many characters as
``docker ps`` shows, or a name, which ends with the whole task id."""


class ExecRequest(ApiObject):
    """The body of ``POST /containers/{id}/exec``."""

    __go_name__ = "types.ExecConfig"

    user: str = ""
    privileged: bool = False
    tty: bool = False
    attach_stdin: bool = False
    attach_stderr: bool = False
    attach_stdout: bool = False
    detach: bool = False
    detach_keys: str = ""
    env: tuple[str, ...] = ()
    working_dir: str = ""
    cmd: tuple[str, ...] = ()
    console_size: tuple[int, ...] = ()
    """Height and width (since API 1.42)."""


class ExecStart(ApiObject):
    """The body of ``POST /exec/{id}/start``."""

    __go_name__ = "types.ExecStartCheck"

    detach: bool = False
    tty: bool = False
    console_size: tuple[int, ...] = ()
    """Height and width (since API 1.42)."""


class Forwarded(msgspec.Struct, frozen=True):
    """A request that managers forward.

    Args:
        path: Pattern of the Engine API's path, without a version.
        parameters: Names of the query parameters that are forwarded. Others are dropped, as Docker ignores them.
        body: Type of the JSON body, or None if the request has none.
        is_upload: Whether the body is an archive, which is streamed.
        upgrades: Whether the connection may become a stream.
    """

    method: str
    path: str
    parameters: tuple[str, ...] = ()
    body: type[ExecRequest] | type[ExecStart] | None = None
    is_upload: bool = False
    upgrades: bool = False


_LOGS = ("stdout", "stderr", "since", "until", "timestamps", "details", "tail")

FORWARDED: Final = (
    Forwarded("GET", "/containers/{id}/json", ("size",)),
    Forwarded("GET", "/containers/{id}/top", ("ps_args",)),
    Forwarded("GET", "/containers/{id}/stats", ("stream", "one-shot")),
    Forwarded("GET", "/containers/{id}/logs", ("follow", *_LOGS)),
    Forwarded("POST", "/containers/{id}/wait", ("condition",)),
    Forwarded("HEAD", "/containers/{id}/archive", ("path",)),
    Forwarded("GET", "/containers/{id}/archive", ("path",)),
    Forwarded(
        "PUT",
        "/containers/{id}/archive",
        ("path", "noOverwriteDirNonDir", "copyUIDGID"),
        is_upload=True,
    ),
    Forwarded(
        "POST",
        "/containers/{id}/attach",
        ("stream", "logs", "stdin", "detachKeys", *_LOGS),
        upgrades=True,
    ),
    Forwarded("POST", "/containers/{id}/resize", ("h", "w")),
    Forwarded("POST", "/containers/{id}/kill", ("signal",)),
    Forwarded("POST", "/containers/{id}/exec", body=ExecRequest),
    Forwarded("POST", "/exec/{id}/start", body=ExecStart, upgrades=True),
    Forwarded("POST", "/exec/{id}/resize", ("h", "w")),
    Forwarded("GET", "/exec/{id}/json"),
)
"""No request of the table starts, changes or removes a container, because the cluster does that.  A container that a
signal ends is replaced according to its service's restart policy.
"""


def forwarded(method: str, path: str) -> Forwarded:
    """Return the entry of a request by the pattern of its path."""
    return next(one for one in FORWARDED if (one.method, one.path) == (method, path))


def query_of(request: Forwarded, query: Mapping[str, str]) -> str:
    """Return the query string to forward, with its question mark, or an empty string."""
    kept = {name: query[name] for name in request.parameters if name in query}
    return f"?{urlencode(kept)}" if kept else ""


def why_not(
    request: Forwarded,
    query: Mapping[str, str],
    labels: Mapping[str, str],
    execution: ExecRequest | None = None,
) -> str:
    """Return why only an administrator may make a request, or an empty string.

    Args:
        labels: Labels of the container.
        execution: Command that the request creates or starts.
    """
    if request.path.endswith("/top"):
        return why_not_ps(query.get("ps_args", ""))
    policy = exec_policy(labels)
    what = request.path.rpartition("/")[2]
    if policy is ExecPolicy.NONE and what in ("exec", "start", "attach", "archive", "kill"):
        return f"the service has the label {EXEC}={policy.value}: only administrators may do this"
    if policy is ExecPolicy.USER and request.is_upload:
        return f"the service has the label {EXEC}={policy.value}: only administrators may copy files in"
    if execution is None:
        return ""
    if execution.privileged:
        return "Privileged: only administrators may run a privileged command"
    if policy is ExecPolicy.USER and execution.user:
        return (
            f"the service has the label {EXEC}={policy.value}: only administrators may run a command as "
            f"the user {execution.user}"
        )
    return ""
