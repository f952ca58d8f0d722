"""``docker search``: searches a registry's index by the first version of the protocol, as Docker does.

Docker Hub has such an index, but few other registries do.

Source: moby 20.10, registry/{service,search,session,endpoint_v1}.go, daemon/images/image_search.go.
"""

from collections.abc import Mapping, Sequence
from urllib.parse import quote_plus, urlsplit

import aiohttp
import msgspec

from skep.engine.images.reference import DEFAULT_DOMAIN
from skep.engine.images.registry.credentials import RegistryCredentials
from skep.engine.images.registry.endpoints import RegistryEndpoint, RegistryPolicy, session_for
from skep.engine.images.registry.refusals import NOT_JSON, read_bounded
from skep.engine.images.registry.registry import RegistryConnection, RegistryError
from skep.errors import InvalidArgument, SkepError

LIMIT_DEFAULT = 25
"""Docker's default number of results."""
_LIMIT_MAX = 100
"""Highest number of results.  Source: moby, registry/search.go."""
_RESPONSE_BYTES_MAX = 4 << 20
"""Longest response to a search in bytes.  Limited, because it is read into memory."""
_INDEX = "https://index.docker.io"


class FoundRepository(msgspec.Struct, frozen=True):
    """One repository of an index, with the API's field names."""

    name: str = ""
    description: str = ""
    star_count: int = 0
    is_official: bool = False
    is_automated: bool = False


class _Response(msgspec.Struct, frozen=True):
    results: tuple[FoundRepository, ...] | None = None


class SearchFilter(msgspec.Struct, frozen=True):
    """Filters of a search.  A filter that is None matches everything."""

    is_official: bool | None = None
    is_automated: bool | None = None
    stars: int = 0

    def takes(self, found: FoundRepository) -> bool:
        """Return whether ``found`` is shown."""
        return (
            self.is_official in (None, found.is_official)
            and self.is_automated in (None, found.is_automated)
            and found.star_count >= self.stars
        )


async def search(
    policy: RegistryPolicy, term: str, credentials: RegistryCredentials, limit: int, wanted: SearchFilter
) -> Sequence[FoundRepository]:
    """Search the index of ``term`` (``[host[:port]/]words``) for repositories.

    Raises:
        InvalidArgument: the limit or the term is not valid.
        RegistryError: the index cannot be reached.
        SearchRefusal: it responds with an error.
    """
    if not 1 <= limit <= _LIMIT_MAX:
        raise InvalidArgument(f"limit {limit} is outside the range of [1, {_LIMIT_MAX}]")
    if "://" in term:
        raise InvalidArgument(f"invalid repository name: repository name ({term}) should not have a scheme")
    domain, words = _split(term)
    query = f"/v1/search?q={quote_plus(words)}&n={limit}"
    problem: RegistryError | None = None
    for endpoint in _endpoints(policy, domain):
        async with session_for(endpoint) as session:
            connection = RegistryConnection(session, endpoint, credentials.for_registry(domain))
            try:
                found = await _search(connection, query)
            except RegistryError as error:
                problem = error
                continue
            return [one for one in found[:limit] if wanted.takes(one)]
    assert problem is not None, "there is at least one endpoint"
    raise problem


class SearchRefusal(SkepError):
    """The index responds with an error."""


async def _search(connection: RegistryConnection, query: str) -> Sequence[FoundRepository]:
    headers = {"X-Docker-Token": "true"}
    async with connection.request(
        "GET", query, headers=headers, timeout=connection.transfers.response_timeout
    ) as response:
        if response.status != 200:
            raise SearchRefusal(f"Unexpected status code {response.status}")
        content = await _content(response)
    try:
        return msgspec.json.decode(content, type=_Response).results or ()
    except NOT_JSON as error:
        raise SearchRefusal(f"error decoding registry search results: {error}") from error


async def _content(response: "aiohttp.ClientResponse") -> bytes:
    try:
        return await read_bounded(response, _RESPONSE_BYTES_MAX)
    except InvalidArgument as error:
        raise SearchRefusal(f"error decoding registry search results: {error}") from error


def _endpoints(policy: RegistryPolicy, domain: str) -> Sequence[RegistryEndpoint]:
    """Return the endpoints that serve searches.  Docker Hub has a separate one, and its mirrors have none."""
    return (RegistryEndpoint(_INDEX),) if domain == DEFAULT_DOMAIN else policy.endpoints(domain)


def _split(term: str) -> tuple[str, str]:
    """Split a term into index and words.  Source: registry/search.go (splitReposSearchTerm)."""
    first, slash, rest = term.partition("/")
    if slash and (set(".:") & set(first) or first == "localhost"):
        host = urlsplit(f"//{first}").hostname
        if not host:
            raise InvalidArgument(f"invalid index name ({first})")
        return (
            (DEFAULT_DOMAIN, rest.removeprefix("library/")) if first == "index.docker.io" else (first, rest)
        )
    return DEFAULT_DOMAIN, term.removeprefix("library/")


def shown(found: FoundRepository) -> Mapping[str, object]:
    """Return one entry of the response."""
    return msgspec.structs.asdict(found)
