"""Kinds of objects that are internal to managers.  No API shows them."""

from collections.abc import Iterable
from typing import TypeVar
from zlib import crc32

import msgspec
from msgspec.structs import replace

from skep.model.node import IssuedSerial
from skep.model.options.dependencies import WAITS_FOR
from skep.model.options.labels import DISCONNECT_LABELS, disconnect_labels
from skep.model.service import Service, ServiceSpec
from skep.model.task import Task
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import ServiceId
from skep.model.values.meta import Version
from skep.model.values.times import Timestamp
from skep.store.interface import Transaction, View

ROOT_KEY_ID = "root-ca"
"""Id of the payload that holds the root's private key (PEM)."""

NEXT_ROOT_KEY_ID = "root-ca-next"
"""Id of the payload that holds the key (PEM) of the root to which the cluster rotates."""

GOSSIP_KEYS_ID = "gossip-keys"
"""Id of the payload that holds the keys of docker nodes' gossip (``model.networks.gossip``)."""

USERS_ROOT_ID = "users-root-ca"
"""Id of the payload that holds key and root (PEM) of the authority that issues users' certificates."""

UNKNOWN_SPEC = f"{WAITS_FOR}the spec that it was made from, which cannot be read on the manager that leads"
"""The error of a task that waits because of ``has_unknown_spec``."""

UNLOCK_KEY_ID = "unlock-key"
"""Id of the payload that holds the managers' unlock key.  It exists only while autolock is on."""


T = TypeVar("T", bound=msgspec.Struct)

_USERS_CLAIMS = 64
"""Number of counters.  Users of stacks with the same counter write one after the other."""


class SpecVersion(ApiObject):
    """One version of a service's spec.  Tasks of this version get their spec from it.

    The store writes it with every new spec.  It is removed together with the service, or by the leader once no task
    refers to it.  A task that outlives it has an empty spec.
    """

    id: str
    service_id: ServiceId
    index: int
    spec: ServiceSpec = always(ServiceSpec())


class Payload(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True):
    """Bytes that must never be shown as such: a secret's data, the root CA's key, registry credentials, past specs.

    The id names the object to which they belong: ``secret/<id>``, ``root-ca``, ``root-ca-next``, ``registry/<service
    id>``.  Only the dispatcher and the CA read payloads, by their ids.
    """

    id: str
    data: bytes = b""

    def __repr__(self) -> str:
        return f"Payload(id={self.id!r}, data=<{len(self.data)} bytes>)"


class Revocation(ApiObject):
    """The revoked certificates of a node.  Deleted when the last of them has expired.

    Attributes:
        id: The node's id.
        is_removed: Whether all its certificates are revoked, not only the ``serials``.
    """

    id: str
    until: Timestamp
    is_removed: bool = False
    serials: tuple[IssuedSerial, ...] = ()
    """Serial numbers of its manager certificates, for etcd's peer port."""
    before: Timestamp = Timestamp("")
    """All its certificates that were issued up to this time are revoked as manager certificates."""
    foreign: tuple[IssuedSerial, ...] = ()
    """Certificates in its name that were issued to another holder.  They are revoked for every purpose."""
    keeps_containers: bool = False
    """Whether the removed node's containers keep running in addition to their replacements."""
    hostname: str = ""
    """Hostname of the removed node."""


class JournalChunk(ApiObject):
    """Some entries of the cluster's history (``manager.journal.chunks``).  Exists from the level ``JOURNAL`` on."""

    id: str
    count: int = 0
    """Number of entries."""
    revision: int = 0
    """Revision up to which the history is complete, or 0 for a chunk of a manager's requests."""
    first: int = 0
    last: int = 0
    """Time of the last entry.  This and ``first`` are in nanoseconds since 1970."""
    marks: tuple[tuple[int, int], ...] = ()
    """Pairs of a time and the store's revision at that time, in order."""
    data: bytes = b""
    """The entries, compressed."""


def id_of_name(name: str) -> str:
    """Return the name of a host or a file as a part of an id, which contains no full stop (``keys.parted``)."""
    return name.replace(".", ":")


def name_in_id(part: str) -> str:
    """Return the name from which ``id_of_name`` made a part of an id."""
    return part.replace(":", ".")


def read_record(payload: Payload | None, default: T) -> T:
    """Return the record in a payload.  One that cannot be read counts as missing: nothing else would repair it."""
    if payload is None:
        return default
    try:
        return msgspec.json.decode(payload.data, type=type(default))
    except msgspec.DecodeError:
        return default


def write_record(tx: Transaction, id: str, record: msgspec.Struct) -> None:
    """Store a record, unless it is stored already.  Concurrent writes of it conflict."""
    data, present = msgspec.json.encode(record), tx.rely_on(Payload, id)
    if present is None or present.data != data:
        tx.put(Payload(id=id, data=data))


def registry_auth_id(service_id: str) -> str:
    """Return the id of the payload with the registry credentials for the service's image."""
    return f"registry/{service_id}"


def previous_registry_auth_id(service_id: str) -> str:
    """Return the id of the payload with the registry credentials for the image that a rollback returns to."""
    return f"registry-previous/{service_id}"


def spec_history_id(service_id: str) -> str:
    """Return the id of the payload with the past specs of the service."""
    return f"specs/{service_id}"


def users_claim_id(stack: str) -> str:
    """Return the id of the payload that counts what users below administrator add to ``stack``.

    A few stacks share one, so that names of removed stacks do not fill the store.
    """
    return f"users-claims/{crc32(stack.encode()) % _USERS_CLAIMS}"


