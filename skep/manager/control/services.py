"""Operations on services.

To create, update or remove a service means to write its spec.  The leader's loops do the rest.  The callers pass specs
that are ``settled`` (see ``service_form``) and have ids of networks.

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
    Unimplemented,
)
from skep.manager.acme.own_certificates import check_certificates
from skep.manager.control.networks import known_ingress_network
from skep.manager.control.quotas import check_quota
from skep.manager.control.validation.service_rules import check_service_spec
from skep.manager.nodes.trust import check_rights, trusted_after
from skep.manager.services.dependent_services import check_dependencies, restart_dependents
from skep.manager.services.job_runs import first_job, next_job
from skep.manager.services.registry_auth import auth_for, auth_of, follow_rollback, keep_auth, with_registry
from skep.manager.services.removal import hide_service
from skep.manager.services.routes import check_routes
from skep.manager.services.spec_history import comparable, keep_spec
from skep.model.door.routes import tls_secrets
from skep.model.needs import cannot_share, needs_of
from skep.model.network import Network, is_ingress
from skep.model.options.affinity import PLACEMENT_LABELS
from skep.model.options.autoscaling import AUTOSCALE, wakes_on_request, with_number_kept
from skep.model.options.constraints import is_dockers, parsed
from skep.model.options.labels import FORMER_VOLUMES, VOLUME_AFFINITY, is_stopped
from skep.model.options.schedules import CRON
from skep.model.secret import Config, Secret
from skep.model.service import (
    NetworkAttachmentConfig,
    Placement,
    PublishMode,
    Service,
    ServiceSpec,
    SpecAuthor,
    UpdateOrder,
    UpdateState,
    UpdateStatus,
)
from skep.model.staging.updates import (
    UPDATE,
    is_same_update,
    is_undecided,
    split_of_rollback,
    stages_of,
    status_after,
)
from skep.model.values.ids import IdSource, ServiceId
from skep.model.values.meta import Version
from skep.model.values.name_generator import NameSource, free_name
from skep.model.values.times import Timestamp
from skep.model.volume import Volume
from skep.store.interface import Transaction, View
from skep.store.kinds import previous_registry_auth_id, registry_auth_id
from skep.store.level import PLACEMENTS, SCHEDULES, STOPS, VOLUME_AFFINITIES, ZERO_TASKS

AuthSource = Literal["spec", "previous-spec"]
"""Source of the registry credentials of an update that has no credentials."""


def create_service(
    tx: Transaction,
    spec: ServiceSpec,
    *,
    new_id: IdSource,
    new_name: NameSource,
    now: Timestamp,
    registry_auth: str = "",
    by_admin: bool = False,
    by: str = "",
) -> Service:
    """Create a service.  A service without a name gets a free readable name.

    Args:
        registry_auth: The ``X-Registry-Auth`` for pulling the image.  It is stored separately and never shown.
        by_admin: Whether an administrator creates it (``manager.nodes.trust``).
        by: The author (``SpecAuthor.by``).

    Raises:
        InvalidArgument: The spec cannot work, a port is taken, or a secret or config is missing.
        PermissionDenied: The cluster does not allow the requested rights over nodes, or the stack's quota is exceeded.
        AlreadyExists: The name is taken.
        FailedPrecondition: It publishes ports on the ingress network, which does not exist.
        Unavailable: An object that it needs cannot be read.
    """
    if not spec.name:
        spec = replace(spec, name=_free_name(tx, new_name))
    spec = with_number_kept(spec, None)
    check_service_spec(spec)
    check_level(tx, spec)
    check_dependencies(tx, spec)
    check_routes(tx, spec)
    check_certificates(tx, spec)
    check_rights(tx, spec)
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
            author=SpecAuthor(by=by, at=now),
            trusted=trusted_after(tx, None, spec, None, by_admin=by_admin),
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
    by: str = "",
) -> Service:
    """Replace the spec of a service that is still at ``version``, and keep the old one as ``previous_spec``.

    Raises:
        InvalidArgument, FailedPrecondition: See ``create_service``.
        NotFound: The service was removed.
        Unimplemented: The update changes the mode, the name, or networks in the old field.
        OutOfSequence: The service is at another version.
        Unavailable: This manager cannot read the current run of the job, or of a job that it would restart.
    """
    service = _changeable(tx, id, spec, version)
    spec = with_number_kept(spec, service.spec)
    check_routes(tx, spec, id)
    check_certificates(tx, spec, id)
    check_rights(tx, spec, service)
    check_quota(tx, spec, service)
    _check_volumes(tx, spec, service.spec)
    previous = previous_after(service, spec)
    current_auth = with_registry(service.spec, auth_of(tx, registry_auth_id(id)))
    previous_auth = auth_of(tx, previous_registry_auth_id(id))
    previous_auth = with_registry(service.previous_spec or service.spec, previous_auth)
    if registry_auth:
        registry_auth = with_registry(spec, registry_auth)
    else:
        registry_auth = previous_auth if registry_auth_from == "previous-spec" else current_auth
    keep_auth(tx, registry_auth_id(id), auth_for(spec, registry_auth))
    # The previous spec of an undecided staged update stays, and may have an image of another registry.
    keep_auth(tx, previous_registry_auth_id(id), auth_for(previous, current_auth, previous_auth))
    restart_dependents(tx, service, spec.task_template, now)
    return tx.put(
        replace(
            service,
            spec=spec,
            author=keep_spec(tx, service, spec, SpecAuthor(by=by, at=now)),
            previous_spec=previous,
            trusted=trusted_after(tx, service, spec, previous, by_admin=by_admin),
            update_status=status_after(service, spec, now),
            job_status=next_job(tx, service, spec, now),
        )
    )


def previous_after(service: Service, new: ServiceSpec) -> ServiceSpec:
    """Return the previous spec of ``new``.

    A rollback shall not stop a service that ``new`` starts, and not lead to a staged update that never ended.  It
    keeps the number of tasks that a staged update was scaled to.
    """
    previous = service.spec
    if is_undecided(service) and service.previous_spec is not None:
        previous = service.previous_spec
        if is_same_update(service.spec, new):
            previous = replace(previous, mode=new.mode)
    is_started = is_stopped(service.spec.labels) and not is_stopped(new.labels)
    return comparable(previous) if is_started else previous


def rollback_service(
    tx: Transaction, id: ServiceId, spec: ServiceSpec, version: int, *, now: Timestamp, by: str = ""
) -> Service:
    """Swap the current and the previous spec.  ``spec`` comes from the client, and is checked but not used.

    Raises:
        FailedPrecondition: There is no previous spec.  For other errors see ``update_service``.
    """
    service = _changeable(tx, id, spec, version)
    if service.previous_spec is None:
        raise FailedPrecondition(f"service {id} does not have a previous spec")
    previous = with_number_kept(service.previous_spec, service.spec)
    if CRON in previous.labels:  # only a request for a run starts one
        forced = service.spec.task_template.force_update
        previous = replace(previous, task_template=replace(previous.task_template, force_update=forced))
    check_dependencies(tx, previous)
    check_routes(tx, previous, id)
    check_certificates(tx, previous, id)
    _check_ingress(tx, previous)
    check_rights(tx, previous, service)
    check_quota(tx, previous, service)
    _check_volumes(tx, previous)
    follow_rollback(tx, service)
    restart_dependents(tx, service, previous.task_template, now)
    return tx.put(
        replace(
            service,
            spec=previous,
            author=keep_spec(tx, service, previous, SpecAuthor(by=by, at=now)),
            previous_spec=service.spec,
            trusted=trusted_after(tx, service, previous, service.spec, by_admin=False),
            update_status=_begun_rollback(service, now),
            job_status=next_job(tx, service, previous, now),
        )
    )


def _begun_rollback(service: Service, now: Timestamp) -> UpdateStatus:
    """Return the status of a rollback that a user has just requested.

    That of a job is over at once, because its next run starts with the spec.  In Docker it never ends.
    """
    if service.job_status is not None:
        state, message = UpdateState.ROLLBACK_COMPLETED, "rollback completed"
        return UpdateStatus(state=state, message=message, started_at=now, completed_at=now)
    return UpdateStatus(
        state=UpdateState.ROLLBACK_STARTED,
        message="manually requested rollback",
        started_at=now,
        split=split_of_rollback(service),
    )


def remove_service(tx: Transaction, id: ServiceId, *, now: Timestamp, version: int | None = None) -> None:
    """Remove a service.  Its name, ports and references are free at once, and its tasks stop gradually.

    The record stays, hidden, as the owner of its tasks.  The leader deletes it after the last task.

    Raises:
        NotFound: The service was removed.
        OutOfSequence: The service is not at ``version``.
    """
    service = present_service(tx, id)
    if version is not None and service.version != Version(index=version):
        raise OutOfSequence
    hide_service(tx, service, now)


def names_networks(spec: ServiceSpec) -> bool:
    """Return whether ``with_network_ids`` would change anything."""
    return bool(spec.task_template.networks or spec.networks)


def with_network_ids(
    view: View, spec: ServiceSpec, among: Callable[[Network], bool] | None = None
) -> ServiceSpec:
    """Return ``spec`` with network ids in place of names or id prefixes.

    Args:
        among: See ``View.resolve``.

    Raises:
        Untranslated: A network does not exist.
        InvalidArgument: A name or prefix is ambiguous.
    """
    template = spec.task_template
    if template.networks:
        networks = _resolved(view, template.networks, among)
        return replace(spec, task_template=replace(template, networks=networks))
    return replace(spec, networks=_resolved(view, spec.networks, among)) if spec.networks else spec


def _resolved(
    view: View,
    attachments: Iterable[NetworkAttachmentConfig],
    among: Callable[[Network], bool] | None,
) -> tuple[NetworkAttachmentConfig, ...]:
    try:
        return tuple(
            replace(attachment, target=view.resolve(Network, attachment.target, among).id)
            for attachment in attachments
        )
    except NotFound as error:
        raise Untranslated(str(error)) from error  # as in moby, which responds 500: its error has no status


def _free_name(tx: Transaction, new_name: NameSource) -> str:
    name = free_name(new_name, lambda name: bool(tx.find(Service, name=name)), attempts=1_000)
    if name is None:
        raise InvalidArgument("all generated names are taken: give the service a name")
    return name


def _changeable(tx: Transaction, id: ServiceId, spec: ServiceSpec, version: int) -> Service:
    """Return the service ``id`` to which ``spec`` may be applied.  The order of the checks is SwarmKit's."""
    check_service_spec(spec)
    check_level(tx, spec)
    check_dependencies(tx, spec)
    _check_attachments(tx, spec)
    service = present_service(tx, id)
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


