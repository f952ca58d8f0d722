"""What a container may call on its API socket, and what is left out of responses."""

import json
from typing import Any

import pytest

from skep.aio.time_slices import run_at_once
from skep.errors import PermissionDenied, Unavailable
from skep.model.permissions.rights import ApiAccess
from skep.model.task import TaskStatus
from skep.model.task_end import KeptLine, TaskEnd
from skep.model.values.encoding import to_json
from skep.node.container_apis.policy import ResponsePassing, check, redacted

READ, INSPECT, FULL = ApiAccess


@pytest.mark.parametrize("path", ["/_ping", "/version", "/events?since=1", "/containers/a/stats?stream=1"])
def test_what_has_no_secrets_is_passed_as_it_is(path: str) -> None:
    assert check(READ, "GET", f"/v1.41{path}") is ResponsePassing.AS_IT_IS


@pytest.mark.parametrize(
    "path",
    [
        *("/info", "/containers/json?all=1", "/containers/a/json"),
        *("/images/json", "/images/a/b:c/json", "/networks", "/networks/a", "/volumes"),
        *("/volumes/a", "/services", "/services/a", "/tasks", "/tasks/a", "/nodes", "/nodes/self", "/swarm"),
        *("/secrets", "/secrets/a", "/configs", "/configs/a"),
    ],
)
def test_documents_are_shown_without_secrets(path: str) -> None:
    assert check(READ, "GET", path) is ResponsePassing.REDACTED
    assert check(READ, "HEAD", path) is ResponsePassing.REDACTED
    expected = ResponsePassing.REDACTED if path == "/swarm" else ResponsePassing.AS_IT_IS
    assert check(INSPECT, "GET", path) is expected


@pytest.mark.parametrize(
    "path",
    [
        *("/containers/a/logs", "/services/a/logs", "/tasks/a/logs", "/containers/a/changes", "/exec/a/json"),
        *(
            "/images/a/history",
            "/system/df",
            "/containers/a/top",
            "/containers/a/top?ps_args=-ef",
        ),
    ],
)
def test_what_others_may_keep_secret_needs_inspect(path: str) -> None:
    with pytest.raises(PermissionDenied, match=r"skep\.api=inspect or full"):
        check(READ, "GET", path)
    check(INSPECT, "GET", path)


@pytest.mark.parametrize("access", [READ, INSPECT])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/containers/a/export"),
        ("GET", "/containers/a/archive?path=/"),
        ("HEAD", "/containers/a/archive?path=/"),
        ("GET", "/containers/a/attach/ws"),
        ("GET", "/images/a/get"),
        ("GET", "/images/get?names=a"),
        ("GET", "/swarm/unlockkey"),
        ("GET", "/skep/backup"),
        ("GET", "/distribution/a/json"),
        ("GET", "/v1.41/v1.41/services"),
        ("GET", "/services/../swarm/unlockkey"),
        ("GET", "/images/../containers/a/json"),
        ("GET", "/images/%2e%2e/containers/a/json"),
        ("GET", "/services/a%2Flogs"),
        ("GET", "//services"),
        ("GET", "/services/"),
        ("GET", "/something/new"),
        ("POST", "/containers/a/stop"),
        ("POST", "/auth"),
        ("POST", "/services/create"),
        ("POST", "/containers/json"),
        ("DELETE", "/services/a"),
        ("PUT", "/containers/a/archive?path=/"),
        ("OPTIONS", "/services"),
        ("get", "/services"),
    ],
)
def test_everything_else_is_refused(access: ApiAccess, method: str, path: str) -> None:
    with pytest.raises(PermissionDenied, match=f"limited to {access.value} access"):
        check(access, method, path)
    assert check(FULL, method, path) is ResponsePassing.AS_IT_IS


def cleaned(document: Any) -> Any:
    return json.loads(run_at_once(redacted(json.dumps(document).encode())))


