"""Validation of a network's spec.

Docker's managers check subnets and options only during the allocation.  A network that cannot be allocated stays
without addresses, and shows no error.  Skep checks as much as possible at once, and refuses with the texts of Docker's
allocator, drivers or command.

Source: swarmkit, manager/controlapi/network.go; moby, libnetwork/drivers/overlay (mtu), ovmanager (vxlan ids),
cli/command/network/create.go (auxiliary addresses, overlaps within a network).
"""

from collections.abc import Sequence
from ipaddress import ip_interface
from itertools import combinations

from skep.api.formats.networks import PREDEFINED_LABEL
from skep.errors import InvalidArgument, PermissionDenied, Unimplemented
from skep.manager.control.validation.names import check_dns_name
from skep.model.network import MTU_OPTION, MTUS, IPAMConfig, NetworkSpec, subnet_of
from skep.model.networks.addresses import Address, is_subnet, parsed
from skep.model.networks.attaching import ATTACH_LABEL, attach_constraints
from skep.model.networks.data_planes import PLANE_OPTION, PLANES, why_reserved
from skep.model.networks.overlays import VXLAN_ID_MAX, VXLAN_OPTION, is_number
from skep.model.networks.routes import Subnet, overlap
from skep.model.values.meta import Driver

SUBNETS_MAX = 64
"""Largest number of subnets of one network."""
_DRIVERS = frozenset({"overlay", "macvlan", "bridge", "ipvlan", "host"})
_MTU_MIN = 576
"""Smallest MTU of an IPv4 network (RFC 791)."""
_MTU_MIN_6 = 1280
"""Smallest MTU of an IPv6 network (RFC 8200)."""


def check_network_spec(spec: NetworkSpec) -> None:
    """Refuse specs that cannot work.  Raises: InvalidArgument, PermissionDenied, Unimplemented."""
    driver = spec.driver_configuration
    if spec.ingress and driver is not None and driver.name != "overlay":
        raise Unimplemented("only overlay driver is currently supported for ingress network")
    if spec.attachable and spec.ingress:
        raise InvalidArgument("ingress network cannot be attachable")
    check_dns_name(spec.name)
    if PREDEFINED_LABEL in spec.labels:
        raise PermissionDenied(
            f"label {PREDEFINED_LABEL} is for internally created predefined networks and cannot be applied by users"
        )
    if driver is not None:
        _check_driver(driver, spec)
    _check_plane(spec)
    if (wanted := spec.labels.get(ATTACH_LABEL)) is not None:
        attach_constraints(wanted)
    if spec.ipam_options is not None:
        _check_ipam_driver(spec.ipam_options.driver)
        check_subnets(spec.ipam_options.configs)


def check_subnets(configs: Sequence[IPAMConfig]) -> None:
    """Refuse invalid or overlapping subnets of one network.  Raises: InvalidArgument."""
    if len(configs) > SUBNETS_MAX:
        raise InvalidArgument(f"ipam configuration: more than {SUBNETS_MAX} subnets")
    for config in configs:
        _check_subnet(config)
    for one, other in combinations(configs, 2):
        if overlap(subnet_of(one), subnet_of(other)):
            raise InvalidArgument("multiple overlapping subnet configuration is not supported")


def _check_driver(driver: Driver, spec: NetworkSpec) -> None:
    if not driver.name:
        raise InvalidArgument("driver name: if driver is specified name is required")
    if driver.name not in _DRIVERS:
        raise InvalidArgument(f"error during lookup of plugin {driver.name}")
    if driver.name != "overlay":
        return
    mtu = driver.options.get(MTU_OPTION)
    if mtu is not None:
        _check_mtu(mtu, _MTU_MIN_6 if spec.ipv6_enabled else _MTU_MIN)
    for word in driver.options[VXLAN_OPTION].split(",") if VXLAN_OPTION in driver.options else ():
        if not is_number(word) or not 0 < int(word) <= VXLAN_ID_MAX:
            raise InvalidArgument(f"invalid vxlan id value {_quoted(word)} passed")


def _check_mtu(word: str, least: int) -> None:
    if not is_number(word.removeprefix("-")):
        raise InvalidArgument(
            f"failed to parse {word}: strconv.Atoi: parsing {_quoted(word)}: invalid syntax"
        )
    if int(word) not in range(least, MTUS.stop):
        raise InvalidArgument(f"invalid MTU value: {word}")


def _check_plane(spec: NetworkSpec) -> None:
    named = (
        spec.labels.get(PLANE_OPTION),
        spec.driver_configuration and (spec.driver_configuration.options.get(PLANE_OPTION)),
    )
    for plane in named:
        if plane is not None and plane not in PLANES:
            raise InvalidArgument(f"{PLANE_OPTION} is docker or skep, not {plane!r}")


def _check_ipam_driver(driver: Driver) -> None:
    if not driver.name:
        raise InvalidArgument("driver name: if driver is specified name is required")
    if driver.name.lower() != "default":
        raise InvalidArgument(f"error during lookup of plugin {driver.name}")


def _check_subnet(config: IPAMConfig) -> None:
    if not is_subnet(config.subnet):
        raise InvalidArgument(f"ipam configuration: invalid subnet {config.subnet}")
    subnet = subnet_of(config)
    if subnet.is_multicast or subnet.is_loopback or subnet.network_address.is_unspecified:
        raise InvalidArgument(f"ipam configuration: invalid subnet {config.subnet}")
    if reason := why_reserved(subnet):
        raise InvalidArgument(f"ipam configuration: subnet {config.subnet} {reason}")
    if subnet.num_addresses < 4:
        raise InvalidArgument(f"ipam configuration: subnet {config.subnet} has no addresses for containers")
    if config.range:
        _check_range(config, subnet)
    if config.gateway:
        try:
            gateway = parsed(config.gateway)
        except ValueError:
            raise InvalidArgument(f"ipam configuration: invalid gateway {config.gateway}") from None
        if gateway not in subnet:
            raise InvalidArgument(
                f"ipam configuration: subnet {config.subnet} does not contain gateway {config.gateway}"
            )
    _check_auxiliary(config, subnet)


def _check_range(config: IPAMConfig, subnet: Subnet) -> None:
    try:
        parsed(config.range.partition("/")[0])
        inner = ip_interface(config.range)
    except ValueError:
        raise InvalidArgument(f"ipam configuration: invalid range {config.range}") from None
    if inner.ip not in subnet or inner.network.prefixlen < subnet.prefixlen:
        raise InvalidArgument(
            f"ipam configuration: subnet {config.subnet} does not contain range {config.range}"
        )


def _check_auxiliary(config: IPAMConfig, subnet: Subnet) -> None:
    if len(config.auxiliary_addresses) > 1024:
        raise InvalidArgument("ipam configuration: more than 1024 auxiliary addresses")
    gateway = parsed(config.gateway) if config.gateway else None
    for name, text in config.auxiliary_addresses.items():
        try:
            address: Address | None = parsed(text)
        except ValueError:
            address = None
        if address is None or address not in subnet:
            raise InvalidArgument(f"no matching subnet for aux-address {text}")
        if address == gateway:
            raise InvalidArgument(
                f"failed to allocate secondary ip address ({name}:{text}): Address already in use"
            )


def _quoted(word: str) -> str:
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
