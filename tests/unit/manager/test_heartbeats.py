from msgspec.structs import replace

from skep.manager.heartbeats import configured_heartbeats, grace_period
from skep.model.ids import ClusterId
from skep.model.labels import HEARTBEAT_GRACE
from skep.model.swarm import DispatcherConfig, Swarm, SwarmSpec
from skep.model.times import SECOND_NS
from skep.store.state import State


def test_three_periods_of_grace_unless_the_cluster_wishes_another() -> None:
    assert grace_period(1.0) == 3.0
    assert grace_period(1.0, configured_s=10.0) == 10.0
    assert grace_period(1.0, configured_s=0.1) == 2.0  # one lost heartbeat takes no node down


def test_a_cluster_that_says_nothing_is_heard_every_five_seconds() -> None:
    assert configured_heartbeats(State()) == (5.0, None)
    assert configured_heartbeats(_cluster(SwarmSpec())) == (5.0, None)


def test_a_cluster_says_how_often_it_is_to_be_heard_and_what_grace_it_gives() -> None:
    spec = SwarmSpec(dispatcher=DispatcherConfig(heartbeat_period=2 * SECOND_NS))
    assert configured_heartbeats(_cluster(spec)) == (2.0, None)
    assert configured_heartbeats(_cluster(replace(spec, labels={HEARTBEAT_GRACE: "9s"}))) == (2.0, 9.0)


def _cluster(spec: SwarmSpec) -> State:
    state = State()
    state.table_by_type[Swarm].store("c1", None, Swarm(id=ClusterId("c1"), spec=spec))
    return state
