"""Rules on what is allocated, and on restart policies: each is shown a history in which it is broken."""

import pytest
from msgspec.structs import replace

from sim.invariants.nodes.allocations import (
    UniqueAllocations,
    allocation_violations,
    networks_are_apart,
)
from sim.invariants.services.restarts import RestartPolicies
from skep.manager.verify.allocations import VXLAN
from skep.model.network import IPAMConfig, IPAMOptions, Network, NetworkSpec
from skep.model.service import (
    Endpoint,
    EndpointVirtualIP,
    PortConfig,
    PublishMode,
    RestartCondition,
    RestartPolicy,
)
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.model.values.ids import NetworkId
from skep.model.values.meta import Driver
from skep.model.values.times import SECOND_NS
from skep.store.transactions.transaction import LocalTransaction
from tests.sim.histories import W1, History, a_node, a_service, a_task
from tests.support.builders import a_service_spec

NET = NetworkId("x1")


def a_network(id: str, *, vxlan: int = 4097, subnet: str = "10.0.0.0/24") -> Network:
    return Network(
        id=NetworkId(id),
        spec=NetworkSpec(name=id),
        driver_state=Driver(name="overlay", options={VXLAN: str(vxlan)}),
        ipam_options=IPAMOptions(driver=Driver(name="default"), configs=(IPAMConfig(subnet=subnet),)),
    )


def at(task: Task, address: str, network: str = "x1") -> Task:
    place = NetworkAttachment(network=a_network(network), addresses=(address,))
    return replace(task, networks_attachments=(place,))


def test_an_address_has_one_holder() -> None:
    history = History(UniqueAllocations())
    history.put(at(a_task("t1"), "10.0.0.2/24"), at(a_task("t2", slot=2), "10.0.0.3/24"))
    history.put(at(a_task("t3", slot=3), "10.0.0.3/24", "x2"))
    assert history.violations == []
    history.put(at(a_task("t4", slot=4), "10.0.0.2/24"))
    assert "10.0.0.2 is held by ['Task t1', 'Task t4']" in history.violations[0]


def test_an_address_is_free_when_its_task_has_ended() -> None:
    history = History(UniqueAllocations())
    history.put(at(a_task("t1", node=W1), "10.0.0.2/24"))
    history.put(at(a_task("t1", node=W1, state=TaskState.FAILED), "10.0.0.2/24"))
    history.put(at(a_task("t2"), "10.0.0.2/24"))
    assert history.violations == []


def test_a_virtual_address_a_nodes_own_and_a_port_have_one_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(UniqueAllocations())
    virtual = (EndpointVirtualIP(network_id=NET, addr="10.0.0.2/24"),)
    port = PortConfig(target_port=80, published_port=30000, publish_mode=PublishMode.INGRESS)
    history.put(replace(a_service(), endpoint=Endpoint(virtual_ips=virtual, ports=(port,))))
    assert history.violations == []
    place = NetworkAttachment(network=a_network("x1"), addresses=("10.0.0.2/24",))
    history.put(replace(a_node(W1), attachments=(place,)))
    assert "Node w1" in history.violations[0]
    monkeypatch.setattr(LocalTransaction, "_claim", lambda *_: None)
    history.put(replace(a_service(id="api", name="api"), endpoint=Endpoint(ports=(port,))))
    assert "port tcp 30000 is held by" in history.violations[1]


def test_networks_share_neither_vxlan_ids_nor_subnets() -> None:
    history = History(networks_are_apart)
    history.put(a_network("x1"), a_network("x2", vxlan=4098, subnet="10.0.1.0/24"))
    assert history.violations == []
    history.state.claims.clear()  # the store would refuse what the rule is to see
    history.put(a_network("x3", vxlan=4098, subnet="10.0.2.0/24"))
    assert "x2 and x3 both have the VXLAN id" in history.violations[0]
    history.state.claims.clear()
    history.put(a_network("x3", vxlan=4099, subnet="10.0.1.128/25"))
    assert "x2 and x3 overlap" in history.violations[1]


def test_a_network_that_was_removed_counts_while_a_task_is_on_it() -> None:
    history = History(networks_are_apart)
    history.put(at(a_task("t1"), "10.0.0.2/24"))
    history.state.claims.clear()
    history.put(a_network("x2"))
    assert "x1 and x2 both have the VXLAN id" in history.violations[0]


def test_at_rest_everything_has_what_it_asked_for() -> None:
    history = History()
    history.put(Network(id=NET, spec=NetworkSpec(name="x1")))
    assert list(allocation_violations(history.state)) == ["network x1 has not been allocated"]


