"""Leader election.  The manager whose member is raft's leader leads once it has written the leader key.

The revision of that write is the fence of its term.  If the write gets no response, the manager reads the key and
compares its nonce.  The record contains raft's term, so that a manager whose member was suspended cannot take the key
back.  If the member does not respond to a status request, that proves nothing, because a defragmentation blocks it for
seconds.  Only another raft leader or a failed fence ends a term.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from secrets import token_hex

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock, until_tick
from skep.errors import Unavailable
from skep.model.values.ids import NodeId
from skep.store import keys
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.client import AdaptiveTimeout, EtcdClient, nested
from skep.store.etcd.encryption.cipher import Cipher
from skep.store.etcd.errors import Uncertain
from skep.store.etcd.requests import change_of, compared_leader, compared_ring, etcd_key
from skep.store.leadership import LeaderRecord, TermState

log = structlog.get_logger()

CANDIDATE_POLL_S = 0.15
"""Seconds between two requests of a follower to its own member for the leader.  On average, half of it adds to a
failover.

Twenty polls per second were half of the idle cost of a manager and its member.
"""

LEADER_POLL_S = 0.5
"""Seconds between these requests on the leader.  Until it notices that it has lost leadership, the fence refuses its
writes.
"""

LEADER_POLL_ALONE_S = 5.0
"""Seconds between these requests on a single member, which cannot lose leadership to another one."""

NONCE_BYTES = 16
"""Random bytes that no other candidate chooses."""


class Election:
    """One manager's candidacy.  ``win_terms`` yields its terms."""

    def __init__(
        self,
        client: EtcdClient,
        cipher: Cipher,
        node_id: NodeId,
        addr: str,
        clock: Clock,
        is_only_member: Callable[[], bool],
    ) -> None:
        self._client = client
        self._cipher = cipher
        self._node_id = node_id
        self._addr = addr
        self._clock = clock
        self._is_only_member = is_only_member
        self._nonce = ""
        """Nonce of a write of the leader key that got no response.  Empty otherwise."""
        self._timeout = AdaptiveTimeout()

    async def win_terms(self, backoff: Backoff) -> AsyncIterator[TermState]:
        """Yield a term when this manager has become leader, and end it when leadership is lost.

        The caller must request the next term at once, because the current one is only monitored then.
        """
        term: TermState | None = None
        while True:
            try:
                status = await self._client.status()
                is_ours = status.leader == status.header.member_id and status.leader != 0
                if term is not None and (not is_ours or term.is_lost):
                    log.info("leadership lost", term=term.number)
                    term.lose()
                    term = None
                if is_ours and term is None:
                    term = await self._claim(status.raft_term)
                    if term is not None:
                        log.info("leadership won", term=term.number)
                        yield term
                backoff.reset()
            except Unavailable as error:
                log.debug("election delayed", reason=str(error))
                await backoff.sleep(self._clock)
                continue
            await self._pause(term)

    async def _pause(self, term: TermState | None) -> None:
        """Wait for the next poll.  A term that a failed fence has ended is replaced at once."""
        if term is None:
            await self._clock.sleep(CANDIDATE_POLL_S)
            return
        with suppress(TimeoutError):
            period_s = LEADER_POLL_ALONE_S if self._is_only_member() else LEADER_POLL_S
            async with asyncio.timeout(until_tick(self._clock.monotonic(), period_s)):
                await term.wait_lost()

    async def _claim(self, raft_term: int) -> TermState | None:
        """Write the leader key, unless its record has a later raft term, or is another manager's of the same term."""
        name = etcd_key(keys.LEADER)
        read = await self._client.range(pb.RangeRequest(key=name))
        seen = 0
        if read.kvs:
            seen = read.kvs[0].mod_revision
            change = change_of(read.kvs[0], self._cipher)
            if change is not None and change.value is not None:
                record = msgspec.json.decode(change.value, type=LeaderRecord)
                if self._nonce and record.nonce == self._nonce and record.term == raft_term:
                    return self._won(seen)
                if record.term > raft_term or (record.term == raft_term and record.node != self._node_id):
                    self._nonce = ""
                    return None
        self._nonce = self._nonce or token_hex(NONCE_BYTES)
        record = LeaderRecord(node=self._node_id, addr=self._addr, term=raft_term, nonce=self._nonce)
        began = self._clock.monotonic()
        try:
            reply = await self._client.txn(
                self._claim_request(name, record, seen), timeout_s=self._timeout.seconds
            )
        except Uncertain:
            self._timeout.expired()
            raise
        self._timeout.responded(self._clock.monotonic() - began)
        return self._won(reply.header.revision) if reply.succeeded else None

    def _claim_request(self, name: bytes, record: LeaderRecord, seen: int) -> pb.TxnRequest:
        value = self._cipher.encrypt(name, msgspec.json.encode(record))
        return pb.TxnRequest(
            compare=[compared_leader(seen), compared_ring(self._cipher.ring_revision)],
            success=[nested(pb.RequestOp(request_put=pb.PutRequest(key=name, value=value)))],
        )

    def _won(self, revision: int) -> TermState:
        self._nonce = ""
        return TermState(number=revision, fence=revision)
