"""The keys below ``x-skep`` and ``deploy``, beside labels and older keys."""

import pytest

from docs.reference.label_table import LABELS, LabelTarget
from skep.model.door.routes import HTTP
from skep.model.door.settings import DOOR_LABELS
from skep.model.options.affinity import PLACEMENT_LABELS
from skep.model.options.autoscaling import AUTOSCALE
from skep.model.options.dependencies import DEPENDS_ON
from tests.unit.stack.test_conversion import read, spec


def test_every_label_of_services_has_a_key() -> None:
    """Below ``x-skep``; ``depends_on`` has its own."""
    values = {"duration": "3s", "`true`, `false`": "true", "IP address": "127.0.0.1", "`0` to `20`": "3"}
    values |= {"URL": "http://x", "PromQL with one sample": "up", "number": "1"}
    for label in LABELS:
        if label.target is not LabelTarget.SERVICE or label.name == DEPENDS_ON:
            continue
        if label.name.startswith(HTTP) or label.name in DOOR_LABELS:
            continue  # see test_routes_are_a_host_a_list_or_a_mapping; `skep door up` sets those of the door
        if label.name.startswith(f"{AUTOSCALE}."):
            continue  # below one key
        value = values.get(label.values) or label.values.split("`")[-2]
        if label.name.startswith("skep.cron"):
            continue  # see test_a_schedule_is_an_expression_a_list_or_a_mapping
        if label.name in PLACEMENT_LABELS:
            continue  # see test_affinities_name_services_of_the_file
        if "publish[" in label.name:
            option = label.name.rpartition(".")[2]
            found = spec(f"ports: ['80:80'], x-skep: {{publish: {{'80/tcp': {{{option}: '{value}'}}}}}}")
            assert found["Labels"][f"skep.publish.80/tcp.{option}"] == value
        else:
            key = label.name.removeprefix("skep.").replace(".", "-")
            found = spec(f"x-skep: {{{key}: '{value}'}}")
            assert found["Labels"][label.name] == value


def test_a_label_adds_dependencies_on_services_of_other_stacks() -> None:
    label = "skep.depends-on: 'infra_vault=service_healthy,shop_db=service_healthy'"
    stack, report = read(
        f"services: {{web: {{image: w, depends_on: [db], deploy: {{labels: {{{label}}}}}}}, db: {{image: d}}}}"
    )
    assert not report.problems
    found = stack.services["web"].spec.labels["skep.depends-on"]
    assert found == "infra_vault=service_healthy,shop_db=service_started"


def test_a_certificate_is_a_secret_of_the_file_or_of_the_cluster() -> None:
    stack, report = read(
        "{services: {web: {image: w, x-skep: {http: {host: a.example, tls: cert, "
        "more: {host: b.example, tls: other}}}}}, "
        "secrets: {cert: {external: true, name: shop_cert-1}}}"
    )
    assert not report.problems
    labels = stack.services["web"].spec.labels
    assert (labels["skep.http.tls"], labels["skep.http.more.tls"]) == ("shop_cert-1", "other")


def test_affinities_name_services_of_the_file() -> None:
    stack, report = read(
        "services: {db: {image: w}, web: {image: w, x-skep: {affinity: db@node.labels.zone, anti-affinity: 'db, web', "
        "affinity-preferred: db, anti-affinity-preferred: db@node.labels.rack, max-skew: 1@node.labels.zone}}}"
    )
    assert not report.problems
    labels = stack.services["web"].spec.labels
    assert {name: labels[name] for name in PLACEMENT_LABELS} == {
        "skep.affinity": "shop_db@node.labels.zone",
        "skep.anti-affinity": "shop_db,shop_web",
        "skep.affinity.preferred": "shop_db",
        "skep.anti-affinity.preferred": "shop_db@node.labels.rack",
        "skep.max-skew": "1@node.labels.zone",
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("affinity: wep", "services.web: its affinity names wep, which is not there"),
        ("affinity: db@zone", "invalid label skep.affinity=shop_db@zone: expected SERVICE[@TOPOLOGY]"),
        ("affinity: db, anti-affinity: db", "contradict each other"),
        ("anti-affinity-preferred: web", "cannot name the service itself"),
        ("max-skew: 1", "invalid label skep.max-skew=1: expected NUMBER@TOPOLOGY"),
    ],
)
def test_affinities_that_cannot_work_are_refused_at_their_place(text: str, problem: str) -> None:
    _, report = read(f"services: {{db: {{image: w}}, web: {{image: w, x-skep: {{{text}}}}}}}")
    assert problem in str(report.problems[0])