def simulated(
    policy: RestartPolicy, state: TaskState, times: int, *, apart_s: float = 1.0
) -> tuple[list[str], bool]:
    """A slot whose task ends ``times`` times (or once, for good): what was wrong, and whether it is given up."""
    history = History(rule := RestartPolicies())
    spec = a_service_spec(restart=policy)
    service = replace(a_service(), spec=spec)
    history.put(service)
    stored = history.state.find(type(service))[0]
    for number in range(times + 1):
        task = replace(
            a_task(f"t{number}", node=W1), spec=spec.task_template, spec_version=stored.spec_version
        )
        history.put(task)
        if number < times or times == 0:
            history.after(apart_s).put(replace(task, status=replace(task.status, state=state)))
    return history.violations, rule.is_given_up(stored, 1)


def after(policy: RestartPolicy, state: TaskState, times: int, *, apart_s: float = 1.0) -> list[str]:
    return simulated(policy, state, times, apart_s=apart_s)[0]


def test_what_is_never_restarted_has_no_successor() -> None:
    none, failure = (
        RestartPolicy(condition=RestartCondition.NONE),
        RestartPolicy(condition=RestartCondition.ON_FAILURE),
    )
    assert "to be restarted none" in after(none, TaskState.FAILED, 1)[0]
    assert "to be restarted on-failure" in after(failure, TaskState.COMPLETE, 1)[0]
    assert after(failure, TaskState.FAILED, 1) == []


def test_no_slot_is_restarted_more_often_than_it_may_be() -> None:
    twice = RestartPolicy(max_attempts=2)
    assert after(twice, TaskState.FAILED, 2) == []
    assert "is restart 3 of its slot, of 2" in after(twice, TaskState.FAILED, 3)[0]
    within = RestartPolicy(max_attempts=2, window=20 * SECOND_NS)
    assert "is restart 3 of its slot, of 2" in after(within, TaskState.FAILED, 3)[0]
    assert after(within, TaskState.FAILED, 5, apart_s=30.0) == []


def test_a_task_that_follows_a_moved_one_is_not_a_restart() -> None:
    assert after(RestartPolicy(max_attempts=1), TaskState.SHUTDOWN, 5) == []
    assert not simulated(RestartPolicy(max_attempts=1), TaskState.SHUTDOWN, 5)[1]


@pytest.mark.parametrize(("node_was_down", "is_wrong"), [(True, False), (False, True)])
def test_a_task_that_takes_over_from_another_version_is_no_restart_also_when_its_node_was_down_between(
    node_was_down: bool, is_wrong: bool
) -> None:
    history = History(RestartPolicies())
    service = replace(a_service(), spec=a_service_spec(restart=RestartPolicy(max_attempts=1)))
    history.put(service)
    old = history.state.find(type(service))[0]
    running = replace(a_task("old", node=W1, state=TaskState.RUNNING), spec_version=old.spec_version)
    history.put(replace(old, spec=replace(old.spec, labels={"a": "b"})))
    version = history.state.find(type(service))[0].spec_version
    spec = service.spec.task_template
    history.put(running)
    attempts = [replace(a_task(f"t{number}", node=W1), spec=spec, spec_version=version) for number in (1, 2)]
    for task in attempts:
        history.put(task)
        history.after(1).put(replace(task, status=replace(task.status, state=TaskState.REJECTED)))
    if node_was_down:
        history.put(replace(running, desired_state=TaskState.SHUTDOWN))
    history.after(1).put(replace(a_task("t3", node=W1), spec=spec, spec_version=version))
    assert history.violations == (["task t3 is restart 2 of its slot, of 1"] if is_wrong else [])


def test_a_task_that_ran_on_after_a_younger_one_was_retired_ends_its_slot() -> None:
    history = History(rule := RestartPolicies())
    spec = a_service_spec(restart=RestartPolicy(condition=RestartCondition.ON_FAILURE))
    history.put(replace(a_service(), spec=spec))
    service = history.state.find(type(a_service()))[0]
    old, surplus, again = (
        replace(a_task(id, node=W1), spec=spec.task_template, spec_version=service.spec_version)
        for id in ("old", "surplus", "again")
    )
    history.put(old)
    history.after(1).put(surplus)
    history.after(1).put(replace(surplus, desired_state=TaskState.SHUTDOWN))
    done = replace(old, status=replace(old.status, state=TaskState.COMPLETE))
    history.after(1).put(done)
    history.after(1).put(replace(done, desired_state=TaskState.SHUTDOWN))
    stopped = replace(surplus.status, state=TaskState.SHUTDOWN)
    history.after(1).put(replace(surplus, desired_state=TaskState.SHUTDOWN, status=stopped))
    assert rule.is_given_up(service, 1)
    history.after(1).put(again)
    (found,) = history.violations
    assert "task again follows old, which ended as complete" in found


def test_a_slot_is_given_up_when_its_policy_has_had_all_that_it_asks_for() -> None:
    assert simulated(RestartPolicy(condition=RestartCondition.NONE), TaskState.FAILED, 0)[1]
    assert not simulated(RestartPolicy(max_attempts=1), TaskState.FAILED, 0)[1]
    assert not simulated(RestartPolicy(), TaskState.FAILED, 0)[1]
