"""The labels of an autoscaled service, and the number of tasks that a spec leaves open."""

from datetime import datetime

import pytest
from msgspec.structs import replace

from skep.api.formats.service_form import settled
from skep.errors import InvalidArgument
from skep.model.measures.queries import MetricQuery, queries_in
from skep.model.options.autoscaling import (
    Autoscaling,
    QueryTarget,
    TaskUsage,
    autoscaling_of,
    check_autoscaling,
    parsed_autoscaling,
    with_number_kept,
    with_present_number,
)
from skep.model.service import (
    GlobalJob,
    GlobalService,
    ReplicatedJob,
    ServiceMode,
    ServiceSpec,
)
from tests.support.builders import a_service_spec

PROMETHEUS = {
    "autoscale": "1..2",
    "autoscale__prometheus": "http://prometheus:9090",
    "autoscale__query": "sum(x)",
}
QUEUE = {"autoscale": "1..2", "autoscale__queue": "http://x", "autoscale__queue_target": "5"}
EXEC = {
    "autoscale": "1..2",
    "autoscale__queue.exec": "redis-cli llen 'the jobs'",
    "autoscale__queue_target": "5",
}


def labeled(replicas: int | None = 1, **labels: str) -> ServiceSpec:
    named = {f"skep.{name.replace('__', '.').replace('_', '-')}": value for name, value in labels.items()}
    return replace(a_service_spec(replicas=replicas), labels=named)


def test_a_command_is_split_into_words_without_a_shell() -> None:
    scaling = autoscaling_of(labeled(**EXEC, **{"autoscale__queue.exec_in": "queue"}).labels)
    assert scaling is not None
    assert scaling.queue is not None
    assert scaling.queue.query == MetricQuery(command=("redis-cli", "llen", "the jobs"), service="queue")
    assert (scaling.queue.target, scaling.cpu) == (5.0, None)
    (query,) = queries_in(labeled(**EXEC).labels)
    assert (query.url, query.service) == ("", ""), "it needs no trust for an address"


def test_a_range_alone_goes_by_processor_time_and_waits_five_minutes() -> None:
    assert autoscaling_of({"skep.autoscale": "2..10"}) == Autoscaling(
        least=2, most=10, cpu=70, memory=None, down_after_s=300.0
    )


def test_a_target_of_memory_alone_leaves_processor_time_out() -> None:
    found = autoscaling_of({"skep.autoscale": "1..3", "skep.autoscale.memory": "80%"})
    assert found == Autoscaling(least=1, most=3, cpu=None, memory=80)


