"""Deploys a stack with a revision, which is recorded before the first change and gets the result after the last one."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from skep.aio.backoff import Backoff
from skep.api.client.requests import LimitedRequests, Requests
from skep.api.client.updates import update
from skep.api.errors import Untranslated
from skep.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    SkepError,
    Unavailable,
)
from skep.model.options.autoscaling import with_present_number
from skep.model.options.freezes import ADMIN_OVERRIDES
from skep.model.options.labels import DEPLOYING, REPLACED, STACK_STATE
from skep.model.permissions.access import Binding, Role
from skep.model.service import Service, ServiceSpec
from skep.model.values.encoding import to_json
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import unix_ns
from skep.stack.claims import DeployClaim, Replaced
from skep.stack.cluster_state import (
    NO_LOGINS,
    RESPONSE_TIMEOUT_S,
    check,
    config_names,
    existing_of,
    known_revisions,
    services_of,
)
from skep.stack.created import CreatedObjects
from skep.stack.deploying import Deployment, Show
from skep.stack.planning import PlanAction, StackPlan, is_still, plan_of, planned_again, with_network_names
from skep.stack.progress import FAILURES_MAX
from skep.stack.project import Stack
from skep.stack.removing import unmake
from skep.stack.revisions import (
    DEPLOYED,
    UNDOING,
    UNDOINGS,
    StackRevision,
    asked_for,
    body_of,
    kept_of,
    names_of,
    newest_deployed,
    refused,
    state_after,
    summary,
    unfinished_of,
    with_part,
)
from skep.stack.waiting import look_at, wait_for

_ENDED: Final = (DEPLOYED, REPLACED, *UNDOINGS)
"""States of revisions that a failure of another deploy does not change."""
_FULL: Final = "the cluster's store is"
"""Part of the managers' refusal to create an object while their store is full."""
_RECORDED_WITHIN_S: Final = 60.0
"""Timeout in seconds for getting the number of a revision.  A hundred deploys that start together get theirs one by
one.
"""


async def carry_out(
    client: Requests,
    stack: Stack,
    plan: StackPlan,
    show: Show,
    wait_s: float | None,
    warn: Callable[[str], None],
    logins: Mapping[str, str] = NO_LOGINS,
    created: CreatedObjects | None = None,
    *,
    failures_max: int = FAILURES_MAX,
    show_plan: Callable[[StackPlan], None] = lambda _: None,
) -> None:
    """Deploy ``stack`` according to ``plan``, and record its desired state as a revision, without ``logins``.

    Nothing is written if the managers would refuse a part of the plan.  The deploy replaces running deploys of the
    stack, and makes a new plan for the objects that they have left.

    A plan for some services only is recorded as the last deployed revision with these services changed.  It is refused
    while another deploy of the stack runs, because it would replace that deploy without completing it.  Nothing is
    recorded if the stack exists without a revision, or if all its revisions failed and have other services.

    ``created`` is filled with the created objects, for ``undo``.  ``show_plan`` is called once the managers have
    accepted the plan.  See ``Deployment.apply`` for the other arguments.

    Raises: Problems: the managers would refuse the plan; Unavailable: objects of another failed deploy are being
        removed; SkepError: an error of ``Deployment.apply``, which the revision then records.
    """
    created = created if created is not None else CreatedObjects()
    revisions = await known_revisions(client, stack.name)
    created.known = frozenset(one.id for one in revisions)
    whole = _whole(stack, plan, revisions)
    asked = asked_for(whole or stack, plan)
    await check(client, stack, plan, warn)
    show_plan(plan)
    if not plan.effective and (
        plan.only or not revisions or revisions[-1].state == DEPLOYED or revisions[-1].is_of(asked)
    ):
        work = partial(Deployment(client, stack, plan, show, logins, created).apply, wait_s, failures_max)
        await _without_changes(client, work, () if plan.only else revisions, asked, created, warn)
        return
    if whole is not None:
        after = (revisions[-1].number if revisions else 0) if plan.only else None
        created.revision = await _record(client, whole, plan, warn, after=after)
    if created.revision:
        created.claim = DeployClaim(client, asked, created.revision)
    try:
        await _check_no_undo(client, stack.name)
        if created.revision:
            plan = await _planned_now(client, stack, plan, show)
            await _inherit(client, () if plan.only else revisions, created)
        deployment = Deployment(client, stack, plan, show, logins, created)
        await deployment.apply(wait_s, failures_max)
        await _end(client, created, None, warn)
    except BaseException as error:
        await _end(client, created, error, warn)
        raise
    kept, surplus = await _forget_surplus(client, stack.name)
    former = names_of(revisions) | plan.former if wait_s is not None else names_of(surplus)
    await deployment.prune(former, names_of(kept))


