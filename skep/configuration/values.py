"""Parsers of written values: a flag's text or a value of TOML or JSON becomes the typed value of a setting.

Every parser raises ``ValueError`` with the second half of a sentence: the fault, and the value to write instead.  The
first sentence of its docstring is the form of the setting in ``docs/reference/configuration.md``.
"""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from skep.configuration.configuration import AddressPool, Host, TcpHost, UnixHost
from skep.errors import InvalidArgument
from skep.model.networks.addresses import joined
from skep.model.networks.data_planes import why_reserved
from skep.model.permissions.rights import Right, allowed_rights
from skep.model.service import DiscreteResource, GenericResource, NamedResource
from skep.paths import SOCKET_PATH_BYTES_MAX

STORE_QUOTA_MIN, STORE_QUOTA_MAX = 16 * 1024**2, 64 * 1024**3
"""Smallest and largest quota of the store."""

_HOST_AND_PORT = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::\d{1,5})?")
_HOST_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?\.?")
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_NAT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,14}")
_RESOURCE_KIND = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_CGROUP_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*")
LOG_DRIVERS = ("json-file", "local", "none", "journald", "syslog", "fluentd", "gelf", "splunk")
_OTHER_LOG_DRIVERS_OF_DOCKER = ("awslogs", "gcplogs", "logentries", "etwlogs")


def text(value: Any) -> str:
    """Any text but the empty one."""
    if not isinstance(value, str):
        raise ValueError(f"is {value!r}: write a text in quotes")
    if not value or "\0" in value:
        raise ValueError("is empty: write a value, or leave the setting out")
    return value


def rights(value: Any) -> frozenset[Right]:
    """``all``, ``none``, or some of ``privileged,devices,gpus,namespaces,resources,api,api-inspect,processes``."""
    try:
        return allowed_rights(text(value))
    except InvalidArgument:
        known = ", ".join(right.value for right in Right)
        raise ValueError(f"is {value!r}: write all, none, or some of {known}, separated by commas") from None


def boolean(value: Any) -> bool:
    """``true`` or ``false``."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "1"):
        return True
    if isinstance(value, str) and value.lower() in ("false", "0"):
        return False
    raise ValueError(f"is {value!r}: write true or false")


def store_quota(value: Any) -> int:
    """A size from ``16MiB`` to ``64GiB``.  Returns bytes."""
    found = re.fullmatch(r"(\d{1,6})(MiB|GiB)", text(value))
    if found is None:
        raise ValueError(f"is {value!r}: write a number with its unit, 512MiB or 4GiB")
    size = int(found[1]) * (1024**3 if found[2] == "GiB" else 1024**2)
    if not STORE_QUOTA_MIN <= size <= STORE_QUOTA_MAX:
        raise ValueError(f"is {value!r}: choose a quota from 16MiB to 64GiB")
    return size


def absolute_path(value: Any) -> Path:
    """An absolute path."""
    path = Path(text(value))
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError(f"is {str(path)!r}: write an absolute path without '..'")
    return path


def existing_file(value: Any) -> Path:
    """The absolute path of a file that exists."""
    path = absolute_path(value)
    if not path.is_file():
        raise ValueError(f"is {str(path)!r}, and there is no such file: create it or correct the path")
    return path


def socket_path(value: Any) -> Path:
    """The absolute path of a unix socket."""
    path = absolute_path(text(value).removeprefix("unix://"))
    if len(str(path).encode()) > SOCKET_PATH_BYTES_MAX:
        raise ValueError(
            f"is {str(path)!r}: a socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes, choose a shorter one"
        )
    return path


def host(value: Any) -> Host:
    """``unix:///path`` or ``tcp://address:port``.  Raises: ValueError."""
    written = text(value)
    if written.startswith("unix://"):
        return UnixHost(socket_path(written))
    if not written.startswith("tcp://"):
        raise ValueError(f"is {written!r}: write unix:///path/of.sock or tcp://address:port")
    parts = urlsplit(written)
    try:
        address = str(ipaddress.ip_address(parts.hostname or ""))
        number = port(parts.port)
    except ValueError as error:
        raise ValueError(
            f"is {written!r}: write tcp:// with an IP address and a port, like tcp://192.0.2.1:2376"
        ) from error
    if parts.path or parts.query or parts.username:
        raise ValueError(f"is {written!r}: nothing may follow the port")
    return TcpHost(address, number)


def port(value: Any) -> int:
    """1 to 65535.  Raises: ValueError, like all parsers of this module."""
    number = _integer(value)
    if not 1 <= number <= 65535:
        raise ValueError(f"is {number}: choose a port from 1 to 65535")
    return number


def percent(value: Any) -> int:
    """0 to 100."""
    number = _integer(value)
    if not 0 <= number <= 100:
        raise ValueError(f"is {number}: choose a percentage from 0 to 100")
    return number


def data_path_port(value: Any) -> int:
    """A port from 1024 to 49151.  Source: moby, daemon/cluster/listen_addr.go (getDataPathPort)."""
    number = _integer(value)
    if not 1024 <= number <= 49151:
        raise ValueError(f"is {number}: choose a port from 1024 to 49151")
    return number


