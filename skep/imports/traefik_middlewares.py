"""Converts Traefik's middlewares to options of a route.  Pure.

Source: doc.traefik.io, HTTP middlewares of Traefik 2.11 and 3; github.com/unrolled/secure for security headers.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from skep.imports.traefik_rules import RuleAddress
from skep.model.values.times import SECOND_NS, duration_ns

_GUARD: Final = "the front door does not check users. Let the service do it"
_PATHS: Final = "the front door changes paths only with strip-prefix"
_BLOCKING: Final = {
    "basicauth": _GUARD,
    "digestauth": _GUARD,
    "forwardauth": _GUARD,
    "addprefix": _PATHS,
    "replacepath": _PATHS,
    "replacepathregex": _PATHS,
    "stripprefixregex": _PATHS,
    "plugin": "plug-ins of Traefik do not run in the front door",
}
"""Middlewares without which strangers would get in, or the service would get other requests."""
_DISPENSABLE: Final = {
    "circuitbreaker": "unhealthy tasks get no requests. Set a health check with --health-cmd",
    "contenttype": "responses keep their Content-Type",
    "encodedcharacters": "paths stay as clients send them",
    "errors": "the front door has pages of its own for 502, 503 and 504",
    "grpcweb": "gRPC-Web is not translated",
    "inflightreq": "open requests are not limited. Use the option rate of a route",
    "passtlsclientcert": "clients are not asked for certificates",
    "retry": "a request that no task has answered is sent to another task anyway",
}
"""Middlewares that a route can do without."""
_PERIODS: Final = {"s": 1, "m": 60, "h": 3600}
_RATE_MAX: Final = 999_999
"""Most requests of a period.  The option ``rate`` has at most six digits."""
_STATIC_HEADERS: Final = {
    "framedeny": ("X-Frame-Options", "DENY"),
    "contenttypenosniff": ("X-Content-Type-Options", "nosniff"),
    "browserxssfilter": ("X-XSS-Protection", "1; mode=block"),
}
"""Switches that set a header of the response."""
_VALUE_HEADERS: Final = {
    "customframeoptionsvalue": "X-Frame-Options",
    "custombrowserxssvalue": "X-XSS-Protection",
    "contentsecuritypolicy": "Content-Security-Policy",
    "contentsecuritypolicyreportonly": "Content-Security-Policy-Report-Only",
    "referrerpolicy": "Referrer-Policy",
    "permissionspolicy": "Permissions-Policy",
    "featurepolicy": "Feature-Policy",
}
"""Options whose value is a header of the response.  They override the switches."""
_STS: Final = ("stsseconds", "stsincludesubdomains", "stspreload", "forcestsheader")
_SITE: Final = re.compile(r"\^?https\??://((?:[A-Za-z0-9.-]|\\\.)+)/\(\.[*+]\)\$?")
_TARGET: Final = re.compile(r"(https?://[A-Za-z0-9.-]+(?::[0-9]+)?)/(?:\$1|\$\{1\})")


class MiddlewareEffects(msgspec.Struct, kw_only=True):
    """The effects of middlewares on a route.

    Args:
        redirect: Value of the option ``redirect``, or empty.
        refused: Reasons by the ends of labels.
        is_blocking: Whether there must be no route without the refused labels.
    """

    options: dict[str, str] = {}
    redirect: str = ""
    refused: dict[str, str] = {}
    differences: dict[str, str] = {}
    is_blocking: bool = False

    def followed_by(self, other: "MiddlewareEffects") -> "MiddlewareEffects":
        """Return the effects of both, of which the later one prevails."""
        return MiddlewareEffects(
            options={**self.options, **other.options},
            redirect=self.redirect or other.redirect,
        )

    def block(self, option: str, reason: str) -> None:
        """Refuse a label together with the router."""
        self.refused[option] = reason
        self.is_blocking = True


def effects_of(options: Mapping[str, str], addresses: Sequence[RuleAddress]) -> MiddlewareEffects:
    """Return what a middleware does.

    Args:
        options: The ends of its labels with their values, for example ``compress`` and ``true``.
        addresses: Hosts and paths of the router.
    """
    made = MiddlewareEffects()
    kinds = sorted({option.partition(".")[0] for option in options})
    for kind in kinds:
        own = {option.partition(".")[2]: value for option, value in options.items() if _is_of(option, kind)}
        if kind in _CONVERTERS:
            _CONVERTERS[kind](kind, own, addresses, made)
            continue
        for option in own:
            label = _joined(kind, option)
            if kind in _DISPENSABLE:
                made.refused[label] = _DISPENSABLE[kind]
            else:
                made.block(label, _BLOCKING.get(kind, "unknown middleware"))
    return made


def _is_of(option: str, kind: str) -> bool:
    return option == kind or option.startswith(f"{kind}.")


def _joined(kind: str, option: str) -> str:
    return f"{kind}.{option}" if option else kind


def listed(text: str) -> list[str]:
    """Return the words of a list that is separated by commas."""
    return [word for part in text.split(",") if (word := part.strip())]


def _is_true(text: str) -> bool:
    return text.lower() in ("true", "1", "t")


def _redirect_scheme(
    kind: str, own: dict[str, str], _: Sequence[RuleAddress], made: MiddlewareEffects
) -> None:
    scheme, port = own.pop("scheme", ""), own.pop("port", "443")
    if scheme.lower() != "https" or port not in ("", "443"):
        made.block(_joined(kind, "scheme"), "the front door redirects to https at port 443 only")
        return
    _redirect("https", kind, "scheme", own, made)


def _redirect_site(
    kind: str, own: dict[str, str], addresses: Sequence[RuleAddress], made: MiddlewareEffects
) -> None:
    """Convert the redirect of a whole site, as from ``www``."""
    site, target = _SITE.fullmatch(own.pop("regex", "")), _TARGET.fullmatch(own.pop("replacement", ""))
    if site is None or target is None:
        example = "^https?://a.example/(.*) to https://b.example/$1"
        reason = f"only a redirect of a whole site can be converted, as from {example}"
        made.block(_joined(kind, "regex"), reason)
        return
    host = site[1].replace("\\", "").lower()
    if {one.host for one in addresses} != {host}:
        made.block(
            _joined(kind, "regex"), f"all requests of a route are redirected. Write a router for {host} alone"
        )
        return
    _redirect(target[1], kind, "regex", own, made)


def _redirect(target: str, kind: str, option: str, own: dict[str, str], made: MiddlewareEffects) -> None:
    """Redirect to ``target``, and name the difference if Traefik's redirect is temporary."""
    made.redirect = target
    if not _is_true(own.pop("permanent", "false")):
        made.differences[_joined(kind, option)] = "the redirect is permanent (308) and not temporary"
    _refuse_rest(kind, own, made)


