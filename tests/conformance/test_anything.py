"""Whatever a client sends: no request makes us fail, and one that is refused leaves nothing behind."""

import asyncio
import copy
from collections.abc import Iterator
from contextlib import AsyncExitStack
from io import BytesIO
from typing import Any

import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given, settings
from hypothesis import strategies as st

from skep.manager.routes import ManagerApi, application
from tests.conformance.manager import a_manager_api
from tests.conformance.script import IN_SWARM

OURS = "internal error"


class Manager:
    """A manager with a client, used from tests that are not coroutines."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()

    def start(self) -> None:
        async def start() -> tuple[ManagerApi, TestClient[Any, Any]]:
            api = await self._stack.enter_async_context(a_manager_api())
            return api, await self._stack.enter_async_context(TestClient(TestServer(application(api))))

        self.api, self._client = self._runner.run(start())

    def stop(self) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()

    def ask(self, method: str, path: str, body: bytes) -> tuple[int, str]:
        """Status and text of the answer."""

        async def ask() -> tuple[int, str]:
            async with self._client.request(method, path, data=BytesIO(body)) as response:
                return response.status, await response.text()

        return self._runner.run(ask())

    @property
    def revision(self) -> int:
        return self.api.store.view().revision


@pytest.fixture(scope="module")
def manager() -> Iterator[Manager]:
    manager = Manager()
    manager.start()
    yield manager
    manager.stop()


def check(manager: Manager, method: str, path: str, body: bytes) -> None:
    before = manager.revision
    status, text = manager.ask(method, path, body)
    assert OURS not in text
    if status >= 400:
        assert msgspec.json.decode(text)["message"]
        assert manager.revision == before


POSTS = (
    "/services/create",
    "/services/web/update?version=1",
    "/secrets/create",
    "/configs/create",
    "/networks/create",
    "/networks/ov1/update",
    "/networks/prune",
    "/swarm/update?version=1",
    "/swarm/unlock",
    "/nodes/m1/update?version=1",
)

words = st.text(max_size=8) | st.sampled_from(["web", "Name", "null", "-1", "{{", "ü", "\0", "a/b", "vip"])
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**70), max_value=2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | words
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)
jsonish = st.text(alphabet='{}[]":,\\u0019e.-tfn ', max_size=40)


@settings(max_examples=150, deadline=None)
@given(path=st.sampled_from(POSTS), value=anything)
def test_arbitrary_json_never_makes_us_fail(manager: Manager, path: str, value: Any) -> None:
    check(manager, "POST", path, msgspec.json.encode(value))


@settings(max_examples=150, deadline=None)
@given(
    path=st.sampled_from(POSTS),
    body=st.binary(max_size=60) | st.text(alphabet='{}[]":,\\u0019e.-tfn ', max_size=40),
)
def test_arbitrary_bytes_never_make_us_fail(manager: Manager, path: str, body: bytes | str) -> None:
    check(manager, "POST", path, body if isinstance(body, bytes) else body.encode())


GOOD = [
    (step.path.removeprefix("/v1.41"), step.body)
    for step in IN_SWARM
    if step.method == "POST" and isinstance(step.body, dict) and "version={" not in step.path
]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_good_request_with_something_else_in_its_place_never_makes_us_fail(
    manager: Manager, data: Any
) -> None:
    """Take a request that means something, and put anything at some place in it."""
    path, body = data.draw(st.sampled_from(GOOD))
    body = copy.deepcopy(body)
    places = list(all_places(body))
    if places:
        parent, key = data.draw(st.sampled_from(places))
        parent[key] = data.draw(anything)
    check(manager, "POST", path, msgspec.json.encode(body))


def all_places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value that holds another, as (container, key)."""
    match value:
        case dict():
            items: Any = list(value.items())
        case list():
            items = list(enumerate(value))
        case _:
            return
    for key, inner in items:
        yield value, key
        yield from all_places(inner)


LISTS = ("/services", "/tasks", "/nodes", "/secrets", "/configs", "/networks")


@settings(max_examples=100, deadline=None)
@given(path=st.sampled_from(LISTS), filters=anything)
def test_arbitrary_filters_never_make_us_fail(manager: Manager, path: str, filters: Any) -> None:
    text = msgspec.json.encode(filters).decode()
    query = "".join(f"%{byte:02x}" for byte in text.encode())
    check(manager, "GET", f"{path}?filters={query}", b"")


@settings(max_examples=100, deadline=None)
@given(path=st.sampled_from(LISTS), word=st.text(min_size=1, max_size=30))
def test_arbitrary_ids_never_make_us_fail(manager: Manager, path: str, word: str) -> None:
    escaped = "".join(f"%{byte:02x}" for byte in word.encode(errors="replace"))
    check(manager, "GET", f"{path}/{escaped}", b"")
    if word not in {"web", "m1"}:
        check(manager, "DELETE", f"{path}/{escaped}", b"")
