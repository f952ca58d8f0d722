"""A service's spec as the keys of a Compose file: the inverse of ``skep.stack.compose.services``."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from skep.imports.document import escaped
from skep.model.container import ContainerSpec, DNSConfig, HealthConfig, Mount, Privileges, Ulimit
from skep.model.service import (
    EndpointSpec,
    NetworkAttachmentConfig,
    Placement,
    PortConfig,
    PublishMode,
    ResourceRequirements,
    Resources,
    RestartPolicy,
    ServiceMode,
    ServiceSpec,
    UpdateConfig,
)
from skep.model.values.meta import Driver
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import exact_duration
from skep.stack.project import IMAGE, NODES_NETWORKS


class ObjectKeys(msgspec.Struct, frozen=True, kw_only=True):
    """Keys in a stack file of the cluster's objects, by their names in the cluster."""

    services: Mapping[str, str]
    networks: Mapping[str, str]
    secrets: Mapping[str, str]
    configs: Mapping[str, str]
    volumes: Mapping[str, str]


def service_entry(spec: ServiceSpec, names: ObjectKeys) -> dict[str, Any]:
    """Return the service's entry below ``services``.  Networks in ``spec`` are targeted by name."""
    container = spec.task_template.container_spec or ContainerSpec()
    health = container.healthcheck
    return _filled(
        {
            "image": _text(_image(spec.labels.get(IMAGE, ""), container.image)),
            "entrypoint": _texts(container.command),
            "command": _texts(container.args),
            "hostname": _text(container.hostname),
            "environment": _texts(container.env),
            "labels": _labels(container.labels, STACK_LABEL),
            "working_dir": _text(container.dir),
            "user": _text(container.user),
            "group_add": _texts(container.groups),
            "security_opt": _security(container.privileges),
            "init": container.init,
            "stop_signal": _text(container.stop_signal),
            "stop_grace_period": _duration(container.stop_grace_period),
            "tty": container.tty or None,
            "stdin_open": container.open_stdin or None,
            "read_only": container.read_only or None,
            "volumes": [_mount(one, names) for one in container.mounts],
            "healthcheck": _healthcheck(health) if health is not None else None,
            "extra_hosts": [_host(one) for one in container.hosts],
            **_dns(container.dns_config or DNSConfig()),
            "sysctls": _labels(container.sysctls),
            "cap_add": _texts(one.removeprefix("CAP_") for one in container.capability_add),
            "cap_drop": _texts(one.removeprefix("CAP_") for one in container.capability_drop),
            "ulimits": {one.name: _ulimit(one) for one in container.ulimits},
            "oom_score_adj": container.oom_score_adj or None,
            **_swap(spec.task_template.resources),
            "secrets": [
                _reference(one.secret_name, one.file, names.secrets)
                for one in container.secrets
                if one.file is not None
            ],
            "configs": [
                _reference(one.config_name, one.file, names.configs)
                for one in container.configs
                if one.file is not None
            ],
            **_networks(spec, names),
            "ports": [_port(one) for one in (spec.endpoint_spec or EndpointSpec()).ports],
            "logging": _logging(spec.task_template.log_driver),
            "platform": _platform(spec.task_template.placement),
            "deploy": _deploy(spec),
        }
    )


def _image(written: str, image: str) -> str:
    """Return the image as written in the stack's file, without a digest, or ``image`` if the service changed it."""
    is_same = written == image if "@" in written else _tagged(written) == _tagged(image)
    return written if written and is_same else image


