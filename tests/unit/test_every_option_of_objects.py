"""Every option of the Engine API for services, networks and volumes has an effect here, or is refused by name.

The rows of ``test_every_option.py`` are about one container; these are about what the manager and the node make around
it. Each is set in turn, and what is compared is what decisions are made from: the requirements of the scheduler, the
allocator's networks, ports and addresses, the network's properties in the data plane, the task's container. Options
that only count over time, of restarts and updates, name the test that sets them.
"""

import asyncio
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from skep.agent.executor.adapter import NodeFacts, create_request, network_head, task_options
from skep.api.formats.bodies import from_builtins, parse
from skep.api.formats.networks import NetworkBody, check_form, check_name
from skep.api.formats.service_form import UNRECOGNIZED, settled
from skep.dataplane.local.bridge_request import bridge_of
from skep.engine.api.volumes import VolumeRequest, check_volume
from skep.engine.volumes.volumes import Volumes
from skep.errors import SkepError
from skep.manager.allocator.addresses import AddressAllocations
from skep.manager.allocator.attachments import AttachableNetworks, virtual_ips_for, wanted_networks
from skep.manager.allocator.ports import endpoint_for
from skep.manager.allocator.subnets import NetworkAllocations, allocated
from skep.manager.control.validation.network_specs import check_network_spec
from skep.manager.control.validation.service_rules import check_service_spec
from skep.manager.orchestrator.replicated import reconcile
from skep.manager.routes.networks import spec_of_body
from skep.manager.routes.volumes import CreateBody
from skep.manager.scheduler.nodes.requirements import requirements_of
from skep.model.network import IPAMConfig, Network, NetworkSpec
from skep.model.service import Service, ServiceSpec
from skep.model.task import AssignedTask, NetworkAttachment, Task
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId
from skep.model.values.meta import Driver
from skep.model.values.times import ZERO_TIME
from skep.wire.convert.task_spec import task_spec_from_pb, task_spec_to_pb
from tests.unit import test_every_option as of_containers
from tests.unit.test_every_option import of_request, with_field

ROOT = Path(__file__).parents[2]
FIELDS = tuple(ROOT / "tests/support/options" / name for name in ("api_1_47.txt", "since_1_48.txt"))
Row = tuple[Any, dict[str, Any]]

NETWORK = Network(
    id=NetworkId("n1"),
    spec=NetworkSpec(name="net", driver_configuration=Driver(name="overlay")),
)
OVERLAY = allocated(NETWORK, NetworkAllocations(), ["10.0.0.0/8"], 24)
PORT = {"TargetPort": 80}
NAMED = {"NamedResourceSpec": {"Kind": "gpu", "Value": "one"}}
COUNTED = {"DiscreteResourceSpec": {"Kind": "gpu", "Value": 1}}


def reserving(*resources: Mapping[str, Any]) -> dict[str, Any]:
    return {"TaskTemplate": {"Resources": {"Reservations": {"GenericResources": list(resources)}}}}


ON_NETWORK = {"TaskTemplate": {"Networks": [{"Target": "n1"}]}}

