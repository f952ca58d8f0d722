"""``skep job ls`` and the schedule in ``skep runs``: what people read."""

import pytest

from skep.cli.apps.job import shown as shown_jobs
from skep.cli.apps.job import until
from skep.cli.output import Screen
from skep.cli.see.explain import about_service
from skep.cli.see.runs import shown as shown_runs
from skep.model.values.times import SECOND_NS, unix_ns

NOW = unix_ns("2026-11-24T10:00:00Z") / SECOND_NS
SKIPPED = "not run at 2026-11-24T09:00:00Z: run 3 is still going"


def test_jobs_are_listed_with_their_last_and_next_run() -> None:
    jobs = [
        {
            "ID": "j1",
            "Name": "nightly",
            "Schedule": "0 2 * * *",
            "TimeZone": "Europe/Berlin",
            "State": "running",
            "LastRun": "2026-11-24T08:00:00Z",
            "NextRun": "2026-11-25T01:00:00Z",
            "Note": SKIPPED,
        },
        {"ID": "j2", "Name": "once", "State": "failed", "LastRun": "2026-11-24T09:59:00Z"},
        {"ID": "j3", "Name": "new", "Schedule": "@daily", "TimeZone": "UTC", "State": "waiting"},
    ]
    lines = list(shown_jobs(jobs, Screen(), NOW))
    assert [line.split() for line in lines] == [
        ["NAME", "SCHEDULE", "LAST", "RUN", "STATE", "NEXT", "RUN", "NOTE"],
        [
            "nightly",
            *["0", "2", "*", "*", "*", "Europe/Berlin", "2h", "ago", "running", "in", "15h"],
            *SKIPPED.split(),
        ],
        ["once", "-", "1m", "ago", "failed", "-"],
        ["new", "@daily", "never", "waiting", "-"],
    ]
    assert next(iter(shown_jobs(jobs, Screen(is_wide=True), NOW))).startswith("ID")


def test_what_is_due_is_due_now() -> None:
    assert until("2026-11-24T10:04:10Z", NOW) == "in 4m 10s"
    assert until("2026-11-24T09:59:59Z", NOW) == "now"


def test_runs_of_a_schedule_are_listed_with_their_reasons() -> None:
    response = {
        "Runs": [],
        "Schedule": "@hourly (UTC), next run at 2026-11-24T11:00:00Z",
        "Starts": [
            {
                "At": "2026-11-24T07:00:00Z",
                "Iteration": {"Index": 3},
                "ScheduledAt": "2026-11-24T07:00:00Z",
                "MissedSince": "2026-11-24T05:00:00Z",
                "Outcome": "completed",
            },
            {
                "At": "2026-11-24T08:00:00Z",
                "ScheduledAt": "2026-11-24T08:00:00Z",
                "Skipped": "run 3 is still going",
            },
            {"At": "2026-11-24T09:00:00Z", "Iteration": {}},
        ],
    }
    lines = [line.split() for line in shown_runs("nightly", response, Screen(), NOW)]
    assert lines[2] == ["schedule:", "@hourly", "(UTC),", "next", "run", "at", "2026-11-24T11:00:00Z"]
    assert lines[3] == ["RUN", "DUE", "STARTED", "OUTCOME"]
    assert lines[4] == [
        *["3", "2026-11-24T07:00:00Z", "3h", "ago", "completed;"],
        *["due", "times", "since", "2026-11-24T05:00:00Z", "had", "no", "leader"],
    ]
    assert lines[5] == ["2026-11-24T08:00:00Z", "skipped:", "run", "3", "is", "still", "going"]
    assert lines[6] == ["0", "on", "request", "1h", "ago"]


@pytest.mark.parametrize(
    ("err", "shown"),
    [
        ("task: non-zero exit (7)", []),
        ("task: non-zero exit (255): its monitor was lost", ["    its monitor was lost"]),
        ("No such image: app:1", ["    No such image: app:1"]),
    ],
)
def test_an_ended_task_has_its_reason_without_the_exit_code(err: str, shown: list[str]) -> None:
    run = {"Name": "job.0", "Hostname": "w1", "State": "failed", "EndedAt": "2026-11-24T09:00:00Z"}
    run |= {"Err": err, "Lines": []}
    assert list(shown_runs("job", {"Runs": [run]}, Screen(), NOW))[2:] == shown


def test_a_service_without_an_ended_task_leads_to_its_tasks() -> None:
    (line,) = shown_runs("nightly", {"Runs": []}, Screen(), NOW)
    assert line == "No task has ended yet. Run skep service ps nightly to see its tasks."


def test_explain_shows_the_schedule_of_a_job_that_waits() -> None:
    explanation = {
        "Summary": "it waits for its first run",
        "Schedule": "@hourly (UTC), next run at 2026-11-24T11:00:00Z",
        "Reasons": [],
        "Failures": [],
    }
    assert list(about_service("job", explanation, NOW)) == [
        "job: it waits for its first run",
        "  schedule: @hourly (UTC), next run at 2026-11-24T11:00:00Z",
    ]