def spec_version_id(service_id: str, version: Version) -> str:
    """Return the id of the spec that ``service_id`` had at ``version``."""
    return f"{service_id}/{version.index}"


def spec_version_of(view: View, task: Task) -> SpecVersion | None:
    """Return the stored spec of ``task``'s spec version, or None if it has none or that spec was removed."""
    if task.spec_version is None:
        return None
    return view.lookup(SpecVersion, spec_version_id(task.service_id, task.spec_version))


def filled(task: Task, version: SpecVersion | None) -> Task:
    """Return ``task`` with the spec of its spec ``version``, if that is stored."""
    if version is None or version.spec.task_template is task.spec:
        return task
    return replace(task, spec=version.spec.task_template)


def spec_of(view: View, task: Task) -> ServiceSpec | None:
    """Return the service's spec from which ``task`` was made, or None if it was deleted or is unreadable."""
    version = spec_version_of(view, task)
    if version is not None:
        return version.spec
    if has_unreadable_spec(view, task):
        return present_spec(view.lookup(Service, task.service_id), task)
    return None


def present_spec(service: Service | None, task: Task) -> ServiceSpec | None:
    """Return the present spec of ``service`` if ``task`` was created from it, otherwise None.

    It can replace a stored version that is unreadable.
    """
    if service is None or service.spec_version != task.spec_version:
        return None
    return service.spec


def has_unknown_spec(view: View, task: Task) -> bool:
    """Return whether the spec from which ``task`` was created is unreadable and not the current spec of its service.

    The task's own spec is then empty, so it is unknown what the task needs and holds.
    """
    return has_unreadable_spec(view, task) and spec_of(view, task) is None


def has_unknown_service(view: View, task: Task) -> bool:
    """Return whether the service of ``task`` exists but was never readable, so that its name and labels are unknown."""
    id = task.service_id
    return bool(id) and id in view.unreadable(Service) and view.lookup(Service, id) is None


def has_unreadable_spec(view: View, task: Task) -> bool:
    """Return whether the stored version of ``task``'s spec is unreadable.  Cheap if everything is readable."""
    if task.spec_version is None or not view.unreadable(SpecVersion):
        return False
    return spec_version_id(task.service_id, task.spec_version) in view.unreadable(SpecVersion)


def with_readable_specs(view: View, service: Service, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
    """Return ``tasks`` of ``service``, with the current spec in place of unreadable ones.

    Without a spec, the tasks would have no restart policy, and would be restarted at once, forever.
    """
    if not view.unreadable(SpecVersion):
        return tasks
    present = service.spec.task_template
    return tuple([replace(task, spec=present) if has_unreadable_spec(view, task) else task for task in tasks])


def run_version(service: Service) -> Version | None:
    """Return the version of the spec of a job's current run, or None if that is the present spec."""
    return service.job_status.spec_version if service.job_status is not None else None


def kept_versions(service: Service) -> frozenset[int]:
    """Return the indexes of the spec versions from which a service may still create tasks."""
    found = {one.index for one in (service.spec_version, run_version(service)) if one is not None}
    return frozenset(found if service.old_version is None else {*found, service.old_version})


def as_run(view: View, service: Service) -> Service:
    """Return the job ``service`` with the spec of its current run, if an update applies from the next run on only.

    It keeps its current disconnect labels, which the nodes of its tasks receive.
    """
    pinned = run_version(service)
    if pinned is None or pinned == service.spec_version:
        return service
    kept = view.lookup(SpecVersion, spec_version_id(service.id, pinned))
    if kept is None:
        return service
    own = {name: value for name, value in kept.spec.labels.items() if name not in DISCONNECT_LABELS}
    labels = {**own, **disconnect_labels(service.spec.labels)}
    return replace(service, spec=replace(kept.spec, labels=labels), spec_version=pinned)


def as_before_update(view: View, service: Service) -> Service:
    """Return ``service`` with the spec of its old tasks during a staged update, or as it is if that cannot be read."""
    if service.old_version is None:
        return service
    version = Version(index=service.old_version)
    kept = view.lookup(SpecVersion, spec_version_id(service.id, version))
    return service if kept is None else replace(service, spec=kept.spec, spec_version=version)


def unused_versions(
    service: Service, versions: Iterable[SpecVersion], tasks: Iterable[Task]
) -> list[SpecVersion]:
    """Return the versions of the service's spec that no task refers to, and that it does not keep itself."""
    used = {task.spec_version.index for task in tasks if task.spec_version is not None} | kept_versions(
        service
    )
    return [version for version in versions if version.index not in used]


def specs_in_use(view: View, service: Service) -> tuple[ServiceSpec, ...]:
    """Return the specs from which tasks of ``service`` were created or may be created.

    They are its current spec, the spec of a job's current run, and the spec that a rollback returns to.
    """
    specs = (service.spec,) if service.previous_spec is None else (service.spec, service.previous_spec)
    run = as_run(view, service)
    return specs if run is service else (*specs, run.spec)


def has_unreadable_status(view: View, task: Task) -> bool:
    """Return whether the status of ``task`` is unreadable.  The task then shows its last known status, or that it is
    assigned.
    """
    return "status" in view.damaged(Task).get(task.id, ())


def has_unreadable_run(view: View, service_id: str) -> bool:
    """Return whether a job's current run is unreadable, so that it is unknown which tasks belong to the run."""
    if "job" in view.damaged(Service).get(service_id, ()):
        return True
    service = view.lookup(Service, service_id)
    pinned = run_version(service) if service is not None else None
    return pinned is not None and spec_version_id(service_id, pinned) in view.unreadable(SpecVersion)
