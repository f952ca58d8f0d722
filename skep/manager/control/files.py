"""Operations on secrets and configs, which differ mainly in the clients that may read them.

Source: swarmkit, manager/controlapi/{secret,config}.go.
"""

import hmac
from collections.abc import Sequence

from msgspec.structs import replace

from skep.api.errors import Untranslated
from skep.errors import InvalidArgument, OutOfSequence
from skep.gotemplate import quoted
from skep.manager.acme.own_certificates import services_with
from skep.manager.control.deploys import replace_deploys
from skep.manager.control.quotas import check_file_quota
from skep.manager.control.validation.names import check_file_name
from skep.manager.services.job_runs import runs_with
from skep.model.options.labels import STACK_REVISION
from skep.model.permissions.access import Binding, Identity, parse_binding, weaker
from skep.model.secret import Config, ConfigSpec, Secret, SecretSpec
from skep.model.service import Service
from skep.model.values.ids import ConfigId, IdSource, SecretId
from skep.model.values.meta import Version
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import Timestamp
from skep.model.volume import Volume
from skep.store.interface import InUse, Transaction
from skep.store.kinds import Payload

SECRET_BYTES_MAX = 500 * 1024
"""Size limit of a secret, as in SwarmKit."""
CONFIG_BYTES_MAX = 1000 * 1024
"""Size limit of a config, as in SwarmKit."""
_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
"""Part of a secret that the front door may use."""


def create_secret(
    tx: Transaction, spec: SecretSpec, data: bytes, *, new_id: IdSource, now: Timestamp
) -> Secret:
    """Create a secret.  Its data becomes a ``Payload`` that no API shows.

    Raises:
        InvalidArgument: The name or the data cannot work.
        AlreadyExists: The name is taken.
        PermissionDenied: The stack's quota does not allow it.
        Untranslated: The spec names a driver that would provide the data.  Skep has no such plug-ins.

    Source: moby, plugin/errors.go (errNotFound), which SwarmKit's API passes on without a code.
    """
    check_file_name(spec.name)
    if spec.driver is not None:
        if not spec.driver.name:
            raise InvalidArgument("secret driver must have a name")
        raise Untranslated(f"plugin {quoted(spec.driver.name)} not found")
    if not 0 < len(data) < SECRET_BYTES_MAX:
        raise InvalidArgument(f"secret data must be larger than 0 and less than {SECRET_BYTES_MAX} bytes")
    check_file_quota(tx, spec, len(data))
    secret = tx.put(Secret(id=SecretId(new_id()), created_at=now, spec=spec))
    tx.put(Payload(id=_payload_id(secret.id), data=data))
    return secret


def update_secret(
    tx: Transaction, id: SecretId, spec: SecretSpec, data: bytes | None, version: int
) -> Secret:
    """Change the labels of a secret that is still at ``version``.  Nothing else of a secret can change.

    Raises:
        NotFound: The secret does not exist.
        InvalidArgument: More than labels would change.
        OutOfSequence: The secret is at another version.
    """
    secret = tx.get(Secret, id)
    if secret.spec.name != spec.name or not _is_same_data(tx, id, data):
        raise InvalidArgument("only updates to Labels are allowed")
    if secret.version != Version(index=version):
        raise OutOfSequence
    payload = tx.lookup(Payload, _payload_id(id))
    check_file_quota(tx, spec, len(payload.data) if payload is not None else 0, secret)
    return tx.put(replace(secret, spec=replace(secret.spec, labels=spec.labels)))


def remove_secret(tx: Transaction, id: SecretId) -> None:
    """Remove a secret, with its data.  Raises: NotFound; InvalidArgument: a service uses it."""
    secret = tx.get(Secret, id)
    _check_runs(tx, "secret", id, secret.spec.name)
    payload = tx.lookup(Payload, _payload_id(id))
    if payload is not None and _CERTIFICATE in payload.data:
        tx.rely_on_all(Service)  # services have no reference to such a secret, because labels name it
    if users := services_with(tx, secret.spec.name):
        raise _used_by("secret", secret.spec.name, users)
    try:
        tx.delete(Secret, id)
    except InUse as error:
        raise _in_use(tx, "secret", secret.spec.name, error) from error
    if payload is not None:
        tx.delete(Payload, payload.id)


