"""Redirects docker's commands about a task's container to the manager, for users who are not administrators.

``docker exec``, ``attach``, ``cp`` and ``kill`` name a container.  A user's rights over it follow from its service,
which the manager knows.  The request is therefore changed into one of ``skep exec``.  The manager checks the role and
the service's spec, records the request in the history, and forwards it to the task's node, which checks it again.
"""

import re
from typing import Protocol
from urllib.parse import unquote

from skep.api.permissions import may, rule_for
from skep.errors import PermissionDenied
from skep.model.access import EVERY_STACK, Identity, Role

_CONTAINER = re.compile(
    r"(?P<version>/v[0-9][0-9.]*)?/containers/(?P<name>[^/?]+)/(?P<what>[a-z]+)(?P<query>\?.*)?"
)
_REMOVAL = re.compile(r"(?:/v[0-9][0-9.]*)?/containers/(?P<name>[^/?]+)(?:\?.*)?")
_EXEC = re.compile(r"(?P<version>/v[0-9][0-9.]*)?/exec/(?P<id>[^/?]+)/(?P<what>[a-z]+)(?P<query>\?.*)?")
_OF_A_TASK = frozenset(("archive", "attach", "exec", "kill", "resize", "wait"))
_OF_THE_CLUSTER = frozenset(("pause", "restart", "start", "stop", "unpause"))
_TASK = re.compile(r"[0-9a-z]+")


class TaskContainers(Protocol):
    """The containers of tasks on this node."""

    def task_of_container(self, word: str) -> str:
        """Return the id of the task whose container ``word`` means, or an empty string."""

    def stack_of_container(self, word: str) -> str:
        """Return the stack whose label the container has, or an empty string."""

    def task_of_exec(self, id: str) -> str:
        """Return the id of the task in whose container exec ``id`` runs, or an empty string."""


def as_task_request(identity: Identity, method: str, target: str, containers: TaskContainers) -> str:
    """Return the target of this request at the manager, or an empty string if this node answers it.

    Args:
        target: Path and query as sent.

    Raises:
        PermissionDenied: Only the cluster starts, stops and removes the container.  Raised only for operators of its
            stack.
    """
    found = _CONTAINER.fullmatch(target)
    if found is not None:
        task = containers.task_of_container(unquote(found["name"]))
        pattern, path = f"/containers/{{id}}/{found['what']}", f"container/{found['what']}"
        is_known = found["what"] in _OF_A_TASK
    elif (found := _EXEC.fullmatch(target)) is not None:
        task = containers.task_of_exec(unquote(found["id"]))
        pattern, path = f"/exec/{{id}}/{found['what']}", f"exec/{found['id']}/{found['what']}"
        is_known = found["what"] in ("json", "resize", "start")
    else:
        _check_removal(identity, method, target, containers)
        return ""
    if not _TASK.fullmatch(task) or may(identity, rule_for(method, pattern)) is None:
        return ""
    if is_known:
        return f"{found['version'] or ''}/skep/tasks/{task}/{path}{found['query'] or ''}"
    if found["what"] in _OF_THE_CLUSTER:
        _check_operator(identity, method, target, containers, unquote(found["name"]))
    return ""


def _check_removal(identity: Identity, method: str, target: str, containers: TaskContainers) -> None:
    found = _REMOVAL.fullmatch(target) if method == "DELETE" and not identity.is_admin else None
    if found is not None and containers.task_of_container(unquote(found["name"])):
        _check_operator(identity, method, target, containers, unquote(found["name"]))


def _check_operator(
    identity: Identity, method: str, target: str, containers: TaskContainers, word: str
) -> None:
    """Refuse a request of an operator of the container's stack.  Raises: PermissionDenied, with the command to use
    instead.

    The response to others must not reveal whether a word means a container, because id prefixes are words.
    """
    if (identity.role_in(containers.stack_of_container(word) or EVERY_STACK) or 0) < Role.OPERATOR:
        return
    path = target.partition("?")[0]
    raise PermissionDenied(
        f"{identity.name} may not {method} {path}: the cluster starts, stops and removes the containers of services. "
        "Use docker service update --force SERVICE, or docker service scale SERVICE=N"
    )
