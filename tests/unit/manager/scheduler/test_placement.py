"""Which node a task gets, or why none."""

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.manager.orchestrator.replacement.enforcement import overcommitted
from skep.manager.orchestrator.unplaceable import is_large_enough
from skep.manager.scheduler.nodes.accounting import Accounting
from skep.manager.scheduler.nodes.requirements import requirements_of
from skep.manager.scheduler.nodes.spread import MAX_FAILURES, CachedSpreads
from skep.manager.scheduler.placement import Placed, PlacementRefused, confirm, place
from skep.model.container import ContainerSpec, Mount
from skep.model.needs import needs_of
from skep.model.node import Availability, EngineDescription, EnginePlugin, Node, NodeRole, NodeState
from skep.model.node_reports.node_refusals import placement_text
from skep.model.options.labels import check_node_labels
from skep.model.service import (
    DiscreteResource,
    GenericResource,
    NamedResource,
    Platform,
    PortConfig,
    PublishMode,
    Resources,
    Service,
)
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from tests.support.builders import a_docker_node, a_node, a_service, a_task

PENDING = TaskState.PENDING
ALL = 10_000


def accounting_of(nodes: Iterable[Node], tasks: Iterable[Task] = ()) -> Accounting:
    accounting = Accounting()
    for node in nodes:
        accounting.set_node(node)
    for task in tasks:
        accounting.add(task, ())
    return accounting


def placed(service: Service, accounting: Accounting, *, count: int | None = None, limit: int = ALL) -> Placed:
    tasks = [
        a_task(slot=slot + 1, service=service, state=PENDING)
        for slot in range(service.spec.replicas if count is None else count)
    ]
    return place(
        tasks, requirements_of(tasks[0], service.spec), CachedSpreads(accounting), now=0.0, limit=limit
    )


def nodes_of(result: Placed) -> Counter[str]:
    return Counter(assignment.node_id for assignment in result.assignments)


def reason(result: Placed) -> str:
    (only,) = {refusal.reason for refusal in result.refusals}
    return only


def test_tasks_spread_evenly() -> None:
    result = placed(a_service(replicas=7), accounting_of([a_node("n1"), a_node("n2"), a_node("n3")]))
    assert sorted(nodes_of(result).values()) == [2, 2, 3]


def test_nodes_with_fewer_tasks_of_the_service_come_before_nodes_with_fewer_tasks() -> None:
    busy = [a_task(node="n2", service="other") for _ in range(5)]
    accounting = accounting_of([a_node("n1"), a_node("n2")], [a_task(node="n1"), *busy])
    assert nodes_of(placed(a_service(replicas=1), accounting)) == {"n2": 1}


def test_among_equals_the_node_with_fewer_tasks_is_taken() -> None:
    accounting = accounting_of([a_node("n1"), a_node("n2")], [a_task(node="n1", service="other")])
    assert nodes_of(placed(a_service(replicas=1), accounting)) == {"n2": 1}


def test_a_node_where_the_service_failed_repeatedly_is_taken_last() -> None:
    accounting = accounting_of([a_node("n1"), a_node("n2")])
    for _ in range(MAX_FAILURES):
        accounting.record_failure(a_task(node="n1"), 0.0)
    assert nodes_of(placed(a_service(replicas=4), accounting)) == {"n2": 4}


def test_failures_are_forgotten_after_five_minutes() -> None:
    accounting = accounting_of([a_node("n1"), a_node("n2")])
    for _ in range(MAX_FAILURES):
        accounting.record_failure(a_task(node="n1"), -301.0)
    assert nodes_of(placed(a_service(replicas=2), accounting)) == {"n1": 1, "n2": 1}


def test_preferences_spread_over_labels_before_nodes() -> None:
    nodes = [
        a_node("n1", labels={"zone": "north"}),
        a_node("n2", labels={"zone": "south"}),
        a_node("n3", labels={"zone": "south"}),
    ]
    result = placed(a_service(replicas=8, spread=("node.labels.zone",)), accounting_of(nodes))
    assert nodes_of(result) == {"n1": 4, "n2": 2, "n3": 2}


def test_a_full_branch_leaves_its_share_to_the_others() -> None:
    nodes = [
        a_node("n1", labels={"zone": "north"}, has=Resources(memory_bytes=100)),
        a_node("n2", labels={"zone": "south"}, has=Resources(memory_bytes=1000)),
    ]
    service = a_service(replicas=6, spread=("node.labels.zone",), reserve=Resources(memory_bytes=100))
    assert nodes_of(placed(service, accounting_of(nodes))) == {"n1": 1, "n2": 5}


