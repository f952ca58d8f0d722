"""Whose a process is, by its control groups."""

import pytest

from skep.model.values.ids import ContainerId
from skep.node.container_apis.peers import container_in

ONE, TWO = "1" * 64, "2" * 64


@pytest.mark.parametrize(
    ("groups", "container"),
    [
        ("0::/\n", None),
        ("0::/system.slice/skep.service\n", None),
        (f"0::/skep/ctr/{ONE}\n", ONE),
        (f"4:memory:/skep/ctr/{TWO}\n0::/\n", TWO),
        (f"0::/docker/{TWO}\n", None),  # a Docker Engine's
        (f"0::/mine/{ONE}\n", ONE),  # --cgroup-parent
        (f"0::/mine/{ONE}/{TWO}\n", ONE),
        (f"0::/skep/ctr/{TWO}/ctr/{ONE}\n", TWO),  # a container names groups below its own as it likes
        (f"0::/docker/{TWO}/{ONE}\n", ONE),
        (f"0::/mine/{ONE}0\n", None),
    ],
)
def test_the_first_group_of_a_container_says_whose_a_process_is(groups: str, container: str | None) -> None:
    assert container_in(groups, lambda one: one == ContainerId(ONE)) == container


@pytest.mark.parametrize(
    ("groups", "container"),
    [
        (f"0::/skep/ctr/{TWO}/agent\n", None),
        (f"0::/skep/ctr/{TWO}/nodes/w1/ctr/{ONE}\n", ONE),
        (f"0::/skep/ctr/{TWO}/nodes/w1/ctr/{ONE}/ctr/{TWO}\n", ONE),
    ],
)
def test_a_container_that_surrounds_the_node_is_its_machine(groups: str, container: str | None) -> None:
    assert container_in(groups, lambda _: False, {ContainerId(TWO)}) == container
