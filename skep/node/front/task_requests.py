"""Redirects docker commands about a task's container to the manager if the user is not an administrator.

``docker exec``, ``attach``, ``cp`` and ``kill`` name a container.  The user's rights over this container follow from
its service, which only the manager knows.  So the request is changed into the request that ``skep exec`` would make.
The manager checks the user's role and the service's spec, records the request in the history, and forwards it to the
task's node, which checks it again.
"""

import re
from collections.abc import Callable
from typing import Protocol
from urllib.parse import unquote

import msgspec

from skep.api.access.permissions import may, rule_for, sees
from skep.errors import NotFound, PermissionDenied
from skep.model.permissions.access import EVERY_STACK, Identity, Role

_CONTAINER = re.compile(
    r"(?P<version>/v[0-9][0-9.]*)?/containers/(?P<name>[^/?]+)/(?P<what>[a-z]+)(?P<query>\?.*)?"
)
_REMOVAL = re.compile(r"(?:/v[0-9][0-9.]*)?/containers/(?P<name>[^/?]+)(?:\?.*)?")
_EXEC = re.compile(r"(?P<version>/v[0-9][0-9.]*)?/exec/(?P<id>[^/?]+)/(?P<what>[a-z]+)(?P<query>\?.*)?")
_TASK_REQUESTS = frozenset(("archive", "attach", "exec", "kill", "resize", "wait"))
_CLUSTER_REQUESTS = frozenset(("pause", "restart", "start", "stop", "unpause"))
_TASK = re.compile(r"[0-9a-z]+")


class TaskContainer(msgspec.Struct, frozen=True):
    """A container of this node that a user may see."""

    task: str = ""
    """The id of its task, or empty if it is a plain container."""
    stack: str = ""


_Find = Callable[[Identity, str], TaskContainer]


class VisibleTasks(Protocol):
    """The containers on this node that a user may see."""

    @property
    def has_docker_engine(self) -> bool:
        """Whether a Docker Engine of this machine may have other containers."""

    def container_of(self, identity: Identity, word: str) -> TaskContainer:
        """Return the container that ``word`` means to a user.  Raises: NotFound, InvalidArgument."""

    def container_of_exec(self, identity: Identity, id: str) -> TaskContainer:
        """Return the container in which exec ``id`` runs, if the user sees it.  Raises: NotFound."""


def as_task_request(identity: Identity, method: str, target: str, containers: VisibleTasks) -> str:
    """Return the path and query to request from the manager, or an empty string if this node answers the request.

    Args:
        target: Path and query as sent.

    Raises:
        PermissionDenied: Only the cluster may start, stop or remove this container.  Raised only for operators of its
            stack.
        NotFound: The user sees no such container, or no such exec.
        InvalidArgument: The id prefix matches several containers that the user may see.
    """
    if identity.is_admin:
        return ""
    try:
        return _task_request(identity, method, target, containers)
    except NotFound:
        # The container may belong to the Docker Engine, which only administrators may use.  The engine's refusal says
        # so.
        if containers.has_docker_engine and sees(identity, ""):
            return ""
        raise


def _task_request(identity: Identity, method: str, target: str, containers: VisibleTasks) -> str:
    if (found := _CONTAINER.fullmatch(target)) is not None:
        pattern, path = f"/containers/{{id}}/{found['what']}", f"container/{found['what']}"
        is_known, is_of_cluster = found["what"] in _TASK_REQUESTS, found["what"] in _CLUSTER_REQUESTS
        find: _Find = containers.container_of
        word = unquote(found["name"])
    elif (found := _EXEC.fullmatch(target)) is not None:
        pattern, path = f"/exec/{{id}}/{found['what']}", f"exec/{found['id']}/{found['what']}"
        is_known, is_of_cluster = found["what"] in ("json", "resize", "start"), False
        find, word = containers.container_of_exec, unquote(found["id"])
    elif method == "DELETE" and (found := _REMOVAL.fullmatch(target)) is not None:
        pattern, path, is_known, is_of_cluster = "/containers/{id}", "", False, True
        find, word = containers.container_of, unquote(found["name"])
    else:
        return ""
    is_nodes = may(identity, rule_for(method, pattern)) is None
    if is_nodes or not (is_known or is_of_cluster):
        return ""
    container = find(identity, word)
    if not _TASK.fullmatch(container.task):
        return ""
    if is_known:
        return f"{found['version'] or ''}/skep/tasks/{container.task}/{path}{found['query'] or ''}"
    if (identity.role_in(container.stack or EVERY_STACK) or 0) < Role.OPERATOR:
        return ""
    raise PermissionDenied(
        f"{identity.name} may not {method} {target.partition('?')[0]}: the cluster starts, stops and removes the "
        "containers of services. Use docker service update --force SERVICE, or docker service scale SERVICE=N"
    )
