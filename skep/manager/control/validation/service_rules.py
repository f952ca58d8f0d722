"""Validation of a service's spec, with SwarmKit's texts and order.

Source: swarmkit, manager/controlapi/service.go (validateServiceSpec and its callees).
"""

import re
from collections.abc import Iterable

from skep.api.errors import Untranslated
from skep.errors import InvalidArgument
from skep.gotemplate import quoted
from skep.manager.control.validation.names import check_dns_name
from skep.model.container import (
    ConfigReference,
    ContainerSpec,
    HealthConfig,
    Mount,
    SecretReference,
)
from skep.model.door.routes import HTTP, has_routes
from skep.model.needs import kind_and_amount
from skep.model.networks.addresses import PORT_MAX
from skep.model.networks.publishing import check_publishing
from skep.model.options import constraints, templates
from skep.model.options.affinity import check_affinities
from skep.model.options.autoscaling import check_autoscaling
from skep.model.options.labels import MIN_AVAILABLE, check_container_labels, check_service_labels
from skep.model.options.schedules import check_schedule
from skep.model.options.secret_env import check_secret_env
from skep.model.permissions.processes import check_process
from skep.model.permissions.rights import RESERVED, check_service_rights, is_reserved_by, rights_of
from skep.model.service import (
    REPLICAS_MAX,
    EndpointSpec,
    Limits,
    PublishMode,
    ResourceRequirements,
    Resources,
    RestartPolicy,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
    UpdateConfig,
)
from skep.model.staging.updates import check_staged_update

_NANO_CPUS_MIN = 1_000_000
"""Smallest CPU limit or reservation, as in SwarmKit."""
_MEMORY_BYTES_MIN = 4 * 1024 * 1024
"""Smallest memory limit or reservation, as in SwarmKit."""
_SIGN_BIT = 2**63 - 1
"""Decoding replaces larger numbers by this value.  SwarmKit reads such numbers as negative."""


def check_service_spec(spec: ServiceSpec) -> None:
    """Refuse specs that cannot work.  Raises: InvalidArgument; Untranslated for unreadable constraints."""
    check_dns_name(spec.name)
    check_service_labels(spec.labels)
    if has_routes(spec.labels) and spec.mode.name in {"replicated-job", "global-job"}:
        raise InvalidArgument(
            f"the label {HTTP} does not work on jobs: set it on a service that keeps running"
        )
    if MIN_AVAILABLE in spec.labels and spec.mode.name != "replicated":
        raise InvalidArgument(f"the label {MIN_AVAILABLE} works on replicated services only")
    check_staged_update(spec)
    check_affinities(spec.labels, spec.name, is_global=spec.mode.name in ("global", "global-job"))
    check_autoscaling(spec)
    check_schedule(spec.labels, spec.mode.name)
    check_publishing(spec)
    check_service_rights(spec.task_template.container_spec, spec.labels)
    check_secret_env(spec.task_template.container_spec, spec.labels)
    _check_template(spec.task_template)
    _check_mode(spec.mode)
    if spec.mode.name in {"replicated-job", "global-job"}:
        if spec.update_config is not None:
            raise InvalidArgument("Jobs may not have an update config")
    else:
        _check_update(spec.update_config)
    _check_endpoint(spec.endpoint_spec)
    for network in spec.networks:  # Docker's older field. Nodes get only the networks of the template.
        for option in network.driver_opts:
            raise InvalidArgument(
                f"network {network.target}: driver option {option} belongs in the networks of TaskTemplate"
            )


def _check_template(template: TaskSpec) -> None:
    _check_resources(template.resources)
    _check_reserved_devices(template)
    _check_restart(template.restart_policy)
    if template.placement is not None:
        _check_constraints(template.placement.constraints)
    container = template.container_spec
    if container is None:
        raise InvalidArgument("TaskSpec: missing runtime")
    check_container_labels(container.labels)
    _check_secrets(container.secrets)
    _check_configs(container)
    _check_container(container)


def _check_resources(requirements: ResourceRequirements | None) -> None:
    if requirements is None:
        return
    for resources in (requirements.limits, requirements.reservations):
        if resources is not None:
            _check_amounts(resources)
    _check_swap(requirements)
    reservations = requirements.reservations
    for one in reservations.generic_resources if reservations is not None else ():
        discrete = one.discrete_resource_spec
        if discrete is not None and discrete.value < 0:  # docker's command refuses them as well
            raise InvalidArgument(f"cannot ask for negative resource {discrete.kind}")


