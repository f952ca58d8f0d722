"""The configuration of HAProxy, from routes and backends.  Pure.

HAProxy finds a request's backend in a map, whose keys are a host, a path and a slash.  The longest key that begins the
request's own host, path and slash wins.  With the slash at the end, ``/api`` does not include ``/apis``.

HAProxy passes a request for a service that is scaled to zero to the node's socket ``HOLD``, after the refusals of its
route.  The node sends it to the socket ``RELEASED`` of the newest process once a task serves
(``dataplane.door.holding``).

After a reload, a former process sends requests on connections that were idle to the newest process, because it does not
know tasks that have come since.

Each backend has more server lines than tasks.  ``commands`` writes the addresses of new tasks into unused lines
while HAProxy runs, so scaling and updates need no reload.

Only values that ``model.door.routes`` has checked reach this text.  Values with free text are quoted (``quoted``).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Final

import msgspec

from skep.dataplane.door.certificates import LIST, certificate_file
from skep.model.door.routes import HeaderRule, HttpRoute, RouteOptions
from skep.model.door.settings import KEYS_DIRECTORY, DoorSettings
from skep.model.door.traffic import BOUNDS_MS, ROUTES_MAX

UNUSED: Final = "0.0.0.0"
"""Address of a server line without a task."""
HOLD: Final = "hold.sock"
"""Name of the socket where the node holds requests."""
RELEASED: Final = "released.sock"
"""Name of the socket where HAProxy gets them back."""
HELD_FOR: Final = "x-skep-held-for"
"""Header with the id of the service that a held request is for."""
UNREACHED: Final = "x-skep-unreached"
"""Header of HAProxy's response to a held request if it has reached no task."""
NEWEST: Final = "newest"
"""Backend whose server is the newest process, its socket, and a map that is empty until a former process may use it."""
SLOTS_MIN: Final = 2
"""Fewest server lines of a backend.  An update of a single task with start-first needs two."""

HEAD_S: Final = 10
"""Seconds for the head of a request.  Slower clients would keep connections, of which HAProxy has a limited number."""
LEFT_OUT_S: Final = 10
"""Seconds for which a task with too many failures in a row gets no requests, as in nginx."""

TRAFFIC_TABLE: Final = "skep-traffic"
"""Backend without servers, whose table counts slow responses by route and latency."""
CONNECT_S: Final = 2
"""Seconds after which a request whose connection to a task does not open is sent to another one."""
_FORM: Final = 7
"""Grows when the text changes for the same state, so that nodes reload HAProxy after an upgrade."""
_REPEATED: Final = "    http-request disable-l7-retry unless { method GET HEAD OPTIONS PUT DELETE }"
"""Rule that sends no other request again once a task may have got it (RFC 9110, 9.2.2: idempotent methods)."""
_TO_ROUTE: Final = "    use_backend %[var(txn.route)]"
"""Rule without a condition, because HAProxy uses the default backend if the name is empty."""
CHALLENGES: Final = "/.well-known/acme-challenge/"
_COMPRESSED: Final = (
    "text/html text/plain text/css text/javascript application/javascript application/json application/xml "
    "image/svg+xml"
)


class ServerLine(msgspec.Struct, frozen=True, kw_only=True):
    """A server line.  Only a ready server gets requests.  ``task``: empty in an unused line.

    ``weight``: its share of the requests, relative to the other servers.  ``is_new``: whether its requests are counted,
    for a staged update.
    """

    task: str = ""
    address: str = UNUSED
    is_ready: bool = False
    weight: int = 1
    is_new: bool = False


NOBODY: Final = ServerLine()


class RouteBackend(msgspec.Struct, frozen=True, kw_only=True):
    """The tasks of one service with the options of some of its routes.

    Args:
        stripped: Prefix that paths lose.
        is_secure: Whether requests without TLS are redirected, because the host has a certificate.
        holds: Whether the node holds requests while no task serves.
    """

    name: str
    options: RouteOptions
    service: str = ""
    stripped: str = ""
    is_secure: bool = False
    holds: bool = False
    servers: tuple[ServerLine, ...] = ()


class DoorState(msgspec.Struct, frozen=True, kw_only=True):
    """All that HAProxy serves.

    Args:
        routes: Each key of the map, with the name of its backend.
        certificates: Certificate chain and key in PEM, by host.
        challenges: Responses of ACME's HTTP-01 challenges, by token.
    """

    settings: DoorSettings = DoorSettings()
    backends: Mapping[str, RouteBackend] = {}
    routes: Mapping[str, str] = {}
    certificates: Mapping[str, str] = {}
    challenges: Mapping[str, str] = {}


