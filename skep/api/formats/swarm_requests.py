"""The requests ``POST /swarm/init`` and ``/swarm/join``, checked before anything is created.

Pure: the machine's interfaces are an argument.  The error texts are the engine's.

Source: moby 20.10, daemon/cluster/listen_addr.go and swarm.go, opts/hosts.go (ParseTCPAddr).
"""

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import TypeAlias

import msgspec
from msgspec.structs import replace

from skep.api.errors import Untranslated
from skep.errors import InvalidArgument
from skep.model.networks.addresses import host_of, joined
from skep.model.networks.data_planes import why_reserved
from skep.model.networks.reserved_ports import MANAGER_PORT
from skep.model.node import Availability
from skep.model.swarm import (
    DEFAULT_DATA_PATH_PORT,
    DEFAULT_POOL,
    DEFAULT_SUBNET_SIZE,
    DEFAULT_SWARM_SPEC,
    InitRequest,
    JoinRequest,
    SwarmSpec,
)

Address: TypeAlias = IPv4Address | IPv6Address

DEFAULT_PORT = str(MANAGER_PORT)

_BAD_LISTEN = "listen address must be an IP address or network interface (with optional port number)"
_BAD_ADVERTISE = (
    "advertise address must be a non-zero IP address or network interface (with optional port number)"
)
_BAD_DATA_PATH = (
    "data path address must be a non-zero IP address or network interface (without a port number)"
)
_NO_ADDRESS = "could not find the system's IP address"
_SAY_LISTEN = (
    "must specify a listening address because the address to advertise is not recognized as a system address, "
    "and a system's IP address to use could not be uniquely identified"
)


class Interface(msgspec.Struct, frozen=True, kw_only=True):
    """A network interface of this machine."""

    addresses: tuple[Address, ...] = ()
    is_up: bool = True
    is_loopback: bool = False
    is_ours: bool = False
    """Whether it belongs to container networks.  Such an interface never has the machine's own address."""


Interfaces = Mapping[str, Interface]


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses where a node listens and where others reach it, as ``host:port`` with IPv6 in brackets.

    ``local_addr`` is an address of this machine.  ``advertise_addr`` may be empty for a join, and the manager then
    determines it.
    """

    listen_addr: str
    advertise_addr: str
    local_addr: str
    data_path_addr: str = ""


class Founding(msgspec.Struct, frozen=True, kw_only=True):
    """A checked init request."""

    endpoints: Endpoints
    spec: SwarmSpec
    availability: Availability
    default_addr_pool: tuple[str, ...]
    subnet_size: int
    data_path_port: int
    force_new_cluster: bool


class Joining(msgspec.Struct, frozen=True, kw_only=True):
    """A checked join request.  ``remote_addrs`` are managers as ``host:port``."""

    endpoints: Endpoints
    remote_addrs: tuple[str, ...]
    token: str
    availability: Availability


def founding(request: InitRequest, interfaces: Interfaces) -> Founding:
    """Check ``request`` and fill in defaults.  Raises: InvalidArgument, Untranslated."""
    listen_addr = _with_port("ListenAddr", request.listen_addr)
    check_swarm_name(request.spec)
    host, port = _listen(listen_addr, interfaces)
    advertise_host, advertise_port = _advertise(request.advertise_addr, port, interfaces)
    data_path_addr = _data_path(request.data_path_addr, interfaces)
    local_addr = _local(host, advertise_host, interfaces)
    pools = checked_pools(request.default_addr_pool, request.subnet_size)
    data_path_port = checked_data_path_port(request.data_path_port)
    spec = merged_spec(request.spec)
    if request.auto_lock_managers:
        spec = replace(spec, encryption_config=replace(spec.encryption_config, auto_lock_managers=True))
    return Founding(
        endpoints=Endpoints(
            listen_addr=joined(host, port),
            advertise_addr=joined(advertise_host, advertise_port),
            local_addr=str(local_addr),
            data_path_addr=data_path_addr,
        ),
        spec=spec,
        availability=availability(request.availability),
        default_addr_pool=pools or DEFAULT_POOL,
        subnet_size=request.subnet_size or DEFAULT_SUBNET_SIZE,
        data_path_port=data_path_port,
        force_new_cluster=request.force_new_cluster,
    )


def joining(request: JoinRequest, interfaces: Interfaces) -> Joining:
    """Check ``request`` and fill in defaults.  Raises: InvalidArgument, Untranslated."""
    listen_addr = _with_port("ListenAddr", request.listen_addr)
    if not request.remote_addrs:
        raise InvalidArgument("at least 1 RemoteAddr is required to join")
    remotes = tuple(_with_port("remoteAddr", remote) for remote in request.remote_addrs)
    host, port = _listen(listen_addr, interfaces)
    advertise_addr = ""
    if request.advertise_addr:
        try:
            advertise_addr = joined(*_advertise(request.advertise_addr, port, interfaces))
        except InvalidArgument:
            pass  # the manager sees the node's address
    local = host_of(advertise_addr) or str(host)
    return Joining(
        endpoints=Endpoints(
            listen_addr=joined(host, port),
            advertise_addr=advertise_addr,
            local_addr=local,
            data_path_addr=_data_path(request.data_path_addr, interfaces),
        ),
        remote_addrs=remotes,
        token=request.join_token,
        availability=availability(request.availability),
    )


def advertised(word: str, listen_addr: str, interfaces: Interfaces) -> str:
    """Return ``ip:port`` where others reach a node.  ``word`` in its configuration is an address or an interface.

    Raises:
        InvalidArgument: ``word`` is neither.
    """
    return joined(*_advertise(word, listen_addr.rpartition(":")[2] or DEFAULT_PORT, interfaces))


def availability(word: str) -> Availability:
    """Return the availability that a joining node requests, or active if ``word`` is empty.  Raises: Untranslated."""
    if not word:
        return Availability.ACTIVE
    try:
        return Availability(word.lower())
    except ValueError:
        raise Untranslated(f'invalid Availability: "{word}"') from None


def check_swarm_name(spec: SwarmSpec) -> None:
    """Check the cluster's name.  Docker accepts only one.  Raises: InvalidArgument."""
    if spec.name not in {"", "default"}:
        raise InvalidArgument('swarm spec must be named "default"')


