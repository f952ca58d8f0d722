"""Secrets and configs on this node: their data in a ramfs, never on a disk, and the files made from it for containers.

``<run>/secrets`` is a ramfs, because a tmpfs may be swapped out.  Its data survives a restart of the node process, but
not a reboot.  ``known/`` has the data that the manager sent.  File names contain the id and, for templates, the
template driver.  ``files/<container id>/`` has the files that are mounted into that container.

Tasks of the front door have a directory there (``files/<container id>/door``), whose files change while they run.
"""

import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import msgspec
import structlog
from msgspec.structs import replace

from skep.aio.event import Event
from skep.aio.trees import discard_tree_now
from skep.dataplane.door.certificates import why_not_loadable, write_certificates
from skep.engine.containers.container import MountPoint
from skep.errors import InvalidArgument, NotFound
from skep.gotemplate import Struct, to_text
from skep.linux.files import replace_file
from skep.linux.syscalls import MS_BIND, MS_NODEV, MS_NOSUID, MS_REMOUNT, mount
from skep.model.assignment import ConfigFile, SecretFile
from skep.model.container import ConfigReference, ContainerSpec, SecretReference
from skep.model.door.payloads import DoorPayload, is_door_file, merged
from skep.model.door.settings import KEYS_DIRECTORY
from skep.model.options import templates
from skep.model.options.secret_env import environment_entry, secret_variables
from skep.model.values.ids import ConfigId, SecretId
from skep.model.values.user_map import UserMap

log = structlog.get_logger(__name__)

_SECRETS_DIRECTORY = "/run/secrets"


def _mount_ramfs(directory: Path) -> None:
    if not os.path.ismount(directory):
        mount("ramfs", directory, "ramfs", MS_NODEV | MS_NOSUID, "mode=0700")
    elif os.statvfs(directory).f_flag & os.ST_NOEXEC:  # the mount of an earlier version
        mount("", directory, None, MS_REMOUNT | MS_BIND | MS_NODEV | MS_NOSUID)


