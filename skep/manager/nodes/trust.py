"""Decides for which services nodes use their own rights to send logs to cluster machines and to log in to registries.

Users below administrator may write services, but a node sends logs and pulls images from the machine's own network, and
the leader asks queries from there.  So it matters which user chose a log driver, an image, or a query with its URL.  A
service records the values that an administrator wrote.  These stay trusted if an operator changes something else or
rolls back to them.  An operator's value does not become trusted when an administrator changes something else.
"""

import ipaddress
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from skep.errors import InvalidArgument, PermissionDenied
from skep.manager.cluster import cluster_of, known_cluster
from skep.model.measures.queries import MetricQuery, is_of_machine, queries_in
from skep.model.options.labels import allowed_repositories, allows_machine_logs
from skep.model.permissions.access import EVERY_STACK, Role
from skep.model.permissions.rights import allowed_by, labels_for, rights_of, rights_text
from skep.model.permissions.user import User
from skep.model.service import Service, ServiceSpec, TaskSpec, Trusted
from skep.model.staging.updates import is_undecided
from skep.model.task import Task, Trust
from skep.model.values.images import registry_of
from skep.model.values.meta import Driver
from skep.model.values.stacks import stack_of
from skep.model.values.times import unix_ns
from skep.store.interface import View

T = TypeVar("T")


def trusted_after(
    view: View,
    service: Service | None,
    spec: ServiceSpec,
    previous: ServiceSpec | None,
    *,
    by_admin: bool,
) -> Trusted:
    """Return the trusted values of a service after it gets ``spec`` and ``previous`` as its previous spec.

    ``service`` and ``previous`` are None for a new service.
    """
    before = service.spec if service is not None else None
    kept = trusted_of(view, service) if service is not None else Trusted()
    # Values that an older version wrote have no mark.  The first administrator who writes the service marks them.
    is_unmarked = service is not None and service.trusted is None
    known = None if is_unmarked else before

    def after(values: Callable[..., list[T]], trusted: Sequence[T]) -> tuple[T, ...]:
        of_known = values(known)
        result: list[T] = []
        for one in values(spec, previous):
            if one in trusted and one not in result:
                result.append(one)
        for one in values(spec) if by_admin else ():
            if one not in result and one not in of_known:
                result.append(one)
        return tuple(result)

    return Trusted(
        log_drivers=after(_logs, kept.log_drivers),
        repositories=after(_repositories, kept.repositories),
        queries=after(_queries, kept.queries),
    )


def trust_of(view: View, service: Service, task: Task) -> Trust:
    """Return the rights that the node of ``task`` may use for it."""
    known, labels, stack = trusted_of(view, service), _cluster_labels(view), stack_of(service.spec.labels)
    logs, repositories = _logs_of(task.spec), _repositories_of(task.spec)
    return Trust(
        logs=allows_machine_logs(labels) or all(driver in known.log_drivers for driver in logs),
        logins=all(
            name in known.repositories or allows_logins(labels, (stack,), name) for name in repositories
        ),
    )


def allows_logins(labels: Mapping[str, str], stacks: Iterable[str], repository: str) -> bool:
    """Return whether a cluster's labels let services of one of ``stacks`` use the nodes' credentials for
    ``repository``.
    """
    try:
        allowed = allowed_repositories(labels)
    except InvalidArgument:
        return False
    places = [place for stack in (*stacks, EVERY_STACK) for place in allowed.get(stack, ())]
    return any(repository == place or repository.startswith(f"{place}/") for place in places)


def machine_log(view: View, driver: Driver | None) -> str:
    """Return the log driver's use of the machine that needs an administrator, or an empty text.

    The node resolves host names and checks their addresses when it connects.
    """
    if driver is None or allows_machine_logs(_cluster_labels(view)):
        return ""
    options = {name: value for name, value in driver.options.items() if value}
    if driver.name == "journald" or (driver.name == "syslog" and "syslog-address" not in options):
        return f"the machine's own log (log driver {driver.name})"
    if driver.name == "fluentd" and "fluentd-address" not in options:
        return "an address of its machine (log driver fluentd without fluentd-address)"
    for name, value in options.items():
        if name.endswith(("-address", "-url")) and _is_of_machine(value):
            return f"an address of its machine (log option {name})"
    return ""


