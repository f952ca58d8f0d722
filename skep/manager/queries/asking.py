"""Asks one query: over HTTP, within a deadline and from addresses that its author may reach."""

import asyncio
import errno
from collections.abc import Callable
from typing import Final

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from skep.linux.network.guard import Guard
from skep.manager.notify.sending import guarded_connector, node_addresses, words_of
from skep.manager.queries.board import Ask, AskedQuery, ask_nothing
from skep.manager.queries.names import NameLookups
from skep.model.history import cut
from skep.model.measures.queries import BODY_BYTES_MAX, QueryFailed, figure_in
from skep.model.task_end import on_one_line
from skep.store.interface import View

ASK_S: Final = 5.0
"""Time limit in seconds for one attempt: names, connection, request and response.  Autoscaling decides every 15."""
_RULE: Final = "only an administrator may choose for queries"
_REASON_CHARACTERS_MAX: Final = 300
"""Longest reason of a failure, which is stored and shown."""
_HEADERS: Final = {"User-Agent": "skep", "Accept": "application/json, text/plain"}


class QueryClient:
    """Asks queries from this manager's machine."""

    def __init__(
        self,
        view: Callable[[], View],
        ask_s: float = ASK_S,
        names: AbstractResolver | None = None,
        run_command: Ask = ask_nothing,
    ) -> None:
        """``run_command`` asks the queries that are commands."""
        self._view = view
        self._run_command = run_command
        self._names = names or NameLookups()
        self._ask_s = ask_s

    async def ask(self, asked: AskedQuery) -> float:
        """Return the figure.  Raises: QueryFailed."""
        if asked.query.command:
            return await self._run_command(asked)
        try:
            async with asyncio.timeout(self._ask_s):
                return await self._ask(asked)
        except TimeoutError:
            raise QueryFailed(f"{asked.query.host} did not respond within {self._ask_s:g} s") from None
        except QueryFailed as error:
            raise QueryFailed(cut(on_one_line(str(error)), _REASON_CHARACTERS_MAX)) from None
        except (aiohttp.ClientError, OSError, UnicodeError, ValueError) as error:
            words = on_one_line(_words(error)) or type(error).__name__
            raise QueryFailed(cut(words, _REASON_CHARACTERS_MAX)) from None

    async def _ask(self, asked: AskedQuery) -> float:
        guard = Guard(lambda: node_addresses(self._view()), is_restricted=not asked.is_trusted, rule=_RULE)
        async with (
            aiohttp.ClientSession(
                connector=guarded_connector(guard, self._names),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=_HEADERS,
            ) as session,
            session.get(URL(asked.query.request_url, encoded=True), allow_redirects=False) as response,
        ):
            if 300 <= response.status < 400:
                raise QueryFailed(
                    f"{asked.query.host} redirects to another address, which is not followed: use the final URL"
                )
            body = bytearray()
            async for part in response.content.iter_any():
                body += part
                if len(body) > BODY_BYTES_MAX:
                    raise QueryFailed(
                        f"the response of {asked.query.host} has more than {BODY_BYTES_MAX // 1024} KiB: write the "
                        "query so that it has one sample"
                    )
            return figure_in(asked.query, response.status, bytes(body))


def _words(error: Exception) -> str:
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, OSError) and cause.errno == errno.EACCES and cause.strerror:
        return cause.strerror  # the guard's words
    return words_of(error)