def _strip_prefix(
    kind: str, own: dict[str, str], addresses: Sequence[RuleAddress], made: MiddlewareEffects
) -> None:
    paths = [one.path for one in addresses]
    prefixes = {one.rstrip("/") for one in listed(own.pop("prefixes", ""))}
    if not paths or not all(path and path in prefixes for path in paths):
        reason = "the front door strips the path of the route. Write each prefix as PathPrefix in the rule"
        made.block(_joined(kind, "prefixes"), reason)
        return
    made.options["strip-prefix"] = "true"
    if len(set(paths)) == 1:
        made.options["request-header.X-Forwarded-Prefix"] = paths[0]
    else:
        made.differences[_joined(kind, "prefixes")] = "services do not get X-Forwarded-Prefix"
    if not _is_true(own.pop("forceslash", "true")):
        made.refused[_joined(kind, "forceslash")] = "a path always begins with a slash"
    _refuse_rest(kind, own, made)


def _headers(kind: str, own: dict[str, str], _: Sequence[RuleAddress], made: MiddlewareEffects) -> None:
    for option, value in sorted(own.items()):
        direction, name = option.partition(".")[::2]
        if direction in ("customrequestheaders", "customresponseheaders") and name:
            made.options[f"{direction[6:-7]}-header.{name}"] = value
        elif option in _STATIC_HEADERS:
            header, text = _STATIC_HEADERS[option]
            if _is_true(value):
                made.options.setdefault(f"response-header.{header}", text)
        elif option not in _VALUE_HEADERS and option not in _STS:
            made.refused[_joined(kind, option)] = (
                "no such header. Set response-header on the route, or let the service"
            )
    for option, header in _VALUE_HEADERS.items():
        if value := own.get(option, ""):
            made.options[f"response-header.{header}"] = value
    if (seconds := own.get("stsseconds", "0")).isdigit() and int(seconds):
        words = [f"max-age={int(seconds)}"]
        words += ["includeSubDomains"] if _is_true(own.get("stsincludesubdomains", "")) else []
        words += ["preload"] if _is_true(own.get("stspreload", "")) else []
        made.options["response-header.Strict-Transport-Security"] = "; ".join(words)


