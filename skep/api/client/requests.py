"""Requests whose responses are read as a whole.  Contains the base of both clients, and the client that does not need
aiohttp.

The import of aiohttp takes longer than the requests of most commands.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import msgspec

from skep.api.client.former_names import with_present_names
from skep.api.client.raw import RawClient
from skep.errors import FailedPrecondition, InvalidArgument, SkepError, Unavailable
from skep.model.permissions.access import OVERRIDE_HEADER, ROLE_HEADER

TIMEOUT_S: Final = 60.0
"""Timeout of a request whose response is read as a whole, in seconds."""

Filters: TypeAlias = Mapping[str, Sequence[str]]
"""Values by key, as ``docker ... --filter KEY=VALUE``."""


def filters_of(words: Iterable[str]) -> dict[str, list[str]]:
    """Parse the ``words`` of a command, each ``KEY=VALUE``.  Raises: InvalidArgument: one has another form."""
    wanted: dict[str, list[str]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise InvalidArgument(f"invalid filter {word!r}: expected KEY=VALUE")
        wanted.setdefault(key.strip().lower(), []).append(value.strip())
    return wanted


def parameters_of(filters: Filters | None) -> dict[str, str]:
    """Return ``filters`` as a query parameter, or none without filters."""
    if not filters:
        return {}
    wanted = {key: dict.fromkeys(values, True) for key, values in filters.items()}
    return {"filters": msgspec.json.encode(wanted).decode()}


class Requests(ABC):
    """Sends requests for commands and stacks."""

    async def get(
        self,
        path: str,
        *,
        filters: Filters | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        **query: str,
    ) -> Any:
        """Return the decoded response to ``GET path``, with the present names of its fields.

        Raises:
            SkepError: The error of the response's status.
            Unavailable: There was no response.
        """
        found = await self.request(
            "GET", path, filters=filters, query=query, headers=headers, timeout_s=timeout_s
        )
        return with_present_names(path, found)

    async def post(
        self,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        **query: str,
    ) -> Any:
        """Return the decoded response to ``POST path`` with ``body`` as JSON, as ``get`` does.

        Raises: the errors of ``get``.
        """
        found = await self.request("POST", path, body=body, query=query, headers=headers, timeout_s=timeout_s)
        return with_present_names(path, found)

    async def delete(self, path: str, *, timeout_s: float | None = None, **query: str) -> Any:
        """Return the decoded response to ``DELETE path``.  Raises: the errors of ``get``."""
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
        """Send a request and return its whole response as decoded JSON, or None if it is empty.

        Raises:
            SkepError: The error of the response's status, with the server's message.
            Unavailable: The response took longer than ``timeout_s``.
        """


class RequestsWith(Requests):
    """Requests whose changes have further headers."""

    def __init__(self, client: Requests, headers: Mapping[str, str]) -> None:
        self._client = client
        self._headers = headers

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
        further = {} if method == "GET" else self._headers
        return await self._client.request(
            method,
            path,
            body=body,
            query=query,
            filters=filters,
            headers={**(headers or {}), **further},
            timeout_s=timeout_s,
        )


def overriding(client: Requests, *, is_override: bool) -> Requests:
    """Return requests that override a strict freeze, or ``client`` itself."""
    return RequestsWith(client, {OVERRIDE_HEADER: "true"}) if is_override else client


class LimitedRequests(RequestsWith):
    """Requests whose changes have at most the rights of one role.

    Reads keep the rights of the client, because a role in one stack does not see the networks of other stacks.
    """

    def __init__(self, client: Requests, role: str) -> None:
        """``role`` has the form of ``skep user``, like ``operator:shop``."""
        super().__init__(client, {ROLE_HEADER: role})

    @classmethod
    async def of(cls, client: Requests, role: str) -> Self:
        """Return requests limited to ``role``.

        Raises:
            FailedPrecondition: The manager's version cannot limit rights.
        """
        made = cls(client, role)
        access = await client.get("/skep/access", headers=made._headers)
        if access.get("Limit") != role:
            raise FailedPrecondition(f"this manager cannot limit a request to the role {role}: upgrade it")
        return made


class PlainRequests(Requests):
    """Sends each request on a separate connection, in the newest API version.  Use it as an async context manager."""

    def __init__(self, client: RawClient) -> None:
        self._client = client

    async def __aenter__(self) -> Self:
        """Connect.  Raises: the errors of ``RawClient``."""
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
            raise Unavailable(f"no response from {self._client.host} within {timeout_s:g} s") from None
        except msgspec.DecodeError as error:
            raise SkepError(f"the response is not JSON: {error}") from error