def test_several_levels_of_preferences() -> None:
    nodes = [
        a_node(f"{zone}{rack}{n}", labels={"zone": zone, "rack": f"{zone}{rack}"})
        for zone, racks in (("a", 1), ("b", 3))
        for rack in range(racks)
        for n in range(2)
    ]
    service = a_service(replicas=12, spread=("node.labels.zone", "node.labels.rack"))
    result = nodes_of(placed(service, accounting_of(nodes)))
    assert sum(count for id, count in result.items() if id.startswith("a")) == 6
    assert {sum(count for id, count in result.items() if id[:2] == f"b{rack}") for rack in range(3)} == {2}


def test_without_nodes_there_is_no_suitable_node() -> None:
    assert reason(placed(a_service(), accounting_of([]))) == "no suitable node"


@pytest.mark.parametrize(
    ("node", "service", "words"),
    [
        (a_node(state=NodeState.DOWN), a_service(), "1 node not available for new tasks"),
        (a_node(availability=Availability.PAUSE), a_service(), "1 node not available for new tasks"),
        (a_node(availability=Availability.DRAIN), a_service(), "1 node not available for new tasks"),
        (
            a_node(has=Resources(memory_bytes=10)),
            a_service(reserve=Resources(memory_bytes=11)),
            "insufficient resources on 1 node",
        ),
        (
            a_node(has=Resources(nano_cpus=10)),
            a_service(reserve=Resources(nano_cpus=11)),
            "insufficient resources on 1 node",
        ),
        (
            a_node(),
            a_service(constraints=("node.role == manager",)),
            "scheduling constraints not satisfied on 1 node",
        ),
    ],
)
def test_the_reason_is_dockers(node: Node, service: Service, words: str) -> None:
    assert reason(placed(service, accounting_of([node]))) == f"no suitable node ({words})"


def test_reasons_are_counted_most_nodes_first() -> None:
    nodes = [a_node("n1", state=NodeState.DOWN), a_node("n2"), a_node("n3")]
    result = placed(a_service(constraints=("node.labels.disk==ssd",)), accounting_of(nodes))
    assert reason(result) == (
        "no suitable node (scheduling constraints not satisfied on 2 nodes; 1 node not available for new tasks)"
    )


def test_max_replicas_per_node_limits_each_node() -> None:
    result = placed(a_service(replicas=5, max_replicas=2), accounting_of([a_node("n1"), a_node("n2")]))
    assert nodes_of(result) == {"n1": 2, "n2": 2}
    assert reason(result) == "no suitable node (max replicas per node limit exceed)"


def test_a_task_that_is_to_leave_counts_for_the_limit_for_as_long_as_it_is_there() -> None:
    service = a_service(replicas=2, max_replicas=1)
    accounting = accounting_of([a_node("n1"), a_node("n2")])
    accounting.add(a_task("old1", slot=1, node="n1", service=service), ())
    new = [a_task(slot=slot, service=service, state=PENDING) for slot in (1, 2)]
    requirements = requirements_of(new[0], service.spec)
    result = place(
        new, requirements, CachedSpreads(accounting), now=0.0, limit=ALL, leaving=Counter({NodeId("n1"): 1})
    )
    assert nodes_of(result) == {"n2": 1}
    assert reason(result) == "no suitable node (max replicas per node limit exceed)"


def test_a_host_port_is_taken_once_per_node() -> None:
    port = PortConfig(target_port=80, published_port=8080, publish_mode=PublishMode.HOST)
    result = placed(a_service(replicas=3, ports=(port,)), accounting_of([a_node("n1"), a_node("n2")]))
    assert nodes_of(result) == {"n1": 1, "n2": 1}
    assert reason(result) == "no suitable node (host-mode port already in use on 2 nodes)"


def test_a_host_port_that_something_else_on_a_node_uses_is_avoided() -> None:
    used = a_node("n1")
    engine = replace(used.description.engine, labels={"skep.ports": "tcp=22,8080 udp=53"})
    used = replace(used, description=replace(used.description, engine=engine))
    port = PortConfig(target_port=80, published_port=8080, publish_mode=PublishMode.HOST)
    result = placed(a_service(replicas=2, ports=(port,)), accounting_of([used, a_node("n2")]))
    assert nodes_of(result) == {"n2": 1}
    assert reason(result) == "no suitable node (host-mode port already in use on 2 nodes)"
    udp = replace(port, protocol="udp")
    assert nodes_of(placed(a_service(replicas=1, ports=(udp,)), accounting_of([used]))) == {"n1": 1}


