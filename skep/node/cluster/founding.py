"""Creates the first node of a new cluster.  Checks the settings, then makes identity, certificate and keys.

Source: moby, daemon/cluster/swarm.go (Init), noderunner.go (errors of a failed start).
"""

import errno
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec

from skep.agent.session.managers import KnownManager
from skep.api.errors import Untranslated
from skep.api.formats.gosyntax import parse_port
from skep.api.formats.swarm_requests import Endpoints, Founding
from skep.errors import InvalidArgument, Unavailable
from skep.model.networks.addresses import joined, next_port, parted
from skep.model.networks.reserved_ports import PEER_PORT, default_peer_addr, distant_peer_port
from skep.model.node import NodeRole
from skep.model.swarm import SwarmSpec
from skep.model.values.ids import ClusterId, IdSource, NodeId
from skep.model.values.times import SECOND_NS
from skep.node.cluster.local import LocalNode
from skep.security.authority import Authority
from skep.security.external import check_external_authorities
from skep.security.identity import NodeIdentity
from skep.security.keypair import KeyPair
from skep.security.keys import new_private_key, private_pem

_FREE_BYTES_MIN = 256 * 1024 * 1024
"""Free bytes that etcd needs at least.  Each of its first log files has 64 MiB."""
_CERT_EXPIRY_MIN_NS = 3600 * SECOND_NS
"""Source: swarmkit, ca/certificates.go (MinNodeCertExpiration)."""
_PEER_PORT_TRIES = 20
"""Number of ports that are tried for etcd before the command fails."""

_LISTEN_FAILED = "manager stopped: failed to listen on remote API address: listen tcp"
_REASONS = {
    errno.EADDRINUSE: "address already in use",
    errno.EADDRNOTAVAIL: "cannot assign requested address",
}


class NewCluster(msgspec.Struct, frozen=True, kw_only=True):
    """Data for the first manager of a new cluster.  ``root_key_pem`` is the key of the cluster's new authority."""

    plan: Founding
    root_key_pem: bytes


def found(plan: Founding, new_id: IdSource) -> tuple[LocalNode, KeyPair, bytes]:
    """Make the first node of a new cluster.

    Returns the node, its certificate, and the PEM key of the cluster's new authority.
    """
    node_id, cluster_id = NodeId(new_id()), ClusterId(new_id())
    authority = Authority.create()
    identity = NodeIdentity(node_id=node_id, cluster_id=cluster_id, role=NodeRole.MANAGER)
    node = sole_manager(identity, plan.endpoints)
    return node, key_pair(authority, identity, authority.root_pem), authority.key_pem


def sole_manager(identity: NodeIdentity, at: Endpoints) -> LocalNode:
    """Return the node that is the only manager of its cluster."""
    return moved(LocalNode(node_id=identity.node_id, cluster_id=identity.cluster_id, is_manager=True), at)


def key_pair(authority: Authority, identity: NodeIdentity, root_pem: bytes) -> KeyPair:
    """Make a key and its certificate.

    ``root_pem`` is the authority's root certificate, byte for byte as in the cluster.
    """
    key = new_private_key()
    certificate_pem = authority.issue(key.public_key(), identity)
    return KeyPair(certificate_pem=certificate_pem, key_pem=private_pem(key), root_pem=root_pem)


def moved(node: LocalNode, to: Endpoints) -> LocalNode:
    """Return a sole manager with other addresses."""
    return msgspec.structs.replace(
        node,
        listen_addr=to.listen_addr,
        advertise_addr=to.advertise_addr,
        local_addr=to.local_addr,
        data_path_addr=to.data_path_addr,
        managers=(KnownManager(node.node_id, to.advertise_addr),),
    )


def check_settings(spec: SwarmSpec) -> None:
    """Refuse settings with which the new manager could not start.  A value of 0 means the default.

    Raises: InvalidArgument, in Docker's words.
    """
    refused = "error updating cluster settings: rpc error: code = InvalidArgument desc ="
    if 0 != spec.ca_config.node_cert_expiry < _CERT_EXPIRY_MIN_NS:
        raise InvalidArgument(f"{refused} minimum certificate expiry time is: 1h0m0s")
    if spec.dispatcher.heartbeat_period < 0:
        raise InvalidArgument(f"{refused} heartbeat time period cannot be a negative duration")
    try:
        check_external_authorities(spec.ca_config)
    except InvalidArgument as error:
        raise InvalidArgument(f"error updating cluster settings: {error}") from error


