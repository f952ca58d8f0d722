"""Translates an assigned task into the request from which the engine creates its container.  Pure.

Source: swarmkit, agent/exec (dockerd's copy: moby, daemon/cluster/executor/container/container.go), and
container_operations.go there (ingress comes first).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import ip_interface, ip_network
from typing import Any

import msgspec
from msgspec.structs import replace

from skep.agent.executor.interface import Rejected
from skep.agent.tasks.cluster_volumes import PublishedVolume
from skep.engine.confinement.machine import DeviceMapping, DeviceRequest, ThrottleDevice
from skep.engine.containers.container import MountPoint
from skep.engine.containers.request import CreateRequest, HostConfig, LogOptions, TaskOptions
from skep.gotemplate import Struct
from skep.model.container import ContainerSpec, Mount, Privileges
from skep.model.door.settings import NAME as DOOR_VOLUME
from skep.model.door.settings import is_door
from skep.model.network import MTU_OPTION, MTUS, Network, is_ingress
from skep.model.networks.data_planes import driver_of, is_overlay
from skep.model.networks.overlays import VXLAN_ID_MAX, VXLAN_OPTION, head_of, options_of
from skep.model.networks.publishing import publish_options
from skep.model.networks.sandbox import EndpointConfig, PublishedPort
from skep.model.networks.tables import NetworkHead
from skep.model.options import templates
from skep.model.options.labels import LABEL_TASK_ID, relabeled
from skep.model.permissions.processes import USER, check_process, is_process
from skep.model.permissions.rights import (
    ALL_RIGHTS,
    MachineRights,
    Right,
    is_reserved_by,
    rights_of,
    rights_text,
)
from skep.model.service import GenericResource, PublishMode, ResourceRequirements
from skep.model.task import AssignedTask, NetworkAttachment, Task
from skep.model.values.stacks import stack_of
from skep.model.values.times import SECOND_NS


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about the node for placeholders such as ``{{.Node.Hostname}}``, and the rights that it grants to tasks."""

    hostname: str
    os: str = "linux"
    architecture: str = ""
    allowed: frozenset[Right] = ALL_RIGHTS
    """Rights over the machine that the node grants to tasks."""


def container_spec(task: AssignedTask) -> ContainerSpec:
    """Return the task's container spec.  Raises: Rejected: it is not a container task."""
    spec = task.task.spec.container_spec
    if spec is None:
        raise Rejected("this node runs containers only: the task has no container spec")
    return spec


def context_of(task: AssignedTask, node: NodeFacts) -> Struct:
    """Return the values that placeholders like ``{{.Task.Slot}}`` can use."""
    return templates.context(
        service_id=task.task.service_id,
        service_name=task.service_name,
        service_labels=task.service_labels,
        node_id=task.task.node_id,
        hostname=node.hostname,
        os=node.os,
        architecture=node.architecture,
        task_id=task.task.id,
        task_name=task.name,
        slot=str(task.task.slot) if task.task.slot else task.task.node_id,
    )


def create_request(
    task: AssignedTask, node: NodeFacts, cluster_volumes: Sequence[PublishedVolume] = ()
) -> CreateRequest:
    """Return the request for the task's container.

    Args:
        cluster_volumes: Published volumes for the task's mounts of type ``cluster``, in the order of these mounts.

    Raises:
        Rejected: The task cannot run on this node.
        InvalidArgument: A placeholder is invalid, or a process has an option that it cannot have.
    """
    spec = templates.expand_container(container_spec(task), context_of(task, node))
    check_process(spec)
    _refuse_driver_options(task.task)
    _refuse_volume_of_door(task, spec)
    _refuse_isolation(spec)
    resources = task.task.spec.resources or ResourceRequirements()
    limits, reservations = resources.limits, resources.reservations
    driver, dns = task.task.spec.log_driver, spec.dns_config
    return CreateRequest(
        image=spec.image,
        hostname=spec.hostname,
        user=spec.user or (USER if is_process(spec) else ""),
        tty=spec.tty,
        open_stdin=spec.open_stdin,
        env=(*spec.env, *_resource_variables(task.task)),
        entrypoint=spec.command or None,
        cmd=spec.args,
        healthcheck=spec.healthcheck,
        working_dir=spec.dir,
        labels=spec.labels,
        stop_signal=spec.stop_signal,
        stop_timeout=math.ceil(spec.stop_grace_ns / SECOND_NS),
        host_config=HostConfig(
            log_config=LogOptions(type=driver.name, config=driver.options)
            if driver is not None
            else LogOptions(),
            cap_add=spec.capability_add,
            cap_drop=spec.capability_drop,
            dns=dns.nameservers if dns else (),
            dns_options=dns.options if dns else (),
            dns_search=dns.search if dns else (),
            group_add=spec.groups,
            oom_score_adj=spec.oom_score_adj,
            readonly_rootfs=spec.read_only,
            security_opt=_security_options(_privileges(spec)),
            mounts=_bound(spec.mounts, cluster_volumes),
            sysctls=spec.sysctls,
            network_mode=_network_mode(task.task),
            memory=limits.memory_bytes if limits else 0,
            memory_reservation=reservations.memory_bytes if reservations else 0,
            nano_cpus=limits.nano_cpus if limits else 0,
            pids_limit=limits.pids if limits else 0,
            ulimits=spec.ulimits,
            init=spec.init,
            **_machine_options(task.task, node, volume_device_rules(spec.mounts, cluster_volumes))
            | _swap(resources),
        ),
    )


