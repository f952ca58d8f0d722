"""New objects, as far as the permission to make them depends on it: stack, what they use, requested rights."""

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec.structs import replace

from skep.api.networks import PREDEFINED_LABEL, NetworkBody
from skep.api.permissions import STACK_LABEL, Known, NewObject
from skep.errors import SkepError
from skep.manager.trust import machine_log
from skep.model.container import ContainerSpec, Mount
from skep.model.labels import priority_of
from skep.model.network import Network
from skep.model.rights import rights_of, rights_text
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import Service, ServiceSpec
from skep.model.task import Task
from skep.model.volume import Volume
from skep.store.interface import View
from skep.store.kinds import as_run, has_unknown_spec, spec_of

_HOST = frozenset(("host", "bridge", "none"))
"""Networks of a machine that services may name."""
_LOG_FILES = frozenset(("splunk-capath", "syslog-tls-ca-cert", "syslog-tls-cert", "syslog-tls-key"))
"""Options of log drivers that name a file, which the node reads as root."""


def stack_of(labels: Mapping[str, str]) -> str:
    """The stack that the labels of an object name; empty: none."""
    return labels.get(STACK_LABEL, "")


def stacks_of(view: View) -> frozenset[str]:
    """Every stack of which there is an object."""
    found = {stack_of(service.spec.labels) for service in view.find(Service)}
    found |= {stack_of(network.spec.labels) for network in view.find(Network)}
    found |= {stack_of(secret.spec.labels) for secret in view.find(Secret)}
    found |= {stack_of(config.spec.labels) for config in view.find(Config)}
    return frozenset(found - {""})


def new_service(view: View, spec: ServiceSpec) -> NewObject:
    """Of a service to be made, or updated."""
    container = spec.task_template.container_spec or ContainerSpec()
    return NewObject(
        name=spec.name,
        stack=stack_of(spec.labels),
        machine_rights=machine_rights(view, spec),
        raised_priority=_raised_priority(view, spec),
        uses=tuple(_uses(view, spec, container)),
        volumes=tuple(mount.source for mount in container.mounts if mount.type == "volume" and mount.source),
    )


def planned_service(view: View, spec: ServiceSpec) -> NewObject:
    """Of a service that may come; what it refers to need not exist yet, and a service of its name may."""
    new = new_service(view, spec)
    present = (one for one in view.find(Service, name=spec.name) if one.removed_at is None)
    uses = [one for one in new.uses if one[1] is not None]
    uses += [("service", _by_id(one), one.spec.name) for one in present]
    return replace(new, uses=tuple(uses))


def _raised_priority(view: View, spec: ServiceSpec) -> int:
    """Its priority, if that is above 0 and above the one that the service has; else 0."""
    found = view.find(Service, name=spec.name)
    present = max((priority_of(one.spec.labels) for one in found if one.removed_at is None), default=0)
    priority = priority_of(spec.labels)
    return priority if priority > max(present, 0) else 0


def new_network(body: NetworkBody) -> NewObject:
    """Of a network to be made."""
    is_plain = body.driver == "overlay" and not body.ingress and not body.config_source
    rights = "" if is_plain else "a network that is no overlay, or the ingress network"
    return NewObject(name=body.name, stack=stack_of(body.labels), machine_rights=rights)


def new_file(spec: SecretSpec | ConfigSpec) -> NewObject:
    """Of a secret or config to be made, or updated."""
    return NewObject(name=spec.name, stack=stack_of(spec.labels))


def known_service(view: View, service: Service) -> Known:
    """Of a service; with the rights of the spec that a rollback would return to, and of a job's present run."""
    specs = (service.spec, service.previous_spec, as_run(view, service).spec)
    rights = next(filter(None, (machine_rights(view, spec) for spec in specs if spec is not None)), "")
    return Known(id=service.id, stack=stack_of(service.spec.labels), machine_rights=rights)


