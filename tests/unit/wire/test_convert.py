"""Whatever has a word on both sides survives the way there and back.

Values are made from the Structs themselves, so a field that is added to the model and forgotten in a conversion
fails here.  What SwarmKit cannot say is named in ``WITHOUT_WORDS``.
"""

import types
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, NewType, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.model.assignment import AssignmentSet, ConfigFile, SecretFile
from skep.model.container import (
    AppArmorOpts,
    BindOptions,
    ConfigReference,
    ContainerSpec,
    CredentialSpec,
    FileTarget,
    Mount,
    RuntimeTarget,
    SeccompOpts,
)
from skep.model.logs import LogLine, LogQuery
from skep.model.network import ConfigReference as NodeNetwork
from skep.model.network import Network, NetworkSpec
from skep.model.networks.addresses import PORT_MAX
from skep.model.node import (
    ManagerStatus,
    Node,
    NodeCertificate,
    NodeDescription,
    NodeSpec,
    NodeState,
    NodeStatus,
    Reachability,
)
from skep.model.service import (
    DiscreteResource,
    EndpointVirtualIP,
    GenericResource,
    Limits,
    NamedResource,
    NetworkAttachmentConfig,
    NetworkAttachmentSpec,
    PluginSpec,
    PortConfig,
    ResourceRequirements,
    Resources,
    RestartCondition,
    RestartPolicy,
    TaskSpec,
)
from skep.model.task import AssignedTask, NetworkAttachment, Task, TaskState, TaskStatus, Trust
from skep.model.task_end import LAST_LINES_MAX, KeptLine, TaskEnd
from skep.model.values.ids import NetworkId, NodeId, TaskId
from skep.model.values.meta import Driver
from skep.model.values.times import ZERO_TIME, Timestamp, timestamp
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.convert.assignments import assignments_from_pb, changes_to_pb, revised_from_pb
from skep.wire.convert.container import container_from_pb, container_to_pb
from skep.wire.convert.logs import line_from_pb, line_to_pb, query_from_pb, query_to_pb
from skep.wire.convert.network import attachment_from_pb, network_from_pb, network_to_pb
from skep.wire.convert.node import (
    CERTIFICATE_STATES,
    NODE_STATES,
    REACHABILITIES,
    availability_from_pb,
    description_from_pb,
    description_to_pb,
    node_to_pb,
    role_from_pb,
)
from skep.wire.convert.task import (
    end_from_pb,
    end_to_pb,
    registry_auth_of,
    status_from_pb,
    status_to_pb,
    task_from_pb,
    task_to_pb,
)
from skep.wire.convert.task_spec import task_spec_from_pb, task_spec_to_pb
from skep.wire.convert.values import (
    duration_from_pb,
    duration_to_pb,
    stamp_of,
    timestamp_from_pb,
    timestamp_to_pb,
    version_from_pb,
)
from tests.support.builders import an_overlay

WITHOUT_WORDS: dict[type, dict[str, Any]] = {
    Mount: {"image_options": None, "cluster_options": None},
    NetworkSpec: {"scope": ""},
    Node: {
        "load": None,
        "session": None,
        "peer_roots": "",
        "silent_since": None,
        "silent_together": False,
        "failing_paths": (),
        "cut_off": (),
    },
    ManagerStatus: {"has_vote": True, "level": 0, "peer_addr": ""},
    Task: {"restart": None, "preemption": None, "relocation": None, "placement_record": ""},
    TaskStatus: {"end": None},
    NodeCertificate: {
        "not_after": Timestamp(""),
        "last_not_after": Timestamp(""),
        "plane": "",
        "issuer": "",
        "serials": (),
    },
}
"""Fields that do not travel, with the value they come back with."""

STORED_STATES = [state for state in TaskState if state is not TaskState.UNKNOWN]

