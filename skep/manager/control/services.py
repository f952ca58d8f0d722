"""Operations on services.

Creating, updating and removing a service write its spec; the leader's loops do the rest.  The specs passed in are
``settled`` (see ``service_form``) and name networks by id.

Source: swarmkit, manager/controlapi/service.go; moby 20.10, daemon/cluster/services.go.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from msgspec.structs import replace

from skep.api.errors import Untranslated
from skep.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfSequence,
    PermissionDenied,
    Unimplemented,
)
from skep.manager.cluster import cluster_of
from skep.manager.control.networks import known_ingress_network
from skep.manager.control.quotas import check_quota
from skep.manager.control.service_rules import check_service_spec
from skep.manager.dependents import check_dependencies, restart_dependents
from skep.manager.job_runs import first_job, next_job
from skep.manager.registry_auth import auth_for, auth_of, follow_rollback, keep_auth, with_registry
from skep.manager.removal import hide_service
from skep.manager.trust import trusted_after
from skep.model.autoscaling import with_number_kept
from skep.model.ids import IdSource, ServiceId
from skep.model.meta import Version
from skep.model.needs import cannot_share, needs_of
from skep.model.network import Network, is_ingress
from skep.model.readable import NameSource, free_name
from skep.model.rights import allowed_by, rights_of, rights_text
from skep.model.schedules import CRON
from skep.model.secret import Config, Secret
from skep.model.service import (
    NetworkAttachmentConfig,
    PublishMode,
    Service,
    ServiceSpec,
    UpdateOrder,
    UpdateState,
    UpdateStatus,
)
from skep.model.times import Timestamp
from skep.model.volume import Volume
from skep.store.interface import Transaction, View
from skep.store.kinds import previous_registry_auth_id, registry_auth_id
from skep.store.level import SCHEDULES

AuthSource = Literal["spec", "previous-spec"]
"""Source of the registry credentials of an update that has none."""


def create_service(
    tx: Transaction,
    spec: ServiceSpec,
    *,
    new_id: IdSource,
    new_name: NameSource,
    now: Timestamp,
    registry_auth: str = "",
    by_admin: bool = False,
) -> Service:
    """Create a service; one without a name gets a readable one that is free.

    Args:
        registry_auth: the ``X-Registry-Auth`` that nodes pull the image with; kept apart, never shown.
        by_admin: whether an administrator asks for it (``manager.trust``).

    Raises:
        InvalidArgument: the spec can never work, a port is taken, a secret or config is missing.
        PermissionDenied: the cluster does not allow the rights over nodes that it asks for, or its stack has a quota.
        AlreadyExists: the name is taken.
        FailedPrecondition: it publishes ports on the ingress network and there is none.
        Unavailable: what it needs cannot be read.
    """
    if not spec.name:
        spec = replace(spec, name=_free_name(tx, new_name))
    spec = with_number_kept(spec, None)
    check_service_spec(spec)
    _check_level(tx, spec)
    check_dependencies(tx, spec)
    _check_rights(tx, spec)
    check_quota(tx, spec)
    _check_volumes(tx, spec)
    _check_attachments(tx, spec)
    _check_ingress(tx, spec)
    check_files(tx, spec)
    service = tx.put(
        Service(
            id=ServiceId(new_id()),
            created_at=now,
            spec=spec,
            trusted=trusted_after(tx, None, spec, by_admin=by_admin),
            job_status=first_job(tx, spec, now),
        )
    )
    keep_auth(tx, registry_auth_id(service.id), auth_for(spec, with_registry(spec, registry_auth)))
    return service


def update_service(
    tx: Transaction,
    id: ServiceId,
    spec: ServiceSpec,
    version: int,
    *,
    now: Timestamp,
    registry_auth: str = "",
    registry_auth_from: AuthSource = "spec",
    by_admin: bool = False,
) -> Service:
    """Replace the spec of a service that is still at ``version``; the spec before it stays as ``previous_spec``.

    Raises:
        InvalidArgument, FailedPrecondition: as for ``create_service``.
        NotFound: it was removed.
        Unimplemented: the update changes the mode, the name, or networks in the old place.
        OutOfSequence: the service is at another version.
        Unavailable: it is a job, or restarts one, whose present run this manager cannot read.
    """
    service = _changeable(tx, id, spec, version)
    spec = with_number_kept(spec, service.spec)
    _check_rights(tx, spec, service.spec)
    check_quota(tx, spec, service)
    _check_volumes(tx, spec, service.spec)
    current_auth = with_registry(service.spec, auth_of(tx, registry_auth_id(id)))
    if registry_auth:
        registry_auth = with_registry(spec, registry_auth)
    elif registry_auth_from == "previous-spec":
        previous_auth = auth_of(tx, previous_registry_auth_id(id))
        registry_auth = with_registry(service.previous_spec or service.spec, previous_auth)
    else:
        registry_auth = current_auth
    keep_auth(tx, registry_auth_id(id), auth_for(spec, registry_auth))
    keep_auth(tx, previous_registry_auth_id(id), current_auth)
    restart_dependents(tx, service, spec.task_template, now)
    return tx.put(
        replace(
            service,
            spec=spec,
            previous_spec=service.spec,
            trusted=trusted_after(tx, service, spec, by_admin=by_admin),
            update_status=None,
            job_status=next_job(tx, service, spec, now),
        )
    )


def rollback_service(
    tx: Transaction, id: ServiceId, spec: ServiceSpec, version: int, *, now: Timestamp
) -> Service:
    """Swap the present and the previous spec.  ``spec``, sent along by the client, is checked and not used.

    Raises:
        FailedPrecondition: there is no previous spec; the rest as for ``update_service``.
    """
    service = _changeable(tx, id, spec, version)
    if service.previous_spec is None:
        raise FailedPrecondition(f"service {id} does not have a previous spec")
    check_dependencies(tx, service.previous_spec)
    _check_ingress(tx, service.previous_spec)
    _check_rights(tx, service.previous_spec, service.spec)
    check_quota(tx, service.previous_spec, service)
    _check_volumes(tx, service.previous_spec)
    follow_rollback(tx, service)
    restart_dependents(tx, service, service.previous_spec.task_template, now)
    return tx.put(
        replace(
            service,
            spec=service.previous_spec,
            previous_spec=service.spec,
            trusted=trusted_after(tx, service, service.previous_spec, by_admin=False),
            update_status=UpdateStatus(
                state=UpdateState.ROLLBACK_STARTED, message="manually requested rollback", started_at=now
            ),
            job_status=next_job(tx, service, service.previous_spec, now),
        )
    )


def remove_service(tx: Transaction, id: ServiceId, *, now: Timestamp, version: int | None = None) -> None:
    """Remove a service: its name, ports and references are free at once, its tasks stop by and by.

    The record stays, hidden, as owner of its tasks; the leader deletes it after the last of them.

    Raises:
        NotFound: it was removed.
        OutOfSequence: it is not at ``version``.
    """
    service = _present(tx, id)
    if version is not None and service.version != Version(index=version):
        raise OutOfSequence
    hide_service(tx, service, now)


def names_networks(spec: ServiceSpec) -> bool:
    """Whether ``with_network_ids`` has anything to do."""
    return bool(spec.task_template.networks or spec.networks)


def with_network_ids(view: View, spec: ServiceSpec) -> ServiceSpec:
    """``spec`` with networks by id, which clients may name by name or by the beginning of an id.

    Raises:
        Untranslated: no such network; InvalidArgument: several.
    """
    template = spec.task_template
    if template.networks:
        networks = _resolved(view, template.networks)
        return replace(spec, task_template=replace(template, networks=networks))
    return replace(spec, networks=_resolved(view, spec.networks)) if spec.networks else spec


def _resolved(
    view: View, attachments: Iterable[NetworkAttachmentConfig]
) -> tuple[NetworkAttachmentConfig, ...]:
    try:
        return tuple(
            replace(attachment, target=view.resolve(Network, attachment.target).id)
            for attachment in attachments
        )
    except NotFound as error:
        raise Untranslated(str(error)) from error  # the engine has no class for this error


def _free_name(tx: Transaction, new_name: NameSource) -> str:
    name = free_name(new_name, lambda name: bool(tx.find(Service, name=name)), attempts=1_000)
    if name is None:
        raise InvalidArgument("no generated name is free: name the service")
    return name


def _changeable(tx: Transaction, id: ServiceId, spec: ServiceSpec, version: int) -> Service:
    """The service ``id``, to which ``spec`` may be applied.  The order of the checks is SwarmKit's."""
    check_service_spec(spec)
    _check_level(tx, spec)
    check_dependencies(tx, spec)
    _check_attachments(tx, spec)
    service = _present(tx, id)
    if (
        service.spec.networks != spec.networks
        and service.spec.task_template.networks == spec.task_template.networks
    ):
        raise Unimplemented("networks must be migrated to TaskSpec before being changed")
    check_files(tx, spec)
    if service.spec.mode.name != spec.mode.name:
        raise Unimplemented("service mode change is not allowed")
    if service.spec.name != spec.name:
        raise Unimplemented("renaming services is not supported")
    _check_ingress(tx, spec)
    if service.version != Version(index=version):
        raise OutOfSequence
    return service