def key_of(route: HttpRoute) -> str:
    """Return the key of a route in the map."""
    return f"{route.host}{route.path}/"


def backend_name(service_id: str, route: HttpRoute, *, is_secure: bool = False) -> str:
    """Return the name of a route's backend, which routes of the service with the same options share."""
    stripped = route.path if route.options.strip_prefix else ""
    kind = (route.options, stripped, is_secure) if is_secure else (route.options, stripped)
    digest = sha256(msgspec.json.encode(kind)).hexdigest()
    return f"{service_id}-{digest[:12]}"


def slotted(before: Sequence[ServerLine], wanted: Iterable[ServerLine]) -> tuple[ServerLine, ...]:
    """Return the server lines for the tasks of ``wanted``.

    A task keeps its line.  The number of lines only grows, because a different number needs a reload.
    """
    present = {one.task: one for one in wanted}
    lines = [present.pop(one.task, NOBODY) if one.task else NOBODY for one in before]
    # Lines of tasks that have just ended come last: responses to their clients may still be under way.
    ended = [at for at, one in enumerate(before) if lines[at] is NOBODY and one.task]
    free = [at for at, one in enumerate(lines) if one is NOBODY and at not in set(ended)] + ended
    for at, server in zip(free, sorted(present.values(), key=lambda one: one.task), strict=False):
        lines[at] = present.pop(server.task)
    lines += sorted(present.values(), key=lambda one: one.task)
    count = max(SLOTS_MIN, len(before))
    while len(lines) > len(before) and count <= len(lines):  # one line is left for the next task
        count *= 2
    return (*lines, *(NOBODY for _ in range(count - len(lines))))


# -- the text ----------------------------------------------------------------------------------------------------


def structure(state: DoorState) -> DoorState:
    """Return the part of ``state`` whose change needs a reload.

    Tasks in server lines, challenges and renewed certificates are changed by commands.
    """
    emptied = {
        name: msgspec.structs.replace(one, servers=(NOBODY,) * len(one.servers))
        for name, one in state.backends.items()
    }
    return msgspec.structs.replace(
        state, backends=emptied, challenges={}, certificates=dict.fromkeys(state.certificates, "")
    )


def version_of(state: DoorState) -> str:
    """Return a short name for the structure of ``state``."""
    return _digest((_FORM, structure(state)))


def description_of(state: DoorState) -> str:
    """Return the description of the configuration, which HAProxy shows: the structure, and the certificates."""
    return f"{version_of(state)}.{_digest(state.certificates)}"


def _digest(value: object) -> str:
    return sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()[:16]


def files(state: DoorState, directory: str, keys: str = KEYS_DIRECTORY) -> dict[str, str]:
    """Return the content of each file in HAProxy's ``directory``.

    Args:
        keys: The directory of the certificates (``certificates.write_certificates``) as HAProxy sees it.
    """
    return {
        "haproxy.cfg": "\n".join(_configuration(state, directory, keys)) + "\n",
        "routes.map": "".join(f"{key} {name}\n" for key, name in sorted(state.routes.items())),
        "holds.map": "".join(
            f"{name} hold-{name}\n" for name, one in sorted(state.backends.items()) if one.holds
        ),
        f"{NEWEST}.map": "",
        "challenges.map": "".join(f"{token} {key}\n" for token, key in sorted(state.challenges.items())),
    }


def _configuration(state: DoorState, directory: str, keys: str) -> Iterator[str]:
    yield from _global(directory, description_of(state))
    yield from _defaults(state.settings)
    if any(one.holds for one in state.backends.values()):
        # Without this option, frontends do not notice when a client disconnects.
        yield "    option abortonclose"
    http, https = state.settings.ports
    yield from _frontend("http", str(http), state, directory)
    if state.certificates:
        # Clients that name no host of ours get no certificate, since each of them belongs to another site.
        tls = f"{https} ssl crt-list {keys}/{LIST} strict-sni alpn h2,http/1.1"
        yield from _frontend("https", tls, state, directory)
    # Entries stay until the table is full.  Further routes are not counted then.
    yield f"backend {TRAFFIC_TABLE}"
    yield f"    stick-table type string len 64 size {ROUTES_MAX} nopurge store gpc({len(BOUNDS_MS)})"
    yield from _released(state, directory)
    yield from _newest(state, directory)
    yield "backend no-route"
    yield "    http-request return status 404 content-type text/plain string 'No route leads to this address.\\n'"
    for name in sorted(state.backends):
        yield _backend_text(state.backends[name])
        if state.backends[name].holds:
            yield from _holding(state.backends[name], directory)