def test_a_host_port_is_free_again_when_the_other_program_has_ended() -> None:
    node = a_node("n1")
    engine = replace(node.description.engine, labels={"skep.ports": "tcp=8080"})
    accounting = accounting_of([replace(node, description=replace(node.description, engine=engine))])
    port = PortConfig(target_port=80, published_port=8080, publish_mode=PublishMode.HOST)
    assert nodes_of(placed(a_service(replicas=1, ports=(port,)), accounting)) == {}
    accounting.set_node(node)
    assert nodes_of(placed(a_service(replicas=1, ports=(port,)), accounting)) == {"n1": 1}


def test_a_retired_task_holds_its_memory_until_it_has_stopped() -> None:
    service = a_service(reserve=Resources(memory_bytes=60))
    stopping = a_task(node="n1", service=service, desired=TaskState.SHUTDOWN)
    accounting = accounting_of([a_node("n1", has=Resources(memory_bytes=100))], [stopping])
    assert reason(placed(service, accounting)) == "no suitable node (insufficient resources on 1 node)"
    accounting.remove(stopping.id)
    assert nodes_of(placed(service, accounting)) == {"n1": 1}


def gpus(count: int) -> tuple[GenericResource, ...]:
    return (GenericResource(discrete_resource_spec=DiscreteResource(kind="gpu", value=count)),)


def test_counted_generic_resources_run_out() -> None:
    node = a_node("n1", has=Resources(generic_resources=gpus(3)))
    result = placed(
        a_service(replicas=2, reserve=Resources(generic_resources=gpus(2))), accounting_of([node])
    )
    assert nodes_of(result) == {"n1": 1}
    assert result.assignments[0].generic_resources == gpus(2)


def test_named_generic_resources_go_to_one_task_each() -> None:
    names = tuple(
        GenericResource(named_resource_spec=NamedResource(kind="gpu", value=name)) for name in ("a", "b")
    )
    accounting = accounting_of([a_node("n1", has=Resources(generic_resources=names))])
    result = placed(a_service(replicas=3, reserve=Resources(generic_resources=gpus(1))), accounting)
    assert [assignment.generic_resources for assignment in result.assignments] == [(names[0],), (names[1],)]


def test_platforms_accept_either_spelling_of_an_architecture() -> None:
    node = a_node("n1")
    node = replace(
        node, description=replace(node.description, platform=Platform(architecture="x86_64", os="linux"))
    )
    web = a_service()
    requirements = requirements_of(a_task(service=web, state=PENDING), web.spec)
    amd, arm = Platform(architecture="amd64", os="linux"), Platform(architecture="arm64", os="linux")
    task = [a_task(service=web, state=PENDING)]
    fits = place(
        task,
        replace(requirements, platforms=(arm, amd)),
        CachedSpreads(accounting_of([node])),
        now=0.0,
        limit=ALL,
    )
    assert nodes_of(fits) == {"n1": 1}
    refused = place(
        task,
        replace(requirements, platforms=(arm,)),
        CachedSpreads(accounting_of([node])),
        now=0.0,
        limit=ALL,
    )
    assert reason(refused) == "no suitable node (unsupported platform on 1 node)"


def test_plugins_are_looked_for_with_and_without_latest() -> None:
    node = a_node("n1")
    engine = EngineDescription(plugins=(EnginePlugin(type="Volume", name="nfs:latest"),))
    node = replace(node, description=replace(node.description, engine=engine))
    web = a_service()
    task = [a_task(service=web, state=PENDING)]
    requirements = requirements_of(task[0], web.spec)
    volume = replace(requirements, plugins=(("Volume", "nfs"), ("Log", "json-file")))
    assert nodes_of(place(task, volume, CachedSpreads(accounting_of([node])), now=0.0, limit=ALL)) == {
        "n1": 1
    }
    logs = (*engine.plugins, EnginePlugin(type="Log", name="json-file"))
    announcing = replace(node, description=replace(node.description, engine=replace(engine, plugins=logs)))
    assert nodes_of(place(task, volume, CachedSpreads(accounting_of([announcing])), now=0.0, limit=ALL)) == {
        "n1": 1
    }
    driver = replace(requirements, plugins=(("Log", "journald"),))
    refused = place(task, driver, CachedSpreads(accounting_of([announcing])), now=0.0, limit=ALL)
    assert reason(refused) == "no suitable node (missing plugin on 1 node)"
    network = replace(requirements, plugins=(("Network", "weave"),))
    refused = place(task, network, CachedSpreads(accounting_of([node])), now=0.0, limit=ALL)
    assert reason(refused) == "no suitable node (missing plugin on 1 node)"


