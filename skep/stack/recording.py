"""A deploy with its revision: recorded before the first change, and how it ended after the last."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from skep.api.requests import Requests
from skep.api.updates import update
from skep.errors import AlreadyExists, InvalidArgument, SkepError, Unavailable
from skep.model.labels import STACK_STATE
from skep.stack.deploying import NO_LOGINS, RESPONSE_TIMEOUT_S, Deployment, Show, existing_of, remove
from skep.stack.planning import Plan, plan_of
from skep.stack.project import Stack
from skep.stack.revisions import (
    DEPLOYED,
    KEPT,
    Revision,
    asked_for,
    body_of,
    names_kept,
    newest_deployed,
    revisions_of,
    state_after,
)

_ATTEMPTS = 5
"""To find a number that no deploy beside this one has taken."""


async def known_revisions(client: Requests, stack: str) -> list[Revision]:
    """The revisions of a stack, the oldest first."""
    return revisions_of(stack, await client.get("/configs", timeout_s=RESPONSE_TIMEOUT_S))


async def carry_out(
    client: Requests,
    stack: Stack,
    plan: Plan,
    show: Show,
    wait_s: float | None,
    warn: Callable[[str], None],
    logins: Mapping[str, str] = NO_LOGINS,
) -> None:
    """Deploy ``stack`` as ``plan`` says, and keep what was asked for as a revision, without ``logins``.

    Raises: as ``Deployment.apply``; the revision then says that the deploy failed, and why.
    """
    deployment = Deployment(client, stack, plan, show, logins)
    if not plan.effective:
        await deployment.apply(wait_s)
        await _complete(client, asked_for(stack, plan), warn)
        return
    revisions = await known_revisions(client, stack.name)
    id = await _recorded(client, stack, plan, revisions, warn)
    failure: BaseException | None = None
    try:
        await deployment.apply(wait_s)
    except BaseException as error:
        failure = error
        raise
    finally:
        if id:
            await _set_state(client, id, state_after(failure), warn)
    others = KEPT - 1 if id else KEPT
    for one in revisions[:-others]:
        await _forget(client, one)
    if wait_s is not None:
        await deployment.prune(sorted(names_kept(revisions[-others:])))


async def _recorded(
    client: Requests, stack: Stack, plan: Plan, revisions: Sequence[Revision], warn: Callable[[str], None]
) -> str:
    """The id of the revision after ``revisions``; empty: it is too large for one."""
    number = revisions[-1].number + 1 if revisions else 1
    for attempt in range(_ATTEMPTS):
        try:
            body = body_of(stack, plan, number + attempt)
        except InvalidArgument as error:
            warn(f"{error}: there will be no return to it")
            return ""
        try:
            made = await client.post("/configs/create", body, timeout_s=RESPONSE_TIMEOUT_S)
        except AlreadyExists:
            continue
        return str(made["ID"])
    raise Unavailable(f"other deploys of {stack.name} are under way: try again when they have ended")


async def _complete(client: Requests, asked: Stack, warn: Callable[[str], None]) -> None:
    """Of a deploy that changed nothing: the last one asked for the same, and may have ended before it could say so."""
    for last in (await known_revisions(client, asked.name))[-1:]:
        if last.state != DEPLOYED and last.is_of(asked):
            await _set_state(client, last.id, DEPLOYED, warn)


async def _set_state(client: Requests, id: str, state: str, warn: Callable[[str], None]) -> None:
    def with_state(config: Mapping[str, Any]) -> dict[str, Any]:
        spec = config["Spec"]
        return {**spec, "Labels": {**spec["Labels"], STACK_STATE: state}}

    try:
        await update(client, "configs", id, with_state, timeout_s=RESPONSE_TIMEOUT_S)
    except SkepError as error:
        warn(f"how the deploy ended could not be recorded: {error}")


async def _forget(client: Requests, revision: Revision) -> None:
    try:
        await client.delete(f"/configs/{revision.id}", timeout_s=RESPONSE_TIMEOUT_S)
    except SkepError:  # another deploy has removed it, or the next one will
        return


async def return_plan(client: Requests, revision: Revision) -> tuple[Stack, Plan]:
    """What a return to a revision changes.

    Raises: InvalidArgument: it cannot be read; Problems: a secret or config of it is gone.
    """
    stack = revision.stack()
    return stack, plan_of(stack, await existing_of(client, stack.name), images={}, prune=True)


async def undo(client: Requests, failed: Plan, show: Show, wait_s: float, warn: Callable[[str], None]) -> str:
    """After a deploy that failed: what was deployed before is deployed again, and a stack that was new is removed.

    Gives a sentence on what was done.  Raises: InvalidArgument: there is no revision to return to, or it is damaged, or
    something that it names is gone; nothing was changed then.
    """
    name = failed.stack
    if failed.is_new:
        await remove(client, name, show, wait_s)
        return f"{name} was not there before: it was removed"
    revision = newest_deployed(await known_revisions(client, name))
    stack, plan = await return_plan(client, revision)
    await carry_out(client, stack, plan, show, wait_s, warn)
    return f"{name} is as in revision {revision.number} again"