class Payloads:
    """The data of secrets and configs assigned to this node."""

    def __init__(
        self,
        directory: Path,
        mount_ramfs: Callable[[Path], None] = _mount_ramfs,
        users: UserMap | None = None,
    ) -> None:
        """``mount_ramfs`` mounts a ramfs at an existing directory, unless it is a mount.  Raises: OSError.

        ``users`` maps the users of tasks' containers to the files' owners.
        """
        self._users = users
        self._directory = directory
        self._mount_ramfs = mount_ramfs
        self._secrets = directory / "known" / "secret"
        self._configs = directory / "known" / "config"
        self._door: dict[str, DoorPayload] = {}
        self._door_lock = threading.Lock()
        self.door_changed = Event()
        """Set when certificates or challenges of the front door change."""

    def open(self) -> None:
        """Mount the ramfs, unless an earlier process has mounted it.  Raises: OSError."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._mount_ramfs(self._directory)
        for directory in (self._secrets, self._configs, self._directory / "files"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    # --- what the manager assigned ----------------------------------------------------------------------------

    def put(self, secrets: Iterable[SecretFile], configs: Iterable[ConfigFile]) -> None:
        """Store these secrets and configs, replacing earlier data with the same ids."""
        for secret in secrets:
            _keep(self._secrets, secret)
            self._note_door(secret.id)
        for config in configs:
            _keep(self._configs, config)

    def drop(self, secrets: Iterable[SecretId], configs: Iterable[ConfigId]) -> None:
        """Forget these secrets and configs.  Containers that use them keep their mounted files."""
        for directory, ids in ((self._secrets, secrets), (self._configs, configs)):
            for id in ids:
                for driver in _DRIVERS:
                    (directory / _file_name(id, driver)).unlink(missing_ok=True)
                self._note_door(id)

    def keep_only(self, secrets: Iterable[SecretId], configs: Iterable[ConfigId]) -> None:
        """Forget all other secrets and configs, because a complete assignment names everything that is still needed."""
        for directory, ids in ((self._secrets, set(secrets)), (self._configs, set(configs))):
            with suppress(FileNotFoundError):
                for path in directory.iterdir():
                    if path.stem not in ids:
                        path.unlink(missing_ok=True)
                        self._note_door(path.stem)

    def has(self, container: ContainerSpec) -> bool:
        """Return whether the data of all secrets and configs of a container are kept.  Reads the directory."""
        wanted: list[tuple[Path, str]] = [(self._secrets, secret.secret_id) for secret in container.secrets]
        wanted += [(self._configs, config.config_id) for config in container.configs]
        return all(
            id.isalnum() and any((directory / _file_name(id, driver)).exists() for driver in _DRIVERS)
            for directory, id in wanted
        )

    def text_of_secret(self, id: str) -> str:
        """Return the data of a secret for a volume driver.  Raises: SkepError."""
        return to_text(_read(self._secrets, "secret", id)[0])

    def _note_door(self, id: str) -> None:
        if is_door_file(id):
            self.door_changed.set()

    def door(self) -> DoorPayload:
        """Return the certificates and challenges of the front door.  Reads files.

        Certificates that OpenSSL refuses are left out, because HAProxy would refuse its whole configuration.
        """
        known: dict[str, DoorPayload] = {}
        for path in self._secrets.glob("*") if self._secrets.is_dir() else ():
            if is_door_file(path.name):
                with suppress(FileNotFoundError):
                    known[path.name] = self._door.get(path.name) or self._usable(path)
        self._door = known
        return merged(known.values())

    def _usable(self, path: Path) -> DoorPayload:
        try:
            payload = msgspec.json.decode(path.read_bytes(), type=DoorPayload)
        except msgspec.DecodeError as error:
            log.warning("part of the front door left out", error=str(error))
            return DoorPayload()
        usable = {}
        for host, pem in payload.certificates.items():
            if problem := why_not_loadable(pem, self._directory):
                log.warning("certificate of the front door left out", name=host, error=problem)
            else:
                usable[host] = pem
        return replace(payload, certificates=usable)

    def write_door(self, seen_at: str = KEYS_DIRECTORY) -> DoorPayload:
        """Write the present certificates for all tasks of the front door.  Raises: OSError.

        Args:
            seen_at: The directory of a task as HAProxy sees it.

        Returns: The challenges, and the certificates unless no task of the front door has a directory.
        """
        with self._door_lock:
            directories = list(self._directory.glob("files/*/door"))
            present = self.door()
            for directory in directories:
                with suppress(FileNotFoundError):  # its task was removed meanwhile
                    write_certificates(directory, present.certificates, seen_at)
                    # A container keeps the mapping that it was created with.
                    owner = directory.stat()
                    for path in directory.iterdir():
                        os.chown(path, owner.st_uid, owner.st_gid)
            return present if directories else replace(present, certificates={})

    # --- what a container sees --------------------------------------------------------------------------------

    def mounts(
        self, key: str, secrets: Iterable[SecretReference], configs: Iterable[ConfigReference]
    ) -> tuple[MountPoint, ...]:
        """Return the mounts of secret and config files for ``key``'s container.  ``materialize`` writes the files."""
        targets = [_secret_path(reference) for reference in secrets if reference.file is not None]
        targets += [_config_path(reference) for reference in configs if reference.file is not None]
        return tuple(_mount(self._files(key) / str(number), target) for number, target in enumerate(targets))

    def door_mount(self, key: str) -> MountPoint:
        """Return the mount of the front door's certificates.  ``materialize_door`` writes the first files."""
        return _mount(self._files(key) / "door", KEYS_DIRECTORY)

    def materialize_door(self, key: str) -> None:
        """Write the front door's certificates for ``key``'s container, whose root owns them.  Raises: OSError."""
        directory = self._files(key) / "door"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._users is not None:
            os.chown(directory, *self._users.root)
        self.write_door()

    def materialize(self, key: str, container: ContainerSpec, seen: Struct) -> None:
        """Write the secret and config files of ``key``'s container with the requested owners and modes, and expand
        templates.

        Args:
            container: Container with its environment expanded.
            seen: Values of the task for templates.

        Raises:
            SkepError: The manager sent no such secret or config, or a template failed.  The message is SwarmKit's.
            OSError: A file could not be written.
        """
        expanded = _Expanded(self._secrets, self._configs, container, seen)
        directory = self._files(key)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        wanted = [
            (secret.file, expanded.secret(secret.secret_id))
            for secret in container.secrets
            if secret.file is not None
        ]
        wanted += [
            (config.file, expanded.config(config.config_id))
            for config in container.configs
            if config.file is not None
        ]
        for number, (target, data) in enumerate(wanted):
            path = directory / str(number)
            replace_file(path, data, mode=0o600, is_durable=False)
            uid, gid = _owner(target.uid), _owner(target.gid)
            if self._users is not None:
                uid, gid = self._users.uid(uid), self._users.gid(gid)
            os.chown(path, uid, gid)
            path.chmod(target.mode & 0o7777)

    def environment(self, container: ContainerSpec, seen: Struct) -> tuple[str, ...]:
        """Return the environment variables whose values are secrets, as ``NAME=value``, for one start.

        They are not stored.

        Raises:
            SkepError: See ``materialize``.
            InvalidArgument: A secret's data cannot be the value of a variable.
        """
        expanded = _Expanded(self._secrets, self._configs, container, seen)
        return tuple(
            environment_entry(name, expanded.secret(secret.secret_id))
            for name, secret in secret_variables(container).items()
        )

    def forget(self, key: str) -> None:
        """Remove the files of ``key``'s container."""
        discard_tree_now(self._files(key))

    def _files(self, key: str) -> Path:
        return self._directory / "files" / key


