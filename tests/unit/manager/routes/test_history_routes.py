"""Who may see what of the history, and what a request is recorded as."""

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import cast

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.manager.control.validation.new_objects import visible_to
from skep.manager.journal.reading import HistoryQuery
from skep.manager.routes.access import MANAGER, ManagerApi
from skep.manager.routes.extensions.history import limited, query_of
from skep.manager.routes.guard import audit
from skep.manager.routes.guard.audit import about, with_outcome
from skep.model.history import EntryType, JournalEntry, Severity, masked, masked_text, without_credentials
from skep.model.permissions.access import ALL, Binding, Identity, Origin, Role
from skep.model.values.ids import ServiceId
from skep.model.values.stacks import STACK_LABEL
from skep.store.state import State
from tests.support.builders import a_node, a_service, a_service_spec

NOW_NS = 1_800_000_000 * 10**9


def a_view() -> State:
    view = State()
    for one in (a_service("web"), a_node("n1")):
        view.table_by_type[type(one)].store(one.id, None, one, moves=True)
    return view


def an_identity(*bindings: Binding) -> Identity:
    return Identity(name="alice", origin=Origin.TOKEN, bindings=bindings)


def test_only_administrators_see_requests() -> None:
    assert limited(HistoryQuery(), an_identity(*ALL)) == HistoryQuery()
    viewer = limited(HistoryQuery(), an_identity(Binding(Role.VIEWER)))
    assert (viewer.kinds, viewer.stacks) == (frozenset({EntryType.CHANGE}), None)


def test_a_user_of_a_stack_sees_that_stack() -> None:
    query = limited(HistoryQuery(), an_identity(Binding(Role.ADMIN, "shop")))
    assert query.kinds == {EntryType.CHANGE}
    assert query.matches(JournalEntry(stack="shop"))
    assert not query.matches(JournalEntry(stack="other"))
    assert not query.matches(JournalEntry())
    assert not limited(HistoryQuery(), an_identity()).matches(JournalEntry(stack="shop"))


@pytest.mark.parametrize(
    "given",
    [
        {"servce": "web"},
        {"limit": "0"},
        {"limit": "1001"},
        {"limit": "-1"},
        {"order": "up"},
        {"kind": "x"},
        {"since": "soon"},
    ],
)
def test_parameters_that_cannot_be_are_refused(given: Mapping[str, str]) -> None:
    with pytest.raises(InvalidArgument):
        query_of(given, a_view(), NOW_NS)


def test_services_and_nodes_may_be_named_by_prefix_or_be_gone() -> None:
    view = a_view()
    web = a_service("web")
    assert query_of({"service": "web", "since": "10m"}, view, NOW_NS).services == {web.id}
    assert query_of({"service": "gone"}, view, NOW_NS).services == {"gone"}
    assert query_of({"about": "n1"}, view, NOW_NS).about >= {"n1"}


@pytest.mark.parametrize(
    ("method", "path", "type_", "action", "name"),
    [
        ("POST", "/services/create", "service", "create", ""),
        ("POST", "/services/web/update", "service", "update", "web"),
        ("DELETE", "/services/gone", "service", "remove", "gone"),
        ("POST", "/skep/services/web/update/pause", "service", "pause", "web"),
        ("POST", "/swarm/update", "cluster", "update", ""),
        ("GET", "/swarm/unlockkey", "cluster", "read", ""),
        ("POST", "/skep/cluster/evict", "cluster", "evict", ""),
        ("PUT", "/skep/cluster/freeze", "cluster", "set-freeze", ""),
        ("DELETE", "/skep/cluster/window", "cluster", "remove-window", ""),
        ("DELETE", "/skep/stacks/shop/freeze", "stack", "remove-freeze", "shop"),
        ("POST", "/", "?", "create", ""),
    ],
)
def test_what_a_request_is_about(method: str, path: str, type_: str, action: str, name: str) -> None:
    entry = about(path, method, a_view())
    assert (entry.type, entry.action, entry.name) == (type_, action, name)


def test_a_request_is_about_the_object_that_its_client_sees() -> None:
    """A prefix of an own id may be the name of another stack's object."""
    view = State()
    for id, name, stack in (("ab1", "shop_web", "shop"), ("cd2", "ab", "blog"), ("ab3", "blog_web", "blog")):
        spec = replace(a_service_spec(name), labels={STACK_LABEL: stack})
        service = replace(a_service(name, spec=spec), id=ServiceId(id))
        view.table_by_type[type(service)].store(service.id, None, service, moves=True)
    among = visible_to(view, an_identity(Binding(Role.OPERATOR, "shop")))
    for word, id in (("ab", "ab1"), ("a", "ab1"), ("shop_web", "ab1"), ("blog_web", "ab3")):
        assert about(f"/services/{word}/update", "POST", view, among).object_id == id, word
    assert about("/services/ab/update", "POST", view).object_id == "cd2", "an administrator sees all"
    assert about("/services/a/update", "POST", view).object_id == ""


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("POST", "/skep/users/create", "create user"),
        ("POST", "/skep/users/ann/update", "update user ann"),
        ("DELETE", "/skep/users/ann", "remove user ann"),
        ("POST", "/skep/users/ann/tokens", "create-token user ann"),
        ("DELETE", "/skep/users/ann/tokens/7k2m9x4q1w", "remove-token user ann"),
        ("POST", "/skep/users/ann/certificates", "create-certificate user ann"),
        ("PUT", "/skep/stacks/shop/quota", "set-quota stack shop"),
        ("DELETE", "/skep/stacks/shop/quota", "remove-quota stack shop"),
    ],
)
def test_the_audit_log_names_users_and_stacks(method: str, path: str, words: str) -> None:
    entry = about(path, method, State())
    assert with_outcome(entry, 200).message == words
    refused = "rpc error: code = InvalidArgument desc = invalid name"
    assert with_outcome(entry, 400, refused).message == f"{words}: refused with 400: invalid name"


