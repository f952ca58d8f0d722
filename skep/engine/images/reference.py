"""Parses image references (``busybox``, ``registry:5000/team/app:1.2@sha256:...``) as Docker does.

A reference as a user types it is *familiar* (``busybox``).  Internally it is *normalized*
(``docker.io/library/busybox``).  Grammar, rules and error texts follow Docker's library.  A property test checks that a
printed reference parses to the same one.

Source: distribution/reference, regexp.go (grammar), reference.go (Parse), normalize.go (the familiar form).
"""

import re
from functools import lru_cache

import msgspec

from skep.engine.images.digest import Digest, is_digest, parse_digest
from skep.errors import InvalidArgument

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"

_LEGACY_DEFAULT_DOMAIN = "index.docker.io"
_OFFICIAL_PREFIX = "library/"
_NAME_LENGTH_MAX = 255
"""Longest name in characters.  Source: distribution, reference/reference.go (NameTotalLengthMax)."""

_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"  # Docker's `[-]*` would backtrack exponentially here
_DOMAIN_COMPONENT = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_HOST = rf"(?:{_DOMAIN_COMPONENT}(?:\.{_DOMAIN_COMPONENT})*|\[[a-fA-F0-9:]+\])"
_NAME = rf"(?:{_HOST}(?::[0-9]+)?/)?{_COMPONENT}(?:/{_COMPONENT})*"
_TAG = r"\w[\w.-]{0,127}"
_DIGEST = r"[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}"

_REFERENCE = re.compile(rf"({_NAME})(?::({_TAG}))?(?:@({_DIGEST}))?", re.ASCII)
_IDENTIFIER = re.compile(r"[a-f0-9]{64}")
_TAG_ONLY = re.compile(_TAG, re.ASCII)