def _tagged(image: str) -> str:
    name = image.partition("@")[0].removeprefix("docker.io/").removeprefix("library/")
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _filled(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries without empty values.  0 and False do not count as empty."""
    return {key: one for key, one in entries.items() if one is not None and one not in ("", [], {})}


def _text(text: str) -> str:
    return escaped(text)


def _texts(texts: Iterable[str]) -> list[str]:
    return [escaped(one) for one in texts]


def _labels(labels: Mapping[str, str], *without: str) -> dict[str, str]:
    return {key: escaped(one) for key, one in sorted(labels.items()) if key not in without}


def _duration(ns: int | None) -> str | None:
    return None if ns is None else exact_duration(ns)


def _security(privileges: Privileges | None) -> list[str]:
    if privileges is None:
        return []
    made = [f"no-new-privileges:{str(privileges.no_new_privileges).lower()}"] * privileges.no_new_privileges
    if privileges.seccomp is not None and privileges.seccomp.mode == "unconfined":
        made.append("seccomp:unconfined")
    if privileges.app_armor is not None and privileges.app_armor.mode == "disabled":
        made.append("apparmor:unconfined")
    if (labels := privileges.selinux_context) is not None:
        made += ["label:disable"] * labels.disable
        given = {"user": labels.user, "role": labels.role, "type": labels.type, "level": labels.level}
        made += [f"label:{name}:{text}" for name, text in given.items() if text]
    return made


def names_volume(mount: Mount) -> bool:
    """Return whether the mount's source is a named volume.  A group of cluster volumes is not one."""
    return (
        mount.type in ("volume", "cluster") and bool(mount.source) and not mount.source.startswith("group:")
    )


def _mount(mount: Mount, names: ObjectKeys) -> dict[str, Any]:
    source = names.volumes.get(mount.source, mount.source) if names_volume(mount) else mount.source
    options: dict[str, Any] = {}
    if mount.bind_options is not None:
        bind = mount.bind_options
        recursive = {
            "disabled": bind.non_recursive,
            "writable": bind.read_only_non_recursive,
            "readonly": bind.read_only_force_recursive,
        }
        options["bind"] = _filled(
            {
                "propagation": bind.propagation,
                "create_host_path": bind.create_mountpoint or None,
                "recursive": next((word for word, is_set in recursive.items() if is_set), None),
            }
        )
    if mount.volume_options is not None:
        volume = mount.volume_options
        options["volume"] = _filled({"nocopy": volume.no_copy or None, "subpath": _text(volume.subpath)})
    if mount.tmpfs_options is not None:
        tmpfs = mount.tmpfs_options
        options["tmpfs"] = _filled(
            {"size": tmpfs.size_bytes or None, "mode": _mode(tmpfs.mode) if tmpfs.mode else None}
        )
    if mount.image_options is not None:
        options["image"] = _filled({"subpath": _text(mount.image_options.subpath)})
    return _filled(
        {
            "type": mount.type,
            "source": _text(source),
            "target": _text(mount.target),
            "read_only": mount.read_only or None,
            **options,
        }
    )


def _mode(mode: int) -> str:
    return f"{mode:04o}"


def _healthcheck(health: HealthConfig) -> dict[str, Any]:
    if health.test[:1] == ("NONE",):
        return {"disable": True}
    times = {
        "interval": health.interval,
        "timeout": health.timeout,
        "start_period": health.start_period,
        "start_interval": health.start_interval,
    }
    return _filled(
        {
            "test": _texts(health.test),
            **{key: _duration(ns or None) for key, ns in times.items()},
            "retries": health.retries or None,
        }
    )


def _host(text: str) -> str:
    """Return Docker's ``ADDRESS NAME`` as ``NAME=ADDRESS``."""
    address, _, name = text.partition(" ")
    return escaped(f"{name}={address}")


def _dns(config: DNSConfig) -> dict[str, Any]:
    return {
        "dns": _texts(config.nameservers),
        "dns_search": _texts(config.search),
        "dns_opt": _texts(config.options),
    }


def _ulimit(limit: Ulimit) -> Any:
    return limit.soft if limit.soft == limit.hard else {"soft": limit.soft, "hard": limit.hard}


def _reference(name: str, file: Any, keys: Mapping[str, str]) -> dict[str, Any]:
    return {
        "source": keys.get(name, name),
        "target": _text(file.name),
        "uid": file.uid,
        "gid": file.gid,
        "mode": _mode(file.mode),
    }


def _networks(spec: ServiceSpec, names: ObjectKeys) -> dict[str, Any]:
    attached = spec.task_template.networks or spec.networks
    if len(attached) == 1 and attached[0].target in NODES_NETWORKS:
        return {"network_mode": attached[0].target}
    own = names.services.get(spec.name, spec.name)
    return {
        "networks": {names.networks.get(one.target, one.target): _attachment(one, own) for one in attached}
    }


def _attachment(one: NetworkAttachmentConfig, own: str) -> dict[str, Any] | None:
    aliases = _texts(alias for alias in one.aliases if alias != own)
    return _filled({"aliases": aliases, "driver_opts": _labels(one.driver_opts)}) or None


def _port(port: PortConfig) -> dict[str, Any]:
    return _filled(
        {
            "name": port.name,
            "target": port.target_port,
            "published": str(port.published_port) if port.published_port else None,
            "protocol": port.protocol if port.protocol != "tcp" else None,
            "mode": "host" if port.publish_mode is PublishMode.HOST else None,
        }
    )


def _logging(driver: Driver | None) -> dict[str, Any] | None:
    return (
        _filled({"driver": driver.name, "options": _labels(driver.options)}) if driver is not None else None
    )


def _platform(placement: Placement | None) -> str | None:
    """Return the platform, if there is only one.  A registry's response may set several, which Compose cannot
    express.
    """
    platforms = placement.platforms if placement is not None else ()
    return (
        f"{platforms[0].os}/{platforms[0].architecture}" if len(platforms) == 1 and platforms[0].os else None
    )


def _deploy(spec: ServiceSpec) -> dict[str, Any]:
    template = spec.task_template
    endpoint = spec.endpoint_spec
    return _filled(
        {
            **_mode_of(spec.mode),
            "labels": _labels(spec.labels, STACK_LABEL, IMAGE),
            "endpoint_mode": endpoint.mode if endpoint is not None and endpoint.mode != "vip" else None,
            "resources": _resources(template.resources),
            "restart_policy": _restart(template.restart_policy),
            "placement": _placement(template.placement),
            "update_config": _update(spec.update_config),
            "rollback_config": _update(spec.rollback_config),
        }
    )


def _mode_of(mode: ServiceMode) -> dict[str, Any]:
    if mode.global_ is not None:
        return {"mode": "global"}
    if mode.global_job is not None:
        return {"mode": "global-job"}
    if mode.replicated_job is not None:
        return {"mode": "replicated-job", "replicas": mode.replicated_job.total_completions}
    replicas = mode.replicated.replicas if mode.replicated is not None else None
    return {"replicas": replicas if replicas != 1 else None}


def _resources(found: ResourceRequirements | None) -> dict[str, Any]:
    if found is None:
        return {}
    return _filled(
        {
            "limits": _amounts(found.limits, pids=found.limits.pids) if found.limits is not None else None,
            "reservations": _amounts(found.reservations) if found.reservations is not None else None,
        }
    )


def _swap(found: ResourceRequirements | None) -> dict[str, Any]:
    """Return the keys of a service for swap.  Compose counts memory and swap together."""
    if found is None:
        return {}
    memory = found.limits.memory_bytes if found.limits is not None else 0
    limit = None
    if found.swap_bytes is not None:
        limit = -1 if found.swap_bytes < 0 else f"{memory + found.swap_bytes}b"
    return {"memswap_limit": limit, "mem_swappiness": found.memory_swappiness}


def _amounts(found: Any, pids: int = 0) -> dict[str, Any]:
    cpus = f"{found.nano_cpus / 1e9:.9f}".rstrip("0").rstrip(".") if found.nano_cpus else None
    generic = found.generic_resources if isinstance(found, Resources) else ()
    discrete = [
        {"discrete_resource_spec": {"kind": one.kind, "value": one.value}}
        for one in (each.discrete_resource_spec for each in generic)
        if one is not None
    ]
    memory = f"{found.memory_bytes}b" if found.memory_bytes else None
    return _filled({"cpus": cpus, "memory": memory, "pids": pids or None, "generic_resources": discrete})


def _restart(policy: RestartPolicy | None) -> dict[str, Any]:
    if policy is None:
        return {}
    return _filled(
        {
            "condition": policy.condition.value if policy.condition is not None else None,
            "delay": _duration(policy.delay),
            "max_attempts": policy.max_attempts,
            "window": _duration(policy.window),
        }
    )


def _placement(placement: Placement | None) -> dict[str, Any]:
    if placement is None:
        return {}
    return _filled(
        {
            "constraints": _texts(placement.constraints),
            "preferences": [
                {"spread": _text(one.spread.spread_descriptor)}
                for one in placement.preferences
                if one.spread is not None
            ],
            "max_replicas_per_node": placement.max_replicas or None,
        }
    )


def _update(config: UpdateConfig | None) -> dict[str, Any]:
    if config is None:
        return {}
    return _filled(
        {
            "parallelism": config.parallelism,
            "delay": _duration(config.delay or None),
            "failure_action": config.failure_action.value if config.failure_action is not None else None,
            "monitor": _duration(config.monitor or None),
            "max_failure_ratio": config.max_failure_ratio or None,
            "order": config.order.value if config.order is not None else None,
        }
    )
