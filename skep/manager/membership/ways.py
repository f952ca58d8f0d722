"""Whether the etcds of two managers reach each other: each of a new one and one that is there opens connections.

A firewall that lets the manager's port pass and not the peer port leaves a manager that comes in without its vote.
"""

import asyncio
import os
from collections.abc import Sequence

from skep.model.addresses import parted
from skep.store.etcd.peers import Peer

CONNECT_S = 1.5
"""For a connection; a manager looks before the one that it answers gives up waiting."""


async def connect_error(addr: str) -> str:
    """Why ``ip:port`` takes no connection; empty: it does."""
    host, port = parted(addr)
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(host, int(port))
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return os.strerror(error.errno).lower() if error.errno else str(error)
    writer.close()
    return ""


async def closed_ways(peers: Sequence[Peer], own: str) -> str:
    """Which of ``peers`` the machine of ``own``, a member's name, does not reach, and why; empty: it reaches all."""
    addrs = [peer.peer_addr for peer in peers if peer.name != own and peer.peer_addr]
    errors = await asyncio.gather(*map(connect_error, addrs))
    closed = [f"{addr} (etcd's peers): {error}" for addr, error in zip(addrs, errors, strict=True) if error]
    return f"this manager cannot reach {', '.join(closed)}: open the way there" if closed else ""
