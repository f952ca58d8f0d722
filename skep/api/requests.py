"""Requests whose responses are read whole: what both clients have of them, and the client that needs no aiohttp.

The import of aiohttp takes longer than the requests of most commands.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import msgspec

from skep.api.raw import RawClient
from skep.errors import FailedPrecondition, InvalidArgument, SkepError, Unavailable
from skep.model.access import ROLE_HEADER

TIMEOUT_S: Final = 60.0
"""Deadline of a request whose response is read as a whole."""

Filters: TypeAlias = Mapping[str, Sequence[str]]
"""Values by key, as ``docker ... --filter KEY=VALUE``."""


def filters_of(words: Iterable[str]) -> dict[str, list[str]]:
    """``words`` of a command, each ``KEY=VALUE``.  Raises: InvalidArgument: one is not."""
    wanted: dict[str, list[str]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise InvalidArgument(f"invalid filter {word!r}: want KEY=VALUE")
        wanted.setdefault(key.strip().lower(), []).append(value.strip())
    return wanted


def parameters_of(filters: Filters | None) -> dict[str, str]:
    """``filters`` as a parameter of a query; none, if there are none."""
    if not filters:
        return {}
    wanted = {key: dict.fromkeys(values, True) for key, values in filters.items()}
    return {"filters": msgspec.json.encode(wanted).decode()}


class Requests(ABC):
    """What commands and stacks make requests with."""

    async def get(
        self,
        path: str,
        *,
        filters: Filters | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        **query: str,
    ) -> Any:
        """The decoded response to ``GET path``.  Raises: the error of the response's status; Unavailable: there is
        none."""
        return await self.request(
            "GET", path, filters=filters, query=query, headers=headers, timeout_s=timeout_s
        )

    async def post(
        self,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        **query: str,
    ) -> Any:
        """The decoded response to ``POST path`` with ``body`` as JSON.  Raises: as ``get``."""
        return await self.request("POST", path, body=body, query=query, headers=headers, timeout_s=timeout_s)

    async def delete(self, path: str, *, timeout_s: float | None = None, **query: str) -> Any:
        """The decoded response to ``DELETE path``.  Raises: as ``get``."""
        return await self.request("DELETE", path, query=query, timeout_s=timeout_s)

    @abstractmethod
    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        filters: Filters | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """One request and its whole response: decoded JSON, None if it is empty.

        Raises:
            SkepError: of the class that the status means, with the server's message.
            Unavailable: no response within ``timeout_s``.
        """


class LimitedRequests(Requests):
    """Requests of which those that change something have the rights of one role at most.

    Reads keep the rights of the client: a role in one stack does not see the networks of others.
    """

    def __init__(self, client: Requests, role: str) -> None:
        """``role``: as in ``skep user``: ``operator:shop``."""
        self._client = client
        self._headers = {ROLE_HEADER: role}

    @classmethod
    async def of(cls, client: Requests, role: str) -> Self:
        """Return requests limited to ``role``.

        Raises: FailedPrecondition: the manager is of a version that cannot limit them.
        """
        made = cls(client, role)
        access = await client.get("/skep/access", headers=made._headers)
        if access.get("Limit") != role:
            raise FailedPrecondition(f"this manager cannot limit a request to the role {role}: upgrade it")
        return made

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        filters: Filters | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """See ``Requests``."""
        limit = {} if method == "GET" else self._headers
        return await self._client.request(
            method,
            path,
            body=body,
            query=query,
            filters=filters,
            headers={**(headers or {}), **limit},
            timeout_s=timeout_s,
        )


class PlainRequests(Requests):
    """Each on a connection of its own, in the newest version of the API.  Use as an async context manager."""

    def __init__(self, client: RawClient) -> None:
        self._client = client

    async def __aenter__(self) -> Self:
        """Raises: as ``RawClient``."""
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        filters: Filters | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        timeout_s = TIMEOUT_S if timeout_s is None else timeout_s
        parameters = {**(query or {}), **parameters_of(filters)}
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.request(method, path, body, parameters, headers or {})
        except TimeoutError:
            raise Unavailable(f"no response within {timeout_s:g} s") from None
        except msgspec.DecodeError as error:
            raise SkepError(f"the response is not JSON: {error}") from error