SERVICE: dict[str, Row] = {
    "Name": ("other", {}),
    "Labels": (
        {"a": "b"},
        {
            "TaskTemplate": {
                "ContainerSpec": {"Env": ["A={{range $k, $v := .Service.Labels}}{{$k}}{{$v}}{{end}}"]}
            }
        },
    ),
    "TaskTemplate.PluginSpec": (
        {"Name": "x", "Remote": "x"},
        {"TaskTemplate": {"Runtime": "plugin"}, "Mode": {"Global": {}}},
    ),
    "TaskTemplate.NetworkAttachmentSpec": ({"ContainerID": "x"}, {"TaskTemplate": {"Runtime": "attachment"}}),
    "TaskTemplate.Resources.Limits.NanoCPUs": (500_000_000, {}),
    "TaskTemplate.Resources.Limits.MemoryBytes": (64 << 20, {}),
    "TaskTemplate.Resources.Limits.Pids": (10, {}),
    "TaskTemplate.Resources.SwapBytes": (
        0,
        {"TaskTemplate": {"Resources": {"Limits": {"MemoryBytes": 64 << 20}}}},
    ),
    "TaskTemplate.Resources.MemorySwappiness": (10, {}),
    "TaskTemplate.Resources.Reservations.NanoCPUs": (500_000_000, {}),
    "TaskTemplate.Resources.Reservations.MemoryBytes": (64 << 20, {}),
    "TaskTemplate.Resources.Reservations.GenericResources.0.NamedResourceSpec.Kind": (
        "fpga",
        reserving(NAMED),
    ),
    "TaskTemplate.Resources.Reservations.GenericResources.0.NamedResourceSpec.Value": (
        "two",
        reserving(NAMED),
    ),
    "TaskTemplate.Resources.Reservations.GenericResources.0.DiscreteResourceSpec.Kind": (
        "fpga",
        reserving(COUNTED),
    ),
    "TaskTemplate.Resources.Reservations.GenericResources.0.DiscreteResourceSpec.Value": (
        2,
        reserving(COUNTED),
    ),
    "TaskTemplate.RestartPolicy.Condition": ("none", {}),
    "TaskTemplate.RestartPolicy.Delay": (7_000_000_000, {}),
    "TaskTemplate.RestartPolicy.MaxAttempts": (3, {}),
    "TaskTemplate.RestartPolicy.Window": (7_000_000_000, {}),
    "TaskTemplate.Placement.Constraints": (["node.role==manager"], {}),
    "TaskTemplate.Placement.Preferences": ([{"Spread": {"SpreadDescriptor": "node.labels.zone"}}], {}),
    "TaskTemplate.Placement.MaxReplicas": (2, {}),
    "TaskTemplate.Placement.Platforms.0.Architecture": (
        "arm64",
        {"TaskTemplate": {"Placement": {"Platforms": [{"OS": "linux"}]}}},
    ),
    "TaskTemplate.Placement.Platforms.0.OS": (
        "windows",
        {"TaskTemplate": {"Placement": {"Platforms": [{"OS": "linux"}]}}},
    ),
    "TaskTemplate.ForceUpdate": (1, {}),
    "TaskTemplate.Runtime": ("plugin", {}),
    "TaskTemplate.Networks.0.Target": ("n2", ON_NETWORK),
    "TaskTemplate.Networks.0.Aliases": (["a"], ON_NETWORK),
    "TaskTemplate.Networks.0.DriverOpts": ({"com.docker.network.endpoint.ifname": "e"}, ON_NETWORK),
    "TaskTemplate.LogDriver.Name": ("local", {"TaskTemplate": {"LogDriver": {"Name": "json-file"}}}),
    "TaskTemplate.LogDriver.Options": (
        {"max-size": "1m"},
        {"TaskTemplate": {"LogDriver": {"Name": "json-file"}}},
    ),
    "Mode.Replicated.Replicas": (3, {}),
    "Mode.Global": ({}, {"Mode": {}}),
    "Mode.ReplicatedJob.MaxConcurrent": (2, {"Mode": {"ReplicatedJob": {}}}),
    "Mode.ReplicatedJob.TotalCompletions": (2, {"Mode": {"ReplicatedJob": {}}}),
    "Mode.GlobalJob": ({}, {"Mode": {}}),
    **{
        f"{config}.{field}": (value, {})
        for config in ("UpdateConfig", "RollbackConfig")
        for field, value in {
            "Parallelism": 3,
            "Delay": 7_000_000_000,
            "FailureAction": "continue",
            "Monitor": 7_000_000_000,
            "MaxFailureRatio": 0.5,
            "Order": "start-first",
        }.items()
    },
    "Networks.0.Target": ("n2", {"Networks": [{"Target": "n1"}]}),
    "Networks.0.Aliases": (["a"], {"Networks": [{"Target": "n1"}]}),
    "Networks.0.DriverOpts": ({"a": "b"}, {"Networks": [{"Target": "n1"}]}),
    "EndpointSpec.Mode": ("dnsrr", ON_NETWORK),
    "EndpointSpec.Ports.0.Name": ("web", {"EndpointSpec": {"Ports": [PORT]}}),
    "EndpointSpec.Ports.0.Protocol": ("udp", {"EndpointSpec": {"Ports": [PORT]}}),
    "EndpointSpec.Ports.0.TargetPort": (81, {"EndpointSpec": {"Ports": [PORT]}}),
    "EndpointSpec.Ports.0.PublishedPort": (8080, {"EndpointSpec": {"Ports": [PORT]}}),
    "EndpointSpec.Ports.0.PublishMode": ("host", {"EndpointSpec": {"Ports": [PORT]}}),
}
"""Of a service's spec, without its ``ContainerSpec``: a value, and what has to be there for the field to count."""

