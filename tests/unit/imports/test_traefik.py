"""Labels for Traefik as labels of the front door: which ones, which are refused, and that none is dropped silently."""

import re
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.imports.traefik import TraefikRoutes, converted, is_for_traefik
from skep.imports.traefik_rules import addresses_of
from skep.model.door.routes import HttpRoute, parsed_routes

ROUTER, SERVICE = "traefik.http.routers.web", "traefik.http.services.web.loadbalancer"
BASE = {f"{ROUTER}.rule": "Host(`a.example`)", f"{SERVICE}.server.port": "8080", f"{ROUTER}.tls": "true"}
SHOWN = {"skep.http": "a.example", "skep.http.port": "8080"}


def of(labels: Mapping[str, str]) -> TraefikRoutes:
    """Return the conversion of a single service."""
    return converted({"web": labels})["web"]


def reasons(found: TraefikRoutes) -> dict[str, str]:
    """Return the notes of each label."""
    made: dict[str, str] = {}
    for note in (*found.refused, *found.differences):
        made[note.path] = f"{made.get(note.path, '')} {note.text}"
    return made


@pytest.mark.parametrize(
    ("rule", "addresses"),
    [
        ("Host(`a.example`)", "a.example"),
        ('Host("A.Example")', "a.example"),
        ("Host(`a.example`, `b.example`)", "a.example b.example"),
        ("Host(`a.example`) && PathPrefix(`/`)", "a.example"),
        ("Host(`a.example`) && PathPrefix(`/x/`, `/y`)", "a.example/x a.example/y"),
        ("(Host(`a.b`) || Host(`c.d`)) && (PathPrefix(`/x`) || PathPrefix(`/y`))", "a.b/x a.b/y c.d/x c.d/y"),
        ("Host(`a.b`) || Host(`c.d`) && PathPrefix(`/x`)", "a.b c.d/x"),
        ("Host(`a.b`)&&PathPrefix(`/x`)&&PathPrefix(`/x/y`)", "a.b/x/y"),
        ("Host(`*.a.example`)", "*.a.example"),
        (r"HostRegexp(`^[^.]+\.a\.example$`)", "*.a.example"),
        ("HostRegexp(`{name:[a-z0-9-]+}.a.example`)", "*.a.example"),
    ],
)
def test_a_rule_has_hosts_and_paths(rule: str, addresses: str) -> None:
    assert " ".join(map(str, addresses_of(rule))) == addresses


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("", "ends too early"),
        ("Host(`a.b`", "needs )"),
        ("Host()", "needs values"),
        ("Host('a.b')", "cannot be read at 'a.b'"),
        ("Host(`a.b`) Host(`c.d`)", "cannot be read at Host"),
        ("Host(`a.b`) &&", "ends too early"),
        ("!Host(`a.b`)", "exclude"),
        ("PathPrefix(`/x`)", "needs a host"),
        ("Host(`a.b`) || PathPrefix(`/x`)", "needs a host"),
        ("Host(`a.b`) && Host(`c.d`)", "no request can match"),
        ("Host(`a.b`) && PathPrefix(`/x`) && PathPrefix(`/xy`)", "no request can match"),
        ("Host(`a.b`) && PathPrefix(`x`)", "begins with a slash"),
        ("Host(`a.b`) && PathPrefix(`/{id:[0-9]+}`)", "not a path"),
        ("Host(`a.b`) && PathPrefix(`/a,b`)", "comma"),
        ("Host(`a.b,c.d`)", "comma"),
        ("Host(`10.0.0.1`)", "an address"),
        ("Host(`**.a.b`)", "not a DNS name"),
        ("Host(`ä.example`)", "xn--4ca.example"),
        ("HostRegexp(`.+`)", "has names"),
        (r"HostRegexp(`[^.]+\.a\.example`)", "has names"),
        ("Host(`a.b`) && Path(`/x`)", "one path alone"),
        *(
            (f"Host(`a.b`) && {matcher}(`x`)", matcher)
            for matcher in (
                *("PathRegexp", "Method", "ClientIP", "Header", "Headers", "HeaderRegexp"),
                *("HeadersRegexp", "Query", "QueryRegexp", "HostSNI"),
            )
        ),
        ("(" * 1000 + "Host(`a.b`)", "parentheses"),
        (" && ".join(["(Host(`a.b`) || Host(`c.d`))"] * 99), "combinations"),
        ("Host(`" + "a" * 5000 + "`)", "4096"),
    ],
)
def test_a_rule_that_a_route_cannot_express_is_refused(rule: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        addresses_of(rule)
    found = of({**BASE, f"{ROUTER}.rule": rule})
    assert found.labels == {}
    assert f"{ROUTER}.rule" in reasons(found)


@given(st.text('Host()PathPrefix`/"\\!&|, a.b*', max_size=60))
def test_any_text_is_a_rule_or_has_a_reason(rule: str) -> None:
    try:
        found = addresses_of(rule)
    except ValueError:
        return
    assert len(parsed_routes({"skep.http": ",".join(map(str, found))})) == len(found) > 0


MIDDLEWARES: list[tuple[dict[str, str], dict[str, str]]] = [
    ({"compress": "true"}, {"compress": "true"}),
    ({"compress": "false"}, {}),
    ({"redirectscheme.scheme": "https", "redirectscheme.permanent": "true"}, {}),
    (
        {"redirectregex.regex": r"^https?://a\.example/(.*)", "redirectregex.replacement": "https://b.example/${1}"},
        {"redirect": "https://b.example"},
    ),
    ({"ratelimit.average": "100"}, {"rate": "100/s"}),
    ({"ratelimit.average": "6", "ratelimit.period": "1m"}, {"rate": "6/m"}),
    ({"ratelimit.average": "50", "ratelimit.period": "10s", "ratelimit.burst": "9"}, {"rate": "5/s"}),
    ({"ratelimit.average": "1", "ratelimit.period": "120"}, {"rate": "30/h"}),
    ({"ratelimit.average": "0"}, {}),
    ({"ipallowlist.sourcerange": "10.0.0.0/8, 127.0.0.1"}, {"allow": "10.0.0.0/8,127.0.0.1"}),
    ({"ipwhitelist.sourcerange": "10.0.0.0/8"}, {"allow": "10.0.0.0/8"}),
    ({"buffering.maxrequestbodybytes": "2000"}, {"max-body": "2000"}),
    ({"headers.customrequestheaders.X-Two": "a b"}, {"request-header.X-Two": "a b"}),
    ({"headers.customResponseHeaders.Server": ""}, {"response-header.Server": ""}),
    ({"headers.frameDeny": "true"}, {"response-header.X-Frame-Options": "DENY"}),
    ({"headers.framedeny": "true", "headers.customframeoptionsvalue": "SAMEORIGIN"},
     {"response-header.X-Frame-Options": "SAMEORIGIN"}),
    ({"headers.contentTypeNosniff": "true"}, {"response-header.X-Content-Type-Options": "nosniff"}),
    ({"headers.browserXssFilter": "true"}, {"response-header.X-XSS-Protection": "1; mode=block"}),
    ({"headers.referrerPolicy": "no-referrer"}, {"response-header.Referrer-Policy": "no-referrer"}),
    ({"headers.stsSeconds": "60", "headers.stsIncludeSubdomains": "true", "headers.stsPreload": "true"},
     {"response-header.Strict-Transport-Security": "max-age=60; includeSubDomains; preload"}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "made"), MIDDLEWARES)
def test_a_middleware_is_an_option_of_the_route(options: dict[str, str], made: dict[str, str]) -> None:
    labels = {f"traefik.http.middlewares.m.{option}": value for option, value in options.items()}
    found = of({**BASE, **labels, f"{ROUTER}.middlewares": "m@docker"})
    assert found.labels == SHOWN | {f"skep.http.{option}": value for option, value in made.items()}
    assert found.refused == ()


def test_a_redirect_to_https_belongs_to_a_route_without_tls() -> None:
    plain = {name: value for name, value in BASE.items() if not name.endswith(".tls")}
    assert of(plain).labels == SHOWN | {"skep.http.tls": "off"}
    redirect = {f"{ROUTER}.middlewares": "s", "traefik.http.middlewares.s.redirectscheme.scheme": "https"}
    found = of(plain | redirect)
    assert found.labels == SHOWN | {"skep.http.redirect": "https"}
    assert "308" in reasons(found)["traefik.http.middlewares.s.redirectscheme.scheme"]
    secure = {
        "traefik.http.routers.s.rule": "Host(`a.example`)",
        "traefik.http.routers.s.tls.certresolver": "le",
    }
    assert of(plain | redirect | secure).labels == SHOWN, "the front door redirects by itself"
    assert "redirects to HTTPS" in reasons(of(plain | secure))[f"{ROUTER}.rule"]


def test_a_prefix_is_stripped_if_it_is_the_path_of_the_route() -> None:
    strip = {f"{ROUTER}.middlewares": "s", "traefik.http.middlewares.s.stripprefix.prefixes": "/api,/v2"}
    found = of(BASE | strip | {f"{ROUTER}.rule": "Host(`a.example`) && PathPrefix(`/api`)"})
    assert found.labels == {
        **SHOWN,
        "skep.http": "a.example/api",
        "skep.http.strip-prefix": "true",
        "skep.http.request-header.X-Forwarded-Prefix": "/api",
    }
    two = of(BASE | strip | {f"{ROUTER}.rule": "Host(`a.example`) && PathPrefix(`/api`, `/v2`)"})
    assert two.labels["skep.http.strip-prefix"] == "true"
    assert "X-Forwarded-Prefix" in reasons(two)["traefik.http.middlewares.s.stripprefix.prefixes"]
    for rule in ("Host(`a.example`)", "Host(`a.example`) && PathPrefix(`/api/x`)"):
        found = of(BASE | strip | {f"{ROUTER}.rule": rule})
        assert found.labels == {}
        assert (
            "strips the path of the route"
            in reasons(found)["traefik.http.middlewares.s.stripprefix.prefixes"]
        )


@pytest.mark.parametrize(
    "option",
    [
        *("basicauth.users", "basicauth.usersfile", "digestauth.users", "forwardauth.address"),
        *("addprefix.prefix", "replacepath.path", "replacepathregex.regex", "stripprefixregex.regex"),
        *("plugin.x.y", "unknown.x", "ipallowlist.ipstrategy.depth", "redirectregex.regex"),
        *("redirectscheme.scheme", "stripprefix.prefixes"),
    ],
)
def test_no_route_lacks_what_guards_it_or_changes_its_paths(option: str) -> None:
    label = f"traefik.http.middlewares.m.{option}"
    found = of({**BASE, label: "x", f"{ROUTER}.middlewares": "m"})
    assert found.labels == {}
    assert {label, f"{ROUTER}.rule"} <= reasons(found).keys()


def test_two_lists_of_networks_are_not_replaced_by_the_second() -> None:
    lists = {
        f"traefik.http.middlewares.{name}.ipallowlist.sourcerange": ranges
        for name, ranges in (("lan", "10.0.0.0/8"), ("again", "10.0.0.0/8"), ("office", "10.1.0.0/16"))
    }
    found = of({**BASE, **lists, f"{ROUTER}.middlewares": "lan,office"})
    assert found.labels == {}
    assert "Join that of office with the one before" in reasons(found)[f"{ROUTER}.middlewares"]
    same = of({**BASE, **lists, f"{ROUTER}.middlewares": "lan,again"})
    assert same.labels["skep.http.allow"] == "10.0.0.0/8"
    rates = {f"traefik.http.middlewares.{name}.ratelimit.average": name[1:] for name in ("r5", "r9")}
    found = of({**BASE, **rates, f"{ROUTER}.middlewares": "r5,r9"})
    assert found.labels["skep.http.rate"] == "9/s"
    assert any(one.path == f"{ROUTER}.middlewares" for one in found.differences)


def test_a_missing_middleware_refuses_the_router() -> None:
    for name in ("auth@file", "gone"):
        found = of({**BASE, f"{ROUTER}.middlewares": name})
        assert found.labels == {}
        assert name in reasons(found)[f"{ROUTER}.middlewares"]


OPTIONS = {
    ROUTER: (
        *("entrypoints", "priority", "tls.options", "tls.domains[0].main", "tls.domains[0].sans", "service"),
        *("observability.accesslogs", "observability.metrics", "observability.tracing", "unknown"),
    ),
    SERVICE: (
        *("healthcheck.path", "healthcheck.interval", "healthcheck.headers.X", "passhostheader"),
        *("responseforwarding.flushinterval", "serverstransport", "server.scheme", "sticky.cookie"),
        *("sticky.cookie.name", "sticky.cookie.secure", "sticky.cookie.samesite", "sticky.cookie.httponly"),
        "unknown",
    ),
    "traefik.http.services.web": ("weighted.services[0].name", "mirroring.service", "failover.service"),
    "traefik.http.middlewares.m": (
        *("circuitbreaker.expression", "contenttype.autodetect", "errors.query", "grpcweb.alloworigins"),
        *(
            "inflightreq.amount",
            "passtlsclientcert.pem",
            "retry.attempts",
            "encodedcharacters.allowencodedslash",
        ),
        *("compress.excludedcontenttypes", "compress.minresponsebodybytes", "compress.encodings"),
        *("buffering.memrequestbodybytes", "buffering.retryexpression", "buffering.maxresponsebodybytes"),
        *("headers.accesscontrolallowmethods", "headers.accesscontrolalloworiginlist", "headers.sslredirect"),
        *("headers.allowedhosts", "headers.isdevelopment", "headers.publickey", "headers.addvaryheader"),
        *("ratelimit.average", "ratelimit.sourcecriterion.requesthost", "ratelimit.unknown"),
    ),
    "traefik.tcp.routers.t": ("rule",),
    "traefik.udp.services.u": ("loadbalancer.server.port",),
    "traefik.frontend": ("rule",),
    "traefik": ("port", "backend"),
    "traefik.http.unknown.x": ("y",),
}


@pytest.mark.parametrize("label", [f"{prefix}.{end}" for prefix, ends in OPTIONS.items() for end in ends])
def test_no_label_is_dropped_silently(label: str) -> None:
    used = {f"{ROUTER}.middlewares": "m"} if ".middlewares." in label else {}
    found = of({**BASE, label: "false", **used})
    assert found.labels or "entrypoints" in label or label.endswith("service"), "the route stays"
    if label.endswith(("priority", "sticky.cookie")):
        return
    assert label in reasons(found), found
    assert len(reasons(found)[label]) > 10


def test_labels_that_agree_with_the_front_door_need_no_note() -> None:
    agreeing = {
        "traefik.enable": "true",
        "traefik.docker.network": "x",
        f"{ROUTER}.entryPoints": "websecure",
        f"{ROUTER}.ruleSyntax": "v3",
        f"{SERVICE}.passHostHeader": "true",
        f"{SERVICE}.sticky.cookie.httponly": "true",
        f"{SERVICE}.server.scheme": "h2c",
    }
    found = of(BASE | agreeing)
    assert found == TraefikRoutes(labels=SHOWN | {"skep.http.sticky": "true", "skep.http.protocol": "h2c"})


def test_routers_have_a_label_each_if_their_options_differ() -> None:
    found = of(
        {
            "traefik.http.routers.Port.rule": "Host(`a.example`)",
            "traefik.http.routers.Port.service": "one",
            "traefik.http.routers.b_2.rule": "Host(`b.example`)",
            "traefik.http.routers.b_2.service": "two@swarm",
            "traefik.http.routers.c.rule": "Host(`c.example`)",
            "traefik.http.routers.c.service": "two",
            "traefik.http.services.one.loadbalancer.server.port": "1",
            "traefik.http.services.two.loadbalancer.server.port": "2",
        }
    )
    assert found.labels == {
        "skep.http.b-2": "b.example,c.example",
        "skep.http.b-2.port": "2",
        "skep.http.b-2.tls": "off",
        "skep.http.route-port": "a.example",
        "skep.http.route-port.port": "1",
        "skep.http.route-port.tls": "off",
    }
    several = {**BASE, "traefik.http.services.two.loadbalancer.server.port": "2"}
    assert "several services" in reasons(of(several))[f"{ROUTER}.rule"]


def test_middlewares_and_services_may_be_on_other_services() -> None:
    found = converted(
        {
            "web": BASE,
            "shared": {"traefik.http.middlewares.gz.compress": "true", "traefik.enable": "true"},
            "edge": {
                "traefik.http.routers.e.rule": "Host(`e.example`)",
                "traefik.http.routers.e.tls": "true",
                "traefik.http.routers.e.service": "web",
                "traefik.http.routers.e.middlewares": "all",
                "traefik.http.middlewares.all.chain.middlewares": "gz,all",
            },
            "plain": {"other": "label"},
        }
    )
    assert found["web"].labels["skep.http.e"] == "e.example"
    assert found["web"].labels["skep.http.e.compress"] == "true"
    assert found["edge"].labels == found["shared"].labels == {}
    assert "plain" not in found


def test_a_middleware_may_be_written_twice_with_the_same_options() -> None:
    gzip = {f"{ROUTER}.middlewares": "gz", "traefik.http.middlewares.gz.compress": "true"}
    other = {name.replace("web", "two"): value.replace("a.e", "b.e") for name, value in (BASE | gzip).items()}
    found = converted({"web": BASE | gzip, "two": other})
    assert [one.labels["skep.http.compress"] for one in found.values()] == ["true", "true"]
    assert not any(one.refused for one in found.values())
    found = converted({"web": BASE | gzip, "two": other | {"traefik.http.middlewares.gz.compress": "false"}})
    assert "another value" in reasons(found["web"])["traefik.http.middlewares.gz.compress"]


def test_a_site_is_redirected_if_its_router_has_no_other_host() -> None:
    redirect = {
        f"{ROUTER}.middlewares": "www",
        "traefik.http.middlewares.www.redirectregex.regex": r"^https?://www\.a\.example/(.*)",
        "traefik.http.middlewares.www.redirectregex.replacement": "https://a.example/$1",
        "traefik.http.middlewares.www.redirectregex.permanent": "true",
    }
    alone = of(BASE | redirect | {f"{ROUTER}.rule": "Host(`www.a.example`)"})
    assert alone.labels == SHOWN | {"skep.http": "www.a.example", "skep.http.redirect": "https://a.example"}
    both = of(BASE | redirect | {f"{ROUTER}.rule": "Host(`a.example`) || Host(`www.a.example`)"})
    assert both.labels == {}, "a redirect to itself would never end"
    assert "www.a.example alone" in reasons(both)["traefik.http.middlewares.www.redirectregex.regex"]


def test_hosts_of_two_stacks_and_a_router_without_a_rule_are_named() -> None:
    found = converted(
        {
            "shop_web": BASE | {"com.docker.stack.namespace": "shop"},
            "api_web": {
                "com.docker.stack.namespace": "api",
                "traefik.http.routers.api.rule": "Host(`a.example`) && PathPrefix(`/api`)",
                "traefik.http.routers.api.tls": "true",
            },
            "idle": {"traefik.enable": "true"},
            "off": {"traefik.enable": "false", **BASE},
            "routed": {"skep.http": "x.example", **BASE, f"{ROUTER}.rule": "Host(`y.example`)"},
        }
    )
    assert "skep.http.share" in reasons(found["shop_web"])["skep.http"]
    assert "no router has a rule" in reasons(found["idle"])["traefik.enable"]
    assert found["off"].labels == {}
    assert "already has routes" in reasons(found["routed"])["skep.http"]


def test_of_two_routers_with_the_same_requests_the_one_with_the_higher_priority_stays() -> None:
    found = converted(
        {
            "one": {"traefik.http.routers.one.rule": "Host(`a.example`)"},
            "two": {
                "traefik.http.routers.two.rule": "Host(`a.example`)",
                "traefik.http.routers.two.priority": "99",
            },
        }
    )
    assert (found["one"].labels, found["two"].labels["skep.http"]) == ({}, "a.example")
    assert "router two of two" in reasons(found["one"])["traefik.http.routers.one.rule"]


HOSTS, PATHS = ("a.example", "b.a.example", "*.a.example"), ("", "/x", "/x/y")


def winner(routes: Mapping[str, tuple[HttpRoute, ...]], host: str, path: str) -> str:
    """The service that the front door sends a request to, or an empty text."""
    fitting = [
        (one.host == host, len(one.path), name)
        for name, of_service in routes.items()
        for one in of_service
        if one.host in (host, f"*.{host.partition('.')[2]}") and f"{path}/".startswith(f"{one.path}/")
    ]
    return max(fitting)[2] if fitting else ""


@given(
    st.lists(
        st.tuples(st.sampled_from(HOSTS), st.sampled_from(PATHS), st.integers(0, 3)), min_size=1, max_size=5
    ),
    st.sampled_from(HOSTS[:2]),
    st.sampled_from(PATHS),
)
def test_a_request_reaches_the_service_that_traefik_chooses_or_there_is_a_note(
    routers: list[tuple[str, str, int]], host: str, path: str
) -> None:
    services, priorities = {}, {}
    for number, (name, prefix, priority) in enumerate(routers):
        rule = f"Host(`{name}`)" + (f" && PathPrefix(`{prefix}`)" if prefix else "")
        label = f"traefik.http.routers.r{number}"
        services[f"s{number}"] = {f"{label}.rule": rule, f"{label}.priority": str(priority)}
        if name in (host, f"*.{host.partition('.')[2]}") and f"{path}/".startswith(f"{prefix}/"):
            priorities[f"s{number}"] = priority or len(rule)
    found = converted(services)
    got = winner({name: parsed_routes(one.labels) for name, one in found.items()}, host, path)
    if not priorities:
        assert got == ""
        return
    best = [name for name, priority in priorities.items() if priority == max(priorities.values())]
    if best != [got]:
        notes = [text for one in found.values() for text in reasons(one).values()]
        assert any(" wins over " in text or " with the priority " in text for text in notes), (best, got)


NAMES = ("routers.r", "routers.s", "middlewares.m", "services.w", "x.y")
ENDS = ("rule", "middlewares", "service", "priority", "tls", "loadbalancer.server.port", "compress",
        "headers.customrequestheaders.X-A", "headers.customrequestheaders.Host", "chain.middlewares")  # fmt: skip
VALUES = ("Host(`a.example`)", "m", "m,n@file", "w", "80", "true", "", "99999999", "\n", "x y", "/", "é")


@given(
    st.dictionaries(
        st.sampled_from([f"traefik.http.{name}.{end}" for name in NAMES for end in ENDS]),
        st.sampled_from(VALUES),
        min_size=1,
    )
)
def test_the_labels_are_always_routes(labels: dict[str, str]) -> None:
    assert is_for_traefik(labels)
    found = of(labels)
    parsed_routes(found.labels)
    assert found.labels or found.refused
    assert all(note.text for note in (*found.refused, *found.differences))
