"""Texts of nodes reach a terminal without what it would obey."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import click
import pytest

from skep.cli.apps.port_forward import failure_of
from skep.cli.output import Cell, Screen, table
from skep.cli.running import errors_shown, run_requests
from skep.cli.see import history, runs
from skep.cli.see.events import line_of, whole_line_of
from skep.cli.see.explain import about_network, about_node, about_service, about_task
from skep.cli.see.status import ClusterStatus, NodeLine, StatusScreen, lines_of
from skep.errors import Unavailable

BAD = "a\x1b]0;owned\x07\x9bb\r\n"
SAFE = "a]0;ownedb"


def test_an_explanation_is_cleaned():
    task = {
        "State": BAD,
        "Since": BAD,
        "DesiredState": BAD,
        "Summary": BAD,
        "End": {"Cause": BAD, "Signal": BAD, "HealthOutput": BAD, "Lines": [{"Text": BAD}]},
        "Nodes": [{"Hostname": BAD, "NodeID": "n1", "Reasons": [BAD]}],
    }
    lines = list(about_task("web.1", task, 0.0))
    assert f"web.1: {SAFE}" in lines
    assert f"  {SAFE} for {SAFE}" in lines
    assert f"  cause: {SAFE} ({SAFE})" in lines
    reason = {"Tasks": 1, "Summary": BAD, "Example": BAD}
    service = {"Summary": BAD, "UpdateStatus": {"Message": BAD}, "Reasons": [reason], "Failures": [reason]}
    lines += about_service("web", service, 0.0)
    assert f"web: {SAFE}" in lines
    assert all(line.isprintable() for line in lines)


def test_a_list_of_runs_numbers_those_of_jobs_and_names_the_missing_logs() -> None:
    run = {
        "Name": "web.1",
        "Hostname": "m1",
        "State": "failed",
        "EndedAt": "2026-01-01T00:00:00Z",
        "Lines": [],
    }
    dockers = "warning: incomplete log stream. some logs could not be retrieved for the following reasons: "
    response = {"Runs": [run], "Incomplete": f"{dockers}node w3 is not available"}
    head, row, missing = runs.shown("nightly", response, Screen(), 1767225600.0)
    assert (head.split(), row.split()[:3]) == (
        ["TASK", "NODE", "STATE", "EXIT", "ENDED"],
        ["web.1", "m1", "failed"],
    )
    assert missing == "Some lines may be missing: node w3 is not available"
    head, row = runs.shown(
        "nightly", {"Runs": [run | {"JobIteration": {"Index": 4}}]}, Screen(), 1767225600.0
    )
    assert (head.split()[2], row.split()[2]) == ("RUN", "4")


def test_earlier_entries_of_a_history_are_shown_by_the_same_command() -> None:
    entry = {"Time": "2026-01-01T10:00:00.5Z", "Message": "service web created", "Severity": "info"}
    page = {"Entries": [entry], "Next": "c1", "Oldest": "2025-12-30T08:00:00Z", "Total": 9}
    now = datetime(2026, 1, 1, 12, tzinfo=UTC)
    *_, oldest, command = history.lines_of(page, Screen(), now, "skep history web -n 5")
    assert oldest == "The oldest entry is from 2025-12-30 08:00:00. Show earlier entries with:"
    assert command == "  skep history web -n 5 --until 2026-01-01T10:00:00.5Z"


def test_a_list_of_runs_is_cleaned():
    run = {
        "Name": BAD,
        "Hostname": BAD,
        "State": BAD,
        "EndedAt": "2026-01-01T00:00:00Z",
        "TaskID": BAD,
        "ExitCode": 1,
        "End": {"Signal": BAD},
        "Err": BAD,
        "Lines": [BAD],
    }
    lines = list(
        runs.shown("nightly", {"Runs": [run], "Incomplete": BAD}, Screen(is_wide=True), 1767225600.0)
    )
    assert lines[-1] == f"Some lines may be missing: {SAFE}"
    assert lines[1].split()[:4] == [SAFE, SAFE, SAFE, "1"]
    assert lines[1].endswith(SAFE)
    assert all(line.isprintable() for line in lines)


def test_every_cell_of_a_table_is_cleaned():
    lines = list(table((BAD, BAD), [(BAD, Cell(BAD))], Screen()))
    assert [line.split() for line in lines] == [[SAFE, SAFE]] * 2


def test_a_node_and_a_network_are_cleaned():
    node = {
        "ID": BAD,
        "CreatedAt": "2026-01-01T00:00:00Z",
        "Spec": {"Availability": BAD, "Role": BAD},
        "Description": {"Hostname": BAD, "Engine": {"EngineVersion": BAD}},
        "Status": {"State": BAD, "Message": BAD, "Addr": BAD},
        "TaskStates": {BAD: 1},
    }
    network = {
        "Id": BAD,
        "Name": BAD,
        "Driver": BAD,
        "Scope": BAD,
        "Created": "2026-01-01T00:00:00Z",
        "IPAM": {"Config": [{"Subnet": BAD, "Gateway": BAD}]},
        "ServiceNames": [BAD],
    }
    lines = [*about_node("w1", node, 1767225600.0), *about_network("net", network, 1767225600.0)]
    assert lines[0] == f"{SAFE}: {SAFE}: {SAFE}"
    assert f"  {SAFE}, gateway {SAFE}" in lines
    assert all(line.isprintable() for line in lines)


def test_an_event_is_cleaned():
    event = {
        "Type": BAD,
        "Action": BAD,
        "Actor": {"ID": BAD, "Attributes": {"name": BAD, BAD: BAD}},
        "timeNano": 0,
    }
    for line in (line_of(event), whole_line_of(event)):
        assert SAFE in line
        assert line.isprintable()


def test_the_status_screen_is_cleaned():
    node = NodeLine(id="n1", name=BAD, state="down", role="worker", availability="active", reason=BAD)
    cluster = ClusterStatus(leader=BAD, nodes=(node,))
    status = StatusScreen(health="degraded", node=(("node", BAD),), notes=(BAD,), cluster=cluster)
    lines = list(lines_of(status, Screen()))
    assert f"node  {SAFE}" in lines
    assert SAFE in lines
    assert lines[-1] == f"Next: skep explain {SAFE}"
    assert all(line.isprintable() for line in lines)


def test_an_error_is_cleaned_but_keeps_its_lines():
    with pytest.raises(click.ClickException) as raised, errors_shown():
        raise Unavailable(f"{BAD}second")
    assert raised.value.message == f"{SAFE}\nsecond"
    assert failure_of(80, Unavailable(BAD)) == f"connection to port 80 failed: {SAFE}"


def test_the_error_of_a_file_has_no_number() -> None:
    with pytest.raises(click.ClickException) as raised, errors_shown():
        Path("/nonexistent/file").read_bytes()
    assert raised.value.message == "/nonexistent/file: no such file or directory"


def test_the_error_of_a_task_group_is_one_line() -> None:
    async def work() -> None:
        async with asyncio.TaskGroup():
            raise Unavailable("cannot listen on 127.0.0.1:80: address already in use. Choose another port.")

    with pytest.raises(click.ClickException, match=r"^cannot listen on 127\.0\.0\.1:80"):
        run_requests(work())
