"""Published ports and their labels in a service spec."""

import pytest

from skep.errors import InvalidArgument
from skep.manager.control.validation.service_rules import check_service_spec
from skep.model.container import ContainerSpec
from skep.model.service import EndpointSpec, PortConfig, ServiceSpec, TaskSpec


def requested(port: PortConfig, **labels: str) -> ServiceSpec:
    return ServiceSpec(
        name="web",
        labels=labels,
        task_template=TaskSpec(container_spec=ContainerSpec(image="busybox:1")),
        endpoint_spec=EndpointSpec(ports=(port,)),
    )


@pytest.mark.parametrize(
    "port",
    [PortConfig(published_port=70000, target_port=80), PortConfig(published_port=80, target_port=65536)],
)
def test_a_port_out_of_range_is_refused(port: PortConfig) -> None:
    with pytest.raises(InvalidArgument, match="EndpointSpec: invalid port"):
        check_service_spec(requested(port))


def test_a_label_that_cannot_be_meant_is_refused() -> None:
    port = PortConfig(published_port=65535, target_port=80)
    check_service_spec(requested(port, **{"skep.publish.65535.affinity": "client-ip"}))
    with pytest.raises(
        InvalidArgument, match=r"skep\.publish\.80\.affinity: the service publishes no such port"
    ):
        check_service_spec(requested(port, **{"skep.publish.80.affinity": "client-ip"}))
