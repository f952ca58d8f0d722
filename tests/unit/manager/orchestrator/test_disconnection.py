"""When the tasks of a node that is down lose their places."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.manager.orchestrator.replacement.disconnection import UNCERTAIN_S, policy_on, replaced_at
from skep.model.container import ContainerSpec
from skep.model.node import RESPONSE_SECONDS_MAX, NodeState
from skep.model.options.labels import (
    DEFAULT_STOP_DELAY_S,
    DisconnectPolicy,
    OnDisconnect,
    check_service_labels,
    check_swarm_labels,
    disconnect_policy,
    heartbeat_grace_s,
)
from skep.model.service import PastDisconnect, Service
from skep.model.values.times import SECOND_NS, timestamp
from tests.support.builders import a_node, a_service, a_service_spec, a_task


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


HEARD_S = 1_700_000_000.0
STOP = {"skep.on-disconnect": "stop", "skep.on-disconnect-delay": "20s"}


def changed(labels: dict[str, str], *past: tuple[dict[str, str], float]) -> Service:
    """``past``: earlier labels, each with the seconds from the node's last heartbeat to the end of its time."""
    return replace(
        a_service(spec=replace(a_service_spec(), labels=labels)),
        past_disconnects=tuple(
            PastDisconnect(labels=labels, until=timestamp(round((HEARD_S + after_s) * SECOND_NS)))
            for labels, after_s in past
        ),
    )


@pytest.mark.parametrize(
    ("past", "delay_s"),
    [
        pytest.param([], 20.0, id="never-changed"),
        pytest.param([({}, 5.0)], inf, id="it-was-not-told-to-stop-anything"),
        pytest.param([({"skep.on-disconnect": "keep"}, 5.0)], inf, id="it-was-told-to-keep"),
        pytest.param([({}, -UNCERTAIN_S / 2)], inf, id="it-may-not-have-received-it"),
        pytest.param([({}, -UNCERTAIN_S * 2)], 20.0, id="it-was-told"),
        pytest.param([({**STOP, "skep.on-disconnect-delay": "5m"}, 5.0)], 300.0, id="a-longer-delay"),
        pytest.param([({**STOP, "skep.on-disconnect-delay": "5s"}, 5.0)], 20.0, id="a-shorter-delay"),
        pytest.param([({}, -60.0), ({"skep.on-disconnect": "stop"}, 5.0)], 30.0, id="the-one-it-was-sent"),
    ],
)
def test_a_node_that_was_not_heard_since_labels_changed_goes_by_earlier_ones(
    past: list[tuple[dict[str, str], float]], delay_s: float
) -> None:
    node = replace(a_node("n1", state=NodeState.DOWN), silent_since=timestamp(round(HEARD_S * SECOND_NS)))
    policy = policy_on(node, changed(STOP, *past))
    assert policy == DisconnectPolicy(action=OnDisconnect.STOP, delay_s=delay_s)
    unstamped = replace(node, silent_since=None)
    assert policy_on(unstamped, changed(STOP, *past)).delay_s == 20.0


@pytest.mark.parametrize("labels", [{}, {"skep.on-disconnect": "keep"}, {"skep.on-disconnect-delay": "1s"}])
def test_what_the_leader_alone_decides_follows_the_present_labels(labels: dict[str, str]) -> None:
    node = replace(a_node("n1", state=NodeState.DOWN), silent_since=timestamp(round(HEARD_S * SECOND_NS)))
    assert policy_on(node, changed(labels, (STOP, 5.0))) == disconnect_policy(labels)


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
    with pytest.raises(InvalidArgument, match=r"invalid label skep.on-disconnect.*expected"):
        check_service_labels(labels)
    assert disconnect_policy(labels) == DisconnectPolicy()


def test_the_grace_of_the_cluster_is_a_label() -> None:
    assert heartbeat_grace_s({}) is None
    assert heartbeat_grace_s({"skep.heartbeat-grace": "10s"}) == 10.0
    with pytest.raises(
        InvalidArgument, match=r"invalid label skep\.heartbeat-grace=soon: expected a duration like 30s"
    ):
        check_swarm_labels({"skep.heartbeat-grace": "soon"})