def test_values_are_left_out_and_names_stay() -> None:
    spec = {
        "Name": "web",
        "TaskTemplate": {
            "ContainerSpec": {
                "Image": "i",
                "Env": ["A=1", "B=x=y", "C"],
                "Mounts": [
                    {"VolumeOptions": {"DriverConfig": {"Name": "local", "Options": {"o": "password=x"}}}}
                ],
            },
            "LogDriver": {"Name": "splunk", "Options": {"splunk-token": "x"}},
        },
    }
    (found,) = cleaned([{"ID": "s", "Spec": spec, "PreviousSpec": spec}])
    assert found["PreviousSpec"] == found["Spec"]
    container = found["Spec"]["TaskTemplate"]["ContainerSpec"]
    assert container["Env"] == ["A=", "B=", "C="]
    assert container["Image"] == "i"
    assert container["Mounts"][0]["VolumeOptions"]["DriverConfig"] == {"Name": "local", "Options": {"o": ""}}
    assert found["Spec"]["TaskTemplate"]["LogDriver"]["Options"] == {"splunk-token": ""}


def test_each_kind_of_document_loses_its_secrets_only() -> None:
    assert cleaned({"Spec": {"Name": "c", "Data": "c2VjcmV0"}}) == {"Spec": {"Name": "c", "Data": ""}}
    assert cleaned({"JoinTokens": {"Worker": "S-1", "Manager": "S-2"}}) == {
        "JoinTokens": {"Worker": "", "Manager": ""}
    }
    graph = {"GraphDriver": {"Data": {"MergedDir": "/m"}, "Name": "overlay2"}, "Config": {"Env": None}}
    assert cleaned(graph) == graph
    volume = {"Name": "v", "Mountpoint": "/m", "Driver": "local", "Options": {"o": "password=x"}}
    assert cleaned({"Volumes": [volume]}) == {"Volumes": [{**volume, "Options": {"o": ""}}]}
    network = {
        "Driver": "overlay",
        "Options": {"encrypted": ""},
        "IPAM": {"Driver": "default", "Options": None},
    }
    assert cleaned([network]) == [network]
    log = {"HostConfig": {"LogConfig": {"Type": "gelf", "Config": {"env": "x"}}}}
    assert cleaned(log) == {"HostConfig": {"LogConfig": {"Type": "gelf", "Config": {"env": ""}}}}
    assert cleaned({"HttpProxy": "http://u:p@q@proxy:1"}) == {"HttpProxy": "http://proxy:1"}
    authority = {"Protocol": "cfssl", "URL": "https://ca", "Options": {"token": "x"}}
    assert cleaned({"ExternalCAs": [authority]}) == {"ExternalCAs": [{**authority, "Options": {"token": ""}}]}
    end = TaskEnd(cause="exit", health_output="x", lines=(KeptLine(text="x"),))
    shown = json.loads(to_json(TaskStatus(err="unhealthy: last health check: x", end=end)))
    status = cleaned({"Status": shown})["Status"]
    assert (status["Err"], status["End"]["Cause"]) == ("unhealthy: last health check: ", "exit")
    assert (status["End"]["Lines"], status["End"]["HealthOutput"]) == ([], "")
    for text, kept in (
        (
            'task web.1 on m1 failed: exit 1, last line "s3cret"',
            "task web.1 on m1 failed: exit 1, last line ",
        ),
        ('unhealthy: its health check "c" failed, last: exit 1, output "s3cret"', None),
        ("update paused due to failure of task t1: unhealthy: last health check: s3cret", None),
    ):
        shown_text = cleaned({"Message": text})["Message"]
        assert "s3cret" not in shown_text
        assert kept is None or shown_text == kept
    assert shown["End"]["Lines"]
    assert shown["End"]["HealthOutput"]
    health = {"Status": "healthy", "Log": [{"ExitCode": 0, "Output": "x"}]}
    assert cleaned({"State": {"Health": health}}) == {
        "State": {"Health": {**health, "Log": [{"ExitCode": 0, "Output": ""}]}}
    }


@pytest.mark.parametrize("document", [b"no", b"[1,", b'{"a"', b"[" * 100_000 + b"]" * 100_000])
def test_what_is_no_json_is_not_passed_on(document: bytes) -> None:
    with pytest.raises(Unavailable):
        run_at_once(redacted(document))
