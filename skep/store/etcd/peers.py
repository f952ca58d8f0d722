"""The peers of this manager's etcd, and the private hosts file that resolves their names.

Peers are named by node id (``https://<node id>:2378``), not by address, so addresses may change.  A hosts file, which
is mounted on ``/etc/hosts`` for this manager's etcd only, resolves the names.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec

from skep.errors import FailedPrecondition
from skep.linux.files import is_no_file, replace_file
from skep.model.networks.addresses import is_address, joined, parted

MEMBERS_FILE = "members.json"
HOSTS_FILE = "hosts"

_NAME = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_HEAD = "127.0.0.1 localhost\n::1 localhost\n"


class EtcdPeer(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A member of etcd's cluster.

    Attributes:
        name: Its node's id.
        url: Its URL in raft's membership.
        ip: The address of the name.
        manager_port: Port of its manager. 0 means that it is unknown, and the port just below the URL's is assumed.
    """

    name: str
    url: str
    ip: str
    manager_port: int = 0

    @property
    def manager_addr(self) -> str:
        """``ip:port`` of its manager.  Empty if unknown."""
        _, port = parted(self.url)
        manager_port = self.manager_port or (int(port) - 1 if port.isdecimal() else 0)
        return joined(self.ip, manager_port) if self.ip and manager_port else ""

    @property
    def peer_addr(self) -> str:
        """``ip:port`` of its peer port.  Empty if unknown."""
        _, port = parted(self.url)
        return joined(self.ip, port) if self.ip and port.isdecimal() else ""


def peer_url(name: str, port: int) -> str:
    """Return the URL of a member's peer port.  It contains the member's name, so that its address may change."""
    return f"https://{name}:{port}"


def hosts_content(peers: Iterable[EtcdPeer]) -> bytes:
    """Return the hosts file for ``peers``, without entries whose name or address is invalid."""
    lines = sorted(
        {f"{peer.ip} {peer.name}\n" for peer in peers if is_address(peer.ip) and _NAME.fullmatch(peer.name)}
    )
    return (_HEAD + "".join(lines)).encode()


def write_hosts(directory: Path, peers: Iterable[EtcdPeer]) -> None:
    """Write the hosts file. etcd reads it again within 5 s, or at once for a name that it has not resolved yet.

    The file is bind-mounted in etcd's namespace, so it is written in place: a new file would not be visible there.
    """
    content = hosts_content(peers)
    descriptor = os.open(directory / HOSTS_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if os.pread(descriptor, len(content) + 1, 0) != content:
            os.pwrite(descriptor, content, 0)
            os.ftruncate(descriptor, len(content))
    finally:
        os.close(descriptor)


def save_peers(directory: Path, peers: Iterable[EtcdPeer]) -> None:
    """Store ``peers`` for the next start, and write the hosts file."""
    known = sorted(peers)
    if load_peers(directory) != tuple(known):
        replace_file(
            directory / MEMBERS_FILE, msgspec.json.format(msgspec.json.encode(known), indent=2) + b"\n"
        )
    write_hosts(directory, known)


def load_peers(directory: Path) -> tuple[EtcdPeer, ...]:
    """Return the last stored peers.  Empty if this member is the only one, or has not joined yet.

    Raises:
        FailedPrecondition: The file is damaged.
        OSError: The file cannot be read now.
    """
    path = directory / MEMBERS_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=tuple[EtcdPeer, ...])
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and not is_no_file(error):
            raise
        raise FailedPrecondition(
            f"{path} cannot be read ({error}): remove this manager from the swarm and join it again"
        ) from error