def test_a_global_task_is_assigned_to_its_node_or_gets_the_reason() -> None:
    service = a_service(is_global=True, reserve=Resources(memory_bytes=60))
    accounting = accounting_of([a_node("n1", has=Resources(memory_bytes=100))])
    tasks = [a_task(slot=0, node="n1", service=service, state=PENDING) for _ in range(2)]
    requirements = requirements_of(tasks[0], service.spec)
    assert not isinstance(confirm(tasks[0], requirements, accounting), PlacementRefused)
    assert confirm(tasks[1], requirements, accounting) == PlacementRefused(
        tasks[1], "insufficient resources on 1 node"
    )


def test_a_batch_is_bounded_and_says_what_is_left() -> None:
    result = placed(a_service(replicas=10), accounting_of([a_node("n1")]), limit=4)
    assert len(result.assignments) == 4
    assert len(result.remaining) == 6


def test_figures_do_not_depend_on_what_arrived_first() -> None:
    service = a_service(reserve=Resources(memory_bytes=30))
    task = a_task(node="n1", service=service)
    early, late = Accounting(), Accounting()
    early.add(task, ())
    early.set_node(a_node("n1"))
    late.set_node(a_node("n1"))
    late.add(task, ())
    accounts = [books.accounts[NodeId("n1")] for books in (early, late)]
    assert accounts[0].free_memory_bytes == accounts[1].free_memory_bytes
    assert accounts[0].active == accounts[1].active == 1


clusters = st.lists(
    st.builds(
        lambda state, availability, memory, role: {
            "state": state,
            "availability": availability,
            "has": Resources(memory_bytes=memory),
            "role": role,
        },
        st.sampled_from([NodeState.READY, NodeState.READY, NodeState.DOWN]),
        st.sampled_from([Availability.ACTIVE, Availability.ACTIVE, Availability.DRAIN]),
        st.integers(0, 500),
        st.sampled_from(list(NodeRole)),
    ),
    max_size=6,
)


@given(clusters, st.integers(0, 20), st.integers(0, 100), st.integers(0, 3), st.booleans())
@settings(max_examples=200)
def test_no_node_is_over_committed_and_no_task_waits_needlessly(
    shapes: list[dict[str, object]], replicas: int, memory: int, max_replicas: int, is_preferring: bool
) -> None:
    nodes = [a_node(f"n{number}", **shape) for number, shape in enumerate(shapes)]  # type: ignore[arg-type]
    service = a_service(
        replicas=replicas,
        reserve=Resources(memory_bytes=memory),
        max_replicas=max_replicas,
        spread=("node.labels.zone",) if is_preferring else (),
    )
    if not replicas:
        return
    result = placed(service, accounting_of(nodes))
    usable = {
        n.id: n
        for n in nodes
        if n.status.state is NodeState.READY and n.spec.availability is Availability.ACTIVE
    }
    counts = nodes_of(result)
    assert set(counts) <= set(usable)
    rooms = []
    for id, node in usable.items():
        has = node.description.resources.memory_bytes
        assert counts[id] * memory <= has
        room = has // memory if memory else replicas
        rooms.append(min(room, max_replicas) if max_replicas else room)
        assert counts[id] <= rooms[-1]
    assert len(result.assignments) == min(replicas, sum(rooms))
    assert len(result.assignments) + len(result.refusals) == replicas


def test_a_cluster_volume_waits_for_one_that_does_not_exist_and_says_so() -> None:
    mounts = (
        Mount(type="cluster", source="group:fast", target="/data"),
        Mount(type="volume", target="/cache"),
    )
    for nodes, where in (([a_node("n1")], "1 node"), ([a_node("n1"), a_docker_node("d1")], "2 nodes")):
        refused = placed(with_mounts(a_service(replicas=2), *mounts), accounting_of(nodes))
        words = f"no suitable node (cannot fulfill requested CSI volume mounts on {where})"
        assert (len(refused.refusals), reason(refused)) == (2, words)
    local = with_mounts(a_service(replicas=2), *mounts[1:])
    assert nodes_of(placed(local, accounting_of([a_node("n1")]))) == {"n1": 2}


def with_mounts(service: Service, *mounts: Mount) -> Service:
    template = service.spec.task_template
    container = replace(template.container_spec or ContainerSpec(), mounts=mounts)
    return replace(
        service, spec=replace(service.spec, task_template=replace(template, container_spec=container))
    )


