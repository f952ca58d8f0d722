"""``skep door status`` in words, and the labels that ``skep service expose`` and ``hide`` write."""

import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from skep.api.client.requests import Requests
from skep.cli.apps.service import exposed, hidden
from skep.cli.cluster.certificate import certificate_problems
from skep.cli.cluster.door import (
    BASE,
    DOCKERFILE,
    proxies_sentence,
    require_administrator,
    route_notes,
    service_spec,
    shown_conversions,
    shown_routes,
)
from skep.cli.main import main
from skep.cli.output import Screen
from skep.errors import InvalidArgument, NotFound, PermissionDenied

WEB = {"Route": "a.example", "Service": "web", "Port": 80, "Tasks": 1, "State": "ok"}
PROXIES = "1 proxy runs."


def test_the_reason_of_each_failing_route_is_below_the_list() -> None:
    failing = {**WEB, "Route": "b.example", "State": "failing", "Problem": "no task of the service runs"}
    lines = list(shown_routes([WEB, failing], PROXIES).lines(Screen()))
    assert lines[0] == PROXIES
    assert [line.split()[:5] for line in lines[2:4]] == [
        ["a.example", "web", "80", "1", "ok"],
        ["b.example", "web", "80", "1", "failing"],
    ]
    assert lines[4:] == ["b.example: no task of the service runs"]


def test_certificates_follow_with_source_end_order_and_the_authoritys_words() -> None:
    found: dict[str, Any] = {
        "Authority": {"Directory": "https://ca.example.com/dir"},
        "Certificates": [
            {"Name": "a.example", "State": "valid", "IsWanted": True, "NotAfter": "2027-02-01T10:20:30Z"},
            {
                "Name": "b.example",
                "State": "ordering",
                "IsWanted": True,
                "Order": "waiting for the challenge",
            },
            {
                "Name": "c.example",
                "State": "failing",
                "IsWanted": True,
                "Error": "too many certificates already issued",
                "NextAttemptAt": "2026-12-01T00:00:00Z",
            },
            {"Name": "d.example", "State": "valid", "IsWanted": True, "Secret": "d-tls"},
        ],
    }
    shown = shown_routes([], PROXIES, certificates=found)
    lines = list(shown.lines(Screen()))
    at = next(number for number, line in enumerate(lines) if line.startswith("CERTIFICATE"))
    assert [re.split(r"  +", line.strip()) for line in lines[at:]] == [
        ["CERTIFICATE", "FROM", "EXPIRES", "STATE", "NEXT ATTEMPT"],
        ["a.example", "ACME", "2027-02-01 10:20", "valid", "-"],
        ["b.example", "ACME", "-", "ordering: waiting for the challenge", "-"],
        ["c.example", "ACME", "-", "failing", "2026-12-01 00:00"],
        ["d.example", "secret d-tls", "-", "valid", "-"],
        ["c.example: too many certificates already issued"],
    ]
    no_authority: dict[str, Any] = {"Certificates": [{"Name": "a", "State": "wanted", "IsWanted": True}]}
    lines = list(shown_routes([], PROXIES, certificates=no_authority).lines(Screen()))
    assert re.split(r"  +", lines[-2].strip())[:4] == ["a", "none", "-", "wanted"]
    assert "skep door acme" in lines[-1]
    assert not any("CERTIFICATE" in line for line in shown_routes([], PROXIES).lines(Screen()))


def test_routes_have_their_recent_requests() -> None:
    busy = {
        **WEB,
        "RequestsPerSecond": 12.5,
        "ErrorPercent": 0.25,
        "LatencyP50": 4.25,
        "LatencyP95": 1500.0,
        "LatencyP99": 10_000.0,
    }
    lines = list(shown_routes([busy, {**WEB, "Route": "b.example"}], PROXIES).lines(Screen()))
    figures = [line.split()[5:] for line in lines[1:]]
    assert figures[0] == ["REQ/S", "ERRORS", "P50", "P95", "P99"]
    assert figures[1] == ["12.5", "0.25%", "4.25ms", "1.5s", ">10s"]
    assert figures[2] == ["-"] * 5


def test_status_names_routes_that_fail_and_counts_the_others() -> None:
    well = {"Route": "a.example", "Service": "web", "ErrorPercent": 0.9}
    bad = {**well, "Route": "b.example", "ErrorPercent": 7.5}
    none = {"Route": "c.example", "Service": "idle", "Problem": "no task of the service runs"}
    assert route_notes([well]) == []
    assert route_notes([well, bad, none]) == [
        "Route b.example of web: 7.5% of the requests in the last minute failed",
        "Route c.example of idle does not work: no task of the service runs",
    ]
    unreadable = {"Route": "-", "Service": "web", "Problem": "not a DNS name"}
    assert route_notes([unreadable]) == ["A route of web does not work: not a DNS name"]
    assert route_notes([none] * 5)[-1] == "and 2 more routes: skep doctor door"


