"""Container specs: the desired containers of tasks.

``task_spec.py`` converts two fields: the limit of processes, which SwarmKit has in the container and the API in the
resources, and registry credentials, which no stored object holds.
"""

import msgspec

from skep.errors import InvalidArgument
from skep.model import container as model
from skep.model.values.ids import ConfigId, SecretId
from skep.wire import swarm_pb2 as pb
from skep.wire.convert.values import (
    EnumTable,
    driver_from_pb,
    driver_to_pb,
    duration_from_pb,
    duration_to_pb,
)
from skep.wire.descriptors import BoolValue

MOUNT_TYPES = EnumTable("MountType", {"bind": 0, "volume": 1, "tmpfs": 2, "npipe": 3, "cluster": 4})
CONSISTENCIES = EnumTable(
    "mount consistency", {"": 0, "default": 0, "consistent": 1, "cached": 2, "delegated": 3}
)
PROPAGATIONS = EnumTable(
    "MountPropagation",
    {"rprivate": 0, "": 0, "private": 1, "rshared": 2, "shared": 3, "rslave": 4, "slave": 5},
)
SECCOMP_MODES = EnumTable("seccomp mode", {"default": 0, "": 0, "unconfined": 1, "custom": 2})
APPARMOR_MODES = EnumTable("AppArmor mode", {"default": 0, "": 0, "disabled": 1})
ISOLATIONS = EnumTable("Isolation", {"": 0, "default": 0, "process": 1, "hyperv": 2})


def container_to_pb(spec: model.ContainerSpec) -> pb.ContainerSpec:
    """Convert a spec.  Raises InvalidArgument if SwarmKit has no equivalent (a mount of type ``image``)."""
    message = pb.ContainerSpec(
        image=spec.image,
        labels=spec.labels,
        command=spec.command,
        args=spec.args,
        hostname=spec.hostname,
        env=spec.env,
        dir=spec.dir,
        user=spec.user,
        groups=spec.groups,
        tty=spec.tty,
        open_stdin=spec.open_stdin,
        read_only=spec.read_only,
        stop_signal=spec.stop_signal,
        mounts=[_mount_to_pb(mount) for mount in spec.mounts],
        secrets=[_secret_to_pb(reference) for reference in spec.secrets],
        configs=[_config_to_pb(reference) for reference in spec.configs],
        hosts=spec.hosts,
        isolation=pb.ContainerSpec.Isolation.ValueType(ISOLATIONS.number(spec.isolation)),
        sysctls=spec.sysctls,
        capability_add=spec.capability_add,
        capability_drop=spec.capability_drop,
        ulimits=[
            pb.ContainerSpec.Ulimit(name=limit.name, soft=limit.soft, hard=limit.hard)
            for limit in spec.ulimits
        ],
        oom_score_adj=spec.oom_score_adj,
    )
    # Absent and empty differ: an engine uses its own default only if the field is absent.
    if spec.privileges is not None:
        message.privileges.CopyFrom(_privileges_to_pb(spec.privileges))
    if spec.init is not None:
        message.init.CopyFrom(BoolValue(value=spec.init))
    if spec.stop_grace_period is not None:
        message.stop_grace_period.CopyFrom(duration_to_pb(spec.stop_grace_period))
    if spec.healthcheck is not None:
        message.healthcheck.CopyFrom(_health_to_pb(spec.healthcheck))
    if spec.dns_config is not None:
        dns = spec.dns_config
        message.dns_config.CopyFrom(
            pb.ContainerSpec.DNSConfig(nameservers=dns.nameservers, search=dns.search, options=dns.options)
        )
    return message