async def _without_changes(
    client: Requests,
    work: Callable[[], Awaitable[None]],
    revisions: Sequence[StackRevision],
    asked: Stack,
    created: CreatedObjects,
    warn: Callable[[str], None],
) -> None:
    """Await ``work``, a deploy that changes nothing, and record its result in the last of ``revisions``."""
    await _inherit(client, revisions, created)
    try:
        await work()
    except SkepError as error:
        if created.inherited:
            created.revision = revisions[-1].id
            await _set_state(client, created.revision, state_after(error), warn, unless=_ENDED)
        raise
    for last in revisions[-1:]:
        await _complete(client, last, asked, warn)


async def _inherit(client: Requests, revisions: Sequence[StackRevision], created: CreatedObjects) -> None:
    """Count the objects of unfinished deploys as created by this deploy, which completes them.

    An unfinished deploy was killed or interrupted, or this one has replaced it.  It undoes nothing itself.
    Objects that are older than its revision were there before.  If all its services run, they may be in use, so they
    do not count.
    """
    unfinished = unfinished_of(revisions, created.began_ns)
    if not unfinished:
        return
    name, since = unfinished[0].of, unix_ns(unfinished[0].created_at)
    stacks = [one.stack() for one in unfinished]
    named = {one.spec.name for stack in stacks for one in stack.services.values()}
    existing = await existing_of(client, name, {one for stack in stacks for one in config_names(stack)})
    networks = {str(one["Id"]): str(one["Name"]) for one in existing.networks}
    services = [
        one for one in existing.services if one.spec.name in named and unix_ns(one.created_at) >= since
    ]
    if services and await _run(client, services):
        return
    created.inherited = tuple(one.id for one in unfinished)
    created.is_whole = len(services) == len(existing.services)
    created.services += [with_network_names(one, networks) for one in services]
    files = {("network", one.name) for stack in stacks for one in stack.networks.values()}
    files |= {("secret", one.name) for stack in stacks for one in stack.secrets.values()}
    files |= {("config", one.name) for stack in stacks for one in stack.configs.values()}
    found = [("network", one["Name"], one["Id"], one["Created"], one) for one in existing.networks]
    for kind, objects in (("secret", existing.secrets), ("config", existing.configs)):
        found += [(kind, one["Spec"]["Name"], one["ID"], one["CreatedAt"], one["Spec"]) for one in objects]
    created.files += [
        (kind, file, id)
        for kind, file, id, at, spec in found
        if (kind, file) in files
        and (spec.get("Labels") or {}).get(STACK_LABEL) == name
        and unix_ns(at) >= since
    ]


async def _run(client: Requests, services: Iterable[Service]) -> bool:
    """Return whether all services are in their desired state."""
    for one in services:
        if not (await look_at(client, one.id, is_deployed=True)).progress.is_done:
            return False
    return True