def _global(directory: str, description: str) -> Iterator[str]:
    yield "# Written by Skep.  Changes are overwritten."
    yield "global"
    yield f"    description {description}"
    yield f"    stats socket {directory}/admin.sock mode 600 level admin expose-fd listeners"
    yield "    user haproxy"
    yield "    group haproxy"
    yield "    log stdout len 4096 format raw local0"
    # A former process serves its open connections on after a reload.  A day is longer than most of them last.
    yield "    hard-stop-after 24h"
    yield "    ssl-default-bind-options ssl-min-ver TLSv1.2"
    yield "    tune.ssl.default-dh-param 2048"


def _defaults(settings: DoorSettings) -> Iterator[str]:
    yield "defaults"
    yield "    mode http"
    if settings.logs:
        yield "    log global"
        yield f"    log-format {quoted(LOG_LINE)}"
    yield "    option dontlognull"
    yield "    option splice-auto"
    # A reload must not close an idle connection at the moment when its client sends the next request.
    yield "    option idle-close-on-response"
    yield "    timeout client 60s"
    yield f"    timeout http-request {HEAD_S}s"
    # A former process knows no tasks that came after its reload.  Idle connections leave it within this time.
    yield "    timeout http-keep-alive 10s"
    # Containers of the cluster accept a connection within milliseconds.  Without an answer another one is tried.
    yield f"    timeout connect {CONNECT_S}s"
    yield "    timeout server 60s"
    yield "    timeout tunnel 24h"
    yield "    timeout queue 10s"
    # Seconds between two attempts at the same server are HAProxy's: three of them cover an application's start.
    yield "    retries 3"
    yield "    option redispatch 1"
    yield "    retry-on conn-failure empty-response"
    for status, text in (
        (502, "does not respond correctly"),
        (503, "is not available"),
        (504, "is too slow"),
    ):
        text_page = page(f"This site {text} at the moment. Please try again soon.")
        yield (
            f"    http-error status {status} content-type 'text/html; charset=utf-8' string {quoted(text_page)}"
            f"{f' hdr Retry-After 5 hdr {UNREACHED} %[var(txn.released)]' if status == 503 else ''}"
        )


LOG_LINE: Final = (
    '{"time":"%[date,utime(%Y-%m-%dT%H:%M:%SZ)]","client":"%ci","method":"%HM"'
    ',"host":"%[var(txn.host),json(utf8s)]","path":"%[var(txn.path),json(utf8s)]","status":%ST,"bytes":%B,'
    '"ms":%Ta,"backend":"%b","server":"%si","state":"%ts"}'
)
"""One line of the access log.  ``state`` is ``--`` unless a side has ended the request early."""


def page(text: str) -> str:
    """Return a page with a sentence."""
    return f'<!doctype html><html lang="en"><title>{text}</title><p>{text}</p></html>'


def _frontend(name: str, bind: str, state: DoorState, directory: str) -> Iterator[str]:
    settings, scheme = state.settings, name
    yield f"frontend {name}"
    accepts = " accept-proxy" if settings.accepts_proxy else ""
    yield f"    bind :{bind}{accepts}"
    if settings.has_ipv6:
        yield f"    bind :::{bind} v6only{accepts}"
    yield (
        f"    http-request return status 200 content-type text/plain lf-string "
        f"%[path,field(-1,/),map_str({directory}/challenges.map)] if {{ path_beg {CHALLENGES} }} "
        f"{{ path,field(-1,/),map_str({directory}/challenges.map) -m found }}"
    )
    yield from _routing(state, directory)
    yield from _forwarded_headers(scheme, settings.trusted)
    yield from latency_rules()
    yield _REPEATED
    # First, because a former process counts no server as usable, and does not know later routes.
    yield f"    use_backend {NEWEST} if {{ stopping }} {{ str(on),map_str({directory}/{NEWEST}.map) -m found }}"
    yield from _to_tasks(state, directory)


