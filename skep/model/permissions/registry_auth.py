"""Registry credentials as clients send them (``X-Registry-Auth``), and the registry that they are for.

Source: moby, registry/auth.go (ConvertToHostname, ResolveAuthConfig), registry/config.go (IndexServer).
"""

import base64
from collections.abc import Mapping
from typing import Any

import msgspec

from skep.model.values.images import registry_of

_HUB = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_HUB_ADDRESS = "https://index.docker.io/v1/"
_ADDRESS = "serveraddress"


def decoded_auth(header: str) -> Mapping[str, Any]:
    """Return the fields of ``X-Registry-Auth``, with names in lower case.

    Docker treats an invalid header as no credentials.  docker-py writes IdentityToken, and Go accepts any case.

    Raises: ValueError, RecursionError: the header is invalid.
    """
    content = base64.urlsafe_b64decode(header.replace("+", "-").replace("/", "_") + "=" * (-len(header) % 4))
    known = msgspec.json.decode(content, type=dict[str, Any]) if content else {}
    return {name.lower(): value for name, value in known.items() if value is not None}


def registry_at(address: str) -> str:
    """Return the registry at a login's address, in the spelling of ``registry_of`` (empty for Docker Hub)."""
    host = address.removeprefix("https://").removeprefix("http://").partition("/")[0].lower()
    return "" if host in _HUB else host


def is_for(address: str, image: str) -> bool:
    """Return whether credentials for the registry ``address`` may be sent to the registry of ``image``.

    Credentials without an address were sent together with the image.
    """
    return not address or registry_at(address) == registry_at(registry_of(image))


def bound_auth(header: str, image: str) -> str:
    """Return ``header`` with a registry address.  If it has none, it gets the registry of ``image``."""
    try:
        fields = decoded_auth(header)
    except (ValueError, RecursionError):
        return header
    if not fields or fields.get(_ADDRESS):
        return header
    address = registry_of(image) or _HUB_ADDRESS
    return base64.urlsafe_b64encode(msgspec.json.encode({**fields, _ADDRESS: address})).decode()


def address_of(header: str) -> str:
    """Return the address of the registry that the credentials are for; empty if they name none."""
    return _texts(header, _ADDRESS)[0]


def has_credentials(header: str) -> bool:
    """Return whether ``header`` has a password or a token."""
    return any(_texts(header, "username", "identitytoken", "registrytoken"))


def _texts(header: str, *names: str) -> list[str]:
    """Return the values of fields, which are empty if they are missing or no text."""
    try:
        fields = decoded_auth(header) if header else {}
    except (ValueError, RecursionError):
        fields = {}
    values = [fields.get(name) for name in names]
    return [value if isinstance(value, str) else "" for value in values]
