"""Secrets and configs on this node: bytes in a ramfs, never on a disk, and their files in containers.

``<run>/secrets`` is a ramfs (a tmpfs may be swapped out): a restart of the node process finds everything
again, a reboot nothing.  ``known/`` holds what the manager sent, ``files/<container id>/`` what is mounted
into that container.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from skep.agent.assignments import ConfigFile, SecretFile
from skep.aio.trees import discard_tree_now
from skep.engine.container import MountPoint
from skep.errors import InvalidArgument, NotFound
from skep.linux.files import replace_file
from skep.linux.syscalls import MS_NODEV, MS_NOEXEC, MS_NOSUID, mount
from skep.model.container import ConfigReference, SecretReference
from skep.model.ids import ConfigId, SecretId

_SECRETS_DIRECTORY = "/run/secrets"


class Payloads:
    """The data of secrets and configs assigned to this node."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._secrets = directory / "known" / "secret"
        self._configs = directory / "known" / "config"

    def open(self) -> None:
        """Mount the ramfs, unless an earlier process did.  Raises: OSError."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.path.ismount(self._directory):
            mount("ramfs", self._directory, "ramfs", MS_NODEV | MS_NOEXEC | MS_NOSUID, "mode=0700")
        for directory in (self._secrets, self._configs, self._directory / "files"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    # --- what the manager assigned ----------------------------------------------------------------------------

    def put(self, secrets: Iterable[SecretFile], configs: Iterable[ConfigFile]) -> None:
        """Keep these; those with the same id are replaced."""
        for secret in secrets:
            _keep(self._secrets, secret.id, secret.data)
        for config in configs:
            _keep(self._configs, config.id, config.data)

    def drop(self, secrets: Iterable[SecretId], configs: Iterable[ConfigId]) -> None:
        """Forget these; containers that have them keep what is mounted."""
        paths = [self._secrets / _file_name(id) for id in secrets]
        paths += [self._configs / _file_name(id) for id in configs]
        for path in paths:
            path.unlink(missing_ok=True)

    def keep_only(self, secrets: Iterable[SecretId], configs: Iterable[ConfigId]) -> None:
        """Forget all others: a complete assignment names everything."""
        for directory, ids in ((self._secrets, set(secrets)), (self._configs, set(configs))):
            with suppress(FileNotFoundError):
                for path in directory.iterdir():
                    if path.name not in ids:
                        path.unlink(missing_ok=True)

    # --- what a container sees --------------------------------------------------------------------------------

    def mounts(
        self, key: str, secrets: Iterable[SecretReference], configs: Iterable[ConfigReference]
    ) -> tuple[MountPoint, ...]:
        """Where the files of ``key``'s container will be, and where it sees them; ``materialize`` writes
        them."""
        targets = [_secret_path(reference) for reference in secrets if reference.file is not None]
        targets += [_config_path(reference) for reference in configs if reference.file is not None]
        return tuple(
            MountPoint(
                type="bind",
                source=str(self._files(key) / str(number)),
                destination=target,
                read_only=True,
                options=("noexec", "nosuid", "nodev"),
                internal=True,
            )
            for number, target in enumerate(targets)
        )

    def materialize(
        self, key: str, secrets: Iterable[SecretReference], configs: Iterable[ConfigReference]
    ) -> None:
        """Write the files of ``key``'s container with the owners and modes it asked for.

        Raises: NotFound: the manager sent no such secret or config, with SwarmKit's words; OSError.
        """
        directory = self._files(key)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        wanted = [
            (secret.file, _read(self._secrets, "secret", secret.secret_id))
            for secret in secrets
            if secret.file is not None
        ]
        wanted += [
            (config.file, _read(self._configs, "config", config.config_id))
            for config in configs
            if config.file is not None
        ]
        for number, (target, data) in enumerate(wanted):
            path = directory / str(number)
            replace_file(path, data, mode=0o600, is_durable=False)
            os.chown(path, _owner(target.uid), _owner(target.gid))
            path.chmod(target.mode & 0o7777)

    def forget(self, key: str) -> None:
        """Remove the files of ``key``'s container."""
        discard_tree_now(self._files(key))

    def _files(self, key: str) -> Path:
        return self._directory / "files" / key


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


def _file_name(id: str) -> str:
    """An id as a file name.  Raises: InvalidArgument: it would lead somewhere else."""
    if not id.isalnum():
        raise InvalidArgument(f"{id!r} is no id")
    return id


def _keep(directory: Path, id: str, data: bytes) -> None:
    replace_file(directory / _file_name(id), data, mode=0o600, is_durable=False)


def _read(directory: Path, kind: str, id: str) -> bytes:
    try:
        return (directory / _file_name(id)).read_bytes()
    except FileNotFoundError:
        raise NotFound(f"unable to get {kind} from {kind} store: {kind} {id} not found") from None
