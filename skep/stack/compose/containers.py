"""Conversion of the keys of a service that configure its containers."""

import ipaddress
import re
from collections.abc import Iterable
from typing import Any, Final

from skep.model.container import (
    AppArmorOpts,
    BindOptions,
    ClusterOptions,
    ContainerSpec,
    DNSConfig,
    HealthConfig,
    ImageMountOptions,
    Mount,
    Privileges,
    SeccompOpts,
    SELinuxContext,
    TmpfsOptions,
    Ulimit,
    VolumeOptions,
)
from skep.model.values.meta import Driver
from skep.stack.compose.document import YamlNode
from skep.stack.compose.reading import MappingReader

_HOST_GATEWAY: Final = "host-gateway"
"""Stands for the node's address in ``extra_hosts``, as in Docker."""
_NO_SUCH_FIELD: Final = "cluster services do not have this setting"
_REFUSED: Final = {
    "annotations": "the runtime does not get annotations: use labels",
    "cgroup": f"{_NO_SUCH_FIELD}: each container has its own cgroup namespace",
    "cgroup_parent": f"{_NO_SUCH_FIELD}: set limits in deploy.resources",
    "cpu_count": "only Windows has it: use deploy.resources.limits.cpus",
    "cpu_percent": "only Windows has it: use deploy.resources.limits.cpus",
    "cpu_rt_period": "real-time scheduling of processes is not supported",
    "cpu_rt_runtime": "real-time scheduling of processes is not supported",
    "credential_spec": "only Windows has credential specs",
    "domainname": "put the full domain name into hostname",
    "external_links": "put both services on one network, where they reach each other by name",
    "mac_address": "a task's address comes from the cluster",
    "models": "a cluster does not run language models itself: run the model as a service",
    "oom_kill_disable": "a container that exceeds its memory limit is always killed",
    "post_start": "hooks are not supported: let the entrypoint do it, or a service with depends_on",
    "pre_start": "hooks are not supported: use a service with depends_on service_completed_successfully",
    "pre_stop": "hooks are not supported: handle stop_signal",
    "provider": "provider programs are not supported: run the program as a service",
    "runtime": "tasks run under their node's default runtime",
    "storage_opt": "the size of a container's layer cannot be limited",
    "use_api_socket": "mount /var/run/docker.sock in a service on a manager",
    "userns_mode": "a service cannot choose it: the node's userns-remap applies to all its tasks",
    "volumes_from": "name the volume in both services",
}
_IGNORED: Final = {
    "attach": "it only affects `docker compose up` in a terminal",
    "develop": "it only affects `docker compose watch`",
    "expose": "services on one network reach all of each other's ports",
    "pull_refresh_after": "each deploy looks up the image again",
}
_MACHINE_PATH: Final = re.compile(r"[./~]|[A-Za-z]:[\\/]")
_LABEL_OPTION: Final = re.compile(r"(user|role|type|level):.+")
_PROPAGATIONS: Final = ("rprivate", "private", "rshared", "shared", "rslave", "slave")
_MODES: Final = (*_PROPAGATIONS, "ro", "rw", "nocopy", "z", "Z", "cached", "delegated", "consistent")


class StackVolumes:
    """The volumes of the file's top level, which services mount."""

    def __init__(self, names: dict[str, tuple[str, dict[str, str], Driver | None]]) -> None:
        self._names = names
        """Maps the name in the file to the name in the cluster, the labels and the driver."""

    def mount(self, source: str, target: str, read_only: bool, no_copy: bool, subpath: str) -> Mount:
        """Return a mount of a volume.  Raises: ValueError: no such volume."""
        options = VolumeOptions(no_copy=no_copy, subpath=subpath)
        if source:
            source, labels, driver = self._named(source)
            options = VolumeOptions(no_copy=no_copy, subpath=subpath, labels=labels, driver_config=driver)
        return Mount(
            type="volume",
            source=source,
            target=target,
            read_only=read_only,
            volume_options=None if options == VolumeOptions() else options,
        )

    def cluster_mount(self, source: str, target: str, read_only: bool) -> Mount:
        """Return a mount of a cluster volume or volume group (``group:NAME``).  Raises: ValueError: no such volume.

        Source: docker/cli, cli/compose/convert/volume.go (handleClusterToMount).
        """
        if not source:
            raise ValueError("it has no source: expected a volume, or group:NAME")
        if not source.startswith("group:"):
            source = self._named(source)[0]
        options = ClusterOptions()
        return Mount(
            type="cluster", source=source, target=target, read_only=read_only, cluster_options=options
        )

    def _named(self, source: str) -> tuple[str, dict[str, str], Driver | None]:
        if source not in self._names:
            raise ValueError(f"there is no volume {source}: declare it in the volumes at the top of the file")
        return self._names[source]


