"""Finds the node that a command connects to, in the same way as the docker command finds its engine.

The order of precedence is ``--host`` or ``--context``; ``SKEP_HOST``, ``DOCKER_HOST``; ``DOCKER_CONTEXT``; the context
that ``docker context use`` has set; this machine's socket.

Source: docker/cli, cli/command/cli.go (resolveContextName), cli/context/store.
"""

import hashlib
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from skep.api.client.raw import RawClient
from skep.api.client.requests import PlainRequests
from skep.errors import InvalidArgument

if TYPE_CHECKING:
    from skep.api.client.client import ApiClient

DEFAULT_HOST = "unix:///run/skep/skep.sock"
_DEFAULT_CONTEXT = "default"
RESPONSE_TIMEOUT_S = 20.0
"""Seconds until a request counts as unanswered.  A command survives a change of leader: one with 100,000 tasks is ready
in 3 s.
"""


class TlsFiles(msgspec.Struct, frozen=True, kw_only=True):
    """PEM files of a client.  Missing files are None."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    skips_verification: bool = False

    @classmethod
    def within(cls, directory: Path, *, skips_verification: bool) -> "TlsFiles | None":
        """Return ``ca.pem``, ``cert.pem`` and ``key.pem`` of a directory, or None if all are missing."""
        ca, certificate, key = (
            path if path.is_file() else None
            for path in (directory / name for name in ("ca.pem", "cert.pem", "key.pem"))
        )
        if not (ca or certificate or key or skips_verification):
            return None
        return cls(ca=ca, certificate=certificate, key=key, skips_verification=skips_verification)

    def context(self) -> ssl.SSLContext:
        """Return the TLS context for the files.  Raises: OSError, ssl.SSLError: a file is unreadable or invalid."""
        context = ssl.create_default_context(cafile=str(self.ca) if self.ca else None)
        if self.skips_verification:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.certificate is not None:
            context.load_cert_chain(self.certificate, self.key)
        return context


class ApiEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A node's API, and the flags with which the docker command connects to the same node."""

    host: str = DEFAULT_HOST
    tls: TlsFiles | None = None
    docker_flags: tuple[str, ...] = ()

    def client(self) -> "ApiClient":
        """Return a client of the API.  Raises: InvalidArgument: ``host`` or the certificates are invalid."""
        from skep.api.client.client import ApiClient

        return ApiClient.at(self.host, tls=self._tls_context())

    def raw_client(self) -> RawClient:
        """Return a client for connections that become streams.  Raises: InvalidArgument: invalid certificates."""
        return RawClient(self.host, self._tls_context())

    def requests(self) -> PlainRequests:
        """Return a client for requests with whole responses.  Raises: InvalidArgument: invalid certificates."""
        return PlainRequests(self.raw_client())

    def _tls_context(self) -> ssl.SSLContext | None:
        try:
            return self.tls.context() if self.tls is not None else None
        except (OSError, ssl.SSLError) as error:
            raise InvalidArgument(
                f"the certificates for {self.host} cannot be used: {error}. "
                "Run docker context inspect to see where they are."
            ) from error


class HostOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options for the endpoint, resolved on first use, so that commands without requests need no endpoint."""

    host: str = ""
    context: str = ""
    environment: Mapping[str, str] = {}
    home: Path = Path("/nonexistent")

    def endpoint(self) -> ApiEndpoint:
        """Return the endpoint.

        Raises: InvalidArgument: both host and context were given, or the context is missing or damaged.
        """
        if self.host and self.context:
            raise InvalidArgument("conflicting options: either specify --host or --context, not both")
        env = self.environment
        if self.context:
            return self._of_context(self.context)
        if host := self.host or env.get("SKEP_HOST") or env.get("DOCKER_HOST"):
            return ApiEndpoint(host=host, tls=self._tls_of_environment(), docker_flags=("--host", host))
        return self._of_context(self.context_name())

    def context_name(self) -> str:
        """Return the name of the context that commands use.  It is the default one if a host is given, as in docker.

        Raises: InvalidArgument: the file of the docker command is damaged.
        """
        env = self.environment
        if self.context:
            return self.context
        if self.host or env.get("SKEP_HOST") or env.get("DOCKER_HOST"):
            return _DEFAULT_CONTEXT
        return env.get("DOCKER_CONTEXT") or self._current_context()

    def client(self) -> "ApiClient":
        """Return the endpoint's client.  Raises: errors of ``endpoint`` and ``ApiEndpoint.client``."""
        return self.endpoint().client()

    def raw_client(self) -> RawClient:
        """Return the endpoint's raw client.  Raises: errors of ``endpoint`` and ``ApiEndpoint.raw_client``."""
        return self.endpoint().raw_client()

    def requests(self) -> PlainRequests:
        """Return the endpoint's client for whole responses.  Raises: errors of ``endpoint`` and
        ``ApiEndpoint.requests``.
        """
        return self.endpoint().requests()

    @property
    def docker_folder(self) -> Path:
        """Return the folder of the docker command's configuration."""
        return Path(self.environment.get("DOCKER_CONFIG") or self.home / ".docker")

    def _tls_of_environment(self) -> TlsFiles | None:
        """Return the files in ``DOCKER_CERT_PATH``, if ``DOCKER_TLS_VERIFY`` or ``DOCKER_TLS`` is set."""
        env = self.environment
        verifies = bool(env.get("DOCKER_TLS_VERIFY"))
        if not verifies and not env.get("DOCKER_TLS"):
            return None
        directory = Path(env.get("DOCKER_CERT_PATH") or self.docker_folder)
        return TlsFiles.within(directory, skips_verification=not verifies) or TlsFiles()

    def _current_context(self) -> str:
        written = _json(self.docker_folder / "config.json")
        return str(written.get("currentContext") or _DEFAULT_CONTEXT) if written else _DEFAULT_CONTEXT

    def _of_context(self, name: str) -> ApiEndpoint:
        if name == _DEFAULT_CONTEXT:
            return ApiEndpoint(docker_flags=("--host", DEFAULT_HOST))
        contexts = self.docker_folder / "contexts"
        id = hashlib.sha256(name.encode()).hexdigest()
        path = contexts / "meta" / id / "meta.json"
        described = _json(path)
        if described is None:
            raise InvalidArgument(
                f'context "{name}" is not in {contexts}. List contexts with skep context ls.'
            )
        try:
            docker = described["Endpoints"]["docker"]
            host, skips = docker["Host"], bool(docker.get("SkipTLSVerify"))
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidArgument(f'context "{name}" has no docker endpoint ({path})') from error
        tls = TlsFiles.within(contexts / "tls" / id / "docker", skips_verification=skips)
        return ApiEndpoint(host=str(host), tls=tls, docker_flags=("--context", name))


def _json(path: Path) -> dict[str, Any] | None:
    """Return the object in a file of the docker command, or None without the file.  Raises: InvalidArgument."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(
            f"{path} cannot be read: {error}. Fix it, or specify the node with --host."
        ) from error