def _bound(mounts: Sequence[Mount], cluster_volumes: Sequence[PublishedVolume]) -> tuple[Mount, ...]:
    """Return ``mounts`` with each cluster volume replaced by a bind mount.

    Raises:
        Rejected: A mount is invalid, or the task has no volume for it.
    """
    for mount in mounts:
        _check_mount(mount)
    wanted = sum(mount.type == "cluster" for mount in mounts)
    if wanted != len(cluster_volumes):
        raise Rejected("the task's cluster volumes were not assigned with it")
    left = iter(cluster_volumes)
    return tuple(
        replace(mount, type="bind", source=str(next(left).path), cluster_options=None)
        if mount.type == "cluster"
        else mount
        for mount in mounts
    )


def _refuse_isolation(spec: ContainerSpec) -> None:
    if spec.isolation not in ("", "default"):
        raise Rejected(f"invalid isolation '{spec.isolation}' on linux")


def _refuse_volume_of_door(task: AssignedTask, spec: ContainerSpec) -> None:
    """Refuse the front door's volume to other tasks.  HAProxy's sockets are in it, by which it could show its keys.

    Managers cannot do that, because placeholders in the volume's name are expanded here.

    Raises: Rejected.
    """
    if is_door(task.service_labels):
        return
    if any(mount.type == "volume" and mount.source == DOOR_VOLUME for mount in spec.mounts):
        raise Rejected(f"only tasks of the front door may mount the volume {DOOR_VOLUME}. Use another volume")


def _check_mount(mount: Mount) -> None:
    """Check a mount.  Raises: Rejected, in Docker's words (moby, daemon/cluster/executor/container/validate.go)."""
    if not mount.target.startswith("/"):
        raise Rejected(f"invalid mount target, must be an absolute path: {mount.target}")
    match mount.type:
        case "bind" if not mount.source.startswith("/"):
            raise Rejected(f"invalid bind mount source, must be an absolute path: {mount.source}")
        case "volume" if mount.source.startswith("/"):
            raise Rejected(f"invalid volume mount source, must not be an absolute path: {mount.source}")
        case "tmpfs" if mount.source:
            raise Rejected("invalid tmpfs source, source must be empty")


def volume_device_rules(
    mounts: Iterable[Mount], cluster_volumes: Iterable[PublishedVolume]
) -> tuple[str, ...]:
    """Return the device rules for the container's block volumes.  A bind mount alone does not allow access."""
    ours = [mount for mount in mounts if mount.type == "cluster"]
    return tuple(
        f"b {volume.device} {'r' if mount.read_only else 'rw'}"
        for mount, volume in zip(ours, cluster_volumes, strict=True)
        if volume.device
    )


def _swap(resources: ResourceRequirements) -> dict[str, Any]:
    """Return the options for the swap that the service's resources request, which override the container's labels."""
    found: dict[str, Any] = {}
    swap, limits = resources.swap_bytes, resources.limits
    if swap is not None and limits is not None and limits.memory_bytes:
        found["memory_swap"] = -1 if swap < 0 else limits.memory_bytes + swap
    if resources.memory_swappiness is not None:
        found["memory_swappiness"] = resources.memory_swappiness
    return found