def test_autoscaling_is_a_range_or_a_mapping() -> None:
    assert spec("x-skep: {autoscale: 2..10}")["Labels"][AUTOSCALE] == "2..10"
    made = spec(
        "x-skep: {autoscale: {min: 2, max: 10, cpu: 60%, memory: 80, down-after: 10m}}, "
        "deploy: {resources: {limits: {memory: 64m}}}"
    )
    labels = {name: value for name, value in made["Labels"].items() if name.startswith("skep.")}
    assert labels == {
        "skep.autoscale": "2..10",
        "skep.autoscale.cpu": "60%",
        "skep.autoscale.memory": "80",
        "skep.autoscale.down-after": "10m",
    }
    assert made["Mode"] == {"Replicated": {}}, "the number is the cluster's"
    measures = "queue: 'http://x', queue-target: 5, schedule: '0 8 * * * 1..2', time-zone: Europe/Berlin"
    labels = spec(f"x-skep: {{autoscale: {{max: 4, {measures}}}}}")["Labels"]
    assert labels["skep.autoscale.queue-target"] == "5"
    assert labels["skep.autoscale.schedule"] == "0 8 * * * 1..2"
    command = "queue.exec: 'llen jobs', queue.exec-in: redis, queue-target: 5"
    labels = spec(f"x-skep: {{autoscale: {{max: 4, {command}}}}}")["Labels"]
    assert labels["skep.autoscale.queue.exec"] == "llen jobs"
    assert labels["skep.autoscale.queue.exec-in"] == "redis"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "autoscale: 5",
            "f:1:48: services.web.x-skep.autoscale: invalid label skep.autoscale=5: expected the fewest",
        ),
        (
            "autoscale: {min: 2}",
            "services.web.x-skep.autoscale.max: expected the most tasks that the service may have",
        ),
        (
            "autoscale: {min: 9, max: 2}",
            "f:1:54: services.web.x-skep.autoscale.min: 9 is more than max, which is 2",
        ),
        (
            "autoscale: {max: 2, cpu: 0}",
            "f:1:62: services.web.x-skep.autoscale.cpu: invalid label skep.autoscale.cpu=0",
        ),
        (
            "autoscale: {max: 2, memory: 50}",
            "skep.autoscale.memory is a percentage of the memory limit: set one",
        ),
        ("autoscale: {max: 2, bytes: 9}", "services.web.x-skep.autoscale.bytes: unknown key"),
        (
            "autoscale: {max: 2, requests: 9}",
            "skep.autoscale.requests counts HTTP requests over the front door",
        ),
        (
            "autoscale: {max: 2, cpu: 50, queue: 'ftp://x', queue-target: 9}",
            "services.web.x-skep.autoscale.queue: invalid label skep.autoscale.queue=ftp://x",
        ),
        (
            "autoscale: {max: 2, query: up}",
            "services.web.x-skep.autoscale.query: the label skep.autoscale.query needs skep.autoscale.prometheus",
        ),
        ("autoscale: {max: 2, down-after: 1s}", "expected a duration from 15s to 24h"),
    ],
)
def test_autoscaling_that_cannot_be_honored_is_refused_at_its_place(text: str, problem: str) -> None:
    _, report = read(f"services: {{web: {{image: w, x-skep: {{{text}}}}}}}")
    (found,) = report.problems
    assert problem in str(found)


def test_a_global_service_is_not_autoscaled() -> None:
    _, report = read("services: {web: {image: w, deploy: {mode: global}, x-skep: {autoscale: 1..2}}}")
    assert "is for replicated services, not for a global one" in str(report.problems[0])