_RESTART = "tests/unit/manager/orchestrator/test_restart.py"
_UPDATE = "tests/unit/manager/orchestrator/test_update.py"
_FAILURES = "tests/unit/manager/orchestrator/test_update_failures.py"
_JOBS = "tests/unit/manager/orchestrator/test_jobs.py"
_ROLLBACK = f"{_FAILURES}::test_a_rollback_has_settings_of_its_own"

SHOWN_BY = {
    "TaskTemplate.RestartPolicy.Condition": f"{_RESTART}::test_the_condition_decides",
    "TaskTemplate.RestartPolicy.Delay": f"{_RESTART}::test_without_a_delay_the_successor_starts_at_once",
    "TaskTemplate.RestartPolicy.MaxAttempts": f"{_RESTART}::test_attempts_are_counted_per_slot_and_end_at_the_maximum",
    "TaskTemplate.RestartPolicy.Window": f"{_RESTART}::test_only_attempts_within_the_window_count",
    "TaskTemplate.ForceUpdate": f"{_UPDATE}::test_force_starts_every_task_anew_and_the_same_spec_none",
    "Mode.Global": "tests/unit/manager/orchestrator/test_global_services.py::test_every_ready_node_gets_one_task",
    "Mode.ReplicatedJob.MaxConcurrent": f"{_JOBS}::test_no_more_tasks_run_at_a_time_than_asked_for",
    "Mode.ReplicatedJob.TotalCompletions": f"{_JOBS}::test_a_job_ends_when_all_runs_are_completed",
    "Mode.GlobalJob": f"{_JOBS}::test_a_global_job_runs_once_on_each_node_that_was_there",
    "UpdateConfig.Parallelism": f"{_UPDATE}::test_parallelism_zero_takes_all_slots_at_once",
    "UpdateConfig.Delay": f"{_UPDATE}::test_the_delay_passes_between_slots_but_not_after_the_last",
    "UpdateConfig.FailureAction": f"{_FAILURES}::test_continue_ignores_failures",
    "UpdateConfig.Monitor": f"{_UPDATE}::test_the_update_is_watched_for_the_monitor_time_before_it_is_complete",
    "UpdateConfig.MaxFailureRatio": f"{_FAILURES}::test_the_ratio_allows_some_failures",
    "UpdateConfig.Order": f"{_UPDATE}::test_start_first_keeps_the_old_task_until_the_new_one_runs",
    **{
        f"RollbackConfig.{field}": _ROLLBACK
        for field in ("Parallelism", "Delay", "FailureAction", "Monitor", "MaxFailureRatio", "Order")
    },
}
"""Options of a service that count over time, and the test that sets each."""

CLUSTER = {"Driver": "overlay"}
SUBNET = {"Driver": "overlay", "IPAM": {"Config": [{"Subnet": "10.9.0.0/24"}]}}
_MTU = "com.docker.network.driver.mtu"
_VXLAN = "com.docker.network.driver.overlay.vxlanid_list"
_BRIDGE = "com.docker.network.bridge"

CLUSTER_NETWORK: dict[str, Row] = {
    "Name": ("other", CLUSTER),
    "Driver": ("nosuch", {"Scope": "swarm"}),
    "Scope": ("nosuch", CLUSTER),
    "Internal": (True, CLUSTER),
    "Attachable": (True, CLUSTER),
    "Ingress": (True, CLUSTER),
    "ConfigOnly": (True, {"Driver": "overlay", "Internal": True}),
    "ConfigFrom.Network": ("c", {"Driver": "overlay", "Labels": {"a": "b"}}),
    "IPAM.Driver": ("nosuch", CLUSTER),
    "IPAM.Config.0.Subnet": ("10.8.0.0/24", SUBNET),
    "IPAM.Config.0.IPRange": ("10.9.0.128/25", SUBNET),
    "IPAM.Config.0.Gateway": ("10.9.0.9", SUBNET),
    "IPAM.Config.0.AuxiliaryAddresses": ({"a": "10.9.0.2"}, SUBNET),
    "IPAM.Options": ({"a": "b"}, CLUSTER),
    "EnableIPv4": (False, CLUSTER),
    "EnableIPv6": (True, CLUSTER),
    f"Options[{_MTU}]": ("1400", CLUSTER),
    f"Options[{_VXLAN}]": ("5000", CLUSTER),
    "Options[encrypted]": ("", CLUSTER),
    "Options[any other]": ("x", CLUSTER),
    "Labels": ({"a": "b"}, CLUSTER),
}
"""Of ``POST /networks/create`` for a network of the cluster; ``Options[NAME]``: one driver option."""

