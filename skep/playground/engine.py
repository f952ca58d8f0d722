"""The few requests that the playground makes to its nodes' Engine API."""

from pathlib import Path
from typing import Any

import aiohttp

from skep.errors import FailedPrecondition, Unavailable

_PING_WITHIN_S = 2
_REQUEST_WITHIN_S = 60


class Engine:
    """One node's API on its unix socket."""

    def __init__(self, endpoint: str) -> None:
        self._path = endpoint.removeprefix("unix://")

    async def is_up(self) -> bool:
        """Whether ``/_ping`` answers."""
        try:
            await self._ask("GET", "/_ping", deadline_s=_PING_WITHIN_S)
        except (FailedPrecondition, Unavailable):
            return False
        return True

    async def get(self, path: str) -> Any:
        return await self._ask("GET", path)

    async def post(self, path: str, body: object = None) -> Any:
        return await self._ask("POST", path, json=body)

    async def load(self, archive: Path) -> None:
        """POST /images/load."""
        with archive.open("rb") as file:
            await self._ask("POST", "/images/load", data=file, headers={"Content-Type": "application/x-tar"})

    async def _ask(
        self, method: str, path: str, *, deadline_s: float = _REQUEST_WITHIN_S, **content: Any
    ) -> Any:
        """The decoded answer, or its text when it is no single JSON value.

        Raises: FailedPrecondition: refused, with the node's message.  Unavailable: no answer in time.
        """
        timeout = aiohttp.ClientTimeout(total=deadline_s)
        connector = aiohttp.UnixConnector(self._path)
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
                session.request(method, f"http://skep{path}", **content) as response,
            ):
                if response.status < 400 and response.content_type != "application/json":
                    return await response.text()
                answer = await response.json(content_type=None) if await response.read() else None
                if response.status >= 400:
                    message = answer.get("message") if isinstance(answer, dict) else None
                    raise FailedPrecondition(message or f"{method} {path}: status {response.status}")
                return answer
        except TimeoutError as error:
            raise Unavailable(f"{method} {path}: no answer within {deadline_s:g} s") from error
        except aiohttp.ClientError as error:
            raise Unavailable(f"{method} {path}: {error}") from error