def check_rights(view: View, spec: ServiceSpec, service: Service | None = None) -> None:
    """Check that the cluster allows the rights that the spec requests.  Raises: PermissionDenied.

    Tasks that ``service`` already has are not checked again, so a service can be scaled when the cluster allows less
    than before, and a staged update can return to its old tasks.
    """
    container = spec.task_template.container_spec
    kinds = rights_of(container).kinds
    if not kinds:
        return
    present = [service.spec] if service is not None else []
    if service is not None and service.previous_spec is not None and is_undecided(service):
        present.append(service.previous_spec)
    if any(spec.task_template == one.task_template for one in present):
        return
    refused = kinds - allowed_by(cluster_of(view).spec.labels)
    if refused:
        raise PermissionDenied(
            f"this cluster does not allow services to use: {rights_text(refused)} "
            f"(requested by {', '.join(labels_for(container, refused))}; see `skep cluster allow`)"
        )


def machine_query(spec: ServiceSpec, trusted: Trusted) -> str:
    """Return the query of a spec that reaches the leader's machine and needs an administrator, or an empty text.

    The leader resolves host names and checks their addresses when it connects.
    """
    for query in queries_in(spec.labels):
        if query not in trusted.queries and is_of_machine(query.url):
            return f"an address of its manager's machine ({query.url})"
    return ""


def repository_of(image: str) -> str:
    """Return the name of an image without tag and digest, with its registry, which is ``docker.io`` for Docker Hub."""
    name = image.partition("@")[0]
    head, _, last = name.rpartition("/")
    name = f"{head}/{last.partition(':')[0]}" if head else last.partition(":")[0]
    if registry_of(image):
        return name
    path = name.removeprefix("index.docker.io/").removeprefix("docker.io/")
    return f"docker.io/{path}" if "/" in path else f"docker.io/library/{path}"


def _is_of_machine(address: str) -> bool:
    place = address.partition("://")[2] or address
    host = place.partition("/")[0].rpartition("@")[2]
    host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if not host or host.lower().rstrip(".").rpartition(".")[2] == "localhost":
        return True
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    found = getattr(found, "ipv4_mapped", None) or found
    return found.is_loopback or found.is_link_local or found.is_unspecified


def trusted_of(view: View, service: Service) -> Trusted:
    """Return the trusted values of a service in its current state.

    A service that an older version wrote last has no mark.  All its values are trusted, unless an operator existed by
    then and may have written them.
    """
    if service.trusted is not None:
        return service.trusted
    written_ns = unix_ns(service.updated_at)
    if any(_writes(user) and unix_ns(user.created_at) <= written_ns for user in view.find(User)):
        return Trusted()
    both = service.spec, service.previous_spec
    return Trusted(
        log_drivers=tuple(_logs(*both)),
        repositories=tuple(_repositories(*both)),
        queries=tuple(_queries(*both)),
    )


def _writes(user: User) -> bool:
    """Return whether a user below administrator may write services."""
    roles = {role.partition(":")[0] for role in user.spec.roles}
    return Role.OPERATOR.word in roles and Role.ADMIN.word not in roles


def _cluster_labels(view: View) -> Mapping[str, str]:
    swarm = known_cluster(view)
    return swarm.spec.labels if swarm is not None else {}


def _logs(*specs: ServiceSpec | None) -> list[Driver]:
    return [driver for spec in specs if spec is not None for driver in _logs_of(spec.task_template)]


def _logs_of(template: TaskSpec) -> list[Driver]:
    """Return the log driver, if it differs from the node's default."""
    driver = template.log_driver
    return [driver] if driver is not None and (driver.name or driver.options) else []


def _queries(*specs: ServiceSpec | None) -> list[MetricQuery]:
    return [query for spec in specs if spec is not None for query in queries_in(spec.labels)]


def _repositories(*specs: ServiceSpec | None) -> list[str]:
    return [name for spec in specs if spec is not None for name in _repositories_of(spec.task_template)]


def _repositories_of(template: TaskSpec) -> list[str]:
    container = template.container_spec
    return [repository_of(container.image)] if container is not None else []
