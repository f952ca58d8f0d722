"""Requests by route: quantiles, and readings of counters that start again."""

import pytest
from msgspec.structs import replace

from skep.dataplane.door.reading import WantedCounters, counters_in, questions
from skep.dataplane.door.statistics import ServiceCounters
from skep.dataplane.door.traffic import WINDOW_S, RouteCounters
from skep.model.door.traffic import BUCKETS, REPORTED_MAX, RouteTraffic, quantile_ms
from skep.model.values.ids import ServiceId


def buckets(**counts: int) -> tuple[int, ...]:
    return tuple(counts.get(f"b{number}", 0) for number in range(BUCKETS))


def a_route(requests: int, errors: int = 0, route: str = "a.example") -> RouteTraffic:
    found = buckets(b1=requests - errors)
    return RouteTraffic(
        service_id=ServiceId("web"), route=route, requests=requests, errors=errors, buckets=found
    )


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ({}, 0.5, None),
        ({"b0": 10}, 0.5, 2.5),
        ({"b1": 10}, 0.99, 9.95),
        ({"b0": 50, "b7": 50}, 0.95, 950.0),
        ({"b0": 99, "b11": 1}, 0.999, 10_000.0),
    ],
)
def test_a_quantile_lies_within_its_bucket(
    counts: dict[str, int], share: float, expected: float | None
) -> None:
    assert quantile_ms(buckets(**counts), share) == (None if expected is None else pytest.approx(expected))


def test_only_differences_of_readings_count_and_a_reload_counts_from_0() -> None:
    counters = RouteCounters()
    for at, requests in ((0.0, 1000), (5.0, 1050), (10.0, 7), (15.0, 10)):
        counters.add(at, {"web-1": a_route(requests, errors=1)})
    [seen] = counters.recent(15.0)
    assert (seen.requests, seen.seconds, seen.per_second) == (60, 15.0, 4.0)
    assert seen.errors == 1, "the one after the reload"
    assert 'route="a.example"' in counters.families()[0].samples[0].labels
    assert counters.families()[0].samples[0].value == 60
    assert counters.recent(15.0 + WINDOW_S + 1) == ()


def test_a_reading_between_two_counters_of_a_response_is_no_reload() -> None:
    counters = RouteCounters()
    for at, found in ((0.0, {"b0": 50}), (5.0, {"b0": 61, "b1": 4}), (10.0, {"b0": 60, "b1": 5})):
        counters.add(
            at, {"web-1": replace(a_route(50), requests=sum(found.values()), buckets=buckets(**found))}
        )
    [seen] = counters.recent(10.0)
    assert sum(seen.buckets) == 15


def test_counters_of_slower_responses_become_buckets() -> None:
    slower = " ".join(f"gpc{at}={count}" for at, count in enumerate((4, 4, 1, *[0] * (BUCKETS - 4))))
    texts = (
        "Pid: 7\n# pxname,svname,hrsp_2xx,hrsp_5xx,econ,eresp,\nweb-1,BACKEND,9,3,1,1,\n",
        f"# table: skep-traffic\n0x1: key=web-1 use=0 exp=0 shard=0 {slower}\n",
    )
    wanted = WantedCounters(routes={"web-1": a_route(0)}, services={}, idle={}, lines={})
    seen = counters_in(wanted, texts, ()).routes["web-1"]
    assert (seen.requests, seen.errors, seen.buckets) == (12, 3, buckets(b0=6, b2=3, b3=1))
    early = replace_row(texts[0], "web-1,BACKEND,2,0,0,0,")
    seen = counters_in(wanted, (early, texts[1]), ()).routes["web-1"]
    assert (seen.requests, seen.buckets) == (2, buckets(b2=3, b3=1)), "the table was read later"


def replace_row(text: str, row: str) -> str:
    *head, _, end = text.split("\n")
    return "\n".join((*head, row, end))


def test_a_backend_is_read_once_whoever_needs_it() -> None:
    wanted = WantedCounters(
        routes={"web-1": a_route(0), "new-1": a_route(0)},
        services={"web-1": "web"},
        idle={"web-1": ServiceId("web"), "new-1": ServiceId("new")},
        lines={("new-1", "s2"): "t2"},
    )
    assert [*questions(wanted)] == [
        "show info;show stat web-1 2 -1\n",
        "show info;show stat new-1 6 -1\n",
        "show table skep-traffic\n",
    ]


HEAD = "Pid: 7\n# pxname,svname,scur,req_tot,connect,act,hrsp_2xx,\n"
WANTED = WantedCounters(
    routes={"web-1": a_route(0), "api-1": a_route(0)},
    services={"web-1": "web", "api-1": "api"},
    idle={"web-1": ServiceId("web"), "api-1": ServiceId("api")},
    lines={},
)
TABLE = "# table: skep-traffic, type: string\n"


@pytest.mark.parametrize(
    "lost",
    [
        [],
        [HEAD + "api-1,BACKEND," + "9" * 200_000 + ",9,9,1,9,\n"],
        [HEAD],
    ],
)
def test_a_lost_or_malformed_response_loses_only_its_own_rows(lost: list[str]) -> None:
    texts = [HEAD + "web-1,BACKEND,1,9,9,1,9,\n", *lost, TABLE]
    seen = counters_in(WANTED, texts, ())
    assert seen.unread == {"api-1"}
    assert seen.services == {"web-1": ServiceCounters(1, 9)}
    assert seen.idle is not None
    assert seen.idle.keys() == {"web"}, "nobody knows whether the other one is idle"
    counters = RouteCounters()
    counters.add(0.0, {"web-1": a_route(0), "api-1": a_route(50)})
    counters.add(5.0, seen.routes, seen.unread)
    assert {one.requests for one in counters.recent(5.0)} == {9}
    counters.add(10.0, {"web-1": a_route(9), "api-1": a_route(52)})
    assert sorted(one.requests for one in counters.recent(10.0)) == [2, 9], "no request counts twice"


@pytest.mark.parametrize("malformed", ["²", "٣", "9" * 5_000, "-1"])
def test_a_malformed_number_loses_no_other_one(malformed: str) -> None:
    texts = [HEAD + f"web-1,BACKEND,1,9,9,1,9,\napi-1,BACKEND,{malformed},5,5,1,5,\n", TABLE]
    seen = counters_in(WANTED, texts, ())
    assert seen.services == {"web-1": ServiceCounters(1, 9), "api-1": ServiceCounters(0, 5)}


def test_without_a_former_process_only_idle_times_are_unknown() -> None:
    texts = [HEAD + "web-1,BACKEND,1,9,9,1,9,\n" + "api-1,BACKEND,0,0,0,1,0,\n", TABLE]
    seen = counters_in(WANTED, texts, None)
    assert (seen.idle, seen.unread) == (None, frozenset())
    assert seen.routes["web-1"].requests == 9


def test_removed_routes_are_forgotten_and_a_report_has_the_busiest() -> None:
    counters = RouteCounters()
    counters.add(0.0, {})
    many = {f"r{number}": a_route(number, route=f"{number}.example") for number in range(REPORTED_MAX + 50)}
    counters.add(5.0, many)
    found = counters.recent(5.0)
    assert (len(found), found[0].requests) == (REPORTED_MAX, REPORTED_MAX + 49)
    counters.add(10.0, {"r1": replace(many["r1"], requests=2)})
    assert [one.value for one in counters.families()[0].samples] == [2]