def _to_tasks(state: DoorState, directory: str) -> Iterator[str]:
    """Yield the rules that use a route's backend, or the node if the service has no task."""
    if any(one.holds for one in state.backends.values()):
        yield f"    http-request set-var(txn.hold) var(txn.route),map_str({directory}/holds.map)"
        yield "    use_backend %[var(txn.hold)] if { var(txn.hold) -m found } { var(txn.route),nbsrv eq 0 }"
    yield _TO_ROUTE
    yield "    default_backend no-route"


def _forwarded_headers(scheme: str, trusted: Sequence[str]) -> Iterator[str]:
    """Yield the rules that tell services about the client, and let only trusted proxies do so too."""
    unless = f" unless {{ src {' '.join(trusted)} }}" if trusted else ""
    # A prefix is cheaper than a rule for each name, and services believe others of them as well.
    yield f"    http-request del-header X-Forwarded- -m beg{unless}"
    yield f"    http-request del-header Forwarded{unless}"
    yield "    http-request add-header X-Forwarded-For %[src]"
    for header, value in (("Host", "%[req.hdr(host)]"), ("Proto", scheme)):
        if_missing = f" if !{{ req.hdr(X-Forwarded-{header}) -m found }}" if trusted else ""
        yield f"    http-request add-header X-Forwarded-{header} {value}{if_missing}"


def latency_rules() -> Iterator[str]:
    """Yield the rules of a frontend that count each slow response of a task by its latency.

    Counter ``n`` has the responses that are slower than ``n + 1`` bounds.  A fast one, as most are, needs one condition
    and no look into the table.  HAProxy's own counters have the number of all responses.
    """
    yield "    http-request set-var(txn.began) date(0,ms)"
    elapsed = "date(0,ms),sub(txn.began)"
    for number, bound in enumerate(BOUNDS_MS):
        # No rule of the frontend follows these.
        yield f"    http-response allow if {{ {elapsed} -m int le {bound} }}"
        if not number:
            yield f"    http-response set-var(txn.ms) {elapsed}"
            yield f"    http-response track-sc1 var(txn.route) table {TRAFFIC_TABLE}"
            elapsed = "var(txn.ms)"
        yield f"    http-response sc-inc-gpc({number},1)"


def _routing(state: DoorState, directory: str) -> Iterator[str]:
    """Yield the rules that find a request's backend."""
    yield "    http-request set-var(txn.path) path"
    yield "    http-request set-var(txn.host) req.hdr(host),field(1,:),lower,rtrim(.)"
    find = f"concat(,txn.path,/),map_beg({directory}/routes.map)"
    yield f"    http-request set-var(txn.route) var(txn.host),{find}"
    if any(key.startswith("*") for key in state.routes):
        found = "!{ var(txn.route) -m found }"
        yield f"    http-request set-var(txn.route) var(txn.host),regsub(^[^.]*,*),{find} if {found}"


def _released(state: DoorState, directory: str) -> Iterator[str]:
    """Yield the frontend for requests that the node has held."""
    # The node sends a request again if HAProxy itself responds with this variable, which no task can set.
    rules = (f"http-request del-header {HELD_FOR}", "http-request set-var(txn.released) str(yes)")
    yield from _inner_frontend(
        "released", f"{directory}/{RELEASED} accept-proxy mode 600", state, directory, rules
    )
    yield _TO_ROUTE
    yield "    default_backend no-route"


def _newest(state: DoorState, directory: str) -> Iterator[str]:
    """Yield the backend that passes requests to the newest process, and the frontend that gets them there."""
    # A former process connects as HAProxy's own user.
    socket = f"{directory}/{NEWEST}.sock accept-proxy mode 600 user haproxy"
    yield from _inner_frontend("from-former", socket, state, directory)
    yield from _to_tasks(state, directory)
    yield f"backend {NEWEST}"
    yield f"    http-response del-header {UNREACHED}"
    yield "    timeout server 24h"
    yield "    http-reuse never"
    yield f"    server {NEWEST} unix@{directory}/{NEWEST}.sock send-proxy-v2 pool-max-conn 0"


def _inner_frontend(
    name: str, socket: str, state: DoorState, directory: str, rules: Sequence[str] = ()
) -> Iterator[str]:
    """Yield the beginning of a frontend behind another one, which has set the headers and logs the requests."""
    yield f"frontend {name}"
    yield f"    bind unix@{socket}"
    yield from _routing(state, directory)
    yield from (f"    {rule}" for rule in rules)
    yield f"    http-response del-header {UNREACHED}"
    yield "    http-request set-log-level silent"
    yield _REPEATED