BRIDGE_NETWORK: dict[str, Row] = {
    "Name": ("other", {}),
    "Driver": ("macvlan", {}),
    "Scope": ("nosuch", {}),
    "Internal": (True, {}),
    "Attachable": (True, {}),
    "Ingress": (True, {"Driver": "bridge"}),
    "ConfigOnly": (True, {"Internal": True}),
    "ConfigFrom.Network": ("c", {"Labels": {"a": "b"}}),
    "IPAM.Driver": ("nosuch", {}),
    "IPAM.Config.0.Subnet": ("10.8.0.0/24", {"IPAM": {"Config": [{"Subnet": "10.9.0.0/24"}]}}),
    "IPAM.Config.0.IPRange": ("10.9.0.128/25", {"IPAM": {"Config": [{"Subnet": "10.9.0.0/24"}]}}),
    "IPAM.Config.0.Gateway": ("10.9.0.9", {"IPAM": {"Config": [{"Subnet": "10.9.0.0/24"}]}}),
    "IPAM.Config.0.AuxiliaryAddresses": (
        {"a": "10.9.0.2"},
        {"IPAM": {"Config": [{"Subnet": "10.9.0.0/24"}]}},
    ),
    "IPAM.Options": ({"a": "b"}, {}),
    "EnableIPv4": (False, {}),
    "EnableIPv6": (True, {}),
    f"Options[{_MTU}]": ("1400", {}),
    f"Options[{_BRIDGE}.name]": ("br7", {}),
    f"Options[{_BRIDGE}.enable_icc]": ("false", {}),
    f"Options[{_BRIDGE}.enable_ip_masquerade]": ("false", {}),
    f"Options[{_BRIDGE}.host_binding_ipv4]": ("127.0.0.1", {}),
    "Options[any other]": ("x", {}),
    "Labels": ({"a": "b"}, {}),
}
"""The same for a network of a node without an engine."""

VOLUME: dict[str, Row] = {
    "Name": ("other", {"Name": "v1"}),
    "Driver": ("nosuch", {"Name": "v1"}),
    "DriverOpts[type, device, o]": ({"type": "nfs", "device": ":/x", "o": "addr=10.0.0.1"}, {"Name": "v1"}),
    "DriverOpts[size]": ({"size": "1g"}, {"Name": "v1"}),
    "DriverOpts[any other]": ({"x": "1"}, {"Name": "v1"}),
    "Labels": ({"a": "b"}, {"Name": "v1"}),
    "ClusterVolumeSpec": ({"AccessMode": {"MountVolume": {}}}, {"Name": "v1"}),
}
"""Of ``POST /volumes/create``."""