def container_from_pb(message: pb.ContainerSpec) -> model.ContainerSpec:
    """Convert a message.  Raises InvalidArgument for undefined numbers."""
    dns = message.dns_config
    return model.ContainerSpec(
        image=message.image,
        labels=dict(message.labels),
        command=tuple(message.command),
        args=tuple(message.args),
        hostname=message.hostname,
        env=tuple(message.env),
        dir=message.dir,
        user=message.user,
        groups=tuple(message.groups),
        privileges=_privileges_from_pb(message.privileges) if message.HasField("privileges") else None,
        init=message.init.value if message.HasField("init") else None,
        stop_signal=message.stop_signal,
        tty=message.tty,
        open_stdin=message.open_stdin,
        read_only=message.read_only,
        mounts=tuple(_mount_from_pb(mount) for mount in message.mounts),
        stop_grace_period=(
            duration_from_pb(message.stop_grace_period) if message.HasField("stop_grace_period") else None
        ),
        healthcheck=_health_from_pb(message.healthcheck) if message.HasField("healthcheck") else None,
        hosts=tuple(message.hosts),
        dns_config=(
            model.DNSConfig(
                nameservers=tuple(dns.nameservers), search=tuple(dns.search), options=tuple(dns.options)
            )
            if message.HasField("dns_config")
            else None
        ),
        secrets=tuple(_secret_from_pb(reference) for reference in message.secrets),
        configs=tuple(_config_from_pb(reference) for reference in message.configs),
        isolation=ISOLATIONS.word(message.isolation),
        sysctls=dict(message.sysctls),
        capability_add=tuple(message.capability_add),
        capability_drop=tuple(message.capability_drop),
        ulimits=tuple(
            model.Ulimit(name=limit.name, soft=limit.soft, hard=limit.hard) for limit in message.ulimits
        ),
        oom_score_adj=message.oom_score_adj,
    )


def _mount_to_pb(mount: model.Mount) -> pb.Mount:
    message = pb.Mount(
        type=pb.Mount.Type.ValueType(MOUNT_TYPES.number(mount.type)),
        source=mount.source,
        target=mount.target,
        readonly=mount.read_only,
        consistency=pb.Mount.Consistency.ValueType(CONSISTENCIES.number(mount.consistency)),
    )
    if (bind := mount.bind_options) is not None:
        message.bind_options.CopyFrom(
            pb.Mount.BindOptions(
                propagation=pb.Mount.BindOptions.Propagation.ValueType(PROPAGATIONS.number(bind.propagation)),
                nonrecursive=bind.non_recursive,
                createmountpoint=bind.create_mountpoint,
                readonlynonrecursive=bind.read_only_non_recursive,
                readonlyforcerecursive=bind.read_only_force_recursive,
            )
        )
    if (volume := mount.volume_options) is not None:
        message.volume_options.CopyFrom(
            pb.Mount.VolumeOptions(nocopy=volume.no_copy, labels=volume.labels, subpath=volume.subpath)
        )
        if volume.driver_config is not None:
            message.volume_options.driver_config.CopyFrom(driver_to_pb(volume.driver_config))
    if (tmpfs := mount.tmpfs_options) is not None:
        message.tmpfs_options.CopyFrom(
            pb.Mount.TmpfsOptions(
                size_bytes=tmpfs.size_bytes,
                mode=tmpfs.mode,
                # One string of JSON, as the engine writes it (moby, daemon/cluster/convert/container.go).
                options=msgspec.json.encode(tmpfs.options).decode() if tmpfs.options else "",
            )
        )
    return message


def _mount_from_pb(message: pb.Mount) -> model.Mount:
    bind, volume, tmpfs = message.bind_options, message.volume_options, message.tmpfs_options
    return model.Mount(
        type=MOUNT_TYPES.word(message.type),
        source=message.source,
        target=message.target,
        read_only=message.readonly,
        consistency=CONSISTENCIES.word(message.consistency),
        bind_options=(
            model.BindOptions(
                propagation=PROPAGATIONS.word(bind.propagation),
                non_recursive=bind.nonrecursive,
                create_mountpoint=bind.createmountpoint,
                read_only_non_recursive=bind.readonlynonrecursive,
                read_only_force_recursive=bind.readonlyforcerecursive,
            )
            if message.HasField("bind_options")
            else None
        ),
        volume_options=(
            model.VolumeOptions(
                no_copy=volume.nocopy,
                labels=dict(volume.labels),
                subpath=volume.subpath,
                driver_config=(
                    driver_from_pb(volume.driver_config) if volume.HasField("driver_config") else None
                ),
            )
            if message.HasField("volume_options")
            else None
        ),
        tmpfs_options=(
            model.TmpfsOptions(
                size_bytes=tmpfs.size_bytes, mode=tmpfs.mode, options=_tmpfs_options(tmpfs.options)
            )
            if message.HasField("tmpfs_options")
            else None
        ),
    )


def _tmpfs_options(text: str) -> tuple[tuple[str, ...], ...]:
    if not text:
        return ()
    try:
        return msgspec.json.decode(text, type=tuple[tuple[str, ...], ...])
    except msgspec.MsgspecError as error:
        raise InvalidArgument(f"invalid tmpfs options: {error}") from error


def _file_to_pb(target: model.FileTarget) -> pb.FileTarget:
    return pb.FileTarget(name=target.name, uid=target.uid, gid=target.gid, mode=target.mode)