STAMPS = st.one_of(
    st.just(ZERO_TIME),
    st.integers(-62_135_596_799 * 10**9, 253_402_300_799 * 10**9).map(timestamp),
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = st.integers(0, 2**31 - 1)
PORTS = st.integers(0, PORT_MAX)
DURATIONS = st.integers(-(2**62), 2**62)


def structs(kind: type, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Any value of a Struct; ``fields`` override what the types say."""
    hints = get_type_hints(kind, include_extras=True)
    known = {name: st.just(value) for name, value in WITHOUT_WORDS.get(kind, {}).items()}
    known |= SPECIAL.get(kind, {})
    known |= fields
    names = [field.name for field in msgspec.structs.fields(kind)]
    return st.builds(kind, **{name: known[name] if name in known else values(hints[name]) for name in names})


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a type as the model uses them."""
    if hint is Timestamp:
        return STAMPS
    if isinstance(hint, NewType):
        return values(hint.__supertype__)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return values(arguments[0])
    if origin in {Union, types.UnionType}:
        return st.one_of(*(values(argument) for argument in arguments))
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=2).map(tuple)
    if origin is Mapping:
        return st.dictionaries(TEXTS, values(arguments[1]), max_size=2)
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return WHOLE[hint] if hint in WHOLE else structs(hint)
    if hint is TaskState:
        return st.sampled_from(STORED_STATES)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from(hint)
    return {
        str: TEXTS,
        int: NUMBERS,
        bool: st.booleans(),
        bytes: st.binary(max_size=8),
        type(None): st.none(),
    }[hint]


SPECIAL: dict[type, dict[str, st.SearchStrategy[Any]]] = {
    BindOptions: {
        "propagation": st.sampled_from(["rprivate", "private", "rshared", "shared", "rslave", "slave"])
    },
    SeccompOpts: {"mode": st.sampled_from(["default", "unconfined", "custom"])},
    AppArmorOpts: {"mode": st.sampled_from(["default", "disabled"])},
    PortConfig: {
        "protocol": st.sampled_from(["tcp", "udp", "sctp"]),
        "target_port": PORTS,
        "published_port": PORTS,
    },
    NodeNetwork: {"network": TEXTS.filter(bool)},
    RestartPolicy: {"condition": st.sampled_from(RestartCondition), "max_attempts": NUMBERS},
    KeptLine: {
        "stream": st.sampled_from(["stdout", "stderr"]),
        "timestamp": st.integers(0, 2**63 - 1).map(timestamp),
    },
    NodeCertificate: {"state": st.sampled_from(["", "issued", "rotate"])},
    ContainerSpec: {
        "isolation": st.sampled_from(["", "process", "hyperv"]),
        "stop_grace_period": st.none() | DURATIONS,
    },
}
SPECIAL[Mount] = {
    "type": st.sampled_from(["bind", "volume", "tmpfs", "npipe", "cluster"]),
    "consistency": st.sampled_from(["", "consistent", "cached", "delegated"]),
}

WHOLE: dict[type, st.SearchStrategy[Any]] = {
    GenericResource: st.one_of(
        st.builds(GenericResource, named_resource_spec=structs(NamedResource)),
        st.builds(GenericResource, discrete_resource_spec=structs(DiscreteResource)),
    ),
    CredentialSpec: st.one_of(
        st.builds(CredentialSpec, file=TEXTS),
        st.builds(CredentialSpec, registry=TEXTS),
        st.builds(CredentialSpec, config=TEXTS),
    ),
    ConfigReference: st.one_of(
        structs(ConfigReference, file=structs(FileTarget), runtime=st.none()),
        structs(ConfigReference, file=st.none(), runtime=st.just(RuntimeTarget())),
        structs(ConfigReference, file=st.none(), runtime=st.none()),
    ),
}
_NOTHING = {"container_spec": st.none(), "network_attachment_spec": st.none(), "plugin_spec": st.none()}
_WITHOUT_PIDS = st.builds(
    ResourceRequirements,
    limits=st.none() | structs(Limits, pids=st.just(0)),
    reservations=st.none() | structs(Resources),
)
WHOLE[TaskSpec] = st.one_of(
    structs(
        TaskSpec, **_NOTHING | {"container_spec": structs(ContainerSpec), "runtime": st.just("container")}
    ),
    structs(
        TaskSpec,
        **_NOTHING
        | {
            "network_attachment_spec": structs(NetworkAttachmentSpec),
            "runtime": st.just("attachment"),
            "resources": st.none() | _WITHOUT_PIDS,
        },
    ),
    structs(
        TaskSpec,
        **_NOTHING
        | {
            "plugin_spec": structs(PluginSpec),
            "runtime": st.just("plugin"),
            "resources": st.none() | _WITHOUT_PIDS,
        },
    ),
)
WHOLE[Node] = structs(Node, certificate=structs(NodeCertificate))

thorough = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def over_the_wire(message: Any) -> Any:
    """The message as the other side decodes it."""
    return type(message).FromString(message.SerializeToString())


@thorough
@given(structs(ContainerSpec))
def test_container_specs_survive(spec):
    assert container_from_pb(over_the_wire(container_to_pb(spec))) == spec


@thorough
@given(WHOLE[TaskSpec])
def test_task_specs_survive(spec):
    assert task_spec_from_pb(over_the_wire(task_spec_to_pb(spec))) == spec


@thorough
@given(structs(AssignedTask))
def test_tasks_survive(assigned):
    assigned = replace(assigned, trust=Trust())  # travels beside the messages that Docker's nodes get, too
    assert task_from_pb(over_the_wire(task_to_pb(assigned))) == assigned


@thorough
@given(structs(TaskStatus))
def test_statuses_survive(status):
    assert status_from_pb(over_the_wire(status_to_pb(status))) == status


@thorough
@given(structs(TaskEnd))
def test_the_ends_of_tasks_survive(end):
    sent = msgspec.structs.replace(end, lines=end.lines[-LAST_LINES_MAX:])
    assert end_from_pb(over_the_wire(end_to_pb(sent))) == sent


def node_from_pb(message: pb.Node) -> Node:
    """The reverse of ``node_to_pb``.  Agents read only parts of the message."""
    status = message.manager_status
    return Node(
        id=NodeId(message.id),
        version=version_from_pb(message.meta.version),
        created_at=stamp_of(message.meta, "created_at"),
        updated_at=stamp_of(message.meta, "updated_at"),
        spec=NodeSpec(
            name=message.spec.annotations.name,
            labels=dict(message.spec.annotations.labels),
            role=role_from_pb(message.spec.desired_role),
            availability=availability_from_pb(message.spec.availability),
        ),
        description=description_from_pb(message.description),
        status=NodeStatus(
            state=NodeState(NODE_STATES.word(message.status.state)),
            message=message.status.message,
            addr=message.status.addr,
        ),
        manager_status=(
            ManagerStatus(
                leader=status.leader,
                reachability=Reachability(REACHABILITIES.word(status.reachability)),
                addr=status.addr,
            )
            if message.HasField("manager_status")
            else None
        ),
        certificate=NodeCertificate(
            role=role_from_pb(message.certificate.role),
            state=CERTIFICATE_STATES.word(message.certificate.status.state),
        ),
        attachments=tuple(attachment_from_pb(attachment) for attachment in message.attachments),
    )


@thorough
@given(WHOLE[Node])
def test_nodes_survive(node):
    assert node_from_pb(over_the_wire(node_to_pb(node))) == node


@thorough
@given(structs(NodeDescription))
def test_descriptions_survive(description):
    assert description_from_pb(over_the_wire(description_to_pb(description))) == description


@thorough
@given(
    st.lists(structs(SecretFile), max_size=2),
    st.lists(structs(ConfigFile), max_size=2),
    st.lists(structs(AssignedTask), max_size=2, unique_by=lambda assigned: assigned.task.id),
    st.lists(TEXTS, max_size=2).map(tuple),
)
def test_assignments_survive(secrets, configs, tasks, removed):
    change = AssignmentSet(
        complete=False,
        revision=7,
        secrets=tuple(secrets),
        configs=tuple(configs),
        tasks=tuple(tasks),
        removed_tasks=removed,
        removed_secrets=removed,
        removed_configs=removed,
    )
    message = pb.AssignmentsMessage(type=pb.AssignmentsMessage.INCREMENTAL, changes=changes_to_pb(change))
    revised = skep.RevisedAssignments(
        revision=7,
        message=message,
        trusted_logs=[one.task.id for one in tasks if one.trust.logs],
        trusted_logins=[one.task.id for one in tasks if one.trust.logins],
        decides_trust=True,
    )
    assert revised_from_pb(over_the_wire(revised)) == change


def test_a_manager_that_decides_trusts_only_the_tasks_that_it_names():
    task = AssignedTask(task=Task(id=TaskId("t1")), trust=Trust(logs=True, logins=True))
    change = AssignmentSet(complete=True, tasks=(task,))
    message = pb.AssignmentsMessage(type=pb.AssignmentsMessage.COMPLETE, changes=changes_to_pb(change))
    decided = revised_from_pb(over_the_wire(skep.RevisedAssignments(message=message, decides_trust=True)))
    assert [one.trust for one in decided.tasks] == [Trust()]


def test_tasks_of_a_docker_engine_or_an_older_manager_run_as_before():
    task = AssignedTask(task=Task(id=TaskId("t1")))
    change = AssignmentSet(complete=True, tasks=(task,))
    message = pb.AssignmentsMessage(type=pb.AssignmentsMessage.COMPLETE, changes=changes_to_pb(change))
    for received in (
        assignments_from_pb(over_the_wire(message)),
        revised_from_pb(over_the_wire(skep.RevisedAssignments(message=message))),
    ):
        assert [one.trust for one in received.tasks] == [Trust(logs=True, logins=True)]


@thorough
@given(structs(LogLine))
def test_log_lines_survive(line):
    assert line_from_pb(over_the_wire(line_to_pb(line))) == line


@thorough
@given(structs(LogQuery))
def test_log_queries_survive(query):
    selector, options = query_to_pb(query)
    message = pb.SubscriptionMessage(selector=selector, options=options)
    assert query_from_pb(over_the_wire(message)) == query


@pytest.mark.parametrize(("tail", "number"), [(None, 0), (0, -1), (5, -6)])
def test_tails_have_swarmkits_numbers(tail, number):
    assert query_to_pb(LogQuery(tail=tail))[1].tail == number


@given(STAMPS)
def test_points_in_time_survive(stamp):
    assert timestamp_from_pb(timestamp_to_pb(stamp)) == stamp


@given(DURATIONS)
def test_durations_survive_with_one_sign_for_both_parts(nanoseconds):
    message = duration_to_pb(nanoseconds)
    assert duration_from_pb(message) == nanoseconds
    assert message.seconds * message.nanos >= 0


def test_states_have_swarmkits_numbers():
    assert {state.name: state.number for state in STORED_STATES} == dict(pb.TaskState.items())


def test_registry_credentials_travel_beside_the_task_and_are_no_part_of_it():
    task = Task(id=TaskId("t1"), spec=TaskSpec(container_spec=ContainerSpec(image="x"), runtime="container"))
    assigned = AssignedTask(task=task)
    message = pb.AssignmentsMessage(
        changes=changes_to_pb(
            AssignmentSet(complete=True, tasks=(assigned,), registry_auths={task.id: "e30="})
        )
    )
    assert registry_auth_of(message.changes[0].assignment.task) == "e30="
    received = assignments_from_pb(over_the_wire(message), trusted={})
    assert received.registry_auths == {"t1": "e30="}
    assert received.tasks == (assigned,)


def test_unset_and_false_are_different_for_init():
    assert not container_to_pb(ContainerSpec()).HasField("init")
    assert container_to_pb(ContainerSpec(init=False)).HasField("init")


@pytest.mark.parametrize(
    "message",
    [
        pb.TaskStatus(state=pb.TaskState.ValueType(513)),
        pb.TaskStatus(timestamp=timestamp_to_pb(ZERO_TIME).__class__(seconds=2**62)),
        pb.TaskStatus(timestamp=timestamp_to_pb(ZERO_TIME).__class__(nanos=-1)),
        pb.TaskStatus(
            port_status=pb.PortStatus(ports=[pb.PortConfig(protocol=pb.PortConfig.Protocol.ValueType(9))])
        ),
    ],
    ids=["state", "far future", "negative nanoseconds", "protocol"],
)
def test_numbers_that_mean_nothing_are_refused(message):
    with pytest.raises(InvalidArgument):
        status_from_pb(message)


def test_a_nodes_impossible_ports_are_left_out_and_the_others_kept():
    ports = [pb.PortConfig(published_port=number) for number in (PORT_MAX, PORT_MAX + 1, 2**32 - 1, 80)]
    status = status_from_pb(pb.TaskStatus(state=pb.RUNNING, port_status=pb.PortStatus(ports=ports)))
    assert [one.published_port for one in status.port_status.ports] == [PORT_MAX, 80]


def test_a_nodes_texts_are_cut_to_what_can_be_kept_for_every_task():
    status = status_from_pb(pb.TaskStatus(state=pb.RUNNING, err="x" * 100_000, message="y" * 100_000))
    assert len(status.err) == len(status.message) == 4096


def test_a_mount_swarmkit_does_not_know_is_refused_with_dockers_words():
    with pytest.raises(InvalidArgument, match="invalid MountType: 'image'"):
        container_to_pb(ContainerSpec(mounts=(Mount(type="image"),)))


def test_an_engine_gets_a_services_virtual_addresses_and_options_of_its_networks() -> None:
    network = an_overlay("net1")
    wanted = NetworkAttachmentConfig(target="net1", driver_opts={"mtu": "1400"})
    spec = TaskSpec(networks=(wanted,))
    places = (NetworkAttachment(network=network, addresses=("10.0.1.5/24",), aliases=("db",)),)
    virtual_ips = (EndpointVirtualIP(network_id=network.id, addr="10.0.1.2/24"),)
    task = Task(id=TaskId("t1"), spec=spec, networks_attachments=places)
    message = task_to_pb(AssignedTask(task=task, virtual_ips=virtual_ips))
    (place,) = message.networks
    assert list(place.addresses) == ["10.0.1.5/24"]
    assert list(place.aliases) == ["db"]
    assert dict(place.driver_attachment_opts) == {"mtu": "1400"}
    assert place.network.driver_state.name == "overlay"
    assert place.network.ipam.driver.name == "default"
    assert [(one.network_id, one.addr) for one in message.endpoint.virtual_ips] == [("net1", "10.0.1.2/24")]


def test_a_network_takes_its_settings_from_one_of_the_node_by_name() -> None:
    spec = NetworkSpec(
        name="lan",
        driver_configuration=Driver(name="macvlan"),
        config_from=NodeNetwork(network="lan-config"),
    )
    message = network_to_pb(Network(id=NetworkId("n1"), spec=spec))
    assert message.spec.WhichOneof("config_from") == "network"
    assert network_from_pb(message).spec.config_from == NodeNetwork(network="lan-config")