REFUSED_SERVICE = {
    "TaskTemplate.PluginSpec": 'runtime type "plugin" only supported in experimental',
    "TaskTemplate.NetworkAttachmentSpec": "unsupported runtime",
    "TaskTemplate.Runtime": "mismatched Runtime and *Spec fields",
    "TaskTemplate.Networks.0.DriverOpts": "driver option com.docker.network.endpoint.ifname",
    "Networks.0.DriverOpts": "driver option a",
}
REFUSED_CLUSTER_NETWORK = {
    "Driver": 'plugin "nosuch" not found',
    "Scope": "invalid scope: nosuch",
    "ConfigOnly": "configuration network can only contain network specific fields",
    "ConfigFrom.Network": "user specified configurations are not supported",
    "IPAM.Driver": "error during lookup of plugin nosuch",
    "EnableIPv4": "IPv4 cannot be disabled",
}
REFUSED_BRIDGE_NETWORK = {
    "Driver": "not driver macvlan",
    "Scope": "invalid scope: nosuch",
    "Ingress": "Ingress network can only be global scope network",
    "ConfigOnly": "configuration network can only contain network specific fields",
    "ConfigFrom.Network": "user specified configurations are not supported",
    "IPAM.Driver": "could not resolve driver nosuch in registry",
    "EnableIPv4": "IPv4 cannot be disabled",
    f"Options[{_BRIDGE}.name]": f"do not have the option {_BRIDGE}.name=br7",
    f"Options[{_BRIDGE}.enable_icc]": f"do not have the option {_BRIDGE}.enable_icc=false",
    f"Options[{_BRIDGE}.enable_ip_masquerade]": f"do not have the option {_BRIDGE}.enable_ip_masquerade=false",
    f"Options[{_BRIDGE}.host_binding_ipv4]": f"do not have the option {_BRIDGE}.host_binding_ipv4=127.0.0.1",
    "Options[any other]": "do not have the option any other=x",
}
REFUSED_VOLUME = {
    "Driver": 'error looking up volume plugin nosuch: plugin "nosuch" not found',
    "DriverOpts[size]": "quota size requested but no quota support",
    "DriverOpts[any other]": 'invalid option: "x"',
}
_DEFAULT_IPAM = "for other IPAM drivers, the driver `default` reads none, as in an engine"
IRRELEVANT_CLUSTER_NETWORK = {
    "IPAM.Options": _DEFAULT_IPAM,
    "Options[any other]": "an engine's driver `overlay` also ignores them",
}
IRRELEVANT_BRIDGE_NETWORK = {"IPAM.Options": _DEFAULT_IPAM}
_ENDPOINT = "NetworkingConfig.EndpointsConfig.n"
_ON_N = {"HostConfig": {"NetworkMode": "n"}, "NetworkingConfig": {"EndpointsConfig": {"n": {}}}}
FILLED_IN: dict[str, Row] = {
    f"{_ENDPOINT}.NetworkID": ("x", _ON_N),
    f"{_ENDPOINT}.EndpointID": ("x", _ON_N),
    f"{_ENDPOINT}.Gateway": ("10.0.0.1", _ON_N),
    f"{_ENDPOINT}.IPAddress": ("10.0.0.2", _ON_N),
    f"{_ENDPOINT}.IPPrefixLen": (24, _ON_N),
    f"{_ENDPOINT}.IPv6Gateway": ("fd00::1", _ON_N),
    f"{_ENDPOINT}.GlobalIPv6Address": ("fd00::2", _ON_N),
    f"{_ENDPOINT}.GlobalIPv6PrefixLen": (64, _ON_N),
    f"{_ENDPOINT}.DNSNames": (["x"], _ON_N),
}
"""Of a plain container's endpoint: what an engine responds with."""
_SENT_BACK = dict.fromkeys(FILLED_IN, "an engine fills it in, and clients that copy a response send it back")


def set_in(body: Mapping[str, Any], path: str, value: Any) -> Any:
    """``body`` with a field or, as ``Options[NAME]``, one driver option."""
    match = re.fullmatch(r"(\w+)\[(.*)\]", path)
    if match is None:
        return with_field(body, path, value)
    if match[1] == "Options":
        return {**body, "Options": {match[2]: value}}
    return {**body, match[1]: value}


def spec_of(body: Mapping[str, Any]) -> ServiceSpec:
    """The spec that the manager stores for a request.  Raises: InvalidArgument."""
    sent = parse(msgspec.json.encode(body))
    return settled(from_builtins(sent, ServiceSpec, unrecognized=UNRECOGNIZED))


def of_service(body: Mapping[str, Any], directory: Path) -> Any:
    """What decisions about such a service, and one of its tasks, are made from; a text: why it is refused."""
    template = body.get("TaskTemplate", {})
    container = {"Image": "i", "Command": ["c"], **template.get("ContainerSpec", {})}
    if template.get("Runtime") != "attachment":
        template = {**template, "ContainerSpec": container}
    try:
        spec = spec_of({"Name": "web", **body, "TaskTemplate": template})
        check_service_spec(spec)
        service = Service(id=ServiceId("s"), spec=spec)
        endpoint = endpoint_for(service, lambda *_: True)
        networks = AttachableNetworks(find=lambda name: OVERLAY if name == "n1" else None)
        addresses = AddressAllocations()
        virtual = virtual_ips_for(service, networks, lambda network, _: addresses.allocate("s", network))
        wanted = wanted_networks(spec, None)
        sent = task_spec_from_pb(task_spec_to_pb(spec.task_template))
        attached = [
            NetworkAttachment(network=OVERLAY, addresses=("10.0.0.5/24",), aliases=one.aliases)
            for one in wanted
            if one.target == "n1"
        ]
        generic = (
            sent.resources.reservations.generic_resources
            if sent.resources and sent.resources.reservations
            else ()
        )
        task = Task(
            id=TaskId("t"),
            slot=1,
            node_id=NodeId("n"),
            service_id=service.id,
            spec=sent,
            networks_attachments=tuple(attached),
            generic_resources=generic,
        )
        assigned = AssignedTask(
            task=task, service_name=spec.name, service_labels=spec.labels, ports=endpoint.ports
        )
        request = create_request(assigned, NodeFacts(hostname="n"))
        run = of_request(request, task_options(assigned, ()), directory)
        changes = len(reconcile(service, ()))
        return requirements_of(task, spec), wanted, endpoint, virtual, changes, run
    except SkepError as error:
        return str(error)


