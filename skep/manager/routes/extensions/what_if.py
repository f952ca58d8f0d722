"""``/skep/what-if``: what would follow from a change.  The decisions run on a copy, and nothing is written.

``GET ?lose=NODE`` and ``GET ?drain=NODE`` suppose that nodes are lost or drained.  A node may be given as
``LABEL=VALUE``, which means all nodes with this label.  ``POST /skep/what-if/services`` supposes that the services of
these specs are created or updated.

``GET /skep/what-if/survive?stack=NAME`` shows which single loss takes which service of a stack down, and ``POST`` the
same for the services of these specs.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from aiohttp import web
from msgspec.structs import replace

from skep import logs
from skep.aio.clock import SystemClock
from skep.aio.time_slices import run_in_slices
from skep.api.access.identity import identity_of
from skep.api.access.permissions import sees
from skep.api.http.server import Routes, json_response
from skep.errors import InvalidArgument, NotFound, ResourceExhausted
from skep.manager.routes.access import current_view, plan_slot
from skep.manager.routes.extensions.placement import read_checked
from skep.manager.what_if.answer import FreeCapacity, Question, SupposedOutcome
from skep.manager.what_if.rehearsal import Rehearsal
from skep.manager.what_if.suppositions import deploy, drain, lose, nodes_named, quorum_after
from skep.manager.what_if.survival import Survival, SurvivalQuestion
from skep.model.service import Service, ServiceSpec
from skep.model.values.ids import NodeId
from skep.model.values.stacks import stack_of
from skep.store.schema import stack_index

routes = Routes()

_WITHIN_S = 60.0
"""Timeout in seconds, from the moment when the request gets its slot.  Replacing 30,000 tasks takes about as long."""


@routes.get("/skep/what-if")
async def suppose_nodes(request: web.Request) -> web.StreamResponse:
    """Show what follows if nodes are lost or drained."""
    kinds = [name for name in ("lose", "drain") if name in request.query]
    if len(kinds) != 1:
        raise InvalidArgument("the request needs one of the parameters lose and drain")
    async with _question(request) as question:
        copy = question.rehearsal.copy.view()
        nodes = nodes_named(copy, request.query[kinds[0]])
        has_leader = True
        if kinds[0] == "drain":
            drain(question.rehearsal, nodes)
        else:
            has_leader = _keeps_leader(question, nodes)
            lose(question.rehearsal, nodes)
        await run_in_slices(question.settle(has_leader=has_leader), SystemClock())
        return json_response(_visible(request, question.answer))


@routes.post("/skep/what-if/services")
async def suppose_services(request: web.Request) -> web.StreamResponse:
    """Show what follows if services are created or updated.  Raises: SkepError: a spec would be refused."""
    specs = await read_checked(request)
    async with _question(request) as question:
        await _deploy(question, specs)
        return json_response(_visible(request, question.answer))


@routes.get("/skep/what-if/survive")
async def survive_stack(request: web.Request) -> web.StreamResponse:
    """Show what single losses do to the services of a stack.  Raises: NotFound: it has no services."""
    stack, view = request.query.get("stack", ""), await current_view(request)
    if not stack:
        raise InvalidArgument("the request needs the parameter stack")
    is_known = sees(identity_of(request), stack) and view.find(Service, stack=stack_index(stack))
    if not is_known:
        raise NotFound(f"stack {stack} has no services: list stacks with skep stack ls")
    return json_response(await _survival(request, lambda spec: stack_of(spec.labels) == stack))


@routes.post("/skep/what-if/survive")
async def survive_services(request: web.Request) -> web.StreamResponse:
    """Show what single losses do to the services of specs.  Raises: SkepError: a spec would be refused."""
    specs = await read_checked(request)
    names = {spec.name for spec in specs}
    return json_response(await _survival(request, lambda spec: spec.name in names, specs))


async def _survival(
    request: web.Request, is_chosen: Callable[[ServiceSpec], bool], specs: Sequence[ServiceSpec] = ()
) -> Survival:
    """Try each loss after the services of ``specs`` were deployed and run."""
    async with _question(request) as question:
        await _deploy(question, specs)
        rehearsal = question.rehearsal
        view = rehearsal.copy.view()
        services = [one.id for one in view.find(Service) if is_chosen(one.spec) and one.removed_at is None]
        survival = SurvivalQuestion(view, rehearsal.clock.now_ns(), services)
        await run_in_slices(survival.steps(), SystemClock())
        return survival.answer


async def _deploy(question: Question, specs: Sequence[ServiceSpec]) -> None:
    """Suppose that the services of ``specs`` are deployed, and let follow what follows."""
    for spec in specs:
        deploy(question.rehearsal, spec)
        await asyncio.sleep(0)
    await run_in_slices(question.settle(), SystemClock())


def _keeps_leader(question: Question, nodes: Sequence[NodeId]) -> bool:
    left, needed = quorum_after(question.rehearsal.copy.view(), nodes)
    if left < needed:
        question.notes.append(
            f"{left} of the {needed} managers that a quorum needs are left: nothing is replaced, and no change is "
            "accepted, until enough of them are back. Tasks on the other nodes keep running."
        )
    return left >= needed


@asynccontextmanager
async def _question(request: web.Request) -> AsyncIterator[Question]:
    """Yield a question about a copy of the current state.  Its log lines are dropped.

    Raises:
        ResourceExhausted: Too many questions wait, or this one takes too long.
    """
    identity = identity_of(request)
    async with plan_slot(request):
        view = await current_view(request)
        question = Question(
            Rehearsal(view, SystemClock().now_ns()),
            lambda service: sees(identity, stack_of(service.spec.labels)),
        )
        await asyncio.sleep(0)  # the copy takes as long as a few slices
        try:
            async with asyncio.timeout(_WITHIN_S):
                with logs.supposed():
                    await run_in_slices(question.begin(), SystemClock())
                    yield question
        except TimeoutError as error:
            raise ResourceExhausted(
                f"the answer takes more than {_WITHIN_S:g} s: suppose a smaller change"
            ) from error


def _visible(request: web.Request, answer: SupposedOutcome) -> SupposedOutcome:
    """Return ``answer`` without the numbers of all stacks' tasks, if the user may not see all of them."""
    if sees(identity_of(request), ""):
        return answer
    return replace(answer, nodes=(), capacity_before=FreeCapacity(), capacity_after=FreeCapacity())