def merged_spec(requested: SwarmSpec) -> SwarmSpec:
    """Return the default spec with all values that ``requested`` sets.  Null, zero and "" set nothing.

    Source: moby 20.10, daemon/cluster/convert/swarm.go (MergeSwarmSpecToGRPC).
    """
    base, raft, orchestration = DEFAULT_SWARM_SPEC, requested.raft, requested.orchestration
    kept, history = raft.keep_old_snapshots, orchestration.task_history_retention_limit
    ca = requested.ca_config
    return replace(
        base,
        name=requested.name or base.name,
        labels=requested.labels or base.labels,
        orchestration=replace(
            base.orchestration,
            task_history_retention_limit=(
                base.orchestration.task_history_retention_limit if history is None else history
            ),
        ),
        raft=replace(
            base.raft,
            snapshot_interval=raft.snapshot_interval or base.raft.snapshot_interval,
            keep_old_snapshots=base.raft.keep_old_snapshots if kept is None else kept,
            log_entries_for_slow_followers=(
                raft.log_entries_for_slow_followers or base.raft.log_entries_for_slow_followers
            ),
            heartbeat_tick=raft.heartbeat_tick or base.raft.heartbeat_tick,
            election_tick=raft.election_tick or base.raft.election_tick,
        ),
        dispatcher=replace(
            base.dispatcher,
            heartbeat_period=requested.dispatcher.heartbeat_period or base.dispatcher.heartbeat_period,
        ),
        ca_config=replace(
            base.ca_config,
            node_cert_expiry=ca.node_cert_expiry or base.ca_config.node_cert_expiry,
            external_cas=tuple(replace(one, protocol=one.protocol.lower()) for one in ca.external_cas),
            force_rotate=ca.force_rotate,
        ),
        task_defaults=requested.task_defaults,
        encryption_config=requested.encryption_config,
    )


def checked_pools(pools: Sequence[str], subnet_size: int) -> tuple[str, ...]:
    """Check the address pools for networks' subnets.  Raises: Untranslated (the engine answers 500)."""
    if not pools:
        return ()
    size = subnet_size or DEFAULT_SUBNET_SIZE
    if size > 29:
        raise Untranslated(f"subnet size is out of range: {size}")
    checked = []
    for pool in (pool.strip() for pool in pools):
        length = pool.partition("/")[2]
        try:
            network = ipaddress.ip_network(pool, strict=False) if length.isdigit() else None
        except ValueError:
            network = None
        if network is None:
            raise Untranslated(f"invalid base pool {pool}: invalid CIDR address: {pool}")
        if size < network.prefixlen:
            raise Untranslated(f'invalid CIDR: "{pool}". Subnet size is too small for pool: {size}')
        if reason := why_reserved(network):
            raise Untranslated(f"invalid base pool {pool}: it {reason}")
        checked.append(pool)
    return tuple(checked)


def checked_data_path_port(port: int) -> int:
    """Check the UDP port of the overlay networks.  Raises: Untranslated: it is outside of 1024 to 49151."""
    if not port:
        return DEFAULT_DATA_PATH_PORT
    if not 1024 <= port <= 49151:
        raise Untranslated(f"Datapath port number is not in valid range (1024-49151) : {port}")
    return port


