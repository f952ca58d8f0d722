"""HTTP routes in the labels of services.  Pure.

``skep.http=app.example.com/path`` has one or more routes, separated by commas.  ``skep.http.NAME`` adds others.
Options follow as ``skep.http.OPTION`` for all routes of the service, or ``skep.http.NAME.OPTION`` for the routes of one
label.  The name of an option is never the name of a route.

A proxy on the nodes gets these values in its configuration.  Hosts, paths and header names are therefore limited to
characters without a meaning there, and all other values are checked for control characters here and quoted there.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from ipaddress import ip_network
from typing import Any, Final

import msgspec

from skep.errors import InvalidArgument
from skep.model.values.times import SECOND_NS, duration_ns

HTTP: Final = "skep.http"
PORT_DEFAULT: Final = 80
"""Port of the containers, which is HTTP's own."""
ROUTES_MAX: Final = 100
"""Most routes of one service.  Each label is sent to every node with a proxy."""
HEADERS_MAX: Final = 20
"""Most header rules of a route in one direction, far more than applications need."""
VALUE_MAX: Final = 1024
"""Most characters of a header value.  Proxies limit all headers of a message to 16 KiB."""
_PATH_MAX: Final = 256
"""Most characters of a path.  Longer ones belong to single requests and not to a route."""
_HOST_MAX: Final = 253
"""Most characters of a DNS name (RFC 1035)."""
_TIMEOUT_S_MAX: Final = 24 * 3600.0
"""Longest time for a response in seconds.  More than a day is a mistake."""
_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_PATH: Final = re.compile(r"(/([A-Za-z0-9._~!$&'()*+;=:@-]|%[0-9A-Fa-f]{2})+)*/?")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_HEADER: Final = re.compile(r"[A-Za-z0-9-]{1,64}")
_RATE: Final = re.compile(r"([1-9][0-9]{0,5})/([smh])")
_FAILURES: Final = re.compile(r"[1-9][0-9]{0,2}", re.ASCII)
_SIZE: Final = re.compile(r"([1-9][0-9]{0,11})(KiB|MiB|GiB)?")
_TARGET: Final = re.compile(r"https?://[A-Za-z0-9._~:/@!$&()*+;=%-]{1,500}")
_UNITS: Final = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_PERIODS: Final = {"s": 1, "m": 60, "h": 3600}
_OF_THE_PROXY: Final = frozenset(
    {
        *(
            "connection",
            "content-length",
            "host",
            "keep-alive",
            "te",
            "trailer",
            "transfer-encoding",
            "upgrade",
        ),
        *("forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip"),
    }
)
"""Headers that decide where a message ends or who sent it, and that no rule may change."""


class HeaderRule(msgspec.Struct, frozen=True, order=True):
    """A header to set.  An empty value removes it."""

    name: str
    value: str


class RouteOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a route.  Two routes of a service with equal options share a backend."""

    port: int = PORT_DEFAULT
    """The containers' port."""
    tls: str = ""
    """``auto``, ``off``, or the name of a secret with the certificate.  Empty: the cluster's default."""
    redirect: str = ""
    """``https``, or the address of another site to which all requests are redirected."""
    strip_prefix: bool = False
    sticky: bool = False
    compress: bool = False
    is_shared: bool = False
    """Whether services of other stacks may have routes with this host."""
    max_body_bytes: int = 0
    max_failures: int = 0
    """Failures in a row after which a task gets no requests for some seconds.  Zero means unlimited."""
    timeout_s: float = 0.0
    rate: tuple[int, int] = (0, 0)
    """Requests, and the period in seconds.  Zero means unlimited."""
    h2c: bool = False
    allow: tuple[str, ...] = ()
    """Networks of the clients that are let in.  Empty: all."""
    request_headers: tuple[HeaderRule, ...] = ()
    response_headers: tuple[HeaderRule, ...] = ()

    @property
    def tls_secret(self) -> str:
        """The name of the secret with the certificate, or an empty text."""
        return "" if self.tls in ("auto", "off") else self.tls


