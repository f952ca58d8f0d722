"""Users and passwords in the addresses of builds.  Pure.

Every text that a build shows, logs or stores passes through ``redacted``.  A password may contain ``/``, ``?``, ``#``
or ``@``.  Then it is uncertain where the host begins, and the address is masked up to its last ``@``: a hidden host
does less harm than a visible part of a password.  The ``@`` before an image's digest does not count, because no host
looks like a digest.

Source: buildkit, util/urlutil/redact.go (RedactCredentials).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from skep.engine.build.dockerfile.dockerfile import readable
from skep.errors import InvalidArgument, SkepError

_MASK = "xxxxx"
_SCHEME = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z0-9+.-]*://")
"""A variable may stand for the scheme, and an option may precede it (``-uhttps://``)."""
_WORD = re.compile(r"(?:\\.|\S)*", re.DOTALL)
"""Rest of a word of the shell.  A backslash may precede a space in it."""
_CLOSING_QUOTES = {quote: re.compile(rf"\n|{quote}(?=[\s,;:|&)\]}}>]|$)") for quote in "\"'`"}
_AUTHORITY = re.compile(r"[^/?#]*")
_HOST = re.compile(r"(?:\[[^\[\]@]*\]|[^:@]*)(?::\d{1,5})?")
_DIGEST = re.compile(r"@sha256:[0-9a-f]{64}(?![\w.-])")
"""Digest of an image reference (``app:1@sha256:...``).  Its hexadecimal digits are too many for a port."""
_CLOSING = "\"'`,;.)]}>"
"""Characters that may follow an address without a path."""
_HINT = "write / ? # and @ in a user or password as %2F %3F %23 and %40"


class Parts(NamedTuple):
    """Parts of an address, as clients of its scheme split it."""

    scheme: str
    """The scheme with its ``://``, or empty."""
    userinfo: str
    """User and password, without the ``@``."""
    rest: str


def redacted(text: str) -> str:
    """Return a text without users and passwords in its addresses: ``https://xxxxx:xxxxx@host/``.

    An address ends at the end of its word, at its closing quote, or where the next address starts.
    """
    found, at, ends = [], 0, _Ends(text)
    while start := _SCHEME.search(text, at):
        begin, end = start.end(), ends.of(start)
        after = _SCHEME.search(text, begin, end)
        piece = text[begin : after.start() if after else end]
        size = _userinfo_size(piece)
        if not size and after and not _is_host(piece):  # the password has a ://
            size = max(ends.last_at(begin, end) + 1 - begin, 0)
        found += [text[at:begin], _masked(text[begin : begin + size])]
        at = begin + size
    return "".join(found) + text[at:]


def redacted_address(address: str) -> str:
    """Return a text that is one address, without its user and password, whatever characters it has."""
    scheme, separator, rest = address.partition("://")
    if not separator:
        # Without a scheme, a colon before the @ tells a password from the user of git@host:path.
        last = _last_at(address, 0, len(address)) + 1
        size = last if last > address.find(":") + 1 > 0 else 0
        is_user = "@" in address.partition(":")[0]
        return address if is_user else _masked(address[:size]) + address[size:]
    size = _userinfo_size(rest)
    return scheme + separator + _masked(rest[:size]) + rest[size:]


def parts_of(address: str) -> Parts:
    """Split an address.  The host follows the last ``@`` before the path."""
    scheme, separator, rest = address.partition("://")
    if not separator:
        return Parts("", "", address)
    authority = _AUTHORITY.match(rest)
    assert authority is not None, "the pattern matches an empty text"
    size = authority[0].rfind("@") + 1
    return Parts(scheme + separator, rest[:size][:-1], rest[size:])


def check_address(address: str, kind: str = "address") -> None:
    """Refuse an address whose host may be a part of its password, or is not a host that a client can reach.

    Raises: InvalidArgument.
    """
    scheme, userinfo, rest = parts_of(address)
    if scheme and not userinfo and "@" in rest and not _is_host(rest):
        raise InvalidArgument(f"invalid {kind}: {redacted_address(address)}: {_HINT}")


def ambiguity(address: str) -> str:
    """Return a hint if the host of an address may be a part of its password, or an empty string.

    Connection errors name the host, so they must not be shown in this case.
    """
    parts = parts_of(address)
    return f"the address has more than one @; {_HINT}" if parts.userinfo and "@" in parts.rest else ""


def shown(text: str) -> str:
    """Return a text for messages: without passwords in addresses, and without bytes that are not UTF-8."""
    return readable(redacted(text))


@contextmanager
def shown_errors() -> Iterator[None]:
    """Change the texts of expected errors of the block as ``shown`` does."""
    try:
        yield
    except SkepError as error:
        error.args = tuple(shown(one) if isinstance(one, str) else one for one in error.args)
        raise


class _Ends:
    """Ends of the words and quotes in a text.  Each place is searched only once, because a hostile Dockerfile could
    make repeated searches slow.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._word = 0
        self._quotes: dict[str, int] = {}
        self._last_at = (-1, -1)

    def of(self, start: re.Match[str]) -> int:
        """Return the end of an address: the end of its word, or of the quotes around it."""
        text, begin = self._text, start.end()
        if self._word < begin:
            word = _WORD.match(text, begin)
            assert word is not None, "the pattern matches an empty text"
            self._word = word.end()
        quote = text[start.start() - 1] if start.start() else ""
        if quote not in _CLOSING_QUOTES:
            return self._word
        if self._quotes.get(quote, -1) < begin:
            closing = _CLOSING_QUOTES[quote].search(text, begin)
            self._quotes[quote] = closing.start() if closing else len(text)
        at = self._quotes[quote]
        return max(self._word, at if text[at : at + 1] == quote else begin)

    def last_at(self, begin: int, end: int) -> int:
        """Return the position of the last ``@`` of an address, or -1."""
        if self._last_at[0] != end:
            self._last_at = end, _last_at(self._text, begin, end)
        return self._last_at[1] if self._last_at[1] >= begin else -1


def _userinfo_size(rest: str) -> int:
    """Return the length of user, password and ``@`` at the start of an address without its scheme."""
    return 0 if _is_host(rest) else _last_at(rest, 0, len(rest)) + 1


def _last_at(text: str, begin: int, end: int) -> int:
    """Return the position of the last ``@`` in a part of a text that does not start a digest, or -1."""
    at = text.rfind("@", begin, end)
    while at >= 0 and _DIGEST.match(text, at, end):
        at = text.rfind("@", begin, at)
    return at


def _is_host(rest: str) -> bool:
    """Return whether an address without its scheme starts with a host, so that it has neither user nor password."""
    authority = _AUTHORITY.match(rest)
    assert authority is not None, "the pattern matches an empty text"
    host = authority[0].rstrip(_CLOSING) if authority[0] == rest else authority[0]
    return _HOST.fullmatch(host) is not None


def _masked(userinfo: str) -> str:
    if not userinfo:
        return ""
    user, colon, password = userinfo[:-1].partition(":")
    return (_MASK if user else "") + colon + (_MASK if password else "") + "@"