async def _forget_surplus(
    client: Requests, name: str
) -> tuple[Sequence[StackRevision], Sequence[StackRevision]]:
    """Remove surplus revisions of a stack, and return the others and the removed ones."""
    present = await known_revisions(client, name)
    kept = kept_of(present)
    surplus = [one for one in present if one not in kept]
    for one in surplus:
        await _forget(client, one)
    return kept, surplus


def _whole(stack: Stack, plan: StackPlan, revisions: Sequence[StackRevision]) -> Stack | None:
    """Return the whole stack to record as a revision, or None for some services of a stack without a revision.

    The other services are recorded as they were last deployed.  Revisions of failed or interrupted deploys are not
    used, because their content never ran and the new revision will be marked as deployed.  Without a deployed revision,
    nothing is recorded if a failed deploy may have created other services, because a rollback to an incomplete revision
    would remove these.

    Raises: FailedPrecondition: the plan is for some services, and another deploy is under way.
    """
    if not plan.only:
        return stack
    if not revisions and not plan.is_new:
        return None
    if revisions:
        _check_after(revisions[-1], revisions[-1].number)
    deployed = next((one for one in reversed(revisions) if one.state == DEPLOYED), None)
    if deployed is None and any(not one.stack().services.keys() <= set(plan.only) for one in revisions):
        return None
    return with_part(deployed.stack() if deployed else Stack(name=stack.name), stack, plan.only)


def _check_after(last: StackRevision, number: int) -> None:
    """Check that the newest revision, ``last``, has this number and is not being deployed.

    Raises: FailedPrecondition.
    """
    if last.number != number or last.state == DEPLOYING:
        raise FailedPrecondition(
            f"another deploy of {last.of} is running (revision {last.number}), and --only would replace it unfinished. "
            "Rerun the command when it has ended, or deploy without --only."
        )


async def _planned_now(client: Requests, stack: Stack, plan: StackPlan, show: Show) -> StackPlan:
    """Return the plan for the stack's present objects, which no other deploy can change from now on."""
    existing = await existing_of(client, stack.name, config_names(stack))
    found = planned_again(stack, plan, existing)
    if [(one.action, one.name) for one in found.changes] != [(one.action, one.name) for one in plan.changes]:
        show(stack.name, f"the cluster has changed since the plan, which is now: {summary(found)}")
    return replace(found, is_new=plan.is_new and found.is_new, former=plan.former | found.former)


async def _end(
    client: Requests, created: CreatedObjects, error: BaseException | None, warn: Callable[[str], None]
) -> None:
    """Record the result of a deploy.  A replaced deploy stays marked as replaced.

    If a newer deploy of the same content has replaced it, a success is recorded in the newer revision, because that
    deploy may have been killed.

    Raises: Replaced: a newer deploy of other content has replaced it.
    """
    if not created.revision:
        return
    found = await _set_state(client, created.revision, state_after(error), warn, unless=(REPLACED,))
    claim = created.claim
    if claim is None or isinstance(error, Replaced) or not isinstance(error, SkepError | None):
        return
    while found.startswith(REPLACED):
        await claim.follow()
        if error is not None:
            return
        found = await _set_state(client, claim.id, DEPLOYED, warn, unless=(REPLACED, *UNDOINGS))


