"""From an assigned task and its image to the container that runs it.  Pure.

Source: swarmkit, agent/exec (dockerd's copy: moby, daemon/cluster/executor/container/container.go); how
image and wish are merged: moby, daemon/commit.go (merge).
"""

import re
from collections.abc import Mapping, Sequence

import msgspec

from skep.agent.executor.interface import Rejected
from skep.agent.executor.places import places
from skep.agent.executor.template import Context, expand
from skep.engine import health
from skep.engine.container import ContainerConfig, LogConfig, MountPoint
from skep.engine.images.image import ContainerDefaults
from skep.engine.signals import signal_number
from skep.engine.spec import merged_environment
from skep.errors import InvalidArgument
from skep.model.container import ContainerSpec, Mount, Privileges, TmpfsOptions
from skep.model.ids import NodeId
from skep.model.labels import LABEL_TASK_ID
from skep.model.meta import Driver
from skep.model.publishing import publish_options
from skep.model.sandbox import PublishedPort
from skep.model.service import PortConfig, PublishMode
from skep.model.task import AssignedTask

_LOG_DRIVERS = ("", "json-file", "local", "none")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kKmMgGtT])?[iI]?[bB]?")
_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What tasks may learn of the node they run on."""

    id: NodeId
    hostname: str
    os: str = "linux"
    architecture: str = ""


def container_spec(task: AssignedTask) -> ContainerSpec:
    """The task's container.  Raises: Rejected: it is no container task."""
    spec = task.task.spec.container_spec
    if spec is None:
        raise Rejected("this node runs containers only: the task has no container spec")
    return spec


def context_of(task: AssignedTask, node: NodeFacts) -> Context:
    """What ``{{.Task.Slot}}`` and its like stand for."""
    return {
        "Service": {
            "ID": task.task.service_id,
            "Name": task.service_name,
            "Labels": dict(task.service_labels),
        },
        "Node": {
            "ID": node.id,
            "Hostname": node.hostname,
            "Platform": {"Architecture": node.architecture, "OS": node.os},
        },
        "Task": {
            "ID": task.task.id,
            "Name": task.name,
            "Slot": str(task.task.slot) if task.task.slot else task.task.node_id,
        },
    }


def labels(task: AssignedTask, node: NodeFacts, image: ContainerDefaults) -> Mapping[str, str]:
    """The container's labels: the image's, the wish's, and the ones that tell whose task it is."""
    return {
        **(image.labels or {}),
        **container_spec(task).labels,
        "com.docker.swarm.node.id": node.id,
        "com.docker.swarm.service.id": task.task.service_id,
        "com.docker.swarm.service.name": task.service_name,
        "com.docker.swarm.task": "",
        LABEL_TASK_ID: task.task.id,
        "com.docker.swarm.task.name": task.name,
    }


def config(
    task: AssignedTask,
    node: NodeFacts,
    image: ContainerDefaults,
    mounts: Sequence[MountPoint],
    log_default: Driver,
) -> ContainerConfig:
    """The container's configuration.

    ``mounts``: as ``mount_point`` made them, and what the node adds.  Raises: Rejected; InvalidArgument.
    """
    spec = container_spec(task)
    context = context_of(task, node)
    entrypoint, command = invocation(spec, image)
    resources = task.task.spec.resources
    limits = resources.limits if resources else None
    reservations = resources.reservations if resources else None
    privileges = spec.privileges or Privileges()
    _require_applicable(privileges)
    dns = spec.dns_config
    return ContainerConfig(
        path=(entrypoint + command)[0],
        args=(entrypoint + command)[1:],
        entrypoint=entrypoint,
        command=command,
        env=merged_environment(image.env or (), (expand(entry, context) for entry in spec.env)),
        working_dir=spec.dir or image.working_dir,
        user=spec.user or image.user,
        groups=spec.groups,
        hostname=expand(spec.hostname, context),
        tty=spec.tty,
        open_stdin=spec.open_stdin,
        stop_signal=stop_signal(spec.stop_signal or image.stop_signal),
        stop_grace_ns=spec.stop_grace_ns,
        init=bool(spec.init),
        read_only=spec.read_only,
        mounts=tuple(mounts),
        nano_cpus=limits.nano_cpus if limits else 0,
        memory_bytes=limits.memory_bytes if limits else 0,
        memory_reservation_bytes=reservations.memory_bytes if reservations else 0,
        pids=limits.pids if limits else 0,
        ulimits=spec.ulimits,
        sysctls=spec.sysctls,
        capability_add=spec.capability_add,
        capability_drop=spec.capability_drop,
        seccomp=_seccomp(privileges),
        apparmor=_apparmor(privileges),
        no_new_privileges=privileges.no_new_privileges,
        oom_score_adj=spec.oom_score_adj,
        hosts=spec.hosts,
        nameservers=dns.nameservers if dns else (),
        search_domains=dns.search if dns else (),
        dns_options=dns.options if dns else (),
        ports=tuple(
            node_port(port, task.service_labels)
            for port in task.ports
            if port.publish_mode is PublishMode.HOST
        ),
        endpoints=places(task.task),
        exposed_ports=tuple(sorted(image.exposed_ports or {})),
        healthcheck=health.merged(spec.healthcheck, image.healthcheck),
        log=log_config(task.task.spec.log_driver or log_default),
    )