def present_service(view: View, id: ServiceId) -> Service:
    """Return a service that was not removed.  Raises: NotFound."""
    service = view.get(Service, id)
    if service.removed_at is not None:
        raise NotFound(f"service {id} not found")
    return service


def check_level(view: View, spec: ServiceSpec) -> None:
    """Refuse labels that an older manager would not honor as the leader.  Raises: FailedPrecondition."""
    if CRON in spec.labels and view.level < SCHEDULES:
        raise FailedPrecondition("schedules need managers of this version: upgrade the others first")
    if VOLUME_AFFINITY in spec.labels and view.level < VOLUME_AFFINITIES:
        raise FailedPrecondition(
            f"{VOLUME_AFFINITY} needs managers of this version: use {FORMER_VOLUMES} (return, keep, spread) until all "
            "managers are upgraded"
        )
    if is_stopped(spec.labels) and view.level < STOPS:
        raise FailedPrecondition("a stopped service needs managers of this version: upgrade the others first")
    if wakes_on_request(spec.labels) and view.level < ZERO_TASKS:
        raise FailedPrecondition(
            f"{AUTOSCALE}={spec.labels[AUTOSCALE]} needs managers of this version: upgrade the others first"
        )
    constraints = parsed((spec.task_template.placement or Placement()).constraints)
    new = [name for name in PLACEMENT_LABELS if name in spec.labels]
    new += [f"the constraint {one.text}" for one in constraints if not is_dockers(one)]
    if new and view.level < PLACEMENTS:
        raise FailedPrecondition(f"{new[0]} needs managers of this version: upgrade the others first")


