"""The store on etcd: a supervised member, and everything this manager asks of it.

::

    binary = find_binary(configured)
    async with Member(settings, binary, clock, Backoff()).running():
        await initialize(socket, wrapping_key, clock, found_cluster, ...)  # the first manager, once
        async with open_store(socket, node_id, wrapping_key, clock) as store:
            ...
"""

from skep.store.etcd.binary import find_binary
from skep.store.etcd.cipher import load_wrapping_key, new_wrapping_key, save_wrapping_key
from skep.store.etcd.flags import MemberSettings, PeerFiles
from skep.store.etcd.founding import Unfinished, initialize
from skep.store.etcd.member import Member, MemberFailed, MemberRemoved
from skep.store.etcd.store import EtcdStore, open_store

__all__ = [
    "EtcdStore",
    "Member",
    "MemberFailed",
    "MemberRemoved",
    "MemberSettings",
    "PeerFiles",
    "Unfinished",
    "find_binary",
    "initialize",
    "load_wrapping_key",
    "new_wrapping_key",
    "open_store",
    "save_wrapping_key",
]
