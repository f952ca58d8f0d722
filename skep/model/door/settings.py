"""Labels of the front door itself: of its service and of its network."""

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from skep.errors import InvalidArgument
from skep.model.door.routes import http_labels, networks
from skep.model.network import Network
from skep.model.values.stacks import STACK_LABEL

DOOR: Final = "skep.door"
"""On a service: ``true`` if its tasks are the proxies.  On a network: ``true`` if routes lead over it."""
TRUSTED: Final = "skep.door.trusted-proxies"
PROXY_PROTOCOL: Final = "skep.door.proxy-protocol"
ACCESS_LOG: Final = "skep.door.access-log"
DOOR_LABELS: Final = (DOOR, TRUSTED, PROXY_PROTOCOL, ACCESS_LOG)
AUTOSCALE_REQUESTS: Final = "skep.autoscale.requests"
"""Label with the target of HTTP requests in flight of a task, over the front door."""
AUTOSCALE_RPS: Final = "skep.autoscale.rps"
"""Label with the target of HTTP requests per second of a task, over the front door."""
DOOR_MEASURES: Final = (AUTOSCALE_REQUESTS, AUTOSCALE_RPS)
"""Labels of measures that front doors count."""

NAME: Final = "skep-door"
"""Name of the service, of its network, and of the volume with HAProxy's files."""
DIRECTORY: Final = "/etc/skep-door"
"""Directory of the files in the container."""
KEYS_DIRECTORY: Final = "/run/skep-door"
"""Directory of certificates and keys in the container.  No other container can mount it."""


class DoorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the whole door.

    Args:
        trusted: Networks of proxies whose ``X-Forwarded-For`` is kept.
        accepts_proxy: Whether clients speak the PROXY protocol.
        logs: Whether each request becomes a line of the log, in JSON.
        ports: Ports of HTTP and HTTPS in the container.
        has_ipv6: Whether the proxy also listens on IPv6 addresses.
    """

    trusted: tuple[str, ...] = ()
    accepts_proxy: bool = False
    logs: bool = True
    ports: tuple[int, int] = (80, 443)
    has_ipv6: bool = False


def is_door(labels: Mapping[str, str]) -> bool:
    """Return whether a service or network belongs to the front door."""
    return labels.get(DOOR, "").lower() == "true"


def door_network(networks: Iterable[Network]) -> Network | None:
    """Return the network of HTTP routes, which is the oldest one with its label, or None."""
    found = (one for one in networks if is_door(one.spec.labels))
    return min(found, key=lambda one: (one.created_at, one.id), default=None)


def labels_for_proxies(labels: Mapping[str, str]) -> dict[str, str]:
    """Return those labels of a service that nodes with a proxy need."""
    names = (*DOOR_LABELS, STACK_LABEL, *DOOR_MEASURES)
    kept = {name: labels[name] for name in names if name in labels}
    return {**kept, **http_labels(labels)}


def settings_of(labels: Mapping[str, str]) -> DoorSettings:
    """Return the settings in the labels of the door's service, or the defaults if one is invalid."""
    try:
        return parsed_settings(labels)
    except InvalidArgument:
        return DoorSettings()


def parsed_settings(labels: Mapping[str, str]) -> DoorSettings:
    """Return the settings in the labels of the door's service.  Raises: InvalidArgument."""
    for name, default in ((DOOR, "false"), (PROXY_PROTOCOL, "false"), (ACCESS_LOG, "true")):
        if (word := labels.get(name, default)).lower() not in {"true", "false"}:
            raise InvalidArgument(f"invalid label {name}={word}: expected true or false")
    try:
        trusted = networks(text) if (text := labels.get(TRUSTED, "")) else ()
    except ValueError as error:
        raise InvalidArgument(f"invalid label {TRUSTED}={text}: expected {error}") from None
    return DoorSettings(
        trusted=trusted,
        accepts_proxy=labels.get(PROXY_PROTOCOL, "").lower() == "true",
        logs=labels.get(ACCESS_LOG, "").lower() != "false",
    )
