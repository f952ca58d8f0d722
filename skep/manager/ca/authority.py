"""The cluster's certificate authority, as the store has it."""

from skep.errors import FailedPrecondition
from skep.model.ids import ClusterId
from skep.model.swarm import Swarm
from skep.security.authority import Authority
from skep.store.interface import View
from skep.store.kinds import Payload

ROOT_KEY_ID = "root-ca"
"""Id of the payload that holds the root's private key (PEM)."""


def cluster_of(view: View) -> Swarm:
    """The cluster object.  Raises: FailedPrecondition: this store holds no cluster yet."""
    swarms = view.find(Swarm)
    if not swarms:
        raise FailedPrecondition("this node is not part of a swarm")
    return swarms[0]


def root_bundle_of(swarm: Swarm) -> bytes:
    """The roots to trust (PEM); join tokens carry the digest of exactly these bytes."""
    return swarm.tls_info.trust_root.encode()


def authority_of(view: View) -> Authority:
    """The authority that signs now.  Raises: FailedPrecondition: its key is missing or another root's."""
    swarm = cluster_of(view)
    key = view.lookup(Payload, ROOT_KEY_ID)
    if key is None:
        raise FailedPrecondition("this cluster's root key is not in the store")
    return Authority.load(key.data, root_bundle_of(swarm))


def cluster_id_of(view: View) -> ClusterId:
    return cluster_of(view).id
