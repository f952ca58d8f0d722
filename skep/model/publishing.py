"""Options of published ports, which Docker's API has no field for: labels of the service.

``skep.publish.<option>`` holds for all ports of the service, ``skep.publish.<port>.<option>`` and
``skep.publish.<port>/<protocol>.<option>`` for one, named by the number under which it is published:

* ``host-ip``: the only node address that it is published on (``127.0.0.1``, ``::1``, ``0.0.0.0``: every IPv4 address);
* ``affinity``: ``client-ip``: one client always meets the same task; ``none``;
* ``local``: ``true``: a node with serving tasks of its own uses only those;
* ``proxy-protocol``: ``v1`` or ``v2``: each connection begins with a header that names its client (TCP).

The last three belong to the routing mesh; a port in host mode has an address only.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from skep.errors import InvalidArgument
from skep.model.addresses import Address, parsed
from skep.model.service import PortConfig, PublishMode, ServiceSpec

PREFIX = "skep.publish."
HOST_IP = "host-ip"
AFFINITY = "affinity"
LOCAL = "local"
PROXY_PROTOCOL = "proxy-protocol"

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
    """The only address it is published on; empty: all."""
    is_sticky: bool = False
    """Session affinity: connections of one client go to one task, as long as it serves."""
    prefers_local: bool = False
    """Connections go to serving tasks of the same node, if there are any."""
    proxy_protocol: int = 0
    """Version of the PROXY protocol header of each connection; 0: none."""


class _Setting(msgspec.Struct, frozen=True):
    """One label.  ``number`` 0: of all ports; ``protocol`` empty: of each."""

    label: str
    number: int
    protocol: str
    option: str
    value: str

    def concerns(self, port: PortConfig) -> bool:
        return self.number in (0, port.published_port) and self.protocol in ("", port.protocol)


def publish_options(labels: Mapping[str, str], port: PortConfig) -> PublishOptions:
    """The options in the labels of a service for ``port``; an invalid label counts as absent."""
    found: dict[str, str] = {}
    for setting in sorted(_readable(labels), key=lambda one: (bool(one.number), bool(one.protocol))):
        if setting.concerns(port):  # the more specific label comes later
            found[setting.option] = setting.value
    is_mesh = port.publish_mode is PublishMode.INGRESS
    version = found.get(PROXY_PROTOCOL, "none") if is_mesh and port.protocol == "tcp" else "none"
    return PublishOptions(
        host_ip=found.get(HOST_IP, ""),
        is_sticky=is_mesh and found.get(AFFINITY) == "client-ip",
        prefers_local=is_mesh and found.get(LOCAL) == "true",
        proxy_protocol=int(version.removeprefix("v")) if version != "none" else 0,
    )


def check_publishing(spec: ServiceSpec) -> None:
    """Raises: InvalidArgument: a ``skep.*`` label is invalid, or matches no port of the service."""
    ports = spec.endpoint_spec.ports if spec.endpoint_spec else ()
    for name, value in spec.labels.items():
        if name.startswith(PREFIX):
            _check_fits(_setting(name, value), ports)


def _check_fits(setting: _Setting, ports: Iterable[PortConfig]) -> None:
    if not setting.number:
        return
    concerned = [port for port in ports if setting.concerns(port)]
    if not concerned:
        raise InvalidArgument(f"invalid label {setting.label}: the service publishes no such port")
    if setting.option == HOST_IP:
        return
    if all(port.publish_mode is PublishMode.HOST for port in concerned):
        raise InvalidArgument(f"invalid label {setting.label}: the port is published in host mode")
    if setting.option == PROXY_PROTOCOL and all(port.protocol != "tcp" for port in concerned):
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
        raise InvalidArgument(f"invalid label {name}: want one of {', '.join(options)} after {PREFIX}")
    port = _PORT.fullmatch(match["port"] or "0")
    number = int(port["number"]) if port else 0
    if port is None or (match["port"] and not 0 < number <= 65535):
        raise InvalidArgument(f"invalid label {name}: invalid port {match['port']!r}")
    option = match["option"]
    if option == HOST_IP:
        value = str(_host_ip(name, value))
    elif value not in _WORDS[option]:
        raise InvalidArgument(f"invalid label {name}={value}: want one of {', '.join(_WORDS[option])}")
    return _Setting(name, number, port["protocol"] or "", option, value)


def _host_ip(name: str, value: str) -> Address:
    try:
        address = parsed(value)
    except ValueError:
        raise InvalidArgument(f"invalid label {name}={value}: want an IP address") from None
    if address.is_multicast:
        raise InvalidArgument(f"invalid label {name}={value}: want an address of a node")
    return address
