"""Writes HAProxy's configuration for a machine from the catalog.  Pure.

HAProxy checks each server by itself and tries another one after a refused connection.  So a machine whose managers are
all away still sends nothing to a server that has ended.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Self

import msgspec

from skep.errors import InvalidArgument
from skep.model.catalog import CatalogInstance, CatalogService
from skep.model.networks.addresses import PORT_MAX, is_address, joined

HEAD: Final = "# Written by skep balance. Changes are overwritten."
"""First line, by which the command knows its own file."""
LOOPBACK: Final = "127.0.0.1"
_SERVER: Final = re.compile(r"[^A-Za-z0-9_.:-]")
"""Characters that the name of a server may not have."""
_FORM = "expected SERVICE=[ADDRESS:]PORT or SERVICE=[ADDRESS:]PORT/http"


class BalancedPort(msgspec.Struct, frozen=True):
    """A local address that leads to a service."""

    service: str
    address: str
    port: int
    mode: str = "tcp"

    @classmethod
    def of(cls, word: str) -> Self:
        """Return the listener of ``SERVICE=[ADDRESS:]PORT[/http]``.  Raises: InvalidArgument."""
        service, equals, place = word.partition("=")
        place, slash, mode = place.partition("/")
        address, _, digits = place.rpartition(":")
        address = address.strip("[]") or LOOPBACK
        if not (service and equals) or (slash and mode not in ("tcp", "http")):
            raise InvalidArgument(f"invalid listener {word!r}: {_FORM}")
        is_port = digits.isascii() and digits.isdigit() and len(digits) <= 5 and 0 < int(digits) <= PORT_MAX
        if not is_port or not is_address(address) or not re.fullmatch(r"[A-Za-z0-9_.-]+", service):
            raise InvalidArgument(f"invalid listener {word!r}: {_FORM}")
        return cls(service, address, int(digits), mode or "tcp")


def configuration(
    listeners: Sequence[BalancedPort], services: Mapping[str, CatalogService], socket: str, user: str
) -> str:
    """Return the whole configuration.

    Args:
        socket: Path of HAProxy's socket, over which a new process takes the listening sockets of the former one.
        user: User and group of HAProxy's worker, or empty for no change of the user.
    """
    return "\n".join((HEAD, *_global(socket, user), *_sections(listeners, services))) + "\n"


def _global(socket: str, user: str) -> Iterator[str]:
    yield "global"
    yield f"    stats socket {socket} mode 600 level admin expose-fd listeners"
    yield "    hard-stop-after 24h"
    if user:
        yield f"    user {user}"
        yield f"    group {user}"
    yield "defaults"
    yield "    timeout connect 2s"
    yield "    timeout client 1h"
    yield "    timeout server 1h"
    yield "    timeout check 2s"
    yield "    retries 3"
    yield "    option redispatch 1"


def _sections(listeners: Sequence[BalancedPort], services: Mapping[str, CatalogService]) -> Iterator[str]:
    for listener in listeners:
        yield f"listen {listener.service}-{listener.port}"
        yield f"    bind {joined(listener.address, listener.port)}"
        yield f"    mode {listener.mode}"
        yield "    balance leastconn"
        yield "    default-server inter 2s fastinter 500ms downinter 2s fall 2 rise 1 observe layer4"
        service = services.get(listener.service)
        for instance in service.instances if service is not None else ():
            # HAProxy refuses the whole file because of one impossible server.
            if 0 < instance.port <= PORT_MAX and is_address(instance.address):
                server = f"    server {_name(instance)} {joined(instance.address, instance.port)} check"
                yield server if instance.weight == 1 else f"{server} weight {instance.weight}"


def _name(instance: CatalogInstance) -> str:
    kind = "outside" if instance.is_registered else "task"
    return f"{kind}-{_SERVER.sub('-', instance.id)}"