def test_a_service_without_the_label_is_not_autoscaled_nor_one_with_a_label_that_cannot_be_read() -> None:
    assert autoscaling_of({"skep.autoscale.cpu": "50"}) is None
    assert autoscaling_of({"skep.autoscale": "many"}) is None


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"autoscale": "5"}, "expected the fewest and the most tasks, like 2..10"),
        ({"autoscale": "٢..٣"}, "expected the fewest and the most tasks"),
        (
            {"autoscale": "0..5"},
            "needs a route of the front door, because only its requests start a task again",
        ),
        ({"autoscale": "0..5", "http": "a.example", "http__redirect": "https://b.example"}, "needs a route"),
        ({"autoscale": "0..0", "http": "a.example"}, "expected at least 1 as the most tasks"),
        ({"autoscale": "1..5", "autoscale__idle_after": "1m"}, "needs a range that starts at 0"),
        ({"autoscale": "0..5", "autoscale__idle_after": "1s"}, "expected a duration from 15s to 24h"),
        ({"autoscale": "5..2"}, "expected the smaller number first"),
        ({"autoscale": "1..999999"}, "at most 100000"),
        ({"autoscale": "1..2", "autoscale__cpu": "0"}, "expected a percentage from 1 to 1000"),
        ({"autoscale": "1..2", "autoscale__cpu": "nan"}, "expected a percentage"),
        ({"autoscale": "1..2", "autoscale__memory": "101"}, "expected a percentage from 1 to 100"),
        ({"autoscale": "1..2", "autoscale__memory": "50"}, "is a percentage of the memory limit: set one"),
        ({"autoscale": "1..2", "autoscale__down_after": "1s"}, "expected a duration from 15s to 24h"),
        (
            {"autoscale": "1..2", "autoscale__bytes": "9"},
            "unknown label skep.autoscale.bytes: expected one of",
        ),
        ({"autoscale__cpu": "50"}, "the label skep.autoscale.cpu needs skep.autoscale"),
        ({"autoscale": "1..2", "autoscale__requests": "9"}, "has no route: run skep service expose web HOST"),
        ({"autoscale": "1..2", "autoscale__rps": "0"}, "expected a number above 0"),
        ({"autoscale": "1..2", "autoscale__query": "up"}, "needs skep.autoscale.prometheus"),
        (PROMETHEUS, "the label skep.autoscale.query needs skep.autoscale.query-target, such as"),
        ({**PROMETHEUS, "autoscale__prometheus": "http://u:p@x"}, "would see its password"),
        ({**PROMETHEUS, "autoscale__prometheus": "ftp://x"}, "expected a URL such as http://"),
        ({**PROMETHEUS, "autoscale__prometheus": "http://x/?a=b"}, "expected the address only, without ?"),
        ({**PROMETHEUS, "autoscale__query": " "}, "expected an expression in PromQL"),
        ({"autoscale": "1..2", "autoscale__queue": "http://x"}, "needs skep.autoscale.queue-target"),
        (
            {"autoscale": "1..2", "autoscale__queue_target": "9"},
            "queue.example.org/length, or skep.autoscale.queue.",
        ),
        ({"autoscale": "1..2", "autoscale__queue.exec": "llen"}, "exec needs skep.autoscale.queue-target"),
        ({**QUEUE, "autoscale__queue.exec": "llen"}, "are two ways to the length: remove one"),
        ({**EXEC, "autoscale__queue.exec": "a 'b"}, "No closing quotation: close each"),
        ({**EXEC, "autoscale__queue.exec": " "}, "expected a command, such as redis-cli"),
        ({**EXEC, "autoscale__queue.exec": "a" * 1001}, "at most 1000 printable characters"),
        ({**EXEC, "autoscale__queue.exec_in": "a b"}, "expected the name of a service"),
        ({**QUEUE, "autoscale__queue.exec_in": "queue"}, "exec-in needs skep.autoscale.queue.exec"),
        ({**QUEUE, "autoscale__queue_field": "a..b"}, "expected names of fields with dots"),
        ({**QUEUE, "autoscale__queue_target": "-1"}, "expected a number above 0"),
        ({"autoscale": "1..2", "autoscale__time_zone": "UTC"}, "needs skep.autoscale.schedule"),
        ({"autoscale": "1..2", "autoscale__schedule": "0 8 * * *"}, "expected a cron expression and a range"),
        ({"autoscale": "1..2", "autoscale__schedule": "0 8 * * * 0..2"}, "0..2 is not within"),
        (
            {"autoscale": "1..2", "autoscale__schedule": "0 8 * * * 1..3"},
            "1..3 is not within skep.autoscale=1..2: widen that range",
        ),
        (
            {"autoscale": "1..2", "autoscale__schedule": "0 25 * * * 1..2"},
            "its hour .0 to 23. is invalid",
        ),
        (
            {"autoscale": "1..2", "autoscale__schedule": "@daily 1..2", "autoscale__time_zone": "Mars"},
            "invalid label skep.autoscale.time-zone=Mars",
        ),
    ],
)
def test_what_cannot_be_honored_is_refused_in_words(labels: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        check_autoscaling(labeled(**labels))


@pytest.mark.parametrize(
    "mode",
    [
        ServiceMode(global_=GlobalService()),
        ServiceMode(replicated_job=ReplicatedJob()),
        ServiceMode(global_job=GlobalJob()),
    ],
)
def test_global_services_and_jobs_are_not_autoscaled(mode: ServiceMode) -> None:
    with pytest.raises(InvalidArgument, match=f"is for replicated services, not for a {mode.name} one"):
        check_autoscaling(replace(labeled(autoscale="1..2"), mode=mode))


def test_a_spec_without_a_number_gets_the_fewest_and_later_keeps_what_there_is() -> None:
    open_spec = settled(labeled(None, autoscale="2..10"))
    assert open_spec.mode.replicated is not None
    assert open_spec.mode.replicated.replicas is None
    assert with_number_kept(open_spec, None).replicas == 2
    assert with_number_kept(open_spec, a_service_spec(replicas=7)).replicas == 7
    assert with_number_kept(open_spec, a_service_spec(replicas=50)).replicas == 10
    assert with_number_kept(open_spec, a_service_spec(replicas=0)).replicas == 0, "off by hand"
    assert with_number_kept(labeled(5, autoscale="2..10"), a_service_spec(replicas=7)).replicas == 5


def test_a_new_service_that_may_have_no_task_starts_with_one() -> None:
    assert with_number_kept(settled(labeled(None, autoscale="0..3", http="a.example")), None).replicas == 1


def test_without_autoscaling_a_missing_number_is_one_as_in_docker() -> None:
    spec = settled(labeled(None))
    assert with_number_kept(spec, a_service_spec(replicas=7)) == spec
    assert spec.replicas == 1


def test_a_file_does_not_reset_the_number_while_autoscaling_stays_on() -> None:
    file = labeled(3, autoscale="2..10")
    assert with_present_number(file, labeled(8, autoscale="2..20")).replicas == 8
    assert with_present_number(file, labeled(8)).replicas == 3
    assert with_present_number(labeled(3), labeled(8, autoscale="2..20")).replicas == 3


@pytest.mark.parametrize("usage", [(-1, 0), (0, -1), (1 << 62, 0), (0, 1 << 51)])
def test_what_no_machine_has_is_no_measurement(usage: tuple[int, int]) -> None:
    assert not TaskUsage(nano_cpus=usage[0], memory_bytes=usage[1]).is_plausible


def test_other_measures_replace_the_default_target_of_processor_time() -> None:
    found = autoscaling_of(labeled(**PROMETHEUS, autoscale__query_target="2.5", autoscale__rps="9").labels)
    assert found is not None
    assert (found.cpu, found.rps, found.requests) == (None, 9.0, None)
    assert found.prometheus == QueryTarget(
        MetricQuery(url="http://prometheus:9090", expression="sum(x)"), 2.5
    )
    assert found.prometheus is not None
    assert found.prometheus.query.request_url == "http://prometheus:9090/api/v1/query?query=sum%28x%29"


def at(scaling: Autoscaling, text: str) -> tuple[int, int]:
    found = scaling.at(int(datetime.fromisoformat(text).timestamp()))
    return found.least, found.most


def test_the_entry_of_the_schedule_that_was_due_last_applies() -> None:
    schedule = "0 8 * * 1-5 4..10; 0 20 * * * 2..4; 0 8 24 12 * 1..1; 0 8 29 2 1 9..9"
    found = parsed_autoscaling(
        {
            "skep.autoscale": "1..20",
            "skep.autoscale.schedule": schedule,
            "skep.autoscale.time-zone": "Europe/Berlin",
        }
    )
    assert found.cpu == 70
    assert at(found, "2026-01-07T07:59:30+01:00") == (2, 4), "Wednesday, before its entry"
    assert at(found, "2026-01-07T08:00:00+01:00") == (4, 10)
    assert at(found, "2026-07-08T08:00:00+02:00") == (4, 10), "summer time"
    assert at(found, "2026-01-07T20:00:00+01:00") == (2, 4)
    assert at(found, "2026-01-10T12:00:00+01:00") == (2, 4), "Saturday"
    assert at(found, "2026-12-24T12:00:00+01:00") == (1, 1), "the later one of two that are due at a time"
    rare = parsed_autoscaling({"skep.autoscale": "1..9", "skep.autoscale.schedule": "0 0 29 2 * 3..3"})
    assert at(rare, "2027-06-01T00:00:00+00:00") == (3, 3)
    assert (found.least, found.most) == (1, 20), "the label keeps the outer bounds"