def test_certificates_with_an_error_are_problems() -> None:
    failing = {"Name": "a.example", "State": "failing", "IsWanted": True, "Error": "too many certificates"}
    well = {"Name": "b.example", "State": "valid", "IsWanted": True}
    away = {"Directory": "https://ca/dir", "Error": "timeout", "FailingSince": "2026-01-01T00:00:00Z"}
    assert certificate_problems(None) == []
    assert certificate_problems({"Certificates": [well]}) == []
    first, second = certificate_problems({"Authority": away, "Certificates": [well, failing]})
    assert first == "Certificate of a.example: too many certificates"
    assert "https://ca/dir fails since 2026-01-01 00:00 UTC: timeout" in second


def test_the_first_route_replaces_the_tasks() -> None:
    spec = {"Labels": {"a": "b"}, "TaskTemplate": {"ForceUpdate": 2}}
    first = exposed(spec, "a.example", 8080)
    assert first["Labels"] == {"a": "b", "skep.http": "a.example", "skep.http.port": "8080"}
    assert first["TaskTemplate"]["ForceUpdate"] == 3
    second = exposed(first, "b.example/x", None)
    assert second["Labels"]["skep.http"] == "a.example,b.example/x"
    assert second["TaskTemplate"]["ForceUpdate"] == 3
    assert exposed(second, "a.example", None)["Labels"] == second["Labels"]


def test_the_port_of_a_new_route_does_not_change_that_of_others() -> None:
    labels = {"skep.http": "a.example", "skep.http.b": "b.example"}
    spec = {"Name": "web", "Labels": labels, "TaskTemplate": {}}
    with pytest.raises(
        InvalidArgument, match=r"^the route a\.example leads to port 80, and would lead to 8080\. "
    ):
        exposed(spec, "c.example/x", 8080)
    assert exposed(spec, "c.example/x", 80)["Labels"]["skep.http"] == "a.example,c.example/x"
    alone = {"Labels": {"skep.http": "a.example"}, "TaskTemplate": {}}
    assert exposed(alone, "a.example", 8080)["Labels"]["skep.http.port"] == "8080"


def test_hiding_removes_one_route_or_all() -> None:
    labels = {"skep.http": "a.example,b.example/x", "skep.http.port": "1", "other": "x"}
    spec = {"Labels": labels}
    assert hidden(spec, "A.example/")["Labels"] == {**labels, "skep.http": "b.example/x"}
    assert hidden(spec, "")["Labels"] == {"other": "x"}
    assert hidden({"Labels": {"skep.http": "a.b", "skep.http.port": "1"}}, "a.b")["Labels"] == {}
    named = {"skep.http": "a.b", "skep.http.api": "c.d"}
    assert hidden({"Labels": named}, "a.b")["Labels"] == {"skep.http.api": "c.d"}
    with pytest.raises(NotFound, match=r"no route c\.example"):
        hidden(spec, "c.example")


def test_the_proxies_have_the_labels_of_their_options() -> None:
    spec = service_spec(
        "i:1", constraints=("a==b",), trusted="10.0.0.0/8", proxy_protocol=True, no_access_log=True
    )
    assert spec["Labels"] == {
        "skep.door": "true",
        "skep.door.trusted-proxies": "10.0.0.0/8",
        "skep.door.proxy-protocol": "true",
        "skep.door.access-log": "false",
    }
    assert spec["TaskTemplate"]["Placement"] == {"Constraints": ["a==b"]}


LABELS = {
    "traefik.http.routers.w.rule": "Host(`a.example`)",
    "traefik.http.routers.w.middlewares": "h",
    "traefik.http.middlewares.h.headers.customresponseheaders.X-A": "$1 b",
    "traefik.http.services.w.loadbalancer.server.port": "8080",
    "traefik.http.services.w.loadbalancer.healthcheck.path": "/",
}