def known_task(view: View, task: Task) -> Known:
    """Of a task; with the rights that it was made with, which the specs of its service may not have any more."""
    service = view.lookup(Service, task.service_id)
    known = known_service(view, service) if service is not None else Known(id="")
    rights = known.machine_rights
    if has_unknown_spec(view, task):
        rights = rights or "a spec that cannot be read"
    else:
        rights = rights or machine_rights(view, spec_of(view, task) or ServiceSpec(task_template=task.spec))
    return Known(id=task.id, stack=known.stack, machine_rights=rights)


def machine_rights(view: View, spec: ServiceSpec) -> str:
    """What a service could do to its machine that only administrators may give; empty: nothing."""
    template = spec.task_template
    if template.plugin_spec is not None or template.network_attachment_spec is not None:
        return "a task that is no container"
    return next(_rights(view, spec, template.container_spec or ContainerSpec()), "")


def _rights(view: View, spec: ServiceSpec, container: ContainerSpec) -> Iterator[str]:
    for mount in container.mounts:
        if what := _mount_right(mount):
            yield what
    try:
        if kinds := rights_of(container).kinds:
            yield f"rights over its machine ({rights_text(kinds)})"
    except SkepError as error:
        yield f"labels that cannot be read ({error})"
    if container.capability_add:
        yield f"the capabilities {', '.join(container.capability_add)}"
    privileges = container.privileges
    if privileges is not None and (
        privileges.credential_spec is not None
        or privileges.selinux_context is not None
        or (privileges.seccomp is not None and privileges.seccomp.mode not in ("", "default"))
        or (privileges.app_armor is not None and privileges.app_armor.mode not in ("", "default"))
    ):
        yield "security options"
    log_driver = spec.task_template.log_driver
    for name, value in (log_driver.options if log_driver is not None else {}).items():
        if value and (name in _LOG_FILES or (name.endswith("-address") and _is_unix(value))):
            yield f"a file of its machine (log option {name})"
    if what := machine_log(view, log_driver):
        yield what
    if container.oom_score_adj < 0:
        yield "a lower score for the kernel's out-of-memory killer"
    for attachment in (*spec.task_template.networks, *spec.networks):
        if name := _network_of_machine(view, attachment.target):
            yield f"the machine's network {name}"


def _network_of_machine(view: View, target: str) -> str:
    """The name of the machine's network that ``target`` means; empty: it is another.  The docker command sends ids."""
    if target in _HOST:
        return target
    try:
        spec = view.resolve(Network, target).spec
    except SkepError:
        return ""
    return spec.name if PREDEFINED_LABEL in spec.labels else ""


def _is_unix(address: str) -> bool:
    """Parsers of URLs leave out spaces and control characters: so does this."""
    scheme = "".join(filter(str.isalnum, address.lower().partition(":")[0]))
    return scheme.startswith("unix")


def _mount_right(mount: Mount) -> str:
    match mount.type:
        case "tmpfs" | "cluster":
            return ""
        case "volume":
            driver = mount.volume_options.driver_config if mount.volume_options is not None else None
            if driver is not None and (driver.options or driver.name not in ("", "local")):
                return f"options of the driver of the volume {mount.source}"
            return ""
        case _:
            return f"a {mount.type} mount of {mount.source}"


def _uses(view: View, spec: ServiceSpec, container: ContainerSpec) -> Iterator[tuple[str, Known | None, str]]:
    for attachment in (*spec.task_template.networks, *spec.networks):
        yield "network", _named(view, Network, attachment.target), attachment.target
    for secret in container.secrets:
        yield "secret", _by_id(view.lookup(Secret, secret.secret_id)), secret.secret_name
    for config in container.configs:
        yield "config", _by_id(view.lookup(Config, config.config_id)), config.config_name
    for mount in container.mounts:
        if mount.type == "cluster":
            yield "volume", _named(view, Volume, mount.source), mount.source


def _named(view: View, kind: type[Network] | type[Volume], word: str) -> Known | None:
    try:
        return _by_id(view.resolve(kind, word))
    except SkepError:
        return None


def _by_id(found: Any) -> Known | None:
    return Known(id=found.id, stack=stack_of(found.spec.labels)) if found is not None else None
