from msgspec.structs import replace

from skep.manager.nodes.heartbeats import configured_heartbeats, grace_period
from skep.model.options.labels import HEARTBEAT_GRACE
from skep.model.swarm import DispatcherConfig, Swarm, SwarmSpec
from skep.model.values.ids import ClusterId
from skep.model.values.times import SECOND_NS
from skep.store.state import State


def test_the_grace_is_three_periods_unless_configured() -> None:
    assert grace_period(1.0) == 3.0
    assert grace_period(1.0, configured_s=10.0) == 10.0
    assert grace_period(1.0, configured_s=0.1) == 2.0  # one lost heartbeat takes no node down


def test_the_default_heartbeat_period_is_five_seconds() -> None:
    assert configured_heartbeats(State()) == (5.0, None)
    assert configured_heartbeats(_cluster(SwarmSpec())) == (5.0, None)


def test_heartbeat_period_and_grace_are_cluster_labels() -> None:
    spec = SwarmSpec(dispatcher=DispatcherConfig(heartbeat_period=2 * SECOND_NS))
    assert configured_heartbeats(_cluster(spec)) == (2.0, None)
    assert configured_heartbeats(_cluster(replace(spec, labels={HEARTBEAT_GRACE: "9s"}))) == (2.0, 9.0)


def _cluster(spec: SwarmSpec) -> State:
    state = State()
    state.table_by_type[Swarm].store("c1", None, Swarm(id=ClusterId("c1"), spec=spec))
    return state