def test_a_schedule_is_an_expression_a_list_or_a_mapping() -> None:
    def labels(cron: str) -> dict[str, str]:
        found = spec(f"deploy: {{mode: replicated-job}}, x-skep: {{cron: {cron}}}")["Labels"]
        return {name: value for name, value in found.items() if name.startswith("skep.cron")}

    assert labels("'*/5 * * * *'") == {"skep.cron": "*/5 * * * *"}
    assert labels("['@daily', '0 9 * * 1']") == {"skep.cron": "@daily; 0 9 * * 1"}
    given = (
        "{schedule: '@daily', time-zone: Asia/Kathmandu, concurrency: replace, deadline: 2h, suspend: true, "
        "max-attempts: 3}"
    )
    made = labels(given)
    assert made == {
        "skep.cron": "@daily",
        "skep.cron.time-zone": "Asia/Kathmandu",
        "skep.cron.concurrency": "replace",
        "skep.cron.deadline": "2h",
        "skep.cron.suspend": "true",
        "skep.cron.max-attempts": "3",
    }
    assert set(made) == {label.name for label in LABELS if label.name.startswith("skep.cron")}
    assert labels("{schedule: ['@daily', '@hourly']}") == {"skep.cron": "@daily; @hourly"}


def test_x_skep_becomes_labels_of_the_service() -> None:
    found = spec(
        "x-skep: {drain: 5s, on-disconnect: keep, publish: {affinity: client-ip, '80': {local: true}}}"
    )
    assert {name: value for name, value in found["Labels"].items() if name.startswith("skep.")} == {
        "skep.drain": "5s",
        "skep.on-disconnect": "keep",
        "skep.publish.affinity": "client-ip",
        "skep.publish.80.local": "true",
    }


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("http: a.example", {"skep.http": "a.example"}),
        ("http: [a.example, b.example/x]", {"skep.http": "a.example,b.example/x"}),
        (
            "http: {host: a.example, port: 8080, sticky: true, request-header: {X-A: '1'}}",
            {
                "skep.http": "a.example",
                "skep.http.port": "8080",
                "skep.http.sticky": "true",
                "skep.http.request-header.X-A": "1",
            },
        ),
        (
            "http: {port: 81, web: a.example, api: {host: [a.example/api], port: 82}}",
            {
                "skep.http.port": "81",
                "skep.http.web": "a.example",
                "skep.http.api": "a.example/api",
                "skep.http.api.port": "82",
            },
        ),
    ],
)
def test_routes_are_a_host_a_list_or_a_mapping(text: str, labels: dict[str, str]) -> None:
    found = spec(f"x-skep: {{{text}}}")["Labels"]
    assert {name: value for name, value in found.items() if name.startswith("skep.http")} == labels


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("http: 'a b'", "services.web.x-skep.http: invalid label skep.http=a b: a b is not a DNS name"),
        ("http: {host: a.example, prt: 80}", "services.web.x-skep.http: invalid label skep.http.prt=80"),
        ("http: {api: {host: a.b, prt: 80}}", "services.web.x-skep.http.api.prt: unknown key"),
        ("http: {host: a.example, port: no}", "expected a port from 1 to 65535"),
    ],
)
def test_routes_that_cannot_work_are_refused_at_their_place(text: str, problem: str) -> None:
    _, report = read(f"services: {{web: {{image: w, x-skep: {{{text}}}}}}}")
    assert problem in "\n".join(map(str, report.problems))


def test_the_error_of_a_label_is_at_the_place_where_the_file_has_it() -> None:
    for settings, place in (
        ("deploy: {labels: {skep.drain: never}}", "f:1:36: services.web.deploy: "),
        ("x-skep: {drain: never}", "f:1:36: services.web.x-skep: "),
    ):
        _, report = read(f"services: {{web: {{image: w, {settings}}}}}")
        assert str(report.problems[0]).startswith(f"{place}invalid label skep.drain=never: "), report.problems


def test_no_limit_is_a_limit_that_is_given() -> None:
    limits = "pids: 0, memory: 0, cpus: 0"
    found = spec(f"deploy: {{resources: {{limits: {{{limits}}}}}}}, pids_limit: 5, mem_limit: 1g, cpus: 2")
    assert "Resources" not in found["TaskTemplate"]