async def _record(
    client: Requests, stack: Stack, plan: StackPlan, warn: Callable[[str], None], *, after: int | None = None
) -> str:
    """Record a new revision and return its id.

    Returns an empty string if it is too large, or refused because of a quota or a full store.

    Args:
        after: required number of the newest revision, 0 if there must be none, or None for any.
    """
    backoff = Backoff(0.05, 2.0)
    deadline = asyncio.get_running_loop().time() + _RECORDED_WITHIN_S
    while asyncio.get_running_loop().time() < deadline:
        revisions = await known_revisions(client, stack.name)
        # This check is also needed after 0, because another first deploy may have recorded its part meanwhile.
        if after is not None and revisions:
            _check_after(revisions[-1], after)
        try:
            body = body_of(stack, plan, revisions[-1].number + 1 if revisions else 1)
        except InvalidArgument as error:
            warn(f"{error}. You cannot roll back to this deploy.")
            return ""
        try:
            response = await client.post("/configs/create", body, timeout_s=RESPONSE_TIMEOUT_S)
        except AlreadyExists:  # a concurrent deploy took the number
            await asyncio.sleep(backoff.next_delay_s())
            continue
        except (
            PermissionDenied
        ) as error:  # a quota refused it, because a user without the right is refused at the first change
            if ADMIN_OVERRIDES in str(error):
                raise  # each change would be refused as well
            warn(f"{error}. You cannot roll back to this deploy.")
            return ""
        except Untranslated as error:
            # A deploy that creates objects was refused before. Others may be what makes room.
            if _FULL not in str(error):
                raise
            warn(f"{error}. You cannot roll back to this deploy.")
            return ""
        return str(response["ID"])
    raise Unavailable(f"other deploys of {stack.name} are running. Rerun the command when they have ended.")


async def _check_no_undo(client: Requests, stack: str) -> None:
    """Check that no other deploy is being undone, because the undo removes objects that this deploy would use.

    Call it after this deploy's revision is recorded.  An undo also records itself before it reads the revisions, so at
    least one of the two notices the other.

    Raises: Unavailable.
    """
    for one in await known_revisions(client, stack):
        if one.state in UNDOINGS:
            raise Unavailable(_undoing(one))


def _undoing(revision: StackRevision) -> str:
    return (
        f"revision {revision.number} of {revision.of} failed, and its new objects are being removed. Rerun the command "
        f"later. If the removal was interrupted, run docker config rm {revision.config}."
    )


async def _complete(client: Requests, last: StackRevision, asked: Stack, warn: Callable[[str], None]) -> None:
    """Mark the last revision as deployed after a deploy that changed nothing.

    The last deploy had the same desired state, and may have ended before it recorded its result.

    Raises:
        Unavailable: the objects that the last deploy created are being removed.
        Replaced: a newer deploy of other content has begun meanwhile.
    """
    if last.state == DEPLOYED:
        return
    found = await _set_state(client, last.id, DEPLOYED, warn, unless=(REPLACED, *UNDOINGS))
    if found in UNDOINGS:
        raise Unavailable(_undoing(last))
    if found.startswith(REPLACED):
        await DeployClaim(client, asked, last.id).follow()


async def _set_state(
    client: Requests, id: str, state: str, warn: Callable[[str], None], unless: tuple[str, ...] = ()
) -> str:
    """Set the state of a revision, unless its state begins with one of ``unless``.

    Returns: The previous state, or an empty text if the update failed.
    """
    found = ""

    def with_state(config: Mapping[str, Any]) -> dict[str, Any] | None:
        nonlocal found
        spec = config["Spec"]
        found = str(spec["Labels"].get(STACK_STATE, ""))
        is_kept = found.startswith(unless)
        return None if is_kept else {**spec, "Labels": {**spec["Labels"], STACK_STATE: state}}

    try:
        await update(client, "configs", id, with_state, timeout_s=RESPONSE_TIMEOUT_S)
    except SkepError as error:
        warn(f"the result of the deploy could not be recorded: {error}")
        return ""
    return found


async def _forget(client: Requests, revision: StackRevision) -> None:
    try:
        await client.delete(f"/configs/{revision.id}", timeout_s=RESPONSE_TIMEOUT_S)
    except SkepError:  # another deploy has removed the revision, or the next deploy will do so
        return


# --- rollbacks to a revision


class Return(msgspec.Struct, frozen=True):
    """A planned rollback to a revision.  ``client`` has the rights with which the rollback runs."""

    client: Requests
    stack: Stack
    plan: StackPlan
    left: frozenset[str] = frozenset()
    """Services that the revision does not contain, but that the rollback may not remove."""
    beyond: tuple[str, ...] = ()
    """Reasons why the rights of the revision's writer do not suffice, one line for each service."""


