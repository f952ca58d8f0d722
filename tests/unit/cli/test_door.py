"""``skep door status`` in words, and the labels that ``skep service expose`` and ``hide`` write."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec.structs import replace

from skep.api.client.requests import Requests
from skep.cli.apps.service import exposed, hidden
from skep.cli.cluster.certificate import certificate_problems
from skep.cli.cluster.door import require_administrator, route_notes, service_spec, shown_routes
from skep.cli.output import Screen
from skep.errors import NotFound, PermissionDenied
from skep.model.network import Network, NetworkSpec
from skep.model.service import Service, UpdateState, UpdateStatus
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.model.values.ids import NetworkId
from skep.model.values.times import Timestamp
from tests.support.builders import a_service, a_task

NETWORK = Network(id=NetworkId("front"), spec=NetworkSpec(name="skep-door"))


def routed(name: str, labels: dict[str, str], at: str = "1") -> Service:
    service = a_service(name)
    return replace(service, spec=replace(service.spec, labels=labels), created_at=Timestamp(at))


def task_of(service: Service, *, is_attached: bool = True) -> Task:
    task = a_task(f"t-{service.spec.name}", node="n1", service=service)
    attachments = (NetworkAttachment(network=NETWORK),) if is_attached else ()
    return replace(
        task, networks_attachments=attachments, status=replace(task.status, state=TaskState.RUNNING)
    )


PROXIES = routed("skep-door", {"skep.door": "true"})


def problems(services: list[Service], tasks: list[Task], networks: list[Network]) -> dict[str, str]:
    rows: Any = shown_routes([PROXIES, *services], [task_of(PROXIES), *tasks], networks).data["Routes"]  # type: ignore[call-overload,index]
    return {row["Route"]: row["Problem"] for row in rows}


def test_each_route_that_does_not_work_has_a_reason() -> None:
    web = routed("web", {"skep.http": "a.example"})
    second = routed("second", {"skep.http": "a.example,b.example"}, at="2")
    idle = routed("idle", {"skep.http": "idle.example"})
    old = routed("old", {"skep.http": "old.example"})
    bad = routed("bad", {"skep.http": "bad example"})
    tasks = [task_of(web), task_of(second), task_of(old, is_attached=False)]
    found = problems([web, second, idle, old, bad], tasks, [NETWORK])
    assert found["b.example"] == ""
    assert found["idle.example"] == "no task of the service runs"
    assert "1 of 1 tasks is not on the network skep-door" in found["old.example"]
    assert "docker service update --force old" in found["old.example"]
    assert "not a DNS name" in found["-"]
    rows: Any = shown_routes([PROXIES, web, second], [task_of(PROXIES), *tasks], [NETWORK]).data["Routes"]  # type: ignore[call-overload,index]
    taken = [row["Problem"] for row in rows if row["Route"] == "a.example"]
    assert taken == ["a.example belongs to service web", ""]
    assert "skep door up" in problems([web], tasks, [])["a.example"]


def test_a_network_without_proxies_is_no_front_door() -> None:
    web = routed("web", {"skep.http": "a.example"})
    rows: Any = shown_routes([web], [task_of(web)], [NETWORK]).data["Routes"]  # type: ignore[call-overload,index]
    assert [row["Problem"] for row in rows] == ["there is no front door. Create it with skep door up"]


def test_the_list_says_how_many_proxies_run() -> None:
    door = routed("skep-door", {"skep.door": "true"})
    web = routed("web", {"skep.http": "a.example"})
    shown = shown_routes([door, web], [task_of(door)], [NETWORK])
    lines = list(shown.lines(Screen()))
    assert lines[0] == "1 proxy runs."
    assert lines[-1] == "a.example: no task of the service runs"


def test_no_route_works_while_no_proxy_runs() -> None:
    web = routed("web", {"skep.http": "a.example"})
    shown = shown_routes([PROXIES, web], [task_of(web)], [NETWORK])
    lines = list(shown.lines(Screen()))
    assert lines[0] == "No proxy runs. Run skep explain skep-door."
    assert lines[-1] == "a.example: no proxy of the front door runs. Run skep door status"


def test_a_user_of_a_stack_sees_no_front_door_and_is_not_told_that_there_is_none() -> None:
    web = routed("web", {"skep.http": "a.example"})
    shown = shown_routes([web], [task_of(web)], [], sees_all=False)
    lines = list(shown.lines(Screen()))
    assert lines[0].startswith("The front door belongs to no stack")
    assert lines[-1] == "a.example: you do not see whether there is a front door. Run skep explain web"
    door = replace(NETWORK, spec=replace(NETWORK.spec, labels={"skep.door": "true"}))
    seen = replace(task_of(web), networks_attachments=(NetworkAttachment(network=door),))
    rows: Any = shown_routes([web], [seen], [], sees_all=False).data["Routes"]  # type: ignore[call-overload,index]
    assert [(row["State"], row["Problem"]) for row in rows] == [("ok", "")]


def test_tasks_that_a_staged_update_replaces_need_no_other_update() -> None:
    web = routed("web", {"skep.http": "a.example", "skep.update": "canary"})
    status = UpdateStatus(state=UpdateState.UPDATING, message="update in progress: step 1 of 3")
    found = problems([replace(web, update_status=status)], [task_of(web, is_attached=False)], [NETWORK])
    assert found["a.example"].endswith("The update in progress replaces them (skep explain web)")


def test_certificates_follow_with_source_end_order_and_the_authoritys_words() -> None:
    door = routed("skep-door", {"skep.door": "true"})
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
    shown = shown_routes([door], [task_of(door)], [NETWORK], certificates=found)
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
    lines = list(shown_routes([door], [task_of(door)], [NETWORK], certificates=no_authority).lines(Screen()))
    assert re.split(r"  +", lines[-2].strip())[:4] == ["a", "none", "-", "wanted"]
    assert "skep door acme" in lines[-1]
    assert not any("CERTIFICATE" in line for line in shown_routes([door], [], [NETWORK]).lines(Screen()))


def test_routes_have_their_recent_requests() -> None:
    web = routed("web", {"skep.http": "a.example,b.example"})
    traffic = [
        {
            "Route": "a.example",
            "Service": "web",
            "RequestsPerSecond": 12.5,
            "ErrorPercent": 0.25,
            "LatencyP50": 4.25,
            "LatencyP95": 1500.0,
            "LatencyP99": 10_000.0,
        }
    ]
    lines = list(shown_routes([PROXIES, web], [task_of(web)], [NETWORK], traffic=traffic).lines(Screen()))
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


class _Api(Requests):
    """The API as a user with these roles sees it."""

    def __init__(self, *roles: str) -> None:
        self._roles = roles

    @asynccontextmanager
    async def requests(self) -> AsyncIterator["_Api"]:
        yield self

    async def request(self, method: str, path: str, **_: Any) -> Any:
        assert (method, path) == ("GET", "/skep/access")
        return {"Name": "ann", "Roles": list(self._roles)}


async def test_only_administrators_build_the_image_of_the_front_door() -> None:
    host: Any = _Api("admin")
    await require_administrator(host)
    host = _Api("operator", "viewer:shop")
    with pytest.raises(PermissionDenied, match="ann may not create the front door: only administrators"):
        await require_administrator(host)