def node_port(port: PortConfig, service_labels: Mapping[str, str]) -> PublishedPort:
    """A port in host mode, on the address that the service's labels name.

    Raises: Rejected: an IPv6 address, on which ports in host mode do not answer.
    """
    host_ip = publish_options(service_labels, port).host_ip
    if ":" in host_ip:
        raise Rejected(f"port {port.target_port}/{port.protocol} in host mode has no IPv6: {host_ip}")
    return PublishedPort(host_ip=host_ip, **msgspec.structs.asdict(port))


def stop_signal(name: str) -> str:
    """``name``, which a process can be told to end with; empty: SIGTERM.

    Raises: Rejected: there is no such signal.
    """
    try:
        signal_number(name or "SIGTERM")
    except InvalidArgument as error:
        raise Rejected(str(error)) from error
    return name


def invocation(spec: ContainerSpec, image: ContainerDefaults) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Entrypoint and command.

    A command in the wish replaces both of the image's; arguments alone replace only the image's command.
    Raises: Rejected: there is nothing to run.
    """
    if spec.command:
        return spec.command, spec.args
    entrypoint, command = image.entrypoint or (), spec.args or image.cmd or ()
    if not entrypoint and not command:
        raise Rejected("No command specified")
    return entrypoint, command


def mount_point(mount: Mount, source: str, name: str) -> MountPoint:
    """A mount of the wish.  ``source``: what it is on this node; ``name``: the volume's."""
    if not mount.target.startswith("/"):
        raise Rejected(f"invalid mount target, must be an absolute path: {mount.target}")
    match mount.type:
        case "bind":
            options = mount.bind_options
            return MountPoint(
                type="bind",
                source=source,
                destination=mount.target,
                read_only=mount.read_only,
                propagation=options.propagation if options else "",
                options=("bind",) if options and options.non_recursive else (),
            )
        case "volume" | "":
            return MountPoint(
                type="volume",
                source=source,
                name=name,
                driver="local",
                destination=mount.target,
                read_only=mount.read_only,
            )
        case "tmpfs":
            return MountPoint(
                type="tmpfs",
                destination=mount.target,
                read_only=mount.read_only,
                options=_tmpfs_options(mount.tmpfs_options or TmpfsOptions()),
            )
        case _:
            raise Rejected(f'mount type "{mount.type}" is not supported by this node')


def log_config(driver: Driver) -> LogConfig:
    """How output is kept.  Raises: Rejected: a driver that does not exist here; InvalidArgument: a bad
    option."""
    if driver.name not in _LOG_DRIVERS:
        raise Rejected(f"logger: no log driver named '{driver.name}' is registered")
    try:
        max_files = int(driver.options.get("max-file", "1"))
    except ValueError:
        raise InvalidArgument(f"invalid value for max-file: {driver.options['max-file']}") from None
    if max_files < 1:
        raise InvalidArgument("max-file cannot be less than 1")
    max_size = driver.options.get("max-size", "-1")
    return LogConfig(
        type=driver.name or "json-file",
        options=driver.options,
        max_size_bytes=0 if max_size.startswith("-") else parse_size(max_size),
        max_files=max_files,
    )


def parse_size(text: str) -> int:
    """Bytes of ``10m``, ``1.5GiB``, ``4096``.  Raises: InvalidArgument.

    Source: docker/go-units, size.go (RAMInBytes).
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidArgument(f"invalid size: '{text}'")
    return int(float(match.group(1)) * _FACTORS[(match.group(2) or "").lower()])


def _tmpfs_options(options: TmpfsOptions) -> tuple[str, ...]:
    chosen = ["noexec", "nosuid", "nodev", "rprivate"]
    if options.mode:
        chosen.append(f"mode={options.mode:o}")
    if options.size_bytes:
        chosen.append(f"size={options.size_bytes}")
    for option in options.options:
        word = "=".join(option)
        opposite = word.removeprefix("no") if word.startswith("no") else f"no{word}"
        chosen = [one for one in chosen if one not in (word, opposite)] + [word]
    return tuple(chosen)


def _require_applicable(privileges: Privileges) -> None:
    """Raises: Rejected: what confines on Windows, in an engine's words, or by SELinux."""
    if (credential := privileges.credential_spec) is not None:
        for source, value in msgspec.structs.asdict(credential).items():
            if value:
                raise Rejected(f'invalid --security-opt 2: "credentialspec={source}://{value}"')
    labels = privileges.selinux_context
    if labels is not None and (labels.user or labels.role or labels.type or labels.level):
        raise Rejected("this node gives containers no SELinux labels: leave the SELinuxContext out")


def _apparmor(privileges: Privileges) -> str:
    is_off = privileges.app_armor is not None and privileges.app_armor.mode == "disabled"
    return "unconfined" if is_off else "default"


def _seccomp(privileges: Privileges) -> str:
    seccomp = privileges.seccomp
    if seccomp is None or seccomp.mode in ("", "default"):
        return "default"
    if seccomp.mode == "unconfined":
        return "unconfined"
    return seccomp.profile.decode(errors="replace")
