"""When the tasks of a node that is down lose their places."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.manager.orchestrator.disconnection import replaced_at
from skep.model.container import ContainerSpec
from skep.model.labels import (
    DEFAULT_STOP_DELAY_S,
    DisconnectPolicy,
    OnDisconnect,
    check_service_labels,
    check_swarm_labels,
    disconnect_policy,
    heartbeat_grace_s,
)
from skep.model.node import RESPONSE_SECONDS_MAX
from skep.model.times import SECOND_NS
from tests.support.builders import a_task


def test_without_labels_tasks_are_replaced_at_once() -> None:
    assert replaced_at(disconnect_policy({}), a_task("t"), 7.0) == 7.0


def test_the_delay_of_a_replacement_counts_from_when_the_node_was_down() -> None:
    policy = disconnect_policy({"skep.on-disconnect-delay": "30s"})
    assert replaced_at(policy, a_task("t"), 7.0) == 37.0


def test_what_keeps_its_place_keeps_it() -> None:
    policy = disconnect_policy({"skep.on-disconnect": "keep"})
    assert replaced_at(policy, a_task("t"), 7.0) == inf


def test_what_its_node_stops_is_replaced_when_it_has_surely_stopped() -> None:
    policy = disconnect_policy({"skep.on-disconnect": "stop"})
    assert policy.delay_s == DEFAULT_STOP_DELAY_S
    task = a_task("t")
    assert replaced_at(policy, task, 7.0) == 7.0 + DEFAULT_STOP_DELAY_S + 10.0
    slow = replace(
        task, spec=replace(task.spec, container_spec=ContainerSpec(stop_grace_period=60 * SECOND_NS))
    )
    assert replaced_at(policy, slow, 7.0) == 7.0 + DEFAULT_STOP_DELAY_S + 60.0


def test_however_short_the_delay_a_node_has_the_time_to_find_out_that_it_is_cut_off() -> None:
    policy = disconnect_policy({"skep.on-disconnect": "stop", "skep.on-disconnect-delay": "1s"})
    assert replaced_at(policy, a_task("t"), 7.0) == 7.0 + RESPONSE_SECONDS_MAX + 10.0


@given(st.sampled_from(OnDisconnect), st.floats(0, 1e6), st.floats(0, 1e6))
def test_nothing_is_replaced_before_the_node_is_down(
    action: OnDisconnect, delay_s: float, down_at: float
) -> None:
    policy = DisconnectPolicy(action=action, delay_s=delay_s)
    assert replaced_at(policy, a_task("t"), down_at) >= down_at


@pytest.mark.parametrize(
    "labels",
    [
        {"skep.on-disconnect": "ignore"},
        {"skep.on-disconnect-delay": "soon"},
        {"skep.on-disconnect-delay": "-1s"},
        {"skep.on-disconnect-delay": "9000000h"},
    ],
)
def test_labels_that_cannot_be_read_are_refused_and_count_for_nothing(labels: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument, match=r"invalid label skep.on-disconnect.*want"):
        check_service_labels(labels)
    assert disconnect_policy(labels) == DisconnectPolicy()


def test_the_grace_of_the_cluster_is_a_label() -> None:
    assert heartbeat_grace_s({}) is None
    assert heartbeat_grace_s({"skep.heartbeat-grace": "10s"}) == 10.0
    with pytest.raises(
        InvalidArgument, match=r"invalid label skep\.heartbeat-grace=soon: want a duration like 30s"
    ):
        check_swarm_labels({"skep.heartbeat-grace": "soon"})