def check_space(data_dir: Path) -> None:
    """Check for enough disk space.  Raises: Unavailable: a manager's store would soon be full."""
    free = shutil.disk_usage(data_dir).free
    if free < _FREE_BYTES_MIN:
        raise Unavailable(
            f"{data_dir} has {free // 1024**2} MiB left and a manager needs {_FREE_BYTES_MIN // 1024**2}: "
            "free some space and try again"
        )


def bind_error(addr: str) -> OSError | None:
    """Return why it is impossible to listen on ``addr`` (``ip:port``), or None if the port is free."""
    host, port = parted(addr)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
            probe.listen(1)
        except OSError as error:
            return error
    return None


def check_listening(
    listen_addr: str, peer_addr: str = "", refusal: Callable[[str], OSError | None] = bind_error
) -> None:
    """Check that the manager's ports are free, before anything is created.

    Args:
        peer_addr: ``:port`` or ``ip:port`` that the user chose for etcd's peers, or empty for any port.
        refusal: Returns why it is impossible to listen on ``ip:port``, or None.

    Raises: Untranslated: a port is not free, in Docker's words.
    """
    host, digits = parted(listen_addr)
    if parse_port(digits) is None:
        raise Untranslated(f"{_LISTEN_FAILED}: address {digits}: invalid port")
    if (error := refusal(listen_addr)) is not None:
        is_peers = int(digits) == PEER_PORT and error.errno == errno.EADDRINUSE
        hint = " (etcd of a manager at 2377 has it: choose a port from 2379 on)" if is_peers else ""
        raise Untranslated(
            f"{_LISTEN_FAILED} {joined(host, digits)}: bind: {_reason(error)}{hint}"
        ) from error
    if peer_addr:
        wanted = _completed(peer_addr, host)
        error = OSError(errno.EADDRINUSE, "") if wanted == listen_addr else refusal(wanted)
        if error is not None:
            raise Untranslated(
                f"manager stopped: etcd cannot listen for the other managers on {wanted} (peer-addr): bind: "
                f"{_reason(error)}: free the port, choose another, or leave the setting out"
            ) from error


def chosen_peer_addr(
    listen_addr: str, wanted: str, refusal: Callable[[str], OSError | None] = bind_error
) -> str:
    """Choose where a new manager's etcd listens for the other managers.

    Returns ``wanted``, else the default port, else the first free port among those 10,000 away, where no other manager
    of this machine listens.  If no port is free, returns the first candidate, so that etcd reports the error.

    Args:
        wanted: ``:port`` or ``ip:port``, or empty.
        refusal: Returns why it is impossible to listen on ``ip:port``, or None.
    """
    host, digits = parted(listen_addr)
    first = distant_peer_port(int(digits))
    distant = (joined(host, port) for port in range(first, first + _PEER_PORT_TRIES))
    candidates = list(dict.fromkeys((default_peer_addr(listen_addr), *distant)))
    if wanted:
        candidates.insert(0, _completed(wanted, host))
    usable = (one for one in candidates if one != listen_addr and refusal(one) is None)
    return next(usable, candidates[0])


def peer_warning(listen_addr: str, wanted: str, peer_addr: str) -> str:
    """Return a warning about an unusual peer port of etcd.

    Empty for the default port and the port of earlier versions.
    """
    port = parted(peer_addr)[1]
    if wanted and peer_addr != _completed(wanted, parted(listen_addr)[0]):
        return (
            f"peer-addr {wanted.removeprefix(':')} is not used: etcd of this manager listens for the other managers on "
            f"{peer_addr}, as when it became one (demote it and promote it again to change that)"
        )
    if peer_addr not in (default_peer_addr(listen_addr), next_port(listen_addr)):
        return (
            f"the other managers reach etcd of this manager at TCP port {port}: firewalls have to let it pass"
        )
    return ""


def _completed(peer_addr: str, host: str) -> str:
    own, port = parted(peer_addr)
    return joined(own or host, port)


def _reason(error: OSError) -> str:
    return _REASONS.get(error.errno or 0, error.strerror or str(error))
