"""Warnings of what a service's spec can never do."""

import pytest
from msgspec.structs import replace

from skep.manager.diagnosis.service_warnings import (
    budget_warnings,
    label_warnings,
    placement_warnings,
    restart_warnings,
    stop_warnings,
)
from skep.model.container import ContainerSpec, Mount
from skep.model.options.labels import MIN_AVAILABLE, STOPPED
from skep.model.options.schedules import CRON, CRON_SUSPEND
from skep.model.service import (
    PortConfig,
    PublishMode,
    ReplicatedJob,
    RestartPolicy,
    ServiceMode,
    ServiceSpec,
    UpdateConfig,
    UpdateOrder,
)
from tests.support.builders import a_node, a_service_spec

HOST_PORT = PortConfig(target_port=80, published_port=8080, publish_mode=PublishMode.HOST)
START_FIRST = UpdateConfig(order=UpdateOrder.START_FIRST)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (a_service_spec(), []),
        (a_service_spec(constraints=("node.labels.zone!=x",)), []),
        (
            a_service_spec(constraints=("node.labels.zone==x", "node.role==worker")),
            [
                "no node meets the constraints (node.labels.zone==x, node.role==worker): new tasks wait until one does"
            ],
        ),
        (
            a_service_spec(constraints=("node.label.disk==ssd",)),
            [
                (
                    "no node meets the constraints (node.label.disk==ssd): new tasks wait until one does. "
                    "No node has the key node.label.disk, did you mean node.labels.disk?"
                )
            ],
        ),
        (a_service_spec(ports=(HOST_PORT,)), []),
        (a_service_spec(update=START_FIRST), []),
        (
            a_service_spec(ports=(HOST_PORT,), update=START_FIRST),
            [
                (
                    "order start-first: two tasks cannot have the host-mode port 8080/tcp on one node, so without a "
                    "further node the old task is stopped first"
                )
            ],
        ),
    ],
)
def test_what_can_never_work_is_said_at_once(spec: ServiceSpec, words: list[str]) -> None:
    assert list(placement_warnings(spec, [a_node("n1"), a_node("n2")])) == words


@pytest.mark.parametrize(
    ("service", "container", "words"),
    [
        (
            {"skep.cron": "@hourly", "skep.publish.80/tcp.local": "true", "com.example": "x"},
            {"skep.exec": "none"},
            [],
        ),
        (
            {"skep.corn": "@hourly", "skep.zzzz": "", "skep.reserve.cpus": "1"},
            {},
            [
                "unknown label skep.corn: it has no effect, did you mean skep.cron?",
                "label skep.reserve.cpus has no effect on a service: it is a label of nodes",
                "unknown label skep.zzzz: it has no effect",
            ],
        ),
        (
            {"skep.schedule": "@hourly", "skep.gpu": "1"},
            {"skep.volumes_affinity": "none"},
            [
                "unknown label skep.gpu: it has no effect, did you mean skep.gpus on the container?",
                "unknown label skep.schedule: it has no effect, did you mean skep.cron?",
                (
                    "unknown label skep.volumes_affinity: it has no effect, did you mean skep.volume-affinity on the "
                    "service?"
                ),
            ],
        ),
        (
            {"skep.exec": "none"},
            {"skep.drain": "5s", "skep.publish.local": "true"},
            [
                "label skep.exec has no effect on a service: it is a label of the container",
                "label skep.drain has no effect on a container: it is a label of the service",
                "label skep.publish.local has no effect on a container: it is a label of the service",
            ],
        ),
    ],
)
def test_a_label_of_ours_that_has_no_effect_is_named(
    service: dict[str, str], container: dict[str, str], words: list[str]
) -> None:
    spec = a_service_spec()
    template = replace(spec.task_template, container_spec=ContainerSpec(image="w", labels=container))
    assert list(label_warnings(replace(spec, labels=service, task_template=template))) == words


def test_a_limit_of_restarts_that_is_too_large_to_count_is_said() -> None:
    assert list(restart_warnings(a_service_spec(restart=RestartPolicy(max_attempts=1000)))) == []
    assert list(restart_warnings(a_service_spec(restart=RestartPolicy(max_attempts=1001)))) == [
        "max attempts 1001 of the restart policy count as no limit: at most 1000 restarts of a task are counted"
    ]


def test_a_stopped_service_is_named_and_a_job_that_the_label_alone_does_not_stop() -> None:
    web = replace(a_service_spec("web"), labels={STOPPED: "true"})
    assert list(stop_warnings(web)) == ["the service is stopped: skep service start web starts its tasks"]
    assert list(stop_warnings(replace(web, labels={}))) == []
    job = replace(web, mode=ServiceMode(replicated_job=ReplicatedJob()))
    assert list(stop_warnings(job)) == [
        "label skep.stopped alone has no effect on a job: use skep service stop web"
    ]
    stopped = replace(job, labels={STOPPED: "true", CRON: "@daily", CRON_SUSPEND: "true"})
    assert list(stop_warnings(stopped)) == []


@pytest.mark.parametrize(
    ("minimum", "writes", "words"),
    [
        ("2", False, []),
        ("3", False, []),
        ("100%", False, []),
        ("2", True, []),
        ("5", False, ["label skep.min-available=5 counts as 3, because the service has no more tasks"]),
        (
            "100%",
            True,
            [
                (
                    "label skep.min-available keeps all tasks, and they write to the volume data: a drain leaves them "
                    "on their node until you run skep node drain --now, and an update still stops one at a time"
                )
            ],
        ),
    ],
)
def test_a_budget_that_cannot_be_kept_is_said_at_once(minimum: str, writes: bool, words: list[str]) -> None:
    spec = replace(a_service_spec(replicas=3), labels={MIN_AVAILABLE: minimum})
    if writes:
        mount = Mount(type="volume", source="data", target="/data")
        container = ContainerSpec(image="app", mounts=(mount,))
        spec = replace(spec, task_template=replace(spec.task_template, container_spec=container))
    assert list(budget_warnings(spec)) == words
    first = replace(spec, update_config=START_FIRST)
    assert list(budget_warnings(first)) == ([] if writes else words), "two tasks may write then"
