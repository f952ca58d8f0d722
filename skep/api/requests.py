"""Requests whose responses are read whole, without aiohttp.

The import of aiohttp takes longer than the requests of most commands.
"""

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

import msgspec

from skep.api.raw import RawClient
from skep.errors import SkepError, Unavailable

if TYPE_CHECKING:
    from skep.api.client import Client

TIMEOUT_S: Final = 60.0


class PlainRequests:
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

    async def get(
        self,
        path: str,
        *,
        filters: Mapping[str, Sequence[str]] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        **query: str,
    ) -> Any:
        """The decoded response to ``GET path``.  Raises: the error of the response's status; Unavailable: there is
        none."""
        if filters:
            wanted = {key: dict.fromkeys(values, True) for key, values in filters.items()}
            query["filters"] = msgspec.json.encode(wanted).decode()
        return await self.request("GET", path, query=query, headers=headers, timeout_s=timeout_s)

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

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """The decoded response.  Raises: as ``get``."""
        timeout_s = TIMEOUT_S if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.request(method, path, body, query or {}, headers or {})
        except TimeoutError:
            raise Unavailable(f"no response within {timeout_s:g} s") from None
        except msgspec.DecodeError as error:
            raise SkepError(f"the response is not JSON: {error}") from error


Requests: TypeAlias = "PlainRequests | Client"
"""What commands and stacks make requests with."""
