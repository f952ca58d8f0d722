"""When the heartbeat of a node expires."""

from random import Random

import pytest

from skep.manager.dispatcher.node_sessions.heartbeat_deadlines import (
    PERIOD_JITTER,
    TICK_S_MIN,
    HeartbeatDeadlines,
)
from skep.manager.dispatcher.node_sessions.sessions import Sessions
from skep.manager.nodes.heartbeats import (
    AWAY_GRACE_S,
    DEFAULT_PERIOD_S,
    GRACE_PERIODS,
    RECOVERY_GRACE_S,
    SUSPENDED_S_MAX,
    grace_after_absence,
)
from skep.model.swarm import DispatcherConfig, Swarm, SwarmSpec
from skep.model.values.ids import ClusterId, NodeId, SessionId
from skep.model.values.times import SECOND_NS
from skep.store.state import State

N1, OWN, A = NodeId("n1"), NodeId("m1"), SessionId("a")
GRACE_S = GRACE_PERIODS * DEFAULT_PERIOD_S


def a_cluster(*, heartbeat_s: int) -> State:
    spec = SwarmSpec(dispatcher=DispatcherConfig(heartbeat_period=heartbeat_s * SECOND_NS))
    state = State()
    state.table_by_type[Swarm].store("c1", None, Swarm(id=ClusterId("c1"), spec=spec))
    return state


class Part:
    """Deadlines whose own time passes in ticks, each on time."""

    def __init__(self) -> None:
        self.sessions = Sessions()
        self.now = 100.0
        self.deadlines = HeartbeatDeadlines(self.sessions, Random(1), lambda: self.now, OWN)

    def pass_time(self, seconds: float, *, has_quorum: bool = True, is_overloaded: bool = False) -> None:
        until = self.now + seconds
        while until - self.now > 1e-9:
            self.now += min(self.deadlines.next_tick(is_alone=False), until - self.now)
            self.deadlines.advance(has_quorum=has_quorum, is_overloaded=is_overloaded)

    def silent(self) -> list[NodeId]:
        return [one.node_id for one in self.deadlines.silent(with_others=False)]


def test_a_node_is_silent_a_grace_after_its_last_heartbeat() -> None:
    part = Part()
    session = part.deadlines.begin(N1, A, lambda: None)
    part.pass_time(GRACE_S - 1)
    assert part.silent() == []
    period_s = part.deadlines.record_heartbeat(session)
    assert abs(period_s - DEFAULT_PERIOD_S) <= PERIOD_JITTER * DEFAULT_PERIOD_S
    part.pass_time(GRACE_PERIODS * period_s - 1)
    assert part.silent() == []
    part.pass_time(2)
    assert part.silent() == [N1]
    assert part.deadlines.has_passed(session)


def test_the_own_node_of_a_single_manager_has_a_longer_period_and_misses_no_heartbeat() -> None:
    for is_alone, id, longer in ((True, OWN, 1.0), (True, N1, 0.0), (False, OWN, 0.0)):
        part = Part()
        part.deadlines.configure(a_cluster(heartbeat_s=1))
        session = part.deadlines.begin(id, A, lambda: None)
        part.deadlines.next_tick(is_alone=is_alone)
        period_s = part.deadlines.record_heartbeat(session)
        assert abs(period_s - 1.0 - longer) <= 0.2
        part.pass_time(2.0)
        assert part.deadlines.missed() == (0 if longer else 1)
        part.pass_time(GRACE_PERIODS * period_s - 2.5)
        assert part.silent() == []
        part.pass_time(1.5)
        assert part.silent() == [id]


def test_the_next_check_is_when_a_deadline_passes_and_the_own_time_goes_on_until_then() -> None:
    part = Part()
    session = part.deadlines.begin(N1, A, lambda: None)
    part.pass_time(1.0)
    part.now += 0.1
    period_s = part.deadlines.record_heartbeat(session)
    assert session.last_seen == pytest.approx(1.1), "not at the last check"
    left_s = GRACE_PERIODS * period_s
    checks = 0
    while not part.silent():
        tick_s = part.deadlines.next_tick(is_alone=True)
        part.now += tick_s
        part.deadlines.advance(has_quorum=True, is_overloaded=False)
        checks += 1
    assert 0.0 <= part.deadlines.now - (1.1 + left_s) <= TICK_S_MIN
    assert checks <= left_s / 0.5 + 2


def test_heartbeats_do_not_expire_without_a_quorum() -> None:
    part = Part()
    part.deadlines.begin(N1, A, lambda: None)
    part.pass_time(10 * GRACE_S, has_quorum=False)
    assert part.silent() == []
    assert part.deadlines.now == 0.0


def test_overload_suspends_deadlines_for_a_bounded_time() -> None:
    part = Part()
    part.deadlines.begin(N1, A, lambda: None)
    part.pass_time(SUSPENDED_S_MAX - 1, is_overloaded=True)
    assert part.deadlines.now == 0.0
    part.pass_time(GRACE_S + 1, is_overloaded=True)
    assert part.silent() == [N1]


def test_without_a_quorum_the_allowance_of_overload_is_not_used() -> None:
    part = Part()
    part.pass_time(2 * SUSPENDED_S_MAX, has_quorum=False, is_overloaded=True)
    part.pass_time(SUSPENDED_S_MAX - 1, is_overloaded=True)
    assert part.deadlines.now == 0.0


def test_a_node_whose_process_crashed_has_the_grace_of_a_planned_stop() -> None:
    part = Part()
    session = part.deadlines.begin(N1, A, lambda: None)
    part.pass_time(GRACE_S - 1)
    part.deadlines.extend_after_crash(session)
    part.pass_time(max(AWAY_GRACE_S, GRACE_S) - 1)
    assert part.silent() == []
    part.pass_time(1)
    assert part.silent() == [N1]


def test_a_node_that_registers_elsewhere_is_alive() -> None:
    part = Part()
    session = part.deadlines.begin(N1, A, lambda: None)
    part.pass_time(GRACE_S - 1)
    part.deadlines.extend(N1)
    part.pass_time(GRACE_S - 1)
    assert part.silent() == []
    assert session.last_seen == 0.0


def test_a_node_is_expected_longer_while_this_manager_recovers() -> None:
    for recovers, grace_s in ((False, GRACE_S), (True, grace_after_absence(DEFAULT_PERIOD_S))):
        part = Part()
        part.pass_time(RECOVERY_GRACE_S)
        if recovers:
            part.deadlines.start_recovery()
        part.deadlines.expect_adopted(N1, A, is_skep=True)
        part.pass_time(grace_s - 1)
        assert part.silent() == []
        part.pass_time(1)
        assert part.silent() == [N1]


def test_nodes_of_an_earlier_run_may_have_been_lost_before_this_one() -> None:
    part = Part()
    part.deadlines.expect_after_restart(N1, A)
    grace_s = grace_after_absence(DEFAULT_PERIOD_S)
    part.pass_time(grace_s)
    (silent,) = part.deadlines.silent(with_others=False)
    assert silent.silent_s == grace_s + 2 * GRACE_S