def of_cluster_network(body: Mapping[str, Any], directory: Path) -> Any:
    """What the data plane and filters know of such a network of the cluster; a text: why it is refused."""
    try:
        asked = from_builtins({"Name": "net", **body}, NetworkBody)
        check_name(asked.name)
        check_form(asked)
        spec = spec_of_body(asked)
        check_network_spec(spec)
        network = allocated(
            Network(id=NetworkId("n1"), spec=spec), NetworkAllocations(), ["10.0.0.0/8"], 24, cluster="c"
        )
        configs = network.ipam_options.configs if network.ipam_options is not None else ()
        ranges: list[IPAMConfig] = list(configs)
        return network_head(network), ranges, spec.attachable, spec.labels, spec.scope
    except SkepError as error:
        return str(error)


def of_bridge_network(body: Mapping[str, Any], directory: Path) -> Any:
    """The network of a node that such a request makes; a text: why it is refused."""
    try:
        asked = from_builtins({"Name": "net", **body}, NetworkBody)
        check_form(asked)
        made = bridge_of(asked, id="f" * 64, created_at=ZERO_TIME, taken=())
        return msgspec.structs.replace(made, ipam_options=None)
    except SkepError as error:
        return str(error)


def of_volume(body: Mapping[str, Any], directory: Path) -> Any:
    """The volume that such a request makes; a text: why it is refused."""
    volumes = Volumes(directory / "volumes")
    try:
        asked = from_builtins(body, VolumeRequest)
        if asked.cluster_volume_spec is not None:
            return from_builtins(body, CreateBody).spec
        check_volume(asked, asked.name)
        asyncio.run(volumes.create(asked.name, asked.driver, asked.labels, asked.driver_opts))
        return asked.name, volumes.labels(asked.name), volumes.options(asked.name)
    except SkepError as error:
        return str(error)


class Walk(NamedTuple):
    """One kind of request: its title, the prefix of its fields in the API description, its rows and their outcomes."""

    title: str
    prefix: str
    rows: Mapping[str, Row]
    refused: Mapping[str, str]
    irrelevant: Mapping[str, str] = {}
    give: Any = None
    shown_by: Mapping[str, str] = {}


WALKS = (
    Walk("Services", "ServiceSpec.", SERVICE, REFUSED_SERVICE, {}, of_service, SHOWN_BY),
    Walk(
        "Networks of the cluster",
        "NetworkCreate.",
        CLUSTER_NETWORK,
        REFUSED_CLUSTER_NETWORK,
        IRRELEVANT_CLUSTER_NETWORK,
        of_cluster_network,
    ),
    Walk(
        "Bridge networks of a node",
        "NetworkCreate.",
        BRIDGE_NETWORK,
        REFUSED_BRIDGE_NETWORK,
        IRRELEVANT_BRIDGE_NETWORK,
        of_bridge_network,
    ),
    Walk("Volumes", "VolumeCreateOptions.", VOLUME, REFUSED_VOLUME, {}, of_volume),
    Walk("Fields that an engine fills in", "", FILLED_IN, {}, _SENT_BACK, of_containers.of_body),
)
"""Those that are walked here."""

CONTAINER_WALKS = (
    Walk(
        "Containers of services",
        "ServiceSpec.TaskTemplate.ContainerSpec.",
        of_containers.CONTAINER,
        of_containers.REFUSED,
        of_containers.IRRELEVANT,
    ),
    Walk(
        "Plain containers: configuration",
        "ContainerConfig.",
        {path: row for path, row in of_containers.BODY.items() if not path.startswith("Networking")},
        of_containers.REFUSED_BODY,
        of_containers.IRRELEVANT,
    ),
    Walk(
        "Plain containers: options of the host",
        "HostConfig.",
        of_containers.HOST,
        of_containers.REFUSED_HOST,
        of_containers.IRRELEVANT,
    ),
    Walk(
        "Plain containers: networks",
        "",
        {path: row for path, row in of_containers.BODY.items() if path.startswith("Networking")},
        of_containers.REFUSED_BODY,
        of_containers.IRRELEVANT,
    ),
)
"""Those of ``test_every_option.py``."""