def create_config(
    tx: Transaction,
    spec: ConfigSpec,
    *,
    new_id: IdSource,
    now: Timestamp,
    writer: Identity | None = None,
) -> Config:
    """Create a config.  A revision of a stack replaces the deploys of earlier revisions that are in progress.

    Raises:
        InvalidArgument: The name or the data cannot work.
        AlreadyExists: The name is taken.
    """
    check_file_name(spec.name)
    if not 0 < len(spec.data) < CONFIG_BYTES_MAX:
        raise InvalidArgument(f"config data must be larger than 0 and less than {CONFIG_BYTES_MAX} bytes")
    check_file_quota(tx, spec, len(spec.data))
    role = _role_of(spec, writer) if STACK_REVISION in spec.labels else None
    replace_deploys(tx, spec)
    written_by = str(role) if role is not None else ""
    return tx.put(Config(id=ConfigId(new_id()), created_at=now, spec=spec, written_by=written_by))


def update_config(
    tx: Transaction, id: ConfigId, spec: ConfigSpec, version: int, *, writer: Identity | None = None
) -> Config:
    """Change the labels of a config that is still at ``version``.  Raises: the errors of ``update_secret``.

    A stack's revision keeps the weakest role that ever wrote it, because a rollback runs with that role and the labels
    decide whether a rollback chooses the revision.
    """
    config = tx.get(Config, id)
    if config.spec.name != spec.name or (spec.data and spec.data != config.spec.data):
        raise InvalidArgument("only updates to Labels are allowed")
    if config.version != Version(index=version):
        raise OutOfSequence
    check_file_quota(tx, spec, len(config.spec.data), config)
    written_by, role = config.written_by, _role_of(config.spec, writer)
    if written_by and role is not None:
        written_by = str(weaker(parse_binding(written_by), role))
    return tx.put(
        replace(config, spec=replace(config.spec, labels=spec.labels), written_by=written_by if role else "")
    )


def _role_of(spec: ConfigSpec, writer: Identity | None) -> Binding | None:
    """Return the role with which ``writer`` may write a config of this stack, or None if the writer is unknown."""
    return writer.strongest_in(spec.labels.get(STACK_LABEL, "")) if writer is not None else None


def remove_config(tx: Transaction, id: ConfigId) -> None:
    """Remove a config.  Raises: NotFound; InvalidArgument: a service uses it."""
    config = tx.get(Config, id)
    _check_runs(tx, "config", id, config.spec.name)
    try:
        tx.delete(Config, id)
    except InUse as error:
        raise _in_use(tx, "config", config.spec.name, error) from error


def _payload_id(id: SecretId) -> str:
    return f"secret/{id}"


def _is_same_data(tx: Transaction, id: SecretId, data: bytes | None) -> bool:
    if not data:
        return True
    payload = tx.rely_on(Payload, _payload_id(id))
    return payload is not None and hmac.compare_digest(payload.data, data)


def _in_use(tx: Transaction, noun: str, name: str, error: InUse) -> InvalidArgument:
    users = [tx.lookup(Service, id) for kind, id in error.users if kind == "service"]
    names = [user.spec.name for user in users if user is not None]
    if not names:  # as in Docker, a secret may be removed while a volume refers to it
        volumes = [tx.lookup(Volume, id) for kind, id in error.users if kind == "volume"]
        words = ", ".join(one.spec.name for one in volumes if one is not None)
        return InvalidArgument(f"{noun} '{name}' is in use by cluster volumes: {words}")
    return _used_by(noun, name, names)


def _used_by(noun: str, name: str, names: Sequence[str]) -> InvalidArgument:
    services = "service" if len(names) == 1 else "services"
    return InvalidArgument(f"{noun} '{name}' is in use by the following {services}: {', '.join(names)}")


def _check_runs(tx: Transaction, noun: str, id: str, name: str) -> None:
    """Check that no current run of a job needs a file.

    Raises:
        InvalidArgument: A current run needs it.
        Unavailable: A current run cannot be read.
    """
    if jobs := runs_with(tx, noun, id):
        raise _used_by(noun, name, [job.spec.name for job in jobs])