def wireguard_port(value: Any) -> int:
    """A port from 1024 to 65532, because two of the three ports above are used too."""
    number = _integer(value)
    if not 1024 <= number <= 65532:
        raise ValueError(f"is {number}: choose a port from 1024 to 65532")
    return number


def nat(value: Any) -> str:
    """``auto``, ``no``, or the name of a NAT."""
    written = text(value)
    if not _NAT.fullmatch(written):
        raise ValueError(
            f"is {written!r}: write auto, no, or a name of at most 63 letters, digits, dots, hyphens and underscores"
        )
    return "" if written == "auto" else written


def address(value: Any) -> str:
    """An IP address or the name of an interface."""
    written = text(value)
    try:
        return str(ipaddress.ip_address(written))
    except ValueError:
        if _INTERFACE.fullmatch(written) and not re.fullmatch(r"[\d.]+", written):
            return written
    raise ValueError(f"is {written!r}: write an IP address or the name of an interface")


def address_and_port(value: Any) -> str:
    """An IP address or the name of an interface, with or without ``:port``."""
    written = text(value)
    name, separator, digits = written.rpartition(":")
    if not separator or (":" in name and not name.startswith("[")):
        return address(written)
    try:
        plain = address(name.removeprefix("[").removesuffix("]"))
        number = port(digits)
    except ValueError as error:
        raise ValueError(
            f"is {written!r}: write an IP address or interface, and a port if you like: 192.0.2.1:2377"
        ) from error
    return joined(plain, number)


def peer_addr(value: Any) -> str:
    """A port, or an IP address with a port.  Returns ``:2380`` or ``192.0.2.1:2380``."""
    if isinstance(value, int) or (isinstance(value, str) and value.removeprefix(":").isdecimal()):
        return f":{port(value.removeprefix(':') if isinstance(value, str) else value)}"
    written = text(value)
    host, separator, digits = written.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]") if separator else "")
        return joined(address, port(digits))
    except ValueError as error:
        raise ValueError(
            f"is {written!r}: write a port, or an IP address with a port: 2378 or 192.0.2.1:2378"
        ) from error


def listening_addr(value: Any) -> tuple[str, int]:
    """An IP address with a port, or ``:port`` for every address."""
    written = text(value)
    host, _, digits = written.rpartition(":")
    try:
        address = str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))) if host else ""
        return address, port(digits)
    except ValueError as error:
        raise ValueError(f"is {written!r}: write an IP address and a port: 127.0.0.1:9323") from error


def http_url(value: Any) -> str:
    """A URL with ``http`` or ``https``, a host, and no path: ``http://collector:4318``."""
    written = text(value)
    try:
        parts = urlsplit(written)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_one = False
    if not is_one or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(f"is {written!r}: write a URL: http://collector:4318")
    return written.rstrip("/")


def one_of(*choices: str) -> Any:
    """Return a parser that accepts exactly these values."""

    def choice(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"is {value!r}: choose {' or '.join(choices)}")
        return str(value)

    choice.__doc__ = f"{' or '.join(f'``{one}``' for one in choices)}."
    return choice


def cgroup_parent(value: Any) -> str:
    """A path of cgroups, without a leading slash."""
    written = text(value).strip("/")
    if not all(_CGROUP_PART.fullmatch(part) for part in written.split("/")):
        raise ValueError(f"is {value!r}: write names separated by '/', like skep or machine/skep")
    return written


def labels(values: Any) -> Mapping[str, str]:
    """``key=value``, whose value may contain blanks and further equals signs."""
    result: dict[str, str] = {}
    for written in _texts(values):
        key, separator, value = written.partition("=")
        if not separator or not key.strip() or key != key.strip():
            raise ValueError(f"is {written!r}: write key=value")
        if result.setdefault(key, value) != value:
            raise ValueError(f"gives {key!r} two values, {result[key]!r} and {value!r}: keep one")
    return result


def generic_resources(values: Any) -> tuple[GenericResource, ...]:
    """``gpu=4`` (a number) or ``gpu=UUID1`` (one named unit), several joined with commas.

    Source: swarmkit, api/genericresource/parse.go.
    """
    numbers: dict[str, int] = {}
    names: dict[str, list[str]] = {}
    for written in (part.strip() for value in _texts(values) for part in value.split(",")):
        kind, separator, amount = written.partition("=")
        if not separator or not _RESOURCE_KIND.fullmatch(kind) or not amount:
            raise ValueError(f"is {written!r}: write kind=number or kind=name, like gpu=4 or gpu=UUID1")
        if amount.lstrip("-").isdigit():
            if int(amount) < 0 or int(amount) >= 1 << 63:
                raise ValueError(f"is {written!r}: the number must not be negative, nor above 2^63-1")
            if kind in numbers:
                raise ValueError(f"names {kind!r} twice with a number: add them up")
            numbers[kind] = int(amount)
        elif amount in names.setdefault(kind, []):
            raise ValueError(f"names {written!r} twice: keep one")
        else:
            names[kind].append(amount)
    if mixed := sorted(numbers.keys() & names.keys()):
        raise ValueError(f"gives {mixed[0]!r} both a number and names: use one of them")
    return (
        *(
            GenericResource(discrete_resource_spec=DiscreteResource(kind=k, value=n))
            for k, n in numbers.items()
        ),
        *(
            GenericResource(named_resource_spec=NamedResource(kind=kind, value=name))
            for kind, named in names.items()
            for name in named
        ),
    )