async def return_plan(
    client: Requests,
    revision: StackRevision,
    *,
    removable: Collection[str] | None = None,
    is_admin: bool = False,
) -> Return:
    """Plan a rollback to a revision, with the client to run it.

    The client has at most the rights of the revision's writer, because every user who may write configs of the stack
    can write a revision.

    Args:
        removable: ids of the services that may be removed if the revision does not contain them, or None for all.
        is_admin: whether to use all rights of the client.

    Raises:
        InvalidArgument: the revision cannot be read.
        Problems: a secret or config of the revision no longer exists.
        FailedPrecondition: the managers' version cannot limit rights.
    """
    stack, limited = revision.stack(), client
    if revision.role != Binding(Role.ADMIN):
        try:
            limited = await LimitedRequests.of(client, str(revision.role))
        except FailedPrecondition:
            if not is_admin:
                raise
    existing = await existing_of(client, stack.name, config_names(stack))
    plan = plan_of(stack, existing, images={}, prune=True, removable=removable)
    kept = {one.spec.name for one in existing.services if removable is not None and one.id not in removable}
    left = frozenset(kept - {one.spec.name for one in stack.services.values()})
    beyond = await _refusals(limited, plan) if limited is not client else ()
    return Return(client if is_admin else limited, stack, plan, left, beyond)


async def _refusals(client: Requests, plan: StackPlan) -> tuple[str, ...]:
    """Return the parts of the plan that the managers would refuse to ``client``, without changing anything."""
    found: list[str] = []
    for one in plan.of("service", PlanAction.CREATE, PlanAction.UPDATE):
        body = msgspec.Raw(to_json([one.spec]))
        try:
            await client.post("/skep/services/placement", body, timeout_s=RESPONSE_TIMEOUT_S)
        except PermissionDenied as error:
            found.append(f"{one.name}: {error}")
        except SkepError:
            continue  # the change itself will report the error
    return tuple(found)


async def undo(
    client: Requests,
    failed: StackPlan,
    show: Show,
    wait_s: float,
    warn: Callable[[str], None],
    created: CreatedObjects | None = None,
) -> str:
    """Undo a failed deploy: deploy the newest deployed revision again, or remove the created objects of a new stack.

    Updated services that no deployed revision has get the spec that they had before the deploy.

    Returns:
        A sentence about the result.

    Raises:
        InvalidArgument: the stack has no deployed revision and no updated service, or the revision is damaged.
        Problems: a secret or config of the revision no longer exists.
        PermissionDenied: the writer of the revision lacks the rights for it.  Nothing was changed.
    """
    name, created = failed.stack, created if created is not None else CreatedObjects()
    revisions = await known_revisions(client, name)
    if created.revision and revisions and revisions[-1].id != created.revision:
        return f"nothing was undone, because revision {revisions[-1].number} of {name} has replaced it"
    new_services = {one.name for one in failed.of("service", PlanAction.CREATE)}
    if failed.is_new or (created.is_whole and not any(one.state == DEPLOYED for one in revisions)):
        text = await _unmade(client, name, created, show, wait_s, warn)
        there = {one.spec.name for one in (await existing_of(client, name)).services}
        return text + _except(new_services & there, {})
    updated = {one.name for one in failed.of("service", PlanAction.UPDATE)}
    updated -= {one.spec.name for one in created.services}
    if not any(one.state == DEPLOYED for one in revisions) and updated:
        kept = await _restore(client, created, updated, show, wait_s)
        text = f"no earlier revision of {name} was deployed, so its updated services have their previous specs again"
        return text + _except(new_services, kept)
    revision = newest_deployed(name, revisions)
    found = await return_plan(client, revision, removable={one.id for one in created.services})
    if found.beyond:
        raise PermissionDenied(refused(revision, found.beyond))
    await carry_out(found.client, found.stack, found.plan, show, wait_s, warn)
    others = updated - {one.spec.name for one in found.stack.services.values()}
    kept = await _restore(client, created, others, show, wait_s)
    return f"{name} is back at revision {revision.number}" + _except(new_services & found.left, kept)