def _check_volumes(view: View, spec: ServiceSpec, present: ServiceSpec | None = None) -> None:
    """Check that start-first or a staged update can replace a task, because the new task needs its cluster volumes
    while the old one still has them.

    SwarmKit starts such an update, which never ends.  A service whose spec was accepted earlier can still be scaled.

    Raises:
        InvalidArgument: A volume cannot be shared.
    """
    rollouts = ("update", spec.update_config), ("rollback", spec.rollback_config)
    changes = [
        f"use stop-first as the {name} order"
        for name, config in rollouts
        if config is not None and config.order is UpdateOrder.START_FIRST
    ]
    if stages_of(spec.labels):
        changes.append(f"remove the label {UPDATE}")
    if not changes or (present is not None and spec == replace(present, mode=spec.mode)):
        return
    for mount in needs_of(spec).cluster_volumes:
        for volume in view.find(Volume, name=mount.source):
            if cannot_share(volume, mount):
                raise InvalidArgument(
                    f"cluster volume {mount.source} has sharing mode {volume.spec.access_mode.sharing.value}, so a new "
                    f"task cannot start while the old one runs: {changes[0]}"
                )


def _check_attachments(view: View, spec: ServiceSpec) -> None:
    for attachment in spec.task_template.networks:
        network = view.lookup(Network, attachment.target)
        if network is not None and is_ingress(network):
            raise InvalidArgument(
                f'Service cannot be explicitly attached to the ingress network "{network.spec.name}"'
            )


def _check_ingress(tx: Transaction, spec: ServiceSpec) -> None:
    """If the spec publishes ports on the ingress network, check that it exists, now and when the transaction commits.

    Raises:
        FailedPrecondition: It does not exist.
    """
    if not needs_ingress(spec):
        return
    network = known_ingress_network(tx)
    if network is None:
        raise FailedPrecondition("service needs ingress network, but no ingress network is present")
    tx.rely_on(Network, network.id)


def needs_ingress(spec: ServiceSpec) -> bool:
    """Return whether the service publishes a port on every node of the cluster."""
    endpoint = spec.endpoint_spec
    return endpoint is not None and any(port.publish_mode is PublishMode.INGRESS for port in endpoint.ports)


def check_files(tx: Transaction, spec: ServiceSpec) -> None:
    """Check that the secrets and configs of ``spec`` exist under its names, now and when the transaction commits.

    Secrets with certificates, which labels name, are checked by ``check_certificates``.

    Raises: InvalidArgument.
    """
    for name in tls_secrets(spec.labels):
        for secret in tx.find(Secret, name=name):
            tx.rely_on(Secret, secret.id)
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
    """Parse the parameter ``registryAuthFrom`` of an update.

    Raises:
        Untranslated: The value is unknown, or the previous spec is missing.
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