def test_routes_for_labels_of_traefik_are_shown_with_the_command_that_adds_them() -> None:
    refused = {"traefik.http.routers.x.rule": "Path(`/x`)"}
    lines = list(shown_conversions({"web": LABELS, "odd": refused, "other": {}}).lines(Screen()))
    assert lines[0] == "odd: no route"
    assert lines[1].startswith(
        "  not converted: traefik.http.routers.x.rule: Path: it matches one path alone"
    )
    assert lines[2:7] == [
        "web:",
        "  skep.http=a.example",
        "  skep.http.port=8080",
        "  skep.http.response-header.X-A=$1 b",
        "  skep.http.tls=off",
    ]
    assert lines[7].startswith("  not converted: traefik.http.services.w.loadbalancer.healthcheck.path: ")
    assert lines[8] == (
        "  docker service update --force --label-add skep.http=a.example --label-add skep.http.port=8080 "
        "--label-add 'skep.http.response-header.X-A=$1 b' --label-add skep.http.tls=off web"
    )
    secure = {**LABELS, "traefik.http.routers.w.tls": "true"}
    assert "skep door acme" in list(shown_conversions({"web": secure}).lines(Screen()))[-1]
    assert not any("acme" in line for line in lines)
    assert list(shown_conversions({}).lines(Screen())) == ["No service has labels of Traefik."]


def test_labels_for_traefik_in_a_file_are_those_of_services_or_else_of_containers(tmp_path: Path) -> None:
    rule = {"traefik.http.routers.o.rule": "Host(`o.example`)"}
    services = {
        "web": {"image": "x:1", "deploy": {"labels": LABELS | {"port": "${PORT:-1}"}}, "labels": rule}
    }
    services["old"] = {"image": "x:1", "labels": rule}
    file = tmp_path / "compose.yaml"
    file.write_text(json.dumps({"services": services}).replace("$1", "$$1"))  # JSON is YAML
    lines = CliRunner().invoke(main, ["door", "traefik", "-c", str(file)]).output.splitlines()
    assert lines[:2] == ["old:", "  skep.http=o.example"]
    assert "  skep.http.response-header.X-A=$$1 b" in lines[lines.index("web:") :]
    assert lines[-1] == "Write these labels below deploy.labels of each service."
    rows = json.loads(CliRunner().invoke(main, ["door", "traefik", "-c", str(file), "-o", "json"]).output)
    assert [row["Service"] for row in rows] == ["old", "web"]
    assert rows[1]["NotConverted"][0]["Label"].endswith("healthcheck.path")


def test_the_dockerfile_of_the_tutorial_makes_the_image_of_the_front_door() -> None:
    file = Path(__file__).parents[3] / "docs/tutorials/front-door/Dockerfile"
    assert file.read_text() == DOCKERFILE.replace("{base}", BASE)


class _Api(Requests):
    """The API as a user with these roles sees it."""

    def __init__(self, *roles: str, tasks: Sequence[str] | None = None) -> None:
        self._roles = roles
        self._tasks = tasks

    @asynccontextmanager
    async def requests(self) -> AsyncIterator["_Api"]:
        yield self

    async def request(self, method: str, path: str, **_: Any) -> Any:
        if path == "/services":
            return [{"ID": "door", "Spec": {"Name": "skep-door"}}] if self._tasks is not None else []
        if path == "/tasks":
            return [{"Status": {"State": state}} for state in self._tasks or ()]
        assert (method, path) == ("GET", "/skep/access")
        return {"Name": "ann", "Roles": list(self._roles)}


async def test_the_list_says_how_many_proxies_run_to_those_who_see_them() -> None:
    assert await proxies_sentence(_Api("admin", tasks=("running", "starting"))) == "1 proxy runs."
    assert await proxies_sentence(_Api("viewer", tasks=("running",) * 2)) == "2 proxies run."
    down = await proxies_sentence(_Api("admin", tasks=("starting",)))
    assert down == "No proxy runs. Run skep explain skep-door."
    assert "skep door up" in await proxies_sentence(_Api("admin"))
    assert (await proxies_sentence(_Api("viewer:shop"))).startswith("The front door belongs to no stack")


async def test_only_administrators_build_the_image_of_the_front_door() -> None:
    host: Any = _Api("admin")
    await require_administrator(host)
    host = _Api("operator", "viewer:shop")
    with pytest.raises(PermissionDenied, match="ann may not create the front door: only administrators"):
        await require_administrator(host)


@pytest.mark.parametrize("words", [["--agree-tos"], ["--directory", "https://ca.internal/dir"]])
def test_options_of_an_authority_need_an_account(words: list[str]) -> None:
    done = CliRunner().invoke(main, ["door", "up", *words])
    assert done.exit_code == 2
    assert "needs --email EMAIL" in done.output