class Reference(msgspec.Struct, frozen=True, order=True):
    """Normalized reference.  ``tag`` and ``digest`` are empty if unset."""

    domain: str
    path: str
    tag: str = ""
    digest: Digest = Digest("")

    @property
    def name(self) -> str:
        """Repository: domain and path."""
        return f"{self.domain}/{self.path}"

    @property
    def familiar_name(self) -> str:
        """Repository as a user writes it."""
        if self.domain != DEFAULT_DOMAIN:
            return self.name
        official = self.path.removeprefix(_OFFICIAL_PREFIX)
        return official if "/" not in official else self.path

    @property
    def spellings(self) -> tuple[str, ...]:
        """Names by which a service's spec may refer to the image.  A digest stands for every name with it."""
        found = [self.familiar, str(self)]
        if self.tag == DEFAULT_TAG and not self.digest:
            found += [self.familiar_name, self.name]
        if self.digest:
            found.append(self.digest)
        return tuple(found)

    @property
    def familiar(self) -> str:
        """Whole reference as a user writes it."""
        return self.familiar_name + self._suffix

    @property
    def is_name_only(self) -> bool:
        """Whether it has neither tag nor digest, and so means all tags of a repository."""
        return not self.tag and not self.digest

    def __str__(self) -> str:
        return self.name + self._suffix

    def with_default_tag(self) -> "Reference":
        """Return the reference with ``latest`` if it has neither tag nor digest."""
        return msgspec.structs.replace(self, tag=DEFAULT_TAG) if self.is_name_only else self

    def with_tag(self, tag: str) -> "Reference":
        """Return the reference with another tag.  Raises: InvalidArgument: it is not a valid tag."""
        if not _TAG_ONLY.fullmatch(tag):
            raise InvalidArgument("invalid tag format")
        return msgspec.structs.replace(self, tag=tag)

    def with_digest(self, digest: str) -> "Reference":
        """Return the reference to ``digest`` in the same repository, without a tag.

        Raises: InvalidArgument: it is not a digest.
        """
        return Reference(self.domain, self.path, digest=parse_digest(digest))

    @property
    def repository(self) -> "Reference":
        """The reference without tag and digest."""
        return Reference(self.domain, self.path)

    @property
    def _suffix(self) -> str:
        return (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


def parse_reference(text: str) -> Reference:
    """Parse a user's reference and normalize it.

    Raises:
        InvalidArgument: with Docker's words ("invalid reference format", "... must be lowercase").
    """
    if _IDENTIFIER.fullmatch(text):
        raise InvalidArgument(f"invalid repository name ({text}), cannot specify 64-byte hexadecimal strings")
    domain, remainder = _split_domain(text)
    path = remainder.partition(":")[0]
    if path != path.lower():
        raise InvalidArgument("invalid reference format: repository name must be lowercase")
    match = _REFERENCE.fullmatch(f"{domain}/{remainder}")
    if match is None:
        raise InvalidArgument("invalid reference format")
    name, tag, digest = match.groups()
    if len(name) > _NAME_LENGTH_MAX:
        raise InvalidArgument(f"repository name must not be more than {_NAME_LENGTH_MAX} characters")
    return Reference(
        domain, name[len(domain) + 1 :], tag or "", parse_digest(digest) if digest else Digest("")
    )


def parse_any(text: str) -> Reference | Digest:
    """Parse a reference, or a digest from a full image id or ``sha256:...``.

    Raises:
        InvalidArgument: it is neither.
    """
    if _IDENTIFIER.fullmatch(text):
        return Digest(f"sha256:{text}")
    if is_digest(text):
        return Digest(text)
    return parse_reference(text)


def matches(pattern: str, reference: Reference) -> bool:
    """Return whether a ``reference=`` filter selects ``reference``: a shell pattern for its name or all of it.

    Raises:
        InvalidArgument: the pattern is malformed.

    Source: distribution/reference, helpers.go (FamiliarMatch).
    """
    expression = _glob(pattern)
    return any(expression.fullmatch(text) for text in (reference.familiar, reference.familiar_name))


@lru_cache(maxsize=64)
def _glob(pattern: str) -> re.Pattern[str]:
    """Compile a shell pattern as Go's ``path.Match`` reads it: ``*`` and ``?`` do not match a slash."""
    pieces = re.findall(r"\\(.)|(\*+)|(\?)|\[(\^?)((?:\\.|[^\]\\])+)\]|([^\[\\])", pattern, re.DOTALL)
    expression, length = "", 0
    for escaped, star, mark, negation, members, plain in pieces:
        if members:
            # Ranges and escapes keep their meaning.
            inside = "".join(f"\\{char}" if char in "[]^&~|" else char for char in members)
            expression += f"(?!/)[{negation}{inside}]" if negation else f"[{inside}]"
            length += len(members) + len(negation) + 2
        else:
            expression += "[^/]*" if star else "[^/]" if mark else re.escape(escaped or plain)
            length += len(star or mark or plain) or 2
    try:
        if length == len(pattern):
            return re.compile(expression, re.DOTALL)
    except re.error:
        pass
    raise InvalidArgument("syntax error in pattern")


def _split_domain(text: str) -> tuple[str, str]:
    """Split a name into its registry and the rest, and add Docker's defaults.

    The part before the first slash is a registry only if it contains a dot or a colon, or is ``localhost``.
    """
    first, slash, rest = text.partition("/")
    if not slash or (not set(".:") & set(first) and first != "localhost"):
        domain, remainder = DEFAULT_DOMAIN, text
    else:
        domain, remainder = first, rest
    if domain == _LEGACY_DEFAULT_DOMAIN:
        domain = DEFAULT_DOMAIN
    if domain == DEFAULT_DOMAIN and "/" not in remainder:
        remainder = _OFFICIAL_PREFIX + remainder
    return domain, remainder


def tagged(word: str) -> Reference | None:
    """Return the reference that a word means, with its tag.  None for the id of an image.  Raises: InvalidArgument."""
    named = parse_any(word)
    return named.with_default_tag() if isinstance(named, Reference) else None
