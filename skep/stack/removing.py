"""Removal of a stack, and of the objects that one deploy has created."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Final

from skep.api.client.requests import Requests
from skep.api.client.waiting import persistently
from skep.errors import FailedPrecondition, NotFound, SkepError, Unavailable
from skep.model.task import TaskState
from skep.model.values.counts import counted
from skep.model.values.stacks import STACK_LABEL
from skep.stack.cluster_state import RESPONSE_TIMEOUT_S
from skep.stack.created import CreatedObjects
from skep.stack.deploying import Show, all_of, remove_unchanged
from skep.stack.planning import removal_of
from skep.stack.progress import UNPLACED_S
from skep.stack.waiting import HeldTimes

_ENDED: Final = frozenset(one.value for one in TaskState if one.is_terminal)
_LOST: Final = TaskState.UNKNOWN.value
"""State of a task whose node is down, with the node's name in its error."""
_CLEANING: Final = "waiting for the cluster to remove its ended tasks"
_IN_USE_S: Final = 10.0
"""Seconds for which an object may be in use.  The nodes release the addresses of ended tasks within a few seconds."""
_LOOK_S: Final = 0.5
"""Seconds between checks of the remaining objects."""


async def remove(client: Requests, stack: str, show: Show, wait_s: float) -> bool:
    """Remove a stack: first its services, and once their tasks have stopped, its other objects.

    Returns: Whether the stack had any objects.
    Raises: Unavailable: an object was still in use after ``wait_s``; FailedPrecondition: the stack was deployed again.
    """
    label = {"label": [f"{STACK_LABEL}={stack}"]}
    found = False
    for kind in ("service", "secret", "config", "network"):
        objects = await client.get(f"/{kind}s", filters=label, timeout_s=RESPONSE_TIMEOUT_S)
        found = found or bool(objects)
        named = [
            (one["Name"], one["Id"]) if kind == "network" else (one["Spec"]["Name"], one["ID"])
            for one in objects
        ]
        await all_of(_remove(client, kind, name, id, show, wait_s) for name, id in named)
        if kind == "service":
            await _wait_tasks_gone(client, label, show, stack, wait_s)
    return found


async def unmake(client: Requests, stack: str, created: CreatedObjects, show: Show, wait_s: float) -> None:
    """Remove the objects that a deploy has created, and nothing else.

    Raises: FailedPrecondition: one of the services was changed meanwhile; Unavailable: an object is still in use.
    """
    for service in created.services:
        if await remove_unchanged(client, removal_of(service)):
            show(service.spec.name, "service removed")
    label = {"label": [f"{STACK_LABEL}={stack}"]}
    await _wait_tasks_gone(client, label, show, stack, wait_s, {one.id for one in created.services})
    for kind in ("secret", "config", "network"):
        of_kind = [(name, id) for one, name, id in created.files if one == kind]
        await all_of(_remove(client, kind, name, id, show, wait_s) for name, id in of_kind)


async def _wait_tasks_gone(
    client: Requests,
    label: Mapping[str, Sequence[str]],
    show: Show,
    stack: str,
    wait_s: float,
    services: Collection[str] | None = None,
) -> None:
    """Wait until no task of the stack, or of these services, runs.  Their addresses and networks are then free.

    Raises: FailedPrecondition: the stack has new services.
    """

    async def read_tasks() -> list[Any]:
        if services is None and await client.get("/services", filters=label, timeout_s=RESPONSE_TIMEOUT_S):
            raise FailedPrecondition(
                f"{stack} was deployed again meanwhile, so its new services and the objects that they use stay. To "
                f"remove them, rerun skep stack rm {stack}."
            )
        tasks = await client.get("/tasks", filters=label, timeout_s=RESPONSE_TIMEOUT_S)
        return [one for one in tasks if services is None or one.get("ServiceID") in services]

    times, text = HeldTimes(), ""
    try:
        async with asyncio.timeout(wait_s):
            while tasks := await persistently(read_tasks, partial(show, stack)):
                left = [one["Status"] for one in tasks if one["Status"]["State"] not in _ENDED]
                lost = sorted({str(one.get("Err", "")) for one in left if one["State"] == _LOST})
                text = f"waiting for {counted(len(left), 'task')} to stop"
                text = (f"{text}: {', '.join(lost)}" if lost else text) if left else _CLEANING
                show(stack, text)
                are_lost = bool(lost) and all(one["State"] == _LOST for one in left)
                if times.held_s(len(left), asyncio.get_running_loop().time(), holds=are_lost) >= UNPLACED_S:
                    raise Unavailable(
                        f"{stack}: {text}. Rerun the command when the node is back. If it is lost for good, run skep "
                        "node forget NODE first."
                    )
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        raise Unavailable(
            f"{stack}: not done within {wait_s:g} s: {text}. Run skep stack ps {stack}."
        ) from None


async def _remove(client: Requests, kind: str, name: str, id: str, show: Show, wait_s: float) -> None:
    """Remove an object.

    Raises: Unavailable: for ``_IN_USE_S`` it was in use by something that this command does not remove.
    """
    deadline = asyncio.get_running_loop().time() + min(wait_s, _IN_USE_S)
    while True:
        try:
            await client.delete(f"/{kind}s/{id}", timeout_s=RESPONSE_TIMEOUT_S)
        except NotFound:
            return
        except SkepError as error:
            is_in_use = "in use" in str(error) or "active endpoints" in str(error)
            if not is_in_use:
                raise
            show(name, f"{kind} not removed yet: {error}")
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable(
                    f"{kind} {name} was not removed: {error}. Remove what uses it, and rerun the command."
                ) from error
            await asyncio.sleep(_LOOK_S)
        else:
            show(name, f"{kind} removed")
            return
