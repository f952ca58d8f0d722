"""Whether two tasks of one slot may run at the same time."""

import pytest
from msgspec.structs import replace

from skep.model.container import Mount
from skep.model.options.overlap import why_stop_first
from skep.model.service import ServiceSpec, UpdateConfig, UpdateOrder
from tests.support.builders import a_service_spec


def a_spec(*mounts: Mount) -> ServiceSpec:
    spec = a_service_spec()
    container = spec.task_template.container_spec
    assert container is not None
    template = replace(spec.task_template, container_spec=replace(container, mounts=mounts))
    return replace(spec, task_template=template)


@pytest.mark.parametrize(
    ("mount", "data"),
    [
        (Mount(type="volume", source="data", target="/data"), "the volume data"),
        (Mount(source="data", target="/data"), "the volume data"),
        (Mount(type="bind", source="/srv/db", target="/data"), "the host path /srv/db"),
        (Mount(type="cluster", source="shared", target="/data"), "the cluster volume shared"),
        (Mount(type="volume", source="data", target="/data", read_only=True), ""),
        (Mount(type="volume", target="/data"), ""),
        (Mount(type="tmpfs", target="/tmp"), ""),
    ],
)
def test_a_task_that_writes_to_data_that_stays_stops_first(mount: Mount, data: str) -> None:
    assert why_stop_first(a_spec(Mount(type="tmpfs", target="/run"), mount)) == data


def test_the_order_start_first_says_that_two_tasks_may_write() -> None:
    spec = a_spec(Mount(type="bind", source="/srv/db", target="/data"))
    assert why_stop_first(replace(spec, update_config=UpdateConfig(order=UpdateOrder.START_FIRST))) == ""
    assert why_stop_first(replace(spec, update_config=UpdateConfig(order=UpdateOrder.STOP_FIRST))) != ""
