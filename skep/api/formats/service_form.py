"""The normalized form in which a service's spec is stored.

Docker converts every spec to SwarmKit's form and back, which fills in some fields, lower-cases words and refuses what
it cannot convert; ``settled`` has the same result.  ``with_defaults`` is ``insertDefaults=true``.

Source: moby 20.10 and 27, daemon/cluster/convert/{service,container}.go; swarmkit, api/defaults/service.go.
"""

from collections.abc import Iterable

from msgspec.structs import replace

from skep.api.errors import Untranslated
from skep.api.formats.bodies import Unrecognized
from skep.errors import InvalidArgument
from skep.model.container import (
    BindOptions,
    ConfigReference,
    ContainerSpec,
    CredentialSpec,
    DNSConfig,
    Mount,
    Privileges,
)
from skep.model.options.autoscaling import AUTOSCALE
from skep.model.service import (
    EndpointSpec,
    GlobalService,
    Placement,
    PortConfig,
    PublishMode,
    ReplicatedJob,
    ReplicatedService,
    ResourceRequirements,
    RestartCondition,
    RestartPolicy,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
    UpdateConfig,
    UpdateFailureAction,
    UpdateOrder,
)
from skep.model.values.times import SECOND_NS

UNRECOGNIZED: Unrecognized = {
    RestartCondition: lambda word: InvalidArgument(f'invalid RestartCondition: "{word}"'),
    UpdateFailureAction: lambda word: InvalidArgument(f"unrecognized update failure action {word}"),
    UpdateOrder: lambda word: InvalidArgument(f"unrecognized update order {word}"),
    PublishMode: lambda word: PublishMode.HOST if word.lower() == "host" else PublishMode.INGRESS,
}
"""The engine's errors for unknown values in a service's spec.  An unknown publish mode means ingress."""

_PROTOCOLS = frozenset({"tcp", "udp", "sctp"})
_MOUNT_TYPES = frozenset({"bind", "volume", "tmpfs", "npipe", "cluster"})
"""SwarmKit's mount types, which do not include images."""
_PROPAGATIONS = frozenset({"rprivate", "private", "rshared", "shared", "rslave", "slave"})


def settled(spec: ServiceSpec) -> ServiceSpec:
    """Return ``spec`` as it is stored and shown.

    Raises:
        InvalidArgument: It cannot be converted, in the engine's words.
    """
    template, mode = _settled_runtime(spec)
    return replace(
        spec,
        task_template=replace(
            template,
            restart_policy=_settled_restart(template.restart_policy),
            placement=_settled_placement(template.placement),
        ),
        mode=_settled_mode(mode, leaves_number=AUTOSCALE in spec.labels),
        update_config=_settled_update(spec.update_config),
        rollback_config=_settled_update(spec.rollback_config),
        endpoint_spec=_settled_endpoint(spec.endpoint_spec),
    )


def _settled_runtime(spec: ServiceSpec) -> tuple[TaskSpec, ServiceMode]:
    template = spec.task_template
    match template.runtime:
        case "" | "container":
            if template.container_spec is None:
                raise InvalidArgument("mismatched Runtime and *Spec fields")
            container = _settled_container(template.container_spec)
            return replace(
                template,
                runtime="container",
                container_spec=container,
                plugin_spec=None,
                network_attachment_spec=None,
            ), spec.mode
        case "plugin":
            if template.plugin_spec is None:
                raise InvalidArgument("mismatched Runtime and *Spec fields")
            if spec.mode.replicated is not None:
                raise InvalidArgument("plugins must not use replicated mode")
            raise Untranslated('runtime type "plugin" only supported in experimental')
        case _:
            raise InvalidArgument("unsupported runtime")


def _settled_container(container: ContainerSpec) -> ContainerSpec:
    return replace(
        container,
        isolation=container.isolation.lower()
        if container.isolation.lower() in {"hyperv", "process"}
        else "default",
        privileges=_settled_privileges(container.privileges),
        configs=tuple(map(_checked_config_reference, container.configs)),
        mounts=tuple(map(_settled_mount, container.mounts)),
    )


def _settled_privileges(privileges: Privileges | None) -> Privileges | None:
    if privileges is not None and privileges.credential_spec is not None:
        _check_credential_spec(privileges.credential_spec)
    return privileges


def _check_credential_spec(credential: CredentialSpec) -> None:
    given = [
        f'"{name}"'
        for name, value in (
            ("config", credential.config),
            ("file", credential.file),
            ("registry", credential.registry),
        )
        if value
    ]
    match given:
        case [_]:
            return
        case []:
            problem = 'must either provide "file", "registry", or "config" for credential spec'
        case [first, second]:
            problem = f"cannot specify both {first} and {second} credential specs"
        case _:
            problem = f"cannot specify both {', '.join(given[:-1])}, and {given[-1]} credential specs"
    raise InvalidArgument(f"invalid CredentialSpec: {problem}")


