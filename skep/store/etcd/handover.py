"""Raft's leadership moves away from this machine's member, from outside of the manager beside it.

etcd lets only the leader's own member hand over, and a manager that hangs does not ask it to: who watches the manager
does, over the member's socket.
"""

from pathlib import Path

import structlog

from skep.errors import Unavailable
from skep.store.etcd.client import Client
from skep.store.etcd.membership import parsed_members

log = structlog.get_logger()

MOVE_S = 2.0
"""For one successor to catch up and to be elected."""


async def hand_over(socket: Path) -> bool:
    """Have another voter lead, if this member leads; gives whether one does now.  Raises: Unavailable."""
    async with Client(socket) as client:
        status = await client.status()
        if status.leader != status.header.member_id:
            return False
        members = parsed_members((await client.members()).members)
        for member in members:
            if member.id == status.leader or member.is_learner or not member.has_started:
                continue
            try:
                await client.move_leader(member.id, timeout_s=MOVE_S)
            except Unavailable as error:
                log.warning("leadership not taken", to=member.name, reason=str(error))
            else:
                log.warning("leadership handed over", to=member.name)
                return True
    return False