def _holding(backend: RouteBackend, directory: str) -> Iterator[str]:
    """Yield the backend that passes requests to the node."""
    yield f"backend hold-{backend.name}"
    yield from _refusals(backend, is_held=True)
    yield f"    http-request set-header {HELD_FOR} {backend.service}"
    # The node has limits of its own, and the task's backend has the route's.
    yield "    timeout server 24h"
    yield "    option abortonclose"
    yield "    option http-server-close"
    yield "    http-reuse never"
    yield f"    server node unix@{directory}/{HOLD} send-proxy-v2 pool-max-conn 0"


@lru_cache(
    maxsize=20_000
)  # a task that starts changes one of the backends, and the text of all is written again
def _backend_text(backend: RouteBackend) -> str:
    return "\n".join(_backend(backend))


def _backend(backend: RouteBackend) -> Iterator[str]:
    options = backend.options
    yield f"backend {backend.name}"
    yield "    no option abortonclose"  # a client that shuts down its side still gets its response
    yield from _refusals(backend)
    if backend.stripped:
        # Without the quotes around the prefix.
        cut = f"path,bytes({len(backend.stripped)})"
        # The second rule does not apply after the first, because / is shorter than any prefix.
        yield f"    http-request set-path / if {{ path -m str {quoted(backend.stripped)} }}"
        yield f"    http-request set-path %[{cut}] if {{ {cut},length gt 0 }}"
    for direction, rules in (("request", options.request_headers), ("response", options.response_headers)):
        for rule in rules:
            yield f"    http-{direction} {_header(rule)}"
    if options.compress:
        yield "    compression algo gzip"
        yield f"    compression type {_COMPRESSED}"
    if options.sticky:
        # Hosts have routes of several services, whose cookies must not replace each other.  Routes of one service with
        # the same port lead to the same task.
        tasks = f"{backend.service}:{options.port}"
        name = f"skep-door-{sha256(tasks.encode()).hexdigest()[:8]}"
        yield f"    cookie {name} insert indirect nocache httponly attr SameSite=Lax dynamic"
        yield f"    dynamic-cookie-key {tasks}"
    if options.timeout_s:
        yield f"    timeout server {max(1, round(options.timeout_s * 1000))}ms"
    for number, server in enumerate(backend.servers, start=1):
        yield f"    server {server_line(number, server, options)}"


def _refusals(backend: RouteBackend, *, is_held: bool = False) -> Iterator[str]:
    """Yield the rules that respond to a request without a task.  A held request passes them once more later."""
    options = backend.options
    if options.allow:
        yield f"    http-request deny deny_status 403 unless {{ src {' '.join(options.allow)} }}"
    if options.redirect == "https" or backend.is_secure:
        # The frontend has removed the header, unless a trusted proxy has sent it.
        yield "    http-request redirect scheme https code 308 unless { req.hdr(X-Forwarded-Proto) https }"
    if options.redirect not in ("", "https"):
        yield f"    http-request redirect prefix {literal(options.redirect)} code 308"
    yield from _limits(backend, is_held=is_held)


def server_line(number: int, server: ServerLine, options: RouteOptions) -> str:
    """Return the definition of a backend's server."""
    address = f"[{server.address}]" if ":" in server.address else server.address
    protocol = " proto h2" if options.h2c else ""
    weight = f" weight {server.weight}" if server.weight != 1 else ""
    # Checks bring a server back: the first one by ``fastinter``, later ones by ``downinter``.
    left_out = (
        f" check inter 24h fastinter {LEFT_OUT_S}s downinter {LEFT_OUT_S}s rise 1 fall 1"
        f" observe layer7 error-limit {options.max_failures} on-error mark-down"
        if options.max_failures
        else ""
    )
    ready = "" if server.is_ready else " disabled"
    return f"s{number} {address}:{options.port}{protocol}{weight}{left_out}{ready}"


