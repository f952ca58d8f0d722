"""When the heartbeat of a node expires."""

from random import Random

from skep.manager.dispatcher.node_sessions.heartbeat_deadlines import PERIOD_JITTER, HeartbeatDeadlines
from skep.manager.dispatcher.node_sessions.sessions import Sessions
from skep.manager.nodes.heartbeats import (
    AWAY_GRACE_S,
    DEFAULT_PERIOD_S,
    GRACE_PERIODS,
    RECOVERY_GRACE_S,
    SUSPENDED_S_MAX,
    grace_after_absence,
)
from skep.model.values.ids import NodeId, SessionId

N1, A = NodeId("n1"), SessionId("a")
GRACE_S = GRACE_PERIODS * DEFAULT_PERIOD_S


class Part:
    """Deadlines whose own time passes in ticks of half a second."""

    def __init__(self) -> None:
        self.sessions = Sessions()
        self.deadlines = HeartbeatDeadlines(self.sessions, Random(1), now=100.0)
        self._now = 100.0

    def pass_time(self, seconds: float, *, has_quorum: bool = True, is_overloaded: bool = False) -> None:
        for _ in range(round(2 * seconds)):
            self._now += 0.5
            self.deadlines.advance(self._now, 0.5, has_quorum=has_quorum, is_overloaded=is_overloaded)

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
