"""The port at which the demo publishes its service on every node."""

import pytest

from skep.errors import FailedPrecondition
from skep.playground.demo import FIRST_PORT, PORTS_TRIED, free_port


def test_the_demo_has_port_8080_or_the_next_free_one() -> None:
    assert free_port(lambda _: True) == 8080
    assert free_port(lambda port: port not in (8080, 8081)) == 8082


def test_a_machine_without_a_free_port_is_named() -> None:
    tried: list[int] = []
    with pytest.raises(FailedPrecondition, match="ports 8080 to 8179 of this machine are in use"):
        free_port(lambda port: tried.append(port) or False)
    assert tried == list(range(FIRST_PORT, FIRST_PORT + PORTS_TRIED))