def _limits(backend: RouteBackend, *, is_held: bool) -> Iterator[str]:
    options, table = backend.options, backend.name
    requests, period_s = options.rate
    if requests:
        unless = ""
        if not is_held:
            # One entry has about 100 bytes.  A full table forgets the oldest clients.
            yield f"    stick-table type ipv6 size 100k expire {period_s}s store http_req_rate({period_s}s)"
            unless = " unless { var(txn.released) -m found }"  # it was counted before it was held
        yield f"    http-request track-sc0 src table {table}{unless}"
        yield f"    http-request deny deny_status 429 if {{ sc_http_req_rate(0,{table}) gt {requests} }}"
    if options.max_body_bytes:
        yield f"    http-request deny deny_status 413 if {{ req.body_size gt {options.max_body_bytes} }}"
        # A request without a length could be of any size.
        refusal = "content-type text/plain string 'Send the length of the body.'"
        yield f"    http-request return status 411 {refusal} if {{ req.hdr(transfer-encoding) -m found }}"


def _header(rule: HeaderRule) -> str:
    if not rule.value:
        return f"del-header {rule.name}"
    return f"set-header {rule.name} {literal(rule.value)}"


def literal(text: str) -> str:
    """Return ``text`` as one word where HAProxy expects a format, in which ``%`` has a meaning."""
    return quoted(text.replace("%", "%%"))


def quoted(text: str) -> str:
    """Return ``text`` as one word of HAProxy's configuration.  It must not have control characters."""
    assert text.isprintable(), "checked where the text came from"
    return "'" + text.replace("'", "'\\''") + "'"


# -- changes while HAProxy runs ----------------------------------------------------------------------------------

_COMMAND_MAX: Final = 15_000
"""Characters of a command.  HAProxy reads at most 16 KiB at once."""


def commands(
    before: DoorState, after: DoorState, directory: str, keys: str = KEYS_DIRECTORY
) -> list[str] | None:
    """Return the commands of the runtime API that turn ``before`` into ``after``, or None if that needs a reload."""
    if before.backends.keys() != after.backends.keys() or structure(before) != structure(after):
        return None
    found: list[str] = []
    for name in sorted(after.backends):
        one = after.backends[name]
        lines = zip(before.backends[name].servers, one.servers, strict=True)
        for number, (old, new) in enumerate(lines, start=1):
            if old != new:
                found += _changed(f"{name}/s{number}", old, new, one.options)
    answers = f"{directory}/challenges.map"
    found += [
        f"del map {answers} {token}" for token in sorted(before.challenges.keys() - after.challenges.keys())
    ]
    found += [
        f"add map {answers} {token} {text}"
        for token, text in sorted(after.challenges.items())
        if token not in before.challenges
    ]
    for host, pem in sorted(after.certificates.items()):
        if before.certificates[host] != pem:
            file = f"{keys}/{certificate_file(host)}"
            found += [f"set ssl cert {file} <<\n{_without_blank_lines(pem)}\n", f"commit ssl cert {file}"]
    return found if max(map(len, found), default=0) < _COMMAND_MAX else None


def use_newest(directory: str) -> str:
    """Return the command that lets a former process send requests to the newest one.

    A stopping HAProxy accepts no changes of servers.
    """
    return f"add map {directory}/{NEWEST}.map on yes"


def every_command(state: DoorState, directory: str) -> list[str]:
    """Return the commands that set server lines and challenges to their state, from any other state."""
    other = ServerLine(task="unknown", address="unknown", is_ready=True, weight=0)
    lines = [
        command
        for name, one in sorted(state.backends.items())
        for number, server in enumerate(one.servers, start=1)
        for command in _changed(f"{name}/s{number}", other, server, one.options)
    ]
    answers = f"{directory}/challenges.map"
    added = [f"add map {answers} {token} {text}" for token, text in sorted(state.challenges.items())]
    return [*lines, f"clear map {answers}", *added]


def _without_blank_lines(pem: str) -> str:
    """Return the text without blank lines, which would end the command."""
    return "\n".join(line for line in pem.splitlines() if line.strip())


def _changed(line: str, old: ServerLine, new: ServerLine, options: RouteOptions) -> Iterator[str]:
    moves = new.address not in (old.address, UNUSED)
    if old.is_ready and (moves or not new.is_ready):
        yield f"set server {line} state maint"
    if moves:
        yield f"set server {line} addr {new.address} port {options.port}"
    if new.weight != old.weight:
        yield f"set server {line} weight {new.weight}"
    if new.is_ready and (moves or not old.is_ready):
        if options.max_failures:  # otherwise HAProxy would wait for a check
            yield f"set server {line} health up"
        yield f"set server {line} state ready"