_HOST = re.compile(r"[\w.:%\[\]-]+")


def _with_port(noun: str, addr: str) -> str:
    """Return ``addr`` with the default port if it has none, without ``tcp://``."""
    if not addr:
        raise InvalidArgument(f'invalid {noun} "": invalid empty address')
    bare = addr.removeprefix("tcp://")
    if not _HOST.fullmatch(bare):
        return addr  # the engine accepts such an address here, and fails at the next step
    host, port = _split(bare) or (bare.strip("[]"), DEFAULT_PORT)
    if not (port or DEFAULT_PORT).isdigit():
        return addr
    return joined(host or "0.0.0.0", port or DEFAULT_PORT)


def _split(addr: str) -> tuple[str, str] | None:
    """Split ``host:port`` or ``[host]:port``.  Returns None for any other form."""
    if addr.startswith("["):
        host, bracket, rest = addr[1:].partition("]")
        return (host, rest[1:]) if bracket and rest.startswith(":") else None
    host, colon, port = addr.rpartition(":")
    return (host, port) if colon and ":" not in host else None


def _listen(addr: str, interfaces: Interfaces) -> tuple[Address, str]:
    parts = _split(addr)
    if parts is None:
        raise Untranslated(f"could not parse listen address {addr}")
    return _address(parts[0], interfaces, _BAD_LISTEN, is_unspecified_valid=True), parts[1]


def _advertise(addr: str, listen_port: str, interfaces: Interfaces) -> tuple[Address, str]:
    if not addr:
        return _system_address(interfaces), listen_port
    host, port = _split(addr) or (addr, listen_port)
    return _address(host, interfaces, _BAD_ADVERTISE), port


def _data_path(addr: str, interfaces: Interfaces) -> str:
    return str(_address(addr, interfaces, _BAD_DATA_PATH)) if addr else ""


def _address(
    word: str, interfaces: Interfaces, problem: str, *, is_unspecified_valid: bool = False
) -> Address:
    """Return the address that ``word`` names: an interface's name or an address."""
    interface = interfaces.get(word)
    if interface is not None:
        return _interface_address(word, interface)
    try:
        address = ipaddress.ip_address(word)
    except ValueError:
        raise InvalidArgument(problem) from None
    if address.is_unspecified and not is_unspecified_valid:
        raise InvalidArgument(problem)
    return address


def _interface_address(name: str, interface: Interface) -> Address:
    """Return the interface's one IPv4 address, else its one IPv6 address."""
    for version in (4, 6):
        found = [address for address in interface.addresses if address.version == version]
        if len(found) > 1:
            raise InvalidArgument(
                f"interface {name} has more than one IPv{version} address ({found[0]} and {found[1]})"
            )
    if not interface.addresses:
        raise InvalidArgument(f"interface {name} has no usable IPv4 or IPv6 address")
    return min(interface.addresses, key=lambda address: address.version)


def _system_address(interfaces: Interfaces) -> Address:
    """Return the machine's only address.  Raises: InvalidArgument: it has none, or several."""
    chosen: tuple[str, Address] | None = None
    for name, address in _candidates(interfaces):
        if chosen is None:
            chosen = (name, address)
            continue
        if chosen[0] == name:
            raise InvalidArgument(
                "could not choose an IP address to advertise since this system has multiple addresses on "
                f"interface {name} ({chosen[1]} and {address})"
            )
        raise InvalidArgument(
            "could not choose an IP address to advertise since this system has multiple addresses on different "
            f"interfaces ({chosen[1]} on {chosen[0]} and {address} on {name})"
        )
    if chosen is None:
        raise InvalidArgument(_NO_ADDRESS)
    return chosen[1]


def _candidates(interfaces: Interfaces) -> Iterator[tuple[str, Address]]:
    """Yield possible addresses of the machine: the IPv4 addresses of each interface, else its IPv6 addresses."""
    for name, interface in interfaces.items():
        if not interface.is_up or interface.is_loopback or interface.is_ours:
            continue
        usable = [
            address
            for address in interface.addresses
            if not (
                address.is_link_local or address.is_loopback or address.is_multicast or address.is_unspecified
            )
        ]
        preferred = [address for address in usable if address.version == 4] or usable
        yield from ((name, address) for address in preferred)


def _local(listen: Address, advertise: Address, interfaces: Interfaces) -> Address:
    """Return an address of this machine: the address where it listens, else the advertised one, else its only
    address.
    """
    if not listen.is_unspecified:
        return listen
    if any(advertise in interface.addresses for interface in interfaces.values()):
        return advertise
    try:
        return _system_address(interfaces)
    except InvalidArgument:
        raise InvalidArgument(_SAY_LISTEN) from None