def _machine_options(task: Task, node: NodeFacts, device_rules: tuple[str, ...]) -> dict[str, Any]:
    """Return the options of the create request for rights over the machine and for access to block volumes.

    Raises:
        Rejected: This node does not grant a right.
    """
    rights = rights_of(task.spec.container_spec)
    refused = rights.kinds - node.allowed
    if refused:
        raise Rejected(f"the setting `allow` of this node refuses its tasks: {rights_text(refused)}")
    cdi_devices = (*rights.cdi_devices, *_assigned_devices(rights, task.generic_resources))
    requests = [DeviceRequest(driver="cdi", device_ids=cdi_devices)] if cdi_devices else []
    gpus = rights.gpus
    if gpus is not None and not gpus.is_reserved:
        requests.append(DeviceRequest(count=gpus.count, device_ids=gpus.ids, capabilities=(("gpu",),)))
    return {
        "privileged": rights.privileged,
        "devices": tuple(
            DeviceMapping(
                path_on_host=one.path, path_in_container=one.path_in_container, cgroup_permissions=one.access
            )
            for one in rights.devices
        ),
        "device_cgroup_rules": (*rights.device_rules, *device_rules),
        "device_requests": tuple(requests),
        "pid_mode": rights.pid,
        "ipc_mode": rights.ipc,
        "uts_mode": rights.uts,
        "shm_size": rights.shm_bytes,
        "cpu_shares": rights.cpu_shares,
        "cpuset_cpus": rights.cpuset_cpus,
        "cpuset_mems": rights.cpuset_mems,
        "memory_swap": rights.memory_swap,
        "memory_swappiness": rights.memory_swappiness,
        "blkio_weight": rights.blkio_weight,
        "blkio_device_read_bps": _throttles(rights.read_bps),
        "blkio_device_write_bps": _throttles(rights.write_bps),
        "blkio_device_read_iops": _throttles(rights.read_iops),
        "blkio_device_write_iops": _throttles(rights.write_iops),
    }


def _assigned_devices(rights: MachineRights, assigned: Iterable[GenericResource]) -> Iterator[str]:
    """Yield the CDI names of the assigned resources that the container gets as devices."""
    for one in assigned:
        named = one.named_resource_spec
        if named is not None and is_reserved_by(rights, named.kind):
            yield f"{named.kind}={named.value}"


def _throttles(rates: Iterable[tuple[str, int]]) -> tuple[ThrottleDevice, ...]:
    return tuple(ThrottleDevice(path=path, rate=rate) for path, rate in rates)


def task_options(
    task: AssignedTask, mounts: Sequence[MountPoint], own_networks: Sequence[EndpointConfig] = ()
) -> TaskOptions:
    """Return the options that have no field in the request.

    Args:
        mounts: Mounts of secrets and configs.
        own_networks: Endpoints on cluster networks that this node creates itself.

    Raises:
        Rejected: The task cannot run on this node.
    """
    spec = container_spec(task)
    return TaskOptions(
        labels={
            "com.docker.swarm.node.id": task.task.node_id,
            "com.docker.swarm.service.id": task.task.service_id,
            "com.docker.swarm.service.name": task.service_name,
            "com.docker.swarm.task": "",
            LABEL_TASK_ID: task.task.id,
            "com.docker.swarm.task.name": task.name,
        },
        endpoints=(*endpoint_configs(task.task), *own_networks),
        ports=tuple(published_ports(task)),
        mounts=tuple(mounts),
        hosts=spec.hosts,
        stop_grace_ns=spec.stop_grace_ns,
        stack=stack_of(task.service_labels),
        may_log_anywhere=task.trust.logs,
        relabel=relabeled(spec.labels),
    )


def _resource_variables(task: Task) -> Iterator[str]:
    """Yield ``DOCKER_RESOURCE_GPU=a,b``: the generic resources that the scheduler assigned to the task.

    Source: swarmkit, api/genericresource/helpers.go (EnvFormat).
    """
    given: dict[str, list[str]] = {}
    for one in task.generic_resources:
        if (named := one.named_resource_spec) is not None:
            given.setdefault(named.kind, []).append(named.value)
        if (discrete := one.discrete_resource_spec) is not None:
            given.setdefault(discrete.kind, []).append(str(discrete.value))
    for kind, values in given.items():
        yield f"DOCKER_RESOURCE_{kind.upper()}={','.join(values)}"


def _refuse_driver_options(task: Task) -> None:
    """Refuse ``driver-opt`` options of network attachments, because this node's networks support none.

    Raises: Rejected.
    """
    for network in task.spec.networks:
        for name in network.driver_opts:
            raise Rejected(f"network {network.target}: driver option {name} is not supported by this node")


def _network_mode(task: Task) -> str:
    """Return ``host`` if the task uses the node's own network, which must be its only network.

    Source: moby, daemon/cluster/executor/container/container.go (hostConfig: the first network, if it is predefined).
    """
    attached = [one.network for one in task.networks_attachments if one.network is not None]
    if not any(driver_of(one) == "host" for one in attached):
        return ""
    if len(attached) > 1:
        others = [one.spec.name for one in attached if driver_of(one) != "host"]
        hint = ", because it publishes ports through the routing mesh: publish them with mode=host"
        raise Rejected(
            "conflicting options: a container on the network host cannot be on another one: "
            + ", ".join(others)
            + (hint if any(map(is_ingress, attached)) else "")
        )
    return "host"


