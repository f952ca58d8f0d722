"""Credentials stored by ``docker login``, for services with images from private registries.

Source: docker/cli, cli/config (configfile/file.go, credentials/native_store.go); docker/docker-credential-helpers.
"""

import base64
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from skep.errors import InvalidArgument
from skep.model.values.images import registry_of

_HUB: Final = "https://index.docker.io/v1/"
"""Docker Hub's key in the file."""
_HELPER_S: Final = 30.0
"""Seconds that a credential helper may take, because it may ask the user's keychain or the network."""
_TOKEN_USER: Final = "<token>"
"""User name by which a helper marks its secret as an identity token."""


class _Login(msgspec.Struct, frozen=True):
    auth: str = ""
    identitytoken: str = ""


class _Config(msgspec.Struct, frozen=True, rename={"helpers": "credHelpers", "store": "credsStore"}):
    auths: Mapping[str, _Login] = {}
    helpers: Mapping[str, str] = {}
    store: str = ""


class RegistryLogins:
    """The logins in ``config.json`` of ``folder`` and in its helper programs."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "config.json"
        self._known: dict[str, str] = {}

    def of(self, image: str) -> str:
        """Return ``X-Registry-Auth`` for the registry of ``image``, or an empty text without a login.

        Raises: InvalidArgument: the file or the response of a helper cannot be read.
        """
        server = registry_of(image) or _HUB
        if server not in self._known:
            fields = self._login(server)
            content = msgspec.json.encode(fields | {"serveraddress": server}) if fields else b""
            self._known[server] = base64.urlsafe_b64encode(content).decode()
        return self._known[server]

    def _login(self, server: str) -> dict[str, str]:
        config = self._config()
        if helper := config.helpers.get(server) or config.store:
            return _from_helper(helper, server)
        login = config.auths.get(server) or config.auths.get(f"https://{server}", _Login())
        if login.identitytoken:
            return {"identitytoken": login.identitytoken}
        if not login.auth:
            return {}
        try:
            name, colon, password = base64.b64decode(login.auth, validate=True).decode().partition(":")
        except ValueError as error:
            raise InvalidArgument(
                f"{self._path}: the login for {server} cannot be read: {error}. Run docker login again."
            ) from error
        return {"username": name, "password": password.rstrip("\0")} if colon else {}

    def _config(self) -> _Config:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Config)
        except FileNotFoundError:
            return _Config()
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidArgument(
                f"{self._path} cannot be read: {error}. Fix it, or remove it and run docker login."
            ) from error


def _from_helper(helper: str, server: str) -> dict[str, str]:
    """Return the helper's login for ``server``, or an empty dict.  Its output is secret, so errors never contain it."""
    program = f"docker-credential-{helper}"
    if (path := shutil.which(program)) is None:
        raise InvalidArgument(
            f"{program} is not installed, but docker's config.json names it. Install it, or run docker login again."
        )
    try:
        done = subprocess.run(
            [path, "get"], input=server.encode(), capture_output=True, timeout=_HELPER_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InvalidArgument(
            f"{program} does not respond: {type(error).__name__}. Run docker login again."
        ) from error
    if done.returncode:
        return {}
    try:
        found: Any = msgspec.json.decode(done.stdout, type=dict[str, str])
        name, secret = found["Username"], found["Secret"]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError):
        raise InvalidArgument(f"{program} returned an unreadable login. Run docker login again.") from None
    return {"identitytoken": secret} if name == _TOKEN_USER else {"username": name, "password": secret}
