"""Transfers raft's leadership away from this machine's member, from outside its manager.

Only the leading member can transfer leadership, and a hung manager does not request it.  Therefore the manager's
supervisor requests it, over the member's socket.
"""

from pathlib import Path

import structlog

from skep.errors import Unavailable
from skep.store.etcd.client import EtcdClient
from skep.store.etcd.membership import parsed_members

log = structlog.get_logger()

MOVE_S = 2.0
"""Timeout for one successor to catch up and be elected."""


async def hand_over(socket: Path) -> bool:
    """If this member leads, transfer leadership to another voter.  Returns whether it did.  Raises Unavailable."""
    async with EtcdClient(socket) as client:
        status = await client.status()
        if status.leader != status.header.member_id:
            return False
        members = parsed_members((await client.members()).members)
        voters = [
            member
            for member in members
            if member.id != status.leader and not member.is_learner and member.has_started
        ]
        # Start with another voter in each term, in case the previous one has returned leadership.
        first = status.raft_term % len(voters) if voters else 0
        for member in [*voters[first:], *voters[:first]]:
            try:
                await client.move_leader(member.id, timeout_s=MOVE_S)
            except Unavailable as error:
                log.warning("leadership transfer failed", to=member.name, reason=str(error))
            else:
                log.warning("leadership transferred", to=member.name)
                return True
    return False