def test_what_a_node_keeps_for_the_system_is_not_given_out() -> None:
    """Tasks that run already keep it.  The node is as full as its rest."""
    has = Resources(nano_cpus=4 * 10**9, memory_bytes=4 << 30)
    node = a_node("n1", has=has, labels={"skep.reserve.cpus": "1.5", "skep.reserve.memory": "1GiB"})
    accounting = accounting_of([node])
    service = a_service(replicas=4, reserve=Resources(nano_cpus=10**9))
    result = placed(service, accounting)
    assert len(result.assignments) == 2
    assert reason(result) == "no suitable node (insufficient resources on 1 node)"
    assert accounting.accounts[NodeId("n1")].free_nano_cpus == 5 * 10**8
    accounting.set_node(replace(node, spec=replace(node.spec, labels={})))
    assert len(placed(service, accounting).assignments) == 2
    small = a_service("db", reserve=Resources(memory_bytes=3 << 30))
    assert not is_large_enough(node, needs_of(a_service("x", reserve=Resources(memory_bytes=4 << 30)).spec))
    assert is_large_enough(node, needs_of(small.spec))
    assert not overcommitted(node, [a_task(node="n1", service=service) for _ in range(4)])


def test_a_reserve_that_cannot_be_read_is_refused() -> None:
    for label in ("skep.reserve.cpus", "skep.reserve.memory"):
        with pytest.raises(InvalidArgument, match=f"invalid label {label}=much"):
            check_node_labels({label: "much"})


def test_a_task_records_why_it_got_its_node() -> None:
    """With few nodes it has their names: the nodes that were refused, and the figures of the others."""
    down = replace(a_node("n4"), status=replace(a_node("n4").status, state=NodeState.DOWN))
    has = Resources(nano_cpus=4 * 10**9)
    nodes = [a_node("n1", labels={"disk": "hdd"}), *(a_node(name, has=has) for name in ("n2", "n3")), down]
    accounting = accounting_of(nodes, [a_task(node="n3", service="other")])
    service = a_service(constraints=("node.labels.disk != hdd",), reserve=Resources(nano_cpus=10**9))
    first, second = placed(service, accounting, count=2).assignments
    assert [first.record, second.record] == [
        "2/4,CONSTRAINTS=1:n1,NOT_READY=1:n4|0|0|25%|n3:1:0:25%",
        "2/4,CONSTRAINTS=1:n1,NOT_READY=1:n4|1|0|25%|n2:1:1:50%",
    ]
    assert placement_text(second.record) == (
        "2 of 4 nodes suitable; scheduling constraints not satisfied on 1 node (n1); "
        "1 node not available for new tasks (n4); "
        "the chosen node had 1 task, 0 of its service, and is then 25% reserved; "
        "n2 had 1 task, 1 of its service, and would be 50% reserved"
    )
    assert placement_text("2/4,CONSTRAINTS=2|5|1|25%") == (
        "2 of 4 nodes suitable; scheduling constraints not satisfied on 2 nodes; "
        "the chosen node had 5 tasks, 1 of its service, and is then 25% reserved"
    )
    assert placement_text("1/2,NEWER=1,FULL=1|2|1|") == (
        "1 of 2 nodes suitable; NEWER=1; at least 1 full; the chosen node had 2 tasks, 1 of its service"
    )
    assert placement_text("2/2,RULES|0|0|") == (
        "2 of 2 nodes suitable; affinities or the largest skew chose among them; the chosen node had 0 tasks, 0 of its "
        "service"
    )
    more = placed(a_service("db", id="db", constraints=("node.id == n3",)), accounting, count=2)
    assert [one.record.split("|")[1:3] for one in more.assignments] == [["2", "0"], ["3", "1"]]
    accounting.remove_node(NodeId("n1"))
    accounting.set_node(a_node("n4"))
    (third,) = placed(service, accounting, count=1).assignments
    assert third.record.startswith("3/3|0|0|")


def test_the_record_of_a_placement_in_a_large_cluster_has_no_names_and_no_name_breaks_it() -> None:
    many = [a_node(f"n{number}", labels={"disk": "hdd" if number else "ssd"}) for number in range(9)]
    wants = a_service(constraints=("node.labels.disk == ssd",))
    (found,) = placed(wants, accounting_of(many), count=1).assignments
    assert found.record == "1/9,CONSTRAINTS=8|0|0|"
    described = [
        replace(one, description=replace(one.description, hostname=f"a,b|{one.id}")) for one in many[:3]
    ]
    (found,) = placed(wants, accounting_of(described), count=1).assignments
    assert found.record == "1/3,CONSTRAINTS=2|0|0|"
    (found,) = placed(a_service(), accounting_of(described[1:]), count=1).assignments
    assert found.record == "2/2|0|0|"