def container_of(service: MappingReader, volumes: StackVolumes) -> ContainerSpec:
    """Return the container spec without image, secrets, configs and labels."""
    for key, why in _REFUSED.items():
        service.refuse(key, why)
    for key, why in _IGNORED.items():
        service.ignore(key, why)
    _check_links(service)
    if service.text("isolation") not in ("", "default"):
        service.problem("isolation", "only Windows has it")
    if (pull := service.text("pull_policy")) not in ("", "always", "missing", "if_not_present", "build"):
        service.problem(
            "pull_policy", f"{pull!r} cannot be kept by a cluster: its nodes get an image by its digest"
        )
    environment = service.pairs("environment")
    return ContainerSpec(
        command=service.words("entrypoint") or (),
        args=service.words("command") or (),
        hostname=service.text("hostname"),
        env=tuple(
            sorted(name if value is None else f"{name}={value}" for name, value in environment.items())
        ),
        dir=service.text("working_dir"),
        user=service.text("user"),
        groups=service.texts("group_add"),
        privileges=_privileges(service),
        init=service.boolean("init"),
        stop_signal=service.text("stop_signal"),
        tty=service.boolean("tty") or False,
        open_stdin=service.boolean("stdin_open") or False,
        read_only=service.boolean("read_only") or False,
        mounts=_mounts(service, volumes),
        stop_grace_period=service.duration("stop_grace_period"),
        healthcheck=_healthcheck(service.reader("healthcheck")),
        hosts=hosts_of(service),
        dns_config=_dns(service),
        sysctls=service.labels("sysctls"),
        capability_add=_capabilities(service.texts("cap_add")),
        capability_drop=_capabilities(service.texts("cap_drop")),
        ulimits=_ulimits(service),
        oom_score_adj=service.integer("oom_score_adj", -1000, 1000) or 0,
    )


def _check_links(service: MappingReader) -> None:
    """Report links with an alias.  A link to a service by its own name is fine, because every network resolves that
    name.
    """
    for text in service.texts("links"):
        target, _, alias = text.partition(":")
        if alias and alias != target:
            service.problem(
                "links", f"{text}: give {target} the alias {alias} in one of its networks instead"
            )


def _capabilities(names: Iterable[str]) -> tuple[str, ...]:
    upper = (name.upper() for name in names)
    return tuple(sorted({name if name == "ALL" else f"CAP_{name.removeprefix('CAP_')}" for name in upper}))


def _privileges(service: MappingReader) -> Privileges | None:
    made: dict[str, Any] = {}
    labels: dict[str, Any] = {}
    for text in service.texts("security_opt"):
        name, _, value = text.replace("=", ":", 1).partition(":")
        match name, value:
            case "no-new-privileges", "" | "true" | "false":
                made["no_new_privileges"] = value != "false"
            case "seccomp", "unconfined":
                made["seccomp"] = SeccompOpts(mode="unconfined")
            case "apparmor", "unconfined":
                made["app_armor"] = AppArmorOpts(mode="disabled")
            case "label", _ if value == "disable" or _LABEL_OPTION.fullmatch(value):
                part, _, text = value.partition(":")
                labels[part] = text or True
            case _:
                service.problem("security_opt", f"{text} is not supported for cluster services")
    if labels:
        made["selinux_context"] = SELinuxContext(**labels)
    return Privileges(**made) if made else None