def _rate_limit(kind: str, own: dict[str, str], _: Sequence[RuleAddress], made: MiddlewareEffects) -> None:
    average, period, burst = own.pop("average", "0"), own.pop("period", "1s"), own.pop("burst", "1")
    # Without a unit, Traefik reads a period as seconds.
    length = duration_ns(f"{period}s" if period.isdigit() else period)
    if not average.isdigit() or not length:
        made.refused[_joined(kind, "average")] = "not a number of requests in a period"
    elif int(average):
        per_second = int(average) * SECOND_NS / length
        unit = next((one for one in "smh" if per_second * _PERIODS[one] >= 1), "h")
        count = max(1, min(_RATE_MAX, round(per_second * _PERIODS[unit])))
        made.options["rate"] = f"{count}/{unit}"
        text = f"each node counts the requests of a client, and lets {count} of them in at once instead of {burst}"
        made.differences[_joined(kind, "average")] = text
    _refuse_rest(kind, own, made, "clients differ by their address")


def _allow(kind: str, own: dict[str, str], _: Sequence[RuleAddress], made: MiddlewareEffects) -> None:
    ranges = listed(own.pop("sourcerange", ""))
    for option in own:
        made.block(
            _joined(kind, option), "clients differ by their address. See skep door up --trusted-proxies"
        )
    if not ranges:
        made.block(_joined(kind, "sourcerange"), "no networks. Add one")
    made.options["allow"] = ",".join(ranges)


def _compress(kind: str, own: dict[str, str], _: Sequence[RuleAddress], made: MiddlewareEffects) -> None:
    if own.pop("", "true").lower() != "false":
        made.options["compress"] = "true"
    _refuse_rest(kind, own, made, "text of any size is compressed with gzip")


def _buffering(kind: str, own: dict[str, str], _: Sequence[RuleAddress], made: MiddlewareEffects) -> None:
    most = own.pop("maxrequestbodybytes", "0")
    if most.isdigit() and int(most):
        made.options["max-body"] = most
        text = "a request without the length of its body gets the status 411"
        made.differences[_joined(kind, "maxrequestbodybytes")] = text
    _refuse_rest(kind, own, made, "bodies are passed on as they come")


def _refuse_rest(
    kind: str, own: Mapping[str, str], made: MiddlewareEffects, reason: str = "unknown option"
) -> None:
    made.refused |= {_joined(kind, option): reason for option in own}


_CONVERTERS: Final[
    Mapping[str, Callable[[str, dict[str, str], Sequence[RuleAddress], MiddlewareEffects], None]]
] = {
    "buffering": _buffering,
    "compress": _compress,
    "headers": _headers,
    "ipallowlist": _allow,
    "ipwhitelist": _allow,
    "ratelimit": _rate_limit,
    "redirectregex": _redirect_site,
    "redirectscheme": _redirect_scheme,
    "stripprefix": _strip_prefix,
}
"""Middlewares that become options.  Each converter takes what it knows out of the options."""