class HttpRoute(msgspec.Struct, frozen=True, kw_only=True):
    """One host, with the paths below one prefix."""

    host: str
    """A DNS name in lower case, or one whose first label is ``*``."""
    path: str = ""
    """Without a slash at its end.  Empty for all paths."""
    options: RouteOptions = RouteOptions()

    @property
    def address(self) -> str:
        """The host and path as they are written in the label."""
        return f"{self.host}{self.path}"


def is_http_label(name: str) -> bool:
    """Return whether ``name`` is a label of a route."""
    return name == HTTP or name.startswith(f"{HTTP}.")


def http_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the labels of routes."""
    return {name: value for name, value in labels.items() if is_http_label(name)}


def has_routes(labels: Mapping[str, str]) -> bool:
    """Return whether a service has any label of a route."""
    return any(map(is_http_label, labels))


def routes_of(labels: Mapping[str, str]) -> tuple[HttpRoute, ...]:
    """Return the routes in a service's labels, or none if a label is invalid."""
    try:
        return parsed_routes(labels)
    except InvalidArgument:
        return ()


def parsed_routes(labels: Mapping[str, str]) -> tuple[HttpRoute, ...]:
    """Return the routes in a service's labels, ordered by host and path.  Raises: InvalidArgument."""
    given = http_labels(labels)
    if not given:
        return ()
    found: dict[tuple[str, str], HttpRoute] = {}
    sources = {name: value for name, value in given.items() if _is_source(name)}
    if not sources:
        raise InvalidArgument(
            f"the label {min(given)} needs a route: set {HTTP}=HOST[/PATH] as well, for example {HTTP}=app.example.com"
        )
    used = set(sources)
    for label, value in sorted(sources.items()):
        options, of_options = _options(given, label)
        used |= of_options
        for text in value.split(","):
            host, path = _address(label, text.strip())
            if (host, path) in found:
                raise InvalidArgument(f"invalid label {label}={value}: the service has {host}{path} twice")
            found[host, path] = HttpRoute(host=host, path=path, options=options)
    if unused := sorted(given.keys() - used):
        raise InvalidArgument(_unknown(unused[0], sources))
    if len(found) > ROUTES_MAX:
        raise InvalidArgument(f"the labels {HTTP} have {len(found)} routes: at most {ROUTES_MAX} are allowed")
    return tuple(found[key] for key in sorted(found))


def tls_secrets(labels: Mapping[str, str]) -> frozenset[str]:
    """Return the names of the secrets with certificates that a service's labels name."""
    return frozenset(one.options.tls_secret for one in routes_of(labels)) - {""}


def with_tls_secret(labels: Mapping[str, str], old: Collection[str], new: str) -> dict[str, str]:
    """Return labels with the secret ``new`` in the place of ``old`` ones."""
    return {
        name: new if is_http_label(name) and name.endswith(".tls") and value in old else value
        for name, value in labels.items()
    }


def _is_source(label: str) -> bool:
    rest = label.removeprefix(HTTP).removeprefix(".")
    return label == HTTP or ("." not in rest and rest not in _PARSERS and rest not in _HEADER_RULES)


def _unknown(label: str, sources: Mapping[str, str]) -> str:
    first = label.removeprefix(f"{HTTP}.").partition(".")[0]
    if first not in _PARSERS and first not in _HEADER_RULES and f"{HTTP}.{first}" not in sources:
        return f"invalid label {label}: the service has no label {HTTP}.{first} with a route of this name"
    known = ", ".join(sorted((*_PARSERS, *(f"{one}.NAME" for one in _HEADER_RULES))))
    return f"invalid label {label}: unknown option. The options are {known}"


# -- hosts and paths ---------------------------------------------------------------------------------------------


def _address(label: str, text: str) -> tuple[str, str]:
    """Return the host and path.  Raises: InvalidArgument."""
    host, slash, path = text.partition("/")
    path = slash + path
    if label != HTTP and _NAME.fullmatch(label.removeprefix(f"{HTTP}.")) is None:
        raise InvalidArgument(
            f"invalid label {_shown(label)}: the name of a route has lower-case letters, digits and hyphens"
        )
    if (reason := why_no_host(host)) or (reason := _why_no_path(path)):
        raise InvalidArgument(
            f"invalid label {label}={_shown(text)}: {reason}. Expected HOST[/PATH], for example app.example.com/api"
        )
    return host.lower(), path.rstrip("/")


