"""Options of published ports that Docker's API has no field for, as labels of the service.

``skep.publish.<option>`` applies to all ports of the service, ``skep.publish.<port>.<option>`` and
``skep.publish.<port>/<protocol>.<option>`` to one port, named by its published number:

* ``host-ip``: the only node address to publish on (``127.0.0.1``, ``::1``, or ``0.0.0.0`` for every IPv4 address);
* ``affinity``: ``client-ip`` sends one client always to the same task, or ``none``;
* ``local``: with ``true``, a node with serving tasks of its own uses only these;
* ``proxy-protocol``: with ``v1`` or ``v2``, each connection begins with a header that names its client (TCP).

The last three apply to the routing mesh only, not to ports in host mode.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from skep.errors import InvalidArgument
from skep.model.networks.addresses import Address, parsed
from skep.model.service import PortConfig, PublishMode, ServiceSpec

PREFIX = "skep.publish."
HOST_IP = "host-ip"
AFFINITY = "affinity"
LOCAL = "local"
PROXY_PROTOCOL = "proxy-protocol"

PORTS_MAX = 1_000
"""Largest number of a service's published ports.  The transaction that claims them has no room for more
(``store.transactions.proposal``).
"""
LABELS_MAX = 4_000
"""Largest number of a service's labels with these options: four for each port."""

_NAME = re.compile(r"skep\.publish\.(?:(?P<port>[^.]+)\.)?(?P<option>[a-z-]+)")
_PORT = re.compile(r"(?P<number>[0-9]{1,5})(?:/(?P<protocol>tcp|udp|sctp))?")
_WORDS = {
    AFFINITY: ("none", "client-ip"),
    LOCAL: ("false", "true"),
    PROXY_PROTOCOL: ("none", "v1", "v2"),
}


class PublishOptions(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """Options of a published port that Docker does not have."""

    host_ip: str = ""
    """The only address to publish on, or empty for all."""
    is_sticky: bool = False
    """Session affinity: connections of one client go to one task, as long as it serves."""
    prefers_local: bool = False
    """Connections go to serving tasks of the same node, if there are any."""
    proxy_protocol: int = 0
    """Version of the PROXY protocol header of each connection, or 0 for no header."""


class _Setting(msgspec.Struct, frozen=True):
    """One label.  It applies to all ports if ``number`` is 0, and to all protocols if ``protocol`` is empty."""

    label: str
    number: int
    protocol: str
    option: str
    value: str


def publish_options(
    labels: Mapping[str, str], ports: Iterable[PortConfig]
) -> Iterator[tuple[PortConfig, PublishOptions]]:
    """Yield each of ``ports`` with its options from the service's labels; invalid labels are ignored."""
    settings: dict[tuple[int, str], dict[str, str]] = {}
    for one in _readable(labels):
        settings.setdefault((one.number, one.protocol), {})[one.option] = one.value
    for port in ports:
        found: dict[str, str] = {}
        for number in (0, port.published_port):
            for protocol in ("", port.protocol):
                found |= settings.get((number, protocol), {})  # the more specific label comes later
        yield port, _options(port, found)


def _options(port: PortConfig, found: Mapping[str, str]) -> PublishOptions:
    is_mesh = port.publish_mode is PublishMode.INGRESS
    version = found.get(PROXY_PROTOCOL, "none") if is_mesh and port.protocol == "tcp" else "none"
    return PublishOptions(
        host_ip=found.get(HOST_IP, ""),
        is_sticky=is_mesh and found.get(AFFINITY) == "client-ip",
        prefers_local=is_mesh and found.get(LOCAL) == "true",
        proxy_protocol=int(version.removeprefix("v")) if version != "none" else 0,
    )


def check_publishing(spec: ServiceSpec) -> None:
    """Check a service's ports and port labels.

    Raises: InvalidArgument: too many ports or labels, or a label is invalid or matches no port.
    """
    ports = spec.endpoint_spec.ports if spec.endpoint_spec else ()
    if len(ports) > PORTS_MAX:
        raise InvalidArgument(f"a service can publish at most {PORTS_MAX} ports, not {len(ports)}")
    labels = {name: value for name, value in spec.labels.items() if name.startswith(PREFIX)}
    if len(labels) > LABELS_MAX:
        raise InvalidArgument(f"a service can have at most {LABELS_MAX} labels {PREFIX}*, not {len(labels)}")
    published: dict[int, set[tuple[str, PublishMode]]] = {}
    for port in ports:
        published.setdefault(port.published_port, set()).add((port.protocol, port.publish_mode))
    for name, value in labels.items():
        _check_fits(_setting(name, value), published)


def _check_fits(setting: _Setting, published: Mapping[int, Iterable[tuple[str, PublishMode]]]) -> None:
    if not setting.number:
        return
    of_number = published.get(setting.number, ())
    concerned = [(protocol, mode) for protocol, mode in of_number if setting.protocol in ("", protocol)]
    if not concerned:
        raise InvalidArgument(f"invalid label {setting.label}: the service publishes no such port")
    if setting.option == HOST_IP:
        return
    if all(mode is PublishMode.HOST for _, mode in concerned):
        raise InvalidArgument(f"invalid label {setting.label}: the port is published in host mode")
    if setting.option == PROXY_PROTOCOL and all(protocol != "tcp" for protocol, _ in concerned):
        raise InvalidArgument(f"invalid label {setting.label}: the PROXY protocol is for tcp")


def _readable(labels: Mapping[str, str]) -> Iterator[_Setting]:
    for name, value in labels.items():
        if name.startswith(PREFIX):
            try:
                yield _setting(name, value)
            except InvalidArgument:
                continue


def _setting(name: str, value: str) -> _Setting:
    match = _NAME.fullmatch(name)
    options = (HOST_IP, *_WORDS)
    if match is None or match["option"] not in options:
        raise InvalidArgument(f"invalid label {name}: expected one of {', '.join(options)} after {PREFIX}")
    port = _PORT.fullmatch(match["port"] or "0")
    number = int(port["number"]) if port else 0
    if port is None or (match["port"] and not 0 < number <= 65535):
        raise InvalidArgument(f"invalid label {name}: invalid port {match['port']!r}")
    option = match["option"]
    if option == HOST_IP:
        value = str(_host_ip(name, value))
    elif value not in _WORDS[option]:
        raise InvalidArgument(f"invalid label {name}={value}: expected one of {', '.join(_WORDS[option])}")
    return _Setting(name, number, port["protocol"] or "", option, value)


def _host_ip(name: str, value: str) -> Address:
    try:
        address = parsed(value)
    except ValueError:
        raise InvalidArgument(f"invalid label {name}={value}: expected an IP address") from None
    if address.is_multicast:
        raise InvalidArgument(f"invalid label {name}={value}: expected an address of a node")
    return address