def _healthcheck(check: MappingReader | None) -> HealthConfig | None:
    if check is None:
        return None
    disable = check.boolean("disable")
    found = check.node("test")
    test: tuple[str, ...] = ()
    if found is not None:
        test = check.texts("test") if found.items is not None else ("CMD-SHELL", check.text("test"))
        if found.items is not None and test[:1] not in (("CMD",), ("CMD-SHELL",), ("NONE",), ()):
            check.problem("test", f"a list begins with CMD, CMD-SHELL or NONE, not {test[0]!r}")
    if disable and test:
        check.problem("disable", "test and disable can't be set at the same time")
    made = HealthConfig(
        test=("NONE",) if disable else test,
        interval=check.duration("interval") or 0,
        timeout=check.duration("timeout") or 0,
        start_period=check.duration("start_period") or 0,
        start_interval=check.duration("start_interval") or 0,
        retries=check.integer("retries", 0, 1 << 31) or 0,
    )
    check.close()
    return made


def hosts_of(service: MappingReader) -> tuple[str, ...]:
    """Return ``extra_hosts`` of a service or a build as lines of a hosts file."""
    made: list[str] = []
    found = service.node("extra_hosts")
    if found is not None and found.entries is not None:
        for name, node in found.entries.items():
            addresses = node.items if node.items is not None else (node,)
            made += [f"{_address(service, 'extra_hosts', one.text)} {name}" for one in addresses]
        return tuple(made)
    for text in service.texts("extra_hosts"):
        name, separator, address = text.partition("=" if "=" in text else ":")
        if not (separator and name and address):
            service.problem("extra_hosts", f"expected NAME=ADDRESS, not {text!r}")
        made.append(f"{_address(service, 'extra_hosts', address)} {name}")
    return tuple(made)


def _address(service: MappingReader, key: str, text: str) -> str:
    """Return an address of ``key`` without brackets.  A resolver would pass over a text that is none."""
    address = text.strip("[]")
    if address == _HOST_GATEWAY and key == "extra_hosts":
        return address
    try:
        ipaddress.ip_address(address)
    except ValueError:
        service.problem(key, f"expected an IP address, not {text!r}")
    return address


def _dns(service: MappingReader) -> DNSConfig | None:
    made = DNSConfig(
        nameservers=tuple(_address(service, "dns", one) for one in service.texts("dns")),
        search=service.texts("dns_search"),
        options=service.texts("dns_opt"),
    )
    return None if made == DNSConfig() else made


def _ulimits(service: MappingReader) -> tuple[Ulimit, ...]:
    limits = service.reader("ulimits")
    if limits is None:
        return ()
    made: list[Ulimit] = []
    for name, node in sorted(limits.names().items()):
        if node.entries is None:
            amount = limits.integer(name, -1) or 0
            made.append(Ulimit(name=name, soft=amount, hard=amount))
            continue
        both = limits.reader(name)
        assert both is not None
        made.append(Ulimit(name=name, soft=both.integer("soft", -1) or 0, hard=both.integer("hard", -1) or 0))
        both.close()
    return tuple(made)


# --- mounts ------------------------------------------------------------------------------------------------------


def _mounts(service: MappingReader, volumes: StackVolumes) -> tuple[Mount, ...]:
    made: list[Mount] = []
    for node, path in service.each("volumes"):
        reader = MappingReader(node, path, service.report) if node.entries is not None else None
        try:
            made.append(_long_mount(reader, volumes) if reader is not None else _short_mount(node, volumes))
        except ValueError as error:
            service.problem_at(node, path, str(error))
    for text in service.texts("tmpfs"):
        target, _, options = text.partition(":")
        made.append(Mount(type="tmpfs", target=target, tmpfs_options=_tmpfs(service, options)))
    taken: dict[str, None] = {}
    for mount in made:
        if mount.target in taken:
            service.problem("volumes", f"two mounts have the target {mount.target}")
        taken[mount.target] = None
    return tuple(made)


def _tmpfs(service: MappingReader, text: str) -> TmpfsOptions | None:
    made: dict[str, Any] = {"options": []}
    for word in filter(None, text.split(",")):
        name, separator, value = word.partition("=")
        if name == "size":
            made["size_bytes"] = (
                service.size_of(YamlNode(value, service.place, text=value), service.at("tmpfs")) or 0
            )
        elif name == "mode" and re.fullmatch(r"[0-7]{3,5}", value):
            made["mode"] = int(value, 8)
        else:
            made["options"].append((name, value) if separator else (name,))
    return TmpfsOptions(**made | {"options": tuple(made["options"])}) if text else None