def why_no_host(host: str) -> str:
    """Return why a route cannot have this host, or an empty string."""
    if not host:
        return "it has no host"
    if "://" in host or host.endswith(":"):
        return "a route has no scheme"
    if ":" in host:
        return f"a route has no port. Set the containers' port with {HTTP}.port"
    if not host.isascii():
        try:
            ascii_host = host.encode("idna").decode()
        except UnicodeError:
            return f"{_shown(host)} is not a DNS name"
        return f"{_shown(host)} has letters beyond ASCII. Write {ascii_host}"
    name = host.lower().removeprefix("*.")
    parts = name.split(".")
    if len(name) > _HOST_MAX or not all(map(_LABEL.fullmatch, parts)):
        return f"{_shown(host)} is not a DNS name"
    if parts[-1].isdigit():
        return f"{_shown(host)} is an address and not a DNS name"
    return ""


def _why_no_path(path: str) -> str:
    if len(path) > _PATH_MAX:
        return f"the path has more than {_PATH_MAX} characters"
    if _PATH.fullmatch(path) is None:
        return f"{_shown(path)} is not a path"
    if {".", ".."} & set(path.split("/")):
        return f"the path {_shown(path)} has the segment . or .."
    return ""


def _shown(text: str) -> str:
    """Return the text for an error, without control characters and without its far end."""
    shown = "".join(char if char.isprintable() else "?" for char in text[:100])
    return shown + "..." if len(text) > len(shown) else shown


# -- options -----------------------------------------------------------------------------------------------------


def _options(labels: Mapping[str, str], source: str) -> tuple[RouteOptions, set[str]]:
    """Return the options of one label's routes, and the labels that they come from.  Raises: InvalidArgument."""
    values: dict[str, Any] = {}
    used: set[str] = set()
    for prefix in dict.fromkeys((HTTP, source)):
        for option, (field, parser) in _PARSERS.items():
            label = f"{prefix}.{option}"
            if (text := labels.get(label)) is not None:
                values[field] = _parsed(label, text, parser)
                used.add(label)
    for direction, field in _HEADER_RULES.items():
        rules = dict[str, HeaderRule]()
        for prefix in dict.fromkeys((HTTP, source)):
            start = f"{prefix}.{direction}."
            for label in sorted(labels):
                if label.startswith(start):
                    rule = _header(label, label.removeprefix(start), labels[label])
                    rules[rule.name.lower()] = rule
                    used.add(label)
        if len(rules) > HEADERS_MAX:
            raise InvalidArgument(f"{source}: more than {HEADERS_MAX} labels .{direction}")
        values[field] = tuple(rules[name] for name in sorted(rules))
    return RouteOptions(**values), used


def _parsed(label: str, text: str, parser: Callable[[str], Any]) -> Any:
    try:
        return parser(text)
    except ValueError as error:
        raise InvalidArgument(f"invalid label {label}={_shown(text)}: expected {error}") from None


def _header(label: str, name: str, value: str) -> HeaderRule:
    if _HEADER.fullmatch(name) is None:
        raise InvalidArgument(f"invalid label {_shown(label)}: {_shown(name)} is not the name of a header")
    if name.lower() in _OF_THE_PROXY:
        raise InvalidArgument(f"invalid label {label}: the front door itself sets the header {name}")
    if len(value) > VALUE_MAX or not (value.isascii() and (value.isprintable() or not value)):
        raise InvalidArgument(
            f"invalid label {label}={_shown(value)}: expected at most {VALUE_MAX} printable ASCII characters"
        )
    return HeaderRule(name, value)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 1 << 16):
        raise ValueError("a port from 1 to 65535")
    return int(text)


def _failures(text: str) -> int:
    if _FAILURES.fullmatch(text) is None:
        raise ValueError("a number of failures in a row, from 1 to 999")
    return int(text)


