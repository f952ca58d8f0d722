"""Routes in the labels of services, and who gets a host that several want."""

import pytest

from skep.errors import InvalidArgument
from skep.model.door.claims import Claimant, may_conflict, refusals, settled
from skep.model.door.routes import (
    HeaderRule,
    HttpRoute,
    RouteOptions,
    has_routes,
    parsed_routes,
    routes_of,
)
from skep.model.values.ids import ServiceId


def addresses(labels: dict[str, str]) -> list[str]:
    return [route.address for route in parsed_routes(labels)]


def test_routes_are_hosts_with_paths() -> None:
    assert addresses({"skep.http": "App.Example.com/api/, *.example.org"}) == [
        "*.example.org",
        "app.example.com/api",
    ]
    assert addresses({"skep.http": "localhost", "skep.http.admin": "localhost/admin"}) == [
        "localhost",
        "localhost/admin",
    ]
    assert parsed_routes({"other": "label"}) == ()
    assert not has_routes({"skep.httpx": "a"})


def test_options_of_a_name_win_over_those_of_the_service() -> None:
    app, web = parsed_routes(
        {
            "skep.http.app": "a.example.com",
            "skep.http.web": "b.example.com",
            "skep.http.port": "8080",
            "skep.http.web.port": "8081",
            "skep.http.sticky": "true",
            "skep.http.rate": "5/m",
            "skep.http.max-body": "10MiB",
            "skep.http.max-failures": "5",
            "skep.http.timeout": "1m30s",
            "skep.http.allow": "10.1.2.3/8,::1",
            "skep.http.protocol": "h2c",
            "skep.http.request-header.X-Tenant": "one",
            "skep.http.web.request-header.x-tenant": "two",
            "skep.http.response-header.Server": "",
        }
    )
    common = {
        "sticky": True,
        "rate": (5, 60),
        "max_body_bytes": 10 << 20,
        "max_failures": 5,
        "timeout_s": 90.0,
        "allow": ("10.0.0.0/8", "::1/128"),
        "h2c": True,
        "response_headers": (HeaderRule("Server", ""),),
    }
    assert app.options == RouteOptions(port=8080, request_headers=(HeaderRule("X-Tenant", "one"),), **common)
    assert web.options == RouteOptions(port=8081, request_headers=(HeaderRule("x-tenant", "two"),), **common)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"skep.http": ""}, "has no host"),
        ({"skep.http": "a.example.com,"}, "has no host"),
        ({"skep.http": "/api"}, "has no host"),
        ({"skep.http": "http://a.example.com"}, "no scheme"),
        ({"skep.http": "a.example.com:8080"}, "skep.http.port"),
        ({"skep.http": "bücher.example"}, "Write xn--bcher-kva.example"),
        ({"skep.http": "a_b.example"}, "not a DNS name"),
        ({"skep.http": "-a.example"}, "not a DNS name"),
        ({"skep.http": f"{'a' * 64}.example"}, "not a DNS name"),
        ({"skep.http": ".".join(["abcdefgh"] * 30)}, "not a DNS name"),
        ({"skep.http": "a.*.example"}, "not a DNS name"),
        ({"skep.http": "*"}, "not a DNS name"),
        ({"skep.http": "10.0.0.1"}, "an address"),
        ({"skep.http": "a.example.com/x y"}, "not a path"),
        ({"skep.http": "a.example.com/x\nbackend evil"}, "not a path"),
        ({"skep.http": "a.example.com\nbackend evil"}, "not a DNS name"),
        ({"skep.http": 'a.example.com/"'}, "not a path"),
        ({"skep.http": "a.example.com/#"}, "not a path"),
        ({"skep.http": "a.example.com/a/../b"}, "the segment"),
        ({"skep.http": "a.example.com//b"}, "not a path"),
        ({"skep.http": f"a.example.com/{'x' * 300}"}, "more than 256"),
        ({"skep.http": "a.example.com,A.EXAMPLE.com/"}, "twice"),
        ({"skep.http": "a.example.com", "skep.http.two": "a.example.com"}, "twice"),
        ({"skep.http": ",".join(f"h{n}.example" for n in range(101))}, "at most 100"),
        ({"skep.http.port": "80"}, "needs a route"),
        ({"skep.http": "a.example.com", "skep.http.web.port": "80"}, "no label skep.http.web"),
        ({"skep.http": "a.example.com", "skep.http.web": "b.c", "skep.http.web.prt": "1"}, "unknown option"),
        ({"skep.http.Web": "a.example.com"}, "lower-case"),
        ({"skep.http.a b": "a.example.com"}, "lower-case"),
        ({"skep.http": "a.b", "skep.http.port": "0"}, "a port from 1"),
        ({"skep.http": "a.b", "skep.http.port": "²"}, "a port from 1"),
        ({"skep.http": "a.b", "skep.http.tls": "no\nname"}, "name of a secret"),
        ({"skep.http": "a.b", "skep.http.redirect": "https://x' code 200"}, "an address like"),
        ({"skep.http": "a.b", "skep.http.redirect": "javascript:1"}, "an address like"),
        ({"skep.http": "a.b", "skep.http.allow": "10.0.0.0/8 } deny"}, "networks like"),
        ({"skep.http": "a.b", "skep.http.allow": "fe80::1%eth0"}, "networks like"),
        ({"skep.http": "a.b", "skep.http.rate": "0/s"}, "like 100/s"),
        ({"skep.http": "a.b", "skep.http.max-body": "-1"}, "a size like"),
        ({"skep.http": "a.b", "skep.http.max-failures": "0"}, "a number of failures"),
        ({"skep.http": "a.b", "skep.http.timeout": "0s"}, "a duration like"),
        ({"skep.http": "a.b", "skep.http.sticky": "yes"}, "true or false"),
        ({"skep.http": "a.b", "skep.http.request-header.X-A": "a\r\nb"}, "printable"),
        ({"skep.http": "a.b", "skep.http.request-header.X-A": "ü"}, "printable"),
        ({"skep.http": "a.b", "skep.http.request-header.X A": "b"}, "not the name of a header"),
        ({"skep.http": "a.b", "skep.http.request-header.Host": "b"}, "itself sets"),
        ({"skep.http": "a.b", "skep.http.request-header.x-forwarded-FOR": "b"}, "itself sets"),
        ({"skep.http": "a.b", "skep.http.response-header.Content-Length": "1"}, "itself sets"),
        (
            {"skep.http": "a.b", **{f"skep.http.request-header.X-{n}": "1" for n in range(21)}},
            "more than 20",
        ),
    ],
)
def test_a_refusal_has_a_reason(labels: dict[str, str], reason: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parsed_routes(labels)
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    assert routes_of(labels) == ()


def claimant(name: str, *hosts: str, stack: str = "", at: int = 0, is_shared: bool = False) -> Claimant:
    routes = tuple(
        HttpRoute(host=host, path=f"/{path}" if path else "", options=RouteOptions(is_shared=is_shared))
        for host, _, path in (one.partition("/") for one in hosts)
    )
    return Claimant(id=ServiceId(name), name=name, stack=stack, created_at=f"2026-01-{at:02}", routes=routes)


def test_the_oldest_service_keeps_a_route() -> None:
    old = claimant("z", "a.example", at=1)
    young = claimant("a", "a.example", "a.example/b", at=2)
    found = settled([young, old])
    assert [one.address for one in found.accepted[old.id]] == ["a.example"]
    assert [one.address for one in found.accepted[young.id]] == ["a.example/b"]
    (refusal,) = found.refused[young.id].values()
    assert refusal.reason == "a.example belongs to service z"
    assert refusal.unnamed == "a.example belongs to a service of another stack"


def test_claims_of_one_moment_are_decided_by_id() -> None:
    both = [claimant("b", "a.example"), claimant("a", "a.example")]
    assert settled(both) == settled(reversed(both))
    assert set(settled(both).refused) == {"b"}


def test_a_host_belongs_to_one_stack_unless_it_is_shared() -> None:
    shop = claimant("shop_web", "a.example", stack="shop", at=1)
    other = claimant("evil_web", "a.example/login", stack="evil", at=2)
    refusal = settled([shop, other]).refused[other.id]["a.example/login"]
    assert "belongs to service shop_web of stack shop" in refusal.reason
    assert "shop" not in refusal.unnamed
    assert refusal.stack == "shop"
    same = claimant("shop_api", "a.example/api", stack="shop", at=2)
    shared = claimant("shop_web", "a.example", stack="shop", at=1, is_shared=True)
    assert not settled([shop, same]).refused
    assert not settled([shared, other]).refused


def test_a_wildcard_covers_the_hosts_of_its_stack() -> None:
    shop = claimant("shop_web", "*.example.com", stack="shop", at=1)
    other = claimant("evil_web", "login.example.com", stack="evil", at=2)
    deeper = claimant("far_web", "a.login.example.com", stack="far", at=2)
    found = settled([shop, other, deeper])
    assert set(found.refused) == {other.id}
    # the younger wildcard takes nothing from the host
    assert not settled([claimant("w", "*.example.com", at=2), claimant("h", "a.example.com", at=1)]).refused


def test_a_new_claim_loses_even_to_a_younger_service() -> None:
    old, young = claimant("old", "a.example", at=1), claimant("young", "a.example", at=2)
    assert refusals(old, [young])["a.example"].reason == "a.example belongs to service young"


def test_other_hosts_are_not_parsed() -> None:
    wanted = claimant("a", "a.example.com").routes
    assert may_conflict(wanted, ["b.example.com,A.example.com/x"])
    assert may_conflict(wanted, ["*.Example.com"])
    assert not may_conflict(wanted, ["b.example.com", "8080"])