def hosts(values: Any) -> tuple[Host, ...]:
    """``unix:///path`` or ``tcp://address:port``."""
    return tuple(dict.fromkeys(host(value) for value in _texts(values)))


def managers(values: Any) -> tuple[str, ...]:
    """``address:port``."""
    for written in _texts(values):
        if ":" not in address_and_port(written).rpartition("]")[2]:
            raise ValueError(f"is {written!r}: write address:port, for instance 192.0.2.1:2377")
    return tuple(dict.fromkeys(_texts(values)))


def registries(values: Any) -> tuple[str, ...]:
    """``host[:port]`` or a network in CIDR form."""
    for written in _texts(values):
        try:
            ipaddress.ip_network(written, strict=False)
        except ValueError as error:
            if not _HOST_AND_PORT.fullmatch(written):
                raise ValueError(
                    f"is {written!r}: write host:port without http://, or a network like 10.0.0.0/8"
                ) from error
    return tuple(dict.fromkeys(_texts(values)))


def host_names(values: Any) -> tuple[str, ...]:
    """A DNS name."""
    for written in _texts(values):
        if not _HOST_NAME.fullmatch(written):
            raise ValueError(f"is {written!r}: write a name like node1.example.com")
    return tuple(dict.fromkeys(written.lower().rstrip(".") for written in _texts(values)))


def directories(values: Any) -> tuple[Path, ...]:
    """An absolute path."""
    return tuple(dict.fromkeys(absolute_path(written) for written in _texts(values)))


def mirrors(values: Any) -> tuple[str, ...]:
    """A URL."""
    for written in _texts(values):
        parts = urlsplit(written)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"is {written!r}: write a URL like https://mirror.example.com")
    return tuple(dict.fromkeys(written.rstrip("/") + "/" for written in _texts(values)))


def credential_helpers(values: Any) -> Mapping[str, str]:
    """``host[:port]=name`` as a flag, a table of names in a file."""
    pairs = values.items() if isinstance(values, Mapping) else [_pair(text) for text in _texts(values)]
    for registry, name in pairs:
        if not _HOST_AND_PORT.fullmatch(registry):
            raise ValueError(f"has {registry!r}: write host:port without http://, or docker.io")
        if not isinstance(name, str) or not _HELPER.fullmatch(name):
            raise ValueError(f"has {name!r}: write NAME of the program docker-credential-NAME")
    return dict(pairs)


def _pair(text: str) -> tuple[str, str]:
    registry, _, name = text.partition("=")
    return registry, name


def log_driver(value: Any) -> str:
    """``json-file``, ``local``, ``none``, ``journald``, ``syslog``, ``fluentd``, ``gelf`` or ``splunk``.

    Docker's other drivers are accepted with a warning, and ``json-file`` is used instead.
    """
    if value not in LOG_DRIVERS + _OTHER_LOG_DRIVERS_OF_DOCKER:
        raise ValueError(f"is {value!r}: write one of {', '.join(LOG_DRIVERS)}")
    return str(value)


def log_options(values: Any) -> Mapping[str, str]:
    """``key=value`` as a flag, a table of texts in a file."""
    if not isinstance(values, Mapping):
        return labels(values)
    for key, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"has {key!r} = {value!r}: write the value as a text, in quotes")
    return dict(values)


def address_pools(values: Any) -> tuple[AddressPool, ...]:
    """``base=10.10.0.0/16,size=24``, or ``{"base": "10.10.0.0/16", "size": 24}`` in a file."""
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        raise ValueError(f"is {values!r}: write a list")
    pools = []
    for written in values:
        fields = dict(written) if isinstance(written, Mapping) else _fields(written)
        try:
            network = ipaddress.ip_network(fields.pop("base"))
            size = _integer(fields.pop("size"))
        except (KeyError, ValueError) as error:
            raise ValueError(f"is {written!r}: write base=10.10.0.0/16,size=24") from error
        longest = network.max_prefixlen - 2  # the gateway and one container
        if fields or not network.prefixlen <= size <= longest:
            raise ValueError(
                f"is {written!r}: the size is a prefix length from {network.prefixlen} to {longest}"
            )
        if reason := why_reserved(network):
            raise ValueError(f"is {written!r}: it {reason}")
        pools.append(AddressPool(str(network), size))
    return tuple(pools)


def _fields(written: Any) -> dict[str, str]:
    return dict(part.partition("=")[::2] for part in text(written).split(","))


def _texts(values: Any) -> list[str]:
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        raise ValueError(f"is {values!r}: write a list of texts")
    return [text(value) for value in values]


def _integer(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"is {value!r}: write a number")
    return value