def test_a_refusal_is_recorded_without_what_it_quotes() -> None:
    entry = with_outcome(
        JournalEntry(type="service", action="create"), 400, "invalid env DB_PASSWORD=hunter2: no"
    )
    assert entry.message == "create service: refused with 400: invalid env DB_PASSWORD=*** no"
    assert (entry.status, entry.severity) == (400, Severity.WARNING)
    assert with_outcome(entry, 503).severity is Severity.ERROR


@pytest.mark.parametrize(
    ("variable", "shown"),
    [
        ("DB_PASSWORD=x", "DB_PASSWORD=***"),
        ("apiKey=x", "apiKey=***"),
        ("GITHUB_TOKEN=x", "GITHUB_TOKEN=***"),
        ("AWS_SECRET_ACCESS_KEY=x", "AWS_SECRET_ACCESS_KEY=***"),
        ("URL=postgres://app:hunter2@db/x", "URL=postgres://app:***@db/x"),
        ("MODE=fast", "MODE=fast"),
        ("PASSWORD", "PASSWORD"),
        ("KEYBOARD=de", "KEYBOARD=de"),
    ],
)
def test_what_looks_like_a_credential_is_masked(variable: str, shown: str) -> None:
    assert masked(variable) == shown


def test_errors_with_urls_are_masked_and_services_of_then_as_well() -> None:
    assert masked_text("cannot reach https://a:b@host/x now") == "cannot reach https://a:***@host/x now"
    spec = a_service_spec("web")
    container = spec.task_template.container_spec
    assert container is not None
    container = replace(container, env=("A_TOKEN=x", "B=y"))
    spec = replace(spec, task_template=replace(spec.task_template, container_spec=container))
    shown = without_credentials(a_service("web", spec=spec, previous=spec))
    for one in (shown.spec, shown.previous_spec):
        assert one is not None
        assert one.task_template.container_spec is not None
        assert one.task_template.container_spec.env == ("A_TOKEN=***", "B=y")


def a_manager(recorded: list[JournalEntry]) -> web.Application:
    """Returns the application of a manager whose journal is given the entries ``recorded``."""
    app = web.Application()
    app[MANAGER] = cast(
        "ManagerApi",
        SimpleNamespace(
            journal=SimpleNamespace(record=recorded.append), store=SimpleNamespace(view=a_view), own="m1"
        ),
    )
    return app


async def test_a_response_does_not_wait_for_its_entry() -> None:
    recorded: list[JournalEntry] = []
    request = make_mocked_request("POST", "/services/create", app=a_manager(recorded))

    async def respond(_: web.Request) -> web.StreamResponse:
        return web.json_response({"ID": "s1"}, status=201)

    response = await audit.record_request(request, respond)
    assert (response.status, recorded) == (201, [])
    await asyncio.sleep(0)  # one turn of the event loop
    assert [(one.status, one.object_id) for one in recorded] == [(201, "s1")]


async def test_a_request_whose_client_has_gone_is_recorded() -> None:
    recorded: list[JournalEntry] = []

    async def wait(_: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    request = make_mocked_request("DELETE", "/services/web", app=a_manager(recorded))
    serving = asyncio.ensure_future(audit.record_request(request, wait))
    await asyncio.sleep(0)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    (entry,) = recorded
    assert entry.status == 499
    assert "the client disconnected before the response" in entry.message
    assert "refused" not in entry.message


async def test_a_client_that_has_the_whole_response_and_goes_knows_the_outcome() -> None:
    """Such as that of a backup, whose manager then records it."""
    recorded: list[JournalEntry] = []

    async def send(request: web.Request) -> web.StreamResponse:
        request[audit.SENT_RESPONSE] = web.Response()
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    request = make_mocked_request("POST", "/skep/backup", app=a_manager(recorded))
    serving = asyncio.ensure_future(audit.record_request(request, send))
    await asyncio.sleep(0)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    (entry,) = recorded
    assert (entry.status, entry.message) == (200, "create backup")


async def test_a_route_that_is_none_is_no_internal_error() -> None:
    recorded: list[JournalEntry] = []
    request = make_mocked_request("POST", "/services/web/nothing", app=a_manager(recorded))

    async def refuse(_: web.Request) -> web.StreamResponse:
        raise web.HTTPNotFound

    with pytest.raises(web.HTTPNotFound):
        await audit.record_request(request, refuse)
    (entry,) = recorded
    assert (entry.status, entry.message) == (404, "nothing service web: refused with 404: Not Found")
