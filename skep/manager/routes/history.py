"""``/skep/history``: what happened in the cluster and why, and who asked for what.  Ours, not Docker's."""

from collections.abc import Mapping

from aiohttp import web
from msgspec.structs import replace

from skep.api.server import Routes, json_answer
from skep.api.timestamps import parse_time
from skep.errors import InvalidArgument, NotFound
from skep.manager.journal.reading import LIMIT_MAX, TIME_MAX, Query, page
from skep.manager.routes.access import OF_WORKER, current_view, manager_of
from skep.model.history import Kind
from skep.model.node import Node
from skep.model.service import Service
from skep.store.interface import View

routes = Routes()

_PARAMETERS = frozenset(
    {"about", "service", "node", "stack", "kind", "since", "until", "limit", "cursor", "order"}
)


@routes.get("/skep/history")
async def show_history(request: web.Request) -> web.Response:
    """A page of entries.  Clients of workers see what happened, not who asked for it."""
    view = await current_view(request)
    query = query_of(request.query, view, manager_of(request).clock.now_ns())
    if OF_WORKER in request.headers:
        query = replace(query, kinds=query.kinds & {Kind.CHANGE})
    return json_answer(await page(view, query))


def query_of(given: Mapping[str, str], view: View, now_ns: int) -> Query:
    """Raises: InvalidArgument: a parameter is unknown, or has a value that it cannot have."""
    if unknown := sorted(set(given) - _PARAMETERS):
        raise InvalidArgument(
            f"unknown parameter {unknown[0][:100]!r}: want {', '.join(sorted(_PARAMETERS))}"
        )
    return Query(
        services=_meant(view, Service, given.get("service", "")),
        nodes=_meant(view, Node, given.get("node", "")),
        stack=given.get("stack", ""),
        about=_about(view, given.get("about", "")),
        kinds=_kinds(given.get("kind", "")),
        since_ns=parse_time(given["since"], now_ns) if given.get("since") else 0,
        until_ns=parse_time(given["until"], now_ns) if given.get("until") else TIME_MAX,
        limit=_limit(given.get("limit", "200")),
        is_ascending=_is_ascending(given.get("order", "desc")),
        cursor=given.get("cursor", ""),
    )


def _meant(view: View, kind: type[Service | Node], word: str) -> frozenset[str]:
    """What entries have of the object that ``word`` names: its id, or the word itself, if it was removed."""
    if not word:
        return frozenset()
    try:
        return frozenset({view.resolve(kind, word).id})
    except NotFound:
        return frozenset({word})


def _about(view: View, word: str) -> frozenset[str]:
    """Of a service, a node or a stack."""
    if not word:
        return frozenset()
    return frozenset({word, *_meant(view, Service, word), *_meant(view, Node, word)})


def _kinds(words: str) -> frozenset[Kind]:
    try:
        return frozenset(map(Kind, words.split(","))) if words else frozenset(Kind)
    except ValueError:
        raise InvalidArgument(f"invalid kind {words[:100]!r}: want request, change or both") from None


def _limit(word: str) -> int:
    if not (word.isascii() and word.isdigit() and len(word) < 10 and 1 <= int(word) <= LIMIT_MAX):
        raise InvalidArgument(f"invalid limit {word[:100]!r}: want a number of entries from 1 to {LIMIT_MAX}")
    return int(word)


def _is_ascending(word: str) -> bool:
    if word not in ("asc", "desc"):
        raise InvalidArgument(f"invalid order {word[:100]!r}: want asc or desc")
    return word == "asc"