def published_ports(task: AssignedTask) -> Iterator[PublishedPort]:
    """Yield the task's ports in host mode, on the addresses that the service's labels name.

    Raises:
        Rejected: SCTP on an IPv6 address.
    """
    ports = [port for port in task.ports if port.publish_mode is PublishMode.HOST]
    for port, options in publish_options(task.service_labels, ports):
        if ":" in options.host_ip and port.protocol == "sctp":
            raise Rejected(
                f"port {port.target_port}/sctp in host mode does not support IPv6: {options.host_ip}"
            )
        yield PublishedPort(host_ip=options.host_ip, **msgspec.structs.asdict(port))


def _privileges(spec: ContainerSpec) -> Privileges:
    given = spec.privileges or Privileges()
    # The machine's programs with the set-user-ID bit must not make a process root.
    return replace(given, no_new_privileges=given.no_new_privileges or is_process(spec))


def _security_options(privileges: Privileges) -> tuple[str, ...]:
    """Return the ``--security-opt`` values of the task's container.

    Raises:
        Rejected: The task has Windows options.  The message is Docker's.
    """
    if (credential := privileges.credential_spec) is not None:
        for source, value in msgspec.structs.asdict(credential).items():
            if value:
                raise Rejected(f'invalid --security-opt 2: "credentialspec={source}://{value}"')
    found = ["no-new-privileges"] if privileges.no_new_privileges else []
    if (labels := privileges.selinux_context) is not None:
        given = (("user", labels.user), ("role", labels.role), ("level", labels.level), ("type", labels.type))
        found += ["label=disable"] * labels.disable + [f"label={name}:{one}" for name, one in given if one]
    if privileges.app_armor is not None and privileges.app_armor.mode == "disabled":
        found.append("apparmor=unconfined")
    seccomp = privileges.seccomp
    if seccomp is not None and seccomp.mode not in ("", "default"):
        profile = "unconfined" if seccomp.mode == "unconfined" else seccomp.profile.decode(errors="replace")
        if not profile:  # an empty profile in the option would mean the default
            raise Rejected("Decoding seccomp profile failed: it is empty")
        found.append(f"seccomp={profile}")
    return tuple(found)


def endpoint_configs(task: Task) -> tuple[EndpointConfig, ...]:
    """Return the task's overlay networks in the order of its interfaces: ingress first, the others as attached.

    Raises:
        Rejected: An attachment is invalid.
    """
    found = [
        _endpoint_config(one)
        for one in task.networks_attachments
        if one.network is not None and is_overlay(one.network)
    ]
    return tuple(sorted(found, key=lambda one: not one.head.is_ingress))


def own_networks(task: Task, head_of_own: Callable[[Network], NetworkHead]) -> tuple[EndpointConfig, ...]:
    """Return the endpoints on those networks of ``task`` that use a device of the machine (for example macvlan).

    This node, not a manager, assigns their addresses.

    Args:
        head_of_own: Creates such a network here.  Raises: SkepError.
    """
    return tuple(
        EndpointConfig(head=head_of_own(one.network), addresses=(), aliases=one.aliases)
        for one in task.networks_attachments
        if one.network is not None and driver_of(one.network) in ("macvlan", "ipvlan")
    )


def network_head(network: Network) -> NetworkHead:
    """Return the described part of an attachment's network.  Raises: ValueError: a value is invalid."""
    options = options_of(network)
    mtu = int(options.get(MTU_OPTION) or 0)
    if mtu and mtu not in MTUS:
        raise ValueError(f"invalid MTU: {mtu}")
    words = options.get(VXLAN_OPTION, "")
    if not all(0 < int(word) <= VXLAN_ID_MAX for word in words.split(",") if word.strip()):
        raise ValueError(f"invalid VXLAN id in {words}")
    for config in network.ipam_options.configs if network.ipam_options is not None else ():
        ip_network(config.subnet, strict=False)
    return head_of(network)


def _endpoint_config(attachment: NetworkAttachment) -> EndpointConfig:
    assert attachment.network is not None, "the caller has checked"
    network = attachment.network
    try:
        head = network_head(network)
        addresses: Sequence[str] = [str(ip_interface(one)) for one in attachment.addresses]
    except ValueError as error:
        raise Rejected(f"invalid attachment to network {network.spec.name}: {error}") from error
    if not addresses:
        raise Rejected(f"no address on network {network.spec.name}")
    return EndpointConfig(
        head=head,
        addresses=tuple(sorted(addresses, key=lambda one: ":" in one)),
        aliases=attachment.aliases,
    )