def _short_mount(node: YamlNode, volumes: StackVolumes) -> Mount:
    if not isinstance(node.value, str):
        raise ValueError(
            f"expected SOURCE:TARGET, or a mapping with type, source and target, not {node.kind}"
        )
    parts = node.text.split(":")
    if len(parts) > 3 or not all(parts):
        raise ValueError(f"expected SOURCE:TARGET[:OPTIONS], not {node.text!r}")
    source, target, modes = ("", parts[0], "") if len(parts) == 1 else (*parts, "")[:3]
    words = modes.split(",") if modes else []
    if unknown := [word for word in words if word not in _MODES]:
        raise ValueError(f"the option {unknown[0]!r} is unknown: expected some of {', '.join(_MODES)}")
    if not target.startswith("/"):
        raise ValueError(f"the target {target!r} is not an absolute path in the container")
    read_only = "ro" in words
    if read_only and "rw" in words:
        raise ValueError(f"{modes!r} is both read-only and writable")
    propagation = next((word for word in words if word in _PROPAGATIONS), "")
    if _MACHINE_PATH.match(source):
        if "nocopy" in words:
            raise ValueError("nocopy concerns volumes, and this is a directory of the machine")
        options = BindOptions(propagation=propagation) if propagation else None
        return Mount(type="bind", source=source, target=target, read_only=read_only, bind_options=options)
    if propagation:
        raise ValueError(f"{propagation} concerns directories of the machine, and this is a volume")
    return volumes.mount(source, target, read_only, "nocopy" in words, "")


def _long_mount(reader: MappingReader, volumes: StackVolumes) -> Mount:
    kind = reader.choice("type", "volume", "bind", "tmpfs", "image", "cluster", "npipe") or "volume"
    source, target = reader.text("source"), reader.text("target")
    read_only = reader.boolean("read_only") or False
    reader.ignore("consistency", "it only affects Docker Desktop")
    parts = {name: reader.reader(name) for name in ("bind", "volume", "tmpfs", "image", "cluster")}
    for name, part in parts.items():
        if part is not None and name != kind:
            reader.problem(name, f"{name} options are incompatible with type {kind}")
    if not target:
        raise ValueError("it has no target")
    made = _mount(kind, source, target, read_only, parts.get(kind), reader, volumes)
    for part in parts.values():
        if part is not None:
            part.close()
    reader.close()
    return made


def _mount(
    kind: str,
    source: str,
    target: str,
    read_only: bool,
    options: MappingReader | None,
    mount: MappingReader,
    volumes: StackVolumes,
) -> Mount:
    match kind:
        case "bind":
            bind = _bind_options(options)
            return Mount(type=kind, source=source, target=target, read_only=read_only, bind_options=bind)
        case "tmpfs":
            if source:
                mount.problem("source", "a tmpfs has no source")
            made = None
            if options is not None:
                size, mode = options.size("size"), options.mode("mode")
                made = TmpfsOptions(size_bytes=size or 0, mode=mode or 0)
            return Mount(type=kind, target=target, read_only=read_only, tmpfs_options=made)
        case "image":
            subpath = options.text("subpath") if options is not None else ""
            inside = ImageMountOptions(subpath=subpath) if subpath else None
            return Mount(type=kind, source=source, target=target, image_options=inside)
        case "volume":
            no_copy = bool(options is not None and options.boolean("nocopy"))
            subpath = options.text("subpath") if options is not None else ""
            if options is not None and options.node("labels") is not None:
                options.problem("labels", "set the labels in the file's top-level volumes section")
            return volumes.mount(source, target, read_only, no_copy, subpath)
        case "cluster":
            return volumes.cluster_mount(source, target, read_only)
        case _:
            mount.problem("type", f"mounts of type {kind} are not supported")
            return Mount(type=kind, source=source, target=target)


def _bind_options(options: MappingReader | None) -> BindOptions | None:
    if options is None:
        return None
    propagation = options.choice("propagation", *_PROPAGATIONS)
    create = options.boolean("create_host_path")
    options.choice("selinux", "z", "Z")  # see ``node_rights``
    recursive = options.choice("recursive", "enabled", "disabled", "writable", "readonly")
    made = BindOptions(
        propagation=propagation,
        create_mountpoint=create or False,
        non_recursive=recursive == "disabled",
        read_only_non_recursive=recursive == "writable",
        read_only_force_recursive=recursive == "readonly",
    )
    return None if made == BindOptions() else made
