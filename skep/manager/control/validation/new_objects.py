"""Collects the facts about new objects that decide whether a user may create them: stack, used objects, requested
rights.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from msgspec.structs import replace

from skep.api.access.permissions import KnownObject, NewObject, sees
from skep.api.formats.networks import PREDEFINED_LABEL
from skep.errors import SkepError
from skep.manager.cluster import reserved_ports_of
from skep.manager.nodes.trust import machine_log, machine_query, trusted_of
from skep.model.container import ContainerSpec
from skep.model.door.routes import tls_secrets
from skep.model.needs import sources_of
from skep.model.network import Network, NetworkSpec
from skep.model.options.affinity import named_services
from skep.model.options.dependencies import dependencies_of
from skep.model.options.labels import priority_of
from skep.model.permissions.access import EVERY_STACK, Identity
from skep.model.permissions.field_rights import admin_rights
from skep.model.permissions.user import User
from skep.model.quota import StackQuota
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import Service, ServiceSpec, Trusted
from skep.model.task import Task
from skep.model.values.stacks import stack_of
from skep.model.volume import Volume
from skep.store.interface import View
from skep.store.kinds import has_unknown_spec, spec_of, specs_in_use


def stacks_of(view: View) -> frozenset[str]:
    """Return every stack that has an object, a quota, or a role of a user.

    A stack that was removed keeps its names if a quota or role names it, because its volumes outlive it.
    """
    kinds: tuple[type[Any], ...] = (Service, Network, Secret, Config, Volume)
    found = {stack_of(one.spec.labels) for kind in kinds for one in view.find(kind)}
    found |= {quota.spec.name for quota in view.find(StackQuota)}
    for user in view.find(User):
        for role in user.spec.roles:
            found.add(role.partition(":")[2])
    return frozenset(found - {"", EVERY_STACK})


def visible_to(view: View, identity: Identity) -> Callable[[Any], bool] | None:
    """Return the ``among`` of ``View.resolve`` for ``identity``, which accepts visible objects, or None if all are
    visible.

    Without it, responses would reveal whether another stack has an object with some name or prefix.
    """
    if sees(identity, ""):
        return None

    def is_visible(one: Any) -> bool:
        owner = view.lookup(Service, one.service_id) if isinstance(one, Task) else one
        return owner is not None and sees(identity, stack_of(owner.spec.labels))

    return is_visible


def new_service(view: View, spec: ServiceSpec, among: Callable[[Any], bool] | None = None) -> NewObject:
    """Return the facts about a service to create or update.  For ``among`` see ``visible_to``."""
    container = spec.task_template.container_spec or ContainerSpec()
    return NewObject(
        name=spec.name,
        stack=stack_of(spec.labels),
        machine_rights=machine_rights(view, spec, _present(view, spec.name)),
        raised_priority=_raised_priority(view, spec),
        uses=tuple(_uses(view, spec, container, among)),
        volumes=tuple(mount.source for mount in container.mounts if mount.type == "volume" and mount.source),
    )


def planned_service(view: View, spec: ServiceSpec, among: Callable[[Any], bool] | None = None) -> NewObject:
    """Return the facts about a planned service.

    The objects to which it refers need not exist yet, and a service with its name may exist.  Secrets and configs are
    found by their names, as in the deploy, and ids in the spec are ignored.
    """
    container = spec.task_template.container_spec or ContainerSpec()
    new = new_service(view, spec, among)
    uses = [one for one in new.uses if one[0] not in ("secret", "config")]
    secrets = [*(one.secret_name for one in container.secrets), *sorted(tls_secrets(spec.labels))]
    uses += [("secret", _by_name(view, Secret, name), name) for name in secrets]
    uses += [
        ("config", _by_name(view, Config, one.config_name), one.config_name) for one in container.configs
    ]
    if (present := _present(view, spec.name)) is not None:
        uses.append(("service", _by_id(present), present.spec.name))
    return replace(new, uses=tuple(uses), is_planned=True)


def _raised_priority(view: View, spec: ServiceSpec) -> int:
    """Return the service's priority if it is above 0 and above the service's current priority, else 0."""
    present, priority = _present(view, spec.name), priority_of(spec.labels)
    before = priority_of(present.spec.labels) if present is not None else 0
    return priority if priority > max(before, 0) else 0


def new_object(spec: NetworkSpec | SecretSpec | ConfigSpec) -> NewObject:
    """Return the facts about a network, secret or config to create or update."""
    return NewObject(name=spec.name, stack=stack_of(spec.labels), machine_rights=next(admin_rights(spec), ""))


def known_service(view: View, service: Service) -> KnownObject:
    """Return the facts about a service.

    Its rights include the rights of a job's current run, and of the spec that a rollback would restore.
    """
    rights = _rights_in_use(view, service)
    return KnownObject(id=service.id, stack=stack_of(service.spec.labels), machine_rights=rights)


def _rights_in_use(view: View, service: Service, current: str = "") -> str:
    """Return the first right of the service's specs with the spec that has it, or an empty string.

    Args:
        current: Words for the current spec, if it has the right.
    """
    for spec in specs_in_use(view, service):
        if rights := machine_rights(view, spec, service):
            if spec is service.spec:
                return rights + current
            if spec is service.previous_spec:
                return f"{rights} (in the service's previous spec, to which a rollback returns)"
            return f"{rights} (in the spec of the job's current run)"
    return ""


def known_task(view: View, task: Task) -> KnownObject:
    """Return the facts about a task.

    It keeps the rights it was created with, even if its service's spec no longer has them.
    """
    service = view.lookup(Service, task.service_id)
    if has_unknown_spec(view, task):
        rights = "a spec that cannot be read"
    else:
        spec = spec_of(view, task) or ServiceSpec(task_template=task.spec)
        rights = machine_rights(view, spec, service)
    if service is None:
        return KnownObject(id=task.id, machine_rights=rights)
    rights = rights or _rights_in_use(view, service, current=" (in the service's current spec)")
    return KnownObject(id=task.id, stack=stack_of(service.spec.labels), machine_rights=rights)


def _present(view: View, name: str) -> Service | None:
    return next((one for one in view.find(Service, name=name) if one.removed_at is None), None)


def machine_rights(view: View, spec: ServiceSpec, service: Service | None = None) -> str:
    """Return the first value in a spec that only administrators may set, or an empty string.

    Args:
        service: Service that has or gets the spec, and keeps the log driver and the queries that an administrator
            chose for it.  None for a new service.
    """
    template = spec.task_template
    attached = (_network_of_machine(view, one.target) for one in (*template.networks, *spec.networks))
    networks = (f"the machine's network {name}" for name in attached if name)
    trusted = trusted_of(view, service) if service is not None else Trusted()
    if found := next(chain(admin_rights(spec), reserved_ports(view, spec), networks), ""):
        return found
    if template.log_driver not in trusted.log_drivers and (found := machine_log(view, template.log_driver)):
        return found
    return machine_query(spec, trusted)


def _network_of_machine(view: View, target: str) -> str:
    """Return the name of the machine's network that ``target`` refers to, or an empty text for any other network.

    The docker command sends ids.
    """
    try:
        return view.resolve(Network, target, lambda one: PREDEFINED_LABEL in one.spec.labels).spec.name
    except SkepError:
        return ""


def _uses(
    view: View, spec: ServiceSpec, container: ContainerSpec, among: Callable[[Any], bool] | None
) -> Iterator[tuple[str, KnownObject | None, str]]:
    for attachment in (*spec.task_template.networks, *spec.networks):
        yield "network", _named(view, Network, attachment.target, among), attachment.target
    for secret in container.secrets:
        yield "secret", _by_id(view.lookup(Secret, secret.secret_id)), secret.secret_name
    for name in sorted(tls_secrets(spec.labels)):
        yield "secret", _by_name(view, Secret, name), name
    for config in container.configs:
        yield "config", _by_id(view.lookup(Config, config.config_id)), config.config_name
    for mount in container.mounts:
        if mount.type == "cluster":
            yield "volume", _cluster_volume(view, mount.source), mount.source
    for one in dependencies_of(spec.labels):
        yield "service", _by_id(_present(view, one.service)), one.service
    for name in named_services(spec.labels):
        if name.lower() != spec.name.lower():
            yield "service", _by_id(_present(view, name)), name


def _cluster_volume(view: View, source: str) -> KnownObject | None:
    """Return the volume that the scheduler chooses for ``source``, which is always a name and never an id.

    Returns None for a group (``group:NAME``), whose volumes may belong to any stack.
    """
    return next((_by_id(one) for one in view.find(Volume, name=source) if source in sources_of(one)), None)


def _named(
    view: View, kind: type[Network], word: str, among: Callable[[Any], bool] | None
) -> KnownObject | None:
    try:
        return _by_id(view.resolve(kind, word, among))
    except SkepError:
        return None


def _by_name(view: View, kind: type[Secret] | type[Config], name: str) -> KnownObject | None:
    return _by_id(next(iter(view.find(kind, name=name)), None))


def _by_id(found: Any) -> KnownObject | None:
    return KnownObject(id=found.id, stack=stack_of(found.spec.labels)) if found is not None else None


def reserved_ports(view: View, spec: ServiceSpec) -> Iterator[str]:
    """Yield the reserved ports that a service would publish, in ingress or host mode, with their uses."""
    ports = spec.endpoint_spec.ports if spec.endpoint_spec is not None else ()
    if not any(port.published_port for port in ports):
        return
    reserved = reserved_ports_of(view)
    for port in ports:
        if use := reserved.get((port.protocol, port.published_port)):
            yield f"the reserved port {port.published_port}/{port.protocol} ({use})"
