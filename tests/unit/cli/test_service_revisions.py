"""What ``skep service rollback`` writes."""

from collections.abc import Mapping
from typing import Any

import pytest

from skep.api.client.requests import Requests
from skep.cli.apps.service import return_to_previous, returned_to
from skep.errors import FailedPrecondition, OutOfSequence

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


class Swapped(Requests):
    """Someone else rolls the service back between the read and the rollback, or autoscaling scales it."""

    def __init__(self, meanwhile: Mapping[str, Any]) -> None:
        self.service: dict[str, Any] = {"ID": "w", "Version": {"Index": 1}, "Spec": BAD, "PreviousSpec": GOOD}
        self._meanwhile = meanwhile

    async def request(self, method: str, path: str, **options: Any) -> Any:
        if method == "GET":
            return dict(self.service)
        if self.service["Version"] == {"Index": 1}:
            self.service |= {"Version": {"Index": 2}, **self._meanwhile}
        if options["query"] != {"rollback": "previous", "version": str(self.service["Version"]["Index"])}:
            raise OutOfSequence("update out of sequence")
        self.service |= {"Spec": self.service["PreviousSpec"], "PreviousSpec": self.service["Spec"]}
        return None


GOOD: dict[str, Any] = {"Name": "web", "Mode": THREE, "Labels": {"is": "good"}}
BAD: dict[str, Any] = {"Name": "web", "Mode": THREE, "Labels": {"is": "bad"}}


async def test_a_service_that_is_rolled_back_meanwhile_is_not_rolled_back_again() -> None:
    cluster = Swapped({"Spec": GOOD, "PreviousSpec": BAD})
    with pytest.raises(FailedPrecondition, match="web was rolled back or updated meanwhile"):
        await return_to_previous(cluster, "web")
    assert cluster.service["Spec"] == GOOD


async def test_a_service_that_is_scaled_meanwhile_is_rolled_back() -> None:
    cluster = Swapped({"Spec": BAD | {"Mode": FIVE}})
    await return_to_previous(cluster, "web")
    assert cluster.service["Spec"] == GOOD
