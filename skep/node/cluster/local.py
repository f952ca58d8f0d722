"""``node.json``: this node as a member of its cluster.

It is written last when joining and removed first when leaving.
"""

from pathlib import Path

import msgspec

from skep.agent.session.managers import KnownManager
from skep.errors import FailedPrecondition, Unavailable
from skep.linux.files import is_no_file, replace_file
from skep.model.networks.addresses import from_here
from skep.model.values.ids import ClusterId, NodeId


class LocalNode(msgspec.Struct, frozen=True, kw_only=True):
    """This node as a member of its cluster.  Addresses are ``host:port``."""

    node_id: NodeId
    cluster_id: ClusterId
    is_manager: bool
    listen_addr: str = ""
    advertise_addr: str = ""
    local_addr: str = ""
    """An address of this machine, without a port."""
    data_path_addr: str = ""
    managers: tuple[KnownManager, ...] = ()
    """The managers to try after a restart, from the last list that the node received."""

    def reach(self, peer: KnownManager) -> str:
        """Return the address at which this node reaches a manager.

        Its own manager is reached at the local listen address: behind address translation, a machine may not reach
        itself at the address that others use.
        """
        if peer.node_id != self.node_id or not self.listen_addr:
            return peer.addr
        return from_here(self.listen_addr)


def read_local_node(path: Path) -> LocalNode | None:
    """Return the content of ``node.json``, or None outside of a cluster.

    Raises: FailedPrecondition: it is damaged; Unavailable: it cannot be read at present.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=LocalNode)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and not is_no_file(error):
            raise Unavailable(f"{path} cannot be read: {error.strerror}") from error
        raise FailedPrecondition(
            f"{path} cannot be read ({error}): restore it, or docker swarm leave --force and join again"
        ) from error


def write_local_node(path: Path, node: LocalNode) -> None:
    """Replace ``node.json`` atomically."""
    replace_file(path, msgspec.json.format(msgspec.json.encode(node), indent=2) + b"\n")