def _check_reserved_devices(template: TaskSpec) -> None:
    """Raise InvalidArgument for a container that gets reserved devices without a reservation of any."""
    rights = rights_of(template.container_spec)
    reserved = template.resources.reservations if template.resources is not None else None
    resources = reserved.generic_resources if reserved is not None else ()
    kinds = [kind for kind, amount in map(kind_and_amount, resources) if amount]
    wants_gpus = rights.gpus is not None and rights.gpus.is_reserved
    for label, is_wanted, is_gpu in (
        ("skep.gpus", wants_gpus, True),
        ("skep.devices", rights.has_reserved_devices, False),
    ):
        if is_wanted and not any(
            is_reserved_by(rights, one) and one.endswith("/gpu") is is_gpu for one in kinds
        ):
            example = "vendor.com/gpu=1" if is_gpu else "vendor.com/class=1"
            raise InvalidArgument(
                f"{label}={RESERVED} needs a reservation of such devices: use --generic-resource {example}"
            )


def _check_swap(requirements: ResourceRequirements) -> None:
    """Raise InvalidArgument for swap without a memory limit, and for values that fail every start of a task.

    Source: moby, daemon/cluster/convert/service.go (resourcesToGRPC), daemon/daemon_unix.go (SWAPPINESS_MAX).
    """
    swap, swappiness, limits = requirements.swap_bytes, requirements.memory_swappiness, requirements.limits
    if swap is not None:
        if limits is None or not limits.memory_bytes:
            raise InvalidArgument("memory swap provided, but no memory-limit was set")
        if swap < -1:
            raise InvalidArgument(f"invalid memory swap {swap}: Must be -1 for no limit, or at least 0")
    if swappiness is not None and not -1 <= swappiness <= 100:
        raise InvalidArgument(f"Invalid value: {swappiness}, valid memory swappiness range is 0-100")


def _check_amounts(resources: Limits | Resources) -> None:
    cpus, memory = resources.nano_cpus, resources.memory_bytes
    if cpus and cpus < _NANO_CPUS_MIN:
        raise InvalidArgument(f"invalid cpu value {_go_float(cpus / 1e9)}: Must be at least 0.001")
    if memory and memory < _MEMORY_BYTES_MIN:
        raise InvalidArgument(f"invalid memory value {memory}: Must be at least 4MiB")


def _go_float(value: float) -> str:
    """Format ``value`` as Go's ``%g`` does: shortest form, exponents of at least two digits."""
    text = repr(value)
    if text.endswith(".0"):
        text = text[:-2]
    if value and (abs(value) < 1e-4 or abs(value) >= 1e21):
        mantissa, _, exponent = f"{value:e}".partition("e")
        digits = repr(value).partition("e")[0] if "e" in repr(value) else mantissa.rstrip("0").rstrip(".")
        return f"{digits}e{exponent}"
    return text


def _check_restart(policy: RestartPolicy | None) -> None:
    if policy is None:
        return
    if policy.delay is not None and policy.delay < 0:
        raise InvalidArgument("TaskSpec: restart-delay cannot be negative")
    if policy.window is not None and policy.window < 0:
        raise InvalidArgument("TaskSpec: restart-window cannot be negative")


def _check_constraints(expressions: Iterable[str]) -> None:
    """Check constraints.  SwarmKit's errors for them have no code, so they become Untranslated."""
    try:
        for expression in expressions:
            constraints.parse(expression)
    except InvalidArgument as error:
        raise Untranslated(str(error)) from error


def _check_secrets(references: Iterable[SecretReference]) -> None:
    taken: dict[str, str] = {}
    for reference in references:
        if not reference.secret_id or not reference.secret_name:
            raise InvalidArgument("malformed secret reference")
        if reference.file is None:
            raise InvalidArgument("malformed secret reference, no target provided")
        target = reference.file.name
        if not target:
            raise InvalidArgument("malformed file secret reference, invalid target file name provided")
        if target in taken:
            raise InvalidArgument(
                f"secret references '{taken[target]}' and '{reference.secret_name}' "
                f"have a conflicting target: '{target}'"
            )
        taken[target] = reference.secret_name


def _check_configs(container: ContainerSpec) -> None:
    taken: dict[str, str] = {}
    for reference in container.configs:
        if not reference.config_id or not reference.config_name:
            raise InvalidArgument("malformed config reference")
        if reference.file is None:
            continue
        target = reference.file.name
        if not target:
            raise InvalidArgument("malformed file config reference, invalid target file name provided")
        if target in taken:
            raise InvalidArgument(
                f"config references '{taken[target]}' and '{reference.config_name}' "
                f"have a conflicting target: '{target}'"
            )
        taken[target] = reference.config_name
    wanted = _credential_config(container)
    if wanted and not any(_is_runtime(reference, wanted) for reference in container.configs):
        raise InvalidArgument(
            f"CredentialSpec references config '{wanted}', "
            "but that config isn't in config references with RuntimeTarget"
        )


def _credential_config(container: ContainerSpec) -> str:
    if container.privileges is None or container.privileges.credential_spec is None:
        return ""
    return container.privileges.credential_spec.config


def _is_runtime(reference: ConfigReference, config_id: str) -> bool:
    return reference.runtime is not None and reference.config_id == config_id


