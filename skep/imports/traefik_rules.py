"""Rules of Traefik's routers, as hosts with paths.  Pure.

A rule has matchers such as ``Host(`a.example.com`)``, with ``&&``, ``||``, ``!`` and parentheses.  The front door knows
hosts and prefixes of paths, so all other matchers are refused by name.

Source: doc.traefik.io, "Rules & Priority" of Traefik 2 and 3.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from skep.errors import InvalidArgument
from skep.model.door.routes import HTTP, ROUTES_MAX, parsed_routes

_RULE_MAX: Final = 4096
"""Most characters of a rule.  A hundred hosts fit into it."""
_DEPTH_MAX: Final = 20
"""Most parentheses around a matcher, so that the parser stays far below Python's limit of recursion."""
_TOKEN: Final = re.compile(r'\s*(&&|\|\||[()!,]|[A-Za-z]+|`[^`]*`|"(?:[^"\\]|\\.)*")')
_ONE_LABEL: Final = (
    re.compile(
        r"\^\[(?:\^\.|a-z0-9-|a-zA-Z0-9-)\]\+\\\.([A-Za-z0-9-]+(?:\\\.[A-Za-z0-9-]+)+)\$"
    ),  # Traefik 3
    re.compile(
        r"\{[^{}:]*:\[(?:\^\.|a-z0-9-|a-zA-Z0-9-)\]\+\}\.([A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+)"
    ),  # Traefik 2
)
"""Regular expressions of any single label before a domain."""
_HOSTS: Final = frozenset({"host", "hostheader", "hostregexp"})
_OTHERS: Final = {
    "path": "it matches one path alone, and a route of Skep also has the paths below it. Use PathPrefix",
    "pathregexp": "routes have no regular expressions. Use PathPrefix",
    "method": "routes do not differ by method",
    "clientip": "routes do not differ by address. Use the option allow of a route",
    "header": "routes do not differ by header",
    "headers": "routes do not differ by header",
    "headerregexp": "routes do not differ by header",
    "headersregexp": "routes do not differ by header",
    "query": "routes do not differ by query",
    "queryregexp": "routes do not differ by query",
}
"""Matchers that a route cannot express, with the reason."""


class RuleAddress(msgspec.Struct, frozen=True, order=True):
    """A host with the paths below one prefix.  ``path``: without a slash at its end."""

    host: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.host}{self.path}"


class _Matcher(msgspec.Struct, frozen=True, order=True):
    is_host: bool
    value: str


_Alternatives = list[frozenset[_Matcher]]
"""Conditions of which one has to be true.  Each has matchers that all have to be true."""


def addresses_of(rule: str) -> tuple[RuleAddress, ...]:
    """Return the hosts and paths that a rule matches, in order.  Raises: ValueError: the reason why a route cannot."""
    if len(rule) > _RULE_MAX:
        raise ValueError(f"the rule has more than {_RULE_MAX} characters. Use several routers")
    parser = _Parser(list(_tokens(rule)))
    found = sorted({_address(one) for one in parser.alternatives()})
    if parser.has_more:
        raise ValueError(f"the rule cannot be read at {parser.shown}")
    return tuple(found)


def _tokens(rule: str) -> Iterator[str]:
    at = 0
    while rule[at:].strip():
        if (found := _TOKEN.match(rule, at)) is None:
            raise ValueError(f"the rule cannot be read at {rule[at : at + 20].strip()}")
        yield found[1]
        at = found.end()


class _Parser:
    """A parser by recursive descent, which returns the rule as alternatives."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = tokens
        self._at = 0
        self._depth = 0

    @property
    def has_more(self) -> bool:
        """Return whether tokens are left."""
        return self._at < len(self._tokens)

    @property
    def shown(self) -> str:
        """Return the next token for an error."""
        return self._tokens[self._at] if self.has_more else "its end"

    def alternatives(self) -> _Alternatives:
        """Return the alternatives of ``A || B``."""
        found = self._all()
        while self._takes("||"):
            found += self._all()
            _require_few(found)
        return found

    def _all(self) -> _Alternatives:
        found = self._one()
        while self._takes("&&"):
            found = [left | right for right in self._one() for left in found]
            _require_few(found)
        return found

    def _one(self) -> _Alternatives:
        if self._takes("!"):
            raise ValueError("a route cannot exclude requests with !")
        if self._takes("("):
            self._depth += 1
            if self._depth > _DEPTH_MAX:
                raise ValueError(f"the rule has more than {_DEPTH_MAX} parentheses around a matcher")
            found = self.alternatives()
            self._depth -= 1
            self._require(")")
            return found
        name = self._next()
        if not name.isalpha():
            raise ValueError(f"the rule cannot be read at {name}")
        self._require("(")
        values = [self._value(name)]
        while self._takes(","):
            values.append(self._value(name))
        self._require(")")
        return [frozenset({_matcher(name, value)}) for value in values]

    def _value(self, name: str) -> str:
        token = self._next()
        if token[0] not in '`"':
            raise ValueError(f"{name} needs values in backticks")
        return token[1:-1] if token[0] == "`" else re.sub(r"\\(.)", r"\1", token[1:-1])

    def _next(self) -> str:
        if not self.has_more:
            raise ValueError("the rule ends too early")
        self._at += 1
        return self._tokens[self._at - 1]

    def _takes(self, token: str) -> bool:
        is_next = self.has_more and self._tokens[self._at] == token
        self._at += is_next
        return is_next

    def _require(self, token: str) -> None:
        if not self._takes(token):
            raise ValueError(f"the rule needs {token} at {self.shown}")


def _require_few(found: _Alternatives) -> None:
    if len(found) > ROUTES_MAX:
        raise ValueError(
            f"the rule has more than {ROUTES_MAX} combinations of hosts and paths. Use several services"
        )


def _matcher(name: str, value: str) -> _Matcher:
    kind = name.lower()
    if kind in _OTHERS:
        raise ValueError(f"{name}: {_OTHERS[kind]}")
    if kind == "pathprefix":
        if not value.startswith("/"):
            raise ValueError(f"PathPrefix(`{value}`): a path begins with a slash")
        return _Matcher(is_host=False, value=value.rstrip("/"))
    if kind not in _HOSTS:
        raise ValueError(f"{name}: unknown matcher")
    host = value.lower()
    if kind == "hostregexp":
        form = next((found for one in _ONE_LABEL if (found := one.fullmatch(value))), None)
        if form is None:
            raise ValueError(
                f"HostRegexp(`{value}`): a route has names. Use Host, also with any single label before a domain, "
                "like Host(`*.example.com`)"
            )
        host = f"*.{form[1].replace(chr(92), '').lower()}"
    return _Matcher(is_host=True, value=host)


def _address(matchers: frozenset[_Matcher]) -> RuleAddress:
    hosts = sorted(one.value for one in matchers if one.is_host)
    paths = sorted((one.value for one in matchers if not one.is_host), key=len)
    if not hosts:
        raise ValueError("a route needs a host, and part of the rule has none. Add Host")
    longest = paths[-1] if paths else ""
    if len(hosts) > 1 or any(not f"{longest}/".startswith(f"{one}/") for one in paths):
        raise ValueError("no request can match part of the rule, which requires two hosts or two paths")
    found = RuleAddress(hosts[0], longest)
    if "," in str(found):
        raise ValueError(f"{found} has a comma, which separates routes")
    try:
        parsed_routes({HTTP: str(found)})
    except InvalidArgument as error:
        raise ValueError(str(error).partition(": ")[2].partition(". Expected")[0]) from None
    return found
