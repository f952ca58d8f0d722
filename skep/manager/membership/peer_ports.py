"""Whether the etcds of two managers can connect to each other, in both directions.

A firewall that allows the manager's port but not etcd's peer port leaves a joining manager without its vote.
"""

import asyncio
import os
from collections.abc import Sequence

from skep.model.networks.addresses import parted
from skep.store.etcd.peers import EtcdPeer

CONNECT_S = 1.5
"""Timeout in seconds of a connection, shorter than the deadline of the caller that waits for the result."""


async def connect_error(addr: str) -> str:
    """Try a connection to ``ip:port``.  Returns why it fails, or an empty string."""
    host, port = parted(addr)
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(host, int(port))
    except TimeoutError:
        return "no response"
    except OSError as error:
        return os.strerror(error.errno).lower() if error.errno else str(error)
    writer.close()
    return ""


async def unreachable_peers(peers: Sequence[EtcdPeer], own: str) -> str:
    """Return which ``peers`` this machine cannot reach, and why, or an empty string.  ``own`` is its member's name."""
    addrs = [peer.peer_addr for peer in peers if peer.name != own and peer.peer_addr]
    errors = await asyncio.gather(*map(connect_error, addrs))
    closed = [f"{addr} (etcd's peers): {error}" for addr, error in zip(addrs, errors, strict=True) if error]
    return (
        f"this manager cannot reach {', '.join(closed)}: open these ports in the firewall" if closed else ""
    )
