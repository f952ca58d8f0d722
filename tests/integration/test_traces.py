"""The life of a service as one trace, as an OpenTelemetry collector receives it from a manager and a node."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.machines.playground_rig import TestNode, a_playground, create, wait_running, wait_until
from tests.support.telemetry import otlp_receiver

pytestmark = pytest.mark.timeout(120)

_PORT = 4318


@pytest.fixture
def traced() -> Iterator[TestNode]:
    setting = f'trace-endpoint = "http://127.0.0.1:{_PORT}"\n'
    with a_playground("traces", configured={"m1": setting}) as cluster:
        yield cluster.node("m1")


def spans_in(file: Path) -> list[dict[str, Any]]:
    """All that have arrived, with the process that sent each."""
    lines = file.read_text().splitlines() if file.exists() else []
    found = []
    for resource in (each for line in lines for each in json.loads(line)["resourceSpans"]):
        about = {one["key"]: one["value"]["stringValue"] for one in resource["resource"]["attributes"]}
        for scope in resource["scopeSpans"]:
            found += [{**span, "process": about["service.name"]} for span in scope["spans"]]
    return found


def test_the_life_of_a_service_is_one_trace(traced: TestNode, tmp_path: Path) -> None:
    file = tmp_path / "traces"
    command = ["nsenter", f"--net={traced.description['netns']}", sys.executable, otlp_receiver.__file__]
    with subprocess.Popen([*command, str(_PORT), str(file)]) as receiver:
        try:
            create(traced, "web", 1)
            (task,) = wait_running(traced, "web", 1)
            names = {
                "request",
                "store",
                "task",
                "schedule",
                "node",
                "prepare",
                "start",
                "runc create",
                "runc start",
            }
            wait_until(lambda: names <= {span["name"] for span in spans_in(file)}, "all spans arrive")
        finally:
            receiver.terminate()
    spans = {span["name"]: span for span in spans_in(file)}
    assert len({span["traceId"] for span in spans.values()}) == 1

    def parent(name: str) -> str:
        ids = {span["spanId"]: span["name"] for span in spans.values()}
        return ids.get(spans[name].get("parentSpanId", ""), "")

    assert {name: parent(name) for name in names} == {
        "request": "",
        "store": "request",
        "task": "request",
        "schedule": "task",
        "node": "task",
        "prepare": "node",
        "start": "node",
        "runc create": "start",
        "runc start": "start",
    }
    assert {span["process"] for span in spans.values()} == {"skep-manager", "skep-node"}
    about = {one["key"]: one["value"]["stringValue"] for one in spans["runc start"]["attributes"]}
    assert about["swarm.task.id"] == task["ID"]
    for name in names:
        assert int(spans[name]["startTimeUnixNano"]) <= int(spans[name]["endTimeUnixNano"])
    assert int(spans["request"]["startTimeUnixNano"]) <= int(spans["runc start"]["endTimeUnixNano"])
    page = subprocess.run(
        ["curl", "-s", "--unix-socket", traced.socket.removeprefix("unix://"), "http://skep/metrics"],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    ).stdout
    assert 'skep_trace_spans_dropped_total{process="manager"} 0' in page