def _checked_config_reference(reference: ConfigReference) -> ConfigReference:
    if reference.runtime is None and reference.file is None:
        raise InvalidArgument("invalid Config: either File or Runtime should be set")
    if reference.runtime is not None and reference.file is not None:
        raise InvalidArgument("invalid Config: cannot specify both File and Runtime")
    return reference


def _settled_mount(mount: Mount) -> Mount:
    type_ = mount.type.lower() or "bind"
    if type_ not in _MOUNT_TYPES:
        raise InvalidArgument(f'invalid MountType: "{mount.type}"')
    return replace(mount, type=type_, bind_options=_settled_bind_options(mount.bind_options))


def _settled_bind_options(options: BindOptions | None) -> BindOptions | None:
    if options is None:
        return None
    propagation = options.propagation.lower()
    if propagation and propagation not in _PROPAGATIONS:
        raise InvalidArgument(f'invalid MountPropagation: "{options.propagation}"')
    if options == BindOptions():
        return None  # SwarmKit cannot distinguish an empty value from a missing one
    return replace(options, propagation=propagation or "rprivate")


def _settled_placement(placement: Placement | None) -> Placement | None:
    """Drop empty preferences."""
    if placement is None:
        return None
    return replace(
        placement, preferences=tuple(one for one in placement.preferences if one.spread is not None)
    )


def _settled_restart(policy: RestartPolicy | None) -> RestartPolicy | None:
    if policy is None:
        return None
    return replace(
        policy, condition=policy.condition or RestartCondition.ANY, max_attempts=policy.max_attempts or 0
    )


def _settled_update(config: UpdateConfig | None) -> UpdateConfig | None:
    if config is None:
        return None
    return replace(
        config,
        failure_action=config.failure_action or UpdateFailureAction.PAUSE,
        order=config.order or UpdateOrder.STOP_FIRST,
    )


def _settled_endpoint(endpoint: EndpointSpec | None) -> EndpointSpec | None:
    if endpoint is None:
        return None
    if endpoint.mode not in {"", "vip", "dnsrr"}:
        raise InvalidArgument(f'invalid resolution mode: "{endpoint.mode}"')
    return replace(endpoint, mode=endpoint.mode or "vip", ports=_settled_ports(endpoint.ports))


def _settled_ports(ports: Iterable[PortConfig]) -> tuple[PortConfig, ...]:
    """Replace unknown protocols by tcp, as in the engine."""
    return tuple(
        replace(port, protocol=port.protocol.lower() if port.protocol.lower() in _PROTOCOLS else "tcp")
        for port in ports
    )


def _settled_mode(mode: ServiceMode, *, leaves_number: bool = False) -> ServiceMode:
    """Return the mode with defaults.  With ``leaves_number``, a missing number of replicas stays missing."""
    given = [
        alternative
        for alternative in (mode.global_, mode.replicated, mode.replicated_job, mode.global_job)
        if alternative is not None
    ]
    if len(given) > 1:
        raise InvalidArgument("must specify only one service mode")
    match mode.name:
        case "global":
            return ServiceMode(global_=GlobalService())
        case "global-job":
            return mode
        case "replicated-job":
            assert mode.replicated_job is not None
            concurrent, total = mode.replicated_job.max_concurrent, mode.replicated_job.total_completions
            concurrent = 1 if concurrent is None else concurrent
            return ServiceMode(
                replicated_job=ReplicatedJob(
                    max_concurrent=concurrent, total_completions=concurrent if total is None else total
                )
            )
        case "replicated":
            replicas = mode.replicated.replicas if mode.replicated is not None else None
            if replicas is None and not leaves_number:
                replicas = 1
            return ServiceMode(replicated=ReplicatedService(replicas=replicas))


_DEFAULT_RESTART = RestartPolicy(condition=RestartCondition.ANY, delay=5 * SECOND_NS, max_attempts=0)
_DEFAULT_UPDATE = UpdateConfig(
    parallelism=1,
    failure_action=UpdateFailureAction.PAUSE,
    monitor=5 * SECOND_NS,
    order=UpdateOrder.STOP_FIRST,
)


def with_defaults(spec: ServiceSpec) -> ServiceSpec:
    """Return ``spec`` with the cluster's defaults for missing values."""
    template = spec.task_template
    container = template.container_spec
    if container is not None:
        container = replace(
            container,
            stop_grace_period=container.stop_grace_ns,
            dns_config=container.dns_config or DNSConfig(),
        )
    restart = template.restart_policy
    if restart is not None and restart.delay is None:
        restart = replace(restart, delay=_DEFAULT_RESTART.delay)
    return replace(
        spec,
        task_template=replace(
            template,
            container_spec=container,
            resources=template.resources or ResourceRequirements(),
            restart_policy=restart or _DEFAULT_RESTART,
            placement=template.placement or Placement(),
        ),
        update_config=_update_with_defaults(spec.update_config),
        rollback_config=_update_with_defaults(spec.rollback_config),
    )


def _update_with_defaults(config: UpdateConfig | None) -> UpdateConfig:
    if config is None:
        return _DEFAULT_UPDATE
    return replace(config, monitor=config.monitor or _DEFAULT_UPDATE.monitor)
