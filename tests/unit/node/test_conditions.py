"""What is wrong with a node: as warnings at once, for the managers as labels, in answers as part of the status."""

from typing import Any

import pytest
from msgspec.structs import replace

from skep.agent.session.session_state import SessionState
from skep.aio.clock import SystemClock
from skep.cli.see.status import node_rows
from skep.manager.routes.representations import Problems, shown_node
from skep.manager.telemetry.events import messages_of
from skep.model.node import EngineDescription, NodeDescription, NodeState, NodeStatus
from skep.model.node_reports.conditions import CHARACTERS_MAX, CONDITIONS_MAX, condition_messages
from skep.node.cluster.cluster_work import NodeWork
from skep.node.host.conditions import LABEL_SECONDS_MIN, Conditions
from skep.store.interface import Updated
from tests.support.builders import a_node


class HandClock(SystemClock):
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def conditions(clock: HandClock) -> Conditions:
    return Conditions(clock)


def described(conditions: Conditions) -> NodeDescription:
    return NodeDescription(engine=EngineDescription(labels={"zone": "a", **conditions.labels()}))


def test_a_condition_is_a_warning_until_it_is_cleared(conditions: Conditions):
    conditions.set("disk", "the disk is full")
    conditions.set("disk", "the disk is nearly full")
    conditions.set("clock", "the clock is wrong")
    assert conditions.warnings() == ("the clock is wrong", "the disk is nearly full")
    conditions.clear("clock")
    conditions.clear("never raised")
    assert conditions.warnings() == ("the disk is nearly full",)


async def test_a_condition_of_one_cluster_is_not_reported_to_the_next(conditions: Conditions):
    """The managers of the cluster that the node joins would show it for half a minute."""
    conditions.set("swarm", "no cluster")
    conditions.clear("swarm")
    conditions.set("disk", "full")
    session = SessionState(HandClock())
    none: Any = Nothing()
    work = NodeWork(none, none, none, HandClock(), conditions, session=session, probes=None)
    await work.remove_all()
    assert conditions.labels() == {"skep.condition.disk": "full"}


def test_no_manager_shows_that_the_node_reaches_none(conditions: Conditions):
    """A leader showed it of itself for half a minute after the cluster was made on a busy machine."""
    conditions.set("manager-unreachable", "no manager answers")
    conditions.set("disk", "full")
    assert conditions.labels() == {"skep.condition.disk": "full"}
    assert conditions.warnings() == ("full", "no manager answers")


class Nothing:
    """A worker, an executor and network tables without content."""

    async def clear(self) -> None:
        pass

    async def leftovers(self) -> tuple[str, ...]:
        return ()


def test_the_end_of_a_long_condition_is_reported_at_once(conditions: Conditions, clock: HandClock):
    conditions.set("disk", "full")
    clock.now += LABEL_SECONDS_MIN
    conditions.set("disk", "fuller")
    assert conditions.labels() == {"skep.condition.disk": "fuller"}
    conditions.clear("disk")
    assert conditions.labels() == {}
    conditions.set("disk", "full")
    conditions.clear("disk")
    assert conditions.labels() == {"skep.condition.disk": "full"}, "it has begun again"


def test_the_end_of_a_condition_is_reported_late_so_that_flapping_is_one_condition(
    conditions: Conditions, clock: HandClock
):
    conditions.set("disk", "full")
    conditions.clear("disk")
    assert conditions.labels() == {"skep.condition.disk": "full"}
    clock.now += LABEL_SECONDS_MIN / 2
    conditions.set("disk", "full")
    conditions.clear("disk")
    assert conditions.labels() == {"skep.condition.disk": "full"}
    clock.now += LABEL_SECONDS_MIN / 2
    assert conditions.labels() == {}


def test_a_ready_nodes_status_message_has_its_conditions(conditions: Conditions):
    conditions.set("disk", "the disk is full")
    node = replace(
        a_node("w1"), description=described(conditions), status=NodeStatus(state=NodeState.READY, message="m")
    )
    assert shown_node(Problems(None, {}), node).status.message == "m; the disk is full"
    down = replace(node, status=NodeStatus(state=NodeState.DOWN))
    assert shown_node(Problems(None, {}), down).status.message == ""


def test_events_say_when_conditions_change(conditions: Conditions):
    before = replace(a_node("w1"), description=described(conditions))
    conditions.set("disk", "the disk is full")
    after = replace(before, description=described(conditions))
    (message,) = messages_of(Updated(old=before, new=after), 0)
    assert message.actor.attributes["conditions.old"] == ""
    assert message.actor.attributes["conditions.new"] == "the disk is full"


def test_skep_status_lists_ready_nodes_that_say_what_is_wrong():
    nodes = [
        {
            "ID": "a",
            "Description": {"Hostname": "w1"},
            "Status": {"State": "ready", "Message": "the disk is full"},
        },
        {"ID": "b", "Description": {"Hostname": "w2"}, "Status": {"State": "ready"}},
    ]
    assert [(row.name, row.reason, row.is_healthy) for row in node_rows(nodes)] == [
        ("w1", "the disk is full", True),
        ("w2", "", True),
    ]


def test_what_a_node_says_is_bounded_on_both_sides(conditions: Conditions):
    for number in range(CONDITIONS_MAX + 5):
        conditions.set(f"c{number:02}", "x" * 5000)
    assert len(conditions.labels()) == CONDITIONS_MAX
    assert set(map(len, conditions.labels().values())) == {CHARACTERS_MAX}
    sent = {f"skep.condition.{number}": "y" * 5000 for number in range(1000)}
    reported = condition_messages(NodeDescription(engine=EngineDescription(labels=sent)))
    assert len(reported) == CONDITIONS_MAX
    assert set(map(len, reported)) == {CHARACTERS_MAX}
