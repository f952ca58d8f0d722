"""Route tables.  A module lists its handlers in a table.  Once the object that they serve exists, the table is bound to
it.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Generic, TypeVar

from aiohttp import web

T = TypeVar("T")
BoundHandler = Callable[[T, web.Request], Awaitable[web.StreamResponse]]


class RouteTable(Generic[T]):
    """Handlers by method and path.  Each is called with the table's subject and the request."""

    def __init__(self) -> None:
        self._handlers: list[tuple[str, str, BoundHandler[T]]] = []

    def get(self, path: str) -> Callable[[BoundHandler[T]], BoundHandler[T]]:
        """Register a handler of GET."""
        return self._adding("GET", path)

    def head(self, path: str) -> Callable[[BoundHandler[T]], BoundHandler[T]]:
        """Register a handler of HEAD."""
        return self._adding("HEAD", path)

    def post(self, path: str) -> Callable[[BoundHandler[T]], BoundHandler[T]]:
        """Register a handler of POST."""
        return self._adding("POST", path)

    def put(self, path: str) -> Callable[[BoundHandler[T]], BoundHandler[T]]:
        """Register a handler of PUT."""
        return self._adding("PUT", path)

    def delete(self, path: str) -> Callable[[BoundHandler[T]], BoundHandler[T]]:
        """Register a handler of DELETE."""
        return self._adding("DELETE", path)

    def bound(self, subject: T) -> list[web.RouteDef]:
        """Return the routes for ``skep.api.http.server.application``."""
        return [
            web.route(method, path, partial(handler, subject)) for method, path, handler in self._handlers
        ]

    def _adding(self, method: str, path: str) -> Callable[[BoundHandler[T]], BoundHandler[T]]:
        def add(handler: BoundHandler[T]) -> BoundHandler[T]:
            self._handlers.append((method, path, handler))
            return handler

        return add
