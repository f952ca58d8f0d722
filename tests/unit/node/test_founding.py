"""What is refused before a cluster is made: its manager could not start."""

import pytest

from skep.errors import InvalidArgument
from skep.model.swarm import CAConfig, DispatcherConfig, SwarmSpec
from skep.model.times import SECOND_NS
from skep.node.founding import check_settings


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            SwarmSpec(ca_config=CAConfig(node_cert_expiry=60 * SECOND_NS)),
            "minimum certificate expiry time is: 1h0m0s",
        ),
        (SwarmSpec(dispatcher=DispatcherConfig(heartbeat_period=-1)), "period cannot be a negative duration"),
    ],
)
def test_settings_that_a_manager_refuses_are_refused_before_there_is_one(
    spec: SwarmSpec, message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        check_settings(spec)


def test_settings_that_are_left_out_are_the_defaults() -> None:
    check_settings(SwarmSpec())