def _switch(text: str) -> bool:
    if text.lower() not in {"true", "false"}:
        raise ValueError("true or false")
    return text.lower() == "true"


def _tls(text: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text, re.ASCII) is None:
        raise ValueError("auto, off, or the name of a secret")
    return text


def _redirect(text: str) -> str:
    if text != "https" and _TARGET.fullmatch(text) is None:
        raise ValueError("https, or an address like https://www.example.com")
    return text.rstrip("/")


def _bytes(text: str) -> int:
    if (found := _SIZE.fullmatch(text)) is None:
        raise ValueError("a size like 10MiB")
    return int(found[1]) * _UNITS[found[2]]


def _timeout(text: str) -> float:
    duration = duration_ns(text)
    if duration is None or not 0 < duration <= _TIMEOUT_S_MAX * SECOND_NS:
        raise ValueError(f"a duration like 30s, at most {_TIMEOUT_S_MAX / 3600:g}h")
    return duration / SECOND_NS


def _rate(text: str) -> tuple[int, int]:
    if (found := _RATE.fullmatch(text)) is None:
        raise ValueError("requests of one client per second, minute or hour, like 100/s")
    return int(found[1]), _PERIODS[found[2]]


def _protocol(text: str) -> bool:
    if text not in {"http1", "h2c"}:
        raise ValueError("http1 or h2c")
    return text == "h2c"


def networks(text: str) -> tuple[str, ...]:
    """Return networks that are separated by commas, in their normal form.  Raises: ValueError."""
    return tuple(_networks(text))


def _networks(text: str) -> Iterator[str]:
    for part in text.split(","):
        try:
            if "%" in part:
                raise ValueError
            yield str(ip_network(part.strip(), strict=False))
        except ValueError:
            raise ValueError("networks like 10.0.0.0/8, separated by commas") from None


_PARSERS: Final[Mapping[str, tuple[str, Callable[[str], Any]]]] = {
    "allow": ("allow", networks),
    "compress": ("compress", _switch),
    "max-body": ("max_body_bytes", _bytes),
    "max-failures": ("max_failures", _failures),
    "port": ("port", _port),
    "protocol": ("h2c", _protocol),
    "rate": ("rate", _rate),
    "redirect": ("redirect", _redirect),
    "share": ("is_shared", _switch),
    "sticky": ("sticky", _switch),
    "strip-prefix": ("strip_prefix", _switch),
    "timeout": ("timeout_s", _timeout),
    "tls": ("tls", _tls),
}
"""Each option, with its field and its parser.  A parser raises ValueError with the expected form."""
_HEADER_RULES: Final[Mapping[str, str]] = {
    "request-header": "request_headers",
    "response-header": "response_headers",
}
OPTIONS: Final = tuple(_PARSERS)
HEADER_OPTIONS: Final = tuple(_HEADER_RULES)
HTTP_LABELS: Final = (
    HTTP,
    f"{HTTP}.NAME",
    *(f"{HTTP}[.NAME].{option}" for option in _PARSERS),
    *(f"{HTTP}[.NAME].{direction}.HEADER" for direction in _HEADER_RULES),
)
"""All labels of routes.  Upper-case words are placeholders."""


def label_class(name: str) -> str:
    """Return the one of ``HTTP_LABELS`` that ``name`` is an instance of, or ``name`` if there is none."""
    if not name.startswith(f"{HTTP}."):
        return name
    parts = name.removeprefix(f"{HTTP}.").split(".")
    if len(parts) == 1 and parts[0] not in (*_PARSERS, *_HEADER_RULES):
        return f"{HTTP}.NAME"
    if parts[0] not in (*_PARSERS, *_HEADER_RULES):
        parts = parts[1:]
    if len(parts) == 1 and parts[0] in _PARSERS:
        return f"{HTTP}[.NAME].{parts[0]}"
    if len(parts) == 2 and parts[0] in _HEADER_RULES:
        return f"{HTTP}[.NAME].{parts[0]}.HEADER"
    return name