def fields_of_the_api() -> list[str]:
    lines = [line for file in FIELDS for line in file.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def outcome(walk: Walk, path: str) -> str:
    """What becomes of an option, as the reference says it."""
    if path in walk.refused:
        return f"refused: `{walk.refused[path]}`"
    return f"no effect: {walk.irrelevant[path]}" if path in walk.irrelevant else "honored"


def named_as_in_the_api(walk: Walk, path: str) -> str:
    """A row's field in the spelling of the API description."""
    path = re.sub(r"\[.*\]", "", path.replace("EndpointsConfig.n.", "EndpointsConfig.*."))
    return walk.prefix + re.sub(r"\.\d+\b", "", path)


def rows_of_the_api() -> Iterator[str]:
    """Every field of the API description that has a row, or is part of one."""
    for walk in (*WALKS, *CONTAINER_WALKS):
        for path in walk.rows:
            yield named_as_in_the_api(walk, path)


@pytest.mark.parametrize(
    ("walk", "path"),
    [pytest.param(walk, path, id=f"{walk.title}-{path}") for walk in WALKS for path in walk.rows],
)
def test_an_option_of_an_object_is_honored_or_refused(walk: Walk, path: str, tmp_path: Path) -> None:
    value, base = walk.rows[path]
    before = walk.give(base, tmp_path / "before")
    after = walk.give(set_in(base, path, value), tmp_path / "after")
    if path in walk.refused:
        assert isinstance(after, str), "it is honored: take it out of the table"
        assert walk.refused[path] in after
    elif path in walk.irrelevant:
        assert repr(after) == repr(before).replace("/before/", "/after/"), "it has an effect: take it out"
    else:
        assert not isinstance(after, str), after
        if path not in walk.shown_by:
            assert repr(after) != repr(before).replace("/before/", "/after/"), "dropped silently"


@pytest.mark.parametrize("path", SHOWN_BY)
def test_an_option_that_counts_over_time_is_kept_and_names_the_test_that_sets_it(path: str) -> None:
    value, base = SERVICE[path]
    container = {"ContainerSpec": {"Image": "i"}}
    specs = []
    for body in (base, with_field(base, path, value)):
        body = {"Name": "web", **body, "TaskTemplate": {**body.get("TaskTemplate", {}), **container}}
        specs.append(spec_of(body))
    assert specs[0] != specs[1]
    file, _, name = SHOWN_BY[path].partition("::")
    assert f"def {name}(" in (ROOT / file).read_text()


def test_every_field_of_the_api_description_has_its_row() -> None:
    rows = set(rows_of_the_api())
    parts = {field for row in rows for field in _above(row)}

    def is_walked(field: str) -> bool:
        return field in parts or any(part in rows for part in _above(field))

    assert [field for field in fields_of_the_api() if not is_walked(field)] == []


def _above(field: str) -> Iterator[str]:
    """The field, and those that it is a part of."""
    words = field.split(".")
    return (".".join(words[:count]) for count in range(2, len(words) + 1))


def test_every_field_of_a_request_that_is_decoded_has_its_row() -> None:
    for walk, type_ in ((WALKS[1], NetworkBody), (WALKS[2], NetworkBody), (WALKS[3], VolumeRequest)):
        rows = {named_as_in_the_api(walk, path).removeprefix(walk.prefix) for path in walk.rows}
        decoded = of_containers.fields_of(type_) - {"CheckDuplicate"}  # of clients before 1.44
        assert decoded == rows, walk.title
    service = {named_as_in_the_api(WALKS[0], path).removeprefix("ServiceSpec.") for path in SERVICE}
    decoded = {
        field
        for field in of_containers.fields_of(ServiceSpec)
        if not field.startswith("TaskTemplate.ContainerSpec.")
    }
    assert {field for field in decoded if not any(part in service for part in _prefixes(field))} == set()


def _prefixes(field: str) -> Iterator[str]:
    words = field.split(".")
    return (".".join(words[:count]) for count in range(1, len(words) + 1))