async def _restore(
    client: Requests, created: CreatedObjects, names: Collection[str], show: Show, wait_s: float
) -> Mapping[str, str]:
    """Give services the spec that they had before a failed deploy, and wait until they run.

    Returns: The reasons why services keep their spec, by name.
    Raises: Unavailable: a restored service does not run.
    """
    kept: dict[str, str] = {}
    restoring: list[str] = []
    networks = await client.get("/networks", timeout_s=RESPONSE_TIMEOUT_S)
    by_id = {str(one["Id"]): str(one["Name"]) for one in networks}
    for name in sorted(names):
        if name not in created.updated:
            continue  # the deploy ended before it updated the service
        before, written = created.updated[name]

        def restored(
            found: Mapping[str, Any],
            name: str = name,
            before: ServiceSpec = before,
            written: ServiceSpec = written,
        ) -> msgspec.Raw | None:
            (service,) = services_of([found])
            present = with_network_names(service, by_id).spec
            if is_still(before, present):
                return None  # by the service's own rollback
            if not is_still(written, present):
                kept[name] = "someone else has changed it"
                return None
            # A forced update since then is not undone, which would start a run of a job with a schedule.
            template = replace(before.task_template, force_update=present.task_template.force_update)
            return msgspec.Raw(to_json(with_present_number(replace(before, task_template=template), present)))

        try:
            await update(client, "services", name, restored, timeout_s=RESPONSE_TIMEOUT_S)
        except (NotFound, PermissionDenied) as error:
            kept[name] = str(error)
        if name not in kept:
            show(name, "previous spec restored")
            restoring.append(name)
    await wait_for(client, restoring, show, wait_s, is_deployed=True)
    return kept


def _except(new: Collection[str], kept: Mapping[str, str]) -> str:
    """Return a clause about services that an undo leaves: ``new`` services, as no response has confirmed that the
    deploy created them, and services that keep their spec for the given reasons.
    """
    left = [f"{', '.join(sorted(new))}, which another deploy may have created"] if new else []
    left += [f"{name} ({why})" for name, why in kept.items()]
    return f", except for {' and '.join(left)}" if left else ""


async def _unmade(
    client: Requests,
    name: str,
    created: CreatedObjects,
    show: Show,
    wait_s: float,
    warn: Callable[[str], None],
) -> str:
    """Remove the objects that a deploy has created, unless another deploy may use them.  Return a sentence about the
    result.
    """
    if not (created.services or created.files or created.revision):
        return "it had created nothing"
    if created.revision and await _set_state(client, created.revision, UNDOING, warn, unless=(DEPLOYED,)) in (
        "",
        DEPLOYED,
    ):
        return "nothing was removed, because another deploy has completed it, or no manager responds"
    try:
        for one in await known_revisions(client, name):
            is_beside = one.state == DEPLOYING or (one.state == DEPLOYED and one.id not in created.known)
            if one.id != created.revision and is_beside:
                hint = (
                    f". If it was interrupted, run docker config rm {one.config}."
                    if one.state == DEPLOYING
                    else ""
                )
                raise Unavailable(
                    f"revision {one.number} of {name} is {one.state} and may use what this deploy created, "
                    f"so nothing was removed{hint}"
                )
        await unmake(client, name, created, show, wait_s)
    except SkepError as error:
        if created.revision:
            await _set_state(client, created.revision, state_after(error), warn)
        raise
    for id in dict.fromkeys(filter(None, (*created.inherited, created.revision))):
        await client.delete(f"/configs/{id}", timeout_s=RESPONSE_TIMEOUT_S)
    return f"its new objects were removed, so {name} has no services again"