def _present(tx: Transaction, id: ServiceId) -> Service:
    service = tx.get(Service, id)
    if service.removed_at is not None:
        raise NotFound(f"service {id} not found")
    return service


def _check_level(view: View, spec: ServiceSpec) -> None:
    """Raises: FailedPrecondition: a manager is too old for schedules: with it as leader the job would run at once."""
    if CRON in spec.labels and view.level < SCHEDULES:
        raise FailedPrecondition("schedules need managers of this version: upgrade the others first")


def _check_rights(view: View, spec: ServiceSpec, present: ServiceSpec | None = None) -> None:
    """Raises: PermissionDenied: the cluster does not allow its services what the spec asks for.

    Tasks as those of ``present`` are not asked about again: scaling goes on when the cluster allows less than before.
    """
    kinds = rights_of(spec.task_template.container_spec).kinds
    if not kinds or (present is not None and spec.task_template == present.task_template):
        return
    refused = kinds - allowed_by(cluster_of(view).spec.labels)
    if refused:
        raise PermissionDenied(
            f"the cluster does not allow its services: {rights_text(refused)} (see `skep cluster allow`)"
        )


def _check_volumes(view: View, spec: ServiceSpec, present: ServiceSpec | None = None) -> None:
    """Check that start-first can ever replace a task: the new one needs its cluster volumes beside the old one.

    SwarmKit starts such an update and never ends it.  A spec that was accepted before may be scaled.

    Raises:
        InvalidArgument: a volume cannot be shared.
    """
    rollouts = ("update", spec.update_config), ("rollback", spec.rollback_config)
    first = [
        name for name, config in rollouts if config is not None and config.order is UpdateOrder.START_FIRST
    ]
    if not first or (present is not None and spec == replace(present, mode=spec.mode)):
        return
    for mount in needs_of(spec).cluster_volumes:
        for volume in view.find(Volume, name=mount.source):
            if cannot_share(volume, mount):
                raise InvalidArgument(
                    f"cluster volume {mount.source} has sharing mode {volume.spec.access_mode.sharing.value}, so a new "
                    f"task cannot start beside the old one: use stop-first as the {first[0]} order"
                )


