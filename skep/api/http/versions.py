"""API versions: the path prefix ``/v1.41``, the supported range, and the comparison of versions.

Source: moby 20.10, api/server/middleware/version.go, api/types/versions/compare.go.
"""

from functools import lru_cache, total_ordering

from skep.errors import InvalidArgument


@total_ordering
class ApiVersion:
    """A version such as ``1.41``, ordered by its numbers and shown as it was written."""

    __slots__ = ("numbers", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        numbers = [int(part) if part.isdigit() and len(part) < 10 else 0 for part in text.split(".")]
        while len(numbers) > 1 and numbers[-1] == 0:
            numbers.pop()
        self.numbers = tuple(numbers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ApiVersion) and self.numbers == other.numbers

    def __lt__(self, other: "ApiVersion") -> bool:
        return self.numbers < other.numbers

    def __hash__(self) -> int:
        return hash(self.numbers)

    def __str__(self) -> str:
        return self.text


OLDEST = ApiVersion("1.24")
NEWEST = ApiVersion("1.55")


@lru_cache(maxsize=64)
def _parsed(text: str) -> ApiVersion:
    return ApiVersion(text)


def requested(prefix: str | None, newest: ApiVersion) -> ApiVersion:
    """Return the version for a request: the version in its path (``1.41``), or the newest.

    Raises:
        InvalidArgument: this server does not support the version.
    """
    if prefix is None:
        return newest
    version = _parsed(prefix)
    if version < OLDEST:
        raise InvalidArgument(
            f"client version {version} is too old. Minimum supported API version is {OLDEST}, "
            "please upgrade your client to a newer version"
        )
    if newest < version:
        raise InvalidArgument(
            f"client version {version} is too new. Maximum supported API version is {newest}"
        )
    return version
