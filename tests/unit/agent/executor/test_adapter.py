"""From tasks to create requests: placeholders and options."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from skep.agent.executor.adapter import NodeFacts, container_spec, create_request, task_options
from skep.agent.executor.interface import Rejected
from skep.agent.tasks.cluster_volumes import PublishedVolume
from skep.engine.containers.container import ContainerConfig
from skep.engine.containers.create import NodeDefaults, container_config, mounts
from skep.engine.images.image import ContainerDefaults
from skep.errors import InvalidArgument
from skep.model.container import (
    AppArmorOpts,
    ContainerSpec,
    CredentialSpec,
    Mount,
    Privileges,
    SeccompOpts,
    SELinuxContext,
)
from skep.model.network import Network, NetworkSpec
from skep.model.permissions.rights import Right
from skep.model.service import (
    DiscreteResource,
    GenericResource,
    Limits,
    NamedResource,
    ResourceRequirements,
    TaskSpec,
)
from skep.model.task import AssignedTask, NetworkAttachment, Trust
from skep.model.values.ids import NetworkId
from skep.model.values.meta import Driver
from skep.model.values.stacks import STACK_LABEL
from tests.support.builders import a_task

NODE = NodeFacts(hostname="n")


@pytest.mark.parametrize(
    ("privileges", "said"),
    [
        (
            Privileges(credential_spec=CredentialSpec(file="spec.json")),
            '^invalid --security-opt 2: "credentialspec=file://spec.json"$',
        ),
    ],
)
def test_what_cannot_confine_here_is_rejected(privileges: Privileges, said: str) -> None:
    with pytest.raises(Rejected, match=said):
        configured(privileges)


def test_the_rest_of_a_services_privileges_reaches_its_containers() -> None:
    found = configured(
        Privileges(
            credential_spec=CredentialSpec(),
            selinux_context=SELinuxContext(disable=True, user="a", role="b", type="c", level="s0:c100"),
            seccomp=SeccompOpts(mode="custom", profile=b"{}"),
            app_armor=AppArmorOpts(mode="disabled"),
            no_new_privileges=True,
        )
    )
    assert (found.seccomp, found.apparmor, found.no_new_privileges) == ("{}", "unconfined", True)
    assert found.label_options == ("disable", "user:a", "role:b", "level:s0:c100", "type:c"), (
        "in moby's order"
    )


def configured(privileges: Privileges) -> ContainerConfig:
    spec = TaskSpec(container_spec=ContainerSpec(image="busybox:1", args=("true",), privileges=privileges))
    task = AssignedTask(task=replace(a_task("t1"), spec=spec))
    facts = NodeFacts(hostname="m1")
    request, options = create_request(task, facts), task_options(task, ())
    return container_config(request, ContainerDefaults(), options, NodeDefaults("m1", "", Driver()))


@pytest.mark.parametrize("source", ["skep-door", "skep-{{.Service.Name}}"])
def test_only_the_front_door_mounts_its_volume(source: str) -> None:
    mount = Mount(type="volume", source=source, target="/x")
    spec = TaskSpec(container_spec=ContainerSpec(image="busybox:1", mounts=(mount,)))
    task = AssignedTask(task=replace(a_task("t1"), spec=spec), service_name="door")
    with pytest.raises(Rejected, match="only tasks of the front door may mount the volume skep-door"):
        create_request(task, NODE)
    create_request(replace(task, service_labels={"skep.door": "true"}), NODE)


def test_an_empty_seccomp_profile_is_not_taken_for_the_default_one() -> None:
    with pytest.raises(Rejected, match="seccomp profile"):
        configured(Privileges(seccomp=SeccompOpts(mode="custom", profile=b"")))


def test_a_tasks_options_reach_its_container() -> None:
    spec = ContainerSpec(
        image="busybox:1",
        args=("true",),
        env=("NODE={{.Node.Hostname}}",),
        hosts=("10.0.0.1 one two",),
        mounts=(Mount(type="volume", source="data-{{.Task.Slot}}", target="/data"),),
        stop_grace_period=1_500_000_000,
        open_stdin=True,
        init=True,
    )
    task = AssignedTask(task=replace(a_task("t1", slot=4), spec=TaskSpec(container_spec=spec)))
    facts = NodeFacts(hostname="m1")
    request, options = create_request(task, facts), task_options(task, ())
    node = NodeDefaults("m1", "", Driver(name="json-file", options={"max-file": "2"}))
    config = container_config(request, ContainerDefaults(env=("A=1",)), options, node)
    assert (config.env, config.hosts) == (("NODE=m1", "A=1"), ("10.0.0.1 one two",))
    assert (config.stop_grace_ns, config.open_stdin, config.init) == (1_500_000_000, True, True)
    assert (config.log.type, config.log.max_files) == ("json-file", 2)
    assert [mount.source for mount in mounts(request)] == ["data-4"]


@pytest.mark.parametrize("trusts", [True, False])
@pytest.mark.parametrize(
    ("driver", "is_default"),
    [
        (None, True),
        (Driver(), True),
        (Driver(options={"tag": "x"}), True),
        (Driver(options={"gelf-address": "udp://10.0.0.1:1"}), False),
        (Driver(name="gelf", options={"gelf-address": "udp://10.0.0.1:1"}), False),
        (Driver(name="json-file"), False),
    ],
)
def test_a_log_goes_anywhere_if_an_administrator_chose_where(
    trusts: bool, driver: Driver | None, is_default: bool
) -> None:
    container = ContainerSpec(image="busybox:1", args=("true",))
    task = AssignedTask(
        task=replace(a_task("t1"), spec=TaskSpec(container_spec=container, log_driver=driver)),
        trust=Trust(logs=trusts),
    )
    request, options = create_request(task, NodeFacts(hostname="m1")), task_options(task, ())
    default = Driver(name="gelf", options={"gelf-address": "udp://127.0.0.1:1"})
    node = NodeDefaults("m1", "", default, log_drivers={"gelf": lambda _: None})
    config = container_config(request, ContainerDefaults(), options, node)
    assert config.log.is_restricted is not (trusts or is_default)
    plain = container_config(request, ContainerDefaults(), None, node)
    assert not plain.log.is_restricted


def on_networks(*drivers: str) -> AssignedTask:
    networks = [
        Network(id=NetworkId(driver), spec=NetworkSpec(name=driver, driver_configuration=Driver(name=driver)))
        for driver in drivers
    ]
    spec = TaskSpec(container_spec=ContainerSpec(image="i", command=("true",)))
    attachments = tuple(NetworkAttachment(network=one) for one in networks)
    return AssignedTask(
        task=replace(a_task("t"), spec=spec, networks_attachments=attachments), service_name="web"
    )


def test_a_task_on_the_network_host_has_the_nodes() -> None:
    assert create_request(on_networks("host"), NODE).host_config.network_mode == "host"
    assert create_request(on_networks("overlay"), NODE).host_config.network_mode == ""
    with pytest.raises(
        Rejected,
        match=r"conflicting options: a container on the network host cannot be on another one: overlay$",
    ):
        create_request(on_networks("overlay", "host"), NODE)


def test_a_task_on_the_network_host_that_publishes_through_the_mesh_is_told_so() -> None:
    given = on_networks("host", "overlay")
    host, mesh = (one.network for one in given.task.networks_attachments)
    assert host is not None
    assert mesh is not None
    mesh = replace(mesh, spec=replace(mesh.spec, name="ingress", ingress=True))
    attachments = (NetworkAttachment(network=host), NetworkAttachment(network=mesh))
    task = replace(given, task=replace(given.task, networks_attachments=attachments))
    with pytest.raises(Rejected, match=r"another one: ingress, because it publishes .* with mode=host$"):
        create_request(task, NODE)


def test_generic_resources_are_variables_of_the_container() -> None:
    given = (
        GenericResource(named_resource_spec=NamedResource(kind="gpu", value="a")),
        GenericResource(discrete_resource_spec=DiscreteResource(kind="ssd", value=2)),
        GenericResource(named_resource_spec=NamedResource(kind="gpu", value="b")),
    )
    spec = TaskSpec(container_spec=ContainerSpec(image="i", env=("A=b",)))
    task = replace(a_task("t"), spec=spec, generic_resources=given)
    env = create_request(AssignedTask(task=task, service_name="web"), NODE).env
    assert env == ("A=b", "DOCKER_RESOURCE_GPU=a,b", "DOCKER_RESOURCE_SSD=2")


def with_labels(**labels: str) -> AssignedTask:
    named = {f"skep.{name.replace('_', '-')}": value for name, value in labels.items()}
    spec = TaskSpec(container_spec=ContainerSpec(image="i", command=("true",), labels=named))
    return AssignedTask(task=replace(a_task("t"), spec=spec), service_name="web")


def test_a_label_names_the_mounts_that_selinux_labels() -> None:
    assert task_options(with_labels(relabel="/a=z,/b=Z"), ()).relabel == {"/a": "z", "/b": "Z"}


def test_rights_of_a_tasks_labels_are_options_of_its_container() -> None:
    task = with_labels(
        privileged="true",
        devices="/dev/fuse:/dev/f:rw,acme.com/net=eth9",
        device_rules="c 188:* r",
        gpus="device=1",
        pid="host",
        ipc="host",
        uts="host",
        shm_size="1m",
        cpu_shares="7",
        memory_swap="-1",
        device_read_bps="/dev/sda:2",
    )
    host = create_request(task, NODE).host_config
    assert (host.privileged, host.pid_mode, host.ipc_mode, host.uts_mode) == (True, "host", "host", "host")
    assert [(one.path_on_host, one.path_in_container, one.cgroup_permissions) for one in host.devices] == [
        ("/dev/fuse", "/dev/f", "rw")
    ]
    assert [(one.driver, one.device_ids, one.capabilities) for one in host.device_requests] == [
        ("cdi", ("acme.com/net=eth9",), ()),
        ("", ("1",), (("gpu",),)),
    ]
    assert (host.device_cgroup_rules, host.shm_size, host.cpu_shares) == (("c 188:* r",), 1 << 20, 7)
    assert host.memory_swap == -1
    assert [(one.path, one.rate) for one in host.blkio_device_read_bps] == [("/dev/sda", 2)]


@pytest.mark.parametrize(
    ("labels", "devices"),
    [
        ({}, ()),
        ({"gpus": "reserved"}, ("acme.com/gpu=1", "acme.com/gpu=3")),
        ({"devices": "reserved"}, ("acme.com/net=eth9",)),
        (
            {"devices": "reserved,acme.com/x=y", "gpus": "reserved"},
            ("acme.com/x=y", "acme.com/gpu=1", "acme.com/net=eth9", "acme.com/gpu=3"),
        ),
    ],
)
def test_a_container_gets_the_devices_that_its_task_was_assigned(
    labels: dict[str, str], devices: tuple[str, ...]
) -> None:
    kinds = (("acme.com/gpu", "1"), ("acme.com/net", "eth9"), ("fpga", "f1"), ("acme.com/gpu", "3"))
    given = [
        GenericResource(named_resource_spec=NamedResource(kind=kind, value=name)) for kind, name in kinds
    ]
    given.append(GenericResource(discrete_resource_spec=DiscreteResource(kind="ssd", value=2)))
    task = with_labels(**labels)
    assigned = replace(task, task=replace(task.task, generic_resources=tuple(given)))
    requests = create_request(assigned, NODE).host_config.device_requests
    assert [(one.driver, one.device_ids) for one in requests] == ([("cdi", devices)] if devices else [])
    refusing = NodeFacts(hostname="n", allowed=frozenset())
    if devices:
        with pytest.raises(Rejected, match="the setting `allow` of this node refuses its tasks"):
            create_request(assigned, refusing)


def test_a_right_that_is_not_granted_rejects_the_task() -> None:
    node = NodeFacts(hostname="n", allowed=frozenset({Right.RESOURCES}))
    assert create_request(with_labels(shm_size="1m"), node).host_config.shm_size == 1 << 20
    with pytest.raises(
        Rejected, match="the setting `allow` of this node refuses its tasks: devices,privileged"
    ):
        create_request(with_labels(privileged="true", devices="/dev/fuse"), node)
    assert not create_request(with_labels(), node).host_config.privileged


def test_a_process_is_confined_whatever_its_service_says() -> None:
    spec = ContainerSpec(image="scratch", args=("true",), labels={"skep.executor": "process"})

    def made(spec: ContainerSpec) -> ContainerConfig:
        task = AssignedTask(task=replace(a_task("t1"), spec=TaskSpec(container_spec=spec)))
        request, options = create_request(task, NODE), task_options(task, ())
        return container_config(request, ContainerDefaults(), options, NodeDefaults("n", "", Driver()))

    config = made(spec)
    assert (config.user, config.no_new_privileges) == ("65534:65534", True)
    assert made(replace(spec, user="www-data")).user == "www-data"
    with pytest.raises(InvalidArgument, match="does not work with capabilities"):
        made(replace(spec, capability_add=("CAP_SYS_ADMIN",)))
    plain = made(replace(spec, labels={}))
    assert (plain.user, plain.no_new_privileges) == ("", False)


def test_a_container_is_of_the_stack_of_its_service_and_not_of_that_in_its_own_labels() -> None:
    spec = ContainerSpec(image="busybox:1", labels={STACK_LABEL: "blog"})
    task = replace(a_task("t1"), spec=TaskSpec(container_spec=spec))
    assert task_options(AssignedTask(task=task, service_labels={STACK_LABEL: "shop"}), ()).stack == "shop"
    assert task_options(AssignedTask(task=task), ()).stack == ""


@pytest.mark.parametrize(
    ("mount", "said"),
    [
        (Mount(type="tmpfs", target="x"), "invalid mount target, must be an absolute path: x"),
        (
            Mount(type="bind", source=".", target="/x"),
            "invalid bind mount source, must be an absolute path: .",
        ),
        (
            Mount(type="volume", source="/etc", target="/x"),
            "invalid volume mount source, must not be an absolute path: /etc",
        ),
        (Mount(type="tmpfs", source="/etc", target="/x"), "invalid tmpfs source, source must be empty"),
    ],
)
def test_a_mount_that_can_be_nowhere_is_rejected_in_dockers_words(mount: Mount, said: str) -> None:
    spec = TaskSpec(container_spec=ContainerSpec(image="busybox:1", mounts=(mount,)))
    task = AssignedTask(task=replace(a_task("t1"), spec=spec))
    with pytest.raises(Rejected) as error:
        create_request(task, NODE)
    assert str(error.value) == said


def test_a_block_volume_is_its_device_and_a_rule_that_allows_its_use() -> None:
    mounts = tuple(
        Mount(type="cluster", source=name, target=f"/dev/{name}", read_only=name == "read")
        for name in ("disk", "read", "files")
    )
    task = with_labels(device_rules="c 188:* r")
    container = replace(container_spec(task), mounts=mounts)
    task = replace(task, task=replace(task.task, spec=replace(task.task.spec, container_spec=container)))
    published = [
        PublishedVolume(Path("/csi/1/mount"), "7:1"),
        PublishedVolume(Path("/csi/2/mount"), "7:2"),
        PublishedVolume(Path("/csi/3/mount")),
    ]
    host = create_request(task, NODE, published).host_config
    assert host.device_cgroup_rules == ("c 188:* r", "b 7:1 rw", "b 7:2 r")
    assert [(one.type, one.source, one.target) for one in host.mounts] == [
        ("bind", f"/csi/{number}/mount", one.target) for number, one in enumerate(mounts, 1)
    ]
    with pytest.raises(Rejected, match="cluster volumes were not assigned"):
        create_request(task, NODE, published[1:])


@pytest.mark.parametrize(("swap", "both"), [(0, 64 << 20), (16 << 20, 80 << 20), (-1, -1), (None, 7 << 20)])
def test_1_52_swap_of_a_service_is_an_option_of_its_containers(swap: int | None, both: int) -> None:
    resources = ResourceRequirements(
        limits=Limits(memory_bytes=64 << 20), swap_bytes=swap, memory_swappiness=None if swap is None else 9
    )
    labels = {"skep.memory-swap": "7m", "skep.memory-swappiness": "3"}
    spec = TaskSpec(container_spec=ContainerSpec(image="i", labels=labels), resources=resources)
    host = create_request(AssignedTask(task=replace(a_task("t1"), spec=spec)), NODE).host_config
    assert (host.memory_swap, host.memory_swappiness) == (both, 3 if swap is None else 9)