def _check_attachments(view: View, spec: ServiceSpec) -> None:
    for attachment in spec.task_template.networks:
        network = view.lookup(Network, attachment.target)
        if network is not None and is_ingress(network):
            raise InvalidArgument(
                f'Service cannot be explicitly attached to the ingress network "{network.spec.name}"'
            )


def _check_ingress(tx: Transaction, spec: ServiceSpec) -> None:
    """Raises: FailedPrecondition: it publishes ports on the ingress network, and there is none, also at the commit."""
    if not needs_ingress(spec):
        return
    network = known_ingress_network(tx)
    if network is None:
        raise FailedPrecondition("service needs ingress network, but no ingress network is present")
    tx.rely_on(Network, network.id)


def needs_ingress(spec: ServiceSpec) -> bool:
    """Whether the service publishes a port on every node of the cluster."""
    endpoint = spec.endpoint_spec
    return endpoint is not None and any(port.publish_mode is PublishMode.INGRESS for port in endpoint.ports)


def check_files(tx: Transaction, spec: ServiceSpec) -> None:
    """Raises: InvalidArgument: a secret or config of ``spec`` does not exist under the name that it gives."""
    container = spec.task_template.container_spec
    if container is None:
        return
    secrets = [(ref.secret_id, ref.secret_name) for ref in container.secrets]
    configs = [(ref.config_id, ref.config_name) for ref in container.configs]
    _check_known("secret", secrets, lambda secret_id: tx.rely_on(Secret, secret_id))
    _check_known("config", configs, lambda config_id: tx.rely_on(Config, config_id))


def _check_known(
    noun: str, references: Sequence[tuple[str, str]], lookup: Callable[[str], Secret | Config | None]
) -> None:
    missing = []
    for id, name in references:
        found = lookup(id)
        if found is None or found.spec.name != name:
            missing.append(name)
    if missing:
        raise InvalidArgument(f"{noun}{'s' if len(missing) > 1 else ''} not found: {', '.join(missing)}")


def auth_source(word: str, service: Service) -> AuthSource:
    """The value of ``registryAuthFrom`` of an update.

    Raises:
        Untranslated: it is no such word, or there is no previous spec.
    """
    match word:
        case "" | "spec":
            return "spec"
        case "previous-spec":
            if service.previous_spec is None:
                raise Untranslated("service does not have a previous spec")
            return "previous-spec"
        case _:
            raise Untranslated("unsupported registryAuthFrom value")