def _file_from_pb(message: pb.FileTarget) -> model.FileTarget:
    return model.FileTarget(name=message.name, uid=message.uid, gid=message.gid, mode=message.mode)


def _secret_to_pb(reference: model.SecretReference) -> pb.SecretReference:
    message = pb.SecretReference(secret_id=reference.secret_id, secret_name=reference.secret_name)
    if reference.file is not None:
        message.file.CopyFrom(_file_to_pb(reference.file))
    return message


def _secret_from_pb(message: pb.SecretReference) -> model.SecretReference:
    return model.SecretReference(
        file=_file_from_pb(message.file) if message.HasField("file") else None,
        secret_id=SecretId(message.secret_id),
        secret_name=message.secret_name,
    )


def _config_to_pb(reference: model.ConfigReference) -> pb.ConfigReference:
    message = pb.ConfigReference(config_id=reference.config_id, config_name=reference.config_name)
    if reference.file is not None:
        message.file.CopyFrom(_file_to_pb(reference.file))
    elif reference.runtime is not None:
        message.runtime.SetInParent()
    return message


def _config_from_pb(message: pb.ConfigReference) -> model.ConfigReference:
    return model.ConfigReference(
        file=_file_from_pb(message.file) if message.HasField("file") else None,
        runtime=model.RuntimeTarget() if message.HasField("runtime") else None,
        config_id=ConfigId(message.config_id),
        config_name=message.config_name,
    )


def _health_to_pb(health: model.HealthConfig) -> pb.HealthConfig:
    return pb.HealthConfig(
        test=health.test,
        interval=duration_to_pb(health.interval),
        timeout=duration_to_pb(health.timeout),
        retries=health.retries,
        start_period=duration_to_pb(health.start_period),
        start_interval=duration_to_pb(health.start_interval),
    )


def _health_from_pb(message: pb.HealthConfig) -> model.HealthConfig:
    return model.HealthConfig(
        test=tuple(message.test),
        interval=duration_from_pb(message.interval),
        timeout=duration_from_pb(message.timeout),
        start_period=duration_from_pb(message.start_period),
        start_interval=duration_from_pb(message.start_interval),
        retries=message.retries,
    )


def _privileges_to_pb(privileges: model.Privileges) -> pb.Privileges:
    message = pb.Privileges(no_new_privileges=privileges.no_new_privileges)
    if (credential := privileges.credential_spec) is not None:
        target = message.credential_spec
        target.SetInParent()
        if credential.config:
            target.config = credential.config
        elif credential.file:
            target.file = credential.file
        elif credential.registry:
            target.registry = credential.registry
    if (selinux := privileges.selinux_context) is not None:
        message.selinux_context.CopyFrom(
            pb.Privileges.SELinuxContext(
                disable=selinux.disable,
                user=selinux.user,
                role=selinux.role,
                type=selinux.type,
                level=selinux.level,
            )
        )
    if (seccomp := privileges.seccomp) is not None:
        mode = pb.Privileges.SeccompOpts.SeccompMode.ValueType(SECCOMP_MODES.number(seccomp.mode))
        message.seccomp.CopyFrom(pb.Privileges.SeccompOpts(mode=mode, profile=seccomp.profile))
    if (apparmor := privileges.app_armor) is not None:
        number = APPARMOR_MODES.number(apparmor.mode)
        message.apparmor.SetInParent()
        message.apparmor.mode = pb.Privileges.AppArmorOpts.AppArmorMode.ValueType(number)
    return message


def _privileges_from_pb(message: pb.Privileges) -> model.Privileges:
    credential, selinux = message.credential_spec, message.selinux_context
    return model.Privileges(
        credential_spec=(
            model.CredentialSpec(config=credential.config, file=credential.file, registry=credential.registry)
            if message.HasField("credential_spec")
            else None
        ),
        selinux_context=(
            model.SELinuxContext(
                disable=selinux.disable,
                user=selinux.user,
                role=selinux.role,
                type=selinux.type,
                level=selinux.level,
            )
            if message.HasField("selinux_context")
            else None
        ),
        seccomp=(
            model.SeccompOpts(mode=SECCOMP_MODES.word(message.seccomp.mode), profile=message.seccomp.profile)
            if message.HasField("seccomp")
            else None
        ),
        app_armor=(
            model.AppArmorOpts(mode=APPARMOR_MODES.word(message.apparmor.mode))
            if message.HasField("apparmor")
            else None
        ),
        no_new_privileges=message.no_new_privileges,
    )
