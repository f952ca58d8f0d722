"""Checks of a service's swap."""

import pytest

from skep.errors import InvalidArgument
from skep.manager.control.validation.service_rules import check_service_spec
from skep.model.container import ContainerSpec
from skep.model.service import Limits, ResourceRequirements, ServiceSpec, TaskSpec

LIMITED = Limits(memory_bytes=64 << 20)


def check(resources: ResourceRequirements) -> None:
    template = TaskSpec(container_spec=ContainerSpec(image="i"), resources=resources)
    check_service_spec(ServiceSpec(name="web", task_template=template))


@pytest.mark.parametrize(
    ("resources", "text"),
    [
        (ResourceRequirements(swap_bytes=0), "memory swap provided, but no memory-limit was set"),
        (
            ResourceRequirements(swap_bytes=-1, limits=Limits()),
            "memory swap provided, but no memory-limit was set",
        ),
        (ResourceRequirements(swap_bytes=-2, limits=LIMITED), "invalid memory swap -2"),
        (ResourceRequirements(memory_swappiness=101), "valid memory swappiness range is 0-100"),
        (ResourceRequirements(memory_swappiness=-2), "valid memory swappiness range is 0-100"),
    ],
)
def test_1_52_swap_that_cannot_be_is_refused(resources: ResourceRequirements, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        check(resources)


def test_1_52_swap_beside_a_memory_limit_is_accepted() -> None:
    for swap in (-1, 0, 1 << 40):
        check(
            ResourceRequirements(swap_bytes=swap, memory_swappiness=swap if swap < 1 else 100, limits=LIMITED)
        )
