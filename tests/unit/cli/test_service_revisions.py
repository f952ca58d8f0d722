"""The spec that ``skep service rollback --to N`` writes."""

from skep.cli.apps.service import returned_to

THREE = {"Replicated": {"Replicas": 3}}
FIVE = {"Replicated": {"Replicas": 5}}


def test_an_earlier_spec_returns_whole_even_with_fields_that_are_not_known() -> None:
    template = {"ForceUpdate": 2, "OtherField": "y"}
    wanted = {
        "Name": "web",
        "Labels": {"tier": "front"},
        "Mode": THREE,
        "NewField": {"x": 1},
        "TaskTemplate": template,
    }
    present = {"Name": "web", "Labels": {}, "Mode": FIVE, "TaskTemplate": {"ForceUpdate": 2}}
    assert returned_to(wanted, present) == wanted


def test_forced_updates_are_not_undone() -> None:
    """It would replace all tasks of a service again, or start a run of a job with a schedule."""
    wanted = {"Mode": THREE, "TaskTemplate": {"ForceUpdate": 1}}
    found = returned_to(wanted, {"Mode": FIVE, "TaskTemplate": {"ForceUpdate": 4}})
    assert found["TaskTemplate"] == {"ForceUpdate": 4}


def test_a_stop_belongs_to_the_service_and_not_to_the_spec() -> None:
    stopped = {"skep.stopped": "true"}
    assert returned_to({"Labels": stopped, "Mode": THREE}, {"Mode": THREE})["Labels"] == {}
    assert returned_to({"Mode": THREE}, {"Labels": stopped, "Mode": THREE})["Labels"] == stopped


def test_a_stop_of_a_job_includes_its_suspended_schedule() -> None:
    runs = {"skep.cron": "@daily"}
    stopped = {**runs, "skep.cron.suspend": "true", "skep.stopped": "true"}
    job = {"ReplicatedJob": {}}
    assert returned_to({"Labels": runs, "Mode": job}, {"Labels": stopped, "Mode": job})["Labels"] == stopped
    assert returned_to({"Labels": stopped, "Mode": job}, {"Labels": runs, "Mode": job})["Labels"] == runs
    suspended = {**runs, "skep.cron.suspend": "true"}
    assert (
        returned_to({"Labels": suspended, "Mode": job}, {"Labels": runs, "Mode": job})["Labels"] == suspended
    )


def test_the_number_that_autoscaling_chose_stays() -> None:
    scaled = {"skep.autoscale": "2..10"}
    assert returned_to({"Labels": scaled, "Mode": THREE}, {"Labels": scaled, "Mode": FIVE})["Mode"] == FIVE
    assert returned_to({"Labels": {}, "Mode": THREE}, {"Labels": scaled, "Mode": FIVE})["Mode"] == THREE