_SEEN = templates.context(
    service_id="serviceid",
    service_name="servicename",
    service_labels={},
    node_id="nodeid",
    hostname="nodeHostname",
    os="os",
    architecture="architecture",
    task_id="taskid",
    task_name="taskname",
    slot="1",
)
"""Example task with which placeholders are tried, as SwarmKit's control API does."""


def _check_container(container: ContainerSpec) -> None:
    container = templates.expand_container(container, _SEEN)
    if not container.image:
        raise InvalidArgument("ContainerSpec: image reference must be provided")
    if not is_image_reference(container.image):
        raise InvalidArgument(f"ContainerSpec: {quoted(container.image)} is not a valid repository/tag")
    check_process(container)
    _check_mounts(container.mounts)
    _check_health(container.healthcheck)


def _check_mounts(mounts: Iterable[Mount]) -> None:
    targets = set()
    for mount in mounts:
        if mount.target in targets:
            raise InvalidArgument(f"ContainerSpec: duplicate mount point: {mount.target}")
        targets.add(mount.target)


def _check_health(health: HealthConfig | None) -> None:
    if health is not None and (refusal := health.refusal("HealthConfig")):
        raise InvalidArgument(f"ContainerSpec: {refusal}")


def _check_mode(mode: ServiceMode) -> None:
    if mode.replicated is not None and mode.replicated.replicas is not None:
        _check_count(mode.replicated.replicas, "Number of replicas must be non-negative")
    if mode.replicated_job is not None:
        _check_count(mode.replicated_job.max_concurrent or 0, "Maximum concurrent jobs must not be negative")
        _check_count(mode.replicated_job.total_completions or 0, "Total completed jobs must not be negative")


def _check_count(count: int, negative: str) -> None:
    if count >= _SIGN_BIT:
        raise InvalidArgument(negative)
    if count > REPLICAS_MAX:
        raise InvalidArgument(f"a service can have at most {REPLICAS_MAX} tasks")


def _check_update(config: UpdateConfig | None) -> None:
    if config is None:
        return
    if config.delay < 0:
        raise InvalidArgument("TaskSpec: update-delay cannot be negative")
    if config.monitor < 0:
        raise InvalidArgument("TaskSpec: update-monitor cannot be negative")
    if not 0 <= config.max_failure_ratio <= 1:
        raise InvalidArgument("TaskSpec: update-maxfailureratio cannot be less than 0 or bigger than 1")


def _check_endpoint(endpoint: EndpointSpec | None) -> None:
    if endpoint is None:
        return
    taken = set()
    for port in endpoint.ports:
        if endpoint.mode == "dnsrr" and port.publish_mode is PublishMode.INGRESS:
            raise InvalidArgument(
                "EndpointSpec: port published with ingress mode can't be used with dnsrr mode"
            )
        for number in (port.published_port, port.target_port):
            if number > PORT_MAX:
                raise InvalidArgument(f"EndpointSpec: invalid port {number}: expected at most {PORT_MAX}")
        if not port.published_port:
            continue
        key = (port.protocol, port.published_port)
        if key in taken:
            raise InvalidArgument("EndpointSpec: duplicate published ports provided")
        taken.add(key)


# -- image references (distribution/reference, normalize.go and regexp.go) -------------------------------------------


_NAME_LENGTH_MAX = 255
"""Source: distribution, reference/reference.go (NameTotalLengthMax)."""

_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|[-]+)[a-z0-9]+)*"
_DOMAIN_PART = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = rf"(?:{_DOMAIN_PART}(?:\.{_DOMAIN_PART})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
_DIGEST = r"[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}"
_REFERENCE = re.compile(
    rf"(?P<name>{_DOMAIN}/{_COMPONENT}(?:/{_COMPONENT})*)(?::(?P<tag>\w[\w.-]{{0,127}}))?(?:@(?P<digest>{_DIGEST}))?",
    re.ASCII,
)
_IMAGE_ID = re.compile(r"[a-f0-9]{64}")
_DIGEST_LENGTHS = {"sha256": 64, "sha384": 96, "sha512": 128}


def is_image_reference(text: str) -> bool:
    """Return whether ``text`` names an image: ``busybox``, ``host:5000/team/web:1.2@sha256:...``, but not
    an image id.
    """
    if len(text) > 1024 or _IMAGE_ID.fullmatch(text):
        return False
    match = _REFERENCE.fullmatch(_with_domain(text))
    if match is None or len(match["name"]) > _NAME_LENGTH_MAX:
        return False
    algorithm, _, hexadecimal = (match["digest"] or "").partition(":")
    return not algorithm or _DIGEST_LENGTHS.get(algorithm) == len(hexadecimal)


def _with_domain(text: str) -> str:
    """Return ``text`` with the registry that a short form omits."""
    first, slash, _ = text.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost" or first.lower() != first):
        return text
    return f"docker.io/{text}" if slash else f"docker.io/library/{text}"