class _Expanded:
    """Expands secrets and configs for one task's container.

    Source: swarmkit, template/{context,getter}.go.
    """

    def __init__(self, secrets: Path, configs: Path, container: ContainerSpec, seen: Struct) -> None:
        self._secrets = secrets
        self._configs = configs
        self._container = container
        self._seen = seen

    def secret(self, id: str) -> bytes:
        """Return the expanded secret.  Raises: SkepError."""
        return self._expanded(self._secrets, "secret", id)

    def config(self, id: str) -> bytes:
        """Return the expanded config.  Raises: SkepError."""
        return self._expanded(self._configs, "config", id)

    def _expanded(self, directory: Path, kind: str, id: str) -> bytes:
        data, driver = _read(directory, kind, id)
        if not driver:
            return data
        try:
            if driver != templates.DRIVER:
                raise InvalidArgument("unrecognized template type")
            env = self._container.env
            return templates.expand_payload(data, self._seen, env, self._secret_text, self._config_text)
        except InvalidArgument as error:
            problem = f"failed to expand templated {kind} {id}: {error}"
            raise InvalidArgument(f"unable to get {kind} from {kind} store: {problem}") from error

    def _secret_text(self, target: str) -> str:
        for one in self._container.secrets:
            if one.file is not None and one.file.name == target:
                return to_text(_read(self._secrets, "secret", one.secret_id)[0])
        raise NotFound(f"secret target {target} not found")

    def _config_text(self, target: str) -> str:
        for one in self._container.configs:
            if one.file is not None and one.file.name == target:
                return to_text(_read(self._configs, "config", one.config_id)[0])
        raise NotFound(f"config target {target} not found")


def _mount(source: Path, target: str) -> MountPoint:
    # Without "noexec", as in Docker: scripts are often given to containers as configs.
    return MountPoint(
        type="bind",
        source=str(source),
        destination=target,
        read_only=True,
        options=("nosuid", "nodev"),
        internal=True,
    )


def _secret_path(reference: SecretReference) -> str:
    assert reference.file is not None
    name = reference.file.name or reference.secret_name
    return name if name.startswith("/") else f"{_SECRETS_DIRECTORY}/{name}"


def _config_path(reference: ConfigReference) -> str:
    assert reference.file is not None
    name = reference.file.name or reference.config_name
    return name if name.startswith("/") else f"/{name}"


def _owner(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0


_DRIVERS = ("", templates.DRIVER, "other")
"""Template drivers as parts of file names.  Empty for data that is not a template."""


def _file_name(id: str, driver: str = "") -> str:
    """Return an id as a file name.  Raises: InvalidArgument: it would lead outside the directory."""
    if not id.isalnum():
        raise InvalidArgument(f"{id!r} is not a valid id")
    return f"{id}.{driver}" if driver else id


def _keep(directory: Path, payload: SecretFile | ConfigFile) -> None:
    driver = ""
    if payload.templating is not None:
        driver = templates.DRIVER if payload.templating.name == templates.DRIVER else "other"
    replace_file(directory / _file_name(payload.id, driver), payload.data, mode=0o600, is_durable=False)
    for other in _DRIVERS:
        if other != driver:
            (directory / _file_name(payload.id, other)).unlink(missing_ok=True)


def _read(directory: Path, kind: str, id: str) -> tuple[bytes, str]:
    """Return data and template driver of a secret or config.  Raises: NotFound, with SwarmKit's message; OSError."""
    for driver in _DRIVERS:
        with suppress(FileNotFoundError):
            return (directory / _file_name(id, driver)).read_bytes(), driver
    raise NotFound(f"unable to get {kind} from {kind} store: {kind} {id} not found")
