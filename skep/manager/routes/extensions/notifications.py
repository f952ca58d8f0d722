"""``/skep/notify``: targets of notifications.  A Skep extension, for administrators only."""

from aiohttp import web

from skep.api.http.server import Routes, json_list_response, json_response, read_json
from skep.errors import FailedPrecondition
from skep.manager.cluster import known_cluster
from skep.manager.notify.addresses import check_secret, parsed_address
from skep.manager.notify.messages import Message
from skep.manager.notify.records import Target, delivery_in, targets_in
from skep.manager.notify.sending import MessageSender, check_destination
from skep.manager.notify.showing import state_of_target
from skep.manager.notify.writing import add_target, find_target, remove_target
from skep.manager.routes.access import current_view, manager_of
from skep.model.options.notifications import STACK_TOPICS, SentTest, TargetSpec

routes = Routes()

_ID_CHARACTERS = 12
"""Length of a target's id, which is a part of every message's id."""


@routes.get("/skep/notify")
async def list_targets(request: web.Request) -> web.StreamResponse:
    """List all targets with their deliveries, without credentials."""
    view = await current_view(request)
    return json_list_response([state_of_target(one, delivery_in(view, one)) for one in targets_in(view)])


@routes.post("/skep/notify/create")
async def create_target(request: web.Request) -> web.StreamResponse:
    """Add a target."""
    manager = manager_of(request)
    spec = await read_json(request, TargetSpec)
    check_secret(parsed_address(spec.url), spec.secret)
    target = Target(
        id=manager.new_id()[:_ID_CHARACTERS],
        name=spec.name,
        url=spec.url,
        secret=spec.secret,
        topics=tuple(dict.fromkeys(spec.on)) or (STACK_TOPICS if spec.stacks else ()),
        stacks=tuple(dict.fromkeys(spec.stacks)),
        allows_internal=spec.allow_internal,
        created_ns=manager.clock.now_ns(),
    )
    check_destination(await current_view(request), target)
    await manager.require_room(creates=True)
    added = await manager.update(add_target, target)
    return json_response(state_of_target(added, None), 201)


@routes.delete("/skep/notify/{name}")
async def delete_target(request: web.Request) -> web.StreamResponse:
    """Remove a target.  Notices that wait for it are dropped."""
    await manager_of(request).update(remove_target, request.match_info["name"])
    return web.Response(status=204)


@routes.post("/skep/notify/{name}/test")
async def test_target(request: web.Request) -> web.StreamResponse:
    """Send a test message from this manager, once, and respond when the target has accepted it."""
    manager = manager_of(request)
    view = await current_view(request)
    target = find_target(targets_in(view), request.match_info["name"])
    swarm = known_cluster(view)
    message = Message(
        id=f"{target.id}-test-{manager.new_id()[:_ID_CHARACTERS]}",
        cluster=swarm.spec.name if swarm is not None else "",
        cluster_id=str(swarm.id) if swarm is not None else "",
        at_ns=manager.clock.now_ns(),
        is_test=True,
    )
    if reason := await MessageSender(manager.store.view, manager.clock).send(target, message):
        raise FailedPrecondition(f"the test message was not delivered to {target.name}: {reason}")
    return json_response(SentTest(id=message.id))
