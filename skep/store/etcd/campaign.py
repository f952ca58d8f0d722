"""A single voter elects itself at once, instead of when its patience with a leader has run out.

Raft's library has a call for it, which SwarmKit uses and etcd does not pass on.  But a member takes raft messages from
members, and one of them says *stand for election now*: a leader that hands over sends it.  A manager has what a member
proves itself with, so it sends that message to its own member, as from itself.

So a single member can have the timers of several from the beginning, without waiting half a second for them at each
start; with timers of its own it would have to be restarted when a second manager comes in.  Among several voters
nobody does this, though it would do no harm: elections are raft's, and this only says when.

Source: etcd 3.5, server/etcdserver/api/rafthttp/{http,peer}.go; raft/raft.go (stepFollower, MsgTimeoutNow).
"""

import asyncio
import http.client
import socket
import ssl

import msgspec

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import Unavailable
from skep.model.addresses import from_here, parted
from skep.security.tls import MANAGER_NAME
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.flags import MemberSettings

ANSWER_S = 1.0
OLDEST_PEER = "3.0.0"
"""Of a peer that this one says to understand."""


class _Listed(msgspec.Struct):
    """A member as the peer port lists it; of no interest but for its id."""

    id: int
    name: str = ""


async def campaign(settings: MemberSettings, version: tuple[int, int, int], clock: Clock) -> None:
    """Ask the member to stand for election again and again until cancelled: it may not be up to it yet.

    One that leads already, or has not taken in its log, does nothing.  What fails is tried again, without end: the
    member's own timers come to the same.
    """
    backoff = Backoff(0.005, 0.2)
    while True:
        try:
            await asyncio.to_thread(ask_once, settings, version)
        except Unavailable:
            pass  # it does not listen yet, or its certificate has expired
        await backoff.sleep(clock)


def ask_once(settings: MemberSettings, version: tuple[int, int, int]) -> None:
    """Ask the member once; blocks for as long as it answers.  Raises: Unavailable: it does not."""
    host, port = parted(from_here(settings.peer_listen))
    try:
        with (
            socket.create_connection((host, int(port)), ANSWER_S) as plain,
            _context(settings).wrap_socket(plain, server_hostname=MANAGER_NAME) as connection,
        ):
            peer = http.client.HTTPConnection(settings.name)
            peer.sock = connection
            cluster, own = _listed(peer, settings.name)
            message = pb.RaftMessage(type=pb.RaftMessage.TIMEOUT_NOW, to=own, sender=own)
            headers = {
                "X-Etcd-Cluster-ID": cluster,
                "X-Server-Version": ".".join(map(str, version)),
                "X-Min-Cluster-Version": OLDEST_PEER,
            }
            peer.request("POST", "/raft", message.SerializeToString(), headers)
            _answered(peer)
    except (
        OSError,
        http.client.HTTPException,
        msgspec.DecodeError,
        UnicodeDecodeError,
    ) as error:  # TLS errors are OSErrors
        raise Unavailable(f"the member does not answer at its peer port: {error}") from error


def _listed(peer: http.client.HTTPConnection, name: str) -> tuple[str, int]:
    """The id of the cluster, as its members write it in a header, and the member's own."""
    peer.request("GET", "/members")
    answer, body = _answered(peer)
    members = msgspec.json.decode(body, type=list[_Listed])
    if len(members) != 1:
        raise Unavailable(f"{name} is not alone")
    return answer.headers.get("X-Etcd-Cluster-Id", ""), members[0].id


def _answered(peer: http.client.HTTPConnection) -> tuple[http.client.HTTPResponse, bytes]:
    answer = peer.getresponse()
    body = answer.read()
    if answer.status >= 300:
        raise Unavailable(f"{answer.status} {body.decode(errors='replace').strip()}")
    return answer, body


def _context(settings: MemberSettings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(settings.peer_files.roots)
    context.load_cert_chain(settings.peer_files.certificate, settings.peer_files.key)
    return context
