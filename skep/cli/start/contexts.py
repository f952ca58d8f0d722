"""The docker command's contexts: named endpoints in ``~/.docker/contexts``, as docker writes and reads them.

Source: docker/cli, cli/context/store/store.go, cli/command/context/*.go.
"""

import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from skep.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from skep.linux.files import replace_file

DEFAULT = "default"
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.+-]+")
_TLS_FILES = ("ca.pem", "cert.pem", "key.pem")


class DockerContext(msgspec.Struct, frozen=True, kw_only=True):
    """A named endpoint."""

    name: str
    host: str
    description: str = ""
    skips_verification: bool = False


class DockerContexts:
    """The contexts in one configuration directory of docker's."""

    def __init__(self, configuration: Path) -> None:
        self._configuration = configuration
        self._folder = configuration / "contexts"

    def all(self) -> list[DockerContext]:
        """Return the contexts sorted by name, without the default one.  Damaged ones, which make docker's list fail,
        are left out.

        Raises: InvalidArgument: the folder cannot be read.
        """
        found = []
        for path in sorted(self._folder.glob("meta/*/meta.json")):
            try:
                found.append(_context_of(msgspec.json.decode(path.read_bytes(), type=dict[str, Any])))
            except (OSError, msgspec.DecodeError, KeyError, TypeError, AttributeError):
                continue
        return sorted(found, key=lambda one: one.name)

    @property
    def current(self) -> str:
        """Return the name of the current context, or of the default context.  Raises: InvalidArgument."""
        return str(self._written().get("currentContext") or DEFAULT)

    def get(self, name: str) -> DockerContext:
        """Return the context ``name``.  Raises: NotFound."""
        for one in self.all():
            if one.name == name:
                return one
        raise NotFound(f'context "{name}" is not in {self._folder}. List contexts with skep context ls.')

    def check_new(self, name: str) -> None:
        """Check the name of a new context.  Raises: InvalidArgument: the name is invalid; AlreadyExists."""
        if name == DEFAULT:
            raise InvalidArgument('"default" is a reserved context name')
        if not _NAME.fullmatch(name):
            raise InvalidArgument(
                f'context name "{name}" is invalid, names are validated against regexp "^{_NAME.pattern}$"'
            )
        if self._meta(name).exists():
            raise AlreadyExists(
                f'context "{name}" already exists. Remove it with skep context rm {name}, or choose another name.'
            )

    def replace_tls(self, name: str, tls: Mapping[str, bytes]) -> None:
        """Replace some of a context's files, named as for ``create``.  Raises: NotFound; OSError."""
        self.get(name)
        for file, content in tls.items():
            _write(self._tls(name) / "docker" / file, content)

    def create(self, context: DockerContext, tls: Mapping[str, bytes]) -> None:
        """Write a context.  ``tls``: the content of ``ca.pem``, ``cert.pem`` and ``key.pem``, as far as given.

        Raises: errors of ``check_new``; OSError.
        """
        self.check_new(context.name)
        meta, secrets = self._meta(context.name), self._tls(context.name)
        for name in _TLS_FILES:
            if name in tls:
                _write(secrets / "docker" / name, tls[name])
        endpoint = {"Host": context.host, "SkipTLSVerify": context.skips_verification}
        metadata = {"Description": context.description} if context.description else {}
        described = {"Name": context.name, "Metadata": metadata, "Endpoints": {"docker": endpoint}}
        _write(
            meta, msgspec.json.encode(described)
        )  # This file comes last, because docker finds a context by it.

    def use(self, name: str) -> None:
        """Make it the current context.  Raises: NotFound; InvalidArgument; OSError."""
        if name != DEFAULT:
            self.get(name)
        written = self._written()
        if name == DEFAULT:
            written.pop("currentContext", None)
        else:
            written["currentContext"] = name
        path = self._configuration / "config.json"
        _write(path, msgspec.json.format(msgspec.json.encode(written), indent=2))

    def remove(self, name: str, *, force: bool) -> None:
        """Remove a context.

        Raises: NotFound; FailedPrecondition: it is the current or the default context; InvalidArgument; OSError.
        """
        if name == DEFAULT:
            raise FailedPrecondition(
                'context "default" cannot be removed. To use another one, run skep context use NAME.'
            )
        if not self._meta(name).exists():
            raise NotFound(f'context "{name}" does not exist. List contexts with skep context ls.')
        if self.current == name:
            if not force:
                raise FailedPrecondition(f'context "{name}" is in use, set -f flag to force remove')
            self.use(DEFAULT)
        shutil.rmtree(self._meta(name).parent)
        shutil.rmtree(self._tls(name), ignore_errors=True)

    def _written(self) -> dict[str, Any]:
        path = self._configuration / "config.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"{path} cannot be read: {error}. Fix it, or remove it.") from error

    def _meta(self, name: str) -> Path:
        return self._folder / "meta" / _id(name) / "meta.json"

    def _tls(self, name: str) -> Path:
        return self._folder / "tls" / _id(name)


def _context_of(described: Mapping[str, Any]) -> DockerContext:
    docker = described["Endpoints"]["docker"]
    return DockerContext(
        name=str(described["Name"]),
        host=str(docker["Host"]),
        description=str((described.get("Metadata") or {}).get("Description", "")),
        skips_verification=bool(docker.get("SkipTLSVerify")),
    )


def _id(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Write a file that only its user can read, because it may name keys and registries."""
    path = path.resolve()  # A configuration file that is a symbolic link stays one.
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(path, content, mode=0o600)
