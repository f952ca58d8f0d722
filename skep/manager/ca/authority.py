"""The cluster's certificate authority, from the store."""

from skep.errors import FailedPrecondition
from skep.manager.cluster import cluster_of
from skep.model.swarm import Swarm
from skep.security.authority import Authority
from skep.store.interface import View
from skep.store.kinds import NEXT_ROOT_KEY_ID, ROOT_KEY_ID, Payload


def root_bundle_of(swarm: Swarm) -> bytes:
    """Return the roots to trust in PEM.  Join tokens carry the digest of exactly these bytes."""
    return swarm.tls_info.trust_root.encode()


def authority_of(view: View) -> Authority:
    """Return the current authority.  Once a rotation starts, it is the new root's.

    Raises:
        FailedPrecondition: Its key is missing or belongs to another root.
    """
    swarm = cluster_of(view)
    rotation = swarm.rotation
    key = view.lookup(Payload, NEXT_ROOT_KEY_ID if rotation else ROOT_KEY_ID)
    if key is None:
        raise FailedPrecondition(
            "no certificate can be signed: an external CA has the key of the root, and none is configured for it"
        )
    if rotation is None:
        return Authority.load(key.data, root_bundle_of(swarm))
    return Authority.load(key.data, rotation.root.encode(), intermediate_pem=rotation.cross_signed.encode())
