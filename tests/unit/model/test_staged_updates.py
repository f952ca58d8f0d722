"""Labels of staged updates: what they mean and what is refused."""

from math import inf

import pytest
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.manager.control.validation.service_rules import check_service_spec
from skep.model.container import ContainerSpec, Mount
from skep.model.service import (
    EndpointSpec,
    GlobalService,
    PortConfig,
    PublishMode,
    ServiceMode,
    ServiceSpec,
    UpdateConfig,
    UpdateFailureAction,
    UpdateOrder,
)
from skep.model.staging.updates import LAST, UpdateStage, stages_of
from tests.support.builders import a_service_spec

CANARY = {"skep.update": "canary"}


def a_spec(**fields: object) -> ServiceSpec:
    return replace(a_service_spec(name="web", image="app:1"), labels=CANARY, **fields)


SWITCHED = replace(LAST, percent=100)
"""The last step of blue-green."""


@pytest.mark.parametrize(
    ("labels", "stages"),
    [
        ({}, ()),
        (CANARY, (UpdateStage(5, 5, 60.0), UpdateStage(25, 25, 60.0), LAST)),
        (
            {**CANARY, "skep.update.steps": "1%, 50%,100%", "skep.update.step-time": "5m"},
            (UpdateStage(1, 1, 300.0), UpdateStage(50, 50, 300.0), LAST),
        ),
        ({**CANARY, "skep.update.steps": "100%"}, (LAST,)),
        (
            {**CANARY, "skep.update.promote": "manual", "skep.update.step-time": "5m"},
            (UpdateStage(5, 5, inf), UpdateStage(25, 25, inf), LAST),
        ),
        ({"skep.update": "blue-green"}, (UpdateStage(0, 100), UpdateStage(100, 100, 600.0), SWITCHED)),
        (
            {"skep.update": "blue-green", "skep.update.promote": "manual", "skep.update.keep": "1h"},
            (UpdateStage(0, 100, inf), UpdateStage(100, 100, 3600.0), SWITCHED),
        ),
        ({"skep.update": "unknown to this version"}, ()),
    ],
)
def test_labels_name_the_steps(labels: dict[str, str], stages: tuple[UpdateStage, ...]) -> None:
    assert stages_of(labels) == stages


@pytest.mark.parametrize(
    "labels",
    [
        {"skep.update": "rolling"},
        {"skep.update.steps": "5%"},
        {**CANARY, "skep.update.steps": "5"},
        {**CANARY, "skep.update.steps": "25%,5%"},
        {**CANARY, "skep.update.steps": "0%,5%"},
        {**CANARY, "skep.update.steps": "101%"},
        {**CANARY, "skep.update.steps": ",".join(f"{n}%" for n in range(1, 23))},
        {**CANARY, "skep.update.step-time": "soon"},
        {**CANARY, "skep.update.keep": "1m"},
        {**CANARY, "skep.update.max-errors": "1%"},  # without a route
        {**CANARY, "skep.http": "a.example", "skep.update.max-errors": "1"},
        {**CANARY, "skep.http": "a.example", "skep.update.max-errors": "101%"},
        {**CANARY, "skep.http": "a.example", "skep.update.max-latency": "fast"},
        {"skep.update.max-errors": "1%"},
        {**CANARY, "skep.update.promote": "later"},
        {"skep.update": "blue-green", "skep.update.steps": "5%"},
        {**CANARY, "skep.update.step-time": "200h"},
    ],
)
def test_labels_without_a_meaning_are_refused(labels: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument, match=r"skep\.update"):
        check_service_spec(replace(a_spec(), labels=labels))


DATA = ContainerSpec(image="app:1", mounts=(Mount(type="volume", source="data", target="/data"),))
IN_HOST_MODE = EndpointSpec(ports=(PortConfig(target_port=80, publish_mode=PublishMode.HOST),))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mode": ServiceMode(global_=GlobalService())}, "replicated services only"),
        ({"endpoint_spec": IN_HOST_MODE}, "port 80 is published in host mode"),
        ({"endpoint_spec": EndpointSpec(mode="dnsrr")}, "needs a virtual address"),
        (
            {"task_template": replace(a_service_spec().task_template, container_spec=DATA)},
            "both would write to the volume data",
        ),
        (
            {"update_config": UpdateConfig(failure_action=UpdateFailureAction.CONTINUE)},
            "the failure action is continue",
        ),
    ],
)
def test_what_cannot_have_two_tasks_in_a_slot_is_refused_by_name(
    fields: dict[str, object], words: str
) -> None:
    with pytest.raises(InvalidArgument, match=words):
        check_service_spec(a_spec(**fields))


def test_tasks_that_may_write_to_the_same_data_are_accepted() -> None:
    template = replace(a_service_spec().task_template, container_spec=DATA)
    order = UpdateConfig(order=UpdateOrder.START_FIRST)
    check_service_spec(a_spec(task_template=template, update_config=order))
